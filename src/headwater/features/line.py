"""A straight line through a gradient field, and what is seen of a function along it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headwater.errors import NotFinite
from headwater.features.quadrature import Rule

Field = Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, tuple[Tensor, ...]]]
"""``(points, rows) -> (f (m,), gradients like points)``: m path points, each of the example whose number stands in ``rows`` (m,)."""


@dataclass(frozen=True)
class Probed:
    """A gradient field that can also be asked for f alone, which is cheaper. ``slopes``: the field; ``value``: ``(points, rows) -> f (m,)``."""

    slopes: Field
    value: Callable[[tuple[Tensor, ...], Tensor], Tensor]

    def __call__(self, points: tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.slopes(points, rows)


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
