"""What pairs of features did together: Integrated Hessians of any network, in one dimension.

Integrated Gradients applied to themselves (Janizek, Sturmfels, Lee 2020, arXiv 2002.04138): with d = x - b, for i and j,

    Gamma_ij = d_i d_j integral over the unit square of a c f_ij(b + a c d) da dc        (+ d_i integral of f_i where i = j).

The product u = a c of two uniform numbers has the density ``-ln u``, so that both integrals are over a line:

    Gamma_ij = d_i d_j integral of (-ln u) u f_ij(b + u d) du   +   [i = j] d_i integral of (-ln u) f_i(b + u d) du,

which Gauss's rule for that weight integrates with n Hessians where the square needs n^2. Gamma is symmetric, row i sums to the
attribution of i, everything to ``f(x) - f(b)``. The sum over a group of rows is one Hessian-vector product with d restricted to the
group: a chosen feature costs one product per node, a matrix of p groups p products, of however many numbers the groups are made.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from headwater.errors import InputError, NotFinite
from headwater.features import network
from headwater.features.asked import Asked
from headwater.features.calls import Call, quiet
from headwater.features.differenced import Differenced
from headwater.features.integrate import fixed
from headwater.features.line import Line, check_finite
from headwater.features.quadrature import LogRule, Rule, gauss_legendre, gauss_log
from headwater.features.question import Question
from headwater.features.sites import Site
from headwater.features.softening import Softening
from headwater.result import FeatureScores
from headwater.result.arrays import flattened
from headwater.result.groups import OTHERS, memberships
from headwater.result.interactions import InteractionScores
from headwater.result.views import views

MOST = 2**31  # bytes of one answer: beyond it groups, or a chosen feature, are asked for
ALARM = 0.05  # how far, as a share of the attributions, rows may miss them before it is said aloud
LEAST = 32  # nodes of the attributions that the rows are compared with


def interactions(
    model: Any,
    inputs: Any,
    target: Any = None,
    *,
    baseline: Any = None,
    feature: int | str | None = None,
    groups: Any = None,
    axis: int | None = None,
    points: int = 16,
    tolerance: float | None = None,
    max_points: int = 256,
    softplus: float | None = None,
    layer: Any = None,
    extra: Any = None,
    feature_names: Sequence[str] | None = None,
    example_names: Sequence[str] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> InteractionScores:
    """Which features did what together, and what did each do by itself?

    Args:
        model, inputs, target, baseline, layer, extra: as in :func:`headwater.explain`, for a torch module or a function of tensors; or a smooth
            function of one array of float64 (``svm.decision_function``), differentiated by differences: 4 p calls for each node and row.
            With several baselines the interactions are averaged over them, with a standard error. Ids of tokens are parts as a whole:
            both axes of the embedding are summed.
        feature: ask for the row of this feature alone, (n, p), by its number or name: one Hessian-vector product per node instead of p. With
            ``groups`` it is the number or name of a group.
        groups, axis: parts that count as one, in every form that :meth:`FeatureScores.group` takes: values are (n, groups, groups).
        points: nodes of the quadrature. 16 give 1e-11 where the model is smooth (GELU, SiLU, tanh, softplus); networks that divide by a
            norm (LayerNorm) need many more towards a baseline of zeros, where it vanishes, than towards a real example.
        tolerance, max_points: double the points, up to so many, of the examples whose rows miss their attributions by more than this share
            of them (Euclidean norms); ``converged`` says which came there.
        softplus: replace ReLU and its relatives by softplus of this sharpness (10, say) for the computation only. A ReLU network has no
            second derivative that could be integrated; the answer is then that of the softened network, and the notes say how far its
            output is from the model's.
        batch_size: points that are evaluated at once, which bounds the memory.

    Every answer comes with ``attributions``, computed on the same network by themselves, and ``row_residual``, how far the rows are from
    them; ``residual`` is the gap of the total. A warning is given where rows miss by more than 5 %, or
    attributions the change of the output: that is how kinks and jumps show.

    Raises InputError for models without gradients, for operations that cannot be differentiated twice, and where the answer would not fit
    into 2 GB; NotFinite where a second derivative is infinite.

    >>> product = lambda x: x[:, 0] * x[:, 1] + x[:, 2]
    >>> interactions(product, torch.tensor([[2.0, 3.0, 1.0]]), progress=False).values.round(6).tolist()
    [[[1.5, 1.5, 0.0], [1.5, 1.5, 0.0], [0.0, 0.0, 1.0]]]
    """
    named = None if feature_names is None else tuple(map(str, feature_names))
    question = Question(
        model, inputs, target, baseline=baseline, layer=layer, extra=extra, example_names=example_names, batch_size=batch_size, seed=seed, progress=progress
    )
    if not network.recognises(question):
        question = _by_differences(question)
    if tolerance is not None and not 0 < tolerance < 1:
        raise InputError(f"tolerance={tolerance}", "between 0 and 1, a share of the attributions", "tolerance=1e-3")
    began, rule, soft = time.perf_counter(), gauss_log(points), Softening.of(softplus)
    call = SoftCall.softened(Call.of(question.model, question.inputs, extra), soft)
    with quiet(model) as notes, sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        asked = Asked.of(question, call)
        if isinstance(question.model, Differenced):
            question.model.scale = _scale(asked)
        parts = Parts.of(asked, groups, axis, named)
        chosen = parts.chosen(feature)
        parts.fits(call.n, len(chosen), feature is not None)
        sums = Sums.of(asked, parts, chosen)
        sums.gather(np.arange(call.n), rule, progress)
        left = sums.beyond(tolerance)
        while len(left) and 2 * len(rule) <= max_points:
            rule = gauss_log(2 * len(rule))
            sums.gather(left, rule, progress)
            left = np.intersect1d(left, sums.beyond(tolerance))
        said = _softening(soft, asked, sums.end) if softplus is not None else []
        if isinstance(question.model, Differenced):
            said.append(f"Derivatives are differences of the function, which was given {question.model.calls:,} rows: values are good to about 1e-6 of the output.")
    return sums.scores(question, feature is not None, rule, tolerance, soft, [*notes, *asked.notes, *said], time.perf_counter() - began)


@dataclass(frozen=True, eq=False)
class SoftCall(Call):
    """A call in which the model's kinks, and not those of anything around it, are rounded off or counted."""

    soft: Softening = field(default_factory=lambda: Softening(None))

    @classmethod
    def softened(cls, call: Call, soft: Softening) -> SoftCall:
        """The same call under ``soft``."""
        return cls(**{f.name: getattr(call, f.name) for f in fields(Call)}, soft=soft)

    def __call__(self, tensors: tuple[Tensor, ...], rows: Tensor) -> Tensor:
        """As in :class:`Call`."""
        with self.soft:
            return super().__call__(tensors, rows)


# ---- what counts as one part ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Parts:
    """To which part each number that moves belongs.

    Args:
        codes: (1 or n, F) numbers of parts, F numbers of an example in the order of the site's tensors.
        count: how many parts. names: of them, or None where numbers say enough.
        single: whether every number is a part by itself.
        grouped: whether parts are groups that someone asked for.
    """

    codes: Tensor
    count: int
    names: tuple[str, ...] | None
    single: bool
    grouped: bool

    @classmethod
    def of(cls, asked: Asked, groups: Any, axis: int | None, names: tuple[str, ...] | None) -> Parts:
        """From the arguments. Raises InputError for what is no grouping of the inputs."""
        site, count = asked.site, len(asked.site.inputs)
        widths = [p.shape[-1] if site.ids and k >= count else 1 for k, p in enumerate(asked.x)]
        shapes = [tuple(p.shape[:-1] if site.ids and k >= count else p.shape) for k, p in enumerate(asked.x)]
        skeleton = _skeleton(asked, shapes, names)
        seen = views(skeleton)
        if names is not None and all(view.feature_names is None for view in seen):
            raise InputError(f"{len(names)} feature_names for inputs of shape {[s[1:] for s in shapes]}", "one for each place of the last axis", "name all, or none")
        if groups is None:
            if axis is not None:
                raise InputError(f"axis={axis} without groups", "groups, one for each place of that axis", "leave it out")
            codes, found = _each_by_itself(shapes), tuple(name for view in seen for name in view.parts())
            plain = len(seen) == 1 and len(shapes[0]) == 2 and names is None and not site.ids
            return cls(_spread(codes, widths, asked), len(found), None if plain else found, max(widths) == 1, False)
        codes, found = _numbered(memberships(skeleton, groups, axis))
        return cls(_spread(codes, widths, asked), len(found), found, False, True)

    def chosen(self, feature: int | str | None) -> list[int]:
        """The parts whose rows are asked for."""
        if feature is None:
            return list(range(self.count))
        if isinstance(feature, str):
            if feature not in (self.names or ()):
                raise InputError(
                    f"feature={feature!r}", f"one of {list(self.names)[:20]}" if self.names else "a number: the features have no names", "check its spelling"
                )
            return [(self.names or ()).index(feature)]
        if isinstance(feature, bool) or not isinstance(feature, int | np.integer) or not -self.count <= feature < self.count:
            raise InputError(f"feature={feature!r} of {self.count} parts", f"its name, or its number from 0 to {self.count - 1}", "feature=0, say")
        return [int(feature) % self.count]

    def fits(self, n: int, rows: int, one: bool) -> None:
        """Raise InputError where the answer would take more than ``MOST`` bytes."""
        size = 8 * n * rows * self.count
        if size > MOST:
            raise InputError(
                f"interactions of {self.count:,} features in {n:,} examples, {size / 1e9:,.0f} GB",
                f"an answer of at most {MOST / 1e9:.0f} GB",
                "explain fewer examples at a time" if one else "explain fewer examples at a time, ask for one row with feature=, or group parts with groups=",
            )

    def sums(self, flat: Tensor, s: Tensor) -> Tensor:
        """(..., m, F) of the examples ``s`` (m,) summed to (..., m, p), in float64 where the device has it."""
        flat = flat.to(_wide(flat.device))
        if self.single:
            return flat
        codes = self.codes[s % len(self.codes)].expand(flat.shape)
        return torch.zeros(*flat.shape[:-1], self.count, dtype=flat.dtype, device=flat.device).scatter_add_(-1, codes, flat)

    def restricted(self, flat: Tensor, s: Tensor, part: int) -> Tensor:
        """(m, F) of the examples ``s``, zero outside the part."""
        return flat * (self.codes[s % len(self.codes)] == part)


def _skeleton(asked: Asked, shapes: list[tuple[int, ...]], names: tuple[str, ...] | None) -> FeatureScores:
    """Attributions of what moves, all zero: they know what parts are called and how they are grouped."""
    arrays = [np.broadcast_to(np.zeros(()), shape) for shape in shapes]
    moving = (*asked.site.inputs, *asked.site.ids)
    called_ = asked.call.names if moving else None  # a layer's tensors have no names
    values: Any = arrays[0] if len(arrays) == 1 else {called_[k]: a for k, a in zip(moving, arrays, strict=True)} if called_ else tuple(arrays)
    n, text = asked.call.n, bool(asked.site.ids) and not asked.site.inputs
    return FeatureScores(values, np.zeros(n), np.zeros(n, int), np.zeros(n), np.zeros(n), "", "", "", feature_names=names, tokens=((),) * n if text else None)


def _each_by_itself(shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    sizes = [int(np.prod(shape[1:])) for shape in shapes]
    starts = np.cumsum([0, *sizes])
    return [np.arange(start, start + size)[None] for start, size in zip(starts, sizes, strict=False)]


def _numbered(members: list[Any]) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Groups of several inputs under one count: those of one name are one, parts in none are ``OTHERS``, the last."""
    names = list(dict.fromkeys(name for member in members for name in member.names))
    if any((member.codes < 0).any() for member in members) and OTHERS not in names:
        names.append(OTHERS)
    found = []
    for member in members:
        places = np.array([*(names.index(name) for name in member.names), names.index(OTHERS) if OTHERS in names else 0])
        found.append(places[flattened(member.codes)])  # -1, none, is the last place
    return found, tuple(names)


def _spread(codes: list[np.ndarray], widths: list[int], asked: Asked) -> Tensor:
    """(1 or n, F): the codes of all tensors side by side, those of tokens repeated along the embedding."""
    n = max(len(c) for c in codes)
    wide = [np.repeat(np.broadcast_to(c, (n, c.shape[1])), width, axis=1) for c, width in zip(codes, widths, strict=True)]
    return torch.from_numpy(np.concatenate(wide, 1).astype(np.int64)).to(asked.call.device)


# ---- the work ------------------------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """The weighted mean over the baselines of every example: interactions (n, rows, p), attributions (n, p), outputs at both ends (n,)."""

    asked: Asked
    parts: Parts
    chosen: list[int]
    values: np.ndarray
    attributions: np.ndarray
    start: np.ndarray
    end: np.ndarray
    evaluations: np.ndarray
    stderr: np.ndarray | None
    asymmetry: float = 0.0

    @classmethod
    def of(cls, asked: Asked, parts: Parts, chosen: list[int]) -> Sums:
        """Empty ones."""
        n, shape = asked.call.n, (asked.call.n, len(chosen), parts.count)
        spread = np.zeros(shape) if asked.draws > 1 else None
        return cls(asked, parts, chosen, np.zeros(shape), np.zeros((n, parts.count)), np.zeros(n), np.zeros(n), np.zeros(n, dtype=np.int64), spread)

    def gather(self, examples: np.ndarray, rule: LogRule, progress: bool) -> None:
        """Integrate these examples anew, block by block, within it baseline by baseline (running means and spread: West 1979)."""
        asked, straight = self.asked, gauss_legendre(max(LEAST, len(rule)))
        self.evaluations[examples] += asked.draws * (len(straight) + 2 + len(rule) * (1 + len(self.chosen)))
        weights, size = asked.against.weights.tolist(), max(1, asked.settings.chunk // len(rule))
        with tqdm(total=len(examples) * asked.draws, desc=f"interactions, {rule!r}", unit="path", disable=not progress, delay=2.0, leave=False) as bar:
            for b in np.split(examples, range(size, len(examples), size)):
                spread, total = np.zeros((len(b), *self.values.shape[1:]) if self.stderr is not None else 0), 0.0
                for k, weight in enumerate(weights):
                    rows, x, reference = asked.ends(torch.from_numpy(b).to(asked.call.device) + asked.call.n * k)
                    one = self._one(Line(asked.site.field, x, reference, rows, asked.settings.chunk), rule, straight)
                    total += weight
                    before = self.values[b] if k else np.zeros_like(one[0])
                    for mean, part in zip((self.values, self.attributions, self.start, self.end), one, strict=True):
                        mean[b] = part if k == 0 else mean[b] + weight / total * (part - mean[b])
                    if self.stderr is not None:
                        spread += weight * (one[0] - before) * (one[0] - self.values[b])
                    bar.update(len(b))
                if self.stderr is not None:
                    effective = sum(w * w for w in weights) / total**2
                    self.stderr[b] = np.sqrt(np.maximum(spread / total * effective / (1 - effective), 0))

    @property
    def gap(self) -> np.ndarray:
        """(n,) how far the rows are from their attributions, as a share of them (a single row: of all that it is the sum of); or the
        attributions from the change of the output, where that is worse."""
        rows = self.attributions[:, self.chosen]
        size = np.linalg.norm(rows, axis=1) if len(self.chosen) > 1 else np.abs(self.values).sum((1, 2)) + np.abs(rows[:, 0])
        missed = _share(np.linalg.norm(self.values.sum(2) - rows, axis=1), size)
        change = self.end - self.start
        off = _share(np.abs(self.attributions.sum(1) - change), np.maximum(np.abs(change), np.abs(self.attributions).sum(1)))
        return np.maximum(missed, off)

    def beyond(self, tolerance: float | None) -> np.ndarray:
        """The examples whose rows miss a tolerance."""
        return np.flatnonzero(self.gap > tolerance) if tolerance is not None else np.zeros(0, dtype=np.int64)

    def _one(self, line: Line, rule: LogRule, straight: Rule) -> tuple[np.ndarray, ...]:
        """Of one baseline: interactions (m, rows, p), attributions (m, p), outputs at the baseline and at the input (m,)."""
        parts = self.parts
        integral = fixed(line, straight)
        every = torch.arange(len(line), device=line.rows.device)
        attributions = parts.sums(torch.cat([v.flatten(1) for v in integral.values], 1), line.rows).cpu().numpy()
        found = torch.zeros(len(line), len(self.chosen), parts.count, dtype=_wide(line.rows.device), device=line.rows.device)
        at_once = max(1, line.chunk // len(line))
        for k in range(0, len(rule), at_once):
            found += hessian_rows(self.asked.site, line, every, rule.nodes[k : k + at_once], rule.weights[k : k + at_once], parts, self.chosen)
        values = found.cpu().numpy()
        if len(self.chosen) == parts.count:
            self.asymmetry = max(self.asymmetry, float(np.abs(values - values.swapaxes(1, 2)).max()))
            values = (values + values.swapaxes(1, 2)) / 2
        return values, attributions, integral.start.cpu().numpy(), integral.end.cpu().numpy()

    def scores(self, question: Question, one: bool, rule: LogRule, tolerance: float | None, soft: Softening, notes: list[str], seconds: float) -> InteractionScores:
        """The result."""
        asked, parts, n = self.asked, self.parts, self.asked.call.n
        values, attributions = (self.values[:, 0], self.attributions[:, self.chosen[0]]) if one else (self.values, self.attributions)
        plain = not parts.grouped and parts.single and len(asked.x) == 1 and not asked.site.seats
        where = f", {asked.words.where}" if asked.words.where else ""
        grouped = [f"Features are {parts.count} groups of parts; a group with itself holds what its parts did among themselves."] if parts.grouped else []
        return InteractionScores(
            values=values,
            residual=values.sum(1) - attributions if one else values.sum((1, 2)) - (self.end - self.start),
            evaluations=self.evaluations,
            output=self.end,
            baseline_output=self.start,
            method=f"Integrated Hessians ({rule!r}){where}" + (f", kinks as softplus of sharpness {soft.beta:g}" if soft.beta is not None and soft.replaced else ""),
            target=asked.words.target,
            baseline=asked.words.baseline,
            feature=self.chosen[0] if one else None,
            attributions=attributions,
            stderr=None if self.stderr is None else self.stderr[:, 0] if one else self.stderr,
            inputs=network._array(asked.x[0]).reshape(n, -1) if plain else None,
            reference=_reference(asked) if plain else None,
            converged=None if tolerance is None else self.gap <= tolerance,
            feature_names=parts.names,
            example_names=None if question.example_names is None else tuple(map(str, question.example_names)),
            notes=(*notes, *grouped, *_alarm(self.gap, tolerance, rule, soft)),
            provenance={
                "cost": {"seconds": seconds, "evaluations": int(self.evaluations.sum())},
                "chunk": asked.settings.chunk,
                "baselines": asked.draws,
                "seed": asked.seed,
                "asymmetry": self.asymmetry,
                "softplus": soft.beta,
            },
        )


def hessian_rows(site: Site, line: Line, s: Tensor, nodes: np.ndarray, weights: np.ndarray, parts: Parts, chosen: list[int]) -> Tensor:
    """(m, rows, p) what some nodes of the quadrature add to the interactions of the ``chosen`` parts with all parts.

    One graph, forward and back, for all points; then a pass back through it for each chosen part (two at a time, or more, where points are
    few: the points stand in the graph as often).
    """
    t = torch.from_numpy(nodes).to(s.device).repeat_interleave(len(s))
    at_s = s.repeat(len(nodes))
    copies = -(-len(chosen) // -(-len(chosen) // max(1, line.chunk // len(t))))
    points = tuple(p.detach().requires_grad_() for p in line.at(at_s.repeat(copies), t.repeat(copies)))
    rows = line.rows[at_s]
    value = site.output(points, rows.repeat(copies))
    check_finite(value.detach(), rows.repeat(copies), t.repeat(copies))
    gradients = _differentiated(value.sum(), points, True)
    d = torch.cat([p[at_s].flatten(1) for p in line.d], 1)
    slopes = parts.sums(torch.cat([g.detach()[: len(t)].flatten(1) for g in gradients], 1) * d, rows)
    shape = (len(nodes), len(s), parts.count)
    first, second = (torch.from_numpy(w).to(slopes) for w in (weights, weights * nodes))
    found = torch.zeros(len(s), len(chosen), parts.count, dtype=slopes.dtype, device=slopes.device)
    for start in range(0, len(chosen), copies):
        some = chosen[start : start + copies]
        v = torch.stack([parts.restricted(d, rows, part) for part in some])
        products = _product(gradients, points, v, line, copies, last=start + copies >= len(chosen))
        curved = parts.sums(products * d, rows)
        if not torch.isfinite(curved).all():
            raise _infinite(rows[(~torch.isfinite(curved)).any(0).any(-1)], t)
        found[:, start : start + len(some)] = torch.einsum("k,qksp->sqp", second, curved.view(len(some), *shape))
    found[:, torch.arange(len(chosen)), chosen] += torch.einsum("k,ksp->sp", first, slopes.view(shape))[:, chosen]
    return found


def _product(gradients: Sequence[Tensor], points: Sequence[Tensor], v: Tensor, line: Line, copies: int, last: bool) -> Tensor:
    """Hessian times each direction v (q, m, F), as (q, m, F); zero where the gradient is constant."""
    q, m, width = v.shape
    if q < copies:
        v = torch.cat([v, v.new_zeros(copies - q, m, width)])
    directions = line.unflatten(v.reshape(-1, width))
    along = [(g * u.to(g.dtype)).sum() for g, u in zip(gradients, directions, strict=True) if g.requires_grad]
    if not along:
        return torch.zeros_like(v[:q])
    products = _differentiated(torch.stack(along).sum(), points, retain=not last)
    return torch.cat([p.flatten(1) for p in products], 1).view(copies, m, width)[:q]


def _differentiated(value: Tensor, points: Sequence[Tensor], create: bool = False, retain: bool = False) -> list[Tensor]:
    """Gradients at the points, zero where there is no dependence. Raises InputError where torch has no derivative."""
    try:
        found = torch.autograd.grad(value, points, create_graph=create, retain_graph=create or retain, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(
            f"a model whose gradient cannot be differentiated again ({str(error).splitlines()[0]})",
            "operations that have a second derivative",
            "write the operation that is named in plain torch; run a compiled model as it was before it was compiled",
        ) from error
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, points, strict=True)]


def _infinite(rows: Tensor, t: Tensor) -> NotFinite:
    who = sorted(set(rows.tolist()))
    shown = ", ".join(map(str, who[:8])) + (", ..." if len(who) > 8 else "")
    return NotFinite(
        f"a second derivative that is NaN or infinite on the path of example {shown}",
        "finite second derivatives from the baseline to the input",
        "look for square roots, norms and powers below 2 that meet zero there, and choose a baseline away from it",
    )


# ---- what is said of it ----------------------------------------------------------------------------------------------------------------


def _alarm(gap: np.ndarray, tolerance: float | None, rule: LogRule, soft: Softening) -> list[str]:
    """Notes on examples that missed the tolerance, and, with a warning, on rows far from their attributions: the sign of kinks."""
    said = []
    if tolerance is not None and (gap > tolerance).any():
        said.append(f"{int((gap > tolerance).sum())} of {len(gap)} examples missed the tolerance {tolerance:g} with {len(rule)} points: see converged.")
    bad = np.flatnonzero(gap > ALARM)
    if not len(bad):
        return said
    why, mend = "the second derivative is not seen in full", "take more points, or a baseline nearer to the data; look for operations without a second derivative"
    if soft.left:
        why = f"the model has kinks ({', '.join(sorted(soft.left))}), whose second derivative no quadrature sees"
        mend = "softplus=10 rounds kinks of ReLU and its relatives off" if soft.beta is None else "smooth operations in their place, or more points, would help"
    named = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    note = (
        f"Rows miss their attributions, or these the change of the output, by up to {gap.max():.0%} (examples {named}): {why}. Do not trust these interactions; {mend}."
    )
    warnings.warn(note, UserWarning, stacklevel=4)
    return [*said, note]


def _softening(soft: Softening, asked: Asked, end: np.ndarray) -> list[str]:
    """What was replaced, and how far that moved the output."""
    if not soft.replaced:
        return [f"softplus={soft.beta:g} found no ReLU, nor any of its relatives, to replace; scripted and compiled models hide theirs."]
    call, target = SoftCall.softened(asked.call, Softening(None)), asked.site.target
    with torch.no_grad():
        blocks = torch.arange(call.n, device=call.device).split(asked.settings.chunk)
        parts = [target.pick(call(tuple(t[rows] for t in call.tensors), rows), rows).double() for rows in blocks]
    moved = np.abs(end - torch.cat(parts).cpu().numpy())
    kinks = f" {', '.join(sorted(soft.left))} kept their kinks." if soft.left else ""
    return [
        f"{', '.join(sorted(soft.replaced))} computed with softplus of sharpness {soft.beta:g} in place of ramps: the output at the input moved by "
        f"{moved.mean():.3g} on average, {moved.max():.3g} at most.{kinks}"
    ]


def _reference(asked: Asked) -> np.ndarray:
    """The mean baseline of the one input, (n, F)."""
    mean = torch.einsum("k,k...->...", asked.against.weights.to(asked.x[0].device), asked.against.points[0].double())
    return np.array(mean.expand(asked.x[0].shape).reshape(asked.call.n, -1).cpu().numpy())


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.divide(part, np.maximum(whole, np.finfo(float).tiny), out=np.zeros_like(part), where=part > 0)
    return found


# ---- functions of arrays -------------------------------------------------------------------------------------------------------------


def _by_differences(question: Question) -> Question:
    """The same question about a function that torch can differentiate. Raises InputError for what is no function of one array."""
    model, inputs = question.model, question.inputs
    if not callable(model) or isinstance(model, type):
        name = next((method for method in ("decision_function", "predict_log_proba", "predict") if hasattr(model, method)), None)
        raise InputError(
            f"interactions of a model of type {type(model).__module__}.{type(model).__name__}",
            "a torch module, or a function of tensors or of an array, smooth enough to be differentiated twice",
            f"pass its function, model.{name}; a tree ensemble jumps, and has no Integrated Hessians" if name else "write it as a function of an array",
        )
    question.refuse("a function of an array", "layer", "extra")
    array = np.asarray(inputs) if isinstance(inputs, np.ndarray | list) else None
    if array is None or array.dtype.kind not in "biuf" or array.ndim < 2 or not array.size:
        raise InputError(f"inputs of type {type(inputs).__name__} for a function of an array", "one array of numbers, (n, ...)", "frame.to_numpy(), say")
    x = torch.from_numpy(array.astype(np.float64))
    width = x[0].numel()
    model = Differenced(model, np.where(array.any(0), np.abs(array).max(0), 1.0))
    return replace(question, model=model, inputs=x, batch_size=question.batch_size or int(np.clip(2**22 // width**2, 1, 256)))


def _scale(asked: Asked) -> Tensor:
    """(...) how far each feature moves at most; where none does, how large it is, or 1."""
    x, b = asked.x[0], asked.against.points[0]
    moved, size = (b - x).abs().flatten(0, 1).amax(0), x.abs().amax(0)
    return torch.where(moved > 0, moved, torch.where(size > 0, size, torch.ones_like(size)))
