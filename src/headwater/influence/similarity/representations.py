"""``Representations``: how alike two examples are to the model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from headwater.errors import InputError
from headwater.influence.methods import COSINE, RANK_ONLY
from headwater.influence.request import SCORES, Parts, Request, mean_of_scores
from headwater.influence.similarity.labels import classes_of
from headwater.influence.similarity.pairs import KERNELS, averaged, pairs, summed
from headwater.influence.similarity.vectors import POSITIONS, prove_vectors, vectors_of
from headwater.training import Run


@dataclass(frozen=True)
class Representations:
    """Similarity of what a layer makes of two examples, at the final weights: no gradients, one forward pass for each example.

    Args:
        layer: the name of a module, whose output is compared (see ``model.named_modules()``); default: the *input* of the linear layer that
            is called last, the features that the model decides by. The result's name and provenance say which was taken.
            ``"input"``: the examples themselves.
        similarity: ``"cosine"``, ``"dot"``, or ``"l2"``: minus the Euclidean distance.
        labels: ``"ignore"``: as published, every similar example counts as one that pushed the measurement up, also one of another class.
            ``"agree"`` (cosine and dot): the similarity of examples of another class counts negative. A last layer trained by gradient
            descent on such features has that sign in itself: an example pushes its own class up, and the others down, in proportion to
            ``dot`` (Yeh et al. 2018, arXiv 1811.09720). Use it where queries are measured by the score of their given class.
        positions: what becomes of further axes: ``"mean"`` over the positions of a sequence (those that the batch's ``attention_mask``
            shows) or the places of a feature map, ``"last"`` position, or ``"all"``, flattened.

        events: of a diffusion model, the noise events at which both sides are seen, features being their mean:
            ``task.grid((100, 300), draws=4)``; default: the task's.

    Scores only rank: strong at finding examples of the same class and kind, weak at predicting what retraining would change (Hanawa et al.
    2021, arXiv 2006.04528). A floor for methods that compute more. A row of several examples (:class:`Query`) is their sum, for cosines
    the mean.

    >>> Representations(similarity="dot", labels="agree").similarity
    'dot'
    """

    layer: str | None = None
    similarity: str = "cosine"
    labels: str = "ignore"
    positions: str = "mean"
    events: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, known in (("similarity", tuple(KERNELS)), ("labels", ("ignore", "agree")), ("positions", POSITIONS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r}", f"one of {', '.join(map(repr, known))}", f"{name}={known[0]!r}")
        if self.similarity == "l2" and self.labels == "agree":
            raise InputError("labels='agree' with similarity='l2'", "a similarity that is 0 between examples with nothing in common", "similarity='cosine' or 'dot'")

    def prove(self, request: Request, model: nn.Module, trained: int) -> None:
        """Raise InputError, from the first examples, where there is no such layer, or no labels that could agree."""
        if self.labels == "agree":
            classes_of(request, "labels='agree'", most=1)
        prove_vectors(request.run, self.layer, self.positions, model)

    def parts(self, request: Request) -> Parts:
        """What one model contributes (see :class:`headwater.influence.request.Scorer`)."""
        if self.events is not None:
            request = replace(request, run=request.run.over(self.events), asked=request.asked.over(self.events))
        signs = np.where(classes_of(request, "labels='agree'").same(), 1, -1) if self.labels == "agree" else None
        vectors = vectors_of(request.run, self.layer, self.positions)
        found = pairs(request, vectors, KERNELS[self.similarity], f"Representations({self.similarity}, {self.positions}, {vectors.where})")
        values = found.values if signs is None else found.values * signs.astype(found.values.dtype)
        rows = averaged(values, request) if self.similarity == "cosine" else summed(values, request)
        facts = {**provenance_of(request.run, found.cost), "layer": vectors.where, "zero_columns": 0 if self.similarity == "l2" else _zero_columns(rows, self)}
        return Parts({SCORES: rows}, self._name(vectors.where), COSINE if self.similarity == "cosine" else RANK_ONLY, facts)

    def _name(self, where: str) -> str:
        labels = "" if self.labels == "ignore" else ", labels='agree'"
        events = "" if self.events is None else f" at {self.events}"
        return f"Representations({self.similarity} of {where}{events}{labels})"

    def combine(self, members: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
        """The mean of the members' scores."""
        return mean_of_scores(members)


def provenance_of(run: Run, cost: dict[str, Any]) -> dict[str, Any]:
    """What every score of this room was computed from."""
    last = run.checkpoints[-1]
    return {"run": str(run.path), "checkpoints": [last], "weights": run.weights_hash(last), "data": [stage.fingerprint for stage in run.stages], "cost": cost}


def _zero_columns(rows: np.ndarray, method: Representations) -> int:
    count = int((rows == 0).all(axis=0).sum())
    if count:
        warnings.warn(f"{method} is exactly 0 between {count} training examples and every query: vectors of zeros, or with nothing in common", stacklevel=4)
    return count
