"""What tests of ensembles share: small recorded networks, copies of them without anything kept, and TRAK written out by hand."""

import shutil
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

import headwater as hw
from headwater.influence.request import Parts
from tests.influence.brute import Brute
from tests.influence.test_laws import ASKED, TASK, TRAIN, record, sgd

METHODS = [hw.GradDot(), hw.GradCos(), hw.TracIn(), hw.Influence(damping=0.1), hw.Source(segments=2)]
RATE = 0.25


def network(seed, rate=RATE):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(rate), nn.Linear(6, 3)).double()


def recorded(path, seed=0, model=None, **settings):
    """A small network's run, trained with its dropout."""
    model = model or network(seed)
    torch.manual_seed(seed)
    return record(path, sgd(), model=model.train(), steps=30, **settings)


def fresh(run, path):
    """The same run in another directory, with nothing kept."""
    shutil.copytree(run.path, path, ignore=shutil.ignore_patterns("members", "factors", "jobs"))
    return hw.Run.open(path, build=run.build, train=run.stages[0].data, task=run.stages[0].task)


def scores(run, method, queries=ASKED, **settings):
    return hw.trace(run, queries, method, progress=False, **settings)


def values(run, method, queries=ASKED, **settings):
    return scores(run, method, queries, **settings).values


def close(a, b, tolerance=1e-9):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) <= tolerance * float(np.abs(b).max())


@dataclass(frozen=True)
class Kernel:
    """TRAK by explicit matrices (notation of Park et al. 2023): every gradient by torch.func, an optional Gaussian projection."""

    dim: int | None = None
    seed: int = 0
    ridge: float = 1e-2

    def _features(self, brute, state, batch):
        rows = brute.gradients(TASK.measure, state, batch)
        if self.dim is None:
            return rows
        return rows @ np.random.default_rng(self.seed).normal(size=(rows.shape[1], self.dim)) / self.dim**0.5

    def parts(self, request):
        run = request.run
        brute, state = Brute(run), run.weights(run.checkpoints[-1])
        train, asked = (self._features(brute, state, batch) for batch in (TRAIN, request.asked.examples[0].data))
        kernel = asked @ np.linalg.solve(train.T @ train + self.ridge * np.eye(train.shape[1]), train.T)
        return Parts({"kernel": kernel, "weight": self.weight(request)}, repr(self), "rank only", {"run": str(run.path)})

    def weight(self, request):
        run = request.run
        model = run.load(run.model(), run.checkpoints[-1])
        with torch.no_grad():
            return 1 - model(TRAIN[0]).softmax(1).gather(1, TRAIN[1][:, None])[:, 0].numpy()

    def combine(self, members):
        return np.mean([m["kernel"] for m in members], axis=0) * np.mean([m["weight"] for m in members], axis=0)

    def member(self, k):
        return replace(self, seed=self.seed + k)
