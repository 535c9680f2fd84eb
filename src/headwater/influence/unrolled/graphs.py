"""Graphs of steps' gradients, kept on the way forwards for the way back: one forward and one backward pass less for each step.

Only where a gradient with a graph is, to the last bit, the one without: then the states, and the scores, do not depend on what is kept.
That is tried out for every kind of step (stage, number of examples, modes, autocast) when the first of its kind comes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from headwater.training.replay import Gradient, Graph, Move, Player, State, Terms
from headwater.training.replay.script import split_parts


class Graphs:
    """``gradient`` in place of the player's; ``take`` what was kept. ``batch_size``: of the passes on the way back."""

    def __init__(self, player: Player, terms: Terms | None, batch_size: int | None) -> None:
        self.player, self.terms, self.batch_size = player, terms, batch_size
        self.kept: dict[int, Graph] = {}
        self._same: dict[object, bool] = {}

    def gradient(self, before: State, move: Move) -> Gradient:
        """The step's gradient; its graph is kept where that changes nothing."""
        kind = self._kind(move)
        if kind is None or not self._same.get(kind, True):
            return self.player.gradient(before, move)
        graph = self.player.graph(before, move, move.parts[0], self.terms, lasting=True)
        gradient = self.player.gradient_of(graph, before, move)
        if kind not in self._same:
            plain = self.player.gradient(before, move)
            self._same[kind] = _equal(gradient, plain)
            if not self._same[kind]:
                return plain
        self.kept[move.step] = replace(graph, buffers={})
        return gradient

    def take(self, step: int) -> Graph | None:
        """A graph that was kept, once."""
        return self.kept.pop(step, None)

    def _kind(self, move: Move) -> object:
        """What decides the kernels of a step; None where it has several passes, or BatchNorm in training mode (written out in a graph)."""
        part = move.parts[0]
        if not move.moved or split_parts(move, self.batch_size, self.player.norms) is not move or len(move.parts) > 1 or self.player.trains_norms(part):
            return None
        return move.stage.index, len(move.ids), part.mode, part.cast


def _equal(a: Gradient, b: Gradient) -> bool:
    """To the last bit."""
    if a.loss != b.loss or a.values.keys() != b.values.keys() or a.buffers.keys() != b.buffers.keys():
        return False
    return all(torch.equal(a.values[n], t) for n, t in b.values.items()) and all(torch.equal(a.buffers[n], t) for n, t in b.buffers.items())
