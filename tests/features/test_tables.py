"""What estimators are asked about: tables checked before work, classes by their labels, baselines as rows."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from headwater.errors import InputError
from headwater.features import baselines, tables, targets

X = np.arange(12.0).reshape(4, 3)
FRAME = pd.DataFrame(X, columns=["a", "b", "c"])
MIXED = pd.DataFrame({"age": [1.0, 2.0, 3.0], "town": ["x", "y", "x"]})


class Fitted:
    n_features_in_ = 3
    feature_names_in_ = np.array(["a", "b", "c"], dtype=object)


# ---- inputs


@pytest.mark.parametrize("inputs", [X, X.tolist(), FRAME, sparse.csr_matrix(X), torch.tensor(X, requires_grad=True), X.astype(np.float32), FRAME.astype("Int64")])
def test_a_table_is_the_same_numbers_however_it_comes(inputs):
    np.testing.assert_array_equal(tables.table(inputs, Fitted()).values, X)


def test_names_are_those_given_else_those_of_the_frame():
    assert tables.table(FRAME).names == ("a", "b", "c")
    assert tables.table(FRAME, feature_names=["u", "v", "w"]).names == ("u", "v", "w")
    assert tables.table(X).names is None


@pytest.mark.parametrize(
    ("inputs", "options", "says"),
    [
        (X[:, :2], {}, "2 columns"),
        (X[0], {}, r"X\[:1\]"),
        (X[:0], {}, "at least one example"),
        (np.where(X == 4, np.nan, X), {}, "nan in row 1, column 1"),
        (np.where(X == 4, np.inf, X), {"missing": True}, "inf in row 1, column 1"),
        (FRAME[["b", "a", "c"]], {}, "column 0 named 'b'"),
        (MIXED, {}, "not a table of numbers"),
        (sparse.csr_matrix((1 << 15, 1 << 15)), {}, "32,768 by 32,768"),
        (X, {"feature_names": ["a"]}, "1 feature_names for 3 columns"),
    ],
)
def test_a_bad_table_is_refused_by_name(inputs, options, says):
    with pytest.raises(InputError, match=says):
        tables.table(inputs, Fitted(), **options)


def test_a_missing_value_passes_where_it_may():
    assert np.isnan(tables.table(np.where(X == 4, np.nan, X), missing=True).values[1, 1])


def test_a_model_that_knows_names_is_given_them():
    assert list(tables.as_fitted(Fitted(), X).columns) == ["a", "b", "c"]
    assert tables.as_fitted(object(), X) is X


def test_a_class_is_known_through_what_it_inherits():
    class Own(torch.nn.Linear):
        pass

    assert tables.named(Own(1, 1), "torch.nn.Module") and not tables.named(Own(1, 1), "torch.Conv2d", "sklearn.Linear")


# ---- targets


def test_a_class_is_its_label_not_its_place():
    assert tables.class_target([3, 5, 7], 5, 2).columns.tolist() == [1, 1]
    assert tables.class_target(np.array(["b", "c"]), None, 2).columns.tolist() == [1, 1]
    assert tables.class_target([3, 5, 7], [7, 3], 2).columns.tolist() == [2, 0]
    pair = tables.class_target([3, 5, 7], (7, 3), 2)
    assert pair.columns.tolist() == [2, 2] and pair.against.tolist() == [0, 0] and pair.words == "class 7 against class 3"


@pytest.mark.parametrize(
    ("classes", "target", "says"),
    [
        ([3, 5, 7], 1, "one of the classes: 3, 5, 7"),
        (["1", "2"], 1, "one of the classes: '1', '2'"),
        ([3, 5, 7], None, "no target, and 3 classes"),
        ([3, 5, 7], [3, 5, 7], r"shape \(3,\) for 2 examples"),
        ([3, 5, 7], (3, 5, 7), "a against b"),
        ([3, 5, 7], (3, 3), "two classes"),
    ],
)
def test_an_unknown_class_is_refused(classes, target, says):
    with pytest.raises(InputError, match=says):
        tables.class_target(classes, target, 2)


def test_targets_of_networks_mean_labels_of_estimators():
    classes, swapped = np.array(["b", "c", "d"]), np.array(["d", "b"])
    for value, plain in [
        (targets.output("c"), "c"),
        (targets.output(["d", "b"]), ["d", "b"]),
        (targets.margin("d", "b"), ("d", "b")),
        (targets.margin(swapped, "c"), (swapped, "c")),
    ]:
        found, expected = tables.class_target(classes, value, 2), tables.class_target(classes, plain, 2)
        np.testing.assert_array_equal(found.columns, expected.columns)
        np.testing.assert_equal(found.against, expected.against)
        assert found.words == expected.words
    assert tables.class_target([3, 5], targets.output(None), 1).columns.tolist() == [1]
    with pytest.raises(InputError, match="one of the classes: 3, 5, 7"):
        tables.class_target([3, 5, 7], targets.output(1), 2)


@pytest.mark.parametrize(
    ("target", "mend"),
    [
        (targets.probability(3), 'output="probability"'),
        (targets.log_odds(3), r"logit\(model.predict_proba\(X\)"),
        (targets.loss(np.abs, [1, 2]), r"f\(model.predict_proba\(X\)\)"),
        (targets.function(np.abs), r"f\(model.predict_proba\(X\)\)"),
        (np.abs, r"f\(model.predict_proba\(X\)\)"),
        (targets.continuation(" Paris"), r"f\(model.predict_proba\(X\)\)"),
        (targets.output((3, 5)), r"margin\(a, b\)"),
        (targets.margin(5, 5), "against itself"),
    ],
)
def test_other_targets_are_refused_with_what_to_write_instead(target, mend):
    with pytest.raises(InputError, match=mend):
        tables.class_target([3, 5, 7], target, 2)
    if not isinstance(target, targets.output | targets.margin):
        with pytest.raises(InputError, match=r"f\(model.predict\(X\)\)"):
            tables.output_target(8, target, 2)


def test_an_output_is_its_index():
    assert tables.output_target(3, targets.output(-1), 2).columns.tolist() == [2, 2]
    pair = tables.output_target(3, targets.margin([0, 1], 2), 2)
    assert pair.columns.tolist() == [0, 1] and pair.against.tolist() == [2, 2]
    with pytest.raises(InputError, match="two outputs"):
        tables.output_target(3, targets.margin(2, -1), 2)
    assert tables.output_target(1, None, 2).columns.tolist() == [0, 0]
    assert tables.output_target(3, [2, -3], 2).columns.tolist() == [2, 0]
    for count, target in [(2, None), (2, 2), (2, -3), (2, 0.5), (2, [0, 1, 1])]:
        with pytest.raises(InputError):
            tables.output_target(count, target, 2)


# ---- baselines


@pytest.mark.parametrize(
    ("baseline", "point"),
    [
        (None, [[0, 0, 0]]),
        (2.0, [[2, 2, 2]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ({"c": 3, "a": 1, "b": 2}, [[1, 2, 3]]),
        (pd.DataFrame({"c": [3], "a": [1], "b": [2]}), [[1, 2, 3]]),
        (X + 1, X + 1),
        (baselines.mean(X), X.mean(0, keepdims=True)),
        (baselines.mean(FRAME[["c", "b", "a"]]), X.mean(0, keepdims=True)),
    ],
)
def test_a_baseline_of_numbers(baseline, point):
    for missing in (False, True):
        found = tables.references(baseline, X, ("a", "b", "c"), missing=missing)
        np.testing.assert_array_equal(found.points[0], point)
        assert found.weights.tolist() == [1.0]


def test_drawn_rows_are_those_that_the_baseline_draws_by_itself():
    expected = baselines.dataset(X, 3).references((torch.tensor(X),), 5)
    for data in (X, FRAME[["c", "b", "a"]]):
        found = tables.references(baselines.dataset(data, 3), X, ("a", "b", "c"), seed=5)
        np.testing.assert_array_equal(np.stack(found.points), expected.points[0])
    np.testing.assert_allclose(found.mean(4), np.broadcast_to(expected.points[0].mean((0, 1)), (4, 3)))


def test_an_average_draws_what_it_draws_by_itself():
    both = baselines.average(baselines.dataset(X, 2), baselines.dataset(X, 2), weights=[1, 3])
    expected = both.references((torch.tensor(X),), 5)
    found = tables.references(both, X, seed=5)
    np.testing.assert_array_equal(np.concatenate(found.points), expected.points[0][:, 0])
    np.testing.assert_allclose(found.weights, expected.weights)


def test_rows_with_text_are_baselines_of_tables_with_text():
    row = tables.references({"town": "y", "age": 0.0}, MIXED).points[0]
    assert row.values.tolist() == [[0.0, "y"]]
    several = tables.references(baselines.average(MIXED.iloc[[0]], baselines.dataset(MIXED, 3), weights=[1, 3]), MIXED)
    assert [len(point) for point in several.points] == [1, 1, 1, 1] and several.weights.tolist() == [0.25] * 4
    for bad in (None, 0.0, {"age": 1.0}, MIXED.iloc[:2], MIXED[["age"]].iloc[[0]], baselines.dataset(np.zeros((3, 2)), 1)):
        with pytest.raises(InputError):
            tables.references(bad, MIXED)


@pytest.mark.parametrize("bad", [[1, 2], X[:2], {"a": 1}, [1, 2, np.nan], baselines.dataset(X[:, :2], 1), baselines.dataset(X * np.nan, 1), FRAME.iloc[:2]])
def test_a_bad_baseline_is_refused(bad):
    with pytest.raises(InputError):
        tables.references(bad, X, ("a", "b", "c"))


def test_a_missing_value_of_a_baseline_passes_where_it_may():
    assert np.isnan(tables.references([1, 2, np.nan], X, missing=True).points[0][0, 2])


# ---- averages


def test_the_standard_error_is_that_of_the_mean_and_equal_arrays_have_none():
    rows, s = np.random.default_rng(0).normal(size=(5, 3)) + 1e6, tables.Spread()
    for row in rows:
        s.add(0.2, row)
    np.testing.assert_allclose(s.mean(), rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(s.stderr(), rows.std(0, ddof=1) / 5**0.5, rtol=1e-9)
    same = tables.Spread()
    for weight in (0.1, 0.9):
        same.add(weight, rows[0])
    assert (same.stderr() == 0).all() and tables.Spread(1, rows[0]).stderr() is None
