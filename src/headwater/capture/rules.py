"""The table of layer rules: for each kind of module, how its input and the gradient of its output make the gradients of its
parameters. Everything that no row covers falls back to exact automatic differentiation (fallback.py).

A rule sees an input ``x`` and an output gradient ``g`` whose first axis counts examples, and returns the pieces of the weight and
of the bias. Worked shapes, with n examples:

    Linear       x (n, ..., in), g (n, ..., out)    -> Outer a (n, 1, positions, in), g (n, 1, positions, out)
    Conv2d       x (n, c, h, w), g (n, o, h', w')   -> Outer a (n, groups, h'w', c/groups*k*k), g (n, groups, h'w', o/groups)
    Embedding    x (n, ...) ids, g (n, ..., width)  -> Lookup index (n, positions), a (n, positions, width)
    LayerNorm    x, g (n, ..., width)               -> Rows (n, width): sum over positions of normalised x times g
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from headwater.capture.blocks import Late, Lookup, Outer, Piece, Rows
from headwater.errors import BatchCoupling, GradientError

Emit = Callable[[Any, Any, Tensor], dict[str, Piece]]


@dataclass(frozen=True)
class Rule:
    """``emit(module, x, g)``: the pieces of "weight" and "bias". ``prepare(module, x, ones)``: what emit takes for x, where it is worth
    making once for all columns of a function; ``ones``: with a last input that is always 1, for a folded bias. ``groups``: the weight's
    groups where it is a matrix, None where it is not. ``transpose``: the stored weight is (in, out). ``fold``: the bias may become one
    more input column. ``given``: see :class:`~headwater.capture.blocks.Block`, as is ``indexed``."""

    emit: Emit
    prepare: Callable[[Any, Tensor, bool], Any] | None = None
    groups: Callable[[Any], int] | None = None
    transpose: bool = False
    fold: bool = True
    given: str = "right"
    indexed: bool = False


def _positions(t: Tensor) -> Tensor:
    """(n, ..., features) -> (n, 1, positions, features)."""
    return t.reshape(len(t), 1, -1, t.shape[-1])


def _linear(module: nn.Module, x: Tensor, g: Tensor) -> dict[str, Piece]:
    g = _positions(g)
    return {"weight": Outer(_positions(x), g), "bias": Rows(g.sum((1, 2)))}


def _padding(module: Any) -> list[int]:
    """The padding of a convolution as F.pad wants it: last axis first, two sides each."""
    if module.padding == "valid":
        return [0, 0] * len(module.kernel_size)
    if module.padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    return [p for p in reversed(module.padding) for _ in range(2)]


def unfold(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int, ones: bool = False) -> Tensor:
    """Patches of an already padded ``x (n, channels, *space)`` as (n, groups, positions, channels/groups * kernel size [+ 1]).

    In memory positions come last, after the examples: so patches are copied in long runs, their second moment is one matrix
    product without another copy, and an example's patches are a matrix as they lie.
    """
    dims, n = len(kernel), len(x)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    # now (n, channels, *positions, *kernel)
    x = x.unflatten(1, (groups, -1))
    x = x.permute(1, 2, *range(3 + dims, 3 + 2 * dims), 0, *range(3, 3 + dims))
    inner, positions = x.shape[1 : 2 + dims].numel(), x.shape[3 + dims :].numel()
    out = x.new_empty(groups, inner + ones, n, positions)
    out[:, :inner].view(x.shape).copy_(x)
    out[:, inner:] = 1
    return out.permute(2, 0, 3, 1)


def _by_group(t: Tensor, groups: int) -> Tensor:
    """(n, channels, *space) -> (n, groups, positions, channels/groups)."""
    return t.reshape(len(t), groups, t.shape[1] // groups, -1).transpose(2, 3)


@dataclass
class Patches:
    """The patches of a convolution's input, made when they are asked for; ``ones``: with a last input that is always 1. ``kept``: all of them,
    once they are to be."""

    module: Any
    x: Tensor
    ones: bool
    kept: Tensor | None = None

    def keep(self) -> None:
        """Make them now, and once."""
        self.kept = self(slice(None))

    @property
    def inner(self) -> int:
        return int(self.module.weight[0].numel()) + self.ones

    def __call__(self, rows: slice) -> Tensor:
        """(n, groups, positions, inner) of the examples in ``rows``."""
        if self.kept is not None:
            return self.kept[rows]
        module, x = self.module, self.x[rows]
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, _padding(module), mode=mode) if any(_padding(module)) else x
        return unfold(x, module.kernel_size, module.stride, module.dilation, module.groups, self.ones)


def _convolution(module: Any, patches: Patches, g: Tensor) -> dict[str, Piece]:
    return {"weight": Late(patches, _by_group(g, module.groups), patches.inner), "bias": Rows(g.flatten(2).sum(2))}


def _transposed(module: Any, x: Tensor, g: Tensor) -> dict[str, Piece]:
    """A transposed convolution is the gradient of a convolution: input and output change roles, so the patches are those of g."""
    padded = F.pad(g, [p for p in reversed(module.padding) for _ in range(2)])
    reach = zip(x.shape[2:], module.stride, module.dilation, module.kernel_size, strict=True)
    needed = (slice(0, (n - 1) * s + d * (k - 1) + 1) for n, s, d, k in reach)  # beyond it lies output padding no input reached
    patches = unfold(padded[(slice(None), slice(None), *needed)], module.kernel_size, module.stride, module.dilation, module.groups)
    return {"weight": Outer(patches, _by_group(x, module.groups)), "bias": Rows(g.flatten(2).sum(2))}


def _embedding(module: nn.Embedding, x: Tensor, g: Tensor) -> dict[str, Piece]:
    g = g.reshape(len(x), -1, g.shape[-1])
    index = x.reshape(len(x), -1)
    if module.padding_idx is not None:
        g = g * (index != module.padding_idx).unsqueeze(-1)
    return {"weight": Lookup(index, g, module.num_embeddings)}


def _scale_and_shift(module: Any, normalised: Tensor, g: Tensor, axes: list[int]) -> dict[str, Piece]:
    """Gradients of an elementwise scale and shift: summed over every axis but the example's and the parameter's."""
    shape = (len(g), *module.weight.shape)
    scale, shift = normalised * g, g
    if axes:
        scale, shift = scale.sum(axes), shift.sum(axes)
    return {"weight": Rows(scale.reshape(shape)), "bias": Rows(shift.reshape(shape))}


def _layer_norm(module: nn.LayerNorm, x: Tensor, g: Tensor) -> dict[str, Piece]:
    normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    return _scale_and_shift(module, normalised, g, list(range(1, g.ndim - len(module.normalized_shape))))


def _rms_norm(module: nn.RMSNorm, x: Tensor, g: Tensor) -> dict[str, Piece]:
    normalised = F.rms_norm(x, module.normalized_shape, eps=module.eps)
    return _scale_and_shift(module, normalised, g, list(range(1, g.ndim - len(module.normalized_shape))))


def _rms_norm_of_a_library(module: Any, x: Tensor, g: Tensor) -> dict[str, Piece]:
    normalised = x * (x.square().mean(-1, keepdim=True) + (_epsilon(module) or 0.0)).rsqrt()
    return _scale_and_shift(module, normalised, g, list(range(1, g.ndim - 1)))


def _epsilon(module: Any) -> float | None:
    found = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return found if isinstance(found, float) else None


def _group_norm(module: nn.GroupNorm, x: Tensor, g: Tensor) -> dict[str, Piece]:
    return _scale_and_shift(module, F.group_norm(x, module.num_groups, eps=module.eps), g, list(range(2, g.ndim)))


def _instance_norm(module: Any, x: Tensor, g: Tensor) -> dict[str, Piece]:
    running = module.track_running_stats and not module.training
    mean, var = (module.running_mean.to(x), module.running_var.to(x)) if running else (None, None)
    return _scale_and_shift(module, F.instance_norm(x, mean, var, use_input_stats=not running, eps=module.eps), g, list(range(2, g.ndim)))


def _batch_norm(module: Any, x: Tensor, g: Tensor) -> dict[str, Piece]:
    normalised = F.batch_norm(x, module.running_mean.to(x), module.running_var.to(x), eps=module.eps)
    return _scale_and_shift(module, normalised, g, list(range(2, g.ndim)))


_CONVOLUTION = Rule(_convolution, Patches, groups=lambda m: m.groups)
_TRANSPOSED = Rule(_transposed, groups=lambda m: m.groups, fold=False, given="left")
_BATCH_NORM = Rule(_batch_norm)
_INSTANCE_NORM = Rule(_instance_norm)

RULES: dict[type, Rule] = {
    nn.Linear: Rule(_linear, groups=lambda m: 1),
    nn.Conv1d: _CONVOLUTION,
    nn.Conv2d: _CONVOLUTION,
    nn.Conv3d: _CONVOLUTION,
    nn.ConvTranspose1d: _TRANSPOSED,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.ConvTranspose3d: _TRANSPOSED,
    nn.Embedding: Rule(_embedding, groups=lambda m: 1, given="left", indexed=True),
    nn.LayerNorm: Rule(_layer_norm),
    nn.RMSNorm: Rule(_rms_norm),
    nn.GroupNorm: Rule(_group_norm),
    nn.InstanceNorm1d: _INSTANCE_NORM,
    nn.InstanceNorm2d: _INSTANCE_NORM,
    nn.InstanceNorm3d: _INSTANCE_NORM,
    nn.BatchNorm1d: _BATCH_NORM,
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm3d: _BATCH_NORM,
}
_TRANSFORMERS_CONV1D = Rule(_linear, groups=lambda m: 1, transpose=True)
_RMS_NORM_OF_A_LIBRARY = Rule(_rms_norm_of_a_library)
_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.SyncBatchNorm)


def rule_of(module: nn.Module) -> Rule | None:
    """The row for a module: by its class, or by a base class whose forward it inherits unchanged; None where no row fits.

    A subclass with a forward of its own, a weight that is computed (parametrizations), an embedding that renormalises or weighs
    by frequency: none of them is what the row describes, so they go to the exact fallback.
    """
    if "weight" not in module._parameters or module._parameters["weight"] is None:
        return None
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return None
    for kind, rule in RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:  # type: ignore[attr-defined]
            return rule
    name, library = type(module).__name__, type(module).__module__
    if name.endswith("RMSNorm") and library.split(".")[0] in ("diffusers", "transformers"):  # each model has its own; the proof finds what is none
        return _RMS_NORM_OF_A_LIBRARY if module._parameters["weight"].ndim == 1 and _epsilon(module) is not None else None
    return _TRANSFORMERS_CONV1D if name == "Conv1D" and library == "transformers.pytorch_utils" else None


def refuse_training_mode(model: nn.Module) -> None:
    """Raise GradientError where a module draws at random, or changes its buffers, at every call."""
    for name, module in model.named_modules():
        changes = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        rate = module.p if isinstance(module, nn.modules.dropout._DropoutNd) else getattr(module, "dropout_prob", 0)  # of labels, in diffusers' DiT
        if module.training and (changes or (isinstance(rate, float) and rate > 0)):
            raise GradientError(
                f"{type(module).__name__} {name!r} is in training mode: it {'updates its running statistics' if changes else 'drops at random'} at every call",
                "a model whose loss is the same at every call",
                "call model.eval()",
            )


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise BatchCoupling where a module normalises by the statistics of the batch: its examples have no gradient of their own."""
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_STATISTICS) and (module.training or module.running_mean is None):
            how = "is in training mode" if module.running_mean is not None else "keeps no running statistics (track_running_stats=False)"
            raise BatchCoupling(
                f"{type(module).__name__} {name!r} {how}: it mixes the examples of a batch",
                "BatchNorm in eval mode with running statistics",
                "call model.eval(); without running statistics replace it by GroupNorm, or record running statistics in training",
            )
