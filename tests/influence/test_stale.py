"""Saved work is never another's: the same weights in another model, and the same data under another loss, are scored anew."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.tasks.code import code_digest, model_digest

g = torch.Generator().manual_seed(0)
X = torch.randn(40, 5, generator=g, dtype=torch.float64)
TRAIN, ASKED = (X[:34], X[:34, 0] + X[:34, 1] ** 2), (X[34:], X[34:, 0])
TASK = hw.tasks.Regression()
METHODS = [
    hw.Influence(),
    hw.Influence(curvature=hw.Diagonal()),
    hw.Source(),
    hw.Trak(dim=8),
    hw.Trak(),
    hw.LoGra(dim=3),
    hw.Representations(),
    hw.floors.gradient_norm(),
    hw.DropoutEnsemble(hw.Trak(dim=8), members=2),
    hw.LoraEnsemble(hw.Influence(), members=1, steps=4),
]


class Scaled(nn.Module):
    """Settings of the user's own, in no parameter."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * torch.tanh(x)


def building(activation):
    """Makes of models with the same weights."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), activation(), nn.Dropout(0.1), nn.Linear(6, 1)).double()

    return build


def opened(path, activation=nn.Tanh):
    return hw.Run.open(path, build=building(activation), train=TRAIN, task=TASK)


@pytest.fixture
def recorded(tmp_path):
    model = building(nn.Tanh)()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, steps=12, checkpoints=3)
    for step in range(12):
        ids = torch.arange(step * 10, step * 10 + 10) % 34
        optimizer.zero_grad()
        TASK.loss(model, tuple(t[ids] for t in TRAIN)).mean().backward()
        optimizer.step()
        recorder.step(ids)
    recorder.finish()
    shutil.copytree(tmp_path / "run", tmp_path / "clean")
    return tmp_path


def scores(run, method):
    return hw.trace(run, ASKED, method, progress=False).values


@pytest.mark.filterwarnings("ignore:build.. makes another model")
@pytest.mark.parametrize("activation", [nn.Softplus, lambda: Scaled(0.5)], ids=["kind", "setting"])
def test_the_same_weights_in_another_model_are_scored_anew(recorded, activation):
    """Models that take the same weights, in one run directory: what was saved for the first says nothing of the second."""
    first = lambda: Scaled(1.0)  # noqa: E731
    for method in METHODS:
        scores(opened(recorded / "run", first), method)
    shutil.copytree(recorded / "clean", recorded / "fresh")
    for method in METHODS:
        found, truth = (scores(opened(recorded / place, activation), method) for place in ("run", "fresh"))
        assert np.abs(found - truth).max() <= 1e-9 * np.abs(truth).max(), method


@pytest.mark.filterwarnings("ignore:build.. makes another model")
def test_an_index_is_of_one_model(recorded):
    held = hw.index(opened(recorded / "run"), progress=False)
    other = hw.index(opened(recorded / "run", nn.ReLU), progress=False)
    assert held.path != other.path


def test_a_model_is_known_by_its_modules_and_not_by_its_weights(recorded):
    run = opened(recorded / "run")
    assert run.code == model_digest(run.load(run.model(), run.checkpoints[-1])) == model_digest(run.model().train())
    makes = (nn.Tanh, nn.ReLU, lambda: nn.LeakyReLU(0.1), lambda: nn.LeakyReLU(0.2), lambda: Scaled(1.0), lambda: Scaled(2.0))
    assert len({model_digest(building(make)()) for make in makes}) == 6


def measuring(criterion):
    return lambda model, batch: criterion(model(batch[0]), batch[1])


def test_a_criterion_is_known_by_its_settings():
    """A loss made of ``nn.CrossEntropyLoss(...)``, or of a function from elsewhere, is another with other settings, or another function."""
    smoothed = [nn.CrossEntropyLoss(reduction="none", label_smoothing=s) for s in (0.0, 0.1, 0.1)]
    plain, one, same = (code_digest(measuring(c), held=True) for c in smoothed)
    assert plain != one == same
    a, b = (code_digest(measuring(f), held=True) for f in (nn.functional.cross_entropy, nn.functional.nll_loss))
    assert a != b
