"""Cutting a run into segments: stretches of training whose curvature and gradients count as stationary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headwater.errors import InputError

if TYPE_CHECKING:
    from headwater.training.run import Run


@dataclass(frozen=True)
class Segment:
    """Steps (start, stop] of a stage, and the checkpoints that stand for them (at most ``stop``, after ``start``)."""

    stage: int
    start: int
    stop: int
    checkpoints: tuple[int, ...]


def segments(run: Run, counts: int | tuple[int, ...]) -> list[Segment]:
    """Segments in the order of training.

    A checkpoint stands for the steps since the one before it; a stage's checkpoints are shared out to its segments evenly, in order.

    Args:
        counts: how many segments in all (stages share them by their steps, at least one each), or one number per stage.

    Raises:
        InputError: more segments than checkpoints, or fewer than stages.
    """
    per_stage = _share(run, counts) if isinstance(counts, int) else counts
    if len(per_stage) != len(run.stages) or min(per_stage) < 1:
        raise InputError(f"segments={counts}", f"at least one for each of {len(run.stages)} stages", f"segments={len(run.stages)} or more")
    found = []
    for stage, count in zip(run.stages, per_stage, strict=True):
        held = stage.checkpoints(run.checkpoints)
        if len(held) < count:
            raise InputError(
                f"{count} segments in stage {stage.name!r}, which has {len(held)} checkpoints (at steps {list(held)})",
                "at least one checkpoint for each segment",
                f"use segments={len(held)} there, or record with checkpoints={2 * count}",
            )
        start = stage.start
        for group in np.array_split(np.array(held), count):
            stop = int(group[-1])
            found.append(Segment(stage.index, start, stop, tuple(int(c) for c in group)))
            start = stop
    return found


def _share(run: Run, total: int) -> tuple[int, ...]:
    """``total`` segments over the stages: one each, the rest where steps per segment are most, within a stage's checkpoints."""
    shares = [1] * len(run.stages)
    if total < len(shares):
        raise InputError(f"{total} segment(s) for a run of {len(shares)} stages", "at least one for each stage", f"segments={len(shares)} or more")
    limits = [len(stage.checkpoints(run.checkpoints)) for stage in run.stages]
    for _ in range(total - len(shares)):
        room = [i for i in range(len(shares)) if shares[i] < limits[i]] or range(len(shares))
        widest = max(room, key=lambda i: (run.stages[i].stop - run.stages[i].start) / shares[i])
        shares[widest] += 1
    return tuple(shares)
