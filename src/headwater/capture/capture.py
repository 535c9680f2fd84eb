"""Per-example gradients of any module as they happen.

``Capture(model, trained, ...)`` finds a rule for every trained parameter (or the exact fallback), proves itself on two examples
against plain autograd, and then yields the gradients of batches block by block:

    capture = Capture(model, task.loss, probe)
    for gradients in capture.each(task.loss, batch):      # one item per column of the function
        gradients["fc.weight"].dense()                    # (n, groups, out, in [+ 1 for the bias])

How: a forward hook adds a *probe* of zeros to each layer's output. The gradient of the summed loss with respect to the probe is the
layer's output gradient, example by example; nothing of the model is modified, and in-place operations after the layer are safe.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwater.capture.blocks import Block, BlockGradient, Late, Lookup, Outer, Piece, Rows
from headwater.capture.fallback import Function, by_loop, by_vmap
from headwater.capture.rules import Patches, Rule, refuse_batch_statistics, refuse_training_mode, rule_of
from headwater.capture.stream import is_out_of_memory
from headwater.errors import BatchCoupling, GradientError, GradientMismatch, InputError, NotFinite, TaskError
from headwater.tasks.batches import Batch, leaves, size, take
from headwater.tasks.diffusion import Drawn

Gradients = dict[str, BlockGradient]
Call = tuple[str, int]
"""A site's path, and which of its calls in one forward pass."""


@dataclass
class Site:
    """A module that a rule covers: the canonical names of its weight and bias (None where not trained or not there)."""

    path: str
    module: nn.Module
    rule: Rule
    weight: str | None
    bias: str | None
    folded: bool = False
    expanded: bool = False  # its output did not show the examples and was expanded to them

    def orientation(self, name: str) -> tuple[object, ...]:
        """How this site lays a parameter out: sites that share it must agree."""
        if name != self.weight:
            return ("bias",)
        return (self.rule.groups and self.rule.groups(self.module), self.rule.transpose)


@dataclass
class Use:
    """One call of a site: its input, the zeros added to its output of shape ``shape``, and where the examples are (see :class:`Layout`).
    ``prepared``: the input as the rule takes it, once made. ``columns``: how many there are of the function."""

    site: Site
    x: Tensor
    probe: Tensor
    how: str
    shape: tuple[int, ...]
    prepared: Any = None
    columns: int = 1

    def input(self, n: int, dtype: torch.dtype) -> Any:
        """What the rule's ``emit`` takes for x; the same for all columns of a function."""
        if self.prepared is None:
            x = examples_first(self.x, self.how, n)
            x = x.to(dtype) if x.is_floating_point() else x
            rule = self.site.rule
            self.prepared = x if rule.prepare is None else rule.prepare(self.site.module, x, self.site.folded)
            if self.columns > 1 and isinstance(self.prepared, Patches):  # made once, not once a column
                self.prepared.keep()
        return self.prepared


@dataclass
class Recording:
    """What the hooks of one forward pass collect; ``layouts`` is given, or None while it is being found out. ``replays``: the probes'
    shapes, while a checkpointed part of the forward pass is run again by the backward pass."""

    n: int
    layouts: dict[Call, Layout] | None
    uses: list[Use] = field(default_factory=list)
    shapes: dict[Call, tuple[int, ...]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    replays: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] | None = None
    coarsest: float = 0.0  # of the layers' outputs: the rounding that gradients carry


@dataclass(frozen=True)
class Layout:
    """Where the examples are in a layer's output, and how many axes that output has.

    "first": axis 0; "second": axis 1 (time-major); "flat": axis 0 holds examples times positions; "absent" and "shared": the layer
    does not see the examples at all (position embeddings), so its output is expanded, by a new axis or along a first axis of
    length 1; "unknown" otherwise.
    """

    how: str
    axes: int = 0

    def at(self, shape: tuple[int, ...], n: int) -> str:
        """The layout of an output of this shape for n examples; an output that an expanded one led to has them first."""
        led = (self.how == "absent" and len(shape) == self.axes + 1) or (self.how == "shared" and shape[0] != 1)
        how = "first" if led else self.how
        fits = {"first": shape[:1] == (n,), "second": shape[1:2] == (n,), "flat": shape[0] % n == 0 if shape else False}
        return how if fits.get(how, True) else "unknown"


def layouts_of(one: dict[Call, tuple[int, ...]], two: dict[Call, tuple[int, ...]]) -> dict[Call, Layout]:
    """The layout of each call, from its shapes for one and for two examples; unknown where the number of calls depends on it."""
    uneven = {path for path, _ in one.keys() ^ two.keys()}
    found = {call: Layout(layout(one[call], two[call]), len(one[call])) for call in one if call[0] not in uneven}
    return found | {call: Layout("unknown") for call in one.keys() | two.keys() if call[0] in uneven}


def layout(one: tuple[int, ...], two: tuple[int, ...]) -> str:
    """See :class:`Layout`."""
    if len(one) != len(two) or not one:
        return "unknown"
    if one[0] == two[0] == 0:  # rows chosen by the data, and none of these
        return "flat"
    changed = [k for k, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if not changed:
        return "shared" if one[0] == 1 else "absent"
    axis = changed[0]
    if len(changed) > 1 or two[axis] != 2 * one[axis] or axis > 1:
        return "unknown"
    if axis == 1:
        return "second" if one[1] == 1 else "unknown"
    return "first" if one[0] == 1 else "flat"


def examples_first(t: Tensor, how: str, n: int) -> Tensor:
    """A layer's input or output gradient with the examples (or examples times positions, for "flat") on axis 0."""
    if how == "second":
        return t.movedim(1, 0)
    if how == "absent":
        return t.unsqueeze(0).expand(n, *t.shape)
    return t.expand(n, *t.shape[1:]) if how == "shared" else t


def regroup(piece: Piece, n: int) -> Piece:
    """A piece over examples times positions as a piece over ``n`` examples."""
    if len(piece) == n:
        return piece
    if isinstance(piece, Late):
        return piece.regrouped(n)
    if isinstance(piece, Outer):  # (n*k, groups, shared, f) -> (n, groups, k*shared, f)
        a, g = (t.unflatten(0, (n, -1)).transpose(1, 2).flatten(2, 3) for t in (piece.a, piece.g))
        return Outer(a, g)
    if isinstance(piece, Lookup):
        return Lookup(piece.index.unflatten(0, (n, -1)).flatten(1), piece.a.unflatten(0, (n, -1)).flatten(1, 2), piece.entries)
    return Rows(piece.values.unflatten(0, (n, -1)).sum(1))


def _gathered(gradients: Gradients, each: int) -> Gradients:
    """Gradients of rows, ``each`` of them an example's, as gradients of examples: their sums."""
    if each == 1:
        return gradients
    return {name: BlockGradient(tuple(regroup(piece, len(g) // each) for piece in g.pieces)) for name, g in gradients.items()}


def with_ones(piece: Outer) -> Outer:
    """The bias as one more input that is always 1."""
    return Outer(torch.cat([piece.a, torch.ones_like(piece.a[..., :1])], -1), piece.g)


def columns(function: Function) -> Function:
    """A function that returns (n,) as one that returns (n, 1)."""

    def wrapped(model: nn.Module, batch: Batch) -> Tensor:
        out = function(model, batch)
        if not isinstance(out, Tensor) or out.ndim not in (1, 2):
            what = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            expected = "one number per example, shape (examples,)"
            raise TaskError(f"a function that returned {what}", expected, 'compute it with reduction="none" and reduce every axis but the first')
        return out.unsqueeze(1) if out.ndim == 1 else out

    return wrapped


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; flags and ``.grad`` are as before afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


class Capture:
    """Per-example gradients of ``model``'s trained parameters, proved on ``probe`` against autograd.

    Args:
        model: the module, in eval mode. Neither its parameters nor their ``.grad`` are ever modified.
        function: ``(model, batch) -> (n,)`` that the proof is made with: the task's loss.
        probe: a batch; its first two examples are used (one example is used twice).
        trained: names of the parameters to attribute; default all that require a gradient.
        group_of: parameters for which this gives different values never share a block (optimizer groups).

    Raises:
        BatchCoupling: an example's loss depends on the rest of its batch.
        GradientMismatch: gradients differ from autograd's; names the parameter.
        GradientError: the model drops at random, or gives another loss at every call.
        NotFinite: the loss or a gradient is NaN or infinite.

    The blocks are fixed from then on: what a later batch shows to need the fallback is laid out as before.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    >>> loss = lambda model, batch: model(batch[0]).squeeze(1) - batch[1]
    >>> capture = Capture(net, loss, (torch.randn(2, 3), torch.zeros(2)))
    >>> {name: tuple(b.shape) for name, b in capture.blocks.items()}
    {'0.weight': (1, 4, 4), '2.weight': (1, 1, 5)}
    """

    def __init__(
        self,
        model: nn.Module,
        function: Function,
        probe: Batch,
        trained: tuple[str, ...] | None = None,
        group_of: Callable[[str], Hashable] = lambda name: 0,
    ) -> None:
        self.model, self.group_of = model, group_of
        self._names = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        names = trained if trained is not None else tuple(n for n, p in model.named_parameters() if p.requires_grad)
        missing = [n for n in names if n not in self._parameters]
        if missing:
            raise InputError(f"parameters {missing[:3]} that the model does not have", f"names among {list(self._parameters)[:3]} ...", "check trained=")
        self.trained = tuple(dict.fromkeys(self._names[id(self._parameters[n])] for n in names))  # a tied parameter counts once
        if not self.trained:
            raise InputError("a model without trained parameters", "at least one parameter with requires_grad", "unfreeze what was trained")
        self.blocks: dict[str, Block] = {}
        self._sums: dict[Hashable, bool] = {}
        self.at_once = 0  # rows that the model sees at once, where one example has more of them; 0: all
        self._layouts: dict[Hashable, dict[Call, Layout]] = {}
        self._rounding = max((torch.finfo(p.dtype).eps for p in self._parameters.values() if p.is_floating_point()), default=0.0)
        self._seen: dict[Hashable, list[tuple[int, ...]]] = {}
        self.fallback: dict[str, str] = {}
        self._settled = False
        self.sites = self._find_sites()
        self._lay_out()
        self.prove(function, probe)
        self._settled = True

    # -- which parameter is covered by what ------------------------------------------------------------------------------------

    def _find_sites(self) -> list[Site]:
        sites = []
        for path, module in self.model.named_modules():
            rule = rule_of(module)
            if rule is None:
                continue
            weight, bias = (self._canonical(module._parameters.get(kind)) for kind in ("weight", "bias"))
            if weight or bias:
                sites.append(Site(path, module, rule, weight, bias))
        return sites

    def _canonical(self, parameter: Tensor | None) -> str | None:
        name = self._names.get(id(parameter)) if parameter is not None else None
        return name if name in self.trained and name not in self.fallback else None

    def _lay_out(self) -> None:
        """One block per weight with a rule (its bias folded in where both are trained alike and nothing else uses them), and one per
        remaining parameter."""
        owners: dict[str, list[Site]] = {}
        for site in self.sites:
            for name in (site.weight, site.bias):
                if name:
                    owners.setdefault(name, []).append(site)
        odd = [name for name, users in owners.items() if len({user.orientation(name) for user in users}) > 1]
        if odd:
            self.fallback.update(dict.fromkeys(odd, "the modules that share it lay it out differently"))
            self.sites = self._find_sites()
            self._lay_out()
            return
        blocks: dict[str, Block] = {}
        for site in self.sites:
            if site.weight and site.weight not in blocks:
                self._add_weight(site, owners, blocks)
        inside = {name for block in blocks.values() for name in block.parameters}
        for name in self.trained:
            if name not in inside:
                blocks[name] = Block(name, (name,), tuple(self._parameters[name].shape) or (1,))
            if name not in owners:
                self.fallback.setdefault(name, "no rule")
        order = {name: k for k, name in enumerate(self.trained)}
        self.blocks = dict(sorted(blocks.items(), key=lambda item: order[item[0]]))

    def _add_weight(self, site: Site, owners: dict[str, list[Site]], blocks: dict[str, Block]) -> None:
        name = site.weight
        assert name is not None
        parameter = self._parameters[name]
        if site.rule.groups is None:
            blocks[name] = Block(name, (name,), tuple(parameter.shape))
            return
        users = [user for user in owners[name] if user.weight == name]
        bias = site.bias
        site.folded = (
            bias is not None and site.rule.fold and len(users) == 1 and len(owners[bias]) == 1 and self.group_of(name) == self.group_of(bias)
        )
        groups = site.rule.groups(site.module)
        rows = (parameter.shape[1] if site.rule.transpose else parameter.shape[0]) // groups
        inner = parameter.numel() // rows // groups
        parameters = (name, bias) if site.folded and bias else (name,)
        given = site.rule.given if all(user.rule.given == site.rule.given for user in users) else ""
        indexed = any(user.rule.indexed for user in users)
        shape = (groups, rows, inner + site.folded)
        blocks[name] = Block(name, parameters, shape, matrix=True, transpose=site.rule.transpose, given=given, indexed=indexed)

    @property
    def coverage(self) -> dict[str, str]:
        """How the gradient of each trained parameter is obtained: the module class of its rule, or why it takes the fallback."""
        how = {name: type(site.module).__name__ for site in reversed(self.sites) for name in (site.weight, site.bias) if name}
        return {name: how.get(name) or f"exact fallback ({self.fallback[name]})" for name in self.trained}

    @property
    def bytes_per_example(self) -> int:
        """A rough upper estimate of the memory that one example takes in a pass: layers' outputs, twice over, and gradients formed."""
        outputs = max((sum(torch.Size(shape).numel() for shape in shapes) for shapes in self._seen.values()), default=0)
        return 4 * (6 * outputs + max(block.size for block in self.blocks.values()) // 4)

    # -- one forward pass with hooks ---------------------------------------------------------------------------------------------

    def _hook(self, site: Site, record: Recording) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
            x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            shape = tuple(output.shape)
            call = (site.path, record.calls.get(site.path, 0))
            record.calls[site.path] = call[1] + 1
            record.shapes[call] = shape
            record.coarsest = max(record.coarsest, torch.finfo(output.dtype).eps)
            if record.replays is not None:
                return output + _probe(output, record.replays.get((site.path, shape), shape))
            if record.layouts is None or not torch.is_grad_enabled() or not output.numel():
                return output
            # how often a module is called may depend on the data: a further call is read as the first one was
            known = record.layouts.get(call) or record.layouts.get((site.path, 0)) or Layout("unknown")
            how = known.at(shape, record.n)
            if how == "unknown":
                raise _Unreadable(site)
            probe = _probe(output, {"absent": (record.n, *shape), "shared": (record.n, *shape[1:])}.get(how, shape))
            site.expanded = site.expanded or how in ("absent", "shared")
            record.uses.append(Use(site, x.detach(), probe, how, shape))
            return output + probe

        return hook

    @contextmanager
    def _hooks(self, record: Recording) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self.sites:
                stack.callback(site.module.register_forward_hook(self._hook(site, record), prepend=True, with_kwargs=True).remove)
            yield

    def _layout_of(self, name: Hashable, function: Function, batch: Batch) -> dict[Call, Layout]:
        """Where the examples are at each call of each site under ``function``, found by running one and two examples, for each
        shape that examples have."""
        key = (name, tuple(t.shape[1:] for t in leaves(batch)))
        if key not in self._layouts:
            records = []
            for count in (1, 2):
                record = Recording(count, None)
                with torch.no_grad(), self._hooks(record):
                    function(self.model, take(batch, torch.zeros(count, dtype=torch.long)))
                records.append(record.shapes)
                self._rounding = max(self._rounding, record.coarsest)
            self._seen[key] = list(records[0].values())
            self._layouts[key] = self._told_apart(layouts_of(*records))
        return self._layouts[key]

    def _told_apart(self, layouts: dict[Call, Layout]) -> dict[Call, Layout]:
        """An output that does not show the examples and has a first axis of length 1 may be that of a single position: as other
        lengths show, where there were any."""
        seen = {(path, known.axes) for found in self._layouts.values() for (path, _), known in found.items() if known.how == "absent"}
        return {call: Layout("absent", own.axes) if own.how == "shared" and (call[0], own.axes) in seen else own for call, own in layouts.items()}

    def each(self, function: Function, batch: Batch, key: Hashable = None) -> Iterator[Gradients]:
        """Per-example gradients of ``function(model, batch)``: one item for a function that returns (n,), one per column for (n, k).

        Gradients are of each example alone, unscaled: no mean over the batch enters. ``key`` names the function where a new object
        is made for each batch: functions with one key call the model alike. A batch of examples with several noise events each is seen
        row by row, an example's gradient being the sum of its rows', where the function is such a sum.
        """
        if not isinstance(batch, Drawn) or (batch.each > 1 and not self._is_sum(function, batch, key)):
            yield from self._each(function, batch, key)
        elif self.at_once and self.at_once < batch.signal.numel():
            yield from self._in_parts(function, batch, key, max(1, self.at_once // len(batch.signal)))
        else:
            yield from (_gathered(gradients, batch.each) for gradients in self._each(function, batch.rows(), key))

    def _is_sum(self, function: Function, batch: Drawn, key: Hashable) -> bool:
        """Whether an example's value is the sum of its rows', as of a mean over noise events, and not, say, a function of that mean: found
        out once for each function, on the first example."""
        name = (function if key is None else key, batch.each)
        if name not in self._sums:
            one = take(batch, slice(0, 1))
            with torch.no_grad():
                whole, rows = (columns(function)(self.model, b) for b in (one, one.rows()))
            parts = rows.sum(0, keepdim=True)
            self._sums[name] = _relative(parts, whole) <= self.tolerance
        return self._sums[name]

    def _in_parts(self, function: Function, batch: Drawn, key: Hashable, width: int) -> Iterator[Gradients]:
        """Examples with more noise events than the model can see at once: ``width`` events of each at a time, their gradients summed."""
        total: list[dict[str, Tensor]] = []
        for start in range(0, batch.each, width):
            rows = batch.rows(slice(start, start + width))
            for column, gradients in enumerate(self._each(function, rows, key)):
                found = {name: gradient.dense() for name, gradient in _gathered(gradients, min(width, batch.each - start)).items()}
                if column == len(total):
                    total.append(found)
                else:
                    total[column] = {name: held + found[name] for name, held in total[column].items()}
        yield from ({name: BlockGradient((Rows(values),)) for name, values in column.items()} for column in total)

    def _each(self, function: Function, batch: Batch, key: Hashable) -> Iterator[Gradients]:
        layouts = self._layout_of(function if key is None else key, function, batch)
        function = columns(function)
        out, uses, found = self._placed(function, layouts, batch)
        for use in uses:
            use.columns = out.shape[1]
        for column in range(out.shape[1]):
            if column:
                found = self._differentiate(out, column, uses, keep=column < out.shape[1] - 1)
            pieces = self._pieces(uses, found, len(out))
            self._add_fallback(pieces, function, batch, column)
            yield self._collect(pieces, out, len(out))

    def gradients(self, function: Function, batch: Batch) -> Gradients:
        """Per-example gradients of a function that returns (n,)."""
        (only,) = self.each(function, batch)
        return only

    def _placed(
        self, function: Function, layouts: dict[Call, Layout], batch: Batch, suspects: tuple[str, ...] = ("flat",)
    ) -> tuple[Tensor, list[Use], Sequence[Tensor | None]]:
        """The function's values, the uses of all sites, and the first column's gradients there. ``suspects``: the layouts under which
        each row is checked to belong to its example; sites where it does not are sent to the fallback first."""
        out, uses = self._forward(function, layouts, batch)
        check = any(use.how in suspects for use in uses)
        found = self._differentiate(out, 0, uses, keep=check or out.shape[1] > 1)
        misplaced = self._misplaced(out, uses, found, suspects) if check else []
        if misplaced:
            self._demote(misplaced, "examples not in order in its output")
            return self._placed(function, layouts, batch, suspects)
        return out, uses, found

    def _forward(self, function: Function, layouts: dict[Call, Layout], batch: Batch) -> tuple[Tensor, list[Use]]:
        """The function's values and the uses of all sites; sites that cannot be read are sent to the fallback first."""
        record = Recording(size(batch), layouts)
        try:
            with frozen(self.model), torch.enable_grad(), self._hooks(record):
                out = function(self.model, batch)
        except _Unreadable as problem:
            self._demote([problem.site], "examples not found in its output")
            return self._forward(function, layouts, batch)
        except (RuntimeError, TaskError) as error:
            expanded = [use.site for use in record.uses if use.how in ("absent", "shared")]
            if not expanded or is_out_of_memory(error):
                raise
            self._demote(expanded, "its output cannot be expanded to the examples")
            return self._forward(function, layouts, batch)
        if len(out) != record.n:
            raise TaskError(f"a function that returned shape {tuple(out.shape)} for {record.n} examples", "(examples,)", "reduce every axis but the first")
        return out, record.uses

    def _misplaced(self, out: Tensor, uses: list[Use], found: Sequence[Tensor | None], suspects: tuple[str, ...]) -> list[Site]:
        """Sites with an output row that belongs to another example than its place says (sorted batches, tokens routed to experts).

        Weighing example i's loss by w_i multiplies the gradient of exactly the rows that belong to it by w_i.
        """
        plain = {id(use): g for use, g in zip(uses, found, strict=True) if g is not None}
        uses = [use for use in uses if use.how in suspects and id(use) in plain]
        n, kind = len(out), torch.promote_types(out.dtype, torch.float32)
        weights = 1 + (torch.arange(n, dtype=kind, device=out.device) * 0.6180339887498949) % 1
        wrong = []
        for use, h in zip(uses, self._differentiate(out, 0, uses, keep=out.shape[1] > 1, weights=weights), strict=True):
            g, h = (examples_first(t, use.how if use.how == "second" else "first", n).reshape(n, -1).to(kind) for t in (plain[id(use)], h))  # type: ignore[arg-type]
            if float((h - weights[:, None] * g).abs().max()) > self.tolerance * float(g.abs().max()):
                wrong.append(use.site)
        return wrong

    def _differentiate(
        self, out: Tensor, column: int, uses: list[Use], keep: bool, weights: Tensor | float = 1.0
    ) -> Sequence[Tensor | None]:
        """Gradients of the (weighted) sum of a column at the uses' probes. The backward pass runs checkpointed parts again: under the
        same conditions."""
        if not uses or not out.requires_grad:
            return [None] * len(uses)
        replays = {(use.site.path, use.shape): tuple(use.probe.shape) for use in uses}
        with torch.enable_grad():  # a sum, not grad_outputs=: given those, torch imports sympy, half a second and 60 MB
            total = (out[:, column] * weights).sum()
        with frozen(self.model), self._hooks(Recording(0, None, replays=replays)):
            return torch.autograd.grad(total, [use.probe for use in uses], retain_graph=keep, allow_unused=True)

    def _pieces(self, uses: list[Use], found: Sequence[Tensor | None], n: int) -> dict[str, list[Piece]]:
        pieces: dict[str, list[Piece]] = {}
        for use, g in zip(uses, found, strict=True):
            if g is not None:
                for name, piece in self._emit(use, g, n):
                    pieces.setdefault(name, []).append(piece)
        return pieces

    def _emit(self, use: Use, g: Tensor, n: int) -> Iterator[tuple[str, Piece]]:
        site = use.site
        g = examples_first(g, use.how, n) if use.how == "second" else g  # an expanded output has them first
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        emitted = site.rule.emit(site.module, use.input(n, g.dtype), g)
        weight, bias = emitted["weight"], emitted.get("bias")
        if site.weight:
            bare = site.folded and site.rule.prepare is None
            piece = with_ones(weight) if bare and isinstance(weight, Outer) else weight
            yield site.weight, regroup(piece, n)
        if site.bias and not site.folded and bias is not None:
            yield site.bias, regroup(bias, n)

    def _add_fallback(self, pieces: dict[str, list[Piece]], function: Function, batch: Batch, column: int) -> None:
        for method in (by_vmap, by_loop):
            names = tuple(n for n in self.trained if n in self.fallback and (self.fallback[n].endswith("loop") == (method is by_loop)))
            if not names:
                continue
            with frozen(self.model) if method is by_vmap else nullcontext():
                found = self._vectorised(names, function, batch, column) if method is by_vmap else by_loop(self.model, names, function, batch, column)
            for name, rows in found.items():
                pieces[name] = [Rows(rows.to(torch.promote_types(rows.dtype, torch.float32)))]

    def _vectorised(self, names: tuple[str, ...], function: Function, batch: Batch, column: int) -> dict[str, Tensor]:
        """By torch.func; nothing, and a note to use the plain loop from now on, where it cannot follow the model."""
        try:
            return by_vmap(self.model, names, function, batch, column)
        except Exception as error:
            if is_out_of_memory(error):
                raise
        self.fallback.update({name: self.fallback[name] + ", by a plain loop" for name in names})
        return {}

    def _collect(self, pieces: dict[str, list[Piece]], out: Tensor, n: int) -> Gradients:
        gradients = {}
        for name, block in self.blocks.items():
            found = pieces.get(name)
            if name in self.fallback:
                found = [Rows(block.pack({p: pieces[p][0].values for p in block.parameters}, lead=1))]  # type: ignore[union-attr]
            elif not found:  # the function does not reach this parameter: its gradient is zero
                dtype = torch.promote_types(out.dtype, torch.float32)
                found = [Rows(torch.zeros((), dtype=dtype, device=out.device).expand(n, *block.shape))]
                if block.matrix:
                    groups, rows, inner = block.shape
                    zero = torch.zeros((), dtype=dtype, device=out.device)
                    found = [Outer(zero.expand(n, groups, 1, inner), zero.expand(n, groups, 1, rows))]
            gradients[name] = BlockGradient(tuple(found))
        return gradients

    # -- the proof ---------------------------------------------------------------------------------------------------------------

    def _demote(self, sites: list[Site], reason: str) -> None:
        self._send_to_fallback({name for site in sites for name in (site.weight, site.bias) if name}, reason)

    def _send_to_fallback(self, names: set[str], reason: str) -> None:
        """Cover parameters by the fallback. Before the proof is over each then has a block of its own shape; later, when curvatures
        may have been laid out by the blocks, these stay, and all of a block's parameters go together."""
        if self._settled:
            names = {name for block in self.blocks.values() if names & set(block.parameters) for name in block.parameters}
        self.fallback.update(dict.fromkeys(names, reason))
        self.sites = self._find_sites()
        if not self._settled:
            self._lay_out()
        for site in self.sites:
            site.folded = site.weight is not None and site.bias is not None and site.bias in self.blocks[site.weight].parameters

    def prove(self, function: Function, probe: Batch, what: str = "loss") -> None:
        """Compare two examples with plain autograd; what a rule cannot reproduce goes to the fallback, what the fallback cannot is
        an error."""
        refuse_training_mode(self.model)
        refuse_batch_statistics(self.model)
        probe = probe.rows(slice(0, 1)) if isinstance(probe, Drawn) else probe  # one event each: what the model sees is proved
        pair = take(probe, torch.arange(2) % size(probe))
        self._layout_of(function, function, pair)
        values = self._refuse_unsteady(function, pair, what)
        truth = self._truth(function, pair)
        self._refuse_coupling(function, pair, values)
        for order in (pair, take(pair, torch.tensor([1, 0]))):  # a batch that the model sorts is in order in one of them at most
            self._placed(columns(function), self._layout_of(function, function, order), order, ("first", "second", "flat"))
        self._settle_fallback(function, pair, truth)
        wrong = self._mismatches(function, pair, truth)
        expanded = [site for site in self.sites if site.expanded]
        if wrong and expanded:  # expanding an output may have misled everything after it
            self._demote(expanded, "its output cannot be expanded to the examples")
            self._settle_fallback(function, pair, truth)
            wrong = self._mismatches(function, pair, truth)
        if wrong:
            self._send_to_fallback(set(wrong), "its rule does not reproduce autograd, as where the weight is also used outside its module")
            self._settle_fallback(function, pair, truth)
            wrong = self._mismatches(function, pair, truth)
        if wrong:
            raise GradientMismatch(
                f"per-example gradients of {wrong} differ from autograd's by {max(wrong.values()):.1e} (relative)",
                "equal gradients on the first two examples",
                "the model or the loss is not deterministic (dropout inside the function, random augmentation), or mixes examples; mend that, or report this model",
            )

    def _refuse_unsteady(self, function: Function, pair: Batch, what: str) -> Tensor:
        """The function's values, which must be finite and the same when asked for again."""
        with torch.no_grad():
            values, again = (columns(function)(self.model, pair) for _ in range(2))
        if not torch.isfinite(values).all():
            mend = f"look for a diverged checkpoint, or log(0), a division by zero or an overflow in the {what}"
            raise NotFinite(f"a {what} of {values.flatten().tolist()} on the first examples", "finite numbers", mend)
        if _relative(again, values) > self.tolerance:
            raise GradientError(
                f"a {what} of {values.flatten().tolist()} for two examples, and {again.flatten().tolist()} for the same two at the next call",
                f"a model and a {what} that give the same at every call",
                f"call model.eval(); look for dropout or other randomness that is still on (inside the {what}, or a module left in training mode)",
            )
        return values

    def _truth(self, function: Function, pair: Batch) -> dict[str, Tensor]:
        """Gradients of the pair by plain autograd, which must be finite."""
        try:
            truth = by_loop(self.model, self.trained, columns(function), pair, 0)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise GradientError(
                "a model with reentrant checkpointing, which gives no gradients of single tensors",
                "non-reentrant checkpointing, or none",
                "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
            ) from error
        for name, rows in truth.items():
            if not torch.isfinite(rows).all():
                raise NotFinite(
                    f"a gradient with NaN or infinite entries in {name!r} on the first examples, though their losses are finite",
                    "finite gradients",
                    "look for sqrt(0), log(0) or a division by zero in the loss (torch.where does not keep a NaN out of the gradient)",
                )
        return truth

    def _refuse_coupling(self, function: Function, pair: Batch, values: Tensor) -> None:
        alone = torch.cat([columns(function)(self.model, take(pair, slice(i, i + 1))).detach() for i in range(2)])
        if _relative(values, alone) > self.tolerance:
            raise BatchCoupling(
                f"losses {values.flatten().tolist()} for two examples together and {alone.flatten().tolist()} for each alone",
                "a loss that does not depend on the rest of the batch",
                "look for a mean over the batch inside the loss, batch statistics, or randomness (dropout) that is still on",
            )

    def _settle_fallback(self, function: Function, pair: Batch, truth: dict[str, Tensor]) -> None:
        """Choose torch.func where it works and agrees, the plain loop elsewhere."""
        names = tuple(n for n in self.trained if n in self.fallback and not self.fallback[n].endswith("loop"))
        if not names:
            return
        try:
            with frozen(self.model):
                found = by_vmap(self.model, names, columns(function), pair, 0)
            noise = self._noise(truth)
            bad = {n for n in names if not _relative(found[n], truth[n], noise) <= self.tolerance}
        except Exception as error:  # whatever stops torch.func: the loop is the definition itself
            if is_out_of_memory(error):
                raise
            bad = set(names)
        for name in bad:
            self.fallback[name] += ", by a plain loop"

    def _mismatches(self, function: Function, pair: Batch, truth: dict[str, Tensor]) -> dict[str, float]:
        found, noise = self.gradients(function, pair), self._noise(truth)
        wrong: dict[str, float] = {}
        for name, block in self.blocks.items():
            dense = block.unpack(found[name].dense(), {p: self._parameters[p].shape for p in block.parameters})
            for parameter, rows in dense.items():
                error = _relative(rows, truth[parameter], noise)
                if not error <= self.tolerance:
                    wrong[parameter] = error
        return wrong

    @property
    def tolerance(self) -> float:
        """How far gradients may differ from autograd's, relative to the largest entry, at the model's coarsest precision."""
        return 1e-9 if self._rounding < 1e-12 else 2e-3 if self._rounding < 1e-6 else 5e-2

    def _noise(self, truth: dict[str, Tensor]) -> float:
        """What rounding may leave of a gradient that is zero in exact arithmetic (the bias of attention's keys)."""
        largest = max((float(t.abs().max()) for t in truth.values() if t.numel()), default=0.0)
        return min(16 * self._rounding, 1e-2) * largest


class _Unreadable(Exception):
    """A site whose output does not show where the examples are."""

    def __init__(self, site: Site) -> None:
        self.site = site


def _probe(output: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros that take no memory, to be differentiated by."""
    return torch.zeros((), dtype=output.dtype, device=output.device).expand(shape).requires_grad_()


def _relative(a: Tensor, b: Tensor, noise: float = 0.0) -> float:
    """Largest difference, beyond ``noise``, relative to the largest entry of the reference."""
    if not b.numel():
        return 0.0
    scale = max(float(b.abs().max()), torch.finfo(b.dtype).tiny)
    difference = float((a.to(b.dtype) - b).abs().max())
    return 0.0 if difference <= noise else difference / scale
