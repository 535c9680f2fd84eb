"""Queries: which predictions a question is about, and how their gradients make one row each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from headwater.errors import HeadwaterError, InputError, QueryError
from headwater.tasks import Examples, Measure, Task, fingerprint
from headwater.tasks.batches import leaves, take
from headwater.tasks.code import code_digest
from headwater.tasks.task import per_example
from headwater.training import Run
from headwater.training.run import EMA, RAW


@dataclass(frozen=True)
class Query:
    """A named set of examples asked about together: its measurement is the sum of theirs, its scores one row.

    >>> import torch
    >>> Query("the threes", (torch.zeros(5, 784), torch.full((5,), 3))).name
    'the threes'
    """

    name: str
    data: Any


@dataclass(frozen=True)
class Asked:
    """What was asked, ready to be streamed: example i of ``examples`` counts in row ``row[i]``; ``names`` where the rows have them.
    ``averaged``: of the model with the moving average of the weights."""

    examples: tuple[Examples, ...]
    rows: tuple[np.ndarray, ...]
    names: tuple[str, ...] | None
    measure: Measure
    averaged: bool = False

    def of(self, run: Run, weights: str | None) -> Asked:
        """The same question about a model of ``run``: with its "raw" weights, their moving average ("ema"), or (None) that where it was
        recorded throughout. Raises InputError, RunError."""
        if weights not in (None, RAW, EMA) or (weights == RAW and run.which == EMA):
            raise InputError(f"weights={weights!r}" + (" of a run seen at its averaged weights" if run.which == EMA else ""), f"{RAW!r} or {EMA!r}", "leave it out")
        if weights == EMA:
            run.weights(run.checkpoints[-1], averaged=True)
        recorded = all(run.averages(step) for step in run.checkpoints)
        return replace(self, averaged=run.which == RAW and (weights == EMA or (weights is None and recorded)))

    def over(self, events: Any) -> Asked:
        """The same question at other noise events; itself for None."""
        return self if events is None else replace(self, examples=tuple(e.over(events) for e in self.examples))

    @property
    def identity(self) -> list[Any]:
        """What was asked, for the names of saved work: examples, how they are seen, rows, and what the measure does."""
        return [[[fingerprint(e), e.view] for e in self.examples], [r.tolist() for r in self.rows], code_digest(self.measure, held=True), self.averaged]

    @property
    def count(self) -> int:
        return len(self.names) if self.names is not None else len(self.rows[0])


def ask(queries: Any, task: Task, measure: Measure | None) -> Asked:
    """Turn what a user passed as ``queries`` (a dataset, a batch, a Query or several) into rows."""
    events = getattr(measure, "events", None)
    if measure is not None and events is not None:  # a measure that says at which noise events it is taken
        return ask(queries, task, replace(measure, events=None)).over(events)  # type: ignore[type-var]
    named = [queries] if isinstance(queries, Query) else queries
    if isinstance(named, list | tuple) and named and all(isinstance(q, Query) for q in named):
        examples = tuple(_examples(q.data, task) for q in named)
        rows = tuple(np.full(len(e), k) for k, e in enumerate(examples))
        return Asked(examples, rows, tuple(q.name for q in named), measure or task.measure)
    examples = (_examples(queries, task),)
    return Asked(examples, (np.arange(len(examples[0])),), None, measure or task.measure)


def _examples(data: Any, task: Task) -> Examples:
    examples = (data if isinstance(data, Examples) else task.examples(data)).asked()
    if len(examples) == 0:
        raise QueryError("no queries", "at least one example to ask about", "pass a batch or a dataset of the examples whose predictions you ask about")
    return examples


def check(asked: Asked, model: nn.Module, train: Examples | None, device: Any) -> None:
    """Measure the first query of each set, and say clearly when the model cannot take it. ``train``: to say what would fit, if at hand."""
    from headwater.tasks.batches import to

    for examples in asked.examples:
        first = to(examples.batch(range(1)), device)
        try:
            per_example(asked.measure(model, first), first, "measure")
        except HeadwaterError:
            raise
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            expected = "like those of the training examples" if train is None else f"of shapes {_shapes(take(train.batch(range(1)), 0))}"
            raise QueryError(
                f"a query with tensors of shapes {_shapes(take(first, 0))}, at which the measure fails: {type(error).__name__}: {error}",
                f"queries like the training examples, with tensors {expected} (one example)",
                "pass queries in the training examples' layout, with a leading axis of examples, or a measure= that takes them",
            ) from error


def _shapes(example: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in leaves(example)]


def methods_of(method: Any, kinds: tuple[type[Any], ...]) -> tuple[list[Any], bool]:
    """The single methods in what was passed as ``method``, and whether a list is the answer's shape."""
    given = list(method) if isinstance(method, Sequence) else [method]
    out: list[Any] = []
    for item in given:
        if isinstance(item, type) or not isinstance(item, kinds):
            mend = "construct it: hw.Source()" if isinstance(item, type) else "an index and hw.self_influence answer methods of this kind alone; trace the run for others"
            raise InputError(f"method={item!r}", "a method such as hw.Source(), hw.Influence(damping=...), hw.TracIn(), or a list of them", mend)
        out += item.sweep() if _swept(item) else [item]
    if not out:
        raise InputError("an empty list of methods", "at least one method", "hw.trace(run, queries, method=hw.Source())")
    return out, isinstance(method, Sequence) or len(out) > 1 or _swept(method)


def _swept(method: Any) -> bool:
    """Whether a method stands for several: a sweep of dampings."""
    return any(isinstance(getattr(method, name, None), tuple) for name in ("damping", "regularisation"))
