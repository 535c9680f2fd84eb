"""Kernel machines and linear models: the laws, for each of them; and against differences of the library's own outputs."""

import numpy as np
import pytest
from scipy import sparse
from sklearn import cross_decomposition, discriminant_analysis, gaussian_process, kernel_ridge, linear_model, naive_bayes, neural_network, svm
from sklearn.gaussian_process import kernels as gp

from headwater.errors import InputError
from headwater.features import baselines, kernels, targets
from headwater.features.kernels import estimators, functions, readings
from headwater.features.kernels.panels import bisected
from headwater.features.kernels.paths import Effort, by_points
from headwater.features.quadrature import gauss_legendre, midpoint
from headwater.features.question import Question

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 5))
Y = X @ [1.0, -2.0, 0.5, 0.0, 1.0] + np.sin(2 * X[:, 0]) * X[:, 1]
TWO = np.where(Y > 0, "yes", "no")
THREE = np.digitize(Y, [-1.0, 1.0]) * 10
B = RNG.normal(size=5)


def ask(model, inputs=X, **options):
    return kernels.explain(Question(model, inputs, **{"baseline": B, **options}))


def process(kernel):
    return gaussian_process.GaussianProcessRegressor(kernel, optimizer=None, alpha=0.5, normalize_y=True)


def perceptron(kind, activation, **options):
    return kind(hidden_layer_sizes=(8, 6), activation=activation, solver="lbfgs", max_iter=30, alpha=0.3, random_state=0, **options)


def ridge(kernel, alpha=0.5, **options):
    return kernel_ridge.KernelRidge(kernel=kernel, alpha=alpha, **options)


# Estimator, what it is fitted to, the target, and how many evaluations the default takes at least: 0 where there is a closed form.
REGRESSORS = {
    **{f"SVR {k}": (svm.SVR(kernel=k, coef0=0.5), 0) for k in ("linear", "poly", "rbf", "sigmoid")},
    "NuSVR": (svm.NuSVR(), 0),
    "LinearSVR": (svm.LinearSVR(), 0),
    **{f"ridge {k}": (ridge(k, gamma=0.3), 0) for k in ("linear", "poly", "rbf", "laplacian")},
    "ridge sigmoid": (ridge("sigmoid", gamma=0.1, alpha=30.0), 0),
    "ridge poly 2.0": (ridge("poly", degree=2.0, gamma=0.2), 0),
    "ridge cosine": (ridge("cosine"), 16),
    "RBF, lengths": (process(gp.RBF([0.5, 1.0, 2.0, 3.0, 9.0])), 0),
    **{f"Matern {nu}": (process(gp.Matern([1.0, 2.0, 1.0, 3.0, 2.0], nu=nu)), 0 if nu == np.inf else 16) for nu in (1.5, 2.5, 3.2, np.inf)},
    "RationalQuadratic": (process(gp.RationalQuadratic(2.0, 0.7)), 16),
    "periodic": (process(gp.ExpSineSquared(3.0, 9.0) + gp.WhiteKernel(2.0)), 16),
    "dot product": (process(gp.DotProduct(2.0) + gp.WhiteKernel(1.0)), 0),
    "polynomial of a dot product": (process(gp.DotProduct(2.0) ** 3 + gp.ConstantKernel(0.5) * gp.RBF(3.0)), 0),
    "product": (process(gp.RBF(3.0) * gp.DotProduct(1.0)), 16),
    "power": (process(gp.RationalQuadratic() ** 1.5), 16),
    "pairwise laplacian": (process(gp.PairwiseKernel(gamma=0.2, metric="laplacian")), 0),
    "pairwise polynomial": (process(gp.PairwiseKernel(gamma=0.2, metric="poly", pairwise_kernels_kwargs={"degree": 2, "coef0": 0.5})), 0),
    "least squares": (linear_model.LinearRegression(), 0),
    "lasso": (linear_model.Lasso(0.1), 0),
    "Bayesian ridge": (linear_model.BayesianRidge(), 0),
    "Huber": (linear_model.HuberRegressor(), 0),
    "consensus": (linear_model.RANSACRegressor(random_state=0), 0),
    "stochastic": (linear_model.SGDRegressor(random_state=0), 0),
    "partial least squares": (cross_decomposition.PLSRegression(), 0),
    "Tweedie, identity": (linear_model.TweedieRegressor(power=0), 0),
    "perceptron tanh": (perceptron(neural_network.MLPRegressor, "tanh"), 16),
    "perceptron logistic": (perceptron(neural_network.MLPRegressor, "logistic"), 16),
    "perceptron identity": (perceptron(neural_network.MLPRegressor, "identity"), 0),
}
CLASSIFIERS = {
    **{f"SVC {k}": (svm.SVC(kernel=k, coef0=0.5), 0) for k in ("linear", "poly", "rbf", "sigmoid")},
    "NuSVC": (svm.NuSVC(nu=0.2), 0),
    "LinearSVC": (svm.LinearSVC(), 0),
    "process": (gaussian_process.GaussianProcessClassifier(gp.RBF(2.0), optimizer=None), 0),
    "process of pairs": (gaussian_process.GaussianProcessClassifier(gp.RBF(2.0), optimizer=None, multi_class="one_vs_one"), 0),
    "logistic": (linear_model.LogisticRegression(), 0),
    "Perceptron": (linear_model.Perceptron(), 0),
    "stochastic classifier": (linear_model.SGDClassifier(random_state=0), 0),
    "ridge classifier": (linear_model.RidgeClassifier(), 0),
    "discriminant": (discriminant_analysis.LinearDiscriminantAnalysis(), 0),
    "quadratic discriminant": (discriminant_analysis.QuadraticDiscriminantAnalysis(), 0),
    "naive Gauss": (naive_bayes.GaussianNB(), 0),
    "perceptron classifier": (perceptron(neural_network.MLPClassifier, "tanh"), 16),
}


def outputs_of(model, target):
    """The number that is explained, from the library's own outputs."""
    if hasattr(model, "classes_"):
        k = list(model.classes_).index(target)
        if isinstance(model, neural_network.MLPClassifier):
            if len(model.classes_) == 2:
                return lambda Z: (lambda p: np.log(p[:, k]) - np.log(p[:, 1 - k]))(model.predict_proba(Z))
            return None
        if isinstance(model, naive_bayes.GaussianNB):
            return lambda Z: (lambda p: p[:, k] - (p[:, 1 - k] if p.shape[1] == 2 else 0))(model.predict_joint_log_proba(Z))
        if isinstance(model, gaussian_process.GaussianProcessClassifier):
            return None
        if isinstance(model, svm.SVC | svm.NuSVC) and len(model.classes_) > 2:
            model = model.set_params(decision_function_shape="ovo")
            places = [(i, j) for i in range(3) for j in range(i + 1, 3)]
            return lambda Z: model.decision_function(Z) @ np.array([(k == i) - (k == j) for i, j in places], dtype=float)
        return lambda Z: model.decision_function(Z)[:, k] if len(model.classes_) > 2 else (2 * k - 1) * model.decision_function(Z)
    return lambda Z: np.ravel((model.decision_function if hasattr(model, "decision_function") else model.predict)(Z))


def brute(f, x, b, panels=12, step=1e-5):
    """Integrated gradients by central differences of values, at eight Gauss-Legendre points in each of so many panels."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    t = ((np.arange(panels)[:, None] + (1 + nodes) / 2) / panels).ravel()
    w, total = np.tile(weights / 2 / panels, panels), np.zeros_like(x)
    for i, row in enumerate(x):
        path = b + t[:, None] * (row - b)
        for j, e in enumerate(step * np.eye(x.shape[1])):
            total[i, j] = (row - b)[j] * w @ (f(path + e) - f(path - e)) / (2 * step)
    return total


def every():
    for name, (model, least) in REGRESSORS.items():
        yield pytest.param(model, Y, None, least, id=name)
    for name, (model, least) in CLASSIFIERS.items():
        yield pytest.param(model, TWO, "no", least, id=f"{name}, two classes")
        yield pytest.param(model, THREE, 10, least, id=f"{name}, three classes")
    for name, model in {"OneClassSVM": svm.OneClassSVM(), "SGDOneClassSVM": linear_model.SGDOneClassSVM(random_state=0)}.items():
        yield pytest.param(model, None, None, 0, id=name)


@pytest.mark.parametrize(("model", "y", "target", "least"), list(every()))
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_laws_for_every_estimator(model, y, target, least):
    model = model.fit(X, y)
    rows = X[:6].copy()
    rows[0, 2], rows[1] = B[2], B  # a coordinate on the baseline, and a whole example
    e = ask(model, rows, target=target)

    scale = max(1.0, np.abs(e.output).max(), np.abs(getattr(model, "dual_coef_", 0.0)).max())
    assert np.abs(e.residual).max() <= 1e-12 * scale
    np.testing.assert_allclose(e.residual, e.values.sum(1) - (e.output - e.baseline_output), atol=1e-15)
    assert e.values[0, 2] == 0 and (e.values[1] == 0).all()
    assert (e.evaluations == 0).all() if least == 0 else (e.evaluations >= least).all()

    own = outputs_of(model, target)
    if own is not None:
        np.testing.assert_allclose(e.output, own(rows), rtol=1e-9, atol=1e-9)
        kinks = "laplacian" in repr(model)
        np.testing.assert_allclose(e.values[2:4], brute(own, rows[2:4], B, 400 if kinks else 12), atol=(1e-3 if kinks else 1e-6) * scale)

    alone = ask(model, rows[3:4], target=target)
    np.testing.assert_allclose(alone.values[0], e.values[3], rtol=1e-9, atol=1e-12 * scale)
    swapped = ask(model, np.tile(B, (4, 1)), target=target, baseline=rows[2:])
    with_others = ask(model, rows[2:], target=target)
    np.testing.assert_allclose(swapped.values, -with_others.values[: len(swapped.values)], rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("nu", [0.5, 0.8])
def test_a_kernel_with_a_cusp_is_integrated_through_it(nu):
    model = process(gp.Matern(1.5, nu=nu)).fit(X, Y)
    through = np.stack([2 * X[0] - B, X[3]])  # the middle of the first path is a training point
    e = ask(model, through)
    assert np.abs(e.residual).max() < (1e-11 if nu == 0.5 else 1e-6)
    near = through + 1e-7
    np.testing.assert_allclose(ask(model, near).values, e.values, atol=1e-5 if nu == 0.5 else 1e-3)


def test_the_laplacian_is_exact_where_paths_start_pass_and_end_on_support_vectors():
    model = ridge("laplacian", gamma=0.7).fit(X, Y)
    rows = np.stack([2 * X[0] - X[1], X[2], X[1]])
    e = ask(model, rows, baseline=X[1])
    assert np.abs(e.residual).max() < 1e-13 and (e.values[2] == 0).all()
    np.testing.assert_allclose(e.values, brute(model.predict, rows, X[1], 2000, step=1e-9), atol=2e-3)


@pytest.mark.parametrize("kernel", ["additive_chi2", "chi2"])
def test_kernels_of_histograms(kernel):
    H = np.abs(X)
    H[:, 4], off = 0.0, np.array([0, 0, 0, 0, 1e-4])  # differences need room
    model = ridge(kernel, gamma=0.5, alpha=200.0 if kernel == "additive_chi2" else 0.5).fit(H, Y)
    e = ask(model, H[:5], baseline=H[7])
    assert np.abs(e.residual).max() < 1e-12
    np.testing.assert_allclose(e.values[:, :4], brute(model.predict, H[:5] + off, H[7] + off)[:, :4], atol=1e-3)
    assert (e.values[:, 4] == 0).all()
    with pytest.raises(InputError, match="negative values"):
        ask(model, X[:5], baseline=0.0)


@pytest.mark.parametrize("gamma", [1e-9, 1e-3, 0.3, 50.0, 5e4])
def test_the_gaussian_is_exact_however_narrow_or_wide(gamma):
    model = svm.SVC(gamma=gamma).fit(X[:, :2], TWO)
    e = ask(model, X[:, :2], baseline=B[:2])
    assert np.abs(e.residual).max() < 1e-12 * max(1.0, np.abs(model.dual_coef_).max())
    near = B[:2] + 1e-7 * X[:4, :2]
    slope = functions.Gaussian(gamma).gradient(B[None, :2], model.support_vectors_, model.dual_coef_)
    np.testing.assert_allclose(ask(model, near, baseline=B[:2]).values, (near - B[:2]) * slope, rtol=1e-3, atol=1e-12 * np.abs(slope).max())


@pytest.mark.parametrize(
    "kernel", [functions.Laplacian(0.7), functions.Gaussian(0.7), functions.AdditiveChiSquared(), functions.Sigmoid(0.3, 0.1)], ids=lambda k: type(k).__name__
)
def test_mean_gradients_are_right_in_coordinates_that_stand_still(kernel):
    """They do not matter for the values, but do when gradients are pulled back through a step that mixes columns."""
    S, x, b, c = np.abs(X[:9]), np.abs(X[10:13]), np.abs(X[20:21]) * np.ones((3, 1)), np.linspace(-1, 1, 9)
    x[:, 2] = b[:, 2]
    nodes, weights = np.polynomial.legendre.leggauss(8)
    t, w = ((np.arange(600)[:, None] + (1 + nodes) / 2) / 600).ravel(), np.tile(weights / 1200, 600)
    numeric = [w @ kernel.gradient(q + t[:, None] * (p - q), S, np.tile(c, (len(t), 1))) for p, q in zip(x, b, strict=True)]
    np.testing.assert_allclose(kernel.mean(x, b, S, c), numeric, atol=2e-3)


@pytest.mark.parametrize(("low", "high"), [(3.0, 4.0), (-5.0, -4.5), (-1.0, 2.0), (6.0, 9.0)])
def test_differences_of_error_functions_keep_their_digits(low, high):
    from scipy.integrate import quad

    area = quad(lambda t: np.exp(-(t * t)), low, high, epsabs=0, epsrel=1e-12)[0] * 2 / np.pi**0.5
    np.testing.assert_allclose(functions._erf_between(np.array([low]), np.array([high])), area, rtol=1e-10)


def test_a_polynomial_is_exact_by_hand():
    """f = x0 x1 from 0 shares equally; f = x0² x1 gives two thirds to x0."""
    S = np.array([[1.0, 1.0], [1.0, -1.0]])
    kernel = functions.Polynomial(1.0, 0.0, 2)  # ((x0+x1)² - (x0-x1)²) / 4 = x0 x1
    x = np.array([[3.0, -2.0]])
    np.testing.assert_allclose(x * kernel.mean(x, np.zeros((1, 2)), S, np.array([0.25, -0.25])), [[-3.0, -3.0]], rtol=1e-15)
    cubic = functions.Polynomial(1.0, 0.0, 3)  # ((x0+x1)³ - (x0-x1)³)/6 = x0² x1 + x1³/3
    phi = x * cubic.mean(x, np.zeros((1, 2)), S, np.array([1 / 6, -1 / 6]))
    np.testing.assert_allclose(phi, [[2 / 3 * -18, 1 / 3 * -18 - 8 / 3]], rtol=1e-14)


def test_a_linear_model_is_weight_times_difference_and_ignores_what_it_ignores():
    model = linear_model.Lasso(0.4).fit(X, Y)
    e = ask(model)
    assert (model.coef_ == 0).any()
    np.testing.assert_array_equal(e.values, model.coef_ * (X - B))


def test_a_margin_of_two_outputs_is_their_difference():
    model = linear_model.Ridge().fit(X, np.c_[X[:, 0], -X[:, 1], X[:, 2] + X[:, 0]])
    pair, first, second = (ask(model, X[:5], target=target).values for target in (targets.margin(2, 0), 2, targets.output(0)))
    np.testing.assert_allclose(pair, first - second, atol=1e-14)
    assert np.abs(second).max() > 0.1


def test_the_class_of_a_multiclass_machine_is_the_sum_of_its_pairs():
    model = svm.SVC().fit(X, THREE)
    pair = {(a, b): ask(model, target=(a, b)).values for a in (0, 10, 20) for b in (0, 10, 20) if a != b}
    np.testing.assert_allclose(pair[0, 20], -pair[20, 0], atol=1e-14)
    e = ask(model, target=10)
    np.testing.assert_allclose(e.values, pair[10, 0] + pair[10, 20], atol=1e-13)
    assert e.target == "class 10 (sum of the decision values of its 2 pairs)"
    np.testing.assert_allclose(ask(model, target=THREE).values[THREE == 10], e.values[THREE == 10], atol=1e-13)
    ovo = model.set_params(decision_function_shape="ovo").decision_function(X)[:, 1]
    np.testing.assert_allclose(ask(model, target=(0, 20)).output, ovo, atol=1e-12)


def test_classes_of_two_are_opposite():
    for model in (svm.SVC(), linear_model.LogisticRegression(), naive_bayes.GaussianNB(), gaussian_process.GaussianProcessClassifier()):
        model.fit(X, TWO)
        np.testing.assert_allclose(ask(model, target="yes").values, -ask(model, target="no").values, atol=1e-12)
        np.testing.assert_array_equal(ask(model).values, ask(model, target="yes").values)


@pytest.mark.parametrize(
    "model",
    [linear_model.LogisticRegression(), discriminant_analysis.LinearDiscriminantAnalysis(), naive_bayes.GaussianNB(), perceptron(neural_network.MLPClassifier, "tanh")],
    ids=lambda model: type(model).__name__,
)
@pytest.mark.parametrize(("y", "target"), [(TWO, "no"), (THREE, 10)])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_probabilities_where_they_are_a_function_of_the_outputs(model, y, target):
    model.fit(X, y)
    column = list(model.classes_).index(target)
    e = ask(model, X[:5], target=target, output="probability")
    np.testing.assert_allclose(e.output, model.predict_proba(X[:5])[:, column], atol=1e-12)
    assert np.abs(e.residual).max() < 1e-12
    np.testing.assert_allclose(e.values, brute(lambda Z: model.predict_proba(Z)[:, column], X[:5], B, 25), atol=1e-6)


def test_a_saturated_logistic_function_keeps_its_digits():
    model = linear_model.LogisticRegression().fit(X, TWO)
    model.coef_ = model.coef_ * 300
    e = ask(model, output="probability")
    assert np.abs(e.residual).max() < 1e-14 and np.isfinite(e.values).all()


def test_probabilities_that_are_no_such_function_are_refused():
    for model in (linear_model.SGDClassifier(loss="modified_huber"), linear_model.RidgeClassifier()):
        with pytest.raises(InputError, match="probability"):
            ask(model.fit(X, THREE), target=0, output="probability")


def test_models_with_a_logarithmic_link_are_explained_on_it():
    model = linear_model.PoissonRegressor().fit(X, np.exp(Y / 4))
    e = ask(model)
    np.testing.assert_allclose(np.exp(e.output), model.predict(X), rtol=1e-12)
    np.testing.assert_allclose(e.values, model.coef_ * (X - B), rtol=1e-14)
    assert "logarithm" in e.target


def test_counts_of_words():
    C = sparse.csr_matrix(np.random.default_rng(1).poisson(1.0, size=(30, 8)))
    y = np.arange(30) % 2
    for model in (naive_bayes.MultinomialNB(), naive_bayes.ComplementNB()):
        e = kernels.explain(Question(model.fit(C, y), C))
        log = model.predict_joint_log_proba(C)
        np.testing.assert_allclose(e.output, log[:, 1] - log[:, 0])
        assert np.abs(e.residual).max() < 1e-13 * np.abs(e.output).max() + 1e-13


def test_many_outputs_are_told_apart():
    model = ridge("rbf").fit(X, np.stack([Y, -2 * Y], 1))
    np.testing.assert_allclose(ask(model, target=1).values, -2 * ask(model, target=0).values, atol=1e-12)
    each = ask(model, target=np.arange(60) % 2)
    np.testing.assert_allclose(each.values[1::2], ask(model, target=1).values[1::2], atol=1e-13)
    with pytest.raises(InputError, match="no target, and 2 outputs"):
        ask(model)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_relu_perceptron_is_followed_from_kink_to_kink():
    """Tangents find kinks: with 128 evaluations panels are off by a percent here, and so are 128 points of any rule."""
    model = neural_network.MLPRegressor(hidden_layer_sizes=(30,), solver="lbfgs", max_iter=100, random_state=0).fit(X, Y)
    e = ask(model, X[:5], max_evaluations=128)
    many = ask(model, X[:5], rule=midpoint(20_000))
    assert (np.linalg.norm(e.values - many.values, axis=1) < 3e-3 * np.linalg.norm(many.values, axis=1)).all()
    assert (e.evaluations <= 128).all()


@pytest.mark.parametrize("nu", [0.5, 2.5])
def test_evaluations_are_those_that_were_made(nu):
    reading = estimators.read(process(gp.Matern(0.4, nu=nu)).fit(X, Y))
    seen = []

    def both(points, rows):
        seen.append(rows)
        return reading.outputs(points)[:, 0], reading.pull(points, np.ones((len(points), 1)))

    found = by_points(both, X[:7], np.tile(B, (7, 1)), Effort(budget=400))
    np.testing.assert_array_equal(found.evaluations, np.bincount(np.concatenate(seen), minlength=7))
    assert (found.evaluations > 18).any() and (found.evaluations <= 400).all()


def test_a_rule_and_a_tolerance_do_what_they_say():
    model = process(gp.Matern(0.3, nu=1.5)).fit(X, Y)
    few, loose, tight = ask(model, rule=gauss_legendre(4)), ask(model, tolerance=1e-2), ask(model, tolerance=1e-9)
    assert (few.evaluations == 6).all() and np.abs(few.residual).max() > 1e-4
    assert loose.converged.all() and tight.converged.all() and loose.evaluations.mean() < tight.evaluations.mean()
    assert (np.abs(loose.residual) <= 1.01e-2 * np.abs(loose.output - loose.baseline_output) + 1e-12).all()
    missed = ask(model, tolerance=1e-13, max_evaluations=20)
    assert not missed.converged.all() and (missed.evaluations <= 20).all()


def test_bisection_finds_a_kink():
    """|t - 1/3| along the path: only the panel that holds the kink is ever halved."""

    def both(points, rows):
        return np.abs(points[:, 0] - 1 / 3), np.sign(points - 1 / 3)

    values, spent = bisected(both, np.ones((1, 1)), np.zeros((1, 1)), np.array([1e-12]), 2000, 64)
    assert abs(values[0, 0] - 1 / 3) < 1e-12 and spent[0] < 800


def test_several_baselines_are_averaged_with_their_spread():
    model = svm.SVC().fit(X, TWO)
    e = ask(model, X[:4], baseline=baselines.dataset(X, 7), seed=3)
    points = baselines.dataset(X, 7).references((__import__("torch").tensor(X[:4]),), 3).points[0][:, 0].numpy()
    each = np.stack([ask(model, X[:4], baseline=point).values for point in points])
    np.testing.assert_allclose(e.values, each.mean(0), atol=1e-14)
    np.testing.assert_allclose(e.stderr, each.std(0, ddof=1) / 7**0.5, atol=1e-14)
    assert np.abs(e.residual).max() < 1e-12 and e.baseline == "7 examples of the data"


def test_names_of_a_frame_are_kept_and_no_library_warns():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(X, columns=list("abcde"))
    e = ask(svm.SVC().fit(frame, TWO), frame, baseline={"a": 0, "b": 1, "c": 2, "d": 3, "e": 4})
    assert e.feature_names == tuple("abcde")
    np.testing.assert_allclose(e.values, ask(svm.SVC().fit(X, TWO), baseline=np.arange(5.0)).values, atol=1e-14)


def test_an_input_on_its_baseline_is_told():
    assert "equal" in ask(svm.SVC().fit(X, TWO), B[None]).notes[0]


def test_a_kernel_that_is_a_function_is_explained_by_differences():
    def product(a, b):
        return (a @ b.T + 1) ** 2

    by_values = ask(svm.SVC(kernel=product).fit(X, TWO), X[:3])
    exact = ask(svm.SVC(kernel="poly", degree=2, gamma=1.0, coef0=1.0).fit(X, TWO), X[:3])
    np.testing.assert_allclose(by_values.values, exact.values, atol=1e-6)
    assert "finite differences" in by_values.notes[0]


def test_what_was_read_is_compared_with_the_library():
    class Halved(svm.SVC):
        def decision_function(self, Z):
            return super().decision_function(Z) / 2

    with pytest.raises(InputError, match="outputs are not those of its fitted attributes"):
        ask(Halved().fit(X, TWO))


@pytest.mark.parametrize(
    ("model", "y", "options", "says"),
    [
        (svm.SVC(kernel="precomputed"), TWO, {"inputs": X @ X.T}, "kernel='precomputed'"),
        (svm.SVC(), TWO, {"inputs": X[:, :3]}, "3 columns"),
        (svm.SVC(), TWO, {"inputs": np.full_like(X, np.nan)}, "nan in row 0"),
        (svm.SVC(), TWO, {"target": "maybe"}, "one of the classes: 'no', 'yes'"),
        (svm.SVC(), TWO, {"layer": "a"}, "layer='a' for SVC"),
        (svm.SVC(), TWO, {"path": "blur"}, "path='blur' for SVC"),
        (svm.SVC(), TWO, {"output": "logit"}, "output='logit'"),
        (svm.SVC(), TWO, {"tolerance": 0.0}, "tolerance=0.0"),
        (svm.SVC(), TWO, {"baseline": [1.0, 2.0]}, "baseline"),
        (ridge("cosine"), Y, {"baseline": 0.0}, "jumps there"),
        (ridge("cosine"), Y, {"baseline": -X}, "jumps there"),
    ],
)
def test_bad_questions_are_refused_by_name(model, y, options, says):
    model.fit(X @ X.T if getattr(model, "kernel", "") == "precomputed" else X, y)
    with pytest.raises(InputError, match=says):
        ask(model, **options)


def test_an_estimator_that_was_not_fitted_and_a_kernel_that_is_unknown_are_refused():
    with pytest.raises(InputError, match="not fitted"):
        ask(svm.SVC())

    class Own(gp.RBF):
        pass

    with pytest.raises(InputError, match="the kernel Own"):
        ask(process(Own()).fit(X, Y))


def test_only_what_it_reads_is_recognised():
    from sklearn.ensemble import RandomForestClassifier

    assert estimators.known(svm.SVC()) and estimators.known(linear_model.Ridge())
    for other in (RandomForestClassifier(), svm.SVC, np.zeros(3), lambda z: z):
        assert not kernels.recognises(Question(other, X))


def test_the_rate_of_the_logistic_function_keeps_its_digits_in_its_tails():
    rate = readings._logistic_rate
    np.testing.assert_allclose(rate(np.array([30.0]), np.array([40.0])), (np.exp(-30) - np.exp(-40)) / 10, rtol=1e-12)
    np.testing.assert_allclose(rate(np.array([-30.0]), np.array([-40.0])), (np.exp(-30) - np.exp(-40)) / 10, rtol=1e-12)
    np.testing.assert_allclose(rate(np.array([1.0, -900.0]), np.array([1.0, 900.0])), [np.exp(-1) / (1 + np.exp(-1)) ** 2, 1 / 1800], rtol=1e-14)


@pytest.mark.parametrize("model", [svm.SVC(), linear_model.LogisticRegression()], ids=lambda model: type(model).__name__)
def test_of_several_classes_each_row_is_asked_about_its_predicted_one(model):
    labels = np.repeat([5, 7, 9], 10)
    points = np.random.default_rng(0).normal(size=(30, 3)) + labels[:, None]
    model.fit(points, labels)
    answer = kernels.explain(Question(model, points[::7], baseline=7.0))
    named = kernels.explain(Question(model, points[::7], model.predict(points[::7]), baseline=7.0))
    assert np.array_equal(answer.values, named.values) and answer.target == "the predicted class of each row"
