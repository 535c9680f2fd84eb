"""Inverses of positive matrices with something added to their diagonal: what TRAK's kernel is made of.

For features Phi (n, k), ``Phi_q (Phi^T Phi + r I)^-1 Phi^T = Phi_q Phi^T (Phi Phi^T + r I)^-1``: the smaller of the two matrices is
inverted, (k, k) or (n, n). The second form needs inner products alone, so it serves gradients that are never written down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.linalg import eigh
from headwater.philox import key_of, signs

DECOMPOSED = 1024
"""Up to this size a matrix is decomposed, which also tells its rank; beyond it, factored by Cholesky, which takes a tenth of the time."""
COUNTED = 2048
"""Up to this size its effective dimension is exact; beyond it, an estimate good to a few percent."""


@dataclass(frozen=True, eq=False)
class Ridge:
    """A positive semidefinite matrix M (m, m) with ``shift`` added to its diagonal, ready to be solved with, in float64.

    ``shift = regularisation * trace(M)``: relative to the sum of the eigenvalues, which a projection keeps in the mean, whatever its
    dimension, and which grows with the number of examples as the matrix does. ``effective_dimension``: ``sum s / (s + shift)`` over the
    eigenvalues s, how many directions are not regularised away (an estimate beyond COUNTED). ``rank``: how many eigenvalues are above rounding; None where the
    matrix was too large to be decomposed.
    """

    shift: float
    effective_dimension: float
    rank: int | None
    _inverse: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, matrix: Tensor, regularisation: float, rounding: float) -> Ridge:
        """``rounding``: of the matrix's entries, relative; below ``m * rounding`` times the largest an eigenvalue counts as zero."""
        m = len(matrix)
        shift = regularisation * float(matrix.diagonal().sum())
        if m > DECOMPOSED:
            found = cls._by_cholesky(matrix, shift, rounding)
            if found is not None:
                return found
        spectrum, basis = eigh(matrix.double())
        kept = spectrum > max(float(spectrum[-1]), 0.0) * m * rounding
        inverse = torch.where(kept | (shift > 0), 1.0 / (spectrum.clamp_min(0) + shift).clamp_min(1e-300), 0.0)
        effective = float((spectrum.clamp_min(0) * inverse).sum())
        return cls(shift, effective, int(kept.sum()), (basis, inverse))

    @classmethod
    def _by_cholesky(cls, matrix: Tensor, shift: float, rounding: float) -> Ridge | None:
        """None where the matrix is not positive definite to rounding: a decomposition has to find what is to be left out."""
        shifted = matrix.double()
        shifted.diagonal().add_(shift)
        lower, info = torch.linalg.cholesky_ex(shifted)
        diagonal = lower.diagonal()
        sound = int(info) == 0 and (shift > 0 or float(diagonal.min() / diagonal.max()) ** 2 > len(matrix) * rounding)
        shifted.diagonal().sub_(shift)
        if not sound:
            return None
        return cls(shift, len(matrix) - shift * _trace_of_inverse(lower), None, (lower, None))

    def solve(self, right: Tensor) -> Tensor:
        """``(M + shift I)^-1 right`` for columns (m, c); the pseudo-inverse where there is no shift and M is singular. float64."""
        first, inverse = self._inverse
        if inverse is None:
            return torch.cholesky_solve(right.double(), first)
        return first @ (inverse.unsqueeze(1) * (first.mT @ right.double()))


def _trace_of_inverse(lower: Tensor) -> float:
    """The trace of ``(L L^T)^-1``, which is ``|L^-1|_F^2``; of a large matrix from vectors of signs z, whose ``|L^-1 z|^2`` have it for their
    mean (Hutchinson 1990). With 128 of them the effective dimension d is right to ``sqrt(d) / 8``."""
    if len(lower) > COUNTED:
        probes = signs(key_of("effective dimension"), range(len(lower)), range(128), dtype=lower.dtype, device=lower.device)
        return float(torch.linalg.solve_triangular(lower, probes, upper=False).square().sum()) / 128
    total, m, step = 0.0, len(lower), 512
    for start in range(0, m, step):  # columns of the inverse begin at their own row
        stop = min(start + step, m)
        unit = torch.zeros(m - start, stop - start, dtype=lower.dtype, device=lower.device)
        unit.diagonal().fill_(1.0)
        total += float(torch.linalg.solve_triangular(lower[start:, start:], unit, upper=False).square().sum())
    return total
