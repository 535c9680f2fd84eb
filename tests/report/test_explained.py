"""Explanations drawn: hue, side and shape follow the sign, lengths follow the numbers, and nothing depends on colour alone."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import InputError
from headwater.report import Dots, Matrix, Overlay, Page, Section, Signal, Signals, Step, Swarm, Tokens, Waterfall, render, text
from headwater.report.explained import matrix, offsets, signals, swarm, tokens, waterfall
from headwater.report.overlays import DOWN, UP, blend, overlay, ramp
from tests.report.reading import percent, picture, pixels, read

floats = st.floats(-1e6, 1e6, allow_nan=False)


# ---- records


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Overlay("#1", np.zeros(4)), r"'#1' have shape \(4,\)(.|\n)*values.sum\(0\)"),
        (lambda: Overlay("#1", np.zeros((2, 2)), baseline=np.zeros((2, 2))), "baseline of '#1' has shape .* float64"),
        (lambda: Tokens("#1", ("a", "b"), (1.0,)), "2 tokens and 1 scores"),
        (lambda: Tokens("#1", ("a",), (1.0,), stderr=(1.0, 2.0)), "1 tokens and 2 standard errors"),
        (lambda: Waterfall("#1", 0.0, 2.0, (("a", 1.0),)), r"lead from 0.0 to 1.0(.|\n)*to 2.0"),
        (lambda: Swarm((("a", (1.0, 2.0), (0.5,)),)), "'a' has 2 scores and 1 ranks"),
        (lambda: Signals("#1", ()), "'#1' has no channels"),
        (lambda: Signals("#1", (("x", (1.0,), (1.0, 2.0)),)), "'x' has 1 values and 2 scores"),
        (lambda: Matrix("#1", ("a",), np.zeros((2, 2))), r"1 names and values of shape \(2, 2\)"),
    ],
)
def test_every_refusal_says_what_was_given_and_expected(make, message):
    with pytest.raises(InputError, match=message):
        make()


# ---- images


def test_hue_is_the_sign_and_opacity_the_size():
    mixed = blend(np.array([[1.0, 0.5, 0.0, -0.5, -1.0, 9.0, np.nan]]), 1.0).astype(float)[0]
    plain = mixed[2]
    for k, full in ((0, UP), (4, DOWN)):
        assert np.abs(mixed[k] - (0.08 * plain + 0.92 * full)).max() <= 1  # full colours let a little of the image through
    assert np.abs(mixed[1] - (plain + mixed[0]) / 2).max() <= 1 and np.abs(mixed[3] - (plain + mixed[4]) / 2).max() <= 1
    assert (mixed[5] == mixed[0]).all() and (mixed[6] == plain).all()


def test_a_picture_without_scores_is_grey_and_keeps_its_order_of_brightness():
    image = picture(3)
    drawn = blend(np.zeros((28, 28)), 1.0, image).astype(int)
    assert (np.ptp(drawn, axis=2) == 0).all()
    order = np.argsort(image, axis=None)
    assert (np.diff(drawn[..., 0].ravel()[order]) >= 0).all()


def test_a_coarse_map_is_stretched_over_its_image():
    fine = blend(np.array([[1.0, -1.0]]), 1.0, np.zeros((4, 8), np.uint8))
    assert (fine[:, :4] == fine[0, 0]).all() and (fine[:, 4:] == fine[0, 7]).all() and (fine[0, 0] != fine[0, 7]).any()


def test_opacity_is_full_at_the_99th_percentile_of_the_sizes():
    values = np.random.default_rng(0).normal(size=(30, 30))
    values[0, 0] = 1e6
    assert Overlay("#1", values).limit == np.percentile(np.abs(values), 99) < 4
    assert Overlay("#1", np.eye(50) * 1e-3).limit == pytest.approx(1e-3) and Overlay("#1", np.eye(200) * 3).limit == 3.0  # few: the largest
    assert Overlay("#1", values, scale=7.0).limit == 7.0 and Overlay("#1", np.zeros((2, 2))).limit == 1.0


def test_input_baseline_and_scores_stand_side_by_side_each_with_its_words():
    image, base, values = picture(1, 9, 9, 3), picture(2, 9, 9, 3), np.random.default_rng(0).normal(size=(9, 9))
    figure = read(overlay(Overlay("#7", values, image, base)))
    shown = [img for pane in figure.find(testid="pane") for img in pane.find("img")]
    assert [img["alt"] for img in shown] == ["#7: input", "#7: baseline", "#7: what pushed it up or down"]
    np.testing.assert_array_equal(pixels(shown[0]["src"]), image)
    np.testing.assert_array_equal(pixels(shown[1]["src"]), base)
    np.testing.assert_array_equal(pixels(shown[2]["src"]), blend(values, Overlay("#7", values).limit, image))
    assert all(img["alt"] for img in figure.find("img"))
    np.testing.assert_array_equal(pixels(figure.find(class_="ramp")[0].find("img")[0]["src"]), ramp())
    assert f"+{values[values > 0].sum():.1f}" in figure.text() and f"−{-values[values < 0].sum():.1f}" in figure.text()


def test_the_strongest_pixels_are_named():
    values = np.zeros((20, 20))
    values[3, 17], values[8, 2] = -2.0, 1.5
    rows = [[cell.text() for cell in row.find("td")] for row in read(overlay(Overlay("#1", values))).find("tr")[1:3]]
    assert rows == [["3", "17", "−2.00"], ["8", "2", "+1.50"]]


def test_the_map_of_letters_tells_the_sides_apart():
    values = np.zeros((32, 64))
    values[:, :8], values[:, -8:] = 1.0, -1.0
    lines = text(Page("t", sections=(Section("", parts=(Overlay("#1", values),)),))).splitlines()
    maps = [line for line in lines if "#" in line and "%" in line]
    assert len(maps) == 16 and all(line == "  " + "####" + " " * 24 + "%%%%" for line in maps)


# ---- texts


def test_pieces_say_their_side_by_class_line_mark_and_title():
    figure = read(tokens(Tokens("#1", ("not", "bad", "at"), (-0.5, 1.0, 0.0))))
    down, up, still = figure.find(testid="token")
    assert down.classes == ["tok", "down", "l5"] and up.classes == ["tok", "up", "l10"] and still.classes == ["tok", "still", "l0"]
    assert (down["title"], up["title"], still["title"]) == ("−0.500", "+1.00", "0")
    assert [piece.find("sup")[0].children for piece in (down, up)] == [["▼"], ["▲"]] and still.find("sup") == []
    style = render(Page(""))
    assert re.search(r"\.tok\.up \{ border-bottom: 2px solid", style) and re.search(r"\.tok\.down \{ border-bottom: 2px dashed", style)


@pytest.mark.parametrize(
    ("pieces", "read_as"),
    [
        (("un", "##bear", "##able", "film"), "unbearable film"),
        (("The", "Ġfilm", "Ġwas", "n't"), "The film wasn't"),
        (("▁The", "▁fil", "m"), "The film"),
        (("The", " film", ", too"), "The film, too"),
        (("two", "words"), "two words"),
    ],
)
def test_a_text_reads_as_it_was_written(pieces, read_as):
    paragraph = read(tokens(Tokens("#1", pieces, (1.0,) + (0.0,) * (len(pieces) - 1)))).find("p", class_="tokens")[0]
    assert "".join(paragraph.texts()) == read_as


def test_every_token_stands_in_the_table_with_its_score():
    part = Tokens("#1", ("not", "", "bad"), (-0.5, 0.25, 1.0), stderr=(0.1, 0.0, 0.2))
    rows = [[cell.text() for cell in row.find("td")] for row in read(tokens(part)).find("tr")[1:]]
    assert rows == [["0", "not", "−0.500", "0.100"], ["1", "∅", "+0.250", "0"], ["2", "bad", "+1.00", "0.200"]]


# ---- waterfalls


@given(st.lists(floats, min_size=1, max_size=12), floats)
def test_each_bar_begins_where_the_one_before_ended_and_the_last_ends_at_the_output(scores, start):
    end = start + sum(scores)
    part = Waterfall("#1", start, end, tuple((f"f{k}", s) for k, s in enumerate(scores)))
    assert part.totals[0] == start and part.totals[-1] == pytest.approx(end, abs=1e-6 * (abs(start) + sum(map(abs, scores))))
    assert np.allclose(np.diff(part.totals), scores, rtol=1e-9, atol=1e-6)
    rows = read(waterfall(part)).find(testid="step")
    assert len(rows) == len(scores) + 2
    at = percent(rows[0].find("line", class_="total")[0]["x1"])
    for row, score in zip(rows[1:-1], scores, strict=True):
        (bar,) = row.find("rect")
        low, width = percent(bar["x"]), percent(bar["width"])
        assert ("up" in bar.classes) == (score > 0) or width == 0
        assert (low if score >= 0 else low + width) == pytest.approx(at, abs=0.06)
        at = low + width if score > 0 else low
        assert percent(row.find("line", class_="joint")[0]["x1"]) == pytest.approx(at, abs=0.06)
    assert percent(rows[-1].find("line", class_="total")[0]["x1"]) == pytest.approx(at, abs=0.06)


def test_the_values_of_the_features_stand_beside_their_names():
    rows = read(waterfall(Waterfall("#1", 1.0, 1.5, (Step("age", 0.75, "28 days", 0.1), ("water", -0.25))))).find(testid="step")
    assert [row.text() for row in rows] == ["output at the baseline 1.00", "age 28 days +0.750 ± 0.100", "water −0.250", "output 1.50"]
    assert [row.find(class_="sign")[0].children for row in rows[1:3]] == [["▲"], ["▼"]]


# ---- swarms


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_dots_stay_in_their_row_and_those_of_equal_score_apart(shares):
    moved = offsets(shares)
    assert moved == offsets(shares) and max(map(abs, moved)) <= 0.5
    assert len(set(zip(shares, moved, strict=True))) == len(shares)


def test_a_dot_stands_at_its_score_in_the_shade_of_its_rank():
    row = read(swarm(Swarm((Dots("age", (0.0, 1.0, -0.5, np.nan), (0.0, 1.0, 0.5, 0.5), "0.5"),)))).find(testid="dots")[0]
    places = {path.classes[-1]: [float(x) for x in re.findall(r"M([\d.]+) ", path["d"])] for path in row.find("path")}
    low, high = -0.5, 1.0
    assert places == {"q0": [pytest.approx(1000 * (0 - low) / (high - low), abs=0.1)], "q6": [1000.0], "q3": [0.0]}


# ---- series


def test_columns_rise_where_it_was_pushed_up_and_hang_where_down():
    figure = read(signals(Signals("#1", (Signal("x", (1, 2, 3, 4), (1.0, 0.0, -0.5, 2.0)), Signal("y", None, (0.0, 0.0, 0.0, -2.0))))))
    x, y = figure.find(testid="channel")
    tall = {path.classes[-1]: [(float(a), -float(v)) for a, v in re.findall(r"M([\d.]+) 50v(-?[\d.]+)h", path["d"])] for path in x.find("path")}
    assert tall == {"up": [(0.0, 24.0), (750.0, 48.0)], "down": [(500.0, -12.0)]}
    assert [path.classes[-1] for path in y.find("path")] == ["down"]
    assert len(x.find("polyline")[0]["points"].split()) == 4 and y.find("polyline") == []
    assert "x +2.50" in x.text() and "y −2.00" in y.text()


# ---- pairs


def test_small_matrices_have_numbers_large_ones_marks_and_all_have_titles():
    values = np.array([[1.0, -0.5], [-0.5, 0.0]])
    cells = read(matrix(Matrix("#1", ("a", "b"), values))).find(testid="cell")
    assert [cell.text() for cell in cells] == ["+1.00", "−0.500", "−0.500", "0"]
    assert [cell["title"] for cell in cells][1] == "a × b: −0.500" and cells[1].classes == ["cell", "down", "l5"]
    large = np.diag(np.arange(1.0, 10.0))
    large[0, 1] = large[1, 0] = -3.0
    marks = read(matrix(Matrix("#1", tuple("abcdefghi"), large))).find(testid="cell")
    assert [cell.text() for cell in marks[:3]] == ["▲", "▼", "•"]


def test_a_pair_is_the_sum_of_its_two_halves_listed_by_size():
    values = np.array([[0, 1, -3.0], [1, 0, 0.5], [-3, 0.5, 9]])
    assert Matrix("#1", ("a", "b", "c"), values).pairs == (("a", "c", -6.0), ("a", "b", 2.0), ("b", "c", 1.0))
    assert Matrix("#1", ("a", "b", "c"), values, symmetric=False).pairs[:2] == (("a", "c", -3.0), ("c", "a", -3.0))


def test_of_a_large_matrix_the_features_with_the_largest_rows_are_drawn_and_this_is_said():
    values = np.zeros((40, 40))
    values[5], values[:, 39] = 1.0, 2.0
    figure = read(matrix(Matrix("#1", tuple(f"f{k}" for k in range(40)), values)))
    shown = [th.text() for th in figure.find("tbody")[0].find("th")]
    assert len(shown) == 24 and "f5" in shown and "f39" in shown and shown == sorted(shown, key=lambda name: int(name[1:]))
    assert "24 of 40 features" in figure.text()
