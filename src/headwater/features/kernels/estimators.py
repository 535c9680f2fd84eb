"""scikit-learn's kernel machines, linear models, discriminants and perceptrons, each read from its fitted attributes.

Nothing is believed unseen: :func:`read` compares what it read with the library's own outputs at a few points, and refuses where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any, cast

import numpy as np

from headwater.errors import InputError
from headwater.features.kernels import functions as k
from headwater.features.kernels.readings import Aim, Array, Reading, columns, no_closed_form, of_classes, of_logs, of_outputs, of_pairs
from headwater.features.tables import as_fitted, is_sparse, named

SVMS = ("sklearn.SVC", "sklearn.NuSVC", "sklearn.SVR", "sklearn.NuSVR", "sklearn.OneClassSVM")
PROCESSES = ("sklearn.GaussianProcessRegressor", "sklearn.GaussianProcessClassifier")
LINEAR = ("sklearn.LinearSVC", "sklearn.LinearSVR", "sklearn.LinearDiscriminantAnalysis", "sklearn._PLS")
NAIVE = ("sklearn.GaussianNB", "sklearn.MultinomialNB", "sklearn.ComplementNB")
LOG_LINK = ("sklearn.PoissonRegressor", "sklearn.GammaRegressor", "sklearn.TweedieRegressor")


class CallableKernel(InputError):
    """A kernel that is a function, of which only values are known."""


def known(model: Any) -> bool:
    """Whether this module reads models of this kind."""
    return reader(model) is not None


def reader(model: Any) -> Callable[[Any], Reading] | None:
    """The function that reads this model, or None."""
    if isinstance(model, type):
        return None
    for names, read_ in ((SVMS, _svm), (PROCESSES, _process), (("sklearn.KernelRidge",), _ridge), (NAIVE, _naive), (LINEAR, _linear)):
        if named(model, *names):
            return read_
    if named(model, "sklearn.QuadraticDiscriminantAnalysis"):
        return _quadratic
    if named(model, "sklearn.MLPClassifier", "sklearn.MLPRegressor"):
        return _perceptron
    if any(kind.__module__.startswith("sklearn.linear_model.") for kind in type(model).__mro__) and hasattr(type(model), "predict"):
        return _linear
    return None


def read(model: Any) -> Reading:
    """The fitted model as a :class:`Reading`. Raises InputError: not fitted, unsupported, or different from the library."""
    read_ = cast(Callable[[Any], Reading], reader(model))
    if not fitted(model):
        raise InputError(f"a {type(model).__name__} that was not fitted", "a fitted estimator", "model.fit(X, y) first")
    return read_(model)


def fitted(model: Any) -> bool:
    """Whether it has attributes that fitting leaves."""
    return any(name.endswith("_") and not name.startswith("_") for name in vars(model))


def agrees(own: Array, library: Array, model: Any) -> None:
    """Raise InputError where what was read differs from the library's own outputs."""
    own, library = columns(own), columns(library)
    size = np.abs(library).max(initial=1e-12)
    if own.shape != library.shape or not np.allclose(own, library, rtol=1e-5, atol=1e-5 * size):
        raise InputError(
            f"a {type(model).__name__} whose outputs are not those of its fitted attributes",
            "an estimator as scikit-learn computes it",
            "explain its function: hw.explain(model.predict, X)",
        )


# ---- expansions in kernels ------------------------------------------------------------------------------------------------------


def _expansion(model: Any, kernel: k.Kernel, S: Array, C: Array, constant: Array, library: Callable[[Array], Array], aim: Aim) -> Reading:
    """``output_k(x) = Σ_i C_ki K(s_i, x) + constant_k``; S (m, p), C (outputs, m)."""
    width = kernel.width(S) + S.shape[0]
    rows = max(1, k.CHUNK // width)

    def outputs(X: Array) -> Array:
        return columns(library(X))

    def pull(X: Array, W: Array) -> Array:
        return np.concatenate([kernel.gradient(X[i : i + rows], S, W[i : i + rows] @ C) for i in range(0, len(X), rows)])

    def closed(x: Array, b: Array, w: Array) -> Array | None:
        parts = [kernel.mean(x[i : i + rows], b[i : i + rows], S, w @ C) for i in range(0, len(x), rows)]
        return None if parts[0] is None else np.concatenate(cast(list[Array], parts))

    own = np.concatenate([kernel(S[i : i + rows], S) @ C.T for i in range(0, min(len(S), 64), rows)]) + constant
    agrees(own, outputs(S[: len(own)]), model)
    exact = kernel.mean(S[:1], S[:1], S[:1], np.zeros(1)) is not None
    method = "closed form" if exact else "Gauss-Legendre on the analytic gradient"
    return Reading(outputs, pull, closed, aim, f"{method} ({kernel_name(kernel)})", width)


def kernel_name(kernel: k.Kernel) -> str:
    """In words."""
    if isinstance(kernel, k.Stretched):
        return kernel_name(kernel.inner)
    if isinstance(kernel, k.Sum | k.Product):
        return f"{kernel_name(kernel.first)} {'+' if isinstance(kernel, k.Sum) else '*'} {kernel_name(kernel.second)}"
    if isinstance(kernel, k.Power):
        return f"({kernel_name(kernel.base)})^{kernel.exponent:g}"
    return f"{kernel.nu:g} Matern" if isinstance(kernel, k.Matern) else type(kernel).__name__.lower()


def named_kernel(model: Any, name: Any, gamma: float, degree: float, shift: float) -> k.Kernel:
    if callable(name):
        raise CallableKernel(f"a {type(model).__name__} with a kernel that is a function", "a kernel of the library", "it is explained by finite differences")
    made: dict[str, Callable[[], k.Kernel]] = {
        "linear": k.Linear,
        "poly": lambda: k.Polynomial(gamma, shift, degree),
        "polynomial": lambda: k.Polynomial(gamma, shift, degree),
        "rbf": lambda: k.Gaussian(gamma),
        "sigmoid": lambda: k.Sigmoid(gamma, shift),
        "laplacian": lambda: k.Laplacian(gamma),
        "cosine": k.Cosine,
        "chi2": lambda: k.ChiSquared(gamma),
        "additive_chi2": k.AdditiveChiSquared,
    }
    if name not in made:
        raise InputError(
            f"a {type(model).__name__} with kernel={name!r}" + (", whose inputs are kernel values and not features" if name == "precomputed" else ""),
            "one of " + ", ".join(made),
            "fit with the kernel by name, or explain a function from features to outputs: hw.explain(lambda X: model.predict(kernel(X, S)), X)",
        )
    return made[name]()


def _dense(values: Any) -> Array:
    return np.asarray(values.toarray() if is_sparse(values) else values, dtype=float)


def _svm(model: Any) -> Reading:
    gamma = model._gamma if not callable(model.kernel) else 1.0
    kernel = named_kernel(model, model.kernel, gamma, model.degree, model.coef0)
    S, C, constant = _dense(model.support_vectors_), _dense(model.dual_coef_), np.atleast_1d(model.intercept_).astype(float)
    if not hasattr(model, "classes_"):
        values = model.decision_function if hasattr(model, "decision_function") else model.predict
        return _expansion(model, kernel, S, C, constant, lambda X: values(as_fitted(model, X)), of_outputs(1))
    if len(model.classes_) == 2:
        return _expansion(model, kernel, S, C, constant, lambda X: model.decision_function(as_fitted(model, X)), of_classes(model.classes_, "decision value"))
    pairwise = copy(model)
    pairwise.decision_function_shape = "ovo"
    library = lambda X: pairwise.decision_function(as_fitted(model, X))  # noqa: E731
    return _expansion(model, kernel, S, _pair_coefficients(C, model.n_support_), constant, library, of_pairs(model.classes_))


def _pair_coefficients(dual: Array, counts: Array) -> Array:
    """(pairs, m): libsvm keeps, for a support vector of class i, its coefficient against class j in row j - 1 where i < j, and in row j where j < i."""
    ends = np.r_[0, np.cumsum(counts)]
    rows = []
    for i in range(len(counts)):
        for j in range(i + 1, len(counts)):
            row = np.zeros(dual.shape[1])
            row[ends[i] : ends[i + 1]] = dual[j - 1, ends[i] : ends[i + 1]]
            row[ends[j] : ends[j + 1]] = dual[i, ends[j] : ends[j + 1]]
            rows.append(row)
    return np.array(rows)


def _ridge(model: Any) -> Reading:
    S, C = _dense(model.X_fit_), columns(model.dual_coef_).T
    gamma = model.gamma if model.gamma is not None else 1.0 if model.kernel == "chi2" else 1.0 / S.shape[1]
    kernel = named_kernel(model, model.kernel, gamma, model.degree, model.coef0)
    return _expansion(model, kernel, S, C, np.zeros(len(C)), lambda X: model.predict(as_fitted(model, X)), of_outputs(len(C)))


# ---- Gaussian processes ---------------------------------------------------------------------------------------------------------


def _process(model: Any) -> Reading:
    if named(model, "sklearn.GaussianProcessRegressor"):
        S, C = _dense(model.X_train_), columns(model.alpha_).T * np.atleast_1d(model._y_train_std)[:, None]
        constant = np.broadcast_to(np.atleast_1d(model._y_train_mean), len(C)).astype(float)
        return _expansion(model, _gp(model, model.kernel_), S, C, constant, lambda X: model.predict(as_fitted(model, X)), of_outputs(len(C)))
    machines = getattr(model.base_estimator_, "estimators_", [model.base_estimator_])
    latent = [_latent(model, machine) for machine in machines]
    aim = of_classes(model.classes_, "latent mean")
    if len(machines) > 1 and model.multi_class == "one_vs_one":
        flipped = [Reading(*_negated(one)) for one in latent]  # the library's pair (i, j) is positive for j
        return _beside(flipped, of_pairs(model.classes_, "latent mean"))
    return _beside(latent, aim)


def _latent(model: Any, machine: Any) -> Reading:
    """Laplace's approximation: f(x) = k(x)ᵀ (y - π) (Rasmussen and Williams 2006, eq. 3.21)."""
    S, C = _dense(machine.X_train_), (machine.y_train_ - machine.pi_)[None]
    return _expansion(model, _gp(model, machine.kernel_), S, C, np.zeros(1), lambda X: machine.kernel_(X, machine.X_train_) @ C[0], of_outputs(1))


def _negated(one: Reading) -> tuple[Any, ...]:
    return (lambda X: -one.outputs(X), lambda X, W: one.pull(X, -W), lambda x, b, w: one.closed(x, b, -w), one.aim, one.method, one.width)


def _beside(parts: list[Reading], aim: Aim) -> Reading:
    """Readings of one output each as one reading of all their outputs."""

    def closed(x: Array, b: Array, w: Array) -> Array | None:
        found = [part.closed(x, b, w[i : i + 1]) for i, part in enumerate(parts) if w[i]]
        return None if any(one is None for one in found) else sum(cast(list[Array], found), np.zeros_like(x))

    def pull(X: Array, W: Array) -> Array:
        return np.asarray(sum((part.pull(X, W[:, i : i + 1]) for i, part in enumerate(parts) if W[:, i].any()), np.zeros_like(X)))

    return Reading(lambda X: np.concatenate([part.outputs(X) for part in parts], 1), pull, closed, aim, parts[0].method, sum(part.width for part in parts))


def _gp(model: Any, kernel: Any) -> k.Kernel:
    """A kernel of ``sklearn.gaussian_process.kernels`` as one of ours; between different points a WhiteKernel is 0."""
    kind = type(kernel).__name__ if type(kernel).__module__ == "sklearn.gaussian_process.kernels" else ""
    if kind in ("Sum", "Product"):
        return {"Sum": k.Sum, "Product": k.Product}[kind](_gp(model, kernel.k1), _gp(model, kernel.k2))
    if kind == "PairwiseKernel":
        options = kernel.pairwise_kernels_kwargs or {}
        return named_kernel(model, kernel.metric, kernel.gamma, options.get("degree", 3), options.get("coef0", 1))
    made: dict[str, Callable[[], k.Kernel]] = {
        "ConstantKernel": lambda: k.Constant(kernel.constant_value),
        "WhiteKernel": lambda: k.Constant(0.0),
        "DotProduct": lambda: k.Linear(kernel.sigma_0**2),
        "RBF": lambda: k.Stretched(k.Gaussian(0.5), kernel.length_scale),
        "Matern": lambda: k.Stretched(k.Gaussian(0.5) if np.isinf(kernel.nu) else k.Matern(kernel.nu), kernel.length_scale),
        "RationalQuadratic": lambda: k.Stretched(k.RationalQuadratic(kernel.alpha), kernel.length_scale),
        "ExpSineSquared": lambda: k.Periodic(kernel.periodicity, kernel.length_scale),
        "Exponentiation": lambda: k.Power(_gp(model, kernel.kernel), kernel.exponent),
    }
    if kind not in made:
        raise InputError(
            f"a {type(model).__name__} with the kernel {type(kernel).__name__}",
            "kernels of sklearn.gaussian_process.kernels: " + ", ".join(made),
            "explain its function by finite differences: hw.explain(model.predict, X)",
        )
    return made[kind]()


# ---- linear and quadratic models ------------------------------------------------------------------------------------------------


def _affine(outputs: Callable[[Array], Array], W: Array, aim: Aim, method: str = "exact: weight times difference") -> Reading:
    """W (outputs, p)."""
    return Reading(outputs, lambda X, V: V @ W, lambda x, b, v: np.broadcast_to(v @ W, x.shape), aim, method, W.shape[1] + len(W), linear=True)


def _linear(model: Any) -> Reading:
    if hasattr(model, "estimator_") and not hasattr(model, "coef_"):  # RANSACRegressor predicts by the estimator that it fitted
        if reader(model.estimator_) is None:
            raise InputError(f"a {type(model).__name__} of {type(model.estimator_).__name__}", "a linear estimator", "explain model.estimator_")
        return read(model.estimator_)
    if not hasattr(model, "coef_"):
        raise InputError(f"a {type(model).__name__} without coef_", "a fitted linear model", "model.fit(X, y) first; or hw.explain(model.predict, X)")
    W = np.atleast_2d(_dense(model.coef_))
    if hasattr(model, "decision_function"):
        library = lambda X: columns(model.decision_function(as_fitted(model, X)))  # noqa: E731
        aim = of_classes(model.classes_, "decision value") if hasattr(model, "classes_") else of_outputs(1)
    elif named(model, *LOG_LINK) and not _identity_link(model):
        library = lambda X: columns(X @ W.T + model.intercept_)  # noqa: E731
        agrees(np.exp(library(np.eye(W.shape[1])[:2])), model.predict(as_fitted(model, np.eye(W.shape[1])[:2])), model)
        return _affine(library, W, lambda target, n: (of_outputs(1)(target, n)[0], "the linear predictor (the logarithm of the prediction)"))
    else:
        library = lambda X: columns(model.predict(as_fitted(model, X)))  # noqa: E731
        aim = of_outputs(len(W))
    ends = library(np.stack([np.zeros(W.shape[1]), np.ones(W.shape[1])]))
    agrees(W.sum(1)[None], ends[1:] - ends[:1], model)
    return _affine(library, W, aim)


def _identity_link(model: Any) -> bool:
    link = getattr(model, "link", None)
    return link == "identity" or (link == "auto" and model.power <= 0)


def _naive(model: Any) -> Reading:
    def library(X: Array) -> Array:
        return columns(model.predict_joint_log_proba(as_fitted(model, X)))

    aim = of_logs(model.classes_)
    if not named(model, "sklearn.GaussianNB"):
        return _affine(library, _dense(model.feature_log_prob_), aim)
    mean, precision = _dense(model.theta_), 1 / _dense(model.var_)

    def pull(X: Array, W: Array) -> Array:
        return cast(Array, W @ (precision * mean) - (W @ precision) * X)

    return _even(library, pull, aim, mean.size)


def _quadratic(model: Any) -> Reading:
    def library(X: Array) -> Array:
        return columns(model.decision_function(as_fitted(model, X)))

    precision = np.stack([R @ np.diag(1 / s) @ R.T for R, s in zip(model.rotations_, model.scalings_, strict=True)])
    mean = _dense(model.means_)

    def pull(X: Array, W: Array) -> Array:
        if len(mean) == 2:  # one output: the second class's quadratic minus the first's
            W = W * np.array([-1.0, 1.0])
        return cast(Array, -np.einsum("nk,kpq,nkq->np", W, precision, X[:, None] - mean))

    return _even(library, pull, of_classes(model.classes_, "decision value"), mean.size)


def _even(library: Callable[[Array], Array], pull: Callable[[Array, Array], Array], aim: Aim, width: int) -> Reading:
    """Quadratic outputs: along a straight path their gradient moves evenly, so its mean is that of the middle."""
    return Reading(library, pull, lambda x, b, w: pull((x + b) / 2, np.broadcast_to(w, (len(x), len(w)))), aim, "closed form (quadratic)", width)


# ---- perceptrons ----------------------------------------------------------------------------------------------------------------


def _perceptron(model: Any) -> Reading:
    weights, shifts = [_dense(w) for w in model.coefs_], [_dense(c) for c in model.intercepts_]
    bend, slope = _ACTIVATIONS[model.activation]

    def forward(X: Array) -> list[Array]:
        layers = [X]
        for W, c in zip(weights[:-1], shifts[:-1], strict=True):
            layers.append(bend(layers[-1] @ W + c))
        return [*layers, layers[-1] @ weights[-1] + shifts[-1]]

    def pull(X: Array, V: Array) -> Array:
        hidden = forward(X)[1:-1]
        back = V @ weights[-1].T
        for h, W in zip(reversed(hidden), reversed(weights[:-1]), strict=True):
            back = (back * slope(h)) @ W.T
        return cast(Array, back)

    probe = np.random.default_rng(0).normal(size=(4, weights[0].shape[0]))
    _check_perceptron(model, forward(probe)[-1], probe)
    aim = of_classes(model.classes_, "output before the last activation") if hasattr(model, "classes_") else of_outputs(len(shifts[-1]))
    width = sum(W.shape[1] for W in weights) + weights[0].shape[0]
    exact = model.activation == "identity"
    closed = no_closed_form if not exact else lambda x, b, w: pull(x, np.broadcast_to(w, (len(x), len(w))))
    return Reading(
        lambda X: forward(X)[-1],
        pull,
        closed,
        aim,
        "exact: linear" if exact else f"Gauss-Legendre on the analytic gradient ({model.activation} perceptron)",
        width,
        exact,
        model.activation == "relu",
    )


def _check_perceptron(model: Any, outputs: Array, probe: Array) -> None:
    from scipy.special import expit, softmax

    last = {"identity": lambda z: z, "logistic": expit, "softmax": lambda z: softmax(z, axis=1), "poisson": np.exp}.get(model.out_activation_)
    if last is None or (hasattr(model, "classes_") and model.out_activation_ == "logistic" and len(model.classes_) != 2):
        raise InputError(
            f"a {type(model).__name__} with output activation {model.out_activation_!r} for this task", "one label for each example", "hw.explain(model.predict_proba, X)"
        )
    own = last(outputs)
    own = np.concatenate([1 - own, own], 1) if model.out_activation_ == "logistic" else own
    agrees(own, (model.predict_proba if hasattr(model, "classes_") else model.predict)(as_fitted(model, probe)), model)


def _sigmoid(z: Array) -> Array:
    from scipy.special import expit

    return cast(Array, expit(z))


_ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "identity": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda h: (h > 0).astype(float)),
    "tanh": (np.tanh, lambda h: 1 - h * h),
    "logistic": (_sigmoid, lambda h: h * (1 - h)),
}
"""Each with its slope in terms of its own value."""
