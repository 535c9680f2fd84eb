"""A card with an overlay: the pixels under the picture, their sums in words, in the page and in its text twin."""

import numpy as np
import pytest

from headwater.report import Attribution, Card, Exhibit, Gallery, Overlay, Page, Section, render, text

IMAGE = np.full((8, 8), 200, np.uint8)
PART = Overlay("#7", np.diag([0.5, -0.25, 0, 0, 0, 0, 0, 1.0]), IMAGE, subtitle="gap 0.01", flag="missed the tolerance")
SUMS = "pixels ▲\N{NO-BREAK SPACE}+1.50 ▼\N{NO-BREAK SPACE}−0.250"


def page(*parts):
    return Page("Owed to", sections=(Section("", parts=parts),))


@pytest.mark.parametrize(
    "part", [Attribution(Card("#7", image=IMAGE, overlay=PART)), Gallery((Card("#7", image=IMAGE, score=1.0, overlay=PART),))], ids=lambda p: type(p).__name__
)
def test_the_pixels_are_a_picture_with_words(part):
    html, twin = render(page(part)), " ".join(text(page(part)).split(" "))
    assert html.count('data-testid="carried"') == 1 and html.count("The scale of colours") == 1
    assert "Pixels that pushed up sum to +1.50, pixels that pushed down to −0.250" in html
    for words in (SUMS, "gap 0.01", "missed the tolerance"):
        assert words in html and words in twin
    assert html.index("Image of #7") < html.index('data-testid="carried"') < html.index('class="title"')


def test_cards_without_one_are_as_they_were():
    cards = Gallery((Card("#7", image=IMAGE, score=1.0),))
    html = render(page(cards))
    assert 'data-testid="carried"' not in html and "The scale of colours" not in html and "pixels" not in text(page(cards))


def test_an_exhibit_lays_them_over_the_examples_that_it_has_them_of():
    shelf = Exhibit(np.zeros((3, 8, 8), np.uint8), overlays={1: PART})
    assert [shelf.card(i).overlay for i in range(3)] == [None, PART, None]
