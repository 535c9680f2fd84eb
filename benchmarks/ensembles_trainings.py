"""The trainings of the ensembles' evidence: three models with dropout that are cheap enough to be retrained some hundred times.

Kept banks are named by the code that trained them: an edit of a model or of ``fit`` makes them anew.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headwater as hw
from headwater.training import settled

QUERIES = 100
WORDS, LENGTH = 512, 64  # the text's vocabulary, and the tokens of a passage
Columns = tuple[Tensor, ...]


@dataclass(frozen=True)
class Training:
    """One training to be attributed.

    ``data``: builds (train, queries, labels of both): a label is a digit's class, or a passage's novel. ``settings``: see :func:`fit`.
    ``subsets`` (to judge by) x ``seeds``: how many retrainings are the truth.
    """

    name: str
    about: str
    data: Callable[[], tuple[Columns, Columns, tuple[Tensor, Tensor]]]
    build: Callable[[], nn.Module]
    task: hw.tasks.Task
    settings: dict[str, Any]
    subsets: int
    seeds: int
    checkpoints: int = 6

    def experiment(self) -> hw.Experiment:
        train, queries, _ = self.data()
        return hw.Experiment(self.build, train, queries, self.task, partial(fit, **self.settings), self.name)

    def record(self, path: Path, seed: int) -> tuple[hw.Run, float]:
        """The run at ``path``, recorded now if it is not there, and the CPU seconds that its training took."""
        experiment, clock = self.experiment(), path / "seconds.txt"
        if not clock.exists():
            with settled(0):  # the first steps of a process load what torch needs: they are not this training's
                fit(self.build(), tuple(c[:8] for c in experiment.train), 0, **{**self.settings, "epochs": 1})
            started = time.process_time()
            experiment.record(path, seed=seed, checkpoints=self.checkpoints, overwrite=True)
            clock.write_text(f"{time.process_time() - started:.3f}")
        return experiment.open(path), float(clock.read_text())


def fit(
    model: nn.Module, train: Columns, seed: int, recorder: hw.Recorder | None = None, *, epochs: int, batch: int, rate: float, decay: float, adam: bool = False
) -> nn.Module:
    """SGD with momentum .9, or AdamW, under a cosine schedule that ends at a tenth of the rate. Epochs count, so that half the examples
    are trained on for half the steps: the dose of each example stays. The seed was set by the caller."""
    steps = epochs * math.ceil(len(train[0]) / batch)
    if adam:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=rate / 10)
    if recorder is not None:
        recorder.watch(model, optimizer, steps=steps)
    model.train()
    for _ in range(epochs):
        for ids in torch.randperm(len(train[0])).split(batch):
            optimizer.zero_grad()
            objective(model, tuple(column[ids] for column in train)).backward()
            optimizer.step()
            if recorder is not None:
                recorder.step(ids)
            schedule.step()
    return model.eval()


def objective(model: nn.Module, batch: Columns) -> Tensor:
    """The mean loss that is minimised: what the task says of one example, averaged."""
    if len(batch) == 2:
        return F.cross_entropy(model(batch[0]), batch[1])
    return F.cross_entropy(model(batch[0])[:, :-1].transpose(1, 2), batch[0][:, 1:])


# --------------------------------------------------------------------------------------------------------------------- models


def mlp() -> nn.Module:
    """784-128-64-10 with dropout after each hidden layer: 109,386 parameters."""
    hidden = [[nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.1)] for a, b in ((784, 128), (128, 64))]
    return nn.Sequential(nn.Flatten(), *chain.from_iterable(hidden), nn.Linear(64, 10))


def cnn() -> nn.Module:
    """Two strided convolutions and two linear layers, with dropout: 26,826 parameters."""
    convolutions = [nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Dropout(0.1), nn.Linear(16 * 49, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))


class Attention(nn.Module):
    """Causal self-attention in plain operations, so that its dropout is a module that can be masked."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.heads = heads
        self.mixed, self.out, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mixed(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(later, -math.inf).softmax(-1)
        return self.out((self.drop(weights) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer network, each on the normalised stream."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.before, self.attention, self.between = nn.LayerNorm(width), Attention(width, heads, rate), nn.LayerNorm(width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.before(x)))
        return x + self.drop(self.network(self.between(x)))


class Transformer(nn.Module):
    """A causal language model: token ids (n, length) to logits (n, length, words)."""

    def __init__(self, words: int = WORDS, length: int = LENGTH, width: int = 64, layers: int = 2, heads: int = 4, rate: float = 0.1) -> None:
        super().__init__()
        self.words, self.places, self.drop = nn.Embedding(words, width), nn.Embedding(length, width), nn.Dropout(rate)
        self.blocks = nn.Sequential(*(Block(width, heads, rate) for _ in range(layers)))
        self.last, self.head = nn.LayerNorm(width), nn.Linear(width, words)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.head(self.last(self.blocks(self.drop(self.words(ids) + self.places(places)))))


# ----------------------------------------------------------------------------------------------------------------------- data


def digits(count: int = 2000) -> tuple[Columns, Columns, tuple[Tensor, Tensor]]:
    """2,000 digits; queries: 100 others. Labels: their classes."""
    train, rest = hw.data.split(hw.data.mnist(), train=count)
    queries = tuple(c[:QUERIES] for c in rest)
    return train, queries, (train[1], queries[1])


def passages(count: int = 1024) -> tuple[Columns, Columns, tuple[Tensor, Tensor]]:
    """1,024 passages of 64 words or marks each, drawn from Northanger Abbey and Persuasion; queries: 100 others. Labels: the novel.
    The 511 most frequent words and marks have tokens of their own, all others share token 0."""
    novels = [re.findall(r"[a-z]+|[^a-z\s]", text.lower()) for text in hw.data.austen().values()]
    known = {word: k + 1 for k, (word, _) in enumerate(sorted(Counter(chain(*novels)).items(), key=lambda pair: (-pair[1], pair[0]))[: WORDS - 1])}
    chunks = [torch.tensor([known.get(w, 0) for w in novel]).unfold(0, LENGTH, LENGTH) for novel in novels]
    novel = torch.cat([torch.full((len(c),), k) for k, c in enumerate(chunks)])
    (train, kind), (rest, other) = hw.data.split((torch.cat(chunks), novel), train=count, seed=0)
    return (train,), (rest[:QUERIES],), (kind, other[:QUERIES])


# ------------------------------------------------------------------------------------------------------------------ the table

DIGITS = {"epochs": 15, "batch": 64, "rate": 0.02, "decay": 1e-3}
TABLE = (
    Training("mnist-mlp", "digits, an MLP with dropout .1", digits, mlp, hw.tasks.Classification(), DIGITS, 100, 3),
    Training("mnist-cnn", "digits, a CNN with dropout .1", digits, cnn, hw.tasks.Classification(), DIGITS, 100, 3),
    Training(
        "austen-transformer",
        "passages of two novels, a transformer with dropout .1",
        passages,
        Transformer,
        hw.tasks.Language(reduction="mean"),
        {"epochs": 6, "batch": 16, "rate": 2e-3, "decay": 0.01, "adam": True},
        50,
        2,
    ),
)
