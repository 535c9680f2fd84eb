"""Spectral responses: functions of curvature's eigenvalues, all in one place so that their limits are neighbours.

A training score is ``-< phi(H) grad measure(query), grad loss(example) > / N``; a method is a choice of phi (and, where training
went on after the example was seen, of psi, which carries the query back through it). Each is a frozen value, so that two tables
with equal rows are equal, and saved work can be named by what it depends on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constant:
    """``phi(s) = value``: Grad-Dot (1) and TracIn (the summed learning rate)."""

    value: float

    def __call__(self, s: Tensor) -> Tensor:
        return torch.full_like(s, self.value)


@dataclass(frozen=True)
class DampedInverse:
    """``phi(s) = 1 / (s + damping)``: influence functions."""

    damping: float

    def __call__(self, s: Tensor) -> Tensor:
        return 1.0 / (s + self.damping)


@dataclass(frozen=True)
class Accumulated:
    """``phi(s) = (1 - exp(-t s)) / s``, equal to t at s = 0: what training of total rate ``t`` makes of a constant push.

    SOURCE's ``F_r`` (Bae et al. 2024, arXiv 2405.12186, Eqs. 20-21). ``-expm1(-x)/x`` keeps full precision where
    ``(1 - exp(-x))/x`` loses it (wrong by 19 % at x = 1e-7 in float32).
    """

    time: float

    def __call__(self, s: Tensor) -> Tensor:
        x = self.time * s
        safe = torch.where(x == 0, torch.ones_like(x), x)
        return self.time * torch.where(x == 0, torch.ones_like(x), -torch.expm1(-safe) / safe)


@dataclass(frozen=True)
class Surviving:
    """``psi(s) = exp(-t s)``: what is left of a change after further training of total rate ``t``. SOURCE's ``F_S`` (Eqs. 16, 21)."""

    time: float

    def __call__(self, s: Tensor) -> Tensor:
        return torch.exp(-self.time * s)
