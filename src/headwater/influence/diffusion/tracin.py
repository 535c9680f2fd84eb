"""Diffusion-TracIn and Diffusion-ReTrac (Xie, Li, Bai & Hsieh 2024, arXiv 2401.09031): TracIn's rows over noise events.

    I(i, q) = sum_k w_k < train_k(i), query_k(q) >,      w_k = the learning rates summed over the steps that checkpoint k stands for, / N

    TracIn   query: mean over timesteps and noises of gradients;                     train: the gradient at the event that training met
    ReTrac   query: mean over timesteps of the UNIT gradient (its mean over noises); train: that gradient at UNIT norm

Timesteps differ in the size of their gradients by far, so a plain product says at which timestep an example was met rather than what
it taught; ReTrac takes the size out. Norms are those of the whole gradient. A zero gradient counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headwater.errors import InputError
from headwater.influence.diffusion.kernels import diffusion
from headwater.influence.methods import MEASUREMENT, RANK_ONLY, Asking, Pace, Row, Table, kept, total_rate
from headwater.influence.responses import Constant
from headwater.tasks.diffusion import Grid, Listed
from headwater.training import Run
from headwater.training.run import Stage

EXPECTED, REPLAY = "expected", "replay"


@dataclass(frozen=True)
class _OverEvents:
    """What both have in common: which noise events are taken on either side."""

    timesteps: int | tuple[int, ...] = 10
    draws: int = 1
    events: str = EXPECTED
    window: int = 1
    noise: str = "shared"
    seed: int = 0
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.timesteps, list):
            object.__setattr__(self, "timesteps", tuple(self.timesteps))
        object.__setattr__(self, "keep", kept(self.keep, ("checkpoint", "timestep")))
        if self.events not in (EXPECTED, REPLAY):
            raise InputError(f"events={self.events!r}", f"{EXPECTED!r} or {REPLAY!r}", "expected events need no record; replay takes those that training met")
        if self.window < 1 or (self.window > 1 and self.events != REPLAY):
            raise InputError(f"window={self.window} with events={self.events!r}", "at least 1, and above 1 only of recorded events", "events='replay', window=20")

    def plan(self, run: Run) -> Table:
        rows = [row for stage in run.stages for row in self._rows(run, stage)]
        plain = all(stage.optimizer.kind == "sgd" for stage in run.stages)
        return Table(repr(self), tuple(rows), MEASUREMENT if plain and not self._unit else RANK_ONLY, keep=self.keep)

    @property
    def _unit(self) -> bool:
        return False

    def _rows(self, run: Run, stage: Stage) -> Iterator[Row]:
        """Rows of a stage's checkpoints: for each, training events x query timesteps, as far as they have to be told apart."""
        start = stage.start
        for step in stage.checkpoints(run.checkpoints):
            pace = Pace(start, step)
            grid = diffusion(run.stages[-1]).grid(self.timesteps, self.draws, noise=self.noise, seed=self.seed, salt=step)
            for events, share in self._train(run, stage, step):
                for asking, part, labels in self._askings(grid, step):
                    yield Row(
                        stage.index, ((step,),), Constant(total_rate(run, pace)), asking=asking, pace=pace, events=events,
                        unit=self._unit, share=share * part, labels=(("checkpoint", step), *labels),
                    )  # fmt: skip
            start = step

    def _train(self, run: Run, stage: Stage, step: int) -> Iterator[tuple[Grid | Listed, float]]:
        """The training events of a checkpoint, apart where each is brought to unit norm, and the share of each."""
        task = diffusion(stage)
        if self.events == REPLAY:
            met = run.met(stage, step, self.window)
            groups: list[Grid | Listed] = [Listed(met.t[:, [k]], met.seeds[:, [k]]) for k in range(met.count)] if self._unit else [met]
        else:
            grid = task.grid(self.timesteps, self.draws, noise=self.noise, seed=self.seed, salt=step)
            groups = list(grid.parts()) if self._unit else [grid]
        for events in groups:
            yield events, 1 / len(groups)

    def _askings(self, grid: Grid, step: int) -> Iterator[tuple[Asking, float, tuple[tuple[str, float], ...]]]:
        """What training gradients are compared with, and the share of each: one vector for all timesteps, unless they are kept apart."""
        parts = grid.parts() if self._unit else (grid,)
        if "timestep" not in self.keep:
            yield Asking((step,), parts, self._unit), 1.0, ()
            return
        for part in grid.parts():
            yield Asking((step,), (part,), self._unit), 1 / len(grid.timesteps), (("timestep", part.timesteps[0]),)


@dataclass(frozen=True)
class DiffusionTracIn(_OverEvents):
    """Diffusion-TracIn (Xie et al. 2024, arXiv 2401.09031, section 3.1): over the run's checkpoints, the product of the query's gradient and the
    training example's, each a mean over noise events, times the summed learning rate, / N. Plain inner products, under Adam as well
    (where the scores then only rank; with SGD they are in the measurement's unit to first order).

    Args:
        timesteps: so many (spread over all of them), or which; the paper's is 100 on the query side.
        draws: noises at each; the paper's is 16.
        events: of the training examples. "expected": the same timesteps and draws as for queries, which needs no record; "replay": those that
            training met, as published (the run must have been recorded with ``recorder.step(ids, events=...)``).
        window: of "replay": the last so many events before each checkpoint; the paper takes 1, which is noisy.
        noise: "shared" by all examples, or each "example" its own.
        seed: of the noise.
        keep: "timestep" (the query's) and "checkpoint" keep those scores apart: ``scores.by("timestep")``.

    Positive: training on the example lowered the query's loss (the measure of a diffusion task is minus the loss).

    >>> DiffusionTracIn(timesteps=20, draws=2)
    DiffusionTracIn(timesteps=20, draws=2, events='expected', window=1, noise='shared', seed=0, keep=())
    """


@dataclass(frozen=True)
class DiffusionReTrac(_OverEvents):
    """Diffusion-ReTrac (Xie et al. 2024, arXiv 2401.09031, section 3.3): as :class:`DiffusionTracIn`, with each training event's gradient at unit
    norm, and on the query side each timestep's mean gradient over its noises at unit norm, then the mean over timesteps.

    So it does not matter at which timestep gradients happen to be large, nor how the loss weighs timesteps. With expected events the training
    side is treated as the query side. Arguments as for :class:`DiffusionTracIn`. Scores rank.

    >>> DiffusionReTrac(events="replay", window=20).window
    20
    """

    @property
    def _unit(self) -> bool:
        return True
