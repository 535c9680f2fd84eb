"""Exact per-example gradients of any parameter, without knowing its module: torch.func, then a plain loop.

Slower than a rule (a second forward pass, gradients formed whole), never less exact. Used for what the table does not cover: bare
parameters, attention's packed projections, parametrized weights, custom modules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from headwater.capture.blocks import CHUNK
from headwater.tasks.batches import Batch, leaves, size, take, tree_map

Function = Callable[[nn.Module, Batch], Tensor]


class Objective(nn.Module):
    """A function of (model, batch) as a module, so that functional_call can replace the model's parameters."""

    def __init__(self, model: nn.Module, function: Function) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Batch) -> Tensor:
        return self.function(self.model, batch)


def refill(batch: Batch, tensors: list[Tensor]) -> Batch:
    """The batch with its tensors replaced, in order."""
    queue = iter(tensors)
    return tree_map(lambda _: next(queue), batch)


def by_vmap(model: nn.Module, names: tuple[str, ...], function: Function, batch: Batch, column: int) -> dict[str, Tensor]:
    """Gradients {name: (n, *shape)} of ``function(model, batch)[:, column]`` by vectorised differentiation."""
    objective = Objective(model, function)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {f"model.{name}": parameters[name].detach() for name in names}

    def single(values: dict[str, Tensor], row: list[Tensor]) -> Tensor:
        out = functional_call(objective, values, (refill(batch, [t.unsqueeze(0) for t in row]),), tie_weights=True)
        return out[0, column]

    at_once = max(1, CHUNK // max(1, sum(t.numel() for t in wanted.values())))
    rows = vmap(grad(single), in_dims=(None, 0), randomness="different", chunk_size=at_once)(wanted, list(leaves(batch)))
    return {name: rows[f"model.{name}"].detach() for name in names}


def by_loop(model: nn.Module, names: tuple[str, ...], function: Function, batch: Batch, column: int) -> dict[str, Tensor]:
    """The same, one example at a time: the definition itself, and the reference for everything faster."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = [parameters[name] for name in names]
    frozen = [p for p in wanted if not p.requires_grad]
    rows: list[list[Tensor]] = []
    try:
        for p in frozen:
            p.requires_grad_(True)
        for i in range(size(batch)):
            with torch.enable_grad():
                out = function(model, take(batch, slice(i, i + 1)))[0, column]
            found = torch.autograd.grad(out, wanted, allow_unused=True) if out.requires_grad else [None] * len(wanted)
            rows.append([torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(wanted, found, strict=True)])
    finally:
        for p in frozen:
            p.requires_grad_(False)
    return {name: torch.stack([row[k] for row in rows]) for k, name in enumerate(names)}
