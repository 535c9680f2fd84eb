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

BYTES = 2**20
"""Of memory for the pairs of row and baseline that one thread holds at a time: about the cache that a core has to itself."""


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
    # Many pairs at once: a deep tree then comes into the cache once for all of them, where few pairs would fetch all trees again and again.
    pairs = max(16, min(1024, BYTES // (32 * max(p, 1))))
    baselines = _slices(count, min(count, pairs))
    rows = _slices(n, max(1, min(pairs // min(count, pairs), -(-n // threads()))))
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

    The jumps of all trees are merged along the path: each place credits the change of the linked output there. Features that cross at one place
    share it by the Shapley value of the corner game played on the linked output, by enumeration; above MOST features by the diagonal
    formula (Owen 1972), in panels that are halved until the sum is complete to 1e-12.
    """
    packed = forest.packed(None, cuts)
    margins = np.array(np.broadcast_to(forest.raw(point), (len(x), forest.outputs)))
    phi = np.zeros(x.shape)
    x, points = np.ascontiguousarray(x), np.ascontiguousarray(point)[None]

    def work(rows: slice) -> int:
        room = Room(forest, 4 * len(forest.roots) + 64)
        return sum(_row(room, packed, x, points, i, general, margins[i], weights, phi[i]) for i in range(rows.start, rows.stop))

    return phi, sum(_each(work, _slices(len(x), 16)))


class Room:
    """Memory for the touches of one row, which grows as needed, and what the compiled loops read of a forest."""

    def __init__(self, forest: Forest, size: int) -> None:
        self.values = np.ascontiguousarray(forest.value, float)
        self.output = np.zeros(0, np.int64) if forest.output is None else np.asarray(forest.output, np.int64)
        self.link = (LINKS[forest.link.kind], float(forest.link.slope))
        self.who = np.empty(forest.features, np.int64)
        self.grow(size)

    def grow(self, size: int) -> None:
        self.at, self.what, self.members = np.empty(size), np.empty((size, 4), np.int64), np.empty(4 * size, np.int64)


def _row(room: Room, packed: Packed, x: np.ndarray, points: np.ndarray, i: int, general: bool, m: np.ndarray, weights: np.ndarray, phi: np.ndarray) -> int:
    kernels = compiled()
    while (count := kernels.touches(*packed, x, points, i, general, room.at, room.what, room.members)) < 0:
        room.grow(2 * len(room.at))
    order = np.argsort(room.at[:count], kind="stable")
    corners, k = 0, 0
    while True:
        k, last, size = kernels.merged(
            order, k, room.at, room.what, room.members, room.who, room.values, room.output, m, weights, *room.link, MOST, phi
        )  # fmt: skip
        if k == count:
            return corners
        group = order[k:last]
        phi += np.where(room.who >= 0, _diagonal(room, group, m, weights, size)[room.who], 0.0)
        kernels.arrive(group, room.what, room.members, room.values, room.output, m)
        corners, k = corners + 1, last


def _diagonal(room: Room, group: np.ndarray, m: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """Gains (size,) of the features of one corner, by the diagonal formula."""
    kernels = compiled()
    after = m.copy()
    kernels.arrive(group, room.what, room.members, room.values, room.output, after)
    change = kernels._linked(after, weights, *room.link) - kernels._linked(m, weights, *room.link)
    nodes, shares = np.polynomial.legendre.leggauss(32)
    panels = 1
    while True:
        starts = np.arange(panels)[:, None]
        quadrature = np.stack([((starts + (nodes + 1) / 2) / panels).ravel(), np.tile(shares / 2 / panels, panels)])
        gains = np.zeros(size)
        kernels.diagonal(group, room.what, room.members, room.who, room.values, room.output, m, weights, *room.link, quadrature, gains)
        if abs(gains.sum() - change) < 1e-12 or panels >= 256:
            return gains
        panels *= 2
