"""Scores against a reference: the measures by their definitions, ties and constants, and what is refused."""

import sys

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from headwater.errors import InputError, NotFinite
from headwater.evaluate import against
from headwater.evaluate.against import MEASURES
from headwater.result import TrainingScores


def scores(values, method="method", unit="measurement", **more):
    return TrainingScores(np.asarray(values), None, method, unit, **more)


def pair(queries=7, train=40, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(queries, train))
    return truth, 0.5 * truth + noise * rng.normal(size=truth.shape)


def overlap_by_definition(a, b, p):
    """Rank-biased overlap of two whole rankings, term by term."""
    first, second = np.argsort(-a), np.argsort(-b)
    share = [len(set(first[:d]) & set(second[:d])) / d for d in range(1, len(a) + 1)]
    return (1 - p) * sum(p ** (d - 1) * x for d, x in enumerate(share, 1)) + p ** len(a) * share[-1]


def test_every_measure_by_its_definition():
    truth, other = pair()
    found = against(truth, other, k=5).found["scores"]
    for q, (a, b) in enumerate(zip(truth, other, strict=True)):
        top = [set(np.argsort(-x)[:5]) for x in (a, b)]
        strongest = np.argsort(-np.abs(a))[:5]
        expected = {
            "spearman": spearmanr(a, b).statistic,
            "pearson": pearsonr(a, b).statistic,
            "jaccard": len(top[0] & top[1]) / len(top[0] | top[1]),
            "rbo": overlap_by_definition(a, b, 0.9),
            "sign": np.mean(np.sign(a[strongest]) == np.sign(b[strongest])),
        }
        assert {m: found.per_query[m][q] for m in MEASURES} == pytest.approx(expected, abs=1e-12)
    assert found.means["spearman"].mean == pytest.approx(found.per_query["spearman"].mean())
    assert found.slope.mean == pytest.approx(np.linalg.lstsq(other.reshape(-1, 1), truth.ravel(), rcond=None)[0][0])
    assert found.slope.low < found.slope.mean < found.slope.high


@pytest.mark.parametrize("persistence", [0.5, 0.98])
def test_rank_biased_overlap_looks_as_deep_as_it_should(persistence):
    truth, other = pair(2, 200)
    found = against(truth, other, persistence=persistence).found["scores"].per_query["rbo"]
    assert found == pytest.approx([overlap_by_definition(a, b, persistence) for a, b in zip(truth, other, strict=True)], abs=2e-9)


def test_the_same_scores_agree_in_everything_and_their_negative_in_nothing():
    truth, _ = pair()
    result = against(scores(truth, "exact"), {"itself": 2 * truth, "turned": -truth})
    assert [result.found["itself"].means[m].mean for m in MEASURES] == pytest.approx([1] * 5) and repr(result.found["itself"].slope) == "0.500 [0.500, 0.500]"
    turned = result.found["turned"]
    assert turned.means["spearman"].mean == pytest.approx(-1) and turned.means["sign"].mean == 0 and turned.means["jaccard"].mean == 0 and turned.slope.mean == -1


def test_scores_of_chance_reach_what_is_said_of_chance():
    truth, _ = pair(400, 50, seed=3)
    rng = np.random.default_rng(9)
    result = against(truth, {"noise": rng.normal(size=truth.shape), "nothing": np.ones(truth.shape)}, k=10)
    for name in ("noise", "nothing"):  # chance orders what is tied: a constant is not rewarded for the order of the training set
        assert result.found[name].means["jaccard"].mean == pytest.approx(result.chance, abs=0.02)
    assert result.found["nothing"].constant == 400 and result.found["nothing"].tied == 400 and result.found["nothing"].means["spearman"].mean == 0
    assert against(np.ones((3, 50)), np.ones((3, 50)), k=10).found["scores"].means["jaccard"].mean < 0.5
    one_order = np.tile(-np.arange(50.0), (400, 1))
    assert against(one_order, np.ones((400, 50)), k=10).found["scores"].means["jaccard"].mean < 0.5


def test_constants_zeros_and_ties_are_counted():
    truth, other = pair()
    truth[2] = 1.5
    other[4] = 0
    other[:, [3, 8]] = 0
    other[0, :3] = 9.0
    result = against(truth, other, k=2)
    judged = result.found["scores"]
    assert result.constant_reference == 1 and judged.constant == 1 and judged.zero_columns == 2 and judged.tied == 2  # the constant one, and the first
    assert judged.per_query["spearman"][[2, 4]].tolist() == [0, 0] and judged.per_query["sign"][4] == 0
    assert "1 queries with a constant reference" in repr(result)
    assert judged.notes == "1 queries with constant scores, 2 training examples that are always 0, 2 queries tied at k"
    zero = against(np.zeros((2, 5)), np.ones((2, 5))).found["scores"]
    assert np.isnan(zero.per_query["sign"]).all() and zero.means["sign"].examples == 0


def test_the_slope_is_left_out_where_a_unit_forbids_it():
    truth, other = pair()
    for reference, judged, there in [
        (scores(truth), scores(other), True),
        (truth, scores(other, unit="rank only"), False),
        (scores(truth, unit="cosine"), other, False),
        (truth, np.zeros_like(other), False),
    ]:
        (found,) = against(reference, judged).found.values()
        assert (found.slope is not None) == there
    assert repr(against(truth, scores(other, unit="cosine"))).endswith(" -")


def test_several_are_one_table_in_the_order_given():
    truth, other = pair()
    result = against(scores(truth, "Unrolled()"), [scores(other, "TracIn()"), scores(truth, "Source()"), scores(other, "TracIn()", "rank only")])
    assert list(result.found) == ["TracIn()", "Source()", "TracIn() (2)"]
    lines = repr(result).splitlines()
    assert lines[0].startswith("Against(Unrolled(): 7 queries x 40 training examples") and "Spearman" in lines[1] and len(lines) == 6
    frame = result.to_frame()
    assert len(frame) == 21 and frame.groupby("method", sort=False)["spearman"].mean()["Source()"] == pytest.approx(1)
    assert result.table.rows[1][1] == "1.000 [1.000, 1.000]"


def test_the_container_and_blocks_change_nothing(monkeypatch):
    truth, other = pair()
    one = against(truth, other)
    monkeypatch.setattr(sys.modules["headwater.evaluate.against"], "_BLOCK", 100)
    for result in (against(torch.tensor(truth), torch.tensor(other)), against(scores(truth), [scores(other)]), against(truth.tolist(), {"a": other.tolist()})):
        (found,) = result.found.values()
        assert all(np.array_equal(found.per_query[m], one.found["scores"].per_query[m]) for m in MEASURES)


def test_the_interval_covers_the_choice_of_queries():
    truth, other = pair(3000, 30, seed=1)
    expected = against(truth, other, bootstrap=2).found["scores"].means["spearman"].mean
    parts = [against(truth[i : i + 30], other[i : i + 30], bootstrap=200).found["scores"] for i in range(0, 3000, 60)]
    assert np.mean([p.means["spearman"].low <= expected <= p.means["spearman"].high for p in parts]) >= 0.86


@pytest.mark.parametrize(
    ("reference", "judged", "error", "words"),
    [
        (np.zeros((3, 4)), np.zeros((4, 3)), InputError, r"shape \(4, 3\), and a reference of shape \(3, 4\)"),
        (np.zeros(4), np.zeros((3, 4)), InputError, "the reference of shape"),
        (np.zeros((3, 4)), [], InputError, "no scores"),
        (np.zeros((3, 4)), {}, InputError, "no scores"),
        (np.full((3, 4), np.inf), np.zeros((3, 4)), NotFinite, "12 of the 12 numbers in the reference are NaN"),
        (np.zeros((3, 4)), {"bad": np.full((3, 4), np.nan)}, NotFinite, "12 of the 12 numbers in the scores of 'bad' are NaN"),
        (np.zeros((1, 4)), np.array([[1.0, 2.0, np.nan, 0.0]]), NotFinite, "1 of the 4 numbers in scores is NaN or infinite"),
        (np.zeros((3, 1)), np.ones((3, 1)), InputError, r"a single column, of shape \(3, 1\)"),
        (scores(np.zeros((2, 4)), query_names=("a", "b")), scores(np.zeros((2, 4)), query_names=("b", "a")), InputError, "same queries in the same order"),
        (scores(np.zeros((2, 4)), provenance={"data": ["x"]}), scores(np.zeros((2, 4)), provenance={"data": ["y"]}), InputError, "other training data"),
    ],
)
def test_what_does_not_fit_is_refused(reference, judged, error, words):
    with pytest.raises(error, match=words):
        against(reference, judged)


def test_settings_without_meaning_are_refused():
    for settings in ({"k": 0}, {"persistence": 1.0}, {"persistence": 0.0}):
        with pytest.raises(InputError, match="To mend it"):
            against(np.ones((2, 3)), np.ones((2, 3)), **settings)


def test_columns_are_called_what_they_are():
    """Groups are no training examples; and where all of them are among the top, their overlap says nothing."""
    exact = TrainingScores(np.arange(12.0).reshape(3, 4), None, "Unrolled()", "measurement", provenance={"scored": "tokens"})
    said = repr(against(exact, exact.values * [1, 1, 0, 2], k=2))
    assert "3 queries x 4 tokens;" in said and "Jaccard by chance 0.333" in said and "1 training examples that are always 0" in said
    groups = exact.group(["a", "b", "a", "c"])
    said = repr(against(groups, groups))
    assert "3 queries x 3 groups; Jaccard of all 3 groups is 1, whatever scores say" in said and "by chance" not in said
