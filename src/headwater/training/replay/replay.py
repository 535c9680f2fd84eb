"""Training a recorded run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import GradientError
from headwater.training.replay.clipping import Clipping
from headwater.training.replay.player import Gradient, Player, Terms, as_recorded
from headwater.training.replay.script import Move, Script
from headwater.training.replay.state import State
from headwater.training.replay.suspects import mismatch
from headwater.training.replay.witness import Witness
from headwater.training.run import Run, Stage


class Replay:
    """A recorded training, ready to be repeated.

    Args:
        run: recorded from its start, with the order of its examples.
        tolerance: how far a replay may be from the record (see :class:`~headwater.training.replay.witness.Witness`).
        clipping: what clipping factors below 1 stand for, "auto" (as the record tells), "norm" or "fixed"; see :class:`Clipping`.

    Raises:
        RunError, MissingCheckpoint, ReplayMismatch: the record lacks what a replay needs (see :class:`Script`).
    """

    def __init__(self, run: Run, tolerance: float | None = None, clipping: str = "auto") -> None:
        self.run = run
        self.script = Script(run, clipping)
        self.player = Player(run, self.script)
        self.tolerance = tolerance

    def witness(self) -> Witness:
        """A new witness for a sweep from the first step."""
        return Witness.of(self.player, self.tolerance)

    def advance(
        self,
        state: State,
        to: int,
        witness: Witness | None = None,
        tick: Callable[[int], object] = lambda n: None,
        gradient_of: Callable[[State, Move], Gradient] | None = None,
    ) -> State:
        """The state after step ``to``. Raises ReplayMismatch where ``witness`` (who follows the first sweep) sees it leave the record.
        ``gradient_of``: what computes the gradients (default: the player)."""
        for step in range(state.step + 1, to + 1):
            move = self.script.move(step)
            state_before, before = state, self.player.begin(state, move)
            gradient = (gradient_of or self.player.gradient)(before, move)
            departed = witness.gradient(move, gradient) if witness is not None and witness.next == step else None
            state = self.player.step(before, move, gradient)
            departed = departed or (witness.state(state) if witness is not None and witness.next == step else None)
            if departed is not None:
                assert witness is not None
                raise mismatch(self.player, self.script, departed, state_before, witness.tolerance)
            tick(1)
        return state

    def check(self) -> dict[str, Any]:
        """Train it again and hold it against every recorded checkpoint, gradient norm and loss; what was compared, and how near it was.

        Raises ReplayMismatch, which names the step at which it departs and what escaped the record.
        """
        witness = self.witness()
        with as_recorded(self.run):
            self.advance(self.player.start(), len(self.script), witness)
        return witness.report()

    def train(self, weights: Any = None, terms: Terms | None = None) -> dict[str, Tensor]:
        """Weights and buffers after training with other weights of the examples, everything else as it was.

        Args:
            weights: (examples of all stages), or (examples, terms) with ``terms``; the normaliser of a batch stays its number of examples.
                Gradients are clipped anew where the loop clipped by their norm.

        Raises GradientError where the record does not tell what its clipping factors stand for.
        """
        given = None if weights is None else torch.as_tensor(weights).to(self.run.device)
        clippings = {} if given is None else {stage.index: self._clipping_anew(stage) for stage in self.run.stages}
        state = self.player.start()
        with as_recorded(self.run):
            for move in self.script:
                before = self.player.begin(state, move)
                mine = None if given is None else given[move.ids + move.stage.columns.start]
                state = self.player.step(before, move, self.player.gradient(before, move, mine, terms, clippings.get(move.stage.index)))
        return {**state.weights, **state.buffers}

    def _clipping_anew(self, stage: Stage) -> Clipping | None:
        """How other gradients of a stage are clipped; None: by the recorded factors."""
        found = self.script.clipping(stage)
        if found.kind != "norm":
            return None
        if np.isnan(found.bound):
            raise GradientError(
                f"clipping by norm in stage {stage.name!r} to a bound that the record does not tell",
                "one max_norm in a stage, and a run that recorded the norms of its gradients (from 2026-11-24 on)",
                "record the training again with one max_norm, or really train again (hw.evaluate.retrain)",
            )
        return found
