"""Baselines as values: what points they come to, and what is refused."""

import numpy as np
import pytest
import torch

from headwater.errors import InputError
from headwater.features import baselines
from headwater.features.baselines import references, smoothed

torch.manual_seed(0)
X = (torch.randn(5, 1, 8, 8, dtype=torch.float64),)
DATA = torch.randn(40, 1, 8, 8, dtype=torch.float64)
LABELS = torch.arange(40) % 4

EACH = {
    "none": (None, 1, 1),
    "number": (0.5, 1, 1),
    "zeros": (baselines.zeros(), 1, 1),
    "constant": (baselines.constant(2.0), 1, 1),
    "one point": (torch.ones(1, 8, 8), 1, 1),
    "one each": (torch.ones(5, 1, 8, 8), 1, 5),
    "numpy": (np.ones((1, 8, 8)), 1, 1),
    "mean": (baselines.mean(DATA), 1, 1),
    "blur": (baselines.blur(2.0), 1, 5),
    "uniform": (baselines.uniform(-1, 1, draws=6), 6, 1),
    "dataset": (baselines.dataset(DATA, 7), 7, 1),
    "nearest": (baselines.nearest(DATA, LABELS, of=torch.arange(5) % 4), 1, 5),
    "calibrated": (baselines.calibrated(DATA, DATA.flatten(1).sum(1), 1.0), 40, 1),
    "average": (baselines.average(0.0, 1.0, baselines.dataset(DATA, 3)), 5, 1),
    "average of each": (baselines.average(0.0, baselines.blur(1.0)), 2, 5),
}


@pytest.mark.parametrize(("baseline", "count", "each"), EACH.values(), ids=EACH)
def test_every_baseline_gives_points_like_the_inputs_with_weights_that_sum_to_one(baseline, count, each):
    found = references(baseline, X, seed=3)
    assert tuple(found.points[0].shape) == (count, each, 1, 8, 8) and found.points[0].dtype == torch.float64
    assert abs(float(found.weights.sum()) - 1) < 1e-12 and (found.weights >= 0).all()
    assert found.name and torch.equal(references(baseline, X, seed=3).points[0], found.points[0])


def test_draws_depend_on_the_seed():
    for baseline in (baselines.uniform(), baselines.dataset(DATA, 5)):
        assert not torch.equal(references(baseline, X, 0).points[0], references(baseline, X, 1).points[0])


def test_a_data_set_is_drawn_without_replacement():
    drawn = references(baselines.dataset(DATA, 40), X, 0).points[0].flatten(1)
    assert len({tuple(row.tolist()) for row in drawn}) == 40


def test_the_nearest_example_is_of_another_class_and_none_is_nearer():
    of = torch.arange(5) % 4
    found = references(baselines.nearest(DATA, LABELS, of=of), X, 0).points[0][0]
    for k in range(5):
        distance = (DATA - X[0][k]).flatten(1).norm(dim=1)
        row = (found[k] == DATA).flatten(1).all(1).nonzero().item()
        assert LABELS[row] != of[k] and distance[row] <= distance[of[k] != LABELS].min() + 1e-12


def test_calibrated_weights_have_the_mean_that_was_asked_for():
    scores = DATA.flatten(1).sum(1)
    found = references(baselines.calibrated(DATA, scores, 4.0), X, 0)
    assert abs(float(found.weights @ scores) - 4.0) < 1e-9
    assert float(found.weights[scores > 4].sum()) > float((scores > 4).double().mean())  # high ones weigh more than equally


def test_blurring_keeps_the_mean_of_what_is_far_from_the_edge_and_constants():
    spot = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    spot[..., 20, 20] = 1
    out = smoothed(spot, 2.0)
    assert abs(float(out.sum()) - 1) < 1e-9 and float(out.max()) < 0.05
    place = torch.arange(41, dtype=torch.float64)
    assert abs(float((out.sum((0, 1, 2)) * (place - 20) ** 2).sum()) - 4.0) < 0.02  # the variance is sigma squared (cut at four sigma)
    assert torch.allclose(smoothed(torch.full((2, 3, 9), 7.0), 3.0), torch.full((2, 3, 9), 7.0))
    assert torch.equal(smoothed(spot, 0.0), spot)
    both = smoothed(torch.cat([spot, spot]), torch.tensor([0.0, 2.0]))
    assert torch.equal(both[0], spot[0]) and torch.allclose(both[1], out[0], atol=1e-15)


@pytest.mark.parametrize(
    ("baseline", "match"),
    [
        (torch.zeros(3, 3), r"shape \(3, 3\)"),
        (torch.full((1, 8, 8), float("nan")), "not finite"),
        ("black", "type str"),
        (baselines.dataset(DATA, 41), "41 of 40"),
        (baselines.dataset(DATA[:, 0], 4), "for inputs of shape"),
        (baselines.uniform(draws=0), "draws=0"),
        (baselines.nearest(DATA, LABELS * 0, of=torch.zeros(5)), "every example has the label"),
        (baselines.nearest(DATA, LABELS, of=[1]), "one each"),
        (baselines.calibrated(DATA, DATA.flatten(1).sum(1), 1e6), "between"),
        (baselines.calibrated(DATA, [1.0], 1.0), "1 scores"),
    ],
)
def test_what_cannot_be_a_baseline_is_refused_in_words(baseline, match):
    with pytest.raises(InputError, match=match):
        references(baseline, X)


def test_several_inputs_take_a_baseline_each():
    two = (torch.randn(4, 3), torch.randn(4, 5))
    found = references((0.0, torch.ones(5)), two)
    assert [p.shape for p in found.points] == [(1, 1, 3), (1, 1, 5)]
    assert references({"b": 1.0, "a": 0.0}, two, names=["a", "b"]).points[1].unique().tolist() == [1.0]
    with pytest.raises(InputError, match="keys"):
        references({"a": 0.0}, two, names=["a", "b"])
    with pytest.raises(InputError, match="2 inputs"):
        references(torch.zeros(3), two)


def test_averages_refuse_weights_that_are_none():
    with pytest.raises(InputError, match="one each"):
        baselines.average(0.0, 1.0, weights=[1.0])
    with pytest.raises(InputError, match="no baseline"):
        baselines.average()
    assert torch.allclose(references(baselines.average(0.0, 1.0, weights=[3, 1]), X).weights, torch.tensor([0.75, 0.25], dtype=torch.float64))


def test_memory_that_must_not_be_written_to_is_fine():
    frozen = np.ones((4, 3))
    frozen.flags.writeable = False
    found = references(baselines.mean(frozen), (torch.zeros(2, 3),))
    assert found.points[0].unique().tolist() == [1.0] and len(references(frozen[0], (torch.zeros(2, 3),))) == 1
