"""Mislabel detection against counting pairs and against shuffling ties."""

import numpy as np
import pytest
import torch

from headwater.errors import InputError, NotFinite
from headwater.evaluate import auroc, detection_curve


def pairs(scores, flipped):
    """AUROC by looking at every (flipped, clean) pair."""
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[flipped] for b in scores[~flipped]]
    return sum(wins) / len(wins)


def drawn(seed, n=40, levels=6):
    rng = np.random.default_rng(seed)
    return rng.integers(levels, size=n).astype(float), np.arange(n) % 4 == 0


@pytest.mark.parametrize("seed", range(5))
def test_auroc_with_ties_equals_counting_pairs(seed):
    scores, flipped = drawn(seed)
    assert auroc(scores, flipped) == pytest.approx(pairs(scores, flipped), abs=1e-12)
    assert auroc(torch.tensor(scores), torch.tensor(flipped)) == auroc(scores, flipped)


@pytest.mark.parametrize(("scores", "area"), [([3, 2, 1, 0], 1.0), ([0, 0, 0, 0], 0.5), ([0, 1, 2, 3], 0.0), ([2, 2, 1, 0], 2.5 / 3)])
def test_auroc_by_hand(scores, area):
    assert auroc(scores, [True, False, False, False]) == pytest.approx(area, abs=1e-12)


def test_curve_is_the_average_over_shuffled_ties():
    scores, flipped = drawn(0)
    rng, runs = np.random.default_rng(1), []
    for _ in range(4000):
        order = np.lexsort((rng.random(len(scores)), -scores))
        runs.append(np.concatenate([[0], np.cumsum(flipped[order])]) / flipped.sum())
    curve = detection_curve(scores, flipped)
    assert np.abs(curve.found - np.mean(runs, axis=0)).max() < 0.02
    assert curve.inspected[[0, -1]].tolist() == [0, 1] and curve.found[[0, -1]].tolist() == [0, 1]


def test_constant_scores_give_the_diagonal():
    curve = detection_curve(np.zeros(50), np.arange(50) < 5)
    assert np.allclose(curve.found, curve.inspected, atol=1e-12) and curve.auroc == 0.5


def test_reading_the_curve():
    scores, flipped = np.arange(100.0), np.arange(100) >= 90
    curve = detection_curve(scores, flipped)
    assert curve.at(0.05) == pytest.approx(0.5) and curve.at(0.1) == pytest.approx(1.0)
    assert "AUROC 1.000" in repr(curve) and "5 % finds 50%" in repr(curve)


@pytest.mark.parametrize(
    ("scores", "flipped", "error"),
    [
        (np.zeros(3), np.zeros(3, bool), InputError),
        (np.zeros(3), np.ones(3, bool), InputError),
        (np.zeros(3), np.ones(4, bool), InputError),
        (np.array([0.0, np.nan]), np.array([True, False]), NotFinite),
    ],
)
def test_bad_input_is_named(scores, flipped, error):
    with pytest.raises(error, match="To mend it"):
        detection_curve(scores, flipped)
