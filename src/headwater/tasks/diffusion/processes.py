"""Noise processes: how an image is mixed with noise at each timestep, and what the network is told and asked for.

    x_t = signal_t x_0 + noise_t eps,        eps ~ N(0, I)

Denoising diffusion (Ho et al. 2020, arXiv 2006.11239): ``signal = sqrt(abar_t)``, ``noise = sqrt(1 - abar_t)``; flow matching (Lipman et al.
2022, arXiv 2210.02747; Esser et al. 2024, arXiv 2403.03206): ``signal = 1 - s``, ``noise = s``. Both are tables over the timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.errors import InputError, TaskError
from headwater.tasks.batches import hash_of
from headwater.tasks.diffusion.densities import Density, density_table, relative

PREDICTIONS = ("epsilon", "v", "sample", "flow")
DIFFUSION, FLOW = "diffusion", "flow"


@dataclass(frozen=True, eq=False)
class Process:
    """Tables over timesteps, float64 (T,): ``signal``, ``noise``, and ``time``, which the network is given (as whole numbers where the table
    holds integers). Write your own for a process that no function here makes: a variance-exploding one has ``signal`` 1, say.

    ``kind``: "diffusion" or "flow". ``prediction``: what the network answers with, where the process says so. ``density``: how often
    training meets each timestep, kept relative to the mean, (T,); None where it draws them uniformly. ``offset``: what training added to the
    noise, as a multiple of one standard normal number for each channel (noise_offset of diffusers' scripts).

    >>> exploding = Process("diffusion", torch.ones(3), torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0.1, 1.0, 10.0]), "epsilon")
    >>> exploding.steps, exploding.snr
    (3, tensor([1.0000e+02, 1.0000e+00, 1.0000e-02]))
    """

    kind: str
    signal: Tensor
    noise: Tensor
    time: Tensor
    prediction: str | None = None
    density: Tensor | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in (DIFFUSION, FLOW) or self.prediction not in (None, *PREDICTIONS):
            raise InputError(
                f"a process of kind {self.kind!r} and prediction {self.prediction!r}", f"{DIFFUSION!r} or {FLOW!r}, and one of {PREDICTIONS}", "see hw.tasks.cosine()"
            )
        for name in ("signal", "noise", "time"):
            table = getattr(self, name)
            if table.shape != self.signal.shape or table.ndim != 1 or not len(table) or not torch.isfinite(table).all():
                raise InputError(f"a process whose {name} has shape {tuple(table.shape)}", f"finite numbers of shape {tuple(self.signal.shape)}", "one value a timestep")
        if (self.signal < 0).any() or (self.noise < 0).any():
            raise InputError("a process with negative signal or noise", "both at least 0", "x_t = signal x + noise eps")
        if not 0 <= self.offset < math.inf:
            raise InputError(f"a noise offset of {self.offset}", "at least 0", "0.05 to 0.1 is what is used")
        if self.density is not None:
            object.__setattr__(self, "density", relative(self.density.double(), len(self.signal)))

    @property
    def steps(self) -> int:
        """How many timesteps there are."""
        return len(self.signal)

    @property
    def digest(self) -> str:
        """Names the tables."""
        return hash_of((self.kind, self.signal, self.noise, self.time, self.density, self.offset))

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio ``(signal / noise)^2``, (T,)."""
        return (self.signal / self.noise).square()

    @property
    def bound(self) -> Tensor:
        """The weight of the squared error of x at each timestep in the variational bound, ``T (snr_{t-1} - snr_t) / 2`` (Kingma et al. 2021,
        arXiv 2107.00630, Eq. 13), 0 at the first; (T,). The mean over all timesteps is then the bound's sum of KL divergences."""
        snr = self.snr
        return self.steps / 2 * torch.cat([torch.zeros(1, dtype=snr.dtype), snr[:-1] - snr[1:]])

    def target(self, prediction: str, x: Tensor, eps: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """What the network should answer with at ``x_t``, in the shape of x: eps, ``signal eps - noise x`` (v, Salimans & Ho 2022, arXiv
        2202.00512), x (sample), or ``eps - x`` (flow)."""
        if prediction == "epsilon":
            return eps
        if prediction == "v":
            return signal * eps - noise * x
        return x if prediction == "sample" else eps - x

    def clean(self, prediction: str, out: Tensor, x_t: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
        """The image x that an answer ``out`` at ``x_t`` amounts to."""
        if prediction == "epsilon":
            return (x_t - noise * out) / signal
        if prediction == "v":
            return (signal * x_t - noise * out) / (signal.square() + noise.square())
        return out if prediction == "sample" else (x_t - noise * out) / (signal + noise)

    def strata(self, count: int, *, evenly: bool = False) -> tuple[int, ...]:
        """``count`` timesteps that stand for all: evenly spaced from 1 to the last (Xie et al. 2024), all where there are not more, or the middles of
        ``count`` equally likely strata where training does not draw them uniformly (unless ``evenly``).

        >>> linear(100).strata(4), flow(100, density="logit-normal").strata(4)
        ((1, 33, 66, 99), (24, 42, 57, 75))
        """
        if count < 1:
            raise InputError(f"{count} timesteps", "at least 1", "10 is a good start")
        if self.density is None or evenly:
            if count >= self.steps:
                return tuple(range(self.steps))
            spaced = torch.linspace(1, self.steps - 1, count, dtype=torch.float64) if count > 1 else torch.tensor([self.steps / 2])
            return tuple(int(t) for t in spaced)
        levels = self.density.cumsum(0) / self.density.sum()
        middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return tuple(int(t) for t in torch.searchsorted(levels, middles).clamp_max(self.steps - 1))


def from_betas(betas: Tensor | Sequence[float], prediction: str | None = None) -> Process:
    """The process of variances ``betas`` (T,): ``abar = cumprod(1 - beta)``. Raises InputError for variances outside 0..1.

    >>> from_betas([0.1, 0.2]).signal.square()
    tensor([0.9000, 0.7200], dtype=torch.float64)
    """
    beta = torch.as_tensor(betas, dtype=torch.float64)
    return from_kept(torch.cumprod(1 - beta, 0), prediction)


def from_kept(kept: Tensor, prediction: str | None = None) -> Process:
    """The process that keeps the share ``abar`` (T,) of an image's variance at each timestep. Raises InputError unless these fall within 0..1."""
    kept = torch.as_tensor(kept, dtype=torch.float64).cpu()
    if kept.ndim != 1 or not len(kept) or not ((kept >= 0) & (kept <= 1)).all() or (kept.diff() > 0).any():
        raise InputError(
            f"a schedule whose cumulated 1 - beta has shape {tuple(kept.shape)}, and is not falling within 0..1", "variances beta from 0 to 1", "check betas="
        )
    return Process(DIFFUSION, kept.sqrt(), (1 - kept).sqrt(), torch.arange(len(kept)), prediction)


def cosine(steps: int = 1000, prediction: str | None = "epsilon") -> Process:
    """The cosine schedule (Nichol & Dhariwal 2021, arXiv 2102.09672, Eq. 17).

    >>> round(float(cosine().signal[500]), 3)
    0.702
    """

    def level(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return from_betas([min(1 - level((i + 1) / steps) / level(i / steps), 0.999) for i in range(steps)], prediction)


def linear(steps: int = 1000, start: float = 1e-4, stop: float = 0.02, prediction: str | None = "epsilon") -> Process:
    """Variances from ``start`` to ``stop`` (Ho et al. 2020).

    >>> linear().steps
    1000
    """
    return from_betas(torch.linspace(start, stop, steps, dtype=torch.float64), prediction)


def flow(steps: int = 1000, shift: float = 1.0, density: Density = "uniform") -> Process:
    """Flow matching: timestep t has level ``s = (t + 1) / steps``, ``x_s = (1 - s) x + s eps``, and the network is given ``steps * s``.

    Args:
        shift: levels become ``shift s / (1 + (shift - 1) s)`` (Esser et al. 2024, Eq. 23).
        density: how training draws levels, before the shift: "uniform", "logit-normal", "mode", "cosmap" (Esser et al. 2024, section 3.1), one
            of :mod:`headwater.tasks.diffusion.densities` with its numbers (``LogitNormal(mean=0.5)``), any cumulative distribution function
            over 0..1, or a table (steps,).

    >>> process = flow(4)
    >>> process.noise, process.time
    (tensor([0.2500, 0.5000, 0.7500, 1.0000], dtype=torch.float64), tensor([1., 2., 3., 4.], dtype=torch.float64))
    """
    s = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    s = shift * s / (1 + (shift - 1) * s)
    return Process(FLOW, 1 - s, s, steps * s, "flow", density_table(density, steps))


def process_of(scheduler: Any) -> Process:
    """The process that a scheduler stands for: one of this module's, or a scheduler of diffusers, with the scale that its networks are
    trained at. Raises TaskError for those whose scale is another."""
    if isinstance(scheduler, Process):
        return scheduler
    from headwater.tasks.diffusion.schedulers import process_of_scheduler

    return process_of_scheduler(scheduler)


def prediction_of(process: Process, given: str | None) -> str:
    """What the network predicts: as given, or as the process says. Raises TaskError where neither does, or they disagree."""
    if given is not None and given not in PREDICTIONS:
        raise TaskError(f"prediction={given!r}", f"one of {PREDICTIONS}", "say what the network was trained to answer with")
    if given is None and process.prediction is None:
        raise TaskError("a prediction type that is declared nowhere", f"prediction= one of {PREDICTIONS}", "say what the network was trained to answer with")
    if given is not None and process.prediction is not None and given != process.prediction:
        raise TaskError(
            f"prediction={given!r} with a scheduler whose prediction type is {process.prediction!r}",
            "what the network was trained with, the same in both",
            "leave prediction= out to take the scheduler's, or mend the scheduler's config",
        )
    prediction = given or process.prediction
    assert prediction is not None
    if (prediction == "flow") != (process.kind == FLOW):
        raise TaskError(
            f"prediction={prediction!r} on a process of kind {process.kind!r}",
            "'flow' for flow matching alone; 'epsilon', 'v' or 'sample' for diffusion",
            "pass the scheduler that the network was trained with",
        )
    return prediction
