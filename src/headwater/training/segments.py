"""Cutting a run into segments: stretches of training whose curvature and gradients count as stationary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from headwater.errors import InputError

if TYPE_CHECKING:
    from headwater.training.run import Run, Stage


@dataclass(frozen=True)
class Segment:
    """Steps (start, stop] of a stage, and the checkpoints that stand for them (at most ``stop``, after ``start``)."""

    stage: int
    start: int
    stop: int
    checkpoints: tuple[int, ...]


AUTO = "auto"
LEFT = 0.1  # the share of gradients' drift that automatic segments may leave inside
STILL = 1e-4  # a drift of a hundredth of the gradients themselves is none: weights are rounded


def segments(run: Run, counts: int | tuple[int, ...] | str) -> list[Segment]:
    """Segments in the order of training.

    A checkpoint stands for the steps since the one before it; a stage's checkpoints are shared out to its segments in order: evenly, or
    where gradients change (see :func:`shares`).

    Args:
        counts: how many segments in all (stages share them by their steps, at least one each), one number per stage, or "auto".

    Raises:
        InputError: more segments than checkpoints, or fewer than stages.
    """
    if isinstance(counts, str):
        return [segment for stage in run.stages for segment in _cut(stage, stage.checkpoints(run.checkpoints), shares(run, stage))]
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
        found += _cut(stage, held, [len(group) for group in np.array_split(np.array(held), count)])
    return found


def _cut(stage: Stage, held: Sequence[int], sizes: Sequence[int]) -> list[Segment]:
    """A stage's segments, of so many checkpoints each."""
    found, start = [], stage.start
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        mine = tuple(int(step) for step in held[end - size : end])
        found.append(Segment(stage.index, start, mine[-1], mine))
        start = mine[-1]
    return found


def shares(run: Run, stage: Stage) -> list[int]:
    """Of a stage the sizes, in checkpoints, of the fewest segments inside which gradients drift little.

    Up to checkpoint c the weights moved by ``t_c`` times a mean (preconditioned) gradient ``g_c``, t_c being the summed learning rate: so a
    record tells how gradients drift without a pass over the data. Borders leave the least of ``sum_c t_c |g_c - mean of the segment|^2``; there
    are as many as it takes to leave a tenth of what one segment leaves.
    """
    held = stage.checkpoints(run.checkpoints)
    known = [step for step in (stage.start, *held) if step in run.checkpoints]
    if len(known) < 3:  # one movement: nothing to compare it with
        return [1] * len(held) if len(held) < 2 else [len(held)]
    times, moved = _movements(run, known)
    gram = moved @ moved.T
    cost = np.full((len(times) + 1, len(times) + 1), np.inf)
    for a in range(len(times)):
        for b in range(a + 1, len(times) + 1):
            t = times[a:b]
            cost[a, b] = max(0.0, float(t @ gram.diagonal()[a:b] - t @ gram[a:b, a:b] @ t / max(t.sum(), np.finfo(float).tiny)))
    sizes = _cheapest(cost, max(LEFT * cost[0, -1], STILL * float(times @ gram.diagonal())))
    sizes[0] += len(held) - len(times)  # where the start was not recorded the first checkpoint has no movement: it goes with the second
    return sizes


def _movements(run: Run, steps: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Between neighbouring checkpoints the largest summed rate (c,), and the movement over it, (c, parameters)."""
    flat = [np.concatenate([t.double().numpy().ravel() for _, t in sorted(run.weights(step).items()) if t.is_floating_point()]) for step in steps]
    times = np.array([max(run.rates(a, b).values(), default=0.0) for a, b in pairwise(steps)])
    return times, np.stack([(b - a) / t if t > 0 else 0 * a for (a, b), t in zip(pairwise(flat), times, strict=True)])


def _cheapest(cost: np.ndarray, allowed: float) -> list[int]:
    """Sizes of the fewest consecutive groups whose costs sum to at most ``allowed``; ``cost[a, b]`` is that of items a to b - 1."""
    n = len(cost) - 1
    best, cuts = cost[0].copy(), [[[b] for b in range(n + 1)]]
    while best[n] > allowed and len(cuts) < n:
        through = best[:, None] + cost  # one group more, which begins at a
        through[0] = np.inf
        last = through.argmin(0)
        cuts.append([[*cuts[-1][a], b - a] for b, a in enumerate(last.tolist())])
        best = through.min(0)
    return [int(size) for size in cuts[-1][n]]


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
