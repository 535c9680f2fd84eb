"""Small trainings on which every approximation of training can be judged by its exact derivative, and that derivative, written out.

The reference goes backwards through every recorded step (SGD, momentum, Adam, AdamW), with all queries' cotangents at once: nothing of
Headwater is in it. float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

import headwater as hw
from headwater.training import settled

Data = tuple[Tensor, Tensor]


def constant(step: int, steps: int) -> float:
    return 1.0


def warmup_cosine(step: int, steps: int) -> float:
    """Linear over the first tenth, then half a cosine to nothing."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def step_decay(step: int, steps: int) -> float:
    """A tenth of the rate from the middle on, a hundredth for the last fifth."""
    return 1.0 if step < steps // 2 else 0.1 if step < steps - steps // 5 else 0.01


@dataclass(frozen=True)
class Problem:
    """One training. ``settings``: of the optimizer, as torch spells them. ``schedule``: what the rate is multiplied with at each step."""

    name: str
    data: Callable[[int], tuple[Data, Data]]
    build: Callable[[], nn.Module]
    task: hw.tasks.Task
    kind: str
    settings: dict[str, float]
    batch: int
    steps: int
    schedule: Callable[[int, int], float] = constant
    checkpoints: int = 6

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        settings = dict(self.settings)
        if "beta2" in settings:
            settings["betas"] = (settings.pop("beta1", 0.9), settings.pop("beta2"))  # type: ignore[assignment]
        return kinds[self.kind](model.parameters(), **settings)  # type: ignore[arg-type]

    def fit(self, model: nn.Module, train: Data, seed: int, recorder: hw.Recorder | None = None, steps: int | None = None) -> nn.Module:
        """Epochs count for subsets (``hw.evaluate.retrain``): half of the examples are trained on for half the steps."""
        optimizer, rate = self.optimizer(model), self.settings["lr"]
        steps = steps or round(self.steps * len(train[1]) / len(self.data(0)[0][1]))
        if recorder is not None:
            recorder.watch(model, optimizer, steps=steps)
        order = torch.Generator().manual_seed(1000 + seed)
        queue: list[Tensor] = []
        for step in range(steps):
            if not queue:
                queue = list(torch.randperm(len(train[1]), generator=order).split(self.batch))
            ids = queue.pop(0)
            optimizer.param_groups[0]["lr"] = rate * self.schedule(step, steps)
            optimizer.zero_grad()
            self.task.loss(model, (train[0][ids], train[1][ids])).mean().backward()
            optimizer.step()
            if recorder is not None:
                recorder.step(ids)
        return model

    def seeded(self, seed: int) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            with settled(seed):
                return self.build().double()

        return build

    def record(self, path: Path, seed: int) -> tuple[hw.Run, Data]:
        """The recorded training of a seed (of data, weights and order) and its queries."""
        train, queries = self.data(seed)
        model = self.seeded(seed)()
        with hw.Recorder(path, task=self.task, train=train, checkpoints=self.checkpoints, overwrite=True) as recorder:
            self.fit(model, train, seed, recorder, self.steps)
            recorder.finish()
        return hw.Run.open(path, build=self.seeded(seed), train=train, task=self.task), queries

    def with_(self, **changes: object) -> Problem:
        return replace(self, **changes)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------------- problems


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def waves(seed: int) -> tuple[Data, Data]:
    """80 points of a noisy sine in six dimensions, 20 queries."""
    g = torch.Generator().manual_seed(seed)
    x, asked, w = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((80, 6), (20, 6), (6,)))
    y = torch.sin(x @ w * 1.2) + 0.2 * torch.randn(80, generator=g, dtype=torch.float64)
    return (x, y), (asked, torch.sin(asked @ w * 1.2))


def digits(seed: int) -> tuple[Data, Data]:
    """300 digits of 8 x 8 pixels, 20 queries."""
    images, labels = hw.data.mnist()
    x = F.avg_pool2d(F.pad(images, (2, 2, 2, 2)), 4).flatten(1).double()
    (a, b), _ = hw.data.split((x, labels), 320, seed=seed)
    return (a[:300], b[:300]), (a[300:], b[300:])


def concrete(seed: int) -> tuple[Data, Data]:
    """400 mixtures and their strength, 30 queries."""
    x, y = hw.data.concrete()
    (a, b), _ = hw.data.split((x.double(), y.double()), 430, seed=seed)
    return (a[:400], b[:400]), (a[400:], b[400:])


def prediction(model: nn.Module, batch: Data) -> Tensor:
    """A regression's output: no kink and no sign flip where the residual is near zero."""
    return model(batch[0]).squeeze(-1)


HALF, CLASSES = hw.tasks.Regression(scale=0.5), hw.tasks.Classification()
SHAPES: dict[str, tuple[Callable[[int], tuple[Data, Data]], Callable[[], nn.Module], hw.tasks.Task, int, int]] = {
    "waves": (waves, lambda: mlp(6, 10, 1), HALF, 20, 160),
    "digits": (digits, lambda: mlp(64, 16, 10), CLASSES, 50, 240),
    "concrete": (concrete, lambda: mlp(8, 16, 16, 1), HALF, 40, 300),
}


def problem(name: str, kind: str, settings: dict[str, float]) -> Problem:
    data, build, task, batch, steps = SHAPES[name]
    return Problem(f"{name}, {kind}", data, build, task, kind, settings, batch, steps)


def measure(of: Problem) -> Callable[[nn.Module, Data], Tensor] | None:
    """What is asked: a regression's output, a classification's log-odds."""
    return prediction if isinstance(of.task, hw.tasks.Regression) else None


# ------------------------------------------------------------------------------------------------------------------ the truth


def unrolled(of: Problem, run: hw.Run, queries: Data) -> np.ndarray:
    """What each example's weight did to each query's measurement: minus the effect of leaving it out, to first order; (queries, examples)."""
    model, train = run.model(), run.stages[0].data.data
    names = [n for n, _ in model.named_parameters()]
    shapes = {n: p.shape for n, p in model.named_parameters()}
    ask = measure(of) or of.task.measure

    def bound(flat: Tensor) -> dict[str, Tensor]:
        return {n: t.reshape(shapes[n]) for n, t in zip(names, flat.split([s.numel() for s in shapes.values()]), strict=True)}

    def apply(function, flat: Tensor, batch: Data) -> Tensor:  # type: ignore[no-untyped-def]
        return function(lambda *args: functional_call(model, bound(flat), args), batch)

    start = run.weights(0)
    theta = torch.cat([start[n].flatten() for n in names])
    state = (theta, torch.zeros_like(theta), torch.zeros_like(theta))
    steps = [_step(of, step, lambda w, flat, ids: (w * apply(of.task.loss, flat, (train[0][ids], train[1][ids]))).mean()) for step in range(len(run.steps))]
    orders = [torch.as_tensor(run.order(k + 1).astype(np.int64)) for k in range(len(steps))]
    states = [state]
    for step, ids in zip(steps, orders, strict=True):
        states.append(tuple(t.detach() for t in step(*states[-1], torch.ones(len(ids), dtype=theta.dtype), ids)))
    final = run.weights(run.checkpoints[-1])
    assert float((states[-1][0] - torch.cat([final[n].flatten() for n in names])).abs().max()) < 1e-9, "this replay is not the recorded training"

    rows = [grad(lambda f, k=k: apply(ask, f, (queries[0][k : k + 1], queries[1][k : k + 1]))[0])(states[-1][0]) for k in range(len(queries[1]))]
    upon = (torch.stack(rows), torch.zeros(len(rows), len(theta), dtype=theta.dtype), torch.zeros(len(rows), len(theta), dtype=theta.dtype))
    scores = torch.zeros(len(rows), len(train[1]), dtype=theta.dtype)
    for step, ids, before in zip(reversed(steps), reversed(orders), reversed(states[:-1]), strict=True):
        pull = vjp(lambda a, b, c, w, step=step, ids=ids: step(a, b, c, w, ids), *before, torch.ones(len(ids), dtype=theta.dtype))[1]
        *upon, onto = vmap(pull)(tuple(upon))
        scores.index_add_(1, ids, onto)
    return scores.numpy()


def _step(of: Problem, k: int, loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """One optimizer step as torch takes it: (weights, first moment, second moment, examples' weights, ids) -> the new three."""
    settings = of.settings
    rate, decay, eps = settings["lr"] * of.schedule(k, of.steps), settings.get("weight_decay", 0.0), settings.get("eps", 1e-8)
    b1, b2 = settings.get("beta1", 0.9), settings.get("beta2", 0.999)

    def sgd(theta: Tensor, m: Tensor, v: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        m = settings.get("momentum", 0.0) * m + grad(lambda t: loss(w, t, ids))(theta) + decay * theta
        return theta - rate * m, m, v

    def adam(theta: Tensor, m: Tensor, v: Tensor, w: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        g = grad(lambda t: loss(w, t, ids))(theta)
        if of.kind == "adam":
            g = g + decay * theta
        else:
            theta = theta * (1 - rate * decay)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        moved = v > 0  # the root has no derivative at 0: an input that is always 0
        root = torch.where(moved, v, 1.0).sqrt() * moved / math.sqrt(1 - b2 ** (k + 1)) + eps
        return theta - rate * m / (1 - b1 ** (k + 1)) / root, m, v

    return sgd if of.kind == "sgd" else adam


def agreement(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Spearman's correlation with the truth, mean over queries; and the slope of the truth on the scores."""
    a, b = (rankdata(s, axis=1) for s in (scores, truth))
    a, b = (s - s.mean(1, keepdims=True) for s in (a, b))
    rho = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return float(rho.mean()), float((scores * truth).sum() / (scores**2).sum())
