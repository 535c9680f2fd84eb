"""A matrix known only in a projected space: ``H ~ P^T F P`` with P a map of each side of a layer's gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.linalg.operators import Operator


@dataclass(frozen=True)
class Projected(Operator):
    """Functions of F, the matrix of gradients ``left G right^T``: ``map(f) = P^T f(F) P`` on matrices (groups, out, in).

    ``left`` (groups, k, out) and ``right`` (groups, l, in) are the two maps, None the identity; ``basis`` holds F's eigenvectors in
    columns (groups * k * l, same) and ``spectrum`` its eigenvalues. What the maps send to zero gets no response at all, whatever f.
    """

    left: Tensor | None
    right: Tensor | None
    basis: Tensor
    spectrum: Tensor

    def project(self, v: Tensor) -> Tensor:
        """Matrices (n, groups, out, in) in the projected space, (n, groups * k * l)."""
        v = v if self.left is None else self.left.to(v.dtype) @ v
        return (v if self.right is None else v @ self.right.to(v.dtype).mT).flatten(1)

    def rotate(self, v: Tensor) -> Tensor:
        return self.project(v) @ self.basis.to(v.dtype)

    def restore(self, v: Tensor) -> Tensor:
        return self.unproject(v @ self.basis.to(v.dtype).mT)

    def unproject(self, v: Tensor) -> Tensor:
        """The transpose of :meth:`project`. F's numbers alone do not say the shape of a side that is not projected: it is the rest."""
        groups = next((side.shape[0] for side in (self.left, self.right) if side is not None), 1)
        if self.left is not None:
            v = v.reshape(len(v), groups, self.left.shape[1], -1)
        elif self.right is not None:
            v = v.reshape(len(v), groups, -1, self.right.shape[1])
        v = v if self.left is None else self.left.to(v.dtype).mT @ v
        return v if self.right is None else v @ self.right.to(v.dtype)

    def precision_in_basis(self, precision: Tensor) -> Tensor:
        eye = torch.eye(len(self.spectrum), dtype=self.spectrum.dtype, device=self.spectrum.device)
        return (self.restore(eye).square() * precision.to(self.spectrum)).flatten(1).sum(1)
