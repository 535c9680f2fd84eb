"""What a page is made of: plain frozen records, no markup. ``page`` turns them into html and ``text`` into a terminal's text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from headwater.errors import InputError
from headwater.report.explanations import Explanation, Overlay


class Figure(NamedTuple):
    """A key figure: what it is, its value as it should be read, and a line of context."""

    name: str
    value: str
    note: str = ""


class Bar(NamedTuple):
    """A measured value with its interval (``low`` to ``high``, both or neither). ``value=None`` says that it was not measured."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""


class Line(NamedTuple):
    """A value to read bars against, such as a noise ceiling."""

    label: str
    value: float


class Axis(NamedTuple):
    """An axis of a curve. ``form="percent"`` writes .25 as 25 %. ``low`` and ``high`` widen the range that the points span."""

    label: str
    low: float | None = None
    high: float | None = None
    form: Literal["number", "percent"] = "number"


class Series(NamedTuple):
    """A named line of a curve. ``role="reference"`` draws it thin and dotted (what chance would do, the best there could be)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    role: Literal["measured", "reference"] = "measured"


@dataclass(frozen=True)
class Prose:
    """Paragraphs, separated by empty lines."""

    text: str


@dataclass(frozen=True)
class Figures:
    """Key figures, large. ``rows``: :class:`Figure`, or (name, value, note)."""

    rows: tuple[Figure, ...]

    def __post_init__(self) -> None:
        _set(self, "rows", _records(Figure, self.rows))


@dataclass(frozen=True)
class Bars:
    """Bars on one axis that begins at zero, with whiskers, and lines to read them against.

    Args:
        rows: :class:`Bar`, or (label, value, low, high, note).
        lines: :class:`Line`, or (label, value): a noise ceiling, chance.
        axis: what is measured, in words.
        best: the label of the bar to set off; default: the largest value. ``""`` sets none off.

    >>> Bars((("Grad-Dot", .12), ("SOURCE", .42, .37, .47)), lines=(("noise ceiling", .7),), axis="LDS").leader
    1
    """

    rows: tuple[Bar, ...]
    lines: tuple[Line, ...] = ()
    axis: str = ""
    best: str | None = None

    def __post_init__(self) -> None:
        _set(self, "rows", _records(Bar, self.rows))
        _set(self, "lines", _records(Line, self.lines))
        for bar in self.rows:
            if (bar.low is None) != (bar.high is None):
                raise InputError(f"The bar {bar.label!r} has one end of an interval.", "low and high, or neither")
        if self.best and self.best not in [bar.label for bar in self.rows]:
            raise InputError(f"best={self.best!r} is no bar.", f"one of {[bar.label for bar in self.rows]}, '' for none, or nothing for the largest")

    @property
    def leader(self) -> int | None:
        """Which bar is set off; None where none stands out."""
        if self.best is not None:
            return next((k for k, bar in enumerate(self.rows) if bar.label == self.best), None)
        values = [-math.inf if bar.value is None or math.isnan(bar.value) else bar.value for bar in self.rows]
        top = max(values, default=-math.inf)
        return values.index(top) if values.count(top) == 1 and top > min(values) else None


@dataclass(frozen=True)
class Curve:
    """Lines over one pair of axes.

    Args:
        series: :class:`Series`, or (name, x, y). A y that is None or NaN is a gap in the line.
        x, y: :class:`Axis`, or its label.

    >>> curve = Curve((("ours", [0, .5, 1], [0, .9, 1]), ("chance", [0, 1], [0, 1], "reference")), "checked", Axis("found", form="percent"))
    >>> curve.series[1].role, curve.x.label
    ('reference', 'checked')
    """

    series: tuple[Series, ...]
    x: Axis
    y: Axis

    def __post_init__(self) -> None:
        _set(self, "series", tuple(Series(s[0], _numbers(s[1]), _numbers(s[2]), *s[3:]) for s in self.series))
        _set(self, "x", Axis(self.x) if isinstance(self.x, str) else Axis(*self.x))
        _set(self, "y", Axis(self.y) if isinstance(self.y, str) else Axis(*self.y))
        for s in self.series:
            if len(s.x) != len(s.y) or not s.x:
                raise InputError(f"The series {s.name!r} has {len(s.x)} x and {len(s.y)} y values.", "as many of one as of the other, at least one")
            if s.role not in ("measured", "reference"):
                raise InputError(f"The series {s.name!r} has the role {s.role!r}.", "'measured' or 'reference'")
        for axis in (self.x, self.y):
            if axis.form not in ("number", "percent"):
                raise InputError(f"The axis {axis.label!r} has the form {axis.form!r}.", "'number' or 'percent'")


@dataclass(frozen=True)
class Table:
    """A table of texts; cells that are numbers line up at the right. Every row has as many cells as ``columns``."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        _set(self, "columns", tuple(map(str, self.columns)))
        _set(self, "rows", tuple(tuple(map(str, row)) for row in self.rows))
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InputError(f"A row of the table has {len(row)} cells: {row}", f"{len(self.columns)}: {self.columns}")


@dataclass(frozen=True)
class Strip:
    """A heat strip: values along an axis, such as timesteps, as shades of one row.

    Args:
        values: signed, from the axis's start to its end.
        axis: what it runs along, with its ends ("from clean to noise").

    >>> Strip((0.5, -0.25), "from clean to noise").limit
    0.5
    """

    values: tuple[float, ...]
    axis: str = ""

    def __post_init__(self) -> None:
        _set(self, "values", _numbers(self.values))
        if not self.values:
            raise InputError("a heat strip without values", "at least one", "one value for each place of its axis")

    @property
    def limit(self) -> float:
        """The size at which shades are full: the largest; 1 where there is none."""
        return max((abs(v) for v in self.values if math.isfinite(v)), default=0.0) or 1.0


@dataclass(frozen=True, eq=False)
class Card:
    """One example: a query or a training example.

    Args:
        title: what it is called (``"#412"``).
        subtitle: its label, or what the model said.
        image: uint8, (height, width) or (height, width, 3), or None.
        text: the example itself where it is a text, or None.
        score: its signed score, or None (a query has none).
        stderr: standard error of the score, in its unit, or None.
        flag: something to notice ("label was flipped"), or None.
        overlay: which of its pixels carried what is asked about, drawn under the image; or None.
        strip: what its score is made of, along an axis, drawn under the image; or None.
        badge: something to know that is no warning ("in 3 of 24 lists"), or None.

    >>> Card("#412", "label 3", image=np.zeros((28, 28), np.uint8), score=.5, stderr=.1, flag="label was flipped").interval
    (0.3, 0.7)
    """

    title: str
    subtitle: str = ""
    image: np.ndarray | None = None
    text: str | None = None
    score: float | None = None
    stderr: float | None = None
    flag: str | None = None
    overlay: Overlay | None = None
    strip: Strip | None = None
    badge: str | None = None

    def __post_init__(self) -> None:
        if self.image is not None:
            picture = np.asarray(self.image)
            if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] == 3)) or not picture.size:
                raise InputError(
                    f"The image of {self.title!r} has shape {picture.shape} and type {picture.dtype}.",
                    "uint8 (height, width) or (height, width, 3)",
                    "for floats in 0..1: (image * 255).astype('uint8'); for (3, height, width): image.transpose(1, 2, 0)",
                )
            _set(self, "image", picture)
        for name in ("score", "stderr"):
            if getattr(self, name) is not None:
                _set(self, name, float(getattr(self, name)))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Two standard errors each way; None where there is no finite one."""
        if self.score is None or self.stderr is None or not math.isfinite(self.score) or not math.isfinite(self.stderr):
            return None
        return self.score - 2 * self.stderr, self.score + 2 * self.stderr

    @property
    def doubtful(self) -> bool:
        """Whether the interval covers zero."""
        return self.interval is not None and self.interval[0] <= 0 <= self.interval[1]


@dataclass(frozen=True, eq=False)
class Attribution:
    """A query, the training examples that pushed its measurement up most (``proponents``, strongest first) and those that pushed it
    down most (``opponents``, strongest first). Bars of all its cards share one scale.

    >>> Attribution(Card("#7", "predicted 3"), proponents=(Card("#412", score=.5),), opponents=(Card("#9", score=-2.0),)).scale
    2.0
    """

    query: Card
    proponents: tuple[Card, ...] = ()
    opponents: tuple[Card, ...] = ()

    def __post_init__(self) -> None:
        _set(self, "proponents", tuple(self.proponents))
        _set(self, "opponents", tuple(self.opponents))

    @property
    def scale(self) -> float:
        """The farthest that a bar or a whisker reaches; 1 where none does."""
        return _scale(self.proponents + self.opponents)


@dataclass(frozen=True, eq=False)
class Gallery:
    """Cards side by side, without a query: a sample of what a ranking found. Bars share one scale."""

    cards: tuple[Card, ...]

    def __post_init__(self) -> None:
        _set(self, "cards", tuple(self.cards))

    @property
    def scale(self) -> float:
        """The farthest that a bar or a whisker reaches; 1 where none does."""
        return _scale(self.cards)


@dataclass(frozen=True, eq=False)
class Ranking:
    """Examples in the order that something put them, strongest first. ``title`` and ``note``: what did, and what it goes by."""

    title: str
    cards: tuple[Card, ...]
    note: str = ""

    def __post_init__(self) -> None:
        _set(self, "cards", tuple(self.cards))

    @property
    def scale(self) -> float:
        """The farthest that a bar or a whisker of it reaches; 1 where none does."""
        return _scale(self.cards)


@dataclass(frozen=True, eq=False)
class Rankings:
    """Several rankings under each other, each with a scale of its own: a query and what each method puts first, say.

    Args:
        rows: :class:`Ranking`, or (title, cards, note).
        query: what they are about, or None.
        beside: :class:`Ranking` to stand under the query, such as its nearest example in pixels; or None.

    >>> len(Rankings((("TracIn", (Card("#1"),)), ("ReTrac", (Card("#2"),))), Card("a generation")).rows)
    2
    """

    rows: tuple[Ranking, ...]
    query: Card | None = None
    beside: Ranking | None = None

    def __post_init__(self) -> None:
        _set(self, "rows", tuple(row if isinstance(row, Ranking) else Ranking(*row) for row in self.rows))
        if self.beside is not None and self.query is None:
            raise InputError(f"Rankings with {self.beside.title!r} beside no query.", "a query", "make it a row of its own")


Part = Prose | Figures | Bars | Curve | Table | Attribution | Gallery | Rankings | Explanation


@dataclass(frozen=True, eq=False)
class Section:
    """A heading, a paragraph or more under it, and its parts. An empty title makes an opening without a heading."""

    title: str
    text: str = ""
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        _set(self, "parts", tuple(self.parts))


@dataclass(frozen=True, eq=False)
class Page:
    """A whole report.

    Args:
        title, subtitle: the heading and one sentence under it.
        sections: in order.
        footer: where the numbers come from: (name, value) rows, or a text.
    """

    title: str
    subtitle: str = ""
    sections: tuple[Section, ...] = ()
    footer: tuple[tuple[str, str], ...] | str = field(default=())

    def __post_init__(self) -> None:
        _set(self, "sections", tuple(self.sections))
        if not isinstance(self.footer, str):
            _set(self, "footer", tuple((str(name), str(value)) for name, value in self.footer))


def _set(record: Any, name: str, value: Any) -> None:
    object.__setattr__(record, name, value)


def _scale(cards: Iterable[Card]) -> float:
    ends = [end for card in cards if card.score is not None for end in (card.score, *(card.interval or ()))]
    return max((abs(end) for end in ends if math.isfinite(end)), default=0.0) or 1.0


def _records(kind: Any, rows: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(kind(*row) for row in rows)


def _numbers(values: Iterable[Any]) -> tuple[float, ...]:
    return tuple(math.nan if v is None else float(v) for v in values)
