"""How cost and memory grow with training examples, checkpoints and queries. Headwater alone."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from speed import problem
from speed.contestant import run
from speed.tables import table

WIDTHS = [784, 128, 64, 10]


def measure(place: Path, tiny: bool, repeats: int) -> str:
    sizes = [60, 120] if tiny else [1000, 2000, 4000, 8000, 16000]
    several = [1, 2] if tiny else [1, 2, 4, 6]
    asked = [2, 4] if tiny else [50, 100, 200, 400, 800]
    base, few = (60, 4) if tiny else (4000, 100)
    parts = [
        curve(place, "training examples", sizes, repeats, lambda k: (k, few, 1), f"Influence with EK-FAC, {few} queries"),
        curve(place, "queries", asked, repeats, lambda k: (base, k, 1), f"Influence with EK-FAC, {base:,} training examples"),
        curve(place, "checkpoints", several, repeats, lambda k: (base, few, k), f"SOURCE in one segment, {base:,} training examples, {few} queries"),
    ]
    return f"### Scaling\n\nMLP {'-'.join(map(str, WIDTHS))}, float32, empirical Fisher. The data is part of the baseline.\n\n" + "\n\n".join(parts) + "\n"


def curve(place: Path, what: str, values: list[int], repeats: int, shape: Any, title: str) -> str:
    """One table: cost and peak memory at each value of what varies, and the straight line that fits the cost best."""
    reports: dict[int, list[dict[str, Any]]] = {}
    for number in range(repeats):
        for value in values:
            train, queries, checkpoints = shape(value)
            spot = place / f"{what.split()[0]}-{value}"
            if number == 0:
                problem.make(spot, WIDTHS, train, queries, checkpoints)
            call = ("headwater_side:source", {}) if what == "checkpoints" else ("headwater_side:influence", {"damping": 1e-2})
            reports.setdefault(value, []).append(run(call[0], spot, label="scaling", **call[1]))
    cost = [median(sum(r["cpu"].values()) for r in reports[v]) for v in values]
    slope, start = np.polyfit(values, cost, 1)
    off = max(abs(start + slope * v - c) / c for v, c in zip(values, cost, strict=True))
    rows = []
    for value, seconds in zip(values, cost, strict=True):
        train, queries, _ = shape(value)
        scores, above = 4 * train * queries / 2**20, median(r["above"] for r in reports[value])
        rows.append([f"{value:,}", f"{seconds:.2f}", f"{1000 * seconds / value:.3f}", f"{above:,.0f}", f"{scores:,.1f}", f"{above - scores:,.0f}"])
    head = [what, "CPU s", "CPU ms for each", "peak MB above baseline", "of which the scores", "the rest"]
    line = f"Best straight line: {start:.2f} s + {1000 * slope:.3f} ms for each; the worst point is {100 * off:.0f} % off it."
    return f"{title}.\n\n{table(head, rows)}\n\n{line}"
