"""The way of a generated image: what the network took it to be at each sampling step.

At step t a sampler holds x_t, and the network's answer there amounts to a finished image ``x0hat`` (Ho et al. 2020, Eq. 15). A
:class:`Trajectory` keeps those, beside the image that came out. It is made by a plain sampler (:meth:`Trajectory.sample`), taken from a
pipeline of diffusers as it samples (:func:`watched`), or built from what your own sampler kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError
from headwater.philox import key_of
from headwater.tasks.batches import Batch, size
from headwater.tasks.diffusion.events import Drawn, Events, Noised, image_of
from headwater.tasks.diffusion.noise import noise_of, seeds_of
from headwater.tasks.diffusion.processes import Process

if TYPE_CHECKING:
    from headwater.tasks.diffusion.task import Diffusion

@dataclass(frozen=True, eq=False)
class Trajectory:
    """Generated images with the ways that led to them. Passed as queries they are the finished images, for any method; ``hw.JourneyTrak`` asks
    about each step.

    Args:
        batch: the finished images (n, ...) with their conditions, as training examples are.
        clean: what they were taken to be at each step, (n, steps, ...).
        timesteps: of the steps, rows of the process's tables, descending.
    """

    batch: Any
    clean: Tensor
    timesteps: tuple[int, ...]
    images: str = "images"

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", tuple(int(t) for t in self.timesteps))
        x = image_of(self.batch, self.images)
        expected = (len(x), len(self.timesteps), *x.shape[1:])
        if tuple(self.clean.shape) != expected:
            raise InputError(f"steps of shape {tuple(self.clean.shape)}", f"{expected}: examples, steps, image", "torch.stack(steps, 1)")
        if not self.timesteps or any(a <= b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise InputError(f"timesteps {self.timesteps[:6]}", "at least one, descending, as samplers go", "the timestep of each step, once")

    def at(self, step: int) -> Batch:
        """The batch with what its images were taken to be at a step (from 0, the noisiest)."""
        return with_images(self.batch, self.clean[:, step], self.images)

    @classmethod
    @torch.no_grad()
    def sample(
        cls, task: Diffusion, model: nn.Module, batch: Batch, *, steps: int = 50, guidance: float | None = None, clip: float | None = None, seed: int = 0
    ) -> Trajectory:
        """Generate images without chance beyond their first noise: DDIM with eta = 0 (Song et al. 2020, arXiv 2010.02502, Eq. 12), for flow
        matching Euler's method.

        Args:
            batch: conditions, and images of the wanted shape (their values do not matter).
            steps: sampling steps, evenly spaced. guidance: as of ``task.output``.
            clip: keep ``x0hat`` within plus or minus this, as samplers of pixels do (1.0): at the noisiest steps a small error of the predicted
                noise is a large one of the image.
            seed: of the first noise; each image has its own, by its number.
        """
        x0, process = image_of(batch, task.images), task.process
        rows = tuple(reversed(process.strata(min(steps, process.steps), evenly=True)))
        seeds = seeds_of(key_of("headwater", "trajectory", seed), np.arange(len(x0)), [(0, 0)])
        kind = torch.promote_types(x0.dtype, torch.float32)
        eps = noise_of(seeds, x0.shape[1:], kind, x0.device)[:, 0]
        x, kept = float(process.noise[rows[0]]) * eps, []
        for t, following in zip(rows, [*rows[1:], None], strict=True):
            signal, noise = (table[t].to(x) for table in (process.signal, process.noise))
            answer = task.predict(model, _as_rows(task, batch, x.to(x0.dtype), t), guidance).to(kind)
            clean = process.clean(task.prediction, answer, x, signal, noise)
            clean = clean if clip is None else clean.clamp(-clip, clip)
            kept.append(clean)
            if following is not None:
                x = process.signal[following].to(x) * clean + process.noise[following].to(x) * (x - signal * clean) / noise
        found = torch.stack(kept, 1).to(x0.dtype)
        return cls(with_images(batch, found[:, -1], task.images), found, rows, task.images)


def _as_rows(task: Diffusion, batch: Batch, x: Tensor, t: int) -> Drawn:
    """Images that hold their noise already, one row each."""
    one = torch.ones(len(x), 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    time = task.process.time[t].expand(len(x), 1).to(x.device)
    time = time.to(one.dtype) if time.is_floating_point() else time
    nothing = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
    return Drawn(with_images(batch, x, task.images), one, 0 * one, time, one, one, one, nothing, torch.zeros_like(x).unsqueeze(1))


def with_images(batch: Batch, x: Tensor, images: str) -> Batch:
    """A batch with other images."""
    if isinstance(batch, tuple | list):
        return type(batch)([x, *batch[1:]])
    if hasattr(batch, "keys"):
        return {name: x if name == images else batch[name] for name in batch}
    return x


class Travelled(Noised):
    """Trajectories as a dataset: of the finished images, which also knows each step's."""

    def __init__(self, journey: Trajectory, process: Process, weights: Tensor, events: Events, drop: float = 0.0, namespace: str = "train") -> None:
        super().__init__(journey.batch, None, process, weights, events, journey.images, drop, namespace)
        self.journey = journey

    def _seen(self, events: Any, namespace: str) -> Travelled:
        return Travelled(self.journey, self.process, self.weights, events, self.drop, namespace)

    def step(self, k: int) -> Noised:
        """What the images were taken to be at step k, as a dataset."""
        return Noised(self.journey.at(k), None, self.process, self.weights, self.events, self.images, self.drop, self.namespace)


@dataclass
class Watch:
    """What a scheduler did: timesteps and finished images, step by step, for each call of the pipeline."""

    task: Diffusion
    rows: list[int] = field(default_factory=list)
    clean: list[Tensor] = field(default_factory=list)
    last: Tensor | None = None

    def trajectory(self, conditions: Sequence[Any] | dict[str, Any] = ()) -> Trajectory:
        """The trajectory of the images that were sampled. ``conditions``: as training examples have them, after the image or by name."""
        if self.last is None:
            raise InputError("a scheduler that took no step", "a pipeline that was called inside `with watched(...)`", "call it there")
        batch: Any = self.last
        if conditions:
            batch = {self.task.images: self.last, **conditions} if isinstance(conditions, dict) else (self.last, *conditions)
        size(batch)
        return Trajectory(batch, torch.stack(self.clean, 1), tuple(self.rows), self.task.images)

    def add(self, t: Any, found: Tensor, last: Tensor) -> None:
        row = int((self.task.process.time.double() - float(t)).abs().argmin())
        if self.rows and row > self.rows[-1]:  # another call of the pipeline began
            self.rows, self.clean = [], []
        if self.rows and row == self.rows[-1]:  # a step in several parts: the last one counts
            self.rows.pop()
            self.clean.pop()
        self.rows.append(row)
        self.clean.append(found.detach().cpu())
        self.last = last.detach().cpu()


@contextmanager
def watched(scheduler: Any, task: Diffusion) -> Iterator[Watch]:
    """Keep what a pipeline of diffusers takes its images to be at each step, while it samples:

        with hw.tasks.watched(pipeline.scheduler, task) as watch:
            pipeline(...)
        trajectory = watch.trajectory(conditions=(labels,))

    ``x0hat`` is the scheduler's own where it gives one, else computed from the network's (guided) answer. Of several calls the last is kept.
    Raises InputError for a scheduler whose steps say neither.
    """
    step, watch = scheduler.step, Watch(task)

    def watching(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        found = step(model_output, timestep, sample, *args, return_dict=True, **kwargs)
        clean = getattr(found, "pred_original_sample", None)
        if clean is None:
            clean = _clean(scheduler, task, model_output, timestep, sample)
        watch.add(timestep, clean, found.prev_sample)
        return found if return_dict else found.to_tuple()

    scheduler.step = watching
    try:
        yield watch
    finally:
        del scheduler.step


def _clean(scheduler: Any, task: Diffusion, answer: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    process = task.process
    row = int((process.time.double() - float(timestep)).abs().argmin())
    if getattr(scheduler, "init_noise_sigma", 1.0) not in (1, 1.0):
        given = f"a {type(scheduler).__name__}, whose steps do not give the finished image and whose samples have another scale"
        raise InputError(given, "a DDPM, DDIM, Euler or flow matching scheduler", "keep x0hat in a sampler of your own: hw.tasks.Trajectory(...)")
    return process.clean(task.prediction, answer, sample, process.signal[row].to(sample), process.noise[row].to(sample))
