"""Discrete columns: where in the gap between two levels a library puts its cut changes no prediction, but it changes what the path credits.

scikit-learn cuts integers halfway (0.5), LightGBM cuts 0/1 columns at 1e-35, XGBoost on the upper level (1.0). With the cut at one end, all
rising features cross at one end of the path and all falling ones at the other. So the cuts of discrete columns move to the midpoint between levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater.errors import InputError
from headwater.features.trees.forest import CATEGORY, Forest


@dataclass(frozen=True, eq=False)
class Part:
    """Rows whose path is walked with the same cuts. notes: which columns were moved."""

    rows: np.ndarray
    cuts: np.ndarray
    moved: tuple[int, ...]


def parts(forest: Forest, x: np.ndarray, points: np.ndarray, discrete: Any, names: Sequence[str] | None) -> list[Part]:
    """The rows of x (n, p), by the cuts that their paths are walked with; points (K, 1 or n, p).

    discrete: "auto": columns all of whose cuts lie where integers are parted (at multiples of a half, or at ±1e-35), in rows where the input
    and every baseline are whole numbers; their levels are the integers. A sequence of columns (names or places): their levels are the
    integers where all values here are whole numbers, else the values that occur here. A dict column -> levels. None: no column.

    >>> from headwater.features.trees.forest import joined
    >>> stump = dict(left=np.array([1, -1, -1]), right=np.array([2, -1, -1]), feature=np.zeros(3), threshold=np.array([1e-35, 0, 0]), value=np.array([[0], [1], [2]]))
    >>> forest = joined([stump], output=None, base=np.zeros(1), features=1, library="by hand")
    >>> float(parts(forest, np.ones((1, 1)), np.zeros((1, 1, 1)), "auto", None)[0].cuts[0])
    0.5
    """
    cuts = forest.cuts
    everyone = np.arange(len(x))
    if discrete is None:
        return [Part(everyone, cuts, ())]
    if isinstance(discrete, str) and discrete != "auto":
        raise InputError(f"discrete={discrete!r}", '"auto", False, columns, or a dict of column -> levels', 'discrete="auto"')
    if isinstance(discrete, str):
        moved = _halfway(cuts)
        columns = np.array([j for j in _numeric(forest) if _parts_integers(cuts[_splits(forest, j)]) and _moves(cuts, moved, _splits(forest, j))], int)
        return _by_row(forest, x, points, cuts, moved, columns) if len(columns) else [Part(everyone, cuts, ())]
    levels = _levels(forest, x, points, discrete, names)
    cuts = cuts.copy()
    for j, known in levels.items():
        at = _splits(forest, j)
        cuts[at] = _halfway(cuts[at]) if known is None else _between(cuts[at], known)
    return [Part(everyone, cuts, tuple(levels))]


def elsewhere(forest: Forest, x: np.ndarray, points: list[np.ndarray]) -> list[int]:
    """Columns that hold whole numbers here, and at least two of them, while their cuts lie neither halfway between integers nor on them."""
    found = []
    for j in _numeric(forest):
        if _whole(x[:, j]).all() and all(_whole(p[:, j]).all() for p in points) and not _parts_integers(forest.cuts[_splits(forest, j)]):
            seen = np.concatenate([x[:, j], *(p[:, j] for p in points)])
            cuts = forest.cuts[_splits(forest, j)]
            if ((cuts > np.nanmin(seen, initial=np.inf)) & (cuts < np.nanmax(seen, initial=-np.inf))).any():
                found.append(j)
    return found


def _numeric(forest: Forest) -> list[int]:
    used = np.unique(forest.feature[forest.feature >= 0])
    asked = set(forest.feature[forest.how & CATEGORY != 0].tolist())
    return [int(j) for j in used if int(j) not in asked]


def _splits(forest: Forest, j: int) -> np.ndarray:
    return forest.feature == j


def _parts_integers(cuts: np.ndarray) -> bool:
    cuts = cuts[np.abs(cuts) < 3e38]  # others only part missing values from the rest
    halves = 2 * cuts
    return bool(((np.abs(halves - np.rint(halves)) <= 4 * np.spacing(np.abs(halves))) | (np.abs(cuts) < 1e-30)).all())


def _moves(cuts: np.ndarray, moved: np.ndarray, at: np.ndarray) -> bool:
    at = at & (np.abs(cuts) < 3e38)
    return bool((np.abs(cuts[at] - moved[at]) > 1e-9 * np.maximum(1, np.abs(cuts[at]))).any())


def _halfway(cuts: np.ndarray) -> np.ndarray:
    """To the midpoint of the two integers that a cut parts: an integer goes left if it is at most the cut."""
    return np.asarray(np.floor(cuts) + 0.5)


def _between(cuts: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """To the midpoint of the two levels that a cut parts; a cut that parts none stays."""
    place = np.searchsorted(levels, cuts, side="right")
    inside = (place > 0) & (place < len(levels))
    near = np.clip(place, 1, max(1, len(levels) - 1))
    return np.where(inside, (levels[near - 1] + levels[np.minimum(near, len(levels) - 1)]) / 2, cuts)


def _whole(values: np.ndarray) -> np.ndarray:
    return np.isnan(values) | (values == np.rint(values))


def _by_row(forest: Forest, x: np.ndarray, points: np.ndarray, cuts: np.ndarray, moved: np.ndarray, columns: np.ndarray) -> list[Part]:
    """Each row by its own values, so that what a row gets does not depend on the others."""
    fits = _whole(x[:, columns]) & _whole(points[:, :, columns]).all(0)
    patterns, kind = np.unique(fits, axis=0, return_inverse=True)
    found = []
    for k, pattern in enumerate(patterns):
        here = np.isin(forest.feature, columns[pattern])
        found.append(Part(np.flatnonzero(kind.reshape(-1) == k), np.where(here, moved, cuts), tuple(int(j) for j in columns[pattern])))
    return found


def _levels(forest: Forest, x: np.ndarray, points: np.ndarray, discrete: Any, names: Sequence[str] | None) -> dict[int, np.ndarray | None]:
    """For each column that was named: its levels, None for the integers."""
    given = discrete if isinstance(discrete, Mapping) else dict.fromkeys(_listed(discrete))
    numeric = set(_numeric(forest))
    found: dict[int, np.ndarray | None] = {}
    for column, known in given.items():
        j = _column(column, forest.features, names)
        seen = np.concatenate([x[:, j], points[:, :, j].ravel()])
        seen = np.unique(seen[~np.isnan(seen)])
        if known is not None:
            named = np.unique(forest.read(np.asarray(known, float)))
            odd = np.setdiff1d(seen, named)
            if len(odd):
                raise InputError(f"the value {odd[0]:g} in column {column!r}", f"one of its {len(named)} levels", "name every level that inputs and baselines have")
            found[j] = named
        elif j in numeric:
            found[j] = None if _whole(seen).all() else seen
    return {j: known for j, known in found.items() if j in numeric}


def _listed(discrete: Any) -> list[Any]:
    try:
        listed = list(discrete)
    except TypeError as error:
        raise InputError(f"discrete={discrete!r}", '"auto", False, a list of columns, or a dict of column -> levels', "discrete=[3, 4]") from error
    return [k for k, yes in enumerate(listed) if yes] if listed and all(isinstance(v, bool | np.bool_) for v in listed) else listed


def _column(column: Any, p: int, names: Sequence[str] | None) -> int:
    if names is not None and str(column) in names:
        return list(names).index(str(column))
    if isinstance(column, int | np.integer) and -p <= column < p:
        return int(column) % p
    raise InputError(
        f"the column {column!r} in discrete=", "a name of a column, or its place", f"names: {', '.join(list(names or ())[:8]) or 'none'}; places: 0 to {p - 1}"
    )
