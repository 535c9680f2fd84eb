"""The training that the demo looks into: a small convolutional network, five epochs on 2,000 digits of which 5 % carry a wrong label."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headwater import data
from headwater.tasks import Classification
from headwater.training import Experiment

TASK = Classification()
FLIPPED = 0.05  # of the training labels
NOISE_SEED = 1  # which labels are flipped, and to what


@dataclass(frozen=True)
class Size:
    """How much the demo does.

    Args:
        train, epochs, batch: the training.
        chosen_on, reported_on: how many test digits Influence's damping is chosen on, and how many others the figures are reported on.
        subsets, seeds: how many half-subsets are retrained, each with how many seeds.
        shown: how many test digits appear on the page.
    """

    train: int = 2000
    epochs: int = 5
    batch: int = 50
    chosen_on: int = 50
    reported_on: int = 100
    subsets: int = 40
    seeds: int = 4
    shown: int = 12

    @property
    def queries(self) -> int:
        """Test digits in all."""
        return self.chosen_on + self.reported_on


FULL = Size()
QUICK = Size(train=400, epochs=15, batch=25, chosen_on=20, reported_on=40, subsets=6, seeds=2)


@dataclass(frozen=True, eq=False)
class Digits:
    """The demo's data. ``train``: images and the labels given in training; ``truth``: the right ones; ``flipped``: where they differ.
    ``test``: every digit that is not trained on; its first ``Size.queries`` are the queries."""

    train: tuple[Tensor, Tensor]
    truth: Tensor
    flipped: Tensor
    test: tuple[Tensor, Tensor]


def digits(size: Size) -> Digits:
    """The vendored digits, cut in two, with some training labels flipped."""
    (images, truth), test = data.split(data.mnist(), train=size.train)
    given, flipped = data.flip_labels(truth, fraction=FLIPPED, seed=NOISE_SEED)
    return Digits((images, given), truth, flipped, test)


def build() -> nn.Module:
    """26,826 parameters: two convolutions, two linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel_size=5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def fit(model: nn.Module, train: tuple[Tensor, Tensor], seed: int, recorder: Any = None, *, epochs: int, batch: int) -> nn.Module:
    """SGD with momentum, weight decay and a cosine schedule; stopped long before convergence."""
    images, labels = train
    order = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(labels) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if recorder is not None:
        recorder.watch(model, optimizer, steps=steps)
    for _ in range(epochs):
        for indices in torch.randperm(len(labels), generator=order).split(batch):
            loss = TASK.loss(model, (images[indices], labels[indices])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if recorder is not None:
                recorder.step(indices)
    return model


def minus_loss(model: nn.Module, batch: Any) -> Tensor:
    """What self-influence asks of each training example: how much did its own presence lower its own loss?"""
    return -TASK.loss(model, batch)


def experiment(size: Size) -> Experiment:
    """The experiment of the demo. It is made of functions of this module, so that worker processes can import it."""
    found = digits(size)
    queries = (found.test[0][: size.queries], found.test[1][: size.queries])
    return Experiment(build, found.train, queries, TASK, partial(fit, epochs=size.epochs, batch=size.batch), "digits")
