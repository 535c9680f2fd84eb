"""Each library's ensembles: the arrays predict what the library predicts, missing values and categories included; and what explain says and refuses."""

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import headwater as hw
from headwater.features import baselines, trees
from headwater.features.question import Question
from tests.features.trees.reference import along_the_path, interventional

catboost = pytest.importorskip("catboost")
lightgbm = pytest.importorskip("lightgbm")
xgboost = pytest.importorskip("xgboost")
ensemble = pytest.importorskip("sklearn.ensemble")
tree = pytest.importorskip("sklearn.tree")

N = 240
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 4))
GAPS = np.where(RNG.random(X.shape) < 0.15, np.nan, X)
Y = np.nan_to_num(GAPS[:, 0]) + X[:, 1] * X[:, 2] + np.sin(X[:, 3])
TWO = np.where(Y > 0, "yes", "no")
THREE = np.digitize(Y, [-0.5, 0.7]) + 10
FRAME = pd.DataFrame(GAPS, columns=["a", "color", "c", "size"])
FRAME["color"] = pd.Categorical(RNG.choice(["blue", "green", "red", "white"], N))
FRAME["size"] = pd.Categorical(RNG.choice([3, 5, 9], N))
MIXED = Y + FRAME["color"].isin(["red", "blue"]).to_numpy() * 1.0 + FRAME["size"].cat.codes.to_numpy()
FRAME.loc[::9, "color"] = np.nan
ZEROS = np.where(RNG.random(X.shape) < 0.4, 0, X)
BITS = RNG.integers(0, 2, (N, 5)).astype(float)
LOGIC = BITS[:, 0] * BITS[:, 1] + BITS[:, 2] * BITS[:, 3] - BITS[:, 4] + 0.1 * RNG.normal(size=N)
QUICK = {"n_estimators": 6, "random_state": 0}
CAT = {"iterations": 6, "depth": 3, "verbose": 0, "allow_writing_files": False}


def ask(model, inputs, target=None, **settings):
    return trees.explain(Question(model, inputs, target, **settings))


def xgb(kind="Regressor", **settings):
    return getattr(xgboost, f"XGB{kind}")(n_estimators=6, max_depth=3, n_jobs=1, **settings)


def lgb(kind="Regressor", **settings):
    return getattr(lightgbm, f"LGBM{kind}")(
        n_estimators=6, num_leaves=8, min_child_samples=5, verbose=-1, n_jobs=1, **{"max_cat_to_onehot": 1, "min_data_per_group": 5} | settings
    )


predict = lambda m, x: m.predict(x)  # noqa: E731
probability = lambda m, x: m.predict_proba(x)  # noqa: E731
decision = lambda m, x: m.decision_function(x)  # noqa: E731
margin = lambda m, x: m.predict(x, output_margin=True)  # noqa: E731
raw_score = lambda m, x: m.predict(x, raw_score=True)  # noqa: E731
log_odds = lambda m, x: np.log(m.predict_proba(x)[:, 1] / m.predict_proba(x)[:, 0])  # noqa: E731
logarithm = lambda m, x: np.log(m.predict(x))  # noqa: E731
formula = lambda m, x: m.predict(x, prediction_type="RawFormulaVal")  # noqa: E731

MODELS = {
    "tree": (tree.DecisionTreeRegressor(max_depth=5), GAPS, Y, predict),
    "two outputs": (tree.DecisionTreeRegressor(max_depth=5), GAPS, np.c_[Y, -2 * Y], predict),
    "tree of classes": (tree.DecisionTreeClassifier(max_depth=4), GAPS, THREE, probability),
    "forest": (ensemble.RandomForestRegressor(**QUICK), GAPS, Y, predict),
    "forest of classes": (ensemble.RandomForestClassifier(**QUICK), GAPS, TWO, probability),
    "extra trees": (ensemble.ExtraTreesRegressor(**QUICK), X, Y, predict),
    "boosting": (ensemble.GradientBoostingRegressor(**QUICK), X, Y, predict),
    "boosting quantiles": (ensemble.GradientBoostingRegressor(loss="quantile", **QUICK), X, Y, predict),
    "boosting from zero": (ensemble.GradientBoostingRegressor(init="zero", **QUICK), X, Y, predict),
    "boosting two classes": (ensemble.GradientBoostingClassifier(**QUICK), X, TWO, decision),
    "boosting exponential": (ensemble.GradientBoostingClassifier(loss="exponential", **QUICK), X, TWO, decision),
    "boosting three classes": (ensemble.GradientBoostingClassifier(**QUICK), X, THREE, decision),
    "histograms": (ensemble.HistGradientBoostingRegressor(max_iter=6), GAPS, Y, predict),
    "histograms, categories": (ensemble.HistGradientBoostingRegressor(max_iter=6, categorical_features="from_dtype"), FRAME, MIXED, predict),
    "histograms, classes": (ensemble.HistGradientBoostingClassifier(max_iter=6), GAPS, THREE, decision),
    "histograms, counts": (ensemble.HistGradientBoostingRegressor(max_iter=6, loss="poisson"), GAPS, np.abs(Y), logarithm),
    "AdaBoost": (ensemble.AdaBoostClassifier(**QUICK), X, TWO, decision),
    "AdaBoost three": (ensemble.AdaBoostClassifier(tree.DecisionTreeClassifier(max_depth=2), **QUICK), X, THREE, decision),
    "XGBoost": (xgb(), GAPS, Y, predict),
    "XGBoost categories": (xgb(enable_categorical=True, max_cat_to_onehot=1), FRAME, MIXED, predict),
    "XGBoost one-hot": (xgb(enable_categorical=True, max_cat_to_onehot=9), FRAME, MIXED, predict),
    "XGBoost dart": (xgb(booster="dart", rate_drop=0.4), GAPS, Y, predict),
    "XGBoost forest": (xgb(num_parallel_tree=3, subsample=0.6), GAPS, Y, predict),
    "XGBoost two classes": (xgb("Classifier"), GAPS, (TWO == "yes").astype(int), margin),
    "XGBoost three classes": (xgb("Classifier"), GAPS, THREE - 10, margin),
    "XGBoost counts": (xgb(objective="count:poisson"), GAPS, np.abs(Y), margin),
    "XGBoost hazards": (xgb(objective="survival:cox"), GAPS, np.abs(Y), margin),
    "XGBoost rare class": (xgb("Classifier", min_child_weight=0), GAPS, (np.arange(N) > 0).astype(int), margin),
    "XGBoost two outputs": (xgb(), GAPS, np.c_[Y, -Y], predict),
    "XGBoost vector leaves": (xgb(multi_strategy="multi_output_tree"), GAPS, np.c_[Y, -Y], predict),
    "XGBoost missing=-9": (xgb(missing=-9), np.nan_to_num(GAPS, nan=-9), Y, predict),
    "LightGBM": (lgb(), GAPS, Y, predict),
    "LightGBM categories": (lgb(), FRAME, MIXED, predict),
    "LightGBM dart": (lgb(boosting_type="dart"), GAPS, Y, predict),
    "LightGBM forest": (lgb(boosting_type="rf", bagging_freq=1, bagging_fraction=0.5), GAPS, Y, predict),
    "LightGBM forest of classes": (lgb("Classifier", boosting_type="rf", bagging_freq=1, bagging_fraction=0.5), GAPS, TWO, log_odds),
    "LightGBM zero is missing": (lgb(zero_as_missing=True), np.where(np.isnan(GAPS), np.nan, ZEROS), Y, predict),
    "LightGBM two classes": (lgb("Classifier"), GAPS, TWO, raw_score),
    "LightGBM three classes": (lgb("Classifier"), FRAME, THREE, raw_score),
    "CatBoost": (catboost.CatBoostRegressor(**CAT), GAPS, Y, predict),
    "CatBoost counts": (catboost.CatBoostRegressor(loss_function="Poisson", **CAT), GAPS, np.abs(Y), formula),
    "CatBoost lossguide": (catboost.CatBoostRegressor(grow_policy="Lossguide", **CAT), GAPS, Y, predict),
    "CatBoost missing high": (catboost.CatBoostRegressor(nan_mode="Max", **CAT), GAPS, Y, predict),
    "CatBoost two classes": (catboost.CatBoostClassifier(**CAT), GAPS, TWO, formula),
    "CatBoost three classes": (catboost.CatBoostClassifier(**CAT), GAPS, THREE, formula),
}
FLOAT32 = 2e-6  # XGBoost sums leaves in float32


@pytest.fixture(scope="module")
def fitted():
    found = {}

    def fit(name):
        if name not in found:
            model, inputs, y, _ = MODELS[name]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = model.fit(inputs, y)
        return found[name]

    return fit


def rows(inputs, k):
    return inputs.iloc[:k] if isinstance(inputs, pd.DataFrame) else inputs[:k]


@pytest.mark.parametrize("name", MODELS)
def test_arrays_predict_what_the_library_predicts_and_attributions_complete_it(name, fitted):
    model, (_, inputs, _, own) = fitted(name), MODELS[name]
    forest = trees.forest_of(model)
    numbers = np.asarray(inputs if forest.encode is None else forest.encode(inputs), float)
    known = np.asarray(own(model, inputs), float).reshape(N, -1)
    tolerance = FLOAT32 if "XGBoost" in name else 1e-12
    np.testing.assert_allclose(forest.raw(forest.read(numbers)), known, atol=tolerance, rtol=0)

    target = 1 if forest.classes is None and forest.outputs > 1 else None
    baseline = inputs.iloc[[20]] if isinstance(inputs, pd.DataFrame) else inputs[20]
    e = ask(model, rows(inputs, 12), target, baseline=baseline)
    assert np.abs(e.residual).max() < 1e-9
    assert (e.evaluations == 0).all() and e.kind == "table" and np.abs(e.values).max() > 0
    column = known.argmax(1)[:12] if forest.classes and forest.outputs > 2 else np.full(12, 1 if known.shape[1] > 1 else 0)
    np.testing.assert_allclose(e.output, known[np.arange(12), column], atol=tolerance)


def test_survival_times_of_xgboost_have_a_log_link():
    data = xgboost.DMatrix(GAPS)
    for bound in ("label_lower_bound", "label_upper_bound"):
        data.set_float_info(bound, np.abs(Y) + 0.1)
    e = ask(booster := xgboost.train({"objective": "survival:aft", "max_depth": 3, "nthread": 1}, data, 6), GAPS[:9], baseline=GAPS[20], output="prediction")
    np.testing.assert_allclose(e.output, booster.predict(data)[:9], rtol=1e-5)


def wrong_way_round(forest):
    root = forest.roots[0]
    left, right = forest.left.copy(), forest.right.copy()
    left[root], right[root] = right[root], left[root]
    return replace(forest, left=left, right=right)


TAMPERED = {
    "a split the wrong way round": wrong_way_round,
    "one tree's leaves 0.01 % higher": lambda forest: replace(forest, value=forest.value * np.where(np.arange(len(forest.value)) < forest.roots[1], 1.0001, 1)[:, None]),
    "a base": lambda forest: replace(forest, base=forest.base + 1e-4),
    "nan": lambda forest: replace(forest, base=forest.base + np.nan),
}
EACH = {"boosting": "scikit-learn GradientBoostingRegressor", "XGBoost": "XGBoost gbtree", "LightGBM": "LightGBM gbdt", "CatBoost": "CatBoost"}


@pytest.mark.parametrize("tampered", TAMPERED)
@pytest.mark.parametrize("name", EACH)
def test_trees_that_predict_anything_but_what_the_library_predicts_are_refused(name, tampered, fitted, monkeypatch):
    model, (_, inputs, *_) = fitted(name), MODELS[name]
    forest = TAMPERED[tampered](trees.forest_of(model))
    monkeypatch.setattr(trees, "forest_of", lambda model: forest)
    version = {"boosting": pytest.importorskip("sklearn"), "XGBoost": xgboost, "LightGBM": lightgbm, "CatBoost": catboost}[name].__version__
    with pytest.raises(hw.errors.InputError, match=f"{EACH[name]} {version}.*another prediction") as caught:
        ask(model, inputs[:100])
    assert "hw.explain(model.predict, X)" in caught.value.mend


@pytest.mark.parametrize(
    "make",
    [lambda: lgb(reg_sqrt=True), lambda: lgb(objective="cross_entropy_lambda"), lambda: xgb(objective="binary:hinge")],
    ids=["square", "log of one plus exp", "hinge"],
)
def test_links_that_are_not_known_are_left_to_the_library(make):
    model = make().fit(GAPS, (Y > 0) * 1.0)
    assert ask(model, GAPS[:20], baseline=GAPS[30]).target.startswith("margin of")
    with pytest.raises(hw.errors.InputError, match=r"output='prediction'.*own predictions"):
        ask(model, GAPS[:20], baseline=GAPS[30], output="prediction")


@pytest.mark.parametrize("name", [name for name, (model, *_) in MODELS.items() if not hasattr(model, "predict_proba")])
def test_predictions_are_the_library_s_own(name, fitted):
    model, (_, inputs, *_) = fitted(name), MODELS[name]
    target = 1 if trees.forest_of(model).outputs > 1 else None
    baseline = inputs.iloc[[20]] if isinstance(inputs, pd.DataFrame) else inputs[20]
    e = ask(model, rows(inputs, 9), target, baseline=baseline, output="prediction")
    np.testing.assert_allclose(e.output, np.asarray(model.predict(rows(inputs, 9))).reshape(9, -1)[:, target or 0], rtol=1e-5, atol=1e-6)
    assert np.abs(e.residual).max() < 1e-9


def test_outputs_that_the_library_does_not_have_are_refused(fitted, monkeypatch):
    forest = trees.forest_of(fitted("XGBoost"))
    monkeypatch.setattr(trees, "forest_of", lambda model: replace(forest, base=np.zeros(2)))
    with pytest.raises(hw.errors.InputError, match="2 outputs, where the library predicts 1"):
        ask(fitted("XGBoost"), X[:3], 1)


@pytest.mark.parametrize("count", [1, 3, 16, 200])
def test_the_library_is_asked_about_few_rows_from_first_to_last(count, fitted, monkeypatch):
    seen = []
    own = trees.from_sklearn.own
    monkeypatch.setattr(trees.from_sklearn, "own", lambda model, inputs: (seen.append(inputs), own(model, inputs))[1])
    ask(fitted("boosting"), X[:count])
    (asked,) = seen
    assert len(asked) == min(count, 16)
    np.testing.assert_array_equal(asked[[0, -1]], X[[0, count - 1]])


@pytest.mark.parametrize("name", [name for name, (model, *_) in MODELS.items() if hasattr(model, "predict_proba")])
def test_probabilities_are_the_library_s_own(name, fitted):
    model, (_, inputs, *_) = fitted(name), MODELS[name]
    expected = model.predict_proba(inputs)
    baseline = inputs.iloc[[20]] if isinstance(inputs, pd.DataFrame) else inputs[20]
    for k, label in enumerate(model.classes_):
        e = ask(model, rows(inputs, 5), label.item() if hasattr(label, "item") else label, baseline=baseline, output="probability")
        np.testing.assert_allclose(e.output, expected[:5, k], atol=1e-6)
        np.testing.assert_allclose(e.values.sum(1), expected[:5, k] - expected[20, k], atol=1e-6)
        assert np.abs(e.residual).max() < 1e-9


@pytest.mark.parametrize("name", ["boosting", "histograms, categories", "XGBoost categories", "LightGBM three classes", "CatBoost"])
def test_the_path_of_a_library_s_model_taken_literally(name, fitted):
    model, (_, inputs, *_) = fitted(name), MODELS[name]
    forest = trees.forest_of(model)
    numbers = np.asarray(inputs if forest.encode is None else forest.encode(inputs), float)
    target = None if forest.classes is None else 12
    e = ask(model, rows(inputs, 4), target, baseline=inputs.iloc[[20]] if isinstance(inputs, pd.DataFrame) else inputs[20], discrete=False)
    seen = forest.read(numbers)
    expected = [along_the_path(forest, seen[k], seen[20], lambda m: m[-1]) for k in range(4)]
    np.testing.assert_allclose(e.values, expected, atol=1e-12)


@pytest.mark.parametrize(
    "make", [lambda: ensemble.GradientBoostingRegressor(**QUICK), xgb, lgb, lambda: catboost.CatBoostRegressor(**CAT)], ids=["sklearn", "xgboost", "lightgbm", "catboost"]
)
def test_on_binary_data_it_is_the_interventional_shapley_value(make):
    model = make().fit(BITS, LOGIC)
    forest, b = trees.forest_of(model), np.array([1.0, 0, 0, 1, 1])
    e = ask(model, BITS[:20], baseline=b)
    np.testing.assert_allclose(e.values, [interventional(forest, row, b, lambda m: m[0]) for row in BITS[:20]], atol=1e-8)
    moved = make in (xgb, lgb)
    assert any("midpoint" in note for note in e.notes) == moved
    assert (np.abs(e.values - ask(model, BITS[:20], baseline=b, discrete=False).values).max() > 0.05) == moved


def test_isolation_forests_by_path_length_and_by_score():
    model = ensemble.IsolationForest(n_estimators=12, max_features=0.7, max_samples=64, random_state=0).fit(X)
    e = ask(model, X[:9], baseline=X[20], output="prediction")
    np.testing.assert_allclose(e.output, model.score_samples(X[:9]), atol=1e-12)
    np.testing.assert_allclose(e.values.sum(1), model.score_samples(X[:9]) - model.score_samples(X[20:21]), atol=1e-12)
    assert e.target == "score of the output" and ask(model, X[:9], baseline=X[20]).target == "mean path length of the output"
    assert np.abs(ask(model, X[:9], baseline=X[20]).residual).max() < 1e-12


def test_trees_after_early_stopping_are_left_out():
    model = xgboost.XGBRegressor(n_estimators=40, early_stopping_rounds=2, learning_rate=0.9, n_jobs=1).fit(X[:120], Y[:120], eval_set=[(X[120:], Y[120:])], verbose=0)
    forest = trees.forest_of(model)
    assert len(forest.roots) == model.best_iteration + 1 < model.get_booster().num_boosted_rounds()
    np.testing.assert_allclose(forest.raw(forest.read(X))[:, 0], model.predict(X), atol=FLOAT32)


@pytest.mark.parametrize("make", [xgb, lgb, lambda: ensemble.ExtraTreesRegressor(**QUICK)], ids=["xgboost", "lightgbm", "sklearn"])
def test_what_a_sparse_matrix_does_not_store_is_what_the_library_takes_it_for(make):
    sparse = pytest.importorskip("scipy.sparse").csr_matrix(ZEROS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().fit(sparse, Y)
    e = ask(model, sparse[:9], baseline=hw.baselines.dataset(sparse, 3))
    np.testing.assert_allclose(e.output, model.predict(sparse[:9]), atol=FLOAT32)
    assert np.abs(e.residual).max() < 1e-12


def test_boosters_know_their_classes_by_number():
    booster = xgb("Classifier").fit(X, THREE - 10).get_booster()
    assert trees.forest_of(booster).classes == (0, 1, 2)
    assert ask(booster, X[:3], 2, baseline=X[9]).target == "margin of class 2"
    light = lgb("Classifier").fit(X, TWO).booster_
    np.testing.assert_allclose(ask(light, X[:3], 0, baseline=X[9]).values, -ask(light, X[:3], 1, baseline=X[9]).values, atol=1e-15)


def test_random_cuts_between_whole_numbers_are_pointed_out_and_move_on_request():
    model = ensemble.ExtraTreesRegressor(**QUICK).fit(BITS, LOGIC)
    forest, b = trees.forest_of(model), np.array([1.0, 0, 0, 1, 1])
    e = ask(model, BITS[:8], baseline=b)
    assert any("column 0, column 1" in note and "discrete=[...]" in note for note in e.notes)
    moved = ask(model, BITS[:8], baseline=b, discrete=range(5))
    np.testing.assert_allclose(moved.values, [interventional(forest, row, b, lambda m: m[0]) for row in BITS[:8]], atol=1e-8)
    assert np.abs(e.values - moved.values).max() > 0.05
    assert not any("whole numbers here" in note for note in ask(ensemble.ExtraTreesRegressor(**QUICK).fit(X, Y), X[:2]).notes)


# ---- targets, inputs, baselines


def test_targets_are_labels(fitted):
    model = fitted("histograms, classes")
    e = ask(model, GAPS[:20], baseline=GAPS[30])
    each = ask(model, GAPS[:20], model.predict(GAPS[:20]), baseline=GAPS[30])
    assert e.target == "margin of the predicted class of each row"
    np.testing.assert_array_equal(e.values, each.values)
    pair = ask(model, GAPS[:20], (12, 10), baseline=GAPS[30])
    np.testing.assert_allclose(pair.values, ask(model, GAPS[:20], 12, baseline=GAPS[30]).values - ask(model, GAPS[:20], 10, baseline=GAPS[30]).values, atol=1e-13)
    np.testing.assert_array_equal(ask(model, GAPS[:20], hw.targets.margin(12, 10), baseline=GAPS[30]).values, pair.values)
    outputs = [ask(fitted("two outputs"), GAPS[:9], target, baseline=GAPS[30]).values for target in (hw.targets.margin(0, 1), 0, 1)]
    np.testing.assert_allclose(outputs[0], outputs[1] - outputs[2], atol=1e-13)
    two = fitted("boosting two classes")
    assert ask(two, X[:2], baseline=X[9]).target == "margin of class 'yes'"
    with pytest.raises(hw.errors.InputError, match=r"(?s)target=1.*'no', 'yes'"):
        ask(two, X[:2], 1)


def test_frames_keep_their_names_and_any_baseline_is_encoded(fitted):
    model = fitted("LightGBM categories")
    row = ask(model, FRAME[:6], baseline=FRAME.iloc[[20]])
    assert row.feature_names == ("a", "color", "c", "size") and any("halfway" in note for note in row.notes)
    np.testing.assert_array_equal(row.values, ask(model, FRAME[:6], baseline=FRAME.iloc[20].to_dict()).values)
    sample = ask(model, FRAME[:6], baseline=baselines.dataset(FRAME[:40], 40))
    each = np.stack([ask(model, FRAME[:6], baseline=FRAME.iloc[[k]]).values for k in range(40)])
    np.testing.assert_allclose(sample.values, each.mean(0), atol=1e-12)
    np.testing.assert_allclose(sample.stderr, each.std(0, ddof=1) / np.sqrt(40), atol=1e-12)
    linked = fitted("LightGBM three classes")
    assert ask(linked, FRAME[:3], 12, baseline=baselines.dataset(FRAME[:40], 5), output="probability").stderr.shape == (3, 4)


def test_results_say_what_they_are_of(fitted):
    e = ask(fitted("boosting"), X[:3], baseline=X[2], feature_names=list("abcd"), example_names=["u", "v", "w"])
    assert e.method == "exact trees (scikit-learn GradientBoostingRegressor, 6 trees)"
    assert e.feature_names == ("a", "b", "c", "d") and e.example_names == ("u", "v", "w")
    assert "1 of 3 inputs equal their baseline: nothing to attribute" in e.notes
    assert (e.values[2] == 0).all()
    np.testing.assert_array_equal(ask(fitted("boosting"), X[:9], baseline=X[2]).values, ask(fitted("boosting"), X[:9], baseline=X[2], batch_size=2).values)


def test_a_class_that_inherits_from_an_ensemble_is_one_and_others_are_not():
    class Mine(ensemble.GradientBoostingRegressor):
        pass

    assert trees.recognises(Question(Mine(), X)) and trees.recognises(Question(xgb(), X))
    for other in (ensemble.VotingRegressor([("a", tree.DecisionTreeRegressor())]), ensemble.BaggingRegressor(), lambda x: x, np.zeros(3), X):
        assert not trees.recognises(Question(other, X))
    assert np.abs(ask(Mine(**QUICK).fit(X, Y), X[:3]).residual).max() < 1e-12


# ---- refusals


def refusals():
    linear = {"linear_tree": True}
    numbers = {"baseline": X[9]}
    return {
        "not fitted": (lambda: (ensemble.RandomForestRegressor(), X, {}), "not fitted"),
        "not fitted, XGBoost": (lambda: (xgb(), X, {}), "not fitted"),
        "not fitted, LightGBM": (lambda: (lgb(), X, {}), "not fitted"),
        "not fitted, CatBoost": (lambda: (catboost.CatBoostRegressor(), X, {}), "not fitted"),
        "median": (lambda: (ensemble.AdaBoostRegressor(**QUICK).fit(X, Y), X, {}), "median of its trees"),
        "linear leaves": (lambda: (lgb(**linear).fit(X, Y), X, {}), "linear_tree=True"),
        "linear booster": (lambda: (xgboost.XGBRegressor(booster="gblinear", updater="coord_descent").fit(X, Y), X, {}), "booster='gblinear'"),
        "categories of CatBoost": (lambda: (catboost.CatBoostRegressor(**CAT).fit(FRAME[["size"]], Y, cat_features=[0]), FRAME[["size"]], {}), "categorical features"),
        "an estimator to start from": (lambda: (ensemble.GradientBoostingRegressor(init=tree.DecisionTreeRegressor(), **QUICK).fit(X, Y), X, {}), "starts from a"),
        "a random tree embedding": (lambda: (ensemble.StackingRegressor([("a", tree.DecisionTreeRegressor())]), X, {}), "hw.explain"),
        "missing": (lambda: (ensemble.GradientBoostingRegressor(**QUICK).fit(X, Y), GAPS, {}), "the value nan"),
        "columns": (lambda: (xgb().fit(X, Y), X[:, :3], {}), "inputs with 3 columns"),
        "names": (lambda: (xgb().fit(FRAME[["a", "c"]], Y), FRAME[["c", "a"]], {}), "column 0 named 'c'"),
        "no row to compare with": (lambda: (lgb().fit(FRAME, Y), FRAME, {}), "columns of categories"),
        "between categories": (lambda: (lgb().fit(FRAME, Y), FRAME, {"baseline": np.array([0, 0.5, 0, 0])}), "between categories"),
        "unknown category": (
            lambda: (xgb(enable_categorical=True).fit(FRAME, Y), FRAME.assign(size=pd.Categorical([4] * N)), {"baseline": FRAME.iloc[[0]]}),
            "the category 4",
        ),
        "tolerance": (lambda: (xgb().fit(X, Y), X, {"tolerance": 1e-3}), "exact"),
        "path": (lambda: (xgb().fit(X, Y), X, {"path": "straight"}), "path="),
        "output": (lambda: (xgb().fit(X, Y), X, {"output": "logit"}), "output='logit'"),
        "a regression has no probability": (lambda: (xgb().fit(X, Y), X, {"output": "probability"}), "output='probability'"),
        "discrete": (lambda: (xgb().fit(X, Y), X, {"discrete": "yes"}), "discrete='yes'"),
        "batch": (lambda: (xgb().fit(X, Y), X, {"batch_size": 0}), "batch_size=0"),
        "huge": (lambda: (lgb().fit(X, Y), X * 1e305, numbers), "beyond 1e300"),
        "outputs": (lambda: (tree.DecisionTreeRegressor().fit(X, np.c_[Y, Y]), X, numbers), "2 outputs"),
        "several kinds of classes": (lambda: (tree.DecisionTreeClassifier().fit(X, np.c_[Y > 0, Y > 1]), X, {}), "2 class outputs"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_be_explained_is_refused_with_a_way_out(name):
    make, said = refusals()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, inputs, settings = make()
    with pytest.raises(hw.errors.InputError, match=said) as caught:
        ask(model, inputs, **settings)
    assert caught.value.mend
