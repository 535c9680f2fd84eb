"""Rankings under each other, and the heat strips of their cards: the sign and the order are told in html and in text alike."""

import numpy as np
import pytest

from headwater.errors import InputError
from headwater.report import Card, Page, Ranking, Rankings, Section, Strip, text
from headwater.report.cards import rankings, strip
from tests.report.reading import picture, read

ROWS = (Ranking("TracIn", (Card("#1", score=8.0), Card("#2", score=4.0)), "as published"), Ranking("ReTrac", (Card("#3", score=0.5),)))


def said(part):
    return text(Page("t", sections=(Section("", parts=(part,)),)))


def test_each_ranking_has_its_own_scale():
    body = read(rankings(Rankings(ROWS)))
    widths = [[bar["width"] for bar in row.find("rect", class_="bar")] for row in body.find(testid="ranking")]
    assert widths == [["50%", "25%"], ["50%"]]
    assert body.find(class_="asked") == []


def test_the_query_and_what_stands_beside_it_come_before_the_rankings():
    part = Rankings(ROWS, Card("a generation", image=picture(1)), Ranking("Nearest", (Card("#9"),), "in pixels"))
    (asked,) = read(rankings(part)).find(class_="asked")
    assert asked.text().index("a generation") < asked.text().index("Nearest") < asked.text().index("#9")
    lines = said(part).splitlines()
    words = "a generation", "Nearest  in pixels", "#9", "TracIn  as published", "#1", "#2", "ReTrac", "#3"
    order = [next(k for k, line in enumerate(lines) if word in line) for word in words]
    assert order == sorted(order)


def test_a_strip_has_a_shade_for_each_value_of_its_sign_and_size():
    cells = read(strip(Strip((1.0, -0.5, 0.0, 0.04, None), "from clean to noise"))).find("i")
    assert [tuple(cell.classes) for cell in cells] == [("up", "l10"), ("down", "l5"), ("still", "l0"), ("up", "l1"), ("still", "l0")]
    (drawn,) = read(strip(Strip((1.0, -0.5, None), "from clean to noise"))).find(testid="strip")
    assert drawn["aria-label"] == "Influence from clean to noise: +1.00, −0.500, missing."


def test_a_strip_and_a_badge_of_a_card_stand_in_the_text_too():
    card = Card("#1", strip=Strip((1.0, -0.5, 0.0), "from clean to noise"), badge="in 3 of 24 lists")
    twin = said(Rankings((("TracIn", (card,)),)))
    assert "▕#= ▏" in twin and "in 3 of 24 lists" in twin and "Strips run from clean to noise." in twin
    assert read(rankings(Rankings((("TracIn", (card,)),)))).find(testid="badge")[0].text() == "in 3 of 24 lists"


def test_what_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="beside no query"):
        Rankings(ROWS, beside=ROWS[0])
    with pytest.raises(InputError, match="without values"):
        Strip(())
    assert Strip(np.array([0.0, np.nan])).limit == 1
