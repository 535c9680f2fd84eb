"""The gap between groups: its parts sum, a planted proxy is found by its strength, and nothing is found where there is none."""

import numpy as np
import pytest
import torch
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression

import headwater as hw
from headwater import audit
from headwater.audit import fairness
from headwater.errors import InputError
from headwater.result import FeatureScores

SMALL = {"bootstrap": 200, "permutations": 200}


def people(n=600, strength=0.0, p=5, seed=0):
    """``(X, group)``: normal columns, of which column 3 differs between the groups by ``strength`` standard deviations."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 2, n)
    X = rng.normal(size=(n, p))
    X[:, 3] += strength * group
    return X, group


def scores_of(values, outputs=None, base=None, name="zeros"):
    values = np.asarray(values, dtype=float)
    base = np.zeros(len(values)) if base is None else base
    outputs = values.sum(1) + base if outputs is None else outputs
    return FeatureScores(values, values.sum(1) - (outputs - base), np.zeros(len(values), int), outputs, base, "given", "f", name)


# ---- the law


@pytest.mark.parametrize("baseline", [0.0, hw.baselines.dataset(people(seed=1)[0], 8), None], ids=["zeros", "dataset", "default"])
def test_the_parts_sum_to_the_gap_of_the_model_s_own_outputs(baseline):
    X, group = people(strength=1.0)
    model = GradientBoostingRegressor(n_estimators=20, random_state=0).fit(X, X[:, 3] * X[:, 0] + X[:, 1] ** 2)
    found = audit.gap(model, X, group, baseline=baseline, **SMALL)
    outputs = model.predict(X)
    truth = outputs[group == 0].mean() - outputs[group == 1].mean()
    assert len(found.parts) == (2 if baseline is None else 1)
    for part in found.parts.values():
        np.testing.assert_allclose(part.values.sum(), truth, atol=1e-12)
        assert part.before == 0
        assert abs(part.residual) < 1e-12
    np.testing.assert_allclose(found.gap.mean, truth, atol=1e-12)


def test_of_a_linear_model_each_part_is_the_weight_times_the_difference_of_means():
    X, group = people(strength=2.0)
    model = LinearRegression().fit(X, X @ [1.0, 2.0, 0.0, -1.5, 0.0])
    found = audit.gap(model, X, group, pair=(1, 0), **SMALL)
    for part in found.parts.values():
        np.testing.assert_allclose(part.values, model.coef_ * (X[group == 1].mean(0) - X[group == 0].mean(0)), atol=1e-12)


def test_swapping_the_pair_swaps_the_sign():
    X, group = people(strength=1.0)
    scores = scores_of(X)
    one, other = (audit.gap(scores, group=group, pair=pair, **SMALL) for pair in ((0, 1), (1, 0)))
    np.testing.assert_array_equal(one.parts["zeros"].values, -other.parts["zeros"].values)
    assert one.gap.mean == -other.gap.mean
    assert one.p == other.p


def test_what_the_baselines_differ_by_is_a_part_of_its_own():
    X, group = people()
    base = 0.7 * (group == 0)
    found = audit.gap(scores_of(X, base=base), group=group, **SMALL)
    part = found.parts["zeros"]
    np.testing.assert_allclose(part.before, 0.7)
    np.testing.assert_allclose(part.values.sum() + part.before - part.residual, found.gap.mean, atol=1e-12)


def test_a_residual_is_not_swept_into_a_part():
    X, group = people()
    outputs = X.sum(1) + 0.1 * (group == 0)
    part = audit.gap(scores_of(X, outputs), group=group, **SMALL).parts["zeros"]
    np.testing.assert_allclose(part.residual, -0.1, atol=1e-12)


def test_the_gap_of_the_error_is_cut_exactly_and_says_what_the_labels_alone_make():
    X, group = people(200, strength=1.0)
    y = (X[:, 3] + X[:, 0] > 0.5).astype(int)
    model = LogisticRegression().fit(X, y)
    found = audit.gap(model, X, group, labels=y, baseline=hw.baselines.dataset(X, 4), **SMALL)
    error = 1 - model.predict_proba(X)[np.arange(200), y]
    part = found.parts["the baseline"]
    np.testing.assert_allclose(found.gap.mean, error[group == 0].mean() - error[group == 1].mean(), atol=1e-12)
    np.testing.assert_allclose(part.values.sum() + part.before - part.residual, found.gap.mean, atol=1e-12)
    assert part.before != 0
    assert abs(part.residual) < 1e-9
    assert "error" in found.unit


def test_one_minus_an_explanation_is_complete_by_the_same_residual():
    X, _ = people(20)
    scores = scores_of(X, X.sum(1) + 0.1, np.full(20, 0.3))
    turned = fairness._turned(scores)
    np.testing.assert_allclose(turned.values.sum(1), turned.output - turned.baseline_output + turned.residual, atol=1e-12)
    np.testing.assert_allclose(turned.output, 1 - scores.output)
    assert abs(turned.residual).min() > 0.1


def test_labels_stay_with_their_rows_where_some_are_left_out():
    X, group = people(90, strength=1.0)
    y, three = (X[:, 0] > 0).astype(int), np.where(np.arange(90) % 3 == 0, 2, group)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)).double()
    error = 1 - network(torch.as_tensor(X)).softmax(1).detach().numpy()[np.arange(90), y]
    loss = torch.nn.functional.cross_entropy(network(torch.as_tensor(X)), torch.as_tensor(y), reduction="none").detach().numpy()
    for truth, asked in ((error, {"labels": y}), (loss, {"target": hw.targets.loss(torch.nn.functional.cross_entropy, torch.as_tensor(y))})):
        found = audit.gap(network, torch.as_tensor(X), three, pair=(0, 1), given=X[:, 1] > -1, baseline=0.0, **asked, **SMALL)
        first, second = ((three == k) & (X[:, 1] > -1) for k in (0, 1))
        np.testing.assert_allclose(found.gap.mean, truth[first].mean() - truth[second].mean(), atol=1e-12)


def test_given_compares_only_those_rows():
    X, group = people(strength=1.0)
    kept = X[:, 0] > 0
    part, direct = (audit.gap(scores_of(X), group=group, given=kept, **SMALL), audit.gap(scores_of(X[kept]), group=group[kept], **SMALL))
    np.testing.assert_array_equal(part.parts["zeros"].values, direct.parts["zeros"].values)
    assert part.sizes == direct.sizes


def test_groups_fold_columns_before_they_are_compared():
    X, group = people(strength=1.0)
    whole = audit.gap(scores_of(X), group=group, **SMALL).parts["zeros"].values
    folded = audit.gap(scores_of(X), group=group, groups=["a", "a", "b", "b", "c"], **SMALL)
    assert folded.names == ("a", "b", "c")
    np.testing.assert_allclose(folded.parts["zeros"].values, [whole[:2].sum(), whole[2:4].sum(), whole[4]], atol=1e-12)


# ---- planted truth


def test_a_proxy_is_ranked_first_the_more_surely_the_stronger_it_is():
    """Columns of equal use, one of which tells the group: recall at rank 1 over twenty samples rises with the strength, from chance to always."""
    recall = []
    for strength in (0.0, 0.2, 1.0):
        firsts = [
            audit.gap(scores_of(X), group=g, bootstrap=1, permutations=1).parts["zeros"].order[0] == 3 for X, g in (people(400, strength, seed=s) for s in range(20))
        ]
        recall.append(np.mean(firsts))
    assert recall[0] <= 0.45
    assert recall[0] < recall[1] < recall[2] == 1.0


def test_without_a_proxy_false_alarms_stay_at_the_level_and_without_correction_they_do_not():
    alarms, plain = 0, 0
    for seed in range(60):
        X, group = people(100, seed=seed, p=10)
        part = audit.gap(scores_of(X), group=group, bootstrap=1, permutations=199, seed=seed).parts["zeros"]
        alarms += (part.corrected <= 0.05).any()
        plain += (part.p <= 0.05).any()
    assert alarms <= 8  # 3 of 60 are expected; more than 8 has a chance below 1 %
    assert plain >= 15  # 24 of 60 are expected of ten columns


def test_a_column_that_the_model_ignores_is_no_carrier_however_it_differs():
    X, group = people(strength=3.0)
    blind = LinearRegression().fit(X, X[:, 0])
    blind.coef_[3] = 0.0
    found = audit.gap(blind, X, group, **SMALL)
    assert "feature 3" not in found.carriers()
    strong = LinearRegression().fit(X, X[:, 3])
    assert audit.gap(strong, X, group, **SMALL).carriers() == ("feature 3",)


def test_the_bootstrap_interval_covers_the_true_part():
    hits = 0
    for seed in range(60):
        X, group = people(200, strength=0.5, seed=seed)
        part = audit.gap(scores_of(X), group=group, bootstrap=200, permutations=1, seed=seed).parts["zeros"]
        hits += part.low[3] <= -0.5 <= part.high[3]
    assert hits >= 52


def test_carriers_must_hold_under_every_baseline():
    X, group = people(strength=3.0)
    other = X.copy()
    other[:, 3], other[:, 0] = X[:, 0], X[:, 3]  # the same outputs, another story
    found = audit.gap({"one": scores_of(X), "two": scores_of(other)}, group=group, **SMALL)
    assert found.carriers() == ()
    assert found.carriers(baseline="one") == ("feature 3",)
    assert found.carriers(baseline="two") == ("feature 0",)


# ---- equal treatment


def test_equal_outputs_for_different_reasons_are_told_apart_and_equal_reasons_are_not():
    rng = np.random.default_rng(0)
    group = np.arange(600) % 2
    first, second = rng.normal(size=(2, 600))
    values = np.where(group[:, None] == 0, np.column_stack([first + 1, second]), np.column_stack([first, second + 1]))
    unequal = audit.equal_treatment(scores_of(values), group, permutations=200)
    assert unequal.auc > 0.75
    assert unequal.p < 0.01
    assert unequal.by_output[1] > 0.05  # the outputs alone say nothing
    equal = audit.equal_treatment(scores_of(np.column_stack([first, second])), group, permutations=200)
    assert 0.4 < equal.auc < 0.6
    assert equal.p > 0.05


def test_p_values_of_equal_treatment_are_uniform_when_there_is_nothing():
    found = []
    for seed in range(60):
        X, group = people(80, seed=seed)
        found.append(audit.equal_treatment(scores_of(X), group, permutations=99, seed=seed).p)
    assert 0.3 < np.mean(found) < 0.7
    assert np.mean(np.array(found) <= 0.1) < 0.25


def test_the_inputs_beside_it_say_how_far_groups_differ_at_all():
    X, group = people(strength=3.0)
    blind = LinearRegression().fit(X, X[:, 0])
    blind.coef_[:] = [1.0, 0, 0, 0, 0]
    e = hw.explain(blind, X, baseline=0.0, progress=False)
    found = audit.equal_treatment(e, group, permutations=100)
    assert found.p > 0.05
    assert found.by_inputs[0] > 0.9
    assert "inputs" in repr(found)


# ---- subgroups


def test_the_subgroup_that_is_treated_otherwise_is_found_and_noise_is_not():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 800))
    values = rng.normal(size=(800, 4))
    nothing = audit.disparity(scores_of(values), {"a": a, "b": b}, permutations=200)
    assert nothing.rows[0][4] > 0.05
    values[(a == 1) & (b == 0), 2] += 1.0
    found = audit.disparity(scores_of(values), {"a": a, "b": b}, permutations=200)
    subgroup, name, size, rows, p = found.rows[0]
    assert (subgroup, name) == ("a 1 and b 0", "feature 2")
    assert rows == ((a == 1) & (b == 0)).sum()
    np.testing.assert_allclose(size, values[(a == 1) & (b == 0), 2].mean() - values[:, 2].mean())
    assert p < 0.02


# ---- what it shows, and what it refuses


def test_networks_are_compared_as_well_and_the_page_is_written(tmp_path):
    X, group = people(60, strength=1.0)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.GELU(), torch.nn.Linear(8, 1)).double()
    found = audit.gap(network, torch.as_tensor(X), np.where(group, "b", "a"), baseline={"zeros": 0.0, "ones": 1.0}, **SMALL)
    outputs = network(torch.as_tensor(X)).detach().numpy()[:, 0]
    np.testing.assert_allclose(found.gap.mean, outputs[group == 0].mean() - outputs[group == 1].mean(), atol=1e-12)
    assert list(found.parts) == ["zeros", "ones"]
    assert "a minus b" in repr(found)
    assert "sum: the gap" in found.to_html(tmp_path / "g.html").read_text()
    assert len(found.to_frame()) == 10
    assert found.table("ones", k=2).rows[2][0] == "3 others together"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": None}, "no group"),
        ({"group": np.zeros(600)}, "1 groups"),
        ({"group": np.arange(600) % 3}, "3 groups"),
        ({"group": np.zeros(5)}, "one for each row"),
        ({"pair": (0, 7)}, "pair"),
        ({"pair": (1, 1)}, "pair"),
        ({"given": np.ones(600)}, "True or False"),
        ({"given": np.arange(600) == 0}, "at least two"),
        ({"baseline": 0.0}, "one of the two"),
        ({"bootstrap": 0}, "at least one"),
        ({"labels": np.zeros(600, int)}, "scores, and labels"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, words):
    X, group = people()
    with pytest.raises(InputError, match=words):
        audit.gap(scores_of(X), **{"group": group, **change})


def test_errors_are_of_classes_and_of_no_other_target():
    X, group = people()
    model = LogisticRegression().fit(X, group)
    for asked, words in (({"labels": X[:, 0]}, "floats"), ({"labels": group, "target": 1}, "one of the two")):
        with pytest.raises(InputError, match=words):
            audit.gap(model, X, group, **asked)


def test_explanations_of_different_outputs_are_not_laid_side_by_side():
    X, group = people()
    with pytest.raises(InputError, match="other outputs"):
        audit.gap({"one": scores_of(X), "two": scores_of(2 * X)}, group=group)
