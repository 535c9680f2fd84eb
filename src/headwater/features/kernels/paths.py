"""Attributions along straight paths by points, for readings without a closed form: the loop of :mod:`headwater.features.integrate`, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.features.integrate import Settings, along_line
from headwater.features.kernels.panels import COST, Both, bisected
from headwater.features.line import Integral, Line
from headwater.features.quadrature import gauss_legendre
from headwater.features.question import Question

Array = np.ndarray
ROUND_OFF = 1e-13
"""A residual below this part of the outputs is their rounding."""
LEVELS = (16, 32, 64)
GROUP = 1 << 14
"""How many numbers of input the panels work on at once: each example may come to hold some sixty panels of gradients."""


@dataclass(frozen=True)
class Effort:
    """How hard to try: the ``tolerance`` and the ``rule`` that were asked for, how many evaluations an example may cost, how many at once."""

    tolerance: float | None = None
    rule: Any = None
    budget: int = 512
    chunk: int = 4096
    floor: float = ROUND_OFF
    levels: tuple[int, ...] = LEVELS

    def goal(self, first: Array, last: Array) -> Array:
        """(n,) the residual to reach between outputs ``first`` and ``last``."""
        return np.maximum((self.tolerance or 0.0) * np.abs(last - first), self.floor * np.maximum(np.abs(first), np.abs(last)))

    @classmethod
    def of(cls, question: Question, rows: int) -> Effort:
        """What the question asks; ``rows``: how many points fit in memory."""
        if question.tolerance is not None and not question.tolerance > 0:
            raise InputError(f"tolerance={question.tolerance}", "a positive number, relative to the change of the output", "tolerance=1e-3, say")
        if question.max_evaluations is not None and question.max_evaluations < 10:
            raise InputError(f"max_evaluations={question.max_evaluations}", "at least 10: the two ends and 8 gradients", "leave it out for 512")
        return cls(question.tolerance, question.rule, question.max_evaluations or 512, max(1, min(question.batch_size or 4096, rows)))


@dataclass
class Values:
    """Attributions (n, p), and (n,) evaluations spent, and whether the tolerance is met."""

    values: Array
    evaluations: Array
    converged: Array


def by_points(both: Both, x: Array, b: Array, effort: Effort, kinks: bool = False) -> Values:
    """``(x - b) ∫₀¹ ∇f(b + t (x - b)) dt`` for each example; x, b (n, p).

    With a rule, by it. Otherwise to the tolerance, or to round-off where there is none: 16, 32 and 64 points, then in panels; for a function
    of many kinks (a ReLU perceptron), from tangent to tangent.
    """
    every = np.arange(len(x))
    if effort.rule is not None:
        return _found(along_line(_line(both, x, b, every, effort.chunk), _settings(effort, rule=effort.rule)), x.shape)
    if kinks:
        return _found(along_line(_line(both, x, b, every, effort.chunk), _settings(effort, tolerance=effort.tolerance or 1e-10)), x.shape)
    found, left = Values(np.zeros(x.shape), np.zeros(len(x), int), np.zeros(len(x), bool)), every
    goal, change = np.zeros(len(x)), np.zeros(len(x))
    for points in effort.levels:
        left = left[found.evaluations[left] + points + 2 <= effort.budget]
        if len(left):
            level = along_line(_line(both, x[left], b[left], left, effort.chunk), _settings(effort, rule=gauss_legendre(points)))
            _keep(found, left, level.values[0].numpy(), level.evaluations.numpy())
            goal[left] = effort.goal(level.start.numpy(), level.end.numpy())
            change[left] = (level.end - level.start).numpy()
            left = left[np.abs(level.residual.numpy()) > goal[left]]
    left = left[found.evaluations[left] + COST <= effort.budget]
    for rows in np.array_split(left, max(1, len(left) * x.shape[1] // GROUP)) if len(left) else ():
        budget = effort.budget - int(found.evaluations[rows].max())
        _keep(found, rows, *bisected(_among(both, rows), x[rows], b[rows], goal[rows], budget, effort.chunk))
    found.converged = np.abs(found.values.sum(1) - change) <= goal
    return found


def _among(both: Both, rows: Array) -> Both:
    """The same function for examples counted within ``rows``."""
    return lambda points, which: both(points, rows[which])


def _settings(effort: Effort, **chosen: Any) -> Settings:
    return Settings(budget=effort.budget, chunk=effort.chunk, **chosen)


def _keep(found: Values, rows: Array, values: Array, spent: Array) -> None:
    found.values[rows] = values
    found.evaluations[rows] += spent


def _line(both: Both, x: Array, b: Array, rows: Array, chunk: int) -> Line:
    """The examples ``rows`` of a path on which a point is ``b + t (x - b)`` and the integrand is the gradient along with its place."""

    def field(points: tuple[Tensor, ...], of: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        value, gradient = both(points[0].numpy(), of.numpy())
        return torch.from_numpy(np.ascontiguousarray(value)), (torch.from_numpy(np.ascontiguousarray(gradient)),)

    return Line(field, (_tensor(x),), (_tensor(b),), torch.from_numpy(rows), chunk)


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _found(found: Integral, shape: tuple[int, ...]) -> Values:
    return Values(found.values[0].numpy().reshape(shape), found.evaluations.numpy(), found.converged.numpy())
