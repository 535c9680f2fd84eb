"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv 2106.09685) on the layers of a frozen model.

A layer with weight W computes ``W x + scale B A x`` instead: ``A`` (rank, in) is drawn at random, ``B`` (out, rank) begins at zero, so that the
adapted model begins as the model itself. Both are plain Linear or convolution modules, whose gradients example by example are exact:
with the gradient ``G`` (out, in) of the whole weight, ``dA = scale B^T G`` and ``dB = scale G A^T``.

The layer stays what it was and where it was: its adapter is a child ``NAME.lora`` with the parts ``down`` (A) and ``up`` (B), added to its output by
a forward hook. A transformers model can be given peft's layers instead (:func:`insert_peft`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from headwater.capture.rules import rule_of
from headwater.errors import GradientError, InputError, MissingExtra
from headwater.philox import key_of, normals

CHILD = "lora"
"""The name of an adapter in the layer that it belongs to."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Adapter(nn.Module):
    """``x -> scale * up(down(x))``, made to fit a layer: the same kernel, stride, padding and dilation; in the layer's dtype, on its device.

    A grouped convolution has an adapter of ``rank`` in each of its groups, since its weight is as many separate matrices.
    """

    def __init__(self, layer: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        if isinstance(layer, CONVOLUTIONS):
            kind: type[nn.Module] = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))  # torch's own: a subclass may take other arguments
            shape = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "padding_mode": layer.padding_mode}
            groups, inner = layer.groups, rank * layer.groups
            self.down = _part(kind, layer, layer.in_channels, inner, layer.kernel_size, groups=groups, **shape)
            self.up = _part(kind, layer, inner, layer.out_channels, 1, groups=groups)
        else:
            _, outputs, inputs = size_of(layer)
            self.down, self.up = _part(nn.Linear, layer, inputs, rank), _part(nn.Linear, layer, rank, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.down(x))


def _part(kind: type[nn.Module], layer: nn.Module, *sizes: Any, **settings: Any) -> nn.Module:
    """A module without bias and with a weight of zeros, made without drawing from the global generators."""
    weight = weight_of(layer)
    part = skip_init(kind, *sizes, bias=False, dtype=weight.dtype, device=weight.device, **settings)
    nn.init.zeros_(weight_of(part))
    return part


def weight_of(module: Any) -> Tensor:
    return module.weight


def size_of(layer: nn.Module) -> tuple[int, int, int]:
    """A layer's weight as matrices: (groups, outputs of each, inputs of each)."""
    weight = weight_of(layer)
    if isinstance(layer, CONVOLUTIONS):
        return layer.groups, layer.out_channels // layer.groups, weight[0].numel()
    outputs, inputs = reversed(weight.shape) if is_transposed(layer) else weight.shape
    return 1, outputs, inputs


def is_transposed(layer: nn.Module) -> bool:
    """Whether the stored weight is (in, out): transformers' Conv1D."""
    rule = rule_of(layer)
    return rule is not None and rule.transpose


# ------------------------------------------------------------------------------------------------------------------- insertion


def insert(model: nn.Module, ranks: Mapping[str, int], alpha: float | None = None) -> nn.Module:
    """Give layers of ``model`` an adapter each (in place; the model); ``scale = alpha / rank``, without ``alpha`` 1. Their weights are zero:
    see :func:`draw`."""
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        layer.add_module(CHILD, Adapter(layer, rank, 1.0 if alpha is None else alpha / rank))
        layer.register_forward_hook(_add, with_kwargs=True)
    return model


def _add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    adapter: nn.Module = getattr(layer, CHILD)
    return output + adapter(x)


def insert_peft(model: nn.Module, ranks: Mapping[str, int], alpha: float | None = None) -> nn.Module:
    """The same through ``peft`` (in place; the model): the layers become peft's, without dropout. Raises MissingExtra."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtra("adapters of a transformers model without the library peft", "peft", "pip install headwater[hf], or say through='hooks'") from error
    odd = next((name for name in ranks if isinstance(model.get_submodule(name), CONVOLUTIONS)), None)
    if odd is not None:
        raise InputError(f"the convolution {odd!r} through peft", "Linear layers (and transformers Conv1D)", "say through='hooks'")
    one_of = "|".join(map(re.escape, ranks))
    config = LoraConfig(
        target_modules=f"({one_of})",
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{re.escape(name)}": rank if alpha is None else alpha for name, rank in ranks.items()},
        lora_dropout=0.0,
        bias="none",
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # it is set right, layer by layer
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # an adapter is the head's alone, and is never saved as one
        return inject_adapter_in_model(config, model)


@dataclass(frozen=True)
class Pair:
    """An adapter as it stands in a model, of whichever make: A ``down``, B ``up``, ``scale``."""

    down: Tensor
    up: Tensor
    scale: float


def adapters_of(model: nn.Module) -> dict[str, Pair]:
    """The adapters in a model, our own and peft's, by the name of their layer."""
    found: dict[str, Pair] = {}
    for name, module in model.named_modules():
        child = getattr(module, CHILD, None)
        if isinstance(child, Adapter):
            found[name] = Pair(weight_of(child.down), weight_of(child.up), child.scale)
        elif isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "scaling"):
            layer: Any = module
            for key in layer.active_adapters:
                if key in layer.lora_A:
                    found[name] = Pair(layer.lora_A[key].weight, layer.lora_B[key].weight, float(layer.scaling[key]))
    return found


def draw(model: nn.Module, seed: int) -> nn.Module:
    """Fill the adapters' ``down`` weights from N(0, 1 / inputs), so that what they give is as large as what they are given, and ``up`` with
    zeros (in place; the model). Numbers are keyed by ``seed`` and the layer's name: adapting other layers too does not change them."""
    with torch.no_grad():
        for name, pair in adapters_of(model).items():
            rows, inputs = len(pair.down), pair.down[0].numel()
            drawn = normals(key_of("adapter", seed, name), range(rows), range(inputs), dtype=torch.float64)
            pair.down.copy_(drawn.reshape(pair.down.shape) / math.sqrt(inputs))
            pair.up.zero_()
    return model


# ------------------------------------------------------------------------------------------- freezing, keeping, merging, checking


def freeze(model: nn.Module) -> tuple[str, ...]:
    """Let nothing be trained but the adapters; the names of their parameters."""
    ours = {id(t) for pair in adapters_of(model).values() for t in (pair.down, pair.up)}
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in ours)
        if id(parameter) in ours:
            names.append(name)
    return tuple(names)


def keep(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Let ``model.state_dict()`` speak of these tensors alone (in place; the model): a checkpoint of adapters is as small as they are."""
    model.register_state_dict_post_hook(_Only(frozenset(names)))
    return model


@dataclass(eq=False)
class _Only:
    """Takes everything but ``names`` out of a state dict (not frozen: torch marks its hooks)."""

    names: frozenset[str]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for key in [key for key in state if key.startswith(prefix) and key.removeprefix(prefix) not in self.names]:
            del state[key]


def delta(layer: nn.Module, pair: Pair) -> Tensor:
    """What an adapter adds to its layer's weight, in that weight's shape: ``scale B A``, group by group for a grouped convolution."""
    groups, outputs, inputs = size_of(layer)
    up, down = pair.up.reshape(groups, outputs, -1), pair.down.reshape(groups, -1, inputs)
    product = pair.scale * (up @ down).reshape(groups * outputs, inputs)
    return product.mT if is_transposed(layer) else product.reshape(weight_of(layer).shape)


def merge(model: nn.Module) -> nn.Module:
    """Add our own adapters to their layers' weights and take them out (in place; the model). Raises InputError where a weight is tied to
    another module, which would be changed with it."""
    for name in adapters_of(model):
        layer = model.get_submodule(name)
        others = [n for n, m in model.named_modules() if m is not layer and any(p is weight_of(layer) for p in m.parameters(recurse=False))]
        if others:
            raise InputError(f"an adapter of {name!r}, whose weight is also that of {others[0]!r}", "a weight of its own", "untie them, or leave the adapter unmerged")
        with torch.no_grad():
            weight_of(layer).add_(delta(layer, adapters_of(layer)[""]))
        delattr(layer, CHILD)
        for key in [key for key, hook in layer._forward_hooks.items() if hook is _add]:
            del layer._forward_hooks[key], layer._forward_hooks_with_kwargs[key]
    return model


def moved(model: nn.Module) -> dict[str, float]:
    """How far each adapter moves its layer: the norm of ``scale B A`` relative to the weight's."""
    out = {}
    with torch.no_grad():
        for name, pair in adapters_of(model).items():
            layer: Any = model.get_submodule(name)
            layer = getattr(layer, "base_layer", layer)
            out[name] = float(delta(layer, pair).norm() / weight_of(layer).norm().clamp_min(torch.finfo(torch.float32).tiny))
    return out


def refuse_untrained(model: nn.Module, where: str) -> None:
    """Raise GradientError where a model has adapters and none was ever trained: with ``B = 0`` the gradients of A are zero, and those of B say
    where training would begin, not what it did."""
    pairs = adapters_of(model)
    if pairs and not any(bool(pair.up.any()) for pair in pairs.values()):
        raise GradientError(
            f"{len(pairs)} adapters that were never trained, {where}: B = 0 in all of them, the first in {next(iter(pairs))!r}",
            "adapters that training moved",
            "train them first; if that was done, look for a learning rate of 0, for layers that the loss does not depend on, and for the right checkpoint",
        )


def transplant(source: nn.Module, model: nn.Module) -> nn.Module:
    """Copy the adapters of ``source`` (of either make) into those of ``model``, layer by layer (in place; the model)."""
    held = adapters_of(source)
    with torch.no_grad():
        for name, pair in adapters_of(model).items():
            pair.down.copy_(held[name].down)
            pair.up.copy_(held[name].up)
    return model
