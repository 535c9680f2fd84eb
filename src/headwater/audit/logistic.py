"""Logistic regression, small and exact: what the audits learn when two kinds of rows are to be told apart. No extra is needed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headwater.errors import InputError, NotFinite


@dataclass(frozen=True, eq=False)
class Logistic:
    """``score(x) = (x - mean) / scale @ weights + bias``: log-odds of the second kind, both kinds weighing alike.

    >>> rows = np.array([[0.0], [1.0], [2.0], [3.0]])
    >>> (Logistic.fit(rows, np.array([False, False, True, True]))(rows) > 0).tolist()
    [False, False, True, True]
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: float

    @classmethod
    def fit(cls, x: np.ndarray, second: np.ndarray, ridge: float = 1.0) -> Logistic:
        """Minimise ``Σ_i c_i log(1 + exp(-s_i score_i)) + ridge / 2 |weights|²`` over standardised columns, ``c_i = n / (2 n_kind)``, ``s_i = ±1``.

        Args:
            x: (n, columns); columns that do not vary weigh nothing. second: (n,) booleans.
        """
        from scipy.optimize import minimize

        if x.ndim != 2 or len(x) != len(second) or not second.any() or second.all() or ridge <= 0:
            given = f"rows of shape {x.shape}, {int(np.sum(second))} of {len(second)} of the second kind, ridge={ridge}"
            raise InputError(given, "rows (n, columns) of two kinds, and a ridge above 0", "give some of each kind")
        if not np.isfinite(x).all():
            raise NotFinite("rows with NaN or infinity", "finite numbers", "look at what they were made from")
        mean, scale = x.mean(0), x.std(0)
        scale = np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, np.inf)
        z = (x - mean) / scale
        sign = np.where(second, 1.0, -1.0)
        count = np.where(second, second.sum(), (~second).sum())
        share = len(x) / (2.0 * count)

        def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
            margin = sign * (z @ at[:-1] + at[-1])
            pull = -share * sign / (1 + np.exp(np.minimum(margin, 700)))
            value = float(share @ np.logaddexp(0, -margin) + ridge / 2 * at[:-1] @ at[:-1])
            return value, np.append(z.T @ pull + ridge * at[:-1], pull.sum())

        found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 2000, "maxfun": 10_000, "ftol": 1e-12, "gtol": 1e-7})
        return cls(mean, scale, found.x[:-1], float(found.x[-1]))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(n,) log-odds of the second kind."""
        return np.asarray((x - self.mean) / self.scale @ self.weights + self.bias)
