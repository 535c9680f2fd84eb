"""Examples that carry their ids to the model: how a mask knows whose activations it sees.

The masks of examples are keyed by them, so ids travel with the batch (a :class:`Keyed` batch is cut, stacked and moved like any
other) and the task hands them to the masks around each call of the model. Training examples are known by their column, queries by a
hash of their content: the same query always meets the same mask, in any company.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.influence.ensembles.masks import Ids
from headwater.influence.queries import Asked
from headwater.tasks import Classification, Draws, Examples, Language, Measure, Regression, Task
from headwater.tasks.batches import Batch, hash_of
from headwater.tasks.code import code_digest
from headwater.training import Run


@dataclass(frozen=True, eq=False)
class Keyed:
    """A batch with the ids of its examples, int64 (n,): columns from 0 on for training examples, below 0 for queries."""

    ids: Tensor
    batch: Any


class KeyedExamples(Examples):
    """A dataset whose batches are :class:`Keyed`."""

    def __init__(self, examples: Examples, ids: Tensor) -> None:
        super().__init__(examples)
        self.inner, self.ids = examples, ids

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> Batch:
        return Keyed(self.ids[torch.from_numpy(np.array(indices, dtype=np.int64))], self.inner.batch(indices))


class _Outputs:
    """A built-in task, all of whose functions see the model through two of its own: those hand the ids on."""

    _ids: Ids

    def _logits(self, model: nn.Module, batch: Batch) -> Any:
        with _opened(batch, self._ids) as inner:
            return super()._logits(model, inner)  # type: ignore[misc]

    def _pair(self, model: nn.Module, batch: Batch) -> Any:
        with _opened(batch, self._ids) as inner:
            return super()._pair(model, inner)  # type: ignore[misc]

    def targets(self, batch: Batch) -> Tensor:
        """The targets of a batch with ids, or of the batch inside it."""
        return super().targets(batch.batch if isinstance(batch, Keyed) else batch)  # type: ignore[misc]


class _Calls:
    """Any other task: each of its functions hands the ids on, and sees the batch inside."""

    _ids: Ids

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with _opened(batch, self._ids) as inner:
            return super().loss(model, inner)  # type: ignore[misc]

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        with _opened(batch, self._ids) as inner:
            return super().measure(model, inner)  # type: ignore[misc]

    def sampled(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        with _opened(batch, self._ids) as inner:
            return super().sampled(model, inner, draws)  # type: ignore[misc]

    def exact(self, model: nn.Module, batch: Batch) -> Tensor:
        with _opened(batch, self._ids) as inner:
            return super().exact(model, inner)  # type: ignore[misc]

    def outputs(self, model: nn.Module, batch: Batch) -> int | None:
        with _opened(batch, self._ids) as inner:
            return super().outputs(model, inner)  # type: ignore[misc]


@contextmanager
def _opened(batch: Batch, ids: Ids) -> Iterator[Batch]:
    """The batch inside, while its ids are those that masks go by. A batch without ids is one that was opened further out."""
    if isinstance(batch, Keyed):
        with ids.of(batch.ids):
            yield batch.batch
    elif ids.inside:
        yield batch
    else:
        raise InputError(f"a batch of type {type(batch).__name__} without ids, for masks of examples", "a batch of the run's own examples", "use masks='member'")


def keyed_task(task: Task, ids: Ids) -> Task:
    """A task of the same kind that hands the ids of a batch to the masks around every call of the model."""
    twin, how = copy.copy(task), _Outputs if type(task) in (Classification, Regression, Language) else _Calls
    twin.__class__ = type(f"Keyed{type(task).__name__}", (how, type(task)), {})
    vars(twin)["_ids"] = ids
    return twin


class KeyedMeasure:
    """A measure of queries that does the same. ``digest`` names the measure in the keys of saved work."""

    def __init__(self, measure: Measure, ids: Ids) -> None:
        self.inner, self.ids, self.digest = measure, ids, code_digest(measure, held=True)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        with _opened(batch, self.ids) as inner:
            return self.inner(model, inner)


def keyed_run(run: Run, ids: Ids) -> Run:
    """A view of a run whose examples carry their columns, and whose tasks hand them on."""
    stages = tuple(
        replace(stage, data=KeyedExamples(stage.data, torch.arange(stage.columns.start, stage.columns.stop)), task=keyed_task(stage.task, ids)) for stage in run.stages
    )
    return replace(run, stages=stages)


def keyed_question(asked: Asked, ids: Ids) -> Asked:
    """A question whose queries carry hashes of their content."""
    return replace(asked, examples=tuple(KeyedExamples(e, _hashes(e)) for e in asked.examples), measure=KeyedMeasure(asked.measure, ids))


def _hashes(examples: Examples) -> Tensor:
    return torch.tensor([-1 - int(hash_of(examples[i])[:15], 16) for i in range(len(examples))], dtype=torch.int64)
