"""The loop: a gradient field, two ends, and a table of nodes become attributions. Memory does not grow with the number of nodes.

Along the straight line from b to x, with d = x - b and f the scalar that is explained (Sundararajan, Taly, Yan 2017, arXiv 1703.01365),

    phi_j = d_j * integral of df/dx_j (b + t d) dt over t from 0 to 1,          sum of phi = f(x) - f(b).

Every gradient evaluation gives f at its node for nothing, and the slope D = <gradient, d> of f along the line. ``Settings.rule`` integrates
with a fixed table. ``adaptive`` does with as few nodes as each example needs; it is the only place that looks between nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater.errors import NotFinite
from headwater.features.quadrature import Rule, gauss_legendre, midpoint

Field = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, tuple[Tensor, ...]]]
"""``(points, rows) -> (f (m,), gradients like points)``: m path points, each of the example whose number stands in ``rows`` (m,)."""


@dataclass(frozen=True)
class Probed:
    """A gradient field that can also be asked for f alone, which is cheaper. ``slopes``: the field; ``value``: ``(points, rows) -> f (m,)``."""

    slopes: Field
    value: Callable[[tuple[Tensor, ...], Tensor], Tensor]

    def __call__(self, points: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.slopes(points, rows)


@dataclass(frozen=True)
class Settings:
    """How to integrate.

    Args:
        rule: the table of nodes and weights, where no tolerance is asked for.
        tolerance: relative, of the completeness residual and of the estimated error of the attributions; None: use the rule as it is.
        budget: evaluations that one example may cost when there is a tolerance.
        chunk: path points evaluated at once.
    """

    rule: Rule = field(default_factory=gauss_legendre)
    tolerance: float | None = None
    budget: int = 256
    chunk: int = 256


class Integral(NamedTuple):
    """What the loop gives for S examples: ``values`` like the points (float64), f at both ends, and what it took.

    ``error`` (S,): estimated ``|phi - exact| / |phi|`` (Euclidean); NaN where the path gives no means to estimate it. ``converged`` (S,)
    says whether the tolerance is met; all False where none was asked for.
    """

    values: tuple[Tensor, ...]
    start: Tensor
    end: Tensor
    evaluations: Tensor
    error: Tensor
    converged: Tensor

    @property
    def residual(self) -> Tensor:
        """Sum of values minus the change of f."""
        return sum((v.flatten(1).sum(1) for v in self.values), torch.zeros_like(self.start)) - (self.end - self.start)


class Line:
    """The straight line from ``b`` to ``x`` (tuples of tensors (S, ...)) through a gradient field, for the examples ``rows`` (S,)."""

    def __init__(self, f: Field, x: tuple[Tensor, ...], b: tuple[Tensor, ...], rows: Tensor, chunk: int) -> None:
        self.f, self.x, self.b, self.rows, self.chunk = f, x, b, rows, chunk
        self.value = f.value if isinstance(f, Probed) else lambda points, rows: f(points, rows)[0]
        self.d = tuple(at_least_single(p) - at_least_single(q) for p, q in zip(x, b, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """The points (m, ...) of examples ``s`` (m,) at ``t`` (m,). Exactly x at t = 1 and b at t = 0."""
        return tuple(_exact(t, x[s], _between(b[s], d[s], t, x.dtype)) for x, b, d in zip(self.x, self.b, self.d, strict=True))

    def grid(self, s: slice, t: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The points of all examples of a slice (S of them) at each of ``t`` (K,), node by node: (K S, ...); and their rows (K S,)."""
        points = []
        for x, b, d in zip(self.x, self.b, self.d, strict=True):
            share = t.to(d.dtype).view(-1, *(1,) * d.ndim)
            points.append(torch.addcmul(at_least_single(b[s]), share, d[s]).to(x.dtype).flatten(0, 1))
        return tuple(points), self.rows[s].repeat(len(t))

    def gradients(self, s: Tensor, t: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """f (m,) and its gradients there, all at once; raises NotFinite where f is not finite."""
        value, slopes = self.f(self.at(s, t), self.rows[s])
        check_finite(value, self.rows[s], t)
        return value.double(), slopes

    def ends(self) -> tuple[Tensor, Tensor]:
        """f at b and at x, both (S,)."""
        parts = [self.value(tuple(p[s] for p in side), self.rows[s]) for side in (self.b, self.x) for s in self._slices()]
        start, end = torch.cat(parts).detach().double().view(2, len(self))
        check_finite(start, self.rows, torch.zeros_like(start))
        check_finite(end, self.rows, torch.ones_like(end))
        return start, end

    def _slices(self) -> list[slice]:
        return [slice(k, min(k + self.chunk, len(self))) for k in range(0, len(self), self.chunk)]

    def products(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """f (m,), and gradient times d flattened over all inputs (m, F): what the exact integral is the mean of. Chunk by chunk."""
        values, products = [], []
        for part in torch.arange(len(s), device=s.device).split(self.chunk):
            value, slopes = self.gradients(s[part], t[part])
            values.append(value)
            products.append(torch.cat([(g * d[s[part]]).flatten(1) for g, d in zip(slopes, self.d, strict=True)], 1))
        return torch.cat(values), torch.cat(products)

    def unflatten(self, flat: Tensor) -> tuple[Tensor, ...]:
        """(S, F) back in the shapes of the inputs."""
        sizes = [d[0].numel() for d in self.d]
        return tuple(part.reshape(len(flat), *d.shape[1:]) for part, d in zip(flat.split(sizes, 1), self.d, strict=True))


TOGETHER = 4  # gradients summed in their own precision before they join the float64 sum


def along_line(line: Line, settings: Settings) -> Integral:
    """Integrate along a straight line: by the rule as it is, or adaptively where there is a tolerance."""
    if settings.tolerance is not None:
        from headwater.features.adaptive import adaptive

        return adaptive(line, settings.tolerance, settings.budget)
    return fixed(line, settings.rule)


def fixed(line: Line, rule: Rule) -> Integral:
    """One rule for all examples. Peak memory: one chunk of points with their graph, and one float64 accumulator."""
    start, end = line.ends()
    size, device = len(line), line.rows.device
    totals = tuple(torch.zeros(d.shape, dtype=_wide(d), device=d.device) for d in line.d)
    values, slopes = (torch.zeros(len(rule), size, dtype=torch.float64, device=device) for _ in range(2))
    t, weights = torch.from_numpy(rule.nodes).to(device), torch.from_numpy(rule.weights).to(device)
    at_once = min(len(rule), line.chunk, max(TOGETHER, line.chunk // size))
    block = max(1, line.chunk // at_once)
    for low in range(0, size, block):
        s = slice(low, min(low + block, size))
        for k in range(0, len(rule), at_once):
            nodes = slice(k, min(k + at_once, len(rule)))
            points, rows = line.grid(s, t[nodes])
            value, gradients = line.f(points, rows)
            check_finite(value, rows, t[nodes].repeat_interleave(s.stop - s.start))
            values[nodes, s] = value.view(nodes.stop - k, -1).double()
            for total, gradient, d in zip(totals, gradients, line.d, strict=True):
                g = gradient.reshape(nodes.stop - k, s.stop - s.start, -1).to(d.dtype)
                slopes[nodes, s] += torch.linalg.vecdot(g, d[s].flatten(1))
                # TOGETHER gradients at a time in their own precision, and these sums in float64
                for part, share in zip(g.split(TOGETHER), weights[nodes].to(d.dtype).split(TOGETHER), strict=True):
                    total[s] += (share @ part.flatten(1)).view(total[s].shape)
    found = tuple(total * d for total, d in zip(totals, line.d, strict=True))
    count = torch.full((size,), len(rule) + 2, dtype=torch.int64, device=device)
    error = unseen(rule, start, end, values, slopes)
    return Integral(found, start, end, count, error, torch.zeros(size, dtype=torch.bool, device=device))


SAFETY = 3.0  # how much larger the attributions' relative error may be than what is unseen along the line (piecewise linear networks)
SMOOTH = 30.0  # the same for smooth ones, on the square of it
ALIGNED = 0.7  # cosine from which what is unseen has the shape that a smooth function leaves


def unseen(rule: Rule, start: Tensor, end: Tensor, values: Tensor, slopes: Tensor) -> Tensor:
    """(S,) Estimated relative error of the attributions, from what the rule does not see of f along the line; NaN for rules that are not Gaussian.

    The polynomial through the slopes ``slopes`` (n, S) predicts how f changes from each node to the next; ``values`` (n, S) and the ends tell
    how it does. u is the root of the summed squares of the differences, over the whole way that f goes up and down: unlike the residual it
    cannot cancel. A piecewise linear f leaves differences of random sign, and the error is a small multiple of u. A smooth f leaves the shape
    of the nodal polynomial, and Gauss's rule converges twice as fast as the interpolation: its error is a multiple of u squared. Which of
    the two holds is read from the shape and the residual. ``benchmarks/explain_accuracy.py`` measures the estimate against the truth.
    """
    if rule.degree < len(rule):
        return torch.full_like(start, torch.nan)
    steps = torch.cat([start[None], values, end[None]]).diff(dim=0)
    gaps = torch.from_numpy(rule.gaps).to(slopes) @ slopes - steps
    way, size = steps.abs().sum(0).clamp_min(torch.finfo(torch.float64).tiny), gaps.square().sum(0).sqrt()
    u, residual = size / way, gaps.sum(0).abs() / way
    shape = torch.from_numpy(rule.shape).to(slopes)
    smooth = ((shape @ gaps).abs() >= ALIGNED * size) & (residual <= SMOOTH * u**2)
    return torch.where(smooth, torch.minimum(SMOOTH * u, torch.full_like(u, SAFETY)) * u, SAFETY * u)


# ---- paths that bend ---------------------------------------------------------------------------------------------------------------

Curve = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""``(s, t) -> points``: where examples ``s`` (m,) are at ``t`` (m,), from the baseline at 0 to the input at 1."""


def along_curve(f: Field, curve: Curve, rows: Tensor, settings: Settings, increments: Curve | None = None) -> Integral:
    """Integrate along any path: the gradient at each node times the increment of the path over the node's cell.

    ``increments``: of what the increments are taken, where the gradients that ``f`` gives are those of something that follows the path (a
    layer, for conductance); default: of the path itself.

    ``phi_j = sum over nodes of df/dx_j (gamma(t_k)) * (gamma_j(e_k+1) - gamma_j(e_k))``: increments telescope, so that a linear f is exact
    at any number of nodes; second order otherwise. A tolerance doubles the nodes of the examples that miss it.
    """
    moving = curve if increments is None else increments
    if settings.tolerance is None:
        return _curve(f, curve, moving, rows, settings.rule, settings.chunk)
    every = torch.arange(len(rows), device=rows.device)
    best = _curve(f, curve, moving, rows, midpoint(8), settings.chunk)
    spent, left, n = best.evaluations.clone(), every, 16
    while len(left) and int(spent[left].max()) + n <= settings.budget:
        finer = _curve(f, _of(curve, left), _of(moving, left), rows[left], midpoint(n), settings.chunk)
        spent[left] += n
        change = sum((a - b[left]).flatten(1).square().sum(1) for a, b in zip(finer.values, best.values, strict=True)).sqrt()  # type: ignore[union-attr]
        norm = sum(a.flatten(1).square().sum(1) for a in finer.values).sqrt()  # type: ignore[union-attr]
        for old, new in zip(best.values, finer.values, strict=True):
            old[left] = new
        best.error[left] = change / norm.clamp_min(torch.finfo(torch.float64).tiny)
        met = (best.error[left] <= settings.tolerance) & (finer.residual.abs() <= settings.tolerance * (finer.end - finer.start).abs())
        best.converged[left] = met
        left, n = left[~met], 2 * n
    return best._replace(evaluations=spent)


def _of(curve: Curve, chosen: Tensor) -> Curve:
    """The curves of some of the examples."""
    return lambda s, t: curve(chosen[s], t)


def _curve(f: Field, curve: Curve, moving: Curve, rows: Tensor, rule: Rule, chunk: int) -> Integral:
    size, device = len(rows), rows.device
    every = torch.arange(size, device=device)
    nodes, edges = torch.from_numpy(rule.nodes).to(device), torch.from_numpy(rule.edges).to(device)
    totals: list[Tensor] = []
    ends: list[list[Tensor]] = [[], []]
    for s in every.split(chunk):
        for which, t in enumerate((0.0, 1.0)):
            ends[which].append(_checked(f, curve(s, torch.full(s.shape, t, dtype=torch.float64, device=device)), rows[s], t)[0])
        parts: tuple[Tensor, ...] = ()
        before = moving(s, edges[0].expand(len(s)))
        for k in range(len(rule)):
            after = moving(s, edges[k + 1].expand(len(s)))
            _, gradients = _checked(f, curve(s, nodes[k].expand(len(s))), rows[s], float(nodes[k]))
            steps = tuple(g.double() * (q.double() - p.double()) for g, p, q in zip(gradients, before, after, strict=True))
            parts = tuple(a + b for a, b in zip(parts, steps, strict=True)) if parts else steps
            before = after
        totals = [torch.cat([a, b]) for a, b in zip(totals, parts, strict=True)] if totals else list(parts)
    start, end = (torch.cat(part).double() for part in ends)
    count = torch.full((size,), len(rule) + 2, dtype=torch.int64, device=device)
    return Integral(tuple(totals), start, end, count, torch.full_like(start, torch.nan), torch.zeros(size, dtype=torch.bool, device=device))


def _checked(f: Field, points: tuple[Tensor, ...], rows: Tensor, t: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    value, gradients = f(points, rows)
    check_finite(value, rows, torch.full(rows.shape, t, dtype=torch.float64))
    return value, gradients


# ---- small matters of precision ---------------------------------------------------------------------------------------------------


def check_finite(value: Tensor, rows: Tensor, t: Tensor) -> None:
    """Raise NotFinite, naming examples and places, unless all values are finite."""
    bad = ~torch.isfinite(value)
    if bad.any():
        who = sorted({int(r) for r in rows.to(bad.device)[bad].tolist()})
        shown = ", ".join(map(str, who[:8])) + (", ..." if len(who) > 8 else "")
        raise NotFinite(
            f"an output that is NaN or infinite on the path of example {shown}, {float(t.to(bad.device)[bad][0]):.3g} of the way from baseline to input",
            "finite outputs from the baseline to the input",
            "check the model there; a half-precision model may leave its range: explain model.float(), or choose a baseline nearer to the data",
        )


def at_least_single(x: Tensor) -> Tensor:
    """Half precision as float32, in which points between two ends are computed; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _between(b: Tensor, d: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.addcmul(at_least_single(b), t.to(d.dtype).view(-1, *(1,) * (d.ndim - 1)), d).to(dtype)


def _exact(t: Tensor, x: Tensor, point: Tensor) -> Tensor:
    """The input itself where t is 1, whatever rounding made of b + (x - b)."""
    return torch.where((t == 1).view(-1, *(1,) * (x.ndim - 1)), x, point)


def _wide(x: Tensor) -> torch.dtype:
    """Sums are kept in float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def norms(flat: Tensor) -> np.ndarray:
    """Euclidean norms of rows, in float64 on the CPU."""
    return flat.double().square().sum(-1).sqrt().cpu().numpy()
