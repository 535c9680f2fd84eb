"""The records: what they accept, and what they say when they do not."""

import numpy as np
import pytest

from headwater.errors import InputError
from headwater.report import Attribution, Axis, Bar, Bars, Card, Curve, Figure, Figures, Line, Page, Series, Table


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bars((("a", 1.0, 0.5),)), "'a' has one end of an interval"),
        (lambda: Bars((("a", 1.0),), best="b"), r"best='b' is no bar(.|\n)*\['a'\]"),
        (lambda: Curve((("s", [0, 1], [0]),), "x", "y"), "'s' has 2 x and 1 y"),
        (lambda: Curve((("s", [], []),), "x", "y"), "'s' has 0 x"),
        (lambda: Curve((("s", [0], [0], "dotted"),), "x", "y"), r"role 'dotted'(.|\n)*'reference'"),
        (lambda: Curve((("s", [0], [0]),), Axis("x", form="log"), "y"), r"form 'log'(.|\n)*'percent'"),
        (lambda: Table(("a", "b"), (("1",),)), r"1 cells(.|\n)*Expected: 2"),
        (lambda: Card("#1", image=np.zeros((28, 28))), r"'#1' has shape \(28, 28\) and type float64(.|\n)*astype\('uint8'\)"),
        (lambda: Card("#1", image=np.zeros((3, 28, 28), np.uint8)), r"transpose\(1, 2, 0\)"),
        (lambda: Card("#1", image=np.zeros((0, 4), np.uint8)), r"\(0, 4\)"),
    ],
)
def test_every_refusal_says_what_was_given_and_expected(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_plain_tuples_and_lists_become_records():
    assert Bars([("a", 1)], [("ceiling", 2)]).rows == (Bar("a", 1),) and Bars([], [("ceiling", 2)]).lines == (Line("ceiling", 2),)
    assert Figures([("LDS", "0.4")]).rows == (Figure("LDS", "0.4"),)
    part = Curve([("s", np.arange(2), np.arange(2))], "x", ("y", 0, 1, "percent"))
    assert part.series == (Series("s", (0.0, 1.0), (0.0, 1.0)),) and part.x == Axis("x") and part.y == Axis("y", 0, 1, "percent")
    assert Table(("n",), ((3,),)).rows == (("3",),) and Page("t", footer=[("seed", 0)]).footer == (("seed", "0"),)


def test_the_scale_is_the_farthest_that_bars_and_whiskers_reach():
    cards = Card("a", score=1.0, stderr=0.25), Card("b", score=-1.2), Card("c", score=float("nan")), Card("d", score=float("inf"), stderr=1.0)
    assert Attribution(Card("q", score=9.0), cards[:2], cards[2:]).scale == 1.5
    assert Attribution(Card("q")).scale == Attribution(Card("q"), (Card("a", score=0.0),)).scale == 1.0
