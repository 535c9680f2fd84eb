"""A page as one html file that needs nothing else: style, script, images and drawings are inside, and the network is forbidden to it."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from headwater.errors import InputError, StorageError
from headwater.report import explained
from headwater.report.cards import attribution, gallery, rankings
from headwater.report.charts import bars, curve
from headwater.report.grid import figures, prose, table
from headwater.report.markup import Markup, tag
from headwater.report.parts import Attribution, Bars, Curve, Figures, Gallery, Page, Part, Prose, Rankings, Section, Table
from headwater.report.words import paragraphs

RENDERERS: dict[type, Callable[[Any], Markup]] = {
    Prose: prose,
    Figures: figures,
    Bars: bars,
    Curve: curve,
    Table: table,
    Attribution: attribution,
    Gallery: gallery,
    Rankings: rankings,
    **explained.RENDERERS,
}

STYLE = Markup(files(__package__).joinpath("style.css").read_text(encoding="utf-8"))
_SCRIPT = Markup(files(__package__).joinpath("page.js").read_text(encoding="utf-8"))


def render(page: Page) -> str:
    """The page as html.

    >>> html = render(Page("Owed to", "Which examples?", (Section("Costs", parts=(Table(("method", "time"), (("SOURCE", "12 s"),)),)),)))
    >>> html.startswith("<!doctype html>"), "12 s" in html, "http" in html.replace("http-equiv", "")
    (True, True, False)
    """
    names = [f"section-{k}" for k in range(1, len(page.sections) + 1)]
    sections = [_section(section, name) for section, name in zip(page.sections, names, strict=True)]
    body = tag("body", _header(page, names), tag("main", sections), _footer(page), tag("script", _SCRIPT))
    return "<!doctype html>\n" + tag("html", _head(page), body, lang="en") + "\n"


def write(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write the page to a file, whole or not at all, and return where it is.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Page("Owed to"), Path(folder) / "owed.html").name
    'owed.html'
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"There is no folder {str(target.parent)!r}.", "a file name in a folder that exists", "create the folder first")
    if target.is_dir():
        raise InputError(f"{str(target)!r} is a folder.", "the name of a file", f"write to {str(target / 'report.html')!r}")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    content = render(page).encode("utf-8")
    try:
        try:
            partial.write_bytes(content)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as refusal:
        given = f"The report could not be written to {str(target)!r}: {refusal.strerror or refusal}."
        raise StorageError(given, f"{len(content)} bytes of room and leave to write there", "free space, or choose another folder") from refusal
    return target


def _head(page: Page) -> Markup:
    # by their hashes, so that a script or style smuggled in by a text cannot run, and by 'none', so that nothing can be fetched
    policy = f"default-src 'none'; img-src data:; style-src {_hash(STYLE)}; script-src {_hash(_SCRIPT)}; base-uri 'none'; form-action 'none'"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", page.title),
        tag("style", STYLE),
    )


def _hash(content: str) -> str:
    return f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'"


def _header(page: Page, names: list[str]) -> Markup:
    titled = [(section.title, name) for section, name in zip(page.sections, names, strict=True) if section.title]
    contents = tag("nav", [tag("a", title, href=f"#{name}") for title, name in titled], aria_label="Sections") if len(titled) > 2 else None
    subtitle = page.subtitle and tag("p", page.subtitle, class_="subtitle", data_testid="subtitle")
    return tag("header", _STREAMS, tag("h1", page.title, data_testid="title"), subtitle, contents)


def _section(section: Section, name: str) -> Markup:
    title = section.title and tag("h2", section.title)
    text = [tag("p", block, class_="text") for block in paragraphs(section.text)]
    return tag("section", title, text, map(rendered, section.parts), id=name, class_="section", data_testid="section")


def rendered(part: Part) -> Markup:
    """One part as html."""
    renderer = RENDERERS.get(type(part))
    if renderer is None:
        raise InputError(f"A section holds {type(part).__name__}.", f"one of {', '.join(kind.__name__ for kind in RENDERERS)}")
    return renderer(part)


def _footer(page: Page) -> Markup | None:
    if not page.footer:
        return None
    if isinstance(page.footer, str):
        body = tag("div", [tag("p", block) for block in paragraphs(page.footer)])
    else:
        body = tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in page.footer])
    return tag("footer", body, data_testid="footer")


# three streams that become one
_STREAMS = tag(
    "svg",
    [
        tag("path", d=d)
        for d in (
            "M4 6 C 60 6, 84 58, 140 62 S 236 58, 316 58",
            "M30 100 C 74 100, 96 68, 140 66 S 236 62, 316 62",
            "M84 2 C 110 6, 116 52, 160 57 S 244 54, 316 54",
        )
    ],
    class_="streams",
    viewBox="0 0 320 104",
    aria_hidden="true",
    focusable="false",
)
