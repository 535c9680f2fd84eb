"""The states that are kept on the way back, in memory or in the run's directory."""

from __future__ import annotations

import shutil

import torch

from headwater.store import Store
from headwater.training.replay import State


class Keeper:
    """States by their step."""

    def __init__(self, store: Store, name: str, where: str, device: torch.device) -> None:
        self.store, self.name, self.disk, self.device = store, name, where == "disk", device
        self.held: dict[int, State | None] = {}
        self.most = 0

    def keep(self, step: int, state: State) -> None:
        """Keep a state."""
        if self.disk and step:
            self.store.write(f"{self.name}/{step}", state.flat(), state.facts())
        self.held[step] = None if self.disk and step else state
        self.most = max(self.most, len(self.held))

    def load(self, step: int) -> State:
        """A state that is kept."""
        held = self.held[step]
        if held is not None:
            return held
        return State.of(self.store.read(f"{self.name}/{step}"), self.store.meta(f"{self.name}/{step}"), self.device)

    def drop(self, step: int) -> None:
        """Forget it."""
        if self.held.pop(step) is None:
            self.store.delete(f"{self.name}/{step}")

    def clear(self) -> None:
        """Forget all of them, and what a process that was killed left of its own."""
        self.held.clear()
        if self.disk:
            shutil.rmtree(self.store.path / self.name, ignore_errors=True)
