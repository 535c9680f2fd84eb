"""What attribution of diffusion models is worth: specificity in three settings, LDS and removals by real retraining, on 8x8 digits.

    python benchmarks/diffusion.py                     all of it, about half an hour on one core; an interrupted run continues
    python benchmarks/diffusion.py --only truth        one part: specificity, truth
    python benchmarks/diffusion.py --tiny              in miniature, to see that it works; its figures mean nothing and are kept nowhere
    python benchmarks/diffusion.py --render            only write the tables again

Models, banks and scores are kept in runs/diffusion; results go to benchmarks/results/diffusion.json, and from there as tables into
docs/diffusion-evidence.md, between its markers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusion_specificity
import diffusion_tables
import diffusion_truth
import torch
from diffusion_trainings import slug
from evidence_tables import put

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "diffusion.json", HERE.parent / "docs" / "diffusion-evidence.md"
SEEDS = 3


def specificity(place: Path, tiny: bool) -> dict[str, Any]:
    """Every setting with every training seed."""
    trial = diffusion_specificity.Trial()
    trials = diffusion_specificity.settings(diffusion_specificity.lean(trial) if tiny else trial)
    seeds = range(1 if tiny else SEEDS)
    return {name: [diffusion_specificity.gather(one, seed, place / f"{slug(name)}-{seed}") for seed in seeds] for name, one in trials.items()}


def truth(place: Path, tiny: bool) -> dict[str, Any]:
    """LDS and removals."""
    trial = diffusion_truth.Trial()
    return dict(diffusion_truth.parts(diffusion_truth.Court(diffusion_truth.lean(trial) if tiny else trial, place)))


PARTS: dict[str, tuple[str, Callable[[Path, bool], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "specificity": ("Specificity", specificity, diffusion_tables.specificity),
    "truth": ("Retraining", truth, diffusion_tables.truth),
}


def render(results: dict[str, Any]) -> str:
    """All tables."""
    return "\n\n".join(f"### {title}\n\n{told(results[name])}" for name, (title, _, told) in PARTS.items() if name in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--repeats", type=int, default=1, help="of no effect: these are no timings")
    parser.add_argument("--directory", type=Path, default=HERE.parent / "runs" / "diffusion")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.tiny:
        with tempfile.TemporaryDirectory() as folder:
            print(render({name: PARTS[name][1](Path(folder) / name, True) for name in asked.only}))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if asked.render else asked.only:
        results[name] = PARTS[name][1](asked.directory / name, False)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(render(results))
    put(PAGE, "figures", render(results))


if __name__ == "__main__":
    main()
