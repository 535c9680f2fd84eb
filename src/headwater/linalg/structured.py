"""Projections with structure: cheaper than a matrix of independent entries, at the same spread or nearly so."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.linalg import projections
from headwater.linalg.projections import Applied, Part, Projection, Rademacher, Rows, streams
from headwater.philox import integers, key_of, plain_name, signs


@dataclass(frozen=True)
class SparseJL(Projection):
    """A sparse map: every coordinate is added, with a sign, to ``nonzeros`` of the numbers, one in each block of
    ``dim / nonzeros`` (Kane & Nelson 2014, arXiv 1012.1577, the block construction; ``nonzeros=1`` is the count sketch).

    Costs ``nonzeros`` multiplications per coordinate, whatever ``dim``, at the spread of :class:`Rademacher`. Of two with blocks of one
    width the smaller is the beginning of the larger.

    >>> SparseJL(512, nonzeros=4)
    SparseJL(dim=512, seed=0, nonzeros=4)
    """

    nonzeros: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.nonzeros, int) or self.nonzeros < 1 or self.dim % self.nonzeros:
            raise InputError(f"nonzeros={self.nonzeros!r} of dim={self.dim}", "a whole number that divides dim", "SparseJL(512, nonzeros=4)")

    @property
    def scale(self) -> float:
        """``1 / sqrt(nonzeros)``."""
        return self.nonzeros**-0.5

    def places(self, name: str, outs: Rows, ins: range, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Where each coordinate goes in each block, and with which sign: two of (nonzeros, outs, ins), int64."""
        width = self.dim // self.nonzeros
        key = key_of("sparse", width, plain_name(name), self.seed)
        drawn = integers(key, streams(self.nonzeros, outs, device), ins, 2 * width, device=device).unflatten(0, (self.nonzeros, -1))
        return drawn >> 1, 2 * (drawn & 1) - 1

    def entries(self, name: str, outs: Rows, ins: range, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        place, sign = self.places(name, outs, ins, device=device)
        out = torch.zeros(self.nonzeros, self.dim // self.nonzeros, *place.shape[1:], dtype=dtype, device=place.device)
        return out.scatter_(1, place.unsqueeze(1), sign.unsqueeze(1).to(dtype)).flatten(0, 1)

    def variance(self, x: Tensor, y: Tensor) -> float:
        return Rademacher(self.dim).variance(x, y)

    def on(self, name: str, out: int, inner: int, *, dtype: torch.dtype, device: torch.device | str, keep: bool = False) -> Applied:
        return _Sparse(self, name, out, inner, dtype, torch.device(device), keep)


class _Sparse(Applied):
    """As :class:`Applied`, by products with sparse matrices: no more work than there are entries."""

    projection: SparseJL

    def _made(self, outs: range, ins: range) -> Tensor:
        place, sign = (t.flatten(1) for t in self.projection.places(self.name, outs, ins, device=self.device))
        blocks, size = place.shape
        number = place + torch.arange(blocks, device=self.device).unsqueeze(1) * (self.projection.dim // blocks)
        where = torch.stack([number.flatten(), torch.arange(size, device=self.device).repeat(blocks)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse", UserWarning)  # torch says that the layout is new
            return torch.sparse_coo_tensor(where, sign.flatten().to(self.dtype), (self.projection.dim, size)).coalesce().to_sparse_csr()


@dataclass(frozen=True)
class KhatriRao(Projection):
    """Signs that are products of a sign per row and a sign per column, ``terms`` such products added: ``sum_t l_tk r_tk^T / sqrt(terms)``
    (Sun, Guo, Tropp & Udell 2018, arXiv 2105.00105, "tensor random projection").

    An outer product ``g a^T``, which is what a layer applied once per example has for a gradient, is projected from its factors,
    ``(L g) * (R a)``: ``dim * terms * (out + in)`` multiplications and not ``dim * out * in``. The spread of inner products of
    unrelated vectors is that of :class:`Rademacher`; that of nearly parallel outer products is larger, a squared length's relative
    variance being about ``(2 + 6 / terms) / dim``. On vectors it is :class:`Rademacher`.

    >>> KhatriRao(512)
    KhatriRao(dim=512, seed=0, terms=1)
    """

    terms: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.terms, int) or self.terms < 1:
            raise InputError(f"terms={self.terms!r}", "a whole number from 1 on", "KhatriRao(512, terms=1)")

    @property
    def noise(self) -> float:
        """That of outer products, for which it is largest: ``sqrt((2 + 6 / terms) / dim)``."""
        return ((2.0 + 6.0 / self.terms) / self.dim) ** 0.5

    def side(self, name: str, side: str, term: int, members: Rows, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        """The signs of one side ("left" or "right") of one term, for some of its rows or columns: (members, dim)."""
        return signs(key_of("khatri-rao", side, term, plain_name(name), self.seed), members, range(self.dim), dtype=dtype, device=device)

    def entries(self, name: str, outs: Rows, ins: range, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        sides = [[self.side(name, side, t, of, dtype=dtype, device=device) for side, of in (("left", outs), ("right", ins))] for t in range(self.terms)]
        return sum(torch.einsum("ok,ik->koi", left, right) for left, right in sides) * self.terms**-0.5

    def variance(self, x: Tensor, y: Tensor) -> float:
        x, y = (v.double().reshape(-1, v.shape[-1]) for v in (x, y))
        a, b, c = x.mT @ x, y.mT @ y, x.mT @ y
        lengths, dot = float(a.trace() * b.trace()), float(c.trace())
        both = lengths + 2 * float((a * b).sum()) - 2 * float((a.diagonal() * b.diagonal()).sum())
        across = dot**2 + float(c.square().sum() + (c * c.mT).sum()) - 2 * float(c.diagonal().square().sum())
        rows = (x.square().sum(1) * y.square().sum(1) + 2 * (x * y).sum(1).square() - 2 * (x.square() * y.square()).sum(1)).sum()
        fourth = both + 2 * across - 2 * float(rows)  # E (l^T x r)^2 (l^T y r)^2 of one term
        return (fourth / self.terms + (1 - 1 / self.terms) * (lengths + 2 * dot**2) - dot**2) / self.dim

    def on(self, name: str, out: int, inner: int, *, dtype: torch.dtype, device: torch.device | str, keep: bool = False) -> Paired:
        return Paired(self, name, out, inner, dtype, torch.device(device), keep)


class Paired(Applied):
    """:class:`KhatriRao` at work: outer products are projected from their factors. The sides are held once made: they are small."""

    projection: KhatriRao

    @cached_property
    def left(self) -> list[Tensor]:
        """The left sides of the terms, each (out, dim)."""
        return [self._side("left", t, range(self.out)) for t in range(self.projection.terms)]

    @cached_property
    def right(self) -> list[Tensor]:
        """The right sides of the terms, each (in, dim)."""
        return [self._side("right", t, range(self.inner)) for t in range(self.projection.terms)]

    def _side(self, side: str, term: int, members: Rows) -> Tensor:
        return self.projection.side(self.name, side, term, members, dtype=self.dtype, device=self.device)

    def __call__(self, part: Part, n: int) -> Tensor:
        total = self._zeros(n)
        step = max(1, projections.TILE // (n * max(self.inner, self.projection.dim)))
        for start in range(0, self.out, step):
            rows = slice(start, min(start + step, self.out))
            values = part(rows, slice(0, self.inner)).to(self.dtype)
            for left, right in zip(self.left, self.right, strict=True):
                total += ((values @ right) * left[rows]).sum(1)
        return total * self.projection.terms**-0.5

    def outer(self, g: Tensor, a: Tensor) -> Tensor:
        """``sum_s g_ns a_ns^T`` of factors (n, shared, out) and (n, shared, in), projected: (n, dim)."""
        total = self._zeros(len(g))
        for left, right in zip(self.left, self.right, strict=True):
            total += ((g @ left) * (a @ right)).sum(1)
        return total * self.projection.terms**-0.5

    def looked_up(self, index: Tensor, a: Tensor) -> Tensor:
        """Matrices that hold ``a`` (n, shared, in) in their rows ``index`` (n, shared) and zeros elsewhere, projected: (n, dim). Only
        the left sides of rows that occur are made."""
        total, (found, where) = self._zeros(len(index)), torch.unique(index, return_inverse=True)
        for t, right in enumerate(self.right):
            total += (self._side("left", t, found)[where] * (a @ right)).sum(1)
        return total * self.projection.terms**-0.5

    def _zeros(self, n: int) -> Tensor:
        return torch.zeros(n, self.projection.dim, dtype=self.dtype, device=self.device)
