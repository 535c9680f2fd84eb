"""The problem all contestants are given: digits, queries, and a really trained MLP with its recorded run, made once and read from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

RATE, MOMENTUM, EPOCHS, BATCH = 0.05, 0.9, 3, 50


def mlp(widths: list[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def damping(train: int) -> float:
    """One over the sum of effective learning rates: what stopping this training amounts to, Headwater's default."""
    return (1 - MOMENTUM) / (RATE * EPOCHS * -(-train // BATCH))


@dataclass(frozen=True)
class Problem:
    """``train`` and ``queries``: images (n, 784) and labels; ``checkpoints``: step -> weights, the last the final model."""

    widths: list[int]
    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    checkpoints: dict[int, dict[str, Tensor]]

    def build(self) -> nn.Module:
        return mlp(self.widths)

    def model(self) -> nn.Module:
        model = self.build()
        model.load_state_dict(self.checkpoints[max(self.checkpoints)])
        return model.eval()


def make(place: Path, widths: list[int], train: int, queries: int, checkpoints: int = 1) -> None:
    """Train and write the problem. Beyond the 5,000 digits there are, they come again with a little noise; queries are digits
    moved by one pixel."""
    import headwater as hw

    place.mkdir(parents=True, exist_ok=True)
    images, labels = hw.data.mnist()
    draw = torch.Generator().manual_seed(0)
    which = torch.arange(train) % len(labels)
    x, y = images[which].flatten(1), labels[which]
    x[len(labels) :] += 0.05 * torch.randn(x[len(labels) :].shape, generator=draw)
    asked = torch.arange(queries) % len(labels)
    moved = images[asked].roll(1, -1).flatten(1)
    np.savez(place / "data.npz", x=x.numpy(), y=y.numpy(), qx=moved.numpy(), qy=labels[asked].numpy(), widths=np.array(widths))
    found = _trained(widths, x, y, draw, checkpoints)
    for step, state in found.items():
        save_file(state, place / f"weights-{step}.safetensors")
    hw.Run.from_checkpoints(
        place / "run",
        found,
        build=lambda: mlp(widths),
        train=(x, y),
        task=hw.tasks.Classification(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM),
        overwrite=True,
    )


def _trained(widths: list[int], x: Tensor, y: Tensor, draw: torch.Generator, checkpoints: int) -> dict[int, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = mlp(widths)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    batches = [part for _ in range(EPOCHS) for part in torch.randperm(len(y), generator=draw).split(BATCH)]
    kept = {round(len(batches) * (k + 1) / checkpoints) for k in range(checkpoints)}
    found = {}
    for step, part in enumerate(batches, start=1):
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        if step in kept:
            found[step] = {n: t.clone() for n, t in model.state_dict().items()}
    return found


def read(place: Path) -> Problem:
    with np.load(place / "data.npz") as held:
        x, y, qx, qy = (torch.from_numpy(held[k]) for k in ("x", "y", "qx", "qy"))
        widths = held["widths"].tolist()
    files = sorted(place.glob("weights-*.safetensors"), key=lambda file: int(file.stem.split("-")[1]))
    return Problem(widths, (x, y), (qx, qy), {int(file.stem.split("-")[1]): load_file(file) for file in files})
