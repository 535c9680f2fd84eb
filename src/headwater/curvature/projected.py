"""Curvature of gradients whose two sides are projected: small enough to be dense, so that nothing within a layer is dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.capture import Block, BlockGradient, Capture, Gradients, Lookup, Outer
from headwater.curvature.ekfac import EKFAC, Statistics, accumulate, named_parts, outside, products
from headwater.curvature.estimate import Blockwise, Curvature, Point, Setting, check_examples, check_fisher
from headwater.errors import InputError
from headwater.linalg import Dense as DenseOperator
from headwater.linalg import Diagonal as DiagonalOperator
from headwater.linalg import Operator, eigh
from headwater.linalg.projected import Projected
from headwater.linalg.projections import Projection, Rademacher

MAX_SPACE = 6_000  # a dense matrix of so many projected coordinates; its eigenvectors take a minute
ROUNDING = 64  # projected gradients this many units of rounding long, relative to what they are projected from, are zero
Sides = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Leading:
    """Not a random projection: a side's leading ``dim`` eigenvectors, of the covariance of the layer's inputs or output gradients.

    Sides that have none (the entries of an embedding, and sides too long to decompose) are projected by signs.

    >>> Leading(16)
    Leading(dim=16)
    """

    dim: int

    def __post_init__(self) -> None:
        Rademacher(self.dim)  # refuses what is no dimension

    @property
    def seed(self) -> int:
        return 0


@dataclass(frozen=True)
class ProjectedFisher:
    """The Gauss-Newton matrix of each layer's projected gradients ``P_out G P_in^T``, dense; parameters outside matrix layers as in
    :class:`EKFAC`, exactly as they are: a dense block up to 512, a diagonal one beyond.

    Args:
        projection: of each side of each layer, under its own name; a side no wider than its ``dim`` is not projected.
        fisher, seed, examples: as in :class:`EKFAC`.
    """

    projection: Projection | Leading
    fisher: str = "auto"
    seed: int = 0
    examples: int | None = None

    def __post_init__(self) -> None:
        check_fisher(self.fisher)
        check_examples(self.examples)

    @property
    def passes(self) -> int:
        return 2 if isinstance(self.projection, Leading) else 1

    def fit(self, sources: list[Point], setting: Setting) -> Curvature:
        capture = setting.capture
        self._refuse_large(capture)
        like = next(capture.model.parameters())
        maps = {name: self._maps(block, {}, like) for name, block in capture.blocks.items() if block.matrix}
        if isinstance(self.projection, Leading):
            found, _ = accumulate(sources, setting, self.fisher, self.seed, self.examples, lambda g, first: EKFAC._covariances(g, first, capture))
            maps = {name: self._maps(capture.blocks[name], found, like) for name in maps}
        sums, count = accumulate(sources, setting, self.fisher, self.seed, self.examples, lambda g, _: self._squares(g, maps, capture))
        operators: dict[str, Operator] = {}
        for name, block in capture.blocks.items():
            mean = sums[name] / count
            if block.matrix:
                # what the maps send to zero (class gradients, which sum to 0, by equal signs) leaves rounding alone: it has no curvature
                rounding = (ROUNDING * torch.finfo(mean.dtype).eps) ** 2 * sums[f"{name}/lengths"] / count
                spectrum, basis = eigh(mean if mean.trace() > rounding else torch.zeros_like(mean))
                operators[name] = Projected(*maps[name], basis, spectrum)
            else:
                operators[name] = DenseOperator.of(mean) if mean.shape != block.shape else DiagonalOperator(mean)
        return Blockwise(operators)

    def _refuse_large(self, capture: Capture) -> None:
        for name, block in capture.blocks.items():
            if block.matrix:
                groups, out, inner = block.shape
                size = groups * min(out, self.projection.dim) * min(inner, self.projection.dim)
                if size > MAX_SPACE:
                    raise InputError(
                        f"dim={self.projection.dim}, which leaves {size:,} numbers of {name!r}",
                        f"at most {MAX_SPACE:,}: the matrix between them is dense",
                        "take a smaller dim, or hw.Influence(curvature=hw.EKFAC()), which projects nothing",
                    )

    def _maps(self, block: Block, covariances: Statistics, like: Tensor) -> Sides:
        groups, out, inner = block.shape
        sides = [self._side(f"{block.name}|{side}", groups, size, covariances.get(f"{block.name}/{side}"), like) for side, size in (("left", out), ("right", inner))]
        return sides[0], sides[1]

    def _side(self, name: str, groups: int, size: int, covariance: Tensor | None, like: Tensor) -> Tensor | None:
        """The map of one side, (groups, dim, size); None where it would not make it smaller."""
        dim = self.projection.dim
        if size <= dim:
            return None
        if isinstance(self.projection, Leading) and covariance is not None:
            return eigh(covariance)[1][..., -dim:].mT.to(like).contiguous()
        random = Rademacher(dim) if isinstance(self.projection, Leading) else self.projection
        return random.matrix(name, groups * size, dtype=like.dtype, device=like.device).reshape(dim, groups, size).transpose(0, 1).contiguous()

    @staticmethod
    def _squares(gradients: Gradients, maps: dict[str, Sides], capture: Capture) -> Statistics:
        found: Statistics = {}
        for name, block in capture.blocks.items():
            if block.matrix:
                rows = projected(gradients[name], *maps[name])
                found[name] = rows.mT @ rows
                found[f"{name}/lengths"] = gradients[name].square_norms().sum()
            else:
                found[name] = products(gradients[name], block)
        return found

    def tensors(self, curvature: Curvature) -> dict[str, Tensor]:
        """The factors as named tensors, for the store."""
        return named_parts(curvature)

    def rebuild(self, tensors: dict[str, Tensor], capture: Capture) -> Curvature:
        """The curvature from :meth:`tensors`."""
        operators: dict[str, Operator] = {}
        for name, block in capture.blocks.items():
            part: dict[str, Any] = {p: tensors.get(f"{name}/{p}") for p in ("left", "right", "basis", "spectrum")}
            operators[name] = Projected(**part) if block.matrix else outside(part["basis"], part["spectrum"])
        return Blockwise(operators)


def projected(gradient: BlockGradient, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left G_n right^T`` of each example, flat (n, groups * k * l): the factors are projected, gradients are never formed."""
    total: Any = 0.0
    for piece in gradient.pieces:
        if isinstance(piece, Lookup) and left is not None:  # an entry's unit vector picks a column of the map
            piece = Outer(piece.a.unsqueeze(1), left[0].mT[piece.index].unsqueeze(1).to(piece.a.dtype))
            total = total + piece.rotated(None, None if right is None else right.mT).dense()
        else:
            total = total + piece.rotated(None if left is None else left.mT, None if right is None else right.mT).dense()
    return total.flatten(1)
