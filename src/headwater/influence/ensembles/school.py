"""The adapters of one model: which layers, whose seeds, trained when they are first needed, told beforehand, kept in the run's directory."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from headwater.errors import GradientError, NotFinite
from headwater.influence.ensembles.members import Member, seed_of
from headwater.influence.request import Request
from headwater.influence.timing import seconds_of
from headwater.report.numbers import duration
from headwater.store import content_hash, write_json
from headwater.tasks.batches import to
from headwater.tasks.code import task_identity
from headwater.training import Run
from headwater.training.adapters import adapters_of, draw, moved
from headwater.training.finetune import Adapted, finetune, is_trained, open_adapters, open_merged
from headwater.training.targets import choose

if TYPE_CHECKING:
    from headwater.influence.ensembles.lora import LoraEnsemble

FOLDER = "adapters"
"""Where a run's trained adapters lie in its directory."""


@dataclass(frozen=True, eq=False)
class AdapterMember(Member):
    """A member whose adapters are trained, with the request's own wish for a bar, when it is first asked."""

    school: Any = None
    index: int = 0

    def request(self, request: Request) -> Request:
        return replace(request, run=self.school.run(self.index, request.progress), asked=self.ask(request.asked))


@dataclass(frozen=True, eq=False)
class School:
    """The adapters of one model: trained one by one, told beforehand, kept in the run's directory."""

    base: Run
    settings: LoraEnsemble
    trained: tuple[int, ...]
    build: Adapted
    apart: tuple[str, ...]

    @classmethod
    def of(cls, base: Run, settings: LoraEnsemble, trained: tuple[int, ...]) -> School:
        """Choose the layers, by running the losses of the stages that are trained on."""
        model = base.load(base.model(), base.checkpoints[-1])

        def forward() -> None:
            for k in trained:
                stage = base.stages[k]
                stage.task.loss(model, to(stage.data.batch(range(min(2, stage.size))), base.device))

        ranks, apart = choose(model, forward, settings.targets, settings.rank)
        peft = settings.through == "peft" or (
            settings.through == "auto" and _of_transformers(model) and not any(isinstance(model.get_submodule(n), nn.modules.conv._ConvNd) for n in ranks)
        )
        return cls(base, settings, trained, Adapted(base, ranks, settings.alpha, peft, settings.training), tuple(apart))

    def seed(self, index: int) -> int:
        """Of a member's start, order and dropout: its own for each model."""
        return seed_of(content_hash("adapter", self.base.weights_hash(self.base.checkpoints[-1]), self.base.variant, self.settings.seed, index))

    def path(self, index: int) -> Path:
        """Where a member's adapters lie: named by all that they are made of."""
        base, s = self.base, self.settings
        stages = [[stage.name, stage.fingerprint, task_identity(stage.task)] for stage in base.stages]
        settings = [self.build.ranks, s.alpha, self.build.peft, repr(s.tuning), list(self.trained)]
        return base.path / FOLDER / content_hash("adapters-1", base.weights_hash(base.checkpoints[-1]), base.architecture, stages, settings, self.seed(index))

    def member(self, index: int) -> Member:
        """Member ``index``, untrained as yet."""
        key = content_hash("adapter member", self.path(index).name, self.settings.merged)
        return AdapterMember(key, self.base, f"adapters {index}", lambda: self.run(index, False), seed_of(key), trial=self.trial, school=self, index=index)

    def trial(self) -> nn.Module:
        """What members compute before they are trained; free to move is what they will be scored by."""
        if not self.settings.merged:
            return self.build()
        model, moved = self.base.load(self.base.model(), self.base.checkpoints[-1]), {name for stage in self.base.stages for name in stage.trainable}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in moved)
        return model

    def run(self, index: int, progress: bool) -> Run:
        """A member as a run, trained if it was not."""
        path = self.path(index)
        if progress:
            self._tell()
        if not is_trained(path):
            self._train(path, index, progress)
        member = open_adapters(path, self.build)
        return open_merged(member, self.build) if self.settings.merged else member

    def _train(self, path: Path, index: int, progress: bool) -> None:
        model, steps = draw(self.build(), self.seed(index)), self.settings.steps
        self._one_step(model)
        started = time.perf_counter()
        with tqdm(total=steps * len(self.trained), unit=" steps", desc=f"adapters {index}", disable=not progress, leave=False, file=sys.stderr, mininterval=0.5) as bar:
            losses = finetune(path, model, self.base.stages, self.trained, self.settings.tuning, self.seed(index), bar.update)
        facts = {"ranks": self.build.ranks, "apart": list(self.apart), "moved": moved(model), "seconds": time.perf_counter() - started}
        tenth = max(1, steps // 10)
        facts["loss"] = {self.base.stages[k].name: [float(losses[k][:tenth].mean()), float(losses[k][-tenth:].mean())] for k in self.trained}
        write_json(path / "adapters.json", facts)

    def _one_step(self, model: nn.Module) -> None:
        """One gradient of each stage, which shows whether the loss reaches every adapter."""
        size = self.settings.batch_size
        for k in self.trained:
            stage = self.base.stages[k]
            with torch.enable_grad():
                loss = stage.task.loss(model, to(stage.data.batch(range(min(size, stage.size))), self.base.device)).mean()
                loss.backward()
            if not torch.isfinite(loss):
                last = self.base.checkpoints[-1]
                raise NotFinite(
                    f"a loss of {loss.item()} at step {last} of {self.base.path}, before any adapter is trained",
                    "finite weights and losses",
                    "training diverged: lower its rate",
                )
        lost = [name for name, pair in adapters_of(model).items() if pair.up.grad is None]
        if lost:
            raise GradientError(f"adapters of {lost}, on which the loss does not depend", "layers that the loss depends on", "leave them out with targets=")

    def _tell(self) -> None:
        """What is about to be done: for all adapters that are not trained yet."""
        waiting = sum(not is_trained(self.path(k)) for k in range(self.settings.members))
        if not waiting:
            return
        model, steps = self.build(), self.settings.steps * len(self.trained)
        seconds = seconds_of(lambda: self._one_step(model)) * self.settings.steps * waiting
        count = sum(pair.down.numel() + pair.up.numel() for pair in adapters_of(model).values())
        share = count / (sum(p.numel() for p in model.parameters()) - count)
        apart = f"; never called, so left out: {', '.join(self.apart)}" if self.apart else ""
        lines = (
            f"{waiting} of {self.settings.members} adapters to train, {steps} steps each: about {duration(seconds)} by timed steps",
            f"each {count:,} parameters in {len(self.build.ranks)} layers, {share:.1%} of the model's{apart}",
        )
        tqdm.write("\n".join("headwater: " + line for line in lines), file=sys.stderr)


def _of_transformers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("transformers.") and kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
