"""What is weighted: examples, groups of them, tokens, or any terms of the losses. The scores have one column for each weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError, TaskError
from headwater.store import content_hash
from headwater.tasks import Task
from headwater.tasks.batches import Batch, size, to
from headwater.tasks.code import code_digest
from headwater.tasks.task import Language
from headwater.training import Run, Stage


@dataclass(frozen=True)
class Weighing:
    """Training minimised the mean of ``sum_t w_t l_t`` over examples, with all weights 1; the scores are derivatives in the weights.

    Made by :func:`examples`, :func:`groups`, :func:`tokens` or :func:`terms`.

    ``kind``: which. ``function``: ``(model, batch) -> (n, terms)``, the terms whose sum is each example's loss; ``count``: how many.
    ``labels``: the group of every example of the run (all stages, in the order of the columns).
    """

    kind: str = "examples"
    function: Callable[[nn.Module, Batch], Tensor] | None = None
    count: int = 1
    labels: tuple[Any, ...] | None = None

    def __repr__(self) -> str:
        detail = ""
        if self.labels is not None:
            detail = content_hash([str(label) for label in self.labels])[:12]
        elif self.function is not None:
            detail = f"{code_digest(self.function, held=True)}, {self.count}"
        return f"weigh.{self.kind}({detail})"

    def on(self, run: Run) -> Columns:
        """The columns that the weights have in the scores of a run. Raises InputError, TaskError where they do not fit it."""
        if self.kind == "tokens":
            other = [stage for stage in run.stages if not isinstance(stage.task, Language)]
            if other:
                given = f"tokens of the task {other[0].task!r} (stage {other[0].name!r})"
                raise TaskError(given, "hw.tasks.Language", "weigh=hw.weigh.terms(function, count) for other losses")
            width = max(_width(stage) for stage in run.stages)
            return Columns(run, width, None, _token_losses, "tokens")
        if self.kind == "terms":
            function = self.function
            assert function is not None
            found = Columns(run, self.count, None, lambda task, model, batch: function(model, batch), "terms")
            found.check()
            return found
        if self.labels is None:
            return Columns(run, 1, None, None)
        if len(self.labels) != run.size:
            raise InputError(f"{len(self.labels)} labels for {run.size} training examples", "one label for each (all stages, in order)", "weigh=hw.weigh.groups(labels)")
        return Columns(run, 1, self.labels, None, "groups")


EXAMPLES = Weighing()


class Columns:
    """Where each weight's scores go. ``names``: of the columns, for groups; ``width``: columns of one example, otherwise; ``scored``: what they
    are, for the provenance of scores, where they are not the examples."""

    def __init__(self, run: Run, width: int, labels: Sequence[Any] | None, terms: Callable[[Task, nn.Module, Batch], Tensor] | None, what: str = "") -> None:
        self.scored = {"scored": what} if what else {}
        self.run, self.width, self.terms = run, width, terms
        self.names: list[Any] | None = None
        if labels is not None:
            self.names, places = _numbered(labels)
            self._place = torch.as_tensor(places).unsqueeze(1)
        else:
            self._place = torch.arange(run.size * width).reshape(run.size, width)
        self.count = len(self.names) if self.names is not None else run.size * width

    def add(self, scores: Tensor, stage: Stage, ids: np.ndarray, values: Tensor) -> None:
        """Add derivatives (queries, n, terms) of a step's examples to the scores (queries, columns)."""
        columns = self._place.index_select(0, torch.from_numpy(ids + stage.columns.start))[:, : values.shape[2]]
        scores.index_add_(1, columns.reshape(-1), values.flatten(1).to("cpu", scores.dtype))

    def check(self) -> None:
        """Raise TaskError unless the terms of each stage's first examples sum to their losses."""
        model = self.run.load(self.run.model(), self.run.checkpoints[-1])
        for stage in self.run.stages:
            batch = to(stage.data.batch(range(min(2, stage.size))), self.run.device)
            assert self.terms is not None
            with torch.no_grad():
                found, losses = self.terms(stage.task, model, batch), stage.task.loss(model, batch)
            if found.shape != (size(batch), self.width):
                raise TaskError(f"terms of shape {tuple(found.shape)}", f"({size(batch)}, {self.width}): one row for each example", "hw.weigh.terms(function, count)")
            if not torch.allclose(found.sum(1).double(), losses.double(), rtol=1e-4, atol=1e-6):
                expected = f"each example's loss, here {losses.tolist()}"
                raise TaskError(f"terms that sum to {found.sum(1).tolist()}", expected, "return the parts that the loss is the sum of")


def _token_losses(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    assert isinstance(task, Language)
    return task.token_losses(model, batch)


def _width(stage: Stage) -> int:
    task = stage.task
    assert isinstance(task, Language)
    return max(task.targets(stage.data.batch(range(i, i + 1))).shape[1] for i in range(stage.size))


def _numbered(labels: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Distinct labels in order (sorted, where they can be), and the number of each example's."""
    distinct = list(dict.fromkeys(labels))
    with suppress(TypeError):
        distinct = sorted(distinct)
    number = {label: k for k, label in enumerate(distinct)}
    return distinct, [number[label] for label in labels]


def examples() -> Weighing:
    """One weight for each training example: the default.

    >>> examples()
    weigh.examples()
    """
    return Weighing()


def groups(labels: Any) -> Weighing:
    """One weight for each group of examples, ``labels[i]`` naming the group of example i (of all stages, in the order of the columns).
    The score of a group is the sum of its members' scores. Columns are sorted by label; ``provenance["columns"]`` names them.

    >>> groups(["a", "b", "a"]).labels
    ('a', 'b', 'a')
    """
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    return Weighing("groups", labels=tuple(values))


def tokens() -> Weighing:
    """One weight for each predicted token of a :class:`hw.tasks.Language` task: column ``i * width + t`` is position t of example i, its
    scores sum to example i's. Positions that do not count score 0.

    >>> tokens()
    weigh.tokens()
    """
    return Weighing("tokens")


def terms(function: Callable[[nn.Module, Batch], Tensor], count: int) -> Weighing:
    """One weight for each of ``count`` terms of every example's loss: ``function(model, batch) -> (n, count)``, whose sum over terms is
    the task's loss. Column ``i * count + t`` is term t of example i.

    >>> terms(lambda model, batch: (model(batch[0]) - batch[1]) ** 2, 3).count
    3
    """
    if count < 1:
        raise InputError(f"count={count}", "at least one term", "how many columns function(model, batch) returns")
    return Weighing("terms", function, count)
