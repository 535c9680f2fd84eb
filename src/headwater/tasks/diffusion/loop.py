"""A training batch with its noise events, under the names that training loops know: what ``randn_like``, ``randint`` and ``add_noise`` gave them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from headwater.tasks.diffusion.events import Draw, Drawn


@dataclass(frozen=True, eq=False)
class Noisy:
    """One event an example; all on the images' device.

    ``noisy`` (n, *image): what the network is given, in the images' dtype; ``timesteps`` (n,): what it is told; ``noise`` and ``target`` (n, *image),
    at least float32: what was added, and what the network should answer with (by the task's prediction type). ``events``: for
    ``recorder.step(indices, events=...)``, where the recorder did not draw them itself. ``batch``: for ``task.loss(model, drawn.batch)``, which
    also weighs timesteps and leaves conditions out.
    """

    noisy: Tensor
    timesteps: Tensor
    noise: Tensor
    target: Tensor
    events: Draw
    batch: Drawn
