"""One data contract, one self-contained page, one text twin. Knows no model and no method.

>>> page = Page("Owed to", sections=(Section("Fidelity", parts=(Bars((("Source", .46, .41, .51),)),)),))
>>> render(page).startswith("<!doctype html>"), "0.460" in text(page)
(True, True)
"""

from headwater.report.examples import Exhibit, attribution
from headwater.report.explanations import Dots, Matrix, Overlay, Signal, Signals, Step, Swarm, Tokens, Waterfall
from headwater.report.figure import draw
from headwater.report.fragment import fragment
from headwater.report.page import render, write
from headwater.report.parts import (
    Attribution,
    Axis,
    Bar,
    Bars,
    Card,
    Curve,
    Figure,
    Figures,
    Gallery,
    Line,
    Page,
    Part,
    Prose,
    Ranking,
    Rankings,
    Section,
    Series,
    Strip,
    Table,
)
from headwater.report.text import text

__all__ = [
    "Attribution",
    "Axis",
    "Bar",
    "Bars",
    "Card",
    "Curve",
    "Dots",
    "Exhibit",
    "Figure",
    "Figures",
    "Gallery",
    "Line",
    "Matrix",
    "Overlay",
    "Page",
    "Part",
    "Prose",
    "Ranking",
    "Rankings",
    "Section",
    "Series",
    "Signal",
    "Signals",
    "Step",
    "Strip",
    "Swarm",
    "Table",
    "Tokens",
    "Waterfall",
    "attribution",
    "draw",
    "fragment",
    "render",
    "text",
    "write",
]
