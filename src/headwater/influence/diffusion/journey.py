"""Journey-TRAK: which examples a generation is owed to, sampling step by sampling step (Georgiev et al. 2023, arXiv 2312.06205).

    query, step t:   phi_t = P^T  mean over noises eps of  grad loss(x0hat_t, t, eps),      x0hat_t: what the sampler took the image to be at t
    training:        phi   = P^T  mean over random timesteps of  grad loss(x, t, eps)
    score[t][q, i] = phi_t(q)^T (Phi^T Phi + lambda I)^-1 phi(i)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from headwater.errors import InputError
from headwater.influence.diffusion.kernels import REGULARISATION, OneKernel, diffusion, met_at, outputs_of, value_of
from headwater.influence.methods import RANK_ONLY
from headwater.influence.request import SCORES, Parts, Request
from headwater.influence.trak.method import solved
from headwater.linalg.projections import Projection
from headwater.philox import key_of, uniforms
from headwater.result import Slices
from headwater.tasks.diffusion import Listed, Travelled
from headwater.tasks.diffusion.noise import seeds_of
from headwater.training import Run
from headwater.training.run import Stage

OUTPUT = "loss"


@dataclass(frozen=True, repr=False)
class JourneyTrak(OneKernel):
    """Journey-TRAK: TRAK's kernel for each sampling step of a generation (Georgiev et al. 2023, arXiv 2312.06205).

    Queries are a :class:`headwater.tasks.Trajectory`. At each step what the sampler took the image to be is given fresh noise of the same
    timestep, and the gradients of minus the loss are averaged over ``draws`` noises. ``scores.by("timestep")`` has the scores of each step,
    divided by the number of steps, so that they sum to the scores, the mean over the journey.

    Args:
        dim: how many numbers a gradient is projected to; the paper's is 2048. None: no projection.
        timesteps: noise events of each training example, at timesteps drawn as in training, its own; the paper's are 5 to 20.
        draws: noises at each sampling step.
        regularisation, projection: as of :class:`DTrak`. seed: of timesteps and noise.

    Positive: training on the example lowered the loss at that step. Scores rank; they are in no unit.

    >>> JourneyTrak(dim=2048)
    JourneyTrak(dim=2048, timesteps=5, draws=20, regularisation=0.005)
    """

    dim: int | None = None
    timesteps: int = 5
    draws: int = 20
    regularisation: float | tuple[float, ...] = REGULARISATION
    seed: int = 0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        self._check()
        if not isinstance(self.timesteps, int) or self.timesteps < 1 or self.draws < 1:
            given = f"timesteps={self.timesteps!r} and draws={self.draws!r}"
            raise InputError(given, "numbers of at least 1", "timesteps are drawn as in training: say how many an example")

    def __repr__(self) -> str:
        return self._told("timesteps", "draws")

    def prove(self, request: Request, model: nn.Module, trained: int) -> None:
        """Raise InputError, from the first examples, where queries have no trajectory, or the kernel no room."""
        _journeys(request)
        outputs_of(self._met(request.run), OUTPUT).run_once(model)
        self._fits(request, trained)

    def parts(self, request: Request) -> Parts:
        """One model's scores (queries, train), and those of each step."""
        journeys, run = _journeys(request), self._met(request.run)
        timesteps, count = journeys[0].journey.timesteps, request.asked.count
        task = diffusion(run.stages[-1])
        examples, rows = [], []
        for k, t in enumerate(timesteps):
            grid = task.grid((t,), self.draws, seed=self.seed)
            examples += [journey.step(k).over(grid) for journey in journeys]
            rows += [ids + k * count for ids in request.asked.rows]
        names = tuple(map(str, range(count * len(timesteps))))
        asked = replace(request.asked, examples=tuple(examples), rows=tuple(rows), names=names, measure=value_of(task, OUTPUT))
        found, facts = solved(self._kernel, outputs_of(run, OUTPUT), replace(request, run=run, asked=asked))
        steps = found.kernel.cpu().numpy().reshape(len(timesteps), count, -1) / len(timesteps)
        return Parts({SCORES: steps.sum(0)}, repr(self), RANK_ONLY, facts, {"timestep": Slices("timestep", timesteps, steps)})

    def _met(self, run: Run) -> Run:
        """The run with its training examples at random timesteps, as training draws them."""
        return met_at(run, self._drawn)

    def _drawn(self, stage: Stage) -> Listed:
        process, key = diffusion(stage).process, key_of("journey", self.seed, stage.index)
        u = uniforms(key, range(stage.size), range(self.timesteps)).contiguous()
        t = (u * process.steps).floor()
        if process.density is not None:
            levels = process.density.cumsum(0) / process.density.sum()
            t = torch.searchsorted(levels, u, right=True).double()
        seeds = seeds_of(key, np.arange(stage.size), [(0, j) for j in range(self.timesteps)])
        return Listed(t.clamp_max(process.steps - 1).numpy(), seeds.numpy())


def _journeys(request: Request) -> list[Travelled]:
    """The queries' trajectories, which must all go over the same timesteps. Raises InputError."""
    found = [e for e in request.asked.examples if isinstance(e, Travelled)]
    if len(found) < len(request.asked.examples):
        mend = "hw.tasks.Trajectory.sample(task, model, batch), or hw.tasks.watched(pipeline.scheduler, task)"
        raise InputError("queries without a trajectory", "a hw.tasks.Trajectory: what the sampler took each image to be at each step", mend)
    if len({journey.journey.timesteps for journey in found}) > 1:
        raise InputError("trajectories over different timesteps in one trace", "the same sampling steps in all", "trace them apart")
    return found
