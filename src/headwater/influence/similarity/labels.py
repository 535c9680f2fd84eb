"""What the examples are labelled with: classes or numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.influence.request import Request
from headwater.tasks import Classification, Diffusion, Examples, Language, Regression, Task
from headwater.tasks.batches import Batch
from headwater.tasks.diffusion.networks import conditions_of
from headwater.tasks.task import split

READ = 1024  # examples at once


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of the queries' examples (queries, outputs) and of the training examples (train, outputs): int64 classes (one output), or float64 targets."""

    queries: np.ndarray
    train: np.ndarray

    @property
    def classes(self) -> bool:
        """Whether these are classes, which are equal or not, rather than numbers, which lie near each other."""
        return self.train.dtype.kind == "i"

    def same(self) -> np.ndarray:
        """Booleans (query examples, train): whether the two have the same class."""
        return self.queries == self.train.T


def labels_of(request: Request, what: str, most: int | None = None) -> Labels:
    """The labels of everything that a request is about. ``what`` needs them, for the error; ``most``: no more than so many of each set.

    A Classification has classes and a Regression targets, a Diffusion the classes that it is conditioned on; of a task of the user's the
    last item of a tuple, or the field "labels", decides by its type. Raises InputError for tasks without labels.
    """
    run = request.run
    train = np.concatenate([_read(stage.data, stage.task, what, most) for stage in run.stages])
    queries = np.concatenate([_read(examples, run.stages[-1].task, what, most) for examples in request.asked.examples])
    if train.dtype != queries.dtype or train.shape[1] != queries.shape[1]:
        raise InputError(
            f"labels of shape {queries.shape} and type {queries.dtype} in the queries, {train.shape} and {train.dtype} in the training data",
            "the same kind of labels in both",
            "pass queries as the training examples are: (inputs, labels)",
        )
    return Labels(queries, train)


def classes_of(request: Request, what: str, most: int | None = None) -> Labels:
    """The same where they must be classes."""
    found = labels_of(request, what, most)
    if not found.classes:
        raise InputError(f"{what} and targets that are numbers", "classes: labels that are equal or not", "it is for classification; leave it out here")
    return found


def _read(examples: Examples, task: Task, what: str, most: int | None) -> np.ndarray:
    if isinstance(task, Language):
        raise InputError(f"{what} and a language task", "examples with labels", "it has no meaning for texts; leave it out here")
    parts, count = [], len(examples) if most is None else min(most, len(examples))
    if isinstance(task, Diffusion):
        examples = examples.over(task.grid((0,)))  # one event of each: no noise is made for nothing
    for start in range(0, count, READ):
        if isinstance(task, Diffusion):
            parts.append(_classes(examples.batch(range(start, min(start + READ, count))), task, what))
            continue
        held = split(examples.batch(range(start, min(start + READ, count))), getattr(task, "labels", "labels"))[2]
        parts.append(_as_labels(held, task, what))
    return np.concatenate(parts)


def _classes(batch: Batch, task: Diffusion, what: str) -> np.ndarray:
    """The classes that a diffusion model is conditioned on: its one condition that is a whole number for each image."""
    given, by_name = conditions_of(batch.batch, task.images)
    found = [t for t in [*given, *by_name.values()] if isinstance(t, Tensor) and not t.is_floating_point() and t.ndim == 1]
    if len(found) != 1:
        held = f"{len(found)} conditions that could be classes" if found else "no condition that is a class"
        raise InputError(f"{what} and a diffusion task with {held}", "images with one class each: (images, classes)", "it needs classes; leave it out here")
    return found[0].detach().cpu().to(torch.int64).reshape(-1, 1).numpy()


def _as_labels(held: Tensor, task: Task, what: str) -> np.ndarray:
    if not isinstance(held, Tensor) or not held.ndim:
        raise InputError(f"{what} and labels of type {type(held).__name__}", "a tensor with one label for each example", "give the batch such labels")
    flat = held.detach().cpu().reshape(len(held), -1)
    if isinstance(task, Classification) or (not isinstance(task, Regression) and not flat.is_floating_point()):
        if flat.shape[1] != 1:
            raise InputError(f"{what} and {flat.shape[1]} labels for each example", "one class for each", "it has no meaning for several labels at once")
        return flat.to(torch.int64).numpy()
    return flat.double().numpy()
