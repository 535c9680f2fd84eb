"""The recorded training as a list of moves: which examples, under which settings, in which mode, with which random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import MissingCheckpoint, ReplayMismatch, RunError
from headwater.store import read_log, read_tensors
from headwater.tasks.diffusion import Noised
from headwater.training.journal import optimizer_file
from headwater.training.optimizers import ADAM, Group
from headwater.training.replay.clipping import Clipping
from headwater.training.replay.updates import Adam, Rule, Sgd
from headwater.training.run import Run, Stage


@dataclass(frozen=True)
class Part:
    """One forward pass of a step: examples ``start`` to ``stop`` of its batch. ``mode``: names of the modules in training mode (None:
    not recorded, taken as all). ``cast``: (device, dtype) of autocast, or (). ``random``: its row in random.npy, None: it drew nothing."""

    start: int
    stop: int
    mode: frozenset[str] | None = None
    cast: tuple[str, ...] = ()
    random: int | None = None


@dataclass(frozen=True, eq=False)
class Move:
    """One recorded step (from 1): ``ids`` in the data of ``stage``; a rule for each parameter group; ``clip`` multiplies the gradient.
    ``moved``: False where a gradient scaler skipped it. ``loss``, ``norm`` (of the clipped gradient): NaN where not recorded."""

    step: int
    stage: Stage
    ids: np.ndarray
    parts: tuple[Part, ...]
    rules: tuple[Rule, ...]
    clip: float
    moved: bool
    touched: bool
    loss: float
    norm: float

    def rule_of(self, name: str) -> Rule:
        """How the parameter ``name`` is moved."""
        return next(rule for rule, group in zip(self.rules, self.stage.optimizer.groups, strict=True) if name in group.names)

    @property
    def begins(self) -> bool:
        """Whether it is its stage's first."""
        return self.step == self.stage.start + 1

    @property
    def scale(self) -> float:
        """What the sum of the batch's losses is multiplied with, before clipping."""
        return 1.0 / len(self.ids) if self.stage.reduction == "mean" else 1.0


class Script:
    """All moves of a run.

    Raises:
        RunError: the order of examples, a diffusion model's noise events, or Adam's beta1 was not recorded. MissingCheckpoint: the weights before training were not.
        ReplayMismatch: a dataset whose examples change from read to read.

    ``clipping``: what factors below 1 stand for, "norm", "fixed", or "auto": as the record tells (see :class:`Clipping`).
    """

    def __init__(self, run: Run, clipping: str = "auto") -> None:
        self.run, self._as_clipping = run, clipping
        self._clippings: dict[int, Clipping] = {}
        self.facts: dict[str, Any] = run.manifest.get("replay", {})
        self.length = run.stages[-1].stop
        self._check()

    def _check(self) -> None:
        self.run.order(1)
        if self.run.checkpoints[0] != 0:
            raise MissingCheckpoint(f"no weights from before training in {self.run.path}", "checkpoint 0", "record the training with hw.Recorder, from its start")
        for stage in self.run.stages:
            if isinstance(stage.data, Noised):
                self.run.events_of(1)  # refused here where they were not recorded
            if stage.fingerprint.startswith("unstable"):
                raise ReplayMismatch(
                    f"the data of stage {stage.name!r} gives other values when an example is read twice (random augmentation)",
                    "data that always reads the same",
                    "augment before training and keep the result, or draw each example's augmentation from a generator seeded by its number and the epoch",
                    escaped=("augmentation",),
                )
            if stage.optimizer.kind == ADAM and not self.facts and any(group.beta1 is None for group in stage.optimizer.groups):
                raise RunError(
                    f"a run that does not know Adam's beta1 in stage {stage.name!r} (recorded by an older version)", "a run that does", "record the training again"
                )

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Move]:
        return (self.move(step) for step in range(1, self.length + 1))

    def move(self, step: int) -> Move:
        """The step (from 1)."""
        stage, rows = self.stage_of(step), self._rows[step - 1]
        ids = self.run.order(step).astype(np.int64)
        moved, touched, loss, norm = self._moves[step - 1] if self._moves else (any(row["rate"] > 0 or row["momentum"] > 0 for row in rows), False, np.nan, np.nan)
        rules = tuple(self._rule(stage, step, group, rows[number], number) for number, group in enumerate(stage.optimizer.groups)) if moved else ()
        return Move(step, stage, ids, self._parts(step, len(ids)), rules, rows[0]["clip"], moved, touched, loss, norm)

    def stage_of(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return next(stage for stage in self.run.stages if stage.start < step <= stage.stop)

    def clipping(self, stage: Stage) -> Clipping:
        """What a stage's clipping factors stand for. Raises GradientError where the record does not tell."""
        if stage.index not in self._clippings:
            moves = [(self._rows[k][0]["clip"], *(self._moves[k][::3] if self._moves else (True, np.nan))) for k in range(stage.start, stage.stop)]
            told = np.array([(clip, norm) for clip, moved, norm in moves if moved]).reshape(-1, 2)
            self._clippings[stage.index] = Clipping.told(told[:, 0], told[:, 1], self._as_clipping)
        return self._clippings[stage.index].checked(stage.name)

    def _rule(self, stage: Stage, step: int, group: Group, row: dict[str, Any], number: int) -> Rule:
        """A group's settings at a step: as they were then, or where that was not noted as they were when the stage began."""
        noted = self._settings.get((step, number))
        if stage.optimizer.kind == ADAM:
            beta1 = noted["beta1"] if noted is not None else group.beta1
            beta2, eps = (noted["beta2"], noted["eps"]) if noted is not None else (group.beta2, group.eps)
            amsgrad = noted["amsgrad"] if noted is not None else bool(group.amsgrad)
            assert beta1 is not None
            return Adam(row["rate"], beta1, beta2, eps, row["decay"], group.decoupled, amsgrad)
        dampening, nesterov = (noted["dampening"], noted["nesterov"]) if noted is not None else (group.dampening, group.nesterov)
        return Sgd(row["rate"], row["momentum"], dampening, nesterov, row["decay"])

    def _parts(self, step: int, batch: int) -> tuple[Part, ...]:
        """The step's forward passes, if they share out its batch; else one pass for all."""
        rows = self._forwards.get(step)
        if rows is None:
            return (Part(0, batch),)
        ends = [*accumulate(row["batch"] for row in rows)]
        if ends[-1] != batch:
            rows, ends = rows[:1], [batch]
        parts, start = [], 0
        for row, end in zip(rows, ends, strict=True):
            parts.append(Part(start, end, self.modes[row["mode"]], self._casts[row["cast"]], row["random"] if row["random"] >= 0 else None))
            start = end
        return tuple(parts)

    # -- what was logged -------------------------------------------------------------------------------------------------------

    # as plain numbers: reading a field of numpy's records costs as much as a small kernel, and every step reads a dozen

    @cached_property
    def _rows(self) -> list[list[dict[str, Any]]]:
        """Of each step, its groups'."""
        steps: list[list[dict[str, Any]]] = []
        for row in _plain(self.run.steps):
            if not steps or steps[-1][0]["step"] != row["step"]:
                steps.append([])
            steps[-1].append(row)
        return steps

    def _log(self, name: str) -> np.ndarray | None:
        return read_log(self.run.path / f"{name}.npy", self.facts[name]) if self.facts else None

    @cached_property
    def _moves(self) -> list[tuple[bool, bool, float, float]]:
        """Of each step: moved, touched, loss, norm; empty where that was not recorded."""
        return [(row["moved"], row["touched"], row["loss"], row["norm"]) for row in _plain(self._log("moves"))]

    @cached_property
    def _settings(self) -> dict[tuple[int, int], dict[str, Any]]:
        return {(row["step"], row["group"]): row for row in _plain(self._log("settings"))}

    @cached_property
    def _forwards(self) -> dict[int, list[dict[str, Any]]]:
        found: dict[int, list[dict[str, Any]]] = {}
        for row in _plain(self._log("forwards")):
            found.setdefault(row["step"], []).append(row)
        return found

    @cached_property
    def _casts(self) -> list[tuple[str, ...]]:
        return [tuple(cast) for cast in self.facts["casts"]]

    @cached_property
    def _random(self) -> np.ndarray | None:
        return self._log("random")

    def random(self, row: int) -> tuple[Tensor, Tensor]:
        """The states of the CPU's and the GPU's generator before a forward pass."""
        assert self._random is not None
        return torch.from_numpy(self._random[row]["cpu"].copy()), torch.from_numpy(self._random[row]["cuda"].copy())

    @cached_property
    def draws(self) -> bool:
        """Whether any forward pass drew random numbers."""
        return bool(self._random is not None and len(self._random))

    @cached_property
    def modes(self) -> list[frozenset[str] | None]:
        """The modes that occur."""
        return [frozenset(names) for names in self.facts["modes"]] if self.facts else [None]

    def remembered(self, stage: Stage) -> dict[str, Tensor]:
        """What the stage's optimizer remembered before its first step, as ``KEY/PARAMETER``; empty for a new one."""
        checksum = self.run.manifest["stages"][stage.index].get("remembered", "")
        return read_tensors(optimizer_file(self.run.path, stage.start), checksum) if checksum else {}


def _plain(rows: np.ndarray | None) -> Iterator[dict[str, Any]]:
    """A log's rows with Python's numbers."""
    if rows is None:
        return iter(())
    names = rows.dtype.names or ()
    return (dict(zip(names, row, strict=True)) for row in rows.tolist())


def split_parts(move: Move, batch_size: int | None, norms: Iterable[str] = ()) -> Move:
    """The move in parts of at most ``batch_size`` examples. Passes that drew random numbers, or had one of the ``norms`` (BatchNorm) in
    training mode, stay whole: their examples depend on each other's company."""
    if batch_size is None or all(part.stop - part.start <= batch_size for part in move.parts):
        return move
    parts: list[Part] = []
    for part in move.parts:
        whole = part.random is not None or any(part.mode is None or name in part.mode for name in norms)
        width = part.stop - part.start if whole else batch_size
        parts += [replace(part, start=start, stop=min(start + width, part.stop)) for start in range(part.start, part.stop, width)]
    return replace(move, parts=tuple(parts))
