"""The recorded training as a list of moves: which examples, under which settings, in which mode, with which random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import MissingCheckpoint, ReplayMismatch, RunError
from headwater.store import read_log, read_tensors
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
        RunError: the order of examples or Adam's beta1 was not recorded. MissingCheckpoint: the weights before training were not.
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
        stage = self.stage_of(step)
        rows = self._rows[step - 1]
        ids = self.run.order(step).astype(np.int64)
        log = self._moves[step - 1] if self._moves is not None else None
        moved = bool(log["moved"]) if log is not None else bool((rows["rate"] > 0).any() or (rows["momentum"] > 0).any())
        rules = tuple(self._rule(stage, step, group, rows[number], number) for number, group in enumerate(stage.optimizer.groups)) if moved else ()
        loss, norm = (float(log["loss"]), float(log["norm"])) if log is not None else (np.nan, np.nan)
        return Move(step, stage, ids, self._parts(step, len(ids)), rules, float(rows["clip"][0]), moved, log is not None and bool(log["touched"]), loss, norm)

    def stage_of(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return next(stage for stage in self.run.stages if stage.start < step <= stage.stop)

    def clipping(self, stage: Stage) -> Clipping:
        """What a stage's clipping factors stand for. Raises GradientError where the record does not tell."""
        if stage.index not in self._clippings:
            steps = range(stage.start, stage.stop)
            factors = np.array([float(self._rows[k]["clip"][0]) for k in steps])
            norms = np.full(len(steps), np.nan) if self._moves is None else self._moves["norm"][stage.start : stage.stop].astype(float)
            took = np.ones(len(steps), bool) if self._moves is None else self._moves["moved"][stage.start : stage.stop]
            self._clippings[stage.index] = Clipping.told(factors[took], norms[took], self._as_clipping)
        return self._clippings[stage.index].checked(stage.name)

    def _rule(self, stage: Stage, step: int, group: Group, row: np.void, number: int) -> Rule:
        """A group's settings at a step: as they were then, or where that was not noted as they were when the stage began."""
        noted = self._settings.get((step, number))
        if stage.optimizer.kind == ADAM:
            beta1 = float(noted["beta1"]) if noted is not None else group.beta1
            beta2, eps = (float(noted["beta2"]), float(noted["eps"])) if noted is not None else (group.beta2, group.eps)
            amsgrad = bool(noted["amsgrad"]) if noted is not None else bool(group.amsgrad)
            assert beta1 is not None
            return Adam(float(row["rate"]), beta1, beta2, eps, float(row["decay"]), group.decoupled, amsgrad)
        dampening, nesterov = (float(noted["dampening"]), bool(noted["nesterov"])) if noted is not None else (group.dampening, group.nesterov)
        return Sgd(float(row["rate"]), float(row["momentum"]), dampening, nesterov, float(row["decay"]))

    def _parts(self, step: int, batch: int) -> tuple[Part, ...]:
        """The step's forward passes, if they share out its batch; else one pass for all."""
        rows = self._forwards.get(step)
        if rows is None:
            return (Part(0, batch),)
        ends = np.cumsum(rows["batch"], dtype=np.int64)
        if ends[-1] != batch:
            rows, ends = rows[:1], np.array([batch])
        parts, start = [], 0
        for row, end in zip(rows, ends.tolist(), strict=True):
            mode, cast = frozenset(self.facts["modes"][row["mode"]]), tuple(self.facts["casts"][row["cast"]])
            parts.append(Part(start, end, mode, cast, int(row["random"]) if row["random"] >= 0 else None))
            start = end
        return tuple(parts)

    # -- what was logged -------------------------------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> list[np.ndarray]:
        steps = self.run.steps
        return np.split(steps, np.flatnonzero(np.diff(steps["step"])) + 1)

    def _log(self, name: str) -> np.ndarray | None:
        return read_log(self.run.path / f"{name}.npy", self.facts[name]) if self.facts else None

    @cached_property
    def _moves(self) -> np.ndarray | None:
        return self._log("moves")

    @cached_property
    def _settings(self) -> dict[tuple[int, int], np.void]:
        rows = self._log("settings")
        return {} if rows is None else {(int(row["step"]), int(row["group"])): row for row in rows}

    @cached_property
    def _forwards(self) -> dict[int, np.ndarray]:
        rows = self._log("forwards")
        if rows is None or not len(rows):
            return {}
        parts = np.split(rows, np.flatnonzero(np.diff(rows["step"])) + 1)
        return {int(part["step"][0]): part for part in parts}

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
