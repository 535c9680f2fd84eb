"""Bars and curves: lengths are proportional to values, places are affine in them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.report import Bar, Bars, Curve, Line, Series
from headwater.report.charts import bars, curve
from headwater.report.svg import HIGH, WIDE, Span
from tests.report.reading import percent, read

values = st.lists(st.floats(-100, 100).filter(lambda v: v == 0 or abs(v) > 1), min_size=1, max_size=6)


def rows(part):
    return read(bars(part)).find(testid="bar")


def bar(row):
    """(start, end) of the bar of a row, in percent, or None."""
    found = row.find("rect", class_="bar")
    return (percent(found[0]["x"]), percent(found[0]["x"]) + percent(found[0]["width"])) if found else None


def place(row, class_):
    return [percent(line["x1"]) for line in row.find("line", class_=class_)]


# ---- bars


@settings(deadline=None)
@given(values)
def test_bars_begin_at_zero_and_are_as_long_as_their_values(numbers):
    drawn = rows(Bars(tuple((f"b{k}", v) for k, v in enumerate(numbers))))
    (zero,) = {x for row in drawn for x in place(row, "zero")}
    unit = 100 / (Span.of([0.0, *numbers]).high - Span.of([0.0, *numbers]).low)
    for row, v in zip(drawn, numbers, strict=True):
        start, end = bar(row)
        assert (end if v < 0 else start) == pytest.approx(zero, abs=0.05)
        assert end - start == pytest.approx(abs(v) * unit, abs=0.05)
        assert start >= 0 and end <= 100.05
        assert ("down" if v < 0 else "up") in row.find("rect", class_="bar")[0].classes


def test_lengths_of_two_bars_are_as_their_values():
    short, long = (bar(row) for row in rows(Bars((("a", 0.1), ("b", 0.4)))))
    assert (long[1] - long[0]) / (short[1] - short[0]) == pytest.approx(4, rel=1e-3)


def test_the_whisker_spans_the_interval_on_the_axis_of_the_bar():
    (row,) = rows(Bars((Bar("a", 0.4, 0.3, 0.5),)))
    scale = (bar(row)[1] - bar(row)[0]) / 0.4
    (line,) = row.find("line", class_="whisker")
    assert percent(line["x1"]) == pytest.approx(0.3 * scale, rel=1e-3) and percent(line["x2"]) == pytest.approx(0.5 * scale, rel=1e-3)
    assert [percent(cap["x"]) for cap in row.find("rect", class_="cap")] == pytest.approx([0.3 * scale, 0.5 * scale], rel=1e-3)


def test_a_reference_line_stands_at_one_place_in_all_rows_and_is_named():
    part = Bars((("a", 0.2), ("b", 0.4)), lines=(Line("ceiling", 0.6), Line("chance", 0.1)))
    scale = bar(rows(part)[0])[1] / 0.2
    for row in rows(part):
        assert place(row, "reference") == pytest.approx([0.6 * scale, 0.1 * scale], rel=1e-3)
    named = read(bars(part)).find(testid="line")
    assert [row.text() for row in named] == ["ceiling 0.600", "chance 0.100"]
    assert [row.find("text")[0]["text-anchor"] for row in named] == ["end", "start"]


@pytest.mark.parametrize(
    ("values", "best", "leader"),
    [
        ((0.1, 0.4, 0.2), None, 1),
        ((3, 1, 2), "b1", 1),
        ((0.1, None, float("nan")), None, 0),
        ((0.2, 0.2), None, None),
        ((0.2,), None, None),
        ((), None, None),
        ((1, 2), "", None),
        ((-1, -2), None, 0),
    ],
)
def test_one_bar_is_set_off(values, best, leader):
    part = Bars(tuple((f"b{k}", v) for k, v in enumerate(values)), best=best)
    assert part.leader == leader
    assert [k for k, row in enumerate(rows(part)) if "best" in row.classes] == ([] if leader is None else [leader])


@pytest.mark.parametrize(("value", "words"), [(None, "–"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_what_was_not_measured_has_no_bar_and_says_so(value, words):
    missing, other = rows(Bars((Bar("a", value, 0.1, 0.2), Bar("b", 1.0))))
    assert bar(missing) is None and bar(other) is not None
    assert value is not None or missing.find("line", class_="whisker") == []
    assert words in missing.text().split()


def test_bars_of_zero_have_no_length():
    assert [bar(row)[1] - bar(row)[0] for row in rows(Bars((("a", 0.0), ("b", 0))))] == [0, 0]


# ---- curves


def series(part):
    """Per series in the order drawn: (classes, points of its lines, points of its dots), in units of the plot."""
    out = []
    for g in read(curve(part)).find(testid="series"):
        lines = [[tuple(map(float, p.split(","))) for p in line["points"].split()] for line in g.find("polyline")]
        dots = [(float(d["x1"]), float(d["y1"])) for d in g.find("line", class_="dot")]
        out.append((g.classes, lines, dots))
    return out


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=2, max_size=30))
def test_points_lie_where_their_values_say(points):
    x, y = zip(*points, strict=True)
    across, up = Span.of(x), Span.of(y)
    ((_, (line,), _),) = series(Curve((Series("s", x, y),), "x", "y"))
    for (a, b), (v, w) in zip(line, points, strict=True):
        assert a == pytest.approx(WIDE * (v - across.low) / (across.high - across.low), abs=0.06)
        assert b == pytest.approx(HIGH * (up.high - w) / (up.high - up.low), abs=0.06)
        assert -0.06 <= a <= WIDE + 0.06 and -0.06 <= b <= HIGH + 0.06


def test_a_gap_parts_the_line_and_a_lone_point_is_a_dot():
    nan = float("nan")
    y = [0, 1, 2, nan, None, 5, math.inf, *range(10)]
    ((_, lines, dots),) = series(Curve((Series("s", range(len(y)), y),), "x", "y"))
    assert [len(line) for line in lines] == [3, 10] and len(dots) == 1
    assert dots[0][0] == pytest.approx(WIDE * 5 / Span.of([0, len(y) - 1]).high, abs=0.06)


def test_a_short_line_shows_its_points():
    ((_, (line,), dots),) = series(Curve((Series("s", [0, 1, 2], [0, 1, 4]),), "x", "y"))
    np.testing.assert_allclose(dots, line, atol=0.06)


def test_one_point_is_one_dot():
    ((_, lines, dots),) = series(Curve((Series("s", [3], [4]),), "x", "y"))
    assert lines == [] and len(dots) == 1


def test_references_are_dotted_and_lie_under_what_was_measured():
    part = Curve((Series("a", [0, 1], [0, 1]), ("chance", [0, 1], [1, 0], "reference"), ("b", [0, 1], [1, 1])), "x", "y")
    assert [classes for classes, _, _ in series(part)] == [["reference", "r0"], ["measured", "m0"], ["measured", "m1"]]
    legend = read(curve(part)).find(class_="legend")[0].find("li")
    assert [item.text() for item in legend] == ["a", "chance", "b"]
    assert [item.find("g")[0].classes[1] for item in legend] == ["m0", "r0", "m1"]


def test_the_plot_is_named_for_those_who_do_not_see_it():
    frame = read(curve(Curve((Series("ours", [0, 1], [0, 1]),), "checked", "found"))).find(class_="frame")[0]
    assert frame["role"] == "img" and frame["aria-label"] == "found against checked: ours"


# ---- axes


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=5))
def test_a_span_holds_every_finite_value(numbers):
    span = Span.of(numbers)
    assert span.low < span.high and math.isfinite(span.low) and math.isfinite(span.high)
    shares = np.array([span.share(v) for v in numbers if math.isfinite(v)])
    assert ((shares >= -1e-6) & (shares <= 1 + 1e-6)).all()
