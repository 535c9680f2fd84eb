"""Small models with known attributions, and the definition by brute force: what integrators are held against."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """w . x + c: every attribution is w_j (x_j - b_j)."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 2, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + 0.7


def smooth(inputs: int = 6, outputs: int = 3, seed: int = 0) -> nn.Module:
    """A float64 network with smooth activations."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs)).double()


def kinked(inputs: int = 6, outputs: int = 3, seed: int = 0) -> nn.Module:
    """A float64 network of ReLUs."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, outputs)).double()


def picture_net(seed: int = 0) -> nn.Module:
    """A float32 convolutional network with everything that has a training mode."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Dropout(0.5), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 4))
    net.train()
    with torch.no_grad():
        net(torch.randn(32, 2, 8, 8))  # so that the running statistics are not those of a new module
    return net


def brute(f, x: Tensor, b: Tensor, points: int = 20_000) -> Tensor:
    """Integrated Gradients of ``f: (m, ...) -> (m,)`` for one x and b (...), by very many midpoints in float64."""
    t = ((torch.arange(points, dtype=torch.float64) + 0.5) / points).view(-1, *(1,) * x.ndim)
    at = (b + t * (x - b)).requires_grad_()
    (gradient,) = torch.autograd.grad(f(at).sum(), at)
    return gradient.mean(0) * (x - b)


def exact_relu(net: nn.Sequential, x: Tensor, b: Tensor, output: int) -> Tensor:
    """Integrated Gradients of a network of Linear and ReLU layers, exactly: the line is cut at every kink by solving for it, piece by piece."""
    cuts = [0.0, 1.0]
    layers = [m for m in net if isinstance(m, nn.Linear)]
    for depth in range(1, len(layers)):  # kinks of one layer after the other: before, everything is linear between the cuts so far
        found = []
        for low, high in pairwise(cuts):
            a, z = (_before(layers, depth, b + t * (x - b)) for t in (low, high))
            for p, q in zip(a.tolist(), z.tolist(), strict=True):
                if p * q < 0:
                    found.append(low + (high - low) * p / (p - q))
        cuts = sorted({*cuts, *found})
    total = torch.zeros_like(x)
    for low, high in pairwise(cuts):
        at = (b + (low + high) / 2 * (x - b)).requires_grad_()
        (gradient,) = torch.autograd.grad(net(at[None])[0, output], at)
        total += (high - low) * gradient
    return total * (x - b)


def _before(layers: list[nn.Linear], depth: int, x: Tensor) -> Tensor:
    with torch.no_grad():
        for k in range(depth):
            x = layers[k](x if k == 0 else x.relu())
    return x


def states(model: nn.Module) -> list[object]:
    """Everything about a model that explaining it must leave alone."""
    found: list[object] = [m.training for m in model.modules()]
    found += [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    found += [p.requires_grad for p in model.parameters()] + [p.grad is None for p in model.parameters()]
    return found + [np.asarray(v.detach().float()).tobytes() for v in model.state_dict().values()]
