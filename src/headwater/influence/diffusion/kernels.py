"""What the methods with a kernel share: output functions of each stage's task, met at chosen noise events on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.influence.request import Request
from headwater.influence.trak.features import Outputs
from headwater.influence.trak.method import Trak
from headwater.influence.trak.outputs import Output, describe
from headwater.linalg.projections import Projection
from headwater.tasks import Measure
from headwater.tasks.batches import Batch, size
from headwater.tasks.diffusion import Diffusion, Events
from headwater.tasks.task import per_example
from headwater.training import Run
from headwater.training.run import Stage

OutputFunction = str | Measure
REGULARISATION = 0.005
"""Relative to the trace. See :class:`DTrak`: too little destroys scores, too much costs little."""


def diffusion(stage: Stage) -> Diffusion:
    """The diffusion task of a stage. Raises InputError for any other."""
    if not isinstance(stage.task, Diffusion):
        mend = "use the methods for all tasks: hw.Trak(), hw.TracIn(), hw.Source() ..."
        raise InputError(f"a {type(stage.task).__name__} in stage {stage.name!r}", "a hw.tasks.Diffusion", mend)
    return stage.task


def check_output(given: Any) -> None:
    """Raise InputError unless this names an output function or is one."""
    if not isinstance(given, str) and not callable(given):
        raise InputError(f"output={given!r}", "a name, such as 'square_norm', or a function (model, batch) -> (n,)", "see hw.tasks.Diffusion.output")
    if getattr(given, "events", None) is not None:
        raise InputError("output= with noise events of its own", "events chosen by the method", "task.output(...) without events=, and timesteps=, draws= of the method")


def check_kernel(dim: int | None, projection: Projection | None, values: Sequence[Any]) -> None:
    """Raise InputError for what is no dimension or projection, and for a regularisation that is not above 0."""
    if not values:
        raise InputError("an empty sweep of regularisations", "at least one number above 0", "leave it out for the default")
    for value in values:
        Trak(dim, projection, value)
        if value == 0:
            mend = "leave it out for the default, or sweep: (0.0005, 0.005, 0.05)"
            raise InputError("regularisation=0", "a number above 0: without any, noise of the smallest directions drowns the scores", mend)


def named(output: OutputFunction) -> str:
    """An output function in a method's name."""
    return repr(output) if isinstance(output, str) else describe(output)


def value_of(task: Diffusion, output: OutputFunction) -> Measure:
    """The output function of a task."""
    return task.output(output) if isinstance(output, str) else _Given(output)


@dataclass(frozen=True, eq=False)
class _Given:
    """The user's function, held to one number per example."""

    function: Measure

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return per_example(self.function(model, batch), batch, "output")


def _one(model: nn.Module, batch: Batch) -> Tensor:
    """No weight: the kernel alone."""
    return torch.ones(size(batch))


def outputs_of(run: Run, output: OutputFunction) -> Outputs:
    """The output function of each stage, without weights."""
    return Outputs(run, tuple(Output(value_of(diffusion(stage), output), _one) for stage in run.stages))


def met_at(run: Run, events: Callable[[Stage], Events]) -> Run:
    """A view of the run whose training examples are met at these events, stage by stage."""
    found = [events(stage) for stage in run.stages]
    stages = tuple(replace(stage, data=stage.data.over(e)) for stage, e in zip(run.stages, found, strict=True))
    return replace(run, stages=stages, variant=f"{run.variant} {found!r}".strip())


def asked_by(request: Request, output: OutputFunction, events: Events) -> Request:
    """The same queries, asked by an output function of the last stage's task at these events, whatever the measure was."""
    measure = value_of(diffusion(request.run.stages[-1]), output)
    return replace(request, asked=replace(request.asked.over(events), measure=measure))
