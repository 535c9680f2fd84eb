"""The twin: blocks as long as values, columns that line up, nothing that breaks a terminal's lines."""

import pytest

from headwater.report import Attribution, Axis, Bars, Card, Curve, Figures, Page, Prose, Section, Series, Table, text
from headwater.report.layout import WIDTH


def lines(*parts):
    return text(Page("t", sections=(Section("", parts=parts),))).splitlines()[3:]


def blocks(line):
    return sum(line.count(c) * n / 8 for n, c in enumerate("▏▎▍▌▋▊▉█", 1))


def test_bars_are_as_long_as_their_values():
    short, long = lines(Bars((("a", 0.1), ("b", 0.4))))
    assert blocks(long) == pytest.approx(4 * blocks(short), abs=0.5) and blocks(long) == 40


def test_a_negative_bar_ends_where_a_positive_one_begins():
    down, up = lines(Bars((("a", -1.0), ("b", 1.0))))
    assert down.rindex("█") + 1 == up.index("█") and down.count("█") == up.count("█") == 20


def test_an_interval_and_a_line_are_drawn_where_they_are():
    row = lines(Bars((("a", 0.5, 0.4, 0.7),), lines=(("ceiling", 1.0),)))[1]
    strip = row[row.index("█") :]
    assert strip[:40] == "█" * 20 + "─" * 8 + " " * 11 + "┊"


def test_the_best_bar_is_marked():
    assert [line[0] for line in lines(Bars((("a", 0.1), ("b", 0.4), ("c", 0.2))))] == [" ", "▸", " "]


def test_scores_point_to_the_side_of_their_sign():
    part = Attribution(Card("q"), (Card("a", score=1.0), Card("b", score=0.5)), (Card("c", score=-1.0),))
    a, b, c = (line for line in lines(part) if "│" in line)
    assert a.endswith("│" + "█" * 10) and b.endswith("│" + "█" * 5) and c.endswith("█" * 10 + "│")
    assert [line.split()[0] for line in (a, b, c)] == ["▲", "▲", "▼"]


def test_a_score_that_cannot_be_told_from_zero_is_hollow():
    sure, unsure = (lines(Attribution(Card("q"), (Card("a", score=1.0, stderr=e),)))[3] for e in (0.1, 0.9))
    assert "█" in sure and "░" not in sure
    assert "░" in unsure and "█" not in unsure


@pytest.mark.parametrize(("name", "columns"), [("TracIn", 6), ("日本語", 6), ("e\u0301te\u0301", 3)])
def test_columns_line_up_whatever_the_script(name, columns):
    rows = lines(Table(("a", "unit"), ((name, "log-odds"), ("A method", "rank"))))
    assert rows[2] == name + " " * (8 - columns) + "  log-odds" and rows[3] == "A method  rank"


def test_quantities_line_up_at_the_right():
    table = lines(Table(("method", "time"), (("a", "2.1 s"), ("b", "38.0 s"), ("c", "–"))))
    assert len({len(line) for line in table}) == 1


def test_a_line_end_in_a_cell_does_not_break_the_table():
    assert len(lines(Table(("a", "b"), (("one\ntwo\r\nthree", "x"),)))) == 3


def test_long_paragraphs_are_wrapped_and_long_words_are_not_cut():
    word = "w" * (WIDTH + 20)
    wrapped = lines(Prose("several words " * 40 + word))
    assert word in wrapped and all(len(line) <= WIDTH for line in wrapped if line != word)


def test_a_curve_is_a_small_table_from_its_first_to_its_last_point():
    x = [k / 100 for k in range(101)]
    rows = lines(Curve((Series("ours", x, [v * v for v in x]),), Axis("checked", form="percent"), "found"))
    assert rows[0] == "found" and rows[1].split() == ["checked", "ours"]
    assert rows[3].split() == ["0", "%", "0"] and rows[-1].split() == ["100", "%", "1.00"] and len(rows) == 12


def test_a_part_of_a_block_lies_on_the_side_of_zero():
    up, down = (line for line in lines(Attribution(Card("q"), (Card("a", score=1.0),), (Card("b", score=-0.55),))) if "│" in line)
    assert down.endswith("  " + " " * 4 + "▐█████│") and up.endswith("│" + "█" * 10)


def test_columns_without_a_text_take_no_room():
    assert lines(Bars((("a", 1.0, None, None, "a note"),)))[0].endswith("█  1.00  a note")
    assert lines(Figures((("LDS", "0.42"), ("cost", "12 s")))) == ["LDS   0.42", "cost  12 s"]


def test_zero_is_in_one_column_for_all_cards_of_an_attribution():
    part = Attribution(Card("q"), (Card("#1", "a long label", score=1.0), Card("#20", score=0.123)), (Card("#3", "b", text="words", score=-1.0),))
    assert len({line.index("│") for line in lines(part) if "│" in line}) == 1
