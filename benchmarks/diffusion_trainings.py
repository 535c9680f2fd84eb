"""The trainings of the diffusion evidence: an MLP that denoises 8x8 digits, under three noise schedules and losses.

Kept banks are named by the code that trained them: an edit of the network or of ``fit`` makes them anew.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import headwater as hw
from headwater.tasks.batches import take
from headwater.tasks.diffusion import Draw, Process

PIXELS = 64
SETTINGS: dict[str, tuple[str, str]] = {"cosine, MSE": ("cosine", "l2"), "linear, MSE": ("linear", "l2"), "cosine, L1": ("cosine", "l1")}
GENERATING = 7000  # seeds of generated images begin here


class Denoiser(nn.Module):
    """Noised pixels (n, 64) and timesteps (n,) to the noise in them: two residual layers of SiLU, told the time by sines and cosines.

    18,752 parameters at width 64, 53,824 at 128.
    """

    def __init__(self, width: int = 64, waves: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequency", torch.exp(torch.arange(waves) * (-math.log(1e4) / waves)), persistent=False)
        self.clock, self.into = nn.Linear(2 * waves, width), nn.Linear(PIXELS, width)
        self.first, self.second, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, PIXELS)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t.to(x.dtype).unsqueeze(1) * self.frequency
        time = self.act(self.clock(torch.cat([angle.sin(), angle.cos()], 1)))
        h = self.act(self.into(x) + time)
        h = h + self.act(self.first(h))
        h = h + self.act(self.second(h) + time)
        return self.out(h)


@dataclass(frozen=True)
class Training:
    """One training: which schedule and loss, how many images, how long.

    ``common``, ``foreign``: zeros and ones, and sevens among them. ``checkpoints``: recorded ones, evenly spaced. ``window``: how many events
    before each of them replaying methods may take.
    """

    setting: str = "cosine, MSE"
    width: int = 64
    common: int = 170
    foreign: int = 10
    epochs: int = 300
    batch: int = 30
    rate: float = 1e-3
    checkpoints: int = 5
    window: int = 20

    @property
    def size(self) -> int:
        return self.common + self.foreign

    @property
    def process(self) -> Process:
        return {"cosine": hw.tasks.cosine, "linear": hw.tasks.linear}[SETTINGS[self.setting][0]]()

    def task(self, timesteps: int = 10, draws: int = 2, seed: int = 0) -> hw.tasks.Diffusion:
        """Its task, with so many expected events."""
        return hw.tasks.Diffusion(self.process, loss=SETTINGS[self.setting][1], timesteps=timesteps, draws=draws, seed=seed)

    def experiment(self, queries: Tensor | None = None, task: hw.tasks.Diffusion | None = None) -> hw.Experiment:
        data = digits(self.common, self.foreign)
        task = task or self.task()
        return hw.Experiment(
            partial(Denoiser, self.width), data.train, data.rest[:1] if queries is None else queries, task,
            partial(fit, task=self.task(), epochs=self.epochs, batch=self.batch, rate=self.rate), f"digits, {self.setting}",
        )  # fmt: skip

    def record(self, path: Path, seed: int) -> hw.Run:
        """The run at ``path``, recorded now if it is not there."""
        experiment, done = self.experiment(), path.with_suffix(".done")
        if not done.exists():
            experiment.record(path, seed=seed, checkpoints=self.checkpoints, overwrite=True)
            done.touch()
        return experiment.open(path)


def fit(
    model: nn.Module, train: Tensor, seed: int, recorder: hw.Recorder | None = None, *, task: hw.tasks.Diffusion, epochs: int, batch: int, rate: float
) -> nn.Module:
    """Adam. Epochs count: each image keeps its dose where others are left out. An epoch's events are drawn and its noise made at once, which
    takes half the time of doing so batch by batch. The seed was set by the caller."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    if recorder is not None:
        recorder.watch(model, optimizer, steps=epochs * math.ceil(len(train) / batch))
    for _ in range(epochs):
        order, events = torch.randperm(len(train)), task.draw(len(train))
        noised = task.noised(train[order], events)
        for rows in torch.arange(len(train)).split(batch):
            optimizer.zero_grad()
            task.loss(model, take(noised, rows)).mean().backward()
            optimizer.step()
            if recorder is not None:
                recorder.step(order[rows], events=Draw(events.t[rows], events.seeds[rows]))
    return model.eval()


# ------------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True, eq=False)
class Digits:
    """``train``: zeros and ones, then sevens (``foreign``: which rows). ``rest``: the other zeros and ones; ``sevens``: the other sevens."""

    train: Tensor
    foreign: np.ndarray
    rest: Tensor
    sevens: Tensor


@lru_cache
def digits(common: int, foreign: int) -> Digits:
    """The 8x8 digits of scikit-learn in -1..1."""
    from sklearn.datasets import load_digits

    held = load_digits()
    x = torch.tensor(held.data / 8 - 1, dtype=torch.float32)
    usual, odd = x[held.target < 2], x[held.target == 7]
    rows = np.arange(common + foreign) >= common
    return Digits(torch.cat([usual[:common], odd[:foreign]]), rows, usual[common:], odd[foreign:])


@torch.no_grad()
def generate(model: nn.Module, process: Process, seeds: range | list[int], watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """One image for each seed, (n, 64), by ancestral sampling over all timesteps (Ho et al. 2020, algorithm 2) with x_0 clipped to -1..1.
    An image's noise is its seed's alone, whatever else is generated. ``watch(t, clean)`` is told what x_0 is taken to be at each timestep."""
    sources = [torch.Generator().manual_seed(GENERATING + seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.cat([torch.randn(1, PIXELS, generator=source) for source in sources])

    kept = process.signal.square().tolist()
    x = noise()
    for t in reversed(range(process.steps)):
        now, before = kept[t], kept[t - 1] if t else 1.0
        beta = 1 - now / before
        clean = ((x - math.sqrt(1 - now) * model(x, torch.full((len(x),), t))) / math.sqrt(now)).clamp(-1, 1)
        if watch is not None:
            watch(t, clean)
        x = (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * x) / (1 - now)
        if t:
            x = x + math.sqrt(beta * (1 - before) / (1 - now)) * noise()
    return x


def slug(name: str) -> str:
    """A name as a file's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
