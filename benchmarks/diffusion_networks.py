"""Denoisers whose speed is measured: an MLP, a UNet in plain torch, and diffusers' own where it is installed. Weights are random."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def waves(t: Tensor, width: int) -> Tensor:
    """Timesteps (n,) as ``width`` sines and cosines."""
    frequency = torch.exp(torch.arange(width // 2, device=t.device) * (-2 * math.log(1e4) / width))
    angle = t.unsqueeze(1) * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class MLP(nn.Module):
    """Flat pixels; residual layers of SiLU."""

    def __init__(self, pixels: int, width: int, layers: int = 3, clock: int = 64) -> None:
        super().__init__()
        self.told, self.clock, self.into = clock, nn.Linear(clock, width), nn.Linear(pixels, width)
        self.layers, self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers)), nn.Linear(width, pixels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = F.silu(self.clock(waves(t, self.told)))
        h = F.silu(self.into(x) + time)
        for layer in self.layers:
            h = h + F.silu(layer(h) + time)
        return self.out(h)


class Residual(nn.Module):
    """Two convolutions on normalised features, told the time in between, beside a shortcut (Ho et al. 2020)."""

    def __init__(self, inside: int, outside: int, clock: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.GroupNorm(8, c), nn.SiLU(), nn.Conv2d(c, outside, 3, padding=1)) for c in (inside, outside))
        self.time = nn.Linear(clock, outside)
        self.shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.first(x) + self.time(F.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.second(h)


class Attention(nn.Module):
    """Self-attention over positions, one head for 64 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.mixed, self.out, self.heads = nn.GroupNorm(8, channels), nn.Linear(channels, 3 * channels), nn.Linear(channels, channels), max(1, channels // 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).mT
        q, k, v = self.mixed(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(found).mT.view(x.shape)


class UNet(nn.Module):
    """A UNet in plain torch: ``blocks`` residual blocks on each level of ``widths`` channels, attention on the ``attended`` levels and in the middle."""

    def __init__(self, colours: int = 3, widths: tuple[int, ...] = (32, 64), blocks: int = 1, attended: tuple[int, ...] = ()) -> None:
        super().__init__()
        clock = 4 * widths[0]
        self.told, self.clock = widths[0], nn.Sequential(nn.Linear(widths[0], clock), nn.SiLU(), nn.Linear(clock, clock))
        self.into = nn.Conv2d(colours, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        held, now = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.down.append(Level(Residual(now, width, clock), Attention(width) if level in attended else None))
                now = width
                held.append(now)
            if level < len(widths) - 1:
                self.down.append(nn.Conv2d(now, now, 3, 2, 1))
                held.append(now)
        self.middle = nn.ModuleList([Residual(now, now, clock), Attention(now), Residual(now, now, clock)])
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(Level(Residual(now + held.pop(), width, clock), Attention(width) if level in attended else None))
                now = width
            if level:
                self.up.append(nn.Conv2d(now, now, 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(8, now), nn.SiLU(), nn.Conv2d(now, colours, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time, h = self.clock(waves(t, self.told)), self.into(x)
        held = [h]
        for part in self.down:
            h = part(h, time) if isinstance(part, Level) else part(h)
            held.append(h)
        first, attention, last = self.middle
        h = last(attention(first(h, time)), time)
        for part in self.up:
            h = part(torch.cat([h, held.pop()], 1), time) if isinstance(part, Level) else part(F.interpolate(h, scale_factor=2.0))
        return self.out(h)


class Level(nn.Module):
    """A residual block, with attention after it where there is any."""

    def __init__(self, residual: Residual, attention: Attention | None) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.residual(x, time)
        return h if self.attention is None else self.attention(h)


@dataclass(frozen=True)
class Network:
    """``build()`` makes the denoiser of images of this ``shape``."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def cifar() -> UNet:
    """Of the shape and size that Ho et al. 2020 used for CIFAR-10: 128 to 256 channels, two blocks on each of four levels, attention at 16 x 16."""
    return UNet(3, (128, 256, 256, 256), 2, (1,))


def networks(tiny: bool = False) -> dict[str, Network]:
    """By name; diffusers' only where it is installed."""
    if tiny:
        return {"MLP": Network(lambda: MLP(16, 8, 1, 8), (16,)), "UNet": Network(lambda: UNet(1, (8, 8)), (1, 4, 4)), **diffusers(8, (8, 8), 4)}
    found = {
        "MLP, 64 pixels": Network(lambda: MLP(64, 128, 2, 32), (64,)),
        "MLP, 784 pixels": Network(lambda: MLP(784, 512), (784,)),
        "UNet, 16 x 16": Network(lambda: UNet(3, (32, 64)), (3, 16, 16)),
        "UNet, 32 x 32": Network(lambda: UNet(3, (32, 64, 64)), (3, 32, 32)),
    }
    return {**found, **diffusers(32, (32, 64), 16)}


def diffusers(groups: int, widths: tuple[int, ...], side: int) -> dict[str, Network]:
    """UNet2DModel with attention on its inner level."""
    try:
        from diffusers import UNet2DModel
    except ImportError:
        return {}
    settings: dict[str, Any] = {
        "sample_size": side, "block_out_channels": widths, "layers_per_block": 1, "norm_num_groups": min(groups, 8), "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return {f"diffusers UNet2DModel, {side} x {side}": Network(lambda: UNet2DModel(**settings), (3, side, side))}
