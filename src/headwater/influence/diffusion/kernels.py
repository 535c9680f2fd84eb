"""What the methods with a kernel share: output functions of each stage's task, met at chosen noise events on both sides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.influence.request import Request, mean_of_scores
from headwater.influence.trak import exact
from headwater.influence.trak.features import Outputs
from headwater.influence.trak.method import Kernel, Trak
from headwater.influence.trak.outputs import Output, describe
from headwater.linalg.projections import Projection
from headwater.linalg.structured import KhatriRao
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


def named(value: Any, name: str) -> str:
    """A setting in a method's name; functions by what they do."""
    return f"{name}={describe(value) if callable(value) else repr(value)}"


def value_of(task: Diffusion, output: OutputFunction) -> Measure:
    """The output function of a task."""
    return replace(task.output(output), events=None) if isinstance(output, str) else _Given(output)


@dataclass(frozen=True, eq=False)
class _Given:
    """The user's function, held to one number per example."""

    function: Measure

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return per_example(self.function(model, batch), batch, "output")


def _one(model: nn.Module, batch: Batch) -> Tensor:
    """No weight: the kernel alone."""
    return torch.ones(size(batch))


def outputs_of(run: Run, output: OutputFunction, weight: Callable[[Diffusion], Measure] = lambda task: _one) -> Outputs:
    """The output function of each stage, and what each training example weighs: 1, if nothing is said."""
    return Outputs(run, tuple(Output(value_of(diffusion(stage), output), weight(diffusion(stage))) for stage in run.stages))


def met_at(run: Run, events: Callable[[Stage], Events]) -> Run:
    """A view of the run whose training examples are met at these events, stage by stage."""
    found = [events(stage) for stage in run.stages]
    stages = tuple(replace(stage, data=stage.data.over(e)) for stage, e in zip(run.stages, found, strict=True))
    return replace(run, stages=stages, variant=f"{run.variant} {found!r}".strip())


def asked_by(request: Request, output: OutputFunction, events: Events) -> Request:
    """The same queries, asked by an output function of the last stage's task at these events, whatever the measure was."""
    measure = value_of(diffusion(request.run.stages[-1]), output)
    return replace(request, asked=replace(request.asked.over(events), measure=measure))


class OneKernel:
    """What methods with one kernel share: fields ``dim``, ``projection``, ``regularisation`` (a number, or a sweep of them)."""

    dim: int | None
    projection: Projection | None
    regularisation: float | tuple[float, ...]

    @property
    def sketch(self) -> Projection | None:
        """The projection that is used; None for the exact kernel."""
        return KhatriRao(self.dim) if self.projection is None and self.dim is not None else self.projection

    def sweep(self) -> tuple[Self, ...]:
        """One method for each regularisation."""
        return tuple(replace(self, regularisation=value) for value in _values(self.regularisation))  # type: ignore[type-var]

    def member(self, k: int) -> Self:
        """The method as member k of an ensemble applies it: with a projection of its own; the exact kernel as it is."""
        own = self.sketch
        return self if own is None else replace(self, dim=None, projection=replace(own, seed=own.seed + k))  # type: ignore[type-var]

    def combine(self, members: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """The mean of the members' scores."""
        return mean_of_scores(members)

    def _check(self) -> None:
        """Lists as tuples, and settings that have a meaning."""
        for name in ("timesteps", "regularisation"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        check_kernel(self.dim, self.projection, _values(self.regularisation))

    def _told(self, *names: str) -> str:
        """A repr with these fields, and those of all such methods that are not as by default."""
        how = f"projection={self.projection!r}" if self.projection is not None else f"dim={self.dim}"
        fields = [named(getattr(self, n), n) for n in names] + [f"regularisation={self.regularisation!r}"]
        more = [f"{n}={getattr(self, n)!r}" for n in ("noise", "seed") if hasattr(self, n) and getattr(self, n) != getattr(type(self), n)]
        return f"{type(self).__name__}({', '.join([how, *fields, *more])})"

    @property
    def _kernel(self) -> Kernel:
        """Raises InputError for a sweep, where one number is needed."""
        if isinstance(self.regularisation, tuple):
            given = f"a sweep of {len(self.regularisation)} regularisations where one is needed"
            raise InputError(given, "one number", "one of method.sweep(), chosen by hw.evaluate.tuned")
        return Kernel(repr(self), self.sketch, self.regularisation)

    def _fits(self, request: Request, trained: int) -> None:
        """Raise InputError where the exact kernel has no room."""
        if self.sketch is None and trained > request.run.size:
            exact.check_room(request.run.size, request.memory)


def _values(regularisation: float | tuple[float, ...]) -> tuple[float, ...]:
    return regularisation if isinstance(regularisation, tuple) else (regularisation,)
