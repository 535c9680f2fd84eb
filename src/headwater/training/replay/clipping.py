"""What a recorded clipping factor stands for: the norm of the whole gradient, or a number that the loop chose.

``torch.nn.utils.clip_grad_norm_`` multiplies with ``c = min(1, bound / (|g| + 1e-6))``. Where c < 1 it moves with the gradient:
``d(c g) = c (dg - g (g . dg) / (|g| (|g| + 1e-6)))``, a projection along g up to the 1e-6. The record tells which it was: norm clipping
leaves the same norm at every step that it clips, a constant has the same factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headwater.errors import GradientError

KINDS = ("auto", "norm", "fixed")
EPS = 1e-6  # torch's
ALIKE = 1e-3  # relative: norms of bfloat16 gradients that were clipped to one bound differ by less


@dataclass(frozen=True)
class Clipping:
    """Of one stage. ``kind``: "none" (no factor below 1), "norm", "fixed" (factors are constants), or "unclear".

    ``bound``: the norm that gradients were clipped to, NaN where there is not one of the whole stage; ``eps``: what is added to the norm.
    """

    kind: str = "none"
    bound: float = np.nan
    eps: float = EPS

    @classmethod
    def told(cls, factors: np.ndarray, norms: np.ndarray, kind: str = "auto") -> Clipping:
        """What the factors of a stage's steps, and the norms after them (NaN: not recorded), tell. ``kind``: "norm" or "fixed" where the
        user says it.

        >>> Clipping.told(np.array([1.0, 0.5, 0.8]), np.array([0.7, 2.0, 2.0])).kind
        'norm'
        >>> Clipping.told(np.array([0.5, 0.5, 0.5]), np.array([0.7, 2.0, 1.0])).kind
        'fixed'
        >>> Clipping.told(np.array([0.5, 0.6, 1.0]), np.array([0.7, 2.0, 1.0])).kind
        'unclear'
        """
        mine = factors < 1
        factors, norms = factors[mine], norms[mine]
        if not len(factors):
            return cls()
        bounds = {eps: norms + factors * eps for eps in (EPS, 0.0)}  # c (|g| + eps): what would have been the bound
        eps = EPS if _spread(bounds[EPS]) <= _spread(bounds[0.0]) or np.isnan(norms).any() else 0.0
        one = _spread(bounds[eps]) <= ALIKE
        if kind == "auto":
            same = len(factors) > 1 and _spread(factors) <= 1e-9
            kind = "norm" if one else "fixed" if same else "norm" if np.isnan(norms).all() else "unclear"
        return cls(kind, float(np.median(bounds[eps])) if kind == "norm" and one else np.nan, eps)

    def checked(self, stage: str) -> Clipping:
        """Itself. Raises GradientError where the record does not tell."""
        if self.kind == "unclear":
            raise GradientError(
                f"clipping factors in stage {stage!r} that neither leave one norm of the whole gradient nor are one number",
                "factors of torch.nn.utils.clip_grad_norm_ over all parameters of the optimizer, with one max_norm in a stage",
                "hw.Unrolled(clipping='norm') where each factor came from the 2-norm of its step's gradient (a max_norm that changes); "
                "clipping='fixed' takes the factors as constants",
            )
        return self

    def factor(self, gradient: Mapping[str, Tensor]) -> float:
        """What another gradient of this stage, not clipped yet, would be multiplied with."""
        found = [torch.linalg.vector_norm(g.double()) for g in gradient.values()]
        norm = float(torch.linalg.vector_norm(torch.stack(found))) if found else 0.0
        return min(1.0, self.bound / (norm + self.eps)) if norm + self.eps else 1.0

    def pull(self, cotangents: Mapping[str, Tensor], clipped: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """Cotangents (queries, ...) of ``factor * g`` with the factor as a constant, from those of the ``clipped`` gradient: the part that
        the moving factor takes away is ``g (g . u) / (|g| (|g| + eps))``."""
        square = sum(float(torch.linalg.vector_norm(clipped[n].double()).square()) for n in cotangents)
        if not square:
            return dict(cotangents)
        along = torch.stack([u.flatten(1) @ clipped[n].flatten().to(u.dtype) for n, u in cotangents.items()]).sum(0)
        along = along / (square + square**0.5 * factor * self.eps)
        return {n: u - along.reshape(-1, *[1] * (u.ndim - 1)) * clipped[n] for n, u in cotangents.items()}


def _spread(values: np.ndarray) -> float:
    """Largest less smallest, relative to the largest; infinite where one is not known."""
    if np.isnan(values).any():
        return np.inf
    return float((values.max() - values.min()) / values.max()) if values.max() > 0 else 0.0
