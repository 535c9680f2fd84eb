"""EK-FAC fit and pairwise scores of an MLP, beside kronfluence, with the empirical Fisher on both sides: then nothing is random and
the factors, and so the scores, must be equal."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from speed import problem
from speed.contestant import run
from speed.tables import agreement, installed, spread, table, times

STAGES = ("set-up", "covariance", "eigendecomposition", "eigenvalue correction", "scores")
BATCHES = {"kronfluence": (256, 100, 500), "kronfluence, small batches": (32, 32, 128)}
Results = dict[str, list[dict[str, Any]]]


def measure(place: Path, tiny: bool, repeats: int) -> str:
    widths, train, queries = ([784, 16, 12, 10], 60, 8) if tiny else ([784, 512, 256, 10], 5000, 500)
    problem.make(place, widths, train, queries)
    dampings = {"default": 1e-2} if tiny else {"default": problem.damping(train), "1e-3": 1e-3, "4e-6": 4e-6}
    results: Results = {}
    for number in range(repeats):  # in alternation, so that what else the machine does meets all alike
        for label, report in contestants(place, dampings, first=number == 0):
            results.setdefault(label, []).append(report)
    return report_of(place, results, dampings, f"MLP {'-'.join(map(str, widths))}, {train:,} training examples x {queries} queries, float32")


def contestants(place: Path, dampings: dict[str, float], first: bool) -> Any:
    """(label, report), one after the other; some are run once only."""
    for name, damping in dampings.items():
        yield f"Headwater|{name}", run("headwater_side:influence", place, damping=damping, label=f"ours-{name}")
        yield f"Headwater, tolerance=0|{name}", run("headwater_side:influence", place, damping=damping, label=f"exact-{name}", tolerance=0.0)
    if first:
        yield "Headwater, exact Gauss-Newton|default", run("headwater_side:influence", place, damping=dampings["default"], label="gauss-newton", fisher="exact")
    if not installed("kronfluence"):
        return
    for peer, batches in list(BATCHES.items())[: 2 if first else 1]:
        chosen = list(dampings) if peer == "kronfluence" else ["default"]
        labels = [f"{peer}-{name}".replace(", ", "-").replace(" ", "-") for name in chosen]
        report = run("kronfluence_side:influence", place, dampings=[dampings[n] for n in chosen], labels=labels, batches=batches)
        for name, label in zip(chosen, labels, strict=True):
            yield f"{peer}|{name}", for_one(report, label)


def for_one(report: dict[str, Any], label: str) -> dict[str, Any]:
    """The part of a report that one damping's scores cost: what all share, and its own last stage."""
    kept = {}
    for clock in ("cpu", "wall"):
        own = report[clock][f"scores {label}"]
        kept[clock] = {**{n: t for n, t in report[clock].items() if not n.startswith("scores")}, "scores": own}
    return {**report, **kept}


def total(report: dict[str, Any], clock: str = "cpu") -> float:
    return sum(report[clock].values())


def report_of(place: Path, results: Results, dampings: dict[str, float], title: str) -> str:
    rows = []
    for name, damping in dampings.items():
        peer = results.get(f"kronfluence|{name}")
        for label in [label for label in results if label.endswith("|" + name)]:
            mine = results[label]
            stages = [f"{median(r['cpu'].get(s, 0.0) for r in mine):.2f}" for s in STAGES]
            ours = peer and label.startswith("Headwater")
            ratio = times(median(map(total, peer)) / median(map(total, mine))) if ours and peer else ""
            lighter = f"{median(r['above'] for r in mine) / median(r['above'] for r in peer):.2f}" if ours and peer else ""
            memory = [f"{median(r[k] for r in mine):,.0f}" for k in ("above", "peak")]
            rows.append([f"{damping:.1e}: {label.split('|')[0]}", *stages, spread([total(r) for r in mine], 1), ratio, *memory, lighter])
    head = ["damping: contestant", *STAGES, "total CPU s", "less CPU", "peak MB above baseline", "peak MB, whole process", "memory / kronfluence's"]
    return f"### EK-FAC: fit and pairwise scores\n\n{title}; medians of CPU seconds by stage.\n\n{table(head, rows)}\n\n{equality(place, results, dampings)}\n"


def equality(place: Path, results: Results, dampings: dict[str, float]) -> str:
    rows = []
    for name, damping in dampings.items():
        file = place / f"scores-kronfluence-{name}.npy"
        dimension = f"{results[f'Headwater|{name}'][0]['dimension']:,.0f}"
        for label, kind in (("ours", "Headwater"), ("exact", "Headwater, tolerance=0")):
            if file.exists():
                rows.append([f"{damping:.1e}: {kind}", dimension, *agreement(np.load(place / f"scores-{label}-{name}.npy"), np.load(file))])
    head = ["scores against kronfluence's", "effective dimension", "largest difference / largest score", "rms difference / rms score", "lowest Spearman of a query"]
    return table(head, rows) if rows else "kronfluence is not installed: nothing to compare with."
