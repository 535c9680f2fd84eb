"""Choosing on some queries and judging on others."""

import numpy as np
import pytest

import headwater as hw
from headwater import evaluate
from headwater.errors import InputError

N, QUERIES, SUBSETS = 30, 24, 60


def bank_of(truth, noise=0.5, seed=0, queries=None):
    rng = np.random.default_rng(seed)
    subsets = evaluate.halves(N, SUBSETS, seed=1)
    kept = np.zeros((SUBSETS, N))
    for k, ids in enumerate(subsets):
        kept[k, np.asarray(ids)] = 1
    values = (kept @ truth.T)[:, None, :] + noise * rng.normal(size=(SUBSETS, 2, len(truth)))
    return evaluate.Bank(subsets, (0, 1), values, np.zeros((2, len(truth))))


TRUTH = np.random.default_rng(5).normal(size=(QUERIES, N))
BANK = bank_of(TRUTH)


def candidate(noise, seed):
    return hw.TrainingScores(TRUTH + noise * np.random.default_rng(seed).normal(size=TRUTH.shape), None, f"noise {noise}", "rank only")


def test_the_best_on_one_part_is_chosen_and_judged_on_the_other():
    held = [candidate(noise, k) for k, noise in enumerate((3.0, 0.3, 1.0))]
    found = evaluate.tuned(held, BANK, seed=4)
    assert found.chosen == 1 and found.scores is held[1] and "noise 0.3" in repr(found)
    assert sorted(found.chosen_on + found.judged) == list(range(QUERIES)) and len(found.judged) == QUERIES // 2
    for k, scores in enumerate(held):
        assert found.candidates[k] == evaluate.lds(scores.at(found.chosen_on), BANK.at(found.chosen_on)).mean
    truth = evaluate.lds(held[1].at(found.judged), BANK.at(found.judged), seed=4)
    assert found.lds.mean == truth.mean and (found.lds.low, found.lds.high) == (truth.low, truth.high)


def test_of_candidates_that_tell_nothing_the_choice_is_not_rewarded():
    """The largest of many LDS of noise is well above 0; the LDS reported is not."""
    rng = np.random.default_rng(0)
    found = [evaluate.tuned(rng.normal(size=(40, QUERIES, N)), BANK, seed=seed, bootstrap=10) for seed in range(12)]
    assert min(f.candidates.max() for f in found) > 0.02
    assert abs(np.mean([f.lds.mean for f in found])) < 0.5 * np.mean([f.candidates.max() for f in found])


def test_it_refuses_to_judge_by_queries_that_it_was_chosen_on():
    found = evaluate.tuned([candidate(1.0, 0), candidate(2.0, 1)], BANK)
    for bank in (BANK, BANK.at(found.chosen_on[:2]), BANK.at([found.judged[0], found.chosen_on[0]])):
        with pytest.raises(InputError, match="on which these scores were chosen"):
            found.judge(bank)
    assert found.judge(BANK.at(found.judged)).mean == pytest.approx(found.lds.mean, abs=1e-12)
    other = bank_of(TRUTH, seed=9).at(found.judged)  # further trainings
    assert found.judge(other).mean == evaluate.lds(found.scores.at(found.judged), other).mean


def test_queries_of_a_picked_bank_keep_their_numbers():
    some = np.arange(4, 20)
    found = evaluate.tuned([candidate(1.0, 0).at(some), candidate(2.0, 1).at(some)], BANK.at(some))
    numbers = some[list(found.judged)]
    assert found.judge(BANK.at(numbers)).mean == pytest.approx(found.lds.mean, abs=1e-12)
    with pytest.raises(InputError, match="on which these scores were chosen"):
        found.judge(BANK.at(some[list(found.chosen_on)]))
    with pytest.raises(InputError, match="that these scores are not of"):
        found.judge(BANK.at([0, 1]))


@pytest.mark.parametrize(
    ("scores", "settings", "message"),
    [
        ([TRUTH], {}, "1 candidates"),
        ([TRUTH, TRUTH], {"fraction": 0.02}, "at least two queries"),
        ([TRUTH, TRUTH], {"fraction": 1.0}, "at least two queries"),
        ([TRUTH, TRUTH[:3]], {}, "scores of 3 queries"),
    ],
)
def test_what_cannot_be_chosen_is_refused(scores, settings, message):
    with pytest.raises(InputError, match=message):
        evaluate.tuned(scores, BANK, **settings)
