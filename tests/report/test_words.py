"""What parts say: samples of curves against direct interpolation, and the rules for texts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.report import Bar, Card, Curve, Series, Table
from headwater.report.words import clean, measured, paragraphs, right_aligned, samples, score_words


def test_samples_of_a_straight_line_lie_on_it():
    x = np.linspace(0, 3, 50)
    rows = samples(Curve((Series("a", x, 2 * x), Series("ref", [0, 3], [0, 6], "reference")), "x", "y"), most=7).rows
    assert len(rows) == 7 and rows[0][0] == "0" and rows[-1][0] == "3.00"
    for across, ours, reference in rows:
        assert float(ours) == pytest.approx(2 * float(across), abs=0.02) and ours == reference


def test_nothing_is_read_off_beyond_a_line_or_in_its_gaps():
    part = Curve((Series("whole", [0, 1, 2, 3], [1, 1, 1, 1]), Series("part", [0, 1.5, 3], [2, None, 2]), Series("short", [1, 2], [3, 3])), "x", "y")
    assert [row[2] for row in samples(part).rows] == ["2.00", "–", "–", "–", "2.00"]
    assert [row[3] for row in samples(part).rows] == ["–", "3.00", "3.00", "3.00", "–"]


def test_a_line_that_turns_back_is_read_at_its_points_only():
    part = Curve((Series("a", [0, 2, 1, 3], [5, 6, 7, 8]), Series("b", [0, 0.5, 2], [1, 1, 1])), "x", "y")
    assert [row[1] for row in samples(part).rows] == ["5.00", "–", "7.00", "6.00", "8.00"]


def test_the_score_and_its_error_have_the_same_decimals():
    assert score_words(Card("c", score=-0.123456, stderr=0.0421)) == ("−0.123", "± 0.042")
    assert score_words(Card("c", score=1e-7, stderr=0.03)) == ("+0.000", "± 0.030")
    assert score_words(Card("c", score=1e-7, stderr=1e-8)) == ("+1.00e-07", "± 1.00e-08")
    assert score_words(Card("c", score=0.5, stderr=0.0)) == ("+0.500", "± 0.000")
    assert score_words(Card("c", score=float("nan"), stderr=0.1)) == ("nan", "± 0.10")


def test_an_interval_has_the_decimals_of_its_value():
    assert measured(Bar("a", 5.0, 4.9999, 5.0001)) == ("5.00000", "4.99990 to 5.00010")
    assert measured(Bar("a", None, 1.0, 2.0)) == ("–", "") and measured(Bar("a", 2.0)) == ("2.00", "")


def test_columns_of_quantities_are_told_from_columns_of_words():
    table = Table(("a", "b", "c", "d", "e"), (("12 s", "x", "", "−1", "#1"), ("–", "2", "", "3e-4", "#2")))
    assert right_aligned(table) == [True, False, False, True, False]
    assert right_aligned(Table(("a",), ())) == [False]


@given(st.text())
def test_clean_texts_hold_nothing_that_steers(words):
    kept = clean(words)
    assert not [c for c in kept if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"]
    assert clean(kept) == kept
    assert kept.encode("utf-8").decode("utf-8") == kept


def test_paragraphs_are_parted_by_empty_lines():
    assert clean("a\rb\r\nc") == "a\nb\nc"
    assert paragraphs("a\nb\n\n\n c \r\n\r\nd\n") == ["a\nb", "c", "d"] and paragraphs(" \n\n ") == []
