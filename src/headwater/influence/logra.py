"""LoGra: influence in a space to which both sides of every layer's gradient are projected (Choe et al. 2024, arXiv 2405.13954)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.curvature.projected import Leading, ProjectedFisher
from headwater.errors import InputError
from headwater.influence.methods import RANK_ONLY, Fit, Row, Table
from headwater.linalg.projections import Projection, Rademacher
from headwater.training import Run


@dataclass(frozen=True)
class RelativeInverse:
    """``phi(s) = 1 / (s + damping * mean(s))``, the mean over a block's own eigenvalues; 0 where they are all 0."""

    damping: float

    def __call__(self, s: Tensor) -> Tensor:
        added = s + self.damping * s.mean()
        return torch.where(added > 0, 1.0 / torch.where(added > 0, added, 1.0), 0.0)


@dataclass(frozen=True)
class LoGra:
    """Influence functions in a projected space: with ``g = P_out G P_in^T`` for each layer,

        score(q, m) = - sum over layers  g_q^T (F + damping * mean eigenvalue of F)^-1 g_m / N,   F = E[g g^T]

    at the final weights (Choe et al. 2024, arXiv 2405.13954, Sec. 3). A layer's F is dense, so nothing within a layer is dropped but
    what the projection drops. A layer takes ``dim^2`` numbers of an example, however wide it is, and its gradient is never formed.

    Two-sided projections of outer products are noisy: the inner product of two such is off by about ``2 sqrt(2 / dim)`` of their
    lengths' product. Parameters outside matrix layers (norms, lone biases) are not projected, and none is left out.

    Args:
        dim: the numbers that each side of a layer is projected to; narrower sides are not projected. Where no side is wider, scores are
            exact influence with F the layer's own Fisher matrix.
        projection: a value of ``hw.projections``, default ``Rademacher(dim)``; ``hw.projections.Leading(dim)`` takes the leading
            eigenvectors of each side instead, as EK-FAC finds them (the paper's PCA initialisation).
        damping: relative to the mean eigenvalue of each layer's F (the published choice is 0.1).
        fisher, seed: of F, as in :class:`headwater.EKFAC`; "empirical" is the published choice.

    >>> LoGra(dim=32)
    LoGra(dim=32, projection=None, damping=0.1, fisher='auto', seed=0)
    """

    dim: int | None = None
    projection: Projection | Leading | None = None
    damping: float = 0.1
    fisher: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.projection is not None and not isinstance(self.projection, Projection | Leading):
            raise InputError(f"projection={self.projection!r}", "a value of hw.projections", "hw.LoGra(projection=hw.projections.Rademacher(32))")
        if self.projection is not None and self.dim not in (None, self.projection.dim):
            raise InputError(f"dim={self.dim} and projection={self.projection!r}", "one dimension", "leave dim= out: the projection has it")
        if isinstance(self.damping, bool) or not isinstance(self.damping, int | float) or not self.damping >= 0:
            raise InputError(f"damping={self.damping!r}", "a number of at least 0, in units of each layer's mean eigenvalue", "hw.LoGra(damping=0.1)")
        self.curvature  # noqa: B018  refuses a dim and a fisher that are none

    @property
    def curvature(self) -> ProjectedFisher:
        """How curvature is estimated."""
        return ProjectedFisher(self.projection or Rademacher(16 if self.dim is None else self.dim), self.fisher, self.seed)

    def plan(self, run: Run) -> Table:
        final = (run.checkpoints[-1],)
        fit = Fit(self.curvature, tuple((stage.index, final) for stage in run.stages))
        total = sum(stage.size for stage in run.stages)
        rows = tuple(Row(stage.index, (final,), RelativeInverse(float(self.damping)), curvature=fit, examples=total) for stage in run.stages)
        return Table(f"LoGra({self.curvature.projection!r}, damping={self.damping:.3g})", rows, RANK_ONLY)
