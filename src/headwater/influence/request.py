"""What is asked of a method, and what one model contributes to an answer.

Two kinds of method exist. A :class:`~headwater.influence.methods.Method` is a table of rows, carried out by the one loop. A
:class:`Scorer` computes by itself what no table says: exact unrolling, kernels in a projected space, similarities, regressions on a bank.
Either way one model's contribution is :class:`Parts`: named arrays, so that methods whose members are averaged piece by piece (TRAK)
and methods whose members are averaged as scores are ensembled by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from headwater.influence.queries import Asked
from headwater.result import Slices, TrainingScores
from headwater.training import Run

SCORES = "scores"
"""The name of the one part of a method whose members are averaged as scores."""


@dataclass(frozen=True, eq=False)
class Request:
    """A question put to a run: the queries with their measure, and how the work is to be done (arguments of :func:`headwater.trace`).
    ``shared``: what methods that are asked together need not compute twice, by names that say all it depends on."""

    run: Run
    asked: Asked
    batch_size: int | None = None
    memory: int = 2**30
    tolerance: float | None = None
    progress: bool = True
    shared: dict[str, Any] = field(default_factory=dict)

    def of(self, run: Run) -> Request:
        """The same question put to another run (a member of an ensemble)."""
        return replace(self, run=run)

    @property
    def in_one_place(self) -> Request:
        """The question as methods take it that meet queries and training examples at the same weights: where it is about averaged weights, both there."""
        return replace(self, run=self.run.averaged(), asked=replace(self.asked, averaged=False)) if self.asked.averaged else self


@dataclass(frozen=True, eq=False)
class Parts:
    """One model's contribution: ``arrays`` by name, e.g. ``{"scores": (queries, train)}``; ``name`` and ``unit`` as of the scores made
    from them; ``provenance``: what it was computed from and what it cost; ``slices``: the scores kept apart along an axis."""

    arrays: dict[str, np.ndarray]
    name: str
    unit: str
    provenance: dict[str, Any] = field(default_factory=dict)
    slices: dict[str, Slices] = field(default_factory=dict)


@runtime_checkable
class Scorer(Protocol):
    """A method that computes by itself: its frozen record of settings names it (its ``repr`` is part of the names of saved work)."""

    def parts(self, request: Request) -> Parts: ...

    def combine(self, members: Sequence[dict[str, np.ndarray]]) -> np.ndarray: ...


@runtime_checkable
class Answering(Protocol):
    """A method made of others (an ensemble): it answers by itself, with standard errors."""

    def answer(self, request: Request) -> TrainingScores: ...


def column_names(provenance: dict[str, Any]) -> tuple[str, ...] | None:
    """The names of columns, where they are groups that provenance names."""
    names = provenance.get("columns")
    return tuple(map(str, names)) if isinstance(names, list) else None


def mean_of_scores(members: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    """The mean of members' scores: how everything but TRAK is averaged. (queries, train)"""
    return np.mean([m[SCORES] for m in members], axis=0)
