"""Attributions to inputs, compared with closed forms, with all subsets of the features, and with many more points on the path."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import combinations
from math import factorial

import numpy as np
import torch
from torch import nn

from headwater.features import baselines, quadrature
from headwater.features.explain import explain
from headwater.result import FeatureScores

TOLERANCE, POINTS = 1e-3, 16384


def linear() -> float:
    """``w_i (x_i - b_i)``, in float64: the largest error, relative to the largest value."""
    model, x, b = nn.Linear(8, 3).double(), torch.randn(5, 8).double(), torch.randn(8).double()
    found = _values(explain(model, x, 1, baseline=b, progress=False))
    return _error(found, (model.weight[1] * (x - b)).detach().numpy())


def product() -> float:
    """``f = x_1 x_2`` from zero: half of it each, as for every polynomial of so low a degree."""
    x = torch.randn(5, 2).double()
    return _error(_values(explain(lambda v: v.prod(1), x, progress=False)), x.prod(1, keepdim=True).repeat(1, 2).numpy() / 2)


def tolerance() -> float:
    """The error of a network's values at a tolerance, relative to their Euclidean norm, against 16,384 points: the worst of its examples.

    The gradient of a network with ReLU jumps, so an even rule's error falls only as one over its points: this many leave about 5e-5.
    """
    model, x = nn.Sequential(nn.Linear(10, 24), nn.GELU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).double(), 2 * torch.randn(8, 10).double()
    found = _values(explain(model, x, 0, baseline=baselines.constant(-0.5), tolerance=TOLERANCE, progress=False))
    right = _values(explain(model, x, 0, baseline=baselines.constant(-0.5), rule=quadrature.midpoint(POINTS), progress=False))
    return float((np.linalg.norm(found - right, axis=1) / np.linalg.norm(right, axis=1)).max())


def trees() -> float:
    """Boosted trees on features of 0 and 1, from zero: the Shapley values by definition, over all subsets of the features."""
    from sklearn.ensemble import GradientBoostingRegressor

    x = np.random.default_rng(0).integers(0, 2, (60, 5)).astype(float)
    y = x @ np.arange(5.0) + 3 * x[:, 0] * x[:, 1] - 2 * x[:, 2] * x[:, 3] * x[:, 4]
    model = GradientBoostingRegressor(n_estimators=8, max_depth=4, random_state=0).fit(x, y)
    return _error(_values(explain(model, x[:6], progress=False)), np.stack([shapley(model.predict, row) for row in x[:6]]))


def shapley(f: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """The Shapley values (p,) of one row against zero: ``sum over S without j of |S|! (p - |S| - 1)! / p! (f(S + j) - f(S))``.

    >>> shapley(lambda v: v[:, 0] * v[:, 1] + v[:, 2], np.ones(3)).round(6).tolist()
    [0.5, 0.5, 1.0]
    """
    p = len(x)
    found = np.zeros(p)
    for j in range(p):
        for size in range(p):
            for others in combinations([k for k in range(p) if k != j], size):
                pair = np.zeros((2, p))
                pair[:, list(others)] = x[list(others)]
                pair[1, j] = x[j]
                without, with_it = f(pair)
                found[j] += factorial(size) * factorial(p - size - 1) / factorial(p) * (with_it - without)
    return found


def with_trees() -> bool:
    """Whether the libraries of the extra ``trees`` are here."""
    return all(find_spec(name) is not None for name in ("sklearn", "numba"))


def _values(scores: FeatureScores) -> np.ndarray:
    assert isinstance(scores.values, np.ndarray)
    return scores.values


def _error(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(found - right).max() / np.abs(right).max())
