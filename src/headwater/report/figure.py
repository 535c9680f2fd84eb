"""Parts as a matplotlib figure: the same records as on the page, for papers and slides. Needs no display and touches no global state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from headwater.errors import InputError, MissingExtra
from headwater.report import readings
from headwater.report.explained import offsets
from headwater.report.explanations import Matrix, Overlay, Signals, Swarm, Tokens, Waterfall
from headwater.report.numbers import number, signed
from headwater.report.overlays import DOWN, UP, blend
from headwater.report.parts import Bars
from headwater.report.words import clean, marker

INCHES = 8.0  # width of a figure
LETTERS = 84  # of a monospaced line across it
_UP, _DOWN = tuple(UP / 255), tuple(DOWN / 255)
_INK, _SOFT, _GRID = "#18242a", "#566269", "#e3e0d7"
_RAMP = ("#e0b04a", "#cf9468", "#b57888", "#93609b", "#6e4b9e", "#4a3890", "#251f6b")
_UNKNOWN = "#0d6578"


def draw(*parts: Any) -> Any:
    """A ``matplotlib.figure.Figure`` with the parts below each other; write it with ``figure.savefig("why.png")`` (or .svg, .pdf).

    Raises InputError for a part that has no figure, and MissingExtra without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a picture without the library matplotlib", "matplotlib", "pip install headwater[plot]") from error
    if not parts:
        raise InputError("no part to draw", "at least one")
    for part in parts:
        if type(part) not in DRAWERS:
            raise InputError(f"a part of type {type(part).__name__}", f"one of {', '.join(kind.__name__ for kind in DRAWERS)}", "report.render(page) shows every part")
    heights = [DRAWERS[type(part)][0](part) for part in parts]
    figure = Figure(figsize=(INCHES, sum(heights)), layout="constrained")
    rooms = figure.subfigures(len(parts), 1, height_ratios=heights, squeeze=False)[:, 0]
    for room, part in zip(rooms, parts, strict=True):
        DRAWERS[type(part)][1](room, part)
    return figure


def _named(room: Any, part: Any) -> None:
    words = [clean(part.title), clean(part.subtitle), f"({clean(part.flag)})" if part.flag else ""]
    room.suptitle(_plain("   ".join(w for w in words if w)), fontsize=10, color=_INK, x=0.01, ha="left")


def _plain(text: str) -> str:
    """A text in which matplotlib reads no mathematics."""
    return text.replace("$", r"\$")


def _overlay(room: Any, part: Overlay) -> None:
    shown = {readings.INPUT: part.image, readings.BASELINE: part.baseline, readings.PUSHED: blend(part.values, part.limit, part.image)}
    names = readings.panes(part)
    for ax, name in zip(np.atleast_1d(room.subplots(1, len(names))), names, strict=True):
        ax.imshow(shown[name], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set_title(name, fontsize=8, color=_SOFT)
        ax.set_axis_off()
    _named(room, part)
    _scale(room, ax, part.limit)


def _scale(room: Any, ax: Any, limit: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = blend(np.linspace(-1, 1, 201)[None], 1.0)[0] / 255
    bar = room.colorbar(ScalarMappable(Normalize(-limit, limit), ListedColormap(colours)), ax=ax, shrink=0.8, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels([number(-limit), "0", signed(limit)], fontsize=7)
    bar.outline.set_visible(False)


def _token_lines(part: Tokens) -> list[list[tuple[int, str, str, float]]]:
    """Lines of (column, text, arrow, score): what does not fit goes to the next line, what is longer than a line is cut into several."""
    lines: list[list[tuple[int, str, str, float]]] = [[]]
    column = 0
    for (gap, token), score in zip(part.pieces, part.scores, strict=True):
        column += len(gap)
        rest = readings.visible(token)
        arrow = marker(score) if readings.level(score, part.limit) > readings.LEVELS // 4 else ""
        while rest:
            if column and column + min(len(rest) + 1, LETTERS) > LETTERS:
                lines.append([])
                column = 0
            piece, rest = rest[: LETTERS - 1], rest[LETTERS - 1 :]
            lines[-1].append((column, piece, "" if rest else arrow, score))
            column += len(piece) + bool(arrow and not rest)
        if "\n" in token:
            lines.append([])
            column = 0
    return [line for line in lines if line] or [[]]


def _tokens(room: Any, part: Tokens) -> None:
    from matplotlib.patches import Rectangle

    lines = _token_lines(part)
    ax = room.subplots()
    ax.set(xlim=(0, LETTERS), ylim=(len(lines), 0))
    ax.set_axis_off()
    size = 72 * INCHES * 0.96 / LETTERS / 0.602  # a letter of DejaVu Sans Mono is 0.602 of its size wide
    for row, line in enumerate(lines):
        for column, text, arrow, score in line:
            strength = readings.level(score, part.limit)
            colour = _UP if score > 0 else _DOWN
            if strength:
                ax.add_patch(Rectangle((column, row + 0.12), len(text), 0.7, facecolor=colour, alpha=0.06 * strength, linewidth=0))
                dash = "-" if score > 0 else (0, (2, 1.2))
                ax.plot([column, column + len(text)], [row + 0.84] * 2, color=colour, linestyle=dash, linewidth=0.6 + 0.25 * strength, solid_capstyle="butt")
            ax.text(column, row + 0.5, _plain(text), family="monospace", fontsize=size, color=_INK, va="center")
            if arrow:
                ax.text(column + len(text) + 0.1, row + 0.3, arrow, family="monospace", fontsize=0.5 * size, color=colour, va="center")
    _named(room, part)


def _waterfall(room: Any, part: Waterfall) -> None:
    ax = room.subplots()
    totals, rows = part.totals, readings.step_words(part)
    n = len(rows)
    for k, (step, a, b) in enumerate(zip(part.steps, totals, totals[1:], strict=False), start=1):
        if math.isfinite(a) and math.isfinite(b):
            ax.barh(k, b - a, left=a, height=0.62, color=_UP if step.score > 0 else _DOWN)
            if step.stderr is not None and math.isfinite(step.stderr):
                ax.errorbar(b, k, xerr=2 * step.stderr, color=_INK, linewidth=1, capsize=2)
        ax.plot([b, b], [k - 0.31, k + 1.31], color=_SOFT, linewidth=0.7)
    ends = [(0, part.start), (n - 1, part.end)]
    for k, value in ends:
        ax.plot([value, value], [k - 0.4, k + 0.4], color=_INK, linewidth=2.2)
    ax.set_ylim(n - 0.4, -0.6)
    ax.set_yticks(range(n), [_plain(f"{clean(name)}  {clean(note)}".strip()) for name, note, *_ in rows], fontsize=8)
    values = ax.secondary_yaxis("right")
    marks = ["", *(marker(s.score) + " " for s in part.steps), ""]
    values.set_yticks(range(n), [f"{mark}{value} {error}".strip() for mark, (_, _, value, error) in zip(marks, rows, strict=True)], fontsize=8)
    values.tick_params(length=0)
    _clean(ax, values)
    _named(room, part)


def _clean(*axes: Any) -> None:
    for ax in axes:
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0, colors=_INK, labelsize=8)
    axes[0].grid(axis="x", color=_GRID, linewidth=0.7)
    axes[0].set_axisbelow(True)


def _swarm(room: Any, part: Swarm) -> None:
    from matplotlib.colors import ListedColormap

    ax = room.subplots()
    low = min([0.0, *(s for row in part.rows for s in row.scores if math.isfinite(s))])
    high = max([0.0, *(s for row in part.rows for s in row.scores if math.isfinite(s))])
    span = (high - low) or 1.0
    dots = None
    for k, row in enumerate(part.rows):
        lift = offsets([(s - low) / span for s in row.scores])
        ranks = np.array(row.ranks if row.ranks is not None else [math.nan] * len(row.scores))
        known = np.isfinite(ranks)
        x, y = np.array(row.scores), k + 0.8 * np.array(lift)
        ax.scatter(x[~known], y[~known], s=9, color=_UNKNOWN, linewidths=0)
        dots = ax.scatter(x[known], y[known], s=9, c=ranks[known], cmap=ListedColormap(_RAMP), vmin=0, vmax=1, linewidths=0)
    ax.axvline(0, color=_SOFT, linewidth=0.9)
    ax.set_yticks(range(len(part.rows)), [_plain(clean(row.name)) for row in part.rows], fontsize=8)
    ax.set_ylim(len(part.rows) - 0.4, -0.6)
    ax.set_xlabel(_plain(clean(part.axis)), fontsize=8, color=_SOFT)
    _clean(ax)
    if dots is not None and readings.shaded(part):
        bar = room.colorbar(dots, ax=ax, shrink=0.6, ticks=[0, 1])
        bar.ax.set_yticklabels(readings.LOW_HIGH, fontsize=7)
        bar.outline.set_visible(False)


def _signals(room: Any, part: Signals) -> None:
    axes = np.atleast_1d(room.subplots(2 * len(part.channels), 1, sharex=True, height_ratios=[1.4, 1] * len(part.channels)))
    for channel, line, pushes in zip(part.channels, axes[::2], axes[1::2], strict=True):
        steps = np.arange(len(channel.scores))
        if channel.values is not None:
            line.plot(steps, channel.values, color=_INK, linewidth=1)
        line.set_ylabel(_plain(clean(channel.name)), fontsize=8, rotation=0, ha="right", va="center")
        scores = np.nan_to_num(np.array(channel.scores), posinf=part.limit, neginf=-part.limit)
        for colour, side in ((_UP, np.maximum(scores, 0)), (_DOWN, np.minimum(scores, 0))):
            pushes.bar(steps, side, width=1.0, color=colour, linewidth=0)
        pushes.axhline(0, color=_SOFT, linewidth=0.7)
        pushes.set_ylim(-1.05 * part.limit, 1.05 * part.limit)
        for ax in (line, pushes):
            ax.spines[:].set_visible(False)
            ax.tick_params(length=0, labelsize=7, colors=_SOFT)
    axes[-1].set_xlabel(_plain(clean(part.axis)), fontsize=8, color=_SOFT)
    _named(room, part)


def _matrix(room: Any, part: Matrix) -> None:
    ax = room.subplots()
    shown = readings.shown_cells(part)
    values = part.values[np.ix_(shown, shown)]
    names = [_plain(clean(part.names[k])) for k in shown]
    ax.imshow(blend(values, part.limit), interpolation="nearest")
    ax.set_xticks(range(len(shown)), names, fontsize=7, rotation=45, ha="right")
    ax.set_yticks(range(len(shown)), names, fontsize=7)
    for (i, j), score in np.ndenumerate(values):
        dark = readings.level(score, part.limit) > 6
        word = signed(float(score)) if readings.written_out(part) else {"up": "+", "down": "−"}.get(readings.side(score), "")
        ax.text(j, i, word, ha="center", va="center", fontsize=7, color="white" if dark else _INK)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, colors=_INK)
    _named(room, part)
    _scale(room, ax, part.limit)


def _bars(room: Any, part: Bars) -> None:
    ax = room.subplots()
    for k, bar in enumerate(part.rows):
        if bar.value is not None and math.isfinite(bar.value):
            ax.barh(k, bar.value, height=0.62, color=_UP if bar.value > 0 else _DOWN)
        if bar.low is not None and bar.high is not None:
            ax.plot([bar.low, bar.high], [k, k], color=_INK, linewidth=1.2)
    for line in part.lines:
        ax.axvline(line.value, color=_INK, linestyle=":", linewidth=1.2, label=_plain(clean(line.label)))
    ax.axvline(0, color=_SOFT, linewidth=0.9)
    ax.set_yticks(range(len(part.rows)), [_plain(clean(bar.label)) for bar in part.rows], fontsize=8)
    ax.set_ylim(len(part.rows) - 0.4, -0.6)
    ax.set_xlabel(_plain(clean(part.axis)), fontsize=8, color=_SOFT)
    _clean(ax)
    if part.lines:
        ax.legend(fontsize=7, frameon=False)


DRAWERS: dict[type, tuple[Callable[[Any], float], Callable[[Any, Any], None]]] = {
    Overlay: (lambda part: 2.7 if len(readings.panes(part)) > 2 else 3.6, _overlay),
    Tokens: (lambda part: 0.45 + 0.27 * len(_token_lines(part)), _tokens),
    Waterfall: (lambda part: 0.8 + 0.26 * (len(part.steps) + 2), _waterfall),
    Swarm: (lambda part: 0.8 + 0.34 * max(1, len(part.rows)), _swarm),
    Signals: (lambda part: 0.8 + 1.0 * len(part.channels), _signals),
    Matrix: (lambda part: 1.6 + 0.22 * max(8, len(readings.shown_cells(part))), _matrix),
    Bars: (lambda part: 0.8 + 0.26 * max(1, len(part.rows)), _bars),
}
"""For each part that has a figure: how many inches it is high, and how it is drawn in its room."""
