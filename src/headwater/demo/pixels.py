"""Which pixels carried the answers of the demo, and those of the training digits that they are owed to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.demo.experiment import Digits
from headwater.demo.kept import kept
from headwater.evaluate import deletion
from headwater.features import baselines, targets
from headwater.features.explain import explain
from headwater.result import FeatureScores
from headwater.tasks import fingerprint
from headwater.training import Run

TOLERANCE = 1e-2  # of the change of the log-odds
JUDGED = 24  # digits that pixels are taken away from, to see whether the order of the scores means something
FILLS = 4  # training digits whose pixels are put in their place


@dataclass(frozen=True, eq=False)
class Pixels:
    """Attributions to pixels, of the log-odds that the traces are about too.

    Args:
        asked: of every reported query, in their order. Its provenance holds ``deletion``: what taking pixels away did.
        training: of training digits, for the class that a query asked about. pairs: (number of the training digit, class), one for each.
    """

    asked: FeatureScores
    training: FeatureScores
    pairs: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Digits explained."""
        return self.asked.n + self.training.n

    @property
    def seconds(self) -> float:
        """What all of it took, when it was done."""
        return sum(float(e.provenance["cost"]["seconds"]) for e in (self.asked, self.training))

    @property
    def evaluations(self) -> np.ndarray:
        """Of the network, for each digit."""
        return np.concatenate([self.asked.evaluations, self.training.evaluations])

    @property
    def gaps(self) -> np.ndarray:
        """How far each digit's values are from their sum, relative to it."""
        return np.concatenate([self.asked.relative_residual, self.training.relative_residual])


def carried(out: Path, run: Run, digits: Digits, asked: np.ndarray, pairs: Sequence[tuple[int, int]]) -> Pixels:
    """The pixels of the test digits ``asked``, and of the training digits of ``pairs`` (number, class asked about); from disk where they are there.

    Compared with the average training digit: a black image could give no credit to ink that is missing, and taking pixels away in the order
    of the values costs the answer sooner with the average than with black, or with black and white averaged (measured on this network).
    """
    images, labels = (column[asked] for column in digits.test)
    ids, classes = (torch.tensor(column, dtype=torch.long) for column in zip(*pairs, strict=True))
    model = run.load(run.model(), run.checkpoints[-1])
    background = digits.train[0]

    def work() -> list[FeatureScores]:
        tests = _explained(model, background, images, labels, [f"Test digit {int(number)}" for number in asked])
        others = _explained(model, background, digits.train[0][ids], classes, [f"#{i} for class {c}" for i, c in pairs])
        judged = deletion(
            tests.at(np.arange(min(JUDGED, tests.n))),
            model,
            images[:JUDGED],
            targets.log_odds(labels[:JUDGED]),
            fill=baselines.dataset(background, FILLS),
            random=1,
        )
        told = {"area": judged.mean.mean, "random": judged.against["random"].mean.mean, "digits": judged.mean.examples}
        return [replace(tests, provenance={**tests.provenance, "deletion": told}), others]

    facts = (TOLERANCE, JUDGED, FILLS, run.weights_hash(run.checkpoints[-1]), fingerprint((images, labels)), fingerprint(background), [list(p) for p in pairs])
    tests, others = kept(out, "pixels", facts, work)
    return Pixels(tests, others, tuple(pairs))


def _explained(model: Any, background: Tensor, images: Tensor, classes: Tensor, names: list[str]) -> FeatureScores:
    return explain(model, images, targets.log_odds(classes), baseline=baselines.mean(background), tolerance=TOLERANCE, example_names=names, progress=False)
