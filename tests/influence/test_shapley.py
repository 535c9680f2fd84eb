"""KNN-Shapley: against Shapley values over all subsets, and the laws that they obey."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InputError
from headwater.influence.shapley import KNNShapley, shapley
from headwater.influence.similarity.labels import Labels


def utility(chosen, order, labels, target, k, classes, centre):
    """Of a set of examples: the share of hits among its k nearest, or minus the squared error of their mean (empty places: the centre)."""
    nearest = [i for i in order if i in chosen][:k]
    if classes:
        return sum(labels[i] == target for i in nearest) / k
    prediction = centre + sum(labels[i] - centre for i in nearest) / k
    return -((prediction - target) ** 2)


def over_all_subsets(nearness, labels, target, k, classes):
    """The Shapley value of each example by its definition."""
    n, centre = len(nearness), labels.mean()
    order = sorted(range(n), key=lambda i: (-nearness[i], i))
    values = np.zeros(n)
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        for size in range(n):
            for chosen in map(set, combinations(rest, size)):
                gain = utility(chosen | {i}, order, labels, target, k, classes, centre) - utility(chosen, order, labels, target, k, classes, centre)
                values[i] += gain / (n * comb(n - 1, size))
    return values


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize(("n", "k"), [(8, 1), (8, 3), (7, 7), (5, 9), (1, 2), (2, 1), (3, 2)])
def test_the_recursion_equals_the_sum_over_all_subsets(n, k, classes):
    rng = np.random.default_rng(n * 10 + k)
    nearness = -rng.integers(0, 4, size=(2, n)).astype(float)  # with ties
    train = rng.integers(0, 2, size=n) if classes else rng.normal(size=n) + 3.0
    queries = np.array([0, 1]) if classes else np.array([2.0, 4.0])
    found = shapley(nearness, Labels(queries[:, None], train[:, None]), k)
    for q in range(2):
        assert np.allclose(found[q], over_all_subsets(nearness[q], train, queries[q], k, classes), atol=1e-12)


def test_several_outputs_add_up():
    rng = np.random.default_rng(0)
    nearness, train, queries = rng.normal(size=(3, 9)), rng.normal(size=(9, 2)), rng.normal(size=(3, 2))
    both = shapley(nearness, Labels(queries, train), 3)
    assert np.allclose(both, sum(shapley(nearness, Labels(queries[:, [o]], train[:, [o]]), 3) for o in (0, 1)), atol=1e-12)


# ------------------------------------------------------------------------------------------------------------------ on a run


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, x[:, :3].argmax(1)


TRAIN, ASKED = data(40, 1), data(6, 2)


def recorded(path, train=TRAIN, task=None, make=build):
    task, model = task or hw.tasks.Classification(), make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hw.Recorder(path, model, optimizer, task=task, train=train, steps=20)
    for step in range(20):
        ids = torch.arange(10) + 10 * (step % 4)
        optimizer.zero_grad()
        task.loss(model, tuple(t[ids] for t in train)).mean().backward()
        optimizer.step()
        recorder.step(ids)
    return recorder.finish()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("shapley") / "run")


def trace(run, method, queries=ASKED, **settings):
    return hw.trace(run, queries, method, progress=False, **settings)


@pytest.mark.parametrize("layer", [None, "input", "1"])
def test_scores_sum_to_the_share_of_hits_among_the_nearest(run, layer):
    scores = trace(run, KNNShapley(k=4, layer=layer))
    assert scores.values.shape == (6, 40) and scores.unit == "rank only"
    model = run.load(run.model(), run.checkpoints[-1])
    seen = (lambda x: x) if layer == "input" else model[:2]
    with torch.no_grad():
        nearest = torch.cdist(seen(ASKED[0]), seen(TRAIN[0])).argsort(1)[:, :4]
    hits = (TRAIN[1][nearest] == ASKED[1][:, None]).double().mean(1)
    assert np.allclose(scores.values.sum(1), hits, atol=1e-12)
    assert "input" in scores.method if layer != "1" else "output of layer '1'" in scores.method


def test_equal_distances_are_settled_by_order(tmp_path):
    x, y = torch.zeros(40, 4, dtype=torch.float64), torch.arange(40) % 2
    scores = trace(recorded(tmp_path / "run", (x, y)), KNNShapley(k=1, layer="input"), (x[:1], y[:1]))
    assert scores.values.sum() == pytest.approx(1) and scores.values[0, 0] == scores.values.max()
    labels = Labels(np.array([[0]]), y[:, None].numpy())
    assert np.allclose(scores.values, shapley(np.zeros((1, 40)), labels, 1), atol=1e-15)


def test_regression_has_its_own_utility(tmp_path):
    x, y = TRAIN[0], TRAIN[0].sum(1)

    def line():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    run = recorded(tmp_path / "run", (x, y), hw.tasks.Regression(), line)
    asked = ASKED[0], ASKED[0].sum(1)
    scores = trace(run, KNNShapley(k=4, layer="input"), asked)
    nearest = torch.cdist(asked[0], x).argsort(1)[:, :4]
    whole, none = -((y[nearest].mean(1) - asked[1]) ** 2), -((y.mean() - asked[1]) ** 2)
    assert np.allclose(scores.values.sum(1), whole - none, atol=1e-12) and scores.provenance["utility"] == "minus squared error"


def test_a_named_query_is_the_sum_of_its_examples_and_order_and_batches_change_nothing(run):
    plain = trace(run, KNNShapley()).values
    named = trace(run, KNNShapley(), [hw.Query("a", tuple(t[:4] for t in ASKED)), hw.Query("b", tuple(t[4:] for t in ASKED))])
    assert np.allclose(named.values, [plain[:4].sum(0), plain[4:].sum(0)], atol=1e-12) and named.query_names == ("a", "b")
    assert np.allclose(trace(run, KNNShapley(), batch_size=7).values, plain, atol=1e-12)
    assert np.allclose(trace(run, KNNShapley(), tuple(t.flip(0) for t in ASKED)).values[::-1], plain, atol=1e-12)


def test_what_has_no_meaning_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="k=0"):
        KNNShapley(k=0)
    with pytest.raises(InputError, match="positions"):
        KNNShapley(positions="first")
    other = recorded(tmp_path / "run", task=hw.tasks.Task(loss=run.stages[0].task.loss, measure=lambda m, b: m(b[0])[:, 0]))
    with pytest.raises(InputError, match="same kind of labels"):
        trace(other, KNNShapley(), (ASKED[0], ASKED[1].double()))
