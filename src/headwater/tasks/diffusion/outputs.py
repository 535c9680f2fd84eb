"""Functions of a denoiser's answer that a question may be about, or that a method may differentiate in place of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headwater.errors import InputError, TaskError
from headwater.tasks.batches import Batch
from headwater.tasks.diffusion.events import Drawn, Events, Grid
from headwater.tasks.diffusion.losses import error_of

if TYPE_CHECKING:
    from headwater.tasks.diffusion.task import Diffusion

OUTPUTS = ("loss", "square_norm", "mean", "l1_norm", "elbo")


@dataclass(frozen=True, eq=False)
class Output:
    """``(model, batch) -> (n,)``: see :meth:`Diffusion.output`."""

    task: Diffusion
    kind: str
    guidance: float | None = None
    events: Events | None = None

    def __post_init__(self) -> None:
        if self.kind not in OUTPUTS:
            raise InputError(f"output {self.kind!r}", f"one of {OUTPUTS}", "or pass any function (model, batch) -> (n,) as measure=")
        if self.guidance is not None and self.task.null is None:
            raise TaskError(f"guidance={self.guidance} for a task without null=", "what the network is given in the condition's place", "Diffusion(null=...)")
        if self.kind == "elbo":
            _refuse_unbounded(self.task, self.events or self.task.events)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.over_events(batch, lambda rows: self._row(model, rows))

    def _row(self, model: nn.Module, rows: Drawn) -> Tensor:
        task = self.task
        out = task.predict(model, rows, self.guidance).flatten(1)
        if self.kind in ("square_norm", "mean", "l1_norm"):
            return {"square_norm": torch.square, "mean": lambda t: t, "l1_norm": torch.abs}[self.kind](out).mean(1)
        x, eps, signal, noise = task.parts(rows, out.dtype)
        if self.kind == "loss":
            return -rows.weight[:, 0] * error_of(task.kind, out - task.process.target(task.prediction, x, eps, signal, noise).flatten(1), task.delta)
        found = task.process.clean(task.prediction, out.view(x.shape), signal * x + noise * eps, signal, noise)
        return -rows.bound[:, 0] * (found - x).square().flatten(1).sum(1)


def _refuse_unbounded(task: Diffusion, events: Events) -> None:
    """Raise TaskError where the bound has no finite term at one of the events: no image left to predict noise from, or no noise before."""
    process = task.process
    rows = torch.tensor(events.timesteps) if isinstance(events, Grid) else torch.from_numpy(events.t).long().flatten()
    endless = ~torch.isfinite(process.bound) | ((process.signal == 0) & (process.bound > 0) & (task.prediction == "epsilon"))
    if endless[rows].any():
        bad = int(rows[endless[rows]][0])
        mend = "task.output('elbo', events=task.grid((1, 250, 500, 750)))"
        raise TaskError(f"output 'elbo' at timestep {bad}, where its term is infinite", "timesteps with both image and noise left", mend)
