"""The task of a denoising network: its loss at noise events, and the functions of its output that a question may be about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headwater.errors import InputError, TaskError
from headwater.tasks.batches import Batch, Examples, hash_of, size
from headwater.tasks.diffusion import events as ev
from headwater.tasks.diffusion.events import Draw, Drawn, Events, Grid, Noised
from headwater.tasks.diffusion.processes import prediction_of, process_of
from headwater.tasks.draws import Draws
from headwater.tasks.task import Measure, Task, at_least_float32

LOSSES = ("l2", "l1", "huber")
OUTPUTS = ("loss", "square_norm", "mean", "l1_norm", "elbo")
Weighting = str | Callable[[Tensor], Tensor] | None


class Diffusion(Task):
    """A denoising diffusion or flow-matching model: the mean over noise events of the error of what the network predicts.

        x_t = signal_t x + noise_t eps
        loss = mean over events (t, eps) of  w(t) * mean over elements of  l(network(x_t, t, condition) - target)

    Batches: images (n, ...), or (images, condition, ...), or a mapping with a field ``images`` whose other fields go to the network by name.
    The network is called as ``model(x_t, t, *conditions)`` (a plain module, or UNet2DModel, UNet2DConditionModel, DiT and the like of
    diffusers). Images are in the network's own range: pixels in -1..1, or latents (see :func:`headwater.tasks.latents`).

    Args:
        scheduler: the noise process: a scheduler of diffusers (DDPM, DDIM, Euler, flow matching, ...), or one of ``hw.tasks.cosine()``,
            ``linear()``, ``flow()``.
        prediction: what the network answers with: "epsilon", "v", "sample" or "flow"; default: as the scheduler's config says.
        loss: "l2", "l1" or "huber" (with threshold ``delta``).
        weighting: w(t): None, "min-snr" (min(snr, 5)/snr for epsilon, /(snr + 1) for v, min(snr, 5) for sample; Hang et al. 2023, arXiv
            2303.09556), or a function of the timesteps (T,) -> (T,).
        timesteps, draws, noise, seed: the expected events, by which the mean over events is estimated wherever a method does not choose its
            own: ``timesteps`` of them (or which), ``draws`` noises at each, noise "shared" by all examples or each "example" its own.
        drop, null: how often training left the condition out, and what it gave in its place (for classifier-free guidance).
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
        timesteps: int | tuple[int, ...] = 10,
        draws: int = 1,
        noise: str = ev.SHARED,
        seed: int = 0,
        drop: float = 0.0,
        null: Any = None,
        images: str = "images",
        collate: Callable[[list[Any]], Batch] | None = None,
    ) -> None:
        if loss not in LOSSES:
            raise TaskError(f"loss={loss!r}", f"one of {LOSSES}", "say what training minimised")
        if not 0 <= drop < 1 or (drop and null is None):
            raise TaskError(
                f"drop={drop} with null={null!r}", "a probability below 1, and what the network is given in the condition's place", "Diffusion(drop=0.1, null=...)"
            )
        self.process = process_of(scheduler)
        self.prediction = prediction_of(self.process, prediction)
        self.kind, self.delta, self.weighting, self.drop, self.null, self.images, self.collate = loss, delta, weighting, drop, null, images, collate
        self.weights = self._weights()
        self.events = self.grid(timesteps, draws, noise=noise, seed=seed)

    # -- events ------------------------------------------------------------------------------------------------------------------

    def grid(self, timesteps: int | tuple[int, ...] = 10, draws: int = 1, *, noise: str = ev.SHARED, seed: int = 0, salt: int = 0) -> Grid:
        """Expected events: so many timesteps that stand for all (or these), with ``draws`` noises each."""
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
        """
        return ev.draw(batch if isinstance(batch, int) else size(batch), self.process, generator)

    def noised(self, batch: Batch, events: Draw) -> Drawn:
        """A batch with the events that :meth:`draw` gave."""
        return ev.drawn(batch, events.t.unsqueeze(1), events.seeds.unsqueeze(1), self.process, self.weights, self.images, self.drop)

    def examples(self, data: Any) -> Examples:
        """A dataset as this task sees it: through its expected events."""
        if isinstance(data, Noised):
            return data
        given = data.data if isinstance(data, Examples) else data
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
        x = ev.image_of(rows.batch, self.images)
        wide = (slice(None), *[None] * (x.ndim - 1))
        noised = rows.signal[:, 0][wide] * x + rows.noise[:, 0][wide] * rows.eps[:, 0]
        out = self._call(model, noised, rows.time[:, 0], rows.batch, rows.dropped[:, 0])
        if guidance is None:
            return out
        if self.null is None:
            raise TaskError(f"guidance={guidance} for a task without null=", "what the network is given in the condition's place", "Diffusion(null=...)")
        empty = self._call(model, noised, rows.time[:, 0], rows.batch, torch.ones_like(rows.dropped[:, 0]))
        return empty + guidance * (out - empty)

    def _call(self, model: nn.Module, x: Tensor, time: Tensor, batch: Batch, left_out: Tensor) -> Tensor:
        args, kwargs = conditions_of(batch, self.images)
        if self.null is not None:
            args = [_replaced(c, self.null, left_out) for c in args]
            kwargs = {name: _replaced(c, self.null[name] if isinstance(self.null, dict) else self.null, left_out) for name, c in kwargs.items()}
        out = at_least_float32(_answer(model(x, time, *args, **kwargs)))
        if out.shape[1:] != x.shape[1:] and out.shape[1] == 2 * x.shape[1]:
            out = out[:, : x.shape[1]]  # the second half predicts the variance, and is not trained by this loss
        if out.shape != x.shape:
            raise TaskError(
                f"a network that answers with shape {tuple(out.shape)} for images of shape {tuple(x.shape)}", "equal shapes", "check the network and the images"
            )
        return out

    def _residual(self, model: nn.Module, rows: Drawn) -> tuple[Tensor, Tensor]:
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
        return self._over_events(batch, lambda rows: rows.weight[:, 0] * self._error(*self._residual(model, rows)))

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """Minus the loss, shape (n,)."""
        return -self.loss(model, batch)

    def _error(self, out: Tensor, target: Tensor) -> Tensor:
        """The mean over elements of each row's error, (rows,)."""
        r = out - target
        if self.kind == "l2":
            return r.square().mean(1)
        if self.kind == "l1":
            return r.abs().mean(1)
        size = r.abs()
        return torch.where(size <= self.delta, 0.5 * r.square(), self.delta * (size - 0.5 * self.delta)).mean(1)

    def _over_events(self, batch: Batch, value: Callable[[Drawn], Tensor]) -> Tensor:
        held = self._drawn(batch)
        return (held.share.flatten() * value(held.rows())).view(held.signal.shape).sum(1)

    def sampled(self, model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        """Pseudo-losses (n, 1) of the Gauss-Newton matrix J^T D J: ``sqrt(share w D) <out, xi>`` with xi standard normal. D is the loss's second
        derivative by the output: ``2/d`` for l2, ``1/d`` within the threshold for huber (0 beyond), and for l1, which has none, that of the
        Laplace distribution's Fisher information, ``1/d^2``."""
        held = self._drawn(batch)
        rows = held.rows()
        out, target = self._residual(model, rows)
        d = out.shape[1]
        curve = {"l2": torch.full_like(out, 2 / d), "l1": torch.full_like(out, 1 / d**2), "huber": ((out - target).abs() <= self.delta).to(out) / d}[self.kind].detach()
        xi = draws.normal(held.each, d).to(out).view(len(out), d)
        value = (rows.weight[:, 0] * rows.share[:, 0]).sqrt() * (curve.sqrt() * xi * out).sum(1)
        return value.view(held.signal.shape).sum(1, keepdim=True)

    # -- what a question may be about ------------------------------------------------------------------------------------------------

    def output(self, kind: str = "loss", *, guidance: float | None = None, events: Events | None = None) -> Output:
        """A function of the network's output to ask about, or to score by, as a mean over events:

        "loss": minus the training loss; "square_norm": mean(out^2) (D-TRAK); "mean": mean(out) (DAS); "l1_norm": mean(|out|); "elbo": minus the
        loss with each timestep weighted as in the variational bound, ``(snr_{t-1} - snr_t) / 2`` times the squared error of x (Kingma et
        al. 2021, arXiv 2107.00630), up to its constants. ``guidance``: of the guided output; the loss then compares that with the target.
        ``events``: the events to ask at, say ``task.grid((500,), draws=8)`` for the loss at one timestep; default: the task's.
        """
        if kind not in OUTPUTS:
            raise InputError(f"output {kind!r}", f"one of {OUTPUTS}", "or pass any function (model, batch) -> (n,) as measure=")
        return Output(self, kind, guidance, events)

    def _weights(self) -> Tensor:
        """w(t) for each timestep, float64 (T,)."""
        steps, snr = torch.arange(self.process.steps, dtype=torch.float64), self.process.snr
        if self.weighting is None:
            return torch.ones_like(steps)
        if callable(self.weighting):
            found = torch.as_tensor(self.weighting(steps), dtype=torch.float64)
            if found.shape != steps.shape or bool((found < 0).any()) or not bool(torch.isfinite(found).all()):
                raise TaskError(
                    f"a weighting that gives shape {tuple(found.shape)}", f"{len(steps)} finite numbers of at least 0", "weighting(timesteps) -> one weight each"
                )
            return found
        if self.weighting == "min-snr" and self.process.kind == "diffusion":
            capped = snr.clamp_max(5.0)
            ratio = torch.where(snr > 0, capped / snr.clamp_min(1e-300), 1.0)
            return {"epsilon": ratio, "v": capped / (snr + 1), "sample": capped}[self.prediction]
        raise TaskError(f"weighting={self.weighting!r}", "None, 'min-snr' (for diffusion), or a function of the timesteps", "see hw.tasks.Diffusion")

    def describe(self) -> dict[str, Any]:
        weighting = self.weighting if isinstance(self.weighting, str | None) else "function"
        events = {"timesteps": list(self.events.timesteps), "draws": self.events.draws, "noise": self.events.noise, "seed": self.events.seed}
        return {
            "kind": "Diffusion", "process": self.process.digest, "prediction": self.prediction, "loss": self.kind, "delta": self.delta,
            "weighting": weighting, "weights": hash_of(self.weights), "drop": self.drop, "events": events,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Output:
    """``(model, batch) -> (n,)``: see :meth:`Diffusion.output`."""

    task: Diffusion
    kind: str
    guidance: float | None = None
    events: Events | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task._over_events(batch, lambda rows: self._row(model, rows))

    def _row(self, model: nn.Module, rows: Drawn) -> Tensor:
        task = self.task
        out = task.predict(model, rows, self.guidance).flatten(1)
        if self.kind in ("square_norm", "mean", "l1_norm"):
            return {"square_norm": torch.square, "mean": lambda t: t, "l1_norm": torch.abs}[self.kind](out).mean(1)
        x, eps, signal, noise = task.parts(rows, out.dtype)
        if self.kind == "loss":
            return -rows.weight[:, 0] * task._error(out, task.process.target(task.prediction, x, eps, signal, noise).flatten(1))
        found = task.process.clean(task.prediction, out.view(x.shape), signal * x + noise * eps, signal, noise)
        return -rows.bound[:, 0] * (found - x).square().flatten(1).sum(1)


def conditions_of(batch: Batch, images: str) -> tuple[list[Any], dict[str, Any]]:
    """What the network is given besides x_t and t: positional, and by name."""
    if isinstance(batch, tuple | list):
        return list(batch[1:]), {}
    if hasattr(batch, "keys"):
        return [], {name: value for name, value in batch.items() if name != images}
    return [], {}


def _answer(out: Any) -> Tensor:
    """The tensor in what a network returned: itself, a field ``sample`` (as in diffusers), or the first of a tuple."""
    found = out[0] if isinstance(out, tuple | list) and out else getattr(out, "sample", out)
    if not isinstance(found, Tensor):
        raise TaskError(
            f"a network that returned a {type(out).__name__}", "a tensor, or an object with .sample", "wrap the network in a module that returns the prediction"
        )
    return found


def _replaced(condition: Any, null: Any, left_out: Tensor) -> Any:
    """A condition with the null condition in place where it is left out."""
    if not isinstance(condition, Tensor):
        return condition
    empty = torch.as_tensor(null, dtype=condition.dtype, device=condition.device).expand(condition.shape[1:])
    return torch.where(left_out.view(-1, *[1] * (condition.ndim - 1)), empty, condition)


__all__ = ["Diffusion", "Events", "Measure", "Output"]
