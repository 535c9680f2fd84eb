"""A fitted pipeline's steps, walked with the rows themselves: which original column each column comes from, and what mixes them.

Rows are transformed by the library. As long as every column comes from one original column, nothing needs to be known of a step but that.
From the first step that mixes columns on, a :class:`~.maps.Map` records how; it is compared with what the library gives for these rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from headwater.errors import InputError
from headwater.features import tables
from headwater.features.kernels.estimators import named_kernel
from headwater.features.pipelines.maps import Affine, Array, Fourier, Landmarks, Map, Monomials, UnitLength, beside, composed

ONE_EACH = ("StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler", "QuantileTransformer", "PowerTransformer", "OrdinalEncoder", "Binarizer")
EVEN = ("StandardScaler", "MaxAbsScaler", "RobustScaler", "MinMaxScaler")
MIXING = (
    "PCA",
    "IncrementalPCA",
    "TruncatedSVD",
    "FactorAnalysis",
    "FastICA",
    "LinearDiscriminantAnalysis",
    "GaussianRandomProjection",
    "SparseRandomProjection",
    "FeatureAgglomeration",
    "PLSRegression",
)
STRAIGHT = (*EVEN, "SimpleImputer", "OneHotEncoder", "OrdinalEncoder", "FunctionTransformer")
"""Steps that leave a straight path straight, or whose columns are no numbers before; a FunctionTransformer is looked at apart."""
VECTORIZERS = ("CountVectorizer", "TfidfVectorizer", "HashingVectorizer")
LARGE = 1 << 27
"""Numbers in a dense table, at most."""


@dataclass
class State:
    """Rows on their way through a pipeline.

    ``data``: as the library has them now. ``u`` (m, p): their numbers before the first mixing step, each from the original column
    ``owners`` (p,) says. ``map``: from u to the numbers of data; None while they are the same. ``bent``: steps that bend a straight path.
    """

    data: Any
    owners: Array
    u: Array | None = None
    map: Map | None = None
    bent: tuple[str, ...] = ()
    checked: tuple[str, ...] = field(default=())

    @property
    def numbers(self) -> Array:
        """u, which is data as long as nothing is mixed."""
        return dense(self.data) if self.u is None else self.u


def dense(data: Any) -> Array:
    """As float64 (m, columns). Raises InputError where that is too large, or not numbers."""
    if data.shape[0] * data.shape[1] > LARGE:
        raise InputError(f"a table of {data.shape[0]:,} by {data.shape[1]:,} numbers between two steps", f"at most {LARGE:,} numbers", "explain fewer rows at once")
    return tables.numbers(data)


def advance(step: Any, state: State) -> State:
    """The rows after one more step. Raises InputError, naming it, where the step cannot be followed."""
    kind = type(step).__name__
    if step is None or (isinstance(step, str) and step == "passthrough"):
        return state
    if kind == "Pipeline":
        for _, inner in step.steps:
            state = advance(inner, state)
        return state
    if kind == "ColumnTransformer":
        return _columns(step, state)
    if kind == "FeatureUnion":
        return _union(step, state)
    out = step.transform(state.data)
    if state.map is None:
        sources = _sources(step, kind, state, out)
        if sources is not None:
            if len(sources) != out.shape[1]:
                raise refused(step, f"whose {out.shape[1]} columns do not match the {len(sources)} expected")
            chooses = type(step).__module__.startswith("sklearn.feature_selection")
            bends = (kind not in STRAIGHT and not chooses) or (kind == "FunctionTransformer" and step.func is not None) or (kind == "MinMaxScaler" and step.clip)
            verified = (*state.checked, kind) if kind == "FunctionTransformer" and step.func is not None else state.checked
            return State(out, state.owners[sources], bent=(*state.bent, kind) if bends else state.bent, checked=verified)
    return _mixed(step, kind, state, out)


def refused(step: Any, why: str) -> InputError:
    """The error for a step that cannot be followed."""
    return InputError(
        f"a pipeline with {type(step).__name__}, {why}",
        "steps that treat columns apart, and mixing steps with a known gradient before a kernel machine, linear model or perceptron",
        "explain the pipeline as a function of its columns: hw.explain(pipeline.predict_proba, X, target=1), or pipeline.predict",
    )


# ---- steps that keep columns apart ----------------------------------------------------------------------------------------------


def _sources(step: Any, kind: str, state: State, out: Any) -> Array | None:
    """For each column that comes out, the column that it was made of; None: of several."""
    count = state.data.shape[1]
    every = np.arange(count)
    if kind in ONE_EACH or (kind == "FunctionTransformer" and step.func is None):
        return every
    if kind == "FunctionTransformer" and out.shape == state.data.shape and _apart(step, state.data, out):
        return every
    if kind == "OneHotEncoder":
        return np.repeat(every, _one_hot_counts(step))
    if kind == "KBinsDiscretizer":
        return every if step.encode == "ordinal" else np.repeat(every, step.n_bins_)
    if kind in ("SplineTransformer", "TargetEncoder"):
        return np.repeat(every, out.shape[1] // count)
    if kind in ("SimpleImputer", "MissingIndicator"):
        return _imputed(step, kind, every)
    if hasattr(step, "get_support") and type(step).__module__.startswith("sklearn.feature_selection"):
        return np.asarray(step.get_support(indices=True))
    if len(set(state.owners.tolist())) == 1 and kind not in MIXING:
        return np.zeros(out.shape[1], dtype=int)  # whatever it does, all of it comes from one original column
    return None


def _one_hot_counts(step: Any) -> list[int]:
    """How many columns each category column becomes."""
    rare = getattr(step, "infrequent_categories_", None) if step.min_frequency is not None or step.max_categories is not None else None
    counts = []
    for j, categories in enumerate(step.categories_):
        merged = 0 if rare is None or rare[j] is None else len(rare[j]) - 1
        dropped = step.drop_idx_ is not None and step.drop_idx_[j] is not None
        counts.append(len(categories) - merged - dropped)
    return counts


def _imputed(step: Any, kind: str, every: Array) -> Array:
    if kind == "MissingIndicator":
        return np.asarray(step.features_)
    empty = np.array([isinstance(value, float) and np.isnan(value) for value in step.statistics_.tolist()])
    kept = every if step.keep_empty_features or step.strategy == "constant" else every[~empty]
    return kept if step.indicator_ is None else np.concatenate([kept, step.indicator_.features_])


def _apart(step: Any, data: Any, out: Any) -> bool:
    """Whether, on these rows, a change of one column changes that column alone."""
    before, m = dense(out), data.shape[0]
    for j in range(data.shape[1]):
        shifted = data.copy()
        if tables.is_frame(shifted):
            shifted.isetitem(j, shifted.iloc[np.roll(np.arange(m), 1), j].to_numpy())
        else:
            shifted[:, j] = shifted[np.roll(np.arange(m), 1), j]
        after = dense(step.transform(shifted))
        others = np.arange(before.shape[1]) != j
        if not np.array_equal(after[:, others], before[:, others], equal_nan=True):
            return False
    return True


# ---- steps that mix them --------------------------------------------------------------------------------------------------------


def _mixed(step: Any, kind: str, state: State, out: Any) -> State:
    map_ = _map(step, kind, state)
    if map_ is None:
        raise refused(step, "whose columns cannot be traced to the columns they come from")
    found = replace(state, data=out, u=state.numbers, map=composed(state.map, map_))
    check(step, found)
    return found


def check(step: Any, state: State) -> None:
    """Raise InputError unless the map gives what the library gives."""
    if state.map is None:
        return
    own, library = state.map.forward(state.numbers), dense(state.data)
    if own.shape != library.shape or not np.allclose(own, library, rtol=1e-6, atol=1e-6 * np.abs(library).max(initial=1e-300)):
        raise refused(step, "which does not give what its fitted attributes say")


def _map(step: Any, kind: str, state: State) -> Map | None:
    module = type(step).__module__
    even = kind in MIXING or (state.map is not None and (kind in EVEN or module.startswith("sklearn.feature_selection")))
    if even and module.startswith("sklearn."):
        count = state.data.shape[1]
        probe = np.concatenate([np.zeros((1, count)), np.eye(count)])
        ends = dense(step.transform(type(state.data)(probe, columns=state.data.columns) if tables.is_frame(state.data) else probe))
        return Affine((ends[1:] - ends[:1]).T, ends[0])
    if kind == "PolynomialFeatures":
        return Monomials(step.powers_)
    if kind == "Normalizer" and step.norm == "l2":
        return UnitLength()
    if kind == "RBFSampler":
        return Fourier(step.random_weights_, step.random_offset_)
    if kind == "Nystroem":
        gamma = step.gamma if step.gamma is not None else 1.0 if step.kernel == "chi2" else 1.0 / state.data.shape[1]
        shift, degree = (default if value is None else value for value, default in ((step.coef0, 1.0), (step.degree, 3)))
        return Landmarks(named_kernel(step, step.kernel, gamma, degree, shift), dense(step.components_), step.normalization_)
    return None


# ---- groups of columns ----------------------------------------------------------------------------------------------------------


def _columns(step: Any, state: State) -> State:
    """A ColumnTransformer: each transformer with its columns, side by side."""
    if state.map is not None:
        raise refused(step, "which comes after a step that mixes columns")
    parts = []
    for name, inner, chosen in step.transformers_:
        places = positions(chosen, state.data)
        if (isinstance(inner, str) and inner == "drop") or not len(places):
            continue
        data = _select(state.data, places, isinstance(chosen, str | int) and name != "remainder")
        if len(np.shape(data)) == 1:
            parts.append(_vectorized(inner, data, state.owners[places[0]]))
        else:
            parts.append(advance(inner, State(data, state.owners[places])))
        weight = (step.transformer_weights or {}).get(name, 1.0)
        if weight != 1.0:
            raise refused(step, "with transformer_weights")
    return _joined(step, step.transform(state.data), parts, state)


def _union(step: Any, state: State) -> State:
    """A FeatureUnion: each transformer with all columns, side by side."""
    if state.map is not None or step.transformer_weights:
        raise refused(step, "which comes after a step that mixes columns, or has transformer_weights")
    parts = [advance(inner, State(state.data, state.owners)) for _, inner in step.transformer_list if not (isinstance(inner, str) and inner == "drop")]
    return _joined(step, step.transform(state.data), parts, state)


def _joined(step: Any, out: Any, parts: list[State], before: State) -> State:
    owners = np.concatenate([part.owners for part in parts])
    bent, checked = (tuple(dict.fromkeys(kind for part in parts for kind in getattr(part, name))) for name in ("bent", "checked"))
    map_ = beside([(part.map, len(part.owners), part.data.shape[1]) for part in parts])
    if len(owners) != out.shape[1] and map_ is None:
        raise refused(step, f"whose {out.shape[1]} columns do not match the {len(owners)} expected")
    u = None if map_ is None else np.concatenate([part.numbers for part in parts], 1)
    found = State(out, owners, u, map_, before.bent + bent, before.checked + checked)
    check(step, found)
    return found


def _vectorized(step: Any, column: Any, owner: int) -> State:
    """A column of texts, handed over as such: whatever is made of it comes from that column."""
    data: Any = column
    for inner in [inner for _, inner in step.steps] if type(step).__name__ == "Pipeline" else [step]:
        data = data if isinstance(inner, str) or inner is None else inner.transform(data)
    return State(data, np.full(data.shape[1], owner), bent=(type(step).__name__,))


def positions(chosen: Any, data: Any) -> Array:
    """What a ColumnTransformer's column specification means: names, places, a slice, a mask."""
    count = data.shape[1]
    if callable(chosen):
        chosen = chosen(data)
    labels = list(data.columns) if tables.is_frame(data) else list(range(count))
    if isinstance(chosen, slice):
        if isinstance(chosen.start, str) or isinstance(chosen.stop, str):
            first, last = (labels.index(end) if end is not None else default for end, default in ((chosen.start, 0), (chosen.stop, count - 1)))
            return np.arange(first, last + 1)
        return np.arange(count)[chosen]
    chosen = [chosen] if isinstance(chosen, str | int) else list(chosen)
    if chosen and all(isinstance(one, bool | np.bool_) for one in chosen):
        return np.flatnonzero(chosen)
    return np.array([labels.index(one) if isinstance(one, str) else int(one) % count for one in chosen], dtype=int)


def _select(data: Any, places: Array, single: bool) -> Any:
    if tables.is_frame(data):
        return data.iloc[:, int(places[0])] if single else data.iloc[:, places]
    return data[:, int(places[0])] if single else data[:, places]


# ---- texts ----------------------------------------------------------------------------------------------------------------------


def is_text(inputs: Any) -> bool:
    """A list, an array or a series of strings."""
    rows = inputs.tolist() if hasattr(inputs, "tolist") and len(np.shape(inputs)) == 1 else inputs
    return isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0 and all(isinstance(row, str) for row in rows)


def flattened(steps: Sequence[tuple[str, Any]]) -> list[Any]:
    """Steps of nested pipelines in a row, without those that do nothing."""
    out: list[Any] = []
    for _, step in steps:
        if type(step).__name__ == "Pipeline":
            out += flattened(step.steps)
        elif step is not None and not (isinstance(step, str) and step == "passthrough"):
            out.append(step)
    return out
