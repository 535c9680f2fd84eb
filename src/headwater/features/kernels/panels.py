"""Bisection in panels of eight Gauss-Legendre points, for functions that are smooth but for a few sharp bends (a Matérn kernel's, near a point).

The panel with the largest gap between the integral of the slope and the change of f is halved, again and again: around an isolated kink the
error falls geometrically, where tangents or more points on the whole path gain a power of their number. The sum of the gaps bounds the
completeness residual, so the stop is a guarantee of that (not of the attributions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

Array = np.ndarray
Both = Callable[[Array, Array], tuple[Array, Array]]
"""(points (m, p), which example each belongs to (m,)) -> f (m,) and its gradients (m, p)."""

POINTS = 8
FIRST = 4
COST = FIRST * POINTS + FIRST + 1
"""Evaluations before the first bisection."""


@dataclass
class _Panels:
    """Pieces [low, high] of the paths ``rows``; f at their ends; attributions (panels, p) and their gap against the change of f."""

    rows: Array
    low: Array
    high: Array
    start: Array
    end: Array
    values: Array
    gap: Array

    def joined(self, other: _Panels, without: Array) -> _Panels:
        return _Panels(*(np.concatenate([np.delete(getattr(self, f.name), without, 0), getattr(other, f.name)]) for f in fields(self)))


def bisected(both: Both, x: Array, b: Array, goal: Array, budget: int, chunk: int) -> tuple[Array, Array]:
    """Attributions (n, p) of the straight paths from b to x, and the evaluations (n,) spent.

    Args:
        goal: (n,) the gap at which a path is done. budget: evaluations that a path may cost. chunk: points evaluated at once.
    """
    n = len(x)
    edges = np.linspace(0, 1, FIRST + 1)
    ends = _at(both, x, b, np.repeat(np.arange(n), FIRST + 1), np.tile(edges, n), chunk)[0].reshape(n, -1)
    rows, low, high = np.repeat(np.arange(n), FIRST), np.tile(edges[:-1], n), np.tile(edges[1:], n)
    held = _panels(both, x, b, rows, low, high, ends[:, :-1].ravel(), ends[:, 1:].ravel(), chunk)
    spent = np.full(n, COST)
    while len(worst := _worst(held, (np.bincount(held.rows, held.gap, n) > goal) & (spent + 2 * POINTS + 1 <= budget))):
        r, low, high = held.rows[worst], held.low[worst], held.high[worst]
        middle = (low + high) / 2
        value = _at(both, x, b, r, middle, chunk)[0]
        start, end = np.r_[held.start[worst], value], np.r_[value, held.end[worst]]
        held = held.joined(_panels(both, x, b, np.r_[r, r], np.r_[low, middle], np.r_[middle, high], start, end, chunk), worst)
        spent[r] += 2 * POINTS + 1
    values = np.zeros(x.shape)
    np.add.at(values, held.rows, held.values)
    return values, spent


def _at(both: Both, x: Array, b: Array, rows: Array, t: Array, chunk: int) -> tuple[Array, Array]:
    """f (m,) and its gradients (m, p) at the places ``t`` (m,) of the paths ``rows`` (m,)."""
    parts = [slice(k, k + chunk) for k in range(0, len(rows), chunk)]
    found = [both(b[rows[s]] + t[s, None] * (x[rows[s]] - b[rows[s]]), rows[s]) for s in parts]
    return np.concatenate([value for value, _ in found]), np.concatenate([gradient for _, gradient in found])


def _panels(both: Both, x: Array, b: Array, rows: Array, low: Array, high: Array, start: Array, end: Array, chunk: int) -> _Panels:
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    t = low[:, None] + (high - low)[:, None] * (1 + nodes) / 2
    gradients = _at(both, x, b, np.repeat(rows, POINTS), t.ravel(), chunk)[1].reshape(len(rows), POINTS, -1)
    values = np.einsum("q,rqp,rp->rp", weights / 2, gradients, (high - low)[:, None] * (x - b)[rows])
    return _Panels(rows, low, high, start, end, values, np.abs(values.sum(1) - (end - start)))


def _worst(held: _Panels, open_: Array) -> Array:
    """The panel with the largest gap of each path that is still open, where it can be halved in float64."""
    order = np.lexsort((held.gap, held.rows))
    last = order[np.r_[held.rows[order][1:] != held.rows[order][:-1], True]]
    wide = held.high[last] - held.low[last] > 1e-13
    return last[open_[held.rows[last]] & wide]
