"""What ``refine=`` is worth: agreement with exact unrolling, and LDS on retrained halves, with and without it.

    python benchmarks/source_refine.py             three trainings, 40 halves of two seeds each: six minutes on one quiet core
    python benchmarks/source_refine.py waves       one of them
    python benchmarks/source_refine.py --tiny      a bank of six

LDS and its differences with 95 % intervals over queries and subsets (:func:`headwater.evaluate.paired`); one recorded model each.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from source_problems import agreement, measure, problem, unrolled

import headwater as hw

PROBLEMS = {
    "waves": ("waves", "adam", {"lr": 0.01, "beta2": 0.99, "eps": 1e-3}),
    "digits": ("digits", "sgd", {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}),
    "concrete": ("concrete", "sgd", {"lr": 0.01, "momentum": 0.9}),
}
REFINE = hw.Refine(steps=60, tolerance=1e-2)
PAIRS = {
    "hw.Source()": (hw.Source(), hw.Source(refine=REFINE)),
    "hw.Source(segments=1)": (hw.Source(1), hw.Source(1, refine=REFINE)),
    "hw.Influence()": (hw.Influence(), hw.Influence(refine=REFINE)),
    "hw.Influence(), preconditioned, 10 steps": (hw.Influence(), hw.Influence(refine=hw.Refine(10, 0.0, preconditioned=True))),
}


def contest(name: str, place: Path, count: int, seeds: int) -> None:
    """One training's table."""
    of = problem(*PROBLEMS[name])
    run, queries = of.record(place / name, 0)
    asked, train = measure(of), of.data(0)[0]
    truth = unrolled(of, run, queries)
    experiment = hw.Experiment(of.seeded(0), train, queries, of.task, of.fit)
    bank = hw.evaluate.retrain(experiment, hw.evaluate.halves(len(train[1]), count, seed=0), seeds=seeds, measure=asked, progress=False)
    methods = [m for pair in PAIRS.values() for m in pair]
    scores = iter(hw.trace(run, queries, [*methods, hw.TracIn()], measure=asked, progress=False))
    judged = hw.evaluate.lds(truth, bank)
    print(f"\n{of.name}, {sum(p.numel() for p in run.model().parameters()):,} parameters; {count} halves x {seeds} seeds, noise ceiling {judged.ceiling:.2f}\n")
    print("| method | products a query | exact unrolling: without, with refine= | LDS without | LDS with | difference |\n|---|---|---|---|---|---|")
    for label in PAIRS:
        plain, refined = next(scores), next(scores)
        before, after, gain = hw.evaluate.lds(plain, bank), hw.evaluate.lds(refined, bank), hw.evaluate.paired(refined, plain, bank)
        found = refined.provenance["refined"]
        pairs = (agreement(plain.values, truth)[0], agreement(refined.values, truth)[0])
        cells = (
            f"{found['products'] / len(queries[1]):.0f}",
            f"{pairs[0]:.3f}, {pairs[1]:.3f}",
            f"{before.mean:.3f} [{before.low:.3f}, {before.high:.3f}]",
            f"{after.mean:.3f} [{after.low:.3f}, {after.high:.3f}]",
            f"{gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
        )
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
    tracin = hw.evaluate.lds(last := next(scores), bank)
    print(f"| hw.TracIn() | 0 | {agreement(last.values, truth)[0]:.3f} | {tracin.mean:.3f} [{tracin.low:.3f}, {tracin.high:.3f}] | | |")
    print(f"| exact unrolling | | 1 | {judged.mean:.3f} [{judged.low:.3f}, {judged.high:.3f}] | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="training", help=", ".join(PROBLEMS))
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    unknown = [name for name in given.names if name not in PROBLEMS]
    if unknown:
        parser.error(f"unknown training {unknown[0]!r}; there are {', '.join(PROBLEMS)}")
    with tempfile.TemporaryDirectory(prefix="headwater-refine-") as folder:
        for name in given.names or (["waves"] if given.tiny else PROBLEMS):
            contest(name, Path(folder), 6 if given.tiny else 40, 2)


if __name__ == "__main__":
    main()
