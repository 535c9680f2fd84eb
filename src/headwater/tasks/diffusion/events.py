"""Noise events: at which timestep an example is met, and with which noise.

An event is a pair (timestep, seed of its noise): 16 bytes in place of a picture of noise. The noise of a seed is made by a counter
(:mod:`headwater.tasks.diffusion.noise`), so it is the same whatever the batch, its order or the device. Two kinds of question are asked:

- *expected* events, a :class:`Grid`: fixed timesteps, each with some draws of noise, shared by all examples or each its own;
- *recorded* events, :class:`Listed`: those that training really met.

:class:`Noised` is a dataset seen through its events: its batches are :class:`Drawn`, examples together with their events, so that a loss
is a function of the model and the batch alone, and nothing is drawn inside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError
from headwater.philox import key_of
from headwater.tasks.batches import Batch, Examples, size, to, tree_map
from headwater.tasks.diffusion.noise import dropped, noise_of, offset_by, seeds_of
from headwater.tasks.diffusion.processes import Process
from headwater.tasks.task import fields_of

SHARED, EXAMPLE = "shared", "example"
_PER_EVENT = ("signal", "noise", "time", "weight", "bound", "share", "dropped", "eps")


@dataclass(frozen=True)
class Grid:
    """Expected events: ``draws`` noises at each of ``timesteps``, equally weighted.

    Args:
        timesteps: numbers of rows in the process's tables.
        noise: "shared" by all examples (common random numbers: what two examples have in common is then not drowned in different noise),
            or each "example" its own.
        seed, salt: name the noise; the methods put the checkpoint into ``salt``, so that noise averages out over checkpoints.

    >>> own = Grid((10, 500), draws=3, noise="example")
    >>> t, seeds = own.of(np.array([7, 2]), "train")
    >>> own.count, t[0].tolist(), bool((own.of(np.array([2]), "train")[1] == seeds[1]).all())
    (6, [10.0, 10.0, 10.0, 500.0, 500.0, 500.0], True)
    """

    timesteps: tuple[int, ...]
    draws: int = 1
    noise: str = SHARED
    seed: int = 0
    salt: int = 0

    def __post_init__(self) -> None:
        if self.noise not in (SHARED, EXAMPLE):
            raise InputError(f"noise={self.noise!r}", f"{SHARED!r} or {EXAMPLE!r}", "shared noise compares examples with less noise")
        if not self.timesteps or self.draws < 1:
            raise InputError(f"{len(self.timesteps)} timesteps with {self.draws} draws", "at least one of each", "Grid(timesteps=(1, 500, 999), draws=2)")

    @property
    def count(self) -> int:
        """Events of each example."""
        return len(self.timesteps) * self.draws

    def parts(self) -> tuple[Grid, ...]:
        """One grid for each timestep. A loss over this one is their mean, if no timestep stands twice."""
        return tuple(replace(self, timesteps=(t,)) for t in self.timesteps)

    def of(self, ids: np.ndarray, namespace: str) -> tuple[Tensor, Tensor]:
        """Timesteps and seeds of the examples ``ids``, (n, k) each. With shared noise ids do not matter."""
        shared = self.noise == SHARED
        key = key_of("headwater", "event", self.seed, self.salt, SHARED if shared else namespace)
        seeds = seeds_of(key, np.zeros(1) if shared else ids, self._draws)
        times = torch.tensor([t for t, _ in self._draws], dtype=torch.float64)
        return times.expand(len(ids), -1), seeds.expand(len(ids), -1)

    @cached_property
    def _draws(self) -> list[tuple[int, int]]:
        """Timestep and number of draw of each event; a timestep that stands here twice has other draws the second time."""
        met: dict[int, int] = {}
        found = []
        for t in self.timesteps:
            first = met.get(t, 0)
            found += [(t, first + draw) for draw in range(self.draws)]
            met[t] = first + self.draws
        return found

    def checked(self, size: int) -> Grid:
        """Itself: a grid fits any data."""
        return self


@dataclass(frozen=True, eq=False)
class Listed:
    """Events that are listed: ``t`` and ``seeds``, (examples, k) each. A seed below 0 marks an event that is missing."""

    t: np.ndarray
    seeds: np.ndarray

    @cached_property
    def digest(self) -> str:
        """Names the events."""
        return hashlib.blake2b(self.t.astype("<f8").tobytes() + self.seeds.astype("<i8").tobytes(), digest_size=8).hexdigest()

    def __repr__(self) -> str:
        return f"Listed({self.t.shape[0]} x {self.t.shape[1]}, {self.digest})"

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Listed) and other.digest == self.digest

    @property
    def count(self) -> int:
        return self.t.shape[1]

    def of(self, ids: np.ndarray, namespace: str) -> tuple[Tensor, Tensor]:
        seeds = self.seeds[ids]
        if (seeds < 0).any():
            bad = int(np.asarray(ids)[(seeds < 0).any(1)][0])
            raise InputError(
                f"example {bad} without a recorded event",
                "an event of every example in the recorded window",
                "record longer (each example must be met once an epoch), or take events='expected'",
            )
        return torch.from_numpy(np.array(self.t[ids], dtype=np.float64)), torch.from_numpy(np.array(seeds, dtype=np.int64))

    def checked(self, size: int) -> Listed:
        if len(self.t) != size:
            raise InputError(f"events of {len(self.t)} examples for {size}", "events of every example", "recorded events are those of the training set")
        return self


Events = Grid | Listed


@dataclass(frozen=True, eq=False)
class Draw:
    """The events of one training batch: ``t`` and ``seeds``, (n,) each. Made by ``task.draw``; kept by ``recorder.step(ids, events=...)``."""

    t: Tensor
    seeds: Tensor


@dataclass(frozen=True, eq=False)
class Drawn:
    """Examples together with their k events each.

    ``batch``: the examples as they are. Per example and event, (n, k): ``signal`` and ``noise`` (how they are mixed), ``time`` (what the
    network is told), ``weight`` (of the loss at that timestep), ``bound`` (of the squared error of x there in the variational bound),
    ``share`` (of the event in the example's mean) and ``dropped`` (the condition left out, as in training for guidance).
    ``eps`` (n, k, *image).
    """

    batch: Any
    signal: Tensor
    noise: Tensor
    time: Tensor
    weight: Tensor
    bound: Tensor
    share: Tensor
    dropped: Tensor
    eps: Tensor

    @property
    def each(self) -> int:
        """Events of one example."""
        return self.signal.shape[1]

    def rows(self, events: slice = slice(None)) -> Drawn:
        """One row for each example and each of its ``events``, example by example: what the network sees. The shares stay, so that an example's
        value is the sum of its rows'."""
        parts = {name: getattr(self, name)[:, events] for name in _PER_EVENT}
        each = parts["signal"].shape[1]
        batch = self.batch if each == 1 else tree_map(lambda t: t.repeat_interleave(each, 0), self.batch)
        return Drawn(batch, **{name: t.flatten(0, 1).unsqueeze(1) for name, t in parts.items()})


class Noised(Examples):
    """A dataset under a noise process, seen through events: batches are :class:`Drawn`. ``weights`` (T,): of the loss at each timestep.
    ``namespace`` keeps the noise of queries apart from that of training examples, where each has its own."""

    def __init__(
        self, data: Any, collate: Any, process: Process, weights: Tensor, events: Events, images: str = "images", drop: float = 0.0, namespace: str = "train"
    ) -> None:
        super().__init__(data, collate)
        self.process, self.weights, self.events, self.images, self.drop, self.namespace = process, weights, events.checked(self.length), images, drop, namespace

    @property
    def rows_per_example(self) -> int:
        return self.events.count

    @property
    def view(self) -> str:
        return f"{self.events!r} {self.namespace}"

    def over(self, events: Any) -> Noised:
        """The same data, seen through other events."""
        return self._seen(events, self.namespace)

    def asked(self) -> Noised:
        """The same data as queries."""
        return self._seen(self.events, "query")

    def _seen(self, events: Any, namespace: str) -> Noised:
        return Noised(self.data, self.collate, self.process, self.weights, events, self.images, self.drop, namespace)

    def spread(self) -> Examples:
        """Each example with each of its events alone, noise its own: what curvature is estimated on."""
        return Spread(self.over(replace(self.events, noise=EXAMPLE) if isinstance(self.events, Grid) else self.events))

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> Batch:
        return self.seen(indices, *self.events.of(np.asarray(indices, dtype=np.int64), self.namespace))

    def seen(self, indices: Sequence[int] | np.ndarray | range, t: Tensor, seeds: Tensor) -> Drawn:
        """The examples at ``indices`` with the events ``t``, ``seeds`` (n, k). Conditions are left out in recorded events alone."""
        return drawn(self._examples(indices), t, seeds, self.process, self.weights, self.images, self.drop if isinstance(self.events, Listed) else 0.0)

    def met(self, indices: Sequence[int] | np.ndarray, t: np.ndarray, seeds: np.ndarray, device: Any) -> Drawn:
        """The examples with one event each, ``t`` and ``seeds`` (n,), as ``task.noised`` made them of a batch on ``device`` in training."""
        times, keys = (torch.from_numpy(np.array(part, dtype=kind))[:, None] for part, kind in ((t, np.float64), (seeds, np.int64)))
        return drawn(to(self._examples(indices), device), times, keys, self.process, self.weights, self.images, self.drop)

    def _examples(self, indices: Sequence[int] | np.ndarray | range) -> Batch:
        """The examples as they are. Raises InputError where their images differ in size."""
        try:
            return super().batch(indices)
        except (InputError, RuntimeError, ValueError) as error:  # as default_collate's, or the user's own, stops at them
            shapes = {tuple(getattr(_one_image(self.data[int(i)], self.images), "shape", ())) for i in indices}
            if len(shapes) < 2:
                raise
            raise InputError(
                f"images of different sizes in one dataset: {', '.join(map(str, sorted(shapes)[:3]))}",
                "images of one size: those of a batch go through the network together, and a noise event is as large as its image",
                "resize or crop them as in training, or trace each size apart, a dataset each",
            ) from error


def drawn(batch: Batch, t: Tensor, seeds: Tensor, process: Process, weights: Tensor, images: str, drop: float) -> Drawn:
    """A batch of n examples with the events ``t``, ``seeds`` (n, k). Noise and tables are at least float32, whatever the images are."""
    x = image_of(batch, images)
    n, each = t.shape
    if n != size(batch):
        raise InputError(f"events of {n} examples for a batch of {size(batch)}", "events of each example of the batch", "task.draw(batch)")
    if not ((t >= 0) & (t <= process.steps - 1)).all():
        raise InputError(f"timesteps from {float(t.min()):g} to {float(t.max()):g}", f"0 to {process.steps - 1}", "count timesteps in the scheduler's tables")
    wide = torch.promote_types(x.dtype, torch.float32)
    row = t.long()
    parts = {
        name: table[row].to(x.device, wide) for name, table in (("signal", process.signal), ("noise", process.noise), ("weight", weights), ("bound", process.bound))
    }
    time = process.time[row]
    parts["time"] = time.to(x.device, wide) if time.is_floating_point() else time.to(x.device)  # networks of diffusion may look timesteps up
    parts["share"] = torch.full((n, each), 1 / each, dtype=wide, device=x.device)
    parts["dropped"] = (dropped(seeds, drop) if drop else torch.zeros(n, each, dtype=torch.bool)).to(x.device)
    eps = noise_of(seeds, x.shape[1:], wide, x.device)
    return Drawn(batch, eps=offset_by(eps, seeds, process.offset) if process.offset else eps, **parts)


def _one_image(example: Any, images: str) -> Any:
    example = fields_of(example)
    if isinstance(example, tuple | list) and example:
        return example[0]
    return example.get(images) if hasattr(example, "keys") else example


def image_of(batch: Batch, images: str = "images") -> Tensor:
    """The images (n, ...) of a batch: the batch itself, its first item, or its field ``images``. Raises InputError."""
    batch = fields_of(batch)
    found = batch[0] if isinstance(batch, tuple | list) and batch else batch.get(images) if hasattr(batch, "keys") else batch
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        kind = f"{type(found).__name__} of {getattr(found, 'dtype', 'no dtype')}, shape {tuple(getattr(found, 'shape', ()))}"
        held = f"none of {[*map(str, batch)]}" if found is None else kind
        raise InputError(
            f"a batch whose images are {held}",
            f"numbers in the network's own range (n, ...): a tensor, the first of a tuple, or the field {images!r}",
            "scale pictures to -1..1, or name the field: Diffusion(images='pixel_values')",
        )
    return found


def draw(count: int, process: Process, generator: torch.Generator | None) -> Draw:
    """Events of ``count`` examples from the training distribution of timesteps, by torch's generator (the global one if None)."""
    device = generator.device if generator is not None else torch.device("cpu")
    if process.density is None:
        t = torch.randint(0, process.steps, (count,), generator=generator, device=device)
    else:
        t = torch.multinomial(process.density.to(device), count, replacement=True, generator=generator)
    return Draw(t.double().cpu(), torch.randint(0, 2**62, (count,), generator=generator, device=device).cpu())


class Spread(Examples):
    """A noised dataset as one example for each example and event."""

    def __init__(self, whole: Noised) -> None:
        super().__init__(whole)
        self.whole, self.each = whole, whole.events.count
        self.length *= self.each

    def batch(self, indices: Sequence[int] | np.ndarray | range) -> Batch:
        ids = np.asarray(indices, dtype=np.int64)
        t, seeds = self.whole.events.of(ids // self.each, self.whole.namespace)
        own = torch.from_numpy(ids % self.each)[:, None]
        return self.whole.seen(ids // self.each, t.gather(1, own), seeds.gather(1, own))
