"""Pipelines: their answers in the original columns, against the pipeline's own function and against their parts."""

import numpy as np
import pandas as pd
import pytest
from sklearn.cluster import FeatureAgglomeration
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import NMF, PCA, FastICA, TruncatedSVD
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfTransformer, TfidfVectorizer
from sklearn.feature_selection import SelectKBest, VarianceThreshold, f_regression
from sklearn.impute import SimpleImputer
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    SplineTransformer,
    StandardScaler,
    TargetEncoder,
)
from sklearn.svm import SVC, SVR

from headwater.errors import InputError
from headwater.features import baselines, blackbox, kernels, pipelines
from headwater.features.pipelines import maps, steps
from headwater.features.question import Question

RNG = np.random.default_rng(0)
X = RNG.gamma(2.0, size=(80, 5)) * [1, 10, 0.1, 3, 1]
Y = np.log(X[:, 0] + 1) * X[:, 1] / 10 - X[:, 2] + 0.1 * RNG.normal(size=80)
B = X[7]
TABLE = pd.DataFrame({"age": RNG.integers(18, 80, 90), "town": RNG.choice(["x", "y", "z"], 90), "job": RNG.choice(list("abcdef"), 90), "pay": RNG.normal(size=90)})
TABLE.loc[[3, 4], "pay"] = np.nan
LABEL = (TABLE.age > 40) ^ (TABLE.town == "y")
TEXTS = ["good film very good", "bad film", "awful plot bad bad", "nice good plot", "fine", "terrible film"]
LIKED = [1, 0, 0, 1, 1, 0]


def ask(model, inputs=X, **options):
    return pipelines.explain(Question(model, inputs, **options))


def by_values(function, inputs, **options):
    return blackbox.explain(Question(function, inputs, progress=False, **options))


def sums_up(e, tolerance=1e-12):
    np.testing.assert_allclose(e.residual, e.values.sum(1) - (e.output - e.baseline_output), atol=1e-15)
    return np.abs(e.residual).max() <= tolerance * max(1.0, np.abs(e.output).max())


# ---- against the pipeline as a function


PERCEPTRON = MLPRegressor(hidden_layer_sizes=(5,), activation="tanh", solver="lbfgs", alpha=0.5, max_iter=50, random_state=0)
STRAIGHT = {
    "scalers": make_pipeline(StandardScaler(), RobustScaler(), MaxAbsScaler(), MinMaxScaler(), SVR()),
    "nested": make_pipeline(make_pipeline(StandardScaler(), "passthrough"), make_pipeline(None, SVR(kernel="poly"))),
    "selectors": make_pipeline(VarianceThreshold(), StandardScaler(), SelectKBest(f_regression, k=3), SVR()),
    "PCA": make_pipeline(StandardScaler(), PCA(3, whiten=True), SVR()),
    "PCA and a selection": make_pipeline(StandardScaler(), PCA(4), StandardScaler(), SelectKBest(f_regression, k=2), SVR()),
    "SVD": make_pipeline(TruncatedSVD(3), Ridge()),
    "ICA": make_pipeline(FastICA(3, random_state=0, whiten="unit-variance"), SVR()),
    "agglomeration": make_pipeline(StandardScaler(), FeatureAgglomeration(2), SVR()),
    "PCA, perceptron": make_pipeline(StandardScaler(), PCA(3), PERCEPTRON),
    "polynomial": make_pipeline(StandardScaler(), PolynomialFeatures(3), StandardScaler(), LinearRegression()),
    "polynomial, kernel": make_pipeline(StandardScaler(), PolynomialFeatures(2), StandardScaler(), SVR()),
    "length": make_pipeline(Normalizer(), SVR()),
    "Fourier features": make_pipeline(StandardScaler(), RBFSampler(gamma=0.2, random_state=0), Ridge()),
    "landmarks": make_pipeline(StandardScaler(), Nystroem(gamma=0.2, n_components=10, random_state=0), Ridge()),
    "polynomial landmarks": make_pipeline(StandardScaler(), Nystroem(kernel="poly", degree=2, coef0=1, n_components=10, random_state=0), Ridge()),
    "union": make_pipeline(FeatureUnion([("a", StandardScaler()), ("b", make_pipeline(StandardScaler(), PCA(2)))]), SVR()),
    "columns": make_pipeline(ColumnTransformer([("a", StandardScaler(), [3, 1]), ("b", PCA(1), [0, 2]), ("c", "drop", [4])]), SVR()),
    "remainder": make_pipeline(ColumnTransformer([("a", StandardScaler(), slice(1, 3))], remainder="passthrough"), SVR()),
}


@pytest.mark.parametrize("name", STRAIGHT)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_where_the_path_stays_straight_the_answer_is_that_of_the_whole_function(name):
    model = STRAIGHT[name].fit(X, Y)
    e = ask(model, X[:4], baseline=B)
    np.testing.assert_allclose(e.output, model.predict(X[:4]).ravel(), atol=1e-12)
    np.testing.assert_allclose(e.values, by_values(model.predict, X[:4], baseline=B).values, atol=2e-6 * max(1, np.abs(e.values).max()))
    assert sums_up(e)


@pytest.mark.parametrize(
    ("step", "columns"),
    [
        (FunctionTransformer(np.log1p), 5),
        (QuantileTransformer(n_quantiles=20), 5),
        (PowerTransformer(), 5),
        (KBinsDiscretizer(4, encode="ordinal", quantile_method="averaged_inverted_cdf"), 5),
        (KBinsDiscretizer(4, quantile_method="averaged_inverted_cdf"), 20),
        (SplineTransformer(n_knots=4, degree=2), 25),
        (SplineTransformer(n_knots=4, include_bias=False), 25),
    ],
    ids=lambda v: str(v)[:40],
)
def test_where_it_bends_every_column_keeps_what_was_made_of_it(step, columns):
    model = make_pipeline(step, SVR()).fit(X, Y)
    e = ask(model, X[:6], baseline=B)
    behind, base = (step.transform(rows) for rows in (X[:6], B[None]))
    behind, base = (rows.toarray() if hasattr(rows, "toarray") else rows for rows in (behind, base))
    last = kernels.explain(Question(model[-1], behind, baseline=base))
    assert last.values.shape[1] == columns
    np.testing.assert_allclose(e.values, last.values.reshape(6, 5, -1).sum(2), atol=1e-14)
    assert sums_up(e) and any("straight in the columns after" in note for note in e.notes)


def test_a_function_is_believed_only_where_it_treats_columns_apart():
    model = make_pipeline(FunctionTransformer(lambda Z: Z - Z.mean(1, keepdims=True)), SVR()).fit(X, Y)
    with pytest.raises(InputError, match="FunctionTransformer, whose columns cannot be traced"):
        ask(model, baseline=B)
    apart = ask(make_pipeline(FunctionTransformer(np.sqrt), SVR()).fit(X, Y), baseline=B)
    assert any("tried, not proved" in note for note in apart.notes)


# ---- tables with text


def table_model(last, pca=False, **one_hot):
    numbers = make_pipeline(SimpleImputer(), StandardScaler(), *([PCA(2)] if pca else []))
    return make_pipeline(ColumnTransformer([("n", numbers, ["age", "pay"]), ("c", OneHotEncoder(**one_hot), ["town", "job"])]), last)


@pytest.mark.parametrize("pca", [False, True])
@pytest.mark.parametrize(
    "one_hot",
    [{}, {"drop": "first"}, {"min_frequency": 16, "handle_unknown": "infrequent_if_exist"}, {"drop": "if_binary", "sparse_output": False}],
)
def test_a_table_of_numbers_and_categories_comes_back_to_its_columns(pca, one_hot):
    model = table_model(LogisticRegression(), pca, **one_hot).fit(TABLE, LABEL)
    rows, base = TABLE.iloc[10:15], TABLE.iloc[[0]]
    e = ask(model, rows, baseline=base)
    assert e.feature_names == ("age", "town", "job", "pay") and e.values.shape == (5, 4)
    np.testing.assert_allclose(e.output, model.decision_function(rows), atol=1e-12)
    assert sums_up(e)
    # additive in the columns: each carries what changes when it alone changes, whatever the path
    for j, name in enumerate(TABLE.columns):
        changed = rows.copy()
        changed[name] = base[name].iloc[0]
        np.testing.assert_allclose(e.values[:, j], model.decision_function(rows) - model.decision_function(changed), atol=1e-12)


def test_missing_values_and_their_indicator_belong_to_their_column():
    model = make_pipeline(SimpleImputer(add_indicator=True), StandardScaler(), SVC()).fit(TABLE[["age", "pay"]], LABEL)
    rows = TABLE[["age", "pay"]].iloc[2:6]
    e = ask(model, rows, baseline={"age": 50, "pay": 0.3})
    assert e.values.shape == (4, 2) and sums_up(e)
    filled = rows.assign(pay=np.where(rows.pay.isna(), model[0].statistics_[1], rows.pay))
    assert not np.allclose(e.values[1], ask(model, filled, baseline={"age": 50, "pay": 0.3}).values[1])


def test_other_encoders_and_remainders():
    parts = [("o", OrdinalEncoder(), ["town"]), ("t", TargetEncoder(cv=5), ["job"])]
    model = make_pipeline(ColumnTransformer(parts, remainder=SimpleImputer()), SVC()).fit(TABLE, LABEL)
    e = ask(model, TABLE.iloc[:9], baseline=baselines.dataset(TABLE, 6))
    assert sums_up(e) and e.stderr.shape == (9, 4) and e.feature_names == ("age", "town", "job", "pay")
    np.testing.assert_allclose(e.baseline_output, e.baseline_output[0])


def test_an_array_of_objects_is_a_table_too():
    values = TABLE[["town", "age"]].to_numpy(dtype=object)
    model = make_pipeline(ColumnTransformer([("c", OneHotEncoder(), [0]), ("n", StandardScaler(), [1])]), SVC()).fit(values, LABEL)
    e = ask(model, values[:5], baseline=pd.DataFrame(values[:1]))
    assert sums_up(e) and (e.values[0] == 0).all()


def test_frames_between_the_steps():
    model = table_model(SVC(), sparse_output=False).set_output(transform="pandas").fit(TABLE, LABEL)
    assert sums_up(ask(model, TABLE.iloc[:5], baseline=TABLE.iloc[[20]]))


def test_a_column_on_its_baseline_carries_nothing():
    model = table_model(SVC()).fit(TABLE, LABEL)
    rows = TABLE.iloc[:6].assign(town="z", pay=1.0)
    e = ask(model, rows, baseline={"age": 30, "town": "z", "job": "a", "pay": 1.0})
    assert (e.values[:, [1, 3]] == 0).all() and (e.values[:, 0] != 0).all()


# ---- trees, searches


def test_a_forest_behind_encoders():
    trees = pytest.importorskip("headwater.features.trees")
    pytest.importorskip("numba")
    from sklearn.ensemble import RandomForestClassifier

    model = table_model(RandomForestClassifier(10, max_depth=4, random_state=0)).fit(TABLE, LABEL)
    assert trees.recognises(Question(model[-1], None))
    e = ask(model, TABLE.iloc[:6], target=True, baseline=TABLE.iloc[[20]])
    np.testing.assert_allclose(e.output, model.predict_proba(TABLE.iloc[:6])[:, 1], atol=1e-12)
    assert sums_up(e, 1e-9) and e.values.shape == (6, 4)
    with pytest.raises(InputError, match="RandomForestClassifier, whose gradient is not known"):
        ask(table_model(RandomForestClassifier(3), pca=True).fit(TABLE, LABEL), TABLE.iloc[:6], target=True, baseline=TABLE.iloc[[20]])


def test_a_search_is_explained_by_what_it_found():
    search = GridSearchCV(make_pipeline(StandardScaler(), SVR()), {"svr__C": [1, 5]}, cv=2).fit(X, Y)
    e = ask(search, baseline=B)
    np.testing.assert_array_equal(e.values, ask(search.best_estimator_, baseline=B).values)
    assert "best_estimator_ of GridSearchCV" in e.notes[0]
    plain = GridSearchCV(SVR(), {"C": [1, 5]}, cv=2).fit(X, Y)
    np.testing.assert_array_equal(ask(plain, baseline=B).values, kernels.explain(Question(plain.best_estimator_, X, baseline=B)).values)


# ---- texts


@pytest.mark.parametrize(
    "model",
    [
        make_pipeline(TfidfVectorizer(), LogisticRegression()),
        make_pipeline(CountVectorizer(), TfidfTransformer(), LogisticRegression()),
        make_pipeline(CountVectorizer(), TfidfTransformer(), SelectKBest(k=6), SVC()),
        make_pipeline(TfidfVectorizer(), TruncatedSVD(3, random_state=0), SVC()),
        make_pipeline(CountVectorizer(), MultinomialNB()),
    ],
    ids=lambda model: "-".join(name for name, _ in model.steps),
)
def test_texts_are_explained_by_their_terms(model):
    model.fit(TEXTS, LIKED)
    e = ask(model, TEXTS[:2])
    assert e.feature_names == ("bad", "film", "good", "very") and e.baseline == "the empty text"
    assert (e.values[0][[0]] == 0).all() and (e.values[1][[2, 3]] == 0).all()  # terms that a text does not have
    assert e.values[0, 2] > 0 > e.values[1, 0] and sums_up(e)
    if hasattr(model, "decision_function"):
        np.testing.assert_allclose(e.output, model.decision_function(TEXTS[:2]), atol=1e-12)
        np.testing.assert_allclose(e.baseline_output, np.repeat(model.decision_function([""]), 2), atol=1e-12)


def test_a_linear_model_of_texts_is_weight_times_frequency():
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, LIKED)
    e = ask(model, TEXTS, baseline="fine film")
    frequency = model[0].transform([*TEXTS, "fine film"]).toarray()
    used = [model[0].vocabulary_[term] for term in e.feature_names]
    np.testing.assert_allclose(e.values, ((frequency[:-1] - frequency[-1]) * model[1].coef_)[:, used], atol=1e-14)
    assert model[1].coef_.shape[1] == model[1].n_features_in_  # the model itself was left alone


def test_a_column_of_texts_is_one_column():
    table = pd.DataFrame({"text": TEXTS, "stars": [4.0, 1, 2, 5, 3, 1]})
    model = make_pipeline(ColumnTransformer([("t", TfidfVectorizer(), "text")], remainder="passthrough"), LogisticRegression()).fit(table, LIKED)
    e = ask(model, table, baseline={"text": "", "stars": 3.0})
    np.testing.assert_allclose(e.values[:, 1], model[-1].coef_[0, -1] * (table.stars - 3), atol=1e-12)
    assert sums_up(e)


# ---- parts


@pytest.mark.parametrize(
    "map_",
    [
        maps.Affine(RNG.normal(size=(3, 4)), RNG.normal(size=3)),
        maps.Monomials(np.array([[1, 0, 0, 0], [2, 1, 0, 0], [0, 0, 3, 1], [0, 0, 0, 0]])),
        maps.UnitLength(),
        maps.Fourier(RNG.normal(size=(4, 6)), RNG.normal(size=6)),
        maps.beside([(None, 2, 2), (maps.UnitLength(), 2, 2)]),
        maps.composed(maps.UnitLength(), maps.Affine(RNG.normal(size=(3, 4)), RNG.normal(size=3))),
    ],
    ids=lambda map_: type(map_).__name__,
)
def test_maps_pull_gradients_back_as_differences_say(map_):
    U = RNG.normal(size=(3, 4))
    V = RNG.normal(size=map_.forward(U).shape)
    numeric = np.stack([((map_.forward(U + e) - map_.forward(U - e)) * V).sum(1) / 2e-5 for e in 1e-5 * np.eye(4)], 1)
    np.testing.assert_allclose(map_.pull(U, V), numeric, atol=1e-8)
    np.testing.assert_array_equal(maps.UnitLength().pull(np.zeros((1, 4)), np.ones((1, 4))), np.zeros((1, 4)))


def test_maps_after_and_beside_one_another_go_where_they_go_one_by_one():
    first, second = (maps.Affine(RNG.normal(size=shape), RNG.normal(size=shape[0])) for shape in ((3, 4), (2, 3)))
    U = RNG.normal(size=(5, 4))
    both = maps.composed(first, second)
    assert isinstance(both, maps.Affine)
    np.testing.assert_allclose(both.forward(U), second.forward(first.forward(U)), atol=1e-14)
    pair = maps.beside([(first, 4, 3), (None, 2, 2)])
    assert isinstance(pair, maps.Affine)
    np.testing.assert_allclose(pair.forward(np.c_[U, U[:, :2]]), np.c_[first.forward(U), U[:, :2]], atol=1e-14)


def test_column_specifications():
    frame = pd.DataFrame(np.zeros((1, 4)), columns=list("abcd"))
    wanted = {
        (1,): "b",
        (2, 0): ["c", "a"],
        (0, 3): [True, False, False, True],
        (1, 2): slice("b", "c"),
        (1, 2, 3): slice(1, None),
        (3,): -1,
        (0, 1): lambda f: ["a", "b"],
        (): [],
    }
    for places, chosen in wanted.items():
        assert tuple(steps.positions(chosen, frame)) == places


# ---- what cannot be answered


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        (make_pipeline(StandardScaler(), KNeighborsClassifier()), {}, r"KNeighborsClassifier.*\n.*\n.*hw.explain\(pipeline.predict_proba, X, target=1\)"),
        (make_pipeline(NMF(2, random_state=0), SVC()), {}, "NMF, whose columns cannot be traced"),
        (make_pipeline(StandardScaler(), PCA(2), OneHotEncoder(handle_unknown="ignore"), SVC()), {}, "OneHotEncoder, whose columns cannot be traced"),
        (make_pipeline(StandardScaler(), SVC()), {"inputs": X[:, :3]}, "3 columns"),
        (make_pipeline(StandardScaler(), SVC()), {"inputs": np.full((2, 5), np.nan)}, "nan in row 0"),
        (make_pipeline(StandardScaler(), SVC()), {"inputs": ["a text"]}, "texts for a pipeline whose first step is StandardScaler"),
        (make_pipeline(StandardScaler(), SVC()), {"target": 7}, "one of the classes"),
        (make_pipeline(StandardScaler(), SVC()), {"layer": 1}, "layer=1"),
        (make_pipeline(StandardScaler(), SVC()), {"path": blackbox.Sweeps()}, "path=Sweeps"),
        (make_pipeline(StandardScaler(), PCA(2), SVC(kernel=lambda a, b: a @ b.T)), {}, "whose kernel is a function"),
        (Pipeline([("a", StandardScaler()), ("b", PCA(2))]), {}, "without a predictor"),
    ],
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_what_cannot_be_folded_is_refused_by_name(model, options, says):
    model.fit(X, Y > 1)
    with pytest.raises(InputError, match=says):
        ask(model, **{"inputs": X, **options})


def test_a_text_table_needs_a_baseline_and_hashed_terms_have_no_names():
    with pytest.raises(InputError, match="a row to compare with"):
        ask(table_model(SVC()).fit(TABLE, LABEL), TABLE)
    with pytest.raises(InputError, match="keeps no vocabulary"):
        ask(make_pipeline(HashingVectorizer(n_features=16), LogisticRegression()).fit(TEXTS, LIKED), TEXTS)
    with pytest.raises(InputError, match="for texts"):
        ask(make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, LIKED), TEXTS, baseline=0.0)
