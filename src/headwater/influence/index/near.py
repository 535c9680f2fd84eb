"""Carried queries of layers applied once per example, as a multiple of the query's own outer product plus a correction on few eigenvectors.

What training makes of a query, ``exp(-t H)``, is a constant times the identity but for the few eigenvalues that are not small. So a query
``u = out in^T`` that was carried through segments with bases of their own stays ``multiple u + L C R^T``, where L and R hold those
eigenvectors of the last basis that matter, and C one small matrix per query. Bringing it into another segment's basis multiplies C with
the products of eigenvectors that both keep, instead of rotating a full matrix for each query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwater.capture import BlockGradient
from headwater.influence.index.parted import Parted
from headwater.influence.vectors import Factored, factors, is_rank_one
from headwater.linalg import Flow, Kronecker, Response

SAMPLE = 16
"""Queries from which it is told which eigenvectors and coordinates matter; all of them where there are fewer."""
ROUNDS = 2
"""How often the multiple and the coordinates kept are fitted to each other."""
MARGIN = 0.5
"""How much of the tolerance leaving eigenvectors out may use; it hardly ever comes near (float32, 784-128-64-10: a tenth of it)."""


@dataclass(frozen=True)
class Basis:
    """Eigenvectors in columns, left (out, out) and right (in, in); None is the identity."""

    left: Tensor | None
    right: Tensor | None

    @classmethod
    def of(cls, left: Tensor | None, right: Tensor | None) -> Basis:
        """From those of a layer of one group, (1, out, out) and (1, in, in)."""
        return cls(*(None if side is None else side[0] for side in (left, right)))

    def turn(self, raw: Factored) -> Factored:
        """Factors in this basis."""
        return Factored(*(t if side is None else t @ side.to(t.dtype) for t, side in ((raw.out, self.left), (raw.inner, self.right))))

    def same(self, other: Basis) -> bool:
        """Whether it is the same memory: bases come from one estimate each."""
        sides = ((self.left, other.left), (self.right, other.right))
        return all(a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr() and a.shape == b.shape) for a, b in sides)


@dataclass(frozen=True)
class Near:
    """``multiple * out in^T + L[:, rows] rest R[:, cols]^T`` for each query, in the eigenvectors L and R of ``basis``; ``rest``
    (queries, rows, cols)."""

    raw: Factored
    multiple: float
    basis: Basis
    rows: Tensor
    cols: Tensor
    rest: Tensor

    @classmethod
    def itself(cls, raw: Factored) -> Near:
        """A query that was not carried yet."""
        none = torch.zeros(0, dtype=torch.long, device=raw.out.device)
        return cls(raw, 1.0, Basis(None, None), none, none, raw.out.new_zeros(len(raw), 0, 0))

    def __len__(self) -> int:
        return len(self.rest)

    def part(self, rows: slice) -> Near:
        return replace(self, raw=self.raw.part(rows), rest=self.rest[rows])

    def coordinates(self, basis: Basis, rows: Tensor, cols: Tensor) -> Tensor:
        """The correction's coordinates (queries, len(rows), len(cols)) in another basis, or in its own."""
        out, inner = self.raw.out.shape[1], self.raw.inner.shape[1]
        across = _across(basis.left, rows, self.basis.left, self.rows, out).to(self.rest.dtype)
        down = _across(self.basis.right, self.cols, basis.right, cols, inner).to(self.rest.dtype)
        return across @ (self.rest.flatten(0, 1) @ down).reshape(len(self), len(self.rows), len(cols))

    def full(self, basis: Basis) -> Tensor:
        """All of the vector's coordinates in a basis, (queries, out, in)."""
        turned = basis.turn(self.raw)
        found = self.coordinates(basis, *_everything(self.raw))
        return found.addcmul_(turned.out.unsqueeze(2), turned.inner.unsqueeze(1), value=self.multiple)

    def whole(self) -> Tensor:
        """(queries, 1, out, in)."""
        return self.full(Basis(None, None)).unsqueeze(1)

    def square_norms(self) -> Tensor:
        """(queries,)"""
        turned = self.basis.turn(self.raw)
        mixed = torch.einsum("nr,nc,nrc->n", turned.out[:, self.rows], turned.inner[:, self.cols], self.rest)
        return self.multiple**2 * self.raw.square_norms() + 2 * self.multiple * mixed + self.rest.flatten(1).square().sum(1)

    def finite(self) -> bool:
        return self.raw.finite() and bool(torch.isfinite(self.rest).all())

    def dot(self, gradient: BlockGradient) -> Tensor:
        """(queries, n)."""
        if not is_rank_one(gradient):
            return gradient.dot(self.whole())
        turned = self.basis.turn(Factored(*factors(gradient)))
        both = turned.out[:, self.rows, None] * turned.inner[:, None, self.cols]
        return self.multiple * self.raw.dot(gradient) + self.rest.flatten(1) @ both.flatten(1).mT

    def paired(self, gradient: BlockGradient) -> Tensor:
        """(n,): query i with example i."""
        return gradient.paired(self.whole())

    # -- responses ---------------------------------------------------------------------------------------------------------------

    def through(self, flow: Flow, responses: list[tuple[Response, Tensor | float]], tolerance: float) -> list[Near]:
        """``gain * phi(H)`` of the vector for each (phi, gain), in the flow's basis. Eigenvectors are left out where that changes it by at
        most ``MARGIN * tolerance`` (root mean square, for gradients under this curvature; another segment's may weigh it otherwise, which
        an index measures when it is built)."""
        matrix: Any = flow.matrix
        basis, spectrum = Basis.of(matrix.left, matrix.right), matrix.spectrum[0].clamp_min(0)
        floor = spectrum.new_tensor([flow.floor or 0.0])
        values = [((gain[0] if isinstance(gain, Tensor) and gain.ndim else gain) * phi(spectrum)) for phi, gain in responses]
        constants = [float((gain.flatten()[0] if isinstance(gain, Tensor) else gain) * phi(floor)) for phi, gain in responses]
        rows, cols = self._mattering(basis, spectrum - float(floor), values, constants, tolerance)
        turned = basis.turn(self.raw)
        own = turned.out[:, rows].mul(self.multiple).unsqueeze(2) * turned.inner[:, cols].unsqueeze(1)
        before = self.coordinates(basis, rows, cols)
        made = []
        for value, constant in zip(values, constants, strict=True):
            kept = value[rows][:, cols].to(own.dtype)
            made.append(Near(self.raw, self.multiple * constant, basis, rows, cols, torch.addcmul(before * kept, own, kept - constant)))
        return made

    def _mattering(self, basis: Basis, weight: Tensor, values: list[Tensor], constants: list[float], tolerance: float) -> tuple[Tensor, Tensor]:
        """Which eigenvectors of each side have a part in the corrections."""
        some = self._some()
        turned, before = basis.turn(some.raw), some.coordinates(basis, *_everything(some.raw))
        own = turned.out.mul(self.multiple).unsqueeze(2) * turned.inner.unsqueeze(1)
        weight = weight.clamp_min(0).to(own.dtype)
        lost, total = torch.zeros_like(weight), torch.zeros_like(weight)
        for value, constant in zip(values, constants, strict=True):
            value = (value / constant).to(own.dtype) if constant else value.to(own.dtype)
            change = torch.addcmul(before * value, own, value - (1.0 if constant else 0.0))
            lost = torch.maximum(lost, change.square().mean(0) * weight)
            total = torch.maximum(total, ((before + own) * value).square().mean(0) * weight)
        allowed = (MARGIN * tolerance) ** 2 * float(total.double().sum()) / 2
        return _largest(lost.double().sum(1), allowed), _largest(lost.double().sum(0), allowed)

    def _some(self) -> Near:
        """Evenly spaced queries."""
        step = -(-len(self) // SAMPLE)
        return self.part(slice(0, len(self), max(1, step)))

    def _of_some(self, values: Tensor) -> Tensor:
        """Of values (queries,) those of :meth:`_some`."""
        return values[:: max(1, -(-len(self) // SAMPLE))]

    # -- towards products --------------------------------------------------------------------------------------------------------

    def parted(self, basis: Basis, energy: Tensor, tolerance: float, reference: Tensor) -> Parted:
        """In a panel's basis, on the coordinates that matter for examples whose squared coordinates are ``energy`` (out, in) in the mean.

        What is left out changes products with them by at most ``tolerance`` (root mean square, if coordinates differ independently) of
        their own size, or of the root of ``reference`` (queries,), where the scores they are added to are larger. What is left out is mostly a
        small part of the query itself: the multiple is made smaller by the share ``less`` that fits it best.
        """
        same = self.basis.same(basis)
        rows, cols = (self.rows, self.cols) if same else _everything(self.raw)
        kept, less = self._told_apart(basis, rows, cols, energy.to(self.rest.dtype), tolerance, reference)
        i, j = kept // len(cols), kept % len(cols)
        if same:
            found = self.rest.flatten(1).index_select(1, kept)
        else:
            (rows, i), (cols, j) = (n.unique(return_inverse=True) for n in (i, j))  # rows and cols were everything
            found = self.coordinates(basis, rows, cols).flatten(1).index_select(1, i * len(cols) + j)
        turned = basis.turn(self.raw)
        pairs = torch.stack([rows[i], cols[j]])
        found.addcmul_(turned.out[:, pairs[0]], turned.inner[:, pairs[1]], value=self.multiple * less)
        return Parted(Factored(turned.out * (self.multiple * (1 - less)), turned.inner), pairs, found, (1, *energy.shape))

    def _told_apart(self, basis: Basis, rows: Tensor, cols: Tensor, weight: Tensor, tolerance: float, reference: Tensor) -> tuple[Tensor, float]:
        """Which coordinates among ``rows`` x ``cols`` are kept (flat numbers), and ``less``, both told from some queries."""
        some, reference = self._some(), self._of_some(reference)
        turned = basis.turn(some.raw)
        rest = some.rest if self.basis.same(basis) else some.coordinates(basis, rows, cols)
        here = weight[rows][:, cols]
        own = turned.out[:, rows].mul(self.multiple).unsqueeze(2) * turned.inner[:, cols].unsqueeze(1)
        outer = ((turned.out.square() @ weight) * turned.inner.square()).sum(1) * self.multiple**2
        size = outer + ((own + rest).square() - own.square()).flatten(1) @ here.flatten()
        scale = torch.maximum(size, reference.to(size)).clamp_min(torch.finfo(size.dtype).tiny).rsqrt()[:, None, None]
        rest, own = rest * scale, own * scale
        rests, mixed, owns = ((x.mean(0) * here).double().flatten() for x in (rest.square(), rest * own, own.square()))
        beyond = max(0.0, float((outer * scale.flatten().square()).double().mean() - owns.sum()))  # where there is no correction
        allowed = tolerance**2
        best, less = _largest(rests, allowed), 0.0
        for _ in range(ROUNDS):
            left = torch.ones_like(rests).index_fill_(0, best, 0.0)
            share = -float((left * mixed).sum()) / max(float((left * owns).sum()) + beyond, torch.finfo(torch.float64).tiny)
            kept = _largest(rests + 2 * share * mixed + share**2 * owns, allowed - share**2 * beyond)
            if len(kept) >= len(best) or share**2 * beyond > allowed:
                break
            best, less = kept, share
        return best, less


def near(flow: Any, side: Any) -> Near | None:
    """The query ``side`` as :class:`Near`, where a response of ``flow`` leaves it one: one learning rate for the whole layer."""
    matrix = getattr(flow, "matrix", None)
    if not isinstance(flow, Flow) or flow.floor is None or not isinstance(matrix, Kronecker) or len(matrix.spectrum) != 1:
        return None
    return side if isinstance(side, Near) else Near.itself(side) if isinstance(side, Factored) else None


def _everything(raw: Factored) -> tuple[Tensor, Tensor]:
    return torch.arange(raw.out.shape[1], device=raw.out.device), torch.arange(raw.inner.shape[1], device=raw.out.device)


def _across(a: Tensor | None, rows: Tensor, b: Tensor | None, cols: Tensor, size: int) -> Tensor:
    """``a[:, rows]^T b[:, cols]`` for orthonormal a and b of ``size``."""
    if a is not None and b is not None:
        return a[:, rows].mT @ b[:, cols].to(a.dtype)
    if a is None and b is None:
        return (rows.unsqueeze(1) == cols).to(torch.get_default_dtype())
    return b[rows][:, cols] if a is None else a[cols][:, rows].mT  # type: ignore[index]


def _largest(lost: Tensor, allowed: float) -> Tensor:
    """All but as many of the smallest as together are ``allowed``, in order."""
    order = lost.argsort()
    return order[int((lost[order].cumsum(0) <= allowed).sum()) :].sort().values
