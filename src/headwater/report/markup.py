"""Html written so that it cannot be wrong: text is escaped unless it is markup already."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Literal

from headwater.report.words import clean

_VOID = {"img", "meta"}


class Markup(str):
    """A string that is html already."""

    __slots__ = ()


Child = str | Literal[False] | None | Iterable["Child"]


def escaped(child: Child) -> Markup:
    """A child as html: markup as it is, text escaped, None and False as nothing, anything else one by one.

    >>> escaped(["a < b", Markup("<b>"), None])
    'a &lt; b<b>'
    """
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return Markup(html.escape(clean(child), quote=True))
    return Markup("".join(map(escaped, child or ())))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """One element. Attributes that are None or False are left out; ``_`` in their names becomes ``-``, a last ``_`` is dropped.

    >>> tag("p", "1 < 2", class_="note", data_testid="x", hidden=None)
    '<p class="note" data-testid="x">1 &lt; 2</p>'
    """
    written = "".join(_attribute(key.removesuffix("_").replace("_", "-"), value) for key, value in attributes.items())
    return Markup(f"<{name}{written}>" + ("" if name in _VOID else f"{escaped(children)}</{name}>"))


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escaped(_plain(value))}"'


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
