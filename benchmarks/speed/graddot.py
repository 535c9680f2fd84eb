"""Exact Grad-Dot beside dattri: the same model, the same data, no projection on either side."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np

from speed import problem
from speed.contestant import run
from speed.tables import agreement, installed, spread, table, times


def measure(place: Path, tiny: bool, repeats: int) -> str:
    sizes = [(60, 8)] if tiny else [(1000, 100), (5000, 500)]
    widths = [784, 16, 12, 10] if tiny else [784, 128, 64, 10]
    return "### Exact Grad-Dot\n\n" + "\n\n".join(one(place / f"{n}", widths, n, m, repeats) for n, m in sizes) + "\n"


def one(place: Path, widths: list[int], train: int, queries: int, repeats: int) -> str:
    problem.make(place, widths, train, queries)
    contestants = {"Headwater": ("headwater_side:graddot", {})}
    if installed("dattri"):
        contestants["dattri"] = ("dattri_side:graddot", {"batch": 250 if train <= 1000 else 500})
    results: dict[str, list[dict]] = {}
    for _ in range(repeats):
        for name, (what, more) in contestants.items():
            results.setdefault(name, []).append(run(what, place, label=name, **more))
    rows = []
    for name, reports in results.items():
        costs = [sum(r["cpu"].values()) for r in reports]
        memory = [f"{median(r[k] for r in reports):,.0f}" for k in ("above", "peak")]
        scores = [f"{median(r['cpu']['scores'] for r in reports):.2f}"]
        ratio = times(median(sum(r["cpu"].values()) for r in results["dattri"]) / median(costs)) if name == "Headwater" and "dattri" in results else ""
        same = agreement(*(np.load(place / f"scores-{n}.npy") for n in ("Headwater", "dattri"))) if ratio else [""] * 3
        rows.append([name, *scores, spread(costs), ratio, *memory, *same])
    head = ["contestant", "scores", "total CPU s", "less CPU", "peak MB above baseline", "peak MB, whole process"]
    head += ["largest difference", "rms difference", "lowest Spearman"]
    return f"MLP {'-'.join(map(str, widths))}, {train:,} training examples x {queries} queries, float32.\n\n{table(head, rows)}"
