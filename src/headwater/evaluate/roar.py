"""Remove and retrain: is what the scores call important still missed by a model that has learned to do without it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from headwater import report
from headwater.errors import InputError, NotFinite
from headwater.evaluate.means import Mean, written
from headwater.evaluate.parts import arrays_of, parts_of
from headwater.features.baselines import smoothed
from headwater.features.calls import quiet
from headwater.result.frames import pandas_library
from headwater.result.views import kind_of
from headwater.tasks.task import logits_of

if TYPE_CHECKING:
    import pandas

Pair = tuple[Any, Any]
FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
RANDOM, BLURRED = "random", "random, blurred"
SIGMA = 2.0
"""Of the blurred control, in pixels."""


@dataclass(frozen=True, eq=False)
class Roar:
    """Quality after retraining without the top parts (see :func:`roar`).

    ``fractions`` (s,): removed, 0 first. ``values[ranking]`` (seeds, s, n test): the measure of each test example. ``lines[ranking]``: mean and
    interval at each fraction. ``advantage[control]``: mean over the fractions above 0 of the control's quality minus that of the judged scores:
    above 0 means that the scores take away more than the control does.
    """

    fractions: np.ndarray
    values: dict[str, np.ndarray]
    lines: dict[str, tuple[Mean, ...]]
    advantage: dict[str, Mean]
    judged: tuple[str, ...]
    seeds: tuple[int, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        ends = "; ".join(f"{name} {written(line[0].mean)} to {line[-1]} without {self.fractions[-1]:.0%}" for name, line in self.lines.items())
        better = "; ".join(f"takes {mean} more than {name}" for name, mean in self.advantage.items())
        return f"Roar({ends}; {better}; {len(self.seeds)} seeds; good: falls fast, and faster than both controls)"

    @property
    def curve(self) -> report.Curve:
        """Quality over the fraction removed, for a report."""
        role = {name: "measured" if name in self.judged else "reference" for name in self.lines}
        series = tuple(report.Series(name, self.fractions.tolist(), [m.mean for m in line], role[name]) for name, line in self.lines.items())  # type: ignore[arg-type]
        return report.Curve(series, report.Axis("of each input replaced", 0.0, 1.0, "percent"), report.Axis("quality after retraining"))

    def to_frame(self) -> pandas.DataFrame:
        """One row for each ranking and fraction: mean, low, high. Needs pandas."""
        rows = [(name, f, m.mean, m.low, m.high) for name, line in self.lines.items() for f, m in zip(self.fractions.tolist(), line, strict=True)]
        return pandas_library().DataFrame(rows, columns=["ranking", "fraction", "mean", "low", "high"])


def roar(
    train: Pair,
    test: Pair,
    fit: Callable[[Any, Any, int], Any],
    explain: Callable[[Any, Any], Any] | Mapping[str, Callable[[Any, Any], Any]],
    *,
    fractions: Sequence[float] = FRACTIONS,
    seeds: int | Sequence[int] = 3,
    measure: Callable[[Any, Any, Any], Any] | None = None,
    parts: Any = None,
    bootstrap: int = 1000,
    progress: bool = True,
) -> Roar:
    """Remove and retrain (Hooker et al. 2019, arXiv 1806.10758).

    For each seed: fit, explain train *and* test, replace the parts with the largest ``|φ|`` in both with the mean of the training data, fit
    anew on the changed training set, measure on the changed test set. Good: quality falls fast, and faster than under a random ranking.

    For images a second control stands beside it: a random ranking that is blurred, so that whole regions go. Smooth rankings take away more than
    scattered ones whatever they know (Rong et al. 2022, arXiv 2202.00449; blur alone raises ROAR: arXiv 2304.13836): only what exceeds
    both controls is knowledge.

    Caveats: the retrained model is another model, which may use what is left; where features repeat each other, quality falls little even for right
    scores. And the mask itself can tell the class: explain with the model's own prediction as the target, never with the test labels. (See
    also Bilodeau et al. 2022, arXiv 2212.11870.)

    Args:
        train, test: (inputs, labels); inputs an array or tensor of floats (n, ...).
        fit: ``(inputs, labels, seed) -> model``: your own training.
        explain: ``(model, inputs) -> scores``: ``lambda m, x: hw.explain(m, x, target=m.predict(x))``; or a dict of several, by name.
        fractions: of each input's parts to replace. ``seeds``: how many (0, 1, ...), or which.
        measure: ``(model, inputs, labels) -> (n,)``, larger is better. Default: 1 where the predicted class is the label; minus the squared error of
            regressors (labels of floats).
        parts: as in :func:`deletion`.

    The intervals redraw test examples and seeds. Raises InputError, NotFinite.

    Example::

        hw.evaluate.roar((X, y), (Xt, yt), lambda X, y, seed: RandomForestClassifier(random_state=seed).fit(X, y),
                         lambda m, X: hw.explain(m, X, target=m.predict(X)))
    """
    work = _Work(train, test, fit, measure or _quality, parts)
    shares, chosen = _fractions(fractions), _seeds(seeds)
    explainers = dict(explain) if isinstance(explain, Mapping) else {"the scores": explain}
    if not explainers or {RANDOM, BLURRED} & set(explainers):
        raise InputError(f"explanations named {sorted(explainers)}", f"at least one, none named {RANDOM!r} or {BLURRED!r}", "name them by method")
    names = [*explainers, RANDOM, *([BLURRED] if kind_of(work.train.shape) == "image" else [])]
    values = {name: np.empty((len(chosen), len(shares), len(work.test))) for name in names}
    with tqdm(total=len(chosen) * (1 + (len(shares) - 1) * len(names)), unit="model", desc="roar", disable=not progress, delay=2.0, leave=False) as bar:
        for i, seed in enumerate(chosen):
            model, base = work.fitted(work.train, work.test, seed)
            bar.update()
            for name in names:
                values[name][i, 0] = base
                ranked = work.rankings(name, explainers.get(name), model, seed)
                for k, share in enumerate(shares[1:].tolist(), 1):
                    values[name][i, k] = work.fitted(*work.without(ranked, share), seed)[1]
                    bar.update()
    draws = _redrawn(len(chosen), len(work.test), bootstrap)
    lines = {name: tuple(_interval(v[:, k], draws) for k in range(len(shares))) for name, v in values.items()}
    return Roar(shares, values, lines, _advantages(values, list(explainers), names, draws), tuple(explainers), chosen)


class _Work:
    """The data, checked, and one training."""

    def __init__(self, train: Pair, test: Pair, fit: Any, measure: Any, parts: Any) -> None:
        self.given, self.fit, self.measure, self.parts = train[0], fit, measure, parts
        (self.train, self.labels), (self.test, self.wanted) = (_data(pair, name) for pair, name in ((train, "train"), (test, "test")))
        if self.train.shape[1:] != self.test.shape[1:]:
            raise InputError(f"train of shape {tuple(self.train.shape)} and test of shape {tuple(self.test.shape)}", "inputs of one shape", "check them")
        self.mean = self.train.double().mean(0).to(self.train)

    def back(self, x: Tensor) -> Any:
        """As the inputs were given."""
        return x.clone() if isinstance(self.given, Tensor) else x.numpy().copy()

    def fitted(self, train: Tensor, test: Tensor, seed: int) -> tuple[Any, np.ndarray]:
        """A model, and its measure on the test set."""
        model = self.fit(self.back(train), self.labels, seed)
        found = self.measure(model, self.back(test), self.wanted)
        found = np.asarray(found.detach().cpu() if isinstance(found, Tensor) else found, dtype=float)
        if found.shape != (len(test),):
            raise InputError(f"a measure of shape {found.shape} for {len(test)} test examples", "one number each", "do not average over them")
        if not np.isfinite(found).all():
            raise NotFinite("a measure that is NaN or infinite", "finite numbers", "look at the training with that seed")
        return model, found

    def rankings(self, name: str, explain: Any, model: Any, seed: int) -> list[Any]:
        """Of train and test: parts with importance (n, parts)."""
        found = []
        for k, x in enumerate((self.train, self.test)):
            if explain is not None:
                held = arrays_of(explain(model, self.back(x)))
            else:
                noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(2 * seed + k), dtype=torch.float64)
                held = ((smoothed(noise, SIGMA) if name == BLURRED else noise).numpy(),)
            sized = tuple(np.abs(a) for a in held)
            found.append(parts_of(sized, (x,), self.parts))
        return found

    def without(self, ranked: list[Any], share: float) -> tuple[Tensor, Tensor]:
        """Train and test with the top share of each example's parts at the mean."""
        found = []
        for x, parts in zip((self.train, self.test), ranked, strict=True):
            ties = np.random.default_rng(0).random(parts.scores.shape)  # equal scores go in a random order, not in that of the columns
            order = np.lexsort((ties, -parts.scores, ~parts.present), axis=1)
            top = np.argsort(order, axis=1) < np.rint(share * parts.present.sum(1))[:, None]
            (mask,) = parts.chosen(torch.from_numpy(top), torch.arange(len(x)))
            found.append(torch.where(mask, self.mean, x))
        return found[0], found[1]


def _data(pair: Pair, name: str) -> tuple[Tensor, Any]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InputError(f"{name} of type {type(pair).__name__}", "(inputs, labels)", f"{name}=(X, y)")
    inputs, labels = pair
    x = (inputs.detach().cpu() if isinstance(inputs, Tensor) else torch.from_numpy(np.array(inputs))).clone()
    if not x.is_floating_point() or x.ndim < 2 or not len(x):
        raise InputError(f"{name} inputs of shape {tuple(x.shape)} and type {x.dtype}", "floats (n, ...)", "convert them: what is removed becomes a mean")
    if not torch.isfinite(x).all():
        raise InputError(f"{name} inputs with NaN or infinity", "finite numbers", "replace or drop them first")
    if len(labels) != len(x):
        raise InputError(f"{len(labels)} {name} labels for {len(x)} examples", "one each", "check them")
    return x, labels


def _fractions(fractions: Sequence[float]) -> np.ndarray:
    found = np.unique(np.asarray(fractions, dtype=float))
    if found.ndim != 1 or not len(found) or not ((found > 0) & (found <= 1)).all():
        raise InputError(f"fractions={fractions!r}", "above 0 and up to 1", f"fractions={FRACTIONS}")
    return np.concatenate([[0.0], found])


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(s) for s in seeds)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise InputError(f"seeds={seeds!r}", "a number of seeds, or different seeds from 0 upwards", "seeds=3")
    return chosen


def _quality(model: Any, inputs: Any, labels: Any) -> np.ndarray:
    """1 where the predicted class is the label; minus the squared error where the labels are floats."""
    if isinstance(model, nn.Module):
        like = next(iter(model.parameters()), None)
        x = torch.as_tensor(inputs)
        with quiet(model), torch.no_grad():
            found = logits_of(model(x if like is None else x.to(like.device))).cpu().numpy()
    else:
        found = np.asarray(model.predict(inputs) if hasattr(model, "predict") else model(inputs))
    wanted = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if wanted.dtype.kind == "f":
        return np.asarray(-((found.reshape(len(found), -1) - wanted.reshape(len(wanted), -1)) ** 2).sum(1))
    if found.ndim == 2 and found.shape[1] > 1:
        found = found.argmax(1)
    return np.asarray(found.reshape(-1) == wanted, dtype=float)


# ---- intervals -------------------------------------------------------------------------------------------------------------------


def _redrawn(seeds: int, examples: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed and each example occurs in each redrawing, as shares: (count, seeds), (count, examples)."""
    rng = np.random.default_rng(0)
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), count) / seeds, rng.multinomial(examples, np.full(examples, 1 / examples), count) / examples


def _interval(values: np.ndarray, draws: tuple[np.ndarray, np.ndarray]) -> Mean:
    """Of values (seeds, n)."""
    low, high = np.percentile(np.einsum("ds,sn,dn->d", draws[0], values, draws[1], optimize=True), [2.5, 97.5])
    return Mean(float(values.mean()), float(low), float(high), values.shape[1])


def _advantages(values: dict[str, np.ndarray], judged: list[str], names: list[str], draws: tuple[np.ndarray, np.ndarray]) -> dict[str, Mean]:
    found = {}
    for name in judged:
        for control in names[len(judged) :]:
            key = control if len(judged) == 1 else f"{control} ({name})"
            found[key] = _interval((values[control] - values[name])[:, 1:].mean(1), draws)
    return found
