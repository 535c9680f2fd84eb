"""Owners and copies, judged on planted truth."""

import numpy as np
import pytest

import headwater as hw
from headwater.errors import InputError

RNG = np.random.default_rng(0)
TRAIN = RNG.normal(size=(200, 3, 4, 4)).astype(np.float32)


def scores_of(values):
    return hw.TrainingScores(np.asarray(values, dtype=float), None, "planted", "rank only")


def planted(queries, owner, strength, seed=1):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(queries, len(owner)))
    values[:, owner] += strength
    return scores_of(values)


def test_an_owner_with_planted_influence_is_above_chance_and_nobody_else():
    labels = np.array(["anna"] * 20 + ["bert"] * 60 + ["others"] * 120)
    found = hw.audit.owners(planted(30, labels == "anna", 3.0), labels)
    assert found.above_chance == ("anna",)
    assert found.names == ("anna", "bert", "others") and found.share[0].mean > 2 * found.size[0]
    assert sum(s.mean for s in found.share) == pytest.approx(1) and found.top.sum() == pytest.approx(1)
    assert found.top[0] > 0.9 and found.table.rows[0][0] in ("anna", "others")


def test_without_planted_influence_owners_seldom_are_above_chance():
    labels = np.repeat(["a", "b", "c", "d"], 50)
    named = [hw.audit.owners(planted(20, labels == "a", 0.0, seed), labels, draws=100).above_chance for seed in range(20)]
    assert sum(map(len, named)) <= 4  # of 80


def test_an_owners_share_by_hand():
    found = hw.audit.owners(scores_of([[4, -2, 1, 0], [1, 1, 0, -5]]), ["a", "b", "a", "b"], k=1)
    assert found.share[0].mean == pytest.approx((1 + 0.5) / 2)
    assert found.top.tolist() == [1, 0]


def test_copies_are_found_and_new_images_are_not():
    copies = TRAIN[[5, 17]] + 0.05 * RNG.normal(size=(2, 3, 4, 4)).astype(np.float32)
    asked = np.concatenate([copies, RNG.normal(size=(6, 3, 4, 4)).astype(np.float32)])
    values = RNG.normal(size=(8, 200))
    values[0, 5], values[1, 17] = 50, -50
    found = hw.audit.memorised(scores_of(values), asked, TRAIN)
    assert found.found.tolist() == [0, 1] and found.nearest[:2].tolist() == [5, 17]
    assert found.rank[0] == 1 and found.rank[1] == 200
    assert found.top_share[0] == pytest.approx(50 / values[0].clip(0).sum())
    by_hand = np.sqrt(((asked[3] - TRAIN) ** 2).mean((1, 2, 3)))
    assert found.distance[3] == pytest.approx(by_hand.min(), rel=1e-6)
    assert found.ratio[3] == pytest.approx(by_hand.min() / (0.5 * np.sort(by_hand)[:50].mean()), rel=1e-6)
    assert found.table.rows[0][0] in ("query 0", "query 1")


def test_bad_input_is_named():
    scores = scores_of(np.ones((2, 200)))
    with pytest.raises(InputError, match="3 owners for 200"):
        hw.audit.owners(scores, ["a", "b", "c"])
    with pytest.raises(InputError, match="query 1 without a positive score"):
        hw.audit.owners(scores_of([[1.0], [-1.0]]), ["a"])
    with pytest.raises(InputError, match="for scores"):
        hw.audit.memorised(scores, TRAIN[:3], TRAIN)
    with pytest.raises(InputError, match="numbers"):
        hw.audit.memorised(scores, TRAIN[:2, :1], TRAIN)
