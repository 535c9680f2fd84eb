"""What the parts of an explanation say in words and numbers: the same for the page and for its text twin."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from headwater.report.explanations import Matrix, Overlay, Signals, Swarm, Tokens, Waterfall
from headwater.report.numbers import number, signed
from headwater.report.parts import Card, Strip, Table
from headwater.report.words import clean

LISTED = 10  # strongest places, steps or pairs in a table of numbers
WHOLE = 8  # a matrix of up to so many features is shown with its numbers
CELLS = 24  # features of a matrix that are drawn: the ones with the largest rows
SHADES = 7  # how finely the rank of a feature's value is told apart
LEVELS = 10  # how finely the size of a score is told apart by shade and weight

INPUT, BASELINE, PUSHED = "input", "baseline", "what pushed it up or down"
LOW_HIGH = ("lowest value", "highest value")


def level(score: float, limit: float) -> int:
    """How strong a score is, 0 (nothing) to 10 (as large as the limit or larger).

    >>> level(0.0, 1.0), level(0.01, 1.0), level(-0.5, 1.0), level(9.0, 1.0), level(float("nan"), 1.0)
    (0, 1, 5, 10, 0)
    """
    if not math.isfinite(score) or score == 0:
        return 0 if not math.isinf(score) else LEVELS
    return min(LEVELS, max(1, round(LEVELS * abs(score) / limit)))


def side(score: float) -> str:
    """The direction of a score as a name: "up", "down" or "still"."""
    return "up" if score > 0 else "down" if score < 0 else "still"


def strip_words(part: Strip) -> str:
    """What a heat strip shows, in a sentence.

    >>> strip_words(Strip((0.5, -0.25, 0.0), "from clean to noise"))
    'Influence from clean to noise: +0.500, −0.250, 0.'
    """
    return f"Influence {part.axis}".rstrip() + f": {', '.join(signed(v) if math.isfinite(v) else 'missing' for v in part.values)}."


def strip_axes(cards: Iterable[Card]) -> list[str]:
    """What the heat strips of some cards run along, each once."""
    return sorted({clean(card.strip.axis) for card in cards if card.strip is not None and card.strip.axis})


def overlay_words(part: Overlay) -> str:
    """What an overlay shows, in a sentence.

    >>> overlay_words(Overlay("#1", np.array([[0.5, -0.25]]), scale=0.5))
    'Pixels that pushed up sum to +0.500, pixels that pushed down to −0.250. Colour is full at ±0.500.'
    """
    lost = int((~np.isfinite(part.values)).sum())
    clip = "" if part.scale is not None else " (99th percentile of the sizes)"
    bad = f" {lost} scores are not finite and have no colour." if lost else ""
    return f"Pixels that pushed up sum to {signed(part.up)}, pixels that pushed down to {signed(part.down)}. Colour is full at ±{number(part.limit)}{clip}.{bad}"


def sums(part: Overlay) -> str:
    """What the pixels of an overlay pushed, in short.

    >>> sums(Overlay("#1", np.array([[0.5, -0.25]])))
    'pixels ▲\xa0+0.500 ▼\xa0−0.250'
    """
    return f"pixels ▲\N{NO-BREAK SPACE}{signed(part.up)} ▼\N{NO-BREAK SPACE}{signed(part.down)}"


def panes(part: Overlay) -> tuple[str, ...]:
    """The names of the pictures of an overlay that it has, in order."""
    return tuple(name for name, there in ((INPUT, part.image), (BASELINE, part.baseline), (PUSHED, part.values)) if there is not None)


def strongest_pixels(part: Overlay) -> Table:
    """The pixels with the largest scores in size: row, column (from 0, at the top left), score."""
    order = np.argsort(-np.nan_to_num(np.abs(part.values), nan=-1.0).ravel(), kind="stable")[:LISTED]
    places = [divmod(int(i), part.values.shape[1]) for i in order]
    return Table(("row", "column", "score"), tuple((str(r), str(c), signed(part.values[r, c])) for r, c in places))


def token_table(part: Tokens) -> Table:
    """Every token with its place and its score."""
    rows = [(str(k), visible(token), signed(score)) for k, (token, score) in enumerate(zip(part.tokens, part.scores, strict=True))]
    if part.stderr is None:
        return Table(("position", "token", "score"), tuple(rows))
    return Table(("position", "token", "score", "± standard error"), tuple((*row, number(e)) for row, e in zip(rows, part.stderr, strict=True)))


def visible(token: str) -> str:
    """A token as it can be seen: one of white space alone as its marks.

    >>> visible(" good"), visible("\\n"), visible("")
    (' good', '↵', '∅')
    """
    text = clean(token)
    return text if text.strip() else text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"


def step_words(part: Waterfall) -> list[tuple[str, str, str, str]]:
    """Each row of a waterfall: name, note, value and its standard error; first the start, last the end."""
    first, last = part.ends
    middle = [(s.name, s.note, signed(s.score), "" if s.stderr is None else f"± {number(s.stderr)}") for s in part.steps]
    return [(first, "", number(part.start), ""), *middle, (last, "", number(part.end), "")]


def swarm_table(part: Swarm) -> Table:
    """Each row of a swarm in numbers: smallest, median and largest score."""
    rows = []
    for row in part.rows:
        finite = np.array([s for s in row.scores if math.isfinite(s)])
        ends = [number(None)] * 3 if not finite.size else [signed(float(v)) for v in (finite.min(), np.median(finite), finite.max())]
        rows.append((row.name, row.note, str(len(row.scores)), *ends))
    return Table(("feature", part.column, "dots", "lowest score", "median", "highest score"), tuple(rows))


def shaded(part: Swarm) -> bool:
    """Whether any dot has a rank to be shaded by."""
    return any(row.ranks is not None and any(map(math.isfinite, row.ranks)) for row in part.rows)


def swarm_words(part: Swarm) -> str:
    """How to read a swarm."""
    return "Each dot is an example" + (", shaded by where the feature's value ranks among the examples." if shaded(part) else ".")


def shade(rank: float) -> int | None:
    """Which of the shades a rank gets; None where it is unknown."""
    return min(SHADES - 1, int(rank * SHADES)) if math.isfinite(rank) else None


def signal_words(part: Signals) -> str:
    """What a series shows, in a sentence."""
    return f"The line is the channel; bars above the middle pushed up, bars below it pushed down. Full height is ±{number(part.limit)} for every channel."


def signal_table(part: Signals) -> Table:
    """Each channel: the sum of its scores, and where it pushed hardest either way."""
    rows = []
    for channel in part.channels:
        scores = np.nan_to_num(np.array(channel.scores))
        high, low = int(scores.argmax()), int(scores.argmin())
        ups = f"{signed(scores[high])} at {high}" if scores[high] > 0 else "–"
        downs = f"{signed(scores[low])} at {low}" if scores[low] < 0 else "–"
        rows.append((channel.name, signed(float(scores.sum())), ups, downs))
    return Table(("channel", "sum", "strongest push up", "strongest push down"), tuple(rows))


def shown_cells(part: Matrix) -> list[int]:
    """Which features of a matrix are drawn, in their order."""
    if len(part.names) <= CELLS:
        return list(range(len(part.names)))
    sizes = np.nan_to_num(np.abs(part.values)).sum(1) + np.nan_to_num(np.abs(part.values)).sum(0)
    return sorted(int(i) for i in np.argsort(-sizes, kind="stable")[:CELLS])


def written_out(part: Matrix) -> bool:
    """Whether the cells of a matrix are shown as numbers: while they are few."""
    return len(part.names) <= WHOLE


def matrix_words(part: Matrix) -> str:
    """How to read a matrix."""
    drawn = f" Drawn are the {CELLS} of {len(part.names)} features with the largest rows." if len(part.names) > CELLS else ""
    twice = " A pair stands in two cells, half of it in each; the list below has the sum." if part.symmetric else ""
    return f"Shade is full at ±{number(part.limit)}.{twice}{drawn}"


def pair_table(part: Matrix) -> Table:
    """The strongest pairs."""
    return Table(("feature", "with", "score"), tuple((a, b, signed(value)) for a, b, value in part.pairs[:LISTED]))
