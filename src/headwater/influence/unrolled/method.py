"""Exact unrolled differentiation: the derivative of a measurement in the weight of every training example, through all of training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from headwater.errors import InputError
from headwater.influence.methods import MEASUREMENT
from headwater.influence.request import SCORES, Parts, Request, mean_of_scores
from headwater.influence.unrolled.backwards import Backwards
from headwater.influence.unrolled.schedule import NAMES
from headwater.influence.unrolled.weigh import EXAMPLES, Weighing
from headwater.training.replay.clipping import KINDS as CLIPPINGS
from headwater.training.run import EMA

KEEPS = ("auto", "memory", "disk")


@dataclass(frozen=True)
class Unrolled:
    """The exact answer of first order, by reverse mode through the recorded training (Bae et al. 2024, Eq. 5; MAGIC: Ilyas and Engstrom
    2025, arXiv 2504.16430).

    The training is repeated from its record, held against every recorded checkpoint, gradient norm and loss, and then walked backwards:
    ``score(q, i) = d measure(q) / d w_i`` at w = 1, with training on ``sum_i w_i loss_i / batch size`` (the normaliser stays). This is the
    predicted change that training on example i caused, in the measurement's own unit; an example that no step saw scores 0. It answers for
    re-weighting along the same batches and random numbers; ``hw.evaluate.slope`` and ``lds`` compare it with real removal.

    SGD (momentum, dampening, Nesterov), Adam, AdamW, AMSGrad; weight decay, schedules, parameter groups, stages, micro-batches, dropout
    (the recorded masks), BatchNorm in training mode (an example's effect through the statistics of its batch and the running ones
    included), and clipping of the norm: a recorded factor below 1 is taken as ``max_norm / (|g| + 1e-6)`` of the gradient g of all parameters
of the optimizer together, and moves with it. All queries pass one reverse sweep together.

    Args:
        schedule: which states are kept on the way: "every" (one replay of the training in all), "sqrt" (two), "log" (more), or "auto":
            the fewest replays that the ``memory`` of :func:`hw.trace` has room for.
        keep: "memory", "disk" (the run's directory), or "auto": memory where at least the logarithmic schedule fits.
        weigh: what has a weight: ``hw.weigh.examples()``, ``groups(labels)``, ``tokens()``, ``terms(function, count)``.
        tolerance: how far the replay may be from the record; default: forgives rounding only.
        clipping: what the factors of ``recorder.step(ids, clip=)`` below 1 are: "norm" (as above), "fixed" (numbers that do not depend on the
            gradient), or "auto": "norm" where all clipped gradients of a stage have one norm, "fixed" where all factors of it are one number;
            refused where neither holds (a ``max_norm`` that changes, another norm than the 2-norm, norms of parts of the parameters).

    ``batch_size`` of :func:`hw.trace` splits steps into micro-batches of at most so many examples, which costs time and saves memory;
    the result is the same up to rounding. Steps with dropout or BatchNorm keep the batches they had.

    Raises ReplayMismatch where the training, repeated, departs from its record: at which step, and what escaped. RunError: the record
    lacks what a replay needs. GradientError: it does not tell what the clipping was, or an operation has no second derivative.

    >>> Unrolled(schedule="sqrt")
    Unrolled(schedule='sqrt', keep='auto', weigh=weigh.examples(), tolerance=None, clipping='auto')
    """

    schedule: str = "auto"
    keep: str = "auto"
    weigh: Weighing = EXAMPLES
    tolerance: float | None = None
    clipping: str = "auto"

    def __post_init__(self) -> None:
        if self.schedule not in ("auto", *NAMES):
            raise InputError(f"schedule={self.schedule!r}", f"'auto', {', '.join(map(repr, NAMES))}", "schedule='auto' chooses from the memory budget")
        if self.keep not in KEEPS:
            raise InputError(f"keep={self.keep!r}", f"one of {', '.join(map(repr, KEEPS))}", "keep='auto'")
        if self.clipping not in CLIPPINGS:
            raise InputError(f"clipping={self.clipping!r}", f"one of {', '.join(map(repr, CLIPPINGS))}", "clipping='auto' asks the record")
        if not isinstance(self.weigh, Weighing):
            raise InputError(f"weigh={self.weigh!r}", "what has a weight", "weigh=hw.weigh.examples(), groups(labels), tokens() or terms(function, count)")
        if self.tolerance is not None and not self.tolerance > 0:
            raise InputError(f"tolerance={self.tolerance}", "a positive relative distance", "leave it out: rounding is forgiven, nothing else")

    def prove(self, request: Request, model: nn.Module, trained: int) -> None:
        """Raise InputError, TaskError where what has a weight does not fit the run's tasks and examples."""
        self.weigh.on(request.run)

    def parts(self, request: Request) -> Parts:
        """The scores of one run."""
        started = time.perf_counter()
        if request.run.which == EMA:
            raise InputError(
                "hw.Unrolled() asked about averaged (EMA) weights",
                "the raw weights, whose training it repeats",
                'hw.trace(..., weights="raw"), or hw.Source(), which takes query gradients at the average',
            )
        backwards = Backwards(request, self.schedule, self.keep, self.weigh, self.tolerance, self.clipping, repr(self))
        scores = backwards.scores()
        run, columns = request.run, backwards.columns
        provenance: dict[str, Any] = {
            "run": str(run.path),
            "method": repr(self),
            "weights": run.weights_hash(run.checkpoints[-1]),
            "data": [stage.fingerprint for stage in run.stages],
            **columns.scored,
            "columns": columns.names if columns.names is not None else {"examples": run.size, "of each": columns.width},
            "replay": backwards.report,
            "cost": {"seconds": round(time.perf_counter() - started, 3), "plan": backwards.plan.facts()},
        }
        return Parts({SCORES: scores.numpy()}, repr(self), MEASUREMENT, provenance)

    def combine(self, members: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """The mean of the members' scores."""
        return mean_of_scores(members)
