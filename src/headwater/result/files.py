"""Answers on disk: one safetensors file each, arrays inside, everything else in its metadata. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headwater.errors import DamagedFile
from headwater.store import bytes_hash, content_hash, damaged, read_tensors, write_tensors

HOMES = {
    "TrainingScores": "headwater.result.training",
    "FeatureScores": "headwater.result.features",
    "InteractionScores": "headwater.result.interactions",
}
"""Where each kind of answer lives: what a file may hold."""


def write(path: str | Path, answer: Any, arrays: Mapping[str, np.ndarray], kept: Sequence[str]) -> Path:
    """Write the ``arrays`` of an answer, and its attributes ``kept`` as JSON. Raises StorageError."""
    place = _named(Path(path))
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    facts = {"answer": type(answer).__name__, "checksum": _checksum(tensors), **{name: getattr(answer, name) for name in kept}}
    write_tensors(place, tensors, {"headwater": json.dumps(facts)})
    return place


def load(path: str | Path) -> Any:
    """Read what :meth:`TrainingScores.save` or :meth:`FeatureScores.save` wrote. Raises DamagedFile."""
    from safetensors import safe_open

    place = Path(path)
    place = place if place.exists() else _named(place)
    tensors = read_tensors(place)
    with safe_open(place, "pt") as file:
        meta = (file.metadata() or {}).get("headwater")
    if meta is None:
        raise DamagedFile(f"{place} holds no scores of Headwater", "a file written by scores.save(path)", "check the path")
    facts = json.loads(meta)
    kind = facts.pop("answer") if "answer" in facts else facts.pop("kind")  # as files were written before there were two kinds
    if kind not in HOMES:
        raise damaged(place, f"holds something else than scores ({kind!r})")
    if facts.pop("checksum") != _checksum(tensors):
        raise damaged(place, "does not match its checksum")
    return getattr(import_module(HOMES[kind]), kind).loaded({name: t.numpy() for name, t in tensors.items()}, facts)


def _named(place: Path) -> Path:
    return place if place.suffix == ".safetensors" else place.with_name(place.name + ".safetensors")


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Of the numbers themselves: the file's own checksum cannot lie in the file."""
    return content_hash({name: bytes_hash(t.numpy().tobytes()) for name, t in tensors.items()})
