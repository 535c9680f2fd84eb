"""Frames: every number once, with where it stands."""

import sys

import numpy as np
import pytest

from headwater.errors import MissingExtra
from headwater.result.arrays import leaves
from tests.result.making import every_structure, random, scores

pytest.importorskip("pandas")


@pytest.mark.parametrize("name", list(every_structure()))
def test_every_number_stands_in_the_frame_once(name):
    e = every_structure()[name]
    frame = e.to_frame()
    assert sorted(frame.score) == sorted(np.concatenate([a.ravel() for a in leaves(e.values)]))
    places = [column for column in frame.columns if column not in ("value", "baseline", "score", "stderr", "token")]
    assert not frame.duplicated(places).any()
    sums = frame.groupby("example", sort=False).score.sum().to_numpy()
    np.testing.assert_allclose(sums, e.output - e.baseline_output + e.residual)
    assert frame.attrs["target"] == e.target and "positive" in frame.attrs["sign"]


def test_a_table_has_its_values_and_baselines_beside_the_scores():
    e = every_structure()["table"]
    frame = e.to_frame()
    assert list(frame.columns) == ["example", "feature", "value", "baseline", "score", "stderr"]
    row = frame[(frame.example == "x") & (frame.feature == "c")].iloc[0]
    assert (row.value, row.baseline, row.score, row.stderr) == (e.inputs[2, 2], e.reference[2, 2], e.values[2, 2], e.stderr[2, 2])


def test_pixels_channels_and_tokens_are_found_by_their_places():
    made = every_structure()
    image, series, text, array = (made[name].to_frame() for name in ("image", "series", "text", "array"))
    e = made["image"]
    assert image.query("example == 1 and row == 3 and column == 7").score.item() == e.values[1, 0, 3, 7]
    assert image.query("example == 1 and row == 3 and column == 7").value.item() == e.inputs[1, 0, 3, 7]
    assert series.query("channel == 2 and time == 49 and example == 1").score.item() == made["series"].values[1, 2, 49]
    assert text.query("example == 0 and token == '##bear'").score.item() == made["text"].values[0, 3]
    assert text.query("example == 1 and position == 5").token.item() == ""
    assert list(array.columns[:5]) == ["example", "axis 1", "axis 2", "axis 3", "axis 4"]
    last = scores(random(2, 40, 3), kind="series", feature_names=("x", "y", "z"))
    assert last.to_frame().query("channel == 'y' and time == 7 and example == 0").score.item() == last.values[0, 7, 1]


def test_each_dimension_of_an_embedding_has_its_token():
    e = scores(random(1, 3, 2), kind="text", tokens=(("a", "b", "c"),))
    frame = e.to_frame()
    assert list(frame.token) == ["a", "a", "b", "b", "c", "c"] and list(frame.position) == [0, 0, 1, 1, 2, 2] and list(frame.dimension) == [0, 1] * 3


def test_several_inputs_are_told_apart():
    e = every_structure()["dict"]
    frame = e.to_frame()
    assert set(frame.input) == {"camera", "state"}
    state = frame[(frame.input == "state") & (frame.example == 1)]
    assert list(state.feature) == [f"feature {k}" for k in range(5)] and list(state.score) == list(e.values["state"][1])


def test_a_baseline_for_all_is_written_beside_each():
    e = scores(random(3, 2), reference=np.array([[1.0, 2.0]]), inputs=random(3, 2))
    assert list(e.to_frame().baseline) == [1.0, 2.0] * 3


def test_without_pandas_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"headwater\[frames\]"):
        every_structure()["table"].to_frame()
