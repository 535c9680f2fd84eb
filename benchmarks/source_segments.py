"""Where to cut a training into SOURCE's segments: every way to share six checkpoints out, against exact unrolling and retrained halves.

    python benchmarks/source_segments.py            two problems, three schedules, three seeds: ten minutes on one quiet core
    python benchmarks/source_segments.py --tiny     one problem, one schedule, one seed, no retraining

Besides equal shares: borders at equal sums of learning rates; and borders by the drift of gradients, which a record holds without a pass
over the data: between checkpoints the weights moved by ``t_c`` times the mean (preconditioned) gradient, so segments are chosen that
leave the least of ``sum_c t_c |g_c - mean of the segment|^2``, g_c being movement over rate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from source_problems import Problem, agreement, constant, measure, problem, step_decay, unrolled, warmup_cosine

import headwater as hw
from headwater.influence.methods import Pace, Table, total_rate
from headwater.training import Segment

SETTINGS = {
    "waves": ("sgd", {"lr": 0.05, "momentum": 0.9}),
    "concrete": ("adamw", {"lr": 0.01, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1}),
}
SCHEDULES = {"constant": constant, "warmup, cosine": warmup_cosine, "step decay": step_decay}
Cut = tuple[int, ...]
"""Sizes of the segments, in checkpoints."""


@dataclass(frozen=True)
class Shared:
    """SOURCE with given shares of a run's checkpoints."""

    sizes: Cut

    def plan(self, run: hw.Run) -> Table:
        rows, start, held = [], 0, list(run.stages[0].checkpoints(run.checkpoints))
        for size in self.sizes:
            mine, held = held[:size], held[size:]
            rows.append(hw.Source()._row(run, Segment(0, start, mine[-1], tuple(mine))))
            start = mine[-1]
        return Table(repr(self), tuple(rows), "measurement")


def cuts(checkpoints: int) -> list[Cut]:
    """All ways to share them out in order."""
    found = []
    for k in range(checkpoints):
        for borders in combinations(range(1, checkpoints), k):
            edges = (0, *borders, checkpoints)
            found.append(tuple(b - a for a, b in zip(edges, edges[1:], strict=False)))
    return found


def equal(checkpoints: int, count: int) -> Cut:
    return tuple(len(part) for part in np.array_split(np.arange(checkpoints), count))


def intervals(run: hw.Run) -> tuple[np.ndarray, np.ndarray]:
    """Of each checkpoint the summed rate since the one before, (c,), and the weights' movement over it, (c, parameters)."""
    steps = run.checkpoints
    times = np.array([total_rate(run, Pace(a, b)) for a, b in zip(steps, steps[1:], strict=False)])
    flat = np.stack([np.concatenate([t.numpy().ravel() for t in run.weights(s).values()]) for s in steps])
    return times, np.diff(flat, axis=0) / times[:, None]


def by_cost(run: hw.Run, count: int, rates_only: bool) -> Cut:
    """The cut into ``count`` segments that leaves the least of gradients' drift, or whose rates are most equal."""
    times, moved = intervals(run)

    def cost(cut: Cut) -> float:
        parts = np.split(np.arange(len(times)), np.cumsum(cut)[:-1])
        if rates_only:
            return float(sum(times[p].sum() ** 2 for p in parts))
        means = [np.average(moved[p], axis=0, weights=times[p]) for p in parts]
        return float(sum((times[p] * ((moved[p] - m) ** 2).sum(1)).sum() for p, m in zip(parts, means, strict=True)))

    return min((c for c in cuts(len(times)) if len(c) == count), key=cost)


def chosen(run: hw.Run, left: float) -> Cut:
    """As many segments as it takes to leave no more than a share ``left`` of the drift that one segment leaves."""
    times, moved = intervals(run)

    def drift(cut: Cut) -> float:
        parts = np.split(np.arange(len(times)), np.cumsum(cut)[:-1])
        return float(sum((times[p] * ((moved[p] - np.average(moved[p], axis=0, weights=times[p])) ** 2).sum(1)).sum() for p in parts))

    whole = drift((len(times),))
    for count in range(1, len(times) + 1):
        cut = by_cost(run, count, False)
        if drift(cut) <= left * whole:
            return cut
    return equal(len(times), len(times))


def contest(of: Problem, seed: int, place: Path, banks: bool) -> list[tuple[str, Cut, float, float]]:
    """(rule, its cut, Spearman with exact unrolling, LDS) for every rule."""
    run, queries = of.record(place / f"{of.name}-{seed}", seed)
    truth, every = unrolled(of, run, queries), cuts(len(run.checkpoints) - 1)
    scores = dict(zip(every, hw.trace(run, queries, [Shared(c) for c in every], measure=measure(of), progress=False), strict=True))
    against = {c: agreement(s.values, truth)[0] for c, s in scores.items()}
    halves = {c: float("nan") for c in every}
    if banks:
        train = of.data(seed)[0]
        experiment = hw.Experiment(of.seeded(seed), train, queries, of.task, of.fit)
        asked = measure(of)
        bank = hw.evaluate.retrain(experiment, hw.evaluate.halves(len(train[1]), 40, seed=0), seeds=2, measure=asked, progress=False)
        halves = {c: hw.evaluate.lds(s, bank, bootstrap=2).mean for c, s in scores.items()}
    count = len(run.checkpoints) - 1
    rules = {f"equal shares, {k}": equal(count, k) for k in (1, 2, 3, count)}
    rules |= {f"equal rates, {k}": by_cost(run, k, True) for k in (2, 3)} | {f"drift, {k}": by_cost(run, k, False) for k in (2, 3)}
    rules |= {f"drift, down to {left:.0%}": chosen(run, left) for left in (0.3, 0.1)}
    rules |= {f"(best of all cuts into {k})": max((c for c in every if len(c) == k), key=against.__getitem__) for k in (2, 3)}
    rules |= {f"(worst of all cuts into {k})": min((c for c in every if len(c) == k), key=against.__getitem__) for k in (2, 3)}
    return [(rule, cut, against[cut], halves[cut]) for rule, cut in rules.items()]


def table(rows: Sequence[Sequence[tuple[str, Cut, float, float]]]) -> None:
    """Means over seeds, and the cuts of the first."""
    for same in zip(*rows, strict=True):
        rule, cut = same[0][:2]
        unrolling, lds = (np.mean([row[k] for row in same]) for k in (2, 3))
        print(f"| {rule} | {'-'.join(map(str, cut))} | {unrolling:.3f} | {lds:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    names, schedules, seeds = (["waves"], ["step decay"], (0,)) if given.tiny else (list(SETTINGS), list(SCHEDULES), (0, 1, 2))
    with tempfile.TemporaryDirectory(prefix="headwater-segments-") as folder:
        for name in names:
            for schedule in schedules:
                of = problem(name, *SETTINGS[name]).with_(schedule=SCHEDULES[schedule], name=f"{name}, {schedule}")
                print(f"\n{of.name} ({of.kind}), seeds {', '.join(map(str, seeds))}\n")
                print("| cut | of six checkpoints | Spearman with exact unrolling | LDS |\n|---|---|---|---|")
                table([contest(of, seed, Path(folder), not given.tiny) for seed in seeds])
                print(file=sys.stderr)


if __name__ == "__main__":
    main()
