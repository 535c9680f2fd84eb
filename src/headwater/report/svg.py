"""Shapes of the drawn parts. Lengths across are percentages, so that a drawing follows the width of the page and its text does not shrink.

Only geometry and classes stand here; colours and strokes are in ``style.css``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from headwater.report.markup import Child, Markup, escaped, tag
from headwater.report.numbers import percent, plain, ticks
from headwater.report.parts import Axis, Series

WIDE, HIGH = 1000.0, 400.0  # the inner units of a plot, stretched to whatever room there is


class Span(NamedTuple):
    """The range of an axis and its ticks.

    >>> Span.of([0.0, 0.46]).share(0.25)
    0.5
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Span:
        """A range with round ends that holds every finite value; 0 to 1 where there is none."""
        finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
        marks = ticks(min(finite), max(finite))
        return cls(marks[0], marks[-1], marks)

    def share(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high end."""
        # halved first: the difference of two large floats may overflow
        return (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)

    def labels(self, form: str = "number") -> list[tuple[float, str]]:
        """Each tick's place and text."""
        texts = [percent(t) for t in self.ticks] if form == "percent" else plain(self.ticks)
        return [(self.share(t), text) for t, text in zip(self.ticks, texts, strict=True)]


def drawing(*shapes: Child, class_: str, **attributes: str | float) -> Markup:
    """A drawing that stands beside its numbers, and is therefore not read aloud."""
    return tag("svg", *shapes, class_=class_, aria_hidden="true", focusable="false", **attributes)


def upright(span: Span, value: float, class_: str) -> Markup:
    """A line from top to bottom at a value."""
    return tag("line", x1=_percent(span.share(value)), x2=_percent(span.share(value)), y1="0", y2="100%", class_=class_)


def bar(span: Span, value: float | None, thick: float = 16) -> Markup:
    """A bar from zero to the value; nothing for a value that is missing or not finite."""
    if value is None or not math.isfinite(value):
        return Markup()
    start, end = sorted((span.share(0.0), span.share(value)))
    kind, centred = "bar down" if value < 0 else "bar up", f"translate(0 {-thick / 2:g})"
    return tag("rect", x=_percent(start), width=_percent(end - start), y="50%", height=thick, rx=2, transform=centred, class_=kind)


def whisker(span: Span, low: float | None, high: float | None, cap: float = 8) -> Markup:
    """The interval over a bar, with a cap at each end; drawn twice, the first time as a halo."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return Markup()
    left, right = _percent(span.share(low)), _percent(span.share(high))
    stem = [tag("line", x1=left, x2=right, y1="50%", y2="50%", class_=kind) for kind in ("halo", "whisker")]
    ends = [tag("rect", x=x, y="50%", width=1.5, height=cap, transform=f"translate(-0.75 {-cap / 2:g})", class_="cap") for x in (left, right)]
    return escaped([*stem, *ends])


def across(labels: Sequence[tuple[float, str]]) -> Markup:
    """Tick labels under a drawing. Every second one may be hidden on a narrow screen."""
    texts = [tag("text", text, x=_percent(share), y="1em", text_anchor="middle", class_="odd" if k % 2 else None) for k, (share, text) in enumerate(labels)]
    return drawing(texts, class_="across", width="100%", height=20)


def upwards(labels: Sequence[tuple[float, str]]) -> Markup:
    """Tick labels left of a plot."""
    texts = [tag("text", text, x="100%", y=_percent(1 - share), dy="0.32em", text_anchor="end") for share, text in labels]
    return drawing(texts, class_="upwards", width=7 * max(len(text) for _, text in labels) + 10, height="100%")


def plot(series: Sequence[Series], x: Span, y: Span) -> Markup:
    """The lines of a curve over its grid."""
    grid = [tag("line", x1=0, x2=WIDE, y1=HIGH * (1 - y.share(t)), y2=HIGH * (1 - y.share(t)), class_="zero" if t == 0 else "grid") for t in y.ticks]
    lines = [tag("g", _line(s, x, y), class_=name, data_testid="series") for s, name in zip(series, classes(series), strict=True)]
    # references lie under what was measured
    lines.sort(key=lambda line: "reference" not in line.split(">")[0])
    return drawing(grid, lines, class_="plot", viewBox=f"0 0 {WIDE:g} {HIGH:g}", preserveAspectRatio="none")


def classes(series: Sequence[Series]) -> list[str]:
    """How each line is drawn: its own colour and dashes, counted separately for measured lines and for references."""
    return [f"{s.role} {s.role[0]}{sum(t.role == s.role for t in series[:k]) % 6}" for k, s in enumerate(series)]


def swatch(class_: str) -> Markup:
    """A short piece of a line, for the legend."""
    return drawing(tag("g", tag("line", x1=1, x2=27, y1=5, y2=5), class_=class_), class_="swatch", width=28, height=10)


def _line(series: Series, x: Span, y: Span) -> list[Markup]:
    """One polyline between gaps. Points without a neighbour become dots, and so do all points of a short line."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in zip(series.x, series.y, strict=True):
        if all(map(math.isfinite, point)):
            runs[-1].append((WIDE * x.share(point[0]), HIGH * (1 - y.share(point[1]))))
        elif runs[-1]:
            runs.append([])
    dotted = series.role == "measured" and len(series.x) <= 12
    lines = [tag("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in run)) for run in runs if len(run) > 1]
    # a line of no length with a round end stays round however the plot is stretched
    dots = [tag("line", x1=a, x2=a, y1=b, y2=b, class_="dot") for run in runs for a, b in run if dotted or len(run) == 1]
    return lines + dots


def span_of(axis: Axis, values: Iterable[float]) -> Span:
    """The range of a curve's axis."""
    return Span.of([*values, *(end for end in (axis.low, axis.high) if end is not None)])


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def between(span: Span, start: float, end: float, thick: float = 16) -> Markup:
    """A bar from one value to another, of the side it goes to; nothing where either is not finite."""
    if not (math.isfinite(start) and math.isfinite(end)):
        return Markup()
    low, high = sorted((span.share(start), span.share(end)))
    kind = "bar up" if end > start else "bar down"
    return tag("rect", x=_percent(low), width=_percent(high - low), y="50%", height=thick, transform=f"translate(0 {-thick / 2:g})", class_=kind)


def run(values: Sequence[float], room: Span, high: float) -> list[Markup]:
    """A line over equal steps across the whole width, broken where a value is missing; a value alone is a dot."""
    step = WIDE / max(1, len(values))
    runs: list[list[str]] = [[]]
    for k, value in enumerate(values):
        if math.isfinite(value):
            runs[-1].append(f"{step * (k + 0.5):.1f},{high * (1 - room.share(value)):.1f}")
        elif runs[-1]:
            runs.append([])
    return [tag("polyline", points=" ".join(points if len(points) > 1 else points * 2)) for points in runs if points]


def columns(scores: Sequence[float], limit: float) -> list[Markup]:
    """Columns that rise from the middle where a score is positive and hang from it where it is negative, 100 units for both sides."""
    step = WIDE / max(1, len(scores))
    sides: dict[str, list[str]] = {"up": [], "down": []}
    for k, score in enumerate(scores):
        if math.isfinite(score) and score:
            tall = 48 * max(-1.0, min(1.0, score / limit))
            sides["up" if score > 0 else "down"].append(f"M{step * k:.1f} 50v{-tall:.1f}h{step:.1f}V50z")
    return [tag("path", d="".join(parts), class_=f"bar {side}") for side, parts in sides.items() if parts]
