"""The trainings whose attribution is put to the proof: plain tables of settings, and the one loop that trains them all.

Every training set has three columns, ``(inputs, targets, stage)``: a training in two stages is retrained on subsets of both stages'
examples together. The rows of the first stage come first, as the columns of the scores do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headwater as hw
from headwater.training import settled

Columns = tuple[Tensor, ...]
QUERIES = 100


@dataclass(frozen=True)
class Training:
    """One training to be attributed.

    ``data``: builds (train, test). ``phases``: the settings of each stage, see :func:`fit`. ``seeds``: retrainings of each subset;
    ``models``: recorded trainings (of other seeds), whose scores are also averaged. ``checkpoints`` and ``segments``: per stage.
    """

    name: str
    kind: str
    data: Callable[[], tuple[Columns, Columns]]
    build: Callable[[], nn.Module]
    phases: tuple[dict[str, Any], ...]
    seeds: int
    models: int
    about: str
    checkpoints: int = 6
    segments: int = 3

    @property
    def task(self) -> hw.tasks.Task:
        return hw.tasks.Regression() if self.name.startswith("concrete") else hw.tasks.Classification()

    def experiment(self) -> hw.Experiment:
        train, test = self.data()
        return hw.Experiment(self.build, train, test, self.task, partial(fit, phases=self.phases), self.name)

    def record(self, path: Path, seed: int) -> hw.Run:
        """The run at ``path``, recorded now if it is not there. (Experiment.record knows one stage, and here the stages split the data.)"""
        experiment = self.experiment()
        if not _finished(path):
            with settled(seed):
                model = self.build()
                settings = {"task": self.task, "train": experiment.train, "checkpoints": self.checkpoints, "seed": seed, "stage": "stage 1"}
                with hw.Recorder(path, **settings, overwrite=True) as recorder:
                    experiment.fit(model, experiment.train, seed, recorder)
                    recorder.finish()
        stages = {f"stage {k + 1}": part(experiment.train, k) for k in range(len(self.phases))}
        return hw.Run.open(path, build=self.build, train=stages if len(stages) > 1 else stages["stage 1"], task=self.task)


def _finished(path: Path) -> bool:
    return (path / "manifest.json").exists() and '"finished": true' in (path / "manifest.json").read_text()


def part(train: Columns, stage: int) -> Columns:
    """Inputs and targets of one stage."""
    mine = train[2] == stage
    return train[0][mine], train[1][mine]


# ------------------------------------------------------------------------------------------------------------------- training


def fit(model: nn.Module, train: Columns, seed: int, recorder: hw.Recorder | None = None, *, phases: tuple[dict[str, Any], ...]) -> nn.Module:
    """SGD with momentum .9, stage after stage. Epochs count, so that half the examples are trained on for half the steps: the dose of
    each example stays."""
    for stage, phase in enumerate(phases):
        inputs, targets = part(train, stage)
        optimizer = torch.optim.SGD(model.parameters(), lr=phase["rate"], momentum=0.9, weight_decay=phase["decay"])
        steps = phase["epochs"] * math.ceil(len(targets) / phase["batch"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if phase.get("cosine") else None
        if recorder is not None and stage == 0:
            recorder.watch(model, optimizer, steps=steps, train=(inputs, targets))
        elif recorder is not None:
            recorder.stage(f"stage {stage + 1}", train=(inputs, targets), optimizer=optimizer, steps=steps)
        for _ in range(phase["epochs"]):
            for ids in torch.randperm(len(targets)).split(phase["batch"]):
                optimizer.zero_grad()
                objective(model(inputs[ids]), targets[ids]).backward()
                optimizer.step()
                if recorder is not None:
                    recorder.step(ids)
                if schedule is not None:
                    schedule.step()
    return model


def objective(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss that is minimised: what the tasks say of one example, averaged."""
    return F.mse_loss(outputs.squeeze(-1), targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)


# --------------------------------------------------------------------------------------------------------------------- models


def mlp(*widths: int, flatten: bool = True) -> nn.Module:
    """Linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()] if flatten else []
    for wide, narrow in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """Two strided convolutions and two linear layers: 26,826 parameters."""
    features = [nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(16 * 49, 32), nn.ReLU(), nn.Linear(32, 10))


# ----------------------------------------------------------------------------------------------------------------------- data


def digits(noise: float = 0.0) -> tuple[Columns, Columns]:
    """2,500 digits, a fraction ``noise`` of which have a random wrong label; queries: 100 others."""
    (x, y), test = _digits()
    return _staged((x, hw.data.flip_labels(y, noise, seed=1)[0])), test


def upright_then_turned() -> tuple[Columns, Columns]:
    """1,250 upright digits, then 1,250 others turned by 45 degrees; queries are upright."""
    (x, y), test = _digits()
    half = len(y) // 2
    return _staged((x[:half], y[:half]), (turned(x[half:], 45), y[half:])), test


def wrong_then_right() -> tuple[Columns, Columns]:
    """1,250 digits with 40 % wrong labels, then 1,250 others with the right ones."""
    (x, y), test = _digits()
    half = len(y) // 2
    return _staged((x[:half], hw.data.flip_labels(y[:half], 0.4, seed=1)[0]), (x[half:], y[half:])), test


def low_then_high() -> tuple[Columns, Columns]:
    """The digits 0 to 4 of 2,500 first, then 5 to 9; queries of all ten."""
    (x, y), test = _digits()
    return _staged((x[y < 5], y[y < 5]), (x[y >= 5], y[y >= 5])), test


def _digits() -> tuple[Columns, Columns]:
    train, rest = hw.data.split(hw.data.mnist(), train=2500)
    return train, tuple(c[:QUERIES] for c in rest)


def concrete() -> tuple[Columns, Columns]:
    """927 mixtures; queries: the other 103."""
    train, test = hw.data.split(hw.data.concrete(), train=927)
    return _staged(train), test


def young_then_old() -> tuple[Columns, Columns]:
    """Mixtures of at most the median age first, then the older ones; queries of all ages."""
    (x, y), test = hw.data.split(hw.data.concrete(), train=927)
    young = x[:, 7] <= x[:, 7].median()
    return _staged((x[young], y[young]), (x[~young], y[~young])), test


def turned(images: Tensor, degrees: float) -> Tensor:
    """Images turned about their centre."""
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]])
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _staged(*parts: Columns) -> Columns:
    """The parts one after the other, with a column that says which stage a row belongs to."""
    columns = [torch.cat(c) for c in zip(*parts, strict=True)]
    return (*columns, torch.cat([torch.full((len(p[0]),), k) for k, p in enumerate(parts)]))


# ------------------------------------------------------------------------------------------------------------------ the table

MNIST_MLP = partial(mlp, 784, 128, 64, 10)
CONCRETE_MLP = partial(mlp, 8, 128, 128, 128, 1, flatten=False)


def phase(epochs: int, rate: float, decay: float, batch: int = 64, cosine: bool = False) -> dict[str, Any]:
    return {"epochs": epochs, "rate": rate, "decay": decay, "batch": batch, "cosine": cosine}


BRIEF, SHORT, STAGES, CONVERGED = "brief", "short", "two stages", "converged"
ON, LONG, TWO = phase(8, 1e-2, 3e-5), phase(60, 3e-2, 1e-3, cosine=True), {"checkpoints": 4, "segments": 2}  # TWO: per stage
SMALL, SMALL_LONG = phase(20, 1e-2, 1e-5, 32), phase(200, 1e-2, 1e-3, 32, cosine=True)
TABLE = (
    Training("mnist-mlp-short", SHORT, digits, MNIST_MLP, (ON,), 3, 3, "digits, not converged"),
    Training("mnist-mlp-two-stage", STAGES, upright_then_turned, MNIST_MLP, (ON, ON), 2, 3, "upright digits, then others turned by 45°", **TWO),
    Training("mnist-mlp-converged", CONVERGED, digits, MNIST_MLP, (LONG,), 2, 3, "digits, converged"),
    Training("mnist-cnn-short", SHORT, digits, cnn, (ON,), 2, 1, "digits, not converged"),
    Training("mnist-cnn-two-stage", STAGES, wrong_then_right, cnn, (ON, ON), 2, 1, "digits of which 40 % have wrong labels, then others with right ones", **TWO),
    Training("mnist-cnn-converged", CONVERGED, digits, cnn, (LONG,), 2, 1, "digits, converged"),
    Training("concrete-mlp-short", SHORT, concrete, CONCRETE_MLP, (SMALL,), 3, 1, "strengths, not converged"),
    Training("concrete-mlp-two-stage", STAGES, young_then_old, CONCRETE_MLP, (SMALL, SMALL), 3, 1, "young mixtures, then old", **TWO),
    Training("concrete-mlp-converged", CONVERGED, concrete, CONCRETE_MLP, (SMALL_LONG,), 2, 1, "strengths, converged"),
    Training("mnist-mlp-brief", BRIEF, partial(digits, 0.3), MNIST_MLP, (phase(3, 1e-2, 3e-5),), 2, 1, "digits, 30 % wrong labels, few steps"),
    Training("mnist-mlp-noisy", SHORT, partial(digits, 0.3), MNIST_MLP, (ON,), 2, 1, "digits, 30 % wrong labels"),
    Training("mnist-mlp-classes", STAGES, low_then_high, MNIST_MLP, (ON, phase(4, 3e-3, 3e-5)), 2, 1, "digits 0 to 4, then 5 to 9", **TWO),
)
