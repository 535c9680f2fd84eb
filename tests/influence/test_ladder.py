"""The law that every rung of the ladder shares: on a small smooth problem, where exact unrolling is the truth, each method that claims a
sign has it. One training, one set of queries, one sign; units that claim the measurement's scale are held to it."""

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw

N, QUERIES, STEPS = 36, 6, 60
TASK = hw.tasks.Classification()
QUIET = {"progress": False}


def data(n, seed):
    """Three clouds in six dimensions, far enough apart to be learned and near enough to disagree."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return torch.randn(n, 6, generator=g, dtype=torch.float64) + 1.5 * torch.eye(6, dtype=torch.float64)[labels], labels


TRAIN, ASKED = data(N, 1), data(QUERIES, 2)


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.05), nn.Linear(12, 3)).double()


def record(path, seed=0):
    """Mini-batch SGD in eval mode: dropout is there for masks, and the training is smooth."""
    model = build(seed).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5, weight_decay=1e-2)
    recorder = hw.Recorder(path, model, optimizer, task=TASK, train=TRAIN, steps=STEPS)
    g = torch.Generator().manual_seed(seed)
    for start in range(STEPS):
        if start % 3 == 0:
            order = torch.randperm(N, generator=g)
        ids = order[12 * (start % 3) : 12 * (start % 3) + 12]
        optimizer.zero_grad()
        TASK.loss(model, tuple(t[ids] for t in TRAIN)).mean().backward()
        optimizer.step()
        recorder.step(ids)
    return recorder.finish()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    return [record(folder / str(seed), seed) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def exact(runs):
    return hw.trace(runs[0], ASKED, hw.Unrolled(), **QUIET)


def agreement(scores, exact):
    """Mean over queries of the correlation with exact unrolling, and the slope of exact on the scores (least squares through 0)."""
    each = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores.values, exact.values, strict=True)]
    return float(np.mean(each)), float((scores.values * exact.values).sum() / (scores.values**2).sum())


ROUGH, FAIR, GOOD = 0.25, 0.5, 0.95  # what a sign needs, what gradients give, what exact products give
METHODS = {
    hw.floors.same_label(): ROUGH,
    hw.KNNShapley(): ROUGH,
    hw.Representations(labels="agree"): ROUGH,
    hw.Representations(labels="agree", similarity="dot"): ROUGH,
    hw.GradDot(): FAIR,
    hw.GradCos(): FAIR,
    hw.TracIn(): FAIR,
    hw.LoGra(dim=8): FAIR,
    hw.LoGra(projection=hw.projections.Leading(4)): FAIR,
    hw.Trak(dim=64): FAIR,
    hw.Trak(dim=None): FAIR,
    hw.Influence(): FAIR,
    hw.Influence(curvature=hw.Diagonal()): FAIR,
    hw.Influence(curvature=hw.Dense()): GOOD,
    hw.Influence(refine=30): GOOD,
    hw.Source(): FAIR,
    hw.Source(average="parameters"): FAIR,
    hw.Source(segments="auto"): FAIR,
    hw.Source(refine=30): GOOD,
    hw.DropoutEnsemble(hw.GradDot(), members=2): FAIR,
    hw.DropoutEnsemble(hw.Source(), members=2): FAIR,
    hw.DropoutEnsemble(hw.Trak(dim=64), members=2): FAIR,
    hw.DropoutEnsemble(hw.Trak(dim=64), members=3, forward_only=True): FAIR,
    hw.CheckpointEnsemble(hw.Influence(), members=3): FAIR,
    hw.LoraEnsemble(hw.GradDot(), members=2, steps=20): FAIR,
    hw.LoraEnsemble(hw.Influence(), members=2, steps=20): FAIR,
    hw.LoraEnsemble(hw.Trak(dim=64), members=2, steps=20): FAIR,
}


def holds(scores, exact, least):
    found, slope = agreement(scores, exact)
    assert found > least, f"{scores.method} correlates {found:.2f} with exact unrolling"
    if scores.unit == "measurement":
        assert 0.05 < slope < 10, f"{scores.method} is in the measurement's unit, and its slope is {slope:.3f}"
    return slope


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_every_method_has_the_sign_of_exact_unrolling(method, runs, exact):
    slope = holds(hw.trace(runs[0], ASKED, method, **QUIET), exact, METHODS[method])
    if METHODS[method] == GOOD:
        assert 0.8 < slope < 1.25


@pytest.mark.parametrize("method", [hw.Trak(dim=64), hw.Source(), hw.Unrolled()], ids=repr)
def test_so_has_the_mean_over_other_models(method, runs, exact):
    holds(hw.trace(runs[0], ASKED, hw.Ensemble(method, runs), **QUIET), exact, FAIR)


def test_so_has_what_an_index_answers(runs, exact):
    index = hw.index(runs[0], **QUIET)
    for found in hw.trace(index, ASKED, [hw.Source(), hw.Influence(), hw.GradDot(), hw.TracIn()], **QUIET):
        holds(found, exact, FAIR)


def test_so_has_a_regression_on_retrainings(runs, exact):
    """Halves of the data, along the same batches."""
    bank = hw.evaluate.replayed(runs[0], hw.evaluate.halves(N, 2 * N, seed=0), ASKED, progress=False)
    holds(hw.trace(runs[0], ASKED, hw.Datamodel(bank), **QUIET), exact, FAIR)


def test_measurements_that_are_turned_turn_every_score(runs, exact):
    """Minus the measurement: minus the score, for all that are derivatives of it."""
    alike = hw.Representations | hw.KNNShapley | type(hw.floors.same_label())  # these do not look at the measurement
    for method in (m for m in METHODS if not isinstance(m, alike)):
        plain, turned = (hw.trace(runs[0], ASKED, method, measure=m, **QUIET).values for m in (TASK.measure, lambda *a: -TASK.measure(*a)))
        assert np.allclose(turned, -plain, rtol=0, atol=1e-6 * np.abs(plain).max()), method
