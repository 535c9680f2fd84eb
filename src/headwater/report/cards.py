"""Examples as cards: attributions and galleries as html."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headwater.report import readings, svg
from headwater.report.explanations import Overlay
from headwater.report.markup import Markup, escaped, tag
from headwater.report.overlays import blend, ramp
from headwater.report.parts import Attribution, Card, Gallery, Ranking, Rankings, Strip
from headwater.report.png import data_uri
from headwater.report.words import ERRORS, NONE, NOTHING, OPPONENTS, PROPONENTS, marker, score_words

PIXELS = 96  # images up to this size are drawn with crisp pixels, larger ones are photographs and drawn smooth


def attribution(part: Attribution) -> Markup:
    """The query at the left, large; the training examples that pushed it up, then those that pushed it down, at the right."""
    query = tag("div", tag("h3", "Query"), _card(part.query, 1.0, "query"), class_="asked")
    rows = [_row(PROPONENTS, part.proponents, part.scale), _row(OPPONENTS, part.opponents, part.scale)]
    body = tag("div", query, tag("div", rows, class_="answers"), class_="attribution-body")
    others = part.proponents + part.opponents
    return tag("article", body, _errors(others), _colours((part.query, *others)), _strips((part.query, *others)), class_="panel attribution", data_testid="attribution")


def gallery(part: Gallery) -> Markup:
    """Cards side by side."""
    if not part.cards:
        return tag("p", NOTHING, class_="nothing", data_testid="gallery")
    return tag("div", _cards(part.cards, part.scale), _errors(part.cards), _colours(part.cards), _strips(part.cards), class_="panel gallery", data_testid="gallery")


def rankings(part: Rankings) -> Markup:
    """The query at the left with what stands beside it, if there is one; the rankings under each other."""
    rows = [_ranking(row) for row in part.rows] or tag("p", NOTHING, class_="nothing")
    answers = tag("div", rows, class_="answers")
    legend = _strips([card for row in (*part.rows, *([] if part.beside is None else [part.beside])) for card in row.cards])
    if part.query is None:
        return tag("article", answers, legend, class_="panel rankings", data_testid="rankings")
    beside = None if part.beside is None else _ranking(part.beside)
    asked = tag("div", tag("h3", "Query"), _card(part.query, 1.0, "query"), beside, class_="asked")
    body = tag("div", asked, answers, class_="attribution-body")
    return tag("article", body, legend, class_="panel attribution rankings", data_testid="rankings")


def _ranking(row: Ranking) -> Markup:
    title = tag("h3", row.title, " ", row.note and tag("small", row.note))
    body = _cards(row.cards, row.scale) if row.cards else tag("p", NONE, class_="nothing")
    return tag("section", title, body, class_="ranking", data_testid="ranking")


def strip(part: Strip) -> Markup:
    """A row of shades, the hue and the side of its line telling the sign."""
    cells = [tag("i", class_=f"{readings.side(v)} l{readings.level(v, part.limit)}") for v in part.values]
    return tag("div", cells, class_="strip", role="img", aria_label=readings.strip_words(part), data_testid="strip")


def _strips(cards: Sequence[Card]) -> list[Markup]:
    """What heat strips run along, where there are any."""
    return [tag("p", f"Strips run {axis}.", class_="legend-line") for axis in readings.strip_axes(cards)]


def _row(heading: tuple[str, str], cards: tuple[Card, ...], scale: float) -> Markup:
    title = tag("h3", heading[0], " ", tag("small", heading[1]))
    body = _cards(cards, scale) if cards else tag("p", NONE, class_="nothing")
    return tag("section", title, body, class_=heading[0].lower(), data_testid=heading[0].lower())


def _cards(cards: tuple[Card, ...], scale: float) -> Markup:
    wordy = any(card.text for card in cards)
    return tag("ol", [tag("li", _card(card, scale, "card")) for card in cards], class_="cards wordy" if wordy else "cards")


def _card(card: Card, scale: float, testid: str) -> Markup:
    parts = [
        card.image is not None and _picture(card.image, card.title),
        card.overlay is not None and _overlay(card.overlay),
        card.strip is not None and strip(card.strip),
        # right under the pictures, so that the bars of a row line up whatever the texts below
        card.score is not None and _score(card, card.score, scale),
        tag("p", card.title, class_="title"),
        card.subtitle and tag("p", card.subtitle, class_="subtitle"),
        card.badge and tag("p", card.badge, class_="badge", data_testid="badge"),
        card.flag and tag("p", tag("span", "⚑", aria_hidden="true"), " ", card.flag, class_="flag", data_testid="flag"),
        card.text and tag("blockquote", card.text, tabindex="0"),
    ]
    return tag("div", parts, class_="card doubtful" if card.doubtful else "card", data_testid=testid)


def _picture(image: np.ndarray, title: str) -> Markup:
    crisp = "crisp" if max(image.shape[:2]) <= PIXELS else None
    return tag("div", tag("img", src=data_uri(image), alt=f"Image of {title}", class_=crisp, decoding="async"), class_="picture")


def _overlay(part: Overlay) -> Markup:
    """The image again, with the scores of its pixels laid over it, and their sums."""
    shown = blend(part.values, part.limit, part.image)
    crisp = "crisp" if max(shown.shape[:2]) <= PIXELS else None
    alt = f"{part.title}: {readings.PUSHED}. {readings.overlay_words(part)}"
    picture = tag("div", tag("img", src=data_uri(shown), alt=alt, class_=crisp, decoding="async"), class_="picture carried", data_testid="carried")
    told = [tag("p", line, class_="pane-name") for line in (readings.sums(part), part.subtitle) if line]
    flag = part.flag and tag("p", tag("span", "⚑", aria_hidden="true"), " ", part.flag, class_="flag", data_testid="flag")
    return escaped([picture, told, flag])


def _colours(cards: tuple[Card, ...]) -> Markup | None:
    """The scale of colours of the overlays, where there are any."""
    if not any(card.overlay is not None for card in cards):
        return None
    down, up = tag("span", "▼ pixels that pushed down"), tag("span", "▲ pixels that pushed up")
    scale = tag("img", src=data_uri(ramp()), alt="The scale of colours, from pushed down at the left over nothing in the middle to pushed up at the right")
    return tag("div", down, scale, up, class_="ramp legend-line")


def _score(card: Card, score: float, scale: float) -> Markup:
    """The number with its sign and a shape, and a bar that grows from the middle: to the right when it pushed up, to the left when down."""
    span = svg.Span(-scale, scale, ())
    whisker = svg.whisker(span, *card.interval, cap=7) if card.interval else None
    bar = svg.drawing(svg.upright(span, 0.0, "zero"), svg.bar(span, score, thick=10), whisker, class_="push", width="100%", height=16)
    sign = tag("span", marker(score), class_="sign down" if score < 0 else "sign up", aria_hidden="true")
    value, error = score_words(card)
    return escaped([bar, tag("p", sign, " ", tag("b", value), " ", error and tag("small", error), class_="score")])


def _errors(cards: tuple[Card, ...]) -> Markup | None:
    return tag("p", ERRORS, class_="legend-line") if any(card.stderr is not None and card.score is not None for card in cards) else None
