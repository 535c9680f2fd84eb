"""Summaries: what numpy says of all examples at once, whatever the batches were."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.errors import InputError
from headwater.result import Accumulator
from tests.report.reading import read
from tests.result.making import every_structure, random, scores

FIELDS = ("mean", "mean_abs", "std", "positive", "negative")


def by_numpy(rows):
    rows = rows.reshape(len(rows), -1)
    return {"mean": rows.mean(0), "mean_abs": np.abs(rows).mean(0), "std": rows.std(0), "positive": (rows > 0).mean(0), "negative": (rows < 0).mean(0)}


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8).filter(sum), st.integers(0, 99), st.sampled_from([0.0, 1.0, 1e6]))
def test_batches_of_any_size_make_what_numpy_makes_of_all_at_once(sizes, seed, offset):
    rows = np.random.default_rng(seed).normal(size=(sum(sizes), 3)) + offset
    rows[::3, 1] = 0
    gathered = Accumulator()
    for batch in np.split(rows, np.cumsum(sizes)[:-1]):
        gathered.add(batch)
    found = gathered.summary()
    for name, expected in by_numpy(rows).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-12, atol=1e-9 * max(1.0, offset) if name == "std" else 1e-12 * max(1.0, offset))
    assert found.n == len(rows)


def test_merging_in_any_order_is_adding():
    parts = [random(k, 4, seed=k) for k in (1, 5, 2, 9)]
    whole = Accumulator().add(np.concatenate(parts)).summary()
    left, right = Accumulator().add(parts[3]).add(parts[0]), Accumulator().add(parts[2]).add(parts[1])
    merged = right.merge(Accumulator()).merge(left).summary()
    for name in FIELDS:
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-13, atol=1e-15)
    assert merged.n == 17 and Accumulator().merge(left).n == 10


def test_the_spread_survives_a_mean_that_is_far_larger():
    rows = 1e9 + random(1000, 2)
    found = Accumulator()
    for batch in np.split(rows, 50):
        found.add(batch)
    np.testing.assert_allclose(found.summary().std, rows.std(0), rtol=1e-6)  # a sum of squares would have lost all digits


@pytest.mark.parametrize("name", list(every_structure()))
def test_a_summary_of_scores_is_that_of_their_parts(name):
    e = every_structure()[name]
    found = e.summary()
    frame = e.to_frame()
    sizes = frame.assign(size=frame.score.abs())
    assert np.isclose(found.mean_abs.sum() * e.n, sizes["size"].sum()) and np.isclose(found.mean.sum(), (e.output - e.baseline_output + e.residual).mean())
    assert found.residual == pytest.approx(np.abs(e.residual).mean()) and found.worst_residual == np.abs(e.residual).max()
    assert found.evaluations == pytest.approx(e.evaluations.mean()) and len(found.names) == len(found.mean)
    assert found.missed == (0 if e.converged is None else 2)


def test_scores_that_come_in_batches_keep_their_errors_too():
    e = every_structure()["table"]
    streamed = Accumulator().add(e.at([0, 1])).add(e.at([2])).add(e.at([3, 4])).summary()
    whole = e.summary()
    for name in (*FIELDS, "residual", "evaluations"):
        np.testing.assert_allclose(getattr(streamed, name), getattr(whole, name), rtol=1e-12)
    assert (streamed.missed, streamed.worst_residual, streamed.names) == (whole.missed, whole.worst_residual, ("a", "b", "c", "d"))
    mixed = Accumulator().add(e).add(e.values).summary()
    assert mixed.residual is None and mixed.n == 10  # of half of them nothing is known


def test_ranks_go_by_mean_size():
    values = np.array([[1.0, -5.0, 0.0, 2.0], [-1.0, 5.0, 0.0, 2.0]])
    found = scores(values, feature_names=("a", "b", "c", "d")).summary()
    assert found.rank.tolist() == [3, 1, 4, 2] and found.order.tolist() == [1, 3, 0, 2]
    assert found.mean.tolist() == [0, 0, 0, 2] and found.positive.tolist() == [0.5, 0.5, 0, 1] and found.negative.tolist() == [0.5, 0.5, 0, 0]
    assert found.share.sum() == pytest.approx(1)
    frame = found.to_frame()
    assert list(frame.columns) == ["feature", "mean", "mean_abs", "std", "positive", "negative", "share", "rank", "n"]
    assert list(frame.sort_values("rank").feature) == ["b", "d", "a", "c"] and (frame.n == 2).all()


def test_it_reads_as_a_table_and_says_what_is_left_out():
    found = scores(random(9, 30)).summary()
    shown = repr(found)
    assert shown.startswith("Attributions of output 0 over 9 examples") and "10 others together" in shown
    rest = found.order[20:]
    assert f"{found.mean_abs[rest].sum():.3g}" in shown


def test_it_is_drawn_and_written(tmp_path):
    pytest.importorskip("matplotlib")
    found = every_structure()["image"].summary()
    figure = found.plot(k=5)
    figure.savefig(tmp_path / "why.png", dpi=30)
    assert [round(bar.get_width(), 9) for bar in figure.axes[-1].patches] == [round(float(v), 9) for v in np.sort(found.mean_abs)[::-1][:5]]
    page = read(found.to_html(tmp_path / "why.html").read_text())
    assert page.find(testid="overlay") and len(page.find(testid="bar")) == 20
    assert "<script" not in found._repr_html_()


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(InputError, match="no examples"):
        Accumulator().summary()
    with pytest.raises(InputError, match=r"3 parts(.|\n)*as in the batches before: 2 parts"):
        Accumulator().add(random(4, 2)).add(random(4, 3))
    gathered = Accumulator().add(random(4, 2))
    with pytest.raises(InputError):
        gathered.add(random(4, 3))
    assert gathered.summary().n == 4  # nothing was half done
    with pytest.raises(InputError, match="1 names for 2 parts"):
        Accumulator(("a",)).add(random(4, 2))
    with pytest.raises(InputError, match=r"a, c(.|\n)*the same parts as in the batches before(.|\n)*a, b"):
        Accumulator().add(scores(random(2, 2), feature_names=("a", "b"))).add(scores(random(2, 2), feature_names=("a", "c")))
