"""Does an input look attacked? Statistics of its explanation, a detector learned from them, and what that detector is worth.

    look = partial(adversarial.fingerprint, model, layers=["3"])              # how each prediction is carried
    benign = [look(images), look(images + noise)]                             # noise too: or the detector learns "not clean"
    d = adversarial.detector(benign, look(adversarial.fgsm(model, images, labels, 0.1).inputs))
    adversarial.detected(d(look(test)), {"PGD": d(look(attacked))}, {"noise of equal size": d(look(noisy))})

After ML-LOO (Yang et al. 2019, arXiv 1906.03499), where the dispersion of attributions tells attacked inputs apart. It *detects, never robust*:
explanations can be attacked like predictions (Ghorbani et al. 2017, arXiv 1710.10547), so a detector is to be judged by :func:`evading`
too, which knows it; and what it flags must not be noise or honest errors alone, which is what ``controls`` are for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater import report
from headwater.audit.attacks import Attacked, evading, fgsm, pgd
from headwater.audit.logistic import Logistic
from headwater.errors import InputError, NotFinite
from headwater.evaluate.means import Mean, written
from headwater.evaluate.mislabels import auroc
from headwater.features.baselines import references
from headwater.features.calls import Call, quiet
from headwater.features.explain import explain
from headwater.features.layers import Seat, Taps, layers_of, replaced, seats_of
from headwater.features.quadrature import Rule, gauss_legendre
from headwater.features.softening import Softening
from headwater.result import FeatureScores
from headwater.result.arrays import flattened, leaves

__all__ = ["Attacked", "Detected", "Detector", "Fingerprint", "detected", "detector", "evading", "fgsm", "fingerprint", "fingerprint_of", "pgd", "plain", "suspicion"]

DISPERSION = ("spread", "mass", "range", "kurtosis", "top 1 %", "top 10 %", "entropy", "negative")
"""Of the attributions φ (p,) of an input or a layer that sum to Δ: ``log std(φ) / |Δ|``; ``log Σ|φ| / |Δ|``; interquartile range / std;
``log`` kurtosis; share of ``Σ|φ|`` in the largest 1 % and 10 % of the parts; entropy of ``|φ| / Σ|φ|`` over ``log p``; share of ``Σ|φ|`` that is negative."""
QUALITY = ("change", "residual", "error", "evaluations")
"""Of the integration: ``log |Δ|``; ``log |residual / Δ|``; ``log`` of the estimated relative error; ``log2`` of the evaluations that the tolerance took,
which counts the kinks on the path. Only those that the scores have, and evaluations only where a tolerance was asked for."""
TINY = 1e-12  # where a logarithm would meet 0


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Statistics (n, s) of n explanations, named "place: statistic"; ``predicted`` (n,): the class explained, where it was the predicted one."""

    names: tuple[str, ...]
    values: np.ndarray
    predicted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def at(self, examples: Any) -> Fingerprint:
        """Those of some of the examples: numbers, or one True or False for each."""
        chosen = np.asarray(examples.cpu() if isinstance(examples, Tensor) else examples)
        return Fingerprint(self.names, self.values[chosen], None if self.predicted is None else self.predicted[chosen])


def fingerprint(
    model: Any,
    inputs: Any,
    *,
    target: Any = None,
    baseline: Any = None,
    layers: Sequence[Any] = (),
    rule: Rule | None = None,
    tolerance: float | None = None,
    max_evaluations: int | None = None,
    batch_size: int | None = None,
) -> Fingerprint:
    """Explain each input's *predicted* class (whoever detects does not know the right one), at the input and at some layers, and describe how
    it is carried: the statistics of :data:`DISPERSION` at each place and of :data:`QUALITY` at the input.

    Args:
        target: what is explained instead; needed where the model is no classifier.
        layers: of the model, as ``layer=`` of ``hw.explain`` takes them.
        rule: default Gauss-Legendre with 16 points. With a ``tolerance`` the input is explained to that instead, and ``evaluations`` counts.

    Raises what ``hw.explain`` raises.
    """
    call = Call.of(model, inputs, None)
    predicted = None
    if target is None:
        predicted = target = _predicted(call, batch_size or 256)
    fixed = rule or gauss_legendre(16)
    asked = {"rule": fixed} if tolerance is None else {"tolerance": tolerance, "max_evaluations": max_evaluations}
    settings = {"baseline": baseline, "batch_size": batch_size, "progress": False}
    found = explain(model, inputs, target, **asked, **settings)
    inner = {str(layer): explain(model, inputs, target, layer=layer, rule=fixed, **settings) for layer in layers}
    described = fingerprint_of(found, inner)
    return Fingerprint(described.names, described.values, predicted)


def fingerprint_of(scores: FeatureScores, layers: Mapping[str, FeatureScores] | None = None) -> Fingerprint:
    """The statistics of explanations that are there already: of the inputs, and of layers by name."""
    places = {"input": scores, **(layers or {})}
    change = _change(torch.from_numpy(scores.output - scores.baseline_output))
    columns, names = [], []
    for place, found in places.items():
        if found.n != scores.n:
            raise InputError(f"{found.n} explanations of {place} beside {scores.n} of the inputs", "those of the same examples", "explain the same inputs")
        flat = np.concatenate([flattened(a) for a in leaves(found.values)], 1).astype(np.float64)
        columns.append(dispersion(torch.from_numpy(flat), change).numpy())
        names += [f"{place}: {name}" for name in DISPERSION]
    quality = _quality(scores, change.numpy())
    values = np.concatenate([*columns, np.stack(list(quality.values()), 1)], 1)
    if not np.isfinite(values).all():
        raise NotFinite("explanations with NaN or infinity", "finite scores", "explain again, and look at the notes")
    return Fingerprint((*names, *(f"input: {name}" for name in quality)), values)


def dispersion(values: Tensor, change: Tensor) -> Tensor:
    """(n, 8) the statistics of :data:`DISPERSION` of attributions (n, p); differentiable almost everywhere. ``change`` (n,): what they sum to, > 0."""
    p = values.shape[1]
    if p < 2:
        raise InputError("explanations with a single part", "at least two parts, whose scores can be spread", "explain inputs or layers with more parts")
    sizes, ordered = values.abs().sort(1, descending=True).values, values.sort(1).values
    mass = sizes.sum(1) + TINY
    away = values - values.mean(1, keepdim=True)
    std = (away.square().mean(1) + TINY**2).sqrt()
    share = values.abs() / mass[:, None]
    columns = (
        (std / change).log(),
        (mass / change).log(),
        (_quantile(ordered, 0.75) - _quantile(ordered, 0.25)) / std,
        ((away / std[:, None]) ** 4).mean(1).clamp_min(TINY).log(),
        sizes[:, : max(1, p // 100)].sum(1) / mass,
        sizes[:, : max(1, p // 10)].sum(1) / mass,
        -(share * (share + TINY).log()).sum(1) / float(np.log(p)),
        (-values).clamp_min(0).sum(1) / mass,
    )
    return torch.stack(columns, 1)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    place = share * (ordered.shape[1] - 1)
    low = int(place)
    high = min(low + 1, ordered.shape[1] - 1)
    return ordered[:, low] + (place - low) * (ordered[:, high] - ordered[:, low])


def _change(difference: Tensor) -> Tensor:
    return difference.abs() + TINY


def _quality(scores: FeatureScores, change: np.ndarray) -> dict[str, np.ndarray]:
    found = {"change": np.log(change), "residual": np.log(np.abs(scores.residual) / change + TINY)}
    if scores.error is not None:
        found["error"] = np.log(scores.error + TINY)
    if scores.converged is not None:
        found["evaluations"] = np.log2(np.maximum(scores.evaluations, 1))
    return found


def _predicted(call: Call, batch_size: int) -> np.ndarray:
    logits = _logits(call, batch_size)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise InputError(f"outputs of shape {tuple(logits.shape)}", "logits (n, classes), of which the largest is explained", "say what is explained: target=0")
    return logits.argmax(1).cpu().numpy()


def _logits(call: Call, batch_size: int) -> Tensor:
    with quiet(call.model), torch.no_grad():
        rows = torch.arange(call.n, device=call.device)
        return torch.cat([call(tuple(t[s] for t in call.tensors), s) for s in rows.split(batch_size)])


def plain(model: Any, inputs: Any, batch_size: int = 256) -> dict[str, np.ndarray]:
    """Suspicions (n,) that need no explanation, to compare a detector with.

    ``"softmax"``: minus the largest softmax probability (Hendrycks and Gimpel 2016, arXiv 1610.02136). ``"margin"``: minus the distance of the two
    largest logits. ``"roughness"``: mean absolute difference of neighbours along the last axis, which never looks at the model; where it does as
    well as a detector, the attack is seen in the input and no explanation is needed.
    """
    call = Call.of(model, inputs, None)
    logits = _logits(call, batch_size).double()
    two = logits.topk(2, 1).values
    x = call.tensors[0].double()
    rough = x.diff(dim=-1).abs().flatten(1).mean(1)
    found = {"softmax": -logits.softmax(1).max(1).values, "margin": two[:, 1] - two[:, 0], "roughness": rough}
    return {name: value.cpu().numpy() for name, value in found.items()}


# ---- the detector ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Detector:
    """Suspicion of fingerprints: ``bias + z·linear + zᵀ quadratic z`` of standardised statistics z. Larger is more suspicious.

    ``levels``: suspicions, in rising order, of benign examples that it was not fitted on: thresholds come from them. ``kind``: in words.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    scale: np.ndarray
    linear: np.ndarray
    quadratic: np.ndarray
    bias: float
    levels: np.ndarray
    kind: str

    def __call__(self, of: Fingerprint) -> np.ndarray:
        """(n,) the suspicions."""
        if of.names != self.names:
            raise InputError(f"a fingerprint of {of.names}", f"{self.names}, which the detector was fitted on", "take it with the same layers, rule and tolerance")
        return self.of(torch.from_numpy(of.values)).numpy()

    def of(self, values: Tensor) -> Tensor:
        """(n,) of statistics (n, s); differentiable."""
        z = (values - torch.from_numpy(self.mean)) / torch.from_numpy(self.scale)
        return self.bias + z @ torch.from_numpy(self.linear) + ((z @ torch.from_numpy(self.quadratic)) * z).sum(1)

    def threshold(self, rate: float = 0.05) -> float:
        """The suspicion that at most ``rate`` of benign examples exceed (of those in ``levels``)."""
        if not 0 < rate < 1 or rate * len(self.levels) < 1:
            raise InputError(
                f"rate={rate} with {len(self.levels)} benign examples to set it by", "at least one example to exceed it", f"a rate of {1 / len(self.levels):.2g}"
            )
        return float(self.levels[-int(rate * len(self.levels)) - 1])

    def flags(self, of: Fingerprint, rate: float = 0.05) -> np.ndarray:
        """(n,) whether each is more suspicious than the threshold."""
        return self(of) > self.threshold(rate)

    def __repr__(self) -> str:
        return f"Detector({self.kind}, {len(self.names)} statistics, thresholds by {len(self.levels)} benign examples; detects, never robust)"


def detector(
    benign: Fingerprint | Sequence[Fingerprint],
    attacked: Fingerprint | None = None,
    *,
    ridge: float = 1.0,
    shrink: float = 0.1,
    calibrate: float = 0.5,
    seed: int = 0,
) -> Detector:
    """Learn what is suspicious. It detects, and is never robust: see the module.

    Args:
        benign: fingerprints of what must not be flagged: clean inputs, and inputs with harmless noise. With clean ones alone a detector learns
            "anything not clean": on images with an exactly black ground the range of attributions alone tells any noise from clean ones.
        attacked: where there are examples: logistic regression of these against the benign. Else one class: the Mahalanobis distance
            ``zᵀ ((1 - shrink) C + shrink I)⁻¹ z`` from the benign.
        ridge: see ``Logistic``. calibrate: share of the benign examples kept back for the thresholds. seed: which.
    """
    held = [benign] if isinstance(benign, Fingerprint) else list(benign)
    names = {f.names for f in (*held, *(() if attacked is None else (attacked,)))}
    if len(names) != 1 or not 0 < calibrate < 1 or not 0 < shrink <= 1:
        raise InputError(
            f"fingerprints of {len(names)} kinds, calibrate={calibrate}, shrink={shrink}",
            "one kind, and shares between 0 and 1",
            "take all with the same layers and rule",
        )
    rng, fit, rest = np.random.default_rng(seed), [], []
    for one in held:
        order = rng.permutation(len(one))
        cut = round(calibrate * len(one))
        if not 0 < cut < len(one) - 1:
            raise InputError(f"{len(one)} benign examples, {cut} of them kept back", "at least two to fit and one to set thresholds by", "give more")
        rest.append(one.values[order[:cut]])
        fit.append(one.values[order[cut:]])
    known = np.concatenate(fit)
    found = _one_class(known, shrink) if attacked is None else _two_classes(known, attacked.values, ridge)
    raw = Detector(names.pop(), *found, np.zeros(0), "one class" if attacked is None else f"logistic regression, {len(attacked)} attacked examples")
    levels = np.sort(raw.of(torch.from_numpy(np.concatenate(rest))).numpy())
    return Detector(raw.names, *found, levels, raw.kind)


def _one_class(known: np.ndarray, shrink: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    mean, scale = known.mean(0), known.std(0)
    scale = np.where(scale > 1e-12 * (1 + np.abs(mean)), scale, np.inf)
    z = (known - mean) / scale
    size = z.shape[1]
    return mean, scale, np.zeros(size), np.linalg.inv((1 - shrink) * z.T @ z / len(z) + shrink * np.eye(size)), 0.0


def _two_classes(known: np.ndarray, attacked: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    fitted = Logistic.fit(np.concatenate([known, attacked]), np.arange(len(known) + len(attacked)) >= len(known), ridge)
    return fitted.mean, fitted.scale, fitted.weights, np.zeros((known.shape[1],) * 2), fitted.bias


def suspicion(
    judge: Detector, model: Any, inputs: Any, *, baseline: Any = None, layers: Sequence[Any] = (), rule: Rule | None = None, softplus: float | None = 20.0
) -> Callable[[Tensor, Tensor], Tensor]:
    """What a detector says, as a differentiable function of points: what the adaptive attack lowers.

    Dispersion at the input and the layers is differentiated through the explanation itself, the predicted class held fixed. What cannot be is the
    number of evaluations (a whole number) and the estimated error (of places where gradients jump): these and the residual stay as they are at the
    unattacked ``inputs``. A ReLU network's explanation has no useful second derivative, so ReLU is softened (``softplus``, its sharpness; None
    leaves it) for the gradient alone.

    Args: those that the fingerprint was taken with (one input tensor, a baseline shared by all examples).
    """
    call = Call.of(model, inputs, None)
    fixed = rule or gauss_legendre(16)
    taken = fingerprint(model, inputs, baseline=baseline, layers=layers, rule=fixed)
    if taken.names != judge.names:
        raise InputError(f"a detector of {judge.names}", f"one of {taken.names}", "give the layers it was fitted with; a tolerance has no gradient")
    kept = torch.from_numpy(taken.values)
    seats = {str(layer): _seats(call, layer) for layer in layers}

    def of(points: Tensor, rows: Tensor) -> Tensor:
        with Softening(softplus):
            found = statistics(call, points, baseline, seats, fixed)
        whole = kept[rows.cpu()].clone()
        whole = torch.cat([found.double().cpu(), whole[:, found.shape[1] :]], 1)
        return judge.of(whole).to(points)

    return of


def _seats(call: Call, layer: Any) -> tuple[Seat, ...]:
    modules, _ = layers_of(call.model, layer)
    return seats_of(modules, lambda m: call((call.tensors[0][:1].expand(m, *call.tensors[0].shape[1:]),), torch.zeros(m, dtype=torch.int64)))


def statistics(call: Call, points: Tensor, baseline: Any, seats: Mapping[str, tuple[Seat, ...]], rule: Rule) -> Tensor:
    """(m, 8 places + 1) dispersion at the input and each layer and the change, with the graph to ``points`` (m, ...)."""
    rows = torch.arange(len(points), device=points.device)
    against = references(baseline, (points.detach(),))
    starts = [p[0].expand(points.shape).detach() for p in against.points[0].split(1)]
    with torch.no_grad():
        predicted = call((points,), rows).argmax(1, keepdim=True)

    def output(at: Tensor) -> Tensor:
        return call((at,), rows).gather(1, predicted)[:, 0]

    change = _change(output(points) - sum(float(w) * output(b) for w, b in zip(against.weights, starts, strict=True)))
    columns = []
    for place in (None, *seats.values()):
        values: Tensor | float = 0.0
        for w, b in zip(against.weights, starts, strict=True):
            values = values + float(w) * (_attributed(output, (points,), (b,), rule, None) if place is None else _in_layer(output, points, b, rule, place))
        columns.append(dispersion(torch.as_tensor(values), change))
    return torch.cat([*columns, change.log()[:, None]], 1)


def _in_layer(output: Callable[[Tensor], Tensor], x: Tensor, b: Tensor, rule: Rule, seats: tuple[Seat, ...]) -> Tensor:
    held = []
    for at in (x, b):
        taps = Taps(seats)
        with taps.open():
            output(at)
        held.append(taps.tensors)
    return _attributed(lambda *_: output(x.detach()), held[0], tuple(h.detach() for h in held[1]), rule, seats)


def _attributed(output: Callable[..., Tensor], x: tuple[Tensor, ...], b: tuple[Tensor, ...], rule: Rule, seats: tuple[Seat, ...] | None) -> Tensor:
    """(m, parts) Integrated Gradients with their graph: ``(x - b) Σ w ∇f(b + t (x - b))``."""
    total = [torch.zeros_like(p) for p in x]
    for t, w in zip(rule.nodes.tolist(), rule.weights.tolist(), strict=True):
        at = tuple(q + t * (p - q) if p.requires_grad else (q + t * (p - q)).requires_grad_() for p, q in zip(x, b, strict=True))
        if seats is None:
            value = output(*at)
        else:
            with replaced(seats, at):
                value = output()
        grads = torch.autograd.grad(value.sum(), at, create_graph=True)
        total = [s + w * g for s, g in zip(total, grads, strict=True)]
    return torch.cat([((p - q) * s).flatten(1) for p, q, s in zip(x, b, total, strict=True)], 1)


# ---- what it is worth ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Detected:
    """What suspicions are worth (see :func:`detected`), each with its interval.

    ``auc[attack]``: against clean examples. ``found[attack][rate]``: share flagged where ``rate`` of the clean ones are. ``flagged[control][rate]``:
    share of a control flagged by the same thresholds. ``apart[attack][control]``: AUC of the attack against the control.
    """

    auc: dict[str, Mean]
    found: dict[str, dict[float, Mean]]
    flagged: dict[str, dict[float, Mean]]
    apart: dict[str, dict[str, Mean]]

    @property
    def table(self) -> report.Table:
        """One row for each attack and control, for a report."""
        rates = list(next(iter(self.found.values())))
        controls = list(self.flagged)
        columns = ("", "AUC against clean", *(f"flagged at {r:.0%} of clean" for r in rates), *(f"AUC against {c}" for c in controls))
        rows = [(a, repr(self.auc[a]), *(repr(self.found[a][r]) for r in rates), *(repr(self.apart[a][c]) for c in controls)) for a in self.auc]
        rows += [(f"control: {c}", "", *(repr(self.flagged[c][r]) for r in rates), *("" for _ in controls)) for c in controls]
        return report.Table(columns, tuple(rows))

    def __repr__(self) -> str:
        lines = []
        for a, auc in self.auc.items():
            said = ", ".join(f"{written(m.mean)} at {r:.0%} false alarms" for r, m in self.found[a].items())
            against = "".join(f"; AUC against {c} {m}" for c, m in self.apart[a].items())
            lines.append(f"{a}: AUC {auc}, finds {said}{against}")
        lines += [f"control {c}: " + ", ".join(f"{m} flagged at {r:.0%}" for r, m in found.items()) for c, found in self.flagged.items()]
        return "Detected(" + "; ".join(lines) + "; good: AUC near 1 against clean and controls alike; detects, never robust)"


def detected(
    clean: Any, attacks: Mapping[str, Any], controls: Mapping[str, Any] | None = None, *, rates: Sequence[float] = (0.01, 0.05), bootstrap: int = 400, seed: int = 0
) -> Detected:
    """What suspicions are worth: AUC, and the share found at given rates of false alarms, per attack, with controls that must not be flagged alike.

    Args:
        clean: (n,) suspicions of clean examples that no detector was fitted on. attacks: by name, of inputs that *fool* the model.
        controls: by name: noise of equal size, honest errors. An attack that is far from clean and not from a control was seen by what it shares
            with the control.
        rates: of false alarms. The threshold is the clean quantile; it is redrawn in each of ``bootstrap`` resamples, so its chance is in the interval.

    Good: AUC near 1 against clean examples and against every control; controls flagged at about the rate of clean ones.

    >>> detected([0.0, 1.0, 2.0, 3.0], {"attack": [4.0, 5.0]}, rates=(0.25,)).auc["attack"]
    1.000 [1.000, 1.000]
    """
    base = _suspicions(clean, "clean")
    bad = {name: _suspicions(v, name) for name, v in attacks.items()}
    other = {name: _suspicions(v, name) for name, v in (controls or {}).items()}
    if not bad or any(not 0 < r < 1 or r * len(base) < 1 for r in rates):
        raise InputError(
            f"{len(bad)} attacks and rates {tuple(rates)} with {len(base)} clean examples", "an attack, and a clean example above each threshold", "give more"
        )
    rng = np.random.default_rng(seed)
    draw = [base[rng.integers(len(base), size=len(base))] for _ in range(bootstrap)]
    found, flagged = ({n: {r: _above(v, base, draw, r, rng) for r in rates} for n, v in group.items()} for group in (bad, other))
    auc = {n: _auc(v, base, bootstrap, rng) for n, v in bad.items()}
    return Detected(auc, found, flagged, {n: {c: _auc(v, w, bootstrap, rng) for c, w in other.items()} for n, v in bad.items()})


def _suspicions(values: Any, name: str) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise InputError(f"suspicions of {name} of shape {found.shape}", "(n,) finite numbers, at least one", "give detector(fingerprint)")
    return found


def _above(values: np.ndarray, clean: np.ndarray, draws: Sequence[np.ndarray], rate: float, rng: np.random.Generator) -> Mean:
    def share(v: np.ndarray, c: np.ndarray) -> float:
        return float((v > np.quantile(c, 1 - rate, method="higher")).mean())

    spread = [share(values[rng.integers(len(values), size=len(values))], c) for c in draws]
    return _mean(share(values, clean), spread, len(values))


def _auc(values: np.ndarray, others: np.ndarray, bootstrap: int, rng: np.random.Generator) -> Mean:
    kind = np.arange(len(values) + len(others)) < len(values)

    def one(a: np.ndarray, b: np.ndarray) -> float:
        return auroc(np.concatenate([a, b]), kind)

    draws = [one(values[rng.integers(len(values), size=len(values))], others[rng.integers(len(others), size=len(others))]) for _ in range(bootstrap)]
    return _mean(one(values, others), draws, len(values))


def _mean(value: float, draws: Sequence[float], count: int) -> Mean:
    low, high = np.percentile(draws, [2.5, 97.5])
    return Mean(value, float(low), float(high), count)
