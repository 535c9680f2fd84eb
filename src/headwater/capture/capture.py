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

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from headwater.capture.blocks import Block, BlockGradient, Lookup, Outer, Piece, Rows
from headwater.capture.fallback import Function, by_loop, by_vmap
from headwater.capture.rules import Rule, refuse_batch_statistics, rule_of
from headwater.errors import BatchCoupling, GradientMismatch, InputError, NotFinite, TaskError
from headwater.tasks.batches import Batch, size, take

Gradients = dict[str, BlockGradient]


@dataclass
class Site:
    """A module that a rule covers: the canonical names of its weight and bias (None where not trained or not there)."""

    path: str
    module: nn.Module
    rule: Rule
    weight: str | None
    bias: str | None
    folded: bool = False
    copies: bool = False  # its input is changed in place after it: keep a copy


@dataclass
class Use:
    """One call of a site: its input, the zeros added to its output, and where the examples are (see :func:`layout`)."""

    site: Site
    x: Tensor
    version: int
    probe: Tensor
    layout: str


@dataclass
class Recording:
    """What the hooks of one forward pass collect; ``layouts`` is given, or None while it is being found out."""

    n: int
    layouts: dict[tuple[str, int], str] | None
    uses: list[Use] = field(default_factory=list)
    shapes: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def layout(one: tuple[int, ...] | None, two: tuple[int, ...] | None) -> str:
    """Where the examples are in a layer's output, from its shapes for one and for two examples.

    "first": axis 0; "second": axis 1 (time-major); "flat": axis 0 holds examples times positions; "absent": the layer does not see
    the examples at all (position embeddings), so its output is expanded; "unknown" otherwise.
    """
    if one is None or two is None or len(one) != len(two):
        return "unknown"
    changed = [k for k, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if not changed:
        return "absent"
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
    if how == "absent" and len(t) != n:
        return t.expand(n, *t.shape[1:]) if len(t) == 1 else t.unsqueeze(0).expand(n, *t.shape)
    return t


def regroup(piece: Piece, n: int) -> Piece:
    """A piece over examples times positions as a piece over ``n`` examples."""
    if len(piece) == n:
        return piece
    if isinstance(piece, Outer):  # (n*k, groups, shared, f) -> (n, groups, k*shared, f)
        a, g = (t.unflatten(0, (n, -1)).transpose(1, 2).flatten(2, 3) for t in (piece.a, piece.g))
        return Outer(a, g)
    if isinstance(piece, Lookup):
        return Lookup(piece.index.unflatten(0, (n, -1)).flatten(1), piece.a.unflatten(0, (n, -1)).flatten(1, 2), piece.entries)
    return Rows(piece.values.unflatten(0, (n, -1)).sum(1))


def with_ones(piece: Outer) -> Outer:
    """The bias as one more input that is always 1."""
    return Outer(torch.cat([piece.a, torch.ones_like(piece.a[..., :1])], -1), piece.g)


def columns(function: Function) -> Function:
    """A function that returns (n,) as one that returns (n, 1)."""

    def wrapped(model: nn.Module, batch: Batch) -> Tensor:
        out = function(model, batch)
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
        NotFinite: the loss or a gradient is NaN or infinite.

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
        refuse_batch_statistics(model)
        self.model, self.group_of = model, group_of
        self.trained = trained if trained is not None else tuple(n for n, p in model.named_parameters() if p.requires_grad)
        if not self.trained:
            raise InputError("a model without trained parameters", "at least one parameter with requires_grad", "unfreeze what was trained")
        self._names = {id(p): n for n, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        missing = [n for n in self.trained if n not in self._parameters]
        if missing:
            raise InputError(f"parameters {missing[:3]} that the model does not have", f"names among {list(self._parameters)[:3]} ...", "check trained=")
        self._layouts: dict[Hashable, dict[tuple[str, int], str]] = {}
        self._seen: dict[Hashable, list[tuple[int, ...]]] = {}
        self.fallback: dict[str, str] = {}
        self.sites = self._find_sites()
        self.blocks = self._lay_out()
        self.prove(function, probe)

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

    def _lay_out(self) -> dict[str, Block]:
        """One block per weight with a rule (its bias folded in where both are trained alike and nothing else uses them), and one per
        remaining parameter."""
        owners: dict[str, list[Site]] = {}
        for site in self.sites:
            for name in (site.weight, site.bias):
                if name:
                    owners.setdefault(name, []).append(site)
        blocks: dict[str, Block] = {}
        for site in self.sites:
            if site.weight and site.weight not in blocks:
                self._add_weight(site, owners, blocks)
        inside = {name for block in blocks.values() for name in block.parameters}
        for name in self.trained:
            if name not in inside:
                blocks[name] = Block(name, (name,), tuple(self._parameters[name].shape))
            if name not in owners:
                self.fallback.setdefault(name, "no rule")
        return dict(sorted(blocks.items(), key=lambda item: self.trained.index(item[0])))

    def _add_weight(self, site: Site, owners: dict[str, list[Site]], blocks: dict[str, Block]) -> None:
        name = site.weight
        assert name is not None
        parameter = self._parameters[name]
        if site.rule.groups is None:
            blocks[name] = Block(name, (name,), tuple(parameter.shape))
            return
        users = owners[name]
        bias = site.bias
        site.folded = (
            bias is not None and site.rule.fold and len(users) == 1 and len(owners[bias]) == 1 and self.group_of(name) == self.group_of(bias)
        )
        groups = site.rule.groups(site.module)
        rows = (parameter.shape[1] if site.rule.transpose else parameter.shape[0]) // groups
        inner = parameter.numel() // rows // groups
        parameters = (name, bias) if site.folded and bias else (name,)
        given = site.rule.given if all(user.rule.given == site.rule.given for user in users) else ""
        shape = (groups, rows, inner + site.folded)
        blocks[name] = Block(name, parameters, shape, matrix=True, transpose=site.rule.transpose, given=given)

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
            x = args[0] if args else next(iter(kwargs.values()))
            call = (site.path, record.calls.get(site.path, 0))
            record.calls[site.path] = call[1] + 1
            record.shapes[call] = tuple(output.shape)
            if record.layouts is None or not torch.is_grad_enabled():
                return output
            how = record.layouts.get(call, "first")
            if how == "unknown" or (how == "first" and len(output) != record.n):
                raise _Unreadable(site)
            shape = tuple(output.shape)
            if how == "absent":
                shape = (record.n, *shape[1:]) if shape[0] == 1 else (record.n, *shape)
            probe = torch.zeros((), dtype=output.dtype, device=output.device).expand(shape).requires_grad_()
            kept = x.detach().clone() if site.copies else x.detach()
            record.uses.append(Use(site, kept, kept._version, probe, how))
            return output + probe

        return hook

    @contextmanager
    def _hooks(self, record: Recording) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self.sites:
                stack.callback(site.module.register_forward_hook(self._hook(site, record), with_kwargs=True).remove)
            yield

    def _layout_of(self, key: Hashable, function: Function, batch: Batch) -> dict[tuple[str, int], str]:
        """Where the examples are at each call of each site under ``function``, found by running one and two examples."""
        if key not in self._layouts:
            records = []
            for count in (1, 2):
                record = Recording(count, None)
                with torch.no_grad(), self._hooks(record):
                    function(self.model, take(batch, torch.zeros(count, dtype=torch.long)))
                records.append(record.shapes)
            self._seen[key] = list(records[0].values())
            self._layouts[key] = {call: layout(*(shapes.get(call) for shapes in records)) for call in {**records[0], **records[1]}}
        return self._layouts[key]

    def each(self, function: Function, batch: Batch, key: Hashable = None) -> Iterator[Gradients]:
        """Per-example gradients of ``function(model, batch)``: one item for a function that returns (n,), one per column for (n, k).

        Gradients are of each example alone, unscaled: no mean over the batch enters. ``key`` names the function where a new object
        is made for each batch: functions with one key call the model alike.
        """
        layouts = self._layout_of(key or function, function, batch)
        function = columns(function)
        out, uses = self._forward(function, layouts, batch)
        for column in range(out.shape[1]):
            pieces = self._backward(out, column, uses, size(batch))
            self._add_fallback(pieces, function, batch, column)
            yield self._collect(pieces, out, size(batch))

    def gradients(self, function: Function, batch: Batch) -> Gradients:
        """Per-example gradients of a function that returns (n,)."""
        (only,) = self.each(function, batch)
        return only

    def _forward(self, function: Function, layouts: dict[tuple[str, int], str], batch: Batch) -> tuple[Tensor, list[Use]]:
        record = Recording(size(batch), layouts)
        try:
            with frozen(self.model), torch.enable_grad(), self._hooks(record):
                out = function(self.model, batch)
        except _Unreadable as problem:
            self._demote(problem.site, "examples not found in its output")
            return self._forward(function, layouts, batch)
        if out.ndim != 2 or len(out) != size(batch):
            raise TaskError(f"a function that returned shape {tuple(out.shape)} for {size(batch)} examples", "(examples,)", "reduce every axis but the first")
        changed = {id(use.site): use.site for use in record.uses if use.x._version != use.version}
        if changed:  # an in-place operation overwrote a layer's input: run again, keeping copies there
            for site in changed.values():
                site.copies = True
            return self._forward(function, layouts, batch)
        return out, record.uses

    def _backward(self, out: Tensor, column: int, uses: list[Use], n: int) -> dict[str, list[Piece]]:
        pieces: dict[str, list[Piece]] = {}
        if not uses or not out.requires_grad:
            return pieces
        last = column == out.shape[1] - 1
        found = torch.autograd.grad(out[:, column].sum(), [use.probe for use in uses], retain_graph=not last, allow_unused=True)
        for use, g in zip(uses, found, strict=True):
            if g is not None:
                for name, piece in self._emit(use, g, n):
                    pieces.setdefault(name, []).append(piece)
        return pieces

    def _emit(self, use: Use, g: Tensor, n: int) -> Iterator[tuple[str, Piece]]:
        site = use.site
        x, g = (examples_first(t, use.layout, n) for t in (use.x, g))
        lowest = torch.promote_types(g.dtype, torch.float32)
        g = g.to(lowest)
        x = x.to(lowest) if x.is_floating_point() else x
        emitted = site.rule.emit(site.module, x, g)
        weight, bias = emitted["weight"], emitted.get("bias")
        if site.weight:
            piece = with_ones(weight) if site.folded and isinstance(weight, Outer) else weight
            yield site.weight, regroup(piece, n)
        if site.bias and not site.folded and bias is not None:
            yield site.bias, regroup(bias, n)

    def _add_fallback(self, pieces: dict[str, list[Piece]], function: Function, batch: Batch, column: int) -> None:
        for method in (by_vmap, by_loop):
            names = tuple(n for n in self.trained if n in self.fallback and (self.fallback[n].endswith("loop") == (method is by_loop)))
            if not names:
                continue
            with frozen(self.model) if method is by_vmap else ExitStack():
                for name, rows in method(self.model, names, function, batch, column).items():
                    pieces.setdefault(name, []).append(Rows(rows.to(torch.promote_types(rows.dtype, torch.float32))))

    def _collect(self, pieces: dict[str, list[Piece]], out: Tensor, n: int) -> Gradients:
        gradients = {}
        for name, block in self.blocks.items():
            found = pieces.get(name)
            if not found:  # the function does not reach this parameter: its gradient is zero
                dtype = torch.promote_types(out.dtype, torch.float32)
                found = [Rows(torch.zeros((), dtype=dtype, device=out.device).expand(n, *block.shape))]
                if block.matrix:
                    groups, rows, inner = block.shape
                    zero = torch.zeros((), dtype=dtype, device=out.device)
                    found = [Outer(zero.expand(n, groups, 1, inner), zero.expand(n, groups, 1, rows))]
            gradients[name] = BlockGradient(tuple(found))
        return gradients

    # -- the proof ---------------------------------------------------------------------------------------------------------------

    def _demote(self, site: Site, reason: str) -> None:
        """Send a site's parameters to the fallback, with the same blocks' names but their own shapes."""
        for name in (site.weight, site.bias):
            if name:
                self.fallback[name] = reason
        self.sites = self._find_sites()
        self.blocks = self._lay_out()

    def prove(self, function: Function, probe: Batch) -> None:
        """Compare two examples with plain autograd; what a rule cannot reproduce goes to the fallback, what the fallback cannot is
        an error."""
        pair = take(probe, torch.arange(2) % size(probe))
        values = columns(function)(self.model, pair).detach()
        if not torch.isfinite(values).all():
            raise NotFinite(f"a loss of {values.flatten().tolist()} on the first examples", "finite losses", "look for a diverged checkpoint or an overflow in the loss")
        truth = by_loop(self.model, self.trained, columns(function), pair, 0)
        self._refuse_coupling(function, pair, values)
        self._settle_fallback(function, pair, truth)
        wrong = self._mismatches(function, pair, truth)
        for name in wrong:
            self.fallback[name] = "its rule does not reproduce autograd: the weight is also used outside its module"
        if wrong:
            self.sites = self._find_sites()
            self.blocks = self._lay_out()
            self._settle_fallback(function, pair, truth)
            wrong = self._mismatches(function, pair, truth)
        if wrong:
            raise GradientMismatch(
                f"per-example gradients of {wrong} differ from autograd's by {max(wrong.values()):.1e} (relative)",
                "equal gradients on the first two examples",
                "the model or the loss is not deterministic (dropout inside the function, random augmentation), or mixes examples; mend that, or report this model",
            )

    def _refuse_coupling(self, function: Function, pair: Batch, values: Tensor) -> None:
        alone = torch.cat([columns(function)(self.model, take(pair, slice(i, i + 1))).detach() for i in range(2)])
        if _relative(values, alone) > _tolerance(values):
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
            bad = {n for n in names if _relative(found[n], truth[n]) > _tolerance(found[n])}
        except (RuntimeError, ValueError, TypeError, NotImplementedError):
            bad = set(names)
        for name in bad:
            self.fallback[name] += ", by a plain loop"

    def _mismatches(self, function: Function, pair: Batch, truth: dict[str, Tensor]) -> dict[str, float]:
        found = self.gradients(function, pair)
        wrong: dict[str, float] = {}
        for name, block in self.blocks.items():
            dense = block.unpack(found[name].dense(), {p: self._parameters[p].shape for p in block.parameters})
            for parameter, rows in dense.items():
                error = _relative(rows, truth[parameter])
                if error > _tolerance(truth[parameter]):
                    wrong[parameter] = error
        return wrong


class _Unreadable(Exception):
    """A site whose output does not show where the examples are."""

    def __init__(self, site: Site) -> None:
        self.site = site


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest entry of the reference."""
    scale = max(float(b.abs().max()) if b.numel() else 0.0, torch.finfo(b.dtype).tiny)
    return float((a.to(b.dtype) - b).abs().max()) / scale if b.numel() else 0.0


def _tolerance(t: Tensor) -> float:
    return {torch.float64: 1e-9, torch.float32: 2e-3}.get(t.dtype, 5e-2)
