"""Independent models: the ensemble that every cheaper one is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from headwater.errors import DataMismatch, InputError
from headwater.influence.ensembles.carrying import carry_out
from headwater.influence.ensembles.members import Member, Variants, model_key, seed_of
from headwater.influence.methods import Method
from headwater.influence.request import Answering, Request, Scorer
from headwater.result import TrainingScores
from headwater.tasks.code import task_identity
from headwater.training import Run


@dataclass(frozen=True, eq=False, repr=False)
class Ensemble:
    """A method averaged over independently trained models, with standard errors.

    Scores of one training are those of one draw of its chance (initial weights, order); the mean over trainings predicts retraining
    much better, and the differences say how far it can be trusted. Two levels: ``hw.Ensemble(hw.DropoutEnsemble(method, members=4),
    runs)`` has 4 masks of every model; models are then what varies independently, and standard errors are theirs.

    Args:
        method: ``hw.Trak()``, ``hw.Influence(...)``, ``hw.Source()`` ..., or an ensemble of variants of one model. Averaged as the method
            says: scores for most (of GradCos: cosines), for TRAK ``mean(kernel) * mean(weight)``. A random projection is drawn anew for
            every model (seeded by its weights); labels that a curvature samples are the same for all (keyed by its seed and the example).
        runs: the members, exactly these, of trainings that differ in their seed (Ensemble asks nothing of the run that ``trace`` is
            given but its data and task). All on the same data in the same order, under the same task: for members trained on subsets
            record each with the whole dataset as ``train`` and draw its batches from the subset.

    The result: ``stderr`` (None for one run) is the jackknife's over models, ``result.spread`` compares models with their variants,
    ``result.reliable()`` marks the scores that can be told from zero. Contributions are kept in each run's directory: a further run
    costs only itself, and neither order nor the number of calls changes a bit of the result.

    Raises:
        InputError: no runs, the same model twice, a method that is none. DataMismatch: a run with other data or another task.

    >>> Ensemble(None, [])
    Traceback (most recent call last):
    ...
    headwater.errors.InputError: an ensemble of no runs
    Expected: at least one recorded training
    To mend it: hw.Ensemble(hw.Trak(), [run_1, run_2, run_3])
    """

    method: Any
    runs: Sequence[Run]

    def __post_init__(self) -> None:
        given = [self.runs] if isinstance(self.runs, Run) else list(self.runs)
        if not given:
            raise InputError("an ensemble of no runs", "at least one recorded training", "hw.Ensemble(hw.Trak(), [run_1, run_2, run_3])")
        for run in given:
            if not isinstance(run, Run):
                raise InputError(f"a {type(run).__name__} among the runs of an ensemble", "recorded trainings (hw.Run)", "hw.Run.open(path, build=, train=, task=)")
        object.__setattr__(self, "runs", tuple(given))
        if isinstance(self.method, type) or not isinstance(self.method, Variants):
            check_method(self.method, "Ensemble")

    def __repr__(self) -> str:
        return f"Ensemble({self.method!r}, {len(self.runs)} run{'s' if len(self.runs) > 1 else ''})"

    def members(self, run: Run) -> list[Member]:
        """All members, for a question about ``run``: one for each run, or the variants of each."""
        for other in self.runs:
            _check_alike(other, run)
        found: list[Member] = []
        for other in self.runs:
            own = seed_of(model_key(other))
            variants = self.method.variants(other) if isinstance(self.method, Variants) else [plain(other)]
            found += [_of_model(member, own) for member in variants]
        return found

    def answer(self, request: Request) -> TrainingScores:
        """Scores averaged over the members, with their standard errors (what :func:`headwater.trace` calls)."""
        method = self.method.method if isinstance(self.method, Variants) else self.method
        return carry_out(repr(self), method, self.members(request.run), request)


def plain(run: Run) -> Member:
    """A run as it is, as a member."""
    return Member(model_key(run), run, "the model", lambda: run)


def _of_model(member: Member, seed: int) -> Member:
    """A member with its model's seed added to its own: chance of a method's own is drawn anew for each model."""
    shares = None if member.shares is None else _of_model(member.shares, seed)
    return replace(member, seed=(member.seed + seed) % 2**31, shares=shares)


def check_method(method: Any, ensemble: str) -> None:
    """Raise InputError unless ``method`` is one that can be averaged over members."""
    example = f"hw.{ensemble}(hw.Source(), ...)"
    if isinstance(method, Answering) and not isinstance(method, type):
        raise InputError(f"{type(method).__name__} inside {ensemble}", "a method", "two levels: hw.Ensemble(hw.DropoutEnsemble(method, members=4), runs)")
    if isinstance(method, type) or not isinstance(method, Method | Scorer):
        raise InputError(f"{method!r} where an ensemble's method belongs", "a method such as hw.Source() or hw.Trak()", f"construct it: {example}")
    damping = getattr(method, "damping", None)
    if isinstance(damping, tuple):
        mend = f"a list of ensembles: [hw.{ensemble}(m, ...) for m in method.sweep()]"
        raise InputError(f"a sweep of {len(damping)} dampings inside {ensemble}", "one damping", mend)


def _check_alike(run: Run, asked: Run) -> None:
    """Raise DataMismatch unless a run's examples are the columns of the run that is asked about, under the same task."""
    pairs: list[tuple[str, Any, Any]] = [("stages", len(run.stages), len(asked.stages))]
    for own, other in zip(run.stages, asked.stages, strict=False):
        where = f"stage {own.name!r}"
        pairs += [(f"examples in {where}", own.size, other.size), (f"data of {where} (fingerprint)", own.fingerprint[:20], other.fingerprint[:20])]
        if own.task is not other.task:
            pairs += [(f"task of {where}", task_identity(own.task), task_identity(other.task))]
    for what, mine, theirs in pairs:
        if mine != theirs:
            told = f": {mine} and {theirs}" if not what.startswith("task") else ""
            raise DataMismatch(
                f"the {what} of the run {run.path} differ from those of the run that is traced, {asked.path}{told}",
                "runs of one task on one dataset, so that their scores have the same columns",
                "record every member with the same train= (for members trained on subsets too: draw their batches from the subset) and task=",
            )
