"""An ensemble of adapters: short trainings of low-rank additions to one frozen model, each of them a member."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from headwater.errors import InputError
from headwater.influence.ensembles.carrying import carry_out
from headwater.influence.ensembles.ensemble import check_method
from headwater.influence.ensembles.members import Member
from headwater.influence.ensembles.school import School
from headwater.influence.methods import Method
from headwater.influence.request import Request
from headwater.influence.unrolled.method import Unrolled
from headwater.result import TrainingScores
from headwater.training import Run
from headwater.training.finetune import Tuning


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
        seed: of starts, orders and dropout. The same seed gives the same members bit by bit, on one machine with as many threads.

    An adapter's gradient is a projection of the whole weight's (``dB = scale G A^T``: of the inputs, to ``rank`` directions). So members differ
    in what they see of one and the same gradient, and not much in the model: averaging them makes up for the projection, and brings
    most to TRAK. ``merged=True`` has whole gradients of models that differ a little. ``stderr`` is for this model: what another training
    would give adapters cannot know; for that, ``hw.Ensemble(hw.LoraEnsemble(method, members=2), runs)``.

    Raises:
        InputError: a model without such layers, targets that match nothing, a rank larger than a layer, a method that follows training
            where adapters have none. GradientError: adapters that training cannot move. MissingExtra: a transformers model without peft.

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
        """Scores averaged over the members, with their standard errors (what :func:`headwater.trace` calls). Asked about averaged
        weights, adapters are trained on the averaged model."""
        request = request.in_one_place
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
    return any(row.at != (final,) or (row.asking is not None and row.asking.at != final) for row in rows)
