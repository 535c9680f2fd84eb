"""Leaving examples out along a run's own batches, and how smoothly a training answers to weights."""

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InputError

TASK = hw.tasks.Classification()


def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return x, (x[:, :3] + 0.3 * torch.randn(n, 3, generator=g)).argmax(1)


TRAIN, ASKED = data(40, 1), data(6, 2)


def record(path, activation=nn.Tanh, optimizer=None, steps=20):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), activation(), nn.Linear(8, 3))
    moved = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    recorder = hw.Recorder(path, model, moved, task=TASK, train=TRAIN, steps=steps)
    g = torch.Generator().manual_seed(3)
    for _ in range(steps):
        ids = torch.randperm(40, generator=g)[:10]
        moved.zero_grad()
        TASK.loss(model, tuple(t[ids] for t in TRAIN)).mean().backward()
        moved.step()
        recorder.step(ids)
    return recorder.finish()


def test_it_is_the_same_loop_without_their_losses(tmp_path):
    run = record(tmp_path / "run")
    subsets = hw.evaluate.removing(40, [[0, 1, 2], [7]])
    bank = hw.evaluate.replayed(run, subsets, ASKED, progress=False)
    assert bank.values.shape == (2, 1, 6) and bank.base.shape == (1, 6)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer, g = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5), torch.Generator().manual_seed(3)
    for _ in range(20):
        ids = torch.randperm(40, generator=g)[:10]
        optimizer.zero_grad()
        (TASK.loss(model, tuple(t[ids] for t in TRAIN)) * (ids > 2)).sum().div(10).backward()
        optimizer.step()
    assert np.allclose(bank.values[0, 0], TASK.measure(model, ASKED).detach(), atol=1e-5)
    assert np.allclose(bank.base[0], TASK.measure(run.load(run.model(), 20), ASKED).detach(), atol=1e-6)


def test_exact_unrolling_foretells_it(tmp_path):
    run = record(tmp_path / "run")
    bank = hw.evaluate.replayed(run, hw.evaluate.leave_out(40, 20, 1, seed=0), ASKED, progress=False)
    scores = hw.trace(run, ASKED, hw.Unrolled(), progress=False)
    assert hw.evaluate.lds(scores, bank, bootstrap=10).mean >= 0.97
    assert 0.9 <= hw.evaluate.slope(scores, bank, bootstrap=10).slope <= 1.2


def test_a_smooth_training_is_smoother_than_a_jagged_one(tmp_path):
    """Adam with a tiny eps moves every coordinate by its sign, in which a weight has hardly a say."""
    smooth = hw.evaluate.metasmoothness(record(tmp_path / "smooth"), progress=False)
    jagged = hw.evaluate.metasmoothness(record(tmp_path / "jagged", nn.ReLU, lambda m: torch.optim.Adam(m.parameters(), lr=0.1, eps=1e-12)), progress=False)
    assert smooth.mean > 0.9 > jagged.mean and len(smooth.values) == 3
    again = hw.evaluate.metasmoothness(record(tmp_path / "again"), directions=2, progress=False)
    assert np.array_equal(again.values, smooth.values[:2])


def test_of_a_linear_answer_it_is_one(tmp_path):
    """One step of SGD is linear in the weights."""
    assert hw.evaluate.metasmoothness(record(tmp_path / "run", steps=1), progress=False).mean == pytest.approx(1, abs=1e-3)


def test_what_does_not_fit_is_refused(tmp_path):
    run = record(tmp_path / "run", steps=1)
    with pytest.raises(InputError, match="subsets of 39"):
        hw.evaluate.replayed(run, hw.evaluate.leave_out(39, 2), ASKED)
    with pytest.raises(InputError, match="step=0"):
        hw.evaluate.metasmoothness(run, step=0)
