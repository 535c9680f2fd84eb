"""``KNNShapley``: the exact Shapley value of every training example for a nearest-neighbour model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from headwater.errors import InputError
from headwater.influence.methods import RANK_ONLY
from headwater.influence.request import SCORES, Parts, Request, mean_of_scores
from headwater.influence.similarity.labels import Labels, labels_of
from headwater.influence.similarity.pairs import minus_distance, pairs, summed
from headwater.influence.similarity.representations import provenance_of
from headwater.influence.similarity.vectors import POSITIONS, prove_vectors, vectors_of

_HELD = 2**23  # numbers of one chunk of queries


@dataclass(frozen=True)
class KNNShapley:
    """Shapley values of a k-nearest-neighbour model on the network's features (Jia et al. 2019, arXiv 1908.08619): exact, in closed form.

    A query is predicted from the k training examples nearest to it (Euclidean distance; equal distances: the example that comes first
    is nearer). The utility of a set of examples is, for classes, the share of the query's own class among its k nearest in the set; for
    targets minus the squared error of their mean. In both a set of fewer than k leaves places empty: an empty place is no hit, and counts
    as the mean training target. Scores of a query sum to the utility of the whole training set minus that of none.

    Args:
        k: neighbours.
        layer, positions: as of :class:`Representations`; default: the input of the last linear layer. ``"input"``: the examples
            themselves.

    Scores only rank: they are in the unit of that utility, not of the measurement, which they never look at. A row of several examples
    (:class:`Query`) is their sum, as Shapley values of summed utilities are.

    >>> KNNShapley(k=3)
    KNNShapley(k=3, layer=None, positions='mean')
    """

    k: int = 5
    layer: str | None = None
    positions: str = "mean"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise InputError(f"k={self.k}", "at least one neighbour", "k=5")
        if self.positions not in POSITIONS:
            raise InputError(f"positions={self.positions!r}", f"one of {', '.join(map(repr, POSITIONS))}", "positions='mean'")

    def prove(self, request: Request, model: nn.Module, trained: int) -> None:
        """Raise InputError, from the first examples, where there are no labels, or no such layer."""
        labels_of(request, "KNN-Shapley", most=1)
        prove_vectors(request.run, self.layer, self.positions, model)

    def parts(self, request: Request) -> Parts:
        """What one model contributes (see :class:`headwater.influence.request.Scorer`)."""
        labels = labels_of(request, "KNN-Shapley")
        vectors = vectors_of(request.run, self.layer, self.positions)
        found = pairs(request, vectors, minus_distance, f"KNNShapley({self.positions}, {vectors.where})")
        values = np.empty(found.values.shape)
        step = max(1, _HELD // found.values.shape[1])
        for start in range(0, len(values), step):
            part = slice(start, start + step)
            values[part] = shapley(found.values[part], Labels(labels.queries[part], labels.train), self.k)
        rows = summed(values, request).astype(found.values.dtype)
        facts = {**provenance_of(request.run, found.cost), "layer": vectors.where, "utility": "accuracy" if labels.classes else "minus squared error"}
        return Parts({SCORES: rows}, f"KNNShapley(k={self.k}, {vectors.where})", RANK_ONLY, facts)

    def combine(self, members: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """The mean of the members' scores."""
        return mean_of_scores(members)


def shapley(nearness: np.ndarray, labels: Labels, k: int) -> np.ndarray:
    """Shapley values (queries, train) of examples that lie ``nearness`` (queries, train; larger is nearer) from each query."""
    order = np.argsort(-nearness, axis=1, kind="stable")
    if labels.classes:
        by_rank = _classification(np.take_along_axis(labels.same(), order, axis=1).astype(np.float64), k)
    else:
        centre = labels.train.mean(axis=0)
        by_rank = sum(
            (_regression((labels.train[:, o] - centre[o])[order], labels.queries[:, o] - centre[o], k) for o in range(labels.train.shape[1])),
            start=np.zeros(order.shape),
        )
    values = np.empty(order.shape)
    np.put_along_axis(values, order, by_rank, axis=1)
    return values


def _classification(hits: np.ndarray, k: int) -> np.ndarray:
    """From hits (queries, N), nearest first, with ``s_N = hit_N / max(N, k)`` and, i = 1 ... N-1 (Jia et al., Theorem 1),

        s_i = s_{i+1} + (hit_i - hit_{i+1}) / k * min(k, i) / i
    """
    n = hits.shape[1]
    i = np.arange(1, n)
    steps = (hits[:, :-1] - hits[:, 1:]) / k * (np.minimum(k, i) / i)
    return _summed_from_the_end(steps, hits[:, -1] / max(n, k))


def _regression(y: np.ndarray, target: np.ndarray, k: int) -> np.ndarray:
    """From centred targets y (queries, N), nearest first, for the utility ``-(sum of the k nearest y / k - target)^2`` (Jia et al.,
    Theorem 6, there with U(empty) = 0; here an empty set predicts the centre).

    Neighbours i and i+1 are exchanged in every set S of the others. Their marginal gains differ by ``(y_{i+1} - y_i) / k *
    ((2 R + y_i + y_{i+1}) / k - 2 target)`` where fewer than k of S are nearer, R being the sum of the other neighbours that the model
    then uses. Under the Shapley weights the number of members of S among any m candidates is uniform on 0 ... m, hence

        P(fewer than k nearer) = w_i = min(k, i) / i
        E[2 R] = w_i (min(k, i) - 1) / (i - 1) * sum_{l < i} y_l  +  sum_{l > i+1} min(k, l-1) min(k-1, l-2) / ((l-1)(l-2)) y_l

    The farthest example N is used where fewer than k others are there: ``s_N = -y_N / (k N) * (M (y_N / k - 2 target) + M (M-1) / k *
    mean of the others)`` with M = min(k, N).
    """
    n = y.shape[1]
    used = min(k, n)
    others = y[:, :-1].mean(axis=1) if n > 1 else 0.0
    last = -y[:, -1] / (k * n) * (used * (y[:, -1] / k - 2 * target) + used * (used - 1) / k * others)
    i = np.arange(1, n)
    m = np.minimum(k, i)
    w = m / i
    before = np.cumsum(y, axis=1)[:, :-1] - y[:, :-1]  # sum of y_l, l < i
    rank = np.arange(1, n + 1, dtype=float)
    far = np.where(rank >= 3, np.minimum(k, rank - 1) * np.minimum(k - 1, rank - 2) / np.maximum(1, (rank - 1) * (rank - 2)), 0.0)
    beyond = np.zeros_like(y)
    beyond[:, :-2] = np.cumsum((far * y)[:, :1:-1], axis=1)[:, ::-1]  # at i-1: sum over l > i+1
    twice = w * (m - 1) / np.maximum(1, i - 1) * before + beyond[:, :-1]
    steps = (y[:, 1:] - y[:, :-1]) / k * ((twice + w * (y[:, :-1] + y[:, 1:])) / k - 2 * w * target[:, None])
    return _summed_from_the_end(steps, last)


def _summed_from_the_end(steps: np.ndarray, last: np.ndarray) -> np.ndarray:
    """``s_i = s_{i+1} + steps_i`` with ``s_N = last``: (queries, N)."""
    tail = np.cumsum(steps[:, ::-1], axis=1)[:, ::-1]
    return np.concatenate([tail, np.zeros((len(steps), 1))], axis=1) + last[:, None]
