"""Fairness between groups: which columns carry the difference of a model's mean output, and are the groups treated by the same rules?

    found = audit.gap(model, X, group, baseline={"all": hw.baselines.dataset(X, 16), "men": hw.baselines.dataset(X[group == "Male"], 16)})
    found.table; audit.equal_treatment(found.scores["all"], group)

Evidence about a model and a sample, and no certificate: baselines, the way columns are cut and the sample change the answer, which is why two
baselines stand side by side (Evidence for such dependence: arXiv 2505.00802).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from headwater import report
from headwater.audit.intervals import chance_of, holm
from headwater.audit.rows import labels_of, rows_of, table_of
from headwater.errors import InputError, MissingExtra
from headwater.evaluate.means import Mean
from headwater.evaluate.mislabels import auroc
from headwater.features import baselines, tables, targets
from headwater.features.explain import explain
from headwater.report.numbers import number, signed
from headwater.result import FeatureScores
from headwater.result.frames import pandas_library
from headwater.result.views import views

if TYPE_CHECKING:
    import pandas

BASELINES = 16
"""Rows that a default baseline compares with."""
AT_ONCE = 1 << 24
"""Numbers of a resampling held at once, at most."""
CERTIFICATE = (
    "This is evidence about one model and one sample. It says which columns carry a difference of outputs; it does not say whether the difference "
    "is justified, nor what would happen in the world if a column changed."
)


# ---- the gap --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parts:
    """One gap, cut into columns, against one baseline.

    ``values`` (p,): ``mean of φ_j in the first group - mean in the second``. ``low``, ``high`` (p,): 95 % bootstrap over rows, within the groups.
    ``p`` (p,): two-sided, by shuffling the groups; ``corrected`` (p,): for the number of columns (Holm). ``medians`` (p,): the difference of the
    medians of φ_j, which sum to nothing and heed no outliers. ``before``: the difference that is there at the baselines already (0 where the groups
    share them). ``residual``: what the integration missed: ``gap = Σ values + before - residual``, but for rounding.
    """

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    corrected: np.ndarray
    medians: np.ndarray
    before: float
    residual: float

    @property
    def order(self) -> np.ndarray:
        """(p,) the columns from the largest part to the smallest, whatever its sign."""
        return np.argsort(-np.abs(self.values), kind="stable")


@dataclass(frozen=True, eq=False)
class Gap:
    """The difference of a mean output between two groups, and the columns that carry it (see :func:`gap`).

    ``groups``: (first, second); ``sizes``: how many rows of each. ``gap``: mean output of the first minus that of the second, with its bootstrap
    interval; ``p``: of the gap itself, by shuffling the groups. ``parts[baseline]``: its cut into columns. ``scores[baseline]``: the explanation
    of the rows that were compared.
    """

    groups: tuple[str, str]
    sizes: tuple[int, int]
    names: tuple[str, ...]
    gap: Mean
    p: float
    parts: dict[str, Parts]
    scores: dict[str, FeatureScores]
    unit: str
    notes: tuple[str, ...] = ()

    def carriers(self, level: float = 0.05, baseline: str | None = None) -> tuple[str, ...]:
        """The columns whose part is not by chance at this level after correction, largest first; without a baseline: under every one of them."""
        found = [self.parts[self._known(baseline)]] if baseline is not None else list(self.parts.values())
        kept = np.all([part.corrected <= level for part in found], axis=0)
        return tuple(self.names[j] for j in found[0].order if kept[j])

    def _known(self, baseline: str) -> str:
        if baseline not in self.parts:
            raise InputError(f"baseline={baseline!r}", f"one of {', '.join(self.parts)}", "name the baseline")
        return baseline

    def __repr__(self) -> str:
        said = []
        for name, part in self.parts.items():
            top = ", ".join(f"{self.names[j]} {signed(part.values[j])}" for j in part.order[:3])
            said.append(f"against {name}: {top}")
        counts = f"{self.sizes[0]:,} and {self.sizes[1]:,} rows"
        return f"Gap({self.unit}, {self.groups[0]} minus {self.groups[1]}: {self.gap}, p {number(self.p)}, {counts}; {'; '.join(said)}; evidence, no certificate)"

    def table(self, baseline: str | None = None, k: int = 20) -> report.Table:
        """The k largest parts; the last rows make up the sum."""
        name = self._known(baseline or next(iter(self.parts)))
        part = self.parts[name]
        rows = [
            (
                self.names[j],
                signed(part.values[j]),
                f"{signed(part.low[j])} to {signed(part.high[j])}",
                number(part.p[j]),
                number(part.corrected[j]),
                signed(part.medians[j]),
            )
            for j in part.order[:k]
        ]
        if len(self.names) > k:
            rows.append((f"{len(self.names) - k} others together", signed(float(part.values[part.order[k:]].sum())), "", "", "", ""))
        if part.before:
            rows.append(("there at the baselines", signed(part.before), "", "", "", ""))
        rows.append(
            ("sum: the gap", signed(float(part.values.sum()) + part.before - part.residual), f"{signed(self.gap.low)} to {signed(self.gap.high)}", number(self.p), "", "")
        )
        return report.Table(("column", f"part of the gap, against {name}", "95 %", "p", "p corrected", "of medians"), tuple(rows))

    def bars(self, baseline: str | None = None, k: int = 12) -> report.Bars:
        """The k largest parts, with their intervals."""
        name = self._known(baseline or next(iter(self.parts)))
        part = self.parts[name]
        rows = tuple(report.Bar(self.names[j], float(part.values[j]), float(part.low[j]), float(part.high[j])) for j in part.order[:k])
        return report.Bars(rows, axis=f"part of the gap in {self.unit}, {self.groups[0]} minus {self.groups[1]}, against {name}", best="")

    @property
    def section(self) -> report.Section:
        """For a page."""
        opening = f"Mean {self.unit}: {self.groups[0]} minus {self.groups[1]} is {self.gap} ({self.sizes[0]:,} and {self.sizes[1]:,} rows)."
        parts = [made for name in self.parts for made in (self.bars(name), self.table(name))]
        return report.Section("Which columns carry the gap?", "\n\n".join([opening, CERTIFICATE, *self.notes]), tuple(parts))

    def to_frame(self) -> pandas.DataFrame:
        """One row for each baseline and column. Needs pandas."""
        pandas = pandas_library()
        found = []
        for name, part in self.parts.items():
            columns = {field: getattr(part, field) for field in ("values", "low", "high", "p", "corrected", "medians")}
            found.append(pandas.DataFrame({"baseline": name, "column": list(self.names), **columns}))
        return pandas.concat(found, ignore_index=True)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page. Raises InputError, StorageError."""
        return report.write(report.Page(f"{self.groups[0]} and {self.groups[1]}", "Which columns carry the difference of a mean output", (self.section,)), path)


def gap(
    model: Any,
    X: Any = None,
    group: Any = None,
    *,
    pair: tuple[Any, Any] | None = None,
    baseline: Any = None,
    labels: Any = None,
    given: Any = None,
    groups: Any = None,
    bootstrap: int = 1000,
    permutations: int = 1000,
    seed: int = 0,
    **settings: Any,
) -> Gap:
    """Which columns carry the difference of the mean output between two groups: ``mean_A φ_j - mean_B φ_j``.

    The parts sum to ``mean_A f - mean_B f`` by completeness, if the groups share their baselines; else what the baselines differ by is a part of
    its own. (The decomposition is Lundberg's, Explaining quantitative measures of fairness, 2020, there with SHAP.) A part says that the model's use
    of this column differs between the groups' rows, through the column's values or through others; it is not a causal effect.

    Args:
        model: whatever ``hw.explain`` takes, with X; or FeatureScores, or a dict of them by the name of their baseline.
        X: (n, p), the rows to compare: held-out ones. The group itself may be one of the columns, or none.
        group: (n,) the group of each row. Two of them, or ``pair=(first, second)`` of more; the gap is the first's mean minus the second's (in
            sorted order where no pair is given).
        baseline: one, or a dict of several by name. Default, two: rows of X of both groups ("all rows"), and rows of the second group.
        given: (n,) booleans: compare only these rows. ``given=y == 1`` is the gap among those whose true answer is 1, as equal opportunity asks
            (Hardt et al. 2016, arXiv 1610.02413).
        groups: fold columns together first, as :meth:`FeatureScores.group` does.
        labels: (n,) true classes: the gap is then one of the *error*, one minus the probability of the right answer. Exact for trees, but slow there
            (a link stands behind them): some hundred rows, few baselines. Baselines have an error for each label, so that groups with other shares
            of the classes differ "at the baselines" already.
        settings: further arguments of ``explain``. Any other loss is a target (``hw.targets.loss`` of a network) or a function to explain.

    All rows of X are explained, whichever are compared.

    Raises InputError for groups of fewer than two rows.

    >>> rows = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    >>> found = gap(FeatureScores(rows, np.zeros(4), np.zeros(4, int), rows.sum(1), np.zeros(4), "", "f", "zeros"), group=["a", "a", "b", "b"])
    >>> found.gap.mean, found.parts["zeros"].values
    (1.0, array([1., 0.]))
    """
    if isinstance(model, FeatureScores):
        model = {model.baseline: model}
    known = isinstance(model, Mapping) and all(isinstance(scores, FeatureScores) for scores in model.values())
    if known and not model:
        raise InputError("no scores", "at least one explanation", 'gap({"all rows": e}, group=group)')
    if known and (X is not None or baseline is not None or settings):
        raise InputError("scores, and what to explain", "one of the two", "gap(scores, group=group), or gap(model, X, group)")
    n = next(iter(model.values())).n if known else len(_rows(X))
    if min(bootstrap, permutations) < 1:
        raise InputError(f"bootstrap={bootstrap}, permutations={permutations}", "at least one of each", "1000 of each")
    theirs, kept, chosen = _compared(group, n, pair, given)
    first = theirs == chosen[0]
    if labels is not None and known:
        raise InputError("scores, and labels", "a model", "gap(model, X, group, labels=y)")
    asked = settings if labels is None else _error(model, labels, n, settings)
    found = _of_rows(model, kept) if known else _explained(model, X, kept, first, chosen, baseline, asked)
    found = found if labels is None else {name: _turned(scores) for name, scores in found.items()}
    found = {str(name): _tabular(scores if groups is None else scores.group(groups)) for name, scores in found.items()}
    _same(found)
    one = next(iter(found.values()))
    columns = np.column_stack([one.output, *(values_of(scores) for scores in found.values())])  # the gap itself first
    low, high = np.percentile(np.concatenate([w @ columns for w in _redrawn(first, bootstrap, seed)]), [2.5, 97.5], axis=0)
    observed = _difference(columns, first)
    p = chance_of(np.abs(observed), np.abs(np.concatenate([w @ columns for w in _shuffled(first, permutations, seed)])))
    count = values_of(one).shape[1]
    where = {name: slice(1 + k * count, 1 + (k + 1) * count) for k, name in enumerate(found)}
    return Gap(
        (str(chosen[0]), str(chosen[1])),
        (int(first.sum()), int((~first).sum())),
        tuple(views(one)[0].parts()),
        Mean(float(observed[0]), float(low[0]), float(high[0]), len(first)),
        float(p[0]),
        {name: _parts(scores, first, low[where[name]], high[where[name]], p[where[name]]) for name, scores in found.items()},
        found,
        one.target,
        tuple(dict.fromkeys(note for scores in found.values() for note in scores.notes)),
    )


def values_of(scores: FeatureScores) -> np.ndarray:
    """(n, p) of a table's scores."""
    return np.asarray(scores.values, dtype=float)


def _parts(scores: FeatureScores, first: np.ndarray, low: np.ndarray, high: np.ndarray, p: np.ndarray) -> Parts:
    values = values_of(scores)
    before, residual = (float(_difference(v[:, None], first)[0]) for v in (scores.baseline_output, scores.residual))
    shared = float(np.ptp(scores.baseline_output)) <= 1e-9 * max(1.0, float(np.abs(scores.baseline_output).max()))
    medians = np.median(values[first], axis=0) - np.median(values[~first], axis=0)
    return Parts(_difference(values, first), low, high, p, holm(p), medians, 0.0 if shared else before, residual - (before if shared else 0.0))


def _difference(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    return np.asarray(values[first].mean(0) - values[~first].mean(0))


def _redrawn(first: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (some, n) of weights, whose product with values is the difference of means over rows redrawn within each group."""
    rng = np.random.default_rng([seed, 0])
    for size in _blocks(count, len(first)):
        weights = np.empty((size, len(first)))
        for ids, sign in ((np.flatnonzero(first), 1), (np.flatnonzero(~first), -1)):
            weights[:, ids] = sign * rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size) / len(ids)
        yield weights


def _shuffled(first: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    """The same for groups of the same sizes drawn at random."""
    rng = np.random.default_rng([seed, 1])
    plain = np.where(first, 1 / first.sum(), -1 / (~first).sum())
    for size in _blocks(count, len(first)):
        yield rng.permuted(np.broadcast_to(plain, (size, len(first))), axis=1)


def _blocks(count: int, n: int) -> list[int]:
    step = max(1, AT_ONCE // n)
    return [min(step, count - done) for done in range(0, count, step)]


# ---- equal treatment ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EqualTreatment:
    """Whether the groups can be told apart by how the model treats their rows (see :func:`equal_treatment`).

    ``auc``: of telling them apart by the attributions, on rows the classifier did not see; ``p``: by shuffling those rows' groups. ``by_output``:
    the same from the output alone (unequal outputs); ``by_inputs``: from the inputs (None where the scores hold none): how far the groups differ at all,
    which no model can help. ``weights``: of the columns in the classifier, standardised; None where it has none.
    """

    groups: tuple[str, str]
    auc: float
    p: float
    by_output: tuple[float, float]
    by_inputs: tuple[float, float] | None
    names: tuple[str, ...]
    weights: np.ndarray | None
    held: int

    def __repr__(self) -> str:
        inputs = "" if self.by_inputs is None else f", from the inputs {self.by_inputs[0]:.3f}"
        telling = "" if self.weights is None else f"; telling: {', '.join(self.names[j] for j in np.argsort(-np.abs(self.weights), kind='stable')[:3])}"
        return (
            f"EqualTreatment({self.groups[0]} or {self.groups[1]} from the attributions: AUC {self.auc:.3f}, p {number(self.p)} on {self.held:,} held-out rows; "
            f"from the output {self.by_output[0]:.3f}{inputs}{telling}; equal treatment: 0.5)"
        )

    @property
    def table(self) -> report.Table:
        """For a report."""
        rows = [("attributions", self.auc, self.p), ("output alone", *self.by_output), *([("inputs", *self.by_inputs)] if self.by_inputs else [])]
        return report.Table(("group told from", "AUC", "p"), tuple((name, f"{a:.3f}", number(p)) for name, a, p in rows))


def equal_treatment(
    scores: FeatureScores,
    group: Any,
    *,
    pair: tuple[Any, Any] | None = None,
    given: Any = None,
    classifier: Any = None,
    held: float = 0.5,
    permutations: int = 1000,
    seed: int = 0,
) -> EqualTreatment:
    """Can a classifier tell the group from the attributions? If it can, the model treats the groups' rows by different reasons.

    The explanation's two-sample test (Mougan et al. 2023, arXiv 2303.08040). Equal *outputs* do not suffice: two groups can get the same mean for
    different reasons, which this sees. The p-value shuffles the groups of the held-out rows, which no training depends on.

    Args:
        scores: of held-out rows (n, p). group, pair, given: as in :func:`gap`.
        classifier: with ``fit`` and ``predict_proba`` or ``decision_function``; default: logistic regression on standardised attributions (needs
            scikit-learn). It sees differences of means; one of trees sees others too.
        held: share of the rows on which it is measured.

    Raises InputError, MissingExtra.
    """
    labels, kept, chosen = _compared(group, scores.n, pair, given)
    if not 0 < held < 1:
        raise InputError(f"held={held}", "a share between 0 and 1", "held=0.5")
    scores = _tabular(scores.at(kept))
    first = labels == chosen[0]
    rng = np.random.default_rng(seed)
    test = _halved(first, held, rng)
    told_by = {"phi": values_of(scores), "output": scores.output[:, None]}
    if isinstance(scores.inputs, np.ndarray) and scores.inputs.shape == told_by["phi"].shape:
        told_by["inputs"] = np.nan_to_num(np.asarray(scores.inputs, dtype=float))
    found = {name: _told_apart(_classifier(classifier), values, first, test, permutations, rng) for name, values in told_by.items()}
    weights = found["phi"][2]
    return EqualTreatment(
        (str(chosen[0]), str(chosen[1])),
        *found["phi"][:2],
        found["output"][:2],
        found["inputs"][:2] if "inputs" in found else None,
        tuple(views(scores)[0].parts()),
        weights,
        int(test.sum()),
    )


def _classifier(given: Any) -> Any:
    try:
        from sklearn.base import clone
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("a classifier of groups without scikit-learn", "scikit-learn", "pip install 'headwater[trees]'") from error
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)) if given is None else clone(given)


def _halved(first: np.ndarray, held: float, rng: np.random.Generator) -> np.ndarray:
    """(n,) which rows are held out: the same share of both groups, at least one of each on either side."""
    test = np.zeros(len(first), bool)
    for ids in (np.flatnonzero(first), np.flatnonzero(~first)):
        test[rng.permutation(ids)[: min(len(ids) - 1, max(1, round(held * len(ids))))]] = True
    return test


def _told_apart(
    classifier: Any, values: np.ndarray, first: np.ndarray, test: np.ndarray, permutations: int, rng: np.random.Generator
) -> tuple[float, float, np.ndarray | None]:
    """AUC on the held-out rows, its p-value, and the weights of a logistic regression."""
    classifier.fit(values[~test], first[~test])
    score = classifier.decision_function(values[test]) if hasattr(classifier, "decision_function") else classifier.predict_proba(values[test])[:, 1]
    found, truth = auroc(score, first[test]), first[test]
    shuffled = np.array([auroc(score, rng.permutation(truth)) for _ in range(permutations)])
    weights = getattr(classifier[-1] if hasattr(classifier, "steps") else classifier, "coef_", None)
    return found, float(chance_of(np.array(found), shuffled)), None if weights is None else np.asarray(weights)[0]


# ---- what is compared -----------------------------------------------------------------------------------------------------------


def _rows(X: Any) -> Any:
    if X is None:
        raise InputError("a model and no rows", "X, the rows to compare", "gap(model, X, group)")
    return range(table_of(X).shape[0])


def _compared(group: Any, n: int, pair: tuple[Any, Any] | None, given: Any) -> tuple[np.ndarray, np.ndarray, tuple[Any, Any]]:
    """The groups of the rows that are compared (m,), their places (m,), and the two groups in order."""
    if group is None:
        raise InputError("no group", "the group of each row, (n,)", "gap(model, X, group)")
    labels = labels_of(group, n, "group")
    kinds = np.unique(labels)
    if pair is None:
        if len(kinds) != 2:
            shown = ", ".join(map(repr, kinds.tolist()[:8]))
            raise InputError(f"{len(kinds)} groups: {shown}", "two groups, or the pair that is meant", f"pair=({kinds[0]!r}, {kinds[-1]!r})")
        pair = (kinds[0], kinds[1])
    if len(pair) != 2 or pair[0] == pair[1] or not all((labels == one).any() for one in pair):
        raise InputError(f"pair={pair!r}", f"two of {', '.join(map(repr, kinds.tolist()[:8]))}", "pair=(first, second)")
    allowed = np.ones(n, bool) if given is None else labels_of(given, n, "given")
    if allowed.dtype != bool:
        raise InputError(f"given of type {allowed.dtype}", "True or False for each row", "given=y == 1")
    kept = np.flatnonzero(allowed & ((labels == pair[0]) | (labels == pair[1])))
    for one in pair:
        if (labels[kept] == one).sum() < 2:
            raise InputError(f"{int((labels[kept] == one).sum())} rows of the group {one!r}", "at least two", "compare more rows")
    return labels[kept], kept, pair


def _of_rows(model: Mapping[str, FeatureScores], kept: np.ndarray) -> dict[str, FeatureScores]:
    return {name: scores.at(kept) for name, scores in model.items()}


def _explained(model: Any, X: Any, kept: np.ndarray, first: np.ndarray, pair: tuple[Any, Any], baseline: Any, settings: dict[str, Any]) -> dict[str, FeatureScores]:
    """All rows of X are explained, whichever are compared, so that a target or a baseline for each row stays with its row."""
    X = table_of(X)
    if baseline is None:
        rows = rows_of(X, kept)
        other = rows_of(rows, np.flatnonzero(~first))
        baseline = {
            "all rows": baselines.dataset(rows, min(BASELINES, rows.shape[0])),
            f"rows of {pair[1]}": baselines.dataset(other, min(BASELINES, other.shape[0])),
        }
    several = isinstance(baseline, Mapping) and baseline and not (tables.is_frame(X) and set(baseline) == set(X.columns))
    held = dict(baseline) if several else {"the baseline": baseline}
    return {str(name): explain(model, X, baseline=one, progress=False, **settings).at(kept) for name, one in held.items()}


def _error(model: Any, labels: Any, n: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What to ask of ``explain`` for the probability of the right answer."""
    if {"target", "output"} & set(settings):
        raise InputError("labels, and a target or an output", "one of the two", "labels= explains the expected error, target= what it names")
    y = labels_of(labels, n)
    if y.dtype.kind == "f":
        raise InputError(
            "labels that are floats", "classes", "for a regression explain its loss: target=hw.targets.loss(function, y) of a network, or a function of the table"
        )
    return settings | ({"target": targets.probability(y)} if isinstance(model, nn.Module) else {"target": y, "output": "probability"})


def _turned(scores: FeatureScores) -> FeatureScores:
    """One minus what was explained."""
    return replace(
        scores,
        values=-values_of(scores),
        residual=-scores.residual,
        output=1 - scores.output,
        baseline_output=1 - scores.baseline_output,
        target="expected error (one minus the probability of the right answer)",
    )


def _tabular(scores: FeatureScores) -> FeatureScores:
    """Raise InputError where the values are no table."""
    if not isinstance(scores.values, np.ndarray) or scores.values.ndim != 2:
        raise InputError("scores that are no table (n, columns)", "one value for each row and column", "fold them: groups=, or scores.group(...)")
    return scores


def _same(found: Mapping[str, FeatureScores]) -> None:
    """Raise InputError where explanations are not of the same outputs and columns."""
    one = next(iter(found.values()))
    for name, scores in found.items():
        shapes = [values_of(each).shape for each in (scores, one)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{name}: scores of shape {shapes[0]} beside {shapes[1]}", "one shape", "explain the same rows and columns")
        if not np.allclose(scores.output, one.output, rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(one.output).max()))):
            raise InputError(f"{name}: other outputs than the first explanation's", "the same model, rows and target", "only the baseline may differ")


# ---- subgroups ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Disparity:
    """Where the use of a column differs most from everyone's (see :func:`disparity`): ``rows``: (subgroup, column, its mean φ there minus
    everywhere, rows, corrected p), largest difference first."""

    rows: tuple[tuple[str, str, float, int, float], ...]
    skipped: int
    smallest: int

    def __repr__(self) -> str:
        said = "; ".join(f"{c} in {s} ({n:,} rows): {signed(v)}, p {number(p)}" for s, c, v, n, p in self.rows[:3])
        return f"Disparity({said}; {self.skipped} subgroups below {self.smallest} rows left out)"

    def table(self, k: int = 10) -> report.Table:
        """The k largest."""
        rows = tuple((s, c, signed(v), f"{n:,}", number(p)) for s, c, v, n, p in self.rows[:k])
        return report.Table(("subgroup", "column", "mean push minus everyone's", "rows", "p corrected"), rows)


def disparity(scores: FeatureScores, groups: Mapping[str, Sequence[Any]], *, smallest: int = 50, permutations: int = 1000, seed: int = 0) -> Disparity:
    """Over all intersections of groups with enough rows: which column's mean φ differs most there from its mean over all rows?

    A search over many subgroups always finds something; the p-values are those of the *largest* difference over all columns and subgroups, in units of
    its own spread, when rows are shuffled (max-T, Westfall and Young 1993), so 5 % of them are below 0.05 when there is nothing. (The question: Chang et al. 2023,
    arXiv 2303.01704.)

    Args:
        groups: by name the label of each row: ``{"sex": X["sex"], "age": np.where(X["age"] < 40, "young", "old")}``.
        smallest: rows that a subgroup must have; smaller ones are counted and left out.
    """
    scores = _tabular(scores)
    if not groups:
        raise InputError("no groups", "at least one label for each row", '{"sex": X["sex"]}')
    labels = [np.array([f"{name} {v}" for v in labels_of(given, scores.n, name).tolist()], dtype=object) for name, given in groups.items()]
    whole = np.array([" and ".join(row) for row in zip(*labels, strict=True)])
    kinds, where, counts = np.unique(whole, return_inverse=True, return_counts=True)
    kept = np.flatnonzero((counts >= smallest) & (counts < scores.n))
    if not len(kept):
        raise InputError(f"no subgroup of {smallest} rows beside others", "at least one", "smallest=20, or fewer groups")
    values = values_of(scores)
    off = values - values.mean(0)
    spread = off.std(0)
    n, each = scores.n, counts[kept]
    scale = spread[None, :] * np.sqrt((1 / each - 1 / n) * n / max(1, n - 1))[:, None]  # standard error of a mean drawn without replacement

    def standard(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = np.zeros((len(kinds), values.shape[1]))
        np.add.at(sums, where, off[order])
        mean = sums[kept] / each[:, None]
        return mean, np.abs(np.divide(mean, scale, out=np.zeros_like(mean), where=scale > 0))

    rng = np.random.default_rng(seed)
    means, sizes = standard(np.arange(n))
    largest = np.array([standard(rng.permutation(n))[1].max() for _ in range(permutations)])
    p = (1 + (largest[:, None, None] >= sizes - 1e-12).sum(0)) / (1 + permutations)
    names = views(scores)[0].parts()
    order = np.argsort(-np.abs(means).ravel(), kind="stable")
    rows = [(str(kinds[kept[i]]), names[j], float(means[i, j]), int(each[i]), float(p[i, j])) for i, j in (divmod(int(k), means.shape[1]) for k in order)]
    return Disparity(tuple(rows), int((counts < smallest).sum()), smallest)
