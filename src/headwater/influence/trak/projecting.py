"""Per-example gradients as few numbers: blocks projected from their factors where that is cheaper, and formed a part at a time where not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headwater.capture import Block, BlockGradient, Gradients, Lookup, Outer
from headwater.linalg.projections import Applied, Projection
from headwater.linalg.structured import Paired
from headwater.philox import plain_name


@dataclass
class Projector:
    """A model's gradients (all trained parameters laid end to end) as ``dim`` numbers: by a random projection, or as they are where
    there are no more parameters than that (``projection`` None).

    Matrix blocks are projected as matrices (groups * out, in), a folded bias being a last column; others as vectors. Blocks have maps of
    their own, named by their first parameter, so that the projection of the whole gradient is the sum over blocks.
    """

    blocks: dict[str, Block]
    projection: Projection | None
    device: torch.device
    memory: int = 2**28
    """Bytes of the map's entries that may be held from batch to batch; more than that are made again each time."""
    _applied: dict[tuple[str, torch.dtype], Applied] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        return self.size if self.projection is None else self.projection.dim

    @property
    def size(self) -> int:
        """How many numbers a whole gradient has."""
        return sum(block.size for block in self.blocks.values())

    def __call__(self, gradients: Gradients) -> Tensor:
        """Gradients of a batch as features (n, dim), in the gradients' own precision."""
        if self.projection is None:
            return torch.cat([gradients[name].dense().flatten(1) for name in self.blocks], 1)
        parts = (self._block(name, gradients[name]) for name in self.blocks)
        return sum_of(parts) * self.projection.scale

    def _block(self, name: str, gradient: BlockGradient) -> Tensor:
        block, lookups = self.blocks[name], [p for p in gradient.pieces if isinstance(p, Lookup)]
        applied = self._on(name, _dtype(gradient))
        rest = BlockGradient(tuple(p for p in gradient.pieces if not isinstance(p, Lookup)))
        parts = [applied.looked_up(piece.index, piece.a.to(applied.dtype)) for piece in lookups]
        if isinstance(applied, Paired):
            factored = [p for p in rest.pieces if isinstance(p, Outer) and _cheaper_from_factors(p, applied.projection.dim)]
            parts += [applied.outer(p.g[:, 0].to(applied.dtype), p.a[:, 0].to(applied.dtype)) for p in factored]
            rest = BlockGradient(tuple(p for p in rest.pieces if not any(p is f for f in factored)))
        if rest.pieces:
            parts.append(_formed(applied, rest, block))
        return sum_of(parts)

    def _on(self, name: str, dtype: torch.dtype) -> Applied:
        """The map of a block, made once."""
        if (name, dtype) not in self._applied:
            assert self.projection is not None
            keep = self.size * self.dim * torch.finfo(dtype).bits // 8 <= self.memory
            self._applied[name, dtype] = self.projection.on(self._keys[name], *matrix_shape(self.blocks[name]), dtype=dtype, device=self.device, keep=keep)
        return self._applied[name, dtype]

    @property
    def _keys(self) -> dict[str, str]:
        """What blocks are called in the projection: their names without wrappers', unless two would be called the same."""
        plain = {name: plain_name(name) for name in self.blocks}
        return plain if len(set(plain.values())) == len(plain) else {name: name.replace(".", "/") for name in plain}


def matrix_shape(block: Block) -> tuple[int, int]:
    """A block as a matrix (groups * out, in); one that is none as a single row."""
    return (block.shape[0] * block.shape[1], block.shape[2]) if block.matrix else (1, block.size)


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    assert total is not None
    return total


def _dtype(gradient: BlockGradient) -> torch.dtype:
    kinds = [piece.a.dtype if isinstance(piece, Outer | Lookup) else piece.values.dtype for piece in gradient.pieces]
    lowest = kinds[0]
    for kind in kinds[1:]:
        lowest = torch.promote_types(lowest, kind)
    return lowest


def _cheaper_from_factors(piece: Outer, dim: int) -> bool:
    """Multiplications for ``dim`` numbers of one example over S positions: from factors ``S (out + in + 1) dim``; formed first
    ``S out in``, and then ``out (in + 1) dim``."""
    _, groups, positions, inner = piece.a.shape
    out = piece.g.shape[-1]
    return groups == 1 and positions * (out + inner + 1) * dim <= positions * out * inner + out * (inner + 1) * dim


def _formed(applied: Applied, gradient: BlockGradient, block: Block) -> Tensor:
    """Gradients of a block projected as matrices, formed a part at a time."""
    if block.matrix and block.shape[0] == 1 and all(isinstance(piece, Outer) for piece in gradient.pieces):
        return applied(lambda r, c: sum_of(_corner(piece, r, c) for piece in gradient.pieces), len(gradient))  # type: ignore[arg-type]
    done = []
    for some in gradient.parts():
        whole = gradient.dense(some).reshape(some.stop - some.start, *matrix_shape(block))
        done.append(applied(lambda r, c, whole=whole: whole[:, r, c], len(whole)))  # type: ignore[misc]
    return torch.cat(done)


def _corner(piece: Outer, rows: slice, columns: slice) -> Tensor:
    """Some rows and columns of ``sum_s g_ns a_ns^T``."""
    g, a = piece.g[:, 0, :, rows], piece.a[:, 0, :, columns]
    return g.mT * a if g.shape[1] == 1 else g.mT @ a
