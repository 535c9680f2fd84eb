"""Examples that carry their ids to the model: how a mask knows whose activations it sees.

The masks of examples are keyed by them, so ids travel with the batch (a :class:`Keyed` batch is cut, stacked and moved like any
other) and the task hands them to the masks around each call of the model. Training examples are known by their column, queries by a
hash of their content: the same query always meets the same mask, in any company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.influence.ensembles.masks import Ids
from headwater.influence.queries import Asked
from headwater.tasks import Draws, Examples, Measure, Task
from headwater.tasks.batches import Batch, hash_of
from headwater.tasks.code import code_digest, task_identity
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
        self.ids = ids

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> Batch:
        return Keyed(self.ids[torch.from_numpy(np.array(indices, dtype=np.int64))], super().batch(indices))


class KeyedTask(Task):
    """A task that hands the ids of a batch to the masks around every call of the model."""

    def __init__(self, task: Task, ids: Ids) -> None:
        self.task, self.ids, self.collate = task, ids, task.collate

    def _with_ids(self, function: Callable[..., Any], model: nn.Module, batch: Batch, *more: Any) -> Any:
        if not isinstance(batch, Keyed):
            raise InputError(f"a batch of type {type(batch).__name__} without ids, for masks of examples", "a batch of the run's own examples", "use masks='member'")
        with self.ids.of(batch.ids):
            return function(model, batch.batch, *more)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._with_ids(self.task.loss, model, batch)

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._with_ids(self.task.measure, model, batch)

    def sampled(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        return self._with_ids(self.task.sampled, model, batch, draws)

    def exact(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._with_ids(self.task.exact, model, batch)

    def outputs(self, model: nn.Module, batch: Batch) -> int | None:
        return self._with_ids(self.task.outputs, model, batch)

    def describe(self) -> dict[str, Any]:
        return {"kind": "Keyed", "of": task_identity(self.task)}


class KeyedMeasure:
    """A measure of queries that does the same. ``digest`` names the measure in the keys of saved work."""

    def __init__(self, measure: Measure, ids: Ids) -> None:
        self.inner, self.ids, self.digest = measure, ids, code_digest(measure, held=True)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        with self.ids.of(batch.ids):
            return self.inner(model, batch.batch)


def keyed_run(run: Run, ids: Ids) -> Run:
    """A view of a run whose examples carry their columns, and whose tasks hand them on."""
    stages = tuple(
        replace(stage, data=KeyedExamples(stage.data, torch.arange(stage.columns.start, stage.columns.stop)), task=KeyedTask(stage.task, ids)) for stage in run.stages
    )
    return replace(run, stages=stages)


def keyed_question(asked: Asked, ids: Ids) -> Asked:
    """A question whose queries carry hashes of their content."""
    return replace(asked, examples=tuple(KeyedExamples(e, _hashes(e)) for e in asked.examples), measure=KeyedMeasure(asked.measure, ids))


def _hashes(examples: Examples) -> Tensor:
    return torch.tensor([-1 - int(hash_of(examples[i])[:15], 16) for i in range(len(examples))], dtype=torch.int64)
