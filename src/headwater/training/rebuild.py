"""A run directory for training that was not recorded: from its checkpoints, its optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError, ModelMismatch
from headwater.tasks import Task
from headwater.training.averages import Average
from headwater.training.folders import as_in, average_folder, decay_of, load, optimizer_file_of, weights_file
from headwater.training.journal import STEPS, Journal, stage_facts, state_of
from headwater.training.optimizers import ADAM, OptimizerRecord, describe, second_moments, unwrapped

Rates = Callable[[int], float] | Sequence[float] | None


def write_run(
    path: str | Path,
    checkpoints: Mapping[int, Any],
    build: Callable[[], nn.Module],
    train: Any,
    task: Task,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    rates: Rates,
    batch_size: int,
    states: Mapping[int, Any],
    reduction: str,
    overwrite: bool,
    averages: Mapping[int, Any] | None = None,
) -> None:
    """See :meth:`headwater.Run.from_checkpoints`."""
    steps = sorted(int(step) for step in checkpoints)
    if not steps or steps[-1] < 1:
        raise InputError(f"checkpoints at steps {steps}", "at least one after step 0", "pass checkpoints={step: state_dict, ...}")
    model = build()
    moved = unwrapped(optimizer(model))
    record = describe(moved, model)
    states = {**{step: file for step in steps if (file := optimizer_file_of(checkpoints[step])) is not None}, **states} if record.kind == ADAM else states
    averaged = _averages(averages, checkpoints)
    without = [step for step in steps if step not in states and step > 0]
    if record.kind == ADAM and without:
        raise InputError(
            f"Adam checkpoints at steps {without} without the optimizer's state",
            "its second moments, which shape its steps",
            "pass states={step: optimizer.state_dict(), ...}; without them score with hw.GradDot() or hw.Influence(damping=...) and an SGD optimizer",
        )
    schedule = _schedule(rates, steps[-1], [float(g["lr"]) for g in moved.param_groups])
    journal = Journal(path, seed=None, overwrite=overwrite)
    journal.note_code(model)
    journal.manifest["stages"].append(stage_facts("train", 0, task, task.examples(train), record, reduction))
    journal.manifest["stages"][0]["stop"] = steps[-1]
    if averaged:
        journal.manifest["stages"][0]["ema"] = _average_facts(averaged)
    journal.log(_rows(record, moved, schedule, batch_size), np.zeros(0, np.uint32))
    for step in steps:
        average: dict[str, Tensor] = {}
        if step in averaged:  # loaded as the raw weights are, and so checked
            _load(model, _tensors(averaged[step]), step, record.names)
            average = {n: t.clone() for n, t in state_of(model).items()}
        _load(model, _tensors(checkpoints[step]), step, record.names)
        if step in states:
            moved.load_state_dict(_tensors(states[step]))
        differing = Average(average, model).differing() if average else None
        journal.save(step, model, second_moments(moved, model) if step in states else {}, differing)
    journal.manifest["finished"] = True
    journal.flush()


def _schedule(rates: Rates, count: int, own: list[float]) -> np.ndarray:
    """Learning rates (steps, groups)."""
    if rates is None:
        return np.tile(own, (count, 1))
    values = np.array([rates(step) for step in range(1, count + 1)] if callable(rates) else list(rates), dtype=float)
    if len(values) != count or values.ndim > 2 or not np.isfinite(values).all() or (values < 0).any():
        expected = f"{count} learning rates of at least 0, one for each step up to the last checkpoint"
        raise InputError(f"rates of shape {values.shape}", expected, "pass a function of the step")
    wide = values.reshape(count, -1)
    if wide.shape[1] not in (1, len(own)):
        raise InputError(f"rates of {wide.shape[1]} groups", f"one for all, or one for each of {len(own)} groups", "pass shape (steps,) or (steps, groups)")
    return np.broadcast_to(wide, (count, len(own)))


def _rows(record: OptimizerRecord, optimizer: torch.optim.Optimizer, schedule: np.ndarray, batch_size: int) -> np.ndarray:
    count, groups = schedule.shape
    rows = np.zeros((count, groups), STEPS)
    rows["step"], rows["group"] = np.arange(1, count + 1)[:, None], np.arange(groups)
    rows["rate"], rows["clip"], rows["batch"] = schedule, 1.0, batch_size
    rows["momentum"] = [float(g.get("momentum", 0.0)) for g in optimizer.param_groups]
    rows["decay"] = [group.weight_decay for group in record.groups]
    return rows.reshape(-1)


def _tensors(given: Any) -> Any:
    """A state dict, or the one in a file or folder."""
    if not isinstance(given, str | Path):
        return given
    return load(weights_file(Path(given)) if Path(given).is_dir() else Path(given))


def _averages(given: Mapping[int, Any] | None, checkpoints: Mapping[int, Any]) -> dict[int, Any]:
    """Averaged weights by step: as given, or the folders of diffusers that lie beside those of the raw ones, where all have one."""
    found = given if given is not None else {step: average_folder(held) for step, held in checkpoints.items() if step > 0}
    averages = {int(step): held for step, held in found.items() if held is not None}
    missing = [step for step in checkpoints if step > 0 and step not in averages]
    if averages and missing:
        raise InputError(
            f"averaged weights at steps {sorted(averages)}, and none at {missing}", "those of every checkpoint, or none", "averages={step: ...}, or averages={}"
        )
    return averages


def _average_facts(averages: dict[int, Any]) -> dict[str, Any]:
    last = averages[max(averages)]
    folder = Path(last) if isinstance(last, str | Path) and Path(last).is_dir() else None
    return {"kind": "EMA", "decay": decay_of(folder) if folder is not None else None}


def _load(model: nn.Module, state: Any, step: int, trained: frozenset[str]) -> None:
    """Put a state dict into the model; one of adapters alone leaves everything else as ``build`` made it. Raises ModelMismatch."""
    adapters = bool(state) and all(".lora" in name for name in state)
    state = as_in(state, state_of(model)) if adapters else state
    expected = state_of(model)
    missing = [name for name in expected if name not in state and (not adapters or name in trained)]
    wrong = [n for n, t in expected.items() if n in state and state[n].shape != t.shape]
    extra = [name for name in state if name not in model.state_dict()]
    if missing or wrong or extra:
        said = "; ".join(f"{what} {names[:3]}" for what, names in (("missing", missing), ("of another shape", wrong), ("unknown", extra)) if names)
        raise ModelMismatch(f"the checkpoint of step {step} does not fit the model: {said}", "a state dict of the model that build() makes", "mend build(), or the names")
    model.load_state_dict(state, strict=False)
