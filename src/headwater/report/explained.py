"""The parts of an explanation as html. Direction is told by a shape, a side or a line as well as by colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from headwater.report import readings, svg
from headwater.report.explanations import Dots, Explanation, Matrix, Overlay, Signal, Signals, Swarm, Tokens, Waterfall
from headwater.report.grid import table
from headwater.report.markup import Markup, escaped, tag
from headwater.report.numbers import signed
from headwater.report.overlays import heading, overlay
from headwater.report.words import NOTHING, marker

SPREAD = 36.0  # of the 44 units of a swarm's row, how many the dots may use
BINS = 120  # how finely dots that would cover each other are told


def tokens(part: Tokens) -> Markup:
    """The text. Pieces that pushed up stand on a solid line, those that pushed down on a dashed one; strong ones have an arrow."""
    pieces = [_token(t, s, gap, part.limit) for (gap, t), s in zip(part.pieces, part.scores, strict=True)]
    return _figure(part, "tokens", tag("p", pieces, class_="tokens"), _numbers(table(readings.token_table(part))))


def _token(token: str, score: float, gap: str, limit: float) -> list[Markup]:
    strength = readings.level(score, limit)
    arrow = tag("sup", marker(score), aria_hidden="true") if strength > readings.LEVELS // 4 else None
    shown = readings.visible(token)
    return [escaped(gap), tag("span", shown, arrow, class_=f"tok {readings.side(score)} l{strength}", title=signed(score), data_testid="token")]


def waterfall(part: Waterfall) -> Markup:
    """A bar for each step, from where the one before ended; first and last the two outputs."""
    totals = part.totals
    span = svg.Span.of([*totals, part.end])
    guides = [svg.upright(span, t, "grid") for t in span.ticks]
    drawn = [
        svg.upright(span, part.start, "total"),
        *([svg.between(span, a, b), svg.upright(span, b, "joint")] for a, b in pairwise(totals)),
        svg.upright(span, part.end, "total"),
    ]
    scores = [None, *(step.score for step in part.steps), None]
    rows = [_step(words, guides, shape, score) for words, shape, score in zip(readings.step_words(part), drawn, scores, strict=True)]
    chart = tag("div", rows, class_="bar-rows", role="list", aria_label="Steps")
    return _figure(part, "waterfall", chart, tag("div", svg.across(span.labels()), class_="axis"), class_="bars")


def _step(words: tuple[str, str, str, str], guides: list[Markup], shape: Any, score: float | None) -> Markup:
    name, note, value, error = words
    mark = score is not None and tag("span", marker(score), class_=f"sign {readings.side(score)}", aria_hidden="true")
    label = tag("div", tag("span", name, class_="name"), note and tag("small", note), class_="label")
    room = tag("div", svg.drawing(guides, shape, class_="track", width="100%", height="100%"), class_="room")
    number = tag("div", tag("b", mark, mark and " ", value), error and tag("small", error), class_="value")
    return tag("div", label, room, number, class_="bar-row" if score is not None else "bar-row best", role="listitem", data_testid="step")


def swarm(part: Swarm) -> Markup:
    """A row of dots for each feature, all on one axis."""
    if not part.rows:
        return tag("p", NOTHING, class_="nothing", data_testid="swarm")
    span = svg.Span.of([0.0, *(s for row in part.rows for s in row.scores)])
    guides = [svg.upright(span, t, "zero" if t == 0 else "grid") for t in span.ticks]
    rows = [_dots(row, span, guides) for row in part.rows]
    chart = tag("div", rows, class_="bar-rows", role="list", aria_label=part.axis or "Features")
    axis = tag("div", svg.across(span.labels()), part.axis and tag("p", part.axis, class_="axis-name"), class_="axis")
    shades = [tag("path", d=f"M{8 + 14 * k} 8h0", class_=f"q{k}") for k in range(readings.SHADES)]
    low, high = readings.LOW_HIGH
    legend = readings.shaded(part) and tag("p", low, " ", svg.drawing(shades, class_="shades", width=100, height=16), " ", high, class_="legend-line shade")
    words = tag("p", readings.swarm_words(part), class_="legend-line")
    fold = _numbers(table(readings.swarm_table(part)))
    return tag("figure", chart, axis, words, legend, fold, class_="panel bars swarm", data_testid="swarm")


def _dots(row: Dots, span: svg.Span, guides: list[Markup]) -> Markup:
    """The dots of one row: those of a shade are one path of points."""
    shades: dict[int | None, list[str]] = {}
    shares = [span.share(s) if math.isfinite(s) else math.nan for s in row.scores]
    for share, offset, rank in zip(shares, offsets(shares), row.ranks or [math.nan] * len(shares), strict=True):
        if math.isfinite(share):
            shades.setdefault(readings.shade(rank), []).append(f"M{svg.WIDE * share:.1f} {22 + SPREAD * offset:.1f}h0")
    paths = [tag("path", d="".join(points), class_="dots" if k is None else f"dots q{k}") for k, points in shades.items()]
    drawn = svg.drawing(guides, paths, class_="track", viewBox=f"0 0 {svg.WIDE:g} 44", preserveAspectRatio="none", width="100%", height="100%")
    label = tag("div", tag("span", row.name, class_="name"), class_="label")
    return tag("div", label, tag("div", drawn, class_="room"), tag("div", tag("b", row.note), class_="value"), class_="bar-row", role="listitem", data_testid="dots")


def offsets(shares: Sequence[float]) -> list[float]:
    """How far each dot is moved off the middle of its row, -0.5 to 0.5, so that dots of nearly equal score can be seen: by turns up
    and down in the order given, the farther the more there are. The same for the same scores, always.

    >>> offsets([0.2, 0.9, 0.2, 0.2])
    [0.0, 0.0, 0.16..., -0.16...]
    """
    seen: dict[int, int] = {}
    places = []
    for share in shares:
        cell = round(BINS * share) if math.isfinite(share) else -1
        k = seen[cell] = seen.get(cell, -1) + 1
        places.append((k + 1) // 2 * (1 if k % 2 else -1))
    widest = max((abs(p) for p in places), default=0)
    return [p / max(2 * widest, 6) for p in places]


def signals(part: Signals) -> Markup:
    """For each channel its line, and under it bars that rise where a step pushed up and hang where it pushed down."""
    words = tag("p", readings.signal_words(part), class_="legend-line")
    channels = [_channel(channel, part.limit) for channel in part.channels]
    return _figure(part, "signals", channels, tag("p", part.axis, class_="axis-name"), words, _numbers(table(readings.signal_table(part))))


def _channel(channel: Signal, limit: float) -> Markup:
    wide: dict[str, str | float] = {"preserveAspectRatio": "none", "width": "100%"}
    line = None
    if channel.values is not None:
        finite = [v for v in channel.values if math.isfinite(v)] or [0.0]
        room = svg.Span(min(finite), max(finite) if max(finite) > min(finite) else min(finite) + 1.0, ())
        line = svg.drawing(svg.run(channel.values, room, 100), class_="line", viewBox=f"0 0 {svg.WIDE:g} 100", height=72, **wide)
    middle = tag("line", x1=0, x2=svg.WIDE, y1=50, y2=50, class_="zero")
    bars = svg.drawing(svg.columns(channel.scores, limit), middle, class_="pushes", viewBox=f"0 0 {svg.WIDE:g} 100", height=56, **wide)
    total = signed(sum(s for s in channel.scores if math.isfinite(s)))
    return tag("div", tag("p", tag("span", channel.name), " ", tag("small", total), class_="pane-name"), line, bars, class_="channel", data_testid="channel")


def matrix(part: Matrix) -> Markup:
    """The cells, shaded by size, with numbers where they are few and else with marks; the strongest pairs behind a fold."""
    shown = readings.shown_cells(part)
    head = tag("tr", tag("td"), [tag("th", tag("span", part.names[j]), scope="col") for j in shown])
    rows = [tag("tr", tag("th", part.names[i], scope="row"), [_cell(part, i, j) for j in shown]) for i in shown]
    grid = tag("table", tag("thead", head), tag("tbody", rows), class_="matrix")
    scroll = tag("div", grid, class_="scroll", role="region", aria_label=part.title, tabindex="0")
    words = tag("p", readings.matrix_words(part), class_="legend-line")
    return _figure(part, "matrix", scroll, words, _numbers(table(readings.pair_table(part))))


def _cell(part: Matrix, i: int, j: int) -> Markup:
    score = float(part.values[i, j])
    shown = signed(score) if readings.written_out(part) else marker(score)
    names = f"{part.names[i]} × {part.names[j]}: {signed(score)}"
    return tag("td", shown, class_=f"cell {readings.side(score)} l{readings.level(score, part.limit)}", title=names, data_testid="cell")


def _numbers(found: Markup) -> Markup:
    return tag("details", tag("summary", "Numbers"), found, class_="numbers")


def _figure(part: Any, name: str, *body: Any, class_: str = "") -> Markup:
    return tag("figure", heading(part.title, part.subtitle, part.flag), body, class_=f"panel {class_} explained".replace("  ", " "), data_testid=name)


RENDERERS: dict[type[Explanation], Callable[[Any], Markup]] = {
    Overlay: overlay,
    Tokens: tokens,
    Waterfall: waterfall,
    Swarm: swarm,
    Signals: signals,
    Matrix: matrix,
}
