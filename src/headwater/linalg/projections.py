"""Random projections as values: linear maps of named vectors into few numbers that keep inner products in expectation.

``E <S x, S y> = <x, y>`` for the map S of each of them (Johnson & Lindenstrauss 1984), with the spread that :meth:`Projection.variance`
gives in closed form. A value is a rule and no matrix: the entry for number k and coordinate (o, i) of the vector ``name`` is computed
from the name, the seed, k, o and i alone (:mod:`headwater.philox`). So it is the same on every device and however it is cut up,
vectors that grow keep the numbers that they had, and before the factor ``scale`` a smaller dimension is the beginning of a larger one.

Vectors are matrices (out, in), as the gradients of layers are; any other vector is a matrix of one row. Different names get
independent maps, so that the projection of several vectors laid end to end is the sum of theirs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.philox import key_of, normals, plain_name, signs

Rows = range | Tensor
"""Rows of a matrix: a range, or their numbers in any order."""
Part = Callable[[slice, slice], Tensor]
"""The vectors to be projected, a part at a time: ``part(rows, columns) -> (n, rows, columns)``."""

VERSION = 1
"""Raised when a change makes other numbers of the same name and seed: kept features of another version are not read."""
TILE = 2**22  # entries generated at once


@dataclass(frozen=True)
class Projection(ABC):
    """What all projections do. ``dim``: how many numbers a vector becomes; ``seed``: which of the random maps it is."""

    dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 1:
            raise InputError(f"dim={self.dim!r}", "a whole number from 1 on", "a few hundred numbers keep inner products to a few percent")

    @property
    def scale(self) -> float:
        """What :meth:`entries` are multiplied with so that inner products are kept: ``1 / sqrt(dim)``."""
        return self.dim**-0.5

    @property
    def noise(self) -> float:
        """The relative standard deviation of a squared length, at the most: what ``dim`` is worth, before any data are seen."""
        return (2.0 / self.dim) ** 0.5

    @abstractmethod
    def entries(self, name: str, outs: Rows, ins: range, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        """The map's entries for coordinates (outs, ins) of the vector ``name``, before the scale: (dim, outs, ins)."""

    @abstractmethod
    def variance(self, x: Tensor, y: Tensor) -> float:
        """The variance of ``<S x, S y>`` over seeds, for two given matrices (out, in); a vector is a matrix of one row."""

    def matrix(self, name: str, size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        """The map of a vector of ``size`` numbers, with its scale: (dim, size).

        >>> Rademacher(2).matrix("fc.weight|right", 3).abs()
        tensor([[0.7071, 0.7071, 0.7071],
                [0.7071, 0.7071, 0.7071]])
        """
        return self.entries(name, range(1), range(size), dtype=dtype, device=device)[:, 0] * self.scale

    def project(self, name: str, v: Tensor) -> Tensor:
        """Vectors (n, out, in) or (n, size), projected: (n, dim)."""
        whole = v if v.ndim == 3 else v.flatten(1).unsqueeze(1)
        return self.on(name, whole.shape[1], whole.shape[2], dtype=v.dtype, device=v.device)(lambda r, c: whole[:, r, c], len(v)) * self.scale

    def on(self, name: str, out: int, inner: int, *, dtype: torch.dtype, device: torch.device | str, keep: bool = False) -> Applied:
        """The map made ready for matrices (out, in) of one name; ``keep``: what it generates is held for the next ones."""
        return Applied(self, name, out, inner, dtype, torch.device(device), keep)


class Applied:
    """A projection at work on the vectors of one name. Results are before the scale."""

    def __init__(self, projection: Projection, name: str, out: int, inner: int, dtype: torch.dtype, device: torch.device, keep: bool) -> None:
        self.projection, self.name, self.out, self.inner = projection, name, out, inner
        self.dtype, self.device, self.keep = dtype, device, keep
        self._held: dict[tuple[range, range], Tensor] = {}

    def __call__(self, part: Part, n: int) -> Tensor:
        """``n`` vectors, of which ``part`` gives parts, as (n, dim): a tile of the map against the same part of the vectors."""
        total = torch.zeros(self.projection.dim, n, dtype=self.dtype, device=self.device)
        for outs, ins in self._tiles():
            values = part(slice(outs.start, outs.stop), slice(ins.start, ins.stop)).flatten(1)
            total += self._tile(outs, ins) @ values.mT.to(self.dtype)
        return total.mT.contiguous()

    def looked_up(self, index: Tensor, a: Tensor) -> Tensor:
        """Matrices that hold ``a`` (n, shared, in) in their rows ``index`` (n, shared) and zeros elsewhere, projected: (n, dim). Only
        entries for rows that occur are made."""
        n, (found, where) = len(index), torch.unique(index, return_inverse=True)
        total = torch.zeros(n, self.projection.dim, dtype=self.dtype, device=self.device)
        step = max(1, TILE // (self.inner * max(self.projection.dim, n)))
        for start in range(0, len(found), step):
            rows = found[start : start + step]
            inside = ((where >= start) & (where < start + len(rows))).unsqueeze(2)
            place = (where - start).clamp(0, len(rows) - 1).unsqueeze(2).expand_as(a)
            whole = a.new_zeros(n, len(rows), self.inner).scatter_add_(1, place, a * inside)
            tile = self.projection.entries(self.name, rows, range(self.inner), dtype=self.dtype, device=self.device)
            total.addmm_(whole.flatten(1).to(self.dtype), tile.flatten(1).mT)
        return total

    def _tiles(self) -> Iterator[tuple[range, range]]:
        """Parts of the matrices for which at most TILE entries have to be made; the same for every call, so that they can be held."""
        wide = max(1, min(self.inner, TILE // self.projection.dim))
        high = max(1, min(self.out, TILE // (self.projection.dim * wide)))
        for o in range(0, self.out, high):
            for i in range(0, self.inner, wide):
                yield range(o, min(o + high, self.out)), range(i, min(i + wide, self.inner))

    def _tile(self, outs: range, ins: range) -> Tensor:
        """The map's entries (dim, outs * ins)."""
        if (outs, ins) in self._held:
            return self._held[outs, ins]
        tile = self._made(outs, ins)
        if self.keep:
            self._held[outs, ins] = tile
        return tile

    def _made(self, outs: range, ins: range) -> Tensor:
        return self.projection.entries(self.name, outs, ins, dtype=self.dtype, device=self.device).flatten(1)


@dataclass(frozen=True)
class Rademacher(Projection):
    """Independent signs: the standard, bit-equal on every device. Costs ``dim`` multiplications per coordinate.

    ``Var <Sx, Sy> = (|x|^2 |y|^2 + <x, y>^2 - 2 sum_j x_j^2 y_j^2) / dim`` (Achlioptas 2003).

    >>> Rademacher(512, seed=1)
    Rademacher(dim=512, seed=1)
    """

    def entries(self, name: str, outs: Rows, ins: range, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        key = key_of("rademacher", plain_name(name), self.seed)
        return signs(key, streams(self.dim, outs, device), ins, dtype=dtype, device=device).unflatten(0, (self.dim, -1))

    def variance(self, x: Tensor, y: Tensor) -> float:
        x, y = x.double().flatten(), y.double().flatten()
        return float(x.square().sum() * y.square().sum() + (x @ y) ** 2 - 2 * (x.square() * y.square()).sum()) / self.dim


@dataclass(frozen=True)
class Gaussian(Projection):
    """Independent standard normals: rotating the vectors changes nothing about the spread, ``(|x|^2 |y|^2 + <x, y>^2) / dim``.

    Takes several times as long to generate as signs, and its last bits differ between devices.

    >>> Gaussian(512)
    Gaussian(dim=512, seed=0)
    """

    def entries(self, name: str, outs: Rows, ins: range, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        key = key_of("gaussian", plain_name(name), self.seed)
        return normals(key, streams(self.dim, outs, device), ins, dtype=dtype, device=device).unflatten(0, (self.dim, -1))

    def variance(self, x: Tensor, y: Tensor) -> float:
        x, y = x.double().flatten(), y.double().flatten()
        return float(x.square().sum() * y.square().sum() + (x @ y) ** 2) / self.dim


def streams(count: int, outs: Rows, device: torch.device | str | None) -> Tensor:
    """The rows of the counter for numbers 0..count-1 and rows ``outs`` of a matrix, number by number: number + 2**32 * row."""
    chosen = outs.to(device or outs.device) if isinstance(outs, Tensor) else torch.arange(outs.start, outs.stop, device=device)
    return (torch.arange(count, device=chosen.device).unsqueeze(1) + (chosen << 32)).flatten()


