"""Recording a training as it happens: one line a step in the user's own loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from headwater.errors import HeadwaterError, InputError, RunError, TaskError
from headwater.tasks import Examples, Task
from headwater.tasks.batches import to
from headwater.tasks.code import model_digest
from headwater.tasks.diffusion import Diffusion, Draw, Noisy
from headwater.tasks.task import per_example
from headwater.training.averages import Average
from headwater.training.journal import EVENTS, Journal, stage_facts
from headwater.training.optimizers import describe, second_moments, unwrapped
from headwater.training.places import Places
from headwater.training.run import Run, stages_of
from headwater.training.watching import Watched

REDUCTIONS = ("mean", "sum")


class Recorder:
    """Records a training in a run directory.

        recorder = hw.Recorder("runs/mnist", model, optimizer, task=task, train=train_set, checkpoints=6, steps=epochs * len(loader))
        for indices, batch in loader:
            ...
            optimizer.step()
            recorder.step(indices)
        run = recorder.finish()

    Args:
        path: the run directory, created; refused where it holds a run already (unless ``overwrite``).
        model, optimizer: what is trained (or say it later, with :meth:`watch`). torch's SGD, Adam or AdamW, also inside a wrapper. Learning
            rate, momentum and weight decay are read at every optimizer step, so schedulers need no care.
        task: the task that training minimises. train: the dataset that ``indices`` count in.
        checkpoints: how many to keep, at the ends of equal intervals; or at which steps of the stage.
        ema: what keeps a moving average of the weights, which checkpoints then hold beside the raw ones: diffusers' EMAModel, torch's
            AveragedModel, a copy of the model, or tensors by name (see :meth:`headwater.Run.averaged`, and ``weights=`` of ``hw.trace``). It has
            to be updated before ``recorder.step`` is called.
        steps: how many steps this stage will take. Without it checkpoints are taken more often and thinned out (up to twice as many lie on
            the disk at a time, and their places are equal only roughly).
        stage: the name of the first stage. reduction: how the loop reduces the losses of a batch, "mean" or "sum".
        seed: noted in the manifest.

    A killed training leaves a run that can be opened, up to its last checkpoint.

    Raises:
        UnknownOptimizer, InputError: the optimizer's dynamics are unknown, or it does not train this model. RunError, StorageError.
    """

    def __init__(
        self,
        path: str | Path,
        model: nn.Module | None = None,
        optimizer: Any = None,
        *,
        task: Task,
        train: Any,
        checkpoints: int | Sequence[int] = 6,
        steps: int | None = None,
        stage: str = "train",
        reduction: str = "mean",
        seed: int | None = None,
        overwrite: bool = False,
        ema: Any = None,
    ) -> None:
        self.journal = Journal(path, seed=seed, overwrite=overwrite)
        self.taken = 0
        self._data: list[tuple[Any, Task]] = []
        self._watched: Watched | None = None
        self._average: Average | None = None
        self._drawn: list[tuple[np.ndarray, Draw]] = []
        self._state_known = False
        self._first = {"name": stage, "train": train, "task": task, "checkpoints": checkpoints, "steps": steps, "reduction": reduction, "ema": ema}
        if model is not None:
            self.watch(model, optimizer)

    def watch(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        steps: int | None = None,
        train: Any = None,
        task: Task | None = None,
        stage: str | None = None,
        ema: Any = None,
    ) -> Self:
        """Name the model and the optimizer where they were not known when the recorder was made; also, if they differ from what was said
        then, the number of steps, the data, the task, the name of the first stage and what keeps the average of the weights."""
        given = {"steps": steps, "train": train, "task": task, "name": stage, "ema": ema}
        return self._begin(model, optimizer, **{**self._first, **{k: v for k, v in given.items() if v is not None}})

    def stage(
        self,
        name: str,
        *,
        train: Any,
        optimizer: Any,
        task: Task | None = None,
        checkpoints: int | Sequence[int] | None = None,
        steps: int | None = None,
        reduction: str | None = None,
        ema: Any = None,
    ) -> Self:
        """Begin a further stage with its own data (whose examples become further columns of the scores), optimizer, and perhaps task and
        average of the weights (that of the stage before goes on unless another is named)."""
        if self._watched is None:
            raise RunError(f"a stage {name!r} before the first one began", "a model and an optimizer to watch", "recorder.watch(model, optimizer)")
        model = self._watched.model
        self._end_stage()
        given = {"task": task, "checkpoints": checkpoints, "reduction": reduction, "ema": ema}
        return self._begin(model, optimizer, **{**self._first, **{k: v for k, v in given.items() if v is not None}, "name": name, "train": train, "steps": steps})

    def _begin(
        self, model: nn.Module, optimizer: Any, *, name: str, train: Any, task: Task, checkpoints: Any, steps: int | None, reduction: str, ema: Any
    ) -> Self:
        if reduction not in REDUCTIONS:
            raise InputError(f"reduction={reduction!r}", f"one of {REDUCTIONS}", "say how your loop makes one loss of a batch's losses")
        if name in [stage["name"] for stage in self.journal.manifest["stages"]]:
            raise InputError(f"a second stage named {name!r}", "a name of its own for each stage", "rename one of them")
        model, optimizer = bare(model), unwrapped(optimizer)
        record, examples = describe(optimizer, model), task.examples(train)
        if len(examples) == 0:
            raise InputError("an empty training set", "at least one example", "pass the dataset that the indices of recorder.step count in")
        check_task(model, task, examples)
        self.journal.note_code(model)
        average = Average(ema, model) if ema is not None else None
        self.journal.manifest["stages"].append(stage_facts(name, self.taken, task, examples, record, reduction) | ({"ema": average.facts()} if average else {}))
        self._data.append((train, task))
        self._state_known = False
        self._first["ema"], self._average = ema, average
        self._watched = Watched(model, optimizer, record, len(examples), Places(checkpoints, steps))
        if self.taken == 0:
            self._save(0)
        return self

    def draw(self, indices: Any, batch: Any = None, *, generator: torch.Generator | None = None) -> Noisy:
        """Noise events of a training batch of a diffusion model, remembered for the next :meth:`step`: in place of a loop's own ``randn_like``,
        ``randint`` and ``add_noise``, which nothing could repeat.

            drawn = recorder.draw(indices, latents)
            answer = unet(drawn.noisy, drawn.timesteps, encoder_hidden_states).sample
            loss = F.mse_loss(answer.float(), drawn.target)
            ...
            optimizer.step()
            recorder.step()

        With gradient accumulation, several draws come before one step; it is then made of the examples of all. ``indices``: as for
        :meth:`step`; ``batch``: these examples as the network's loss takes them, or their images alone, on the device; default: read from
        the stage's dataset. ``generator``: torch's; the global one if None. Raises InputError, RunError.
        """
        watched = self._watched
        if watched is None:
            raise RunError("recorder.draw() before recorder.watch()", "a model and an optimizer to watch", "recorder.watch(model, optimizer)")
        train, task = self._data[-1]
        if not isinstance(task, Diffusion):
            raise InputError(f"recorder.draw() in a stage whose task is {type(task).__name__}", "a hw.tasks.Diffusion", "draw nothing: recorder.step(indices)")
        ids = _ids(indices, watched.size)
        if batch is None:
            device = next((p.device for p in watched.model.parameters()), torch.device("cpu"))
            batch = to(Examples(train, task.collate).batch(ids), device)
        drawn = task.noisy(batch, task.draw(len(ids), generator))
        self._drawn.append((ids, drawn.events))
        return drawn

    def step(self, indices: Any = None, *, clip: float = 1.0, loss: Any = None, events: Draw | None = None) -> None:
        """Record the optimizer step just taken.

        Args:
            indices: the ids, in the stage's dataset, of the examples whose losses made its gradient (all micro-batches together); left out
                where :meth:`draw` was told them.
            clip: the factor that gradient clipping multiplied the gradient with; ``max_norm / total_norm`` will do (above 1 counts as 1).
                torch's own factor is ``max_norm / (total_norm + 1e-6)``: with that one a replay can be exact to the last bit. A factor
                below 1 is taken as clipping of the 2-norm of the gradients of all the watched optimizer's parameters together
                (``hw.Unrolled`` differentiates through it), unless it is the same number at every clipped step.
            events: of a diffusion model, the noise events of these examples, in their order, as ``task.draw`` gave them.
            loss: the loss of the whole batch, if you like: a replay then shows at which step it departs (see ``hw.Unrolled``).

        A step that a gradient scaler skipped is recorded as one that moved nothing. Of several processes (DistributedDataParallel) one
        records, with the ids and events of all: ``accelerator.gather``, say, of ``indices``, ``events.t`` and ``events.seeds``.

        Raises:
            InputError: ids out of range. RunError: before ``watch``, or several optimizer steps since the last record.
        """
        watched = self._watched
        if watched is None:
            raise RunError("recorder.step() before recorder.watch()", "a model and an optimizer to watch", "recorder.watch(model, optimizer)")
        ids, events = self._seen(indices, events, watched.size)
        rows = watched.rows(len(self.journal.manifest["stages"]) - 1, self.taken + 1, min(1.0, float(clip)), len(ids))
        self.taken += 1
        first = not self._state_known
        self.journal.log(rows, ids)
        self._log_events(events, len(ids))
        watched.log(self.journal, self.taken, loss)
        if first and watched.moved:
            self._state_known = True
            self._note_state(watched)
        since = self.taken - self.journal.manifest["stages"][-1]["start"]
        if watched.places.wanted(since):
            self._save(self.taken)
            start = self.taken - since
            self.journal.drop([start + s for s in watched.places.thin()])

    def _seen(self, indices: Any, events: Draw | None, size: int) -> tuple[np.ndarray, Draw | None]:
        """What a step saw: as it is told, or as it was drawn since the last one."""
        drawn, self._drawn = self._drawn, []
        if indices is not None and not drawn:
            return _ids(indices, size), events
        if not drawn:
            raise InputError("recorder.step() without indices", "the ids of its examples, or recorder.draw(indices, batch) before it", "recorder.step(indices)")
        if indices is not None or events is not None:
            raise InputError("indices or events of a step whose events recorder.draw() gave", "one of the two ways", "recorder.step() alone, after the draws")
        t, seeds = (torch.cat([getattr(found, name) for _, found in drawn]) for name in ("t", "seeds"))
        return np.concatenate([ids for ids, _ in drawn]), Draw(t, seeds)

    def _log_events(self, events: Draw | None, count: int) -> None:
        """Keep the noise events of a step; every step has them, or none."""
        had = self.journal.events is not None
        if events is None and not had:
            return
        if events is None or (not had and self.taken > 1) or len(events.t) != count:
            given = f"step {self.taken} without noise events" if events is None else f"{len(events.t)} noise events for {count} examples at step {self.taken}"
            mend = "recorder.step(indices, events=events), with the events that the loss was taken at"
            raise InputError(given, "one event for each example of every step, from the first on", mend)
        rows = np.empty(count, EVENTS)
        rows["t"], rows["seed"] = events.t.cpu().numpy(), events.seeds.cpu().numpy()
        self.journal.log_events(rows)

    def _note_state(self, watched: Watched) -> None:
        """Keep what the optimizer remembered before the stage's first step (nothing, if it was new)."""
        stage = self.journal.manifest["stages"][-1]
        stage["remembered"] = self.journal.save_optimizer(stage["start"], watched.state) if watched.state else ""
        watched.state = {}

    def _save(self, step: int) -> None:
        watched = self._watched
        assert watched is not None
        self.journal.manifest["stages"][-1]["stop"] = step
        self.journal.save(step, watched.model, second_moments(watched.optimizer, watched.model), self._average.differing() if self._average else None)

    def _end_stage(self) -> None:
        watched, stage = self._watched, self.journal.manifest["stages"][-1]
        assert watched is not None
        since = self.taken - stage["start"]
        if since == 0:
            raise RunError(f"the stage {stage['name']!r} ends without a step", "recorder.step(indices) after every optimizer.step()", "add that line to the loop")
        if not watched.moved:
            raise RunError(
                f"the stage {stage['name']!r} recorded {since} steps, but its optimizer took none",
                "the optimizer that the loop steps",
                "pass that very object to the recorder",
            )
        if self._average is not None and not self._average.moved:
            raise RunError(
                f"an average of the weights (ema=) that was never updated in the {since} steps of the stage {stage['name']!r}",
                "the object that the loop updates after each step",
                "pass that very object to the recorder, or leave ema= out",
            )
        if str(self.taken) not in self.journal.manifest["checkpoints"]:
            watched.places.wanted(since, final=True)
            self._save(self.taken)
        self.journal.drop([stage["start"] + s for s in watched.places.settle(since)])
        watched.release()

    def finish(self) -> Run:
        """End the recording; the run, ready for ``hw.trace`` (its model is a copy of the trained one)."""
        if self._watched is None:
            raise RunError("a recorder that never saw a model", "a model and an optimizer to watch", "recorder.watch(model, optimizer)")
        watched = self._watched
        if not self.journal.manifest["finished"]:
            self._end_stage()
            self.journal.note_code(watched.model)
            self.journal.manifest["finished"] = True
            self.journal.flush()
        model = watched.model
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        stages = stages_of(self.journal.manifest, [d for d, _ in self._data], [t for _, t in self._data])
        return Run(self.journal.path, self.journal.manifest, stages, lambda: copy.deepcopy(model), device, code=model_digest(model))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._watched is not None:
            self._watched.release()


def check_task(model: nn.Module, task: Task, examples: Examples) -> None:
    """Raise TaskError where the task's loss of the first two examples is not one number each: better now than after the training."""
    device, mode = next((p.device for p in model.parameters()), torch.device("cpu")), {m: m.training for m in model.modules()}
    batch = to(examples.batch(range(min(2, len(examples)))), device)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            per_example(task.loss(model.eval(), batch), batch, "loss")
    except HeadwaterError:
        raise
    except Exception as error:  # whatever the user's model raises
        raise TaskError(
            f"a task whose loss fails on the first training examples: {type(error).__name__}: {error}",
            "a loss that takes the model and a batch of the dataset",
            "look at what train[0] holds and in which order; give the task a collate= that makes the batches it wants",
        ) from error
    finally:
        for module, training in mode.items():
            module.training = training


def bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (model.module if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else None)
        if inner is None:
            return model
        model = inner


def _ids(indices: Any, size: int) -> np.ndarray:
    ids = (indices.detach().cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices)).reshape(-1)
    if ids.dtype.kind not in "iu" or len(ids) == 0:
        raise InputError(f"indices of type {ids.dtype} and length {len(ids)}", "the integer ids of the batch's examples", "recorder.step(indices)")
    if ids.astype(np.uint64).max() >= size:  # a negative id counts as a huge one
        raise InputError(f"indices from {ids.min()} to {ids.max()}", f"ids from 0 to {size - 1}", "count examples in the dataset that the recorder was given")
    return ids.astype(np.uint32)


