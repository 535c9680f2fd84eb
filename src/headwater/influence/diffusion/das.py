"""DAS, the diffusion attribution score: how far what the network predicts moves without an example (Lin et al. 2024, arXiv 2410.18639).

Losses compare a model with the noise; DAS compares it with the model trained without the example. For outputs that are linear in the
weights and squared errors, with J the Jacobian of an output, r its error and ``A = sum_j J_j^T J_j + lambda I`` (Sherman-Morrison),

    out_without_i(q) - out(q) = J_q A^-1 J_i^T (I - J_i A^-1 J_i^T)^-1 r_i

The Jacobian has as many rows as an image has numbers. In its place stands the gradient phi of the mean of the output, projected:

    score[q, i] = ( phi_q^T A^-1 phi_i * |r_i| / (1 - h_i) )^2,      h_i = phi_i^T A^-1 phi_i

which for a linear denoiser and one event an example is exactly ``|out_without_i(q) - out(q)|^2``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.influence.diffusion.kernels import REGULARISATION, OneKernel, asked_by, diffusion, met_at, outputs_of
from headwater.influence.methods import MAGNITUDE
from headwater.influence.request import SCORES, Parts, Request
from headwater.influence.trak.method import solved
from headwater.linalg.projections import Projection
from headwater.tasks.batches import Batch
from headwater.tasks.diffusion import Diffusion, Drawn

OUTPUT = "mean"


@dataclass(frozen=True, repr=False)
class DAS(OneKernel):
    """The diffusion attribution score (Lin, Tao, Lou, Wang & Chen 2024, arXiv 2410.18639): how far the network's prediction for the query moves, squared, when the
    example is left out.

    A magnitude: at least 0, without opponents, and blind to whether the example helped. The measure of a trace is not looked at. Derived
    again from the linear model (see the module), since the published script does not run: the leverage is each training example's own,
    and its error ``|r_i|`` the root of the mean over events of the squared error of the prediction.

    Args:
        dim: how many numbers a gradient is projected to; the paper's is 32768 (the released script's 4096). None: no projection.
        timesteps, draws: the noise events on both sides; the paper's are 10 and 100 timesteps with one noise.
        regularisation: lambda relative to the trace of ``Phi^T Phi``, above 0, or a sweep of such numbers. It bounds the leverage below 1.
        noise, seed, projection: as of :class:`DTrak`.

    >>> DAS(dim=4096)
    DAS(dim=4096, timesteps=10, draws=1, regularisation=0.005)
    """

    dim: int | None = None
    timesteps: int | tuple[int, ...] = 10
    draws: int = 1
    regularisation: float | tuple[float, ...] = REGULARISATION
    noise: str = "shared"
    seed: int = 0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        self._check()

    def __repr__(self) -> str:
        return self._told("timesteps", "draws")

    def prove(self, request: Request, model: nn.Module, trained: int) -> None:
        """Raise InputError, from the first examples, where a task is no diffusion task, or the kernel has no room."""
        outputs_of(self._met(request).run, OUTPUT, _Missed).run_once(model)
        self._fits(request, trained)

    def parts(self, request: Request) -> Parts:
        """One model's scores (queries, train)."""
        seen = self._met(request)
        found, facts = solved(self._kernel, outputs_of(seen.run, OUTPUT, _Missed), seen)
        leverage = found.leverage()
        largest = float(leverage.max())
        if not largest < 1:
            mend = "regularisation=0.005, say"
            raise InputError(f"regularisation={self.regularisation}, with which an example has leverage {largest:.6f}", "leverages below 1", mend)
        moved = found.kernel.double() * (torch.as_tensor(found.weight, device=leverage.device) / (1 - leverage))
        facts |= {"largest_leverage": round(largest, 6), "mean_leverage": round(float(leverage.mean()), 6)}
        return Parts({SCORES: moved.square().to(found.kernel.dtype).cpu().numpy()}, repr(self), MAGNITUDE, facts)

    def _met(self, request: Request) -> Request:
        grid = diffusion(request.run.stages[-1]).grid(self.timesteps, self.draws, noise=self.noise, seed=self.seed)
        return replace(asked_by(request, OUTPUT, grid), run=met_at(request.run, lambda stage: grid))


@dataclass(frozen=True, eq=False)
class _Missed:
    """By how much the network misses its target: the root of the mean over events of the squared length, (n,)."""

    task: Diffusion

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.over_events(batch, lambda rows: self._row(model, rows)).sqrt()

    def _row(self, model: nn.Module, rows: Drawn) -> Tensor:
        task, out = self.task, self.task.predict(model, rows)
        target = task.process.target(task.prediction, *task.parts(rows, out.dtype))
        return (out - target).flatten(1).square().sum(1)
