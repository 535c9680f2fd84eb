"""The task of a denoising network: its loss at noise events, and the functions of its output that a question may be about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError, TaskError
from headwater.tasks.batches import Batch, Examples, hash_of, size, take, to
from headwater.tasks.diffusion import events as ev
from headwater.tasks.diffusion.densities import Density, density_table
from headwater.tasks.diffusion.events import Draw, Drawn, Events, Grid, Noised
from headwater.tasks.diffusion.loop import Noisy
from headwater.tasks.diffusion.losses import Weighting, checked, curvature_of, error_of, weights_of
from headwater.tasks.diffusion.networks import answer, conditions_of, without
from headwater.tasks.diffusion.outputs import Output
from headwater.tasks.diffusion.processes import Process, prediction_of, process_of
from headwater.tasks.diffusion.trajectory import Trajectory, Travelled
from headwater.tasks.draws import Draws
from headwater.tasks.task import Measure, Task


class Diffusion(Task):
    """A denoising diffusion or flow-matching model: the mean over noise events of the error of what the network predicts.

        x_t = signal_t x + noise_t eps
        loss = mean over events (t, eps) of  w(t) * mean over elements of  l(network(x_t, t, condition) - target)

    Batches: images (n, ...), or (images, condition, ...), or a mapping with a field ``images`` whose other fields go to the network by name
    (nested as it wants them: ``added_cond_kwargs``). Any number of axes: pictures and latents (n, c, h, w), signals (n, length), sequences.
    Images are in the network's own range: pixels in -1..1, or latents (see :func:`headwater.tasks.latents`).

    The network is called as ``model(x_t, t, *conditions)``, or with the time by its name where it is a later argument (SD3, PixArt, Flux); it may
    be a plain module, or a UNet2DModel, UNet2DConditionModel, DiT or transformer of diffusers. Noise is keyed by (seed, example, timestep, draw):
    nothing depends on batches, their order or the device.

    Args:
        scheduler: the noise process: a scheduler of diffusers (DDPM, DDIM, Euler, flow matching, ...), or one of ``hw.tasks.cosine()``,
            ``linear()``, ``flow()``.
        prediction: what the network answers with: "epsilon", "v", "sample" or "flow"; default: as the scheduler's config says.
        loss: "l2", "l1", "huber" (torch's, with threshold ``delta``) or "pseudo-huber" (the "huber" of diffusers' scripts, ``delta`` their
            huber_c): see :mod:`headwater.tasks.diffusion.losses`.
        weighting: w(t): None, "min-snr" or ``MinSNR(gamma)`` (diffusion), "sigma-sqrt" or "cosmap" (flow matching, as in diffusers'
            ``compute_loss_weighting_for_sd3``), or a function of the timesteps (T,) -> (T,).
        density: how training draws timesteps, where not uniformly: see :func:`headwater.tasks.flow`; for any scheduler.
        noise_offset: what training added to the noise, times one standard normal number a channel, as in diffusers' scripts.
        time: what the network is told: a factor (1 / 1000 for Flux), or a function of the process's times (T,) -> (T,); whole numbers stay so.
        fixed: further arguments of the network, the same in every call (``{"img_ids": ids}``).
        timesteps, draws, noise, seed: the expected events, by which the mean over events is estimated wherever a method does not choose its
            own: ``timesteps`` of them (or which), ``draws`` noises at each, noise "shared" by all examples or each "example" its own.
        drop, null: how often training left the condition out, and what it gave in its place (for classifier-free guidance): a number or tensor
            for all conditions, or nulls by name or by place, None for what stays. Left out are conditions of training events, drawn and
            recorded; never those of expected events. A network that drops labels itself in training mode (DiT) leaves no record of it: set its
            ``dropout_prob`` to 0 and give ``drop=0.1, null=classes`` here.
        images: the images' field when batches are mappings. collate: as in a DataLoader.

    The measure is minus the loss: a positive score means that training on the example lowered the query's loss.
    ``output(kind)`` gives other functions to ask about.

    >>> import torch
    >>> from headwater.tasks import cosine
    >>> class Network(torch.nn.Module):
    ...     def forward(self, x, t):
    ...         return torch.zeros_like(x)
    >>> task = Diffusion(cosine(), timesteps=5)
    >>> task.loss(Network(), torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2])
    """

    def __init__(
        self,
        scheduler: Any,
        prediction: str | None = None,
        loss: str = "l2",
        weighting: Weighting = None,
        *,
        delta: float = 1.0,
        density: Density = None,
        noise_offset: float = 0.0,
        time: float | Callable[[Tensor], Tensor] | None = None,
        fixed: Mapping[str, Any] | None = None,
        timesteps: int | tuple[int, ...] = 10,
        draws: int = 1,
        noise: str = ev.SHARED,
        seed: int = 0,
        drop: float = 0.0,
        null: Any = None,
        images: str = "images",
        collate: Callable[[list[Any]], Batch] | None = None,
    ) -> None:
        if not 0 <= drop < 1 or (drop and null is None):
            raise TaskError(
                f"drop={drop} with null={null!r}", "a probability below 1, and what the network is given in the condition's place", "Diffusion(drop=0.1, null=...)"
            )
        self.process = _altered(process_of(scheduler), density, noise_offset, time)
        self.prediction = prediction_of(self.process, prediction)
        self.kind, self.delta, self.weighting, self.drop, self.null, self.images, self.collate = checked(loss, delta), delta, weighting, drop, null, images, collate
        self.fixed = dict(fixed or {})
        self.weights = weights_of(weighting, self.process, self.prediction)
        self.events = self.grid(timesteps, draws, noise=noise, seed=seed)

    # -- events ------------------------------------------------------------------------------------------------------------------

    def grid(self, timesteps: int | tuple[int, ...] = 10, draws: int = 1, *, noise: str = ev.SHARED, seed: int = 0, salt: int = 0) -> Grid:
        """Expected events: so many timesteps that stand for all (or these), with ``draws`` noises each. Raises InputError for others than the
        process has.

        >>> from headwater.tasks import cosine
        >>> Diffusion(cosine()).grid(3, draws=2)
        Grid(timesteps=(1, 500, 999), draws=2, noise='shared', seed=0, salt=0)
        """
        steps = self.process.strata(timesteps) if isinstance(timesteps, int) else tuple(int(t) for t in timesteps)
        if any(not 0 <= t < self.process.steps for t in steps):
            raise InputError(f"timesteps {steps}", f"timesteps from 0 to {self.process.steps - 1}", "count them in the scheduler's tables")
        return Grid(steps, draws, noise, seed, salt)

    def draw(self, batch: Any, generator: torch.Generator | None = None) -> Draw:
        """Events of a training batch, one an example, from the training distribution of timesteps.

            events = task.draw(batch)
            loss = task.loss(model, task.noised(batch, events)).mean()
            ...
            recorder.step(indices, events=events)

        ``batch``: the batch, or how many examples it has. ``generator``: torch's; the global one if None.

        >>> from headwater.tasks import cosine
        >>> events = Diffusion(cosine()).draw(4, torch.Generator().manual_seed(0))
        >>> events.t.shape, events.seeds.shape
        (torch.Size([4]), torch.Size([4]))
        """
        return ev.draw(batch if isinstance(batch, int) else size(batch), self.process, generator)

    def noised(self, batch: Batch, events: Draw) -> Drawn:
        """A batch with the events that :meth:`draw` gave: what :meth:`loss` then sees, conditions left out as in training.

        >>> from headwater.tasks import cosine
        >>> task, x = Diffusion(cosine()), torch.zeros(4, 3, 8, 8)
        >>> task.noised(x, task.draw(x)).eps.shape
        torch.Size([4, 1, 3, 8, 8])
        """
        return ev.drawn(batch, events.t.unsqueeze(1), events.seeds.unsqueeze(1), self.process, self.weights, self.images, self.drop)

    def noisy(self, batch: Batch, events: Draw) -> Noisy:
        """The same in the terms of a training loop of its own: ``.noisy``, ``.timesteps``, ``.noise``, ``.target``."""
        held = self.noised(batch, events)
        x, eps, signal, noise = self.parts(held, held.eps.dtype)
        target = self.process.target(self.prediction, x, eps, signal, noise)
        return Noisy(self.mixed(held), held.time[:, 0], eps, target, events, held)

    def examples(self, data: Any) -> Examples:
        """A dataset as this task sees it: through its expected events."""
        if isinstance(data, Noised):
            return data
        given = data.data if isinstance(data, Examples) else data
        if isinstance(given, Trajectory):
            return Travelled(given, self.process, self.weights, self.events, self.drop)
        collate = self.collate or (data.collate if isinstance(data, Examples) else None)
        return Noised(given, collate, self.process, self.weights, self.events, self.images, self.drop)

    def _drawn(self, batch: Batch) -> Drawn:
        """A batch with its events: as it came, or the expected ones where it came without."""
        if isinstance(batch, Drawn):
            return batch
        if self.events.noise != ev.SHARED:
            raise TaskError(
                "a batch without events, for a task whose noise belongs to each example",
                "a batch that knows its examples' numbers",
                "task.examples(data).batch(ids), or noise='shared'",
            )
        n = size(batch)
        t, seeds = self.events.of(np.zeros(n, dtype=np.int64), "train")
        return ev.drawn(batch, t, seeds, self.process, self.weights, self.images, 0.0)

    # -- the network ---------------------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, rows: Drawn, guidance: float | None = None) -> Tensor:
        """What the network answers with at the rows' events, in at least float32, in the shape of the images (rows, ...).
        ``guidance``: ``null + guidance * (conditional - null)``, as samplers do."""
        noised = self.mixed(rows)
        out = self._call(model, noised, rows.time[:, 0], rows.batch, rows.dropped[:, 0])
        if guidance is None:
            return out
        if self.null is None:
            raise TaskError(f"guidance={guidance} for a task without null=", "what the network is given in the condition's place", "Diffusion(null=...)")
        empty = self._call(model, noised, rows.time[:, 0], rows.batch, torch.ones_like(rows.dropped[:, 0]))
        return empty + guidance * (out - empty)

    def mixed(self, rows: Drawn) -> Tensor:
        """``x_t`` of each row (rows, ...), in the images' dtype."""
        x = ev.image_of(rows.batch, self.images)
        wide = (slice(None), *[None] * (x.ndim - 1))
        return (rows.signal[:, 0][wide] * x + rows.noise[:, 0][wide] * rows.eps[:, 0]).to(x.dtype)

    def _call(self, model: nn.Module, x: Tensor, time: Tensor, batch: Batch, left_out: Tensor) -> Tensor:
        given, named = conditions_of(batch, self.images)
        if self.null is not None:
            given, named = without(given, self.null, left_out), without(named, self.null, left_out)
        return answer(model, x, time, (given, {**to(self.fixed, x.device), **named}), self.process)

    def _pair(self, model: nn.Module, rows: Drawn) -> tuple[Tensor, Tensor]:
        """Prediction and target, (rows, elements) each."""
        out = self.predict(model, rows)
        return out.flatten(1), self.process.target(self.prediction, *self.parts(rows, out.dtype)).flatten(1)

    def parts(self, rows: Drawn, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image and noise of each row (rows, ...), and how they are mixed, broadcast over them."""
        x, eps = ev.image_of(rows.batch, self.images).to(dtype), rows.eps[:, 0].to(dtype)
        wide = (slice(None), *[None] * (x.ndim - 1))
        return x, eps, rows.signal[:, 0].to(dtype)[wide], rows.noise[:, 0].to(dtype)[wide]

    # -- what training minimised ---------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Each example's mean loss over its events, shape (n,)."""
        return self.over_events(batch, lambda rows: rows.weight[:, 0] * self._error(model, rows))

    def _error(self, model: nn.Module, rows: Drawn) -> Tensor:
        out, target = self._pair(model, rows)
        return error_of(self.kind, out - target, self.delta)

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus the loss, shape (n,)."""
        return -self.loss(model, batch)

    def over_events(self, batch: Batch, value: Callable[[Drawn], Tensor]) -> Tensor:
        """The mean over each example's events of a function of rows, one an example and event: (rows,) -> (n,)."""
        held = self._drawn(batch)
        return (held.share.flatten() * value(held.rows())).view(held.signal.shape).sum(1)

    # -- its curvature -------------------------------------------------------------------------------------------------------------

    def sampled(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Pseudo-losses (n, 1) of the Gauss-Newton matrix J^T D J: ``sqrt(share w D) <out, xi>`` with xi standard normal, own to each event. D is
        the loss's second derivative by the answer: ``2/d`` for l2, ``1/d`` within the threshold for huber (0 beyond), ``2 c^3 / (r^2 + c^2)^1.5
        / d`` for pseudo-huber, and for l1, which has none, ``1/d^2`` (the Fisher information of the Laplace distribution)."""
        held, factors, out = self._curved(model, batch)
        xi = draws.normal(held.each, out.shape[1]).to(out).view(out.shape)
        return (factors * xi * out).sum(1).view(held.signal.shape).sum(1, keepdim=True)

    def exact(self, model: nn.Module, batch: Batch) -> Tensor:
        """``sqrt(share w D) out`` for each element of each event's answer, (n, events * d): the outer products of their gradients sum to the
        Gauss-Newton matrix."""
        held, factors, out = self._curved(model, batch)
        return (factors * out).view(len(held.signal), -1)

    def outputs(self, model: nn.Module, batch: Batch) -> int:
        held = self._drawn(take(batch, slice(0, 1)))
        return held.eps[0].numel()

    def _curved(self, model: nn.Module, batch: Batch) -> tuple[Drawn, Tensor, Tensor]:
        """The batch's events, ``sqrt(share w D)`` and the answers, (rows, d) each."""
        held = self._drawn(batch)
        rows = held.rows()
        out, target = self._pair(model, rows)
        scale = (rows.weight[:, 0] * rows.share[:, 0]).unsqueeze(1)
        return held, (scale * curvature_of(self.kind, (out - target).detach(), self.delta)).sqrt(), out

    # -- what a question may be about ------------------------------------------------------------------------------------------------

    def output(self, kind: str = "loss", *, guidance: float | None = None, events: Events | None = None) -> Output:
        """A function of the network's output to ask about, or to score by, as a mean over events:

        "loss": minus the training loss; "square_norm": mean(out^2) (D-TRAK); "mean": mean(out) (DAS); "l1_norm": mean(|out|); "elbo": minus the
        sum over timesteps of the KL divergences of the variational bound, ``(snr_{t-1} - snr_t) / 2`` times the squared error of x (Kingma et
        al. 2021, arXiv 2107.00630, Eq. 13), in nats an image, without prior and reconstruction; estimated from the events at hand, exact
        with all timesteps.

        ``guidance``: of the guided output, ``null + guidance * (conditional - null)``; the loss then compares that with the target.
        ``events``: the events to ask at, say ``task.grid((500,), draws=8)`` for the loss at one timestep; default: the task's (for "elbo" spread
        evenly, however training draws timesteps).

        >>> import torch
        >>> from headwater.tasks import linear
        >>> task = Diffusion(linear())
        >>> early = task.output("loss", events=task.grid((10, 20, 30), draws=4))
        >>> early.kind, early.events.count
        ('loss', 12)
        """
        if kind == "elbo" and events is None and self.process.density is not None:
            events = replace(self.events, timesteps=self.process.strata(len(self.events.timesteps), evenly=True))
        return Output(self, kind, guidance, events)

    def describe(self) -> dict[str, Any]:
        weighting = self.weighting if isinstance(self.weighting, str | None) else repr(self.weighting) if is_dataclass(self.weighting) else "function"
        events = {"timesteps": list(self.events.timesteps), "draws": self.events.draws, "noise": self.events.noise, "seed": self.events.seed}
        return {
            "kind": "Diffusion", "process": self.process.digest, "prediction": self.prediction, "loss": self.kind, "delta": self.delta,
            "weighting": weighting, "weights": hash_of(self.weights), "drop": self.drop, "null": None if self.null is None else hash_of(self.null),
            "fixed": hash_of(self.fixed) if self.fixed else None, "events": events,
        }  # fmt: skip


def _altered(process: Process, density: Density, offset: float, time: float | Callable[[Tensor], Tensor] | None) -> Process:
    """The process under another density of timesteps, with noise moved, and with other times told to the network."""
    process = replace(process, offset=offset) if offset else process
    if density is not None:
        if process.density is not None:
            raise TaskError("density= for a process that has one", "one of the two", "flow(density=...), or Diffusion(density=...)")
        process = replace(process, density=density_table(density, process.steps))
    if time is not None:
        process = replace(process, time=torch.as_tensor(time(process.time) if callable(time) else process.time * time))
    return process


__all__ = ["Diffusion", "Events", "Measure", "Output"]
