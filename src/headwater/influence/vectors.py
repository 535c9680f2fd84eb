"""The query side of a comparison, block by block, in the cheapest form that is exact (or as exact as asked for).

- :class:`Whole`: the transformed query gradients as they are, (queries, *shape); compared by one matrix product with the training
  gradients formed chunk by chunk.
- :class:`Factored`: raw gradients of a layer applied once per example, as factors ``out_q in_q^T``; never formed.
- :class:`Seen`: factored gradients through a response, as factors in the curvature's eigenbasis; never formed either.
- :class:`Sketched`: gradients through a response in a projected space, where training gradients are projected too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from headwater.capture import BlockGradient, Outer
from headwater.curvature import Vectors
from headwater.curvature.projected import projected
from headwater.linalg import Grid, Response, Split, Turned
from headwater.linalg.projected import Projected


class Side(Protocol):
    """Query vectors of one block. ``dot(gradient)`` (queries, n); ``paired(gradient)`` (n,): query i with example i."""

    def dot(self, gradient: BlockGradient) -> Tensor: ...

    def paired(self, gradient: BlockGradient) -> Tensor: ...

    def part(self, rows: slice) -> Side: ...

    def whole(self) -> Tensor: ...

    def square_norms(self) -> Tensor: ...

    def finite(self) -> bool: ...

    def __len__(self) -> int: ...


Queries = dict[str, Any]
"""One :class:`Side` for each block."""


@dataclass(frozen=True)
class Whole:
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def dot(self, gradient: BlockGradient) -> Tensor:
        return gradient.dot(self.values)

    def paired(self, gradient: BlockGradient) -> Tensor:
        return gradient.paired(self.values)

    def part(self, rows: slice) -> Whole:
        return Whole(self.values[rows])

    def whole(self) -> Tensor:
        return self.values

    def square_norms(self) -> Tensor:
        return self.values.flatten(1).square().sum(1)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.values).all())

    def placed(self, rows: Tensor, count: int, into: Whole | None) -> Whole:
        """These vectors added at ``rows`` of ``count``: several may belong to one named query."""
        total = into.values if into is not None else self.values.new_zeros(count, *self.values.shape[1:])
        return Whole(total.index_add_(0, rows, self.values))


@dataclass(frozen=True)
class Factored:
    """``out (queries, out)`` and ``inner (queries, in)``: the gradient of query q is their outer product."""

    out: Tensor
    inner: Tensor

    def __len__(self) -> int:
        return len(self.out)

    def dot(self, gradient: BlockGradient) -> Tensor:
        g, a = factors(gradient)
        return (self.out @ g.mT) * (self.inner @ a.mT)

    def paired(self, gradient: BlockGradient) -> Tensor:
        if not is_rank_one(gradient):
            return gradient.paired(self.whole())
        g, a = factors(gradient)
        return (self.out * g).sum(1) * (self.inner * a).sum(1)

    def part(self, rows: slice) -> Factored:
        return Factored(self.out[rows], self.inner[rows])

    def whole(self) -> Tensor:
        return self.out[:, None, :, None] * self.inner[:, None, None, :]

    def square_norms(self) -> Tensor:
        return self.out.square().sum(1) * self.inner.square().sum(1)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.out).all() and torch.isfinite(self.inner).all())

    def placed(self, rows: Tensor, count: int, into: Factored | None) -> Factored:
        out, inner = (into.out, into.inner) if into is not None else (t.new_zeros(count, t.shape[1]) for t in (self.out, self.inner))
        return Factored(out.index_copy_(0, rows, self.out), inner.index_copy_(0, rows, self.inner))


@dataclass(frozen=True)
class Seen:
    """Factored vectors through a response: ``turned``, one column for each query."""

    response: Split | Grid
    turned: Turned

    def __len__(self) -> int:
        return self.turned[0].shape[1]

    def dot(self, gradient: BlockGradient) -> Tensor:
        return self.response.dots(self.turned, self.response.turn(*factors(gradient)))

    def paired(self, gradient: BlockGradient) -> Tensor:
        if not is_rank_one(gradient):
            return gradient.paired(self.whole())
        return self.response.paired(self.turned, self.response.turn(*factors(gradient)))

    def part(self, rows: slice) -> Seen:
        return Seen(self.response, (self.turned[0][:, rows], self.turned[1][:, rows]))

    def whole(self) -> Tensor:
        return self.response.whole(self.turned)

    def square_norms(self) -> Tensor:
        return self.response.square_norms(self.turned)

    def finite(self) -> bool:
        return all(bool(torch.isfinite(t).all()) for t in self.turned)


@dataclass(frozen=True)
class Sketched:
    """Vectors through the response of a :class:`Projected` matrix: ``values`` (queries, k) in the projected space."""

    matrix: Projected
    values: Tensor

    @classmethod
    def of(cls, flow: Any, phi: Response, side: Side) -> Sketched:
        """``phi`` of the flow's matrix applied to ``side``, a few queries at once."""
        matrix, response = flow.matrix, flow.gain * phi(flow.matrix.spectrum.clamp_min(0))
        step = max(1, 2**21 // max(1, side.part(slice(0, 1)).whole().numel()))
        turned = torch.cat([matrix.rotate(side.part(slice(i, i + step)).whole()) for i in range(0, len(side), step)])
        return cls(matrix, (turned * response.to(turned.dtype)) @ matrix.basis.to(turned.dtype).mT)

    def __len__(self) -> int:
        return len(self.values)

    def _of(self, gradient: BlockGradient) -> Tensor:
        parts = [BlockGradient(tuple(piece.part(rows) for piece in gradient.pieces)) for rows in gradient.parts()]
        return torch.cat([projected(part, self.matrix.left, self.matrix.right) for part in parts]).to(self.values.dtype)

    def dot(self, gradient: BlockGradient) -> Tensor:
        return self.values @ self._of(gradient).mT

    def paired(self, gradient: BlockGradient) -> Tensor:
        return (self.values * self._of(gradient)).sum(1)

    def part(self, rows: slice) -> Sketched:
        return Sketched(self.matrix, self.values[rows])

    def whole(self) -> Tensor:
        return self.matrix.unproject(self.values)

    def square_norms(self) -> Tensor:
        return self.whole().flatten(1).square().sum(1)

    def finite(self) -> bool:
        return bool(torch.isfinite(self.values).all())


def is_rank_one(gradient: BlockGradient) -> bool:
    """Whether each example's gradient of this block is a single outer product."""
    only = gradient.pieces[0]
    return len(gradient.pieces) == 1 and isinstance(only, Outer) and only.groups == 1 and only.shared == 1


def factors(gradient: BlockGradient) -> tuple[Tensor, Tensor]:
    """The output gradient (n, out) and the input (n, in) of a rank-one block."""
    only = gradient.pieces[0]
    assert isinstance(only, Outer)
    return only.g[:, 0, 0], only.a[:, 0, 0]


def vectors_of(gradient: BlockGradient, factored: bool) -> Side:
    """Query vectors from captured gradients, kept as factors where each query is one example of a rank-one block."""
    if factored and is_rank_one(gradient):
        return Factored(*(t.contiguous() for t in factors(gradient)))
    return Whole(gradient.dense())


def through(apply: Callable[[Vectors], Vectors], queries: Queries) -> Queries:
    """A map of whole vectors applied to queries, a few at once: they are formed for it, and what it makes on the way stays small."""
    if not queries:
        return {}
    sizes = {n: side.part(slice(0, 1)).whole() for n, side in queries.items()}
    out = {n: one.new_empty(len(queries[n]), *one.shape[1:]) for n, one in sizes.items()}
    count = max(len(side) for side in queries.values())
    step = max(1, (2**21 if next(iter(out.values())).device.type == "cpu" else 2**28) // max(1, sum(one.numel() for one in sizes.values())))
    for i in range(0, count, step):
        rows = slice(i, i + step)
        for name, v in apply({n: side.part(rows).whole() for n, side in queries.items()}).items():
            out[name][rows] = v
    return {n: Whole(v) for n, v in out.items()}


def respond(flow: Any, phi: Response, queries: Queries, tolerance: float) -> Queries:
    """``phi`` of the curvature applied to queries: to their factors where they are factored, whole elsewhere."""
    out: Queries = {}
    for name, side in queries.items():
        inner = getattr(flow, "flows", {}).get(name)
        if isinstance(getattr(inner, "matrix", None), Projected):
            out[name] = Sketched.of(inner, phi, side)
            continue
        response = _on_factors(flow, name, phi, tolerance) if isinstance(side, Factored) else None
        if response is not None:
            out[name] = Seen(response, response.turn(side.out, side.inner))
    whole = through(flow.respond(phi), {n: side for n, side in queries.items() if n not in out})
    return {name: out.get(name) or whole[name] for name in queries}


def _on_factors(flow: Any, name: str, phi: Response, tolerance: float) -> Split | Grid | None:
    inner: Any = getattr(flow, "flows", {}).get(name)
    return inner.on_factors(phi, tolerance) if hasattr(inner, "on_factors") else None


def dots_of(sides: list[Side], gradient: BlockGradient) -> list[Tensor]:
    """Inner products of several rows' query vectors with one batch: the whole ones stacked into one product."""
    return dots_and_squares(sides, gradient, False)[0]


def dots_and_squares(sides: list[Side], gradient: BlockGradient, squares: bool) -> tuple[list[Tensor], Tensor | None]:
    """:func:`dots_of`, and with ``squares`` the square norms of the batch's gradients, (n,): these are formed for both at once."""
    usable = [side if isinstance(side, Whole | Sketched) or is_rank_one(gradient) else Whole(side.whole()) for side in sides]
    whole = [side.values for side in usable if isinstance(side, Whole)]
    lengths: Tensor | None = None
    together: Tensor | None = None
    if whole and squares:
        together, lengths = gradient.dot_and_squares(torch.cat(whole))
    elif whole:
        together = gradient.dot(torch.cat(whole))
    elif squares:
        lengths = gradient.square_norms()
    stacked = iter(()) if together is None else iter(together.split([len(w) for w in whole]))
    return [next(stacked) if isinstance(side, Whole) else side.dot(gradient) for side in usable], lengths


def scaled(queries: Queries, by: Tensor) -> Queries:
    """Each query's vectors (whole or factored) multiplied with its number in ``by`` (queries,)."""
    out: Queries = {}
    for name, side in queries.items():
        if isinstance(side, Factored):
            out[name] = Factored(side.out * by.to(side.out)[:, None], side.inner)
        else:
            whole = side.whole()
            out[name] = Whole(whole * by.to(whole).view(-1, *[1] * (whole.ndim - 1)))
    return out


def summed(one: Queries | None, other: Queries) -> Queries:
    """The sum of two sets of vectors; None counts as zero."""
    return other if one is None else {name: Whole(one[name].whole() + side.whole()) for name, side in other.items()}


def lengths_of(queries: Queries) -> Tensor:
    """Length of each query's vector over all blocks, (queries,)."""
    return torch.stack([side.square_norms() for side in queries.values()]).sum(0).sqrt()
