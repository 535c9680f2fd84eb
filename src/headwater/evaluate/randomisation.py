"""Does an explanation change when the model forgets what it learned? Layer by layer, with the model put back exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from headwater import report
from headwater.errors import InputError, NotFinite
from headwater.evaluate.accord import spearman
from headwater.evaluate.means import Mean, mean_of, written
from headwater.evaluate.parts import arrays_of
from headwater.features.baselines import smoothed
from headwater.result.arrays import flattened
from headwater.result.frames import pandas_library
from headwater.result.views import channel_axis, kind_of

if TYPE_CHECKING:
    import pandas

Similarities = dict[str, np.ndarray]
JITTER = 0.01
"""Of the control: noise on every weight, relative to the spread of its tensor."""


@dataclass(frozen=True, eq=False)
class Randomisation:
    """Similarity of scores to those of the trained model (see :func:`randomisation`).

    ``layers``: from the output down. ``cascading[measure]`` (layers, n): with this layer and all above it randomised. ``independent[measure]``
    (those of ``alone``, n): this layer only. ``control[measure]`` (n,): weights changed by 1 %. ``chance[measure]`` (n,): the scores of another
    example. Measures: "spearman" (signed), "spearman of sizes" (of ``|φ|``), and "ssim" (of ``|φ|``) for images.
    ``verdict``: "pass", "fail", or "undecided" where the control itself is not similar.
    """

    layers: tuple[str, ...]
    alone: tuple[str, ...]
    cascading: Similarities
    independent: Similarities
    control: Similarities
    chance: Similarities
    means: dict[str, tuple[Mean, ...]]
    verdict: Literal["pass", "fail", "undecided"]
    method: str
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the scores were seen to depend on what was learned."""
        return self.verdict == "pass"

    def __repr__(self) -> str:
        said = "; ".join(
            f"{name} {self.means[name][-1]} (control {written(_mean(self.control[name]))}, other example {written(_mean(self.chance[name]))})" for name in self.cascading
        )
        return f"Randomisation({self.method}: {self.verdict}; all {len(self.layers)} layers randomised: {said}; good: near 0, far below the control)"

    @property
    def curve(self) -> report.Curve:
        """Similarity over the number of layers randomised, from the output down, for a report."""
        x = list(range(len(self.layers) + 1))
        series = [report.Series(name, x, [1.0, *(m.mean for m in self.means[name])]) for name in self.cascading]
        series.append(report.Series("control: weights changed by 1 %", x, [_mean(self.control["spearman"])] * len(x), "reference"))
        return report.Curve(tuple(series), report.Axis("layers randomised, from the output down"), report.Axis("similarity", 0.0, 1.0))

    def to_frame(self) -> pandas.DataFrame:
        """One row for each way, layer and example, one column for each measure. Needs pandas."""
        pandas, found = pandas_library(), []
        for way, layers, held in (("cascading", self.layers, self.cascading), ("independent", self.alone, self.independent)):
            for k, layer in enumerate(layers):
                columns = {name: values[k] for name, values in held.items()}
                found.append(pandas.DataFrame({"way": way, "layer": layer, "example": np.arange(len(self.control["spearman"])), **columns}))
        return pandas.concat(found, ignore_index=True)


def randomisation(model: nn.Module, explain: Callable[[nn.Module], Any], *, layers: Sequence[str] | None = None, bootstrap: int = 1000, seed: int = 0) -> Randomisation:
    """The model parameter randomisation test (Adebayo et al. 2018, arXiv 1810.03292): layers are initialised anew, and scores compared.

    Cascading: from the output down, each on top of those before. Independent: one at a time. Similarity is the Spearman correlation of the
    signed scores, of their sizes, and, for images, the SSIM of their sizes. Good: it falls to near 0. Scores that stay are those of the input (an
    edge detector), not of what was learned.

    The verdict compares the signed Spearman, all layers randomised, with a control in which every weight moves by 1 % of its tensor's spread: "pass"
    where the upper end of its interval is below midway from the control to the scores of another example (or 0, if that is larger); "undecided"
    where the control is below 0.5, so that similarity says nothing. Methods that multiply with the input keep similar *sizes* even then (zeros
    stay zeros): a note says so.

    Caveat: necessary, not sufficient; a random explanation passes too. (And see Bilodeau et al. 2022, arXiv 2212.11870.)

    Args:
        model: it is changed in place, and put back exactly, also after an error.
        explain: from the model to scores of fixed inputs and targets: ``lambda m: hw.explain(m, images, target=labels)``.
        layers: names of modules, in the order to randomise; default: all that have parameters and run, in the reverse of the order they run in.

    Layers with ``reset_parameters`` use it; others are drawn normal with the mean and spread of their weights. Norms are reset to the identity:
    they count in the cascade, and not alone. Parameters of a module that is never called itself (its weight may be used by the module it is
    part of) belong to that module.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> randomisation(net, lambda m: np.arange(40.0).reshape(10, 4) ** 2).verdict
    'fail'
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"a model of type {type(model).__name__}", "a torch module, whose layers can be randomised", "retrain on shuffled labels for other models")
    with _restored(model):
        first, fired = _running(model, explain)
        trained = _arrays(first)
        groups = _groups(model, fired, layers)
        compare = _comparison(trained)
        control = _jittered(model, explain, compare, seed)
        cascading, independent, alone, notes = _walk(model, explain, compare, groups, seed)
    chance = compare(tuple(np.roll(a, 1, axis=0) for a in trained)) if len(trained[0]) > 1 else {name: np.zeros(1) for name in control}
    means = {name: tuple(mean_of(row, bootstrap, seed) for row in rows) for name, rows in cascading.items()}
    verdict = _verdict(means["spearman"][-1], control["spearman"], chance["spearman"])
    if verdict == "pass" and _verdict(means["spearman of sizes"][-1], control["spearman of sizes"], np.zeros(1)) == "fail":
        notes.append("The sizes of the scores stay similar though their signs do not: they are mostly those of the input (a factor x, say).")
    method = str(getattr(first, "method", "the given scores"))
    return Randomisation(tuple(groups), alone, cascading, independent, control, chance, means, verdict, method, tuple(notes))


# ---- layers ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Parameters, buffers and torch's random state are put back."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    kept = [(t, t.detach().clone()) for t in held.values()]
    devices = sorted({t.device.index or 0 for t in held.values() if t.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for t, was in kept:
                t.copy_(was)


def _running(model: nn.Module, explain: Callable[[nn.Module], Any]) -> tuple[Any, list[str]]:
    """The scores, and the names of the modules in the order in which they first ended."""
    fired: dict[str, None] = {}
    handles = [m.register_forward_hook(lambda *_, name=name: fired.setdefault(name)) for name, m in model.named_modules()]
    try:
        return explain(model), list(fired)
    finally:
        for handle in handles:
            handle.remove()


def _groups(model: nn.Module, fired: list[str], layers: Sequence[str] | None) -> dict[str, list[nn.Module]]:
    """Layers to randomise, top first: each with the modules whose parameters it owns (those that never run belong to the one they are part of)."""
    modules = dict(model.named_modules())
    if layers is not None:
        unknown = [name for name in layers if name not in modules or not any(True for _ in modules[name].parameters())]
        if unknown or not layers or len(set(layers)) < len(layers):
            known = [name for name, m in modules.items() if any(True for _ in m.parameters(recurse=False))]
            raise InputError(f"layers={list(layers)!r}", f"names of modules with parameters, once each: {', '.join(known[:12])}", "see model.named_modules()")
        return {name: [m for m in modules[name].modules() if any(True for _ in m.parameters(recurse=False))] for name in layers}
    fired = fired or list(modules)[1:]  # scores that never run the model: the order of registration
    owned: dict[str, list[nn.Module]] = {}
    for name, module in modules.items():
        if any(True for _ in module.parameters(recurse=False)):
            owner = name
            while owner and owner not in fired:
                owner = owner.rpartition(".")[0]
            owned.setdefault(owner, []).append(module)
    if not owned:
        raise InputError("a model without parameters", "layers that can be randomised", "there is nothing to forget")
    place = {name: k for k, name in enumerate(fired)}
    return {name or "(the model)": owned[name] for name in sorted(owned, key=lambda name: -place.get(name, -1))}


def _redraw(module: nn.Module) -> None:
    """New parameters, in place."""
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    with torch.no_grad():
        if callable(reset):
            reset()
            return
        for p in module.parameters(recurse=False):
            spread = float(p.double().std()) if p.numel() > 1 else float(p.double().abs().max())
            p.normal_(float(p.double().mean()) if p.numel() > 1 else 0.0, spread or 1.0)


def _random(modules: list[nn.Module]) -> bool:
    """Whether redrawing gives other numbers each time."""
    seen = []
    for _ in range(2):
        for m in modules:
            _redraw(m)
        seen.append([p.detach().clone() for m in modules for p in m.parameters(recurse=False)])
    return any(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


def _walk(model: nn.Module, explain: Any, compare: Any, groups: dict[str, list[nn.Module]], seed: int) -> tuple[Similarities, Similarities, tuple[str, ...], list[str]]:
    """Similarities of both ways."""
    torch.manual_seed(seed)
    cascading, independent, alone, fixed = [], [], [], []
    with _restored(model):
        for modules in groups.values():
            for m in modules:
                _redraw(m)
            cascading.append(compare(_arrays(explain(model))))
    for name, modules in groups.items():
        with _restored(model):
            if not _random(modules):
                fixed.append(name)
                continue
            independent.append(compare(_arrays(explain(model))))
            alone.append(name)
    names = list(cascading[0])
    notes = [f"Reset to the identity, and so not looked at alone: {', '.join(fixed)}."] if fixed else []
    stacked = [{name: np.stack([row[name] for row in rows]) if rows else np.zeros((0, 0)) for name in names} for rows in (cascading, independent)]
    return stacked[0], stacked[1], tuple(alone), notes


def _jittered(model: nn.Module, explain: Any, compare: Any, seed: int) -> Similarities:
    """The control: every weight moved a little."""
    numbers = torch.Generator().manual_seed(seed)
    with _restored(model):
        with torch.no_grad():
            for p in model.parameters():
                if p.is_floating_point():
                    spread = float(p.double().std()) if p.numel() > 1 else float(p.double().abs().max())
                    p.add_((JITTER * spread * torch.randn(p.shape, generator=numbers, dtype=torch.float64)).to(p))
        found: Similarities = compare(_arrays(explain(model)))
        return found


def _verdict(found: Mean, control: np.ndarray, chance: np.ndarray) -> Literal["pass", "fail", "undecided"]:
    stays, other = _mean(control), max(0.0, _mean(chance))
    if not stays >= 0.5:
        return "undecided"
    upper = found.mean if np.isnan(found.high) else found.high
    return "pass" if np.isnan(found.mean) or upper < (stays + other) / 2 else "fail"


# ---- similarity ------------------------------------------------------------------------------------------------------------------


def _arrays(scores: Any) -> tuple[np.ndarray, ...]:
    found = arrays_of(scores)
    if not all(np.isfinite(a).all() for a in found):
        raise NotFinite("scores that are NaN or infinite", "finite scores", "explain fewer layers: layers=[...]")
    return found


def _comparison(trained: tuple[np.ndarray, ...]) -> Callable[[tuple[np.ndarray, ...]], Similarities]:
    """``compare(arrays)``: similarities (n,) to the trained model's scores."""
    flat = _flat(trained)
    image = len(trained) == 1 and kind_of(trained[0].shape) == "image"

    def compare(other: tuple[np.ndarray, ...]) -> Similarities:
        theirs = _flat(other)
        if theirs.shape != flat.shape:
            raise InputError(f"scores of shape {theirs.shape} after {flat.shape}", "scores of the same parts at every call", "explain the same inputs")
        found = {"spearman": spearman(flat, theirs), "spearman of sizes": spearman(np.abs(flat), np.abs(theirs))}
        return found | ({"ssim": ssim(_picture(trained[0]), _picture(other[0]))} if image else {})

    return compare


def _flat(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    return np.concatenate([flattened(a) for a in arrays], 1)


def _picture(values: np.ndarray) -> np.ndarray:
    """(n, rows, columns): sizes, channels summed, each image's largest at 1."""
    axis = channel_axis(values.shape, "image")
    sizes = np.abs(values if axis is None else values.sum(axis))
    top = sizes.max((1, 2), keepdims=True)
    return np.divide(sizes, top, out=np.zeros_like(sizes), where=top > 0)


def ssim(a: np.ndarray, b: np.ndarray, sigma: float = 1.5) -> np.ndarray:
    """(n,) mean structural similarity of images (n, rows, columns) in [0, 1] (Wang et al. 2004): Gaussian windows, K1 = 0.01, K2 = 0.03.

    ``(2 μ_a μ_b + C1)(2 σ_ab + C2) / ((μ_a² + μ_b² + C1)(σ_a² + σ_b² + C2))``; edges repeated.
    """

    def local(image: np.ndarray) -> np.ndarray:
        found: np.ndarray = smoothed(torch.from_numpy(image), sigma).numpy()
        return found

    c1, c2 = 0.01**2, 0.03**2
    ma, mb = local(a), local(b)
    va, vb, ab = local(a * a) - ma * ma, local(b * b) - mb * mb, local(a * b) - ma * mb
    found: np.ndarray = ((2 * ma * mb + c1) * (2 * ab + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean((1, 2))
    return found


def _mean(values: np.ndarray) -> float:
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if len(kept) else float("nan")
