"""The parts of an explanation as a terminal's text. Everything that their drawings say in words stands here too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from headwater.report import readings, words
from headwater.report.explanations import Explanation, Matrix, Overlay, Signals, Swarm, Tokens, Waterfall
from headwater.report.layout import aligned, filled, one_line, table
from headwater.report.numbers import signed
from headwater.report.parts import Table

ROWS, COLUMNS = 16, 32  # of a map made of letters; a terminal's cell is twice as high as wide
UPS, DOWNS = "·+#", "·=%"  # weak to strong: rounder marks push down, crossed ones push up


def _head(part: Any) -> list[str]:
    flag = f"⚑ {part.flag}" if part.flag else ""
    return aligned([(part.title, part.subtitle, flag)])


def overlay(part: Overlay) -> list[str]:
    """The scores as a coarse map of marks, then in words and numbers."""
    names = ", ".join(readings.panes(part))
    return [*_head(part), names, *_letters(part.values), *filled(readings.overlay_words(part)), *table(readings.strongest_pixels(part))]


def _letters(values: np.ndarray) -> list[str]:
    """Means of blocks as marks: + and # pushed up, = and % pushed down, a stronger mark for a larger size, nothing where it is small."""
    height, width = values.shape
    rows, columns = min(ROWS, height), min(COLUMNS, width)
    sums = np.add.reduceat(np.nan_to_num(values), np.arange(rows) * height // rows, axis=0)
    sums = np.add.reduceat(sums, np.arange(columns) * width // columns, axis=1)
    limit = float(np.abs(sums).max()) or 1.0
    return ["  " + "".join(_letter(v, limit) for v in row).rstrip() for row in sums]


def letters(values: Sequence[float], limit: float) -> str:
    """One mark for each value, as in a map of marks.

    >>> letters((0.1, 1.0, -0.5), 1.0)
    '·#='
    """
    return "".join(_letter(v, limit) for v in values)


def _letter(value: float, limit: float) -> str:
    step = readings.level(value, limit)
    marks = UPS if value > 0 else DOWNS
    return " " if step < 1 else marks[0] if step < 3 else marks[1] if step < 6 else marks[2]


def tokens(part: Tokens) -> list[str]:
    """One line for each token: its place, a mark for its direction, the token, its score and a bar."""
    return [*_head(part), *table(readings.token_table(part), marks=[words.marker(s) for s in part.scores])]


def waterfall(part: Waterfall) -> list[str]:
    """One line for each step, from start to end."""
    marks = ["", *(words.marker(step.score) for step in part.steps), ""]
    rows = [(mark, name, note, value, error) for mark, (name, note, value, error) in zip(marks, readings.step_words(part), strict=True)]
    return [*_head(part), *("  " + line for line in aligned(rows, right=(False, False, True, True)))]


def swarm(part: Swarm) -> list[str]:
    """The rows in numbers."""
    if not part.rows:
        return []
    ends = "  ".join(readings.LOW_HIGH) if readings.shaded(part) else ""
    return [*filled(readings.swarm_words(part)), *([ends] if ends else []), *table(readings.swarm_table(part)), *([one_line(part.axis)] if part.axis else [])]


def signals(part: Signals) -> list[str]:
    """The channels in numbers."""
    return [*_head(part), *filled(readings.signal_words(part)), *table(readings.signal_table(part)), one_line(part.axis)]


def matrix(part: Matrix) -> list[str]:
    """The cells that are drawn (with numbers, where they are few, else marks), and the strongest pairs."""
    shown = readings.shown_cells(part)
    names = [part.names[k] for k in shown]
    write = signed if readings.written_out(part) else words.marker
    rows = tuple((part.names[i], *(write(float(part.values[i, j])) for j in shown)) for i in shown)
    return [*_head(part), *filled(readings.matrix_words(part)), *table(Table(("", *names), rows)), *table(readings.pair_table(part))]


TWINS: dict[type[Explanation], Callable[[Any], list[str]]] = {
    Overlay: overlay,
    Tokens: tokens,
    Waterfall: waterfall,
    Swarm: swarm,
    Signals: signals,
    Matrix: matrix,
}
