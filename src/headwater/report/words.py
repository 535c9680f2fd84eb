"""What a part says in words and numbers: the same for the page and for its text twin."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from headwater.report.numbers import alike, is_quantity, number, percent, places, signed
from headwater.report.parts import Axis, Bar, Card, Curve, Series, Table

PROPONENTS = ("Proponents", "training on these pushed it up")
OPPONENTS = ("Opponents", "training on these pushed it down")
NOTHING = "Nothing to show."
NONE = "none"
ERRORS = "± is one standard error, the whisker spans two each way; a hollow bar cannot be told from zero."

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def clean(text: object) -> str:
    """The text without characters that would steer a terminal or spoil a file (each becomes U+FFFD). Line ends and tabs stay.

    >>> clean("a\\x1b[31mb")
    'a\ufffd[31mb'
    """
    return _CONTROL.sub("\ufffd", str(text).replace("\r\n", "\n").replace("\r", "\n"))


def paragraphs(text: str) -> list[str]:
    """Blocks of text that empty lines separate."""
    return [block.strip() for block in re.split(r"\n\s*\n", clean(text)) if block.strip()]


def marker(score: float) -> str:
    """The sign as a shape, so that neither colour nor a small plus has to carry it alone."""
    return "▲" if score > 0 else "▼" if score < 0 else "•"


def score_words(card: Card) -> tuple[str, str]:
    """A card's score with its sign, and its standard error; nothing for what it does not have.

    >>> score_words(Card("#1", score=0.1234567, stderr=0.02)), score_words(Card("#2", score=-3.0)), score_words(Card("the query"))
    (('+0.123', '± 0.020'), ('−3.00', ''), ('', ''))
    """
    if card.score is None:
        return "", ""
    if card.stderr is None:
        return signed(card.score), ""
    value, error = alike((card.score, card.stderr), places(card.stderr, 2) or places(card.score, 3))
    return ("+" if card.score > 0 else "") + value, f"± {error}"


def measured(bar: Bar) -> tuple[str, str]:
    """A bar's value and its interval.

    >>> measured(Bar("Grad-Dot", 0.12, 0.09, 0.15)), measured(Bar("not measured", None))
    (('0.120', '0.090 to 0.150'), ('–', ''))
    """
    if bar.value is None or bar.low is None or bar.high is None:
        return number(bar.value), ""
    numbers = bar.value, bar.low, bar.high
    value, low, high = alike(numbers, max(places(max(map(abs, numbers)), 3), places((bar.high - bar.low) / 2, 2)))
    return value, f"{low} to {high}"


def reading(axis: Axis) -> Callable[[float], str]:
    """How a value on this axis is written."""
    return percent if axis.form == "percent" else number


def right_aligned(table: Table) -> list[bool]:
    """For each column, whether all its cells are quantities (and there is one)."""
    return [any(c.strip() for c in cells) and all(map(is_quantity, cells)) for cells in _columns(table)]


def _columns(table: Table) -> list[list[str]]:
    return [[row[k] for row in table.rows] for k in range(len(table.columns))]


def samples(curve: Curve, most: int = 9) -> Table:
    """A curve as a small table: a few x of its measured lines, and every line there (read off where it has no point of its own).

    >>> line, chance = Series("ours", [0, 1, 2], [0, 3, 4]), Series("chance", [0, 2], [0, 1], "reference")
    >>> samples(Curve((line, chance), "checked", "found")).rows
    (('0', '0', '0'), ('1.00', '3.00', '0.500'), ('2.00', '4.00', '1.00'))
    """
    lines = [s for s in curve.series if s.role == "measured"] or list(curve.series)
    xs = sorted({x for s in lines for x in s.x if math.isfinite(x)})
    picked = xs if len(xs) <= most else [xs[round(k * (len(xs) - 1) / (most - 1))] for k in range(most)]
    across, up = reading(curve.x), reading(curve.y)
    rows = tuple((across(x), *(number(None) if (y := _at(s, x)) is None else up(y) for s in curve.series)) for x in picked)
    return Table((curve.x.label, *(s.name for s in curve.series)), rows)


def _at(series: Series, x: float) -> float | None:
    if x in series.x:
        y = series.y[series.x.index(x)]
        return y if math.isfinite(y) else None
    if not all(a <= b for a, b in pairwise(series.x)) or not series.x[0] < x < series.x[-1]:
        return None
    y = float(np.interp(x, series.x, series.y))
    return y if math.isfinite(y) else None
