"""Parts as a piece of html for a notebook: static, without a script, its style inside and kept to itself."""

from __future__ import annotations

import re
from collections.abc import Iterator

from headwater.report.markup import Markup, tag
from headwater.report.page import STYLE, rendered
from headwater.report.parts import Part

SCOPE = ".headwater"
# Notebooks choose light or dark by themselves, whatever the system prefers: Jupyter, VS Code, and pages built from notebooks.
LIGHT = ('[data-jp-theme-light="true"]', ".vscode-light", 'html[data-theme="light"]')
DARK = ('[data-jp-theme-light="false"]', ".vscode-dark", 'html[data-theme="dark"]')


def fragment(*parts: Part) -> str:
    """The parts as one element with everything that they need. It holds no script and asks nothing of the network.

    >>> from headwater.report.parts import Prose
    >>> html = fragment(Prose("Two words."))
    >>> html.startswith('<div class="headwater">'), "Two words." in html, "<script" in html
    (True, True, False)
    """
    body = [rendered(part) for part in parts]
    used = set(re.findall(r'class="([^"]*)"', "".join(body)))
    style = scoped(STYLE, {name for classes in used for name in classes.split()}, set(re.findall(r"<([a-z0-9]+)", "".join(body))))
    return tag("div", tag("style", Markup(style)), body, class_="headwater")


def scoped(style: str, classes: set[str], tags: set[str]) -> str:
    """The rules of a style sheet that these classes and tags need, each bound to elements inside the fragment.

    >>> scoped("a { color: red; } .b { color: blue; } .c { color: green; }", {"b"}, {"a"})
    '.headwater a{color: red;} .headwater .b{color: blue;}'
    """
    written = []
    for media, selectors, body in _rules(style):
        bound = [b for s in selectors.split(",") if (b := _bound(s.strip(), classes, tags))]
        if not bound:
            continue
        rule = f"{', '.join(bound)}{{{' '.join(body.split())}}}"
        if ":root" in selectors:  # the names of the colours
            names = " ".join(body.split()).replace("color-scheme: light dark;", "")
            dark = "prefers-color-scheme: dark" in media
            chosen = DARK if dark else LIGHT
            written.append(f"{media}{{{rule}}}" if media else rule)
            if media in ("", "@media (prefers-color-scheme: dark)"):
                written.append(f"{', '.join(f'{theme} {SCOPE}' for theme in chosen)}{{{names} color-scheme: {'dark' if dark else 'light'};}}")
        else:
            written.append(f"{media}{{{rule}}}" if media else rule)
    return " ".join(written)


def _rules(style: str) -> Iterator[tuple[str, str, str]]:
    """(media query or nothing, selectors, body) of every rule, in order. Queries hold rules and no further queries."""
    style = re.sub(r"/\*.*?\*/", "", style, flags=re.S)
    for media, inside, selectors, body in re.findall(r"\s*(?:(@media[^{]*)\{((?:[^{}]*\{[^{}]*\})*)\s*\}|([^{}@]+)\{([^{}]*)\})", style):
        if media:
            yield from ((media.strip(), s.strip(), b) for s, b in re.findall(r"([^{}]+)\{([^{}]*)\}", inside))
        else:
            yield "", selectors.strip(), body


def _bound(selector: str, classes: set[str], tags: set[str]) -> str | None:
    """A selector inside the fragment; None for one that nothing there would match."""
    if selector in (":root", "body", SCOPE):
        return SCOPE
    inner = selector.removeprefix(SCOPE).strip()
    names = _needed(inner, r"\.([\w-]+)")
    elements = _needed(inner, r"(?:^|[\s>+~])([a-z][a-z0-9]*)")
    if not names <= classes or not elements <= tags:
        return None
    return f"{SCOPE} {inner}"


def _needed(selector: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, re.sub(r"\[[^\]]*\]|::?[\w-]+(\([^)]*\))?", "", selector)))
