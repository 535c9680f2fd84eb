"""The door of this room: ``explain``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from headwater.errors import InputError
from headwater.features.question import Question
from headwater.result import FeatureScores

FAMILIES = ("text", "pipelines", "trees", "kernels", "network", "blackbox")
"""Modules of this room that know a kind of model, asked in this order. Each has ``recognises(question) -> bool`` and
``explain(question) -> FeatureScores``; adding a kind of model is one module and one word here."""


def explain(
    model: Any,
    inputs: Any,
    target: Any = None,
    *,
    baseline: Any = None,
    path: Any = None,
    rule: Any = None,
    tolerance: float | None = None,
    max_evaluations: int | None = None,
    layer: Any = None,
    neuron: Any = None,
    space: str | None = None,
    extra: Any = None,
    output: str | None = None,
    discrete: Any = None,
    smooth: Any = None,
    tokenizer: Any = None,
    feature_names: Sequence[str] | None = None,
    example_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FeatureScores:
    """Which parts of these inputs carried the prediction?"""
    question = Question(**locals())
    for name in FAMILIES:
        family = import_module(f"headwater.features.{name}")
        if family.recognises(question):
            return family.explain(question)
    raise InputError(
        f"a model of type {type(model).__module__}.{type(model).__name__}",
        "a torch module, a scikit-learn, XGBoost, LightGBM or CatBoost estimator, a transformers model with its tokenizer, or a function",
        "pass a function from an array (n, features) to (n,) or (n, outputs): it is explained by evaluating it along the path",
    )
