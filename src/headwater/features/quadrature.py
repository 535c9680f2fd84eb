"""Quadrature as tables: nodes and weights on [0, 1]. The loop that uses them is written once, in ``integrate``.

    hw.explain(model, x, target=3, rule=hw.quadrature.midpoint(64))

Weights of every rule sum to 1 and none is negative, so its nodes lie in cells whose ends are the running sums of the weights
(``Rule.edges``): on a curved path a node stands for the increment of the path over its cell, and a linear function is exact for any rule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from headwater.errors import InputError

__all__ = ["LogRule", "Rule", "gauss_kronrod", "gauss_legendre", "gauss_log", "left", "midpoint", "right", "trapezoid"]


@dataclass(frozen=True, eq=False)
class Rule:
    """A quadrature rule on [0, 1].

    Args:
        name: as it is written in results.
        nodes, weights: (n,) float64, nodes ascending.
        degree: polynomials up to this degree are integrated exactly.
        embedded: (n,) weights of a rule of lower degree on some of the same nodes (a Gauss-Kronrod pair), or None: the difference of
            the two integrals estimates the error for no further evaluation. For those who want the pair; ``explain`` itself estimates
            its error from the values of f between the nodes (``line.unseen``), whatever the Gaussian rule.

    >>> gauss_legendre(2)
    Gauss-Legendre(2)
    """

    name: str
    nodes: np.ndarray
    weights: np.ndarray
    degree: int
    embedded: np.ndarray | None = field(default=None)

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"{self.name}({len(self)})"

    @property
    def edges(self) -> np.ndarray:
        """(n + 1,) ends of the cells that the nodes stand for, from 0 to 1."""
        return np.minimum(np.concatenate([[0.0], np.cumsum(self.weights)]), 1.0)

    @property
    def gaps(self) -> np.ndarray:
        """(n + 1, n): row k integrates the polynomial through the values at all nodes from node k - 1 to node k (from 0, and to 1 at the ends).

        With the derivative of a function at the nodes this predicts its changes from node to node. Where the function's values are known
        too, the gap between predicted and real change shows how well the rule sees what happens between its nodes.
        """
        return _gaps(tuple(self.nodes.tolist()), tuple(self.weights.tolist()) if self.degree == 2 * len(self) - 1 else None)

    @property
    def shape(self) -> np.ndarray:
        """(n + 1,) of unit length: the integrals of the polynomial that vanishes at all nodes over the same gaps. What a smooth function leaves."""
        ends, (at, share) = np.concatenate([[0.0], self.nodes, [1.0]]), np.polynomial.legendre.leggauss(8)
        places = ends[:-1, None] + np.diff(ends)[:, None] * (1 + at) / 2
        apart = places[:, :, None] - self.nodes
        # as logarithms: a product of hundreds of distances is far below the smallest number
        size, sign = np.log(np.abs(apart)).sum(2), np.sign(apart).prod(2)
        found = np.diff(ends) * ((sign * np.exp(size - size.max())) @ share)
        return found / np.linalg.norm(found)


def gauss_legendre(points: int = 32) -> Rule:
    """Exact to degree ``2 points - 1``: spectral convergence where the model is smooth along the path (GELU, SiLU, tanh).

    >>> rule = gauss_legendre(3)
    >>> bool(np.isclose(rule.weights @ rule.nodes**5, 1 / 6))
    True
    """
    n = _count(points)
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return Rule("Gauss-Legendre", (1 + nodes) / 2, weights / weights.sum(), 2 * n - 1)


def midpoint(points: int = 32) -> Rule:
    """The middle of ``points`` equal cells; degree 1."""
    n = _count(points)
    return Rule("midpoint", (np.arange(n) + 0.5) / n, np.full(n, 1 / n), 1)


def trapezoid(points: int = 32) -> Rule:
    """Equally spaced, both ends included, each end with half a weight; degree 1. (captum's ``riemann_trapezoid`` has weights that sum
    to 1 - 1/n.)"""
    n = _count(points, at_least=2)
    weights = np.full(n, 1 / (n - 1))
    weights[[0, -1]] /= 2
    return Rule("trapezoid", np.linspace(0, 1, n), weights, 1)


def left(points: int = 32) -> Rule:
    """The left ends of equal cells; degree 0."""
    n = _count(points)
    return Rule("left", np.arange(n) / n, np.full(n, 1 / n), 0)


def right(points: int = 32) -> Rule:
    """The right ends of equal cells; degree 0."""
    n = _count(points)
    return Rule("right", (np.arange(n) + 1) / n, np.full(n, 1 / n), 0)


def gauss_kronrod(points: int = 31) -> Rule:
    """A Gauss-Kronrod pair: ``points`` = 2n + 1 nodes that contain the n of Gauss-Legendre; degree ``3n + 1`` (one more where n is odd).

    ``embedded`` holds the Gauss-Legendre weights. Nodes by Laurie's algorithm (Calculation of Gauss-Kronrod quadrature rules,
    Mathematics of Computation 66, 1997): eigenvalues of a Jacobi matrix of order 2n + 1 whose leading part is Legendre's.

    >>> len(gauss_kronrod(15)), gauss_kronrod(15).degree
    (15, 23)
    """
    total = _count(points, at_least=3)
    if total % 2 == 0:
        raise InputError(f"gauss_kronrod({points})", "an odd number of points, 2n + 1", f"gauss_kronrod({points + 1})")
    n = total // 2
    diagonal, squares = _kronrod_matrix(n)
    matrix = np.diag(diagonal) + np.diag(np.sqrt(squares[1:]), 1) + np.diag(np.sqrt(squares[1:]), -1)
    nodes, vectors = np.linalg.eigh(matrix)
    nodes = np.where(np.arange(total) == n, 0.0, (nodes - nodes[::-1]) / 2)  # they lie symmetrically
    weights = vectors[0] ** 2
    weights = (weights + weights[::-1]) / 2
    embedded = np.zeros(total)
    embedded[1::2] = gauss_legendre(n).weights
    return Rule("Gauss-Kronrod", (1 + nodes) / 2, weights / weights.sum(), 3 * n + 1 + n % 2, embedded)


def _kronrod_matrix(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Diagonal and squared off-diagonal (2n + 1,) of Laurie's matrix for the weight 1 on [-1, 1]. The diagonal is zero by symmetry."""
    k = np.arange(0, 3 * n // 2 + 2, dtype=float)
    b = np.zeros(2 * n + 1)
    legendre = np.where(k == 0, 2.0, k**2 / np.where(k == 0, 1.0, 4 * k**2 - 1))
    b[: (3 * n + 1) // 2 + 1] = legendre[: (3 * n + 1) // 2 + 1]
    a = np.zeros(2 * n + 1)
    s, t = np.zeros(n // 2 + 2), np.zeros(n // 2 + 2)
    t[1] = b[n + 1]
    for m in range(n - 1):
        u = 0.0
        for i in range((m + 1) // 2, -1, -1):
            low = m - i
            u += (a[i + n + 1] - a[low]) * t[i + 1] + b[i + n + 1] * s[i] - b[low] * s[i + 1]
            s[i + 1] = u
        s, t = t, s
    s[1:] = s[:-1].copy()
    for m in range(n - 1, 2 * n - 2):
        u = 0.0
        for i in range(m + 1 - n, (m - 1) // 2 + 1):
            low, j = m - i, n - 1 - (m - i)
            u += -(a[i + n + 1] - a[low]) * t[j + 1] - b[i + n + 1] * s[j + 1] + b[low] * s[j + 2]
            s[j + 1] = u
        i = (m + 1) // 2
        if m % 2 == 0:
            a[i + n + 1] = a[i] + (s[j + 1] - b[i + n + 1] * s[j + 2]) / t[j + 2]
        else:
            b[i + n + 1] = s[j + 1] / s[j + 2]
        s, t = t, s
    a[2 * n] = a[n - 1] - b[2 * n] * s[1] / t[1]
    return a, b


@cache
def _gaps(nodes: tuple[float, ...], weights: tuple[float, ...] | None) -> np.ndarray:
    x = 2 * np.array(nodes) - 1
    n = len(x)
    ends = np.concatenate([[-1.0], x, [1.0]])
    # the polynomial through the values, in Legendre polynomials; each is integrated as (P_{k+1} - P_{k-1}) / (2k + 1)
    values = np.polynomial.legendre.legvander(x, n - 1)
    # a Gauss rule sees them as orthogonal; other nodes need a system to be solved
    coefficients = np.linalg.inv(values) if weights is None else (2 * np.arange(n) + 1)[:, None] * values.T * np.array(weights)
    at = np.polynomial.legendre.legvander(ends, n)
    order = np.arange(1, n)
    integrals = np.concatenate([at[:, 1:2], (at[:, order + 1] - at[:, order - 1]) / (2 * order + 1)], axis=1)
    return np.diff(integrals, axis=0) @ coefficients / 2


def _count(points: int, at_least: int = 1) -> int:
    if points != int(points) or points < at_least:
        raise InputError(f"{points} points", f"a whole number of at least {at_least}", "32, say")
    return int(points)


# ---- a weight of its own: double integrals of interactions ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LogRule:
    """Nodes and weights for integrals over [0, 1] against the weight ``-ln u``; no :class:`Rule`, whose weight is 1.

    Args:
        nodes, weights: (n,) float64, nodes ascending; weights are positive and sum to 1, the integral of ``-ln u``.
        degree: ``integral of (-ln u) q(u) du`` is exact for polynomials q up to this degree.
    """

    nodes: np.ndarray
    weights: np.ndarray
    degree: int

    def __len__(self) -> int:
        return len(self.nodes)

    def __repr__(self) -> str:
        return f"Gauss-log({len(self)})"


@cache
def gauss_log(points: int = 16) -> LogRule:
    """Gauss's rule for the weight ``-ln u`` on [0, 1], exact to degree ``2 points - 1``: its moments are ``1 / (k + 1)^2``.

    The product of two independent uniform numbers has this density, so that a double integral of ``g(a b)`` over the unit square, which
    Integrated Hessians are, is ``sum of weights * g(nodes)``. Its recurrence comes from Legendre's by the modified Chebyshev algorithm
    (Gautschi, Orthogonal Polynomials, 2004, section 2.1.7), which is stable here; the integrals of the shifted Legendre polynomials
    against the weight are 1 and ``(-1)^k / (k (k + 1))``. On [0, 4] instead of [0, 1], where monic polynomials neither grow nor vanish.

    >>> rule = gauss_log(2)
    >>> [round(float(x), 12) for x in (*rule.nodes, *rule.weights)]
    [0.112008806167, 0.602276908119, 0.71853931903, 0.28146068097]
    """
    n = _count(points)
    alpha, beta = _chebyshev(n)
    off = np.sqrt(beta[1:])
    nodes, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(off, 1) + np.diag(off, -1))
    weights = vectors[0] ** 2
    return LogRule(nodes / 4, weights / weights.sum(), 2 * n - 1)


def _chebyshev(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) and (n,) coefficients of the recurrence of the polynomials that are orthogonal for ``-ln(x / 4)`` on [0, 4]."""
    k = np.arange(2 * n, dtype=float)
    b = np.where(k == 0, 0.0, 4 * k**2 / np.where(k == 0, 1.0, 4 * k**2 - 1))  # of monic Legendre polynomials on [0, 4]; there a = 2
    growth = np.concatenate([[1.0], np.cumprod(2 * k[1:] / (2 * k[1:] - 1))])  # 4^k (k!)^2 / (2k)!: from Legendre to monic on [0, 4]
    before = np.zeros(2 * n)
    now = growth * np.where(k == 0, 1.0, (-1.0) ** k / np.where(k == 0, 1.0, k * (k + 1)))
    alpha, beta = np.zeros(n), np.zeros(n)
    alpha[0], beta[0] = 2 + now[1] / now[0], now[0]
    for m in range(1, n):
        low, high = m, 2 * n - m
        after = np.zeros(2 * n)
        after[low:high] = now[low + 1 : high + 1] - (alpha[m - 1] - 2) * now[low:high] - beta[m - 1] * before[low:high] + b[low:high] * now[low - 1 : high - 1]
        alpha[m] = 2 + after[m + 1] / after[m] - now[m] / now[m - 1]
        beta[m] = after[m] / now[m - 1]
        before, now = now, after
    return alpha, beta
