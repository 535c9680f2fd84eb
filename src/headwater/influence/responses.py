"""Spectral responses: functions of curvature's eigenvalues, all in one place so that their limits are neighbours.

A training score is ``-< phi(H) grad measure(query), grad loss(example) > / N``; a method is a choice of phi (and, where training
went on after the example was seen, of psi, which carries the query back through it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.linalg import Response


def constant(value: float) -> Response:
    """``phi(s) = value``: Grad-Dot (1) and TracIn (the summed learning rate)."""
    return lambda s: torch.full_like(s, value)


def damped_inverse(damping: float) -> Response:
    """``phi(s) = 1 / (s + damping)``: influence functions."""
    return lambda s: 1.0 / (s + damping)


def accumulated(time: float) -> Response:
    """``phi(s) = (1 - exp(-t s)) / s``, equal to t at s = 0: what training of total rate ``t`` makes of a constant push.

    SOURCE's ``F_r`` (Bae et al. 2024, arXiv 2405.12186, Eqs. 20-21). ``-expm1(-x)/x`` keeps full precision where
    ``(1 - exp(-x))/x`` loses it (wrong by 19 % at x = 1e-7 in float32).
    """

    def phi(s: Tensor) -> Tensor:
        x = time * s
        safe = torch.where(x == 0, torch.ones_like(x), x)
        return time * torch.where(x == 0, torch.ones_like(x), -torch.expm1(-safe) / safe)

    return phi


def surviving(time: float) -> Response:
    """``psi(s) = exp(-t s)``: what is left of a change after further training of total rate ``t``. SOURCE's ``F_S`` (Eqs. 16, 21)."""
    return lambda s: torch.exp(-time * s)
