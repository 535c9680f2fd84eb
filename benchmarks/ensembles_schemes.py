"""What is compared: methods, and ways of making several members of one method. Plain tables, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ensembles_trainings import Training

import headwater as hw

FACTORS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # dampings that the choosing subsets choose from, in units of 1 / (eta T)
NAIVE, DROPOUT, EACH, FORWARD, LORA, BRIEF, MERGED, CHECKPOINTS = (
    "independent", "dropout", "dropout, a mask for each example", "dropout, forward only", "LoRA", "LoRA, 30 steps", "LoRA, merged", "checkpoints",
)  # fmt: skip
ADAPTED = (LORA, BRIEF, MERGED)  # these train adapters: 100 steps where nothing is said


@dataclass(frozen=True)
class Scheme:
    """Members of one method: ``models`` independent trainings, ``each`` variants of every one of them (masks, adapters, checkpoints)."""

    kind: str
    models: int
    each: int = 1

    @property
    def name(self) -> str:
        if self.kind == NAIVE:
            return "one model" if self.models == 1 else f"{self.models} models"
        return f"{self.kind}, {self.models} × {self.each}"

    @property
    def file(self) -> str:
        return f"{self.kind.replace(', ', '-').replace(' ', '-')}-{self.models}x{self.each}"

    def ensemble(self, method: Any, runs: Sequence[hw.Run]) -> hw.Ensemble:
        """What ``hw.trace`` takes. Checkpoints: the last ones of a training, each as if it had ended there."""
        if self.kind == CHECKPOINTS:
            return hw.Ensemble(method, [run.until(step) for run in runs for step in run.checkpoints[-self.each :]])
        variants = {
            NAIVE: lambda: method,
            DROPOUT: lambda: hw.DropoutEnsemble(method, members=self.each),
            EACH: lambda: hw.DropoutEnsemble(method, members=self.each, masks="example"),
            FORWARD: lambda: hw.DropoutEnsemble(method, members=self.each, forward_only=True),
            LORA: lambda: hw.LoraEnsemble(method, members=self.each),
            BRIEF: lambda: hw.LoraEnsemble(method, members=self.each, steps=30),
            MERGED: lambda: hw.LoraEnsemble(method, members=self.each, merged=True),
        }
        return hw.Ensemble(variants[self.kind](), runs)


Families = dict[str, tuple[Scheme, ...]]


def families(training: Training, method: str) -> Families:
    """The schemes of a method on a training, in families that are carried out apart from each other (they share no work)."""
    text = training.name == TEXT
    naive = tuple(Scheme(NAIVE, k) for k in ((1, 2, 3, 5) if text else (1, 2, 3, 5, 10)))
    if method in FLOORS:
        return {"plain": naive[:1]}
    if method in (GRAD_COS, DEFAULT, FEATURES):
        return {"plain": naive}
    masks = (Scheme(DROPOUT, 1, 3), Scheme(DROPOUT, 1, 10), Scheme(DROPOUT, 2, 5))
    found = {"plain": naive, "masks": masks, "each": (Scheme(EACH, 1, 3 if text else 10),), "adapters": (Scheme(LORA, 1, 3), Scheme(LORA, 2, 3))}
    if method == SOURCE:  # it follows a whole training by itself: checkpoints are no members, and merged adapters have no training
        return found
    found["plain"] += (Scheme(CHECKPOINTS, 1, 3), Scheme(CHECKPOINTS, 1, 6))
    if method == EXACT:
        return {"plain": (*found["plain"], Scheme(FORWARD, 1, 10)), "masks": masks}
    if method == TRAK:
        found["plain"] += tuple(Scheme(FORWARD, models, each) for models, each in ((1, 10), (2, 5), (5, 10)))
        found["masks"] += (Scheme(DROPOUT, 5, 3),)
        found["merged"] = (Scheme(MERGED, 1, 3), Scheme(MERGED, 2, 3))
        found["brief"] = (Scheme(BRIEF, 1, 3), Scheme(BRIEF, 2, 3))
    return found


def tiny(schemes: Families) -> Families:
    """At most two models with two variants each."""
    return {name: tuple(dict.fromkeys(Scheme(s.kind, min(s.models, 2), min(s.each, 2)) for s in held)) for name, held in schemes.items()}


# ------------------------------------------------------------------------------------------------------------------- methods

TEXT = "austen-transformer"
TRAK, EXACT, SOURCE, CHOSEN, DEFAULT = "TRAK", "TRAK, not projected", "Source", "Influence, chosen damping", "Influence, damping 1/(ηT)"
GRAD_DOT, GRAD_COS, FEATURES, RANDOM, SAME, NEIGHBOURS, WORDS = (
    "Grad-Dot", "Grad-Cos", "Representations", "random", "same label", "KNN-Shapley", "shared words (BM25)",
)  # fmt: skip
FLOORS = (RANDOM, SAME, NEIGHBOURS, WORDS)
MODEL_FREE = (RANDOM, SAME, WORDS)  # they look at no model: nothing had to be trained for them
ENSEMBLED = (TRAK, EXACT, SOURCE, CHOSEN, GRAD_DOT)
DIMENSION = 512


def methods(training: Training, damping: float | None) -> dict[str, Any]:
    """By name. ``damping``: chosen on other subsets than those that judge; None before that."""
    found: dict[str, Any] = {
        TRAK: hw.Trak(dim=DIMENSION),
        SOURCE: hw.Source(segments=3, average="parameters"),
        CHOSEN: hw.Influence(damping=damping),
        DEFAULT: hw.Influence(),
        GRAD_DOT: hw.GradDot(),
        GRAD_COS: hw.GradCos(),
        RANDOM: hw.floors.random(0),
    }
    if training.name == TEXT:
        return {**found, FEATURES: hw.Representations(), WORDS: hw.floors.inputs("bm25")}
    return {**found, EXACT: hw.Trak(), FEATURES: hw.Representations(labels="agree"), SAME: hw.floors.same_label(), NEIGHBOURS: hw.KNNShapley()}
