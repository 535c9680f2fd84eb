"""The training that the diffusion demo looks into: a small class-conditional UNet on emoji of three categories."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from headwater import data
from headwater.demo.diffusion.unet import UNet
from headwater.tasks.diffusion import Diffusion, cosine
from headwater.training import Experiment

CATEGORIES = ("Smileys & Emotion", "Flags", "Symbols")
ANY = len(CATEGORIES)  # the number that stands for no category in particular
WARM = 100  # steps until the learning rate is full
TASK = Diffusion(cosine(prediction="v"), drop=0.1, null=ANY)


@dataclass(frozen=True)
class Size:
    """How much the demo does.

    Args:
        train: how many emoji are trained on; None: all of the three categories.
        epochs, batch, rate, widths, checkpoints: the training.
        each: pictures generated of each category. steps, guidance: of the sampler.
        timesteps: noise events of each emoji and query, at each checkpoint.
        traced: training emoji that are asked about too, to see whether they are traced to themselves.
        probed: emoji whose gradients are measured along timesteps. along: at how many.
        shown: generations at the top of the page.
        threads: of torch; always as many, so that figures do not depend on the machine.
    """

    train: int | None = None
    epochs: int = 166
    batch: int = 32
    rate: float = 2e-3
    widths: tuple[int, int, int] = (32, 64, 64)
    checkpoints: int = 4
    each: int = 8
    steps: int = 50
    guidance: float = 2.5
    timesteps: int = 8
    traced: int = 8
    probed: int = 48
    along: int = 20
    shown: int = 6
    threads: int = 2

    @property
    def made(self) -> int:
        """Pictures generated in all."""
        return self.each * len(CATEGORIES)


FULL = Size()
QUICK = Size(train=60, epochs=8, batch=20, rate=0.02, widths=(8, 8, 8), checkpoints=2, each=2, steps=6, timesteps=3, traced=6, probed=6, along=4, shown=2, threads=1)


def emoji(size: Size) -> tuple[Tensor, Tensor]:
    """The emoji trained on, (n, 3, 32, 32) from -1 to 1, and their categories (n,)."""
    images, labels = data.emoji(CATEGORIES)
    return 2 * images[: size.train] - 1, labels[: size.train]


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(widths: tuple[int, int, int]) -> nn.Module:
    """The network, untrained."""
    return UNet(len(CATEGORIES), widths).to(device()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fit(model: nn.Module, train: tuple[Tensor, Tensor], seed: int, recorder: Any = None, *, epochs: int, batch: int, rate: float) -> nn.Module:
    """Adam, whose learning rate rises over the first steps and falls to zero along a cosine: the last weights need no averaging to sample from."""
    images, labels = (column.to(device()) for column in train)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(labels) // batch)
    optimizer = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM) * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
    if recorder is not None:
        recorder.watch(model, optimizer, steps=steps)
    with tqdm(total=steps, desc="train", unit=" steps", file=sys.stderr, leave=False, mininterval=0.5, disable=recorder is None) as bar:
        for _ in range(epochs):
            for ids in torch.randperm(len(labels), generator=generator).split(batch):
                events = TASK.draw(len(ids), generator)
                drawn = TASK.noised((images[ids], labels[ids]), events)
                loss = TASK.loss(model, drawn).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                if recorder is not None:
                    recorder.step(ids, events=events)
    return model


def experiment(size: Size) -> Experiment:
    """The experiment of the demo. The queries are not in it: the model makes them."""
    train = emoji(size)
    return Experiment(partial(build, size.widths), train, train, TASK, partial(fit, epochs=size.epochs, batch=size.batch, rate=size.rate), "emoji")
