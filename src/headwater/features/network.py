"""Networks: any torch module, or function of tensors, worked off block by block."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from headwater.features.asked import Asked
from headwater.features.calls import Call, quiet
from headwater.features.integrate import along_curve, fixed
from headwater.features.layers import neuron
from headwater.features.line import Integral, Line, Probed
from headwater.features.paths import Blur
from headwater.features.question import Question
from headwater.features.sites import Points
from headwater.result import FeatureScores


def recognises(question: Question) -> bool:
    """A torch module, or a function given tensors."""
    parts = question.inputs.values() if isinstance(question.inputs, Mapping) else question.inputs if isinstance(question.inputs, tuple | list) else [question.inputs]
    return isinstance(question.model, nn.Module) or (callable(question.model) and any(isinstance(p, Tensor) for p in parts))


def explain(question: Question) -> FeatureScores:
    """Attributions of a network."""
    question.refuse("a network", "output", instead="say what is explained with target=, one of hw.targets")
    question.refuse("a network", "discrete", "tokenizer")
    began = time.perf_counter()
    call = Call.of(question.model, question.inputs, question.extra)
    with quiet(question.model) as notes:
        asked = Asked.of(question, call)
        answers = Answers(asked)
        for v, integral in _blocks(asked, question.progress):
            answers.add(v, integral)
        return answers.scores(question, notes, time.perf_counter() - began)


def _blocks(asked: Asked, progress: bool) -> Iterator[tuple[Tensor, Integral]]:
    """All paths (n times draws), a chunk at a time. Where work is long it is counted on stderr, by evaluations of the model."""
    everything = torch.arange(asked.call.n * asked.draws, device=asked.call.device)
    total = None if asked.settings.tolerance is not None or asked.flow else len(everything) * (len(asked.settings.rule) + 2)
    with tqdm(total=total, desc="explain", unit=" evaluations", disable=not progress, delay=2.0, leave=False) as bar:
        for v in everything.split(asked.settings.chunk):
            rows, x, b = asked.ends(v)
            yield v, _integral(asked, rows, x, b, bar.update)


def _integral(asked: Asked, rows: Tensor, x: Points, b: Points, tell: Callable[[int], Any]) -> Integral:
    flow, settings = asked.flow, asked.settings
    if flow is None:
        return asked.path.integrate(Probed(_roomy(asked.site.field, tell), _roomy(asked.site.value, tell)), x, b, rows, settings)
    line = Line(asked.site.field, x, b, rows, settings.chunk)
    found = along_curve(_roomy(flow.field, tell), line.at, rows, settings, increments=lambda s, t: flow.layer(line.at(s, t), rows[s]))
    if flow.unit is None:
        return found
    # the unit's own conductance is what the inputs' shares sum to
    through = neuron(found.values[0], flow.unit)
    inner = fixed(Line(_roomy(flow.unit_field, tell), x, b, rows, settings.chunk), settings.rule)
    return inner._replace(start=torch.zeros_like(through), end=through, error=torch.full_like(through, torch.nan))


def _roomy(ask: Callable[[Points, Tensor], Any], tell: Callable[[int], Any]) -> Callable[[Points, Tensor], Any]:
    """Points that do not fit in memory at once are asked for in halves. ``tell``: is told how many were answered."""

    def answer(points: Points, rows: Tensor) -> Any:
        try:
            found = ask(points, rows)
            tell(len(rows))
            return found
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        if rows.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        first, second = (answer(tuple(p[s] for p in points), rows[s]) for s in (slice(None, middle), slice(middle, None)))
        if isinstance(first, Tensor):
            return torch.cat([first, second])
        return torch.cat([first[0], second[0]]), tuple(torch.cat(pair) for pair in zip(first[1], second[1], strict=True))

    return answer


class Answers:
    """Running weighted means over the paths of each example, and their spread (West 1979)."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        n, device = asked.call.n, asked.call.device
        self.weight, self.square, self.start, self.end, self.error = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(5))
        self.spent = torch.zeros(n, dtype=torch.int64, device=device)
        self.converged = torch.ones(n, dtype=torch.bool, device=device)
        self.mean: list[Tensor] = []
        self.spread: list[Tensor] = []

    def add(self, v: Tensor, integral: Integral) -> None:
        """Take in the paths ``v``; a block may hold several paths of one example, which are taken in order."""
        n, draw = self.asked.call.n, v // self.asked.call.n
        values = tuple(self._shown(k, x) for k, x in enumerate(integral.values))
        for d in draw.unique().tolist():
            mask = draw == d
            weight = float(self.asked.against.weights[d % len(self.asked.against)])
            self._one(v[mask] % n, weight, Integral(tuple(x[mask] for x in values), *(f[mask] for f in integral[1:])))

    def _one(self, rows: Tensor, w: float, found: Integral) -> None:
        if not self.mean:
            self.mean = [torch.zeros(self.asked.call.n, *x.shape[1:], dtype=x.dtype, device=x.device) for x in found.values]
            self.spread = [torch.zeros_like(m) for m in self.mean] if self.asked.draws > 1 else []
        self.weight[rows] += w
        self.square[rows] += w * w
        share = w / self.weight[rows]
        for k, x in enumerate(found.values):
            delta = x - self.mean[k][rows]
            self.mean[k][rows] += share.to(x.dtype).view(-1, *(1,) * (x.ndim - 1)) * delta
            if self.spread:
                self.spread[k][rows] += w * delta * (x - self.mean[k][rows])
        for mean, part in ((self.start, found.start), (self.end, found.end), (self.error, found.error)):
            mean[rows] += share * (part - mean[rows])
        self.spent[rows] += found.evaluations
        self.converged[rows] &= found.converged

    def scores(self, question: Question, notes: Sequence[str], seconds: float) -> FeatureScores:
        """The result."""
        asked, call = self.asked, self.asked.call
        residual = sum((m.flatten(1).sum(1).double() for m in self.mean), torch.zeros_like(self.start)) - (self.end - self.start)
        effective = (self.square / self.weight**2)[0].item()
        stderr = [(s / self.weight.view(-1, *(1,) * (s.ndim - 1)) * effective / (1 - effective)).clamp_min(0).sqrt() for s in self.spread]
        missed = int((~self.converged).sum()) if question.tolerance is not None else 0
        said = [f"{missed} of {call.n} examples missed the tolerance {question.tolerance:g} within {asked.settings.budget} evaluations: see converged."] if missed else []
        kept = {"inputs": self._like_inputs(dict(enumerate(call.tensors))), "reference": self._reference()} if self.at_inputs else {}
        return FeatureScores(
            values=self._structured(self.mean),
            residual=residual.cpu().numpy(),
            evaluations=self.spent.cpu().numpy(),
            output=self.end.cpu().numpy(),
            baseline_output=self.start.cpu().numpy(),
            method=_method(asked, question),
            target=asked.words.target,
            baseline=asked.words.baseline,
            converged=self.converged.cpu().numpy() if question.tolerance is not None else None,
            stderr=self._structured(stderr) if stderr else None,
            feature_names=None if question.feature_names is None else tuple(map(str, question.feature_names)),
            example_names=None if question.example_names is None else tuple(map(str, question.example_names)),
            notes=(*notes, *asked.notes, *said),
            error=None if torch.isnan(self.error).any() else self.error.cpu().numpy(),
            provenance={"cost": {"seconds": seconds, "evaluations": int(self.spent.sum())}, "chunk": asked.settings.chunk, "paths": asked.draws, "seed": asked.seed},
            **kept,
        )

    @property
    def at_inputs(self) -> bool:
        """Whether attributions are those of the inputs, rather than of a layer."""
        flow, site = self.asked.flow, self.asked.site
        return (flow is None or flow.unit is not None) and (not site.seats or bool(site.ids))

    def _shown(self, k: int, x: Tensor) -> Tensor:
        """Attributions of ids: the sum over the embedding axis, signed, so that completeness stays."""
        site = self.asked.site
        return x.sum(-1) if self.at_inputs and site.ids and k >= len(site.inputs) else x

    def _structured(self, parts: Sequence[Tensor]) -> Any:
        """In the structure of the inputs; those of a layer as one array, or a tuple of them."""
        if not self.at_inputs:
            arrays = [p.cpu().numpy() for p in parts]
            return arrays[0] if len(arrays) == 1 else tuple(arrays)
        return self._like_inputs(dict(zip((*self.asked.site.inputs, *self.asked.site.ids), parts, strict=True)))

    def _like_inputs(self, parts: Mapping[int, Tensor]) -> Any:
        """Arrays in the structure of the inputs; zeros for what was kept as it is."""
        call = self.asked.call
        arrays = [_array(parts[k]) if k in parts else np.zeros(tuple(t.shape)) for k, t in enumerate(call.tensors)]
        if call.names is not None:
            return dict(zip(call.names, arrays, strict=True))
        return arrays[0] if call.single else tuple(arrays)

    def _reference(self) -> Any:
        """The mean of the baselines, where they are points of the inputs."""
        asked = self.asked
        if asked.site.ids or isinstance(asked.path, Blur):
            return None
        mean = [torch.einsum("k,k...->...", asked.against.weights.to(p.device), p.double()).expand(x.shape) for p, x in zip(asked.against.points, asked.x, strict=True)]
        return self._like_inputs(dict(zip(asked.site.inputs, mean, strict=True)))


def _method(asked: Asked, question: Question) -> str:
    how = repr(asked.settings.rule) if question.tolerance is None else f"adaptive, tolerance {question.tolerance:g}"
    path = "" if question.path is None else f" along {asked.path.name}"
    where = f", {asked.words.where}" if asked.words.where else ""
    smooth = f", {asked.smooth!r}" if asked.smooth else ""
    return f"Integrated Gradients{path} ({how}){where}{smooth}"


def _array(t: Tensor) -> np.ndarray:
    found = t.detach().cpu()
    return (found.float() if found.dtype == torch.bfloat16 else found).numpy()
