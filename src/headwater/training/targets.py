"""Which layers of a model get adapters, and of what rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from headwater.capture.rules import rule_of
from headwater.errors import InputError
from headwater.training.adapters import adapters_of, is_transposed, size_of, weight_of

RANK = 8
"""Of an adapter, where nothing is said and the layer is as large."""


def adaptable(module: nn.Module) -> bool:
    """Whether a module is a Linear, a convolution or transformers' Conv1D, with a weight of its own that a low-rank one can be added to."""
    fits = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_transposed(module)
    return fits and rule_of(module) is not None and weight_of(module).is_floating_point()


def called_layers(model: nn.Module, forward: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """The layers that can be adapted, in the order in which ``forward()`` first calls them; and those that it never calls."""
    names = {module: name for name, module in model.named_modules() if adaptable(module)}
    seen: dict[str, None] = {}
    hooks = [module.register_forward_hook(lambda *_, name=name: seen.setdefault(name)) for module, name in names.items()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return list(seen), [name for name in names.values() if name not in seen]


def choose(model: nn.Module, forward: Callable[[], Any], targets: int | str | Sequence[str] | None, rank: int | None) -> tuple[dict[str, int], list[str]]:
    """The layers to adapt, in the order of the forward pass, and the rank of each; and the layers that could not be chosen, since the forward
    pass never calls them.

    Args:
        forward: runs the model on an example or two.
        targets: None: all layers that can be adapted; a number: that many last ones; names of layers, the ends of names ("attn.c_attn") or
            patterns ("blocks.*.fc?").
        rank: of every adapter; None: 8, or as much as a smaller layer has.

    Raises:
        InputError: nothing to adapt, adapters there already, a target that matches nothing, a rank larger than a layer's.
    """
    held = next(iter(adapters_of(model)), None)
    if held is not None:
        mend = "merge them into the weights before recording, or train several such models: hw.Ensemble(method, runs)"
        raise InputError(f"a model with adapters already (in {held!r})", "a model without", mend)
    called, apart = called_layers(model, forward)
    if not called:
        raise InputError(
            "a model without a layer that can be adapted",
            "a Linear, Conv1d, Conv2d, Conv3d (or transformers Conv1D) that its forward pass calls",
            "use hw.DropoutEnsemble, or hw.Ensemble of several trainings",
        )
    modules = dict(model.named_modules())
    chosen = {name: _rank(name, modules[name], rank) for name in _matching(called, apart, targets)}
    return chosen, apart


def _matching(called: list[str], apart: list[str], targets: int | str | Sequence[str] | None) -> list[str]:
    if targets is None:
        return called
    if isinstance(targets, int):
        if not 1 <= targets <= len(called):
            raise InputError(f"targets={targets}", f"how many of the last layers to adapt, 1 to {len(called)}", f"the layers are {called}")
        return called[-targets:]
    wanted = [targets] if isinstance(targets, str) else list(targets)
    matched = {target: [name for name in called if _named(name, target)] for target in wanted}
    for target, found in matched.items():
        if not found:
            outside = next((name for name in apart if _named(name, target)), None)
            why = f"; {outside!r} is never called by the forward pass: its weight is used elsewhere, where an adapter is not seen" if outside else ""
            raise InputError(
                f"targets={target!r}, which matches no layer{why}", f"names, ends of names or patterns of {called}", "mend targets=, or leave it out: all of them"
            )
    if not wanted:
        raise InputError("targets=[]", f"names, ends of names or patterns of {called}", "leave it out: all of them")
    return [name for name in called if any(name in found for found in matched.values())]


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target) or fnmatchcase(name, target)


def _rank(name: str, layer: nn.Module, rank: int | None) -> int:
    groups, outputs, inputs = size_of(layer)
    most = min(outputs, inputs)
    if rank is not None and rank > most:
        shape = f"{outputs} x {inputs}" + (f" in each of {groups} groups" if groups > 1 else "")
        raise InputError(
            f"rank={rank} for the layer {name!r}, whose weight is {shape}",
            f"a rank of at most {most}",
            f"rank={most}; leave rank= out (as much as a layer has, at most {RANK}); or leave the layer out with targets=",
        )
    return min(RANK, most) if rank is None else rank
