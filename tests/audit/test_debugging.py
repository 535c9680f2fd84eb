"""Shortcuts, kinds of mistakes and drift: planted ones are found, and nothing is where nothing was planted."""

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater import audit
from headwater.errors import InputError

# ---- hotspots


def test_shares_and_excess_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    values, kinds = rng.normal(size=(12, 1, 4, 6)), np.arange(12) % 3
    spots = audit.hotspots(values, by=kinds, parts=2, permutations=19)
    share = np.zeros((12, 6))
    for i in range(12):
        for r in range(4):
            for c in range(6):
                share[i, (r // 2) * 3 + c // 2] += max(values[i, 0, r, c], 0)
        share[i] /= share[i].sum()
    np.testing.assert_allclose(spots.of, share)
    for k in range(3):
        np.testing.assert_allclose(spots.share[k], share[kinds == k].mean(0))
        np.testing.assert_allclose(spots.excess[k], share[kinds == k].mean(0) - share[kinds != k].mean(0))
    np.testing.assert_array_equal(spots.mask(0).reshape(4, 6), spots.region(0).reshape(2, 3).repeat(2, 0).repeat(2, 1))


def test_the_unit_and_the_strength_of_a_prediction_do_not_matter():
    rng = np.random.default_rng(0)
    values, kinds = rng.normal(size=(30, 8)), np.arange(30) % 2
    first = audit.hotspots(values, by=kinds)
    again = audit.hotspots(values * rng.uniform(0.1, 100, size=(30, 1)), by=kinds)
    np.testing.assert_allclose(again.excess, first.excess, atol=1e-12)
    np.testing.assert_array_equal(again.chance, first.chance)


def test_a_planted_part_is_found_in_its_class():
    rng = np.random.default_rng(1)
    values, kinds = rng.exponential(size=(90, 20)), np.repeat(["cat", "dog", "owl"], 30)
    values[kinds == "dog", 7] += 6
    of, part, share, excess, chance = audit.hotspots(values, by=kinds).top(1)[0]
    assert (of, part) == ("dog", 7)
    assert chance <= 0.01 and share > 0.2 and excess > 0.15


def test_where_attributions_do_not_depend_on_the_class_false_alarms_are_as_rare_as_said():
    alarms = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        spots = audit.hotspots(rng.exponential(size=(40, 15)), by=np.arange(40) % 4, permutations=39, seed=seed)
        alarms += spots.chance.min() <= 0.05
    assert alarms <= 7  # 3 of 60 expected; more than 7 has a chance below 1 %


def test_an_example_without_any_positive_score_has_no_share():
    spots = audit.hotspots(np.array([[-1.0, -2.0], [1.0, 1.0], [3.0, 1.0], [0.0, 0.0]]), by=[0, 0, 1, 1])
    np.testing.assert_allclose(spots.of, [[0, 0], [0.5, 0.5], [0.75, 0.25], [0, 0]])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"by": [0, 0, 0, 0]}, "two classes"),
        ({"by": [0, 1]}, "one label for each"),
        ({"by": [0, 0, 1, 1], "permutations": 5}, "permutations=5"),
        ({"by": [0, 0, 1, 1], "parts": np.arange(12).reshape(4, 3) % 3}, "differ between examples"),
    ],
)
def test_bad_questions_about_hotspots_are_refused(asked, message):
    with pytest.raises(InputError, match=message):
        audit.hotspots(np.ones((4, 3)), **asked)


# ---- shortcuts


class Corner(nn.Module):
    """Class 1 where the corner pixel is lit; else what the sum of the others says (a class 1 that is nowhere in particular)."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        flat = x.flatten(1)
        score = self.weight * flat[:, 0] + flat[:, 1:].sum(1) - 7.5
        return torch.stack([torch.zeros_like(score), score], 1)


def lit(seed=0):
    """Images (80, 1, 4, 4): class 1 is brighter everywhere, and its corner is always lit."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(80) % 2
    images = torch.rand(80, 1, 4, 4, generator=rng) * 0.5 + 0.5 * labels[:, None, None, None]
    images[:, 0, 0, 0] = labels.float()
    return images, labels


def test_a_part_that_decides_alone_is_a_shortcut_and_one_that_merely_differs_is_none():
    images, labels = lit()
    for weight, expected in ((20.0, True), (0.3, False)):
        model = Corner(weight)
        scores = hw.explain(model, images, hw.targets.margin(labels, 1 - labels), progress=False)
        first = audit.shortcuts(audit.hotspots(scores, by=labels), model, images, labels)[0]
        assert first.found is expected
        if expected:
            assert first.of == 1
            assert np.flatnonzero(first.region).tolist() == [0]
            assert first.pasted.mean == 1.0 and first.pasted_control.mean < 0.1
            assert first.masked_elsewhere.mean < 0.1
            filled = images.clone()
            filled[:, 0, 0, 0] = 0
            assert first.accuracy_masked == pytest.approx((model(filled).argmax(1) == labels).float().mean().item())
            called = model(filled[labels == 1]).argmax(1)
            assert first.masked.mean == pytest.approx((called != 1).float().mean().item())
            assert "SHORTCUT" in repr(first)


def test_how_often_a_part_must_decide_is_the_users_to_say():
    images, labels = lit()
    model = Corner(3.5)
    spots = audit.hotspots(hw.explain(model, images, hw.targets.margin(labels, 1 - labels), progress=False), by=labels)
    low = next(s for s in audit.shortcuts(spots, model, images, labels) if s.of == 1).pasted.low
    assert 0.1 < low < 0.9
    for least, expected in ((low - 0.01, True), (low + 0.01, False)):
        assert next(s for s in audit.shortcuts(spots, model, images, labels, least=least) if s.of == 1).found is expected


def test_shortcuts_are_asked_of_the_inputs_that_were_explained():
    images, labels = lit()
    spots = audit.hotspots(images.numpy(), by=labels)
    for inputs, kinds in ((images[:40], labels[:40]), (images[:, :, :2], labels), (images, labels + 1)):
        with pytest.raises(InputError, match="the inputs that were explained"):
            audit.shortcuts(spots, Corner(1.0), inputs, kinds)


# ---- kinds of mistakes


def two_kinds(n=40, noise=0.1, seed=0):
    rng = np.random.default_rng(seed)
    kind = np.arange(n) % 4 == 0
    values = noise * rng.normal(size=(n, 6))
    values[kind, 1] += 1
    values[~kind, 4] -= 1
    return values * rng.uniform(0.5, 5, size=(n, 1)), kind


def test_planted_kinds_of_mistakes_are_told_apart_whatever_their_strength():
    values, kind = two_kinds()
    found = audit.clusters(values)
    assert len(found) == 2
    np.testing.assert_array_equal(found.group, kind.astype(int))  # the larger group first
    assert found.silhouette > found.unstructured
    assert [top[0][0] for top in found.top] == ["part 4", "part 1"]
    assert found.top[0][0][1] < 0 < found.top[1][0][1]
    assert sorted(np.concatenate(found.nearest).tolist()) == list(range(40))


def test_only_mistakes_are_grouped():
    values, kind = two_kinds()
    wrong = np.arange(40) < 20
    found = audit.clusters(values, wrong)
    assert (found.group[~wrong] == -1).all()
    np.testing.assert_array_equal(found.group[wrong], kind[wrong].astype(int))
    assert audit.clusters(values, np.flatnonzero(wrong)).group.tolist() == found.group.tolist()


def test_one_kind_of_mistake_is_one_group():
    single = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        single += len(audit.clusters(rng.normal(size=(24, 6)) + 2, seed=seed, most=5)) == 1
    assert single >= 4  # 5 % false alarms each


def test_the_silhouette_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    values, _ = two_kinds(noise=0.6)
    found = audit.clusters(values, k=3)
    assert len(found) == 3
    assert found.silhouette == pytest.approx(metrics.silhouette_score(values, found.group, metric="cosine"), abs=1e-9)


@pytest.mark.parametrize("asked", [{"mistakes": [0, 1]}, {"mistakes": [0, 1, 2, 99]}, {"mistakes": [0.5, 1, 2, 3]}, {"k": 40}, {"k": 0}])
def test_bad_questions_about_mistakes_are_refused(asked):
    with pytest.raises(InputError, match=r"mistakes|examples"):
        audit.clusters(two_kinds()[0], **asked)


# ---- drift


def test_drift_is_found_and_named_where_it_was_planted():
    rng = np.random.default_rng(0)
    then, now = rng.normal(size=(300, 5)), rng.normal(size=(200, 5))
    now[:, 3] += 1.0
    found = audit.drift(then, now)
    assert found.found
    assert found.auc.mean == pytest.approx(0.76, abs=0.06)  # Φ(1 / √2)
    assert found.top(1)[0][0] == "part 3"
    both = np.concatenate([then, now])
    np.testing.assert_allclose(found.shift, (now.mean(0) - then.mean(0)) / both.std(0))


def test_a_change_of_spread_alone_is_drift_too():
    rng = np.random.default_rng(0)
    assert audit.drift(rng.normal(size=(400, 3)), 3 * rng.normal(size=(400, 3))).auc.low > 0.7  # no sum of the values alone tells it


def test_without_drift_none_is_found():
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        alarms += audit.drift(rng.normal(size=(60, 8)), rng.normal(size=(60, 8)), bootstrap=100, seed=seed).found
    assert alarms <= 4  # 2.5 % each: one expected


def test_the_inputs_are_judged_beside_their_explanations():
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    then, now = torch.randn(200, 4), torch.randn(200, 4)
    now[:, 2] += 2  # what the model does not use
    found = audit.drift(*(hw.explain(model, x, progress=False) for x in (then, now)))
    assert not found.found
    assert found.inputs.low > 0.8


def test_bad_questions_about_drift_are_refused():
    with pytest.raises(InputError, match="4 and 5 parts"):
        audit.drift(np.ones((9, 4)), np.ones((9, 5)))
    with pytest.raises(InputError, match="four or more"):
        audit.drift(np.ones((9, 4)), np.ones((3, 4)))
