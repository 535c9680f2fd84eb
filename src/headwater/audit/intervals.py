"""Intervals and corrections that more than one audit needs."""

from __future__ import annotations

import numpy as np

from headwater.evaluate.means import Mean


def corrected(values: np.ndarray, ratio: float) -> Mean:
    """The mean over J resamplings and its 95 % interval, widened because their training sets overlap.

    ``mean ± t(J-1) sqrt((1/J + n_test/n_train) s²)`` (Nadeau and Bengio 2003, Inference for the Generalization Error, section 3): the naive
    standard error takes the folds for independent and is far too small. ``ratio`` is ``n_test/n_train``.

    >>> corrected(np.array([0.9, 0.9]), 0.25), corrected(np.array([0.8, 0.9, 1.0]), 0.25)
    (0.900 [0.900, 0.900], 0.900 [0.571, 1.229])
    """
    from scipy.stats import t

    count, mean = len(values), float(values.mean())
    if count < 2:
        return Mean(mean, float("nan"), float("nan"), count)
    reach = float(t.ppf(0.975, count - 1) * np.sqrt((1 / count + ratio) * values.var(ddof=1)))
    return Mean(mean, mean - reach, mean + reach, count)


def holm(p: np.ndarray) -> np.ndarray:
    """p-values corrected for their number: rejecting those below α keeps the chance of any false alarm at α (Holm 1979), however they depend.

    In rising order the k-th of m (from 0) is multiplied by ``m - k``, and none may be below the one before it.

    >>> holm(np.array([0.01, 0.04, 0.03])).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    found = np.empty(len(p))
    found[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return found


def chance_of(observed: np.ndarray, shuffled: np.ndarray) -> np.ndarray:
    """``(1 + #{as large}) / (1 + B)`` of statistics under B shuffles (B, ...): never 0, and valid for any B (Phipson and Smyth 2010).

    >>> chance_of(np.array(2.0), np.array([1.0, 2.0, 3.0]))
    np.float64(0.75)
    """
    slack = 1e-12 * np.abs(observed)  # an equal statistic may differ by its rounding
    return np.asarray((1 + (shuffled >= observed - slack).sum(0)) / (1 + len(shuffled)))[()]
