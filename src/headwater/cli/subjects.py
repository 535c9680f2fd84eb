"""What ``headwater explain`` is about: the model of a run with examples of its test set, or a model from a file with rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import headwater as hw
from headwater.cli import asking, files
from headwater.cli.naming import Asked
from headwater.errors import InputError
from headwater.evaluate.jobs import select
from headwater.features.question import Question
from headwater.features.trees import recognises
from headwater.tasks import Examples
from headwater.tasks.batches import leaves, take, to
from headwater.tasks.task import fields_of, logits_of


@dataclass(frozen=True, eq=False)
class Background:
    """What inputs can be compared with. ``rows``: from the numbers of some of the ``size`` examples to their inputs. ``labels``: of all, or None."""

    size: int
    rows: Callable[[np.ndarray], Any]
    name: str
    labels: Callable[[], Any] | None = None

    @property
    def all(self) -> Any:
        """The inputs of every example."""
        return self.rows(np.arange(self.size))

    def drawn(self, count: int) -> Any:
        """The inputs of ``count`` examples; which ones is the same every time."""
        if not 0 < count <= self.size:
            raise InputError(f"--baseline data:{count} and {self.size:,} examples of {self.name}", f"1 to {self.size:,}", "ask for fewer")
        return self.rows(np.sort(np.random.default_rng(0).choice(self.size, count, replace=False)))


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and the inputs to explain.

    Args:
        names: of the inputs, one each. network: whether gradients are taken by autograd, so that there is a tolerance to keep.
        classes: from "predicted" or "label" to the class of each input. asked: from "measure" or "loss" to a target; both raise InputError
            for what there is not.
        target, baseline: what is explained, and compared with, where nothing is said; None: as ``hw.explain`` has it. settings: further arguments of ``hw.explain``.
        said: what was found on the way, in sentences.
    """

    model: Any
    inputs: Any
    names: tuple[str, ...]
    background: Background
    classes: Callable[[str], Any]
    asked: Callable[[str], Any]
    target: str | None
    baseline: str | None
    network: bool
    settings: dict[str, Any] = field(default_factory=dict)
    said: tuple[str, ...] = ()

    @property
    def ids(self) -> bool:
        """Whether some of the inputs are whole numbers that go into an embedding."""
        return self.network and any(not t.is_floating_point() for t in leaves(self.inputs))


# ---- a run ----------------------------------------------------------------------------------------------------------------------


def of_run(path: Path, file: Path | None, name: str | None, queries: str) -> Subject:
    """The last model of a run, and queries of its experiment's test set."""
    experiment = asking.recalled(path, file, name)
    run = experiment.open(path)
    rows = asking.chosen(queries, experiment, run)
    task = experiment.task
    batch = to(Examples(select(experiment.test, rows), task.collate).batch(range(len(rows))), run.device)
    model = run.load(run.model(), run.checkpoints[-1]).eval()
    train = Examples(experiment.train, task.collate)
    inputs, labels = parts(task, batch)

    def classes(word: str) -> Any:
        if not isinstance(task, hw.tasks.Classification):
            raise InputError(f"--target {word} with the task {type(task).__name__}", "a Classification", "name an output by its number, or use --target measure")
        if word == "label":
            return torch.as_tensor(labels).reshape(len(rows), -1)[:, 0].long()
        out = _output(model, inputs)
        return None if out.ndim == 1 or out.shape[1] == 1 else out.argmax(-1)

    def asked(word: str) -> Any:
        ask = {"measure": task.measure, "loss": task.loss}[word]
        return Asked(ask, batch, f"the {word}").checked(model, _output(model, inputs))

    default = "predicted" if isinstance(task, hw.tasks.Classification) else None if isinstance(task, hw.tasks.Regression) else "measure"
    background = Background(
        len(train), lambda ids: to(parts(task, train.batch(ids))[0], run.device), "the training set", lambda: parts(task, train.batch(range(len(train))))[1]
    )
    names = tuple(f"test example {row}" for row in rows)
    return Subject(model, inputs, names, background, classes, asked, default, None, network=True)


def parts(task: Any, batch: Any) -> tuple[Any, Any]:
    """The inputs of a batch as the model takes them, and its labels (None where it has none): as the tasks read it."""
    batch, labels = fields_of(batch), getattr(task, "labels", "labels")
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != labels}, batch.get(labels)
    if not isinstance(batch, tuple | list):
        return batch, None
    inputs = tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
    return inputs[0] if len(inputs) == 1 else inputs, batch[-1] if len(batch) > 1 else None


def _output(model: nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            return logits_of(model(**inputs))
        return logits_of(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


# ---- a file ---------------------------------------------------------------------------------------------------------------------


def of_file(model_file: Path, data_file: Path | None, background_file: Path | None, queries: str) -> Subject:
    """A model that a file holds or makes, and rows of a table (or what the file gives as inputs)."""
    found = files.model_of(model_file)
    data, said, names = found.fitting(found.inputs_or(data_file))
    rows = found.rows(queries, _count(data))
    inputs, network = _rows(data, rows), isinstance(found.model, nn.Module)
    store, more = (data, ()) if background_file is None else found.fitting(files.table(background_file))[:2]
    name = "the data" if background_file is None else str(background_file)

    def classes(word: str) -> Any:
        if word == "label":
            raise InputError("--target label with a model from a file", "a class, or 'predicted'", "labels are known of a run only: headwater explain RUN")
        return files.predicted(found.model, inputs)

    def asked(word: str) -> Any:
        raise InputError(f"--target {word} with a model from a file", "an output or a class", "a task is known of a run only: headwater explain RUN")

    count = min(32, _count(store))
    return Subject(
        found.model,
        inputs,
        tuple(f"row {row}" for row in rows),
        Background(_count(store), lambda ids: _rows(store, ids), name),
        classes,
        asked,
        _usual(found.model, inputs),
        None if isinstance(inputs, list) or network else f"data:{count}",
        network,
        {**found.settings, **({} if names is None else {"feature_names": names})},
        (*said, *(line for line in more if line not in said)),
    )


def _usual(model: Any, inputs: Any) -> str | None:
    """What is explained where nothing is said: the predicted class. None, which is the library's choice, of texts, and the second of two classes."""
    return None if isinstance(inputs, list) or len(getattr(model, "classes_", ())) == 2 or recognises(Question(model, inputs)) else "predicted"


def _count(data: Any) -> int:
    if isinstance(data, Mapping):
        return len(next(iter(data.values())))
    return len(data[0]) if isinstance(data, tuple) else int(data.shape[0]) if hasattr(data, "shape") else len(data)


def _rows(data: Any, rows: Sequence[int] | np.ndarray) -> Any:
    """Some of the examples, in the same container."""
    if hasattr(data, "iloc"):
        return data.iloc[rows]
    if isinstance(data, list):
        return [data[int(i)] for i in rows]
    if isinstance(data, np.ndarray):
        return data[rows]
    return take(data, torch.as_tensor(np.asarray(rows), dtype=torch.long))
