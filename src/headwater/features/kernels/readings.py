"""What a fitted estimator computes, read into a few functions: its outputs, their gradients, and their mean gradient where it has a closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from headwater.errors import InputError
from headwater.features.kernels.functions import CHUNK
from headwater.features.tables import class_target, output_target

Array = np.ndarray
Aim = Callable[[Any, int], tuple[Array, str]]
"""(target, n) -> the weights (n, m) of the outputs whose sum is explained, and what that is in words."""


@dataclass(frozen=True)
class Reading:
    """An estimator of m outputs.

    Args:
        outputs: (n, p) -> (n, m), by the library itself where it shows them.
        pull: points (n, p) and weights W (n, m) -> ``Σ_k W_nk ∇output_k(x_n)`` (n, p).
        closed: x, b (both (n, p)) and weights (m,) -> the mean gradient (n, p) of the weighted sum along the straight path; None: by points.
        aim: what a target means.
        method: in words. width: numbers needed for one point, which bounds the batches. linear: all gradients are constant.
        kinks: the outputs are piecewise smooth, in many pieces.
    """

    outputs: Callable[[Array], Array]
    pull: Callable[[Array, Array], Array]
    closed: Callable[[Array, Array, Array], Array | None]
    aim: Aim
    method: str
    width: int = 1
    linear: bool = False
    kinks: bool = False

    @property
    def rows(self) -> int:
        """How many points may be evaluated at once."""
        return max(1, CHUNK // max(1, self.width))


def columns(values: Any) -> Array:
    """(n,) or (n, m) as (n, m) in float64."""
    values = np.asarray(values, dtype=float)
    return values[:, None] if values.ndim == 1 else values


def no_closed_form(x: Array, b: Array, w: Array) -> None:
    """For readings whose mean gradient is integrated by points."""


# ---- targets --------------------------------------------------------------------------------------------------------------------


def of_outputs(count: int) -> Aim:
    """An index, or one for each example."""

    def aim(target: Any, n: int) -> tuple[Array, str]:
        found = output_target(count, target, n)
        rows = np.eye(count)
        return rows[found.columns] - (0 if found.against is None else rows[found.against]), found.words

    return aim


def of_classes(classes: Any, unit: str) -> Aim:
    """For outputs one for each class; or, of two classes, one output, of the second against the first."""

    def aim(target: Any, n: int) -> tuple[Array, str]:
        found = class_target(classes, target, n)
        rows = np.eye(len(classes))
        weights = rows[found.columns] - (0 if found.against is None else rows[found.against])
        if len(classes) == 2:
            weights = np.where(found.columns == 1, 1.0, -1.0)[:, None]
        return weights, f"{found.words} ({unit})"

    return aim


def of_logs(classes: Any) -> Aim:
    """For one logarithm of a joint probability for each class; of two classes their difference, the log-odds, is meant."""

    def aim(target: Any, n: int) -> tuple[Array, str]:
        found = class_target(classes, target, n)
        rows = np.eye(len(classes))
        if len(classes) == 2:
            return rows[found.columns] - rows[1 - found.columns], f"{found.words} (log-odds)"
        unit = "joint log-likelihood" if found.against is None else "log-odds"
        return rows[found.columns] - (0 if found.against is None else rows[found.against]), f"{found.words} ({unit})"

    return aim


def of_pairs(classes: Any, unit: str = "decision value") -> Aim:
    """For one output for each pair of classes i < j, positive for i: the pair that is named, or the sum of a class's pairs."""
    places = [(i, j) for i in range(len(classes)) for j in range(i + 1, len(classes))]
    signs = np.array([[(k == i) - (k == j) for i, j in places] for k in range(len(classes))], dtype=float)

    def aim(target: Any, n: int) -> tuple[Array, str]:
        found = class_target(classes, target, n)
        chosen = signs[found.columns]
        if found.against is None:
            return chosen, f"{found.words} (sum of the {unit}s of its {len(classes) - 1} pairs)"
        return np.where(signs[found.against] != 0, chosen, 0.0), f"{found.words} ({unit} of the pair)"

    return aim


# ---- probabilities --------------------------------------------------------------------------------------------------------------


def probabilities(reading: Reading, model: Any, x: Array) -> Reading:
    """The same estimator's probabilities: the logistic or softmax function of its outputs, which must be what ``predict_proba`` gives.

    For one linear output m the mean gradient is exact: m moves evenly, so ``∫σ'(m) dt w = w (σ(m1) - σ(m0)) / (m1 - m0)``.
    """
    name = type(model).__name__
    if not hasattr(model, "predict_proba"):
        raise InputError(f'output="probability" for {name}, which gives none', "an estimator with predict_proba", "leave output out: its decision value is explained")
    if not np.allclose(_probability(reading.outputs(x)), model.predict_proba(x), rtol=0, atol=1e-7):
        raise InputError(
            f'output="probability" for {name}, whose probabilities are no logistic or softmax function of its outputs',
            "decision values",
            "leave output out, or explain the function: hw.explain(model.predict_proba, X, target=column)",
        )
    classes = model.classes_

    def pull(points: Array, W: Array) -> Array:
        outputs = reading.outputs(points)
        return reading.pull(points, _pulled(_probability(outputs), W, outputs.shape[1]))

    def closed(points: Array, b: Array, w: Array) -> Array | None:
        last, first = reading.outputs(points), reading.outputs(b)
        if not reading.linear or last.shape[1] != 1:
            return None
        rate = _logistic_rate(first[:, 0], last[:, 0]) * (w[1] - w[0])
        return reading.pull(points, rate[:, None])

    def aim(target: Any, n: int) -> tuple[Array, str]:
        found = class_target(classes, target, n)
        rows = np.eye(len(classes))
        return rows[found.columns] - (0 if found.against is None else rows[found.against]), f"{found.words} (probability)"

    method = "exact, along the logistic function" if reading.linear and len(classes) == 2 else "analytic gradient of the probability"
    return Reading(lambda points: _probability(reading.outputs(points)), pull, closed, aim, method, reading.width + len(classes), kinks=reading.kinks)


def _probability(outputs: Array) -> Array:
    from scipy.special import expit, softmax

    if outputs.shape[1] == 1:
        return np.concatenate([expit(-outputs), expit(outputs)], 1)
    return cast(Array, softmax(outputs, axis=1))


def _pulled(P: Array, W: Array, count: int) -> Array:
    """Weights of probabilities as weights of the ``count`` outputs behind them; one output is the second of two, beside a constant 0."""
    inner = P * (W - (P * W).sum(1, keepdims=True))
    return inner[:, 1:] if count == 1 else inner


def _logistic_rate(first: Array, last: Array) -> Array:
    """``(σ(last) - σ(first)) / (last - first)`` without cancellation: near each other ``sinh(h)/h sqrt(σ'(first) σ'(last))``, h half the difference."""
    from scipy.special import expit

    half = (last - first) / 2
    near = np.abs(half) < 0.5
    h = np.where(near, half, 0.0)
    ratio = np.divide(np.sinh(h), h, out=np.ones_like(h), where=h != 0)
    side = np.where((first > 0) & (last > 0), -1.0, 1.0)  # σ(last) - σ(first) = σ(-first) - σ(-last), whichever is far from 1
    far = side * (expit(side * last) - expit(side * first)) / np.where(near, 1.0, 2 * half)
    return cast(Array, np.where(near, ratio * np.sqrt(expit(first) * expit(-first) * expit(last) * expit(-last)), far))
