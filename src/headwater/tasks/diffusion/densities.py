"""How often training meets each noise level: densities over the levels of flow matching (Esser et al. 2024, arXiv 2403.03206, section 3.1).

A density is given by its cumulative distribution function over levels s in 0..1 (0: the image, 1: noise alone), before any shift of the
levels. A table of T timesteps then has exactly the probabilities with which training draws them as ``floor(s * T)``.

The scripts of diffusers draw u by ``compute_density_for_timestep_sampling`` and look it up in a table that *descends* from noise, so their
level is 1 - u: their ``logit_mean=m`` is ``LogitNormal(mean=-m)`` here. Modes and the standard logit-normal are symmetric, so the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.errors import InputError

Density = str | Callable[[Tensor], Tensor] | Tensor | None
"""A name, a cumulative distribution function, weights of the timesteps (T,), or None where all are as likely."""
_HALVINGS = 60


@dataclass(frozen=True)
class LogitNormal:
    """Levels whose logit is normal: ``s = 1 / (1 + exp(-z))``, z normal of this ``mean`` (above 0: towards noise) and ``std``.

    >>> LogitNormal()(torch.tensor([0.5]))
    tensor([0.5000])
    """

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, levels: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(levels) - self.mean) / self.std)


@dataclass(frozen=True)
class Mode:
    """Levels ``s = 1 - u - scale (cos(pi u / 2)^2 - 1 + u)``, u uniform (Esser et al. 2024, Eq. 20); ``scale`` from -1 to 2/(pi - 2), 1.29 in theirs."""

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise InputError(f"Mode(scale={self.scale})", "from -1 to 2/(pi - 2): beyond, levels do not fall with u", "1.29 is the paper's")

    def __call__(self, levels: Tensor) -> Tensor:
        low, high = torch.zeros_like(levels), torch.ones_like(levels)
        for _ in range(_HALVINGS):  # the level falls with u: halve the interval where it is met
            u = (low + high) / 2
            above = 1 - u - self.scale * (torch.cos(math.pi * u / 2).square() - 1 + u) > levels
            low, high = torch.where(above, u, low), torch.where(above, high, u)
        return 1 - (low + high) / 2


@dataclass(frozen=True)
class CosMap:
    """Levels as common as under the cosine schedule: density ``2 / (pi - 2 pi s + 2 pi s^2)`` (Esser et al. 2024, Eq. 21).

    >>> CosMap()(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    def __call__(self, levels: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan2(levels, 1 - levels)


NAMED: dict[str, Callable[[Tensor], Tensor] | None] = {"uniform": None, "logit-normal": LogitNormal(), "mode": Mode(), "cosmap": CosMap()}


def density_table(density: Density, steps: int) -> Tensor | None:
    """How often each of ``steps`` timesteps is met, relative to the mean, float64 (steps,); None for uniform. Raises InputError."""
    if isinstance(density, str):
        if density not in NAMED:
            raise InputError(f"density={density!r}", f"one of {[*NAMED]}, a cumulative distribution function, or a table", "see headwater.tasks.diffusion.densities")
        return density_table(NAMED[density], steps)
    if density is None:
        return None
    if isinstance(density, Tensor):
        return relative(density.double(), steps)
    edges = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return relative(torch.as_tensor(density(edges), dtype=torch.float64).diff(), steps)


def relative(weights: Tensor, steps: int) -> Tensor:
    """Weights of the timesteps relative to their mean. Raises InputError for what is no density over ``steps`` timesteps."""
    if weights.shape != (steps,) or not torch.isfinite(weights).all() or (weights < 0).any() or weights.sum() <= 0:
        raise InputError(
            f"a density of timesteps of shape {tuple(weights.shape)}, from {float(weights.min()):g} to {float(weights.max()):g}",
            f"finite numbers of at least 0, not all 0, of shape ({steps},)",
            "one weight a timestep, or a distribution function that rises from 0 at level 0 to 1 at level 1",
        )
    return weights / weights.mean()
