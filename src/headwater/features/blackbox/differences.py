"""Gradients of a function by central differences at two step sizes, and what error they have.

With D(h) = (f(z + h) - f(z - h)) / 2h, the extrapolated slope (4 D(h) - D(2h)) / 3 errs by O(h⁴) from curvature and by O(ε/h) from the
rounding ε of f; h ~ ε^(1/5) of the way the coordinate goes balances them. No point leaves the box between baseline and input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
Values = Callable[[Array, Array], Array]
"""(points (m, F), which example each belongs to (m,)) -> (m,)."""

CALLS = 4
"""For each feature that differs from the baseline, at each node; and one call for the value."""


@dataclass
class Slopes:
    """The gradient field of ``values`` on the paths from b to x (n, F), and of each path how many gradients were
    ``seen``, how many were zero throughout (``flat``), and between which values f went (``low``, ``high``)."""

    values: Values
    x: Array
    b: Array
    epsilon: float
    dtype: np.dtype[Any]
    seen: Array = field(init=False)
    flat: Array = field(init=False)
    low: Array = field(init=False)
    high: Array = field(init=False)

    def __post_init__(self) -> None:
        self.seen, self.flat = np.zeros(len(self.x), int), np.zeros(len(self.x), int)
        self.low, self.high = np.full(len(self.x), np.inf), np.full(len(self.x), -np.inf)

    def both(self, points: Array, rows: Array) -> tuple[Array, Array]:
        """f (m,) and its gradients (m, F); 0 where a coordinate does not move."""
        first, second = self.at(points, rows, 1), self.at(points, rows, 2)
        gradient = (4 * first - second) / 3
        zero = ~(first.any(1) | second.any(1))
        np.add.at(self.seen, rows, 1)
        np.add.at(self.flat, rows, zero.astype(int))
        value = self.values(points, rows)
        np.minimum.at(self.low, rows, value)
        np.maximum.at(self.high, rows, value)
        return value, gradient

    def at(self, points: Array, rows: Array, times: int) -> Array:
        """Central differences (m, F) with ``times`` the step."""
        out = np.zeros(points.shape)
        m, j = np.nonzero((self.x != self.b)[rows])
        if len(m):
            h = times * self.steps(points, rows)[m, j]
            ends = []
            for side in (1, -1):
                moved = points[m]
                moved[np.arange(len(m)), j] += side * h
                moved = moved.astype(self.dtype).astype(float)  # as the function gets it
                ends.append((self.values(moved, rows[m]), moved[np.arange(len(m)), j]))
            (up, high), (down, low) = ends
            out[m, j] = np.divide(up - down, high - low, out=np.zeros(len(m)), where=high != low)
        return out

    def steps(self, points: Array, rows: Array) -> Array:
        """(m, F): one step; four of them stay between baseline and input."""
        x, b = self.x[rows], self.b[rows]
        room = np.minimum(np.abs(points - b), np.abs(x - points))
        least = self.epsilon**0.5 * np.maximum(np.abs(x), np.abs(b))
        return np.minimum(np.maximum(self.epsilon**0.2 * np.abs(x - b), least), room / 4)

    def error(self) -> Array:
        """(n, F): the estimated error of the attributions. At the middle of the paths, how far the slopes from twice the steps are from those
        that are used (sixteen times their error from curvature, half their error from rounding), and rounding as such."""
        rows, middle = np.arange(len(self.x)), (self.x + self.b) / 2
        one, two, four = (self.at(middle, rows, times) for times in (1, 2, 4))
        size = np.abs(self.values(middle, rows))[:, None] * self.epsilon
        steps = self.steps(middle, rows)
        rounding = np.divide(size, steps, out=np.zeros_like(steps), where=steps > 0)
        return np.asarray(np.abs(self.x - self.b) * (np.abs((4 * one - two) / 3 - (4 * two - four) / 3) + rounding))
