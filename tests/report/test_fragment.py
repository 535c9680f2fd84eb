"""A piece for a notebook: complete, static, and without effect on what stands around it."""

import re

import pytest

from headwater.report import Card, Gallery, Page, Section, fragment, render
from headwater.report.page import STYLE
from tests.report.reading import everything, picture, read

PARTS = [part for section in everything().sections for part in section.parts]


def style_of(html):
    return "".join(read(html).find("style")[0].children)


def rules(style):
    return [(s.strip(), body) for s, body in re.findall(r"([^{};]+)\{([^{}]*)\}", style) if not s.strip().startswith("@media")]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_it_holds_no_script_and_asks_nothing_of_the_network(part):
    html = fragment(part)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript:|\bon\w+=", re.sub(r"data:image/png;base64,[\w+/=]+", "", html))
    elements = list(read(html).everything())[1:]
    assert not {e.tag for e in elements} & {"script", "link", "iframe", "object", "embed", "form", "base", "meta"}
    assert not any({"style", "id", "action"} & set(e.attributes) for e in elements)
    assert all(e.get("alt") and e["src"].startswith("data:image/png;base64,") for e in elements if e.tag == "img")


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_every_rule_of_its_style_is_bound_to_it(part):
    for selectors, _ in rules(re.sub(r"@media[^{]*\{", "", style_of(fragment(part)))):
        for selector in selectors.split(","):
            assert re.search(r"(^|[\s])\.headwater(\s|$)", selector.strip()), selector


def test_it_says_what_the_page_says():
    html, page = read(fragment(*PARTS)), read(render(Page("", sections=(Section("", parts=tuple(PARTS)),))))
    assert html.text() == page.find("main")[0].text()


def test_its_style_has_all_the_rules_that_its_elements_have_on_the_page():
    used = set(re.findall(r"\.([a-z][\w-]*)", style_of(fragment(*PARTS))))
    shown = {name for e in read(fragment(*PARTS)).everything() for name in e.classes}
    on_the_page = set(re.findall(r"\.([a-z][\w-]*)", STYLE))
    assert shown & on_the_page <= used


def test_it_follows_the_theme_of_the_notebook_as_well_as_that_of_the_system():
    style = style_of(fragment(PARTS[0]))
    assert '[data-jp-theme-light="false"] .headwater' in style and ".vscode-dark .headwater" in style and '[data-jp-theme-light="true"] .headwater' in style
    dark = re.search(r"prefers-color-scheme: dark\)\{\.headwater\{([^}]*)\}", style).group(1)
    by_theme = re.search(r'html\[data-theme="dark"\] \.headwater\{([^}]*)\}', style).group(1)
    assert "--paper: #0e1417" in dark and by_theme.startswith(dark)


def test_a_small_piece_has_a_small_style():
    assert len(style_of(fragment(Gallery((Card("a", image=picture(0)),))))) < 0.6 * len(STYLE)
