"""Series of several sensors: does switching one off do what its attributions said, which readings are used unusually, do explanations flicker?

scores = hw.explain(model, {"accelerometer": a, "gyroscope": g}, target=labels)      # one tensor for each sensor
scores.group("inputs").values                                                        # (n, sensors): what each carried; sums to the change of f
audit.switched_off(scores, model, inputs, labels)                                    # predicted against real
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater import report
from headwater.errors import InputError
from headwater.evaluate.means import Mean, written
from headwater.evaluate.parts import arrays_of
from headwater.evaluate.probes import Points, measured, probe_of
from headwater.result import FeatureScores
from headwater.result.arrays import flattened, leaves
from headwater.result.groups import Membership, memberships


@dataclass(frozen=True, eq=False)
class SwitchedOff:
    """What switching sensors off does, against what was said (see :func:`switched_off`).

    ``predicted``, ``real`` (n, sensors): the sum of a sensor's attributions, and ``f(x) - f(x without it)``. ``correlation``, ``slope``: of real on
    predicted, over examples, for each sensor; ``top_correlation``, ``top_slope``: for each example's own strongest sensor. ``shuffled``: the correlation that
    the strongest sensors reach with the examples shuffled (chance).
    """

    names: tuple[str, ...]
    predicted: np.ndarray
    real: np.ndarray
    correlation: dict[str, Mean]
    slope: dict[str, Mean]
    top_correlation: Mean
    top_slope: Mean
    shuffled: float
    fill: str

    def __repr__(self) -> str:
        each = ", ".join(f"{name} {written(self.correlation[name].mean)} (slope {written(self.slope[name].mean)})" for name in self.names)
        return (
            f"SwitchedOff(each example's strongest sensor: correlation {self.top_correlation}, slope {self.top_slope} (shuffled {written(self.shuffled)}); "
            f"by sensor: {each}; off: {self.fill}; good: both near 1)"
        )

    @property
    def table(self) -> report.Table:
        """One row for each sensor, for a report."""
        rows = [(name, written(float(self.predicted[:, k].mean())), repr(self.correlation[name]), repr(self.slope[name])) for k, name in enumerate(self.names)]
        rows.append(("strongest of each", written(float(_own(self.predicted, self.predicted).mean())), repr(self.top_correlation), repr(self.top_slope)))
        return report.Table(("sensor off", "mean predicted fall", "correlation with the real fall", "slope"), tuple(rows))


def switched_off(
    scores: FeatureScores,
    model: Any,
    inputs: Any,
    target: Any = None,
    *,
    sensors: Any = "inputs",
    axis: int | None = None,
    off: Any = None,
    bootstrap: int = 400,
    seed: int = 0,
) -> SwitchedOff:
    """The dropout test: turn each sensor off, and compare the real fall of f with the sum of the sensor's attributions.

    By completeness all sensors off falls by exactly the sum. One off need not: where f is not additive in its sensors (redundant ones, gates), its
    attributions are an average over the path, and the slope says by how much they miss. Good: correlation and slope near 1; a slope far from 1 with a
    high correlation means that sensors share what they carry.

    Args:
        scores: of these inputs and this target. sensors: "inputs" (one for each input tensor), or groups as ``scores.group`` takes them, with ``axis``.
        off: what a silent sensor reads: None (the baseline of the scores, the mean of several; else zeros), a number, points, or one of ``hw.baselines``.

    Raises InputError for scores of other inputs, or fewer than three examples.
    """
    probe = probe_of(model, inputs, target)
    members = memberships(scores, sensors, axis)
    names = tuple(dict.fromkeys(name for m in members for name in m.names))
    if scores.n < 3 or [tuple(t.shape) for t in probe.x] != [a.shape for a in leaves(scores.values)]:
        given = f"scores of shapes {[a.shape for a in leaves(scores.values)]} for inputs of shapes {[tuple(t.shape) for t in probe.x]}"
        raise InputError(given, "the scores of these inputs, three examples or more", "explain them with the same model and target")
    fill = probe.fills(scores.reference if off is None and scores.reference is not None else off, seed)
    rows = torch.arange(scores.n, device=probe.x[0].device)
    whole = probe.output(probe.x, rows).cpu().numpy()
    if not np.allclose(whole, scores.output, rtol=1e-3, atol=1e-3 * float(np.abs(whole).max())):
        raise InputError("scores whose output is not the model's", "the same model, inputs and target", "explain them again")
    predicted, real = np.zeros((scores.n, len(names))), np.zeros((scores.n, len(names)))
    for k, name in enumerate(names):
        masks = [_mask(m, name, a.shape) for m, a in zip(members, leaves(scores.values), strict=True)]
        predicted[:, k] = sum(flattened(np.where(m, a, 0)).astype(np.float64).sum(1) for m, a in zip(masks, leaves(scores.values), strict=True))
        tensors = tuple(torch.from_numpy(m).to(rows.device) for m in masks)
        real[:, k] = whole - measured(probe, rows, _off(tensors), fill).cpu().numpy()
    pairs = {name: _line(predicted[:, k], real[:, k], bootstrap, seed) for k, name in enumerate(names)}
    top = _line(_own(predicted, predicted), _own(real, predicted), bootstrap, seed)
    rng = np.random.default_rng(seed)
    chance = float(np.mean([abs(_fit(_own(predicted, predicted), rng.permutation(_own(real, predicted)))[0]) for _ in range(100)]))
    return SwitchedOff(names, predicted, real, {n: p[0] for n, p in pairs.items()}, {n: p[1] for n, p in pairs.items()}, *top, chance, fill.name)


def _mask(member: Membership, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """(n, ...) whether each reading belongs to the sensor."""
    code = member.names.index(name) if name in member.names else -2
    return np.array(np.broadcast_to(member.codes == code, shape))


def _off(masks: tuple[Tensor, ...]) -> Any:
    def change(places: Tensor, x: Points, b: Points) -> Points:
        return tuple(torch.where(m[places], off, on) for m, on, off in zip(masks, x, b, strict=True))

    return change


def _own(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """(n,) the value of each example's strongest sensor."""
    return np.asarray(np.take_along_axis(values, np.abs(by).argmax(1)[:, None], 1)[:, 0])


def _fit(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Correlation, and slope of y on x; NaN where one does not vary."""
    dx, dy = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((dx**2).sum() * (dy**2).sum()))
    if spread <= 1e-12 * max(1e-300, float(np.abs(x).max() * np.abs(y).max()) * len(x)):
        return float("nan"), float("nan")
    return float((dx * dy).sum()) / spread, float((dx * dy).sum() / (dx**2).sum())


def _line(x: np.ndarray, y: np.ndarray, bootstrap: int, seed: int) -> tuple[Mean, Mean]:
    """Correlation and slope with the intervals of a bootstrap over examples."""
    rng, value = np.random.default_rng(seed), _fit(x, y)
    draws = np.array([_fit(x[s], y[s]) for s in (rng.integers(len(x), size=len(x)) for _ in range(bootstrap))])
    draws = draws[~np.isnan(draws).any(1)]
    low, high = np.percentile(draws, [2.5, 97.5], axis=0) if len(draws) else np.full((2, 2), np.nan)
    return Mean(value[0], float(low[0]), float(high[0]), len(x)), Mean(value[1], float(low[1]), float(high[1]), len(x))


# ---- what is used unusually -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Unusual:
    """Where examples are used unlike the known ones (see :func:`unusual`).

    ``z`` (n, sensors, bins): distance from the known mean in known standard deviations. ``sensor``, ``time`` (n,): the sensor and the bin where it
    gathers most (the two marginals of ``z²``; time is often right where the sensor is not: Ismail et al. 2020, arXiv 2010.13924). ``strength`` (n,): the largest
    ``|z|``. ``width``: of a bin, in steps.
    """

    z: np.ndarray
    sensor: np.ndarray
    time: np.ndarray
    strength: np.ndarray
    width: int

    def __repr__(self) -> str:
        _, sensors, times = self.z.shape
        return f"Unusual({len(self.z)} examples, {sensors} sensors, {times} times of {self.width} steps; median largest |z| {written(float(np.median(self.strength)))})"


def unusual(scores: Any, known: Any, *, width: int = 10, floor: float = 0.1) -> Unusual:
    """Readings whose attributions are unlike those of known healthy examples of the same class: where a sensor fault reaches the prediction.

    ``z = (Σ_bin φ - mean) / sd`` over the known examples, per sensor and bin of ``width`` steps; sds below ``floor`` times the median one of the sensor's bins
    are raised to it. Give it the inputs themselves in place of the attributions for the plain comparison: a fault that the model does not use shows there only.

    Args:
        scores, known: attributions (n, sensors, steps) and (m, sensors, steps); FeatureScores, arrays or tensors; of several inputs the sensors follow
            each other.

    Raises InputError for other forms, and fewer than five known examples.
    """
    now, then = (_binned(one, width) for one in (scores, known))
    if now.shape[1:] != then.shape[1:] or len(then) < 5:
        raise InputError(
            f"attributions of shapes {now.shape} and {then.shape} (binned)", "the same sensors and times, five known examples or more", "explain more of them"
        )
    if floor <= 0:
        raise InputError(f"floor={floor}", "above 0", "floor=0.1")
    sd = then.std(0, ddof=1)
    least = floor * np.median(sd, axis=1, keepdims=True)
    least = np.where(least > 0, least, floor * max(float(np.median(sd)), 1e-12))
    z = (now - then.mean(0)) / np.maximum(sd, least)
    weight = z**2
    return Unusual(z, weight.sum(2).argmax(1), weight.sum(1).argmax(1), np.abs(z).max((1, 2)), width)


def _binned(scores: Any, width: int) -> np.ndarray:
    arrays = arrays_of(scores)
    if any(a.ndim != 3 for a in arrays) or len({a.shape[2] for a in arrays}) != 1:
        raise InputError(f"attributions of shapes {[a.shape for a in arrays]}", "(n, sensors, steps), all of the same steps", "scores of series")
    whole = np.concatenate(arrays, 1).astype(np.float64)
    if not 1 <= width <= whole.shape[2]:
        raise InputError(f"width={width} of {whole.shape[2]} steps", "at least one step, and no more than there are", "width=10")
    return np.add.reduceat(whole, np.arange(0, whole.shape[2], width), axis=2)


def flicker(scores: FeatureScores) -> np.ndarray:
    """(n - 1,) ``|φ_t - φ_(t-1)| / |x_t - x_(t-1)|`` of frames that follow each other: how much explanations jump for a change of the input.

    Euclidean norms over all inputs; in units of f per unit of the input. NaN where a frame equals the one before. Good: steady; peaks are frames
    at which what the model uses changed, or where its explanation is not stable.

    >>> e = FeatureScores(np.array([[1.0, 0.0], [0.0, 0.0]]), np.zeros(2), np.zeros(2, int), np.ones(2), np.zeros(2), "", "", "", inputs=np.array([[2.0, 0], [0, 0]]))
    >>> flicker(e)
    array([0.5])
    """
    if scores.n < 2 or scores.inputs is None:
        raise InputError(
            f"{scores.n} frames, inputs {'kept' if scores.inputs is not None else 'not kept'}", "two frames or more, with their inputs", "explain inputs, not a layer"
        )
    moved = [np.concatenate([flattened(np.asarray(a)) for a in leaves(held)], 1).astype(np.float64) for held in (scores.values, scores.inputs)]
    change = [np.linalg.norm(np.diff(m, axis=0), axis=1) for m in moved]
    return np.divide(change[0], change[1], out=np.full(scores.n - 1, np.nan), where=change[1] > 0)
