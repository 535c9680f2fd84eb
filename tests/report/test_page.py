"""The page: complete by itself, complete in its text twin, and deaf to what the texts on it would like to be."""

import base64
import hashlib
import os
import re
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.errors import InputError, StorageError
from headwater.report import Attribution, Card, Page, Part, Prose, Section, page, render, text, write
from headwater.report.page import RENDERERS
from headwater.report.text import TWINS
from tests.report.reading import degenerate, everything, picture, pixels, read

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><img src=https://evil.example/x onerror=alert(1)>",
    "\" onload=\"alert(1)' onclick='alert(1)",
    "<!-- --><svg/onload=alert(1)>]]>&lt;&#60;&amp;",
    "</title></p></div></body></html><base href=//evil.example>",
    "\x1b[2J\x1b]0;owned\x07\x00\x9b31m\ud800 \u202eabc",
]


def seen(content):
    return [" ".join(t.split()) for t in read(content).texts() if t.strip()]


def said(content):
    return " ".join(content.split())


# ---- the twin


@pytest.mark.parametrize("given_page", [everything(), *degenerate()], ids=lambda p: p.sections and p.sections[0].parts and type(p.sections[0].parts[0]).__name__)
def test_every_text_on_the_page_stands_in_its_twin(given_page):
    twin = said(text(given_page))
    missing = [t for t in seen(render(given_page)) if t not in twin]
    assert not missing


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=200))
def test_every_text_on_the_page_stands_in_its_twin_whatever_it_says(words):
    given_page = everything(lambda _: words)
    twin = said(text(given_page))
    assert [t for t in seen(render(given_page)) if t not in twin] == []


def test_nothing_that_a_page_is_given_is_left_out_of_it_or_of_its_twin():
    given_words = []

    def say(words):
        given_words.append(f"{words.split()[0]}{len(given_words)}z")
        return given_words[-1]

    given_page = everything(say)
    on_the_page, in_the_twin = " ".join(seen(render(given_page))), said(text(given_page))
    assert len(given_words) > 50
    assert [words for words in given_words if words not in on_the_page] == []
    assert [words for words in given_words if words not in in_the_twin] == []
    for value in ("0.420 0.370 to 0.470", "+0.50 ± 0.10", "−0.750 ± 0.020", "0.700"):
        assert value in on_the_page and value in re.sub(r"(\d)z?\s+", r"\1 ", in_the_twin)


def test_every_part_has_a_renderer_and_a_twin():
    assert set(RENDERERS) == set(TWINS) == set(typing.get_args(Part))


@pytest.mark.parametrize("show", [render, text])
def test_what_is_no_part_is_named(show):
    with pytest.raises(InputError, match=r"holds Section.*\nExpected: one of Prose, Figures, Bars"):
        show(Page("t", sections=(Section("", parts=(Section("nested"),)),)))


def test_every_part_can_be_found_by_its_testid():
    body = read(render(everything()))
    for name in ("title", "subtitle", "section", "figures", "figure", "bars", "bar", "line", "curve", "series", "table", "prose"):
        assert body.find(testid=name), name
    for name in ("attribution", "query", "proponents", "opponents", "card", "flag", "gallery", "rankings", "ranking", "strip", "badge", "footer"):
        assert body.find(testid=name), name


def test_sections_are_reached_from_the_top_and_names_are_used_once():
    body = read(render(everything()))
    names = [e["id"] for e in body.everything() if e.get("id")]
    assert len(set(names)) == len(names) == 14
    assert [a["href"] for a in body.find("nav")[0].find("a")] == [f"#{name}" for name in names]
    assert [section.find("h2")[0].text() for section in body.find(testid="section")] == ["A section"] * 14


# ---- by itself


def test_the_page_asks_nothing_of_the_network():
    content = render(everything())
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"data:image/png;base64,[\w+/=]+", "", content.replace("// A larger view", "")))
    for element in read(content).everything():
        assert element.tag not in {"link", "iframe", "object", "embed", "base", "form", "video", "audio", "source", "use"}
        assert (element.get("src") or "data:").startswith("data:image/png;base64,") or element.tag != "img"
        assert "src" not in element.attributes or element.tag == "img"
        assert (element.get("href") or "#").startswith("#")
        assert not {"style", "srcset", "xlink:href", "action"} & set(element.attributes)


def test_the_page_forbids_itself_everything_but_its_own_style_and_script():
    body = read(render(everything()))
    (policy,) = [meta["content"] for meta in body.find("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert rules.pop("img-src") == "data:"
    for tag in ("style", "script"):
        (element,) = body.find(tag)
        digest = base64.b64encode(hashlib.sha256("".join(element.children).encode()).digest()).decode()
        assert rules.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert not rules


@pytest.mark.parametrize("shape", [(28, 28), (1, 1), (3, 200), (17, 5, 3), (256, 256, 3)])
def test_every_picture_has_the_pixels_it_was_given(shape):
    images = [picture(seed, *shape) for seed in range(4)]
    cards = [Card(f"#{k}", image=image, score=1.0) for k, image in enumerate(images)]
    body = read(render(Page("t", sections=(Section("", parts=(Attribution(cards[0], cards[1:3], cards[3:]),)),))))
    shown = body.find("img")
    assert len(shown) == 4
    for image, element in zip(images, shown, strict=True):
        np.testing.assert_array_equal(pixels(element["src"]), image)


# ---- hostile texts


def shape(content):
    """The elements, without what stands in them."""
    return [(e.tag, sorted(e.attributes), e.get("class"), e.get("role")) for e in read(content).everything()]


@pytest.mark.parametrize("words", HOSTILE)
def test_a_hostile_text_stays_a_text(words):
    content, harmless = render(everything(lambda _: words)), render(everything(lambda _: "words"))
    assert shape(content) == shape(harmless)
    visible = "".join("\ufffd" if c < " " or "\x7f" <= c <= "\x9f" or c == "\ud800" else c for c in words)
    assert " ".join(visible.split()) in seen(content)


@pytest.mark.parametrize("words", HOSTILE)
def test_a_hostile_text_does_not_steer_the_terminal(words):
    lines = text(everything(lambda _: words))
    assert not [c for c in lines if (c < " " and c != "\n") or "\x7f" <= c <= "\x9f"]
    assert lines.encode("utf-8")


# ---- the file


def test_write_makes_the_file_that_render_makes(tmp_path):
    target = write(everything(), tmp_path / "owed.html")
    assert target == tmp_path / "owed.html" and target.read_text(encoding="utf-8") == render(everything())
    assert os.listdir(tmp_path) == ["owed.html"]


def test_write_takes_texts_that_no_file_could_hold(tmp_path):
    assert "\ufffd" in write(Page("\ud800"), str(tmp_path / "x.html")).read_text(encoding="utf-8")


def test_a_refusal_of_the_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "owed.html"
    target.write_text("old")

    def refuse(source, destination):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.os, "replace", refuse)
    with pytest.raises(StorageError, match=r"owed\.html.*No space left on device(.|\n)*Expected: \d+ bytes"):
        write(Page("new"), target)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["owed.html"]


def test_a_folder_that_refuses_is_named(tmp_path, monkeypatch):
    def refuse(self, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(page.Path, "write_bytes", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        write(Page("t"), tmp_path / "owed.html")


def test_a_missing_folder_and_a_folder_in_place_of_a_file_are_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no folder .*missing(.|\n)*create the folder"):
        write(Page("t"), tmp_path / "missing" / "owed.html")
    with pytest.raises(InputError, match=r"is a folder(.|\n)*report\.html"):
        write(Page("t"), tmp_path)


def test_paragraphs_stay_apart():
    body = read(render(Page("t", sections=(Section("", parts=(Prose("one\nline\n\n \n two"),)),))))
    assert [p.text() for p in body.find(testid="prose")[0].find("p")] == ["one line", "two"]
