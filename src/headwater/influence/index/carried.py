"""The query side of an index's rows: as in scoring.py, with what a response makes of a query left in the eigenbasis, where the stored
gradients are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.curvature.estimate import BlockwiseFlow
from headwater.influence.index.near import Near, near
from headwater.influence.methods import Row
from headwater.influence.scoring import QuerySide, Use
from headwater.influence.vectors import Factored, Queries, Side, Whole, respond, through
from headwater.linalg import Flow, Kronecker


@dataclass(frozen=True)
class InBasis:
    """Query vectors as coordinates ``values`` (queries, groups, out, in) in the eigenbasis of ``operator``."""

    operator: Kronecker
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def whole(self) -> Tensor:
        """Back in the block's own axes."""
        return self.operator.restore(self.values)

    def square_norms(self) -> Tensor:
        """(queries,); the basis is orthonormal."""
        return self.values.flatten(1).square().sum(1)


class CarriedSide(QuerySide):
    """As :class:`QuerySide`; a vector that is rotated for a response is not rotated back, nor once more to be carried."""

    def _respond(self, use: Use) -> Queries:
        row = use.row
        u = self.carried[use.method] if row.asking is None else self.asking(row.asking)
        seen, carried = _both(self.engine.flow(row), row, u, use.index > 0 and row.psi is not None, self.tolerance)
        if carried is not None:
            self.carried[use.method] = carried
        return seen


def _both(flow: Any, row: Row, u: Queries, carry: bool, tolerance: float) -> tuple[Queries, Queries | None]:
    """The queries through phi, and (where asked) through psi for the row before."""
    flows: dict[str, Any] = getattr(flow, "flows", {})
    own = {n for n, inner in flows.items() if n in u and isinstance(inner, Flow) and isinstance(inner.matrix, Kronecker)}
    rest = {n: side for n, side in u.items() if n not in own}
    seen = respond(flow, row.phi, rest, tolerance)
    carried = through(flow.carry(row.psi), rest) if carry and row.psi is not None else {}
    for n in own:
        seen[n], moved = _one(flows[n], n, row, u[n], carry, tolerance)
        if moved is not None:
            carried[n] = moved
    return {n: seen[n] for n in u}, {n: carried[n] for n in u} if carry else None


def _one(flow: Any, name: str, row: Row, side: Side, carry: bool, tolerance: float) -> tuple[Any, Whole | Near | None]:
    matrix = flow.matrix
    close = near(flow, side) if tolerance > 0 else None
    if close is not None and (carry or isinstance(side, Near)):
        return _near(flow, name, row, close, isinstance(side, Factored), carry, tolerance)
    spectrum = matrix.spectrum.clamp_min(0)
    phi, psi = flow.gain * row.phi(spectrum), row.psi(spectrum) if carry and row.psi is not None else None
    seen: Any = None
    if isinstance(side, Factored):
        seen = respond(BlockwiseFlow({name: flow}), row.phi, {name: side}, tolerance)[name]
        if psi is None:
            return seen, None
    like = side.part(slice(0, 1)).whole()
    found = None if seen is not None else like.new_empty(len(side), *like.shape[1:])
    moved = None if psi is None else like.new_empty(len(side), *like.shape[1:])
    step = max(1, (2**21 if like.device.type == "cpu" else 2**28) // max(1, like.numel()))
    for i in range(0, len(side), step):
        rows = slice(i, i + step)
        turned = _turned(matrix, side.part(rows))
        if found is not None:
            torch.mul(turned, phi.to(turned.dtype), out=found[rows])
        if moved is not None and psi is not None:
            moved[rows] = matrix.restore(turned * psi.to(turned.dtype))
    return seen if found is None else InBasis(matrix, found), None if moved is None else Whole(moved)


def _near(flow: Any, name: str, row: Row, side: Near, first: bool, carry: bool, tolerance: float) -> tuple[Any, Near | None]:
    """As :func:`_one`, for queries that stay a multiple of themselves and a correction on few eigenvectors."""
    responses: list[tuple[Any, Any]] = [*([] if first else [(row.phi, flow.gain)]), *([(row.psi, 1.0)] if carry else [])]
    made = side.through(flow, responses, tolerance)
    seen = respond(BlockwiseFlow({name: flow}), row.phi, {name: side.raw}, tolerance)[name] if first else made[0]
    return seen, made[-1] if carry else None


def _turned(matrix: Kronecker, side: Side) -> Tensor:
    """Coordinates in the eigenbasis; of an outer product those of its factors, multiplied."""
    if not isinstance(side, Factored):
        return matrix.rotate(side.whole())
    out, inner = side.out, side.inner
    out = out if matrix.left is None else out @ matrix.left[0].to(out.dtype)
    inner = inner if matrix.right is None else inner @ matrix.right[0].to(inner.dtype)
    return out[:, None, :, None] * inner[:, None, None, :]
