"""What an index holds: which gradients (panels), in whose eigenbasis, and in which form each block's rows are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from headwater.capture import Block, BlockGradient, Gradients, Lookup, Outer
from headwater.curvature import Estimate
from headwater.errors import InputError
from headwater.influence.methods import Fit, Influence, Pace, Row, Source, Weights
from headwater.training import Run

FACTORS, LOOKUP, COORDINATES, KEPT = "factors", "lookup", "coordinates", "kept"


@dataclass(frozen=True)
class Panel:
    """The gradients of a stage's examples, averaged over ``at``, in the eigenbasis of ``fit``. ``pace``: of the segment whose
    learning rates and preconditioner the gradients met there (they order the coordinates)."""

    stage: int
    at: tuple[Weights, ...]
    fit: Fit
    pace: Pace | None = None

    def describe(self) -> dict[str, Any]:
        """For the manifest: plain values."""
        return {"stage": self.stage, "at": [list(w) for w in self.at], "basis": [[stage, list(w)] for stage, w in self.fit.at], "estimate": repr(self.fit.estimate)}


@dataclass(frozen=True)
class Form:
    """How a block's rows are kept: ``kind``, the ``numbers`` that one example takes, and whether its coordinates may be left out."""

    kind: str
    numbers: int
    whole: int


def panels_of(run: Run, segments: int | tuple[int, ...], curvature: Estimate, each: bool) -> list[Panel]:
    """One panel for each segment (``each``: for each of its checkpoints), and each stage's gradients at the final weights."""
    found: dict[tuple[Any, ...], Panel] = {}
    for row in Source(segments, curvature=curvature).plan(run).rows:
        assert row.curvature is not None
        for at in [(w,) for w in row.at] if each else [row.at]:
            found[(row.stage, at, row.curvature)] = Panel(row.stage, at, row.curvature, row.pace)
    for row in Influence(damping=1.0, curvature=curvature).plan(run).rows:
        assert row.curvature is not None
        found.setdefault((row.stage, row.at, row.curvature), Panel(row.stage, row.at, row.curvature))
    return list(found.values())


def covering(row: Row, panels: Sequence[Panel]) -> list[int]:
    """The panels whose gradients make up a row's mean, those in its own eigenbasis first. Raises InputError: what is missing."""
    wanted, chosen = set(row.at), []
    fitting = [p for p, panel in enumerate(panels) if panel.stage == row.stage and set(panel.at) <= wanted]
    for p in sorted(fitting, key=lambda p: (panels[p].fit != row.curvature, -len(panels[p].at), p)):
        if set(panels[p].at) <= wanted:
            chosen.append(p)
            wanted -= set(panels[p].at)
    if wanted:
        held = sorted({_named(panel.at) for panel in panels if panel.stage == row.stage})
        raise InputError(
            f"a method that needs stage {row.stage}'s gradients at {_named(sorted(wanted))}",
            f"gradients that the index holds: {'; '.join(held)}",
            "build an index with as many segments as there are checkpoints (each is then held alone), or trace the run itself",
        )
    return chosen


def _named(at: Iterable[Weights]) -> str:
    said = ["step " + str(w[0]) if len(w) == 1 else f"the mean weights of steps {', '.join(map(str, w))}" for w in at]
    return said[0] if len(said) == 1 else f"the mean over {', '.join(said)}"


def forms(blocks: dict[str, Block], probe: Gradients, checkpoints: int, whole: frozenset[str] = frozenset()) -> dict[str, Form]:
    """The exact form of each block's rows that takes fewest numbers. ``whole``: blocks that must not be kept as factors."""
    return {name: _form(block, probe[name], checkpoints, name not in whole) for name, block in blocks.items()}


def _form(block: Block, gradient: BlockGradient, checkpoints: int, factored: bool) -> Form:
    only = gradient.pieces[0]
    if factored and block.matrix and len(gradient.pieces) == 1:
        if isinstance(only, Outer):
            numbers = checkpoints * only.a.shape[1] * only.a.shape[2] * (only.a.shape[3] + only.g.shape[3])
            if numbers < block.size:
                return Form(FACTORS, numbers, block.size)
        if isinstance(only, Lookup):
            numbers = checkpoints * only.index.shape[1] * (1 + only.a.shape[2])
            if numbers < block.size:
                return Form(LOOKUP, numbers, block.size)
    return Form(COORDINATES, block.size, block.size)
