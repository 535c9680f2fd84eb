"""Per-example gradients against autograd, for each kind of layer that has a rule and for parameters that have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from headwater.capture import Capture
from headwater.errors import GradientMismatch
from headwater.tasks.batches import Batch

EXAMPLES = 3


@dataclass(frozen=True)
class Case:
    """A layer and the shape of one example (of token ids below ``tokens`` where that is given). ``ruled``: a rule covers its parameters."""

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int | None = None
    ruled: bool = True


class Scaled(nn.Module):
    """A parameter that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale)


class Twice(nn.Module):
    """A layer that is used two times in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)))


CASES: dict[str, Case] = {
    "Linear": Case(lambda: nn.Linear(4, 3), (4,)),
    "Linear on sequences": Case(lambda: nn.Linear(4, 3), (5, 4)),
    "Conv1d": Case(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7)),
    "Conv2d": Case(lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2, padding_mode="circular"), (2, 6, 6)),
    "Conv3d": Case(lambda: nn.Conv3d(1, 2, 2, stride=2), (1, 4, 4, 4)),
    "ConvTranspose1d": Case(lambda: nn.ConvTranspose1d(4, 2, 3, stride=2), (4, 5)),
    "ConvTranspose2d": Case(lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2), (2, 4, 4)),
    "ConvTranspose3d": Case(lambda: nn.ConvTranspose3d(1, 2, 2), (1, 3, 3, 3)),
    "Embedding": Case(lambda: nn.Embedding(7, 4, padding_idx=0), (5,), tokens=7),
    "LayerNorm": Case(lambda: nn.LayerNorm(4), (5, 4)),
    "RMSNorm": Case(lambda: nn.RMSNorm(4), (5, 4)),
    "GroupNorm": Case(lambda: nn.GroupNorm(2, 4), (4, 5)),
    "InstanceNorm1d": Case(lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "InstanceNorm2d": Case(lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    "InstanceNorm3d": Case(lambda: nn.InstanceNorm3d(4, affine=True), (4, 2, 2, 2)),
    "BatchNorm1d in eval mode": Case(lambda: nn.BatchNorm1d(4), (4,)),
    "BatchNorm2d in eval mode": Case(lambda: nn.BatchNorm2d(4), (4, 3, 3)),
    "BatchNorm3d in eval mode": Case(lambda: nn.BatchNorm3d(4), (4, 2, 2, 2)),
    "a layer used twice": Case(Twice, (4,)),
    "tied weights": Case(Tied, (5,), tokens=7),
    "a parameter without a rule": Case(Scaled, (4,), ruled=False),
}


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """A curved function of everything the layer puts out."""
    out = model(batch[0]).flatten(1)
    return (torch.tanh(out) * torch.linspace(-1, 1, out.shape[1], dtype=out.dtype)).sum(1).square()


def largest_difference(case: Case) -> float:
    """The largest relative difference of any example's gradient of any parameter, in float64."""
    model = case.layer().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    size = (EXAMPLES, *case.shape)
    batch = (torch.randint(case.tokens, size) if case.tokens else torch.randn(size, dtype=torch.float64),)
    capture = Capture(model, loss, batch)
    left = [f"{name}: {how}" for name, how in capture.coverage.items() if how.startswith("exact fallback")]
    if left and case.ruled:  # a rule that fails its own check is replaced by the fallback, which is right and would hide it
        raise GradientMismatch(f"a rule that was not used ({left[0]})", "a rule that reproduces autograd", "report this with your version of torch")
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    found = capture.gradients(loss, batch)
    ours = {n: t for name, block in capture.blocks.items() for n, t in block.unpack(found[name].dense(), shapes).items()}
    truth = _by_autograd(model, batch)
    return max(float((ours[name] - truth[name]).abs().max() / truth[name].abs().max().clamp_min(1e-30)) for name in truth)


def _by_autograd(model: nn.Module, batch: tuple[Tensor]) -> dict[str, Tensor]:
    """Each example alone through plain autograd: {parameter: (examples, *shape)}."""
    named = dict(model.named_parameters())
    rows = [torch.autograd.grad(loss(model, (batch[0][i : i + 1],)).sum(), list(named.values())) for i in range(EXAMPLES)]
    return {name: torch.stack(column) for name, column in zip(named, zip(*rows, strict=True), strict=True)}


CHECKS: dict[str, Callable[[], float]] = {name: partial(largest_difference, case) for name, case in CASES.items()}
