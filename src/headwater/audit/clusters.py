"""Kinds of mistakes: the explanations of errors, grouped by what carried them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater import report
from headwater.errors import InputError
from headwater.evaluate.means import written
from headwater.evaluate.parts import arrays_of, parts_of
from headwater.result import FeatureScores
from headwater.result.views import part_name, views

RESTARTS = 8


@dataclass(frozen=True, eq=False)
class Clusters:
    """Groups of explanations (see :func:`clusters`).

    ``group`` (n,): of each example, -1 for those that were not asked about; groups are numbered by falling size. ``centres`` (k, parts): mean
    directions. ``silhouette``: how far apart they are, from -1 to 1; ``unstructured``: what explanations without any groups reach (95 % of shuffles lie
    below). Where the former is not above the latter there is one group. ``nearest`` : for each group its examples, the most typical first.
    """

    group: np.ndarray
    centres: np.ndarray
    silhouette: float
    unstructured: float
    nearest: tuple[np.ndarray, ...]
    top: tuple[tuple[tuple[str, float], ...], ...]

    def __len__(self) -> int:
        return len(self.centres)

    def __repr__(self) -> str:
        said = [
            f"group {g}: {len(rows)} examples ({', '.join(map(str, rows[:3]))}, ...), carried by {', '.join(name for name, _ in parts[:3])}"
            for g, (rows, parts) in enumerate(zip(self.nearest, self.top, strict=True))
        ]
        return f"Clusters({'; '.join(said)}; silhouette {written(self.silhouette)}, without structure {written(self.unstructured)})"

    @property
    def table(self) -> report.Table:
        """One row for each group, for a report."""
        rows = [
            (str(g), str(len(rows)), ", ".join(map(str, rows[:5])), ", ".join(f"{name} {score:+.2f}" for name, score in parts[:5]))
            for g, (rows, parts) in enumerate(zip(self.nearest, self.top, strict=True))
        ]
        return report.Table(("group", "examples", "most typical", "carried by"), tuple(rows))


def clusters(scores: Any, mistakes: Any = None, *, k: int | None = None, parts: Any = None, most: int = 8, shuffles: int = 20, seed: int = 0) -> Clusters:
    """Group the explanations of mistakes by what carried them: spherical k-means (Dhillon and Modha 2001) of the attribution vectors.

    Vectors are brought to length 1, so that strong and weak predictions of one kind fall together. The number of groups has the largest mean
    silhouette (Rousseeuw 1987, cosine distance), and is one where shuffling every part's values over the examples, which leaves no groups, gives as much.

    Args:
        scores: FeatureScores or arrays: of the predicted class, or of the loss (``target=hw.targets.loss(...)``: what made it wrong).
        mistakes: (n,) booleans or numbers, which examples to group; default: all.
        k: how many groups; default: chosen, from 2 to ``most``. parts: as in ``hotspots``; coarse parts (4) are easier to group than pixels.

    Raises InputError for fewer than four mistakes.
    """
    values = arrays_of(scores)
    n = len(values[0])
    chosen = np.arange(n) if mistakes is None else np.asarray(mistakes.cpu() if isinstance(mistakes, Tensor) else mistakes)
    chosen = np.flatnonzero(chosen) if chosen.dtype == bool and chosen.shape == (n,) else chosen
    if chosen.ndim != 1 or len(chosen) < 4 or chosen.dtype.kind not in "iu" or chosen.min() < 0 or chosen.max() >= n:
        raise InputError(f"{len(chosen)} mistakes of {n} examples", "four or more, as numbers or one True or False for each", "wrong = predicted != labels")
    if k is not None and not 1 <= k < len(chosen):
        raise InputError(f"k={k} of {len(chosen)} examples", "at least 1 and fewer than there are", "leave it out to choose")
    held = parts_of(values, tuple(torch.from_numpy(v) for v in values), parts).scores[chosen]
    rows = _unit(held)
    rng = np.random.default_rng(seed)
    group, quality = _chosen(rows, k, most, rng)
    without = np.array([_chosen(_unit(rng.permuted(held, axis=0)), k, most, rng)[1] for _ in range(shuffles)]) if k != 1 else np.zeros(1)
    limit = float(np.quantile(without, 0.95))
    if k is None and quality <= limit:
        group = np.zeros(len(rows), int)
    order = np.argsort(-np.bincount(group), kind="stable")
    group = np.argsort(order)[group]
    centres = np.array([rows[group == g].mean(0) for g in range(len(order))])
    nearest = tuple(chosen[group == g][np.argsort(-(rows[group == g] @ centre), kind="stable")] for g, centre in enumerate(centres))
    whole = np.full(n, -1)
    whole[chosen] = group
    return Clusters(whole, centres, quality, limit, nearest, tuple(_strongest(scores, centre, parts) for centre in centres))


def _unit(rows: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, size, out=np.zeros_like(rows), where=size > 0)


def _chosen(rows: np.ndarray, k: int | None, most: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """The grouping with the best silhouette."""
    tried = [k] if k is not None else range(2, min(most, len(rows) - 1) + 1)
    found = [_kmeans(rows, one, rng) for one in tried]
    quality = [_silhouette(rows, group) for group in found]
    best = int(np.argmax(quality))
    return found[best], quality[best]


def _kmeans(rows: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Groups of unit vectors that are closest to their own mean direction, the best of several starts."""
    best, least = np.zeros(len(rows), int), -np.inf
    for _ in range(RESTARTS):
        centres = _starts(rows, k, rng)
        group = np.full(len(rows), -1)
        for _ in range(100):
            now = (rows @ centres.T).argmax(1)
            if np.array_equal(now, group):
                break
            group = now
            centres = np.array([_unit(rows[group == g].sum(0, keepdims=True))[0] if (group == g).any() else rows[rng.integers(len(rows))] for g in range(k)])
        fit = float((rows * centres[group]).sum())
        if fit > least:
            best, least = group, fit
    return np.unique(best, return_inverse=True)[1]


def _starts(rows: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Far from each other, with chance in proportion to the distance (k-means++, Arthur and Vassilvitskii 2007)."""
    picked = [int(rng.integers(len(rows)))]
    while len(picked) < k:
        far = np.maximum(1 - (rows @ rows[picked].T).max(1), 0)
        far[picked] = 0
        picked.append(int(rng.choice(len(rows), p=far / far.sum())) if far.sum() > 0 else int(rng.integers(len(rows))))
    return rows[picked]


def _silhouette(rows: np.ndarray, group: np.ndarray) -> float:
    """Mean of ``(b - a) / max(a, b)``: a the mean cosine distance to the own group, b to the nearest other; 0 for an example alone in its group."""
    count = np.bincount(group)
    if len(count) < 2:
        return 0.0
    distance = 1 - rows @ rows.T
    np.fill_diagonal(distance, 0)
    sums = distance @ np.eye(len(count))[group]
    own = sums[np.arange(len(rows)), group] / np.maximum(count[group] - 1, 1)
    away = sums / count
    away[np.arange(len(rows)), group] = np.inf
    other = away.min(1)
    return float(np.where(count[group] > 1, (other - own) / np.maximum(np.maximum(own, other), 1e-300), 0).mean())


def _strongest(scores: Any, centre: np.ndarray, parts: Any) -> tuple[tuple[str, float], ...]:
    order = np.argsort(-np.abs(centre), kind="stable")[:10]
    found = views(scores) if isinstance(scores, FeatureScores) and parts is None else None
    return tuple((part_name(found, int(j)) if found else f"part {j}", float(centre[j])) for j in order)
