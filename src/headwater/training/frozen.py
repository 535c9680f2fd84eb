"""Weights that no optimizer moves, written once and not with each checkpoint: of a model with adapters (LoRA) they are nearly all of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from headwater.store import read_tensors, write_tensors

FILE = "frozen.safetensors"


class Frozen:
    """The frozen weights of a run in the directory ``path``. ``checksum``: of their file, "" where there are none."""

    def __init__(self, path: Path) -> None:
        self.path, self.checksum = path / FILE, ""
        self._seen: dict[str, tuple[int, int]] | None = None
        self._held: dict[str, Tensor] | None = None

    def rest(self, state: dict[str, Tensor], model: nn.Module, trained: Iterable[str]) -> dict[str, Tensor]:
        """What a checkpoint with this ``state`` has to hold: all but the frozen weights, which the first one writes. A weight that was changed
        all the same, or is ``trained`` by now, is held."""
        parameters = dict(model.named_parameters())
        still = {n: t for n, t in state.items() if n in parameters and n not in set(trained)}
        if self._seen is None:
            self._seen = {n: _version(parameters[n]) for n in still}
            self.checksum = write_tensors(self.path, still) if still else ""
            return {n: t for n, t in state.items() if n not in still}
        return {n: t for n, t in state.items() if n not in still or n not in self._seen or not self._unchanged(n, parameters[n])}

    def _unchanged(self, name: str, parameter: Tensor) -> bool:
        """Whether a parameter is what the file holds: its version says so, or else its content."""
        assert self._seen is not None
        if self._seen[name] == _version(parameter):
            return True
        if self._held is None:
            self._held = read_tensors(self.path, self.checksum)
        return torch.equal(self._held[name], parameter.detach().cpu())


def _version(parameter: Tensor) -> tuple[int, int]:
    return parameter.data_ptr(), parameter._version
