"""Markup: a text can only ever become a text."""

from hypothesis import given
from hypothesis import strategies as st

from headwater.report.markup import Markup, escaped, tag
from headwater.report.words import clean
from tests.report.reading import read


@given(st.text())
def test_a_text_comes_back_as_it_was(words):
    (element,) = read(tag("p", words, title=words)).children
    assert "".join(element.children) == clean(words) and element["title"] == clean(words)


def test_markup_is_escaped_once():
    assert tag("b", tag("i", "<")) == "<b><i>&lt;</i></b>"
    assert escaped(Markup("<br>")) == "<br>" and escaped(["<br>", None, False, Markup("<br>")]) == "&lt;br&gt;<br>"


def test_attributes_can_be_left_out_or_bare():
    assert tag("p", class_="a", hidden=True, title=None, lang=False, x=0.5) == '<p class="a" hidden x="0.5"></p>'
    assert tag("img", src="a&b") == '<img src="a&amp;b">'
