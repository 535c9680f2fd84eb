"""scikit-learn's trees and ensembles of them as a :class:`Forest`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from headwater.errors import InputError
from headwater.features.tables import named
from headwater.features.trees.forest import CATEGORY, DEFAULT_FIRST, NAN_IS_MISSING, Forest, Link, joined

EULER = 0.5772156649015329


def forest(model: Any) -> Forest | None:
    """The forest of a fitted estimator; None where the class is none of these."""
    for name, read in READERS:
        if named(model, f"sklearn.{name}"):
            _fitted(model)
            return read(model)
    return None


def own(model: Any, inputs: Any) -> Any:
    """The margins that scikit-learn itself predicts; where it shows them through a link only, the link undone."""
    if named(model, "sklearn.IsolationForest"):
        return -np.log2(-model.score_samples(inputs)) * average_path_length(model.max_samples_)
    for name in ("decision_function", "predict_proba"):
        if hasattr(model, name):
            return getattr(model, name)(inputs)
    found = model.predict(inputs)
    return np.log(found) if getattr(model, "loss", None) in {"poisson", "gamma"} else found


def predicted(model: Any, inputs: Any) -> Any:
    """What scikit-learn itself predicts through the link."""
    name = next(name for name in ("score_samples", "predict_proba", "predict") if hasattr(model, name))
    return getattr(model, name)(inputs)


def _fitted(model: Any) -> None:
    if not hasattr(model, "n_features_in_"):
        raise InputError(f"a {type(model).__name__} that is not fitted", "a fitted model", "call fit(X, y) first")


def _tree(tree: Any, values: np.ndarray, columns: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """One ``tree_``, with leaf values (nodes, width). columns: the model's column of each of the tree's."""
    feature = np.maximum(tree.feature, 0)
    missing = getattr(tree, "missing_go_to_left", np.zeros(tree.node_count, np.uint8))
    return {
        "left": tree.children_left,
        "right": tree.children_right,
        "feature": feature if columns is None else np.asarray(columns)[feature],
        "threshold": tree.threshold,
        "value": values,
        "kinds": NAN_IS_MISSING | np.where(missing, DEFAULT_FIRST, 0).astype(np.uint8),
    }


def _facts(model: Any, kind: str) -> dict[str, Any]:
    names = getattr(model, "feature_names_in_", None)
    return {"features": int(model.n_features_in_), "library": f"scikit-learn {kind}", "single": True, "names": None if names is None else tuple(map(str, names))}


def _allows_missing(model: Any) -> bool:
    from sklearn.utils import get_tags

    return bool(get_tags(model).input_tags.allow_nan)


def _leaf_means(tree: Any, classes: bool) -> np.ndarray:
    """(nodes, outputs): class fractions, or the mean of each output."""
    if not classes:
        return np.asarray(tree.value[:, :, 0])
    counts = np.asarray(tree.value[:, 0, :])
    return np.asarray(counts / counts.sum(1, keepdims=True))  # older releases store counts


def _averaged(model: Any) -> Forest:
    """A tree, or the mean of trees: class probabilities are additive already."""
    grown = getattr(model, "estimators_", None)
    trees = [model.tree_] if grown is None else [e.tree_ for e in grown]
    classes = getattr(model, "classes_", None)
    if isinstance(classes, list):
        raise InputError(
            f"a {type(model).__name__} with {len(classes)} class outputs",
            "one class output",
            "explain one of them: hw.explain(lambda X: model.predict_proba(X)[k][:, 1], X)",
        )
    parts = [_tree(t, _leaf_means(t, classes is not None) / len(trees)) for t in trees]
    return joined(
        parts,
        output=None,
        base=np.zeros(parts[0]["value"].shape[1]),
        missing=_allows_missing(model),
        classes=None if classes is None else tuple(classes),
        margin="prediction" if classes is None else "probability",
        **_facts(model, type(model).__name__),
    )


def _boosted(model: Any) -> Forest:
    if not (model.init_ == "zero" or type(model.init_).__name__.startswith("Dummy")):
        raise InputError(
            f"a {type(model).__name__} that starts from a {type(model.init_).__name__}",
            "one that starts from a constant",
            "hw.explain(model.predict, X) explains both together",
        )
    grid = model.estimators_
    parts = [_tree(tree.tree_, model.learning_rate * tree.tree_.value[:, 0, :]) for row in grid for tree in row]
    classes = getattr(model, "classes_", None)
    link = Link() if classes is None else Link("softmax") if grid.shape[1] > 1 else Link("sigmoid", 2.0 if model.loss == "exponential" else 1.0)
    facts = _facts(model, type(model).__name__)
    output = np.tile(np.arange(grid.shape[1]), len(grid))
    bare = joined(parts, output=output, base=np.zeros(grid.shape[1]), **facts)
    base = _probe(model.predict if classes is None else model.decision_function, bare)
    return joined(
        parts, output=output, base=base, link=link, classes=None if classes is None else tuple(classes), margin="prediction" if classes is None else "margin", **facts
    )


def _probe(raw: Callable[[Any], Any], bare: Forest) -> np.ndarray:
    """What the library's own raw output has above the trees: a constant, read off at one point."""
    point = np.zeros((1, bare.features))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the point has no feature names
        known = np.asarray(raw(point), dtype=float).reshape(1, -1)
    return np.asarray((known - bare.raw(point))[0])


def _hist(model: Any) -> Forest:
    categorical = None if model.is_categorical_ is None else np.asarray(model.is_categorical_, bool)
    encodes = getattr(model, "_preprocessor", None) is not None
    p = int(model.n_features_in_)
    # The encoder puts categorical columns first; here every column stays where the user has it.
    columns = np.concatenate([np.flatnonzero(categorical), np.flatnonzero(~categorical)]) if encodes and categorical is not None else np.arange(p)
    sets: list[np.ndarray] = []
    rounds = model._predictors
    parts = [_hist_tree(predictor, columns, sets) for row in rounds for predictor in row]
    classes = getattr(model, "classes_", None)
    width = len(rounds[0])
    link = (
        Link("softmax")
        if classes is not None and width > 1
        else Link("sigmoid")
        if classes is not None
        else Link("exp")
        if model.loss in {"poisson", "gamma"}
        else Link()
    )

    def encode(inputs: Any) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names of columns and unknown categories, which become missing values
            found = np.asarray(model._preprocessor.transform(inputs), dtype=float)
        return found[:, np.argsort(columns)]

    facts = _facts(model, type(model).__name__) | {"single": False}
    return joined(
        parts,
        output=np.tile(np.arange(width), len(rounds)),
        base=np.asarray(model._baseline_prediction, dtype=float).reshape(-1),
        sets=tuple(sets),
        missing=True,
        link=link,
        classes=None if classes is None else tuple(classes),
        margin="prediction" if link.kind == "identity" else "margin",
        encode=encode if encodes else None,
        categorical=categorical,
        **facts,
    )


def _hist_tree(predictor: Any, columns: np.ndarray, sets: list[np.ndarray]) -> dict[str, np.ndarray]:
    nodes = predictor.nodes
    leaf = nodes["is_leaf"].astype(bool)
    asks = nodes["is_categorical"].astype(bool) & ~leaf
    threshold = nodes["num_threshold"].astype(float)
    threshold[asks] = len(sets) + nodes["bitset_idx"][asks]
    sets.extend(np.asarray(row, np.uint32) for row in predictor.raw_left_cat_bitsets)
    return {
        "left": np.where(leaf, -1, nodes["left"].astype(np.int64)),
        "right": np.where(leaf, -1, nodes["right"].astype(np.int64)),
        "feature": columns[np.where(leaf, 0, nodes["feature_idx"])],
        "threshold": threshold,
        "value": nodes["value"].astype(float)[:, None],
        "kinds": (NAN_IS_MISSING | np.where(nodes["missing_go_to_left"], DEFAULT_FIRST, 0) | np.where(asks, CATEGORY, 0)).astype(np.uint8),
    }


def average_path_length(n: np.ndarray | int) -> np.ndarray:
    """Of an unsuccessful search in a binary tree of n points: ``2(ln(n-1) + γ) - 2(n-1)/n`` (Liu, Ting, Zhou 2008, eq. 1).

    >>> average_path_length(np.array([1, 2])).tolist()
    [0.0, 1.0]
    """
    n = np.asarray(n, dtype=float)
    safe = np.maximum(n, 3)
    return np.where(n <= 1, 0.0, np.where(n == 2, 1.0, 2 * (np.log(safe - 1) + EULER) - 2 * (safe - 1) / safe))


def _depths(tree: Any) -> np.ndarray:
    depth = np.zeros(tree.node_count)
    for node in range(tree.node_count):  # parents come before their children
        if tree.children_left[node] >= 0:
            depth[[tree.children_left[node], tree.children_right[node]]] = depth[node] + 1
    return depth


def _isolation(model: Any) -> Forest:
    """The margin is the mean path length (long: ordinary); ``score_samples`` is ``-2^(-length / c)`` of it, the link."""
    count = len(model.estimators_)
    parts = [
        _tree(e.tree_, ((_depths(e.tree_) + average_path_length(e.tree_.n_node_samples)) / count)[:, None], columns)
        for e, columns in zip(model.estimators_, model.estimators_features_, strict=True)
    ]
    return joined(
        parts,
        output=None,
        base=np.zeros(1),
        missing=_allows_missing(model),
        link=Link("isolation", 1 / float(average_path_length(model.max_samples_))),
        margin="mean path length",
        **_facts(model, "IsolationForest"),
    )


def _voted(model: Any) -> Forest:
    """AdaBoost's decision function: each tree's class has a weighted vote, +1 for the class and -1/(K-1) for the others."""
    if any(not hasattr(e, "tree_") for e in model.estimators_):
        raise InputError(f"an AdaBoostClassifier over {type(model.estimators_[0]).__name__}", "one over decision trees", "hw.explain(model.decision_function, X)")
    classes = tuple(model.classes_)
    shares = np.asarray(model.estimator_weights_, float)[: len(model.estimators_)]
    shares = shares / np.asarray(model.estimator_weights_, float).sum()
    parts = [_tree(e.tree_, share * _votes(e, classes)) for e, share in zip(model.estimators_, shares, strict=True)]
    slope = 1.0 if len(classes) == 2 else 1 / (len(classes) - 1)
    link = Link("sigmoid", slope) if len(classes) == 2 else Link("softmax", slope)
    return joined(
        parts, output=None, base=np.zeros(parts[0]["value"].shape[1]), missing=_allows_missing(model), link=link, classes=classes, **_facts(model, "AdaBoostClassifier")
    )


def _votes(estimator: Any, classes: tuple[Any, ...]) -> np.ndarray:
    chosen = np.asarray(estimator.classes_)[estimator.tree_.value[:, 0, :].argmax(1)]
    votes = np.where(chosen[:, None] == np.asarray(classes), 1.0, -1 / (len(classes) - 1))
    return np.asarray((votes[:, 1] - votes[:, 0])[:, None] if len(classes) == 2 else votes)


def _refused(model: Any) -> Forest:
    raise InputError(
        f"a {type(model).__name__}, whose prediction is the median of its trees and not their sum",
        "a sum of trees",
        "hw.explain(model.predict, X) explains it as a function",
    )


READERS: list[tuple[str, Callable[[Any], Forest]]] = [
    *((name, _hist) for name in ("HistGradientBoostingClassifier", "HistGradientBoostingRegressor")),
    *((name, _boosted) for name in ("GradientBoostingClassifier", "GradientBoostingRegressor")),
    ("IsolationForest", _isolation),
    ("AdaBoostClassifier", _voted),
    ("AdaBoostRegressor", _refused),
    *((name, _averaged) for name in ("RandomForestClassifier", "RandomForestRegressor", "ExtraTreesClassifier", "ExtraTreesRegressor")),
    *((name, _averaged) for name in ("DecisionTreeClassifier", "DecisionTreeRegressor")),
]
"""Which class is read how; the first that the model is, or inherits from, counts."""
