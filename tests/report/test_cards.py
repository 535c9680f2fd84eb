"""Cards: the side of a bar is the sign, its length the score, and neither has to be told by colour."""

import numpy as np
import pytest

from headwater.report import Attribution, Card, Gallery
from headwater.report.cards import attribution, gallery
from tests.report.reading import percent, picture, read

SCORES = [0.8, 0.2, -0.4, -0.1, 0.0]


def drawn(cards):
    return read(gallery(Gallery(tuple(cards)))).find(testid="card")


def bar(card):
    found = card.find("rect", class_="bar")
    return (percent(found[0]["x"]), percent(found[0]["x"]) + percent(found[0]["width"])) if found else None


def test_bars_grow_from_the_middle_to_the_side_of_the_sign():
    for card, score in zip(drawn(Card("c", score=s) for s in SCORES), SCORES, strict=True):
        start, end = bar(card)
        assert (end if score < 0 else start) == 50
        assert end - start == pytest.approx(50 * abs(score) / 0.8, abs=0.01)


def test_the_sign_is_written_and_drawn_as_a_shape():
    up, _, down, _, zero = drawn(Card("c", score=s) for s in SCORES)
    signs = [card.find(class_="sign")[0].children for card in (up, down, zero)]
    assert signs == [["▲"], ["▼"], ["•"]]
    assert "+0.800" in up.text() and "−0.400" in down.text() and "+" not in zero.text()


def test_cards_of_an_attribution_share_one_scale():
    part = Attribution(Card("q"), (Card("a", score=0.5),), (Card("b", score=-2.0),))
    body = read(attribution(part))
    assert bar(body.find(testid="proponents")[0].find(testid="card")[0]) == (50, 62.5)
    assert bar(body.find(testid="opponents")[0].find(testid="card")[0]) == (0, 50)
    assert body.find(testid="query")[0].find(class_="push") == []


def test_a_score_that_pushed_down_is_drawn_so_even_among_the_proponents():
    part = Attribution(Card("q"), (Card("a", score=-1.0),))
    assert bar(read(attribution(part)).find(testid="card")[0]) == (0, 50)


def test_the_whisker_spans_two_standard_errors_and_stays_within():
    (card,) = drawn([Card("c", score=0.6, stderr=0.2)])
    (line,) = card.find("line", class_="whisker")
    assert (percent(line["x1"]), percent(line["x2"])) == pytest.approx((60, 100), abs=0.01)
    assert "± 0.20" in card.text()


@pytest.mark.parametrize(("score", "stderr", "doubtful"), [(1.0, 0.6, True), (1.0, 0.4, False), (-1.0, 0.6, True), (0.1, None, False), (0.0, 0.0, True)])
def test_a_score_that_cannot_be_told_from_zero_is_hollow(score, stderr, doubtful):
    (card,) = drawn([Card("c", score=score, stderr=stderr)])
    assert ("doubtful" in card.classes) == doubtful == Card("c", score=score, stderr=stderr).doubtful


def test_the_meaning_of_the_whisker_is_written_only_where_there_is_one():
    with_error, without = (read(gallery(Gallery((Card("c", score=1.0, stderr=e),)))).text() for e in (0.1, None))
    assert "standard error" in with_error and "standard error" not in without


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_has_no_bar_and_does_not_spoil_the_scale(score):
    bad, good = drawn([Card("bad", score=score), Card("good", score=2.0)])
    assert bar(bad) is None and bar(good) == (50, 100)
    assert ("nan" if np.isnan(score) else "inf") in bad.text()


def test_a_flag_is_a_chip_with_its_words():
    marked, plain = drawn([Card("a", flag="label was flipped"), Card("b")])
    assert marked.find(testid="flag")[0].text() == "label was flipped" and plain.find(testid="flag") == []


def test_small_images_are_drawn_with_crisp_pixels_and_every_image_says_what_it_is():
    digit, photograph = (card.find("img")[0] for card in drawn([Card("#1", image=picture(0)), Card("#2", image=picture(0, 200, 300, 3))]))
    assert "crisp" in digit.classes and "crisp" not in photograph.classes
    assert (digit["alt"], photograph["alt"]) == ("Image of #1", "Image of #2")


def test_cards_with_texts_get_room_to_be_read():
    assert read(gallery(Gallery((Card("a", text="words"),)))).find("ol")[0].classes == ["cards", "wordy"]
    assert read(gallery(Gallery((Card("a"),)))).find("ol")[0].classes == ["cards"]
