"""A question about a network, ready to be worked off. Everything that can be wrong is looked at here, before the work."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.errors import BatchCoupling, InputError
from headwater.features.baselines import References, mean, references, token
from headwater.features.calls import Call
from headwater.features.integrate import Settings
from headwater.features.layers import Seat, embeddings_of, layers_of, seats_of
from headwater.features.paths import Blur, Path, straight
from headwater.features.quadrature import Rule, gauss_legendre
from headwater.features.question import Question
from headwater.features.sites import Flow, Points, Site, UnitSite
from headwater.features.smoothing import Smooth
from headwater.features.targets import Target, target_of

FIXED = ("attention_mask", "token_type_ids", "position_ids", "decoder_attention_mask", "labels")
"""Inputs that describe others: integers of these names stay as they are."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question about a network, ready to be worked off: points x (n, ...), references of K points each, a site, a path.

    ``flow`` is set for conductance: then the path runs at ``site`` and the increments, or the unit, are the flow's.
    """

    call: Call
    site: Site
    x: Points
    against: References
    path: Path
    settings: Settings
    flow: Flow | None
    smooth: Smooth | None
    seed: int
    words: Words
    notes: tuple[str, ...]

    @classmethod
    def of(cls, question: Question, call: Call) -> Asked:
        """Everything that can be wrong is looked at here. Raises InputError, BatchCoupling, NotFinite."""
        target = target_of(question.target)
        base, notes = _base(call, target, question)
        settings = _settings(question, base.call)
        path = _path(question)
        every = torch.arange(call.n, device=call.device)
        x = base.values(call.tensors, every, settings.chunk)
        against = _against(base, question, x, settings.chunk)
        site, flow, words = _seat(base, question, against.name)
        if isinstance(path, Blur):
            words = dataclasses.replace(words, baseline=f"the input blurred, sigma {path.sigma:g}")
        _look(site, x)
        notes = [*notes, *_equal(x, against)] if not isinstance(path, Blur) else notes
        if site.seats and not site.ids and not site.inputs:  # the path runs in a layer
            x, against = _moved(base, site, x, against, settings.chunk)
        return cls(call, site, x, against, path, settings, flow, question.smooth, question.seed, words, tuple(notes))

    @property
    def draws(self) -> int:
        """How many paths each example has: baselines times noisy copies."""
        return len(self.against) * (self.smooth.draws if self.smooth else 1)

    def ends(self, v: Tensor) -> tuple[Tensor, Points, Points]:
        """Of paths ``v`` (m,), numbered draw by draw: example rows (m,), inputs and baselines (m, ...)."""
        n = self.call.n
        rows, draw = v % n, v // n
        k = draw % len(self.against)
        each = [0 if point.shape[1] == 1 else 1 for point in self.against.points]
        b = tuple(point[k, rows * flag] for point, flag in zip(self.against.points, each, strict=True))
        x = tuple(p[rows] for p in self.x)
        if self.smooth:
            copies = (draw // len(self.against)).tolist()
            moving = len(self.site.inputs)
            noisy = [
                torch.cat([self.smooth.noisy(p[m : m + 1], [int(rows[m])], c, self.seed + 7919 * i) for m, c in enumerate(copies)]) for i, p in enumerate(x[:moving])
            ]
            x = (*noisy, *x[moving:])
        return rows, x, b


@dataclass(frozen=True)
class Words:
    """How the result is described."""

    target: str
    baseline: str
    where: str = ""


def _base(call: Call, target: Target, question: Question) -> tuple[Site, list[str]]:
    """The site at the inputs: floats move, ids move in the output of their embedding, descriptions of others stay."""
    names = call.names or tuple(f"input {k}" for k in range(len(call.tensors)))
    floats = tuple(k for k, t in enumerate(call.tensors) if t.is_floating_point())
    others = [k for k, t in enumerate(call.tensors) if not t.is_floating_point()]
    wanted = [k for k in others if names[k] not in FIXED]
    first = torch.zeros(1, dtype=torch.int64, device=call.device)
    tensors = tuple(t[:1] for t in call.tensors)
    try:
        found = embeddings_of(call.model, [tensors[k] for k in wanted], lambda: call(tensors, first)) if wanted else []
    except RuntimeError as error:  # the model takes no integers at all
        raise _unembedded(names[wanted[0]], tensors[wanted[0]].dtype) from error
    notes = [f"{names[k]} was kept as it is: it describes other inputs." for k in others if k not in wanted]
    for k, module in zip(wanted, found, strict=True):
        if module is None:
            raise _unembedded(names[k], call.tensors[k].dtype)
    if wanted and question.smooth is not None:
        raise InputError(f"smooth={question.smooth} with ids", "floating inputs, to which noise can be added", "leave smooth= out")
    if not floats and not wanted:
        raise InputError("no input that can move", "a floating input, or ids that go into an embedding", "pass masks and lengths with extra=")
    if wanted and len({id(m) for m in found}) != len(found):
        raise InputError("two inputs of ids that share one embedding module", "an embedding for each", "explain them one at a time, the other in extra=")
    return Site(call, target, floats, tuple(Seat(m) for m in found if m is not None), tuple(wanted)), notes


def _unembedded(name: str, dtype: torch.dtype) -> InputError:
    return InputError(
        f"{name} of type {dtype}, which goes into no embedding layer of the model",
        "floating inputs, or ids that go into an embedding",
        "convert it to the model's floating type if it is a quantity; pass what describes other inputs (masks, lengths) with extra=",
    )


def _seat(base: Site, question: Question, baseline: str) -> tuple[Site, Flow | None, Words]:
    """Where the path runs, given layer=, neuron= and space=."""
    words = Words(base.target.name, baseline)
    if question.space not in (None, "layer", "input"):
        raise InputError(f"space={question.space!r}", "'layer' (the path runs in the layer) or 'input' (conductance)", "leave it out for 'layer'")
    if question.layer is None:
        for name in ("neuron", "space"):
            if getattr(question, name) is not None:
                raise InputError(f"{name}={getattr(question, name)!r} without a layer", "the layer that it is about", f"{name}=..., layer=model.some_layer")
        return base, None, words
    modules, name = layers_of(base.call.model, question.layer)
    call = base.call
    seats = seats_of(modules, lambda m: call(tuple(t[:1].expand(m, *t.shape[1:]) for t in call.tensors), torch.zeros(m, dtype=torch.int64, device=call.device)))
    if question.neuron is None:
        if question.space == "input":
            return base, Flow(base, seats), dataclasses.replace(words, where=f"conductance of {name}")
        return dataclasses.replace(base, inputs=(), seats=seats, ids=()), None, dataclasses.replace(words, where=f"layer {name}")
    if len(modules) != 1:
        raise InputError(f"a neuron of {len(modules)} layers", "one layer", "layer=model.some_layer, neuron=3")
    unit = tuple(int(u) for u in question.neuron) if isinstance(question.neuron, tuple | list) else (int(question.neuron),)
    if question.target is None:
        facts = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
        return UnitSite(**facts, watched=seats, unit=unit), None, dataclasses.replace(words, target=f"neuron {unit} of {name}")
    return base, Flow(base, seats, unit), dataclasses.replace(words, where=f"through neuron {unit} of {name}")


def _against(site: Site, question: Question, x: Points, chunk: int) -> References:
    """The baseline as points of the site: ids are embedded, everything else is a point already."""
    baseline, call = question.baseline, site.call
    names = call.names or tuple(str(k) for k in range(len(call.tensors)))
    if not site.ids:
        return references(baseline, x, question.seed, [names[k] for k in site.inputs])
    parts = [baseline] * len(call.tensors)
    if isinstance(baseline, Mapping):
        parts = [baseline.get(name) for name in names]
    elif isinstance(baseline, tuple | list) and len(baseline) == len(call.tensors) > 1:
        parts = list(baseline)
    elif not _ids(baseline):
        return references(baseline, x, question.seed)
    if any(isinstance(parts[i], token) for i in site.inputs):
        raise InputError(
            "a token as the baseline of floating inputs",
            "one baseline for each input",
            f"baseline={{{names[site.inputs[0]]!r}: 0.0, {names[site.ids[0]]!r}: hw.baselines.token(0)}}",
        )
    floats = [references(parts[i], (x[k],), question.seed) for k, i in enumerate(site.inputs)]
    embedded = [_embedded(site, i, parts[i], x[len(site.inputs) + k], question.seed, chunk) for k, i in enumerate(site.ids)]
    found = [*floats, *embedded]
    if len({len(f) for f in found}) != 1:
        raise InputError(f"baselines of {', '.join(str(len(f)) for f in found)} points for the inputs", "as many for each", "draw as many from each")
    return References(tuple(f.points[0] for f in found), found[0].weights, " and ".join(dict.fromkeys(f.name for f in found)))


def _ids(baseline: Any) -> bool:
    """Whether a baseline is made of ids rather than of points in the embedding."""
    data = getattr(baseline, "data", baseline)
    if isinstance(baseline, token):
        return True
    if isinstance(data, Tensor | np.ndarray):
        return not (data.is_floating_point() if isinstance(data, Tensor) else data.dtype.kind == "f")
    return isinstance(data, int) and not isinstance(data, bool)


def _embedded(site: Site, i: int, baseline: Any, x: Tensor, seed: int, chunk: int) -> References:
    """References in the output of the embedding of input ``i``."""
    call = site.call
    if isinstance(baseline, token):
        if isinstance(baseline.which, str) and baseline.which != "zero":
            raise InputError(f"the token {baseline.which!r} without a tokenizer", "its id", "hw.baselines.token(0), or explain(..., tokenizer=tokenizer)")
        baseline = None if baseline.which == "zero" else int(baseline.which)
    if baseline is None or not _ids(baseline):
        return references(baseline, (x,), seed)
    if isinstance(baseline, mean):
        raise InputError("the mean of token ids", "a token, or points of the embedding", "hw.baselines.dataset(ids, 16) averages over examples")
    ids = references(torch.tensor(baseline) if isinstance(baseline, int) else baseline, (call.tensors[i],), seed)
    every, place = torch.arange(call.n, device=call.device), site.ids.index(i)
    points = []
    for point in ids.points[0]:
        tensors = list(call.tensors)
        tensors[i] = point.expand(call.n, *point.shape[1:]).to(tensors[i])
        points.append(site.values(tuple(tensors), every, chunk)[len(site.inputs) + place])
    name = f"token {baseline}" if isinstance(baseline, int) else ids.name
    return References((torch.stack(points),), ids.weights, name)


def _moved(base: Site, site: Site, x: Points, against: References, chunk: int) -> tuple[Points, References]:
    """Inputs and references where they come out of the layer."""
    flow, n = Flow(base, site.seats), base.call.n
    rows = torch.arange(n, device=base.call.device)

    def out(points: Points) -> Points:
        parts = [flow.layer(tuple(p[s] for p in points), rows[s]) for s in rows.split(chunk)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    there = [out(tuple(point[k].expand(n, *point.shape[2:]) for point in against.points)) for k in range(len(against))]
    return out(x), References(tuple(torch.stack(column) for column in zip(*there, strict=True)), against.weights, against.name)


def _settings(question: Question, call: Call) -> Settings:
    rule = question.rule if question.rule is not None else gauss_legendre()
    if not isinstance(rule, Rule):
        raise InputError(f"rule={rule!r}", "one of hw.quadrature", "rule=hw.quadrature.gauss_legendre(64)")
    if question.tolerance is not None:
        if question.rule is not None:
            raise InputError(f"both rule={rule} and tolerance={question.tolerance}", "one of them", "a tolerance chooses its own points")
        if not 0 < question.tolerance < 1:
            raise InputError(f"tolerance={question.tolerance}", "between 0 and 1, relative to the change of the output", "tolerance=1e-3")
    elif question.max_evaluations is not None:
        raise InputError(
            f"max_evaluations={question.max_evaluations} without a tolerance", "a tolerance to reach", "tolerance=1e-3, or rule=hw.quadrature.gauss_legendre(64)"
        )
    budget = 256 if question.max_evaluations is None else question.max_evaluations
    if budget < 10:
        raise InputError(f"max_evaluations={budget}", "at least 10: eight points and both ends", "max_evaluations=256")
    if question.batch_size is not None and question.batch_size < 1:
        raise InputError(f"batch_size={question.batch_size}", "at least 1", "leave it out")
    return Settings(rule, question.tolerance, budget, question.batch_size or _chunk(call))


def _chunk(call: Call) -> int:
    """Path points at once: as many as suit a core's caches (256 took 1.5 times as long on a small CNN), or many on a GPU; memory that does not suffice
    halves it."""
    numbers = max(1, sum(t[0].numel() for t in call.tensors))
    most = 128 if call.device.type == "cpu" else 1024
    return int(min(most, max(16, 2 ** (18 if call.device.type == "cpu" else 25) // numbers)))


def _path(question: Question) -> Path:
    path = question.path if question.path is not None else straight()
    if not isinstance(path, Path):
        raise InputError(f"path={path!r}", "one of hw.paths", "path=hw.paths.straight()")
    if isinstance(path, Blur) and question.baseline is not None:
        raise InputError("both a blur path and a baseline", "one of them: a blur path begins at the blurred input", "leave baseline= out")
    if question.layer is not None and question.path is not None and question.neuron is None:
        raise InputError("a path together with a layer", "the straight one, in the layer or (space='input') in the inputs", "leave path= out")
    return path


def _look(site: Site, x: Points) -> None:
    """One gradient and three outputs of the first two examples: is there one number for each, does it depend on the input, and on it alone?"""
    two = torch.arange(min(2, site.call.n), device=site.call.device)
    in_layer = bool(site.seats) and not site.ids

    def output(rows: Tensor) -> Tensor:
        if in_layer:  # where the points lie is not known yet: the model runs as it is
            return site.target.pick(site.call(tuple(t[rows] for t in site.call.tensors), rows), rows)
        return site.output(tuple(p[rows] for p in x), rows)

    with torch.no_grad():
        value, again = output(two), output(two)
        try:
            alone = output(two[:1])
        except ValueError as error:  # normalisation over a batch of one
            raise _coupled("an example that the model refuses to take alone") from error
    if not torch.isfinite(value).all():
        return  # named, with its example, when the path is walked
    slack = float(torch.finfo(value.dtype).eps) ** 0.5 * (float(value.abs().max()) + 1e-30)
    if float((value - again).abs().max()) > slack:
        raise InputError("a model that gives another output for the same input", "a deterministic one", "put every part of it into eval mode; fix its random numbers")
    if float((value[0] - alone[0]).abs()) > slack:
        raise _coupled(f"the output of an example that changes from {float(alone[0]):.6g} to {float(value[0]):.6g} when another stands beside it")
    if not in_layer:
        site.field(tuple(p[two] for p in x), two)  # raises where nothing depends on the input


def _coupled(given: str) -> BatchCoupling:
    mend = "put normalisation over the batch into eval mode, or give it running statistics; give what is shared with extra="
    return BatchCoupling(given, "outputs that depend on their own example alone", mend)


def _equal(x: Points, against: References) -> list[str]:
    """A note, and a warning, on examples that are their own baseline: all their attributions are zero."""
    if len(against) != 1:
        return []
    same = torch.ones(len(x[0]), dtype=torch.bool, device=x[0].device)
    for p, b in zip(x, against.points, strict=True):
        same &= (p == b[0]).flatten(1).all(1)
    who = same.nonzero()[:, 0].tolist()
    if not who:
        return []
    named = ", ".join(map(str, who[:8])) + (", ..." if len(who) > 8 else "")
    note = f"The baseline equals the input of example {named}: all their attributions are zero."
    warnings.warn(note, UserWarning, stacklevel=5)
    return [note]
