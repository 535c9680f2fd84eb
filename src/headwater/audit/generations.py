"""What is owed for generated images: how much of their influence an owner's images hold, and whether one was memorised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from headwater import report
from headwater.errors import InputError
from headwater.evaluate.means import Mean, mean_of, written
from headwater.result import TrainingScores
from headwater.tasks import Examples
from headwater.tasks.batches import leaves


@dataclass(frozen=True, eq=False)
class Owners:
    """How much of the influence over a set of queries each owner's training examples hold (see :func:`owners`).

    ``names``: the owners. For each: ``share`` of all positive influence, a mean over queries with its interval; ``size``, their share of the
    training set; ``chance``, the share that so many examples drawn at random would reach in 1 of 20 draws; ``top``, their share of the places
    in the queries' lists of the k largest scores.
    """

    names: tuple[str, ...]
    share: tuple[Mean, ...]
    size: np.ndarray
    chance: np.ndarray
    top: np.ndarray

    @property
    def above_chance(self) -> tuple[str, ...]:
        """Owners whose share's interval lies above what so many examples reach by chance."""
        return tuple(name for name, share, chance in zip(self.names, self.share, self.chance, strict=True) if share.low > chance)

    def __repr__(self) -> str:
        order = np.argsort([-s.mean for s in self.share], kind="stable")[:3]
        told = ", ".join(f"{self.names[o]} {self.share[o]} (holds {self.size[o]:.1%} of the images, by chance up to {self.chance[o]:.1%})" for o in order)
        return f"Owners({told})"

    @property
    def table(self) -> report.Table:
        """All owners, the largest share first, for a report."""
        order = np.argsort([-s.mean for s in self.share], kind="stable")
        rows = ((self.names[o], written(self.share[o].mean), written(self.size[o]), written(self.chance[o]), written(self.top[o])) for o in order)
        return report.Table(("owner", "share of influence", "share of images", "by chance up to", "share of top places"), tuple(rows))


def owners(scores: TrainingScores, labels: Iterable[Any], *, k: int = 10, draws: int = 200, seed: int = 0) -> Owners:
    """Which owner's training examples the queries are owed to.

    An owner's share for a query is the sum of the positive scores of the owner's examples over the sum of all positive scores. Scores are
    predictions, and where they only rank (``scores.unit``) a share says how a ranking is spread, not how much of an image somebody made.

    Args:
        scores: of generations (or of any queries), from :func:`headwater.trace`. labels: the owner of each training example.
        k: of the lists whose places are counted. draws: so many random ownerships of the same sizes, for ``chance``.

    Raises:
        InputError: another number of labels, or a query without any positive score.

    >>> scores = TrainingScores(np.array([[3.0, 1.0, -1.0, 0.0]] * 4), None, "by hand", "rank only")
    >>> owners(scores, ["a", "b", "b", "b"], k=1).share[0].mean
    0.75
    """
    given = [str(label) for label in labels]
    if len(given) != scores.train:
        raise InputError(f"{len(given)} owners for {scores.train} training examples", "one each", "pass the owner of every training example")
    positive = scores.values.clip(0).astype(float)
    total = positive.sum(1)
    if (total <= 0).any():
        raise InputError(f"query {int(np.argmin(total))} without a positive score", "something that pushed it up", "leave it out: scores.at([...])")
    names = tuple(dict.fromkeys(given))
    number = np.array([names.index(label) for label in given])
    rng = np.random.default_rng(seed)
    share = _shares(positive, number, len(names)) / total[:, None]
    drawn = np.stack([(_shares(positive, rng.permutation(number), len(names)) / total[:, None]).mean(0) for _ in range(draws)])
    means = tuple(mean_of(column) for column in share.T)
    places = np.bincount(number[scores.top(k).indices.ravel()], minlength=len(names))
    size = np.bincount(number, minlength=len(names)) / len(number)
    return Owners(names, means, size, np.percentile(drawn, 95, axis=0), places / places.sum())


def _shares(positive: np.ndarray, number: np.ndarray, count: int) -> np.ndarray:
    """Sums over training examples of the same owner, (queries, owners)."""
    out = np.zeros((count, len(positive)))
    np.add.at(out, number, positive.T)
    return out.T


@dataclass(frozen=True, eq=False)
class Memorised:
    """Whether generations are copies of training images (see :func:`memorised`); arrays (queries,).

    ``nearest``: the training image closest to each; ``distance`` to it, the root mean square over elements; ``ratio``: that distance over half the mean
    distance to the ``neighbours`` closest: below 1 it stands out, as a copy does; ``rank`` of that image among the query's scores (1: the
    largest); ``top_share``: the share of positive influence that the largest score holds.
    """

    nearest: np.ndarray
    distance: np.ndarray
    ratio: np.ndarray
    rank: np.ndarray
    top_share: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """The queries that look memorised: ``ratio`` below 1."""
        return np.flatnonzero(self.ratio < 1)

    def __repr__(self) -> str:
        told = f"{len(self.found)} of {len(self.ratio)} look copied; the nearest image also has the largest score for {(self.rank == 1).sum()}"
        return f"Memorised({told}; the largest score holds {np.median(self.top_share):.1%} of the influence (median))"

    @property
    def table(self) -> report.Table:
        """All queries, the most suspicious first, for a report."""
        rows = (
            (f"query {q}", f"#{self.nearest[q]}", written(self.distance[q]), written(self.ratio[q]), str(self.rank[q]), written(self.top_share[q]))
            for q in np.argsort(self.ratio, kind="stable")
        )
        return report.Table(("query", "nearest image", "distance", "ratio", "rank of its score", "share of the largest score"), tuple(rows))


def memorised(scores: TrainingScores, queries: Any, train: Any, *, neighbours: int = 50) -> Memorised:
    """Which generations are copies of training images, by nearest neighbours, with their scores beside them.

    The test is that of Carlini et al. 2023 (arXiv 2301.13188, section 5.1): the distance to the closest training image over half the mean distance to
    the ``neighbours`` closest. It needs no model; what the scores add is whether the copy is also owed to that image. It looks at pixels (or
    latents) as they are: a copy that was shifted or recoloured is not found.

    Args:
        scores: of the generations, from :func:`headwater.trace`. queries, train: the images as they were traced and trained on.

    Raises:
        InputError: other numbers of images than the scores have, or of other shapes.
    """
    asked, known = _flat(queries), _flat(train)
    if (len(asked), len(known)) != scores.values.shape or asked.shape[1] != known.shape[1]:
        raise InputError(
            f"{len(asked)} queries of {asked.shape[1]} numbers and {len(known)} training images of {known.shape[1]}, for scores {scores.values.shape}",
            "the images that were traced, all of one shape",
            "pass both as they were given to hw.trace and to the recorder",
        )
    count = min(neighbours, len(known))
    square = (asked**2).sum(1)[:, None] + (known**2).sum(1)[None] - 2 * asked @ known.T
    distance = np.sqrt(square.clip(0) / asked.shape[1])
    nearest, closest = distance.argmin(1), np.partition(distance, count - 1, axis=1)[:, :count]
    own = np.take_along_axis(scores.values, nearest[:, None], 1)
    rank = 1 + (scores.values > own).sum(1)
    positive = scores.values.clip(0)
    total = positive.sum(1)
    top = np.divide(positive.max(1), total, out=np.zeros_like(total), where=total > 0)
    least = distance.min(1)
    mean = closest.mean(1)
    return Memorised(nearest, least, np.divide(least, 0.5 * mean, out=np.zeros_like(least), where=mean > 0), rank, top)


def _flat(data: Any) -> np.ndarray:
    """The images of a dataset, one row each, float64."""
    examples = data if isinstance(data, Examples) else Examples(data)
    found = next(leaves(examples.columns if examples.columns is not None else examples.batch(range(len(examples)))))
    return found.detach().cpu().double().flatten(1).numpy()
