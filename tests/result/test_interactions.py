"""Interactions: pairs, rows and totals add up, in memory, in tables and in files."""

import numpy as np
import pytest

import headwater as hw
from headwater.errors import InputError
from headwater.result import InteractionScores
from tests.report.reading import read


def made(n=3, p=4, seed=0, feature=None, **changes):
    rng = np.random.default_rng(seed)
    full = rng.normal(size=(n, p, p))
    full = full + full.swapaxes(1, 2)
    values = full if feature is None else full[:, feature]
    base, residual = rng.normal(size=n), 0.01 * rng.normal(size=n)
    total = full.sum((1, 2)) - residual
    given = {"method": "Integrated Hessians", "target": "output 0", "baseline": "zeros", "feature": feature}
    given |= {"attributions": values.sum(-1) + 0.001, "feature_names": tuple("abcd"[:p]), "notes": ("softened",), "provenance": {"nodes": 16}, **changes}
    return InteractionScores(values, residual, np.full(n, 16), base + total, base, **given)


def test_rows_sum_to_attributions_but_for_their_residual():
    e = made()
    np.testing.assert_allclose(e.row_residual, np.full((3, 4), -0.001))
    assert "largest gap between a row and its attribution 1.0e-03" in repr(e) and made(attributions=None).row_residual is None
    assert made(feature=2).row_residual.shape == (3,)


def test_a_pair_is_both_of_its_halves():
    e = made()
    pairs = e.pairs()
    assert not np.tril(pairs).any()
    np.testing.assert_allclose(pairs[:, 0, 3], 2 * e.values[:, 0, 3])
    np.testing.assert_allclose(pairs.sum((1, 2)) + np.trace(e.values, axis1=1, axis2=2), e.output - e.baseline_output + e.residual)


def test_the_strongest_pairs_come_first_by_size():
    e = made()
    top = e.top(2)
    for i in range(3):
        sizes = np.sort(np.abs(e.pairs()[i][np.triu_indices(4, 1)]))[::-1]
        np.testing.assert_allclose(np.abs(top.scores[i]), sizes[:2])
        first, second = top.indices[i, 0]
        assert top.names[i][0] == ("abcd"[first], "abcd"[second]) and top.scores[i, 0] == 2 * e.values[i, first, second]
    assert e.top(99).scores.shape == (3, 6) and repr(top).count("\n") == 2 and "×" in repr(top)


def test_one_feature_has_its_partners():
    e, full = made(feature=1), made()
    np.testing.assert_array_equal(e.values, full.values[:, 1])
    top = e.top(9)
    assert top.scores.shape == (3, 3) and (top.indices[..., 0] == 1).all() and (top.indices[..., 1] != 1).all()
    np.testing.assert_array_equal(np.sort(top.scores[0]), np.sort(2 * np.delete(full.values[0, 1], 1)))
    with pytest.raises(InputError, match="row of one feature"):
        e.pairs()


def test_the_frame_sums_to_the_change_of_output():
    pytest.importorskip("pandas")
    e = made(stderr=np.abs(made().values))
    frame = e.to_frame()
    assert len(frame) == 3 * 10 and list(frame.columns) == ["example", "feature", "with", "score", "stderr"]
    np.testing.assert_allclose(frame.groupby("example").score.sum(), e.output - e.baseline_output + e.residual)
    assert not frame.duplicated(["example", "feature", "with"]).any()
    row = frame.query("example == 1 and feature == 'a' and `with` == 'c'")
    assert row.score.item() == pytest.approx(2 * e.values[1, 0, 2]) and row.stderr.item() == pytest.approx(2 * e.stderr[1, 0, 2])
    one = made(feature=2).to_frame()
    np.testing.assert_array_equal(one.score, e.values[:, 2].ravel())


@pytest.mark.parametrize("feature", [None, 3])
def test_what_is_saved_is_what_is_loaded(tmp_path, feature):
    tokens = (("a",), ("b", "c"), ("d", "e", "f", "g"))
    e = made(feature=feature, stderr=np.ones((3, 4) if feature is not None else (3, 4, 4)), inputs=np.ones((3, 4)), converged=np.array([True, False, True]))
    e = InteractionScores(**{**{f: getattr(e, f) for f in e.__dataclass_fields__}, "tokens": tokens, "example_names": ("x", "y", "z")})
    back = hw.load(e.save(tmp_path / "pairs"))
    for name in e.__dataclass_fields__:
        given, found = getattr(e, name), getattr(back, name)
        assert np.array_equal(given, found) and given.dtype == found.dtype if isinstance(given, np.ndarray) else given == found, name


def test_picking_and_averaging():
    e = made(n=5)
    picked = e.at([4, 0])
    np.testing.assert_array_equal(picked.values, e.values[[4, 0]])
    np.testing.assert_array_equal(picked.attributions, e.attributions[[4, 0]])
    mean = e.mean()
    np.testing.assert_allclose(mean.values[0], e.values.mean(0))
    np.testing.assert_allclose(mean.stderr[0], e.values.std(0, ddof=1) / np.sqrt(5))
    np.testing.assert_allclose(mean.values.sum(), mean.output - mean.baseline_output + mean.residual)
    assert mean.example_names == ("mean of 5 examples",)


def test_it_is_drawn_and_written(tmp_path):
    pytest.importorskip("matplotlib")
    for e in (made(), made(feature=0)):
        e.plot().savefig(tmp_path / "pairs.png", dpi=25)
        page = read(e.to_html(tmp_path / "pairs.html", examples=1).read_text())
        said = page.text()
        assert "softened" in said and "Shown are 1 of 3 examples" in said and "lower bound on the error" in said
        assert "<script" not in e._repr_html_() and "softened" in e._repr_html_()
    (first, *_) = read(made().to_html(tmp_path / "pairs.html", examples=1).read_text()).find(testid="section")[-1].find(testid="cell")
    assert first["title"].startswith("a × a")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made(feature_names=("a",)), "1 feature_names"),
        (lambda: made(attributions=np.zeros((3, 3))), r"attributions of shape \(3, 3\)"),
        (lambda: InteractionScores(np.zeros((2, 3)), *[np.zeros(2)] * 4, "m", "t", "b"), r"\(n, p, p\) without a chosen feature"),
        (lambda: InteractionScores(np.zeros((2, 3, 4)), *[np.zeros(2)] * 4, "m", "t", "b"), r"values of shape \(2, 3, 4\)"),
        (lambda: InteractionScores(np.zeros((2, 3)), *[np.zeros(2)] * 4, "m", "t", "b", feature=3), "feature=3 of 3"),
        (lambda: made().top(0), "k=0"),
        (lambda: made().at([3]), "below 3"),
        (lambda: made().plot([3]), "below 3"),
        (lambda: made().at([]).mean(), "no examples"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
