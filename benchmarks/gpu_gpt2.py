"""GPT-2-small shape: covariance, eigenvalue correction and pairwise passes in tokens/s, Headwater beside kronfluence.

    python benchmarks/gpu_gpt2.py                  on a GPU, where there is one: 512 sequences x 512 tokens, 16 queries
    python benchmarks/gpu_gpt2.py --amp            the model under bfloat16 autocast on both sides
    python benchmarks/gpu_gpt2.py --tiny           in miniature, on any machine: shows that it works and that scores are equal

Random weights; the 48 linear layers of the blocks are attributed, the same on both sides (kronfluence can take no other). Empirical
Fisher, so that scores can be compared. Writing factors to disk is booked apart on both sides. TF32 is allowed on both.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch
from speed.contestant import run
from speed.gpt2 import SHAPES, device_name
from speed.tables import agreement, installed, machine, spread, table, times

PASSES = ("covariance", "eigenvalue correction", "pairwise")


def measure(place: Path, tiny: bool, repeats: int, amp: bool = False) -> str:
    """The table. Without a GPU only the miniature is run, and no ratio is given."""
    tiny = tiny or not torch.cuda.is_available()
    place.mkdir(parents=True, exist_ok=True)
    shape = SHAPES["tiny" if tiny else "small"]
    sides = ["headwater", *(["kronfluence"] if installed("kronfluence") else [])]
    results: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            results[side].append(run(f"gpt2_{side}:passes", place, tiny=tiny, amp=amp))
    rows = []
    for name in PASSES:
        rates = {side: [shape.tokens / r["wall"][name] for r in reports] for side, reports in results.items()}
        ratio = times(median(rates["headwater"]) / median(rates["kronfluence"])) if len(sides) > 1 and not tiny else ""
        rows.append([name, *(spread(rates[side], 0) for side in sides), ratio])
    for label, key in (("peak MB of the device", "device_peak"), ("peak MB of the process", "peak"), ("seconds writing to disk", "disk")):
        rows.append([label, *(f"{median(r.get(key, 0.0) for r in results[side]):,.1f}" for side in sides), ""])
    same = ", ".join(agreement(*(np.load(place / f"scores-{side}.npy") for side in sides))) if len(sides) > 1 else "kronfluence is not installed"
    head = ["tokens/s", "Headwater", "kronfluence", "ratio"] if len(sides) > 1 else ["tokens/s", "Headwater", "ratio"]
    note = " In miniature: it works, and its times mean nothing."
    return (
        f"### GPT-2 shape\n\n{shape}; {'bfloat16 autocast' if amp else 'float32 with TF32'}; on {device_name()}.{note * tiny}\n\n{table(head, rows)}\n\n"
        f"Scores against kronfluence's (largest difference / largest score, rms / rms, lowest Spearman of a query): {same}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--amp", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--place", type=Path, default=Path("runs/bench-gpt2"))
    given = parser.parse_args()
    print(f"{measure(given.place, given.tiny, given.repeats, given.amp)}\n{machine()}; {given.repeats} runs")


if __name__ == "__main__":
    sys.exit(main())
