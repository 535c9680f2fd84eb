"""A small UNet for pictures of 32 x 32 pixels, told a timestep and a category: 530 thousand parameters in the demo's size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

TOGETHER = 8  # channels that a GroupNorm normalises together; alone, it would undo what the embedding adds to each
WAVES = 32  # sines, and as many cosines, that a timestep is told by


class Block(nn.Module):
    """Two convolutions around what the embedding adds, beside a shortcut (Ho et al. 2020, arXiv 2006.11239, appendix B, without dropout)."""

    def __init__(self, wide: int, out: int, embedded: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(wide // TOGETHER, wide), nn.SiLU(), nn.Conv2d(wide, out, 3, padding=1))
        self.told = nn.Linear(embedded, out)
        last = nn.Conv2d(out, out, 3, padding=1)
        nn.init.zeros_(last.weight)  # every block begins as its shortcut
        self.second = nn.Sequential(nn.GroupNorm(out // TOGETHER, out), nn.SiLU(), last)
        self.shortcut = nn.Conv2d(wide, out, 1) if wide != out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.first(x) + self.told(embedding)[:, :, None, None]
        return self.shortcut(x) + self.second(h)


class UNet(nn.Module):
    """``(x (n, 3, 32, 32), t (n,), category (n,)) -> (n, 3, 32, 32)``.

    Args:
        categories: how many; one more number stands for "any".
        widths: channels at 16, 8 and 4 pixels a side, multiples of 8.

    Each 2 x 2 pixels are read as one with four times the channels, so that the widest maps are of 16 x 16: four times as cheap on a CPU, and
    pictures of flat colours lose little by it.
    """

    def __init__(self, categories: int, widths: tuple[int, int, int] = (32, 64, 64), embedded: int = 128) -> None:
        super().__init__()
        a, b, c = widths
        self.time = nn.Linear(2 * WAVES, embedded)
        self.category = nn.Embedding(categories + 1, embedded)
        self.mixed = nn.Linear(embedded, embedded)
        self.enter = nn.Conv2d(12, a, 3, padding=1)
        self.down16, self.half16 = Block(a, a, embedded), nn.Conv2d(a, b, 3, stride=2, padding=1)
        self.down8, self.half8 = Block(b, b, embedded), nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.middle1, self.middle2 = Block(c, c, embedded), Block(c, c, embedded)
        self.up8, self.up16 = Block(c + b, b, embedded), Block(b + a, a, embedded)
        last = nn.Conv2d(a, 12, 3, padding=1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.leave = nn.Sequential(nn.GroupNorm(a // TOGETHER, a), nn.SiLU(), last)

    def forward(self, x: Tensor, t: Tensor, category: Tensor) -> Tensor:
        told = self.time(waves(t).to(x.dtype)) + self.category(category)
        told = functional.silu(self.mixed(functional.silu(told)))
        at16 = self.down16(self.enter(functional.pixel_unshuffle(x, 2)), told)
        at8 = self.down8(self.half16(at16), told)
        h = self.middle2(self.middle1(self.half8(at8), told), told)
        h = self.up8(torch.cat([_twice(h), at8], 1), told)
        h = self.up16(torch.cat([_twice(h), at16], 1), told)
        return functional.pixel_shuffle(self.leave(h), 2)


def waves(t: Tensor) -> Tensor:
    """Timesteps as sines and cosines of falling frequency (n, 64)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(WAVES, device=t.device) / WAVES)
    angles = t.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def _twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")
