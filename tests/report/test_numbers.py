"""Numbers as they are read: what is written is the value, to the digits shown."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.report.numbers import alike, is_quantity, number, percent, places, plain, signed, ticks

any_size = st.floats(allow_nan=False, allow_infinity=False)
finite = st.floats(-1e300, 1e300)


def back(text):
    return float(text.replace("−", "-"))


@given(finite)
def test_a_number_is_written_to_three_digits(value):
    text = number(value)
    assert back(text) == pytest.approx(value, rel=5.1e-3, abs=1e-320)
    assert "-" not in text.removeprefix("−").replace("e-", "") and len(text) <= 11


@given(finite.filter(lambda v: v != 0))
def test_the_sign_is_always_written(value):
    assert signed(value)[0] == ("+" if value > 0 else "−") and back(signed(value)) == back(number(value))


def test_what_has_no_value_is_written_too():
    assert [number(v) for v in (None, math.nan, math.inf, -math.inf, -0.0)] == ["–", "nan", "inf", "−inf", "0"]
    assert signed(math.nan) == "nan" and signed(-0.0) == "0"


@given(any_size, any_size)
def test_ticks_are_even_round_and_hold_the_range(a, b):
    low, high = sorted((a, b))
    marks = ticks(low, high)
    slack = 1e-9 * max(abs(low), abs(high)) + 1e-300  # below that a float is zero
    assert marks[0] <= low + slack and marks[-1] >= high - slack and 2 <= len(marks) <= 8
    steps = [after / 2 - before / 2 for before, after in pairwise(marks)]
    assert min(steps) > 0
    size = max(abs(low), abs(high))
    if 1e-6 * size < high - low and size <= 1e307:  # else the ticks are the float's own neighbours, or its largest
        assert max(steps) == pytest.approx(min(steps), rel=1e-3)
        digit = f"{2 * steps[0]:.0e}"[0]
        assert digit in "125"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.46), (-3, 7), (0, 1e-4), (0, 3e-15), (0, 250_000), (0, 8e9), (1000, 1005)])
def test_tick_labels_are_their_values_and_all_different(low, high):
    marks = ticks(low, high)
    labels = plain(marks)
    assert [back(label) for label in labels] == pytest.approx(list(marks), rel=1e-9, abs=1e-30) and len(set(labels)) == len(labels)


def test_tick_labels_have_the_same_decimals():
    assert plain([0, 0.25, 0.5, 1]) == ["0", "0.25", "0.50", "1.00"] and plain([]) == []


@given(st.lists(finite, min_size=1, max_size=3), st.integers(0, 6))
def test_numbers_alike_are_their_values_to_the_decimals_shown(values, decimals):
    for text, value in zip(alike(values, decimals), values, strict=True):
        assert back(text) == pytest.approx(value, rel=5.1e-3, abs=0.51 * 10.0**-decimals)


@given(st.floats(1e-5, 1e6), st.integers(1, 3))
def test_places_show_the_digits_asked_for(size, digits):
    assert abs(float(f"{size:.{places(size, digits)}f}") - size) <= 0.51 * 10.0 ** (math.floor(math.log10(size)) + 2 - digits)


@given(st.floats(-5, 5))
def test_a_percentage_is_a_hundred_times_its_share(value):
    assert back(percent(value).removesuffix(" %")) == pytest.approx(100 * value, rel=5.1e-3)


@given(finite)
def test_every_number_reads_as_a_quantity(value):
    assert is_quantity(number(value)) and is_quantity(signed(value)) and is_quantity(percent(value))
