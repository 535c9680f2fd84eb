"""Integrated Gradients of a tree ensemble along the straight path, exactly.

On ``b + a (x - b)`` every feature is monotone, so the box of a leaf is occupied on one interval [s, e] of a. The feature whose split opens
the box at s gains the leaf's value, the feature that closes it at e loses it; a box that is occupied from the baseline on has no opener,
one that is occupied at the input no closer. The sum over leaves and trees telescopes to F(x) - F(b). **Whether** a split is crossed
is decided by the library's predicate at x and at b alone; a only orders the crossings.

**Ties.** Features that cross at the same a (the normal case for binary and integer data) play a game: a box is occupied if the
features E that open it have moved and the features O that close it have not. Its Shapley value is the credit, and the limit
of smoothing all steps with one kernel (Owen 1972): for s < e each opener gains v / |E| and each closer loses v / |O|; for s = e each opener
gains ``v (|E|-1)! |O|! / (|E|+|O|)!`` and each closer loses ``v |E|! (|O|-1)! / (|E|+|O|)!``. On binary data with cuts in the middle this is the
baseline (interventional) Shapley value.

A path crosses few of a tree's splits: the cost is of the order of depth × (crossings + 1) per tree, row and baseline, with no sorting.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from headwater.features.trees.forest import LINKS, Forest, Packed, compiled

MOST = 12
"""Up to so many tied features are enumerated where the output is linked."""


def threads() -> int:
    """How many: as many as this process has cores, or fewer where NUMBA_NUM_THREADS or OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [int(v) for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS") if (v := os.environ.get(name, "")).isdigit() and int(v) > 0]
    return min([cores, *limits])


def _each(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """``work`` on every item, in threads (the compiled loops let go of Python's lock)."""
    listed = list(items)
    count = min(threads(), len(listed))
    if count <= 1:
        return [work(item) for item in listed]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, listed))


def _slices(n: int, size: int) -> list[slice]:
    return [slice(k, min(k + size, n)) for k in range(0, n, size)]


def attributions(packed: Packed, x: np.ndarray, points: np.ndarray, weights: np.ndarray, general: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Mean attributions (n, p) over K baselines and their standard error (None for one baseline).

    x (n, p); points (K, 1 or n, p); weights (K,), which sum to 1. The standard error is ``sqrt(K/(K-1) Σ w² (φ - mean)²)``: std/√K for equal weights.
    """
    kernels = compiled()
    n, p = x.shape
    count = len(weights)
    pairs = max(1, min(64, 8192 // max(p, 1)))
    baselines = _slices(count, min(count, pairs))
    rows = _slices(n, max(1, pairs // min(count, pairs)))
    total, spread = np.zeros((len(baselines), n, p)), np.zeros((len(baselines), 2, n, p))

    def work(item: tuple[slice, int]) -> None:
        row, k = item
        some = points[baselines[k]]
        kernels.walk(*packed, x[row], some if some.shape[1] == 1 else some[:, row], weights[baselines[k]], general, total[k, row], spread[k, :, row])

    _each(work, [(row, k) for row in rows for k in range(len(baselines))])
    mean = total.sum(0)
    if count == 1:
        return mean, None
    block = np.array([weights[s].sum() for s in baselines])[:, None, None]
    square = np.array([(weights[s] ** 2).sum() for s in baselines])[:, None, None]
    off = np.divide(total, block, out=np.zeros_like(total), where=block > 0) - mean
    variance = (spread[:, 1] + 2 * off * spread[:, 0] + off**2 * square).sum(0) * count / (count - 1)
    return mean, np.sqrt(variance)


def linked(forest: Forest, cuts: np.ndarray, x: np.ndarray, point: np.ndarray, weights: np.ndarray, general: bool) -> tuple[np.ndarray, int]:
    """Attributions (n, p) of ``Σ weights link(margins)`` against one baseline, point (1 or n, p), and how many corners had more than MOST features.

    The jumps of all trees are merged along the path: each place credits the change of the linked output there.
    """
    kernels = compiled()
    packed = forest.packed(None, cuts)
    nodes, shares = np.polynomial.legendre.leggauss(32)
    quadrature = np.stack([(nodes + 1) / 2, shares / 2])
    margins = np.broadcast_to(forest.raw(point), (len(x), forest.outputs))
    output = np.zeros(0, np.int64) if forest.output is None else np.asarray(forest.output, np.int64)
    phi = np.zeros(x.shape)
    kind = LINKS[forest.link.kind]

    def work(row: slice) -> int:
        some = point if len(point) == 1 else point[row]
        return int(
            kernels.linked(
                *packed, x[row], some, np.ascontiguousarray(margins[row]), general, forest.value, output, weights, kind, forest.link.slope, MOST, quadrature, phi[row]
            )
        )

    return phi, sum(_each(work, _slices(len(x), 16)))
