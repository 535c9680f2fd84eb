"""A language model of GPT-2's shape with random weights, and token sequences for it: what both contestants are given."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """``batch``: sequences at once."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    sequences: int
    length: int
    queries: int
    batch: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def __str__(self) -> str:
        model = f"{self.layers} layers, width {self.width}, {self.heads} heads, vocabulary {self.vocabulary:,}"
        return f"{model}; {self.sequences} sequences x {self.length} tokens, {self.queries} queries, batches of {self.batch}"


SHAPES = {"small": Shape(12, 768, 12, 50257, 512, 512, 16, 16), "tiny": Shape(2, 32, 2, 97, 12, 16, 3, 4)}


class Block(nn.Module):
    """Attention and a multilayer perceptron, each after a LayerNorm, as in GPT-2; linear layers under GPT-2's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.c_attn(self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.c_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_c_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(shape.vocabulary, shape.width), nn.Embedding(shape.length, shape.width)
        self.h = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in attributed(self))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def attributed(model: nn.Module) -> list[str]:
    """The parameters of the blocks' linear layers."""
    return [f"{path}.{kind}" for path in layers(model) for kind in ("weight", "bias")]


def layers(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def build(shape: Shape) -> nn.Module:
    torch.manual_seed(0)
    model = GPT2(shape)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    return model.eval().to(device())


def sequences(shape: Shape) -> tuple[Tensor, Tensor]:
    """Token ids of the training sequences and of the queries."""
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randint(shape.vocabulary, (count, shape.length), generator=draw) for count in (shape.sequences, shape.queries))  # type: ignore[return-value]


def loss(model: nn.Module, ids: Tensor, amp: bool) -> Tensor:
    """Summed next-token cross-entropy of each sequence, (n,)."""
    with torch.autocast(device().type, torch.bfloat16, enabled=amp):
        logits = model(ids)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).float().sum(1)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"


def start(tiny: bool) -> Shape:
    """Called first by both contestants: the same arithmetic."""
    torch.set_float32_matmul_precision("high")
    return SHAPES["tiny" if tiny else "small"]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def costs(meter: Any) -> dict[str, Any]:
    """The meter's report, with the device's peak and the time spent writing to disk."""
    report = meter.report()
    device_peak = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0
    return {**report, "device_peak": device_peak, "disk": report["wall"].get("disk", 0.0)}
