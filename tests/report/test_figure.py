"""The same parts as matplotlib figures: same numbers, no display, no global state."""

import sys

import numpy as np
import pytest

from headwater.errors import InputError, MissingExtra
from headwater.report import Bars, Dots, Matrix, Overlay, Prose, Signal, Signals, Step, Swarm, Tokens, Waterfall, draw
from headwater.report.figure import DRAWERS
from headwater.report.overlays import blend
from tests.report.reading import degenerate, everything, picture

pytest.importorskip("matplotlib")

FLOATS_END = "huge"  # the one part that matplotlib's own arithmetic cannot span
PARTS = [part for page in (everything(), *degenerate()) for section in page.sections for part in section.parts if type(part) in DRAWERS]
PARTS = [part for part in PARTS if not (isinstance(part, Bars) and any(row.label == FLOATS_END for row in part.rows))]


@pytest.mark.parametrize("form", ["png", "svg"])
def test_every_part_can_be_written(tmp_path, form):
    for part in everything().sections:
        kept = [p for p in part.parts if type(p) in DRAWERS]
        if kept:
            draw(*kept).savefig(tmp_path / f"why.{form}", dpi=30)
    content = (tmp_path / f"why.{form}").read_bytes()
    assert content.startswith(b"\x89PNG") if form == "png" else b"<svg" in content


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_parts_at_the_edges_are_drawn_without_a_warning(part):
    figure = draw(part)
    figure.canvas.draw()
    assert figure.get_size_inches()[0] == 8.0


def test_no_window_and_no_global_figure_is_made():
    before = "matplotlib.pyplot" in sys.modules
    draw(Bars((("a", 1.0),)))
    assert before or "matplotlib.pyplot" not in sys.modules
    if before:
        import matplotlib.pyplot as plt

        assert plt.get_fignums() == []


def axes(*parts):
    return draw(*parts).axes


def test_bars_of_a_waterfall_lead_from_the_baseline_to_the_output():
    part = Waterfall("#1", 1.0, 1.5, (Step("age", 0.75, "28"), ("water", -0.25)))
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes(part)[0].patches]
    assert bars == [(1.0, 1.75), (1.75, 1.5)]
    assert [label.get_text() for label in axes(part)[0].get_yticklabels()] == ["output at the baseline", "age  28", "water", "output"]


def test_an_overlay_shows_the_pixels_of_the_page():
    values, image = np.random.default_rng(0).normal(size=(28, 28)), picture(0)
    part = Overlay("#1", values, image, image)
    shown = [ax.images[0].get_array() for ax in axes(part) if ax.images]
    np.testing.assert_array_equal(shown[0], image)
    np.testing.assert_array_equal(shown[2], blend(values, part.limit, image))


def test_dots_stand_at_their_scores():
    (ax, *_) = axes(Swarm((Dots("age", (0.5, -0.25), (1.0, 0.0)), Dots("water", (2.0, 1.0)))))
    found = sorted(float(x) for group in ax.collections for x, _ in np.ma.getdata(group.get_offsets()))
    assert found == [-0.25, 0.5, 1.0, 2.0]


def test_columns_of_a_series_have_the_height_of_their_scores():
    _line, pushes = axes(Signals("#1", (Signal("x", (1, 2, 3), (0.5, -1.0, 0.0)),)))
    heights = np.array([bar.get_height() for bar in pushes.patches]).reshape(2, 3)
    np.testing.assert_array_equal(heights.sum(0), [0.5, -1.0, 0.0])


def test_a_text_keeps_every_letter_and_its_marks():
    words = [f"{word}{k}" for k in range(5) for word in ("The", "film", "is", "not", "bad")]
    ax = axes(Tokens("#1", tuple(words), tuple(np.linspace(-1, 1, len(words)))))[0]
    written = [t.get_text() for t in ax.texts if t.get_text() not in "▲▼"]
    assert written == words and len({t.get_position()[1] for t in ax.texts if t.get_text() in words}) == 2
    styles = {line.get_linestyle() for line in ax.lines}
    assert styles == {"-", "--"}


def test_cells_of_a_matrix_are_written_out():
    ax = axes(Matrix("#1", ("a", "b"), np.array([[1.0, -0.5], [-0.5, 0.0]])))[0]
    assert [t.get_text() for t in ax.texts] == ["+1.00", "−0.500", "−0.500", "0"]


def test_mathematics_in_a_name_is_left_as_it_is():
    figure = draw(Waterfall("cost in $", 0.0, 1.0, (("US$ and $x_1$", 1.0),)))
    figure.canvas.draw()
    assert figure.axes[0].get_yticklabels()[1].get_text() == r"US\$ and \$x_1\$"  # how matplotlib writes dollars that are none of its own


def test_what_has_no_figure_is_named():
    with pytest.raises(InputError, match=r"type Prose(.|\n)*Overlay, Tokens"):
        draw(Prose("words"))
    with pytest.raises(InputError, match="no part"):
        draw()


def test_without_matplotlib_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"headwater\[plot\]"):
        draw(Bars((("a", 1.0),)))
