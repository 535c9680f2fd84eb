"""Where does the rest go? One small training on which everything is affordable: exact unrolling, dense curvature, other protocols.

    python benchmarks/evidence_causes.py        about 4 minutes on two cores

1,000 digits of 7 x 7 pixels, an MLP of 2,298 parameters, not converged. Each variant of SOURCE changes one thing. Judged twice: by
retraining (LDS), and by its agreement with exact unrolling of the same training (Spearman over training examples, mean over queries),
which tells apart what SOURCE approximates badly from what no first-order method can know. Results: benchmarks/results/causes.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from evidence_tables import put, render_causes
from evidence_trainings import SHORT, Columns, Training, _staged, fit, mlp, phase
from evidence_unrolled import unrolled
from scipy.stats import spearmanr

import headwater as hw

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "causes.json"
SUBSETS, SEEDS, MODELS, RECORDED = 40, 4, 3, 100
DAMPINGS = tuple(10.0**k for k in np.arange(-4, 1.1, 0.5))


def coarse() -> tuple[Columns, Columns]:
    """1,000 digits of 7 x 7 pixels; 100 others as queries."""
    (x, y), (xq, yq) = hw.data.split(hw.data.mnist(), train=1000)
    return _staged((F.avg_pool2d(x, 4), y)), (F.avg_pool2d(xq[:100], 4), yq[:100])


Variant = Callable[[hw.Run], tuple[hw.Run, Any]]
BASE = Training("causes", SHORT, coarse, partial(mlp, 49, 32, 16, 10), (phase(10, 3e-2, 3e-5, 32),), SEEDS, MODELS, "7 x 7 digits", checkpoints=24)
HALF = replace(BASE, phases=(phase(5, 3e-2, 3e-5, 32),))  # as many steps as the retrainings on halves take


def slow_pace(run: hw.Run) -> hw.Run:
    """The run, its momentum forgotten: effective rates without 1 / (1 - .9)."""
    forgetful = replace(run)
    object.__setattr__(forgetful, "rates", lambda start, stop: {n: 0.1 * r for n, r in run.rates(start, stop).items()})
    return forgetful


def six(run: hw.Run, middle: bool = False) -> hw.Run:
    """The run as it would be with 6 of its 24 checkpoints: at the ends of equal intervals, or (but for the last) in their middles."""
    steps = [s for s in run.checkpoints if s > 0]
    kept = {0, *(steps[1::4] if middle else steps[3::4]), steps[-1]}
    checkpoints = {k: v for k, v in run.manifest["checkpoints"].items() if int(k) in kept}
    return replace(run, manifest={**run.manifest, "checkpoints": checkpoints})


def variants() -> dict[str, Variant]:
    """Each makes of the recorded run what is traced, and how."""
    return {
        "Source (3 segments, 6 checkpoints, EK-FAC)": lambda run: (six(run), hw.Source()),
        "averaged parameters": lambda run: (six(run), hw.Source(average="parameters")),
        "1 segment": lambda run: (six(run), hw.Source(segments=1)),
        "2 segments": lambda run: (six(run), hw.Source(segments=2)),
        "6 segments": lambda run: (six(run), hw.Source(segments=6)),
        "24 checkpoints": lambda run: (run, hw.Source()),
        "24 checkpoints, 24 segments": lambda run: (run, hw.Source(segments=24)),
        "checkpoints in the middles": lambda run: (six(run, middle=True), hw.Source()),
        "dense Gauss-Newton": lambda run: (six(run), hw.Source(curvature=hw.Dense())),
        "dense Hessian": lambda run: (six(run), hw.Source(curvature=hw.Dense("hessian"))),
        "diagonal": lambda run: (six(run), hw.Source(curvature=hw.Diagonal())),
        "sampled Fisher": lambda run: (six(run), hw.Source(curvature=hw.EKFAC(fisher="sampled"))),
        "empirical Fisher": lambda run: (six(run), hw.Source(curvature=hw.EKFAC(fisher="empirical"))),
        "momentum forgotten": lambda run: (slow_pace(six(run)), hw.Source()),
        "TracIn": lambda run: (six(run), hw.TracIn()),
        "Grad-Dot": lambda run: (run, hw.GradDot()),
        "Influence, EK-FAC": lambda run: (run, hw.Influence(damping=DAMPINGS)),
        "Influence, dense Gauss-Newton": lambda run: (run, hw.Influence(damping=DAMPINGS, curvature=hw.Dense())),
    }


def scores_of(directory: Path, number: int) -> dict[str, np.ndarray]:
    """All variants on one recorded model, each (sweep, queries, examples), exact unrolling first; and three of them on a model that was
    recorded for half as long. Kept in ``directory``, one file each."""
    whole, half = (t.record(directory / f"{name}-{number}", RECORDED + number) for name, t in (("run", BASE), ("half", HALF)))
    usual, dense = "Source (3 segments, 6 checkpoints, EK-FAC)", "dense Gauss-Newton"
    work = {"exact unrolling": lambda: unrolled(BASE, RECORDED + number)[None]}
    work |= {name: partial(traced, make, whole) for name, make in variants().items()}
    work |= {f"recorded for half as long: {name}": partial(traced, variants()[name], half) for name in (usual, dense)}
    work["recorded for half as long: exact unrolling"] = lambda: unrolled(HALF, RECORDED + number)[None]
    found = {}
    for name, make in work.items():
        file = directory / f"scores-{number}" / f"{name.replace(' ', '-')}.npy"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            np.save(file, make())
        found[name] = np.load(file)
    return found


def traced(make: Variant, run: hw.Run) -> np.ndarray:
    """The scores of one variant, (sweep, queries, examples)."""
    changed, method = make(run)
    found = hw.trace(changed, BASE.data()[1], method, progress=False)
    return np.stack([s.values for s in (found if isinstance(found, list) else [found])])


# ------------------------------------------------------------------------------------------------------------------ the truth


def steps_kept(model: Any, train: Columns, seed: int, recorder: Any = None, *, phases: Any) -> Any:
    """As ``fit``, but a subset is trained for as many steps as the whole set: its examples come round twice as often."""
    doubled = tuple({**p, "epochs": round(p["epochs"] * 1000 / len(train[0]))} for p in phases)
    return fit(model, train, seed, recorder, phases=doubled)


def banks(directory: Path, workers: int) -> dict[str, hw.evaluate.Bank]:
    """Truths by name: half-subsets with the epochs kept, with the steps kept, and 90 % subsets."""
    usual = BASE.experiment()
    longer = replace(usual, fit=partial(steps_kept, phases=BASE.phases))
    n = len(usual.train[0])
    asked = {
        "halves, same epochs": (usual, hw.evaluate.halves(n, SUBSETS)),
        "halves, same steps": (longer, hw.evaluate.halves(n, SUBSETS)),
        "90 %, same epochs": (usual, hw.evaluate.halves(n, SUBSETS, fraction=0.9)),
    }
    return {
        name: hw.evaluate.retrain(experiment, subsets, SEEDS, workers=workers, directory=directory / name.replace(" ", "-").replace(",", ""))
        for name, (experiment, subsets) in asked.items()
    }


def agreement(values: np.ndarray, exact: np.ndarray) -> float:
    """Spearman over training examples, mean over queries."""
    return float(np.mean([spearmanr(a, b)[0] for a, b in zip(values, exact, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--directory", type=Path, default=HERE.parent / "runs" / "evidence" / "causes", help="where models and scores are kept")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    truths = banks(asked.directory, asked.workers)
    models = [scores_of(asked.directory, k) for k in range(MODELS)]
    usual = truths["halves, same epochs"]
    rows = {}
    for name in models[0]:
        best = max(range(len(models[0][name])), key=lambda k: hw.evaluate.lds(models[0][name][k], usual, bootstrap=1).mean)
        each = [m[name][best] for m in models]
        one, exact = hw.evaluate.lds(each[0], usual), ("recorded for half as long: " if "half" in name else "") + "exact unrolling"
        rows[name] = {
            "with exact unrolling": float(np.mean([agreement(s, m[exact][0]) for s, m in zip(each, models, strict=True)])),
            "lds": one.mean, "low": one.low, "high": one.high,
            "slope": hw.evaluate.slope(each[0], usual).slope,
            "models": [hw.evaluate.lds(s, usual, bootstrap=1).mean for s in each],
            **{truth: hw.evaluate.lds(np.mean(each, axis=0), bank, bootstrap=1).mean for truth, bank in truths.items()},
            "damping": DAMPINGS[best] if len(models[0][name]) > 1 else None,
        }  # fmt: skip
    nothing = np.zeros((usual.queries, usual.subsets.n))
    ceilings = {name: hw.evaluate.lds(nothing, bank, bootstrap=1).ceiling for name, bank in truths.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"rows": rows, "ceilings": ceilings, "models": MODELS, "subsets": SUBSETS, "seeds": SEEDS}, indent=1, ensure_ascii=False) + "\n")
    text = render_causes(json.loads(RESULTS.read_text()))
    print(text)
    put(HERE.parent / "docs" / "evidence.md", "causes", text)


if __name__ == "__main__":
    main()
