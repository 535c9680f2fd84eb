"""Kinks rounded off: piecewise linear activations replaced by smooth ones while something is computed, without touching the model.

A ReLU network has no second derivative that quadrature could see: it is zero almost everywhere and infinite at the kinks. Inside
``Softening(10.0)`` every ``relu`` is computed as ``softplus(x) = log(1 + exp(beta x)) / beta``, whose distance from it is at most
``log(2) / beta``, at 0 (Janizek, Sturmfels, Lee 2020, arXiv 2002.04138, section 4). Calls are caught on their way into torch
(``TorchFunctionMode``), so that modules and functional calls are replaced alike and nothing has to be put back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headwater.errors import InputError

Ramp = Callable[[Tensor], Tensor]
"""What stands for ``relu``."""


def _leaky(ramp: Ramp, x: Tensor, slope: float = 0.01) -> Tensor:
    return slope * x + (1 - slope) * ramp(x)


def _clipped(ramp: Ramp, x: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    return low + ramp(x - low) - ramp(x - high)


def _prelu(ramp: Ramp, x: Tensor, weight: Tensor) -> Tensor:
    slope = weight.view(1, -1, *(1,) * (x.ndim - 2)) if weight.numel() > 1 else weight
    return slope * x + (1 - slope) * ramp(x)


def _rrelu(ramp: Ramp, x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3) -> Tensor:
    return _leaky(ramp, x, (lower + upper) / 2)


SOFT: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "relu": (lambda ramp, x: ramp(x), ()),
    "relu6": (lambda ramp, x: _clipped(ramp, x, 0.0, 6.0), ()),
    "leaky_relu": (_leaky, ("negative_slope",)),
    "prelu": (_prelu, ("weight",)),
    "rrelu": (_rrelu, ("lower", "upper")),
    "hardtanh": (_clipped, ("min_val", "max_val")),
    "hardsigmoid": (lambda ramp, x: _clipped(ramp, x + 3, 0.0, 6.0) / 6, ()),
    "hardswish": (lambda ramp, x: x * _clipped(ramp, x + 3, 0.0, 6.0) / 6, ()),
}
"""Functions of torch (in place or not) that are sums of ramps: how they are put together, and the names of their further arguments."""

KINKED = frozenset(
    """
    abs absolute amax amin aminmax clamp clamp_max clamp_min clip cummax cummin fmax fmin hardshrink max maximum median min minimum quantile sort
    softshrink threshold topk rnn_relu max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d
    """.split()  # noqa: SIM905
)
"""Functions of torch whose derivative jumps too, and which stay as they are."""


class Softening(TorchFunctionMode):
    """Within it, the functions of ``SOFT`` are smooth; what was ``replaced``, and what has kinks that were ``left``, is counted by name.

    Args:
        beta: sharpness; None replaces nothing and only counts, in ``left``.

    >>> with Softening.of(10) as soft:
    ...     round(float(torch.relu(torch.zeros(()))), 4), dict(soft.replaced)
    (0.0693, {'relu': 1})
    """

    def __init__(self, beta: float | None) -> None:
        super().__init__()
        self.beta = beta
        self.replaced: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    @classmethod
    def of(cls, beta: Any) -> Softening:
        """From an argument ``softplus=``. Raises InputError unless it is None or a positive number."""
        if beta is not None and not (isinstance(beta, int | float) and not isinstance(beta, bool) and 0 < beta < float("inf")):
            raise InputError(f"softplus={beta!r}", "a positive number, the sharpness of softplus", "softplus=10")
        return cls(None if beta is None else float(beta))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Torch calls this in place of ``func``."""
        given = dict(kwargs or {})
        written = getattr(func, "__name__", "")
        name = written.removesuffix("_").removeprefix("_")
        if name in SOFT and self.beta is not None and not (name == "rrelu" and (given.get("training") or args[3:4] == (True,))):  # that one is random
            self.replaced[name] += 1
            return self._soft(name, args, given, written.endswith("_"))
        if name in SOFT or name in KINKED:
            self.left[name] += 1
        return func(*args, **given)

    def _soft(self, name: str, args: tuple[Any, ...], given: dict[str, Any], in_place: bool) -> Tensor:
        build, further = SOFT[name]
        names = ("input", *further, *(("training",) if name == "rrelu" else ()), "inplace")
        bound = {**dict(zip(names, args, strict=False)), **{("input" if key == "self" else key): value for key, value in given.items()}}
        x: Tensor = bound["input"]
        in_place = in_place or bool(bound.get("inplace", False))
        found = build(self._ramp, x.clone() if in_place else x, *(bound[key] for key in further if key in bound))
        return x.copy_(found) if in_place else found

    def _ramp(self, x: Tensor) -> Tensor:
        """Softplus, in full up to where it equals the ramp to the last digit."""
        assert self.beta is not None
        return F.softplus(x, self.beta, 40.0 if x.dtype == torch.float64 else 20.0)
