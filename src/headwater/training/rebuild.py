"""A run directory for training that was not recorded: from its checkpoints, its optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from headwater.errors import DamagedFile, InputError, MissingCheckpoint, ModelMismatch
from headwater.tasks import Task
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
) -> None:
    """See :meth:`headwater.Run.from_checkpoints`."""
    steps = sorted(int(step) for step in checkpoints)
    if not steps or steps[-1] < 1:
        raise InputError(f"checkpoints at steps {steps}", "at least one after step 0", "pass checkpoints={step: state_dict, ...}")
    model = build()
    moved = unwrapped(optimizer(model))
    record = describe(moved, model)
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
    journal.log(_rows(record, moved, schedule, batch_size), np.zeros(0, np.uint32))
    for step in steps:
        _load(model, _tensors(checkpoints[step]), step)
        if step in states:
            moved.load_state_dict(_tensors(states[step]))
        journal.save(step, model, second_moments(moved, model) if step in states else {})
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
    """A state dict, or the one in a file."""
    if not isinstance(given, str | Path):
        return given
    path = Path(given)
    if not path.is_file():
        raise MissingCheckpoint(f"{path} is not a file", "a checkpoint", "check the path")
    try:
        return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both libraries raise many types for a broken file
        raise DamagedFile(f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})", "a state dict of tensors", "save it again") from error


def _load(model: nn.Module, state: Any, step: int) -> None:
    expected = state_of(model)
    missing = [name for name in expected if name not in state]
    wrong = [n for n, t in expected.items() if n in state and state[n].shape != t.shape]
    extra = [name for name in state if name not in model.state_dict()]
    if missing or wrong or extra:
        said = "; ".join(f"{what} {names[:3]}" for what, names in (("missing", missing), ("of another shape", wrong), ("unknown", extra)) if names)
        raise ModelMismatch(f"the checkpoint of step {step} does not fit the model: {said}", "a state dict of the model that build() makes", "mend build(), or the names")
    model.load_state_dict(state, strict=False)
