"""Agreement of explanations, and mass inside a region, by hand and against scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

import headwater as hw
from headwater import evaluate, report
from headwater.errors import InputError, NotFinite


def drawn(n=5, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.integers(-3, 4, size=(n, 3, 4)).astype(float)
    return a, a + rng.integers(-2, 3, size=a.shape)


def test_correlations_are_those_of_scipy_with_ties():
    a, b = drawn()
    found = evaluate.agreement(a, torch.tensor(b), names=("a", "b"))
    for i in range(5):
        x, y = a[i].ravel(), b[i].ravel()
        assert found.per_example["spearman"]["a", "b"][i] == pytest.approx(spearmanr(x, y).statistic)
        assert found.per_example["pearson"]["a", "b"][i] == pytest.approx(pearsonr(x, y).statistic)
    assert found.means["spearman"]["a", "b"].mean == pytest.approx(np.mean(found.per_example["spearman"]["a", "b"]))


def test_overlap_and_signs_by_hand():
    a = np.array([[5.0, -4.0, 3.0, 0.0, 1.0]])
    b = np.array([[5.0, 4.0, -1.0, 2.0, 0.0]])
    found = evaluate.agreement(a, b, k=3)
    pair = ("first", "second")
    assert found.per_example["top"][pair] == pytest.approx([2 / 3]) and found.per_example["sign"][pair] == pytest.approx([1 / 3]) and found.chance == 0.6


def test_scores_and_their_opposite_agree_in_size_alone():
    a, _ = drawn()
    found = evaluate.agreement(a, -a, k=4)
    assert [found.matrix(m)[0, 1] for m in ("spearman", "pearson", "top", "sign")] == pytest.approx([-1, -1, 1, 0])


def test_several_by_name_give_a_matrix():
    a, b = drawn()
    c = np.random.default_rng(9).normal(size=a.shape)
    found = evaluate.agreement({"a": a, "b": b, "c": c})
    matrix = found.matrix("pearson")
    assert np.array_equal(matrix, matrix.T) and (np.diag(matrix) == 1).all() and matrix[0, 1] > 0.5 > abs(matrix[0, 2])
    assert matrix[1, 2] == pytest.approx(evaluate.agreement(b, c).matrix("pearson")[0, 1])
    assert len(found.table.rows) == 3 and len(found.to_frame()) == 15 and "agreement is not faithfulness" in repr(found)


def test_constant_scores_are_left_out_of_the_mean():
    a, b = drawn()
    b[0] = 1.0
    found = evaluate.agreement(a, b)
    assert np.isnan(found.per_example["spearman"]["first", "second"][0]) and found.means["spearman"]["first", "second"].examples == 4


def test_two_explanations_are_called_by_their_methods():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    a, b = (hw.explain(net, x, rule=rule, progress=False) for rule in (hw.quadrature.gauss_legendre(32), hw.quadrature.midpoint(64)))
    found = evaluate.agreement(a, b)
    assert found.names == (a.method, b.method) and found.matrix("pearson")[0, 1] == pytest.approx(1, abs=1e-4)


def test_mass_and_hits_by_hand():
    scores = np.array([[[3.0, -5.0], [1.0, 0.0]], [[0.0, 1.0], [3.0, 4.0]], [[-1.0, -1.0], [-1.0, -2.0]]])
    mask = np.array([[True, True], [False, False]])
    found = evaluate.mass_in(scores, mask)
    assert found.values[:2].tolist() == [0.75, 0.125] and np.isnan(found.values[2])
    assert found.hits.tolist() == [1, 0, 2 / 3] and found.area.tolist() == [0.5] * 3  # three equal largest ones share the hit
    each = evaluate.mass_in(scores[:2], np.stack([mask, ~mask]))
    assert each.values.tolist() == [0.75, 0.875] and each.hits.tolist() == [1, 1]


def test_a_planted_cue_holds_the_mass_of_the_model_that_uses_it():
    """A model that sums one corner: every part outside is a dummy."""
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    e = hw.explain(lambda z: z[:, :, :3, :3].sum((1, 2, 3)) ** 2, x, progress=False)
    corner = np.zeros((8, 8), bool)
    corner[:3, :3] = True
    found = evaluate.mass_in(e, corner)
    assert (found.values == 1).all() and found.hit.mean == 1 and found.area[0] == 9 / 64
    assert "chance 0.141" in repr(found)
    page = report.Page("Cue", sections=(report.Section("", parts=(found.bars, evaluate.agreement(e, e).table)),))
    assert "mass inside" in report.text(page) and len(found.to_frame()) == 6


def test_several_inputs_are_read_together():
    scores = (np.ones((2, 3)), 2 * np.ones((2, 2)))
    found = evaluate.mass_in(scores, (np.array([True, False, False]), np.array([False, True])))
    assert np.allclose(found.values, 3 / 7) and np.allclose(found.area, 2 / 5)
    assert evaluate.agreement(scores, scores).matrix("top")[0, 1] == 1


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: evaluate.agreement(np.ones((2, 3))), InputError),
        (lambda: evaluate.agreement({"one": np.ones((2, 3))}), InputError),
        (lambda: evaluate.agreement(np.ones((2, 3)), np.ones((2, 4))), InputError),
        (lambda: evaluate.agreement(np.ones((2, 3)), np.ones((2, 3)), k=0), InputError),
        (lambda: evaluate.agreement(np.ones((0, 3)), np.ones((0, 3))), InputError),
        (lambda: evaluate.agreement(np.ones((2, 3)), np.full((2, 3), np.nan)), NotFinite),
        (lambda: evaluate.agreement(*drawn()).matrix("kendall"), InputError),
        (lambda: evaluate.mass_in(np.ones((2, 3)), np.ones(3)), InputError),
        (lambda: evaluate.mass_in(np.ones((2, 3)), np.ones(4, bool)), InputError),
        (lambda: evaluate.mass_in(np.ones((2, 3)), np.zeros(3, bool)), InputError),
        (lambda: evaluate.mass_in((np.ones((2, 3)),) * 2, np.ones(3, bool)), InputError),
    ],
)
def test_what_does_not_fit_is_refused(call, error):
    with pytest.raises(error):
        call()
