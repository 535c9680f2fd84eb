"""How well scores agree with retraining: LDS, the paired difference of two methods, and the slope.

Every interval here comes from one bootstrap that redraws queries *and* subsets. It covers the choice of both; it does not cover
another training set, another architecture, or the choice of seeds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from headwater.errors import InputError, NotFinite
from headwater.evaluate.arrays import array
from headwater.evaluate.bank import Bank

HELD = 2**25  # numbers held at once in the rank tables
SPLITS = 32  # ways of halving the seeds that enter the noise ceiling


@dataclass(frozen=True, eq=False)
class LDS:
    """The linear datamodeling score (see :func:`lds`).

    ``mean``: over queries, with its 95 % interval ``low`` ... ``high`` and bootstrap standard error ``std``.
    ``per_query``: (queries,). ``reliability``: correlation to expect between two such banks; ``ceiling``: the LDS that perfect
    scores would reach in this bank, ``sqrt(reliability)``; both None with one seed.
    ``constant``: queries whose predictions are all equal, ``constant_truth``: queries whose retrained measurements are (both count as
    correlation 0).
    ``subsets``: how many were used. ``method``: of the scores.
    """

    mean: float
    low: float
    high: float
    std: float
    per_query: np.ndarray
    ceiling: float | None
    reliability: float | None
    constant: int
    constant_truth: int
    subsets: int
    method: str = ""

    def __repr__(self) -> str:
        ceiling = "" if self.ceiling is None else f", noise ceiling {self.ceiling:.3f}"
        constant = f", {self.constant} queries with constant predictions" if self.constant else ""
        over = f"{len(self.per_query)} queries, {self.subsets} subsets"
        return f"LDS({_named(self.method)}{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}], {over}{ceiling}{constant})"


@dataclass(frozen=True, eq=False)
class Paired:
    """LDS of one method minus LDS of another on the same bank, with its 95 % interval ``low`` ... ``high`` and standard error ``std``.

    ``per_query``: the differences, (queries,).
    """

    difference: float
    low: float
    high: float
    std: float
    per_query: np.ndarray
    methods: tuple[str, str] = ("", "")

    def __repr__(self) -> str:
        names = " - ".join(self.methods) if all(self.methods) else "difference"
        return f"Paired({names}: {self.difference:+.3f} [{self.low:+.3f}, {self.high:+.3f}])"


@dataclass(frozen=True, eq=False)
class SlopeResult:
    """Retrained against predicted change (see :func:`slope`).

    ``slope``: of actual on predicted, least squares through 0, with its 95 % interval ``low`` ... ``high``. ``spearman``: mean over queries,
    ``per_query`` (queries,). ``predicted``, ``actual``: changes of the measurement upon removal, (subsets, queries). ``unit``: of the scores.
    """

    slope: float
    low: float
    high: float
    spearman: float
    per_query: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray
    unit: str = ""
    method: str = ""

    def __repr__(self) -> str:
        note = f"; the scores are {self.unit}, so only its sign has a meaning" if self.unit not in ("", "measurement") else ""
        return f"SlopeResult({_named(self.method)}slope {self.slope:.3f} [{self.low:.3f}, {self.high:.3f}], Spearman {self.spearman:.3f}{note})"


def lds(scores: Any, bank: Bank, *, bootstrap: int = 1000, seed: int = 0) -> LDS:
    """Linear datamodeling score: do summed scores rank the subsets as retraining does? (Park et al. 2023, arXiv 2303.14186, Def. 2.3)

    ``LDS(q) = Spearman over subsets S of ( sum_{i in S} scores[q, i],  mean over seeds of f(z_q; theta(S)) )``, averaged over queries.
    Ties share their average rank. A query whose predictions are constant scores 0 and is counted.

    The reliability of the truth is the mean Spearman between disjoint halves of the seeds, brought to the full number of seeds
    by the Spearman-Brown formula ``k r / (1 + (k - 1) r)`` with ``k = seeds / half``. Scores that equal the expected truth would reach
    its square root, which is the ``ceiling``.

    Args:
        scores: TrainingScores, or an array (queries, train).
        bank: from :func:`retrain`. Subsets with missing trainings are left out. Scores that were fitted to some of its trainings
            (:class:`Datamodel`) draw a warning: judge them by the other part of ``bank.split()``.
        bootstrap: redrawings for the interval. ``seed``: of the redrawings.

    Raises:
        InputError: shapes that do not fit the bank. NotFinite: NaN or infinite scores.

    >>> from headwater.evaluate import Bank, Subsets
    >>> bank = Bank(Subsets(4, ([0, 1], [1, 2], [2, 3]), "by hand"), (0,), np.array([[[1., 1.]], [[2., 1.]], [[3., 2.]]]), np.zeros((1, 2)))
    >>> lds(np.array([[1., 3., 2., 4.], [2., 1., 5., 4.]]), bank).per_query.round(4)
    array([1.   , 0.866])
    """
    bank = bank.complete()
    predicted, truth = _predicted(scores, bank), bank.values.mean(axis=1)
    replicates = _replicates(predicted, truth, _draws(bank, bootstrap, seed))
    per_query = _spearman(predicted, truth)
    low, high = _interval(replicates)
    reliability = _reliability(bank)
    return LDS(
        mean=float(per_query.mean()),
        low=low,
        high=high,
        std=float(replicates.std()),
        per_query=per_query,
        ceiling=None if reliability is None else float(np.sqrt(reliability)),
        reliability=reliability,
        constant=int((np.ptp(predicted, axis=0) == 0).sum()),
        constant_truth=int((np.ptp(truth, axis=0) == 0).sum()),
        subsets=len(bank.subsets),
        method=str(getattr(scores, "method", "")),
    )


def paired(a: Any, b: Any, bank: Bank, *, bootstrap: int = 1000, seed: int = 0) -> Paired:
    """LDS of ``a`` minus LDS of ``b``, both judged by the same redrawn queries and subsets: an interval above 0 says that ``a`` is better.

    Arguments and errors as in :func:`lds`.
    """
    bank = bank.complete()
    draws, truth = _draws(bank, bootstrap, seed), bank.values.mean(axis=1)
    first, second = _predicted(a, bank), _predicted(b, bank)
    replicates = _replicates(first, truth, draws) - _replicates(second, truth, draws)
    per_query = _spearman(first, truth) - _spearman(second, truth)
    low, high = _interval(replicates)
    methods = (str(getattr(a, "method", "")), str(getattr(b, "method", "")))
    return Paired(float(per_query.mean()), low, high, float(replicates.std()), per_query, methods)


def slope(scores: Any, bank: Bank, *, bootstrap: int = 1000, seed: int = 0) -> SlopeResult:
    """Does the predicted change have the right size? Retrained change on predicted change, least squares through 0, over subsets and queries.

    Removing a set of examples is predicted to change the measurement by ``-sum_{i removed} scores[q, i]``; the retrained change is
    ``f(z_q; theta(S)) - f(z_q; theta(all))``, each seed against the same seed, then averaged.

    What to expect for scores in the measurement's unit: 1.0 to 1.3 (finite removal against first order). Near N: sums and means were
    confused; near 1.7 or 1 / (1 - momentum): a learning rate without its momentum.

    Arguments and errors as in :func:`lds`; also InputError where every predicted change is 0, or the full-set trainings are missing.
    """
    bank = bank.complete()
    predicted = -bank.subsets.sums(_values(scores, bank), removed=True)
    if not np.isfinite(bank.base).all():
        raise InputError("a bank without trainings on the full set", "base measurements for every seed", "call retrain again: it continues")
    if not predicted.any():
        raise InputError("scores that predict no change at all", "at least one score that is not 0", "check the scores")
    actual = (bank.values - bank.base).mean(axis=1)
    rows, columns = _draws(bank, bootstrap, seed)
    per_query = _spearman(predicted, actual)
    low, high = _interval(_weighted(predicted * actual, rows, columns) / _weighted(predicted**2, rows, columns))
    return SlopeResult(
        slope=float((predicted * actual).sum() / (predicted**2).sum()),
        low=low,
        high=high,
        spearman=float(per_query.mean()),
        per_query=per_query,
        predicted=predicted,
        actual=actual,
        unit=str(getattr(scores, "unit", "")),
        method=str(getattr(scores, "method", "")),
    )


# ------------------------------------------------------------------------------------------------------------- predictions


def _values(scores: Any, bank: Bank) -> np.ndarray:
    """The scores as an array (queries, n) that fits the bank. Warns where they were fitted to trainings that are now to judge them."""
    values = array(scores)
    known = set((getattr(scores, "provenance", None) or {}).get("fitted", ()))
    if known and (shared := sum(mark in known for mark in bank.marks())):
        warnings.warn(
            f"{shared} of the {len(bank.subsets)} subsets of this bank are ones that these scores were fitted to: they are no judge of them. "
            "Fit one part and judge by the other: fitted, judging = bank.split(); hw.Datamodel(fitted)",
            stacklevel=4,
        )
    if values.shape != (bank.queries, bank.subsets.n):
        raise InputError(
            f"scores of shape {values.shape}",
            f"(queries, train) = ({bank.queries}, {bank.subsets.n}), as in the bank",
            "trace the queries that the bank measured, in that order (bank.at(queries) picks some), and cut the columns to its training examples",
        )
    if not np.isfinite(values).all():
        raise NotFinite(
            f"{np.count_nonzero(~np.isfinite(values))} scores are NaN or infinite", "finite scores", "trace again, and look at the warnings"
        )
    return values


def _predicted(scores: Any, bank: Bank) -> np.ndarray:
    """Summed scores of what each subset keeps, (subsets, queries)."""
    return bank.subsets.sums(_values(scores, bank))


# --------------------------------------------------------------------------------------------------------------- bootstrap


def _draws(bank: Bank, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each subset (draws, subsets) and each query (draws, queries) occurs in each redrawing."""
    rng = np.random.default_rng(seed)
    subsets, queries = len(bank.subsets), bank.queries
    return rng.multinomial(subsets, np.full(subsets, 1 / subsets), count), rng.multinomial(queries, np.full(queries, 1 / queries), count)


def _interval(replicates: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.percentile(replicates, [2.5, 97.5])
    return float(low), float(high)


def _weighted(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Sums of a table (subsets, queries) in each redrawing, (draws,)."""
    return np.einsum("ds,sq,dq->d", rows.astype(float), table, columns.astype(float), optimize=True)


def _replicates(a: np.ndarray, b: np.ndarray, draws: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The mean Spearman correlation in each redrawing, (draws,)."""
    rows, columns = draws
    total = np.zeros(len(rows))
    for part, correlations in _correlations(a, b, rows):
        total += (correlations * columns[:, part]).sum(axis=1)
    return total / columns.sum(axis=1)


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman correlation of each column over the rows, ties right, 0 where a column is constant: (columns,)."""
    once = np.ones((1, len(a)))
    return np.concatenate([correlations[0] for _, correlations in _correlations(a, b, once)])


def _correlations(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Weighted Spearman correlations (draws, some of the columns), for rows that occur ``weights`` (draws, rows) times."""
    step = max(1, HELD // (len(a) * max(len(a), len(weights))))
    for start in range(0, a.shape[1], step):
        part = slice(start, start + step)
        yield part, _pearson(_ranks(a[:, part], weights), _ranks(b[:, part], weights), weights[:, :, None])


def _ranks(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average ranks (up to a constant) of rows that occur ``weights`` times: (draws, rows, columns).

    ``rank_j = sum_k w_k ([x_k < x_j] + [x_k = x_j] / 2)``: all draws share one comparison of every pair, so that redrawing is a matrix product.
    """
    below = (x[:, None] < x[None]).astype(np.float32) + 0.5 * (x[:, None] == x[None]).astype(np.float32)  # (k, j, columns)
    return np.tensordot(weights.astype(np.float32), below, axes=1).astype(np.float64)  # halves below 2^24: exact in float32


def _pearson(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted correlation along axis 1, 0 where either side is constant."""
    total = weights.sum(axis=1, keepdims=True)
    a = a - (weights * a).sum(axis=1, keepdims=True) / total
    b = b - (weights * b).sum(axis=1, keepdims=True) / total
    scale = np.sqrt((weights * a * a).sum(axis=1) * (weights * b * b).sum(axis=1))
    return np.divide((weights * a * b).sum(axis=1), scale, out=np.zeros_like(scale), where=scale > 1e-9)


# ----------------------------------------------------------------------------------------------------------- noise ceiling


def _reliability(bank: Bank) -> float | None:
    """Spearman-Brown reliability of the truth averaged over all seeds (see :func:`lds`); None with one seed."""
    count = len(bank.seeds)
    if count < 2:
        return None
    half = count // 2
    found = [_spearman(bank.values[:, one].mean(axis=1), bank.values[:, other].mean(axis=1)).mean() for one, other in _halvings(count)]
    r, k = max(0.0, float(np.mean(found))), count / half
    return k * r / (1 + (k - 1) * r)


def _halvings(count: int) -> list[tuple[list[int], list[int]]]:
    """Pairs of disjoint groups of ``count // 2`` seeds: all of them where they are few, else an even sample."""
    half = count // 2
    if count > 8:
        orders = [np.random.default_rng(i).permutation(count) for i in range(SPLITS)]
        return [(list(order[:half]), list(order[half : 2 * half])) for order in orders]
    groups = list(combinations(range(count), half))
    return [(list(a), list(b)) for a, b in combinations(groups, 2) if not set(a) & set(b)]


def _named(method: str) -> str:
    return f"{method}: " if method else ""
