"""Which ensemble is worth its cost? LDS against training time, serving time and storage, for every scheme and three trainings.

    python benchmarks/ensembles.py                      all of it: under an hour on two cores; an interrupted run continues
    python benchmarks/ensembles.py --only mnist-mlp     some of the trainings
    python benchmarks/ensembles.py --quick              the same in miniature, to see that it works; results are printed and kept nowhere
    python benchmarks/ensembles.py --remeasure          models are recorded and scored anew (on a quiet machine); the retrained ones are kept
    python benchmarks/ensembles.py --render             only write tables and figures again

Retrained models, recorded runs and scores are kept in runs/ensembles; results go to benchmarks/results/ensembles.json, and from there as
tables into docs/which-method.md, between its markers, and as figures into docs/images/pareto-*.svg.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ensembles_cells import RECORDED, carry_out, cell_file, master, own_copy, read_cell
from ensembles_figures import draw, render
from ensembles_schemes import CHOSEN, DEFAULT, FACTORS, GRAD_DOT, NAIVE, SOURCE, TRAK, Families, families, methods, tiny
from ensembles_trainings import TABLE, Training, digits, passages
from evidence_tables import put

import headwater as hw

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "results" / "ensembles.json", HERE.parent / "docs" / "which-method.md"
CHOOSING = 16  # further subsets, which only choose a damping
REDRAWN = 1000
SLOW_FIRST = (SOURCE, CHOSEN, DEFAULT, TRAK, GRAD_DOT)


def gather(trainings: tuple[Training, ...], directory: Path, workers: int, quick: bool = False) -> dict[str, Any]:
    """Retrain, record, choose dampings, carry out every family of schemes, judge."""
    schemes: dict[str, dict[str, Families]] = {}
    for training in trainings:
        place, experiment = directory / training.name, training.experiment()
        own = {name: families(training, name) for name in methods(training, None)}
        schemes[training.name] = {name: tiny(held) if quick else held for name, held in own.items()}
        subsets = hw.evaluate.halves(len(experiment.train[0]), training.subsets + CHOOSING, seed=0)
        hw.evaluate.retrain(experiment, subsets, training.seeds, workers=workers, directory=place / "bank")
    models = {t.name: max(s.models for held in schemes[t.name].values() for family in held.values() for s in family) for t in trainings}
    in_parallel([partial(record, t, directory / t.name, models[t.name]) for t in reversed(trainings)], workers, "recording")
    in_parallel([partial(choose, t, directory / t.name) for t in trainings], workers, "choosing a damping")
    jobs = []
    for training in reversed(trainings):  # the dearest one first, so that two workers end together
        place = directory / training.name
        order = sorted(schemes[training.name], key=lambda name: SLOW_FIRST.index(name) if name in SLOW_FIRST else len(SLOW_FIRST))
        for name in order:
            for family, held in schemes[training.name][name].items():
                if not all(cell_file(place, name, s).exists() for s in held):
                    jobs.append(partial(carry_out, training, place, name, family, held, damping_of(place)))
    in_parallel(jobs, workers, "scoring")
    in_parallel([partial(judged, t, directory / t.name, schemes[t.name]) for t in trainings], workers, "judging")
    return {t.name: json.loads((directory / t.name / "judged.json").read_text()) for t in trainings}


def in_parallel(jobs: list[Any], workers: int, what: str) -> None:
    """Each job in a fresh process, so that memory is measured from the same start; the first failure is raised when all have ended."""
    started, failures = time.perf_counter(), []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for k, job in enumerate(as_completed([pool.submit(job) for job in jobs])):
            print(f"{what}: {k + 1} of {len(jobs)}, {time.perf_counter() - started:.0f} s", flush=True)
            if job.exception() is not None:
                failures.append(job.exception())
                print(f"failed: {job.exception()}", flush=True)
    if failures:
        raise failures[0]


def record(training: Training, place: Path, models: int) -> None:
    """Record the models that are not there yet."""
    torch.set_num_threads(1)
    for number in range(models):
        training.record(master(place, number), RECORDED + number)


def choose(training: Training, place: Path) -> None:
    """The damping with the largest LDS on the choosing subsets, by the first model; the sweep is kept in ``damping.json``."""
    file, work = place / "damping.json", place / "work" / "damping"
    if file.exists():
        return
    torch.set_num_threads(1)
    run = own_copy(training, place, work, 0)
    total = max(run.rates(0, run.checkpoints[-1]).values())
    found = hw.trace(run, training.data()[1], hw.Influence(damping=tuple(f / total for f in FACTORS)), progress=False)
    bank = hw.evaluate.Bank.open(place / "bank")
    choosing, judging = range(training.subsets, training.subsets + CHOOSING), range(training.subsets)
    other, seen = ([hw.evaluate.lds(s, cut(bank, ids), bootstrap=1).mean for s in found] for ids in (choosing, judging))
    best = int(np.argmax(other))
    facts = {"factors": list(FACTORS), "factor": FACTORS[best], "damping": FACTORS[best] / total, "choosing": other, "judging": seen}
    file.write_text(json.dumps(facts, indent=1))
    shutil.rmtree(work)


def damping_of(place: Path) -> float:
    return float(json.loads((place / "damping.json").read_text())["damping"])


def cut(bank: hw.evaluate.Bank, ids: range) -> hw.evaluate.Bank:
    """The bank of some of the subsets."""
    return replace(bank, subsets=bank.subsets.take(ids), values=bank.values[list(ids)])


# ------------------------------------------------------------------------------------------------------------------- judging


def judged(training: Training, place: Path, schemes: dict[str, Families]) -> None:
    """:func:`judge`, into ``judged.json``."""
    (place / "judged.json").write_text(json.dumps(judge(training, place, schemes), indent=1, ensure_ascii=False))


def judge(training: Training, place: Path, schemes: dict[str, Families]) -> dict[str, Any]:
    """LDS and costs of every scheme; and its difference from each number of independent models under the same method."""
    bank = cut(hw.evaluate.Bank.open(place / "bank"), range(training.subsets))
    cells: dict[str, Any] = {}
    for name, held in schemes.items():
        found = {s: read_cell(place, name, s) for family in held.values() for s in family}
        naive = {s.name: values for s, (values, _) in found.items() if s.kind == NAIVE}
        naive = {name: naive[name] for name in (*list(naive)[:1], *list(naive)[-2:])}  # one model, 5, and 10 where there are
        cells[name] = {}
        for scheme, (values, facts) in found.items():
            lds = hw.evaluate.lds(values, bank, bootstrap=REDRAWN)
            cell = {"kind": scheme.kind, "models": scheme.models, "each": scheme.each, "lds": lds.mean, "low": lds.low, "high": lds.high, **facts}
            cell["storage"] = facts["weights"] + facts["kept"]
            cell["minus"] = {other: paired(values, base, bank) for other, base in naive.items() if other != scheme.name}
            cells[name][scheme.name] = cell
    return {"facts": facts_of(training, place, bank), "cells": cells}


def paired(a: np.ndarray, b: np.ndarray, bank: hw.evaluate.Bank) -> dict[str, float]:
    found = hw.evaluate.paired(a, b, bank, bootstrap=REDRAWN)
    return {"difference": found.difference, "low": found.low, "high": found.high}


def facts_of(training: Training, place: Path, bank: hw.evaluate.Bank) -> dict[str, Any]:
    """What the training was, how far it came, and how much of the truth is noise."""
    experiment = training.experiment()
    run = experiment.open(master(place, 0))
    model = run.load(run.model(), run.checkpoints[-1])
    with torch.no_grad():
        losses = [float(training.task.loss(model, data).mean()) for data in (experiment.train, experiment.test)]
    truth = hw.evaluate.lds(np.zeros((bank.queries, bank.subsets.n)), bank, bootstrap=1)
    return {
        "about": training.about, "settings": training.settings, "examples": len(experiment.train[0]), "queries": bank.queries,
        "parameters": sum(p.numel() for p in model.parameters()), "checkpoints": len(run.checkpoints) - 1, "loss": losses,
        "subsets": len(bank.subsets), "seeds": len(bank.seeds), "ceiling": truth.ceiling, "retraining": bank.seconds,
        "damping": json.loads((place / "damping.json").read_text()),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- doing


def small(training: Training) -> Training:
    """One epoch on few examples, four halves."""
    data = partial(passages, 96) if training.task.describe()["kind"] == "Language" else partial(digits, 200)
    return replace(training, data=data, settings={**training.settings, "epochs": 1}, subsets=4, seeds=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[t.name for t in TABLE], metavar="NAME", help="trainings: " + ", ".join(t.name for t in TABLE))
    parser.add_argument("--quick", "--tiny", action="store_true", help="in miniature; results are printed and kept nowhere")
    parser.add_argument("--render", action="store_true", help="only write tables and figures again from the results")
    parser.add_argument("--remeasure", action="store_true", help="forget recorded runs, scores and costs first; retrained models are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--directory", type=Path, default=HERE.parent / "runs" / "ensembles", help="where models and scores are kept")
    asked = parser.parse_args()
    trainings = tuple(t for t in TABLE if t.name in asked.only)
    if asked.quick:
        with tempfile.TemporaryDirectory() as directory:
            print(render(gather(tuple(map(small, trainings)), Path(directory), asked.workers, quick=True)))
        return
    if asked.remeasure:
        for training, part in product(trainings, ("models", "work", "cells")):
            shutil.rmtree(asked.directory / training.name / part, ignore_errors=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not asked.render:
        found = gather(trainings, asked.directory, asked.workers)
        results = {t.name: {**results, **found}[t.name] for t in TABLE if t.name in {**results, **found}}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    draw(results, HERE.parent / "docs" / "images")
    print(render(results))
    put(PAGE, "figures", render(results))


if __name__ == "__main__":
    main()
