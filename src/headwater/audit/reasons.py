"""Reason codes: why was this alert raised, in plain words, compared with what is legitimate?

found = audit.reasons(model, X[flagged], legitimate=X[~fraud], threshold=2.0)
print(found.sentences(0)); found.queue(); found.to_html("reasons.html")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from headwater import report
from headwater.audit.rows import column, columns_of, names_of, numeric, rows_of, table_of
from headwater.errors import InputError
from headwater.evaluate.means import Mean, mean_of
from headwater.features import baselines, tables
from headwater.features.explain import explain
from headwater.report.numbers import number, percent, signed
from headwater.result import FeatureScores
from headwater.result.frames import pandas_library
from headwater.result.views import views

if TYPE_CHECKING:
    import pandas

POOL = 4096
"""Legitimate rows whose outputs are looked at to meet a threshold, at most."""


class Reason(NamedTuple):
    """One reason of one alert.

    ``name`` of the column or group; ``push``: its φ, in units of the output; ``share`` of all that pushed up; ``stderr`` over the legitimate rows it was
    compared with, or None; ``value`` of the alert and what is ``typical`` of the legitimate, in words.
    """

    name: str
    push: float
    share: float
    stderr: float | None
    value: str
    typical: str

    @property
    def doubtful(self) -> bool:
        """Whether the push may be due to the choice of the rows it was compared with."""
        return self.stderr is not None and self.push <= 2 * self.stderr

    def __str__(self) -> str:
        doubt = "; doubtful: it depends on which legitimate rows it is compared with" if self.doubtful else ""
        typical = f" (legitimate: {self.typical})" if self.typical else ""
        return f"{self.name} is {self.value}{typical}: {signed(self.push)}, {percent(self.share)} of what raised it{doubt}"


@dataclass(frozen=True, eq=False)
class Reasons:
    """For each alert its strongest reasons (see :func:`reasons`).

    ``alerts``: for each alert at most k :class:`Reason`, strongest first; fewer where fewer parts raised the output. ``scores``: the explanation behind
    them, columns that belong together folded. ``names``: of the alerts. ``stability``: the share of the k reasons that stay when the numbers of an alert
    are changed a little, and ``first``: how often the first reason stays; None where that was not tried. ``noise``: relative.
    """

    alerts: tuple[tuple[Reason, ...], ...]
    scores: FeatureScores
    names: tuple[str, ...]
    k: int
    stability: Mean | None
    first: Mean | None
    noise: float
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.alerts)

    def sentences(self, alert: int) -> str:
        """Why this alert (its place) was raised, one line for each reason."""
        if not -len(self) <= alert < len(self):
            raise InputError(f"alert={alert}", f"a place below {len(self)}", "found.sentences(0)")
        e = self.scores
        opening = f"{self.names[alert]}: {e.target} is {number(float(e.output[alert]))}; against {e.baseline} it is {number(float(e.baseline_output[alert]))}."
        lines = [f"  {place}. {reason}" for place, reason in enumerate(self.alerts[alert], start=1)]
        return "\n".join([opening, *(lines or ["  Nothing raised it above what it is compared with."])])

    def queue(self, depth: int = 1) -> dict[tuple[str, ...], tuple[int, ...]]:
        """Alerts that belong together: the places of those with the same first ``depth`` reasons (in any order), the largest group first."""
        if not 1 <= depth <= self.k:
            raise InputError(f"depth={depth}", f"from 1 to the {self.k} reasons that were asked for", "found.queue(2)")
        keys = [tuple(sorted(reason.name for reason in alert[:depth])) for alert in self.alerts]
        return {key: tuple(i for i, one in enumerate(keys) if one == key) for key, _ in Counter(keys).most_common()}

    def recall(self, truth: Sequence[Any], k: int | None = None) -> Mean:
        """How often the known cause of an alert (a name, or several, for each) is among its first k reasons: the share of the causes found."""
        if len(truth) != len(self):
            raise InputError(f"{len(truth)} causes for {len(self)} alerts", "one (or several names) for each", "found.recall(planted)")
        causes = [{one} if isinstance(one, str) else set(one) for one in truth]
        if not all(causes) or (unknown := set().union(*causes) - set(self._columns)):
            raise InputError(
                "an alert without a cause" if not all(causes) else f"the cause {min(unknown)!r}", f"one of {', '.join(self._columns[:8])}", "name columns or groups"
            )
        return mean_of(np.array([len(cause & {r.name for r in alert[: k or self.k]}) / len(cause) for cause, alert in zip(causes, self.alerts, strict=True)]))

    @property
    def _columns(self) -> list[str]:
        return views(self.scores)[0].parts()

    def __repr__(self) -> str:
        common = "; ".join(f"{' and '.join(key) or 'nothing'}: {len(ids):,}" for key, ids in list(self.queue().items())[:4])
        steady = "" if self.stability is None else f"; {self.stability} of the top {self.k} stay under ±{percent(self.noise)} noise"
        return f"Reasons({len(self):,} alerts by first reason: {common}{steady}; {self.scores.target} against {self.scores.baseline})"

    def table(self, k: int = 15) -> report.Table:
        """Alerts by first reason: how many, and their mean output; the k largest groups."""
        groups = list(self.queue().items())
        shown = groups[:k] if len(groups) <= k else [*groups[: k - 1], ((f"{len(groups) - k + 1} others",), tuple(i for _, ids in groups[k - 1 :] for i in ids))]
        rows = [(" and ".join(key) or "nothing raised it", f"{len(ids):,}", number(float(self.scores.output[list(ids)].mean()))) for key, ids in shown]
        return report.Table(("first reason", "alerts", "mean output"), tuple(rows))

    def alert(self, place: int) -> report.Table:
        """The reasons of one alert, as a table for a page."""
        rows = [(r.name, r.value, r.typical, signed(r.push) + (" (doubtful)" if r.doubtful else ""), percent(r.share)) for r in self.alerts[place]]
        return report.Table(("reason", "value", "among the legitimate", "push", "of what raised it"), tuple(rows))

    def sections(self, alerts: int = 8) -> tuple[report.Section, ...]:
        """For a page: the queue, then the first few alerts."""
        steady = (
            []
            if self.stability is None
            else [f"Under ±{percent(self.noise)} noise {self.stability} of the top {self.k} reasons stay, and {self.first} of the first ones."]
        )
        some = [part for i in range(min(alerts, len(self))) for part in (report.Prose(self.sentences(i).splitlines()[0]), self.alert(i))]
        return (
            report.Section("Alerts by their first reason", "\n\n".join([READING, *steady, *self.notes]), (self.table(),)),
            report.Section("Alert by alert", f"{min(alerts, len(self))} of {len(self):,}.", tuple(some)),
        )

    def to_frame(self) -> pandas.DataFrame:
        """One row for each alert and reason. Needs pandas."""
        rows = [(name, place, *reason) for name, alert in zip(self.names, self.alerts, strict=True) for place, reason in enumerate(alert, start=1)]
        return pandas_library().DataFrame(rows, columns=["alert", "place", "reason", "push", "share", "stderr", "value", "typical"])

    def to_html(self, path: str | Path, alerts: int = 8) -> Path:
        """Write one self-contained page. Raises InputError, StorageError."""
        return report.write(report.Page("Why these alerts?", f"{len(self):,} alerts: {self.scores.target} against {self.scores.baseline}", self.sections(alerts)), path)


READING = (
    "A reason is a part of the input that raised the output above what it is for legitimate rows. It says what the model went by, not what the sender or the "
    "customer did, and another choice of legitimate rows gives other reasons: keep that choice, and its version, with the alert."
)


def reasons(
    model: Any,
    alerts: Any = None,
    legitimate: Any = None,
    *,
    k: int = 3,
    threshold: float | None = None,
    count: int = 32,
    groups: Any = None,
    noise: float = 0.01,
    draws: int = 5,
    feature_names: Sequence[str] | None = None,
    alert_names: Sequence[str] | None = None,
    seed: int = 0,
    **settings: Any,
) -> Reasons:
    """For each alert the k parts of its input that raised the output most, against a legitimate population.

    Args:
        model: whatever ``hw.explain`` takes; explain log-odds or a margin, not a probability, where the class is rare. Or FeatureScores of the alerts
            (then stability is not tried, and ``legitimate`` is used for words alone).
        alerts: (n, p), the rows that were flagged.
        legitimate: (m, p), rows that are known to be legitimate. ``count`` of them are drawn as baselines.
        threshold: the output at which an alert is raised: rows near it are drawn, and weighted so that their mean output is this
            (:class:`hw.baselines.calibrated`): the reasons account for the excess above it, and say what sets the alert apart from legitimate rows that were
            almost flagged. Some legitimate row's output must be above it. Default: the plain mean of rows drawn at random.
        groups: columns that are one thing (one-hot columns, a panel of measurements): a name for each column, or a dict from a name to columns.
        noise: stability: numbers are multiplied by 1 ± up to this, ``draws`` times; whole-number columns are rounded again. 0 leaves it out.
        settings: further arguments of ``explain``: target, tolerance, ...

    Raises InputError for what does not fit, before any work.

    >>> e = FeatureScores(np.array([[2.0, -1.0, 1.0]]), np.zeros(1), np.zeros(1, int), np.array([2.0]), np.zeros(1), "", "log-odds", "legitimate rows")
    >>> found = reasons(e, k=2, feature_names=["amount", "age", "hour"])
    >>> [reason.name for reason in found.alerts[0]]
    ['amount', 'hour']
    """
    if k < 1 or count < 1 or draws < 1 or not 0 <= noise < 1:
        raise InputError(f"k={k}, count={count}, draws={draws}, noise={noise}", "at least one of each, and noise below 1", "k=3, count=32, noise=0.01")
    if isinstance(model, FeatureScores):
        if settings or threshold is not None:
            raise InputError("scores, and arguments of explain", "one of the two", "reasons(scores, k=3), or reasons(model, alerts, legitimate)")
        scores, again, notes = model, None, []
        alerts = alerts if alerts is not None or not isinstance(scores.inputs, np.ndarray) else scores.inputs
    else:
        alerts, legitimate = _both(alerts, legitimate)
        asked = _asked(model, legitimate, threshold, count, seed, {"feature_names": feature_names, **settings})
        scores, again = asked(alerts), asked if noise else None
        notes = [] if threshold is None else [f"The legitimate rows are weighted so that their mean output is the threshold, {threshold:g}."]
    columns = _columns(scores, alerts, feature_names)
    folded = scores if groups is None else scores.group(groups)
    names = tuple(alert_names) if alert_names is not None else scores.example_names or tuple(f"alert {i}" for i in range(scores.n))
    if len(names) != scores.n:
        raise InputError(f"{len(names)} alert_names for {scores.n} alerts", "one each", "name every alert, or none")
    parts = list(columns) if groups is None else views(folded)[0].parts()
    words = _Words(alerts, legitimate, columns, _members(groups, columns, parts))
    stability = first = None
    if again is not None:
        kept = _kept(np.asarray(folded.values), alerts, again, groups, k, noise, draws, seed)
        stability, first = mean_of(kept[0]), mean_of(kept[1])
    folded = folded if folded.feature_names is not None else replace(folded, feature_names=tuple(parts))
    told = tuple(_told(folded, i, parts, words, k) for i in range(scores.n))
    return Reasons(told, folded, tuple(map(str, names)), k, stability, first, noise, (*notes, *scores.notes))


# ---- the explanation ------------------------------------------------------------------------------------------------------------


def _both(alerts: Any, legitimate: Any) -> tuple[Any, Any]:
    if alerts is None or legitimate is None:
        raise InputError("a model without alerts or without legitimate rows", "both", "reasons(model, alerts, legitimate)")
    alerts, legitimate = table_of(alerts, "alerts"), table_of(legitimate, "legitimate")
    if alerts.shape[1] != legitimate.shape[1]:
        raise InputError(f"{alerts.shape[1]} columns of alerts and {legitimate.shape[1]} of legitimate rows", "the same columns", "cut both from one table")
    return alerts, legitimate


def _asked(model: Any, legitimate: Any, threshold: float | None, count: int, seed: int, settings: dict[str, Any]) -> Callable[[Any], FeatureScores]:
    """Explain rows against some of the legitimate ones, weighted to the threshold where there is one."""
    settings = {"progress": False, "seed": seed, **{name: value for name, value in settings.items() if value is not None}}
    order = np.random.default_rng(seed).permutation(legitimate.shape[0])
    if threshold is None:
        drawn = rows_of(legitimate, np.sort(order[:count]))
        baseline: Any = baselines.dataset(drawn, drawn.shape[0])
    else:
        pool = rows_of(legitimate, np.sort(order[:POOL]))
        outputs = explain(model, pool, baseline=rows_of(pool, np.arange(1)), **settings).output
        near = _near(outputs, float(threshold), count, seed)
        drawn = rows_of(pool, near)
        baseline = baselines.calibrated(drawn, outputs[near], float(threshold))
    named = f"{drawn.shape[0]} legitimate rows" + ("" if threshold is None else f" weighted to the threshold {threshold:g}")
    return lambda X: replace(explain(model, X, baseline=baseline, **settings), baseline=named)


def _near(outputs: np.ndarray, threshold: float, count: int, seed: int) -> np.ndarray:
    """Places of about ``count`` rows, drawn with the weights that give a mean output at the threshold, and both extremes, so that it stays within reach.

    Raises InputError where no row's output is above the threshold.
    """
    ends = {int(outputs.argmin()), int(outputs.argmax())}
    if not outputs.min() < threshold < outputs.max():
        given = f"threshold={threshold:g} and {len(outputs):,} legitimate rows with outputs from {outputs.min():g} to {outputs.max():g}"
        raise InputError(given, "a threshold between them", "leave threshold out: the reasons then account for all that is above the legitimate mean")
    every = baselines.calibrated(np.arange(len(outputs), dtype=float)[:, None], outputs, threshold)
    weights = every.references((torch.zeros(1, 1, dtype=torch.float64),), seed).weights.numpy()
    drawn = np.random.default_rng([seed, 1]).choice(len(outputs), min(count, int((weights > 0).sum())), replace=False, p=weights)
    return np.array(sorted(ends | set(drawn.tolist())))


def _columns(scores: FeatureScores, alerts: Any, feature_names: Sequence[str] | None) -> tuple[str, ...]:
    if not isinstance(scores.values, np.ndarray) or scores.values.ndim != 2:
        raise InputError("scores that are no table (alerts, columns)", "one value for each alert and column", "fold them: scores.group(...)")
    if alerts is not None and table_of(alerts, "alerts").shape != scores.values.shape:
        raise InputError(f"alerts of shape {tuple(table_of(alerts).shape)} and scores of shape {scores.values.shape}", "the rows that were explained", "pass those rows")
    return names_of(scores.values, feature_names if feature_names is not None else scores.feature_names)


def _kept(values: np.ndarray, alerts: Any, again: Any, groups: Any, k: int, noise: float, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the share of the k reasons that stay, and (n,) how often the first does, over draws of noise."""
    rng = np.random.default_rng([seed, 2])
    before = _top(values, k)
    shares, firsts = np.zeros(len(values)), np.zeros(len(values))
    for _ in range(draws):
        scores = again(_noisy(alerts, noise, rng))
        after = _top(np.asarray((scores if groups is None else scores.group(groups)).values), k)
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            shares[i] += len(set(a) & set(b)) / max(len(a), len(b)) if a or b else 1.0
            firsts[i] += a[:1] == b[:1]
    return shares / draws, firsts / draws


def _top(values: np.ndarray, k: int) -> list[list[int]]:
    """For each row the places of its k largest values above 0."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return [[j for j in row.tolist() if values[i, j] > 0] for i, row in enumerate(order)]


def _noisy(X: Any, noise: float, rng: np.random.Generator) -> Any:
    """Numbers times 1 ± up to ``noise``; columns of whole numbers are rounded, text stays."""
    found: dict[int, np.ndarray] = {}
    for j in range(X.shape[1]):
        values = column(X, j)
        if numeric(values) and values.dtype.kind != "b":
            moved = values * (1 + noise * rng.uniform(-1, 1, len(values)))
            whole = values.dtype.kind in "iu" or bool((values == np.rint(values)).all())
            found[j] = (np.rint(moved) if whole else moved).astype(values.dtype)
    if tables.is_frame(X):
        copy = X.copy()
        for j, values in found.items():
            copy.isetitem(j, values)
        return copy
    moved = np.column_stack([found.get(j, column(X, j)) for j in range(X.shape[1])])
    if tables.is_sparse(X):
        from scipy.sparse import csr_array

        return csr_array(moved)
    return X.new_tensor(moved) if hasattr(X, "new_tensor") else moved.astype(X.dtype)


# ---- words ----------------------------------------------------------------------------------------------------------------------


def _told(scores: FeatureScores, i: int, parts: Sequence[str], words: _Words, k: int) -> tuple[Reason, ...]:
    values = np.asarray(scores.values)[i]
    up = float(values[values > 0].sum())
    error = None if scores.stderr is None else np.asarray(scores.stderr)[i]
    chosen = _top(values[None], k)[0]
    return tuple(Reason(parts[j], float(values[j]), float(values[j]) / up, None if error is None else float(error[j]), *words(parts[j], i)) for j in chosen)


def _members(groups: Any, columns: Sequence[str], parts: Sequence[str]) -> dict[str, list[int]]:
    """Which columns each part is made of."""
    places = {name: j for j, name in enumerate(columns)}
    if groups is None:
        return {name: [j] for name, j in places.items()}
    if isinstance(groups, Mapping):
        found = {str(name): _places(which, places, len(columns)) for name, which in groups.items()}
    else:
        found = {str(name): [j for j, one in enumerate(groups) if one == name] for name in dict.fromkeys(groups)}
    rest = sorted(set(range(len(columns))) - {j for ids in found.values() for j in ids})
    return {name: found.get(name, rest) for name in parts}


def _places(which: Any, places: Mapping[str, int], count: int) -> list[int]:
    given = np.asarray(which)
    if given.dtype == bool:
        return np.flatnonzero(given).tolist()
    return [places[one] if isinstance(one, str) else int(one) % count for one in given.tolist()]


class _Words:
    """What an alert has, and what is typical of the legitimate rows."""

    def __init__(self, alerts: Any, legitimate: Any, columns: Sequence[str], members: dict[str, list[int]]) -> None:
        self.alerts, self.legitimate, self.columns, self.members = alerts, legitimate, columns, members
        self.seen: dict[int, np.ndarray] = {}

    def __call__(self, part: str, i: int) -> tuple[str, str]:
        """The value of alert i, and the typical one, both in words."""
        if self.alerts is None:
            return "as it is", ""
        members = self.members[part]
        if len(members) == 1:
            return self._single(members[0], i)
        held = np.array([column(columns_of(rows_of(self.alerts, np.array([i])), [j]), 0)[0] for j in members], dtype=object)
        if self._one_hot(members, held):
            return self._category(part, members, held)
        return f"a group of {len(members)} columns", "differs by column"

    def _normal(self, j: int) -> np.ndarray | None:
        if self.legitimate is not None and j not in self.seen:
            self.seen[j] = column(self.legitimate, j)
        return self.seen.get(j)

    def _single(self, j: int, i: int) -> tuple[str, str]:
        value, normal = column(rows_of(self.alerts, np.array([i])), j)[0], self._normal(j)
        if not numeric(np.asarray(value)):
            if normal is None:
                return str(value), ""
            most, times = Counter(normal.tolist()).most_common(1)[0]
            return str(value), f"{most} in {percent(times / len(normal))}, this in {percent(float(np.mean(normal == value)))}"
        if normal is None:
            return plain(float(value)), ""
        return plain(float(value)), _place(float(value), normal[normal == normal].astype(float))

    def _one_hot(self, members: list[int], held: np.ndarray) -> bool:
        normal = [self._normal(j) for j in members]
        columns = [values for values in normal if values is not None]
        flags = all(numeric(np.asarray(v)) and v in (0, 1) for v in held) and all(numeric(v) and np.isin(v, (0, 1)).all() for v in columns)
        return flags and sum(map(float, held)) <= 1 and (not columns or bool((np.column_stack(columns).sum(1) <= 1).all()))

    def _category(self, part: str, members: list[int], held: np.ndarray) -> tuple[str, str]:
        short = [self.columns[j].removeprefix(part).lstrip("_=: ") or self.columns[j] for j in members]
        value = next((name for name, flag in zip(short, held, strict=True) if flag), "none of them")
        normal = [self._normal(j) for j in members]
        if any(values is None for values in normal):
            return value, ""
        shares = np.array([np.mean(values) for values in normal if values is not None])
        own = 1 - float(shares.sum()) if value == "none of them" else float(shares[short.index(value)])
        most = int(shares.argmax())
        return value, f"{short[most]} in {percent(float(shares[most]))}, this in {percent(own)}"


def _place(value: float, normal: np.ndarray) -> str:
    """Where a number stands among legitimate ones.

    >>> _place(5.0, np.array([1.0, 2.0, 3.0, 4.0])), _place(1.0, np.array([0.0, 0.0, 0.0, 1.0]))
    ('typically 2.5, all are lower', '0 in 75 %, this high in 25 %')
    """
    if not len(normal):
        return "never with a value"
    below, above = float(np.mean(normal < value)), float(np.mean(normal > value))
    where = f"this high in {percent(1 - below)}" if below >= above else f"this low in {percent(1 - above)}"
    where = "all are lower" if below == 1 else "all are higher" if above == 1 else where
    kinds, counts = np.unique(normal, return_counts=True)
    if counts.max() > len(normal) / 2:
        return f"{plain(float(kinds[counts.argmax()]))} in {percent(float(counts.max()) / len(normal))}, {where}"
    return f"typically {plain(float(np.median(normal)))}, {where}"


def plain(value: float) -> str:
    """A value as one would write it.

    >>> plain(15024.0), plain(0.123456), plain(2.5)
    ('15,024', '0.123', '2.5')
    """
    if value != value:
        return "missing"
    if value == round(value) and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
