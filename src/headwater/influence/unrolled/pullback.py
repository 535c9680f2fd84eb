"""One step backwards: what a change of the state before it, or of an example's weight in it, does to the measurements.

With the step ``s' = h(s, w)`` and ``c' = d measure / d s'`` (one for each query), ``c = c'^T dh/ds`` and ``d measure / d w = c'^T dh/dw``.
The optimizer is elementwise and pulled back by hand: it turns c' into a cotangent of the batch's gradient G, through the clipping of its
norm if there was one. What is left is
``d <G(θ, w), cotangent> / d (θ, w)``: a Hessian-vector product, and the product of each example's gradient with the cotangent, both from
one backward pass through the graph of the gradient (Pearlmutter 1994). Queries share that graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headwater.errors import GradientError
from headwater.training.replay import Bundle, Graph, Moments, Move, Player, State, Terms


@dataclass(frozen=True, eq=False)
class Cotangent:
    """Derivatives of the measurements, each (queries, ...), with respect to a :class:`State`. What is missing is 0."""

    weights: dict[str, Tensor]
    moments: dict[str, Moments] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)

    @property
    def queries(self) -> int:
        return len(next(iter(self.weights.values())))

    def flat(self) -> dict[str, Tensor]:
        """All tensors by a path, for the disk."""
        out = {f"weights/{n}": t for n, t in self.weights.items()} | {f"statistics/{n}": t for n, t in self.statistics.items()}
        return out | {f"moments/{key}/{n}": t for n, held in self.moments.items() for key, t in held.items()}

    @classmethod
    def of(cls, flat: dict[str, Tensor], device: torch.device) -> Cotangent:
        """The inverse of :meth:`flat`."""
        out = cls({}, {}, {})
        for path, tensor in flat.items():
            kind, _, name = path.partition("/")
            if kind == "moments":
                key, _, name = name.partition("/")
                out.moments.setdefault(name, {})[key] = tensor.to(device)
            elif kind in ("weights", "statistics"):
                getattr(out, kind)[name] = tensor.to(device)
        return out


@dataclass(frozen=True, eq=False)
class Pulled:
    """What one step backwards gives: the cotangent before it, and for each of the step's parts ``(first, last, (queries, n, terms))``, the
    derivative with respect to the weight of each example's terms."""

    before: Cotangent
    scores: list[tuple[int, int, Tensor]]


def pull(player: Player, state: State, move: Move, after: Cotangent, terms: Terms | None = None, lanes: int | None = None, graph: Graph | None = None) -> Pulled:
    """One step backwards from ``after``; ``state``: as ``player.begin`` gives it. ``lanes``: how many queries pass the graph at once.
    ``graph``: of the step, where it was kept (it is used up)."""
    values, graph = _gradient(player, state, move, terms, graph)
    weights, moments = dict(after.weights), dict(after.moments)
    pulls: dict[str, Tensor] = {}
    for rule, count, bundle in player.bundles(state, move, values):
        held, g = player.held(state, rule, bundle), None if rule.linear else bundle.join({n: t for n, t in values.items() if t is not None})
        upon, cotangents = bundle.join(after.weights), _upon_moments(after, bundle, held)
        upon, new, pulled = rule.backward(bundle.join(state.weights), held, count, g, upon, cotangents)
        weights.update(bundle.split(upon))
        pulls.update(bundle.split(pulled))
        split = {key: bundle.split(t) for key, t in new.items()}
        moments.update({n: {key: found[n] for key, found in split.items()} for n in bundle.shapes})
    if _moving(player, move):
        pulls = player.script.clipping(move.stage).pull(pulls, {n: t for n, t in values.items() if t is not None}, move.clip)
    if move.clip != 1.0:
        pulls = {n: move.clip * t for n, t in pulls.items()}
    statistics, scores = dict(after.statistics), []
    for part in reversed(move.parts):
        graph = graph or player.graph(state, move, part, terms)
        more, weighted, statistics = _through(graph, pulls, statistics, after.queries, lanes)
        for name, t in more.items():
            weights[name] = weights[name] + t
        if move.moved:
            scores.append((part.start, part.stop, weighted))
        graph = None
    return Pulled(Cotangent(weights, {} if move.begins else moments, statistics), scores[::-1])


def _moving(player: Player, move: Move) -> bool:
    """Whether the step's gradient was clipped by its norm, so that the factor moves with it."""
    return move.moved and move.clip < 1 and player.script.clipping(move.stage).kind == "norm"


def _upon_moments(after: Cotangent, bundle: Bundle, held: Moments) -> Moments:
    """The cotangents of a bundle's moments; 0 where nothing came back to them yet."""

    def of(name: str, key: str) -> Tensor:
        return after.moments[name][key] if name in after.moments else torch.zeros_like(after.weights[name])

    return {key: bundle.join({n: of(n, key) for n in bundle.shapes}) for key in held}


def _gradient(player: Player, state: State, move: Move, terms: Terms | None, graph: Graph | None) -> tuple[dict[str, Tensor | None], Graph | None]:
    """The values of the step's gradient, as far as the optimizer's derivative needs them, by the parameters that took part; and the
    graph that they came from, where the step had one part only (several graphs would not fit where one does)."""
    if not move.moved:
        return {}, None
    if len(move.parts) == 1:
        graph = graph or player.graph(state, move, move.parts[0], terms)
        return {n: g.detach() * move.clip if move.clip != 1.0 else g.detach() for n, g in graph.gradients.items()}, graph
    if all(rule.linear for rule in move.rules) and move.step in player.idle and not _moving(player, move):
        return dict.fromkeys(sorted(move.stage.trainable - player.idle[move.step])), None
    return dict(player.gradient(state, move).values), None


def _through(
    graph: Graph, pulls: dict[str, Tensor], statistics: dict[str, Tensor], queries: int, lanes: int | None
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """The pullback of a part's gradient and of the running statistics it wrote: cotangents of the parameters, of the terms' weights, and
    of the statistics before it."""
    outputs = [(g, pulls[n]) for n, g in graph.gradients.items() if n in pulls]
    outputs += [(t, statistics[n]) for n, t in graph.after.items() if n in statistics]
    outputs = [(t, c) for t, c in outputs if t.requires_grad]
    inputs = [*graph.leaves.values(), graph.weights, *graph.before.values()]
    found: list[Tensor | None] = [None] * len(inputs)
    if outputs:
        found = backward([t for t, _ in outputs], inputs, [c for _, c in outputs], lanes or queries)
    held = [torch.zeros(queries, *t.shape, dtype=t.dtype, device=t.device) if f is None else f for f, t in zip(found, inputs, strict=True)]
    n = len(graph.leaves)
    read = dict(zip(graph.before, held[n + 1 :], strict=True))
    return dict(zip(graph.leaves, held[:n], strict=True)), held[n], {**statistics, **read} if statistics else {}


def _once(what: str) -> GradientError:
    return GradientError(
        f"an operation of the model that cannot be differentiated twice: {what}",
        "a model whose gradient can be differentiated",
        "use the plain implementation of that operation (attn_implementation='eager' in transformers, say)",
    )


def prove_twice(gradients: Iterable[Tensor]) -> int:
    """How many operations the graph of the gradients has. Raise GradientError where a function marked ``once_differentiable`` is among them:
    torch would only complain if something behind it were asked for, and otherwise take its gradient as constant."""
    waiting, seen = [g.grad_fn for g in gradients if g.grad_fn is not None], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name().endswith("::Error"):
            raise _once("a custom function marked once_differentiable")
        waiting += [following for following, _ in node.next_functions if following is not None]
    return len(seen)


def _together(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: list[Tensor], last: bool) -> list[list[Tensor | None]]:
    """The derivatives of all ``cotangents`` in one pass, or of each in its own where that fails: the derivatives of some operations (group norm,
    attention) cannot be batched, and say so in many words. What is wrong otherwise is raised then."""
    count = len(cotangents[0])
    if count > 1:
        with suppress(RuntimeError):
            return [list(torch.autograd.grad(list(outputs), list(inputs), cotangents, allow_unused=True, retain_graph=True, is_grads_batched=True))]
    parts: list[list[Tensor | None]] = []
    for k in range(count):
        one = torch.autograd.grad(list(outputs), list(inputs), [c[k] for c in cotangents], allow_unused=True, retain_graph=not last or k + 1 < count)
        parts.append([None if t is None else t.unsqueeze(0) for t in one])
    return parts


def backward(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], lanes: int) -> list[Tensor | None]:
    """``d <outputs, cotangent> / d inputs`` for each cotangent (their leading axis), ``lanes`` of them at once. The graph is freed."""
    count = len(cotangents[0])
    parts: list[list[Tensor | None]] = []
    try:
        for start in range(0, count, lanes):
            some = slice(start, min(start + lanes, count))
            parts += _together(outputs, inputs, [c[some] for c in cotangents], last=some.stop == count)
    except RuntimeError as error:
        if not any(words in str(error) for words in ("derivative for", "double backward", "differentiate twice")):
            raise
        raise _once(str(error).splitlines()[0]) from error
    if len(parts) == 1:
        return parts[0]
    return [None if column[0] is None else torch.cat([t for t in column if t is not None]) for column in zip(*parts, strict=True)]
