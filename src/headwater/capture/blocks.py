"""Blocks: how parameters are laid out inside Headwater, and the per-example gradients of one block.

A *block* is a set of parameters treated together. A matrix block has shape (groups, out, in): the weight of a linear-like layer,
with the bias as a last input column where both are trained alike. Any other parameter is a block of its own shape.

The gradient of a block is a list of *pieces*, one for each use of its parameters in the forward pass; the gradient is their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**21  # numbers held at once when per-example gradients are formed: few enough for a CPU's cache, and for its allocator to keep
MANY = 64  # examples, of which a product with queries runs at full speed
ROOMIER = 16  # times as many on an accelerator, which wants large products


@dataclass(frozen=True)
class Block:
    """One block: its ``name``, the ``parameters`` in it, its ``shape``, and how they are laid out.

    A matrix block (``matrix=True``) holds a weight viewed as (groups, out, in), transposed first where ``transpose``, and a bias
    as the last column where it has two parameters. ``given``: the side that is the layer's input, the same for every function of
    the outputs ("right" for a linear layer, "left" where the roles are swapped, "" where its uses disagree). ``indexed``: the rows
    are entries that are looked up (an embedding): they are never mixed.
    """

    name: str
    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    matrix: bool = False
    transpose: bool = False
    given: str = "right"
    indexed: bool = False

    @property
    def size(self) -> int:
        return torch.Size(self.shape).numel()

    def pack(self, values: dict[str, Tensor], lead: int = 0) -> Tensor:
        """Parameters, each with ``lead`` leading axes before its own, as one tensor (*leading, *shape)."""
        weight = values[self.parameters[0]]
        if not self.matrix:
            return weight.reshape(*weight.shape[:lead], *self.shape)
        leading, (groups, out, _) = weight.shape[:lead], self.shape
        weight = (weight.mT if self.transpose else weight).reshape(*leading, groups, out, -1)
        if len(self.parameters) == 1:
            return weight
        return torch.cat([weight, values[self.parameters[1]].reshape(*leading, groups, out, 1)], -1)

    def unpack(self, v: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """The inverse of :meth:`pack`: ``v (lead, *shape)`` as parameters (lead, *own shape)."""
        weight = self.parameters[0]
        if not self.matrix:
            return {weight: v.reshape(len(v), *shapes[weight])}
        out: dict[str, Tensor] = {}
        if len(self.parameters) == 2:
            bias = self.parameters[1]
            out[bias] = v[..., -1].reshape(len(v), *shapes[bias])
            v = v[..., :-1]
        if self.transpose:
            v = v.reshape(len(v), *v.shape[-2:]).mT
        out[weight] = v.reshape(len(v), *shapes[weight])
        return out


@dataclass(frozen=True)
class Outer:
    """``G_n = sum_s g_ns a_ns^T``: activations ``a`` (n, groups, shared, in) and output gradients ``g`` (n, groups, shared, out)."""

    a: Tensor
    g: Tensor

    def __len__(self) -> int:
        return len(self.a)

    @property
    def device(self) -> torch.device:
        return self.a.device

    @property
    def groups(self) -> int:
        return self.g.shape[1]

    @property
    def shared(self) -> int:
        """How many positions the sum runs over."""
        return self.g.shape[2]

    @property
    def inner(self) -> int:
        """Inputs: the last axis of ``a``."""
        return self.a.shape[-1]

    @property
    def numel(self) -> int:
        return self.groups * self.inner * self.g.shape[-1]

    @property
    def extra(self) -> int:
        """Numbers that have to be made for one example before it can be formed."""
        return 0

    def made(self) -> Outer:
        """Itself, with its activations in memory."""
        return self

    def part(self, rows: slice) -> Outer:
        return Outer(self.a[rows], self.g[rows])

    def dense(self) -> Tensor:
        if self.a.shape[2] == 1:  # an outer product: cheaper than a batched product of rank one
            return self.g.mT * self.a
        return self.g.mT @ self.a

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Outer:
        """The piece of ``left^T G right``: rotating the factors is far cheaper than rotating their product."""
        return Outer(_times(self.a, right), _times(self.g, left))

    def covariances(self, want_left: bool, want_right: bool) -> tuple[Tensor | None, Tensor | None]:
        """``sum g g^T`` (groups, out, out) and ``sum a a^T`` (groups, in, in) over examples and positions."""
        return (_second_moment(self.g) if want_left else None), (_second_moment(self.a) if want_right else None)


class Late(Outer):
    """An outer product whose activations take many times the memory of what they are made of (the patches of a convolution): they are made when
    they are asked for, some examples at a time, and not kept. All layers' at once would be more than the allocator keeps between batches, and
    memory that is fetched anew costs as much time as the products.

    ``make(rows)``: the activations (n, groups, shared, in) of the examples in ``rows``, of which there are ``size``, with ``inner`` inputs.
    Whoever reads ``a`` itself has them made once, and kept.
    """

    _make: Callable[[slice], Tensor]
    _inner: int
    _kept: Tensor

    def __init__(self, make: Callable[[slice], Tensor], g: Tensor, inner: int) -> None:
        for name, value in (("_make", make), ("g", g), ("_inner", inner)):
            object.__setattr__(self, name, value)

    @property
    def a(self) -> Tensor:
        if "_kept" not in vars(self):
            object.__setattr__(self, "_kept", self._make(slice(None)))
        return self._kept

    def __len__(self) -> int:
        return len(self.g)

    @property
    def device(self) -> torch.device:
        return self.g.device

    @property
    def inner(self) -> int:
        return self._inner

    @property
    def extra(self) -> int:
        return self.groups * self.shared * self._inner

    def made(self) -> Outer:
        return Outer(self.a if "_kept" in vars(self) else self._make(slice(None)), self.g)

    def part(self, rows: slice) -> Outer:
        if "_kept" in vars(self):
            return Outer(self.a[rows], self.g[rows])
        start, stop, _ = rows.indices(len(self))
        return Late(lambda some: self._make(_inside(slice(start, stop), some)), self.g[rows], self.inner)

    def regrouped(self, n: int) -> Outer:
        """As a piece over ``n`` examples, each the sum of as many of this one's."""
        each, g = len(self) // n, _joined(self.g, n)

        def make(rows: slice) -> Tensor:
            start, stop, _ = rows.indices(n)
            return _joined(self._make(slice(start * each, stop * each)), stop - start)

        return Late(make, g, self.inner)

    def dense(self) -> Tensor:
        return self.made().dense()

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Outer:
        return self.made().rotated(left, right)

    def covariances(self, want_left: bool, want_right: bool) -> tuple[Tensor | None, Tensor | None]:
        return self.made().covariances(want_left, want_right)


def _inside(whole: slice, some: slice) -> slice:
    """Rows ``some`` of the rows ``whole``."""
    start, stop, _ = some.indices(whole.stop - whole.start)
    return slice(whole.start + start, whole.start + stop)


def _joined(t: Tensor, n: int) -> Tensor:
    """(n*k, groups, shared, f) as (n, groups, k*shared, f)."""
    return t.unflatten(0, (n, len(t) // n if n else 1)).transpose(1, 2).flatten(2, 3)


@dataclass(frozen=True)
class Lookup:
    """An embedding's gradient: row ``index_ns`` of (entries, width) receives ``a_ns``. index (n, shared), a (n, shared, width)."""

    index: Tensor
    a: Tensor
    entries: int

    def __len__(self) -> int:
        return len(self.a)

    @property
    def device(self) -> torch.device:
        return self.a.device

    @property
    def numel(self) -> int:
        return self.entries * self.a.shape[-1]

    def part(self, rows: slice) -> Lookup:
        return Lookup(self.index[rows], self.a[rows], self.entries)

    def _owners(self) -> tuple[Tensor, Tensor, Tensor]:
        """The non-zero rows of all gradients: which example (k,), which entry (k,), and the row (k, width), repeats summed."""
        example = torch.arange(len(self), device=self.index.device).unsqueeze(1)
        keys, where = torch.unique(example * self.entries + self.index, return_inverse=True)
        rows = self.a.new_zeros(len(keys), self.a.shape[-1]).index_add_(0, where.flatten(), self.a.flatten(0, 1))
        return keys // self.entries, keys % self.entries, rows

    def dot(self, queries: Tensor) -> Tensor:
        """Inner products (queries, n) with ``queries`` (queries, 1, entries, width), by looking the entries up in them."""
        step = max(1, CHUNK // max(1, len(queries) * self.a[0].numel()))
        parts = zip(self.index.split(step), self.a.to(queries.dtype).split(step), strict=True)
        return torch.cat([torch.einsum("qnsd,nsd->qn", queries[:, 0][:, index], a) for index, a in parts], 1)

    def paired(self, queries: Tensor) -> Tensor:
        example = torch.arange(len(self), device=self.index.device).unsqueeze(1)
        return (queries[:, 0][example, self.index] * self.a.to(queries.dtype)).sum((1, 2))

    def squares(self) -> Tensor:
        _, entry, rows = self._owners()
        return self.a.new_zeros(1, self.entries, self.a.shape[-1]).index_add_(1, entry, rows.square().unsqueeze(0))

    def square_norms(self) -> Tensor:
        example, _, rows = self._owners()
        return self.a.new_zeros(len(self)).index_add_(0, example, rows.square().sum(1))

    def dense(self) -> Tensor:
        out = self.a.new_zeros(len(self), 1, self.entries, self.a.shape[-1])
        return out.scatter_add_(2, self.index[:, None, :, None].expand(-1, 1, -1, self.a.shape[-1]), self.a.unsqueeze(1))

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Lookup:
        assert left is None, "an embedding's rows are never rotated"
        return self if right is None else Lookup(self.index, self.a @ right[0], self.entries)

    def covariances(self, want_left: bool, want_right: bool) -> tuple[Tensor | None, Tensor | None]:
        flat = self.a.flatten(0, 1)
        return None, ((flat.mT @ flat).unsqueeze(0) if want_right else None)


@dataclass(frozen=True)
class Rows:
    """Per-example gradients held as they are, (n, *shape)."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def numel(self) -> int:
        return self.values[0].numel() if len(self) else 1

    def part(self, rows: slice) -> Rows:
        return Rows(self.values[rows])

    def dense(self) -> Tensor:
        return self.values

    def rotated(self, left: Tensor | None, right: Tensor | None) -> Rows:
        turned = self.values if left is None else left.mT @ self.values
        return Rows(turned if right is None else turned @ right)

    def covariances(self, want_left: bool, want_right: bool) -> tuple[Tensor | None, Tensor | None]:
        """``sum G G^T`` and ``sum G^T G``: without factors, the gradients' own second moments on either side."""
        g = self.values
        return ((g @ g.mT).sum(0) if want_left else None), ((g.mT @ g).sum(0) if want_right else None)


Piece = Outer | Lookup | Rows
Sides = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class BlockGradient:
    """Per-example gradients (n, *shape) of one block, as the sum of its pieces; never formed whole unless asked."""

    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return len(self.pieces[0])

    def parts(self) -> list[slice]:
        """Slices of examples small enough that :meth:`dense` of each holds at most CHUNK numbers (more on an accelerator)."""
        room = CHUNK * (1 if self.pieces[0].device.type == "cpu" else ROOMIER)
        step = max(1, room // max(1, max(piece.numel for piece in self.pieces), self._extra))
        return [slice(i, min(i + step, len(self))) for i in range(0, len(self), step)]

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Gradients (n, *shape) of the examples in ``rows``."""
        total = self.pieces[0].part(rows).dense()
        for piece in self.pieces[1:]:
            total = total + piece.part(rows).dense()
        return total

    def dot(self, queries: Tensor) -> Tensor:
        """Inner products (queries, n) with dense ``queries`` (queries, *shape)."""
        only = self.pieces[0]
        if len(self.pieces) == 1 and isinstance(only, Outer) and only.groups == only.shared == 1:
            return _rank_one_dot(queries[:, 0], only.g[:, 0, 0], only.a[:, 0, 0])
        lookups = [piece for piece in self.pieces if isinstance(piece, Lookup)]
        if lookups:  # entries by the ten thousand, of which an example touches few
            rest = tuple(piece for piece in self.pieces if not isinstance(piece, Lookup))
            total = sum(piece.dot(queries) for piece in lookups)
            return total + BlockGradient(rest).dot(queries) if rest else total  # type: ignore[return-value]
        return self._compared(queries, False)[0]

    def dot_and_squares(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`dot` and :meth:`square_norms`, for which gradients are formed once where they have to be formed."""
        only = self.pieces[0]
        rank_one = len(self.pieces) == 1 and isinstance(only, Outer) and only.shared == 1
        if rank_one or any(isinstance(piece, Lookup) for piece in self.pieces):
            return self.dot(queries), self.square_norms()
        return self._compared(queries, True)

    def _compared(self, queries: Tensor, squares: bool) -> tuple[Tensor, Tensor]:
        """Inner products (queries, n), and the gradients' square norms (n,) where they are wanted (else zeros), tile by tile of the gradients."""
        first = self.pieces[0]
        like = first.values if isinstance(first, Rows) else first.g if isinstance(first, Outer) else first.a
        dots, found = queries.new_zeros(len(queries), len(self)), like.new_zeros(len(self))
        at_once, height = self._tile()
        for i in range(0, len(self), at_once):
            rows = slice(i, min(i + at_once, len(self)))
            part = [piece.part(rows) for piece in self.pieces]
            ready = [piece.made() for piece in part if isinstance(piece, Outer)] if height else []
            for out in [slice(o, o + height) for o in range(0, ready[0].g.shape[-1], height)] if ready else [None]:
                if out is None:
                    tile, seen = BlockGradient(tuple(part)).dense(), queries
                else:
                    tile, seen = BlockGradient(tuple(Outer(piece.a, piece.g[..., out]) for piece in ready)).dense(), queries[:, :, out]
                flat = tile.flatten(1)
                dots[:, rows] += seen.flatten(1) @ flat.to(queries.dtype).mT
                if squares:
                    found[rows] += flat.square().sum(1)
        return dots, found

    def _tile(self) -> tuple[int, int]:
        """How many examples to form at once, and how many rows of their matrices: 0 for all, unless so few whole gradients find room that a
        product with them would be one of thin matrices."""
        first = self.pieces[0]
        room = CHUNK * (1 if first.device.type == "cpu" else ROOMIER)
        at_once, roomy = max(1, room // max(1, max(piece.numel for piece in self.pieces))), max(1, room // max(1, self._extra))
        if min(at_once, len(self)) >= min(MANY, roomy, len(self)) or not isinstance(first, Outer) or not all(isinstance(p, Outer) for p in self.pieces):
            return min(at_once, roomy), 0
        at_once = min(MANY, roomy, len(self))
        return at_once, max(1, room // (at_once * first.groups * first.inner))

    @property
    def _extra(self) -> int:
        return max(piece.extra if isinstance(piece, Outer) else 0 for piece in self.pieces)

    def paired(self, queries: Tensor) -> Tensor:
        """Inner products (n,) of example i's gradient with query i."""
        if len(self.pieces) == 1 and isinstance(self.pieces[0], Lookup):
            return self.pieces[0].paired(queries)
        parts = [(queries[rows].flatten(1) * self.dense(rows).flatten(1).to(queries.dtype)).sum(1) for rows in self.parts()]
        return torch.cat(parts)

    def rotated(self, left: Tensor | None, right: Tensor | None) -> BlockGradient:
        return BlockGradient(tuple(piece.rotated(left, right) for piece in self.pieces))

    def coordinates(self, left: Tensor | None, right: Tensor | None, rows: slice = slice(None)) -> Tensor:
        """``left^T G_n right`` (n, *shape) of the examples in ``rows``, rotated where that is cheapest."""
        early, late = self._when_to_rotate(left, right)
        return _turned(BlockGradient(tuple(piece.part(rows) for piece in self.pieces)).rotated(*early).dense(), *late)

    def squares(self, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
        """``sum_n (left^T G_n right)^2`` elementwise, (*shape): one matrix product where every example has a single position."""
        only = self.pieces[0]
        if len(self.pieces) == 1 and isinstance(only, Outer) and only.shared == 1:
            turned = only.rotated(left, right)
            return torch.einsum("ngo,ngi->goi", turned.g.squeeze(2).square(), turned.a.squeeze(2).square())
        if len(self.pieces) == 1 and isinstance(only, Lookup):
            return only.rotated(left, right).squares()
        early, late = self._when_to_rotate(left, right)
        turned_all = self.rotated(*early)
        return sum(_turned(turned_all.dense(rows), *late).square().sum(0) for rows in self.parts())  # type: ignore[return-value]

    def _when_to_rotate(self, left: Tensor | None, right: Tensor | None) -> tuple[Sides, Sides]:
        """The sides to rotate before gradients are formed, and those to rotate after. Over S positions a side f of factors takes
        S f^2 multiplications, and the formed gradient f^2 times its other side: the smaller of the two."""
        positions = sum(piece.shared if isinstance(piece, Outer) else 0 for piece in self.pieces)
        outers = [piece for piece in self.pieces if isinstance(piece, Outer)]
        if len(outers) < len(self.pieces):
            return (left, right), (None, None)
        out, inner = outers[0].g.shape[-1], outers[0].inner
        early = (left if positions <= inner else None), (right if positions <= out else None)
        return early, (left if early[0] is None else None, right if early[1] is None else None)

    def square_norms(self) -> Tensor:
        """``|G_n|^2``, (n,)."""
        only = self.pieces[0]
        if len(self.pieces) == 1 and isinstance(only, Outer) and only.shared == 1:
            return (only.g.square().sum(-1) * only.a.square().sum(-1)).flatten(1).sum(1)
        if len(self.pieces) == 1 and isinstance(only, Lookup):
            return only.square_norms()
        return torch.cat([self.dense(rows).square().flatten(1).sum(1) for rows in self.parts()])


def _times(t: Tensor, side: Tensor | None) -> Tensor:
    """Factors (n, groups, shared, f) times ``side`` (groups, f, k): one product for each group, not one for each example."""
    if side is None:
        return t
    flat = t.transpose(0, 1).flatten(1, 2) @ side
    return flat.unflatten(1, (len(t), t.shape[2])).transpose(0, 1)


def _turned(gradients: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left^T G_n right`` for gradients (n, groups, out, in)."""
    gradients = _times(gradients, right)
    return gradients if left is None else left.mT @ gradients


def _second_moment(t: Tensor) -> Tensor:
    """``sum t t^T`` (groups, f, f) of factors (n, groups, shared, f) over examples and positions."""
    n, _, shared, size = t.shape
    as_it_lies = shared == 1 or t.stride(0) == shared * t.stride(2)
    if as_it_lies or n * size > CHUNK // size:  # one long product, for which factors laid out otherwise are copied
        flat = t.transpose(0, 1).flatten(1, 2)
        return flat.mT @ flat
    return (t.mT @ t).sum(0)


def _rank_one_dot(queries: Tensor, g: Tensor, a: Tensor) -> Tensor:
    """``g_n^T Q a_n`` for every query Q (queries, out, in), as (queries, n): the outer products are formed a few rows at a time."""
    g, a = g.to(queries.dtype), a.to(queries.dtype)
    total = queries.new_zeros(len(queries), len(g))
    room = CHUNK * (1 if queries.device.type == "cpu" else ROOMIER)
    step = max(1, room // max(1, a.numel()))
    for i in range(0, g.shape[1], step):
        rows = slice(i, i + step)
        total.addmm_(queries[:, rows].flatten(1), (g[:, rows].unsqueeze(2) * a.unsqueeze(1)).flatten(1).mT)
    return total
