"""Feature selection: planted support is found, decoys and noise are not, and nothing is claimed where there is nothing."""

import numpy as np
import pandas
import pytest
import torch
from scipy.sparse import csr_array, csr_matrix
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from headwater import audit
from headwater.audit import selection
from headwater.audit.intervals import corrected, holm
from headwater.errors import InputError, NotFinite

QUIET = {"progress": False}
WITHOUT = {"permutation": selection.by_permutation, "random": selection.by_chance}


def planted(n=300, p=12, seed=0):
    """A linear answer of columns 2, 5 and 7 among p."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, p))
    y = 3 * X[:, 2] - 2 * X[:, 5] + 1.5 * X[:, 7] + 0.3 * rng.normal(size=n)
    return X, y


def line(X, y, seed):
    return LinearRegression().fit(X, y)


def logistic(X, y, seed):
    return LogisticRegression().fit(X, y)


def test_the_planted_columns_are_kept_by_every_fold_and_lose_nothing():
    X, y = planted()
    found = audit.select(line, X, y, against=WITHOUT, sizes=[1, 3, 6], **QUIET)
    assert set(found.top(3)) == {"feature 2", "feature 5", "feature 7"}
    assert all(set(order[:3]) == {2, 5, 7} for order in found.orders["attribution"])
    assert found.overlap["attribution"][1] == 1.0
    assert found.at(3).mean == pytest.approx(found.at(12).mean, abs=0.01)
    assert found.advantage["random"].low > 0


def test_the_numbers_are_those_of_a_plain_loop():
    X, y = planted(120)
    cuts = [(np.arange(60), np.arange(60, 120)), (np.arange(60, 120), np.arange(60))]
    found = audit.select(line, X, y, against={}, sizes=[2], folds=cuts, held=0.5, **QUIET)
    for fold, (train, test) in enumerate(cuts):
        order = found.orders["attribution"][fold]
        kept = sorted(order[:2])
        model = LinearRegression().fit(X[np.ix_(train, kept)], y[train])
        np.testing.assert_allclose(found.values["attribution"][fold, 0], model.score(X[np.ix_(test, kept)], y[test]), rtol=1e-10)
    ranked = LinearRegression().fit(X[:60], y[:60]).coef_
    assert set(found.orders["attribution"][0][:3]) == set(np.argsort(-np.abs(ranked))[:3])


def test_labels_without_a_pattern_give_no_advantage():
    X = np.random.default_rng(0).normal(size=(200, 10))
    y = np.random.default_rng(1).integers(0, 2, 200)
    found = audit.select(logistic, X, y, against=WITHOUT, seeds=2, **QUIET)
    assert all(0.4 < line.mean < 0.6 for line in found.lines["attribution"])
    assert found.advantage["random"].low < 0 < found.advantage["random"].high


def test_the_ranking_never_sees_test_rows():
    X, y = planted(100)
    seen = []

    def watched(model, rows):
        seen.append(rows)
        return np.abs(rows)

    cuts = [(np.arange(80), np.arange(80, 100))]
    audit.select(line, X, y, explain=watched, against={"other": lambda fold: seen.append(fold.fitted[0]) or np.arange(12.0)}, sizes=[1], folds=cuts, **QUIET)
    known = {row.tobytes() for row in X[:80]}
    assert len(seen) == 2
    assert all(row.tobytes() in known for rows in seen for row in rows)
    assert not {row.tobytes() for row in seen[0]} & {row.tobytes() for row in seen[1]}  # explained rows were held out of the ranking model


def test_every_fold_holds_the_same_share_of_each_class_and_every_row_is_tested_once():
    y = np.array(["rare"] * 10 + ["common"] * 90)[np.random.default_rng(0).permutation(100)]
    cuts = selection._cuts(5, 2, y)
    assert len(cuts) == 10
    for train, test in cuts:
        assert (y[test] == "rare").sum() == 2
        assert not np.intersect1d(train, test).size
        assert len(train) + len(test) == 100
    for one in (cuts[:5], cuts[5:]):
        assert sorted(np.concatenate([test for _, test in one])) == list(range(100))
    assert any((a[1] != b[1]).any() for a, b in zip(cuts[:5], cuts[5:], strict=True))  # another seed cuts otherwise


def test_twins_share_credit_alone_and_are_one_together():
    rng = np.random.default_rng(0)
    X, hidden = rng.normal(size=(600, 8)), rng.normal(size=600)
    X[:, [0, 2]] = hidden[:, None] + 0.3 * rng.normal(size=(600, 2))  # two readings of one cause, of which the answer makes the most
    y = 3 * hidden - 2 * X[:, 5] + 1.2 * X[:, 7]
    apart, together = (audit.select(line, X, y, against={}, sizes=[3], twins=twins, **QUIET) for twins in (None, 0.85))
    assert set(apart.top(3)) == {"feature 0", "feature 2", "feature 5"}
    assert together.groups == (("feature 0", "feature 2"), *((f"feature {j}",) for j in (1, 3, 4, 5, 6, 7)))
    assert together.top(1) == ("feature 0/feature 2",)
    assert set(together.top(3)) == {"feature 0/feature 2", "feature 5", "feature 7"}
    assert together.at(3).mean > apart.at(3).mean + 0.03  # apart, the twins take two of the three places
    assert any("Twins" in note for note in together.notes)


def test_what_twins_push_in_opposite_ways_is_not_importance():
    X, y = planted(80)
    X[:, 1] = -X[:, 0]
    found = audit.select(line, X, y, explain=lambda model, rows: rows, against={}, sizes=[1], twins=0.99, **QUIET)  # φ = x: 0 and 1 cancel
    assert ("feature 0", "feature 1") in found.groups
    assert all(order[-1] == 0 for order in found.orders["attribution"])


def test_twins_need_every_two_of_them_to_be_alike():
    rng = np.random.default_rng(0)
    a = rng.normal(size=2000)
    b = a + 0.6 * rng.normal(size=2000)
    X = np.column_stack([a, b, b + 0.7 * rng.normal(size=2000), rng.normal(size=2000), np.zeros(2000)])  # a like b, b like c, but a not like c
    work = selection._Work(line, X, a, None, {}, None, 0.25, 0.8, None)
    closeness = work.closeness(np.arange(2000))
    assert min(closeness[0, 1], closeness[1, 2]) > 0.8 > closeness[0, 2]
    assert sorted(len(group) for group in work.twins()) == [1, 1, 1, 2]
    np.testing.assert_allclose(closeness[:4, :4], np.abs(spearmanr(X[:, :4]).statistic), atol=1e-12)


def test_permutation_shuffles_the_columns_of_a_group_together():
    rng = np.random.default_rng(0)
    X = rng.integers(0, 2, size=(2000, 3)).astype(float)
    same = X[:, 0] == X[:, 1]

    class Equal:
        def predict(self, rows):
            return rows[:, 0] == rows[:, 1]

    groups = (np.array([0, 1]), np.array([2]))
    fold = selection.Fold(Equal(), (X, same), (X, same), groups, selection.accuracy, 0)
    np.testing.assert_allclose(selection.by_permutation(fold), [0.5, 0.0], atol=0.03)
    twice = np.column_stack([X[:, 0], X[:, 0], X[:, 2]])  # always equal: shuffled together they stay so, one by one they would not
    fold = selection.Fold(Equal(), (twice, np.ones(2000, bool)), (twice, np.ones(2000, bool)), groups, selection.accuracy, 0)
    np.testing.assert_allclose(selection.by_permutation(fold), [0.0, 0.0])


def test_every_default_ranking_finds_a_column_that_tells_the_class():
    X = np.random.default_rng(0).normal(size=(200, 5))
    y = np.where(X[:, 3] > 0, "yes", "no")
    found = audit.select(lambda X, y, seed: DecisionTreeClassifier(max_depth=2, random_state=seed).fit(X, y), X, y, folds=3, **QUIET)
    for ranking in ("attribution", "permutation", "mutual information", "model gain"):
        assert found.top(1, ranking) == ("feature 3",), ranking
    assert found.measure == "accuracy"


def test_a_model_without_gain_is_said_and_left_out():
    X, y = planted(100)
    found = audit.select(line, X, y, sizes=[1], folds=2, **QUIET)
    assert "model gain" not in found.lines
    assert any("model gain" in note for note in found.notes)


def test_frames_stay_frames_and_text_columns_can_be_chosen():
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame({"noise": rng.normal(size=240), "colour": rng.choice(["red", "blue", "green"], 240), "size": rng.integers(0, 9, 240)})
    y = (frame["colour"] == "red").to_numpy().astype(int)

    def fit(X, y, seed):
        from sklearn.compose import make_column_transformer
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import OneHotEncoder

        text = [c for c in X if X[c].dtype.kind not in "if"]
        return make_pipeline(make_column_transformer((OneHotEncoder(sparse_output=False), text), remainder="passthrough"), LogisticRegression()).fit(X, y)

    found = audit.select(fit, frame, y, folds=3, twins=0.9, measure=selection.auc, **QUIET)
    assert found.top(1) == found.top(1, "permutation") == found.top(1, "mutual information") == ("colour",)
    assert found.at(1).mean == 1.0
    assert found.measure == "area under the ROC curve"


@pytest.mark.parametrize("form", [csr_matrix, csr_array, torch.as_tensor, np.ndarray.tolist], ids=["matrix", "sparse array", "tensor", "lists"])
def test_the_form_of_the_table_changes_nothing(form):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 6)) * (rng.random((120, 6)) < 0.5)
    y = (X[:, 2] > 0).astype(int)
    settings = {"folds": 2, "sizes": [1, 2], "twins": 0.9, "against": {"permutation": selection.by_permutation, "information": selection.by_information}}
    plain, other = (audit.select(logistic, rows, y, **settings, **QUIET) for rows in (X, form(X)))
    for name, values in plain.values.items():
        np.testing.assert_allclose(other.values[name], values)
        np.testing.assert_array_equal(other.orders[name], plain.orders[name])


def test_networks_of_several_classes_are_explained_for_the_class_they_predict():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 6)).astype(np.float32)
    y = np.abs(X[:, :3]).argmax(1)

    def fit(X, y, seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(X.shape[1], 16), torch.nn.GELU(), torch.nn.Linear(16, 3))
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for _ in range(40):
            loss = torch.nn.functional.cross_entropy(model(torch.as_tensor(X)), torch.as_tensor(y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model

    found = audit.select(fit, X, y, against={"random": selection.by_chance}, folds=2, sizes=[3], **QUIET)
    assert set(found.top(3)) == {"feature 0", "feature 1", "feature 2"}


def test_the_answer_shows_itself(tmp_path):
    X, y = planted(100)
    found = audit.select(line, X, y, against=WITHOUT, sizes=[2, 4], folds=3, **QUIET)
    assert "R²" in repr(found)
    assert list(found.to_frame().columns) == ["ranking", "columns", "mean", "low", "high", "overlap"]
    assert "Which columns are worth keeping?" in found.to_html(tmp_path / "s.html").read_text()
    assert found.change(12).mean == 0
    np.testing.assert_allclose(found.chance, [2 / 12, 4 / 12, 1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": [0]}, "whole numbers from 1"),
        ({"sizes": [13]}, "whole numbers from 1"),
        ({"folds": 1}, "folds"),
        ({"folds": [(np.arange(5), np.arange(4, 9))]}, "fold whose rows"),
        ({"twins": 0.0}, "rank correlation"),
        ({"held": 1.0}, "held"),
        ({"against": {"attribution": selection.by_chance}}, "another name"),
        ({"feature_names": ["one"]}, "feature_names"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_training(change, words):
    X, y = planted(60)
    with pytest.raises(InputError, match=words):
        audit.select(lambda *_: pytest.fail("trained"), X, y, **{**QUIET, **change})


def test_labels_that_are_missing_or_of_one_class_are_refused():
    X, y = planted(60)
    for bad, words in ((np.r_[y[:-1], np.nan], "missing"), (y[:-1], "one for each row"), (np.zeros(60, int), "one class")):
        with pytest.raises(InputError, match=words):
            audit.select(lambda *_: pytest.fail("trained"), X, bad, **QUIET)


def test_several_rows_of_importance_are_averaged():
    X, y = planted(60)
    cuts = [(np.arange(40), np.arange(40, 60))]
    one, other = np.arange(12.0), -np.arange(12.0)
    rows = {"up": lambda fold: one, "down": lambda fold: other, "both": lambda fold: np.stack([one, other])}
    found = audit.select(line, X, y, against=rows, sizes=[3], folds=cuts, **QUIET).values
    np.testing.assert_allclose(found["both"], (found["up"] + found["down"]) / 2)
    assert abs(found["up"] - found["down"])[0, 0] > 0.01


def test_importance_of_the_wrong_form_is_refused_by_name():
    X, y = planted(60)
    with pytest.raises(InputError, match="mine"):
        audit.select(line, X, y, against={"mine": lambda fold: np.ones(3)}, sizes=[1], folds=2, **QUIET)
    with pytest.raises(NotFinite, match="mine"):
        audit.select(line, X, y, against={"mine": lambda fold: np.full(12, np.nan)}, sizes=[1], folds=2, **QUIET)


def test_the_corrected_interval_covers_and_the_naive_one_does_not():
    """Cross-validated accuracy of a constant classifier on coin flips: the truth is 0.5, the naive interval is as wide for overlapping folds as for none."""
    rng, hits, naive = np.random.default_rng(0), 0, 0
    for _ in range(300):
        y = rng.integers(0, 2, 60)
        scores = []
        for _ in range(20):  # twenty random halves that share most of their rows
            test = rng.permutation(60)[:30]
            scores.append((y[test] == 1).mean())
        found, plain = corrected(np.array(scores), 1.0), np.array(scores)
        hits += found.low <= 0.5 <= found.high
        naive += abs(plain.mean() - 0.5) <= 2.09 * plain.std(ddof=1) / np.sqrt(20)
    assert hits / 300 > 0.9
    assert naive / 300 < 0.6


def test_holm_is_the_step_down_rule():
    p = np.array([0.01, 0.012, 0.04, 0.5])
    found = holm(p)
    np.testing.assert_allclose(found, [0.04, 0.04, 0.08, 0.5])
    assert (holm(np.full(3, 0.9)) == 1).all()
