"""Regions: parts of an input that are spoken of together, as maps of labels and names that :meth:`FeatureScores.group` takes.

e = hw.explain(model, images, target=3)
e.group(hw.regions.superpixels(images, 60))                 # one number for each region of similar pixels
e.group(hw.regions.patches((28, 28), 4))                    # one for each square of 4 by 4
e.group(hw.regions.columns(names, of=["age", "job"]))       # one-hot columns back into what they were
hw.regions.ranked(e, hw.regions.superpixels(images, 60))    # regions in order, and the smallest that carry most
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from headwater.errors import InputError
from headwater.result import FeatureScores
from headwater.result.views import channel_axis, views

__all__ = ["Ranking", "columns", "patches", "ranked", "superpixels"]


def patches(shape: Sequence[int], size: int | Sequence[int]) -> np.ndarray:
    """Labels (*shape) of boxes of ``size`` (a number, or one for each axis), numbered in reading order; those at the end may be smaller.

    Args:
        shape: of the map: (rows, columns) of an image, (steps,) of a series. Channels are left out.

    >>> patches((2, 5), (2, 2)).tolist()
    [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2]]
    """
    lengths = [int(k) for k in shape]
    sizes = [int(size)] * len(lengths) if isinstance(size, int | np.integer) else [int(k) for k in size]
    if not lengths or min(lengths) < 1 or len(sizes) != len(lengths) or min(sizes) < 1:
        raise InputError(f"patches({tuple(shape)}, {size})", "positive lengths, and one size for all axes or one for each", "patches((28, 28), 4)")
    labels = np.zeros(lengths, dtype=np.int64)
    for axis, (length, step) in enumerate(zip(lengths, sizes, strict=True)):
        place = (np.arange(length) // step).reshape([-1 if a == axis else 1 for a in range(len(lengths))])
        labels = labels * -(-length // step) + place
    return labels


def columns(names: Sequence[str], of: Sequence[str] | None = None, separator: str = "_") -> list[str]:
    """For each column the name of the feature that it was made from, as one-hot encoders name them: ``job_clerk`` from ``job``.

    Args:
        of: the names of the features. A column belongs to the longest of them that it equals, or begins with before ``separator``. Without
            them, a column belongs to what stands before the first separator, and to itself where there is none.

    Raises InputError for a column that belongs to none of ``of``.

    >>> columns(["age", "job_clerk", "job_none", "job_type_a"], of=["age", "job", "job_type"])
    ['age', 'job', 'job', 'job_type']
    >>> columns(["age", "job=clerk", "job=none"], separator="=")
    ['age', 'job', 'job']
    """
    if not separator:
        raise InputError("an empty separator", "what stands between a feature's name and its value", 'separator="_"')
    if of is None:
        return [name.split(separator)[0] for name in names]
    found = []
    for name in names:
        fitting = [known for known in of if name == known or name.startswith(known + separator)]
        if not fitting:
            raise InputError(
                f"the column {name!r}", f"a column of {list(of)[:12]}, named by the feature and {separator!r}", "add its feature to of=, or give another separator="
            )
        found.append(max(fitting, key=len))
    return found


# ---- superpixels ---------------------------------------------------------------------------------------------------------------------


def superpixels(images: Any, count: int = 64, compactness: float = 0.5, rounds: int = 10) -> np.ndarray:
    """Labels of about ``count`` connected regions of similar pixels in each image, numbered from 0.

    Simple linear iterative clustering (Achanta et al., SLIC superpixels compared to state-of-the-art superpixel methods, IEEE TPAMI 34,
    2012): k-means of colour and place, from centres on a grid, each pixel choosing among the nine centres around it; then what is not
    connected to the largest piece of its cluster joins the neighbour that it shares most of its border with. No chance is involved.

    Args:
        images: (n, rows, columns), or with channels on the second or the last axis.
        compactness: weight of place against colour, for distances in units of the grid and of the image's standard deviation.
        rounds: of k-means.

    Returns labels in the shape of the images: the channels of a pixel share its label.

    >>> superpixels(np.repeat([[[0.0, 1.0]]], 8, axis=1).repeat(4, axis=2), count=2)[0, 0].tolist()
    [0, 0, 0, 0, 1, 1, 1, 1]
    """
    given = np.asarray(images.detach().float().cpu() if isinstance(images, Tensor) else images, dtype=np.float64)
    if given.ndim not in (3, 4) or not given.size or not np.isfinite(given).all():
        raise InputError(
            f"images of shape {given.shape}{'' if np.isfinite(given).all() else ' with NaN or infinity'}", "(n, rows, columns), or with channels", "image[None]"
        )
    if count < 1 or not compactness > 0 or rounds < 1:
        raise InputError(f"count={count}, compactness={compactness}, rounds={rounds}", "positive numbers", "superpixels(images, 64)")
    axis = channel_axis(given.shape, "image")
    colours = given[:, None] if axis is None else np.moveaxis(given, axis, 1)
    labels = np.stack([_connected(_clustered(image, int(count), compactness, rounds)) for image in colours])
    return labels if axis is None else np.repeat(np.expand_dims(labels, axis), given.shape[axis], axis)


def _clustered(image: np.ndarray, count: int, compactness: float, rounds: int) -> np.ndarray:
    """(rows, columns) the number of each pixel's cluster, for an image (channels, rows, columns)."""
    _, height, width = image.shape
    down = int(np.clip(round(np.sqrt(count * height / width)), 1, min(count, height)))
    across = int(np.clip(round(count / down), 1, width))
    y, x = np.mgrid[:height, :width].astype(np.float64)
    spread = image.std() or 1.0
    place = compactness * np.stack([y * down / height, x * across / width])
    points = np.concatenate([image / spread, place]).reshape(len(image) + 2, -1)  # (channels + 2, pixels)
    home_y, home_x = (y * down / height).astype(int), (x * across / width).astype(int)
    steps = [(0, 0), *((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0))]  # at a tie a pixel stays at home
    around = np.stack([np.clip(home_y + a, 0, down - 1) * across + np.clip(home_x + b, 0, across - 1) for a, b in steps]).reshape(9, -1)
    labels = around[0]
    for _ in range(rounds):
        sizes = np.bincount(labels, minlength=down * across)
        centres = np.stack([np.bincount(labels, row, minlength=down * across) for row in points]) / np.maximum(sizes, 1)
        centres[:, sizes == 0] = np.inf
        distances = np.stack([((points - centres[:, candidate]) ** 2).sum(0) for candidate in around])
        chosen = np.take_along_axis(around, distances.argmin(0)[None], 0)[0]
        if (chosen == labels).all():
            break
        labels = chosen
    return labels.reshape(height, width)


def _connected(labels: np.ndarray) -> np.ndarray:
    """Every label one connected piece (4 neighbours), numbered from 0 in reading order."""
    first, second = _neighbours(labels.shape)
    flat = labels.ravel()
    alike = flat[first] == flat[second]
    graph = coo_array((np.ones(alike.sum(), dtype=np.int8), (first[alike], second[alike])), shape=(flat.size, flat.size))
    count, piece = connected_components(graph, directed=False)
    sizes, owner = np.bincount(piece, minlength=count), np.zeros(count, dtype=np.int64)
    owner[piece] = flat
    largest_first = np.argsort(-sizes, kind="stable")
    clusters, place = np.unique(owner[largest_first], return_index=True)
    home = np.full(count, -1)  # the cluster that a piece ends up in: its own where it is the largest of it
    home[largest_first[place]] = clusters
    borders = _borders(piece[first], piece[second], count)
    while (home < 0).any():
        settled = home.copy()
        for k in np.flatnonzero(settled < 0):
            beside, shared = borders[k]
            known = settled[beside] >= 0
            if known.any():
                home[k] = np.bincount(settled[beside[known]], shared[known]).argmax()
    return _in_order(home[piece]).reshape(labels.shape)


def _neighbours(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    number = np.arange(shape[0] * shape[1]).reshape(shape)
    return np.concatenate([number[:-1].ravel(), number[:, :-1].ravel()]), np.concatenate([number[1:].ravel(), number[:, 1:].ravel()])


def _borders(one: np.ndarray, other: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each piece its neighbours, and how many sides of pixels it shares with each."""
    apart = one != other
    a, b = np.concatenate([one[apart], other[apart]]), np.concatenate([other[apart], one[apart]])
    pairs = coo_array((np.ones(len(a)), (a, b)), shape=(count, count)).tocsr()
    pairs.sum_duplicates()
    return [(pairs.indices[s:t], pairs.data[s:t]) for s, t in zip(pairs.indptr[:-1], pairs.indptr[1:], strict=True)]


def _in_order(labels: np.ndarray) -> np.ndarray:
    """The same labels, numbered by where they appear first."""
    _, start, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(start))[inverse]


# ---- regions in order ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ranking:
    """Regions of n images, those with the most attribution per pixel first.

    Args:
        heat: (n, rows, columns) for each pixel the attribution per pixel of the region that it was taken with.
        step: (n, rows, columns) at which step it was taken, from 0.
        gains, areas: for each image, step by step: attribution per newly covered pixel, and the share of the pixels covered so far.
        regions: for each image, step by step: the number of the map of labels, and the label in it.
    """

    heat: np.ndarray
    step: np.ndarray
    gains: tuple[np.ndarray, ...]
    areas: tuple[np.ndarray, ...]
    regions: tuple[tuple[tuple[int, int], ...], ...]

    def mask(self, share: float) -> np.ndarray:
        """(n, rows, columns) the first regions of each image that together cover at most this share of it, at least the first."""
        if not 0 < share <= 1:
            raise InputError(f"mask({share})", "a share of the pixels, above 0 and at most 1", "mask(0.2)")
        last = [max(int(np.searchsorted(area, share * (1 + 1e-12), side="right")), 1) for area in self.areas]
        return self.step < np.array(last)[:, None, None]


def ranked(scores: FeatureScores, labels: Any) -> Ranking:
    """Regions in the order in which they carry the prediction: again and again the one with the most attribution per pixel not yet covered.

    This is XRAI (Kapishnikov et al. 2019, arXiv 1906.02825, algorithm 1) as a step after any attribution. The paper's own are Integrated
    Gradients averaged over a black and a white baseline, ``baseline=hw.baselines.average(hw.baselines.constant(0.0), hw.baselines.constant(1.0))``,
    and overlapping regions of several sizes: ``labels=[superpixels(images, k) for k in (16, 64, 256)]``.

    Args:
        scores: of images, one input; channels are summed.
        labels: a map (rows, columns) or (n, rows, columns), or a list of maps, whose regions may overlap those of other maps.
    """
    found = views(scores)
    if len(found) != 1 or found[0].kind != "image":
        raise InputError(f"attributions of {len(found)} inputs of kind {', '.join(view.kind for view in found)}", "of one input that holds images", "explain images")
    values = found[0].values.astype(np.float64)
    axis = channel_axis(values.shape, "image")
    values = values if axis is None else values.sum(axis)
    maps = [_map(one, values.shape, axis) for one in (labels if isinstance(labels, list | tuple) else [labels])]
    if not maps:
        raise InputError("no maps of labels", "at least one", "labels=hw.regions.superpixels(images)")
    rows = [_greedy(v, [m[k] for m in maps]) for k, v in enumerate(values)]
    return Ranking(np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows]), *(tuple(r[k] for r in rows) for k in (2, 3, 4)))


def _map(labels: Any, shape: tuple[int, ...], axis: int | None) -> np.ndarray:
    """(n, rows, columns), numbers from 0; of labels that go on through the channels, those of the first."""
    given = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if axis is not None and given.ndim == 4:
        if (given != given.take([0], axis)).any():
            raise InputError("a map whose labels differ between the channels of a pixel", "one label for each pixel", "rank regions of pixels")
        given = given.take(0, axis)
    if given.dtype.kind not in "iu" or given.shape not in (shape, shape[1:]):
        raise InputError(f"a map of labels of shape {given.shape} and type {given.dtype}", f"whole numbers, {shape[1:]} or {shape}", "hw.regions.superpixels(images)")
    return np.broadcast_to(np.unique(given, return_inverse=True)[1].reshape(given.shape), shape)


def _greedy(values: np.ndarray, maps: list[np.ndarray]) -> tuple[Any, ...]:
    """Of one image: heat, step, gains, areas and regions."""
    flat, codes = values.ravel(), [m.ravel() for m in maps]
    counts = [int(c.max()) + 1 for c in codes]
    sums = [np.bincount(c, flat, minlength=k) for c, k in zip(codes, counts, strict=True)]
    sizes = [np.bincount(c, minlength=k) for c, k in zip(codes, counts, strict=True)]
    heat, step, left = np.zeros(flat.size), np.full(flat.size, -1), flat.size
    gains: list[float] = []
    areas: list[float] = []
    regions: list[tuple[int, int]] = []
    while left:
        density = np.concatenate([np.where(n > 0, s / np.maximum(n, 1), -np.inf) for s, n in zip(sums, sizes, strict=True)])
        best = int(density.argmax())
        which = int(np.searchsorted(np.cumsum(counts), best, side="right"))
        label = best - sum(counts[:which])
        taken = np.flatnonzero((codes[which] == label) & (step < 0))
        gain = float(flat[taken].mean())
        heat[taken], step[taken] = gain, len(gains)
        for c, k, s, n in zip(codes, counts, sums, sizes, strict=True):
            s -= np.bincount(c[taken], flat[taken], minlength=k)
            n -= np.bincount(c[taken], minlength=k)
        left -= len(taken)
        gains.append(gain)
        areas.append(1 - left / flat.size)
        regions.append((which, label))
    return heat.reshape(values.shape), step.reshape(values.shape), np.array(gains), np.array(areas), tuple(regions)
