"""What does a class hang on? Parts that carry one class and no other, and whether such a part alone decides.

    spots = audit.hotspots(scores, by=labels, parts=4)                  # where attributions of one class gather
    audit.shortcuts(spots, model, images, labels)                       # taken away, and pasted into others: does the prediction follow?

Classes differ honestly too (a seven has no ink where a zero has), so that a hotspot is no fault by itself. A shortcut is: the region, pasted
into examples of other classes, makes the model name the class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater import report
from headwater.audit.intervals import chance_of
from headwater.errors import InputError
from headwater.evaluate.means import Mean, mean_of, written
from headwater.evaluate.parts import arrays_of, parts_of
from headwater.features.baselines import references
from headwater.features.calls import Call, quiet

LARGEST = 0.025  # of the parts a region may hold: a cue is small; the middle of an honest 8, pasted whole, makes eights too
FOLLOWS = 0.25  # a part belongs to the region of a stronger one if it has this share of its excess


@dataclass(frozen=True, eq=False)
class Hotspots:
    """Where the attributions of one class gather (see :func:`hotspots`).

    ``share`` (classes, parts): mean share of the positive attributions of a class's examples in each part. ``excess``: that minus the same of all
    other classes. ``chance``: of an excess as large anywhere when labels are shuffled (family-wise over classes and parts). ``classes``: their
    values, in order. ``of`` (n, parts): the shares of each example. ``labels`` (numbers of an example,): the part that each belongs to.
    """

    classes: tuple[Any, ...]
    share: np.ndarray
    excess: np.ndarray
    chance: np.ndarray
    of: np.ndarray
    labels: np.ndarray

    def top(self, k: int = 5) -> list[tuple[Any, int, float, float, float]]:
        """The k strongest (class, part, share, excess, chance), the largest excess first."""
        order = np.argsort(-self.excess, axis=None, kind="stable")[:k]
        rows, parts = np.unravel_index(order, self.excess.shape)
        picked = zip(rows, parts, strict=True)
        return [(self.classes[c], int(j), float(self.share[c, j]), float(self.excess[c, j]), float(self.chance[c, j])) for c, j in picked]

    def region(self, of: Any) -> np.ndarray:
        """(parts,) which parts make up the hotspot of a class: the strongest, and those with at least a quarter of its excess, but no more than
        a fortieth of all parts (at least one)."""
        excess = self.excess[self.classes.index(of)]
        order = np.argsort(-excess, kind="stable")[: max(1, int(LARGEST * len(excess)))]
        found = np.zeros(len(excess), bool)
        found[order[excess[order] >= FOLLOWS * excess[order[0]]]] = True
        return found

    def mask(self, of: Any) -> np.ndarray:
        """(numbers of an example,) the same as a mask of the inputs' numbers in a row."""
        return np.asarray(self.region(of)[self.labels])

    def __repr__(self) -> str:
        rows = (f"class {c}, part {j}: {written(s)} of the mass, {written(x)} more than elsewhere, chance {written(p)}" for c, j, s, x, p in self.top(3))
        return f"Hotspots({'; '.join(rows)}; a hotspot is no fault by itself: see shortcuts)"

    @property
    def table(self) -> report.Table:
        """The ten strongest, for a report."""
        rows = tuple((str(c), str(j), written(s), written(x), written(p)) for c, j, s, x, p in self.top(10))
        return report.Table(("class", "part", "share of the mass", "excess", "chance"), rows)


def hotspots(scores: Any, by: Any, *, parts: Any = None, permutations: int = 200, seed: int = 0) -> Hotspots:
    """Parts in which the positive attributions of one class gather, as against all other classes.

    ``share = mean over the class's examples of Σ_{j in part} max(φ_j, 0) / Σ_j max(φ_j, 0)``; labels are shuffled ``permutations`` times, and the
    largest excess of each shuffle makes ``chance`` (Westfall and Young 1993, max-T), so that nothing is found where attributions do not depend
    on the class. Good: no part with a large share and a large excess. A corner patch planted on one class shows as one part with most of the mass.

    Args:
        scores: FeatureScores or arrays of explanations *of each example's own class*. by: (n,) the classes (or groups of any kind).
        parts: None (each number), c (cells of c by c), or labels of the inputs' shape, the same for all examples.

    Raises InputError for a single class, or parts that differ between examples.

    >>> spots = hotspots(np.eye(4)[[0, 0, 0, 0, 1, 2, 3, 1]], by=[7, 7, 7, 7, 8, 8, 8, 8])
    >>> spots.top(1)[0][:3]
    (7, 0, 1.0)
    """
    values = arrays_of(scores)
    kinds = np.asarray(by.cpu() if isinstance(by, Tensor) else by)
    classes = np.unique(kinds)
    if kinds.shape != (len(values[0]),) or len(classes) < 2:
        given = f"{len(classes)} classes of shape {kinds.shape} for {len(values[0])} explanations"
        raise InputError(given, "one label for each, of two classes or more", "hotspots(scores, by=labels)")
    if permutations < 19:
        raise InputError(f"permutations={permutations}", "at least 19, for a chance of 0.05", "permutations=200")
    held = parts_of(tuple(np.maximum(v, 0) for v in values), tuple(torch.from_numpy(v) for v in values), parts)
    if len(held.labels) != 1:
        raise InputError("parts that differ between examples", "the same for all, which classes can be compared on", "parts=4, or one map of labels")
    total = held.scores.sum(1, keepdims=True)
    share = np.divide(held.scores, total, out=np.zeros_like(held.scores), where=total > 0)
    mine = kinds == classes[:, None]
    excess = _excess(share, mine)
    rng = np.random.default_rng(seed)
    shuffled = np.array([_excess(share, mine[:, rng.permutation(len(share))]).max() for _ in range(permutations)])
    chance = chance_of(excess, np.broadcast_to(shuffled[:, None, None], (permutations, *excess.shape)))
    return Hotspots(tuple(classes.tolist()), _means(share, mine), excess, chance, share, held.labels[0].cpu().numpy())


def _means(share: np.ndarray, mine: np.ndarray) -> np.ndarray:
    return np.asarray(mine.astype(float) @ share / mine.sum(1, keepdims=True))


def _excess(share: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """(classes, parts): mean over the class minus mean over all others."""
    return np.asarray(_means(share, mine) - _means(share, ~mine))


# ---- does the part alone decide? --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shortcut:
    """What a class's hotspot does to predictions (see :func:`shortcuts`).

    ``masked``: share of the class's examples, predicted as such, that are no longer when the region is filled; ``masked_elsewhere``: other regions
    of equal size. ``pasted``: share of other classes' examples that are called this class when they get the region of one of its examples;
    ``pasted_control``: when they get it from an example of a third class, or another region of equal size from one of this class.
    ``accuracy``, ``accuracy_masked``: on all examples, and with the region filled in all. ``found``: the verdict. ``region`` (parts,).
    """

    of: Any
    region: np.ndarray
    share: float
    excess: float
    chance: float
    masked: Mean
    masked_elsewhere: Mean
    pasted: Mean
    pasted_control: Mean
    accuracy: float
    accuracy_masked: float
    found: bool

    def __repr__(self) -> str:
        verdict = "SHORTCUT" if self.found else "no shortcut"
        return (
            f"Shortcut(class {self.of}: {verdict}; parts {np.flatnonzero(self.region).tolist()} hold {written(self.share)} of the mass; masked: {self.masked} lose "
            f"the class (elsewhere {written(self.masked_elsewhere.mean)}); pasted: {self.pasted} take it on (control {written(self.pasted_control.mean)}); "
            f"accuracy {self.accuracy:.3f}, {self.accuracy_masked:.3f} masked)"
        )


def shortcuts(
    spots: Hotspots,
    model: Any,
    inputs: Any,
    labels: Any,
    *,
    fill: Any = None,
    least: float = 0.1,
    alpha: float = 0.05,
    draws: int = 4,
    batch_size: int = 256,
    seed: int = 0,
) -> list[Shortcut]:
    """For each class: does the region of its hotspot decide alone? Strongest first.

    Found means that all three hold: the excess is beyond chance (``alpha``); pasting the region into examples of other classes makes at least
    ``least`` of them (lower end of the interval) take on the class; and more do than under the control (intervals apart). Measured on handwritten digits
    (three networks, ten classes each): honest classes reach 0.06 at most; a patch on nine tenths of a class's training images 0.34 to 0.67, on half of them
    0.00 to 0.23: what a network has not come to rely on is no shortcut, and is not found.
    Regions are pasted ``draws`` times from examples drawn at random. An example is not in the data to begin with once something is pasted into it: that is why the
    control pastes too.

    Args:
        spots: of explanations of these inputs. model: from one tensor of inputs (n, ...) to logits (n, classes). labels: (n,) class numbers, as ``by``.
        fill: what a masked region becomes: None (zeros), a number, an array or one of ``hw.baselines``.

    Raises InputError.
    """
    call = Call.of(model, inputs, None)
    y = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    fits = len(call.tensors) == 1 and call.tensors[0][0].numel() == len(spots.labels) and len(spots.of) == call.n
    if not fits or y.shape != (call.n,) or set(y.tolist()) != set(spots.classes):
        given = f"hotspots of {len(spots.of)} explanations of {len(spots.labels)} numbers, for {call.n} inputs and labels of shape {y.shape}"
        raise InputError(given, "the inputs that were explained, and the labels that hotspots() got", "explain and look at the same examples")
    work = _Trials(call, spots, y, fill, draws, batch_size, np.random.default_rng(seed))
    found = [work.judged(c, least, alpha) for c in spots.classes]
    return sorted(found, key=lambda s: (-s.found, -s.excess))


class _Trials:
    """Predictions for changed inputs."""

    def __init__(self, call: Call, spots: Hotspots, y: np.ndarray, fill: Any, draws: int, batch_size: int, rng: np.random.Generator) -> None:
        self.call, self.spots, self.y, self.draws, self.batch, self.rng = call, spots, y, draws, batch_size, rng
        self.x = call.tensors[0]
        against = references(fill, (self.x,))
        weights = against.weights.to(self.x.device).to(self.x.dtype)
        self.fill = torch.einsum("k,k...->...", weights, against.points[0].to(self.x.dtype)).expand(self.x.shape)
        self.predicted = self.classes(self.x)

    def classes(self, x: Tensor) -> np.ndarray:
        """(m,) what the model calls them."""
        with quiet(self.call.model), torch.no_grad():
            rows = torch.arange(len(x), device=x.device)
            logits = torch.cat([self.call((x[s],), s) for s in rows.split(self.batch)])
        if logits.ndim != 2:
            raise InputError(f"outputs of shape {tuple(logits.shape)}", "logits (n, classes)", "give a classifier")
        return np.asarray(logits.argmax(1).cpu().numpy())

    def put(self, rows: np.ndarray, region: np.ndarray, source: Tensor) -> np.ndarray:
        """What the examples ``rows`` are called with ``source`` (m, ...) in the region."""
        mask = torch.from_numpy(region[self.spots.labels]).to(self.x.device).reshape(self.x.shape[1:])
        return self.classes(torch.where(mask, source, self.x[torch.from_numpy(rows)]))

    def elsewhere(self, region: np.ndarray) -> np.ndarray:
        """As many other parts, at random."""
        others = np.flatnonzero(~region)
        found = np.zeros(len(region), bool)
        found[self.rng.choice(others, size=min(len(others), int(region.sum())), replace=False)] = True
        return found

    def judged(self, c: Any, least: float, alpha: float) -> Shortcut:
        """All figures of one class."""
        k = self.spots.classes.index(c)
        region, y, rng = self.spots.region(c), self.y, self.rng
        mine, others = np.flatnonzero(y == c), np.flatnonzero(y != c)
        called = mine[self.predicted[mine] == c]
        masked = (self.put(called, region, self.fill[torch.from_numpy(called)]) != c).astype(float)
        away = np.mean([self.put(called, self.elsewhere(region), self.fill[torch.from_numpy(called)]) != c for _ in range(self.draws)], axis=0)
        free = others[self.predicted[others] != c]
        pasted = np.mean([self.put(free, region, self._from(rng.choice(mine, len(free)))) == c for _ in range(self.draws)], axis=0)
        third = [self.put(free, region, self._from(rng.choice(others, len(free)))) == c for _ in range(self.draws)]
        moved = [self.put(free, self.elsewhere(region), self._from(rng.choice(mine, len(free)))) == c for _ in range(self.draws)]
        control = np.maximum(np.mean(third, axis=0), np.mean(moved, axis=0))
        best = int(np.argmax(self.spots.excess[k]))
        chance = float(self.spots.chance[k, best])
        takes, without = mean_of(pasted), mean_of(control)
        every = np.arange(len(y))
        whole = float((self.put(every, region, self.fill) == y).mean())
        found = chance <= alpha and takes.low >= least and takes.low > without.high
        share = float(self.spots.share[k, region].sum())
        accuracy = float((self.predicted == y).mean())
        return Shortcut(c, region, share, float(self.spots.excess[k, best]), chance, mean_of(masked), mean_of(away), takes, without, accuracy, whole, bool(found))

    def _from(self, rows: np.ndarray) -> Tensor:
        return self.x[torch.from_numpy(rows)]
