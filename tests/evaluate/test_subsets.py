"""Subsets: sizes, reproducibility, and sums that add up."""

import numpy as np
import pytest

from headwater.errors import InputError
from headwater.evaluate import halves, leave_out, removing


def test_halves_keep_half_and_a_longer_list_begins_like_a_shorter_one():
    short, long = halves(101, 5, seed=3), halves(101, 9, seed=3)
    assert [len(m) for m in long] == [50] * 9
    assert all(np.array_equal(a, b) for a, b in zip(short, long, strict=False))
    assert len({tuple(m) for m in long}) == 9
    assert not np.array_equal(halves(101, 1, seed=4)[0], short[0])


def test_halves_choose_every_example_equally_often():
    often = halves(20, 4000, seed=0).mask().mean(axis=0)
    assert np.abs(often - 0.5).max() < 5 * np.sqrt(0.25 / 4000)


def test_leave_out_all_is_complete_leave_one_out():
    subsets = leave_out(7, 7, seed=1)
    assert sorted(int(subsets.removed(i)[0]) for i in range(7)) == list(range(7))
    assert all(len(m) == 6 for m in subsets)


@pytest.mark.parametrize(("size", "removed"), [(3, 3), (0.25, 10), (0.001, 1)])
def test_leave_out_counts_and_fractions(size, removed):
    subsets = leave_out(40, 6, size=size)
    assert [40 - len(m) for m in subsets] == [removed] * 6


def test_sums_of_kept_and_removed_make_the_whole():
    values = np.random.default_rng(0).normal(size=(3, 30)).astype(np.float32)
    subsets = halves(30, 4)
    by_mask = subsets.mask() @ values.T.astype(float)
    assert np.allclose(subsets.sums(values), by_mask, atol=1e-12)
    assert np.allclose(subsets.sums(values) + subsets.sums(values, removed=True), values.sum(axis=1, dtype=float), atol=1e-12)


def test_removing_chosen_examples():
    subsets = removing(5, [[4], [1, 0, 1]])
    assert [m.tolist() for m in subsets] == [[0, 1, 2, 3], [2, 3, 4]]
    assert "without" in repr(subsets)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: halves(10, 0),
        lambda: halves(10, 3, fraction=1.0),
        lambda: halves(1, 3),
        lambda: leave_out(10, 11),
        lambda: leave_out(10, 3, size=10),
        lambda: leave_out(10, 0),
        lambda: removing(5, [[5]]),
        lambda: removing(5, [[-1]]),
        lambda: removing(5, [range(5)]),
        lambda: removing(5, [[]]),
        lambda: removing(5, []),
    ],
)
def test_impossible_subsets_are_refused(ask):
    with pytest.raises(InputError, match="To mend it"):
        ask()
