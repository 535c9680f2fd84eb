"""Do the scores predict how the output changes as parts change together? Infidelity and sensitivity-n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from headwater import report
from headwater.errors import InputError
from headwater.evaluate.means import Mean, mean_of, written
from headwater.evaluate.probes import Points, measured, once
from headwater.evaluate.subject import Subject, subject_of
from headwater.result.frames import pandas_library

if TYPE_CHECKING:
    import pandas


class Trials(NamedTuple):
    """Perturbations: their ``weights`` (n, draws, parts), the ``slopes`` (n, parts) that they are multiplied with, and the real changes (n, draws)."""

    weights: np.ndarray
    slopes: np.ndarray
    real: np.ndarray

    def predicted(self, slopes: np.ndarray | None = None) -> np.ndarray:
        """``Iᵀφ``, (n, draws)."""
        found: np.ndarray = (self.weights @ (self.slopes if slopes is None else slopes)[:, :, None])[:, :, 0]
        return found


@runtime_checkable
class Perturbation(Protocol):
    """``trials(subject, draws, seed)``: what is done to the inputs, and what comes of it: ``d = f(x) - f(x - I)``."""

    def trials(self, subject: Subject, draws: int, seed: int) -> Trials: ...


@dataclass(frozen=True)
class masks:  # reads as a function where it is passed, and is a value
    """``I = m ⊙ (x - b)``: each part is replaced with the fill with probability ``share``. It matches scores that are contributions
    (Integrated Gradients, gradient x input, Shapley values): ``a = Σ m_j φ_j``."""

    share: float = 0.5

    def trials(self, subject: Subject, draws: int, seed: int) -> Trials:
        """Draws in which no part is replaced count as they come: both sides are 0 there."""
        if not 0 < self.share <= 1:
            raise InputError(f"share={self.share}", "above 0 and up to 1", "masks(0.5)")
        removed = np.random.default_rng(seed).random((subject.n, draws, subject.parts.count)) < self.share
        return _without(subject, removed)


@dataclass(frozen=True)
class gaussian:
    """``I ~ N(0, sigma²)`` on every number of the input: it judges slopes. ``a = Σ I_j s_j``.

    An array of scores is taken as slopes (gradients, in units of f per unit of input). FeatureScores are contributions: their slopes are
    ``φ_j / (x_j - b_j)``, and 0 where ``x_j = b_j``. Floating inputs whose every number is a part, no groups.
    """

    sigma: float = 0.1

    def trials(self, subject: Subject, draws: int, seed: int) -> Trials:
        """Noise on every number."""
        x = subject.probe.x
        if not self.sigma > 0:
            raise InputError(f"sigma={self.sigma}", "above 0", "gaussian(0.1)")
        if not all(t.is_floating_point() for t in x) or any(getattr(subject.probe, "books", ())):
            raise InputError("Gaussian noise on ids or texts", "numbers", "perturbation=masks(0.5)")
        flat = torch.cat([t.flatten(1).double() for t in x], 1)
        if not subject.parts.each:
            raise InputError("Gaussian noise for groups of numbers", "a score for every number of the input", "leave parts= out, or perturbation=masks(0.5)")
        slopes = self._slopes(subject, flat).cpu().numpy()
        noise = np.random.default_rng(seed).normal(0, self.sigma, (subject.n, draws, flat.shape[1]))
        return Trials(noise, slopes, subject.output[:, None] - self._moved(subject, noise))

    def _slopes(self, subject: Subject, flat: Tensor) -> Tensor:
        scores = torch.from_numpy(subject.parts.scores).to(flat.device)
        if not subject.contributions:
            return scores
        if len(subject.fill) != 1:
            raise InputError(f"a fill of {len(subject.fill)} points", "one, so that contributions can be turned into slopes", "fill=0.0, or hw.baselines.mean(train)")
        step = flat - torch.cat([p[0].flatten(1).double() for p in subject.fill.points], 1)
        return torch.where(step == 0, 0.0, scores / torch.where(step == 0, 1.0, step))

    def _moved(self, subject: Subject, noise: np.ndarray) -> np.ndarray:
        n, draws, count = noise.shape
        device, sizes = subject.probe.x[0].device, [int(np.prod(shape)) for shape in subject.parts.shapes]
        moves, rows = torch.from_numpy(noise.reshape(n * draws, count)).to(device), torch.arange(n, device=device).repeat_interleave(draws)

        def change(places: Tensor, x: Points, b: Points) -> Points:
            return tuple(t - step.reshape(t.shape).to(t) for t, step in zip(x, moves[places].split(sizes, 1), strict=True))

        return measured(subject.probe, rows, change, once(subject.fill), subject.batch_size).cpu().numpy().reshape(n, draws)


@dataclass(frozen=True, eq=False)
class Infidelity:
    """Squared error of predicted changes (see :func:`infidelity`).

    ``values`` (n,), their ``mean``. ``relative`` (n,): over the mean square of the real change: 0 is perfect, 1 is what predicting no change
    gets; NaN where f does not change. ``beta`` (n,): the scale that the scores were multiplied with, None where they were taken as they are.
    ``shuffled``: relative infidelity of the same scores in random order, which is well below 1 for masks (their sum is right); ``advantage``:
    the paired difference, above 0 where the order of the scores means something.
    """

    values: np.ndarray
    mean: Mean
    relative: np.ndarray
    relative_mean: Mean
    beta: np.ndarray | None
    shuffled: Mean
    advantage: Mean
    perturbation: str
    method: str
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        scaled = "" if self.beta is None else f", scores scaled by beta, median {written(float(np.nanmedian(self.beta)))}"
        return (
            f"Infidelity({self.method}: {self.mean} squared units of f; relative {self.relative_mean}, shuffled {written(self.shuffled.mean)}, better by "
            f"{self.advantage}; {self.perturbation}{scaled}; "
            "good: near 0; relative 1 is what predicting no change gets)"
        )

    def to_frame(self) -> pandas.DataFrame:
        """One row for each example: infidelity, relative, beta. Needs pandas."""
        beta = np.ones(len(self.values)) if self.beta is None else self.beta
        return pandas_library().DataFrame({"example": np.arange(len(beta)), "infidelity": self.values, "relative": self.relative, "beta": beta})


def infidelity(
    scores: Any,
    model: Any,
    inputs: Any = None,
    target: Any = None,
    *,
    perturbation: Perturbation | None = None,
    scaled: bool = False,
    draws: int = 200,
    fill: Any = None,
    parts: Any = None,
    extra: Any = None,
    output: str | None = None,
    batch_size: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Infidelity:
    """``E_I[(β Iᵀφ - (f(x) - f(x - I)))²]`` (Yeh et al. 2019, arXiv 1901.09392, Definition 2.1).

    Good: near 0, and ``relative`` well below 1 (predicting no change) and below that of the same scores ``shuffled``. Zero for linear models
    with matching scores. The perturbation must match what the scores are: ``masks`` for contributions to ``f(x) - f(b)`` (the fill must then be
    their baseline), ``gaussian`` for slopes.

    Args:
        perturbation: ``hw.evaluate.masks(0.5)`` (default) or ``hw.evaluate.gaussian(0.1)``.
        scaled: whether scores may be multiplied with ``β = E[ab] / E[a²]`` (a predicted, b real), the best scale for each example: for scores
            without a unit. An optimistic figure: β is fitted on the same draws.
        draws: perturbations for each example.
        Others as in :func:`deletion`.

    Caveat: it judges changes of the size and shape that were asked for; f need not be like that elsewhere (Bilodeau et al. 2022,
    arXiv 2212.11870: complete attributions can be no better than chance about counterfactual behaviour).

    >>> infidelity(np.array([[3.0, 1.0]]), lambda X: X @ [3.0, 1.0], np.ones((1, 2))).values
    array([0.])
    """
    how = masks() if perturbation is None else perturbation
    if not isinstance(how, Perturbation):
        raise InputError(f"perturbation={how!r}", "hw.evaluate.masks(share) or hw.evaluate.gaussian(sigma)", "leave it out for masks(0.5)")
    _draws(draws)
    subject = subject_of(scores, model, inputs, target, fill, parts, extra, output, batch_size, seed)
    trials = how.trials(subject, draws, seed)
    values, relative, scale = _errors(trials.predicted(), trials.real, scaled)
    _, other, _ = _errors(trials.predicted(_shuffled(trials.slopes, subject.parts.present, seed)), trials.real, scaled)
    figures = [mean_of(v, bootstrap, seed) for v in (values, relative, other, other - relative)]
    return Infidelity(values, figures[0], relative, figures[1], scale, figures[2], figures[3], repr(how), subject.method, subject.notes)


@dataclass(frozen=True, eq=False)
class SensitivityN:
    """Correlations of predicted and real changes over subsets of each size (see :func:`sensitivity_n`).

    ``sizes`` (s,): parts replaced. ``correlations`` (n, s), NaN where one side is constant. ``values`` (n,): their mean over the sizes.
    """

    sizes: np.ndarray
    correlations: np.ndarray
    values: np.ndarray
    mean: Mean
    at: tuple[Mean, ...]
    method: str
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        by = ", ".join(f"n={size} {written(m.mean)}" for size, m in zip(self.sizes.tolist(), self.at, strict=True))
        return f"SensitivityN({self.method}: mean correlation {self.mean}; {by}; good: near 1 at every size; 0: no relation)"

    @property
    def curve(self) -> report.Curve:
        """Mean correlation over the number of parts replaced, with its interval, for a report."""
        lines = [(self.method, [m.mean for m in self.at], "measured"), ("low", [m.low for m in self.at], "reference"), ("high", [m.high for m in self.at], "reference")]
        series = tuple(report.Series(name, self.sizes.tolist(), y, role) for name, y, role in lines)  # type: ignore[arg-type]
        return report.Curve(series, report.Axis("parts replaced"), report.Axis("correlation", 0.0, 1.0))

    def to_frame(self) -> pandas.DataFrame:
        """One row for each example and size. Needs pandas."""
        n, s = self.correlations.shape
        return pandas_library().DataFrame({"example": np.repeat(np.arange(n), s), "size": np.tile(self.sizes, n), "correlation": self.correlations.ravel()})


def sensitivity_n(
    scores: Any,
    model: Any,
    inputs: Any = None,
    target: Any = None,
    *,
    sizes: Sequence[int] | None = None,
    draws: int = 100,
    fill: Any = None,
    parts: Any = None,
    extra: Any = None,
    output: str | None = None,
    batch_size: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> SensitivityN:
    """Pearson correlation of ``Σ_{j in S} φ_j`` and ``f(x) - f(x_S→b)`` over random sets S of n parts (Ancona et al. 2018, arXiv 1711.06104).

    Good: near 1 at every n; for a linear model it is 1. Only the ranking and the proportions of an example count, not the unit. An example in
    which either side is constant (all scores equal, say) has no correlation at that n: NaN, left out of the mean.

    Caveat: large sets make inputs like nothing that the model has seen, and a curve that falls with n says that f is not additive, which no
    scores can mend (Bilodeau et al. 2022, arXiv 2212.11870).

    Args:
        sizes: of the sets; default: up to 8 from 1 to 80 % of the parts, evenly in the logarithm.
        draws: sets of each size. Others as in :func:`deletion`.

    >>> found = sensitivity_n(np.array([[3.0, 1.0, 2.0]]), lambda X: X @ [3.0, 1.0, 2.0], np.ones((1, 3)))
    >>> found.sizes, found.correlations.round(12)
    (array([1, 2]), array([[1., 1.]]))
    """
    _draws(draws)
    subject = subject_of(scores, model, inputs, target, fill, parts, extra, output, batch_size, seed)
    own = subject.parts.present.sum(1)
    chosen = _sizes(sizes, int(own.min()))
    rng, columns = np.random.default_rng(seed), []
    for size in chosen.tolist():
        keys = np.where(subject.parts.present[:, None], rng.random((subject.n, draws, subject.parts.count)), 2.0)
        removed = np.argsort(np.argsort(keys, axis=2), axis=2) < size
        trials = _without(subject, removed)
        columns.append(_correlation(trials.predicted(), trials.real))
    found = np.stack(columns, 1)
    counted = (~np.isnan(found)).sum(1)
    values = np.where(counted > 0, np.nansum(found, 1) / np.maximum(counted, 1), np.nan)
    boot = (bootstrap, seed)
    return SensitivityN(chosen, found, values, mean_of(values, *boot), tuple(mean_of(c, *boot) for c in found.T), subject.method, subject.notes)


# ---- their mathematics -----------------------------------------------------------------------------------------------------------


def _errors(a: np.ndarray, d: np.ndarray, scaled: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Mean squared errors (n,), the same over the mean square of d, and the best scale of a where it was asked for."""
    scale = _ratio((a * d).mean(1), (a * a).mean(1)) if scaled else None
    error = (((a if scale is None else np.nan_to_num(scale)[:, None] * a) - d) ** 2).mean(1)
    return error, _ratio(error, (d * d).mean(1)), scale


def _without(subject: Subject, removed: np.ndarray) -> Trials:
    """The fall of f without the parts of ``removed`` (n, draws, count) that the examples have."""
    removed = removed & subject.parts.present[:, None]
    return Trials(removed, subject.parts.scores, subject.output[:, None] - subject.without(removed))


def _shuffled(slopes: np.ndarray, present: np.ndarray, seed: int) -> np.ndarray:
    """Each example's scores in random order over the parts that it has."""
    rng, found = np.random.default_rng([seed, 1]), slopes.copy()
    for row, own in zip(found, present, strict=True):
        row[own] = rng.permutation(row[own])
    return found


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full(over.shape, np.nan), where=under > 0)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) Pearson along the last axis; NaN where a side is constant up to round-off."""
    size = np.maximum(np.abs(a).max(1), 1e-300), np.maximum(np.abs(b).max(1), 1e-300)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    spread = np.sqrt((a * a).mean(1)), np.sqrt((b * b).mean(1))
    varied = (spread[0] > 1e-9 * size[0]) & (spread[1] > 1e-9 * size[1])
    return np.divide((a * b).mean(1), spread[0] * spread[1], out=np.full(len(a), np.nan), where=varied)


def _sizes(sizes: Sequence[int] | None, count: int) -> np.ndarray:
    if count < 2:
        raise InputError(f"an example with {count} parts", "at least 2, so that sets of them differ", "give smaller parts")
    if sizes is None:
        return np.unique(np.rint(np.geomspace(1, max(1, min(count - 1, round(0.8 * count))), 8)).astype(int))
    found = np.asarray(sizes)
    if found.dtype.kind not in "iu" or found.ndim != 1 or not len(found) or found.min() < 1 or found.max() >= count:
        raise InputError(f"sizes={sizes!r}", f"whole numbers from 1 to {count - 1}: a set of all parts is always the same", "leave them out")
    return np.unique(found)


def _draws(draws: int) -> None:
    if draws < 2:
        raise InputError(f"draws={draws}", "at least 2", "draws=100")
