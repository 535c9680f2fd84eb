"""Linear regression small enough to retrain without each example: the truth that methods are judged by. Float64, numpy apart from the
recorded training itself, which is torch's own optimizer in a plain loop."""

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

import headwater as hw


def output(model, batch):
    return model(batch[0]).squeeze(1)


TASK = hw.tasks.Regression(scale=0.5)


@dataclass
class Stage:
    """Examples ``ids``, learning rates (steps,), batches of ids, and torch's SGD settings."""

    ids: np.ndarray
    rates: np.ndarray
    batches: list
    settings: dict = field(default_factory=dict)


@dataclass
class Problem:
    x: np.ndarray
    y: np.ndarray
    queries: np.ndarray
    stages: list

    def train(self, weights):
        """Final parameters (R, d) of R trainings with example weights (R, N), all along the same batches, removed examples weighing 0."""
        theta, velocity = np.zeros((len(weights), self.x.shape[1])), 0.0
        for stage in self.stages:
            momentum, decay, velocity = stage.settings.get("momentum", 0.0), stage.settings.get("weight_decay", 0.0), 0.0
            for rate, batch in zip(stage.rates, stage.batches, strict=True):
                residual = (theta @ self.x[batch].T - self.y[batch]) * weights[:, batch]
                gradient = residual @ self.x[batch] / len(batch) + decay * theta
                velocity = momentum * velocity + gradient
                step = gradient + momentum * velocity if stage.settings.get("nesterov") else velocity
                theta = theta - rate * step
        return theta

    def owed(self):
        """What training on each example gave to each query's output, (queries, N): minus the change when it is left out."""
        n = len(self.y)
        theta = self.train(np.vstack([np.ones(n), 1 - np.eye(n)]))
        return -self.queries @ (theta[1:] - theta[0]).T

    def asked(self):
        q = torch.from_numpy(self.queries)
        return q, torch.zeros(len(q), dtype=q.dtype)

    def data(self, stage):
        return torch.from_numpy(self.x[stage.ids]), torch.from_numpy(self.y[stage.ids])

    def record(self, path, **settings):
        """The same training with torch's SGD, recorded."""
        model = nn.Linear(self.x.shape[1], 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(model.weight)
        recorder = None
        for number, stage in enumerate(self.stages):
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **stage.settings)
            data = self.data(stage)
            count = len(stage.rates)
            if recorder is None:
                recorder = hw.Recorder(path, model, optimizer, task=TASK, train=data, steps=count, **settings)
            else:
                recorder.stage(f"stage {number}", train=data, optimizer=optimizer, steps=count)
            local = {int(g): i for i, g in enumerate(stage.ids)}
            for rate, batch in zip(stage.rates, stage.batches, strict=True):
                optimizer.param_groups[0]["lr"] = float(rate)
                ids = torch.tensor([local[int(i)] for i in batch])
                optimizer.zero_grad()
                TASK.loss(model, (data[0][ids], data[1][ids])).mean().backward()
                optimizer.step()
                recorder.step(ids)
        return recorder.finish()


def problem(seed=0, steps=120, rate=0.1, batch=None, cosine=False, n=100, d=20, queries=30, order=0, **settings):
    """One stage on n examples whose inputs have scales 1, 1/2, ... 1/d (ill-conditioned, as real problems are)."""
    rng = np.random.default_rng(seed)
    x, y, q = _data(rng, n, d, queries)
    rates = rate * (0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps)) if cosine else np.ones(steps))
    return Problem(x, y, q, [Stage(np.arange(n), rates, batches(np.arange(n), batch or n, steps, 1000 + order), settings)])


def two_stages(seed=3):
    """60 examples for 120 steps, then 60 others for 60 steps."""
    x, y, q = _data(np.random.default_rng(seed), 120, 20, 30)
    first, second = np.arange(60), np.arange(60, 120)
    return Problem(x, y, q, [Stage(first, np.full(120, 0.2), [first] * 120), Stage(second, np.full(60, 0.2), [second] * 60)])


def batches(ids, size, steps, seed):
    rng, out = np.random.default_rng(seed), []
    while len(out) < steps:
        order = ids if size == len(ids) else rng.permutation(ids)
        out += [order[i : i + size] for i in range(0, len(ids), size)]
    return out[:steps]


def _data(rng, n, d, queries):
    scale = 1.0 / np.arange(1, d + 1)
    x, q, w = rng.normal(size=(n, d)) * scale, rng.normal(size=(queries, d)) * scale, rng.normal(size=d)
    return x, x @ w + 0.5 * rng.standard_t(3, size=n), q


def agreement(scores, truth):
    """Mean Spearman over queries, and the slope of truth on scores (least squares through 0)."""
    found = np.mean([spearmanr(a, b).statistic for a, b in zip(scores, truth, strict=True)])
    return float(found), float((scores * truth).sum() / (scores**2).sum())
