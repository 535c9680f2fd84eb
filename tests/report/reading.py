"""What a reader of a page needs: its elements, the text that is seen, the pixels of its pictures. And a page with every part on it."""

import base64
import struct
import zlib
from html.parser import HTMLParser

import numpy as np

from headwater.report import (
    Attribution,
    Axis,
    Bar,
    Bars,
    Card,
    Curve,
    Dots,
    Figure,
    Figures,
    Gallery,
    Line,
    Matrix,
    Overlay,
    Page,
    Prose,
    Ranking,
    Rankings,
    Section,
    Series,
    Signal,
    Signals,
    Step,
    Strip,
    Swarm,
    Table,
    Tokens,
    Waterfall,
)

VOID = {"img", "meta"}


class Element:
    """A tag with its attributes and children (elements and texts)."""

    def __init__(self, tag, attributes, parent=None):
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []

    def __getitem__(self, name):
        return self.attributes[name]

    def get(self, name):
        return self.attributes.get(name)

    @property
    def classes(self):
        return (self.get("class") or "").split()

    def everything(self):
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.everything()

    def find(self, tag=None, testid=None, class_=None):
        """All elements within that match everything asked for."""
        return [
            e for e in self.everything() if e is not self and tag in (None, e.tag) and testid in (None, e.get("data-testid")) and (class_ is None or class_ in e.classes)
        ]

    def texts(self):
        """Texts that are seen or read aloud. Drawings, which stand beside their numbers, and the handle of a fold are left out."""
        if self.tag in ("head", "script", "style", "summary") or self.get("aria-hidden") == "true":
            return []
        return [t for child in self.children for t in (child.texts() if isinstance(child, Element) else [child])]

    def text(self):
        return " ".join(" ".join(self.texts()).split())


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.root = self.at = Element("", {})

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes), self.at)
        assert len(element.attributes) == len(attributes), f"an attribute twice in {tag}: {attributes}"
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_endtag(self, tag):
        assert tag == self.at.tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)


def read(html):
    """The page as a tree. Every element must be closed, in order."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.at is reader.root, f"<{reader.at.tag}> is not closed"
    return reader.root


def pixels(uri):
    """The image in a data address: PNG of 8 bits, rows without a filter, as the format's document says and not as the writer does."""
    kind, _, content = uri.partition(";base64,")
    assert kind == "data:image/png"
    data, at, body, shape = base64.b64decode(content, validate=True), 8, b"", None
    assert data[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    while at < len(data):
        (length,), name = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunk = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(name + chunk)
        if name == b"IHDR":
            width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunk)
            assert (depth, rest) == (8, [0, 0, 0])
            shape = (height, width) if colour == 0 else (height, width, {2: 3}[colour])
        body += chunk if name == b"IDAT" else b""
        at += 12 + length
    assert name == b"IEND"
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(shape[0], -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(shape)


def percent(value):
    """A length across, such as 42%, as a number."""
    assert value.endswith("%")
    return float(value[:-1])


def picture(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape or (28, 28)).astype(np.uint8)


def everything(say=lambda text: text):
    """A page with every part, and every field of every part, filled. ``say`` makes the texts."""
    cards = [
        Card(say("#1"), say("label 3"), picture(1), say("first line\n\nsecond line"), 0.5, 0.1, say("flipped")),
        Card(say("#2"), say("label 8"), picture(2, 20, 30, 3), score=0.25, stderr=0.3),
        Card(say("#3"), score=0.0),
        Card(say("#4"), score=float("nan"), stderr=float("nan")),
    ]
    against = [Card(say("#5"), say("label 9"), picture(5), score=-0.75, stderr=0.02), Card(say("#6"), text=say("only words"), score=float("-inf"))]
    parts = (
        Figures((Figure(say("LDS"), say("0.42"), say("0.37 to 0.47")), (say("cost"), say("12 s")))),
        Bars(
            (
                Bar(say("Grad-Dot"), -0.12, -0.2, 0.05, say("one checkpoint")),
                (say("SOURCE"), 0.42, 0.37, 0.47),
                (say("TRAK"), None),
                (say("X"), float("nan")),
            ),
            (Line(say("noise ceiling"), 0.7), (say("chance"), 0.0)),
            say("LDS"),
        ),
        Curve(
            (Series(say("ours"), [0, 0.5, 1], [0, None, 1]), (say("chance"), [0, 1], [0, 1], "reference")),
            Axis(say("checked"), form="percent"),
            Axis(say("found"), 0, 1, "percent"),
        ),
        Table((say("method"), say("time")), ((say("SOURCE"), say("12 s")), (say("TracIn"), say("3 s")))),
        Prose(say("A paragraph.\n\nAnother one.")),
        Attribution(Card(say("query"), say("predicted 3"), picture(7), say("its words"), flag=say("misread")), cards, against),
        Gallery(cards),
        Rankings(
            (
                Ranking(say("TracIn"), (Card(say("#13"), image=picture(13), strip=Strip((0.5, -0.25, 0.0), say("from clean to noise")), badge=say("in 3 lists")),)),
                (say("ReTrac"), (Card(say("#14"), score=0.5),), say("at unit norm")),
            ),
            Card(say("a generation"), image=picture(15)),
            Ranking(say("nearest"), (Card(say("#16")),), say("in pixels")),
        ),
        Overlay(say("#8"), np.random.default_rng(8).normal(size=(7, 7)), picture(8), picture(9, 28, 28, 3), say("7 → 1"), say("far off")),
        Tokens(say("#9"), (say("not"), say("bad"), say("at")), (0.5, -0.25, 0.0), say("positive"), say("cut"), (0.1, 0.02, 0.0)),
        Waterfall(say("#10"), 1.0, 1.5, (Step(say("age"), 0.75, say("28 days"), 0.125), (say("water"), -0.25)), say("35 MPa"), say("missed"), (say("from"), say("to"))),
        Swarm((Dots(say("age"), (0.5, -0.25, float("nan")), (1.0, 0.0, float("nan")), say("0.375")), (say("water"), (0.0, 1.0, 1.0))), say("MPa"), say("size")),
        Signals(say("#11"), (Signal(say("x"), (0, 1, None, 2), (0.5, -0.5, 0.0, 1.0)), (say("y"), None, (0.0, 0.1))), say("walking"), say("short"), say("ms")),
        Matrix(say("#12"), (say("age"), say("water"), say("ash")), np.array([[1, -0.5, 0], [-0.5, 0, 0.25], [0, 0.25, np.nan]]), say("pairs"), say("kinked")),
    )
    footer = ((say("method"), say("SOURCE")), (say("run"), say("runs/mnist")))
    return Page(say("Owed to"), say("Which examples?"), tuple(Section(say("A section"), say("Its text."), (part,)) for part in parts), footer)


def degenerate():
    """Pages at the edges of what a part allows."""
    nothing = [Figures(()), Bars(()), Curve((), "x", "y"), Table((), ()), Table(("a",), ()), Prose(""), Attribution(Card("q")), Gallery(())]
    flat = [
        Overlay("nothing", np.zeros((1, 1))),
        Overlay("nan", np.full((2, 3), np.nan), picture(0, 2, 3)),
        Overlay("one pixel", np.eye(200), scale=2.0),
        Tokens("none", (), ()),
        Tokens("spaces", (" ", "\n", "", " a", "##b"), (0.0, 1.0, float("nan"), float("inf"), -1e-300)),
        Waterfall("flat", 0.0, 0.0, ()),
        Waterfall("nan", 1.0, float("nan"), (("a", float("nan")),)),
        Swarm(()),
        Swarm((Dots("none", ()), Dots("nan", (float("nan"),)), Dots("one", (float("inf"),), (0.5,)))),
        Signals("flat", (("x", (float("nan"), 1.0, float("nan")), (0.0, float("nan"), float("inf"))),)),
        Matrix("one", ("a",), np.zeros((1, 1))),
        Matrix("large", tuple(f"feature {k}" for k in range(40)), np.random.default_rng(0).normal(size=(40, 40)), symmetric=False),
        Bars((("a", 0.0), ("b", 0.0))),
        Bars((("a", None),)),
        Bars((("a", float("nan")), ("b", float("inf"), float("nan"), float("inf")))),
        Bars((("a", -1.0), ("b", -3.0, -4.0, -2.0)), lines=(("limit", float("nan")),)),
        Bars((("tiny", 3e-15), ("tinier", 5e-324))),
        Bars((("huge", 1.7e308), ("low", -1.7e308))),
        Curve((Series("one point", [3.0], [4.0]),), "x", "y"),
        Curve((Series("all the same", [1, 1, 1], [2, 2, 2]),), "x", "y"),
        Curve((Series("nothing finite", [None, 1.0], [float("inf"), None]),), "x", "y"),
        Curve((Series("backwards", [2, 0, 1], [0, 1, 0]), Series("ref", [0, 2], [0, 2], "reference")), "x", "y"),
        Gallery((Card("zero", score=0.0), Card("nan", score=float("nan")), Card("none"))),
        Rankings(()),
        Rankings((("nothing", ()), ("nan", (Card("nan", strip=Strip((float("nan"), None, float("inf")))), Card("zero", score=0.0, strip=Strip((0.0,))))))),
        Gallery((Card("tiny", score=1e-300, stderr=0.0), Card("dot", image=np.zeros((1, 1), np.uint8)))),
    ]
    pages = [Page(""), Page("t", sections=(Section(""), Section("empty"))), Page("t", footer="From nowhere.\n\nAt all.")]
    return pages + [Page("t", sections=(Section("", parts=(part,)),)) for part in nothing + flat]
