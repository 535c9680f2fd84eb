"""The central findings of docs/evidence.md on banks small enough for a test: SOURCE against the others, judged by real retraining.

The margins asserted are far inside what was measured (in the comments), and every number is seeded.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import headwater as hw
from headwater.training import settled

FIRST, SECOND, QUERIES, EPOCHS, BATCH = 500, 500, 60, 12, 32
SWEEP = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def build() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))


def fit(model, train, seed, recorder=None):
    """Stage after stage (the third column): SGD with momentum, not to convergence."""
    images, labels, stage = train
    for number in range(int(stage.max()) + 1):
        x, y = images[stage == number], labels[stage == number]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3e-5)
        if recorder is not None and number == 0:
            recorder.watch(model, optimizer, train=(x, y))
        elif recorder is not None:
            recorder.stage("second", train=(x, y), optimizer=optimizer)
        for _ in range(EPOCHS):
            for ids in torch.randperm(len(y)).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
                if recorder is not None:
                    recorder.step(ids)
    return model


def judged(train, queries, checkpoints, segments, folder):
    """A bank of half-subsets, and the scores of every method on one recorded training of another seed."""
    experiment = hw.Experiment(build, train, queries, hw.tasks.Classification(), fit)
    bank = hw.evaluate.retrain(experiment, hw.evaluate.halves(len(train[0]), 30, seed=0), seeds=2, workers=1, directory=folder / "bank", progress=False)
    with settled(100):
        model = build()
        with hw.Recorder(folder / "run", task=experiment.task, train=train, checkpoints=checkpoints, seed=100) as recorder:
            fit(model, train, 100, recorder)
            run = recorder.finish()
    methods = [hw.Source(segments=segments), hw.GradDot(), hw.TracIn(), hw.Influence(damping=SWEEP)]
    source, dot, tracin, *influence = hw.trace(run, queries, methods, progress=False)
    return bank, source, dot, tracin, influence


@pytest.fixture(scope="module")
def digits():
    (x, y), (xq, yq) = hw.data.split(hw.data.mnist(), train=FIRST + SECOND)
    return x, y, (xq[:QUERIES], yq[:QUERIES])


@pytest.mark.slow
def test_source_is_ahead_on_a_short_training(digits, tmp_path):
    x, y, queries = digits
    bank, source, dot, tracin, influence = judged((x, y, torch.zeros(len(y))), queries, 6, 3, tmp_path)
    report(bank, source, dot, tracin, influence)
    for other in (dot, tracin):
        assert hw.evaluate.paired(source, other, bank).low > 0


@pytest.mark.slow
def test_source_is_far_ahead_of_any_damping_on_two_stages(digits, tmp_path):
    """Upright digits, then others upside down; queries are upright."""
    x, y, queries = digits
    stage = (torch.arange(len(y)) >= FIRST).float()
    turned = torch.where(stage[:, None, None, None] == 1, x.flip(2, 3), x)
    bank, source, dot, tracin, influence = judged((turned, y, stage), queries, 4, (2, 2), tmp_path)
    report(bank, source, dot, tracin, influence)
    for other in (dot, tracin, *influence):
        assert hw.evaluate.paired(source, other, bank).low > 0


def report(bank, source, dot, tracin, influence):
    """Seen with pytest -s, and when an assertion fails."""
    for scores in (source, dot, tracin, *influence):
        print(hw.evaluate.lds(scores, bank, bootstrap=200))
