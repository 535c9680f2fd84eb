"""Functions of which only values are known: differences with their error, sweeps with their spread, and how the two are told apart."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from headwater.errors import BatchCoupling, HeadwaterError, InputError, NotFinite
from headwater.features import baselines, blackbox, kernels
from headwater.features.blackbox import Sweeps
from headwater.features.question import Question

X = np.random.default_rng(0).normal(size=(40, 4))
B = np.array([0.3, -0.2, 0.1, 0.4])
LABEL = (X[:, 0] * X[:, 1] + X[:, 2] > 0).astype(int)


def ask(function, inputs=X[:6], **options):
    return blackbox.explain(Question(function, inputs, **{"progress": False, **options}))


def smooth(Z):
    return np.tanh(Z[:, 0] * Z[:, 1]) + np.exp(Z[:, 2] / 2) * Z[:, 0]


def stairs(Z):
    return np.floor(3 * Z[:, 0]) * 1.0 + 2.0 * (Z[:, 1] > 0) * (Z[:, 2] > 0)


def reference(f, x, b, panels=40):
    """Integrated gradients of a function of torch tensors, by autograd."""
    nodes, weights = np.polynomial.legendre.leggauss(10)
    t = torch.tensor(((np.arange(panels)[:, None] + (1 + nodes) / 2) / panels).ravel())
    w, x, b = torch.tensor(np.tile(weights / 2 / panels, panels)), torch.tensor(x), torch.tensor(b)
    out = []
    for row in x:
        path = (b + t[:, None] * (row - b)).requires_grad_()
        (g,) = torch.autograd.grad(f(path).sum(), path)
        out.append((w @ g) * (row - b))
    return torch.stack(out).numpy()


def smooth_torch(Z):
    return torch.tanh(Z[:, 0] * Z[:, 1]) + torch.exp(Z[:, 2] / 2) * Z[:, 0]


# ---- the laws


@pytest.mark.parametrize("path", [None, Sweeps(8, 3)])
@pytest.mark.parametrize("function", [smooth, stairs], ids=["smooth", "stairs"])
def test_laws(function, path):
    rows = X[:6].copy()
    rows[0, 1], rows[1] = B[1], B
    e = ask(function, rows, baseline=B, path=path)
    np.testing.assert_allclose(e.residual, e.values.sum(1) - (e.output - e.baseline_output), atol=1e-15)
    assert np.abs(e.residual).max() < 1e-7
    assert (e.values[:, 3] == 0).all()  # a column that the function ignores
    assert e.values[0, 1] == 0 and (e.values[1] == 0).all()
    for k in (0, 3):
        np.testing.assert_allclose(ask(function, rows[k : k + 1], baseline=B, path=path).values[0], e.values[k], atol=1e-12)
    np.testing.assert_array_equal(ask(function, rows, baseline=B, path=path, batch_size=3).values, e.values)
    if function is smooth and path is None:
        swapped = ask(function, np.tile(B, (6, 1)), baseline=rows)
        np.testing.assert_allclose(swapped.values, -e.values, atol=1e-7)


def test_calls_are_those_that_were_made():
    calls = []

    def counting(Z):
        calls.append(len(Z))
        return smooth(Z)

    for path in (None, Sweeps(4, 2)):
        calls.clear()
        e = ask(counting, X[:3], baseline=B, path=path)
        assert sum(calls) == e.provenance["calls"] and abs(sum(calls) - e.evaluations.sum()) <= 1 + 2 * 3
    assert Sweeps(4, 2).calls(4) + 2 == e.evaluations[0]


# ---- differences


def test_differences_are_as_good_as_they_say():
    e = ask(smooth, baseline=B)
    off = np.abs(e.values - reference(smooth_torch, X[:6], B)).max(1)
    assert off.max() < 1e-8
    assert (off <= 10 * np.array(e.provenance["difference_error"]) + 10 * np.abs(e.residual) + 1e-12).all()
    assert "double precision" in e.notes[0] and e.method.startswith("finite differences")


@pytest.mark.parametrize("how", ["outputs", "inputs"])
def test_single_precision_is_seen_and_told(how):
    rows = X[:6].astype(np.float32) if how == "inputs" else X[:6]
    e = ask((lambda Z: smooth(Z).astype(np.float32).astype(float)) if how == "outputs" else smooth, rows, baseline=B)
    off = np.abs(e.values - reference(smooth_torch, rows.astype(float), B)).max(1)
    assert 1e-9 < off.max() < 1e-4 and (off <= 10 * np.array(e.provenance["difference_error"]) + 1e-7).all()
    assert "single precision" in e.notes[0]


def test_a_function_is_never_asked_outside_the_box_between_baseline_and_input():
    low, high, seen = np.array([1.0, 0.5]), np.array([3.0, 1.0]), []

    def steep(Z):
        seen.append(Z)
        return np.sqrt(Z[:, 0] - 1.0 + 1e-9) * Z[:, 1]

    e = ask(steep, high[None], baseline=low, tolerance=1e-9, max_evaluations=5000)
    points = np.concatenate(seen)
    assert (points >= low).all() and (points <= high).all() and e.evaluations[0] > 1000


def test_a_tolerance_and_a_budget():
    def sharp(Z):
        return np.tanh(20 * (Z[:, 0] - 0.5)) + Z[:, 1]

    rows = np.array([[2.0, 1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]])
    rough, fine = ask(sharp, rows, max_evaluations=200), ask(sharp, rows, tolerance=1e-6, max_evaluations=20_000)
    assert not ask(sharp, rows, tolerance=1e-6, max_evaluations=200).converged[0] and fine.converged.all()
    assert np.abs(rough.residual).max() > 1e-3 and any("relative residual above 1e-3" in note for note in rough.notes)
    assert np.abs(fine.residual).max() < 1e-5 and (rough.evaluations < fine.evaluations).any()


def test_any_shape_and_any_output():
    rows = np.random.default_rng(1).normal(size=(2, 3, 2))
    e = ask(lambda Z: np.stack([(Z**2).sum((1, 2)), Z[:, 0, 0]], 1), rows, target=0)
    np.testing.assert_allclose(e.values, rows**2, atol=1e-9)
    difference = ask(lambda Z: np.stack([(Z**2).sum((1, 2)), Z[:, 0, 0]], 1), rows, target=lambda out: out[:, 0] - out[:, 1])
    np.testing.assert_allclose(difference.values[:, 1:], e.values[:, 1:], atol=1e-9)
    each = ask(lambda Z: np.stack([(Z**2).sum((1, 2)), Z[:, 0, 0]], 1), rows, target=[0, 1])
    np.testing.assert_allclose(each.values[0], e.values[0], atol=1e-9)
    assert each.values[1].ravel()[1:].max() == 0
    given = []
    ask(lambda Z: given.append(Z) or (Z**2).sum((1, 2)), torch.tensor(rows))
    assert all(isinstance(Z, torch.Tensor) and Z.shape[1:] == (3, 2) for Z in given)


# ---- sweeps


def test_one_segment_is_baseline_shapley():
    """f = x0 x1 x2 from 0: each gets a third, once all orders are seen; every order and its reverse together are exact for pairs."""
    e = ask(lambda Z: Z[:, 0] * Z[:, 1] + Z[:, 2], np.array([[2.0, 3.0, 4.0]]), path=Sweeps(1, 1))
    np.testing.assert_allclose(e.values, [[3.0, 3.0, 4.0]], atol=1e-14)
    many = ask(lambda Z: np.prod(Z, 1), np.array([[2.0, 3.0, 5.0]]), path=Sweeps(1, 600))
    np.testing.assert_allclose(many.values, [[10.0, 10.0, 10.0]], atol=4 * many.stderr.max())


def test_segments_converge_to_integrated_gradients_within_their_spread():
    exact = reference(smooth_torch, X[:6], B)
    off = [np.abs(ask(smooth, baseline=B, path=Sweeps(n, 4)).values - exact).max() for n in (2, 8, 32)]
    assert off[0] > 4 * off[1] > 16 * off[2]


def test_stairs_are_seen_and_swept():
    rows = np.array([[2.0, 1.0, 1.0, 5.0], [-2.0, 1.0, -1.0, 5.0], [0.05, 2.0, -1.0, 5.0], [0.0, 0.0, 0.0, 3.0]])
    e = ask(stairs, rows, baseline=[0.01, -1.0, -1.0, 0.0])
    assert "path sweeps" in e.method and any("flat where its gradient was taken" in note for note in e.notes)
    np.testing.assert_allclose(e.values, [[6, 1, 1, 0], [-6, 0, 0, 0], [0, 0, 0, 0], [-0.0, 0, 0, 0]], atol=1e-12)
    assert e.stderr is not None and np.isfinite(e.stderr).all()
    smooth_beside = ask(
        lambda Z: np.where(Z[:, 3] > 2.5, stairs(Z), smooth(Z)), np.array([[1.0, 1, 1, 0], [1.0, 1, 1, 5]]), baseline=np.array([[0.0, 0, 0, 0], [0.0, 0, 0, 5]])
    )
    assert smooth_beside.method == "finite differences at Gauss-Legendre points and path sweeps"


def test_stairs_that_go_up_and_down_again_are_seen_too():
    def hill(Z):
        return 1.0 * (Z[:, 0] > 0.25) - 1.0 * (Z[:, 1] > 0.75)

    e = ask(hill, np.ones((1, 2)))
    np.testing.assert_allclose(e.values, [[1.0, -1.0]])
    assert e.output[0] == e.baseline_output[0] == 0.0


def test_a_tolerance_of_sweeps_is_one_of_their_spread():
    f = lambda Z: np.floor(3 * Z[:, 0]) * np.floor(3 * Z[:, 1]) * np.floor(3 * Z[:, 2])  # noqa: E731
    assert not ask(f, np.full((1, 3), 1.3), tolerance=1e-6, path=Sweeps(2, 4)).converged.any()
    assert ask(f, np.full((1, 3), 1.3), tolerance=0.5, path=Sweeps(2, 64)).converged.all()


def test_a_forest_by_its_function_is_swept_with_a_hint():
    forest = RandomForestClassifier(5, random_state=0).fit(X, LABEL)
    e = ask(forest.predict_proba, X[:3], target=1, baseline=B)
    np.testing.assert_allclose(e.output, forest.predict_proba(X[:3])[:, 1])
    assert "path sweeps" in e.method and any("passing the estimator itself" in note for note in e.notes)
    assert e.target == "output 1 (class 1) of predict_proba"


def test_a_budget_shrinks_the_sweeps():
    e = ask(stairs, baseline=B, max_evaluations=300)
    assert (e.evaluations <= 300).all() and np.abs(e.residual).max() < 1e-12
    with pytest.raises(InputError, match="at least one segment"):
        Sweeps(0, 1)


# ---- tables


def test_columns_of_text_switch_at_the_middle():
    table = pd.DataFrame({"a": [1.0, 2.0, 3.0], "town": ["x", "y", "y"], "b": [1.0, np.nan, 2.0]}, index=[5, 9, 7])

    def price(t):
        return t.a * np.where(t.town == "y", 3.0, 1.0) + t.b.fillna(10.0)

    e = ask(price, table, baseline={"a": 0.0, "town": "x", "b": 0.0})
    np.testing.assert_allclose(e.output, price(table))
    np.testing.assert_allclose(e.values[:, 2], [1.0, 10.0, 2.0], atol=1e-12)
    np.testing.assert_allclose(e.values[1, :2], [1 + 3.0, 2.0], atol=0.3)  # a earns 1 for the first half of the way and 3 after; town 2 a at the middle
    assert e.values[0, 1] == 0 and e.feature_names == ("a", "town", "b") and "switch" in e.notes[-1]
    fine = ask(price, table, baseline={"a": 0.0, "town": "x", "b": 0.0}, path=Sweeps(101, 1))
    np.testing.assert_allclose(fine.values[1, :2], [4.0, 2.0], atol=3e-2)


def test_declared_columns_switch_and_never_take_other_values():
    def lookup(Z):
        return np.array([{0.0: 1.0, 3.0: 5.0}[k] for k in Z[:, 0]]) * Z[:, 1]

    e = ask(lookup, np.array([[3.0, 2.0]]), discrete=[0])
    np.testing.assert_allclose(e.values.sum(), 10.0)
    for bad in ([7], ["a"]):
        with pytest.raises(InputError, match="discrete column"):
            ask(lookup, np.array([[3.0, 2.0]]), discrete=bad)


def test_frames_come_as_frames_and_estimators_do_not_warn():
    frame = pd.DataFrame(X, columns=list("abcd"))
    model = LogisticRegression().fit(frame, LABEL)
    e = ask(model.decision_function, frame.iloc[:5], baseline=dict(zip("abcd", B, strict=True)))
    np.testing.assert_allclose(e.values, model.coef_ * (X[:5] - B), atol=1e-9)
    mean = ask(model.decision_function, frame.iloc[:5], baseline=baselines.mean(frame[list("dcba")]))
    np.testing.assert_allclose(mean.values, model.coef_ * (X[:5] - X.mean(0)), atol=1e-9)


def test_several_baselines():
    e = ask(smooth, X[:3], baseline=baselines.dataset(X, 4), seed=1)
    one = [ask(smooth, X[:3], baseline=p).values for p in baselines.dataset(X, 4).references((torch.tensor(X[:3]),), 1).points[0][:, 0].numpy()]
    np.testing.assert_allclose(e.values, np.mean(one, 0), atol=1e-12)
    np.testing.assert_allclose(e.stderr, np.std(one, 0, ddof=1) / 2, atol=1e-12)


def test_a_kernel_machine_by_its_function_is_the_closed_form():
    model = SVC().fit(X, LABEL)
    np.testing.assert_allclose(ask(model.decision_function, baseline=B).values, kernels.explain(Question(model, X[:6], baseline=B)).values, atol=1e-8)


# ---- what is refused


@pytest.mark.parametrize(
    ("function", "options", "error", "says"),
    [
        (KNeighborsClassifier().fit(X, LABEL), {}, InputError, r"hw.explain\(model.predict_proba, X, target=1\)"),
        (lambda Z: Z.sum(), {}, InputError, r"shape \(\) for"),
        (lambda Z: Z, {}, InputError, "no target for outputs"),
        (lambda Z: Z, {"target": 4}, InputError, "target 4 of outputs"),
        (lambda Z: np.array(["a"] * len(Z)), {}, InputError, "not numbers"),
        (lambda Z: Z[:, 0] - Z[:, 0].mean(), {}, BatchCoupling, "first example"),
        (lambda Z: np.where(Z[:, 0] > 9, 0.0, np.nan), {}, NotFinite, "NaN or infinite"),
        (smooth, {"inputs": X[0]}, InputError, r"X\[:1\]"),
        (smooth, {"inputs": X * np.inf}, InputError, "infinite inputs"),
        (smooth, {"layer": 1}, InputError, "layer=1 for a function"),
        (smooth, {"path": "blur"}, InputError, "path='blur'"),
        (smooth, {"baseline": [1.0, 2.0]}, InputError, "a baseline"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_questions_are_refused_by_name(function, options, error, says):
    with pytest.raises(error, match=says) as caught:
        ask(function, **options)
    assert isinstance(caught.value, HeadwaterError)


def test_labels_of_a_classifier_point_to_its_probabilities():
    model = LogisticRegression().fit(X, np.where(LABEL, "yes", "no"))
    with pytest.raises(InputError, match="predict_proba"):
        ask(model.predict)
