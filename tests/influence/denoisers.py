"""What tests of diffusion share: small denoisers, recorded training of them, and gradients of single examples at single events by autograd."""

import math

import numpy as np
import torch
from torch import nn

import headwater as hw
from headwater.tasks.diffusion import Grid
from headwater.tasks.diffusion.events import noise_of

D, T = 6, 50
"""Numbers in an image, and timesteps."""


class Linear(nn.Module):
    """``W phi(x_t, t)``: the denoiser whose influence is known in closed form."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.fc = nn.Linear(D + 2, D, bias=False, dtype=dtype)

    @staticmethod
    def phi(x, t):
        angle = t.to(x.dtype) * (math.pi / T)
        return torch.cat([x, angle.cos()[:, None], angle.sin()[:, None]], 1)

    def forward(self, x, t):
        return self.fc(self.phi(x, t))


class Network(nn.Module):
    """Two layers, the timestep, and a class where there is one: every kind of block (matrix, bias, embedding)."""

    def __init__(self, dtype=torch.float64, classes=0, width=7):
        super().__init__()
        self.enter = nn.Linear(D + 2, width, dtype=dtype)
        self.leave = nn.Linear(width, D, dtype=dtype)
        self.label = nn.Embedding(classes + 1, width, dtype=dtype) if classes else None

    def forward(self, x, t, y=None):
        h = self.enter(Linear.phi(x, t))
        if self.label is not None:
            h = h + self.label(y)
        return self.leave(torch.tanh(h))


def made(kind, seed=0, **settings):
    torch.manual_seed(seed)
    return kind(**settings)


def images(n, seed, dtype=torch.float64):
    """Points near a few directions, so that examples have something in common."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return (torch.randn(n, 3, generator=g, dtype=torch.float64) @ directions * 0.6 + 0.2 * torch.randn(n, D, generator=g, dtype=torch.float64)).to(dtype)


def labelled(n, seed, classes, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed + 1000)
    return images(n, seed, dtype), torch.randint(0, classes, (n,), generator=g)


def batch_of(data, ids):
    return tuple(t[ids] for t in data) if isinstance(data, tuple) else data[ids]


def trained(path, model, task, data, *, epochs=4, batch=4, rate=0.1, optimizer=None, checkpoints=2, events=True, seed=3, recorder=None, losses=None, keep=None):
    """A recorded training; ``losses``: a list that takes each step's losses, ``keep``: one that takes its events."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), rate)
    n = len(data[0]) if isinstance(data, tuple) else len(data)
    recorder = recorder or hw.Recorder(path, model, optimizer, task=task, train=data, checkpoints=checkpoints, steps=epochs * (-(-n // batch)))
    g = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for ids in torch.randperm(n, generator=g).split(batch):
            drawn = task.draw(len(ids), g)
            loss = task.loss(model, task.noised(batch_of(data, ids), drawn))
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            recorder.step(ids, events=drawn if events else None)
            if losses is not None:
                losses.append(loss.detach())
            if keep is not None:
                keep.append((ids, drawn))
    return recorder


class Brute:
    """Gradients of single examples at single events, one at a time, by plain autograd; the loss and its target written out here."""

    def __init__(self, run, weighting=None):
        self.run, self.weighting = run, weighting or (lambda t: 1.0)
        self.model = run.model()

    def at(self, step):
        self.run.load(self.model, step)
        return self

    def gradient(self, stage, example, t, seed, met=False):
        """Of the loss of one example (without a batch axis) at one event, flat; ``met`` in training, where conditions may be left out."""
        task = stage.task
        x, conditions = (example[0], example[1:]) if isinstance(example, tuple) else (example, ())
        eps = noise_of(torch.tensor([[seed]]), x.shape, x.dtype, "cpu")[0, 0]
        a, b = task.process.signal[t].to(x.dtype), task.process.noise[t].to(x.dtype)
        if task.drop and met:
            from headwater.tasks.diffusion.events import dropped

            if bool(dropped(torch.tensor([[seed]]), task.drop)[0, 0]):
                conditions = (torch.as_tensor(task.null, dtype=conditions[0].dtype),)
        out = self.model((a * x + b * eps)[None], task.process.time[t].long()[None], *(c[None] for c in conditions))[0]
        target = {"epsilon": eps, "sample": x, "v": a * eps - b * x, "flow": eps - x}[task.prediction]
        error = (out - target).abs() if task.kind == "l1" else (out - target) ** 2
        found = torch.autograd.grad(self.weighting(t) * error.mean(), list(self.model.parameters()), allow_unused=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(self.model.parameters(), found, strict=True)])

    def of_output(self, output, x, t, seed):
        """Of ``output(network's answer, image, noise)`` of one image at one event, flat."""
        process = self.run.stages[-1].task.process
        eps = noise_of(torch.tensor([[seed]]), x.shape, x.dtype, "cpu")[0, 0]
        out = self.model((process.signal[t] * x + process.noise[t] * eps)[None], torch.tensor([t]))[0]
        return torch.cat([g.flatten() for g in torch.autograd.grad(output(out, x, eps), list(self.model.parameters()))])

    def expected(self, stage, example, number, side, timesteps, draws, noise, seed, salt):
        """The mean gradient over noises at each timestep, (timesteps, p). ``side``: "train" or "query", which tells their own noise apart."""
        rows = []
        for t in timesteps:
            _, seeds = Grid((t,), draws, noise, seed, salt).of(np.array([number]), side)
            rows.append(torch.stack([self.gradient(stage, example, t, int(s)) for s in seeds[0]]).mean(0))
        return torch.stack(rows)

    def met(self, stage, number, step):
        """The events at which training met an example up to ``step``, the latest first: read step by step."""
        found = []
        for s in range(step, stage.start, -1):
            ids = self.run.order(s)
            found += [(int(e["t"]), int(e["seed"])) for i, e in zip(ids[::-1], self.run.events_of(s)[::-1], strict=True) if i == number]
        return found


def unit(v):
    """At unit norm; zero stays zero."""
    size = v.norm()
    return v / size if size > 0 else v


def example_of(data, i):
    return tuple(t[i] for t in data) if isinstance(data, tuple) else data[i]


def by_hand(run, queries, method, pairs, weighting=None):
    """Diffusion-TracIn and -ReTrac of (query, column) pairs, one gradient at a time (Xie et al. 2024, sections 3.1 and 3.3)."""
    retrac = isinstance(method, hw.DiffusionReTrac)
    brute, out = Brute(run, weighting), dict.fromkeys(pairs, 0.0)
    last = run.stages[-1]
    for stage in run.stages:
        start, mine = stage.start, [(q, c) for q, c in pairs if c in stage.columns]
        timesteps = stage.task.process.strata(method.timesteps) if isinstance(method.timesteps, int) else method.timesteps
        for step in stage.checkpoints(run.checkpoints):
            brute.at(step)
            rate = run.steps[(run.steps["step"] > start) & (run.steps["step"] <= step)]["rate"].sum()
            grid = (timesteps, method.draws, method.noise, method.seed, step)
            asked = {q: brute.expected(last, example_of(queries, q), q, "query", *grid) for q in {q for q, _ in mine}}
            seen = {}
            for c in {c for _, c in mine}:
                i = c - stage.columns.start
                example = example_of(stage.data.data, i)
                if method.events == "replay":
                    seen[c] = torch.stack([brute.gradient(stage, example, t, s, met=True) for t, s in brute.met(stage, i, step)[: method.window]])
                else:
                    seen[c] = brute.expected(stage, example, i, "train", *grid)
            if retrac:
                asked, seen = ({k: torch.stack([unit(v) for v in rows]) for k, rows in side.items()} for side in (asked, seen))
            for q, c in mine:
                out[q, c] += float(rate) / stage.size * float(asked[q].double().mean(0) @ seen[c].double().mean(0))
            start = step
    return out


def agree(found, truth, tolerance):
    """Scores at the pairs of ``truth`` equal them, relative to the largest."""
    scale = max(map(abs, truth.values()))
    assert scale > 0
    worst = max(abs(found[pair] - value) for pair, value in truth.items()) / scale
    assert worst <= tolerance, worst


def close(a, b, tolerance):
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    assert np.abs(b).max() > 0
    return float(np.abs(a - b).max()) <= tolerance * float(np.abs(b).max())
