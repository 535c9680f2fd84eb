"""LightGBM's boosters and estimators as a :class:`Forest`, read from the model's own text."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from headwater.errors import InputError
from headwater.features.tables import is_frame, named
from headwater.features.trees.forest import CATEGORY, DEFAULT_FIRST, NAN_IS_MISSING, ZERO_IS_MISSING, Forest, Link, joined

MISSING = np.array([0, ZERO_IS_MISSING, NAN_IS_MISSING, NAN_IS_MISSING], np.uint8)
"""LightGBM's missing_type, bits 2 and 3 of decision_type: none, zero, NaN."""


OTHER_LINKS = {"sqrt", "cross_entropy_lambda"}
"""Marks of objectives whose link is none of ours: their margins are explained, their predictions are not."""


def forest(model: Any) -> Forest | None:
    """The forest of an LGBMModel or a Booster; None for anything else."""
    if named(model, "lightgbm.LGBMModel"):
        if not model.__sklearn_is_fitted__():
            raise InputError(f"a {type(model).__name__} that is not fitted", "a fitted model", "call fit(X, y) first")
        return _read(model.booster_, getattr(model, "classes_", None))
    return _read(model, None) if named(model, "lightgbm.Booster") else None


def own(model: Any, inputs: Any) -> Any:
    """The margins that LightGBM itself predicts. Of a random forest its raw score is the sum over the trees, and the margin their mean."""
    booster = model.booster_ if named(model, "lightgbm.LGBMModel") else model
    averaged = "average_output" in booster.model_to_string(num_iteration=1).split("\nTree=")[0].splitlines()
    rounds = booster.best_iteration if booster.best_iteration > 0 else booster.current_iteration()
    return booster.predict(inputs, raw_score=True) / (rounds if averaged else 1)


def predicted(model: Any, inputs: Any) -> Any:
    """What LightGBM itself predicts through the link."""
    return (model.booster_ if named(model, "lightgbm.LGBMModel") else model).predict(inputs)


def _read(booster: Any, classes: Any) -> Forest:
    head, *bodies = booster.model_to_string().split("\n\n\nend of trees")[0].split("\nTree=")
    about = dict(line.split("=", 1) for line in head.splitlines() if "=" in line)
    each = int(about["num_tree_per_iteration"])
    rounds = max(1, len(bodies) // each)
    scale = 1 / rounds if "average_output" in head.splitlines() else 1.0
    sets: list[np.ndarray] = []
    trees = [_tree(dict(line.split("=", 1) for line in body.splitlines() if "=" in line), scale, sets) for body in bodies]
    link, labels = _objective(about.get("objective", ""), each, classes)
    p = int(about["max_feature_idx"]) + 1
    categories = booster.pandas_categorical or []
    asks = np.zeros(p, bool)
    for tree in trees:
        asks[tree["feature"][tree["kinds"] & CATEGORY != 0]] = True
    names = about["feature_names"].split(" ")
    return joined(
        trees,
        output=np.arange(len(trees)) % each,
        base=np.zeros(each),
        features=p,
        library=f"LightGBM {booster.params.get('boosting', booster.params.get('boosting_type', 'gbdt'))}",
        sets=tuple(sets),
        missing=True,
        link=link,
        classes=labels,
        margin="prediction" if link.kind == "identity" and not OTHER_LINKS & set(about.get("objective", "").split()) else "margin",
        names=None if names == [f"Column_{k}" for k in range(p)] else tuple(names),
        encode=lambda inputs: _encoded(inputs, categories),
        categorical=asks,
    )


def _numbers(text: str, kind: Any) -> np.ndarray:
    return np.array(text.split(), dtype=kind)


def _tree(told: dict[str, str], scale: float, sets: list[np.ndarray]) -> dict[str, np.ndarray]:
    """One tree: inner nodes 0, 1, ..., then the leaves, which the text calls -1, -2, ..."""
    if told.get("is_linear", "0") != "0":
        raise InputError("a LightGBM model with linear_tree=True", "constant leaves", "hw.explain(model.predict, X) explains it as a function")
    values = _numbers(told["leaf_value"], float) * scale
    inner = len(values) - 1
    child = {side: _numbers(told[f"{side}_child"], np.int64) if inner else np.zeros(0, np.int64) for side in ("left", "right")}
    decision = _numbers(told["decision_type"], np.int64) if inner else np.zeros(0, np.int64)
    threshold = _numbers(told["threshold"], float) if inner else np.zeros(0)
    asks = decision & 1 == 1
    if asks.any():
        bounds, words = _numbers(told["cat_boundaries"], np.int64), _numbers(told["cat_threshold"], np.uint32)
        threshold[asks] += len(sets)
        sets.extend(words[a:b] for a, b in pairwise(bounds))
    kinds = np.where(asks, CATEGORY, MISSING[(decision >> 2) & 3] | np.where(decision & 2, DEFAULT_FIRST, 0))
    rest = np.full(len(values), -1)
    return {
        **{side: np.concatenate([np.where(found < 0, inner + ~found, found), rest]) for side, found in child.items()},
        "feature": np.concatenate([_numbers(told["split_feature"], np.int64) if inner else np.zeros(0, np.int64), rest]),
        "threshold": np.concatenate([threshold, np.zeros(len(values))]),
        "value": np.concatenate([np.zeros(inner), values])[:, None],
        "kinds": np.concatenate([kinds, np.zeros(len(values))]).astype(np.uint8),
    }


def _objective(text: str, outputs: int, classes: Any) -> tuple[Link, tuple[Any, ...] | None]:
    """The link, and the labels where it is a classification."""
    name, *rest = text.split() or [""]
    settings = dict(part.split(":", 1) for part in rest if ":" in part)
    slope = float(settings.get("sigmoid", 1.0))
    links = {
        "binary": Link("sigmoid", slope),
        "multiclass": Link("softmax"),
        "multiclassova": Link("sigmoid", slope),
        "cross_entropy": Link("sigmoid"),
        **{log: Link("exp") for log in ("poisson", "gamma", "tweedie")},
    }
    link = links.get(name, Link())
    if classes is None and name in {"binary", "multiclass", "multiclassova"}:
        classes = range(max(2, outputs))
    return link, None if classes is None else tuple(classes)


def _encoded(inputs: Any, known: list[list[Any]]) -> Any:
    """Columns of categories as the codes that they had in training; unknown ones become missing, as LightGBM has it."""
    if not is_frame(inputs):
        return inputs
    columns = [c for c in inputs.columns if hasattr(inputs[c].dtype, "categories")]
    if len(columns) != len(known):
        raise InputError(f"{len(columns)} columns of categories", f"{len(known)}, as in training", "give the columns the dtypes that they had in training")
    inputs = inputs.copy()
    for column, levels in zip(columns, known, strict=True):
        codes = np.asarray(inputs[column].cat.set_categories(levels).cat.codes, dtype=float)
        inputs[column] = np.where(codes < 0, np.nan, codes)
    return inputs
