"""Whether a method can work on a run, found out by a forward pass or two: before work is done that a refusal would waste.

A method knows what it needs of a task, and would say so when it gets there. An ensemble of adapters gets there after training the first of
them; a table, after the queries' gradients. So what can be refused by looking at the first examples of each stage is looked at beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import nn

from headwater.curvature.estimate import Estimate, prove_fisher
from headwater.influence.methods import Method
from headwater.influence.request import Request
from headwater.tasks.batches import to
from headwater.training import Run


@runtime_checkable
class Proving(Protocol):
    """A method that can tell beforehand. ``model``: the run's, at its final weights (or one that computes the same, with untrained adapters
    in it); ``trained``: how many parameters it would be scored by. Raises what the method itself would raise later."""

    def prove(self, request: Request, model: nn.Module, trained: int) -> None: ...


def prove(method: Any, request: Request, model: nn.Module, trained: int) -> None:
    """Raise, by forward passes on the first examples of each stage alone, what ``method`` would raise where this run's task is not for it."""
    if isinstance(method, Proving):
        method.prove(request, model, trained)
    elif isinstance(method, Method):  # not by its plan: members have rates and checkpoints of their own
        prove_estimates([estimate for estimate in [getattr(method, "curvature", None)] if estimate is not None], request.run, model)


def prove_estimates(estimates: Iterable[Estimate], run: Run, model: nn.Module) -> None:
    """Raise TaskError where a stage's task cannot give what a curvature is estimated from."""
    for fisher in dict.fromkeys(str(estimate.fisher) for estimate in estimates if hasattr(estimate, "fisher")):
        for stage in run.stages:
            prove_fisher(fisher, stage.task, model, to(stage.data.batch(range(1)), run.device))
