"""Each example of training is an experiment that records, traces and retrains; here with a few of its training examples and one epoch."""

import dataclasses
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

import headwater as hw
from headwater.evaluate.jobs import select

FILES = sorted(file for file in (Path(__file__).parents[2] / "examples").glob("*.py") if not file.stem.startswith(("explain_", "diffusion_")))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def small(request, monkeypatch):
    """The file's experiment with 60 training examples, 8 test examples and a single epoch."""
    experiment = hw.Experiment.load(request.param)
    monkeypatch.setattr(sys.modules[experiment.fit.__module__], "EPOCHS", 1)
    return dataclasses.replace(experiment, train=select(experiment.train, np.arange(60)), test=select(experiment.test, np.arange(8)))


def test_there_is_an_example_of_each_kind():
    assert {file.stem for file in FILES} >= {"mnist", "concrete"}


def test_it_records_and_traces(small, tmp_path):
    run = small.record(tmp_path / "run", checkpoints=2)
    scores = hw.trace(run, small.test, hw.Source(segments=2), progress=False)
    assert scores.values.shape == (8, 60)
    assert scores.values.any(axis=1).all()
    assert scores.to_html(tmp_path / "owed.html", small.test, small.train).exists()


def test_it_retrains_to_the_recorded_answers(small, tmp_path):
    run = small.record(tmp_path / "run", checkpoints=2)
    bank = hw.evaluate.retrain(small, hw.evaluate.halves(60, 2), seeds=1, workers=1, directory=tmp_path / "bank", progress=False)
    model = run.load(run.model(), run.checkpoints[-1])
    np.testing.assert_allclose(bank.base[0], small.task.measure(model, small.test).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_worker_processes_can_open_it(file):
    again = pickle.loads(pickle.dumps(hw.Experiment.load(file)))
    assert len(again.train[1]) == len(hw.Experiment.load(file).train[1])
