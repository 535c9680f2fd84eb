"""Differentiable steps of a pipeline that mix columns: where they send a point, and gradients pulled back through them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from headwater.features.kernels.functions import Kernel

Array = np.ndarray


class Map:
    """``forward(U)``: (n, p) -> (n, q). ``pull(U, V)``: V (n, q) -> ``Σ_k V_nk ∂z_k/∂u`` (n, p)."""

    def forward(self, U: Array) -> Array:
        """(n, q)"""
        raise NotImplementedError

    def pull(self, U: Array, V: Array) -> Array:
        """(n, p)"""
        raise NotImplementedError


@dataclass(eq=False)
class Affine(Map):
    """``matrix u + shift``"""

    matrix: Array
    shift: Array

    def forward(self, U: Array) -> Array:
        return np.asarray(U @ self.matrix.T + self.shift)

    def pull(self, U: Array, V: Array) -> Array:
        return np.asarray(V @ self.matrix)


def identity(size: int) -> Affine:
    """Columns as they are."""
    return Affine(np.eye(size), np.zeros(size))


@dataclass(eq=False)
class Monomials(Map):
    """``Π_j u_j^powers_kj``; powers (q, p), whole numbers."""

    powers: Array

    def forward(self, U: Array) -> Array:
        return np.asarray(np.prod(U[:, None] ** self.powers, axis=-1))

    def pull(self, U: Array, V: Array) -> Array:
        out = np.zeros(U.shape)
        for j in range(U.shape[1]):
            with_j = np.flatnonzero(self.powers[:, j])
            lower = self.powers[with_j].copy()
            lower[:, j] -= 1
            out[:, j] = (V[:, with_j] * self.powers[with_j, j] * np.prod(U[:, None] ** lower, axis=-1)).sum(1)
        return out


@dataclass(eq=False)
class UnitLength(Map):
    """``u / |u|``; a row of zeros stays."""

    def forward(self, U: Array) -> Array:
        length = np.linalg.norm(U, axis=1, keepdims=True)
        return np.divide(U, length, out=np.zeros_like(U), where=length > 0)

    def pull(self, U: Array, V: Array) -> Array:
        length, unit = np.linalg.norm(U, axis=1, keepdims=True), self.forward(U)
        return np.divide(V - (V * unit).sum(1, keepdims=True) * unit, length, out=np.zeros_like(U), where=length > 0)


@dataclass(eq=False)
class Fourier(Map):
    """Random Fourier features ``sqrt(2/q) cos(uW + offset)`` (Rahimi and Recht 2007); W (p, q)."""

    weights: Array
    offset: Array

    def forward(self, U: Array) -> Array:
        return np.asarray((2 / len(self.offset)) ** 0.5 * np.cos(U @ self.weights + self.offset))

    def pull(self, U: Array, V: Array) -> Array:
        return np.asarray(-((2 / len(self.offset)) ** 0.5) * (V * np.sin(U @ self.weights + self.offset)) @ self.weights.T)


@dataclass(eq=False)
class Landmarks(Map):
    """Nystroem features: kernel values at landmarks S (m, p), times a matrix (q, m)."""

    kernel: Kernel
    points: Array
    mixing: Array

    def forward(self, U: Array) -> Array:
        return np.asarray(self.kernel(U, self.points) @ self.mixing.T)

    def pull(self, U: Array, V: Array) -> Array:
        return self.kernel.gradient(U, self.points, V @ self.mixing)


class Composed(Map):
    """``second(first(u))``; one affine map where both are."""

    def __init__(self, first: Map, second: Map) -> None:
        self.first, self.second = first, second

    def forward(self, U: Array) -> Array:
        return self.second.forward(self.first.forward(U))

    def pull(self, U: Array, V: Array) -> Array:
        return self.first.pull(U, self.second.pull(self.first.forward(U), V))


def composed(first: Map | None, second: Map) -> Map:
    """``second`` after ``first``; None is the identity."""
    if first is None:
        return second
    if isinstance(first, Affine) and isinstance(second, Affine):
        return Affine(second.matrix @ first.matrix, second.forward(first.shift[None])[0])
    return Composed(first, second)


class Beside(Map):
    """Maps of separate groups of columns, side by side."""

    def __init__(self, parts: list[tuple[Map, int, int]]) -> None:
        self.parts = parts  # each with its counts of columns, before and after

    def forward(self, U: Array) -> Array:
        return np.concatenate([part.forward(u) for (part, _, _), u in zip(self.parts, self._split(U, 1), strict=True)], 1)

    def pull(self, U: Array, V: Array) -> Array:
        groups = zip(self.parts, self._split(U, 1), self._split(V, 2), strict=True)
        return np.concatenate([part.pull(u, v) for (part, _, _), u, v in groups], 1)

    def _split(self, values: Array, which: int) -> list[Array]:
        return np.split(values, np.cumsum([part[which] for part in self.parts])[:-1], axis=1)


def beside(parts: list[tuple[Map | None, int, int]]) -> Map | None:
    """Maps side by side: None where all are the identity, one affine map where all are affine."""
    if all(part is None for part, _, _ in parts):
        return None
    known = [(identity(before) if part is None else part, before, after) for part, before, after in parts]
    affine = [part for part, _, _ in known if isinstance(part, Affine)]
    if len(affine) < len(known):
        return Beside(known)
    from scipy.linalg import block_diag

    return Affine(block_diag(*(part.matrix for part in affine)), np.concatenate([part.shift for part in affine]))
