"""How far scores agree with reference scores: exact unrolling, say, where retraining is too dear to judge by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater import report
from headwater.errors import InputError, NotFinite
from headwater.evaluate.accord import correlation, spearman
from headwater.evaluate.arrays import array
from headwater.evaluate.means import Mean, mean_of, written
from headwater.report.layout import table
from headwater.result.frames import pandas_library
from headwater.result.training import EXAMPLES

if TYPE_CHECKING:
    import pandas

MEASURES = ("spearman", "pearson", "jaccard", "rbo", "sign")
_NO_UNIT = ("rank only", "cosine", "magnitude")
_BLOCK = 2**23  # numbers of one block of queries
_DEEP = 1e-9  # ranks whose weight in the rank-biased overlap is below this are left out


@dataclass(frozen=True, eq=False)
class Judged:
    """One method against the reference: ``per_query[measure]`` (queries,) and its ``means``, with 95 % intervals over queries.

    ``slope``: least squares through 0 of the reference on the scores, over all queries, None where a unit forbids it. ``constant``: queries
    whose scores are all equal (their correlations count as 0). ``zero_columns``: training examples that are 0 for every query.
    ``columns``: what they are. ``tied``: queries whose k-th and next score are equal, so that chance decides who is among the top k.
    """

    method: str
    unit: str
    per_query: dict[str, np.ndarray]
    means: dict[str, Mean]
    slope: Mean | None
    constant: int
    zero_columns: int
    tied: int
    columns: str = EXAMPLES

    @property
    def notes(self) -> str:
        """What to know about these numbers, in words."""
        found = [(self.constant, "queries with constant scores"), (self.zero_columns, f"{self.columns} that are always 0"), (self.tied, "queries tied at k")]
        return ", ".join(f"{count} {what}" for count, what in found if count)


@dataclass(frozen=True, eq=False)
class Against:
    """Methods against one reference (see :func:`against`): ``found[name]`` is a :class:`Judged`; in the order given.

    ``chance``: the Jaccard overlap of random rankings. ``constant_reference``: queries whose reference scores are all equal: nothing can agree
    with them, and correlations count as 0. ``columns``: what scores are of, "training examples" or "groups", "tokens", "terms".
    """

    reference: str
    found: dict[str, Judged]
    queries: int
    train: int
    k: int
    persistence: float
    chance: float
    constant_reference: int
    columns: str = EXAMPLES

    @property
    def table(self) -> report.Table:
        """One row for each method, for a report."""
        columns = ("method", "Spearman", "Pearson", f"Jaccard@{self.k}", "RBO", f"sign of {self.k}", "slope", "")
        rows = []
        for name, judged in self.found.items():
            slope = "-" if judged.slope is None else repr(judged.slope)
            rows.append((name, *(repr(judged.means[m]) for m in MEASURES), slope, judged.notes))
        return report.Table(columns, tuple(rows))

    def __repr__(self) -> str:
        constant = f"; {self.constant_reference} queries with a constant reference" if self.constant_reference else ""
        size = f"{self.queries} queries x {self.train:,} {self.columns}{constant}"
        chance = f"Jaccard by chance {written(self.chance)}" if self.k < self.train else f"Jaccard of all {self.train} {self.columns} is 1, whatever scores say"
        return "\n".join([f"Against({self.reference or 'a reference'}: {size}; {chance})", *table(self.table)])

    def to_frame(self) -> pandas.DataFrame:
        """One row for each method and query. Needs pandas."""
        pandas = pandas_library()
        parts = [pandas.DataFrame({"method": name, "query": np.arange(self.queries), **j.per_query}) for name, j in self.found.items()]
        frame = pandas.concat(parts, ignore_index=True)
        frame.attrs.update(reference=self.reference, k=self.k, persistence=self.persistence)
        return frame


def against(reference: Any, scores: Any, *, k: int = 10, persistence: float = 0.9, bootstrap: int = 1000, seed: int = 0) -> Against:
    """Do scores say what a better method says? Query by query over training examples, then averaged over queries.

    - ``spearman``, ``pearson``: correlations; 0 where one side is constant (counted).
    - ``jaccard``: of the k largest scores of both, ``|A ∩ B| / |A ∪ B|``.
    - ``rbo``: rank-biased overlap of the whole rankings, extrapolated (Webber, Moffat & Zobel 2010, Eq. 32): ``(1 - p) sum_d p^(d-1) overlap of
      the first d / d``, which looks at about ``1 / (1 - p)`` ranks, 1 for the same order.
    - ``sign``: of the k examples strongest in the reference (by ``|score|``), the share with the same sign.
    - ``slope``: of the reference on the scores, least squares through 0 over all queries; only where neither unit is one that ranks.

    Equal scores are ordered by chance, differently on both sides, so that scores that tell nothing overlap as chance does.

    Args:
        reference: TrainingScores or an array (queries, train): ``hw.trace(run, queries, hw.Unrolled())``.
        scores: the same of the same queries and training examples; or several: a list, or a dict by name.
        k: how many count as the top. persistence: ``p`` above.
        bootstrap: redrawings of queries for the intervals. They cover the choice of queries alone.

    Raises:
        InputError: shapes or queries that differ, other training data, or a single column, which is first in every ranking. NotFinite.

    A reference is no truth: what it gets wrong, this counts as right. ``lds`` and ``slope`` ask retrained models.

    >>> exact = np.array([[3.0, -1.0, 2.0, 0.5]])
    >>> against(exact, {"half": exact / 2}, k=2).found["half"].slope.mean
    2.0
    """
    truth = _array(reference, "the reference")
    if truth.shape[1] < 2:
        expected = "at least two columns: a single one is first in every ranking"
        raise InputError(f"a reference of a single column, of shape {truth.shape}", expected, "compare its scores by eye")
    if k < 1 or not 0 < persistence < 1:
        raise InputError(f"k={k} and persistence={persistence}", "k of at least 1, a persistence between 0 and 1", "k=10, persistence=0.9")
    size = min(k, truth.shape[1])
    found = {}
    for name, held in _by_name(scores).items():
        values = _array(held, name)
        _fits(reference, held, name, truth.shape, values.shape)
        found[name] = _judged(truth, values, held, reference, size, persistence, bootstrap, seed)
    common = size**2 / truth.shape[1]  # of random rankings
    constant = int((np.ptp(truth, axis=1) == 0).sum())
    method, columns = str(getattr(reference, "method", "")), str(getattr(reference, "columns", EXAMPLES))
    return Against(method, found, len(truth), truth.shape[1], size, persistence, common / (2 * size - common), constant, columns)


def _judged(truth: np.ndarray, values: np.ndarray, held: Any, reference: Any, k: int, p: float, bootstrap: int, seed: int) -> Judged:
    step, parts = max(1, _BLOCK // truth.shape[1]), []
    for start in range(0, len(truth), step):
        rows = slice(start, start + step)
        parts.append(_measured(truth[rows], values[rows], k, p, seed))
    per_query = {m: np.concatenate([part[m] for part in parts]) for m in MEASURES}
    units = [str(getattr(side, "unit", "")) for side in (reference, held)]
    slope = None if any(unit in _NO_UNIT for unit in units) or not values.any() else _slope(truth, values, bootstrap, seed)
    ordered = -np.sort(-values, axis=1)
    return Judged(
        method=str(getattr(held, "method", "")),
        unit=units[1],
        per_query=per_query,
        means={m: mean_of(v, bootstrap, seed) for m, v in per_query.items()},
        slope=slope,
        constant=int((np.ptp(values, axis=1) == 0).sum()),
        zero_columns=int((values == 0).all(axis=0).sum()),
        tied=int((ordered[:, k - 1] == ordered[:, k]).sum()) if k < values.shape[1] else 0,
        columns=str(getattr(held, "columns", EXAMPLES)),
    )


def _measured(truth: np.ndarray, values: np.ndarray, k: int, p: float, seed: int) -> dict[str, np.ndarray]:
    """Every measure of some of the queries."""
    rank = _places(truth, seed), _places(values, seed + 1)
    common = ((rank[0] < k) & (rank[1] < k)).sum(axis=1)
    strongest = np.argsort(-np.abs(truth), axis=1, kind="stable")[:, :k]
    signs = [np.sign(np.take_along_axis(side, strongest, axis=1)) for side in (truth, values)]
    told = signs[0] != 0
    agree = np.divide(((signs[0] == signs[1]) & told).sum(axis=1), told.sum(axis=1), out=np.full(len(truth), np.nan), where=told.any(axis=1))
    return {
        "spearman": np.nan_to_num(spearman(truth, values), nan=0.0),
        "pearson": np.nan_to_num(correlation(truth, values), nan=0.0),
        "jaccard": common / (2 * k - common),
        "rbo": _rbo(np.maximum(*rank), p),
        "sign": agree,
    }


def _places(values: np.ndarray, seed: int) -> np.ndarray:
    """The place (from 0) of each score in its row, largest first, equal scores in an order drawn once for all rows."""
    drawn = np.random.default_rng([seed, values.shape[1]]).permutation(values.shape[1])
    order = drawn[np.argsort(-values[:, drawn], axis=1, kind="stable")]
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.arange(values.shape[1])[None], axis=1)
    return places


def _rbo(later: np.ndarray, p: float) -> np.ndarray:
    """From the later of an example's two places (queries, train): ``(1 - p) sum_{d=1}^{D} p^{d-1} X_d / d + p^D X_D / D``, X_d being how
    many examples are among the first d of both. Whole rankings end at X_n / n = 1; deeper than what weighs nothing is not looked at."""
    n = later.shape[1]
    depth = int(min(n, np.ceil(np.log(_DEEP) / np.log(p))))
    d = np.arange(1, depth + 1)
    shared = np.stack([np.bincount(row[row < depth], minlength=depth) for row in later]).cumsum(axis=1) / d
    return (1 - p) * (shared * p ** (d - 1.0)).sum(axis=1) + p**depth * shared[:, -1]


def _slope(truth: np.ndarray, values: np.ndarray, bootstrap: int, seed: int) -> Mean:
    """Least squares through 0 with an interval over redrawn queries."""
    up, down = (truth * values).sum(axis=1), (values * values).sum(axis=1)
    slope = float(up.sum() / down.sum())
    if len(truth) < 2:
        return Mean(slope, float("nan"), float("nan"), len(truth))
    times = np.random.default_rng(seed).multinomial(len(truth), np.full(len(truth), 1 / len(truth)), bootstrap)
    weight = times @ down
    low, high = np.percentile((times @ up)[weight > 0] / weight[weight > 0], [2.5, 97.5])
    return Mean(slope, float(low), float(high), len(truth))


# ------------------------------------------------------------------------------------------------------------------ arguments


def _by_name(scores: Any) -> dict[str, Any]:
    """What was passed as ``scores``, by name; methods of one name are numbered."""
    if isinstance(scores, Mapping):
        held = {str(name): value for name, value in scores.items()}
    else:
        many = isinstance(scores, Sequence) and not isinstance(scores, str) and all(hasattr(one, "values") or np.ndim(one) == 2 for one in scores)
        held = {}
        for one in scores if many else [scores]:
            name, number = str(getattr(one, "method", "")) or "scores", 1
            while (name if number == 1 else f"{name} ({number})") in held:
                number += 1
            held[name if number == 1 else f"{name} ({number})"] = one
    if not held:
        raise InputError("no scores to judge", "scores, a list of them, or a dict by name", "hw.evaluate.against(reference, scores)")
    return held


def _array(held: Any, name: str) -> np.ndarray:
    values = array(held)
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiub":
        raise InputError(f"{name} of shape {values.shape}", "numbers (queries, train)", "pass TrainingScores or a matrix")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        bad, whose = np.count_nonzero(~np.isfinite(values)), name if name in ("scores", "the reference") else f"the scores of {name!r}"
        given = f"{bad} of the {values.size} numbers in {whose} {'is' if bad == 1 else 'are'} NaN or infinite"
        raise NotFinite(given, "finite scores", "trace again, and look at the warnings")
    return values


def _fits(reference: Any, held: Any, name: str, expected: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if shape != expected:
        given = f"{name} of shape {shape}, and a reference of shape {expected}"
        raise InputError(given, "the same queries and training examples", "trace the same queries of the same run")
    asked = [getattr(side, "query_names", None) for side in (reference, held)]
    if None not in asked and asked[0] != asked[1]:
        raise InputError(f"{name} of the queries {asked[1]}, and a reference of {asked[0]}", "the same queries in the same order", "pick them with scores.at([...])")
    data = [(getattr(side, "provenance", None) or {}).get("data") for side in (reference, held)]
    if None not in data and data[0] != data[1]:
        raise InputError(f"{name}, scores of other training data than the reference's", "scores of the same training examples", "trace runs on the same data")
