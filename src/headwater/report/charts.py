"""Bars and curves as html."""

from __future__ import annotations

from headwater.report import svg
from headwater.report.grid import table
from headwater.report.markup import Markup, tag
from headwater.report.numbers import number
from headwater.report.parts import Bar, Bars, Curve, Line
from headwater.report.words import NOTHING, measured, samples


def bars(part: Bars) -> Markup:
    """One row per bar: label, drawing, value. Reference lines run through all rows, each named on a row of its own at the top."""
    if not part.rows:
        return tag("p", NOTHING, class_="nothing", data_testid="bars")
    span = svg.Span.of([0.0, *_values(part)])
    guides = [svg.upright(span, t, "zero" if t == 0 else "grid") for t in span.ticks]
    lines = [svg.upright(span, line.value, "reference") for line in part.lines]
    rows = [_reference(line, span, guides + lines[: k + 1]) for k, line in enumerate(part.lines)]
    rows += [_bar(bar, span, guides + lines, best=k == part.leader) for k, bar in enumerate(part.rows)]
    chart = tag("div", rows, class_="bar-rows", role="list", aria_label=part.axis or "Bars")
    axis = tag("div", svg.across(span.labels()), part.axis and tag("p", part.axis, class_="axis-name"), class_="axis")
    return tag("figure", chart, axis, class_="panel bars", data_testid="bars")


def _values(part: Bars) -> list[float]:
    ends = [end for bar in part.rows if bar.value is not None for end in (bar.value, bar.low, bar.high)]
    return [end for end in (*ends, *(line.value for line in part.lines)) if end is not None]


def _bar(bar: Bar, span: svg.Span, behind: list[Markup], best: bool) -> Markup:
    label = tag("div", tag("span", bar.label, class_="name"), bar.note and tag("small", bar.note), class_="label")
    shapes = [svg.bar(span, bar.value), bar.value is not None and svg.whisker(span, bar.low, bar.high)]
    room = tag("div", svg.drawing(behind, shapes, class_="track", width="100%", height="100%"), class_="room")
    number, interval = measured(bar)
    value = tag("div", tag("b", number), interval and tag("small", interval), class_="value")
    return tag("div", label, room, value, class_="bar-row best" if best else "bar-row", role="listitem", data_testid="bar")


def _reference(line: Line, span: svg.Span, behind: list[Markup]) -> Markup:
    """The name of a line, written on the side of it that has more room."""
    share = min(1.0, max(0.0, span.share(line.value)))
    side, shift = ("end", -8) if share > 0.5 else ("start", 8)
    name = tag("text", line.label, x=f"{100 * share:.4g}%", y="50%", dx=shift, dy="0.32em", text_anchor=side)
    room = tag("div", svg.drawing(behind, name, class_="track", width="100%", height="100%"), class_="room")
    spoken = tag("div", tag("span", line.label, class_="spoken"), class_="label")
    value = tag("div", number(line.value), class_="value")
    return tag("div", spoken, room, value, class_="line-row", role="listitem", data_testid="line")


def curve(part: Curve) -> Markup:
    """A plot, its legend, and the same lines as a small table behind a fold."""
    if not part.series:
        return tag("p", NOTHING, class_="nothing", data_testid="curve")
    x = svg.span_of(part.x, (v for s in part.series for v in s.x))
    y = svg.span_of(part.y, (v for s in part.series for v in s.y))
    legend = [tag("li", svg.swatch(name), s.name) for s, name in zip(part.series, svg.classes(part.series), strict=True)]
    frame = tag(
        "div",
        svg.upwards(y.labels(part.y.form)),
        svg.plot(part.series, x, y),
        svg.across(x.labels(part.x.form)),
        class_="frame",
        role="img",
        aria_label=f"{part.y.label} against {part.x.label}: {', '.join(s.name for s in part.series)}",
    )
    numbers = tag("details", tag("summary", "Numbers"), table(samples(part)), class_="numbers")
    names = tag("p", part.y.label, class_="axis-name up"), frame, tag("p", part.x.label, class_="axis-name")
    return tag("figure", tag("ul", legend, class_="legend"), names, numbers, class_="panel curve", data_testid="curve")
