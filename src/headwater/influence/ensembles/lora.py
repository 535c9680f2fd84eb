"""An ensemble of adapters: short trainings of low-rank additions to one frozen model, each of them a member."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from headwater.errors import GradientError, InputError, NotFinite
from headwater.influence.ensembles.carrying import carry_out
from headwater.influence.ensembles.ensemble import check_method
from headwater.influence.ensembles.members import Member, seed_of
from headwater.influence.methods import Method
from headwater.influence.request import Request
from headwater.influence.unrolled.method import Unrolled
from headwater.report.numbers import duration
from headwater.result import TrainingScores
from headwater.store import content_hash, write_json
from headwater.tasks.batches import to
from headwater.tasks.code import task_identity
from headwater.training import Run
from headwater.training.adapters import adapters_of, draw, moved
from headwater.training.finetune import Adapted, Tuning, finetune, is_trained, open_adapters, open_merged
from headwater.training.targets import choose

FOLDER = "adapters"
"""Where a run's trained adapters lie in its directory."""


@dataclass(frozen=True, repr=False)
class LoraEnsemble:
    """An ensemble of adapters (Deng, Li, Zhang and Ma 2024, arXiv 2405.17293): each member is the run's final model, frozen, with low-rank
    adapters of its own start and order of examples, trained for a short while. Members are scored with gradients of their adapters alone,
    and averaged by the method's rule.

    A member is a recorded training in the run's directory (``adapters/``): any method works on it, also those that follow training. It is
    trained when it is first needed, and kept; more ``members`` later train only the new ones.

    Args:
        method: what each member is scored by: ``hw.Trak()``, ``hw.GradDot()``, ``hw.Source()``.
        members: how many.
        rank: of every adapter; default: 8, or as much as a smaller layer has.
        targets: the layers to adapt: names, ends of names ("attn.c_attn") or patterns ("blocks.*.fc?"), or how many of the last ones;
            default: every Linear and convolution that the loss calls.
        steps: optimizer steps (of each stage that is trained on).
        alpha: the adapters' outputs are scaled by ``alpha / rank``; default: by 1.
        lr: default: 0.002 for "adamw", 0.05 for "sgd".
        optimizer: "adamw" (without weight decay) or "sgd" (momentum 0.9).
        stages: of a run with several stages train adapters on the data of the "last" or of "all", one after the other. Every stage's examples
            are scored either way, at the trained adapters; but methods that follow training (TracIn, Source, Unrolled) need "all".
        training: in training mode, with dropout and BatchNorm as they were in training; default: both stand still.
        merged: score the model with the adapters added to its weights, by gradients of all that the run trained. For methods at the final
            weights only (GradDot, GradCos, Influence, Trak).
        through: "hooks" (our own adapters, any model), "peft", or "auto": peft for the Linear layers of a transformers model.
        seed: of starts, orders and dropout. The same seed on the same machine gives the same members bit by bit.

    >>> from headwater.influence import GradDot
    >>> LoraEnsemble(GradDot(), members=3, steps=200)
    LoraEnsemble(GradDot(), members=3, steps=200)
    """

    method: Any
    members: int = 5
    rank: int | None = None
    targets: int | str | tuple[str, ...] | None = None
    steps: int = 100
    alpha: float | None = None
    lr: float | None = None
    batch_size: int = 32
    optimizer: str = "adamw"
    stages: str = "last"
    training: bool = False
    merged: bool = False
    through: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.members < 1:
            raise InputError(f"members={self.members}", "at least 1", "members=5")
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank={self.rank}", "at least 1", "leave it out: 8, or as much as a smaller layer has")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise InputError(f"alpha={self.alpha}", "a number above 0", "leave it out: adapters' outputs are then not scaled")
        for name, value, allowed in (("stages", self.stages, ("last", "all")), ("through", self.through, ("auto", "hooks", "peft"))):
            if value not in allowed:
                raise InputError(f"{name}={value!r}", f"one of {allowed}", "see hw.LoraEnsemble")
        _ = self.tuning
        check_method(self.method, "LoraEnsemble")

    def __repr__(self) -> str:
        """The method, and what differs from the defaults."""
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[1:] if f.name == "members" or getattr(self, f.name) != f.default]
        return f"LoraEnsemble({self.method!r}, {', '.join(said)})"

    def answer(self, request: Request) -> TrainingScores:
        """Scores averaged over the members, with their standard errors (what :func:`headwater.trace` calls)."""
        return carry_out(repr(self), self.method, self.variants(request.run), request)

    @property
    def tuning(self) -> Tuning:
        """How adapters are trained."""
        return Tuning(self.steps, self.lr, self.batch_size, self.optimizer, self.training)

    def variants(self, run: Run) -> tuple[Member, ...]:
        """One member for each adapter on ``run``'s final model."""
        trained = tuple(stage.index for stage in run.stages) if self.stages == "all" else (run.stages[-1].index,)
        self._refuse_trajectory(run, len(trained))
        school = School.of(run, self, trained)
        return tuple(school.member(k) for k in range(self.members))

    def _refuse_trajectory(self, run: Run, trained: int) -> None:
        """Refuse a method that follows training where adapters have no training of all that is scored."""
        if not (self.merged or trained < len(run.stages)) or not _follows_training(self.method, run):
            return
        final = "a method at the final weights: GradDot, GradCos, Influence, Trak"
        if self.merged:
            mend = "leave merged= out: adapters are trainings that it can follow"
            raise InputError(f"{self.method!r} on merged adapters, which follows training", final, mend)
        raise InputError(
            f"{self.method!r} on adapters trained on the last of {len(run.stages)} stages: it follows training through all of them",
            f"adapters trained on all stages, or {final}",
            "stages='all'",
        )


def _follows_training(method: Any, run: Run) -> bool:
    """Whether a method looks at more of a run than its final weights."""
    if not isinstance(method, Method):
        return isinstance(method, Unrolled)
    rows, final = method.plan(run).rows, (run.checkpoints[-1],)
    return {row.stage for row in rows} != {stage.index for stage in run.stages} or any(row.at != (final,) or row.query_at not in (None, final) for row in rows)


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
        return base.path / FOLDER / content_hash("adapters-1", base.weights_hash(base.checkpoints[-1]), base.variant, stages, settings, self.seed(index))

    def member(self, index: int) -> Member:
        """Member ``index``, untrained as yet."""
        key = content_hash("adapter member", self.path(index).name, self.settings.merged)
        return AdapterMember(key, self.base, f"adapters {index}", lambda: self.run(index, False), seed_of(key), school=self, index=index)

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

    def _one_step(self, model: nn.Module) -> float:
        """Seconds of one step of training, by one gradient of each stage, which also shows whether the loss reaches every adapter."""
        started, size = time.perf_counter(), self.settings.batch_size
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
        seconds = (time.perf_counter() - started) / len(self.trained)
        lost = [name for name, pair in adapters_of(model).items() if pair.up.grad is None]
        if lost:
            raise GradientError(f"adapters of {lost}, on which the loss does not depend", "layers that the loss depends on", "leave them out with targets=")
        model.zero_grad(set_to_none=True)
        return seconds

    def _tell(self) -> None:
        """What is about to be done: for all adapters that are not trained yet."""
        waiting = sum(not is_trained(self.path(k)) for k in range(self.settings.members))
        if not waiting:
            return
        model, steps = self.build(), self.settings.steps * len(self.trained)
        self._one_step(model)  # the first is slower
        seconds = self._one_step(model) * steps * waiting
        count = sum(pair.down.numel() + pair.up.numel() for pair in adapters_of(model).values())
        share = count / (sum(p.numel() for p in model.parameters()) - count)
        apart = f"; never called, so left out: {', '.join(self.apart)}" if self.apart else ""
        lines = (
            f"{waiting} of {self.settings.members} adapters to train, {steps} steps each: about {duration(seconds)} by one timed step",
            f"each {count:,} parameters in {len(self.build.ranks)} layers, {share:.1%} of the model's{apart}",
        )
        tqdm.write("\n".join("headwater: " + line for line in lines), file=sys.stderr)


def _of_transformers(model: nn.Module) -> bool:
    return any(kind.__module__.startswith("transformers.") and kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)
