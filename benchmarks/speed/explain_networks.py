"""Integrated Gradients of networks beside captum: equal points, equal answers, time and memory."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np

from speed import pictures
from speed.contestant import run
from speed.tables import installed, spread, table, times

CONTESTANTS = {
    "Headwater": ("explain_sides:headwater", {}),
    "captum": ("explain_sides:captum", {}),
    "captum, internal_batch_size=256": ("explain_sides:captum", {"at_once": 256}),
}


def measure(place: Path, tiny: bool, repeats: int) -> str:
    names = ("MLP ReLU", "CNN ReLU")
    pictures.make(place, names, epochs=1 if tiny else 4)
    batch, points = (16, (4, 8)) if tiny else (256, (50, 200))
    contestants = CONTESTANTS if installed("captum") else {"Headwater": CONTESTANTS["Headwater"]}
    rows = []
    for threads in (1, 2):
        for name in names:
            for n in points:
                reports: dict[str, list[dict]] = {}
                for _ in range(repeats):
                    for who, (what, more) in contestants.items():
                        reports.setdefault(who, []).append(run(what, place, threads=threads, name=name, batch=batch, points=n, label=who, **more))
                rows += [_row(place, threads, name, n, who, reports) for who in contestants]
    clock = "CPU seconds on one thread, wall seconds on two"
    head = ["threads, network, points, contestant", clock, "of captum's default", "peak MB above baseline", "of captum's default", "largest difference"]
    text = f"Integrated Gradients of {batch} digits, float32, zero baseline, Gauss-Legendre nodes on both sides. MLP 784-128-128-10, CNN 8-16 channels."
    return f"### Explanations of networks\n\n{text}\n\n{table(head, rows)}\n"


def _row(place: Path, threads: int, name: str, points: int, who: str, reports: dict[str, list[dict]]) -> list[str]:
    clock = "cpu" if threads == 1 else "wall"
    seconds = [r[clock]["explain"] for r in reports[who]]
    memory = median(r["above"] for r in reports[who])
    base = reports.get("captum")
    if base is None or who == "captum":
        return [f"{threads}, {name}, {points}, {who}", spread(seconds, 3), "", f"{memory:,.0f}", "", ""]
    share = median(seconds) / median(r[clock]["explain"] for r in base)
    less = memory / median(r["above"] for r in base)
    a, b = (np.load(place / f"values-{label}.npy").astype(float) for label in (who, "captum"))
    return [f"{threads}, {name}, {points}, {who}", spread(seconds, 3), times(share), f"{memory:,.0f}", times(less), f"{np.abs(a - b).max() / np.abs(b).max():.0e}"]
