"""Paragraphs, key figures and tables as html."""

from __future__ import annotations

from headwater.report.markup import Markup, tag
from headwater.report.parts import Figure, Figures, Prose, Table
from headwater.report.words import NOTHING, paragraphs, right_aligned


def prose(part: Prose) -> Markup:
    """Its paragraphs."""
    return tag("div", [tag("p", block) for block in paragraphs(part.text)], class_="prose", data_testid="prose")


def figures(part: Figures) -> Markup:
    """A strip of key figures, as a list of descriptions."""
    if not part.rows:
        return tag("p", NOTHING, class_="nothing", data_testid="figures")
    return tag("dl", map(_figure, part.rows), class_="figures", data_testid="figures")


def _figure(row: Figure) -> Markup:
    note = row.note and tag("dd", row.note, class_="note")
    return tag("div", tag("dt", row.name), tag("dd", row.value, class_="big"), note, class_="figure", data_testid="figure")


def table(part: Table) -> Markup:
    """Columns of quantities line up at the right. A table that is too wide scrolls by itself, by keyboard too."""
    classes = ["number" if right else None for right in right_aligned(part)]
    head = tag("tr", [tag("th", name, scope="col", class_=kind) for name, kind in zip(part.columns, classes, strict=True)])
    rows = [tag("tr", [tag("td", cell, class_=kind) for cell, kind in zip(row, classes, strict=True)]) for row in part.rows]
    nothing = None if part.rows else tag("p", NOTHING, class_="nothing")
    grid = tag("table", tag("thead", head), tag("tbody", rows))
    return tag("div", grid, nothing, class_="scroll", role="region", aria_label="Table", tabindex="0", data_testid="table")
