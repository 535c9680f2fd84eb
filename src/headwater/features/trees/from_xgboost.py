"""XGBoost's boosters and estimators as a :class:`Forest`, read from the booster's own JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from headwater.errors import InputError
from headwater.features.tables import is_frame, is_sparse, named
from headwater.features.trees.forest import CATEGORY, DEFAULT_FIRST, NAN_IS_MISSING, Forest, Link, bitset, joined

LOG_LINKS = ("count:poisson", "reg:gamma", "reg:tweedie", "survival:cox", "survival:aft")


def forest(model: Any) -> Forest | None:
    """The forest of an XGBModel or a Booster; None for anything else."""
    if named(model, "xgboost.XGBModel"):
        if not hasattr(model, "n_features_in_") or not model.__sklearn_is_fitted__():
            raise InputError(f"a {type(model).__name__} that is not fitted", "a fitted model", "call fit(X, y) first")
        booster, classes = model.get_booster(), getattr(model, "classes_", None)
        best = getattr(booster, "best_iteration", None) if _stopped_early(booster) else None
        return _read(booster, classes, best, getattr(model, "missing", np.nan))
    return _read(model, None, None, np.nan) if named(model, "xgboost.Booster") else None


def own(model: Any, inputs: Any) -> Any:
    """The margins that XGBoost itself predicts."""
    if named(model, "xgboost.XGBModel"):
        return model.predict(inputs, output_margin=True, validate_features=False)
    from xgboost import DMatrix

    return model.predict(DMatrix(inputs, enable_categorical=True), output_margin=True, validate_features=False)


def predicted(model: Any, inputs: Any) -> Any:
    """What XGBoost itself predicts through the link."""
    if named(model, "xgboost.XGBModel"):
        return (model.predict_proba if hasattr(model, "predict_proba") else model.predict)(inputs, validate_features=False)
    from xgboost import DMatrix

    return model.predict(DMatrix(inputs, enable_categorical=True), validate_features=False)


def _stopped_early(booster: Any) -> bool:
    return booster.attr("best_iteration") is not None


def _read(booster: Any, classes: Any, best: int | None, absent: Any) -> Forest:
    learner = json.loads(bytes(booster.save_raw("json")).decode())["learner"]
    trained = learner["gradient_booster"]
    kind, weights = trained["name"], None
    if kind == "dart":
        weights, trained = trained["weight_drop"], trained["gbtree"]
    elif kind != "gbtree":
        raise InputError(f"an XGBoost model with booster={kind!r}", "gbtree or dart", "a linear booster is a linear model: hw.explain(model.predict, X)")
    grown = trained["model"]
    rounds = grown["iteration_indptr"]
    count = rounds[best + 1] if best is not None and best + 1 < len(rounds) else len(grown["trees"])
    objective = learner["objective"]["name"]
    sets: list[np.ndarray] = []
    scales = np.ones(count) if weights is None else np.asarray(weights[:count], float)
    trees = [_tree(tree, scale, sets) for tree, scale in zip(grown["trees"][:count], scales, strict=True)]
    asks = np.array([t == "c" for t in learner["feature_types"]]) if learner["feature_types"] else np.zeros(int(learner["learner_model_param"]["num_feature"]), bool)
    base = _base(learner["learner_model_param"], objective)
    vector = trees[0]["value"].shape[1] > 1
    return joined(
        trees,
        output=None if vector else np.asarray(grown["tree_info"][:count]),
        base=base,
        features=int(learner["learner_model_param"]["num_feature"]),
        library=f"XGBoost {kind}",
        sets=tuple(sets),
        single=True,
        precision=2.0**-24,
        missing=True,
        link=_link(objective),
        classes=_classes(classes, objective, len(base)),
        margin="prediction" if _link(objective).kind == "identity" and objective != "binary:hinge" else "margin",
        names=tuple(map(str, learner["feature_names"])) or None,
        encode=_encoder(grown.get("cats", {}).get("enc", []), learner["feature_names"], absent),
        categorical=asks,
    )


def _tree(tree: dict[str, Any], scale: float, sets: list[np.ndarray]) -> dict[str, np.ndarray]:
    """One tree. ``value < threshold`` becomes ``value <= the number before it``; a category in the set goes right, so children change places."""
    left, right = np.asarray(tree["left_children"], np.int64), np.asarray(tree["right_children"], np.int64)
    leaf, count = left < 0, len(left)
    asks = np.asarray(tree["split_type"], bool) & ~leaf if tree["split_type"] else np.zeros(count, bool)
    conditions = np.asarray(tree["split_conditions"], np.float32)
    threshold = np.nextafter(conditions.astype(float), -np.inf)
    for node, start, size in zip(tree["categories_nodes"], tree["categories_segments"], tree["categories_sizes"], strict=True):
        threshold[node] = len(sets)
        sets.append(bitset(tree["categories"][start : start + size]))
    width = int(tree["tree_param"]["size_leaf_vector"])
    if width > 1:
        leaves = np.asarray(tree["leaf_weights"], np.float32).astype(float).reshape(-1, width)
        value = np.where(leaf[:, None], leaves[np.where(leaf, right, 0)], 0.0)
    else:
        value = conditions.astype(float)[:, None]
    default_left = np.asarray(tree["default_left"], bool)
    return {
        "left": np.where(leaf, -1, np.where(asks, right, left)),
        "right": np.where(leaf, -1, np.where(asks, left, right)),
        "feature": np.asarray(tree["split_indices"], np.int64),
        "threshold": threshold,
        "value": scale * value,
        "kinds": (NAN_IS_MISSING | np.where(default_left ^ asks, DEFAULT_FIRST, 0) | np.where(asks, CATEGORY, 0)).astype(np.uint8),
    }


def _base(parameters: dict[str, str], objective: str) -> np.ndarray:
    """Margins without trees. The file holds them as predictions: probabilities for logistic objectives, means for those with a log link.

    In float32, as XGBoost turns one into the other: near probability 1 the margin moves by more than its round-off otherwise.
    """
    width = max(int(parameters["num_class"]), int(parameters["num_target"]), 1)
    stored = np.array([float(v) for v in parameters["base_score"].strip("[]").split(",")], np.float32)
    if objective in {"binary:logistic", "reg:logistic"}:
        stored = -np.log(1 / stored - 1)
    elif objective in LOG_LINKS:
        stored = np.log(stored)
    return np.broadcast_to(stored, width).astype(float)


def _link(objective: str) -> Link:
    if objective in {"binary:logistic", "reg:logistic", "binary:logitraw"}:
        return Link("sigmoid")
    if objective.startswith("multi:"):
        return Link("softmax")
    return Link("exp") if objective in LOG_LINKS else Link()


def _classes(known: Any, objective: str, outputs: int) -> tuple[Any, ...] | None:
    if known is not None:
        return tuple(known)
    if objective.startswith("multi:"):
        return tuple(range(outputs))
    return (0, 1) if objective.startswith("binary:") else None


def _encoder(known: list[dict[str, Any]], names: list[str], absent: Any) -> Any:
    """From a frame with categories, or an array where ``absent`` stands for missing values, to numbers."""
    levels = {str(name): _levels(one) for name, one in zip(names, known, strict=False) if one.get("values")}

    def encode(inputs: Any) -> Any:
        if is_sparse(inputs):
            inputs = _spread(inputs)
        if is_frame(inputs):
            inputs = inputs.copy()
            for column in inputs.columns:
                if hasattr(inputs[column].dtype, "categories"):
                    inputs[column] = _codes(inputs[column], levels.get(str(column), {}), str(column))
        if isinstance(absent, int | float) and not np.isnan(absent):
            inputs = inputs.mask(inputs == absent) if is_frame(inputs) else np.where(np.asarray(inputs, float) == absent, np.nan, np.asarray(inputs, float))
        return inputs

    return encode


def _spread(inputs: Any) -> np.ndarray:
    """A sparse matrix as XGBoost reads it: what is not stored is missing, not zero."""
    stored = inputs.tocoo()
    found = np.full(stored.shape, np.nan)
    found[stored.row, stored.col] = stored.data
    return found


def _levels(one: dict[str, Any]) -> dict[Any, int]:
    if "offsets" not in one:
        return {value: k for k, value in enumerate(one["values"])}
    text = np.asarray(one["values"], np.int8).tobytes()
    return {text[a:b]: k for k, (a, b) in enumerate(zip(one["offsets"][:-1], one["offsets"][1:], strict=True))}


def _codes(column: Any, levels: dict[Any, int], name: str) -> np.ndarray:
    def code(value: Any) -> float:
        if value != value or value is None:
            return np.nan
        # XGBoost 3.2 cuts the bytes of a text to as many as it has letters.
        keys = [value.encode(), value.encode()[: len(value)]] if isinstance(value, str) else [value]
        for key in keys:
            if key in levels:
                return float(levels[key])
        raise InputError(
            f"the category {value!r} in column {name}", f"one of the {len(levels)} that the model was trained on", "make it missing (NaN) to follow the default way"
        )

    return np.array([code(value) for value in column.to_numpy(dtype=object)])
