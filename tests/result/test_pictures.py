"""Pictures of attributions: which one, of what, and that its numbers are those of the scores."""

import re

import numpy as np
import pytest

from headwater.errors import InputError, StorageError
from headwater.report import Bars, Overlay, Signals, Swarm, Tokens, Waterfall
from headwater.result.pictures import parts_of
from headwater.result.views import kind_of
from tests.report.reading import pixels, read
from tests.result.making import TOKENS, every_structure, random, scores, text

structures = pytest.mark.parametrize("name", list(every_structure()))


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((5, 1, 28, 28), "image"),
        ((5, 3, 32, 48), "image"),
        ((5, 32, 48, 3), "image"),
        ((5, 28, 28), "image"),
        ((5, 64, 28, 28), "array"),
        ((5, 1, 4, 4), "array"),
        ((5, 3, 100), "series"),
        ((5, 100, 6), "series"),
        ((5, 100), "table"),
        ((5,), "table"),
        ((5, 2, 3, 8, 8), "array"),
    ],
)
def test_the_kind_is_told_by_the_shape_where_nothing_is_said(shape, kind):
    assert kind_of(shape) == kind


def test_what_is_said_goes_before_the_shape_where_it_can_be_drawn():
    assert isinstance(parts_of(scores(random(2, 100), kind="series"))[0], Signals)
    assert isinstance(parts_of(scores(random(2, 5, 7), kind="image"))[0], Overlay)
    assert isinstance(parts_of(scores(random(2, 64, 7, 7), kind="image"))[0], Overlay)
    assert isinstance(parts_of(scores(random(2, 4), kind="image"))[0], Waterfall)  # no image can be made of it
    assert isinstance(parts_of(text())[0], Tokens)
    assert isinstance(parts_of(scores(random(2, 4), kind="text"))[0], Waterfall)  # there are no tokens


# ---- images


def test_channels_are_summed_wherever_they_stand():
    first = random(2, 3, 9, 11)
    for values in (first, np.moveaxis(first, 1, 3)):
        parts = parts_of(scores(values))
        assert len(parts) == 2
        for part, expected in zip(parts, first.sum(1), strict=True):
            np.testing.assert_allclose(part.values, expected)


def test_input_and_baseline_are_stretched_alike():
    inputs, reference = random(1, 1, 9, 9), np.full((1, 1, 9, 9), -0.5)
    (part,) = parts_of(scores(random(1, 1, 9, 9), inputs=inputs, reference=reference))
    low, high = min(inputs.min(), -0.5), max(inputs.max(), -0.5)
    np.testing.assert_array_equal(part.image, np.round((inputs[0, 0] - low) / (high - low) * 255))
    np.testing.assert_array_equal(part.baseline, np.round((reference[0, 0] - low) / (high - low) * 255))
    grey = scores(random(1, 1, 9, 9), inputs=np.abs(inputs) / 9, reference=np.zeros((1, 1, 9, 9)))
    assert not parts_of(grey)[0].baseline.any()


def test_pictures_may_be_finer_than_the_scores_or_have_other_channels():
    (part,) = parts_of(scores(random(1, 64, 7, 7), kind="image", inputs=random(1, 3, 28, 28)))
    assert part.image.shape == (28, 28, 3) and part.values.shape == (7, 7)
    (part,) = parts_of(scores(random(1, 4, 9, 9), kind="image", inputs=random(1, 4, 9, 9)))
    assert part.image.shape == (9, 9)
    (part,) = parts_of(scores(random(1, 1, 5, 5), kind="image", inputs=random(1, 1, 5, 5)))
    assert part.image.shape == (5, 5)


# ---- tables


@pytest.mark.parametrize("k", [1, 3, 5, 99])
def test_a_waterfall_leads_from_the_baseline_to_the_output_and_shows_the_residual(k):
    e = scores(random(3, 6), inputs=random(3, 6, seed=1), stderr=np.abs(random(3, 6, seed=2)))
    for i, part in enumerate(parts_of(e, k=k)):
        assert part.start == e.baseline_output[i] and part.end == e.output[i]
        np.testing.assert_allclose(part.totals[-1], e.output[i], rtol=1e-12)
        assert part.steps[-1].name.startswith("residual") and part.steps[-1].score == pytest.approx(-e.residual[i])
        order = np.argsort(-np.abs(e.values[i]))
        shown = len(part.steps) - 1 - (k + 1 < 6)
        np.testing.assert_array_equal([s.score for s in part.steps[:shown]], e.values[i, order[:shown]])
        assert [s.stderr for s in part.steps[:shown]] == [e.stderr[i, j] for j in order[:shown]]
        if k + 1 < 6:
            assert part.steps[k].name == f"{6 - k} others"
            np.testing.assert_allclose(part.steps[k].score, e.values[i, order[k:]].sum())


def test_the_value_of_a_feature_stands_beside_it_with_its_baseline_where_they_differ():
    e = scores(np.array([[3.0, 2.0, 1.0]]), gap=0.0, inputs=np.array([[28.0, 0.5, 7.0]]), reference=np.array([[1.0, 0.5, 7.25]]))
    assert [(s.name, s.note) for s in parts_of(e)[0].steps] == [("feature 0", "28 (baseline 1)"), ("feature 1", "0.500"), ("feature 2", "7 (baseline 7.25)")]


def test_many_rows_are_a_swarm_by_mean_size():
    inputs = random(40, 5, seed=1)
    inputs[:, 2] = inputs[:, 2] > 0
    e = scores(random(40, 5) * [1, 5, 2, 4, 3], inputs=inputs, feature_names=tuple("abcde"))
    (part,) = parts_of(e, k=3)
    assert isinstance(part, Swarm) and [row.name for row in part.rows] == ["b", "d", "e"] and "2 features with smaller pushes left out" in part.axis
    np.testing.assert_array_equal(part.rows[0].scores, e.values[:, 1])
    assert np.argsort(part.rows[0].ranks).tolist() == np.argsort(inputs[:, 1]).tolist() and min(part.rows[0].ranks) == 0 and max(part.rows[0].ranks) == 1
    binary = next(row for row in parts_of(e)[0].rows if row.name == "c")
    np.testing.assert_array_equal(binary.ranks, inputs[:, 2])
    assert isinstance(parts_of(e, "waterfall", [3])[0], Waterfall) and isinstance(parts_of(e, examples=range(8))[0], Swarm)


def test_of_very_many_rows_some_are_drawn_and_this_is_said():
    e = scores(random(3000, 2))
    (part,) = parts_of(e)
    assert len(part.rows[0].scores) == 500 and "500 of 3,000 examples drawn" in part.axis
    assert part.rows[0].note == f"{np.abs(e.values).mean(0).max():.3f}"


# ---- texts, series, several inputs


def test_padding_is_not_shown():
    long, short = parts_of(text())
    assert (long.tokens, short.tokens) == TOKENS and len(short.scores) == 3


def test_the_dimensions_of_an_embedding_are_summed():
    values = random(1, 3, 8)
    (part,) = parts_of(scores(values, kind="text", tokens=(("a", "b", "c"),)))
    np.testing.assert_allclose(part.scores, values[0].sum(1))


@pytest.mark.parametrize(("shape", "names", "channels"), [((2, 30), None, 1), ((2, 3, 30), None, 3), ((2, 30, 3), None, 3), ((2, 3, 30), tuple("x" * 30), 30)])
def test_channels_of_a_series_are_told_from_its_steps(shape, names, channels):
    e = scores(random(*shape), kind="series", inputs=random(*shape, seed=1), feature_names=names)
    for i, part in enumerate(parts_of(e)):
        assert len(part.channels) == min(channels, 8)
        assert ("8 of 30 channels" in part.subtitle) == (channels > 8)
        if channels <= 8:
            assert sum(sum(c.scores) for c in part.channels) == pytest.approx(e.values[i].sum())
            assert sum(sum(c.values) for c in part.channels) == pytest.approx(e.inputs[i].sum())


def test_inputs_without_a_picture_share_a_waterfall_that_counts_the_others():
    e = every_structure()["dict"]
    overlay, fall = parts_of(e, examples=[1])
    assert overlay.title == "#1, camera" and fall.title == "#1"
    above = next(step for step in fall.steps if step.name == "inputs shown above")
    assert above.score == pytest.approx(e.values["camera"][1].sum())
    assert fall.totals[-1] == pytest.approx(e.output[1])


# ---- what is said


def test_examples_that_missed_the_tolerance_are_flagged():
    parts = parts_of(every_structure()["table"])
    assert [part.flag for part in parts] == [None, "missed the tolerance", None, None, "missed the tolerance"]
    assert [part.title for part in parts] == list("vwxyz")
    assert all("output 0: " in part.subtitle and "residual" in part.subtitle for part in parts)


def test_values_that_are_no_numbers_are_flagged_and_drawn_without_colour():
    values = random(2, 1, 9, 9)
    values[1, 0, 4, 4] = np.nan
    flags = [part.flag for part in parts_of(scores(values))]
    assert flags == [None, "some values are not finite"]


@pytest.mark.parametrize(
    ("name", "kind", "examples", "k", "message"),
    [
        ("table", "image", None, 10, r"an image of values of shape \(n, 4,\)"),
        ("table", "text", None, 10, "a text without its tokens"),
        ("image", "beeswarm", None, 10, r"a beeswarm of values of shape \(3, 1, 9, 9\)"),
        ("array", "series", None, 10, "a series of values of shape"),
        ("table", "pie", None, 10, r"kind='pie'(.|\n)*beeswarm"),
        ("table", None, [5], 10, r"examples=\[5\](.|\n)*below 5"),
        ("table", None, [], 10, "at least one"),
        ("table", None, None, 0, "k=0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(name, kind, examples, k, message):
    with pytest.raises(InputError, match=message):
        parts_of(every_structure()[name], kind, examples, k)


def test_no_examples_cannot_be_drawn():
    with pytest.raises(InputError, match="a picture of no examples"):
        every_structure()["table"].at([]).plot()


@structures
def test_bars_of_mean_sizes_can_be_had_of_everything(name):
    e = every_structure()[name]
    bars = next(part for part in parts_of(e, "bars", k=3) if isinstance(part, Bars))
    np.testing.assert_allclose([bar.value for bar in bars.rows], np.sort(e.summary().mean_abs)[::-1][:3])


# ---- files and notebooks


@structures
def test_every_structure_is_drawn_by_matplotlib_and_as_html(tmp_path, name):
    pytest.importorskip("matplotlib")
    e = every_structure()[name]
    figure = e.plot(examples=0)
    figure.savefig(tmp_path / "why.png", dpi=25)
    figure.savefig(tmp_path / "why.svg")
    assert (tmp_path / "why.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "why.svg").read_text()[:2000]
    page = read(e.to_html(tmp_path / "why.html").read_text())
    said = page.text()
    for words in ("output 0", "zeros", "by hand", "raised the output above its value at the baseline", "lower bound on the error", *e.notes):
        assert words in said, words
    rows = [[cell.text() for cell in row.find("td")] for row in page.find(testid="section")[-1].find("tr")[1:]]
    assert len(rows) == e.n and [int(row[5]) for row in rows] == e.evaluations.tolist()


def test_the_page_tells_who_missed_the_tolerance(tmp_path):
    said = read(every_structure()["table"].to_html(tmp_path / "why.html").read_text()).text()
    assert "2 of 5 examples missed the tolerance" in said and said.count("⚑ missed") == 2 and said.count(" met") >= 3


def test_a_page_of_many_rows_shows_all_at_once_and_some_by_themselves(tmp_path):
    page = read(scores(random(300, 4)).to_html(tmp_path / "why.html").read_text())
    assert len(page.find(testid="swarm")) == 1 and len(page.find(testid="waterfall")) == 8 and "Shown are 8 of 300 examples." in page.text()
    assert "and 100 more" in page.text()
    chosen = read(scores(random(300, 4)).to_html(tmp_path / "why.html", examples=[7, 250]).read_text())
    assert [figure.find("h3")[0].text().split()[0] for figure in chosen.find(testid="waterfall")] == ["#7", "#250"]


def test_a_page_goes_where_a_page_can_go(tmp_path, monkeypatch):
    e = every_structure()["table"]
    with pytest.raises(InputError, match="There is no folder"):
        e.to_html(tmp_path / "missing" / "why.html")
    monkeypatch.setattr("headwater.report.page.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="No space left"):
        e.to_html(tmp_path / "why.html")


@structures
def test_a_notebook_gets_a_static_piece_with_everything_inside(name):
    e = every_structure()[name]
    html = e._repr_html_()
    assert not re.search(r"<script|https?:|//[a-z]|@import|url\(", re.sub(r"data:image/png;base64,[\w+/=]+", "", html))
    root = read(html)
    assert all(img["alt"] and pixels(img["src"]).size for img in root.find("img"))
    assert "output 0" in root.text() and f"examples {e.n}" in root.text() and all(note in root.text() for note in e.notes)
    assert len(html) < 60_000
