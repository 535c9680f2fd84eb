"""The harness of docs/which-method.md in miniature: what it scores is what trace scores, what it charges is what was done, and its
arithmetic of savings is right."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.capture import Capture

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAMES = ("trainings", "schemes", "cells", "figures")


@pytest.fixture(scope="module")
def parts():
    """The modules of the benchmark, imported from its folder as the script imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        found = {name: importlib.import_module(f"ensembles_{name}") for name in NAMES}
        yield SimpleNamespace(main=importlib.import_module("ensembles"), **found)


@pytest.fixture(scope="module")
def small(parts):
    training = parts.main.small(parts.trainings.TABLE[0])
    return replace(training, data=partial(parts.trainings.digits, 80))


@pytest.fixture(scope="module")
def place(parts, small, tmp_path_factory):
    """A bank of four halves, two recorded models, a chosen damping, and the plain family of TRAK carried out."""
    folder, experiment = tmp_path_factory.mktemp("ensembles"), small.experiment()
    subsets = hw.evaluate.halves(len(experiment.train[0]), small.subsets + parts.main.CHOOSING, seed=0)
    hw.evaluate.retrain(experiment, subsets, small.seeds, workers=1, directory=folder / "bank", progress=False)
    parts.main.record(small, folder, models=2)
    parts.main.choose(small, folder)
    for name, schemes in ((parts.schemes.TRAK, trak(parts)), *((name, trak(parts)[:1]) for name in (parts.schemes.GRAD_DOT, parts.schemes.RANDOM))):
        parts.cells.carry_out(small, folder, name, "plain", schemes, None)
    return folder


def trak(parts):
    s = parts.schemes
    return (s.Scheme(s.NAIVE, 1), s.Scheme(s.NAIVE, 2), s.Scheme(s.FORWARD, 1, 2), s.Scheme(s.CHECKPOINTS, 1, 2))


def test_scores_are_those_of_trace_and_costs_those_of_the_pieces(parts, small, place, tmp_path):
    one, two, forward, checkpoints = (parts.cells.read_cell(place, parts.schemes.TRAK, s) for s in trak(parts))
    runs = [parts.cells.own_copy(small, place, tmp_path, k) for k in (0, 1)]
    method = parts.schemes.methods(small, None)[parts.schemes.TRAK]
    assert np.array_equal(one[0], hw.trace(runs[0], small.data()[1], hw.Ensemble(method, runs[:1]), progress=False).values)
    assert np.array_equal(two[0], hw.trace(runs[0], small.data()[1], hw.Ensemble(method, runs), progress=False).values)
    seconds = [parts.cells.recorded_seconds(run) for run in runs]
    assert [c[1]["training"] for c in (one, two, forward, checkpoints)] == [seconds[0], sum(seconds), seconds[0], seconds[0]]
    assert [c[1]["pieces"] for c in (one, two, forward, checkpoints)] == [1, 2, 3, 2]  # a kernel and two weights
    assert min(two[1]["serving"], forward[1]["serving"], checkpoints[1]["serving"]) > one[1]["serving"] > 0
    file = (runs[0].path / "checkpoints" / f"{runs[0].checkpoints[-1]}.safetensors").stat().st_size
    assert [c[1]["weights"] for c in (one, two, forward, checkpoints)] == [file, 2 * file, file, 2 * file]
    features = 4 * len(small.data()[0][0]) * parts.schemes.DIMENSION
    assert features < one[1]["kept"] < 1.2 * features + 10_000
    assert forward[1]["kept"] < 1.1 * one[1]["kept"] < checkpoints[1]["kept"]


def test_what_is_there_stays_and_what_was_interrupted_is_done_anew(parts, small, place, tmp_path):
    cells = [parts.cells.cell_file(place, parts.schemes.TRAK, s) for s in trak(parts)]
    before = [c.stat().st_mtime_ns for c in cells]
    parts.cells.carry_out(small, place, parts.schemes.TRAK, "plain", trak(parts), None)
    assert [c.stat().st_mtime_ns for c in cells] == before
    run = parts.cells.own_copy(small, place, tmp_path, 0)
    (run.path / "half-done").touch()
    assert (parts.cells.own_copy(small, place, tmp_path, 0).path / "half-done").exists()
    (tmp_path / "run-0.begun").touch()
    assert not (parts.cells.own_copy(small, place, tmp_path, 0).path / "half-done").exists()


def test_a_run_until_a_checkpoint_is_the_training_that_ended_there(parts, small, place, tmp_path):
    run = parts.cells.own_copy(small, place, tmp_path, 0)
    step = run.checkpoints[-2]
    early = run.until(step)
    assert (early.checkpoints[-1], early.stages[0].stop) == (step, step)
    damping = 1 / max(run.rates(0, step).values())
    queries = small.data()[1]
    values = [hw.trace(early, queries, m, progress=False).values for m in (hw.Influence(), hw.Influence(damping=damping))]
    assert np.allclose(*values, rtol=1e-5)
    assert not np.allclose(values[0], hw.trace(run, queries, hw.Influence(damping=damping), progress=False).values, rtol=1e-2)


def test_judging_and_drawing(parts, small, place, tmp_path):
    schemes = {parts.schemes.TRAK: {"plain": trak(parts)}, **{name: {"plain": trak(parts)[:1]} for name in (parts.schemes.GRAD_DOT, parts.schemes.RANDOM)}}
    found = {"mnist-mlp": json.loads(json.dumps(parts.main.judge(small, place, schemes)))}
    cells = found["mnist-mlp"]["cells"]["TRAK"]
    assert list(cells) == ["one model", "2 models", "dropout, forward only, 1 × 2", "checkpoints, 1 × 2"]
    cheap = cells["checkpoints, 1 × 2"]
    assert cheap["minus"]["2 models"]["difference"] == pytest.approx(cheap["lds"] - cells["2 models"]["lds"])
    assert cheap["storage"] == cheap["weights"] + cheap["kept"]
    floor = found["mnist-mlp"]["cells"]["random"]["one model"]
    assert floor["training"] == floor["storage"] == 0 and abs(floor["lds"]) < 0.5
    text = parts.figures.render(found)
    assert text.count("checkpoints, 1 × 2") >= 2
    parts.figures.draw(found, tmp_path)
    drawn = (tmp_path / "pareto-mnist-mlp.svg").read_text()
    assert "TRAK" in drawn and len(drawn) < 200_000


def test_savings_are_against_as_many_models_as_are_worth_the_same(parts):
    naive = {str(k): {"kind": parts.schemes.NAIVE, "models": k, "lds": lds, "serving": 10.0 * k} for k, lds in ((1, 0.2), (2, 0.3), (3, 0.29), (5, 0.4))}
    worth = [parts.figures.as_many_models(lds, naive) for lds in (0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)]
    assert worth == pytest.approx([0, 1, 1.5, 2, 3.5, 5, float("inf")])
    assert [parts.figures.saving(8.0, naive, w, "serving") for w in (0.0, 1.0, 4.0, float("inf"))] == ["+20%", "+20%", "+80%", "+84%"]
    assert parts.figures.saving(20.0, naive, 1.0, "serving") == "-100%"


def test_at_the_reference_s_lds_only_what_is_not_below_it_counts(parts):
    s, f = parts.schemes, parts.figures

    def cell(kind, models, cost, high):
        costs = dict.fromkeys(("training", "serving", "storage"), cost)
        minus = {} if high is None else {"5 models": {"difference": high - 0.1, "low": high - 0.2, "high": high}}
        return {"kind": kind, "models": models, "lds": 0.4, "low": 0.3, "high": 0.5, "minus": minus, **costs}

    cells = {"5 models": cell(s.NAIVE, 5, 50.0, None), "3 models": cell(s.NAIVE, 3, 30.0, 0.01), "one model": cell(s.NAIVE, 1, 10.0, -0.01)}
    rivals = {"worse": cell(s.DROPOUT, 1, 5.0, -0.02), "as good": cell(s.LORA, 1, 20.0, 0.02), "as good, dearer": cell(s.LORA, 2, 60.0, 0.02)}
    line = f.verdicts({"one": {"cells": {s.TRAK: {**cells, **rivals}}}}).splitlines()[-1]
    assert line.count("+60%: as good (") == 3 and "| 3 |" in line
    assert "| none | none | none |" in f.verdicts({"one": {"cells": {s.TRAK: {**cells, "worse": rivals["worse"]}}}})


def test_the_transformer_is_causal_attends_as_torch_does_and_needs_no_fallback(parts):
    t = parts.trainings
    torch.manual_seed(0)
    attention, x = t.Attention(16, 4, 0.1).eval(), torch.randn(2, 7, 16)
    q, k, v = attention.mixed(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attention(x), attention.out(expected.transpose(1, 2).flatten(2)), atol=1e-6)
    model = t.Transformer(words=20, length=8, width=16).eval()
    ids = torch.randint(0, 20, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 20
    before, after = model(ids), model(changed)
    assert torch.equal(before[0, :5], after[0, :5]) and not torch.allclose(before[0, 5:], after[0, 5:])
    task = t.TABLE[2].task
    assert not Capture(model, task.loss, (torch.randint(0, 20, (2, 8)),)).fallback


def test_passages_and_their_queries_do_not_meet(parts):
    train, queries, (labels, asked) = parts.trainings.passages()
    assert train[0].shape == (1024, parts.trainings.LENGTH) and queries[0].shape == (parts.trainings.QUERIES, parts.trainings.LENGTH)
    assert not {tuple(row) for row in train[0].tolist()} & {tuple(row) for row in queries[0].tolist()}
    assert 0.3 < labels.double().mean() < 0.7 and 0.3 < asked.double().mean() < 0.7
    assert int(train[0].max()) == parts.trainings.WORDS - 1 and (train[0] == 0).double().mean() < 0.3
