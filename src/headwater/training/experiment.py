"""An experiment: everything that a training needs, so that it can be recorded, and repeated on subsets."""

from __future__ import annotations

import importlib.util
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from headwater.errors import InputError
from headwater.store import bytes_hash
from headwater.tasks import Task
from headwater.training.recorder import Recorder
from headwater.training.run import Run

OWN_FILES = "headwater_experiment_"
"""How the names of modules begin that experiments were loaded from."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """A training that can be repeated.

    Args:
        build: ``() -> model``, untrained. It is called with a seed set.
        train, test: datasets (see :class:`headwater.tasks.Examples`). ``test`` holds the queries that are measured.
        task: the loss and the measure.
        fit: ``(model, train, seed, recorder=None) -> model``: your own training. Where a recorder is given, call
            ``recorder.watch(model, optimizer)`` before the first step and ``recorder.step(indices)`` after each.
        name: for reports.
        stages: where ``fit`` records several stages, ``(train) -> {stage: its dataset}``, in the order of training; a dataset, or a
            pair (dataset, task) where the stage has a task of its own.

    >>> import torch
    >>> def fit(model, train, seed, recorder=None):
    ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...     if recorder:
    ...         recorder.watch(model, optimizer)
    ...     for _ in range(10):
    ...         optimizer.zero_grad()
    ...         ((model(train[0]) - train[1]) ** 2).mean().backward()
    ...         optimizer.step()
    ...         if recorder:
    ...             recorder.step(range(len(train[0])))
    ...     return model
    >>> data = torch.randn(20, 3), torch.randn(20, 1)
    >>> from headwater.tasks import Regression
    >>> experiment = Experiment(lambda: torch.nn.Linear(3, 1), data, data, Regression(), fit, "a line")
    """

    build: Callable[[], nn.Module]
    train: Any
    test: Any
    task: Task
    fit: Callable[..., Any]
    name: str | None = None
    stages: Callable[[Any], dict[str, Any]] | None = None

    def record(self, path: str | Path, *, seed: int = 0, checkpoints: int = 6, overwrite: bool = False) -> Run:
        """Train once on everything, with ``seed``, recorded in the directory ``path``. Raises RunError where one is there already."""
        with settled(seed):
            model = self.build()
            recorder = Recorder(path, task=self.task, train=self.train, checkpoints=checkpoints, seed=seed, overwrite=overwrite)
            with recorder:
                self.fit(model, self.train, seed, recorder)
                recorder.finish()
        return self.open(path)

    def open(self, path: str | Path, *, device: torch.device | str | None = None) -> Run:
        """The run that :meth:`record` left at ``path``."""
        if self.stages is None:
            return Run.open(path, build=self.build, train=self.train, task=self.task, device=device)
        parts = {name: held if _with_task(held) else (held, self.task) for name, held in self.stages(self.train).items()}
        train, task = ({name: pair[k] for name, pair in parts.items()} for k in (0, 1))
        return Run.open(path, build=self.build, train=train, task=task, device=device)

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> Experiment:
        """The experiment that a Python file defines at its top level.

        Args:
            path: the file. It is run as a module, so a part under ``if __name__ == "__main__":`` is not.
            name: of the variable; default: the only Experiment there is.

        Raises:
            InputError: no such file, or not exactly one experiment of that name.
        """
        module = _run_file(Path(path))
        found = {key: value for key, value in vars(module).items() if isinstance(value, cls) and not key.startswith("_")}
        if name is not None and name in found:
            return found[name]
        if name is None and len(set(map(id, found.values()))) == 1:
            return next(iter(found.values()))
        wanted = f"a variable {name!r} that holds a hw.Experiment" if name else "one variable that holds a hw.Experiment"
        raise InputError(f"{path} defines {sorted(found) or 'no experiment'}", wanted, "experiment = hw.Experiment(build, train, test, task, fit)")

    def __reduce__(self) -> tuple[Any, ...]:
        """Experiments from a file are sent to other processes with the file's path, since nobody could import it by its name."""
        content = pickle.dumps({f.name: getattr(self, f.name) for f in fields(self)})
        functions = (self.build, self.fit)
        files = {sys.modules[m].__file__ for m in (getattr(f, "__module__", "") or "" for f in functions) if m.startswith(OWN_FILES)}
        return _revive, (sorted(str(f) for f in files), content)


def _with_task(held: Any) -> bool:
    return isinstance(held, tuple) and len(held) == 2 and isinstance(held[1], Task)


def _revive(files: list[str], content: bytes) -> Experiment:
    for file in files:
        _run_file(Path(file))
    return Experiment(**pickle.loads(content))


def _run_file(path: Path) -> ModuleType:
    """Import a Python file under a name of its own, so that it can neither shadow another module nor be shadowed."""
    path = path.resolve()
    if not path.is_file():
        raise InputError(f"{path} is not a file", "a Python file that defines a hw.Experiment", "check the path")
    name = f"{OWN_FILES}{path.stem}_{bytes_hash(str(path).encode())[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file", "a file ending in .py", "rename it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    sys.path.insert(0, str(path.parent))  # what lies beside the file can be imported by it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@contextmanager
def settled(seed: int, threads: int | None = None) -> Iterator[None]:
    """Every generator (random, numpy, torch) seeded, and ``threads`` torch threads; all is put back afterwards."""
    before, states = torch.get_num_threads(), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    try:
        torch.set_num_threads(threads or before)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
    finally:
        torch.set_num_threads(before)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
