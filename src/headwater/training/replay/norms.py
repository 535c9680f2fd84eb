"""BatchNorm written in plain operations, so that its running statistics can be differentiated too.

In training mode they are computed from the batch: ``r' = (1-a) r + a s(x)`` (Ioffe & Szegedy 2015, Alg. 2; torch keeps the unbiased
variance). torch updates them outside of the graph, and takes them as constants in eval mode: derivatives through them would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

MEAN, VARIANCE = "running_mean", "running_var"


def tracked(model: nn.Module) -> dict[str, Any]:
    """The modules that keep running statistics, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None}


@contextmanager
def written_out(model: nn.Module, on: bool = True) -> Iterator[dict[str, Tensor]]:
    """Within it BatchNorm is computed in plain operations (unless ``on`` is False); yields a dict that collects the new running
    statistics, with their graph."""
    found: dict[str, Tensor] = {}
    modules = tracked(model) if on else {}
    try:
        for name, module in modules.items():
            module.forward = partial(_forward, module, name, found)
        yield found
    finally:
        for module in modules.values():
            del module.__dict__["forward"]


def _forward(module: Any, name: str, found: dict[str, Tensor], x: Tensor) -> Tensor:
    axes, shape = [0, *range(2, x.ndim)], (1, -1, *([1] * (x.ndim - 2)))
    mean, variance = found.get(f"{name}.{MEAN}", module.running_mean), found.get(f"{name}.{VARIANCE}", module.running_var)
    if module.training:
        share = module.momentum if module.momentum is not None else 1.0 / (float(module.num_batches_tracked) + 1.0)
        count = x.numel() / x.shape[1]
        batch_mean, batch_variance = x.mean(axes), x.var(axes, unbiased=False)
        found[f"{name}.{MEAN}"] = (1 - share) * mean + share * batch_mean
        found[f"{name}.{VARIANCE}"] = (1 - share) * variance + share * batch_variance * (count / (count - 1))
        mean, variance = batch_mean, batch_variance
    y = (x - mean.reshape(shape)) * torch.rsqrt(variance.reshape(shape) + module.eps)
    return y if module.weight is None else y * module.weight.reshape(shape) + module.bias.reshape(shape)
