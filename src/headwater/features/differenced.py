"""A function of arrays as a torch function that can be differentiated twice: by differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError

STEP = float(np.finfo(np.float64).eps) ** 0.25
"""As a share of a feature's scale. Two nested central differences err by about STEP^2 from the third and fourth derivatives, and by eps / STEP^2
from rounding: both are 1e-8 of the output."""
ROWS = 4096  # handed to the function at once


class Differenced:
    """``function``: from an array (m, ...) in double precision to (m,) or (m, outputs). ``calls`` counts the rows that it was given.

    Args:
        scale: (...) how far each feature moves: steps are ``STEP`` times that.

    >>> cube = Differenced(lambda x: x.sum(1) ** 3, np.ones(2))
    >>> x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    >>> slope = torch.autograd.grad(cube(x).sum(), x, create_graph=True)[0]
    >>> torch.autograd.grad(slope[0, 0], x)[0].round(decimals=5).tolist()      # 6 (x0 + x1)
    [[12.0, 12.0]]
    """

    def __init__(self, function: Callable[[np.ndarray], Any], scale: np.ndarray) -> None:
        self.function, self.calls = function, 0
        self.scale = torch.from_numpy(np.asarray(scale, dtype=np.float64))

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs at x (m, ...)."""
        found: Tensor = _Values.apply(x, self)
        return found

    def values(self, x: Tensor) -> Tensor:
        """The outputs, without a graph. Raises InputError for what is no array of numbers in double precision, one row for each."""
        parts = []
        for part in x.detach().split(ROWS):
            out = np.asarray(self.function(part.cpu().numpy()))
            self.calls += len(part)
            if out.ndim not in (1, 2) or len(out) != len(part):
                raise InputError(f"a function that returned shape {out.shape} for {len(part)} rows", "one value, or one row of values, for each", "f(X) -> (n,)")
            if out.dtype != np.float64:
                raise InputError(f"a function that returned {out.dtype}", "float64: second differences need double precision", "compute in float64")
            parts.append(torch.from_numpy(out))
        return torch.cat(parts)

    def slopes(self, x: Tensor, weights: Tensor) -> Tensor:
        """(m, ...) the gradient of ``sum of weights * outputs`` (weights like the outputs), feature by feature."""
        m, steps = len(x), STEP * self.scale.flatten()
        shifts = torch.diag(steps).view(-1, 1, *x.shape[1:])
        points = torch.cat([x + shifts, x - shifts]).flatten(0, 1)  # (2 F m, ...)
        change = self.values(points).view(2, len(steps), m, -1)
        found = ((change[0] - change[1]) * weights.reshape(m, -1)).sum(-1) / (2 * steps[:, None])
        return found.T.reshape(x.shape)

    def length(self, v: Tensor) -> Tensor:
        """(m, 1...) the step along each direction v (m, ...): as many of it as move no feature by more than ``STEP`` of its scale."""
        most = (v.abs() / self.scale).flatten(1).amax(1).view(-1, *(1,) * (v.ndim - 1))
        return STEP / torch.where(most > 0, most, torch.ones_like(most))


class _Values(torch.autograd.Function):
    """Outputs, with differences as derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Differenced) -> Tensor:
        ctx.save_for_backward(x)
        ctx.f = f
        return f.values(x)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor, None]:
        return _Slopes.apply(ctx.saved_tensors[0], weights[0], ctx.f), None


class _Slopes(torch.autograd.Function):
    """Gradients, with differences of gradients along a direction as derivative. The Hessian is symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, f: Differenced) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.f = f
        return f.slopes(x, weights)

    @staticmethod
    def backward(ctx: Any, *direction: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weights), f, v = ctx.saved_tensors, ctx.f, direction[0]
        step = f.length(v)
        ahead, behind = x + step * v, x - step * v
        curved = (f.slopes(ahead, weights) - f.slopes(behind, weights)) / (2 * step)
        along = (f.values(ahead) - f.values(behind)).view(weights.shape) / (2 * step.view(-1, *(1,) * (weights.ndim - 1)))
        return curved, along, None
