"""Small colour pictures: the emoji of Twemoji, in ten categories."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from headwater.errors import InputError

__all__ = ["EMOJI", "emoji"]

EMOJI = (
    "Activities",
    "Animals & Nature",
    "Component",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
"""The categories that the labels of ``emoji()`` stand for."""


def emoji(categories: Sequence[str] = EMOJI) -> tuple[Tensor, Tensor]:
    """1,911 emoji of 32 x 32 pixels in colour on white, in a fixed shuffled order.

    Args:
        categories: which of ``EMOJI`` to take; labels count in this list.

    Returns:
        ``images (n, 3, 32, 32)`` float32 from 0 to 1, and ``labels (n,)`` int64.

    Many are near repeats of another (clocks, hearts, faces with another mouth, the same flag for two places), and so on both sides of a random split.

    Source: Twemoji (Copyright Twitter, Inc. and other contributors), as shipped by the npm package emoji-datasource-twitter 16.0.0.
    Licence: the graphics are under CC BY 4.0; name Twemoji where you show them.

    >>> images, labels = emoji(("Flags", "Symbols"))
    >>> images.shape, torch.bincount(labels)
    (torch.Size([494, 3, 32, 32]), tensor([270, 224]))

    Raises:
        InputError: for a category that there is none of, or one named twice.
    """
    wanted = [categories] if isinstance(categories, str) else list(categories)
    if not wanted or len(set(wanted)) < len(wanted) or not set(wanted) <= set(EMOJI):
        raise InputError(f"categories={categories!r}", f"some of {EMOJI}, each once", 'emoji(("Flags", "Symbols"))')
    with resources.as_file(resources.files("headwater.data") / "emoji.npz") as path, np.load(path, allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    order = np.argsort(np.random.PCG64([0, 0]).random_raw(len(labels)), kind="stable")  # the file keeps related ones together
    place = np.array([wanted.index(name) if name in wanted else -1 for name in EMOJI])[labels[order]]
    chosen = order[place >= 0]
    return torch.from_numpy(images[chosen]).permute(0, 3, 1, 2).to(torch.float32) / 255, torch.from_numpy(place[place >= 0])
