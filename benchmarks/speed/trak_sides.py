"""TRAK as both contestants do it. What a side does not need it does not import: memory is measured above its own baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from speed.meter import Meter
from speed.problem import read


def headwater(place: Path, label: str, dim: int | None = None, kind: str | None = None, others: tuple[float, ...] = ()) -> dict[str, Any]:
    """``kind``: a projection's name in ``hw.projections``; default: Trak's own, or none without ``dim``. ``others``: regularisations whose
    scores are kept too, behind those of the default, (1 + others, queries, train)."""
    import headwater as hw
    from speed.headwater_side import opened

    problem = read(place)
    projection = {"projection": getattr(hw.projections, kind)(dim)} if kind else {"dim": dim}
    method = hw.Trak(**projection)
    torch.zeros(2, 2) @ torch.zeros(2, 2)  # the library's own buffers are no contestant's
    meter = Meter()
    with meter.stage("scores"):
        with meter.stage("set-up"):
            run = opened(place, problem)
        scores = hw.trace(run, problem.queries, method, progress=False)
    report = meter.report()
    second = Meter()
    with second.stage("again"):  # features are kept: what another regularisation of the same queries costs
        hw.trace(run, problem.queries, hw.Trak(**projection, regularisation=0.02), progress=False)
    more = [hw.trace(run, problem.queries, hw.Trak(**projection, regularisation=r), progress=False).values for r in others]
    np.save(place / f"scores-{label}.npy", np.stack([scores.values, *more]) if others else scores.values)
    return {**report, "again": sum(second.report()["cpu"].values()), "dimension": scores.provenance["effective_dimension"]}


def dattri(place: Path, label: str, dim: int, batch: int, others: tuple[float, ...] = ()) -> dict[str, Any]:
    """As in dattri's documentation: log-odds as ``log p - log(1 - p)``. ``others``: regularisations, relative to the trace of its matrix,
    which its own argument, an absolute number, cannot say."""
    from dattri.algorithm import trak as module
    from dattri.task import AttributionTask
    from torch.func import functional_call

    problem = read(place)
    model = problem.model()

    def log_p(parameters: dict[str, torch.Tensor], example: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = example
        return -F.cross_entropy(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    def odds(parameters: dict[str, torch.Tensor], example: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        found = log_p(parameters, example)
        return found - torch.log(1 - torch.exp(found))

    def p(parameters: dict[str, torch.Tensor], example: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.exp(log_p(parameters, example))

    meter = Meter()
    with meter.stage("set-up"):
        task = AttributionTask(loss_func=odds, model=model, checkpoints=[model.state_dict()])
        attributor = module.TRAKAttributor(task, p, projector_kwargs={"device": "cpu", "proj_dim": dim}, device="cpu")
        loaders = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch) for data in (problem.train, problem.queries)]
    solve, seen = torch.linalg.solve, []

    def kept(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append((matrix.clone(), right)) if others else None
        return solve(matrix, right)

    with meter.stage("scores"):
        torch.linalg.solve = kept
        attributor.cache(loaders[0])
        torch.linalg.solve = solve
        found = [attributor.attribute(loaders[1]).T.numpy()]
    report = meter.report()
    for regularisation in others:
        matrix, right = seen[0]
        shifted = matrix + regularisation * matrix.trace() * torch.eye(len(matrix))
        attributor.inv_XTX_XT_list = [solve(shifted, right)]
        found.append(attributor.attribute(loaders[1]).T.numpy())
    np.save(place / f"scores-{label}.npy", np.stack(found) if others else found[0])
    return report
