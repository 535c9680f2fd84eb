"""One block's rows: from captured gradients to arrays, back to gradients, and query vectors brought into the same coordinates.

Everything here is a change of orthonormal basis, under which inner products and lengths stay what they are; only :data:`KEPT` leaves
coordinates out, and reduced dtypes round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from headwater.capture import BlockGradient, Lookup, Outer, Rows
from headwater.curvature import Blockwise
from headwater.influence.engine import Engine
from headwater.influence.index.carried import InBasis
from headwater.influence.index.layout import FACTORS, KEPT, LOOKUP, Panel
from headwater.influence.methods import Row
from headwater.influence.responses import Constant
from headwater.influence.vectors import Factored, Seen, Whole
from headwater.linalg import Diagonal, Kronecker, Split

FLOOR = 1e-6  # eigenvalues this far below the largest are taken for equal when coordinates are brought to one scale


class Unfit(Exception):
    """A block whose gradients came in another form than its rows are kept in (a layer went to the fallback); carries its name."""


@dataclass(frozen=True)
class Basis:
    """Eigenvectors of one block (None: its own axes), and how large squared coordinates are expected to be as the optimizer meets
    them, shaped as the block (None: not known, then none is left out)."""

    left: Tensor | None
    right: Tensor | None
    energy: Tensor | None


def bases_of(engine: Engine, panel: Panel) -> dict[str, Basis]:
    """The basis of each block, from the curvature that the panel is kept in."""
    flow: Any = engine.flow(Row(panel.stage, panel.at, Constant(1.0), curvature=panel.fit, pace=panel.pace))
    curvature = engine.curvature(panel.fit)
    found = dict.fromkeys(engine.capture.blocks, Basis(None, None, None))
    if isinstance(curvature, Blockwise):
        for name, operator in curvature.operators.items():
            if isinstance(operator, Kronecker | Diagonal) and operator.spectrum.shape == engine.capture.blocks[name].shape:
                energy = flow.flows[name].gain * operator.spectrum.clamp_min(0)
                sides = (operator.left, operator.right) if isinstance(operator, Kronecker) else (None, None)
                found[name] = Basis(*sides, energy)
    return found


@dataclass(frozen=True)
class Keeper:
    """How one block's rows are kept in one panel: their ``kind``, ``basis``, which coordinates (``keep``, flat numbers) and ``white``,
    the scale of each that a row is divided by."""

    name: str
    kind: str
    basis: Basis
    keep: Tensor | None = None
    white: Tensor | None = None

    # -- from gradients to arrays ----------------------------------------------------------------------------------------------

    def taken(self, gradient: BlockGradient) -> dict[str, Tensor]:
        """The arrays of one batch at one set of weights. Raises Unfit."""
        only = gradient.pieces[0]
        if self.kind == FACTORS:
            if len(gradient.pieces) > 1 or not isinstance(only, Outer):
                raise Unfit(self.name)
            turned = only.rotated(self.basis.left, self.basis.right)
            return {"g": turned.g, "a": turned.a}
        if self.kind == LOOKUP:
            if len(gradient.pieces) > 1 or not isinstance(only, Lookup):
                raise Unfit(self.name)
            return {"index": only.index, "a": only.rotated(None, self.basis.right).a}
        return {"rows": torch.cat([self._coordinates(gradient, rows) for rows in gradient.parts()])}

    def _coordinates(self, gradient: BlockGradient, rows: slice) -> Tensor:
        flat = gradient.coordinates(self.basis.left, self.basis.right, rows).flatten(1)
        return flat if self.keep is None else flat[:, self.keep]

    def averaged(self, parts: Sequence[Sequence[dict[str, Tensor]]]) -> dict[str, Tensor]:
        """The arrays of a mean over checkpoints, from those of each checkpoint's batches."""
        if self.kind == KEPT or "rows" in parts[0][0]:
            rows = torch.stack([torch.cat([batch["rows"] for batch in batches]) for batches in parts]).mean(0)
            return {"rows": rows if self.white is None else rows / self.white}
        axes = {"g": 2, "a": 2} if self.kind == FACTORS else {"index": 1, "a": 1}
        joined = {field: torch.cat([_stacked([batch[field] for batch in batches], axis) for batches in parts], axis) for field, axis in axes.items()}
        scaled = "g" if self.kind == FACTORS else "a"
        return {**joined, scaled: joined[scaled] / len(parts)}

    # -- from arrays to gradients ----------------------------------------------------------------------------------------------

    def gradient(self, fields: dict[str, Tensor], entries: int) -> BlockGradient:
        """Per-example gradients in the panel's coordinates; ``entries``: of an embedding."""
        if self.kind == FACTORS:
            return BlockGradient((Outer(fields["a"], fields["g"]),))
        if self.kind == LOOKUP:
            return BlockGradient((Lookup(fields["index"], fields["a"], entries),))
        return Stored((Rows(fields["rows"]),), fields.get("norms"))

    # -- queries in the same coordinates ---------------------------------------------------------------------------------------

    def turned(self, side: Any) -> Any:
        """Query vectors whose inner products with :meth:`gradient` are those of ``side`` with the gradients themselves."""
        left, right = self.basis.left, self.basis.right
        if self.kind == FACTORS and isinstance(side, Factored):
            return Factored(_one(side.out, left), _one(side.inner, right))
        if self.kind == FACTORS and isinstance(side, Seen):
            return _rebased(side, left, right)
        there = isinstance(side, InBasis) and side.operator.left is left and side.operator.right is right
        values = side.values if there else _both(side.whole(), left, right)
        if self.kind in (FACTORS, LOOKUP):
            return Whole(values)
        flat = values.flatten(1)
        flat = flat if self.keep is None else flat[:, self.keep]
        return Whole(flat if self.white is None else flat * self.white.to(flat.dtype))


@dataclass(frozen=True)
class Stored(BlockGradient):
    """Gradients of which coordinates were left out or rounded: their ``norms`` (n,) are those from before, where they were kept."""

    norms: Tensor | None = None

    def square_norms(self) -> Tensor:
        return super().square_norms() if self.norms is None else self.norms.square()

    def dot_and_squares(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        return super().dot_and_squares(queries) if self.norms is None else (self.dot(queries), self.square_norms())


def _one(t: Tensor, side: Tensor | None) -> Tensor:
    """Factors (n, f) of a layer of one group, rotated."""
    return t if side is None else t @ side[0].to(t.dtype)


def _both(v: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    v = v if left is None else left.to(v.dtype).mT @ v
    return v if right is None else v @ right.to(v.dtype)


def _rebased(side: Seen, left: Tensor | None, right: Tensor | None) -> Seen:
    """A response on factors, to be met by factors that are in the basis ``left``, ``right`` already."""
    response, grid = side.response, side.response.grid if isinstance(side.response, Split) else side.response
    if grid is None:  # a constant: its queries are as they were captured
        out, inner = side.turned
        turned = (out if left is None else left[0].to(out.dtype).mT @ out, inner if right is None else right[0].to(inner.dtype).mT @ inner)
        return Seen(response, turned)
    moved = replace(grid, left=_relative(grid.left, left), right=_relative(grid.right, right))
    return Seen(replace(response, grid=moved) if isinstance(response, Split) else moved, side.turned)


def _relative(own: Tensor | None, basis: Tensor | None) -> Tensor | None:
    """The eigenvectors ``own`` seen from ``basis``: ``basis^T own``, and None where that is the identity."""
    if basis is None:
        return own
    other = basis[0]
    if own is None:
        return other.mT
    return None if own.shape == other.shape and torch.equal(own, other.to(own.dtype)) else other.to(own.dtype).mT @ own


def _stacked(batches: Sequence[Tensor], axis: int) -> Tensor:
    """Batches one below the other, those with fewer positions filled up with zeros."""
    longest = max(t.shape[axis] for t in batches)
    return torch.cat([pad(t, (0, 0) * (t.ndim - 1 - axis) + (0, longest - t.shape[axis])) if t.shape[axis] < longest else t for t in batches])


def scale_of(energy: Tensor) -> Tensor:
    """By what coordinates are divided so that one scale fits a row: the root of what their squares are expected to be."""
    flat = energy.flatten().double()
    return (flat + FLOOR * flat.max().clamp_min(torch.finfo(torch.float32).tiny)).sqrt().float()
