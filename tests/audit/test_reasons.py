"""Reason codes: planted patterns come first, words are true, and what depends on chance is called doubtful."""

import numpy as np
import pandas
import pytest
from scipy.sparse import csr_array
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

import headwater as hw
from headwater import audit
from headwater.errors import InputError
from headwater.result import FeatureScores

NAMES = ["amount", "hour", "distance", "age", "country_ES", "country_FR", "country_IT"]
PLACES = ["amount", "hour", "distance", "age", "country", "country", "country"]


def payments(n=600, seed=0):
    """``(X, fraud, cause)``: fraud is either a large amount, a large distance or one country; 4 % of the rows; ``cause`` names it."""
    rng = np.random.default_rng(seed)
    country = rng.choice(3, n, p=[0.45, 0.5, 0.05])
    X = np.column_stack([rng.gamma(2, 20, n).round(2), rng.integers(0, 24, n), rng.gamma(2, 3, n), rng.integers(18, 80, n), np.eye(3)[country]])
    cause = np.array([""] * n, dtype=object)
    fraud = np.arange(n) < n // 25
    for i in np.flatnonzero(fraud):
        cause[i] = ("amount", "distance")[i % 2]
        X[i, {"amount": 0, "distance": 2}[cause[i]]] *= 30
    return X, fraud, cause


@pytest.fixture(scope="module")
def planted():
    X, fraud, cause = payments()
    model = GradientBoostingClassifier(n_estimators=40, max_depth=2, random_state=0).fit(X, fraud)
    return model, X, fraud, cause


def test_the_planted_cause_is_the_first_reason(planted):
    model, X, fraud, cause = planted
    found = audit.reasons(model, X[fraud], X[~fraud], k=2, feature_names=NAMES, groups=PLACES)
    assert found.recall(list(cause[fraud]), k=1).mean == 1.0
    assert found.recall(["country"] * int(fraud.sum())).mean < 0.5  # a cause that is not there is seldom named
    assert found.queue() == {(name,): tuple(np.flatnonzero(cause[fraud] == name).tolist()) for name in ("amount", "distance")}


def test_the_values_are_those_of_explain_folded_and_shares_are_of_what_pushed_up(planted):
    model, X, fraud, _ = planted
    found = audit.reasons(model, X[fraud], X[~fraud], k=7, count=8, feature_names=NAMES, groups=PLACES, noise=0)
    rows = np.sort(np.random.default_rng(0).permutation(int((~fraud).sum()))[:8])
    e = hw.explain(model, X[fraud], baseline=hw.baselines.dataset(X[~fraud][rows], 8), progress=False)
    folded = np.column_stack([e.values[:, :4], e.values[:, 4:].sum(1)])
    np.testing.assert_allclose(found.scores.values, folded, atol=1e-12)
    for alert, row in zip(found.alerts, folded, strict=True):
        up = row[row > 0]
        np.testing.assert_allclose([r.push for r in alert], np.sort(up)[::-1])
        np.testing.assert_allclose(sum(r.share for r in alert), 1)
    assert found.stability is None


def test_against_a_threshold_the_reasons_account_for_the_excess_above_it():
    X, fraud, _ = payments()
    model = LogisticRegression(max_iter=1000, C=1e-4).fit(X, fraud)
    threshold = float(np.quantile(model.decision_function(X[~fraud]), 0.99))
    found = audit.reasons(model, X[fraud], X[~fraud], threshold=threshold, count=12, noise=0)
    np.testing.assert_allclose(found.scores.baseline_output, threshold, atol=1e-6)
    np.testing.assert_allclose(found.scores.values.sum(1), model.decision_function(X[fraud]) - threshold, atol=1e-6)
    assert any("threshold" in note for note in found.notes)
    with pytest.raises(InputError, match="a threshold between them"):
        audit.reasons(model, X[fraud], X[~fraud], threshold=1e6)


def test_a_reason_that_raised_nothing_is_none():
    e = FeatureScores(np.array([[-1.0, -2.0], [3.0, 0.0]]), np.zeros(2), np.zeros(2, int), np.array([-3.0, 3.0]), np.zeros(2), "", "f", "zeros")
    found = audit.reasons(e, k=2)
    assert [len(alert) for alert in found.alerts] == [0, 1]
    assert "Nothing raised it" in found.sentences(0)
    assert found.queue() == {(): (0,), ("feature 0",): (1,)}


def test_what_pushed_down_takes_no_place_among_the_reasons():
    e = FeatureScores(np.array([[5.0, -9.0, 1.0]]), np.zeros(1), np.zeros(1, int), np.array([-3.0]), np.zeros(1), "", "f", "zeros")
    told = audit.reasons(e, k=2).alerts[0]
    assert [reason.name for reason in told] == ["feature 0", "feature 2"]
    np.testing.assert_allclose([reason.share for reason in told], [5 / 6, 1 / 6])  # of what pushed up


def test_doubt_is_two_standard_errors_over_the_legitimate_rows():
    e = FeatureScores(
        np.array([[1.0, 1.0]]), np.zeros(1), np.zeros(1, int), np.array([2.0]), np.zeros(1), "", "f", "rows", stderr=np.array([[0.49, 0.51]])
    )  # fmt: skip
    sure, unsure = audit.reasons(e).alerts[0]
    assert not sure.doubtful
    assert unsure.doubtful
    assert "doubtful" in str(unsure)
    assert "doubtful" not in str(sure)


def test_steady_models_keep_their_reasons_and_rough_ones_lose_them():
    rng = np.random.default_rng(0)
    X = 10 + rng.normal(size=(80, 12))
    steady = lambda rows: rows @ np.arange(12.0)  # noqa: E731
    rough = lambda rows: np.sin(rows * 1e3).sum(1)  # noqa: E731
    kept = [audit.reasons(f, X[:6], X[20:], count=2, draws=2, tolerance=1e-1, max_evaluations=500).stability.mean for f in (steady, rough)]
    assert kept[0] > 0.8
    assert kept[1] < 0.6


def test_noise_rounds_whole_numbers_and_leaves_text_and_one_hot_alone():
    frame = pandas.DataFrame({"amount": [100.5, 2000.25], "count": [1, 5000], "where": ["x", "y"], "flag": [0, 1]})
    noisy = audit.reasons.__globals__["_noisy"](frame, 0.01, np.random.default_rng(0))
    assert noisy["amount"].between(frame["amount"] * 0.99, frame["amount"] * 1.01).all()
    assert (noisy["amount"] != frame["amount"]).all()
    assert noisy["count"].dtype == frame["count"].dtype
    assert noisy["count"].iloc[0] == 1
    assert noisy["count"].iloc[1] != 5000
    assert noisy[["where", "flag"]].equals(frame[["where", "flag"]])
    for held in (np.array([[0.5, 1.0]]), csr_array(np.array([[0.5, 1.0]]))):
        moved = audit.reasons.__globals__["_noisy"](held, 0.01, np.random.default_rng(0))
        moved = moved.toarray() if hasattr(moved, "toarray") else moved
        assert 0.495 <= moved[0, 0] <= 0.505
        assert moved[0, 0] != 0.5
        assert moved[0, 1] == 1.0


def test_the_words_are_true(planted):
    model, X, fraud, _ = planted
    alert = np.array([[4321.5, 3, 5.0, 40, 0, 0, 1.0]])
    found = audit.reasons(model, alert, X[~fraud], k=7, feature_names=NAMES, groups=PLACES, noise=0)
    said = {reason.name: reason for reason in found.alerts[0]}
    assert said["amount"].value == "4,322"
    assert said["amount"].typical == f"typically {np.median(X[~fraud, 0]):.3g}, all are lower"
    words = audit.reasons.__globals__["_Words"](alert, X[~fraud], NAMES, {"country": [4, 5, 6], "hour": [1], "pair": [0, 1]})
    shares = X[~fraud][:, 4:].mean(0)
    assert words("country", 0) == ("IT", f"{['ES', 'FR', 'IT'][shares.argmax()]} in {100 * shares.max():.3g} %, this in {100 * shares[2]:.3g} %")
    low = float((X[~fraud, 1] <= 3).mean())
    assert words("hour", 0)[1].endswith(f"this low in {100 * low:.3g} %")
    assert words("pair", 0)[0] == "a group of 2 columns"


def test_frames_with_text_speak_of_categories():
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame({"amount": rng.gamma(2, 20, 300), "where": rng.choice(["home", "home", "abroad"], 300)})
    y = (frame["where"] == "abroad").to_numpy().astype(int)
    from sklearn.compose import make_column_transformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    model = make_pipeline(make_column_transformer((OneHotEncoder(sparse_output=False), ["where"]), remainder="passthrough"), LogisticRegression(max_iter=1000)).fit(
        frame, y
    )
    found = audit.reasons(model, frame[y == 1][:3], frame[y == 0], k=1, count=4, draws=1)
    assert [alert[0].name for alert in found.alerts] == ["where"] * 3
    assert str(found.alerts[0][0]).startswith("where is abroad (legitimate: home in 100 %, this in 0 %)")


def test_the_answer_shows_itself(planted, tmp_path):
    model, X, fraud, _ = planted
    found = audit.reasons(model, X[fraud][:4], X[~fraud], count=4, draws=1, feature_names=NAMES, groups=PLACES, alert_names=["a", "b", "c", "d"])
    assert "4 alerts by first reason" in repr(found)
    assert found.sentences(1).startswith("b: ")
    assert list(found.to_frame().columns) == ["alert", "place", "reason", "push", "share", "stderr", "value", "typical"]
    assert [row[0] for row in found.alert(2).rows] == [reason.name for reason in found.alerts[2]]
    shown = found.table(k=1).rows
    assert len(shown) == 1
    assert shown[0][1] == "4"
    page = found.to_html(tmp_path / "r.html").read_text()
    assert "Alerts by their first reason" in page
    assert 0 <= found.stability.mean <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "at least one"),
        ({"noise": 1.0}, "noise"),
        ({"legitimate": None}, "without legitimate"),
        ({"legitimate": np.zeros((5, 3))}, "the same columns"),
        ({"alert_names": ["one"]}, "alert_names"),
        ({"feature_names": ["one"]}, "feature_names"),
    ],
)
def test_what_does_not_fit_is_refused(planted, change, words):
    model, X, fraud, _ = planted
    with pytest.raises(InputError, match=words):
        audit.reasons(model, **{"alerts": X[fraud], "legitimate": X[~fraud], "count": 2, "draws": 1, **change})


def test_questions_that_have_no_answer_are_refused(planted):
    model, X, fraud, _ = planted
    found = audit.reasons(model, X[fraud], X[~fraud], count=2, noise=0)
    for ask, words in (
        (lambda: found.recall(["amount"]), "causes for"),
        (lambda: found.recall(["nothing"] * int(fraud.sum())), "the cause"),
        (lambda: found.sentences(99), "alert=99"),
        (lambda: found.queue(9), "depth"),
        (lambda: audit.reasons(found.scores, threshold=1.0), "one of the two"),
    ):
        with pytest.raises(InputError, match=words):
            ask()
