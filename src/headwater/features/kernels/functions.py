"""Kernels K(s, x): their gradients in x, and the mean of that gradient along the straight path where it has a closed form.

A weighted sum of kernels is what every kernel machine computes: ``f(x) = Σ_i c_i K(s_i, x) + c0``. Each kernel here knows

    kernel(X, S)             (n, m)  its values
    kernel.gradient(X, S, W) (n, p)  ``Σ_i W_ni ∂K(s_i, x_n)/∂x``
    kernel.mean(x, b, S, c)  (n, p)  ``∫₀¹ Σ_i c_i ∂K(s_i, b + t (x - b))/∂x dt`` without quadrature, or None

Closed forms, with d = x - b, for a kernel of the inner product k(z), z0 = g<s,b> + r, z1 = g<s,x> + r: the mean of k'(z) is the divided
difference ``(k(z1) - k(z0)) / (z1 - z0)``. It is written without cancellation: ``Σ_m z1^m z0^(degree-1-m)`` for a power,
``tanh(h)/h (1 - tanh z1 tanh z0)`` with h = z1 - z0 for tanh. For exp(-g|x-s|²) the path crosses a Gaussian bump: error functions.
For exp(-g Σ|x_j - s_j|) the exponent is linear between the points where a coordinate passes s_j: a sum over those pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

Array = np.ndarray
CHUNK = 1 << 21
"""How many numbers one temporary array may hold."""


class Kernel:
    """The interface; see the module."""

    def __call__(self, X: Array, S: Array) -> Array:
        """(n, m)"""
        raise NotImplementedError

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        """(n, p)"""
        raise NotImplementedError

    def mean(self, x: Array, b: Array, S: Array, c: Array) -> Array | None:
        """(n, p), or None: no closed form."""
        return None

    def width(self, S: Array) -> int:
        """How many numbers one point needs in :meth:`gradient`."""
        return int(S.shape[0] + S.shape[1])


# ---- kernels of the inner product -----------------------------------------------------------------------------------------------


class _Inner(Kernel):
    scale: float
    shift: float

    def z(self, X: Array, S: Array) -> Array:
        return self.scale * (X @ S.T) + self.shift

    def k(self, z: Array) -> Array:
        raise NotImplementedError

    def slope(self, z: Array) -> Array:
        raise NotImplementedError

    def divided(self, z1: Array, z0: Array) -> Array | None:
        """``(k(z1) - k(z0)) / (z1 - z0)``"""
        return None

    def __call__(self, X: Array, S: Array) -> Array:
        return self.k(self.z(X, S))

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        return cast(Array, self.scale * ((W * self.slope(self.z(X, S))) @ S))

    def mean(self, x: Array, b: Array, S: Array, c: Array) -> Array | None:
        q = self.divided(self.z(x, S), self.z(b, S))
        return None if q is None else np.broadcast_to(self.scale * ((q * c) @ S), x.shape)


@dataclass(frozen=True)
class Linear(_Inner):
    """``<s, x> + shift``"""

    shift: float = 0.0
    scale: float = 1.0

    def k(self, z: Array) -> Array:
        return z

    def slope(self, z: Array) -> Array:
        return np.ones_like(z)

    def divided(self, z1: Array, z0: Array) -> Array:
        return np.ones_like(z1)


@dataclass(frozen=True)
class Polynomial(_Inner):
    """``(scale <s, x> + shift)^degree``"""

    scale: float
    shift: float
    degree: float

    def k(self, z: Array) -> Array:
        return cast(Array, z**self.degree)

    def slope(self, z: Array) -> Array:
        return self.degree * z ** (self.degree - 1) if self.degree else np.zeros_like(z)

    def divided(self, z1: Array, z0: Array) -> Array | None:
        if self.degree != int(self.degree):
            return None
        total = np.zeros(np.broadcast_shapes(z1.shape, z0.shape))
        for m in range(int(self.degree)):
            total += z1**m * z0 ** (int(self.degree) - 1 - m)
        return total


@dataclass(frozen=True)
class Sigmoid(_Inner):
    """``tanh(scale <s, x> + shift)``"""

    scale: float
    shift: float

    def k(self, z: Array) -> Array:
        return np.tanh(z)

    def slope(self, z: Array) -> Array:
        return 1 - np.tanh(z) ** 2

    def divided(self, z1: Array, z0: Array) -> Array:
        h = z1 - z0
        ratio = np.divide(np.tanh(h), h, out=np.ones_like(h), where=h != 0)
        return ratio * (1 - np.tanh(z1) * np.tanh(z0))


@dataclass(frozen=True)
class Cosine(Kernel):
    """``<s, x> / (|s| |x|)``, 0 where one of them is 0."""

    def __call__(self, X: Array, S: Array) -> Array:
        return cast(Array, _unit(X) @ _unit(S).T)

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        length = np.linalg.norm(X, axis=1, keepdims=True)
        U, pull = _unit(X), W @ _unit(S)
        return np.divide(pull - (pull * U).sum(1, keepdims=True) * U, length, out=np.zeros_like(X), where=length > 0)


def _unit(X: Array) -> Array:
    length = np.linalg.norm(X, axis=1, keepdims=True)
    return np.divide(X, length, out=np.zeros_like(X), where=length > 0)


# ---- kernels of the distance ----------------------------------------------------------------------------------------------------


class _Radial(Kernel):
    """A function of the squared distance ρ: ``profile(ρ)``, and ``slope(ρ)`` = 2 profile'(ρ), so that the gradient is slope · (x - s)."""

    def profile(self, rho: Array) -> Array:
        raise NotImplementedError

    def slope(self, rho: Array) -> Array:
        raise NotImplementedError

    def __call__(self, X: Array, S: Array) -> Array:
        return self.profile(_squared(X, S))

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        pull = W * self.slope(_squared(X, S))
        return cast(Array, pull.sum(1, keepdims=True) * X - pull @ S)


def _squared(X: Array, S: Array) -> Array:
    """Squared distances from differences: near a support vector, ``|x|² - 2xs + |s|²`` would lose half the digits of the distance."""
    from scipy.spatial.distance import cdist

    return cast(Array, cdist(X, S, "sqeuclidean"))


@dataclass(frozen=True)
class Gaussian(_Radial):
    """``exp(-scale |x - s|²)``"""

    scale: float

    def profile(self, rho: Array) -> Array:
        return np.exp(-self.scale * rho)

    def slope(self, rho: Array) -> Array:
        return -2 * self.scale * np.exp(-self.scale * rho)

    def mean(self, x: Array, b: Array, S: Array, c: Array) -> Array:
        """With D = |d|², u = b - s, p = <u,d>/D, q = |u|² - D p² (the squared distance of s from the line):

        I0 = ∫K dt = e^(-gq) sqrt(π / (4gD)) (erf(√(gD)(1+p)) - erf(√(gD) p)),   I1 = ∫tK dt = (K(b) - K(x)) / (2gD) - p I0,
        and the mean gradient is ``-2g Σ c (u I0 + d I1)``.
        """
        middle = S.mean(0)  # distances do not change, and their expansions lose fewer digits
        x, b, S = x - middle, b - middle, S - middle
        d, g = x - b, self.scale
        D = (d * d).sum(1, keepdims=True)
        ud = (b * d).sum(1, keepdims=True) - d @ S.T
        u2 = np.broadcast_to(_squared(b, S), ud.shape)
        I0, I1 = np.empty_like(ud), np.empty_like(ud)
        short = g * D[:, 0] < 0.25  # the bump is wide beside the path: a closed form would cancel, 16 points are exact to round-off
        I0[short], I1[short] = _bump_by_points(g, D[short], ud[short], u2[short])
        long = ~short
        I0[long], I1[long] = _bump(g, D[long], ud[long], u2[long], _squared(x[long], S))
        A, B = I0 * c, I1 * c
        return cast(Array, 2 * g * (A @ S - A.sum(1, keepdims=True) * b - B.sum(1, keepdims=True) * d))


def _bump(g: float, D: Array, ud: Array, u2: Array, v2: Array) -> tuple[Array, Array]:
    """The two integrals of :meth:`Gaussian.mean`; ``v2`` = |x - s|²."""
    p, root = ud / D, np.sqrt(g * D)
    q = np.maximum(u2 - D * p * p, 0)
    I0 = np.exp(-g * q) * np.sqrt(np.pi) / (2 * root) * _erf_between(root * p, root * (1 + p))
    return I0, (np.exp(-g * u2) - np.exp(-g * v2)) / (2 * g * D) - p * I0


def _bump_by_points(g: float, D: Array, ud: Array, u2: Array) -> tuple[Array, Array]:
    nodes, weights = np.polynomial.legendre.leggauss(16)
    I0, I1 = np.zeros_like(ud), np.zeros_like(ud)
    for t, w in zip((1 + nodes) / 2, weights / 2, strict=True):
        K = w * np.exp(-g * np.maximum(u2 + 2 * t * ud + t * t * D, 0))
        I0 += K
        I1 += t * K
    return I0, I1


def _erf_between(low: Array, high: Array) -> Array:
    """``erf(high) - erf(low)`` for low <= high; far from 0 by erfc, which keeps its digits there."""
    from scipy.special import erf, erfc

    out = np.asarray(erf(high) - erf(low))
    right, left = low > 1, high < -1
    out[right] = erfc(low[right]) - erfc(high[right])
    out[left] = erfc(-high[left]) - erfc(-low[left])
    return out


@dataclass(frozen=True)
class Matern(_Radial):
    """Matérn of smoothness ``nu`` and length 1 (Rasmussen and Williams 2006, eq. 4.14): with z = √(2ν) r,
    ``K = 2^(1-ν)/Γ(ν) z^ν K_ν(z)``, and ``dK/dz = -2^(1-ν)/Γ(ν) z^ν K_(ν-1)(z)``."""

    nu: float

    def profile(self, rho: Array) -> Array:
        r = np.sqrt(rho)
        if self.nu == 0.5:
            return np.exp(-r)
        if self.nu == 1.5:
            return (1 + 3**0.5 * r) * np.exp(-(3**0.5) * r)
        if self.nu == 2.5:
            return (1 + 5**0.5 * r + 5 / 3 * rho) * np.exp(-(5**0.5) * r)
        return np.where(r > 0, self._bessel(r, self.nu, self.nu), 1.0)

    def slope(self, rho: Array) -> Array:
        r = np.sqrt(rho)
        if self.nu == 0.5:  # a cusp at r = 0, where the gradient is not defined; 0, the mean of its sides
            return -np.divide(np.exp(-r), r, out=np.zeros_like(r), where=r > 0)
        if self.nu == 1.5:
            return -3 * np.exp(-(3**0.5) * r)
        if self.nu == 2.5:
            return -5 / 3 * (1 + 5**0.5 * r) * np.exp(-(5**0.5) * r)
        at_zero = -self.nu / (self.nu - 1) if self.nu > 1 else 0.0
        return np.where(r > 0, -2 * self.nu * self._bessel(r, self.nu - 1, abs(self.nu - 1)), at_zero)

    def _bessel(self, r: Array, power: float, order: float) -> Array:
        from scipy.special import gamma, kv

        z = np.maximum((2 * self.nu) ** 0.5 * r, np.finfo(float).eps)
        return cast(Array, 2 ** (1 - self.nu) / gamma(self.nu) * z**power * kv(order, z))


@dataclass(frozen=True)
class RationalQuadratic(_Radial):
    """``(1 + |x - s|² / (2 alpha))^(-alpha)``"""

    alpha: float

    def profile(self, rho: Array) -> Array:
        return cast(Array, (1 + rho / (2 * self.alpha)) ** -self.alpha)

    def slope(self, rho: Array) -> Array:
        return cast(Array, -((1 + rho / (2 * self.alpha)) ** (-self.alpha - 1)))


@dataclass(frozen=True)
class Periodic(_Radial):
    """``exp(-2 sin²(π r / period) / length²)``"""

    period: float
    length: float

    def profile(self, rho: Array) -> Array:
        return np.exp(-2 * np.sin(np.pi * np.sqrt(rho) / self.period) ** 2 / self.length**2)

    def slope(self, rho: Array) -> Array:
        rate = 2 * np.pi / self.period  # sin(rate r)/r = rate sinc(rate r / π)
        return -2 * np.pi / (self.period * self.length**2) * rate * np.sinc(rate * np.sqrt(rho) / np.pi) * self.profile(rho)


@dataclass(frozen=True)
class Laplacian(Kernel):
    """``exp(-scale Σ_j |x_j - s_j|)``"""

    scale: float

    def width(self, S: Array) -> int:
        return int(S.size)

    def __call__(self, X: Array, S: Array) -> Array:
        from scipy.spatial.distance import cdist

        return np.exp(-self.scale * cdist(X, S, "cityblock"))

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        return cast(Array, -self.scale * np.einsum("nm,nmp->np", W * self(X, S), np.sign(X[:, None] - S)))

    def mean(self, x: Array, b: Array, S: Array, c: Array) -> Array:
        """Coordinate j passes s_j at t_j = (s_j - b_j) / d_j. Sorted, these cut [0, 1] in pieces on which the logarithm of K is linear,
        so that ``F(t) = ∫₀ᵗ K`` is a sum of exponentials; the gradient's sign changes at t_j: ``-g (sign before · F(t_j) + sign after · (F(1) - F(t_j)))``.
        """
        b = np.broadcast_to(b, x.shape)
        rows = max(1, CHUNK // (S.size + 1))
        return np.concatenate([self._mean(x[k : k + rows], b[k : k + rows], S, c) for k in range(0, len(x), rows)])

    def _mean(self, x: Array, b: Array, S: Array, c: Array) -> Array:
        d = (x - b)[:, None]
        u = b[:, None] - S  # (n, m, p)
        cut = np.divide(-u, d, out=np.ones_like(u), where=d != 0)
        cut = np.where((cut > 0) & (cut < 1), cut, 1.0)
        order = cut.argsort(-1)
        before = np.sign(np.where(u != 0, u, d))
        after = np.sign(np.where(u + d != 0, u + d, before))
        rate = np.abs(d) * np.ones_like(u)
        steps = np.where(before != after, 2 * rate, 0.0)  # how much the slope of Σ|x-s| rises at each cut
        times = np.concatenate([np.zeros((*u.shape[:2], 1)), np.take_along_axis(cut, order, -1), np.ones((*u.shape[:2], 1))], -1)
        first = (before * d).sum(-1, keepdims=True)
        slopes = first + np.concatenate([np.zeros_like(first), np.cumsum(np.take_along_axis(steps, order, -1), -1)], -1)
        spans = np.diff(times, axis=-1)
        rise = -self.scale * slopes * spans
        start = -self.scale * (np.abs(u).sum(-1, keepdims=True) + np.concatenate([np.zeros_like(first), np.cumsum(slopes * spans, -1)[..., :-1]], -1))
        pieces = spans * np.exp(start) * np.divide(np.expm1(rise), rise, out=np.ones_like(rise), where=rise != 0)
        area = np.cumsum(pieces, -1)  # F at each cut, and at 1
        at_cut = np.empty_like(u)
        np.put_along_axis(at_cut, order, area[..., :-1], -1)
        still = d == 0  # such a coordinate does not move: its sign is constant, and 0 on s itself
        signs = np.where(still, np.sign(u) * area[..., -1:], before * at_cut + after * (area[..., -1:] - at_cut))
        return cast(Array, -self.scale * np.einsum("m,nmp->np", c, signs))


# ---- kernels for histograms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdditiveChiSquared(Kernel):
    """``-Σ_j (x_j - s_j)² / (x_j + s_j)``, for what is not negative; 0 where both are 0. A sum over coordinates: each keeps its own change."""

    def width(self, S: Array) -> int:
        return int(S.size)

    def __call__(self, X: Array, S: Array) -> Array:
        total: Array = self.terms(X, S).sum(-1)
        return total

    def terms(self, X: Array, S: Array) -> Array:
        total = X[:, None] + S
        return -np.divide((X[:, None] - S) ** 2, total, out=np.zeros_like(total), where=total != 0)

    def slopes(self, X: Array, S: Array) -> Array:
        total = X[:, None] + S
        return -np.divide((X[:, None] - S) * (X[:, None] + 3 * S), total**2, out=np.zeros_like(total), where=total != 0)

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        return cast(Array, np.einsum("nm,nmp->np", W, self.slopes(X, S)))

    def mean(self, x: Array, b: Array, S: Array, c: Array) -> Array:
        b, rows = np.broadcast_to(b, x.shape), max(1, CHUNK // (S.size + 1))
        return np.concatenate([self._mean(x[k : k + rows], b[k : k + rows], S, c) for k in range(0, len(x), rows)])

    def _mean(self, x: Array, b: Array, S: Array, c: Array) -> Array:
        change = np.einsum("m,nmp->np", c, self.terms(x, S) - self.terms(b, S))
        return np.divide(change, x - b, out=np.einsum("m,nmp->np", c, self.slopes(x, S)), where=x != b)


@dataclass(frozen=True)
class ChiSquared(Kernel):
    """``exp(-scale Σ_j (x_j - s_j)² / (x_j + s_j))``, for what is not negative."""

    scale: float

    def width(self, S: Array) -> int:
        return int(S.size)

    def __call__(self, X: Array, S: Array) -> Array:
        return np.exp(self.scale * AdditiveChiSquared()(X, S))

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        return AdditiveChiSquared().gradient(X, S, self.scale * W * self(X, S))


# ---- kernels made of kernels ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constant(Kernel):
    """The same for all pairs."""

    value: float

    def __call__(self, X: Array, S: Array) -> Array:
        return np.full((len(X), len(S)), self.value)

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        return np.zeros_like(X)

    def mean(self, x: Array, b: Array, S: Array, c: Array) -> Array:
        return np.zeros_like(x)


@dataclass(frozen=True, eq=False)
class Stretched(Kernel):
    """``inner(x / lengths, s / lengths)``: one length for all columns, or one each."""

    inner: Kernel
    lengths: Array | float

    def __call__(self, X: Array, S: Array) -> Array:
        return self.inner(X / self.lengths, S / self.lengths)

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        return self.inner.gradient(X / self.lengths, S / self.lengths, W) / self.lengths

    def mean(self, x: Array, b: Array, S: Array, c: Array) -> Array | None:
        inner = self.inner.mean(x / self.lengths, b / self.lengths, S / self.lengths, c)
        return None if inner is None else inner / self.lengths


@dataclass(frozen=True)
class Sum(Kernel):
    """``first + second``"""

    first: Kernel
    second: Kernel

    def __call__(self, X: Array, S: Array) -> Array:
        return self.first(X, S) + self.second(X, S)

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        return self.first.gradient(X, S, W) + self.second.gradient(X, S, W)

    def mean(self, x: Array, b: Array, S: Array, c: Array) -> Array | None:
        first, second = self.first.mean(x, b, S, c), self.second.mean(x, b, S, c)
        return None if first is None or second is None else first + second


@dataclass(frozen=True)
class Product(Kernel):
    """``first · second``"""

    first: Kernel
    second: Kernel

    def __call__(self, X: Array, S: Array) -> Array:
        return self.first(X, S) * self.second(X, S)

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        return self.first.gradient(X, S, W * self.second(X, S)) + self.second.gradient(X, S, W * self.first(X, S))

    def mean(self, x: Array, b: Array, S: Array, c: Array) -> Array | None:
        for constant, other in ((self.first, self.second), (self.second, self.first)):
            if isinstance(constant, Constant):
                return other.mean(x, b, S, constant.value * c)
        return None


@dataclass(frozen=True)
class Power(Kernel):
    """``base ^ exponent``"""

    base: Kernel
    exponent: float

    def __call__(self, X: Array, S: Array) -> Array:
        return cast(Array, self.base(X, S) ** self.exponent)

    def gradient(self, X: Array, S: Array, W: Array) -> Array:
        if not self.exponent:
            return np.zeros_like(X)
        return self.base.gradient(X, S, W * self.exponent * self.base(X, S) ** (self.exponent - 1))

    def mean(self, x: Array, b: Array, S: Array, c: Array) -> Array | None:
        if isinstance(self.base, Linear):
            return Polynomial(1.0, self.base.shift, self.exponent).mean(x, b, S, c)
        return None
