"""How a denoiser is called, whatever its arguments are called, and what it must fit.

    UNet2DModel, UNet2DConditionModel, DiT, plain modules      network(x_t, t, *conditions, **conditions by name)
    SD3, PixArt, Flux: the time is a later argument            network(x_t, *conditions, timestep=t, **conditions by name)
    a network that is told no time                             network(x_t, **conditions by name)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwater.errors import TaskError
from headwater.tasks.batches import Batch
from headwater.tasks.diffusion.processes import Process
from headwater.tasks.task import at_least_float32, fields_of

Conditions = tuple[list[Any], dict[str, Any]]
"""What a network is given besides the image and the time: in order, and by name."""
_TIMES = ("timestep", "timesteps", "t", "time")
_BY_LEVEL = ("Flux", "Chroma", "QwenImage", "AuraFlow", "LongCatImage", "OvisImage")
"""Transformers of diffusers that are told the level 0..1, not 1000 times as much: their pipelines divide."""
_BACKWARDS = ("Lumina2Transformer", "ZImageTransformer")
"""Those that are told 1 - level and answer with image minus noise: their pipelines turn both around."""


def conditions_of(batch: Batch, images: str) -> Conditions:
    """The conditions in a batch: all but its images."""
    batch = fields_of(batch)
    if isinstance(batch, tuple | list):
        return list(batch[1:]), {}
    if hasattr(batch, "keys"):
        return [], {str(name): value for name, value in batch.items() if name != images}
    return [], {}


def without(condition: Any, null: Any, left_out: Tensor) -> Any:
    """A condition with ``null`` in its place where it is left out (n,). Nulls may be by name or by place, nested as the condition is; what
    has no null stays."""
    if null is None or isinstance(condition, str):
        return condition
    if isinstance(condition, Mapping):
        return {name: without(part, null.get(name) if isinstance(null, Mapping) else null, left_out) for name, part in condition.items()}
    if isinstance(condition, tuple | list):
        nulls = [*null, *[None] * (len(condition) - len(null))] if isinstance(null, tuple | list) else [null] * len(condition)
        return type(condition)(without(part, n, left_out) for part, n in zip(condition, nulls, strict=True))
    if not isinstance(condition, Tensor):
        return condition
    empty = torch.as_tensor(null, dtype=condition.dtype, device=condition.device)
    try:
        empty = empty.expand(condition.shape[1:])
    except RuntimeError as error:
        raise TaskError(
            f"null= of shape {tuple(empty.shape)} for a condition of shape {tuple(condition.shape[1:])}", "what the network is given in its place", "null=zeros, say"
        ) from error
    return torch.where(left_out.view(-1, *[1] * (condition.ndim - 1)), empty, condition)


def answer(network: nn.Module, x: Tensor, time: Tensor, conditions: Conditions, process: Process) -> Tensor:
    """What the network answers with for images x (n, ...) at ``time`` (n,), in at least float32 and the shape of x. Raises TaskError where
    network, images and process do not fit."""
    refuse_misfit(network, x, process)
    args, kwargs = _arguments(network, x, time, conditions)
    out = at_least_float32(_tensor(network(*args, **kwargs)))
    if out.ndim == x.ndim and out.shape[1:] != x.shape[1:] and out.shape[1] == 2 * x.shape[1]:
        out = out[:, : x.shape[1]]  # the second half predicts the variance, and is not trained by this loss
    if out.shape != x.shape:
        raise TaskError(f"a network that answers with shape {tuple(out.shape)} for images of shape {tuple(x.shape)}", "equal shapes", "check the network and the images")
    return out


def _arguments(network: nn.Module, x: Tensor, time: Tensor, conditions: Conditions) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The network's arguments, in order and by name."""
    given, named = conditions
    try:
        signature = inspect.signature(bare(network).forward)
    except (TypeError, ValueError):  # a scripted module: it has no names
        return (x, time, *given), named
    told = [p for p in signature.parameters.values() if p.name in _TIMES]
    places = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    anything = any(p.kind == p.VAR_POSITIONAL for p in signature.parameters.values())
    later = [p for p in told if p.kind == p.KEYWORD_ONLY or p.name in places[2:]]
    if later and not any(p.name in places[:2] for p in told):
        args, kwargs = (x, *given), {later[0].name: time, **named}
    elif len(places) < 2 and not anything:
        args, kwargs = (x,), named
    else:
        args, kwargs = (x, time, *given), named
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TaskError(
            f"a {type(bare(network)).__name__} that cannot be called with x_t, t, {len(given)} conditions in order and {sorted(named)} by name: {error}",
            f"the arguments of its forward{signature}",
            "give conditions by name: {'images': ..., 'encoder_hidden_states': ...}; what every call shares: Diffusion(fixed={...}); leave out the rest",
        ) from error
    return args, kwargs


def bare(network: nn.Module) -> nn.Module:
    """The network without what torch.compile, data parallelism and peft put around it."""
    while True:
        if isinstance(network, nn.DataParallel | nn.parallel.DistributedDataParallel):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), nn.Module):
            network = network._orig_mod  # type: ignore[assignment]
        elif type(network).__name__.startswith("Peft") and hasattr(network, "get_base_model"):
            network = network.get_base_model()  # type: ignore[operator]
        else:
            return network


def refuse_misfit(network: nn.Module, x: Tensor, process: Process) -> None:
    """Raise TaskError where the config of a network of diffusers says that it was made for other images or another scale."""
    found = bare(network)
    config, name = getattr(found, "config", None), type(found).__name__
    if config is None or not hasattr(config, "get"):
        return
    channels, steps = config.get("in_channels"), config.get("num_train_timesteps")
    if isinstance(channels, int) and x.ndim in (4, 5) and x.shape[1] != channels:
        raise TaskError(
            f"images of shape {tuple(x.shape)} for a {name} with in_channels={channels}",
            f"(n, {channels}, height, width)",
            "a latent model takes latents: hw.tasks.latents(images, vae)" if channels >= 4 else "check the images' channels",
        )
    if isinstance(steps, int) and steps != process.steps:
        raise TaskError(
            f"a scheduler of {process.steps} timesteps for a {name} with num_train_timesteps={steps}", "equal numbers", "pass the scheduler of the network's own training"
        )
    if config.get("time_embedding_type") == "fourier" and not process.time.is_floating_point():
        raise TaskError(
            f"a {name} with Fourier time embeddings, which is told noise levels, and a process that counts timesteps",
            "the variance-exploding process that it was trained with",
            "headwater.tasks.diffusion.Process('diffusion', signal=ones, noise=sigmas, time=sigmas, prediction='epsilon')",
        )
    if name.startswith(_BACKWARDS):
        raise TaskError(
            f"a {name}, which is told the time backwards and answers with x - eps",
            "a network that is told what the process says, and answers with eps - x",
            "wrap it in a module whose forward turns both around, as its pipeline does",
        )
    if name.startswith(_BY_LEVEL) and "Transformer" in name and float(process.time.max()) > 1.5:
        raise TaskError(
            f"times up to {float(process.time.max()):g} for a {name}", "levels from 0 to 1: this network multiplies by 1000 itself", "Diffusion(time=1 / 1000)"
        )


def _tensor(out: Any) -> Tensor:
    """The tensor in what a network returned: itself, a field ``sample`` (as in diffusers), or the first of a tuple."""
    found = out[0] if isinstance(out, tuple | list) and out else getattr(out, "sample", out)
    if not isinstance(found, Tensor):
        raise TaskError(
            f"a network that returned a {type(out).__name__}", "a tensor, or an object with .sample", "wrap the network in a module that returns the prediction"
        )
    return found
