"""Latents and prompt embeddings: a dataset is encoded once, before training and tracing, and kept on disk.

What a latent model is traced by must be what it saw: the same latents in every pass. So the autoencoder's posterior is not drawn from anew
each time, but its mean is taken, or one draw that belongs to the example.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from headwater.errors import InputError, TaskError
from headwater.philox import key_of
from headwater.store import Store, content_hash
from headwater.tasks.batches import Batch, Examples, fingerprint, hash_of
from headwater.tasks.diffusion.events import image_of
from headwater.tasks.diffusion.noise import noise_of, seeds_of
from headwater.tasks.task import at_least_float32

CHUNK = 256
"""Examples of one entry on the disk: what a killed call has to repeat at most."""


def latents(
    data: Any,
    vae: nn.Module,
    *,
    draw: int | None = None,
    path: str | Path | None = None,
    images: str = "images",
    collate: Callable[[list[Any]], Batch] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Tensor:
    """The latents that a latent diffusion model is trained on, (n, channels, h, w): ``(z - shift_factor) * scaling_factor`` of the autoencoder's
    config (or ``(z - latents_mean) * scaling_factor / latents_std`` where it has those), in at least float32, on the CPU.

    Args:
        data: images (n, 3, H, W) in -1..1: a tensor, a dataset, or tuples and mappings with images in them, as a batch of the task.
            For flipped twins encode the flipped images as well: ``latents(x.flip(-1), vae)``.
        vae: an AutoencoderKL of diffusers, or any module whose ``encode(images)`` gives ``latent_dist`` (or ``latents``, ``latent``).
        draw: None for z the posterior's mean; a seed for ``mean + std * noise``, with noise keyed by (seed, example).
        path: a folder to keep them in, by the content of data and weights (beyond 20,000 examples of a dataset, by an even sample): a second call
            reads them, a killed one goes on. None keeps nothing.

    Raises InputError for images that do not fit, and with ``path`` for data that are read differently each time (random augmentation).

    >>> import torch
    >>> from types import SimpleNamespace
    >>> class Halves(torch.nn.Module):
    ...     config = {"scaling_factor": 0.5}
    ...     def encode(self, x):
    ...         return SimpleNamespace(latents=x[..., ::2, ::2])
    >>> latents(torch.ones(3, 1, 4, 4), Halves(), progress=False).shape
    torch.Size([3, 1, 2, 2])
    """
    if not hasattr(vae, "encode"):
        raise InputError(f"a {type(vae).__name__} without encode", "an autoencoder: AutoencoderKL of diffusers, say", "latents(images, pipe.vae)")
    examples, config = Examples(data, collate), getattr(vae, "config", {})

    def encode(ids: range) -> dict[str, Tensor]:
        x = image_of(examples.batch(ids), images)
        channels = config.get("in_channels")
        if channels is not None and (x.ndim != 4 or x.shape[1] != channels):
            given = f"images of shape {tuple(x.shape)} for a {type(vae).__name__} with in_channels={channels}"
            raise InputError(given, f"(n, {channels}, height, width)", "check the images")
        return {"z": _scaled(_posterior(vae, x, ids, draw), config)}

    key = None
    if path is not None:
        settings = {name: value for name, value in dict(config).items() if not name.startswith("_")}
        key = content_hash("latents", _content(examples), hash_of(vae.state_dict()), settings, draw)
    with _quiet([vae]):
        return _encoded(encode, len(examples), key, path, batch_size, progress, "latents")["z"]


def embeddings(
    prompts: Sequence[str],
    encode: Callable[[list[str]], Any],
    *,
    models: Sequence[nn.Module] = (),
    path: str | Path | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Any:
    """What a network is told of prompts, encoded once for each that differs: as ``encode`` gives it, a tensor (n, ...) or a mapping of tensors, on
    the CPU. Put it beside the latents: ``{"images": latents, "encoder_hidden_states": embeddings}``.

    Args:
        prompts: n texts.
        encode: a list of texts to a tensor (texts, ...), or a mapping of them (embeddings, pooled embeddings, masks), as long for each text:
            ``lambda texts: pipe.encode_prompt(texts, device, 1, False)[0]``.
        models: the text encoders, which then have no part in gradients; with ``path`` they name what is kept.
        path: a folder to keep them in, by the content of prompts and models' weights: a second call reads them, a killed one goes on.

    >>> found = embeddings(["a cat", "a dog", "a cat"], lambda texts: torch.tensor([[float(len(t))] for t in texts]), progress=False)
    >>> found.shape
    torch.Size([3, 1])
    """
    texts = list(prompts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{len(texts)} prompts of types {sorted({type(text).__name__ for text in texts})}", "texts, at least one", "embeddings(['a cat', ...], encode)")
    if path is not None and not models:
        raise InputError("embeddings to be kept at a path, by no model's weights", "the text encoders", "embeddings(..., models=[pipe.text_encoder])")
    different = sorted(set(texts))
    alone = False

    def encode_some(ids: range) -> dict[str, Tensor]:
        nonlocal alone
        found = encode([different[i] for i in ids])
        alone = isinstance(found, Tensor)
        named = {"": found} if alone else dict(found) if isinstance(found, Mapping) else {}
        if not named or any(not isinstance(t, Tensor) or t.ndim < 1 or len(t) != len(ids) for t in named.values()):
            what = {name: tuple(getattr(t, "shape", ())) for name, t in named.items()} or type(found).__name__
            expected = "a tensor or a mapping of tensors, a row a text"
            raise TaskError(f"an encode function that gave {what} for {len(ids)} texts", expected, "pad to one length, and pick a tuple's parts")
        return {f"e.{name}": t for name, t in named.items()}

    key = None if path is None else content_hash("embeddings", different, [hash_of(model.state_dict()) for model in models])
    with _quiet(models):
        kept = _encoded(encode_some, len(different), key, path, batch_size, progress, "embeddings")
    place = {text: i for i, text in enumerate(different)}
    rows = torch.tensor([place[text] for text in texts])
    found = {name.removeprefix("e."): t[rows] for name, t in kept.items()}
    return found[""] if [*found] == [""] else found


def _posterior(vae: Any, x: Tensor, ids: range, draw: int | None) -> Tensor:
    """z of images: the posterior's mean, or each example's own draw from it."""
    weight = next(iter(vae.parameters()), None)
    out = vae.encode(x if weight is None else x.to(weight.device, weight.dtype))
    posterior = getattr(out, "latent_dist", None)
    if posterior is None:
        z = getattr(out, "latents", getattr(out, "latent", None))
        if z is None or draw is not None:
            given = f"a {type(vae).__name__} whose encode gives {'no posterior to draw from' if z is not None else 'neither latent_dist nor latents'}"
            raise InputError(given, "an autoencoder with a posterior: AutoencoderKL", "leave draw= out, or pass another vae")
        return at_least_float32(z)
    mean = at_least_float32(posterior.mean)
    if draw is None:
        return mean
    seeds = seeds_of(key_of("headwater", "latent", draw), np.asarray(ids), [(0, 0)])
    return mean + at_least_float32(posterior.std) * noise_of(seeds, mean.shape[1:], mean.dtype, mean.device)[:, 0]


def _scaled(z: Tensor, config: Mapping[str, Any]) -> Tensor:
    """z in the diffusion model's own range."""
    scale = config.get("scaling_factor") or 1.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.as_tensor(part, dtype=z.dtype, device=z.device).view(1, -1, *[1] * (z.ndim - 2)) for part in (mean, std))
        return (z - mean) * scale / std
    return (z - (config.get("shift_factor") or 0.0)) * scale


def _content(examples: Examples) -> str:
    found = fingerprint(examples)
    if found.startswith("unstable"):
        raise InputError("data that are read differently each time", "the same images at each read, so that they can be kept", "encode them without random augmentation")
    return found


def _encoded(
    encode: Callable[[range], dict[str, Tensor]], count: int, key: str | None, path: str | Path | None, batch_size: int, progress: bool, what: str
) -> dict[str, Tensor]:
    """What ``encode`` gives for examples 0..count-1, read from the disk where it was kept."""
    if batch_size < 1 or count < 1:
        raise InputError(f"{count} examples with batch_size={batch_size}", "at least one of each", "batch_size=16")
    store = Store(path) if path is not None else None
    chunks: list[dict[str, Tensor]] = []
    with tqdm(total=count, desc=what, unit=" examples", file=sys.stderr, disable=not progress, leave=False) as bar, torch.no_grad():
        for start in range(0, count, CHUNK):
            ids, name = range(start, min(count, start + CHUNK)), f"{what}/{key}/{start // CHUNK:06d}"
            if store is not None and store.has(name):
                chunks.append(store.read(name))
            else:
                chunks.append(_joined([{k: t.cpu() for k, t in encode(ids[i : i + batch_size]).items()} for i in range(0, len(ids), batch_size)], what))
                if store is not None:
                    store.write(name, chunks[-1])
            bar.update(len(ids))
    return _joined(chunks, what)


def _joined(parts: list[dict[str, Tensor]], what: str) -> dict[str, Tensor]:
    shapes = {tuple((name, tuple(t.shape[1:])) for name, t in sorted(part.items())) for part in parts}
    if len(shapes) > 1:
        given = f"{what} of different shapes: {', '.join(str(dict(shape)) for shape in sorted(shapes)[:2])}"
        raise InputError(given, "one shape", "resize the images, or pad the prompts, to one size")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def _quiet(models: Sequence[nn.Module]) -> Iterator[None]:
    """The models in eval mode, as they were afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
