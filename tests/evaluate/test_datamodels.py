"""LDS, paired difference and slope: against scipy, hand calculation, and synthetic truth with known answers."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from headwater.errors import InputError, NotFinite
from headwater.evaluate import Bank, Subsets, halves, lds, leave_out, paired, slope
from headwater.evaluate.datamodels import _correlations


class Scores:
    """The part of TrainingScores that evaluation reads."""

    def __init__(self, values, method="", unit=""):
        self.values, self.method, self.unit = values, method, unit


def linear_bank(scores, subsets, noise, seeds, rng):
    """Measurements that are exactly additive in ``scores`` plus independent noise of each training."""
    signal = subsets.sums(scores)
    values = signal[:, None] + noise * rng.normal(size=(len(subsets), seeds, len(scores)))
    return Bank(subsets, tuple(range(seeds)), values, np.tile(scores.sum(axis=1), (seeds, 1)))


def test_lds_by_hand_with_a_tie():
    subsets = Subsets(4, (np.array([0, 1]), np.array([1, 2]), np.array([2, 3])), "by hand")
    scores = np.array([[1.0, 3, 2, 4], [2.0, 1, 5, 4]])
    truth = np.array([[1.0, 1], [2, 1], [3, 2]])
    result = lds(scores, Bank(subsets, (0,), truth[:, None], np.zeros((1, 2))))
    assert result.per_query == pytest.approx([1, np.sqrt(3) / 2], abs=1e-12)
    assert result.mean == pytest.approx((1 + np.sqrt(3) / 2) / 2) and result.ceiling is None and result.subsets == 3


@pytest.mark.parametrize("rounding", [0, 6])
def test_lds_equals_scipy(rounding):
    rng = np.random.default_rng(0)
    subsets, scores = halves(40, 25), rng.normal(size=(7, 40)).round(rounding)
    values = rng.normal(size=(25, 3, 7)).round(rounding)
    result = lds(scores, Bank(subsets, (0, 1, 2), values, np.zeros((3, 7))))
    predicted, truth = subsets.mask() @ scores.T, values.mean(axis=1)
    assert result.per_query == pytest.approx([spearmanr(predicted[:, q], truth[:, q]).statistic for q in range(7)], abs=1e-12)


def test_redrawn_subsets_equal_repeated_rows():
    rng = np.random.default_rng(1)
    a, b = rng.integers(5, size=(12, 4)).astype(float), rng.normal(size=(12, 4))
    weights = rng.multinomial(12, np.full(12, 1 / 12), 6)
    found = np.concatenate([c for _, c in _correlations(a, b, weights)], axis=1)
    expected = [[spearmanr(np.repeat(a[:, q], w), np.repeat(b[:, q], w)).statistic for q in range(4)] for w in weights]
    assert np.allclose(found, expected, atol=1e-12)


def test_rank_tables_in_parts_equal_the_whole(monkeypatch):
    rng = np.random.default_rng(2)
    scores, subsets = rng.normal(size=(9, 30)), halves(30, 20)
    bank = linear_bank(scores, subsets, 2.0, 2, rng)
    whole = lds(scores, bank, bootstrap=50)
    monkeypatch.setattr("headwater.evaluate.datamodels.HELD", 20 * 50 * 2)
    parts = lds(scores, bank, bootstrap=50)
    assert (parts.mean, parts.low, parts.high) == pytest.approx((whole.mean, whole.low, whole.high), abs=1e-12)


def test_constant_predictions_count_as_zero():
    rng = np.random.default_rng(3)
    scores, subsets = rng.normal(size=(4, 30)), halves(30, 20)
    bank = linear_bank(scores, subsets, 0.0, 1, rng)
    flat = scores.copy()
    flat[1] = 0.25
    result = lds(flat, bank)
    assert result.per_query == pytest.approx([1, 0, 1, 1]) and result.constant == 1 and result.constant_truth == 0
    assert "1 queries with constant predictions" in repr(result)
    still = Bank(subsets, (0,), np.zeros((20, 1, 4)), np.zeros((1, 4)))
    assert lds(scores, still).mean == 0 and lds(scores, still).constant_truth == 4


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_perfect_scores_reach_the_noise_ceiling(seeds):
    rng = np.random.default_rng(seeds)
    scores, subsets = rng.normal(size=(200, 60)), halves(60, 80)
    variance = subsets.sums(scores).var(axis=0).mean()
    noise = np.sqrt(variance)  # one training: as much noise as signal
    result = lds(scores, linear_bank(scores, subsets, noise, seeds, rng), bootstrap=10)
    known = seeds / (seeds + 1)  # signal / (signal + noise / seeds)
    assert result.reliability == pytest.approx(known, abs=0.04)  # rank correlations lie a little below linear ones
    assert result.ceiling == pytest.approx(result.mean, abs=0.02)


def test_pure_noise_has_no_ceiling():
    rng = np.random.default_rng(0)
    bank = Bank(halves(30, 40), (0, 1), rng.normal(size=(40, 2, 100)), np.zeros((2, 100)))
    result = lds(rng.normal(size=(100, 30)), bank, bootstrap=200)
    assert result.ceiling < 0.25 and result.low < 0 < result.high


def spread(make, repeats):
    return [make(np.random.default_rng(100 + i)) for i in range(repeats)]


def test_the_interval_covers_the_truth():
    """Fresh queries and subsets each time; the expected LDS comes from a very large bank."""

    def world(rng, queries, count):
        scores = rng.normal(size=(queries, 30))
        estimate = scores + 0.7 * rng.normal(size=scores.shape)
        return estimate, linear_bank(scores, halves(30, count, seed=int(rng.integers(2**31))), 2.0, 1, rng)

    expected = lds(*world(np.random.default_rng(0), 250, 150), bootstrap=2).mean
    hits = [r.low <= expected <= r.high for r in spread(lambda rng: lds(*world(rng, 25, 30), bootstrap=100), 40)]
    assert np.mean(hits) >= 0.85


def test_the_paired_interval_covers_the_difference_and_is_narrower():
    def world(rng, queries, count):
        scores = rng.normal(size=(queries, 30))
        shared = scores + 0.5 * rng.normal(size=scores.shape)
        a, b = shared + 0.3 * rng.normal(size=scores.shape), shared + 0.6 * rng.normal(size=scores.shape)
        return a, b, linear_bank(scores, halves(30, count, seed=int(rng.integers(2**31))), 1.0, 1, rng)

    expected = paired(*world(np.random.default_rng(0), 250, 150), bootstrap=2).difference
    results = spread(lambda rng: paired(*world(rng, 25, 30), bootstrap=100), 40)
    assert np.mean([r.low <= expected <= r.high for r in results]) >= 0.85
    a, b, bank = world(np.random.default_rng(1), 40, 40)
    both, one = paired(a, b, bank), lds(a, bank)
    assert both.difference == pytest.approx(one.mean - lds(b, bank).mean)
    assert both.high - both.low < one.high - one.low
    assert np.isclose(paired(b, a, bank).low, -both.high)


def test_paired_with_itself_is_zero_and_names_are_shown():
    rng = np.random.default_rng(0)
    scores, subsets = rng.normal(size=(5, 20)), halves(20, 10)
    bank = linear_bank(scores, subsets, 1.0, 1, rng)
    same = paired(Scores(scores, "SOURCE"), Scores(scores, "TracIn"), bank)
    assert same.low == same.high == same.difference == 0 and "SOURCE - TracIn" in repr(same)


def test_results_do_not_depend_on_the_container_or_change_from_call_to_call():
    rng = np.random.default_rng(0)
    scores, subsets = rng.normal(size=(5, 20)), halves(20, 10)
    bank = linear_bank(scores, subsets, 1.0, 2, rng)
    one = lds(scores, bank)
    for other in (lds(Scores(scores, "GradDot"), bank), lds(torch.tensor(scores), bank), lds(Scores(torch.tensor(scores)), bank)):
        assert (one.mean, one.low, one.high) == (other.mean, other.low, other.high)
    assert lds(scores, bank, seed=1).low != one.low
    assert repr(lds(Scores(scores, "GradDot"), bank)).startswith("LDS(GradDot: ")


def test_any_scale_gives_the_same_lds_and_the_inverse_slope():
    rng = np.random.default_rng(0)
    scores, subsets = rng.normal(size=(5, 20)), leave_out(20, 20)
    bank = linear_bank(scores, subsets, 0.1, 1, rng)
    assert lds(4 * scores, bank).mean == lds(scores, bank).mean
    assert slope(4 * scores, bank).slope == pytest.approx(slope(scores, bank).slope / 4)


def test_slope_is_least_squares_through_zero_with_an_interval():
    rng = np.random.default_rng(5)
    scores, subsets = rng.normal(size=(30, 50)), leave_out(50, 40, size=3)
    bank = linear_bank(1.7 * scores, subsets, 0.5, 2, rng)
    result = slope(scores, bank)
    predicted = np.array([[-scores[q, subsets.removed(s)].sum() for q in range(30)] for s in range(40)])
    actual = (bank.values - bank.base).mean(axis=1)
    line = np.linalg.lstsq(predicted.reshape(-1, 1), actual.ravel(), rcond=None)[0][0]
    assert result.slope == pytest.approx(line, rel=1e-12) and np.allclose(result.predicted, predicted)
    assert result.low < 1.7 < result.high and result.high - result.low < 0.1
    assert result.per_query[4] == pytest.approx(spearmanr(predicted[:, 4], actual[:, 4]).statistic)


def test_slope_says_when_the_unit_gives_it_no_meaning():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 10))
    bank = linear_bank(scores, leave_out(10, 10), 0.0, 1, rng)
    assert "only its sign" in repr(slope(Scores(scores, "GradCos", "cosine"), bank))
    assert "only its sign" not in repr(slope(Scores(scores, "Source", "measurement"), bank))


def test_missing_trainings_are_left_out():
    rng = np.random.default_rng(0)
    scores, subsets = rng.normal(size=(4, 20)), halves(20, 12)
    bank = linear_bank(scores, subsets, 1.0, 2, rng)
    kept = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    small = Bank(subsets.take(kept), bank.seeds, bank.values[kept], bank.base)
    bank.values[6, 1] = np.nan
    assert lds(scores, bank).mean == lds(scores, small).mean and lds(scores, bank).subsets == 11
    assert "1 trainings missing" in repr(bank)
    bank.values[1:] = np.nan
    with pytest.raises(InputError, match="1 complete subsets"):
        lds(scores, bank)


@pytest.mark.parametrize(
    ("scores", "error", "words"),
    [
        (np.zeros((4, 19)), InputError, r"\(4, 20\)"),
        (np.zeros((20, 4)), InputError, r"\(4, 20\)"),
        (np.full((4, 20), np.nan), NotFinite, "80 scores"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores, error, words):
    bank = linear_bank(np.ones((4, 20)), halves(20, 5), 1.0, 1, np.random.default_rng(0))
    for judge in (lds, slope, lambda s, b: paired(s, s, b)):
        with pytest.raises(error, match=words):
            judge(scores, bank)


def test_slope_refuses_what_it_cannot_answer():
    bank = linear_bank(np.ones((4, 20)), halves(20, 5), 1.0, 1, np.random.default_rng(0))
    with pytest.raises(InputError, match="no change at all"):
        slope(np.zeros((4, 20)), bank)
    bank.base[:] = np.nan
    with pytest.raises(InputError, match="full set"):
        slope(np.ones((4, 20)), bank)


def test_a_bank_of_the_wrong_shape_is_refused():
    with pytest.raises(InputError, match="seeds, queries"):
        Bank(halves(20, 5), (0, 1), np.zeros((5, 1, 4)), np.zeros((1, 4)))
