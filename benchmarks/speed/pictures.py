"""The networks that explanations are timed on: trained on the vendored digits, the same for every contestant, written once to a place."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import headwater as hw

NETWORKS = ("MLP ReLU", "CNN ReLU", "MLP GELU", "CNN GELU")


def built(name: str) -> nn.Sequential:
    """A network, untrained."""
    torch.manual_seed(0)
    act: type[nn.Module] = nn.ReLU if name.endswith("ReLU") else nn.GELU
    if name.startswith("MLP"):
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), act(), nn.Linear(128, 128), act(), nn.Linear(128, 10))
    head = [nn.Flatten(), nn.Linear(16 * 49, 64), act(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), act(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, padding=1), act(), nn.AvgPool2d(2), *head)


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """4,000 training digits and 1,000 others."""
    return hw.data.split(hw.data.mnist(), train=4000)


def make(place: Path, names: tuple[str, ...] = NETWORKS, epochs: int = 4) -> None:
    """Train the networks and write their weights."""
    place.mkdir(parents=True, exist_ok=True)
    (images, labels), _ = digits()
    for name in names:
        model = built(name)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        numbers = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=numbers).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        torch.save(dict(model.state_dict()), place / f"{name}.pt")


def read(place: Path, name: str) -> nn.Sequential:
    """A trained network."""
    model = built(name)
    model.load_state_dict(torch.load(place / f"{name}.pt", weights_only=True))
    return model.eval()
