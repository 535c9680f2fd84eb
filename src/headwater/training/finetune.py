"""Training the adapters of one member: a short run on a frozen model, recorded like any other, with seeds of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError, NotFinite
from headwater.store import read_json
from headwater.tasks.batches import to
from headwater.training.adapters import CHILD, adapters_of, freeze, insert, insert_peft, keep, refuse_untrained, transplant
from headwater.training.experiment import settled
from headwater.training.recorder import Recorder
from headwater.training.run import Run, Stage, stages_of

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 2e-3, "weight_decay": 0.0}),
    "sgd": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
}
CHECKPOINTS = 6


@dataclass(frozen=True)
class Tuning:
    """How adapters are trained: ``steps`` in each stage, ``batch_size`` examples at once. ``lr``: of the optimizer "adamw" (0.002 where nothing
    is said, no weight decay) or "sgd" (momentum 0.9; 0.05). ``training``: the model is in training mode, so that its dropout and BatchNorm
    act as they did when it was trained; else they stand still."""

    steps: int = 100
    lr: float | None = None
    batch_size: int = 32
    optimizer: str = "adamw"
    training: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise InputError(f"steps={self.steps}, batch_size={self.batch_size}", "at least 1 of each", "steps=100, batch_size=32")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"optimizer={self.optimizer!r}", f"one of {sorted(OPTIMIZERS)}", "adamw is the default")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise InputError(f"lr={self.lr}", "a learning rate above 0", "leave it out, or give 0.001, say")

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the adapters."""
        kind, settings = OPTIMIZERS[self.optimizer]
        return kind(parameters, **(settings if self.lr is None else {**settings, "lr": self.lr}))


@dataclass(frozen=True, eq=False)
class Adapted:
    """Builds the final model of ``run`` with untrained adapters in it, everything else frozen. Its checkpoints hold the adapters alone, and
    after training in training mode the buffers too (BatchNorm's statistics move)."""

    run: Run
    ranks: dict[str, int]
    alpha: float | None
    peft: bool
    training: bool

    def __call__(self) -> nn.Module:
        model = self.run.load(self.run.model(), self.run.checkpoints[-1])
        (insert_peft if self.peft else insert)(model, self.ranks, self.alpha)
        return keep(model, [*freeze(model), *(name for name, _ in model.named_buffers() if self.training)])


@dataclass(frozen=True, eq=False)
class Merged:
    """Builds the model of ``run`` around the trained adapters of ``member``, which count as fixed: with the final weights W of ``run``, a layer
    computes with ``W + scale B A``, and gradients with respect to W are those at the merged weights."""

    run: Run
    member: Run
    ranks: dict[str, int]
    alpha: float | None

    def __call__(self) -> nn.Module:
        model = self.run.model()
        names = list(model.state_dict())
        transplant(self.member.load(self.member.model(), self.member.checkpoints[-1]), insert(model, self.ranks, self.alpha))
        for name in adapters_of(model):
            model.get_submodule(f"{name}.{CHILD}").requires_grad_(False)
        return keep(model, names)


def is_trained(path: Path) -> bool:
    """Whether the adapters in a directory were trained to their end."""
    return (path / "manifest.json").exists() and bool(read_json(path / "manifest.json")["finished"])


def open_adapters(path: Path, build: Adapted) -> Run:
    """The run that :func:`finetune` left in ``path``, with the stages and columns of the run it is built on."""
    manifest, base = read_json(path / "manifest.json"), build.run
    stages = stages_of(manifest, [stage.data for stage in base.stages], [stage.task for stage in base.stages])
    return Run(path, manifest, stages, build, base.device, variant=f"adapters on {base.weights_hash(base.checkpoints[-1])} {base.variant}".strip(), code=base.code)


def open_merged(member: Run, build: Adapted) -> Run:
    """A view of the base run at its final weights plus a member's adapters. Earlier checkpoints are not seen: adapters belong to the last."""
    base, last = build.run, build.run.checkpoints[-1]
    manifest = {**base.manifest, "checkpoints": {str(last): base.weights_hash(last)}}
    variant = f"{base.variant} merged with {member.weights_hash(member.checkpoints[-1])}".strip()
    return replace(base, manifest=manifest, build=Merged(base, member, build.ranks, build.alpha), variant=variant)


def finetune(path: Path, model: nn.Module, stages: Sequence[Stage], trained: Sequence[int], tuning: Tuning, seed: int, advance: Callable[[int], Any]) -> list[Tensor]:
    """Train the adapters in ``model`` (made by :class:`Adapted`) and record it in the directory ``path``; each step's loss, stage by stage.

    Every stage is recorded, so that its examples are columns of the scores; those not in ``trained`` as a single step at rate 0.
    ``advance(n)`` is called after n steps. Data order and the model's dropout come from ``seed``, whatever the state of the global generators.
    """
    parameters, device = [p for p in model.parameters() if p.requires_grad], next(model.parameters()).device
    model.train(tuning.training)
    order = torch.Generator().manual_seed(seed)
    losses: list[Tensor] = []
    recorder: Recorder | None = None
    with _own_chance(seed, device):
        for stage in stages:
            real = stage.index in trained
            optimizer, steps = tuning.make(parameters), tuning.steps if real else 1
            if recorder is None:
                recorder = Recorder(
                    path, model, optimizer, task=stage.task, train=stage.data, checkpoints=CHECKPOINTS, steps=steps, stage=stage.name, seed=seed, overwrite=True
                )
            else:
                recorder.stage(stage.name, train=stage.data, task=stage.task, optimizer=optimizer, steps=steps)
            with recorder:
                losses.append(_train(model, stage, optimizer, recorder, _batches(stage.size, tuning, order), advance) if real else _stand_still(optimizer, recorder))
    assert recorder is not None
    refuse_untrained(model, f"after {tuning.steps} steps of training in {path}")
    recorder.finish()
    return losses


def _train(model: nn.Module, stage: Stage, optimizer: torch.optim.Optimizer, recorder: Recorder, batches: Iterator[np.ndarray], advance: Callable[[int], Any]) -> Tensor:
    device, losses = next(model.parameters()).device, []
    for ids in batches:
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = stage.task.loss(model, to(stage.data.batch(ids), device)).mean()
            loss.backward()
        optimizer.step()
        recorder.step(ids)
        losses.append(loss.detach())
        advance(1)
    found = torch.stack(losses).float().cpu()
    if not torch.isfinite(found).all():
        first = int((~torch.isfinite(found)).nonzero()[0]) + 1
        rate = optimizer.param_groups[0]["lr"]
        raise NotFinite(
            f"a NaN or infinite loss at step {first} of training adapters (stage {stage.name!r}, lr={rate})",
            "a finite loss",
            f"lower the learning rate: lr={rate / 10:g}",
        )
    return found


def _stand_still(optimizer: torch.optim.Optimizer, recorder: Recorder) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.zero_grad()
    optimizer.step()
    recorder.step([0])
    return torch.zeros(0)


def _batches(size: int, tuning: Tuning, generator: torch.Generator) -> Iterator[np.ndarray]:
    """Batches of ids: a new permutation for each time through the examples; the last of one may be smaller."""
    left, given = np.zeros(0, np.int64), 0
    while given < tuning.steps:
        if not len(left):
            left = torch.randperm(size, generator=generator).numpy()
        yield left[: tuning.batch_size]
        left, given = left[tuning.batch_size :], given + 1


@contextmanager
def _own_chance(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators, also the device's, seeded for the model's own draws and put back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), settled(seed):
        yield
