"""The page as a terminal's text: every part has a twin here, and everything that the page says stands in it."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from textwrap import wrap
from typing import Any

from headwater.errors import InputError
from headwater.report import words
from headwater.report.numbers import number
from headwater.report.parts import Attribution, Bars, Card, Curve, Figures, Gallery, Page, Part, Prose, Section, Table
from headwater.report.svg import Span

WIDTH = 96
_EIGHTHS = "▏▎▍▌▋▊▉"
_BLOCKS = _EIGHTHS + "█▐▕"


def text(page: Page) -> str:
    """The page as text, for a terminal or a log.

    >>> print(text(Page("Owed to", sections=(Section("Fidelity", parts=(Bars((("TracIn", .2), ("SOURCE", .4)), axis="LDS"),)),))))
    Owed to
    =======
    <BLANKLINE>
    Fidelity
    --------
    <BLANKLINE>
      TracIn  ████████████████████                      0.200
    ▸ SOURCE  ████████████████████████████████████████  0.400
              LDS
    <BLANKLINE>
    """
    heading = _ruled(page.title, "=") + _filled(page.subtitle)
    blocks = [heading, *map(_section, page.sections), _footer(page)]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _section(section: Section) -> list[str]:
    heading = _ruled(section.title, "-") if section.title else []
    return _spaced([heading, *map(_filled, words.paragraphs(section.text)), *map(_part, section.parts)])


def _part(part: Part) -> list[str]:
    twin = TWINS.get(type(part))
    if twin is None:
        raise InputError(f"A section holds {type(part).__name__}.", f"one of {', '.join(kind.__name__ for kind in TWINS)}")
    return twin(part) or [words.NOTHING]


def _footer(page: Page) -> list[str]:
    if isinstance(page.footer, str):
        return _spaced(_filled(block) for block in words.paragraphs(page.footer))
    return _aligned([(name, value) for name, value in page.footer])


def _prose(part: Prose) -> list[str]:
    return _spaced(_filled(block) for block in words.paragraphs(part.text))


def _figures(part: Figures) -> list[str]:
    return _aligned(part.rows)


def _bars(part: Bars) -> list[str]:
    values = [v for bar in part.rows if bar.value is not None for v in (bar.value, bar.low, bar.high)] + [line.value for line in part.lines]
    span = Span.of([0.0, *(v for v in values if v is not None)])
    rows = [("  " + line.label, _strip(span, None, lines=[line.value]), number(line.value), "", "") for line in part.lines]
    for k, bar in enumerate(part.rows):
        strip = _strip(span, bar.value, None if bar.value is None else (bar.low, bar.high), [line.value for line in part.lines])
        rows.append((("▸ " if k == part.leader else "  ") + _line(bar.label), strip, *words.measured(bar), bar.note))
    lines = _aligned(rows, right=(False, False, True))
    indent = max((_width(row[0]) for row in rows), default=0) + 2
    return lines + ([" " * indent + _line(part.axis)] if part.axis and rows else [])


def _curve(part: Curve) -> list[str]:
    if not part.series:
        return []
    return [_line(part.y.label), *_table(words.samples(part))]


def _table(part: Table) -> list[str]:
    rule = [("─" * max(_width(_line(row[k])) for row in (part.columns, *part.rows))) for k in range(len(part.columns))]
    lines = _aligned([part.columns, rule, *part.rows], right=words.right_aligned(part))
    return lines if part.rows else [*lines, words.NOTHING]


def _attribution(part: Attribution) -> list[str]:
    answers = _cards(part.proponents + part.opponents, part.scale)  # together, so that zero is in one column
    split = len(part.proponents)
    lines = ["Query", *_flat(_cards((part.query,), 1.0))]
    for heading, cards in ((words.PROPONENTS, answers[:split]), (words.OPPONENTS, answers[split:])):
        lines += [" ".join(heading), *(_flat(cards) or ["  " + words.NONE])]
    return lines + _errors(part.proponents + part.opponents)


def _gallery(part: Gallery) -> list[str]:
    return _flat(_cards(part.cards, part.scale)) + _errors(part.cards)


def _cards(cards: tuple[Card, ...], scale: float) -> list[list[str]]:
    """The lines of each card: one for what it is, then its text."""
    heads = _aligned([_card(card, scale) for card in cards])
    bodies = [_flat(_filled(block, "      ") for block in words.paragraphs(card.text or "")) for card in cards]
    return [["  " + head, *body] for head, body in zip(heads, bodies, strict=True)]


def _flat(blocks: Iterable[list[str]]) -> list[str]:
    return [line for block in blocks for line in block]


def _card(card: Card, scale: float) -> tuple[str, ...]:
    if card.score is None:
        return "", "", card.title, card.subtitle, "", _flag(card)
    score, error = words.score_words(card)
    # the halves around zero; a nan stays out of both
    left = _strip(Span(-scale, 0.0, ()), min(0.0, card.score), _within(card.interval, -scale, 0.0), cells=10)
    right = _strip(Span(0.0, scale, ()), max(0.0, card.score), _within(card.interval, 0.0, scale), cells=10)
    bar = f"{left}│{right}"
    return f"{words.marker(card.score)} {score}", error, card.title, card.subtitle, _hollow(bar) if card.doubtful else bar, _flag(card)


def _within(interval: tuple[float, float] | None, low: float, high: float) -> tuple[float, float] | None:
    """The part of an interval that lies in a range."""
    if interval is None or interval[1] <= low or interval[0] >= high:
        return None
    return max(interval[0], low), min(interval[1], high)


def _hollow(bar: str) -> str:
    return "".join("░" if c in _BLOCKS else c for c in bar)


def _flag(card: Card) -> str:
    return f"⚑ {card.flag}" if card.flag else ""


def _errors(cards: tuple[Card, ...]) -> list[str]:
    return _filled(words.ERRORS) if any(card.stderr is not None and card.score is not None for card in cards) else []


TWINS: dict[type, Callable[[Any], list[str]]] = {
    Prose: _prose,
    Figures: _figures,
    Bars: _bars,
    Curve: _curve,
    Table: _table,
    Attribution: _attribution,
    Gallery: _gallery,
}


def _strip(
    span: Span, value: float | None, interval: tuple[float | None, float | None] | None = None, lines: Sequence[float] = (), cells: int = 40
) -> str:
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


def _ruled(title: str, mark: str) -> list[str]:
    return [_line(title), mark * min(_width(_line(title)), WIDTH)]


def _filled(block: str, indent: str = "") -> list[str]:
    return wrap(words.clean(block), WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _spaced(blocks: Iterable[list[str]]) -> list[str]:
    """The blocks with an empty line between them."""
    lines: list[str] = []
    for block in filter(None, blocks):
        lines += ["", *block] if lines else block
    return lines


def _aligned(rows: Iterable[Sequence[str]], right: Sequence[bool] = ()) -> list[str]:
    """Rows of cells in columns two spaces apart, columns without any text left out."""
    cells = [[_line(cell) for cell in row] for row in rows]
    columns = [list(column) for column in zip(*cells, strict=True)]
    widths = [max(map(_width, column)) for column in columns]
    shown = [k for k, width in enumerate(widths) if width]
    return ["  ".join(_padded(row[k], widths[k], k < len(right) and right[k]) for k in shown).rstrip() for row in cells]


def _padded(cell: str, width: int, right: bool) -> str:
    gap = " " * (width - _width(cell))
    return gap + cell if right else cell + gap


def _line(cell: str) -> str:
    """A text on one line. The spaces of a drawn strip, or before a label, are kept."""
    return words.clean(cell).replace("\n", " ").replace("\t", " ")


def _width(line: str) -> int:
    """How many columns of a terminal it takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)
