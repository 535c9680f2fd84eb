"""SOURCE against exact unrolling and real leave-one-out on a linear regression, small enough to train once for every example.

Loss ``(f - y)^2 / 2`` with ``f = x . theta``; step k on the batch b, with example weights w (all 1; 0 for an example that is left out,
while the batch keeps its size):

    v <- mu v + sum_{i in b} w_i (x_i . theta - y_i) x_i / |b| + decay theta,        theta <- theta - rate_k v

Unrolling differentiates these two lines with respect to every w_i; nothing is approximated.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import GradientMismatch
from headwater.influence import GradDot, Influence, Source, trace
from headwater.tasks import Regression
from headwater.training import Recorder, Run

FEATURES, QUERIES, EPOCH = 16, 30, 10  # EPOCH: steps that see every example of a stage once
TASK = Regression(scale=0.5)


def prediction(model: nn.Module, batch: Any) -> Tensor:
    """What is asked about: the model's answer itself."""
    return model(batch[0]).squeeze(-1)


def build() -> nn.Module:
    return nn.Linear(FEATURES, 1, bias=False).double()


@dataclass(frozen=True)
class Step:
    """One optimizer step: the examples of its batch, its learning rate, and whether it begins a stage (with a new optimizer)."""

    batch: Tensor
    rate: float
    begins: bool


@dataclass(frozen=True, eq=False)
class Case:
    """A training: ``stages``, each a number of epochs over examples of its own; SGD in batches.

    ``cosine``: the rate falls to 0 along a half cosine in each stage.
    """

    rate: float
    momentum: float = 0.0
    decay: float = 0.0
    cosine: bool = False
    stages: tuple[int, ...] = (20,)
    size: int = 100  # examples of each stage
    seed: int = field(default=0)

    @cached_property
    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets of all stages' examples, and the queries' inputs. Features differ in size, so that directions are learned at different speeds."""
        draw = torch.Generator().manual_seed(self.seed)
        count = self.size * len(self.stages)
        normal = torch.randn(count + QUERIES + 1, FEATURES, generator=draw, dtype=torch.float64)
        scale = 1.0 / torch.arange(1, FEATURES + 1, dtype=torch.float64)
        x, truth = normal[:-1] * scale, normal[-1]
        draws = torch.randn(count, 4, generator=draw, dtype=torch.float64)
        noise = 0.5 * draws[:, 0] / draws[:, 1:].square().mean(1).sqrt()  # Student's t with 3 degrees: some targets are far off, as in real data
        return x[:count], x[:count] @ truth + noise, x[count:]

    @cached_property
    def steps(self) -> list[Step]:
        """Every step of the training, in order."""
        draw = torch.Generator().manual_seed(self.seed + 1)
        found = []
        for stage, epochs in enumerate(self.stages):
            total = epochs * EPOCH
            orders = [stage * self.size + torch.randperm(self.size, generator=draw) for _ in range(epochs)]
            for k, batch in enumerate(batch for order in orders for batch in order.split(self.size // EPOCH)):
                fall = 0.5 * (1 + math.cos(math.pi * k / total)) if self.cosine else 1.0
                found.append(Step(batch, self.rate * fall, k == 0))
        return found

    def trained(self, weights: Tensor) -> Tensor:
        """Parameters (trainings, features) after training from zero with example weights (trainings, examples), by hand."""
        x, y, _ = self.data
        theta = torch.zeros(len(weights), FEATURES, dtype=torch.float64)
        velocity = torch.zeros_like(theta)
        for step in self.steps:
            b = step.batch
            gradient = ((theta @ x[b].T - y[b]) * weights[:, b]) @ x[b] / len(b) + self.decay * theta
            velocity = gradient + (0.0 if step.begins else self.momentum) * velocity
            theta = theta - step.rate * velocity
        return theta

    @cached_property
    def left_out(self) -> Tensor:
        """The true answer, (queries, examples): what training on each example changed, by training without it."""
        _, y, asked = self.data
        n = len(y)
        theta = self.trained(torch.cat([torch.ones(1, n), 1 - torch.eye(n)]).double())
        return asked @ (theta[0] - theta[1:]).T

    @cached_property
    def unrolled(self) -> Tensor:
        """The exact derivative of the answers by each example's weight, through every step, (queries, examples)."""
        x, y, asked = self.data
        theta, velocity = torch.zeros(FEATURES, dtype=torch.float64), torch.zeros(FEATURES, dtype=torch.float64)
        moved, pull = torch.zeros(FEATURES, len(y), dtype=torch.float64), torch.zeros(FEATURES, len(y), dtype=torch.float64)
        for step in self.steps:
            b, momentum = step.batch, 0.0 if step.begins else self.momentum
            errors = x[b] @ theta - y[b]
            own = torch.zeros_like(moved)
            own[:, b] = (errors.unsqueeze(1) * x[b]).T / len(b)
            pull = momentum * pull + x[b].T @ (x[b] @ moved) / len(b) + self.decay * moved + own
            velocity = momentum * velocity + x[b].T @ errors / len(b) + self.decay * theta
            moved, theta = moved - step.rate * pull, theta - step.rate * velocity
        return asked @ moved

    @cached_property
    def source(self) -> Tensor:
        """Headwater's answer, from a recorded training with torch's own optimizer, (queries, examples)."""
        with tempfile.TemporaryDirectory(prefix="headwater-doctor-") as place:
            run = self._recorded(f"{place}/run")
            found = trace(run, (self.data[2], torch.zeros(QUERIES, dtype=torch.float64)), Source(segments=3), measure=prediction, progress=False)
        return torch.from_numpy(found.values)

    def _recorded(self, path: str) -> Run:
        x, y, _ = self.data
        model = build()
        nn.init.zeros_(model.weight)  # type: ignore[arg-type]
        optimizer, recorder = self._optimizer(model), None
        for k, step in enumerate(self.steps):
            stage = k and sum(s.begins for s in self.steps[: k + 1]) - 1
            if step.begins:
                mine = slice(stage * self.size, (stage + 1) * self.size)
                optimizer = self._optimizer(model)
                told: dict[str, Any] = {"train": (x[mine], y[mine]), "steps": self.stages[stage] * EPOCH}
                if recorder is None:
                    recorder = Recorder(path, model, optimizer, task=TASK, checkpoints=6, **told)
                else:
                    recorder.stage(f"stage {stage + 1}", optimizer=optimizer, **told)
            optimizer.param_groups[0]["lr"] = step.rate
            optimizer.zero_grad()
            TASK.loss(model, (x[step.batch], y[step.batch])).mean().backward()
            optimizer.step()
            recorder.step(step.batch - stage * self.size)  # type: ignore[union-attr]
        self._same(model)
        return recorder.finish()  # type: ignore[union-attr]

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.rate, momentum=self.momentum, weight_decay=self.decay)

    def _same(self, model: nn.Module) -> None:
        """Truth and recording must be about the same training."""
        by_hand = self.trained(torch.ones(1, len(self.data[1]), dtype=torch.float64))
        gap = float((model.weight.detach() - by_hand).abs().max())  # type: ignore[operator]
        if gap > 1e-10:
            raise GradientMismatch(f"torch's SGD and the same steps by hand end {gap:.2g} apart", "equal weights", "report this with your version of torch")

    def against_unrolling(self) -> float:
        """Mean rank correlation over the queries."""
        return _spearman(self.source, self.unrolled)

    def against_leave_one_out(self) -> float:
        """Mean rank correlation over the queries."""
        return _spearman(self.source, self.left_out)

    def slope(self) -> float:
        """Least squares through 0: true change on SOURCE's."""
        return float((self.source * self.left_out).sum() / self.source.square().sum())


CASES: dict[str, Case] = {
    "SGD": Case(rate=0.05, stages=(30,)),
    "momentum, cosine, decay": Case(rate=0.02, momentum=0.9, decay=0.05, cosine=True, stages=(24,)),
    "two stages": Case(rate=0.1, stages=(16, 8)),
}


def long_training() -> float:
    """With endless training nothing of the damping is left: the largest relative difference to influence functions without any."""
    ours, theirs = _both(rate=1e9, method=Influence(damping=0.0))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def short_training() -> float:
    """With hardly any training curvature plays no part: the largest relative difference to Grad-Dot times the learning rate."""
    rate = 1e-9
    ours, theirs = _both(rate=rate, method=GradDot())
    return float(np.abs(ours - rate * theirs).max() / np.abs(rate * theirs).max())


def _both(rate: float, method: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores of SOURCE in one segment, for a single step of learning rate ``rate``, and of another method."""
    x, y, asked = CASES["SGD"].data
    model = build()
    with tempfile.TemporaryDirectory(prefix="headwater-doctor-") as place:
        run = Run.from_checkpoints(
            f"{place}/run", {1: model.state_dict()}, build=build, train=(x, y), task=TASK, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=rate)
        )
        queries = asked, torch.zeros(QUERIES, dtype=torch.float64)
        one, other = trace(run, queries, [Source(segments=1), method], measure=prediction, progress=False)
    return one.values, other.values


def _spearman(found: Tensor, truth: Tensor) -> float:
    """Mean over rows of the correlation of ranks (no two numbers are equal here)."""
    ranks = [t.argsort(1).argsort(1).double() for t in (found, truth)]
    a, b = (r - r.mean(1, keepdim=True) for r in ranks)
    return float(((a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()).mean())
