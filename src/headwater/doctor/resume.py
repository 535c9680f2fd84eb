"""A computation that is interrupted and called again must give the identical numbers."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.errors import HeadwaterError
from headwater.influence import Source, trace
from headwater.tasks import Classification
from headwater.training import Experiment, Run

EXAMPLES, STEPS = 60, 12


@dataclass
class Meter:
    """Counts calls, and stops them, as by Ctrl-C, after ``left``; None: never. Apart from the task, whose own values name saved work."""

    asked: int = 0
    left: int | None = None


class Interrupted(Classification):
    """A classification whose loss is counted, and stopped, by its meter."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.meter.asked += 1
        if self.meter.left is not None and self.meter.asked > self.meter.left:
            raise KeyboardInterrupt
        return super().loss(model, batch)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "kind": "Interrupted"}


def _build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def _fit(model: nn.Module, train: tuple[Tensor, Tensor], seed: int, recorder: Any) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder.watch(model, optimizer, steps=STEPS)
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(train[0]), train[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder.step(range(EXAMPLES))
    return model


def difference() -> float:
    """The largest difference between the scores of an interrupted, resumed trace and those of an undisturbed one."""
    task = Interrupted()
    train = torch.randn(EXAMPLES, 6), torch.randint(3, (EXAMPLES,))
    plan = Experiment(_build, train, train, task, _fit, "interrupted")
    with tempfile.TemporaryDirectory(prefix="headwater-doctor-") as place:
        whole, asked = _trace(plan.record(f"{place}/one"), task)
        run = plan.record(f"{place}/two")
        task.meter.asked, task.meter.left = 0, asked - 3
        try:
            trace(run, run.stages[0].data, Source(), batch_size=10, progress=False)
            raise HeadwaterError("a trace that could not be interrupted", "one that stops", "report this")
        except KeyboardInterrupt:
            task.meter.left = None
        again, repeated = _trace(run, task)
    if repeated >= asked:
        raise HeadwaterError("an interrupted trace that began anew", "one that resumes", "report this")
    return float((whole - again).abs().max())


def _trace(run: Run, task: Interrupted) -> tuple[Tensor, int]:
    """The scores, and how often the loss was asked for."""
    task.meter.asked = 0
    return torch.from_numpy(trace(run, run.stages[0].data, Source(), batch_size=10, progress=False).values), task.meter.asked
