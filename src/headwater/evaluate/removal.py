"""What happens to the output as parts are taken away, or given back, in the order of their scores?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater import report
from headwater.errors import InputError
from headwater.evaluate.means import Mean, mean_of, written
from headwater.evaluate.parts import arrays_of, parts_of
from headwater.evaluate.probes import Network
from headwater.evaluate.subject import Subject, subject_of
from headwater.features import quadrature
from headwater.features.explain import explain
from headwater.result.frames import pandas_library

if TYPE_CHECKING:
    import pandas

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Of DeYoung et al. 2019: how much of the input a rationale may hold."""
UNDEFINED = 0.1
"""An example whose ``|f(x) - f(b)|`` is below this share of the median has no normalised curve."""
GOOD = {
    "deletion": "low: the output falls at once",
    "insertion": "high: the output returns at once",
    "comprehensiveness": "high: the output is lost without the top parts",
    "sufficiency": "low: the top parts alone keep the output",
}
_LARGER = {"insertion": True, "comprehensiveness": True, "deletion": False, "sufficiency": False}
_GIVES = ("insertion", "sufficiency")  # the top parts are what stays


@dataclass(frozen=True, eq=False)
class Compared:
    """Another ranking on the same examples and fill.

    ``values`` (n,): its figures. ``line`` (s,): its mean curve. ``advantage``: mean of the paired differences, signed so that above 0 means
    that the judged scores are better.
    """

    values: np.ndarray
    mean: Mean
    line: np.ndarray
    advantage: Mean


@dataclass(frozen=True, eq=False)
class Removal:
    """A removal metric (see :func:`deletion`, :func:`insertion`, :func:`comprehensiveness`, :func:`sufficiency`).

    ``shares`` (s,): of the parts that were removed (or kept). ``outputs`` (n, s): f there. ``output``, ``filled`` (n,): f(x) and f at the fill.
    ``values`` (n,): the figure of each example, NaN where it is undefined. ``against``: other rankings.
    """

    kind: str
    shares: np.ndarray
    outputs: np.ndarray
    output: np.ndarray
    filled: np.ndarray
    values: np.ndarray
    mean: Mean
    line: np.ndarray
    against: dict[str, Compared]
    method: str
    fill: str
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        others = "".join(f"; {name} {written(c.mean.mean)}, better by {c.advantage}" for name, c in self.against.items())
        left = f"; {len(self.values) - self.mean.examples} examples undefined" if self.mean.examples < len(self.values) else ""
        return f"Removal({self.kind} of {self.method}: {self.mean}, fill {self.fill}{others}{left}; good: {GOOD[self.kind]})"

    @property
    def curve(self) -> report.Curve:
        """Mean curves, for a report."""
        lines = [report.Series(self.method, self.shares.tolist(), self.line.tolist())]
        lines += [report.Series(name, self.shares.tolist(), c.line.tolist(), "reference") for name, c in self.against.items()]
        named = {"deletion": "of the parts replaced", "insertion": "of the parts given back", "comprehensiveness": "top parts replaced", "sufficiency": "top parts kept"}
        unit = "(f - f(fill)) / (f(x) - f(fill))" if self.kind in ("deletion", "insertion") else "fall of f"
        return report.Curve(tuple(lines), report.Axis(named[self.kind], 0.0, None, "percent"), report.Axis(unit))

    @property
    def bars(self) -> report.Bars:
        """This and the other rankings with their intervals, for a report."""
        rows = [(self.method, self.mean), *((name, c.mean) for name, c in self.against.items())]
        kept = [report.Bar(name, m.mean, *m.bounds) for name, m in rows if not np.isnan(m.mean)]
        best = max(kept, key=lambda bar: (1 if _LARGER[self.kind] else -1) * (bar.value or 0.0), default=None)
        return report.Bars(tuple(kept), best=None if best is None else best.label)

    def to_frame(self) -> pandas.DataFrame:
        """One row for each example and share: example, share, output, normalised. Needs pandas."""
        n, s = self.outputs.shape
        columns = {"example": np.repeat(np.arange(n), s), "share": np.tile(self.shares, n), "output": self.outputs.ravel()}
        return pandas_library().DataFrame({**columns, "normalised": _normalised(self.outputs, self.output, self.filled).ravel()})


def deletion(
    scores: Any,
    model: Any,
    inputs: Any = None,
    target: Any = None,
    *,
    fill: Any = None,
    parts: Any = None,
    steps: int = 20,
    against: Mapping[str, Any] | None = None,
    random: int = 3,
    extra: Any = None,
    output: str | None = None,
    batch_size: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Removal:
    """The deletion curve (Petsiuk et al. 2018, arXiv 1806.07421): parts are replaced, the highest score first.

    ``AUC = ∫₀¹ (f(x_s) - f(b)) / (f(x) - f(b)) ds``, with ``x_s`` the input whose top share s of parts is replaced with the fill b; trapezoids.
    Good: low, and well below a random ranking on the same examples (for a linear model whose parts have equal scores it is 0.5). Where
    ``f(x) < f(b)`` the order is reversed, so that the parts that carried the change still go first. Examples whose change is below 10 % of the
    median change are undefined: NaN, counted.

    Caveat: replaced inputs may be like nothing that the model has seen, and then the curve measures that. Ask for several fills
    (:func:`removal`), and read differences between rankings, not the number itself. A good curve does not make the scores causes: complete,
    linear attributions can be no better than chance at counterfactual behaviour (Bilodeau et al. 2022, arXiv 2212.11870).

    Args:
        scores: FeatureScores, or an array like the inputs (a tuple or dict of them); may lack channels. See ``parts``.
        model, inputs, target, extra, output: as given to ``hw.explain``; ``inputs`` default to those that the scores hold (not
            for a function, whose inputs may be tensors or arrays).
        fill: what a removed part becomes: None (the baseline of the scores, else zeros), a number, an array, a token id for ids, or one of
            ``hw.baselines``: ``mean(train)``, ``blur(4)``, ``uniform()``, ``dataset(train, 32)`` (f is averaged over its points).
            Texts: ``inputs=dict(tokenizer(texts, padding=True, return_tensors="pt"))`` with ``fill=tokenizer.mask_token_id``; special tokens,
            padding and masks stay as they are.
        parts: None (each score), a whole number c (cells of c by c pixels, channels together), or labels of superpixels, columns or words.
        steps: intervals of the curve; no more than there are parts.
        against: scores to compare with, by name. Random rankings always are, and |gradient| and gradient x input for networks.
        random: how many random rankings are averaged.
        batch_size: changed inputs at a time. ``bootstrap``, ``seed``: of the intervals and of all chance.

    Raises InputError for scores of other inputs or of another target. NotFinite.

    >>> e = explain(lambda X: X @ [3.0, 1.0], np.ones((2, 2)), progress=False)
    >>> deletion(e, lambda X: X @ [3.0, 1.0], np.ones((2, 2))).line
    array([1.  , 0.25, 0.  ])
    """
    return _area("deletion", locals())


def insertion(
    scores: Any,
    model: Any,
    inputs: Any = None,
    target: Any = None,
    *,
    fill: Any = None,
    parts: Any = None,
    steps: int = 20,
    against: Mapping[str, Any] | None = None,
    random: int = 3,
    extra: Any = None,
    output: str | None = None,
    batch_size: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Removal:
    """The insertion curve (Petsiuk et al. 2018, arXiv 1806.07421): parts return to the fill, the highest score first.

    Good: high, and well above a random ranking. Everything else, the caveat too, as in :func:`deletion`.

    >>> f = lambda X: X @ [3.0, 1.0]
    >>> insertion(np.array([[3.0, 1.0]]), f, np.ones((1, 2))).line
    array([0.  , 0.75, 1.  ])
    """
    return _area("insertion", locals())


def comprehensiveness(
    scores: Any,
    model: Any,
    inputs: Any = None,
    target: Any = None,
    *,
    fill: Any = None,
    parts: Any = None,
    shares: Sequence[float] = SHARES,
    against: Mapping[str, Any] | None = None,
    random: int = 3,
    extra: Any = None,
    output: str | None = None,
    batch_size: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Removal:
    r"""The fall of f without the top k % of parts (DeYoung et al. 2019, arXiv 1911.03429): ``f(x) - f(x \ top k %)``, averaged over ``shares``.

    In units of f: the paper takes the probability of the predicted class (``target=hw.targets.probability(label)``). Good: high: the top parts were
    needed. A share holds at least one part. Arguments and caveat as in :func:`deletion`; there is no normalisation and no reversal here.

    >>> comprehensiveness(np.array([[3.0, 1.0]]), lambda X: X @ [3.0, 1.0], np.ones((1, 2))).values
    array([3.])
    """
    return _rationale("comprehensiveness", locals())


def sufficiency(
    scores: Any,
    model: Any,
    inputs: Any = None,
    target: Any = None,
    *,
    fill: Any = None,
    parts: Any = None,
    shares: Sequence[float] = SHARES,
    against: Mapping[str, Any] | None = None,
    random: int = 3,
    extra: Any = None,
    output: str | None = None,
    batch_size: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Removal:
    """The fall of f with nothing but the top k % of parts (DeYoung et al. 2019, arXiv 1911.03429): ``f(x) - f(top k %)``, averaged over ``shares``.

    Good: low: the top parts are enough. Everything else, the caveat too, as in :func:`comprehensiveness`.

    >>> sufficiency(np.array([[3.0, 1.0]]), lambda X: X @ [3.0, 1.0], np.ones((1, 2))).values
    array([1.])
    """
    return _rationale("sufficiency", locals())


@dataclass(frozen=True, eq=False)
class Removals:
    """Deletion and insertion under several fills (see :func:`removal`): ``found[kind, fill]``."""

    found: dict[tuple[str, str], Removal]

    def __repr__(self) -> str:
        return "Removals(\n" + "\n".join(f"  {name}: {r!r}" for (_, name), r in self.found.items()) + "\n)"

    def __getitem__(self, key: tuple[str, str]) -> Removal:
        return self.found[key]

    @property
    def table(self) -> report.Table:
        """One row for each kind and fill, for a report."""
        names = list(dict.fromkeys(name for r in self.found.values() for name in r.against))
        rows = []
        for (kind, fill), r in self.found.items():
            others = [f"{written(r.against[name].mean.mean)} ({r.against[name].advantage})" if name in r.against else "" for name in names]
            rows.append((kind, fill, repr(r.mean), *others))
        return report.Table(("curve", "fill", "these scores", *(f"{name} (advantage)" for name in names)), tuple(rows))


def removal(scores: Any, model: Any, inputs: Any = None, target: Any = None, *, fills: Mapping[str, Any], **settings: Any) -> Removals:
    """Deletion and insertion with several fills at once: a ranking that is better under one fill alone is better at producing odd inputs.

    Args:
        fills: by name, each as ``fill=`` of :func:`deletion`: ``{"zeros": 0.0, "mean": hw.baselines.mean(train), "blur": hw.baselines.blur(4)}``.
        settings: everything else of :func:`deletion`.

    >>> found = removal(np.array([[3.0, 1.0]]), lambda X: X @ [3.0, 1.0], np.ones((1, 2)), fills={"zeros": 0.0, "half": 0.5})
    >>> found["deletion", "half"].line
    array([1.  , 0.25, 0.  ])
    """
    if not fills:
        raise InputError("no fills", "at least one, by name", 'fills={"zeros": 0.0}')
    kinds = {"deletion": deletion, "insertion": insertion}
    return Removals({(kind, name): how(scores, model, inputs, target, fill=fill, **settings) for name, fill in fills.items() for kind, how in kinds.items()})


# ---- how -------------------------------------------------------------------------------------------------------------------------


def _area(kind: str, given: dict[str, Any]) -> Removal:
    """The areas of deletion and insertion."""
    if given["steps"] < 1:
        raise InputError(f"steps={given['steps']}", "at least 1", "steps=20")
    subject = _subject(given)
    count = int(subject.parts.present.sum(1).max())
    shares = np.unique(np.rint(np.linspace(0, count, min(given["steps"], count) + 1))) / count
    way = np.where(subject.output < subject.filled, -1.0, 1.0)

    def figures(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        curves = _normalised(outputs, subject.output, subject.filled)
        return np.trapezoid(curves, shares, axis=1), curves

    return _result(kind, subject, given, shares, way, figures)


def _rationale(kind: str, given: dict[str, Any]) -> Removal:
    """The means of comprehensiveness and sufficiency."""
    shares = np.asarray(given["shares"], dtype=float)
    if shares.ndim != 1 or not len(shares) or not ((shares > 0) & (shares <= 1)).all():
        raise InputError(f"shares={given['shares']!r}", "shares of the parts, above 0 and up to 1", f"shares={SHARES}")
    subject = _subject(given)

    def figures(outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        falls = subject.output[:, None] - outputs
        return falls.mean(1), falls

    return _result(kind, subject, given, shares, np.ones(subject.n), figures)


def _subject(given: dict[str, Any]) -> Subject:
    if given["random"] < 1:
        raise InputError(f"random={given['random']}", "at least one random ranking", "random=3")
    return subject_of(*(given[name] for name in ("scores", "model", "inputs", "target", "fill", "parts", "extra", "output", "batch_size", "seed")))


def _result(kind: str, subject: Subject, given: dict[str, Any], shares: np.ndarray, way: np.ndarray, figures: Any) -> Removal:
    rng = np.random.default_rng(given["seed"])
    outputs = _outputs(kind, subject, subject.parts.scores * way[:, None], shares, rng)
    values, curves = figures(outputs)
    boot = (given["bootstrap"], given["seed"])
    others, notes = _others(subject, given, way, rng)
    against = {}
    for name, rankings in others.items():
        theirs = [figures(_outputs(kind, subject, ranking, shares, rng)) for ranking in rankings]
        other, line = (np.mean([t[k] for t in theirs], axis=0) for k in (0, 1))
        sign = 1 if _LARGER[kind] else -1
        against[name] = Compared(other, mean_of(other, *boot), _mean_line(line), mean_of(sign * (values - other), *boot))
    left = int(np.isnan(values).sum())
    notes += [f"{left} examples are undefined: their outputs hardly change between input and fill."] if left else []
    facts = (kind, shares, outputs, subject.output, subject.filled, values, mean_of(values, *boot), _mean_line(curves), against)
    return Removal(*facts, subject.method, subject.fill.name, (*subject.notes, *notes))


def _mean_line(curves: np.ndarray) -> np.ndarray:
    kept = curves[~np.isnan(curves).any(1)]
    return kept.mean(0) if len(kept) else np.full(curves.shape[1], np.nan)


def _outputs(kind: str, subject: Subject, ranking: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(n, s): f with the top ``shares`` of each example's parts replaced, or kept; equal scores in random order, parts it does not have last."""
    present = subject.parts.present
    order = np.lexsort((rng.random(ranking.shape), -ranking, ~present), axis=1)
    place = np.argsort(order, axis=1)
    own = present.sum(1)[:, None] * shares
    counts = np.rint(own) if kind in ("deletion", "insertion") else np.maximum(1, np.ceil(own - 1e-9))
    top = place[:, None, :] < counts[:, :, None]
    return subject.without(~top if kind in _GIVES else top)


def _normalised(outputs: np.ndarray, output: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """1 at f(x), 0 at the fill; NaN for examples that hardly change."""
    change = output - filled
    size = np.abs(change)
    defined = (size > 0) & (size >= UNDEFINED * np.median(size))
    return (outputs - filled[:, None]) / np.where(defined, change, np.nan)[:, None]


def _others(subject: Subject, given: dict[str, Any], way: np.ndarray, rng: np.random.Generator) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """Rankings to compare with, each (n, parts), by name; and what could not be compared."""
    shape = subject.parts.scores.shape
    found = {"random": [rng.random(shape) for _ in range(given["random"])]}
    probe, notes = subject.probe, []
    if isinstance(probe, Network) and all(t.is_floating_point() for t in probe.x):
        gradients = probe.gradient()
        sized = [g.abs().double().cpu().numpy() for g in gradients]
        times = [(g * t).double().cpu().numpy() for g, t in zip(gradients, probe.x, strict=True)]
        found["|gradient|"], found["gradient x input"] = [subject.parts.of(sized)], [subject.parts.of(times) * way[:, None]]
    elif isinstance(probe, Network):
        one = explain(given["model"], probe_inputs(given), given["target"], extra=given["extra"], rule=quadrature.right(1), progress=False)
        found["gradient x input"] = [parts_of(probe.own(arrays_of(one)), probe.x, given["parts"], subject.parts.movable).scores * way[:, None]]
    else:
        notes.append("The model is known by its values alone: there is no gradient to compare with.")
    for name, scores in (given["against"] or {}).items():
        other = parts_of(probe.own(arrays_of(scores)), probe.x, given["parts"], subject.parts.movable)
        if other.scores.shape != shape:
            sizes = [a.shape for a in arrays_of(scores)]
            raise InputError(f"scores {name!r} of shapes {sizes} to compare with", f"{shape[1]} parts, like the judged scores", "explain the same inputs, or give parts=")
        found[name] = [other.scores * way[:, None]]
    return found, notes


def probe_inputs(given: dict[str, Any]) -> Any:
    """The inputs as they were given, or as the scores hold them."""
    return given["scores"].inputs if given["inputs"] is None else given["inputs"]
