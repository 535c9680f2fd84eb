"""The page as a terminal's text: every part has a twin here, and everything that the page says stands in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from headwater.errors import InputError
from headwater.report import readings, retold, words
from headwater.report.layout import BLOCKS, aligned, filled, flat, one_line, ruled, spaced, strip_of, table, width_of
from headwater.report.numbers import number
from headwater.report.parts import Attribution, Bars, Card, Curve, Figures, Gallery, Page, Part, Prose, Rankings, Section, Table
from headwater.report.svg import Span


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
    heading = ruled(page.title, "=") + filled(page.subtitle)
    blocks = [heading, *map(_section, page.sections), _footer(page)]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _section(section: Section) -> list[str]:
    heading = ruled(section.title, "-") if section.title else []
    return spaced([heading, *map(filled, words.paragraphs(section.text)), *map(_part, section.parts)])


def _part(part: Part) -> list[str]:
    twin = TWINS.get(type(part))
    if twin is None:
        raise InputError(f"A section holds {type(part).__name__}.", f"one of {', '.join(kind.__name__ for kind in TWINS)}")
    return twin(part) or [words.NOTHING]


def _footer(page: Page) -> list[str]:
    if isinstance(page.footer, str):
        return spaced(filled(block) for block in words.paragraphs(page.footer))
    return aligned([(name, value) for name, value in page.footer])


def _prose(part: Prose) -> list[str]:
    return spaced(filled(block) for block in words.paragraphs(part.text))


def _figures(part: Figures) -> list[str]:
    return aligned(part.rows)


def _bars(part: Bars) -> list[str]:
    values = [v for bar in part.rows if bar.value is not None for v in (bar.value, bar.low, bar.high)] + [line.value for line in part.lines]
    span = Span.of([0.0, *(v for v in values if v is not None)])
    rows = [("  " + line.label, strip_of(span, None, lines=[line.value]), number(line.value), "", "") for line in part.lines]
    for k, bar in enumerate(part.rows):
        strip = strip_of(span, bar.value, None if bar.value is None else (bar.low, bar.high), [line.value for line in part.lines])
        rows.append((("▸ " if k == part.leader else "  ") + one_line(bar.label), strip, *words.measured(bar), bar.note))
    lines = aligned(rows, right=(False, False, True))
    indent = max((width_of(row[0]) for row in rows), default=0) + 2
    return lines + ([" " * indent + one_line(part.axis)] if part.axis and rows else [])


def _curve(part: Curve) -> list[str]:
    if not part.series:
        return []
    return [one_line(part.y.label), *table(words.samples(part))]


def _attribution(part: Attribution) -> list[str]:
    answers = _cards(part.proponents + part.opponents, part.scale)  # together, so that zero is in one column
    split = len(part.proponents)
    pixels = () if part.query.overlay is None else filled(readings.overlay_words(part.query.overlay), "  ")
    lines = ["Query", *flat(_cards((part.query,), 1.0)), *pixels]
    for heading, cards in ((words.PROPONENTS, answers[:split]), (words.OPPONENTS, answers[split:])):
        lines += [" ".join(heading), *(flat(cards) or ["  " + words.NONE])]
    return lines + _errors(part.proponents + part.opponents) + _strips((part.query, *part.proponents, *part.opponents))


def _gallery(part: Gallery) -> list[str]:
    return flat(_cards(part.cards, part.scale)) + _errors(part.cards) + _strips(part.cards)


def _rankings(part: Rankings) -> list[str]:
    query = [] if part.query is None else ["Query", *flat(_cards((part.query,), 1.0))]
    rows = ([] if part.beside is None else [part.beside]) + list(part.rows)
    lists = [line for row in rows for line in (one_line(f"{row.title}  {row.note}".rstrip()), *(flat(_cards(row.cards, row.scale)) or ["  " + words.NONE]))]
    return [*query, *lists, *_strips([card for row in rows for card in row.cards])]


def _strips(cards: Sequence[Card]) -> list[str]:
    return flat(filled(f"Strips run {axis}. There + and # pushed up, = and % pushed down.") for axis in readings.strip_axes(cards))


def _strip(card: Card) -> str:
    return "" if card.strip is None else f"▕{retold.letters(card.strip.values, card.strip.limit)}▏"


def _cards(cards: tuple[Card, ...], scale: float) -> list[list[str]]:
    """The lines of each card: one for what it is, then its text."""
    heads = aligned([_card(card, scale) for card in cards])
    bodies = [flat(filled(block, "      ") for block in words.paragraphs(card.text or "")) for card in cards]
    return [["  " + head, *body] for head, body in zip(heads, bodies, strict=True)]


def _card(card: Card, scale: float) -> tuple[str, ...]:
    if card.score is None:
        return "", "", card.title, card.subtitle, "", _strip(card), _pixels(card), card.badge or "", _flag(card)
    score, error = words.score_words(card)
    # the halves around zero; a nan stays out of both
    left = strip_of(Span(-scale, 0.0, ()), min(0.0, card.score), _within(card.interval, -scale, 0.0), cells=10)
    right = strip_of(Span(0.0, scale, ()), max(0.0, card.score), _within(card.interval, 0.0, scale), cells=10)
    bar = f"{left}│{right}"
    head = f"{words.marker(card.score)} {score}", error, card.title, card.subtitle, _hollow(bar) if card.doubtful else bar
    return (*head, _strip(card), _pixels(card), card.badge or "", _flag(card))


def _within(interval: tuple[float, float] | None, low: float, high: float) -> tuple[float, float] | None:
    """The part of an interval that lies in a range."""
    if interval is None or interval[1] <= low or interval[0] >= high:
        return None
    return max(interval[0], low), min(interval[1], high)


def _hollow(bar: str) -> str:
    return "".join("░" if c in BLOCKS else c for c in bar)


def _flag(card: Card) -> str:
    return f"⚑ {card.flag}" if card.flag else ""


def _pixels(card: Card) -> str:
    if card.overlay is None:
        return ""
    flag = f"⚑ {card.overlay.flag}" if card.overlay.flag else ""
    return "; ".join(filter(None, (readings.sums(card.overlay), card.overlay.subtitle, flag)))


def _errors(cards: tuple[Card, ...]) -> list[str]:
    return filled(words.ERRORS) if any(card.stderr is not None and card.score is not None for card in cards) else []


TWINS: dict[type, Callable[[Any], list[str]]] = {
    Prose: _prose,
    Figures: _figures,
    Bars: _bars,
    Curve: _curve,
    Table: table,
    Attribution: _attribution,
    Gallery: _gallery,
    Rankings: _rankings,
    **retold.TWINS,
}
