"""The run directory as it is written: checkpoints, steps and order as they come, the manifest last, so that it always speaks of whole files.

    manifest.json               schema, stages, optimizers, loss reduction, data fingerprints, versions; checksums of all that follows
    checkpoints/STEP.safetensors  weights and buffers by name; Adam's bias-corrected second moments as moment/NAME; averaged weights as ema/NAME
    frozen.safetensors          weights that no optimizer moves, where there are some; the checkpoints do not repeat them
    steps.npy                   one row per step and parameter group: learning rate, momentum, weight decay, clipping, batch size, stage
    order.npy                   which examples each step saw, uint32, end to end (steps.npy tells how many each took)
    events.npy                  of a diffusion model the noise event that each of them was seen at, where that was recorded

What only a replay needs (``manifest["replay"]``; absent in runs recorded before 2026-11-24):

    moves.npy                   one row per step: whether the optimizer moved, whether anything else did, loss, norm of the gradient
    settings.npy                one row per step and group: betas, eps, dampening, Nesterov
    forwards.npy                one row per forward pass of the model: its step, examples, mode, autocast, generator's state
    random.npy                  the generators' states before forward passes that drew random numbers (dropout), and only before those
    optimizer/STEP.safetensors  what an optimizer that had taken steps before remembered when a stage began
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from headwater.errors import RunError
from headwater.store import Log, disk, write_json, write_tensors
from headwater.tasks import Examples, Task, fingerprint
from headwater.tasks.code import model_facts
from headwater.training.frozen import FILE, Frozen
from headwater.training.optimizers import MOMENT, OptimizerRecord

SCHEMA, FROZEN_APART = 1, 2  # versions before the second would not find weights that lie apart
AVERAGE = "ema/"
"""Prefix of averaged weights in a checkpoint's file."""
STEPS = np.dtype(
    [("step", "<u8"), ("stage", "<u2"), ("group", "<u2"), ("rate", "<f8"), ("momentum", "<f8"), ("decay", "<f8"), ("clip", "<f8"), ("batch", "<u4")]
)
ORDER = np.dtype("<u4")
EVENTS = np.dtype([("t", "<f8"), ("seed", "<i8")])
"""A noise event of a diffusion model: its timestep and the seed of its noise."""
MOVES = np.dtype([("step", "<u8"), ("moved", "?"), ("touched", "?"), ("loss", "<f8"), ("norm", "<f8")])
SETTINGS = np.dtype(
    [("step", "<u8"), ("group", "<u2"), ("beta1", "<f8"), ("beta2", "<f8"), ("eps", "<f8"), ("dampening", "<f8"), ("nesterov", "?"), ("amsgrad", "?")]
)
FORWARDS = np.dtype([("step", "<u8"), ("batch", "<u4"), ("mode", "<u2"), ("cast", "<u2"), ("random", "<i8")])
"""``mode`` and ``cast`` count in the manifest's lists, ``random`` in random.npy (-1: the pass drew no random numbers)."""
RANDOM = np.dtype([("cpu", "u1", (5056,)), ("cuda", "u1", (16,))])
Rows = list[tuple[Any, ...]]
"""Of one of these tables, in the order of its fields."""
_TOGETHER = 64  # steps whose gradient norms are put together at a time
_LOGS = {"moves": MOVES, "settings": SETTINGS, "forwards": FORWARDS, "random": RANDOM}
_MADE_LATER = ("factors", "jobs", "index", "states", "trak", "members", "adapters")  # from the run, and named by its weights
_OURS = ("checkpoints", "optimizer", *_MADE_LATER, "manifest.json", FILE, "steps.npy", "order.npy", "events.npy", *(f"{name}.npy" for name in _LOGS))


def checkpoint_file(path: Path, step: int) -> Path:
    """Where a checkpoint lies."""
    return path / "checkpoints" / f"{step}.safetensors"


def optimizer_file(path: Path, step: int) -> Path:
    """Where the state lies that an optimizer had before the first step of a stage that began after ``step``."""
    return path / "optimizer" / f"{step}.safetensors"


def machine() -> dict[str, Any]:
    """What decides the last bits of a training besides its code."""
    cuda = torch.cuda.is_available()
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "processor": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": {"benchmark": torch.backends.cudnn.benchmark, "deterministic": torch.backends.cudnn.deterministic} if cuda else {},
    }


class Journal:
    """Writes one run directory. Raises RunError where there is a run already (unless ``overwrite``), StorageError where the disk refuses."""

    def __init__(self, path: str | Path, *, seed: int | None, overwrite: bool) -> None:
        self.path = Path(path)
        if (self.path / "manifest.json").exists() and not overwrite:
            raise RunError(f"{self.path} holds a run already", "a new directory", "give another path, open that run with hw.Run.open, or say overwrite=True")
        self._clear()
        self.manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "finished": False,
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": seed,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "safetensors": safetensors.__version__},
            "tensors": {},
            "stages": [],
            "checkpoints": {},
        }
        self.steps, self.order = Log(self.path / "steps.npy", STEPS), Log(self.path / "order.npy", ORDER)
        self.frozen = Frozen(self.path)
        self.events: Log | None = None
        self.replay: dict[str, Log] = {}
        self._moves: list[tuple[int, bool, bool, float]] = []
        self._norms: list[list[Tensor]] = []

    def _clear(self) -> None:
        """Remove what an earlier run left, the manifest first; nothing else in the directory is touched."""
        with disk(self.path):
            (self.path / "manifest.json").unlink(missing_ok=True)
            for name in _OURS:
                place = self.path / name
                if place.is_dir():
                    shutil.rmtree(place)
                else:
                    place.unlink(missing_ok=True)

    def note_code(self, model: nn.Module) -> None:
        """Note what the model computes, apart from its weights, as it is now: training may change that (a counter, a temperature)."""
        facts, held = model_facts(model), self.manifest.setdefault("code", [])
        if facts not in held:
            held.append(facts)

    def log(self, rows: np.ndarray | Rows, ids: np.ndarray) -> None:
        """One step: a row of :data:`STEPS` for each group, and the examples it saw."""
        self.steps.append(rows)
        self.order.append(ids)

    def log_events(self, rows: np.ndarray) -> None:
        """The noise events (:data:`EVENTS`) of the examples that were logged last."""
        if self.events is None:
            self.events = Log(self.path / "events.npy", EVENTS)
        self.events.append(rows)

    def log_replay(self, **rows: np.ndarray | Rows) -> None:
        """Rows of the logs that only a replay needs, by their names."""
        if not self.replay:
            self._begin_replay()
        for name, found in rows.items():
            self.replay[name].append(found)

    def log_move(self, step: int, moved: bool, touched: bool, loss: float, norms: list[Tensor]) -> None:
        """A row of :data:`MOVES`, with the norms of all gradients (none: no norm). They are put together later, many steps at a time: one
        small kernel costs as much as a large one, and on a GPU every number read is a wait."""
        if not self.replay:
            self._begin_replay()
        self._moves.append((step, moved, touched, loss))
        self._norms.append(norms)
        if len(self._moves) >= _TOGETHER:
            self._settle_moves()

    def _begin_replay(self) -> None:
        """The logs for replays begin with the first step."""
        self.replay = {name: Log(self.path / f"{name}.npy", dtype) for name, dtype in _LOGS.items()}
        self.manifest["replay"] = {"modes": [], "casts": [], "machine": machine()}

    def _settle_moves(self) -> None:
        if self._moves:
            self.replay["moves"].append([(*move, norm) for move, norm in zip(self._moves, norms_of(self._norms), strict=True)])
            self._moves, self._norms = [], []

    def number(self, table: str, fact: Any) -> int:
        """The place of a fact (plain JSON) in one of the manifest's lists for replays, "modes" or "casts"; put there if it is new."""
        facts: list[Any] = self.manifest["replay"][table]
        if fact not in facts:
            facts.append(fact)
        return facts.index(fact)

    def save_optimizer(self, step: int, tensors: Mapping[str, Tensor]) -> str:
        """Write what an optimizer remembered after ``step``; the checksum."""
        return write_tensors(optimizer_file(self.path, step), tensors)

    def save(self, step: int, model: nn.Module, moments: Mapping[str, Tensor], averages: Mapping[str, Tensor] | None = None) -> None:
        """Write a checkpoint, and a manifest that knows it. ``averages``: averaged weights, by name, where they differ from the raw ones."""
        state = state_of(model)
        trained = {name for stage in self.manifest["stages"] for group in stage["optimizer"]["groups"] for name in group["names"]}
        tensors = self.frozen.rest(state, model, trained)
        tensors |= {MOMENT + name: moment for name, moment in moments.items()} | {AVERAGE + name: t for name, t in (averages or {}).items()}
        checksum = write_tensors(checkpoint_file(self.path, step), tensors)
        if self.frozen.checksum:
            self.manifest["schema"], self.manifest["frozen"] = FROZEN_APART, self.frozen.checksum
        self.manifest["tensors"] = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in state.items()}
        self.manifest["checkpoints"][str(step)] = checksum
        self.flush()

    def drop(self, steps: list[int]) -> None:
        """Forget checkpoints; the manifest first."""
        if steps:
            for step in steps:
                del self.manifest["checkpoints"][str(step)]
            self.flush()
            for step in steps:
                checkpoint_file(self.path, step).unlink(missing_ok=True)

    def flush(self) -> None:
        """Write the manifest for all that is on the disk by now."""
        self._settle_moves()
        self.manifest["steps"], self.manifest["order"] = self.steps.flush(), self.order.flush()
        if self.events is not None:
            self.manifest["events"] = self.events.flush()
        for name, log in self.replay.items():
            self.manifest["replay"][name] = log.flush()
        write_json(self.path / "manifest.json", self.manifest)


def norms_of(parts: list[list[Tensor]]) -> list[float]:
    """Of each step's gradient, from the norms of its parts; NaN for a step without any.

    >>> norms_of([[torch.tensor(3.0), torch.tensor(4.0)], [], [torch.tensor(2.0)]])
    [5.0, nan, 2.0]
    """
    found = [norm for step in parts for norm in step]
    if len({(norm.dtype, norm.device) for norm in found}) > 1:
        found = [norm.to("cpu", torch.float64) for norm in found]
    values = torch.stack(found).to("cpu", torch.float64).numpy() if found else np.zeros(0)
    ends = np.cumsum([len(step) for step in parts])
    return [float(np.linalg.norm(values[end - len(step) : end])) if step else np.nan for step, end in zip(parts, ends, strict=True)]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name, a tied weight once (under the first of its names)."""
    seen: set[int] = set()
    first: dict[str, Tensor] = {}
    kept = {id(t) for t in [*model.parameters(), *model.buffers()]}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) in kept and id(tensor) not in seen:
            seen.add(id(tensor))
            first[name] = tensor.detach()
    return first


def stage_facts(name: str, start: int, task: Task, examples: Examples, record: OptimizerRecord, reduction: str) -> dict[str, Any]:
    """What the manifest says of a stage."""
    return {
        "name": name,
        "start": start,
        "stop": start,
        "task": task.describe(),
        "data": {"examples": len(examples), "fingerprint": fingerprint(examples)},
        "optimizer": record.to_json(),
        "reduction": reduction,
    }
