"""How far can training attribution be trusted? Measured by retraining, for every method and three kinds of training.

    python benchmarks/evidence.py                               all of it: an hour or more on two cores; an interrupted run continues
    python benchmarks/evidence.py --only mnist-mlp-short ...    some of the trainings
    python benchmarks/evidence.py --tiny                        the same in miniature, to see that it works
    python benchmarks/evidence.py --render                      only write the tables again

Retrained models, recorded runs and scores are kept in runs/evidence; results go to benchmarks/results/evidence.json, and from there as
tables into docs/evidence.md, between its markers.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_tables import put, render
from evidence_trainings import TABLE, Training, part

import headwater as hw

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "evidence.json"
SUBSETS, CHOOSING = 50, 16  # half-subsets to judge by, and others that only choose a damping
RECORDED = 100  # seeds of recorded models begin here: none of them is among the retrained ones
FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # dampings of the sweep, in units of 1 / (eta T)
MEMORY = 2**30


# ------------------------------------------------------------------------------------------------------------------- methods


def methods(training: Training, run: hw.Run, first: bool) -> dict[str, Any]:
    """What is compared, by name; a sweep counts as one. SOURCE in one segment only where ``first`` (it costs as much as with more)."""
    stages = len(training.phases)
    segments = (training.segments,) * stages
    time = sum(effective_rates(run))
    found: dict[str, Any] = {
        "Grad-Dot": hw.GradDot(),
        "Grad-Cos": hw.GradCos(),
        "TracIn": hw.TracIn(),
        "Influence": hw.Influence(damping=tuple(f / time for f in FACTORS)),
        "Source": hw.Source(segments=segments),
        "Source, averaged parameters": hw.Source(segments=segments, average="parameters"),
    }
    if first:
        found["Source, 1 segment" + (" a stage" if stages > 1 else "")] = hw.Source(segments=(1,) * stages)
    return found


def effective_rates(run: hw.Run) -> list[float]:
    """Summed learning rates of each stage, momentum counted."""
    return [max(run.rates(stage.start, stage.stop).values()) for stage in run.stages]


def score(training: Training, place: Path, number: int) -> None:
    """Record model ``number`` and score its queries by every method; what is there already stays."""
    torch.set_num_threads(1)
    run = training.record(place / f"run-{number}", RECORDED + number)
    queries = training.data()[1]
    for name, method in methods(training, run, first=number == 0).items():
        file = scores_file(place, number, name)
        if not file.exists():
            found = hw.trace(run, queries, method, memory=MEMORY, progress=False)
            found = found if isinstance(found, list) else [found]
            meta = {"cost": found[0].provenance["cost"], "units": [s.unit for s in found], "methods": [s.method for s in found]}
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file.with_suffix(".part.npz"), meta=json.dumps(meta), **{str(k): s.values for k, s in enumerate(found)})
            file.with_suffix(".part.npz").rename(file)


def scores_file(place: Path, number: int, name: str) -> Path:
    return place / "scores" / f"{number}-{name.replace(' ', '-').replace(',', '')}.npz"


def read_scores(place: Path, number: int, name: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The score matrices of a method (several of a sweep) and what was noted beside them."""
    with np.load(scores_file(place, number, name)) as held:
        meta = json.loads(str(held["meta"]))
        return [held[str(k)] for k in range(len(meta["methods"]))], meta


# ------------------------------------------------------------------------------------------------------------------- judging


def judge(training: Training, place: Path, bank: hw.evaluate.Bank) -> dict[str, Any]:
    """Every method against the bank, for one model and for the mean of the scores of all recorded models."""
    run = training.record(place / "run-0", RECORDED)
    judging, choosing = cut(bank, range(SUBSETS)), cut(bank, range(SUBSETS, len(bank.subsets)))
    names = methods(training, run, first=True)
    time = sum(effective_rates(run))
    out = {"facts": facts(training, run, bank), "single": {}, "ensemble": {}}
    for which, numbers in (("single", [0]), ("ensemble", range(training.models))):
        scores, costs = gathered(place, names, numbers)
        scores.update(dampings(scores.pop("Influence"), time, judging, choosing, out[which]))
        out[which]["methods"] = {name: figures(values, judging) for name, values in scores.items()}
        out[which]["paired"] = {f"Source - {name}": difference(scores["Source"], scores[name], judging) for name in scores if name != "Source"}
        if which == "single":
            out["costs"] = costs
    return out


def cut(bank: hw.evaluate.Bank, ids: range) -> hw.evaluate.Bank:
    """The bank of some of the subsets."""
    return replace(bank, subsets=bank.subsets.take(ids), values=bank.values[list(ids)])


def gathered(place: Path, names: dict[str, Any], numbers: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores by method, averaged over the models that have them all; a sweep stays a list. And each method's cost."""
    scores: dict[str, Any] = {}
    costs: dict[str, Any] = {}
    for name in names:
        if all(scores_file(place, n, name).exists() for n in numbers):
            read = [read_scores(place, n, name) for n in numbers]
            means = [np.mean(found, axis=0) for found in zip(*(matrices for matrices, _ in read), strict=True)]
            scores[name] = means if len(means) > 1 else means[0]
            costs[name] = {key: read[0][1]["cost"][key] for key in ("seconds", "example_gradients")}
    return scores, costs


def dampings(sweep: list[np.ndarray], time: float, judging: Any, choosing: Any, out: dict[str, Any]) -> dict[str, np.ndarray]:
    """Influence as it is reported: at 1/(eta T) and 3/(eta T), at the damping that other subsets choose, and at the best in hindsight."""
    seen, other = ([hw.evaluate.lds(s, bank, bootstrap=1).mean for s in sweep] for bank in (judging, choosing))
    out["sweep"] = {"factors": list(FACTORS), "dampings": [f / time for f in FACTORS], "lds": seen, "lds of the choosing subsets": other}
    chosen, best = int(np.argmax(other)), int(np.argmax(seen))
    out["sweep"] |= {"chosen": FACTORS[chosen], "best": FACTORS[best]}
    return {
        "Influence, 1/(ηT)": sweep[FACTORS.index(1.0)],
        "Influence, 3/(ηT)": sweep[FACTORS.index(3.0)],
        "Influence, chosen damping": sweep[chosen],
        "Influence, best damping": sweep[best],
    }


def figures(values: np.ndarray, bank: hw.evaluate.Bank) -> dict[str, float]:
    found, size = hw.evaluate.lds(values, bank), hw.evaluate.slope(values, bank)
    return {"lds": found.mean, "low": found.low, "high": found.high, "slope": size.slope}


def difference(a: np.ndarray, b: np.ndarray, bank: hw.evaluate.Bank) -> dict[str, float]:
    found = hw.evaluate.paired(a, b, bank)
    return {"difference": found.difference, "low": found.low, "high": found.high}


def facts(training: Training, run: hw.Run, bank: hw.evaluate.Bank) -> dict[str, Any]:
    """What the training was, how far it came, and how much of the truth is noise."""
    train, test = training.data()
    model, losses = run.model(), {}
    for step in (0, run.checkpoints[-1]):
        run.load(model, step)
        losses[step] = [float(training.task.loss(model, part(train, k)).mean().detach()) for k in range(len(training.phases))]
    correct = None if training.name.startswith("concrete") else float((model(test[0]).argmax(1) == test[1]).double().mean())
    truth = hw.evaluate.lds(np.zeros((bank.queries, bank.subsets.n)), cut(bank, range(SUBSETS)), bootstrap=1)
    return {
        "kind": training.kind, "about": training.about, "phases": training.phases, "examples": [s.size for s in run.stages], "queries": bank.queries,
        "parameters": sum(p.numel() for p in model.parameters()), "checkpoints": list(run.checkpoints), "segments": training.segments,
        "effective_rates": effective_rates(run), "loss before": losses[0], "loss after": losses[run.checkpoints[-1]], "accuracy": correct,
        "subsets": SUBSETS, "choosing": len(bank.subsets) - SUBSETS, "seeds": list(bank.seeds), "models": training.models,
        "ceiling": truth.ceiling, "reliability": truth.reliability, "retraining seconds": bank.seconds,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- doing


def gather(training: Training, directory: Path, workers: int) -> dict[str, Any]:
    """Retrain, record, score and judge one training."""
    place, started = directory / training.name, time.perf_counter()
    experiment = training.experiment()
    subsets = hw.evaluate.halves(len(experiment.train[0]), SUBSETS + CHOOSING, seed=0)
    bank = hw.evaluate.retrain(experiment, subsets, seeds=training.seeds, directory=place / "bank", workers=workers)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(score, training, place), range(training.models)))
    out = judge(training, place, bank)
    out["seconds"] = time.perf_counter() - started
    return out


def tiny(training: Training) -> Training:
    """One epoch a stage, two seeds and two models."""
    phases = tuple({**phase, "epochs": 1} for phase in training.phases)
    return replace(training, phases=phases, seeds=2, models=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[t.name for t in TABLE], metavar="NAME", help="trainings: " + ", ".join(t.name for t in TABLE))
    parser.add_argument("--tiny", action="store_true", help="in miniature; results are printed and kept nowhere else")
    parser.add_argument("--render", action="store_true", help="only write the tables again from the results")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--directory", type=Path, default=HERE.parent / "runs" / "evidence", help="where models and scores are kept")
    asked = parser.parse_args()
    results: dict[str, Any] = {} if asked.tiny else kept()
    for training in [] if asked.render else [t for t in TABLE if t.name in asked.only]:
        print(f"--- {training.name}: {training.about}", flush=True)
        small = tiny(training) if asked.tiny else training
        found = gather(small, asked.directory / "tiny" if asked.tiny else asked.directory, asked.workers)
        results = {**(results if asked.tiny else kept()), training.name: found}
        if not asked.tiny:
            write(results)
    print(render(results))
    if not asked.tiny:
        put(HERE.parent / "docs" / "evidence.md", "figures", render(results))


def kept() -> dict[str, Any]:
    """The results so far, in the order of the table."""
    held = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {t.name: held[t.name] for t in TABLE if t.name in held}


def write(results: dict[str, Any]) -> None:
    """Keep the results."""
    RESULTS.parent.mkdir(exist_ok=True)
    ordered = {t.name: results[t.name] for t in TABLE if t.name in results}
    RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
