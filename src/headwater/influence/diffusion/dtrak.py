"""D-TRAK: TRAK's kernel of output functions of a diffusion model (Zheng, Pang, Du, Jiang & Lin 2024, arXiv 2311.00500).

    phi(x)      = P^T  mean over events (t, eps) of  grad f(x, t, eps)
    score[q, i] = phi(q)^T (Phi^T Phi + lambda I)^-1 phi(i)

at the final weights, the same f on both sides, no weight of training examples. Averaging before projecting is the same as after, and
cheaper. With ``N < dim`` the kernel is solved in the space of examples, which gives the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from headwater.influence.diffusion.kernels import REGULARISATION, OneKernel, OutputFunction, asked_by, check_output, diffusion, met_at, outputs_of
from headwater.influence.methods import RANK_ONLY
from headwater.influence.request import SCORES, Parts, Request
from headwater.influence.trak.method import solved
from headwater.linalg.projections import Projection
from headwater.tasks.diffusion import Grid


@dataclass(frozen=True, repr=False)
class DTrak(OneKernel):
    """D-TRAK: TRAK's kernel, of gradients of an output function averaged over timesteps, on both sides (Zheng et al. 2024, arXiv 2311.00500).

    Args:
        dim: how many numbers a gradient is projected to; the paper's is 32768. None: no projection, the kernel from inner products of whole
            gradients, exactly (for as many training examples as have a matrix of all pairs in ``memory``).
        timesteps: so many (spread over all of them), or which; the paper's are 10 and 100.
        draws: noises at each.
        output: the output function f, of a task's kinds ("square_norm": the mean square of what the network answers, the paper's choice;
            "mean", "l1_norm"; "loss": TRAK as used on diffusion models; "elbo"), or any function ``(model, batch) -> (n,)``. The
            measure of a trace is not looked at: f is asked on the queries' side, too.
        regularisation: lambda relative to the trace of ``Phi^T Phi``, above 0; a tuple of numbers is a sweep: as many scores, from one pass
            over the training data. Too little destroys the scores, too much costs little. Choose it on queries that are not
            reported: ``hw.evaluate.tuned``.
        noise: "shared" by all examples, or each "example" its own. seed: of the noise.
        projection: how gradients are projected, a value of ``hw.projections``; default: ``KhatriRao(dim)``.

    A positive score: training on the example pushed f of the query the way it pushed its own. Where f is a loss that is a proponent; for
    other functions that sign is a heuristic, which ranked best in the paper. Scores rank; they are in no unit.

    >>> DTrak(dim=4096, timesteps=10)
    DTrak(dim=4096, timesteps=10, draws=1, output='square_norm', regularisation=0.005)
    """

    dim: int | None = None
    timesteps: int | tuple[int, ...] = 10
    draws: int = 1
    output: OutputFunction = "square_norm"
    regularisation: float | tuple[float, ...] = REGULARISATION
    noise: str = "shared"
    seed: int = 0
    projection: Projection | None = None

    def __post_init__(self) -> None:
        self._check()
        check_output(self.output)

    def __repr__(self) -> str:
        return self._told("timesteps", "draws", "output")

    def prove(self, request: Request, model: nn.Module, trained: int) -> None:
        """Raise InputError, from the first examples, where a task is no diffusion task, has no such output, or the kernel no room."""
        outputs_of(self._met(request).run, self.output).run_once(model)
        self._fits(request, trained)

    def parts(self, request: Request) -> Parts:
        """One model's scores (queries, train)."""
        seen = self._met(request)
        found, facts = solved(self._kernel, outputs_of(seen.run, self.output), seen)
        facts["events"] = repr(self._grid(request))
        return Parts({SCORES: found.kernel.cpu().numpy()}, repr(self), RANK_ONLY, facts)

    def _grid(self, request: Request) -> Grid:
        return diffusion(request.run.stages[-1]).grid(self.timesteps, self.draws, noise=self.noise, seed=self.seed)

    def _met(self, request: Request) -> Request:
        """The same request, of the output function at the method's events on both sides."""
        grid = self._grid(request)
        return replace(asked_by(request, self.output, grid), run=met_at(request.run, lambda stage: grid))
