"""Scores as an answer: ranking, grouping, tables and files keep every number and its meaning."""

import numpy as np
import pytest

import headwater as hw
from headwater.errors import DamagedFile, InputError, MissingExtra, StorageError


def scores(queries=3, train=12, **changes):
    rng = np.random.default_rng(0)
    given = {
        "values": rng.normal(size=(queries, train)).astype(np.float32),
        "stderr": None,
        "method": "Source(segments=3)",
        "unit": "measurement",
        "provenance": {"run": "runs/x", "cost": {"seconds": 1.5}},
    }
    if changes.get("stderr") is True:
        changes["stderr"] = np.abs(rng.normal(size=(queries, train))).astype(np.float32)
    return hw.TrainingScores(**{**given, **changes})


def test_top_and_bottom_are_the_ends_of_the_order():
    s = scores()
    for q in range(3):
        order = np.sort(s.values[q])
        assert np.array_equal(s.top(4).scores[q], order[::-1][:4]) and np.array_equal(s.bottom(4).scores[q], order[:4])
        assert np.array_equal(s.values[q][s.top(4).indices[q]], s.top(4).scores[q])
    assert s.top(99).indices.shape == (3, 12)
    tied = scores(values=np.array([[1.0, 2.0, 2.0, 0.0]]), queries=1)
    assert tied.top(2).indices.tolist() == [[1, 2]]
    with pytest.raises(InputError):
        s.top(0)


def test_groups_sum_and_keep_the_order_of_first_appearance():
    s = scores(stderr=True)
    labels = ["b", "a", "b", "c"] * 3
    g = s.group(labels)
    assert g.train_names == ("b", "a", "c") and np.allclose(g.values.sum(1), s.values.sum(1), atol=1e-5)
    assert np.allclose(g.values[:, 1], s.values[:, 1::4].sum(1), atol=1e-6)
    assert np.allclose(g.stderr[:, 1], np.sqrt((s.stderr[:, 1::4] ** 2).sum(1)), atol=1e-6)
    assert g.unit == s.unit and g.provenance == {**s.provenance, "scored": "groups"} and "a " in repr(g.top(3))
    with pytest.raises(InputError, match="11 labels"):
        s.group(labels[:11])


def test_picking_queries_keeps_everything_else():
    s = scores(stderr=True, query_names=("a", "b", "c"))
    picked = s.at([2, 0])
    assert picked.query_names == ("c", "a") and np.array_equal(picked.values, s.values[[2, 0]]) and np.array_equal(picked.stderr, s.stderr[[2, 0]])
    assert picked.method == s.method and len(picked) == 2


def test_tables_hold_every_score_once():
    pandas = pytest.importorskip("pandas")
    s = scores(stderr=True)
    frame = s.to_frame()
    assert len(frame) == 36 and list(frame.columns) == ["query", "example", "score", "stderr", "rank"]
    back = frame.pivot(index="query", columns="example", values="score").to_numpy()
    assert np.array_equal(back, s.values) and frame.attrs["unit"] == "measurement" and "lower it" in frame.attrs["sign"]
    few = s.to_frame(2)
    assert len(few) == 12 and sorted(few["rank"].unique()) == [1, 2, 11, 12]
    assert few[few["rank"] == 1]["score"].tolist() == s.values.max(1).tolist()
    assert isinstance(scores().to_frame()["stderr"], pandas.Series) and scores().to_frame()["stderr"].isna().all()


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"headwater\[frames\]"):
        scores().to_frame()


@pytest.mark.parametrize("stderr", [True, None])
def test_files_give_back_what_was_saved(tmp_path, stderr):
    s = scores(stderr=stderr, query_names=("a", "b", "ü"), train_names=tuple(map(str, range(12))))
    for name in ("s", "s.safetensors"):
        place = s.save(tmp_path / name)
        read = hw.load(tmp_path / name)
        assert place.name == "s.safetensors" and np.array_equal(read.values, s.values) and read.values.dtype == np.float32
        assert (read.stderr is None) == (s.stderr is None) and (not stderr or np.array_equal(read.stderr, s.stderr))
        for field in ("method", "unit", "query_names", "train_names", "provenance"):
            assert getattr(read, field) == getattr(s, field)


def test_files_that_are_not_scores_are_refused(tmp_path):
    place = scores().save(tmp_path / "s")
    for damage in (lambda c: c[:-8], lambda c: b"nonsense", lambda c: c[:20] + b"#" + c[21:]):
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(damage(place.read_bytes()))
        with pytest.raises(DamagedFile, match="broken"):
            hw.load(broken)
    with pytest.raises(DamagedFile, match="missing"):
        hw.load(tmp_path / "nothing")
    with pytest.raises(StorageError):
        scores().save(place / "inside a file")


def test_one_flipped_bit_is_noticed(tmp_path):
    place = scores().save(tmp_path / "s")
    content = bytearray(place.read_bytes())
    content[-1] ^= 1
    place.write_bytes(content)
    with pytest.raises(DamagedFile, match="checksum"):
        hw.load(place)


def test_shapes_are_checked():
    for changes in ({"values": np.zeros(3)}, {"stderr": np.zeros((3, 11))}, {"query_names": ("a",)}, {"train_names": ("a",)}):
        with pytest.raises(InputError):
            scores(**changes)


def test_the_words_say_what_a_score_means():
    assert "removing the example is predicted to lower it" in repr(scores())
    assert "size means nothing" in repr(scores(unit="rank only"))


def test_a_page_shows_each_query_with_its_strongest_examples_and_what_the_scores_mean(tmp_path):
    made = scores(stderr=True)
    page = made.to_html(tmp_path / "owed.html", queries=["first", "second", "third"], labels=range(12), k=2, flagged={int(made.top(1).indices[0, 0]): "seen twice"})
    html = page.read_text()
    assert html.count('data-testid="attribution"') == 3
    assert "seen twice" in html and "second" in html and "pushed the measurement up" in html and "± " in html
    for index in (*made.top(2).indices[1], *made.bottom(2).indices[1]):
        assert f"#{index}" in html and f"label {index}" in html


def test_a_page_without_the_examples_has_their_names(tmp_path):
    html = scores(query_names=("a", "b", "c"), train_names=tuple(f"mixture {i}" for i in range(12))).to_html(tmp_path / "owed.html", flagged=[3]).read_text()
    assert "mixture 3" in html and "flagged" in html


def test_a_page_of_many_queries_says_that_it_shows_the_first(tmp_path):
    html = scores(queries=70).to_html(tmp_path / "owed.html").read_text()
    assert html.count('data-testid="attribution"') == 60
    assert "first 60 of 70 queries" in html


def test_a_page_needs_a_label_for_each_example(tmp_path):
    with pytest.raises(InputError, match="12 training examples"):
        scores().to_html(tmp_path / "owed.html", labels=range(3))


@pytest.mark.parametrize("what", ["tokens", "groups"])
def test_columns_that_are_no_examples_are_called_what_they_are(what, tmp_path):
    made = scores().group(range(12)) if what == "groups" else scores(provenance={"scored": what})
    html = made.to_html(tmp_path / "owed.html").read_text()
    assert f"x 12 {what};" in repr(made) and f"Owed to these {what}" in html and f"12 {what}, scored by" in html
    assert "12 training examples" not in html and f"12 {what};" in repr(hw.load(made.save(tmp_path / "s.safetensors")))
    with pytest.raises(InputError, match=f"train= of 5 for scores of 12 {what}"):
        made.to_html(tmp_path / "owed.html", train=(np.zeros((5, 3)), np.zeros(5)))
    assert made.to_html(tmp_path / "owed.html", train=(np.zeros((12, 3)), np.zeros(12))).exists()
