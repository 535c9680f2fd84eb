"""How large gradients are at each timestep, and at the noise events that training met: the size that ReTrac takes out of the scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.capture import Capture
from headwater.store import content_hash, read_tensors, write_tensors
from headwater.tasks.batches import to
from headwater.training import Run

BATCH = 32


@dataclass(frozen=True, eq=False)
class Norms:
    """Norms of the gradients of single examples at single noise events.

    Args:
        timesteps: (T,). steps: the first and the last checkpoint looked at.
        along: (2, T) at those checkpoints, the mean over some training examples.
        met: (train,) of each training example at the event that it met last before each checkpoint, weighted as TracIn weighs checkpoints.
    """

    timesteps: np.ndarray
    steps: tuple[int, int]
    along: np.ndarray
    met: np.ndarray

    @property
    def ratios(self) -> tuple[float, float]:
        """The largest mean norm over the smallest, at the first and at the last checkpoint."""
        first, last = self.along.max(1) / self.along.min(1)
        return float(first), float(last)

    @property
    def peak(self) -> int:
        """The timestep whose gradients are largest at the last checkpoint."""
        return int(self.timesteps[self.along[1].argmax()])


def norms(run: Run, probed: int, along: int, place: Path) -> Norms:
    """Measured on ``probed`` training examples at ``along`` timesteps with the noise that all share, and at every example's recorded events;
    or read, where they lie on disk already."""
    steps = [step for step in run.checkpoints if step > 0]
    file = place / f"norms-{content_hash([run.weights_hash(s) for s in steps], probed, along)[:12]}.safetensors"
    if not file.exists():
        write_tensors(file, _measured(run, steps, probed, along))
    held = {name: tensor.numpy() for name, tensor in read_tensors(file).items()}
    return Norms(held["timesteps"], (steps[0], steps[-1]), held["along"], held["met"])


def _measured(run: Run, steps: list[int], probed: int, along: int) -> dict[str, torch.Tensor]:
    stage = run.stages[0]
    grid = stage.task.grid(along)  # type: ignore[attr-defined]
    model = run.load(run.model(), steps[-1])
    capture = Capture(model, stage.task.loss, to(stage.data.batch(range(2)), run.device))
    curves, met, start = [], torch.zeros(stage.size), 0
    for step in steps:
        run.load(model, step)
        rate = max(run.rates(start, step).values())
        met += rate * _sizes(capture, run, stage.data.over(run.met(stage, step)), range(stage.size))
        if step in (steps[0], steps[-1]):
            at = [stage.task.grid((t,)) for t in grid.timesteps]  # type: ignore[attr-defined]
            curves.append(torch.stack([_sizes(capture, run, stage.data.over(g), range(min(probed, stage.size))).mean() for g in at]))
        start = step
    return {"timesteps": torch.tensor(grid.timesteps), "along": torch.stack([curves[0], curves[-1]]), "met": met}


def _sizes(capture: Capture, run: Run, data: Any, ids: range) -> torch.Tensor:
    """The norm of each example's gradient (n,)."""
    found = []
    for k in range(0, len(ids), BATCH):
        batch = to(data.batch(ids[k : k + BATCH]), run.device)
        squares = [g.square_norms() for g in capture.gradients(run.stages[0].task.loss, batch).values()]
        found.append(torch.stack(squares).sum(0).sqrt().flatten().cpu())
    return torch.cat(found)
