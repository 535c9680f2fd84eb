"""A recorded training, read back: its stages, checkpoints, and how fast it moved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import DataMismatch, InputError, MissingCheckpoint, ModelMismatch, RunError
from headwater.store import Store, read_json, read_log, read_tensors
from headwater.tasks import Examples, Task, fingerprint
from headwater.tasks.code import model_digest, model_facts
from headwater.tasks.diffusion import Listed
from headwater.training.frozen import FILE
from headwater.training.journal import AVERAGE, FROZEN_APART, SCHEMA, checkpoint_file, state_of
from headwater.training.optimizers import ADAM, MOMENT, Group, OptimizerRecord
from headwater.training.rebuild import write_run

RAW, EMA = "raw", "ema"


@dataclass(frozen=True, eq=False)
class Stage:
    """One stage of training: steps (start, stop], its data under its task, and the columns that its examples have in the scores."""

    index: int
    name: str
    start: int
    stop: int
    data: Examples
    task: Task
    optimizer: OptimizerRecord
    fingerprint: str
    reduction: str
    columns: range

    @property
    def size(self) -> int:
        """How many examples it trained on."""
        return len(self.data)

    @property
    def trainable(self) -> frozenset[str]:
        """The parameters that it moved."""
        return self.optimizer.names

    def checkpoints(self, steps: Sequence[int]) -> tuple[int, ...]:
        """Those of ``steps`` that lie in this stage."""
        return tuple(step for step in steps if self.start < step <= self.stop)


@dataclass(frozen=True, eq=False)
class Run:
    """A recorded training. Made by ``Recorder.finish()``, :meth:`open` or :meth:`from_checkpoints`.

    ``path``: the run directory. ``stages``: in the order of training. ``device``: where the model is put to be traced.
    ``variant``: names what a view of the run changed about its model (dropout masks, say). ``code``: names what the model that ``build``
    makes does with its weights (:func:`headwater.tasks.code.model_digest`). Both are part of the names of all saved work. ``which``: "raw"
    weights, or of a view their moving average, "ema".
    """

    path: Path
    manifest: dict[str, Any]
    stages: tuple[Stage, ...]
    build: Callable[[], nn.Module]
    device: torch.device
    variant: str = ""
    code: str = ""
    which: str = RAW

    @classmethod
    def open(cls, path: str | Path, *, build: Callable[[], nn.Module], train: Any, task: Any, device: torch.device | str | None = None) -> Run:
        """Read a run directory.

        Args:
            path: the directory.
            build: ``() -> model`` of the recorded architecture; its weights do not matter.
            train: the dataset it was trained on; of several stages a mapping by their names.
            task: the task; of several stages likewise, or one for all.
            device: where to put the model; default: where ``build`` puts it.

        Raises:
            RunError: no run there, or written by another version. DamagedFile, DataMismatch, ModelMismatch: what their names say.

        Warns where the model takes the recorded weights and does something else with them: another activation, another setting.
        """
        place = Path(path)
        if not (place / "manifest.json").exists():
            mend = "check the path; a recording that was killed at once leaves nothing"
            raise RunError(f"{place} holds no run (no manifest.json)", "a directory written by hw.Recorder", mend)
        manifest = read_json(place / "manifest.json")
        if manifest.get("schema") not in (SCHEMA, FROZEN_APART):
            known = f"schema {SCHEMA} or {FROZEN_APART}"
            raise RunError(f"the run {place} has schema {manifest.get('schema')}", known, "record it again, or use the version that wrote it")
        facts = _lived(manifest)
        stages = stages_of(manifest, _spread(train, facts, "train", Examples), _spread(task, facts, "task", Task))
        for stage in stages:
            _check_data(stage, facts[stage.index])
            _check_task(stage, facts[stage.index])
        if not manifest["finished"]:
            warnings.warn(f"the run {place} was not recorded to its end; it is read up to its last checkpoint, step {stages[-1].stop}", stacklevel=2)
        with torch.random.fork_rng(devices=[]):
            model = build()
        _check_model(model, manifest, place)
        _warn_of_other_code(model, manifest, place)
        found = next((p.device for p in model.parameters()), torch.device("cpu"))
        return cls(place, manifest, stages, build, torch.device(device) if device is not None else found, code=model_digest(model))

    @classmethod
    def from_checkpoints(
        cls,
        path: str | Path,
        checkpoints: Mapping[int, Any],
        *,
        build: Callable[[], nn.Module],
        train: Any,
        task: Task,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        rates: Callable[[int], float] | Sequence[float] | None = None,
        batch_size: int = 1,
        states: Mapping[int, Any] | None = None,
        reduction: str = "mean",
        averages: Mapping[int, Any] | None = None,
        overwrite: bool = False,
        device: torch.device | str | None = None,
    ) -> Run:
        """A run from checkpoints that lie around, for training that was not recorded but whose schedule is known.

        Args:
            path: a directory for the run (weights are copied into it; curvature and scores will be kept there).
            checkpoints: step -> a state dict, or the path of one (.safetensors, or a torch file of tensors), or a folder that holds one: as
                ``save_pretrained`` of diffusers and transformers leaves it (of a pipeline its unet or transformer), or a file or folder of
                LoRA adapters alone (the rest is then as ``build`` makes it). The last is the final model.
            optimizer: ``(model) -> optimizer`` as in training, with its learning rate, momentum and weight decay.
            rates: the learning rate of each step: a function of the step (from 1), or as many numbers as the last checkpoint's step;
                default: the optimizer's own, throughout.
            batch_size: examples per step (matters only with ``reduction="sum"``).
            states: step -> the optimizer's state dict, or its path: needed for Adam, whose second moments shape its steps; default: the
                ``optimizer.bin`` in a checkpoint's folder, as accelerate leaves it.
            averages: step -> averaged (EMA) weights, given as checkpoints are; default: the folder ``unet_ema`` (``transformer_ema``) in each
                checkpoint's folder, or beside it. ``{}``: none.

        Raises:
            ModelMismatch: a state dict that does not fit. InputError: a schedule of the wrong length, Adam without states.
        """
        write_run(path, checkpoints, build, train, task, optimizer, rates, batch_size, states or {}, reduction, overwrite, averages)
        return cls.open(path, build=build, train=train, task=task, device=device)

    # -- what there is ---------------------------------------------------------------------------------------------------------

    @cached_property
    def store(self) -> Store:
        """What is computed from the run (curvature, unfinished scores) is kept in its directory."""
        return Store(self.path)

    @cached_property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps with recorded weights, ascending: the first is 0 (before training) where it was recorded, the last the final model."""
        return tuple(sorted(int(step) for step in self.manifest["checkpoints"]))

    @property
    def architecture(self) -> str:
        """Names the function that weights are put into: what saved work depends on besides them."""
        return f"{self.code} {self.variant}".strip()

    @property
    def finished(self) -> bool:
        """Whether training was recorded to its end."""
        return bool(self.manifest["finished"])

    @property
    def size(self) -> int:
        """How many training examples there are, over all stages: the columns of the scores."""
        return sum(stage.size for stage in self.stages)

    def __repr__(self) -> str:
        stages = ", ".join(f"{s.name}: steps {s.start + 1}..{s.stop}, {s.size:,} examples, {s.optimizer.kind}" for s in self.stages)
        return f"Run({str(self.path)!r}; {stages}; checkpoints at {list(self.checkpoints)}{'' if self.finished else '; not finished'})"

    # -- weights ---------------------------------------------------------------------------------------------------------------

    def weights_hash(self, step: int) -> str:
        """The checksum of a checkpoint's file. Raises MissingCheckpoint."""
        held = self.manifest["checkpoints"].get(str(step))
        if held is None:
            given = f"no checkpoint of step {step} in {self.path}"
            raise MissingCheckpoint(given, f"one of {list(self.checkpoints)}", "record that step: hw.Recorder(checkpoints=[...])")
        return held

    def _tensors(self, step: int) -> dict[str, Tensor]:
        checksum, file = self.weights_hash(step), checkpoint_file(self.path, step)
        if not file.exists():
            raise MissingCheckpoint(f"{file} is missing; the manifest names it", "the file as it was recorded", "restore it from a copy, or record the training again")
        return read_tensors(file, checksum)

    @cached_property
    def _frozen(self) -> dict[str, Tensor]:
        """What checkpoints do not repeat."""
        checksum = self.manifest.get("frozen", "")
        return read_tensors(self.path / FILE, checksum) if checksum else {}

    def weights(self, step: int, averaged: bool = False) -> dict[str, Tensor]:
        """Parameters and buffers by name at a checkpoint, on the CPU; ``averaged``: the moving average of the weights. Raises
        MissingCheckpoint, DamagedFile; RunError where no average was recorded."""
        held = self._tensors(step)
        raw = self._frozen | {n: t for n, t in held.items() if not n.startswith((MOMENT, AVERAGE))}
        if not (averaged or self.which == EMA):
            return raw
        if not self.averages(step):
            mend = "hw.Recorder(..., ema=...) records it beside the raw weights; weights='raw' asks these"
            raise RunError(f"no averaged (EMA) weights at step {step} of {self.path}", "a run recorded with them", mend)
        return raw | {n: held[AVERAGE + n].to(t.dtype) for n, t in raw.items() if AVERAGE + n in held}

    def averages(self, step: int) -> bool:
        """Whether a moving average of the weights was recorded at a checkpoint."""
        stage = next((s for s in self.manifest["stages"] if s["start"] < step <= s["stop"]), self.manifest["stages"][0])
        return "ema" in stage

    def averaged(self) -> Run:
        """A view of the run whose weights, at every checkpoint, are their moving average: training examples and queries are both met there.
        To ask about the averaged model how training of the raw one made it, pass the run itself to ``hw.trace`` (see its ``weights=``).
        Raises RunError where no average was recorded."""
        self.weights(next((step for step in self.checkpoints if not self.averages(step)), self.checkpoints[-1]), averaged=True)
        return self if self.which == EMA else replace(self, which=EMA, variant=f"{self.variant} {EMA}".strip())

    def second_moments(self, step: int) -> dict[str, Tensor]:
        """Adam's bias-corrected second moments by parameter name at a checkpoint; empty for SGD."""
        return {n.removeprefix(MOMENT): t for n, t in self._tensors(step).items() if n.startswith(MOMENT)}

    def model(self) -> nn.Module:
        """A model of the recorded architecture in eval mode, on the run's device; weights as ``build`` left them (see :meth:`load`)."""
        with torch.random.fork_rng(devices=[]):
            model = self.build()
        _check_model(model, self.manifest, self.path)
        return model.to(self.device).eval()

    def load(self, model: nn.Module, step: int, averaged: bool = False) -> nn.Module:
        """Put a checkpoint's weights (``averaged``: their moving average) into a model of this run; the model."""
        model.load_state_dict(self.weights(step, averaged), strict=False)
        return model

    def until(self, step: int) -> Run:
        """The run as it would be if it had ended at ``step``, a checkpoint of its last stage: the same examples, earlier checkpoints alone.
        Raises MissingCheckpoint, InputError."""
        self.weights_hash(step)
        last = self.stages[-1]
        if step <= last.start:
            expected = f"one of {list(last.checkpoints(self.checkpoints))}"
            raise InputError(f"until({step}), before the last stage {last.name!r} began", expected, "take a checkpoint of that stage")
        kept = {k: held for k, held in self.manifest["checkpoints"].items() if int(k) <= step}
        return replace(self, manifest={**self.manifest, "checkpoints": kept}, stages=(*self.stages[:-1], replace(last, stop=step)))

    # -- how fast it moved -----------------------------------------------------------------------------------------------------

    @cached_property
    def steps(self) -> np.ndarray:
        """One row per step and parameter group (see :data:`headwater.training.journal.STEPS`). Raises DamagedFile."""
        return read_log(self.path / "steps.npy", self.manifest["steps"])

    def order(self, step: int) -> np.ndarray:
        """The ids, in its stage's dataset, of the examples that a step (from 1) saw. Raises RunError where that was not recorded."""
        return self._ids[self._ends[step - 1] : self._ends[step]]

    @cached_property
    def _ids(self) -> np.ndarray:
        return read_log(self.path / "order.npy", self.manifest["order"])

    @cached_property
    def _ends(self) -> np.ndarray:
        first = self.steps[self.steps["group"] == 0]
        ends = np.concatenate([[0], np.cumsum(first["batch"], dtype=np.int64)])
        if len(self._ids) != ends[-1]:
            raise RunError(f"the run {self.path} does not know which examples its steps saw", "a run recorded by hw.Recorder", "record the training")
        return ends

    # -- noise events ------------------------------------------------------------------------------------------------------------

    @cached_property
    def events(self) -> np.ndarray:
        """The noise event of each example of each step (:data:`headwater.training.journal.EVENTS`), in the order of :meth:`order`.
        Raises RunError where they were not recorded, DamagedFile."""
        if "events" not in self.manifest:
            mend = "recorder.step(indices, events=task.draw(...)), or use expected events, which need no record"
            raise RunError(f"the run {self.path} does not know the noise events that its steps met", "a run recorded with them", mend)
        found = read_log(self.path / "events.npy", self.manifest["events"])
        if len(found) != len(self._ids):
            raise RunError(f"{len(found):,} noise events for {len(self._ids):,} examples in {self.path}", "one each", "record the training again")
        return found

    def events_of(self, step: int) -> np.ndarray:
        """The noise events of a step (from 1), in the order of its examples."""
        return self.events[self._ends[step - 1] : self._ends[step]]

    def met(self, stage: Stage, step: int, window: int = 1) -> Listed:
        """The last ``window`` noise events of each of a stage's examples up to ``step``, the latest first; missing ones have seed -1."""
        first, last = int(self._ends[stage.start]), int(self._ends[step])
        ids, found = self._ids[first:last][::-1], self.events[first:last][::-1]
        by_example = np.argsort(ids, kind="stable")
        ids, found = ids[by_example], found[by_example]
        starts = np.searchsorted(ids, np.arange(stage.size))
        place = np.arange(len(ids)) - starts[ids]
        t, seeds = np.zeros((stage.size, window)), np.full((stage.size, window), -1, np.int64)
        taken = place < window
        t[ids[taken], place[taken]], seeds[ids[taken], place[taken]] = found["t"][taken], found["seed"][taken]
        return Listed(t, seeds)

    def over(self, events: Any) -> Run:
        """A view of the run whose examples are seen through other (expected) noise events, by every stage."""
        stages = tuple(replace(stage, data=stage.data.over(events)) for stage in self.stages)
        return replace(self, stages=stages, variant=f"{self.variant} {events!r}".strip())

    def _groups(self, start: int, stop: int) -> Iterator[tuple[Group, np.ndarray, np.ndarray]]:
        """Each group that moved over steps (start, stop]: the group, effective rates (steps,), decay coefficients (steps,)."""
        rows = self.steps[(self.steps["step"] > start) & (self.steps["step"] <= stop)]
        for stage in self.stages:
            for number, group in enumerate(stage.optimizer.groups):
                mine = rows[(rows["stage"] == stage.index) & (rows["group"] == number)]
                if not len(mine):
                    continue
                by = mine["clip"] * (mine["batch"].astype(float) if stage.reduction == "sum" else 1.0)  # what the mean gradient is multiplied with
                rate = mine["rate"] * by
                decay = mine["decay"] / np.where(by > 0, by, 1.0)  # decay acts on the weights themselves, whatever happens to the gradient
                if stage.optimizer.kind != ADAM:
                    rate = rate * np.where(mine["momentum"] > 0, 1 - group.dampening, 1.0) / (1 - mine["momentum"])
                yield group, rate, decay

    def rates(self, start: int, stop: int) -> dict[str, float]:
        """Effective learning rates by parameter, summed over steps (start, stop].

        A step counts as ``rate * clip`` for Adam, and ``rate * clip * (1 - dampening) / (1 - momentum)`` for SGD with momentum, also
        Nesterov's: the speed that a constant gradient reaches (Bae et al. 2024, App. B). With ``reduction="sum"`` times the batch's size.
        """
        total: dict[str, float] = {}
        for group, rate, _ in self._groups(start, stop):
            for name in group.names:
                total[name] = total.get(name, 0.0) + float(rate.sum())
        return total

    def decays(self, start: int, stop: int) -> dict[str, float]:
        """Weight decay by parameter over steps (start, stop]: the mean of the steps' coefficients, weighted by their effective rates."""
        rate_sum: dict[str, float] = {}
        product: dict[str, float] = {}
        for group, rate, decay in self._groups(start, stop):
            for name in group.names:
                rate_sum[name] = rate_sum.get(name, 0.0) + float(rate.sum())
                product[name] = product.get(name, 0.0) + float((rate * decay).sum())
        return {name: product[name] / total if total else 0.0 for name, total in rate_sum.items()}


# -------------------------------------------------------------------------------------------------------------- making stages


def _lived(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages that took a step before their last checkpoint (a killed training may leave one that did not)."""
    found = [stage for stage in manifest["stages"] if stage["stop"] > stage["start"]]
    if not found:
        raise RunError("a run without a checkpoint after its first step", "at least one", "training ended too early: record it again")
    return found


def stages_of(manifest: dict[str, Any], data: Sequence[Any], tasks: Sequence[Task]) -> tuple[Stage, ...]:
    """The manifest's stages with their data and tasks."""
    out: list[Stage] = []
    column = 0
    for index, (facts, train, task) in enumerate(zip(_lived(manifest), data, tasks, strict=False)):
        examples = task.examples(train)
        columns = range(column, column + len(examples))
        record = OptimizerRecord.from_json(facts["optimizer"])
        out.append(Stage(index, facts["name"], facts["start"], facts["stop"], examples, task, record, facts["data"]["fingerprint"], facts["reduction"], columns))
        column = columns.stop
    return tuple(out)


def _spread(given: Any, facts: list[dict[str, Any]], what: str, kind: type) -> list[Any]:
    """What was passed for ``train`` or ``task``, one for each stage."""
    if kind is Task and not isinstance(given, Task | Mapping | list | tuple):
        raise InputError(f"a {type(given).__name__} where a task belongs", "a hw.tasks.Task", "hw.tasks.Classification(), say, or hw.tasks.Task(loss=, measure=)")
    names = [stage["name"] for stage in facts]
    if isinstance(given, Mapping) and set(names) <= set(given):
        return [given[name] for name in names]
    if len(names) == 1 or isinstance(given, kind):
        return [given] * len(names)
    raise InputError(f"one {what} for a run of {len(names)} stages", f"one for each stage: {names}", f"pass {what}={{{names[0]!r}: ..., {names[1]!r}: ...}}")


def _check_data(stage: Stage, facts: dict[str, Any]) -> None:
    count, expected = facts["data"]["examples"], facts["data"]["fingerprint"]
    if stage.size != count:
        raise DataMismatch(
            f"a dataset of {stage.size:,} examples for stage {stage.name!r}", f"the {count:,} that it was recorded with", "pass the dataset that the model was trained on"
        )
    found = fingerprint(stage.data)
    if found != expected:
        raise DataMismatch(
            f"a dataset for stage {stage.name!r} whose content differs from the recorded one ({found[:20]} now, {expected[:20]} then)",
            "the same examples, unchanged and in the same order",
            "undo the change (a fixed order, no random augmentation), or record the training again",
        )


def _check_task(stage: Stage, facts: dict[str, Any]) -> None:
    found = stage.task.describe()
    differing = [f"{k}: {facts['task'].get(k)!r} then, {found.get(k)!r} now" for k in {**facts["task"], **found} if facts["task"].get(k) != found.get(k)]
    if differing:
        raise RunError(f"another task for stage {stage.name!r} than it was recorded with ({'; '.join(differing)})", "the task of the training", "pass that one")


def _check_model(model: nn.Module, manifest: dict[str, Any], path: Path) -> None:
    found = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in state_of(model).items()}
    expected = manifest["tensors"]
    for name in [*expected, *(n for n in found if n not in expected)]:
        if found.get(name) != expected.get(name):
            then, now = (f"{w[name][0]} {w[name][1]}" if name in w else "not there" for w in (expected, found))
            raise ModelMismatch(
                f"a model whose {name!r} is {now}; in the run {path} it is {then}",
                "the architecture that was recorded",
                "make build() return that model (the same classes, sizes, dtype, and weights tied alike)",
            )


def _warn_of_other_code(model: nn.Module, manifest: dict[str, Any], path: Path) -> None:
    """Warn where the model is not any that was seen in training. Digests made by other versions say nothing; older runs have none."""
    now = model_facts(model)
    then = [facts for facts in manifest.get("code", []) if facts["made"] == now["made"]]
    if not then or now["digest"] in [facts["digest"] for facts in then]:
        return
    kinds = then[0]["kinds"]
    differing = [name for name in [*kinds, *(n for n in now["kinds"] if n not in kinds)] if kinds.get(name) != now["kinds"].get(name)]
    first, missing = next(iter(differing), ""), "not there"
    told = f"{first!r} is {now['kinds'].get(first, missing)}, and was {kinds.get(first, missing)}" if differing else "other settings, or other code"
    warnings.warn(
        f"build() makes another model than was recorded in {path}: {told} (digest {now['digest']}, recorded {then[0]['digest']}). The weights fit, so it will be "
        "traced, but scores will be those of this other model. Expected is the model of the training, with the same modules, settings and code. "
        "To mend it make build() return that one; where the difference is meant, ignore this warning.",
        stacklevel=3,
    )
