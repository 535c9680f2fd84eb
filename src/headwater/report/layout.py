"""Laying out text for a terminal: columns, filled paragraphs, bars of blocks."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from textwrap import wrap

from headwater.report import words
from headwater.report.parts import Table
from headwater.report.svg import Span

WIDTH = 96
_EIGHTHS = "▏▎▍▌▋▊▉"
BLOCKS = _EIGHTHS + "█▐▕"


def strip_of(span: Span, value: float | None, interval: tuple[float | None, float | None] | None = None, lines: Sequence[float] = (), cells: int = 40) -> str:
    """A bar from zero to the value in blocks; where it leaves room, its interval as ─ and reference lines as ┊."""
    strip = [" "] * cells
    ends = [span.share(end) * cells for end in interval or () if end is not None and math.isfinite(end)]
    if len(ends) == 2:
        low, high = ends
        strip[max(0, math.floor(low)) : math.ceil(high)] = "─" * (min(cells, math.ceil(high)) - max(0, math.floor(low)))
    for line in lines:
        if math.isfinite(line):
            strip[min(cells - 1, math.floor(span.share(line) * cells))] = "┊"
    if value is not None and math.isfinite(value):
        start, end = sorted((span.share(0.0) * cells, span.share(value) * cells))
        for k in range(cells):
            strip[k] = _block(min(end, k + 1) - max(start, k), start > k) or strip[k]
    return "".join(strip)


def _block(filled: float, from_right: bool) -> str:
    """One cell of a bar; nothing where less than a sixteenth of it is filled."""
    eighths = round(8 * filled)
    if eighths <= 0:
        return ""
    if eighths >= 8:
        return "█"
    return ("▐" if eighths >= 3 else "▕") if from_right else _EIGHTHS[eighths - 1]


def ruled(title: str, mark: str) -> list[str]:
    return [one_line(title), mark * min(width_of(one_line(title)), WIDTH)]


def filled(block: str, indent: str = "") -> list[str]:
    return wrap(words.clean(block), WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def spaced(blocks: Iterable[list[str]]) -> list[str]:
    """The blocks with an empty line between them."""
    lines: list[str] = []
    for block in filter(None, blocks):
        lines += ["", *block] if lines else block
    return lines


def aligned(rows: Iterable[Sequence[str]], right: Sequence[bool] = ()) -> list[str]:
    """Rows of cells in columns two spaces apart, columns without any text left out."""
    cells = [[one_line(cell) for cell in row] for row in rows]
    columns = [list(column) for column in zip(*cells, strict=True)]
    widths = [max(map(width_of, column)) for column in columns]
    shown = [k for k, width in enumerate(widths) if width]
    return ["  ".join(_padded(row[k], widths[k], k < len(right) and right[k]) for k in shown).rstrip() for row in cells]


def _padded(cell: str, width: int, right: bool) -> str:
    gap = " " * (width - width_of(cell))
    return gap + cell if right else cell + gap


def one_line(cell: str) -> str:
    """A text on one line. The spaces of a drawn strip, or before a label, are kept."""
    return words.clean(cell).replace("\n", " ").replace("\t", " ")


def width_of(line: str) -> int:
    """How many columns of a terminal it takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def flat(blocks: Iterable[list[str]]) -> list[str]:
    return [line for block in blocks for line in block]


def table(part: Table, marks: Sequence[str] = ()) -> list[str]:
    """A table under its ruled heading; ``marks`` stand before its rows."""
    rule = [("─" * max(width_of(one_line(row[k])) for row in (part.columns, *part.rows))) for k in range(len(part.columns))]
    lines = aligned([part.columns, rule, *part.rows], right=words.right_aligned(part))
    if marks:
        lines = [f"{mark} {line}" for mark, line in zip((" ", " ", *marks), lines, strict=True)]
    return lines if part.rows else [*lines, words.NOTHING]
