"""CatBoost's models of numeric features as a :class:`Forest`, read from the model's own JSON."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from headwater.errors import InputError
from headwater.features.tables import named
from headwater.features.trees.forest import DEFAULT_FIRST, NAN_IS_MISSING, Forest, Link, joined

LINKS = {
    **dict.fromkeys(("Logloss", "CrossEntropy", "MultiClassOneVsAll", "MultiLogloss", "MultiCrossEntropy"), "sigmoid"),
    "MultiClass": "softmax",
    **dict.fromkeys(("Poisson", "Tweedie"), "exp"),
}


def forest(model: Any) -> Forest | None:
    """The forest of a CatBoost model; None for anything else."""
    if not named(model, "catboost.CatBoost"):
        return None
    if not model.is_fitted():
        raise InputError(f"a {type(model).__name__} that is not fitted", "a fitted model", "call fit(X, y) first")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.json"
        model.save_model(str(path), format="json")
        told = json.loads(path.read_text())
    floats = told["features_info"].get("float_features", [])
    others = sorted(set(told["features_info"]) & {"categorical_features", "text_features", "embedding_features"})
    if any(told["features_info"][kind] for kind in others):
        raise InputError(
            f"a CatBoost model with {', '.join(others).replace('_', ' ')}",
            "numeric features only: statistics of categories are not functions of one column",
            "hw.explain(model.predict, X)",
        )
    scale, bias = told["scale_and_bias"]
    base = np.atleast_1d(np.asarray(bias, float))
    columns = {one["feature_index"]: one for one in floats}
    trees = (
        [_oblivious(t, columns, scale, len(base)) for t in told["oblivious_trees"]] if "oblivious_trees" in told else [_grown(t, columns, scale) for t in told["trees"]]
    )
    loss = _loss(told)
    classes = tuple(model.classes_) if loss in {"Logloss", "CrossEntropy", "MultiClass", "MultiClassOneVsAll"} and len(model.classes_) else None
    link = Link(LINKS.get(loss, "identity"))
    names = model.feature_names_
    p = len(names) if names else max(one["flat_feature_index"] for one in floats) + 1
    return joined(
        trees,
        output=None,
        base=base,
        features=p,
        library="CatBoost",
        single=True,
        missing=True,
        link=link,
        classes=classes,
        margin="margin" if link.kind != "identity" else "prediction",
        names=None if not names or list(names) == [str(k) for k in range(p)] else tuple(names),
    )


def own(model: Any, inputs: Any) -> Any:
    """The margins that CatBoost itself predicts."""
    from catboost import CatBoost

    return CatBoost.predict(model, inputs, prediction_type="RawFormulaVal")  # a ranker's own predict takes no type


def predicted(model: Any, inputs: Any) -> Any:
    """What CatBoost itself predicts through the link."""
    from catboost import CatBoost

    kind = {"sigmoid": "Probability", "softmax": "Probability", "exp": "Exponent"}.get(LINKS.get(str(model.get_all_params().get("loss_function")).split(":")[0], ""))
    return model.predict(inputs) if kind is None else CatBoost.predict(model, inputs, prediction_type=kind)


def _loss(told: dict[str, Any]) -> str:
    parameters = told["model_info"].get("params", {})
    parameters = json.loads(parameters) if isinstance(parameters, str) else parameters
    found = parameters.get("loss_function", {})
    return str(found.get("type", "") if isinstance(found, dict) else found).split(":")[0]


def _split(split: dict[str, Any], columns: dict[int, dict[str, Any]]) -> tuple[int, float, int]:
    """(column, border, kind) of "goes right if value > border"."""
    if split["split_type"] != "FloatFeature":
        raise InputError(f"a CatBoost split of type {split['split_type']}", "splits of numeric features", "hw.explain(model.predict, X)")
    feature = columns[split["float_feature_index"]]
    right = feature["nan_value_treatment"] == "AsTrue"
    return feature["flat_feature_index"], float(np.float32(split["border"])), NAN_IS_MISSING | (0 if right else DEFAULT_FIRST)


def _oblivious(tree: dict[str, Any], columns: dict[int, dict[str, Any]], scale: float, outputs: int) -> dict[str, np.ndarray]:
    """A symmetric tree: bit i of a leaf's index says whether split i goes right. Here the last split is the root."""
    splits = [_split(split, columns) for split in tree.get("splits") or []][::-1]
    depth = len(splits)
    inner = 2**depth - 1
    level = np.floor(np.log2(np.arange(inner) + 1)).astype(int)
    asked = np.array(splits or [(0, 0.0, 0)], float)[level] if inner else np.zeros((0, 3))
    child = np.arange(inner) * 2 + 1
    rest = np.full(2**depth, -1)
    return {
        "left": np.concatenate([child, rest]),
        "right": np.concatenate([child + 1, rest]),
        "feature": np.concatenate([asked[:, 0].astype(int), rest]),
        "threshold": np.concatenate([asked[:, 1], np.zeros(2**depth)]),
        "value": scale * np.concatenate([np.zeros((inner, outputs)), np.asarray(tree["leaf_values"], float).reshape(-1, outputs)]),
        "kinds": np.concatenate([asked[:, 2], np.zeros(2**depth)]).astype(np.uint8),
    }


def _grown(tree: dict[str, Any], columns: dict[int, dict[str, Any]], scale: float) -> dict[str, np.ndarray]:
    """A tree that is not symmetric, from nested nodes."""
    rows: list[tuple[Any, ...]] = []
    values: list[Any] = []

    waiting = [(tree, -1, 0)]
    while waiting:
        node, parent, side = waiting.pop()
        place = len(rows)
        if parent >= 0:
            first, second, *rest = rows[parent]
            rows[parent] = (place, second, *rest) if side == 0 else (first, place, *rest)
        if "split" in node:
            rows.append((0, 0, *_split(node["split"], columns)))
            values.append(None)
            waiting += [(node["right"], place, 1), (node["left"], place, 0)]
        else:
            rows.append((-1, -1, -1, 0.0, 0))
            values.append(np.atleast_1d(node["value"]))
    width = len(next(v for v in values if v is not None))
    left, right, feature, threshold, kinds = (np.array(column) for column in zip(*rows, strict=True))
    value = scale * np.array([np.zeros(width) if v is None else v for v in values], float)
    return {"left": left, "right": right, "feature": feature, "threshold": threshold, "value": value, "kinds": kinds.astype(np.uint8)}
