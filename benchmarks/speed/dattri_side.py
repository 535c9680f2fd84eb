"""dattri as a contestant: exact Grad-Dot, without the projection that it does by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from torch.func import functional_call
from torch.nn import functional as F

from speed.meter import Meter
from speed.problem import read


def graddot(place: Path, label: str, batch: int) -> dict[str, Any]:
    problem = read(place)
    model = problem.model()
    meter = Meter()

    def loss(parameters: dict[str, torch.Tensor], example: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = example
        return F.cross_entropy(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    with meter.stage("set-up"):
        task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])
        attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
        attributor.projector_kwargs = None  # in 0.3.0 the argument cannot say so: None leaves the default of 512 dimensions
        loaders = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch) for data in (problem.train, problem.queries)]
    with meter.stage("scores"):
        scores = attributor.attribute(*loaders)
    report = meter.report()
    np.save(place / f"scores-{label}.npy", scores.T.numpy() / len(problem.train[0]))
    return report
