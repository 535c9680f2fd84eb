"""Checkpoints of one training as members: the ensemble that costs no training at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from headwater.errors import InputError
from headwater.influence.ensembles.carrying import carry_out
from headwater.influence.ensembles.ensemble import check_method, plain
from headwater.influence.ensembles.members import Member
from headwater.influence.methods import Source, TracIn
from headwater.influence.request import Request
from headwater.influence.unrolled import Unrolled
from headwater.result import TrainingScores
from headwater.training import Run

ALONG = (Source, TracIn, Unrolled)
"""Methods that look at a training's checkpoints by themselves."""


@dataclass(frozen=True)
class CheckpointEnsemble:
    """A method averaged over the checkpoints of one training, each taken as if training had ended there.

    Nothing is trained for it. On both digit classifiers of docs/which-method.md six checkpoints of one training were ahead of ten trainings, under
    TRAK and influence functions; on the text model they were level with five under TRAK, and gave influence functions little.

    Args:
        method: one that looks at a single model: ``hw.Trak()``, ``hw.Influence(damping=...)``, ``hw.GradDot()``, ``hw.GradCos()`` ...
            TracIn, Source and Unrolled follow a training by themselves and are refused. A random projection is drawn anew for
            each checkpoint. ``Influence()`` without a damping takes that of a training which ended at the checkpoint.
        members: how many checkpoints, the last ones of the last stage; default: all of that stage.

    With ``hw.Ensemble`` it has two levels: ``hw.Ensemble(hw.CheckpointEnsemble(method), runs)``. ``stderr`` is then that of the runs;
    of one run it says how much the scores moved while the model trained, not how much another training would differ.

    Raises:
        InputError: a method that follows training, or more members than the last stage has checkpoints.

    >>> import headwater as hw
    >>> CheckpointEnsemble(hw.Trak(), members=4)
    CheckpointEnsemble(Trak(), members=4)
    """

    method: Any
    members: int | None = None

    def __post_init__(self) -> None:
        check_method(self.method, "CheckpointEnsemble")
        if isinstance(self.method, ALONG):
            raise InputError(
                f"CheckpointEnsemble of {type(self.method).__name__}, which follows training through its checkpoints by itself",
                "a method that looks at one model, such as hw.Trak() or hw.Influence()",
                "leave the ensemble out, or average over independent models: hw.Ensemble(method, runs)",
            )
        if self.members is not None and self.members < 1:
            raise InputError(f"members={self.members}", "at least one checkpoint", "members=6, or leave it out for all")

    def __repr__(self) -> str:
        return f"CheckpointEnsemble({self.method!r}{'' if self.members is None else f', members={self.members}'})"

    def answer(self, request: Request) -> TrainingScores:
        """Scores averaged over the checkpoints (what :func:`headwater.trace` calls)."""
        return carry_out(repr(self), self.method, self.variants(request.run), request)

    def variants(self, run: Run) -> Sequence[Member]:
        """One member for each checkpoint, the final model first: it keeps the method's own projection."""
        held = run.stages[-1].checkpoints(run.checkpoints)[::-1]
        if self.members is not None and self.members > len(held):
            raise InputError(
                f"{self.members} checkpoints of the last stage of {run.path}, which has {len(held)}",
                f"at most {len(held)}",
                "leave members= out for all of them, or record the training with more: hw.Recorder(checkpoints=...)",
            )
        return [_member(run, step, number) for number, step in enumerate(held[: self.members])]


def _member(run: Run, step: int, number: int) -> Member:
    ended = run.until(step)
    return replace(plain(ended), home=run, name=f"step {step}", view=partial(run.until, step), seed=number)
