"""Parts that show which pieces of an input carried an output: plain frozen records like those in ``parts``.

In all of them a positive score pushed the output up and a negative one pushed it down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from headwater.errors import InputError

BEGINS = "Ġ▁"  # how tokenizers of bytes and of sentence pieces write the space before a word
CLIP = 99.0  # percentile of the sizes at which colour is full: a few extreme pixels would leave the rest of a picture blank


class Step(NamedTuple):
    """One step of a waterfall: what it is, how far it moved the output, a note (the feature's value) and the standard error."""

    name: str
    score: float
    note: str = ""
    stderr: float | None = None


class Dots(NamedTuple):
    """One row of a swarm: a feature, its score in each example, and the rank of its value there (0 lowest, 1 highest, NaN unknown)."""

    name: str
    scores: Sequence[float]
    ranks: Sequence[float] | None = None
    note: str = ""


class Signal(NamedTuple):
    """One channel of a series: its values over time (or None) and their scores."""

    name: str
    values: Sequence[float] | None
    scores: Sequence[float]


@dataclass(frozen=True, eq=False)
class Overlay:
    """An image, what it was compared with, and the signed scores of its pixels laid over it.

    Args:
        title: what the example is called.
        values: (height, width) scores, channels summed. A map coarser than the image is stretched over it.
        image, baseline: uint8, (height, width) or (height, width, 3), or None.
        subtitle, flag: a line about it; something to notice.
        scale: the size at which colour is full; default: the 99th percentile of the sizes.

    >>> part = Overlay("#7", np.array([[0.5, -0.25], [0.0, 0.0]]))
    >>> round(part.limit, 4), part.up, part.down
    (0.4925, 0.5, -0.25)
    """

    title: str
    values: np.ndarray
    image: np.ndarray | None = None
    baseline: np.ndarray | None = None
    subtitle: str = ""
    flag: str | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 2 or not values.size:
            raise InputError(f"The scores of {self.title!r} have shape {values.shape}.", "(height, width)", "sum over channels: values.sum(0)")
        object.__setattr__(self, "values", values)
        for name in ("image", "baseline"):
            if (picture := getattr(self, name)) is not None:
                object.__setattr__(self, name, _picture(picture, f"The {name} of {self.title!r}"))

    @property
    def limit(self) -> float:
        """The size at which colour is full; 1 where there is no size."""
        return clipped(self.values) if self.scale is None else float(self.scale)

    @property
    def up(self) -> float:
        """The sum of all positive scores."""
        return float(self.values[self.values > 0].sum())

    @property
    def down(self) -> float:
        """The sum of all negative scores."""
        return float(self.values[self.values < 0].sum())


@dataclass(frozen=True, eq=False)
class Tokens:
    """A text piece by piece with the score of each piece.

    Args:
        title, subtitle, flag: as in a card.
        tokens: the pieces. Where none begins or ends in white space they are set apart by spaces; marks of tokenizers (``##`` continues
            a word, ``Ġ`` and ``▁`` begin one) are understood and not shown in the running text.
        scores: one each.
        stderr: one each, or None.

    >>> Tokens("#1", ("not", "bad"), (-0.2, 0.7)).limit
    0.7
    """

    title: str
    tokens: tuple[str, ...]
    scores: tuple[float, ...]
    subtitle: str = ""
    flag: str | None = None
    stderr: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(map(str, self.tokens)))
        object.__setattr__(self, "scores", _floats(self.scores))
        if self.stderr is not None:
            object.__setattr__(self, "stderr", _floats(self.stderr))
        for what, count in (("scores", len(self.scores)), ("standard errors", len(self.stderr or self.tokens))):
            if count != len(self.tokens):
                raise InputError(f"{self.title!r} has {len(self.tokens)} tokens and {count} {what}.", "as many of one as of the other")

    @property
    def limit(self) -> float:
        """The largest size; 1 where there is none."""
        return largest(self.scores)

    @property
    def pieces(self) -> tuple[tuple[str, str], ...]:
        """For each token what stands before it, nothing or a space, and how it reads.

        >>> Tokens("", ("un", "##known", "place"), (0, 0, 0)).pieces, Tokens("", ("▁a", "b"), (0, 0)).pieces
        ((('', 'un'), ('', 'known'), (' ', 'place')), (('', 'a'), ('', 'b')))
        """
        marked, written_out = any(t[:1] in BEGINS for t in self.tokens if t), any(t != t.strip() for t in self.tokens)
        pieces = []
        for k, t in enumerate(self.tokens):
            new = t[:1] in BEGINS if marked and t else not t.startswith("##") and not marked and not written_out
            shown = t[1:] if marked and t and t[0] in BEGINS else t.removeprefix("##") if not written_out else t
            pieces.append((" " if new and k else "", shown or t))
        return tuple(pieces)


@dataclass(frozen=True, eq=False)
class Waterfall:
    """The way from one output to another, feature by feature.

    Args:
        title, subtitle, flag: as in a card.
        start, end: the output at the baseline and at the input.
        steps: :class:`Step`, or (name, score, note, stderr). They lead from start to end; what is merged or left over is a step too.
        ends: what start and end are called.

    >>> Waterfall("#1", 1.0, 1.5, (("age", 0.75, "28"), ("water", -0.25))).totals
    (1.0, 1.75, 1.5)
    """

    title: str
    start: float
    end: float
    steps: tuple[Step, ...]
    subtitle: str = ""
    flag: str | None = None
    ends: tuple[str, str] = ("output at the baseline", "output")

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(Step(*step) for step in self.steps))
        gap = self.totals[-1] - self.end
        size = abs(self.start) + sum(abs(step.score) for step in self.steps)
        if math.isfinite(gap) and abs(gap) > 1e-6 * size:
            raise InputError(f"The steps of {self.title!r} lead from {self.start} to {self.totals[-1]}.", f"to {self.end}", "add what is left over as a step of its own")

    @property
    def totals(self) -> tuple[float, ...]:
        """The output before the first step, and after each."""
        found = [float(self.start)]
        for step in self.steps:
            found.append(found[-1] + step.score)
        return tuple(found)


@dataclass(frozen=True, eq=False)
class Swarm:
    """Many examples at once: a row for each feature, a dot for each example, at its score, shaded by the rank of the feature's value.

    >>> Swarm((Dots("age", (0.5, -0.25), (1.0, 0.0)),)).rows[0].name
    'age'
    """

    rows: tuple[Dots, ...]
    axis: str = ""
    column: str = ""
    """What the notes of the rows are, such as "mean size"."""

    def __post_init__(self) -> None:
        rows = tuple(Dots(*row) for row in self.rows)
        object.__setattr__(self, "rows", tuple(r._replace(scores=_floats(r.scores), ranks=None if r.ranks is None else _floats(r.ranks)) for r in rows))
        for row in self.rows:
            if row.ranks is not None and len(row.ranks) != len(row.scores):
                raise InputError(f"The row {row.name!r} has {len(row.scores)} scores and {len(row.ranks)} ranks.", "one rank for each score")


@dataclass(frozen=True, eq=False)
class Signals:
    """A series: the line of each channel, and below it how far each step in time pushed the output up or down. One scale for all.

    >>> Signals("#1", (("x", [0, 1, 2], [0.0, 0.5, -1.0]),)).limit
    1.0
    """

    title: str
    channels: tuple[Signal, ...]
    subtitle: str = ""
    flag: str | None = None
    axis: str = "step"

    def __post_init__(self) -> None:
        given = tuple(Signal(*channel) for channel in self.channels)
        made = tuple(Signal(str(c.name), None if c.values is None else _floats(c.values), _floats(c.scores)) for c in given)
        object.__setattr__(self, "channels", made)
        if not made:
            raise InputError(f"{self.title!r} has no channels.", "at least one")
        for channel in self.channels:
            if not channel.scores or (channel.values is not None and len(channel.values) != len(channel.scores)):
                given_ = f"The channel {channel.name!r} has {len(channel.values or ())} values and {len(channel.scores)} scores."
                raise InputError(given_, "one score for each value, at least one")

    @property
    def limit(self) -> float:
        """The largest size of a score; 1 where there is none."""
        return largest(score for channel in self.channels for score in channel.scores)


@dataclass(frozen=True, eq=False)
class Matrix:
    """What pairs of features did together: signed values (p, p), row and column named alike.

    Args:
        symmetric: whether ``values[i, j]`` and ``values[j, i]`` are two halves of one pair: then pairs are listed once, with their sum.

    >>> Matrix("#1", ("a", "b"), np.array([[1.0, -0.5], [-0.5, 0.0]])).pairs[0]
    ('a', 'b', -1.0)
    """

    title: str
    names: tuple[str, ...]
    values: np.ndarray
    subtitle: str = ""
    flag: str | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(map(str, self.names)))
        object.__setattr__(self, "values", np.asarray(self.values, dtype=np.float64))
        p = len(self.names)
        if self.values.shape != (p, p) or not p:
            raise InputError(f"The matrix {self.title!r} has {p} names and values of shape {self.values.shape}.", f"({p}, {p})")

    @property
    def limit(self) -> float:
        """The largest size; 1 where there is none."""
        return largest(self.values.ravel())

    @property
    def pairs(self) -> tuple[tuple[str, str, float], ...]:
        """Pairs of different features, the largest size first."""
        p = len(self.names)
        both = [(i, j, self.values[i, j] + self.values[j, i]) for i in range(p) for j in range(i + 1, p)]
        one = [(i, j, self.values[i, j]) for i in range(p) for j in range(p) if i != j]
        found = sorted(both if self.symmetric else one, key=lambda pair: -abs(pair[2]) if math.isfinite(pair[2]) else 0.0)
        return tuple((self.names[i], self.names[j], float(value)) for i, j, value in found)


Explanation = Overlay | Tokens | Waterfall | Swarm | Signals | Matrix


def largest(scores: Iterable[float]) -> float:
    """The largest finite size; 1 where there is none."""
    return max((abs(s) for s in map(float, scores) if math.isfinite(s)), default=0.0) or 1.0


def clipped(values: np.ndarray) -> float:
    """The 99th percentile of the finite sizes; the largest where that is 0; 1 where there is no size."""
    sizes = np.abs(values[np.isfinite(values)])
    if not sizes.size:
        return 1.0
    return float(np.percentile(sizes, CLIP)) or float(sizes.max()) or 1.0


def _floats(numbers: Iterable[Any]) -> tuple[float, ...]:
    return tuple(math.nan if v is None else float(v) for v in numbers)


def _picture(image: Any, whose: str) -> np.ndarray:
    picture = np.asarray(image)
    if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)) or not picture.size:
        raise InputError(f"{whose} has shape {picture.shape} and type {picture.dtype}.", "uint8 (height, width) or (height, width, 3)")
    return picture
