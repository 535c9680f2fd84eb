"""Attributions input by input: what each input is (an image, a table, a text, a series), and what its parts are called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from headwater.result.arrays import called, flattened, leaves

if TYPE_CHECKING:
    from headwater.result.features import FeatureScores

KINDS = ("image", "table", "text", "series", "array")
SMALLEST = 8  # a matrix with fewer rows or columns is a table of numbers or a series, not a picture
PLACES = {"image": ("channel", "row", "column"), "series": ("channel", "time")}


@dataclass(frozen=True, eq=False)
class View:
    """The attributions to one input.

    Args:
        name: of the input, '' where there is one.
        values, stderr: (n, ...) and its standard errors or None.
        inputs, reference: of any shape that begins with n, or None.
        kind: one of ``KINDS``; axes: what the axes after the first are called; feature_names: of the last axis, or None.
        tokens: for each example, or None.
    """

    name: str
    values: np.ndarray
    stderr: np.ndarray | None
    inputs: np.ndarray | None
    reference: np.ndarray | None
    kind: str
    axes: tuple[str, ...]
    feature_names: tuple[str, ...] | None
    tokens: tuple[tuple[str, ...], ...] | None

    @property
    def flat(self) -> np.ndarray:
        """(n, parts) float64."""
        return flattened(self.values).astype(np.float64)

    def parts(self, example: int | None = None) -> list[str]:
        """What each part is called, in the order of :attr:`flat`; tokens are those of one example."""
        return [self.part(j, example) for j in range(math.prod(self.values.shape[1:]))]

    def part(self, j: int, example: int | None = None) -> str:
        """What the part in place j of :attr:`flat` is called."""
        before = f"{self.name}: " if self.name else ""
        if self.tokens is not None and self.values.ndim == 2 and example is not None and j < len(self.tokens[example]):
            return f"{before}{self.tokens[example][j]} ({j})"
        return before + self._place(tuple(map(int, np.unravel_index(j, self.values.shape[1:]))))

    def _place(self, index: tuple[int, ...]) -> str:
        sizes, last = self.values.shape[1:], len(index) - 1
        words = [f"{self.axes[a]} {k}" for a, k in enumerate(index) if sizes[a] > 1 and not (self.feature_names and a == last)]
        if self.feature_names:
            words.append(self.feature_names[index[-1]])
        return ", ".join(words) or f"{self.axes[-1]} {index[-1]}"

    def like_values(self, name: str) -> np.ndarray | None:
        """The inputs or the reference as numbers (n, parts) where each belongs to one part, else None."""
        given = getattr(self, name)
        if given is None or given.dtype.kind not in "biuf" or given.shape[1:] != self.values.shape[1:]:
            return None
        return flattened(np.broadcast_to(given, self.values.shape))


def views(scores: FeatureScores) -> list[View]:
    """The attributions input by input."""
    values, names = leaves(scores.values), called(scores.values)
    spread, inputs, reference = (_beside(values, given) for given in (scores.stderr, scores.inputs, scores.reference))
    return [_view(scores, *row) for row in zip(names, values, spread, inputs, reference, strict=True)]


def _beside(values: Sequence[np.ndarray], given: object) -> Sequence[np.ndarray | None]:
    """One for each array of the values; None for those that it has none for."""
    found = [None] if given is None else list(leaves(given))  # type: ignore[arg-type]
    return found if len(found) == len(values) else [None] * len(values)


def _view(scores: FeatureScores, name: str, values: np.ndarray, stderr: np.ndarray | None, inputs: np.ndarray | None, reference: np.ndarray | None) -> View:
    if values.ndim == 1:  # one number for each example is a table of one column
        values, stderr, inputs, reference = (a[:, None] if a is not None and a.ndim == 1 else a for a in (values, stderr, inputs, reference))  # type: ignore[assignment]
    names = scores.feature_names
    tokens = scores.tokens if scores.tokens is not None and values.ndim >= 2 and all(len(t) <= values.shape[1] for t in scores.tokens) else None
    kind = scores.kind if scores.kind in KINDS and possible(scores.kind, values.shape, tokens is not None) else "array"
    kind = kind_of(values.shape, tokens is not None) if kind == "array" else kind
    fits = names if names is not None and len(names) == values.shape[-1] else None
    return View(name, values, stderr, inputs, reference, kind, _axes(kind, values.shape, fits is not None), fits, tokens if kind == "text" else None)


def possible(kind: str, shape: tuple[int, ...], tokens: bool) -> bool:
    """Whether values of a shape can be of a kind."""
    ways = {"image": len(shape) in (3, 4), "table": len(shape) in (1, 2), "text": tokens and len(shape) in (2, 3), "series": len(shape) in (2, 3)}
    return ways.get(kind, True)


def kind_of(shape: tuple[int, ...], tokens: bool = False) -> str:
    """What values of a shape are, where nothing is said.

    >>> kind_of((5, 1, 28, 28)), kind_of((5, 28, 28)), kind_of((5, 8)), kind_of((5, 3, 100)), kind_of((5, 64, 7, 7)), kind_of((5, 8), tokens=True)
    ('image', 'image', 'table', 'series', 'array', 'text')
    """
    if tokens and len(shape) in (2, 3):
        return "text"
    if len(shape) == 4 and (_channelled(shape, 1) or _channelled(shape, 3)):
        return "image"
    if len(shape) == 3:
        return "image" if min(shape[1:]) >= SMALLEST else "series"
    return "table" if len(shape) in (1, 2) else "array"


def _channelled(shape: tuple[int, ...], axis: int) -> bool:
    return shape[axis] in (1, 3) and min(k for a, k in enumerate(shape) if a not in (0, axis)) >= SMALLEST


def channel_axis(shape: tuple[int, ...], kind: str, named: bool = False) -> int | None:
    """Which axis holds the channels: of images the first after the examples, unless only the last has 1 or 3; of series the first
    if it is not the longer one, unless the last axis has names. None where there are none.

    >>> channel_axis((5, 3, 9, 9), "image"), channel_axis((5, 9, 9, 3), "image"), channel_axis((5, 100, 6), "series"), channel_axis((5, 100), "series")
    (1, 3, 2, None)
    """
    if kind == "image":
        return None if len(shape) == 3 else 3 if shape[3] in (1, 3) and shape[1] not in (1, 3) else 1
    if kind == "series" and len(shape) == 3:
        return 2 if named or shape[1] > shape[2] else 1
    return None


def _axes(kind: str, shape: tuple[int, ...], named: bool) -> tuple[str, ...]:
    if kind in PLACES:
        channel, *rest = PLACES[kind]
        axis = channel_axis(shape, kind, named)
        if axis is not None:
            rest.insert(axis - 1, channel)
        return tuple(rest)
    if kind == "text":
        return ("position", "dimension")[: len(shape) - 1]
    return ("feature",)[: len(shape) - 1] if kind == "table" else tuple(f"axis {k}" for k in range(1, len(shape)))


def part_name(found: Sequence[View], j: int, example: int | None = None) -> str:
    """What the part in place j of all inputs in a row is called."""
    for view in found:
        size = math.prod(view.values.shape[1:])
        if j < size:
            return view.part(j, example)
        j -= size
    raise IndexError(j)
