"""What training minimised: the error of an answer, and how it weighs timesteps.

Errors of a residual r, each the mean over its d elements, with threshold c = ``delta``:

    l2             r^2
    l1             |r|
    huber          r^2 / 2 where |r| <= c, else c (|r| - c / 2)       as torch.nn.functional.huber_loss
    pseudo-huber   2 c (sqrt(r^2 + c^2) - c)                          as loss_type="huber" with huber_c = c in the scripts of diffusers
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headwater.errors import InputError, TaskError
from headwater.tasks.diffusion.processes import FLOW, Process

LOSSES = ("l2", "l1", "huber", "pseudo-huber")


def error_of(kind: str, r: Tensor, delta: float) -> Tensor:
    """The mean error of each row of residuals (n, d), shape (n,)."""
    if kind == "l2":
        return r.square().mean(1)
    if kind == "l1":
        return r.abs().mean(1)
    if kind == "huber":
        return F.huber_loss(r, torch.zeros_like(r), delta=delta, reduction="none").mean(1)
    return (2 * delta * ((r.square() + delta**2).sqrt() - delta)).mean(1)


def curvature_of(kind: str, r: Tensor, delta: float) -> Tensor:
    """The second derivative of that mean by each element of the answer, shape (n, d). The absolute error has none: its place takes the
    Fisher information of the Laplace distribution whose negative log-likelihood it is, 1 / d^2."""
    d = r.shape[1]
    if kind == "l2":
        return torch.full_like(r, 2 / d)
    if kind == "l1":
        return torch.full_like(r, 1 / d**2)
    if kind == "huber":
        return (r.abs() <= delta).to(r) / d
    return 2 * delta**3 / (r.square() + delta**2) ** 1.5 / d


@dataclass(frozen=True)
class MinSNR:
    """Weights ``min(snr, gamma) / snr`` for a network that predicts epsilon, ``/ (snr + 1)`` for v, and ``min(snr, gamma)`` for sample (Hang et
    al. 2023, arXiv 2303.09556). 1 where nothing is left of the image.

    >>> from headwater.tasks import linear
    >>> MinSNR(gamma=5.0)(linear(3, 0.1, 0.9), "epsilon").round(decimals=3)
    tensor([0.5560, 1.0000, 1.0000], dtype=torch.float64)
    """

    gamma: float = 5.0

    def __call__(self, process: Process, prediction: str) -> Tensor:
        if process.kind == FLOW:
            raise TaskError(f"{self} for flow matching", "'sigma-sqrt', 'cosmap', None or a function of the timesteps", "min-snr weighs diffusion's timesteps")
        snr = process.snr
        capped = snr.clamp_max(self.gamma)
        if prediction == "epsilon":
            return torch.where(snr > self.gamma, self.gamma / snr, 1.0)
        return capped / (snr + 1) if prediction == "v" else capped


def _sigma_sqrt(process: Process, prediction: str) -> Tensor:
    return process.noise.pow(-2)


def _cosmap(process: Process, prediction: str) -> Tensor:
    return 2 / (math.pi * (1 - 2 * process.noise + 2 * process.noise.square()))


_NAMED: dict[str, Callable[[Process, str], Tensor]] = {"min-snr": MinSNR(), "sigma-sqrt": _sigma_sqrt, "cosmap": _cosmap}
Weighting = str | MinSNR | Callable[[Tensor], Tensor] | None


def weights_of(weighting: Weighting, process: Process, prediction: str) -> Tensor:
    """w(t) of each timestep, float64 (T,). Raises TaskError for a weighting that is none."""
    steps = torch.arange(process.steps, dtype=torch.float64)
    if weighting is None:
        return torch.ones_like(steps)
    if isinstance(weighting, str):
        if weighting not in _NAMED or (weighting != "min-snr" and process.kind != FLOW):
            expected = "None, 'min-snr' (diffusion), 'sigma-sqrt' or 'cosmap' (flow matching), MinSNR(gamma), or a function of the timesteps"
            raise TaskError(f"weighting={weighting!r} on a process of kind {process.kind!r}", expected, "see hw.tasks.Diffusion")
        return _NAMED[weighting](process, prediction)
    found = weighting(process, prediction) if isinstance(weighting, MinSNR) else torch.as_tensor(weighting(steps), dtype=torch.float64)
    if found.shape != steps.shape or bool((found < 0).any()) or not bool(torch.isfinite(found).all()):
        raise TaskError(f"a weighting that gives shape {tuple(found.shape)}", f"{len(steps)} finite numbers of at least 0", "weighting(timesteps) -> one weight each")
    return found


def checked(kind: str, delta: float) -> str:
    """The name of a loss. Raises InputError."""
    if kind not in LOSSES:
        raise TaskError(f"loss={kind!r}", f"one of {LOSSES}", "say what training minimised")
    if not (math.isfinite(delta) and delta > 0):
        raise InputError(f"delta={delta}", "a threshold above 0", "1.0 is torch's")
    return kind
