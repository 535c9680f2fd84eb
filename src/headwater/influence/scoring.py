"""The one loop over a method's rows: query side once, training gradients streamed, scores accumulated.

For each pass (a stage's examples at one set of weights) every row that uses it contributes

    score[q, m] -= < phi(H) u_q, grad loss(m) > / (N * checkpoints of the row)

where u is the query gradient at the final weights, carried back through later rows by psi. The minus sign (training descends the
loss) and the 1/N stand here and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headwater.capture import Gradients
from headwater.capture.stream import stream
from headwater.errors import NotFinite
from headwater.influence.engine import Engine
from headwater.influence.methods import Asking, Row, Table, Weights
from headwater.influence.queries import Asked
from headwater.influence.vectors import Queries, Whole, dots_and_squares, lengths_of, respond, scaled, summed, through, vectors_of
from headwater.tasks.batches import Batch
from headwater.tasks.diffusion import Grid


class Pass(NamedTuple):
    """A stage, the weights at which its examples' gradients are taken, and the noise events (None: as the examples come)."""

    stage: int
    weights: Weights
    events: Any = None



@dataclass(frozen=True)
class Use:
    """One row's part in one pass: which method and row, and the factor ``share / (N * checkpoints)``."""

    method: int
    index: int
    row: Row
    factor: float

    @property
    def side(self) -> Hashable:
        """Rows with one and the same query side share it."""
        row = self.row
        own = row.asking is None or row.refine is not None
        return (self.method, self.index) if own else (row.asking, row.phi, row.curvature, row.pace, row.stage)


@dataclass(frozen=True)
class Seen:
    """A use ready to be compared with training gradients: its query side ``psi``, and what products are divided by besides the length of
    the training gradient, where that is to count at unit norm: for cosines the queries' lengths, else 1."""

    use: Use
    vectors: Queries
    norms: Tensor | None

    def part(self, rows: slice) -> Seen:
        """Of some of the queries."""
        return replace(self, vectors={n: v.part(rows) for n, v in self.vectors.items()}, norms=None if self.norms is None else self.norms[rows])


def passes(tables: list[Table], engine: Engine) -> dict[Pass, list[Use]]:
    """Every pass that the tables need, latest weights first, with the rows that share it."""
    found: dict[Pass, list[Use]] = {}
    for m, table in enumerate(tables):
        for r, row in enumerate(table.rows):
            count = row.examples or engine.run.stages[row.stage].size
            for weights in row.at:
                found.setdefault(Pass(row.stage, weights, row.events), []).append(Use(m, r, row, row.share / (count * len(row.at))))
    return dict(sorted(_split(found, tables).items(), key=lambda item: (-max(item[0].weights), -item[0].stage)))


def _split(found: dict[Pass, list[Use]], tables: list[Table]) -> dict[Pass, list[Use]]:
    """A pass over several timesteps is left out where others go over each of them alone: its rows, being linear in the loss, are the mean of
    theirs. (Rows that bring each gradient to unit norm are not.)"""
    for where in [w for w in found if isinstance(w.events, Grid) and len(set(w.events.timesteps)) == len(w.events.timesteps) > 1]:
        parts = [where._replace(events=part) for part in where.events.parts()]
        linear = not any(use.row.unit or tables[use.method].cosine for use in found[where])
        if linear and all(part in found for part in parts):
            for part in parts:
                found[part] += [replace(use, factor=use.factor / len(parts)) for use in found[where]]
            del found[where]
    return found


def query_gradients(engine: Engine, asked: Asked, weights: Weights, rows: slice) -> Queries:
    """Gradients of the measurement at ``weights`` for the asked-for rows in ``rows``: {block: (queries, *shape)}."""
    engine.load(weights, asked.averaged)
    start, stop = rows.start, rows.stop
    one_each = asked.names is None
    out: Queries = {}
    for examples, row_of in zip(asked.examples, asked.rows, strict=True):
        ids = np.flatnonzero((row_of >= start) & (row_of < stop))

        def process(batch: Batch, _: np.ndarray) -> Queries:
            gradients = engine.capture.gradients(asked.measure, batch)
            return {name: vectors_of(gradient, factored=one_each) for name, gradient in gradients.items()}

        size = max(1, min(engine.batch_size, 2**26 // max(1, sum(b.size for b in engine.capture.blocks.values()))))
        for part, vectors in stream(examples, ids, process, batch_size=size, device=engine.run.device):
            target = torch.as_tensor(row_of[part] - start, device=engine.run.device)
            for name, v in vectors.items():
                before = out.get(name)
                if before is not None and type(before) is not type(v):  # a layer went to the fallback in between
                    before, v = Whole(before.whole()), Whole(v.whole())
                out[name] = v.placed(target, stop - start, before)
    _require_finite(out, "the measure", weights)
    return out


def _require_finite(vectors: Queries, what: str, weights: Weights) -> None:
    for name, v in vectors.items():
        if not v.finite():
            raise NotFinite(
                f"gradients of {what} with NaN or infinite values in {name!r} at step {weights[-1]}",
                "finite gradients",
                "look for log(0), a division by zero or an overflow in it; hw.tasks.log_odds is a stable log-odds",
            )


class QuerySide:
    """The query side of all rows for one chunk of queries, made when a pass first needs it and dropped after its last."""

    def __init__(self, engine: Engine, tables: list[Table], base: Queries, asked: Asked, rows: slice, tolerance: float) -> None:
        self.engine, self.tables, self.asked, self.rows, self.tolerance = engine, tables, asked, rows, tolerance
        self.carried = [base] * len(tables)
        self.held: dict[Hashable, Queries] = {}
        self.left = Counter(use.side for uses in passes(tables, engine).values() for use in uses)

    def prepare(self, uses: list[Use]) -> list[Seen]:
        """The rows of one pass, latest row of each method first; call before the pass's weights are loaded."""
        seen = []
        for use in sorted(uses, key=lambda u: -u.index):
            if use.side not in self.held:
                self.held[use.side] = self._respond(use)
            vectors, norms = self.held[use.side], None
            if self.tables[use.method].cosine:
                norms = lengths_of(vectors)
            elif use.row.unit:
                norms = torch.ones(self.rows.stop - self.rows.start, device=self.engine.run.device)
            seen.append(Seen(use, vectors, norms))
        return seen

    def release(self, uses: list[Use]) -> None:
        """Forget the rows whose last pass this was."""
        for use in uses:
            self.left[use.side] -= 1
            if self.left[use.side] == 0:
                del self.held[use.side]

    def asking(self, asking: Asking) -> Queries:
        """The query gradients that a row asks for: their mean over noise events, each at unit norm where that is asked for."""
        total: Queries | None = None
        for events in asking.events:
            u = query_gradients(self.engine, self.asked.over(events), asking.at, self.rows)
            if asking.unit or len(asking.events) > 1:
                length = lengths_of(u) if asking.unit else torch.ones(())
                u = scaled(u, torch.where(length > 0, 1 / length.clamp_min(torch.finfo(length.dtype).tiny), 0.0).expand(len(next(iter(u.values())))) / len(asking.events))
            total = summed(total, u)
        assert total is not None
        return total

    def _respond(self, use: Use) -> Queries:
        row = use.row
        u = self.carried[use.method] if row.asking is None else self.asking(row.asking)
        if row.refine is not None:
            psi = row.psi if use.index > 0 else None
            seen, carried = self.engine.refined(row).solve(row.phi, psi, len(next(iter(u.values()))), lambda rows: {n: side.part(rows).whole() for n, side in u.items()})
            if carried is not None:
                self.carried[use.method] = {n: Whole(v) for n, v in carried.items()}
            return {n: Whole(v) for n, v in seen.items()}
        flow = self.engine.flow(row)
        if row.psi is not None and use.index > 0:
            self.carried[use.method] = through(flow.carry(row.psi), u)
        return respond(flow, row.phi, u, self.tolerance)


def contribution(seen: list[Seen], gradients: Gradients, paired: bool) -> list[Tensor]:
    """What a batch adds to each row's scores: (queries, n) for all pairs, (1, n) for query i with example i."""
    lengths: Tensor | None = None
    if paired:
        dots = [torch.stack([s.vectors[name].paired(g) for name, g in gradients.items()]).sum(0).unsqueeze(0) for s in seen]
    else:
        dots = [torch.zeros(0)] * len(seen)
        squares = []
        for name, gradient in gradients.items():
            added, square = dots_and_squares([s.vectors[name] for s in seen], gradient, any(s.norms is not None for s in seen))
            squares += [] if square is None else [square]
            for k, dot in enumerate(added):
                dots[k] = dots[k] + dot if dots[k].numel() else dot
        lengths = torch.stack(squares).sum(0).sqrt() if squares else None
    out = []
    for s, dot in zip(seen, dots, strict=True):
        if s.norms is not None:
            lengths = _lengths(gradients) if lengths is None else lengths
            scale = s.norms.unsqueeze(0) if paired else s.norms.unsqueeze(1)
            product = scale * lengths
            dot = torch.where(product > 0, dot / product.clamp_min(torch.finfo(dot.dtype).tiny), 0.0)
        out.append(-s.use.factor * dot)
    return out


def _lengths(gradients: Gradients) -> Tensor:
    """Length of each example's gradient over all blocks, (n,)."""
    return torch.stack([g.square_norms() for g in gradients.values()]).sum(0).sqrt()


def score_pass(
    engine: Engine, where: Pass, seen: list[Seen], ids: np.ndarray, paired: bool
) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
    """Stream a stage's examples ``ids`` at the pass's weights; yield what each batch adds to each seen row's scores. ``paired``: the
    queries are those very examples, each to be compared with itself."""
    stage, data = engine.run.stages[where.stage], engine.data(where.stage, where.events)
    engine.load(where.weights)

    def process(batch: Batch, part: np.ndarray) -> list[Tensor]:
        first = int(np.searchsorted(ids, part[0]))
        mine = [s.part(slice(first, first + len(part))) for s in seen] if paired else seen
        return contribution(mine, engine.capture.gradients(stage.task.loss, batch), paired)

    for part, added in stream(data, ids, process, batch_size=engine.batch_size, device=engine.run.device):
        for block in added:
            if not torch.isfinite(block).all():
                bad = part[int((~torch.isfinite(block)).any(0).nonzero()[0])]
                raise NotFinite(
                    f"a NaN or infinite score for training example {bad} of stage {stage.name!r} at step {where.weights[-1]}",
                    "finite losses and gradients",
                    "look at that example and its loss; scores computed so far are kept and resumed",
                )
        engine.advance(len(part) * data.rows_per_example)
        yield part, added
