"""The loop: a gradient field, two ends, and a table of nodes become attributions. Memory does not grow with the number of nodes.

Along the straight line from b to x, with d = x - b and f the scalar that is explained (Sundararajan, Taly, Yan 2017, arXiv 1703.01365),

    phi_j = d_j * integral of df/dx_j (b + t d) dt over t from 0 to 1,          sum of phi = f(x) - f(b).

Every gradient evaluation gives f at its node for nothing, and the slope D = <gradient, d> of f along the line. ``Settings.rule`` integrates
with a fixed table, ``adaptive`` with as few nodes as each example needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headwater.features.adaptive import adaptive
from headwater.features.line import Field, Integral, Line, check_finite, unseen
from headwater.features.quadrature import Rule, gauss_legendre, midpoint


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


TOGETHER = 4  # gradients summed in their own precision before they join the float64 sum


def along_line(line: Line, settings: Settings) -> Integral:
    """Integrate along a straight line: by the rule as it is, or adaptively where there is a tolerance."""
    if settings.tolerance is not None:
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


def _wide(x: Tensor) -> torch.dtype:
    """Sums are kept in float64, where the device has it."""
    return torch.float32 if x.device.type == "mps" else torch.float64
