"""Walking a recorded training backwards: planned and told beforehand, checked on the way there, kept when interrupted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from headwater.errors import GradientError
from headwater.influence.jobs import Job, guarded
from headwater.influence.queries import Asked
from headwater.influence.request import Request
from headwater.influence.timing import seconds_of
from headwater.influence.unrolled.graphs import Graphs
from headwater.influence.unrolled.keeping import Keeper
from headwater.influence.unrolled.pullback import Cotangent, backward, prove_twice, pull
from headwater.influence.unrolled.schedule import Schedule, walk
from headwater.influence.unrolled.weigh import Weighing
from headwater.report.numbers import duration
from headwater.store import Store, content_hash
from headwater.tasks.batches import size, to
from headwater.tasks.code import task_identity
from headwater.tasks.task import per_example
from headwater.training.replay import Move, Replay, State, as_recorded
from headwater.training.replay.norms import written_out
from headwater.training.replay.script import split_parts

OPERATION = 1024  # bytes, about, of one node of a graph and what it holds besides its tensors' values
AT_ONCE = 64  # examples asked about that are measured in one pass


@dataclass(frozen=True)
class Plan:
    """What unrolling will do, told before it starts. ``replays``: steps trained again, ``reversed``: steps walked backwards, both in all;
    ``states`` kept at a time, ``state_bytes`` each, ``where``; ``with_graphs``: those of their steps' gradients are kept too; queries in
    ``chunks`` of ``chunk``, ``lanes`` of them through a graph at once."""

    steps: int
    queries: int
    columns: int
    schedule: Schedule
    where: str
    state_bytes: int
    query_bytes: int
    graph_bytes: int
    chunk: int
    chunks: int
    lanes: int
    with_graphs: bool
    pace: tuple[float, float] | None = None
    """Seconds of a step replayed and of one reversed; None where nobody is told."""

    @property
    def replays(self) -> int:
        """The first sweep, its last step, and the states made again between."""
        return self.chunks * (self.schedule.replays + 1)

    def left(self, chunk: int, walked: int) -> tuple[int, int]:
        """Steps still to be replayed and to be reversed, once so many steps of ``chunk`` and all of the chunks before it are walked."""
        if chunk >= self.chunks:
            return 0, 0
        later, rest = self.chunks - chunk - 1, self.steps - walked
        return later * (self.schedule.replays + 1) + Schedule(rest, self.schedule.states).replays + (not walked), later * self.steps + rest

    def seconds(self, replays: int, steps: int) -> float | None:
        """Of so many steps replayed and reversed. With graphs kept, a step's one pass is part of its reversal."""
        return None if self.pace is None else (0 if self.with_graphs else replays * self.pace[0]) + steps * self.pace[1]

    def facts(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**asdict(self), "replays": self.replays, "reversed": self.chunks * self.steps}

    def told(self, chunk: int, walked: int) -> str:
        """The plan, and how much of it is left from there on."""
        left = self.left(chunk, walked)
        seconds = self.seconds(*left)
        kept = f"{self.schedule.states:,} states of {_mb(self.state_bytes)} MB in {self.where} ({_mb(self.schedule.states * self.state_bytes)} MB)"
        if self.with_graphs:
            kept += f" and the graphs of all steps ({_mb(self.steps * self.graph_bytes)} MB)"
        lines = (
            f"unrolling {self.steps:,} steps for {self.queries:,} queries, {self.columns:,} weights: "
            f"{self.replays:,} steps replayed, {self.chunks * self.steps:,} reversed" + (f", in {self.chunks} chunks of {self.chunk} queries" if self.chunks > 1 else ""),
            f"of these {left[0]:,} and {left[1]:,} are left" if (chunk, walked) != (0, 0) else "",
            f"about {duration(seconds)} by timed steps" if seconds is not None else "",
            f"memory: {kept}, queries {_mb(self.chunk * self.query_bytes)} MB, a step's graph {_mb(self.graph_bytes)} MB for each of {self.lanes} lanes",
        )
        return "\n".join("headwater: " + line for line in lines if line)


def _mb(count: int) -> str:
    return f"{count / 2**20:,.1f}"


class Backwards:
    """See the module's docstring. ``name``: of the method, part of the names of saved work; ``report``: of the replay's check."""

    def __init__(self, request: Request, schedule: str, keep: str, weigh: Weighing, tolerance: float | None, clipping: str, name: str) -> None:
        self.request, self.run = request, request.run
        self.columns = weigh.on(self.run)
        self.replay = Replay(self.run, tolerance, clipping)
        self.player, self.script = self.replay.player, self.replay.script
        for stage in self.run.stages:
            self.script.clipping(stage)  # refused before any work
        self.name, self.keep, self.report = name, keep, {}  # type: tuple[str, str, dict[str, Any]]
        with as_recorded(self.run):
            self.plan = self._plan(schedule)

    # -- planning --------------------------------------------------------------------------------------------------------------

    def _move(self, step: int) -> Move:
        """The step, in micro-batches of at most ``request.batch_size`` examples where that changes nothing."""
        return split_parts(self.script.move(step), self.request.batch_size, self.player.norms)

    def _plan(self, schedule: str) -> Plan:
        """Schedule, chunks and lanes from the memory budget: a third each for states, queries, and the graph of a step."""
        length, queries, third = len(self.script), self.request.asked.count, self.request.memory // 3
        move = self._move(1)
        before = self.player.begin(self.player.start(), move)
        after = self.player.step(before, move, self.player.gradient(before, move))
        self._refuse_foreign(before, after)
        moments = max((sum(len(rule.empty(torch.zeros(()))) for rule in self.script.move(stage.start + 1).rules[:1]) for stage in self.run.stages), default=0)
        weights = sum(t.numel() * t.element_size() for t in after.weights.values())
        state_bytes = (1 + moments) * weights + sum(t.numel() * t.element_size() for n, t in after.buffers.items() if t is not before.buffers[n])
        query_bytes = 3 * (1 + moments) * weights
        graph_bytes = self._graph_bytes(before, move)
        chunk = int(max(1, min(queries, third // max(1, query_bytes))))
        lanes = int(max(1, min(chunk, third // max(1, graph_bytes))))
        chosen, where = self._schedule(schedule, length, max(1, third // max(1, state_bytes)))
        chunks = -(-queries // chunk)
        every = chosen.replays == length - 1 and where == "memory" and length * (state_bytes + graph_bytes) <= third
        plan = Plan(length, queries, self.columns.count, chosen, where, state_bytes, query_bytes, graph_bytes, chunk, chunks, lanes, every)
        return replace(plan, pace=self._pace(before, move, chunk, lanes)) if self.request.progress else plan

    def _refuse_foreign(self, before: State, after: State) -> None:
        """Buffers that a step changes by other ways than BatchNorm's would carry influence that no derivative here sees."""
        known = self.player.statistics
        foreign = [n for n, t in after.buffers.items() if t.is_floating_point() and t is not before.buffers[n] and n not in known]
        if foreign:
            raise GradientError(
                f"a model whose forward pass changes the buffer(s) {', '.join(foreign[:3])}, through which examples act on later steps unseen",
                "buffers that stay as they are, or BatchNorm's running statistics",
                "record a training with that layer in eval mode, or without it",
            )

    def _schedule(self, name: str, length: int, room: int) -> tuple[Schedule, str]:
        """The schedule and where its states lie, with room for so many of them in memory."""
        log = Schedule.named("log", length)
        if name == "auto":
            fits = room >= log.states and self.keep != "disk"
            chosen = Schedule.within(length, room) if fits or self.keep == "memory" else Schedule.named("sqrt", length)
        else:
            chosen = Schedule.named(name, length)
        if self.keep == "auto":
            return chosen, "memory" if chosen.states <= max(room, 1) else "disk"
        return chosen, self.keep

    def _graph_bytes(self, before: State, move: Move) -> int:
        """What one pass through the graph of a step's gradient holds on to."""
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            graph = self.player.graph(before, move, max(move.parts, key=lambda part: part.stop - part.start), self.columns.terms)
        operations = prove_twice(graph.gradients.values())
        return sum(held.values()) + sum(g.numel() * g.element_size() for g in graph.gradients.values()) + operations * OPERATION

    def _pace(self, before: State, move: Move, chunk: int, lanes: int) -> tuple[float, float]:
        """Seconds of one step replayed, and of one reversed."""
        ones = Cotangent({n: torch.ones(chunk, *t.shape, dtype=t.dtype, device=t.device) for n, t in before.weights.items()})
        replayed = seconds_of(lambda: self.player.step(before, move, self.player.gradient(before, move)))
        return replayed, seconds_of(lambda: pull(self.player, before, move, ones, self.columns.terms, lanes))

    # -- walking ---------------------------------------------------------------------------------------------------------------

    def scores(self) -> Tensor:
        """(queries, columns). Work that was interrupted is taken up where it was."""
        key = self._key()
        job = WalkJob(self.run.store, key, (self.request.asked.count, self.columns.count), self._dtype())
        self.report = job.report
        show = self.request.progress
        if show:
            tqdm.write(self.plan.told(*job.place[:2]) + ("\nheadwater: resuming interrupted work" if job.resumed else ""), file=sys.stderr)
        total = self.plan.replays + self.plan.chunks * self.plan.steps
        done = total - sum(self.plan.left(*job.place[:2]))
        with tqdm(total=total, initial=done, unit=" steps", disable=not show, desc="unroll", leave=False, file=sys.stderr, mininterval=0.5) as bar, as_recorded(self.run):

            def go() -> None:
                for c in range(job.place[0], self.plan.chunks):
                    self._chunk(job, c, bar.update, show)

            guarded(job, go)
        job.finish()
        return job.scores[0]

    def _chunk(self, job: WalkJob, c: int, tick: Callable[[int], object], show: bool) -> None:
        """Walk backwards for one chunk of queries, from where it was left."""
        rows = slice(c * self.plan.chunk, min((c + 1) * self.plan.chunk, self.plan.queries))
        done = job.place[1] if job.place[0] == c else 0
        length = self.plan.steps - done
        witness = None if job.report else self.replay.witness()
        upon: list[Cotangent] = [Cotangent.of(job.carried.flat(), self.run.device)] if done else []
        states = Keeper(self.run.store, f"states/{job.name.removeprefix('jobs/')}", self.plan.where, self.run.device)

        graphs = Graphs(self.player, self.columns.terms, self.request.batch_size)

        def advance(state: State, _: int, to: int) -> State:
            return self.replay.advance(state, to, witness, tick, graphs.gradient if self.plan.with_graphs else None)

        def back(state: State, k: int) -> None:
            move = self._move(k + 1)
            before = self.player.begin(state, move)
            if not upon:
                final = advance(state, k, k + 1)
                if witness is not None:
                    job.report.update(witness.report())
                    if show:
                        tqdm.write(f"headwater: {witness}", file=sys.stderr)
                upon.append(self._asked(final, rows))
            pulled = pull(self.player, before, move, upon[0], self.columns.terms, self.plan.lanes, graphs.take(k + 1))
            upon[0] = pulled.before
            for start, stop, values in pulled.scores:
                self.columns.add(job.scores[0][rows], move.stage, move.ids[start:stop], values)
            job.carry(pulled.before, c, self.plan.steps - k)
            tick(1)

        try:
            walk(Schedule(length, self.plan.schedule.states), self.player.start(), advance, back, states.keep, states.drop, states.load)
        finally:
            states.clear()
        job.carry(Cotangent({}), c + 1, 0)

    def _asked(self, final: State, rows: slice) -> Cotangent:
        """The gradients of the measurements in the final weights and running statistics: what is walked back."""
        asked, player = self.request.asked, self.player
        player.set_mode(frozenset())
        trains = any(mode is None or name in mode for mode in self.script.modes for name in player.norms)
        statistics = player.statistics if trains else ()
        total: dict[str, Tensor] = {}
        for examples, numbers in zip(asked.examples, asked.rows, strict=True):
            wanted = np.flatnonzero((numbers >= rows.start) & (numbers < rows.stop))
            for some in np.array_split(wanted, -(-len(wanted) // AT_ONCE)) if len(wanted) else ():
                batch = to(examples.batch(some), self.run.device)
                buffers = {n: t.detach().clone().requires_grad_(n in statistics) for n, t in final.buffers.items()}
                leaves = player.place(final.weights, buffers, final.weights)
                with torch.enable_grad(), written_out(player.model, bool(statistics)):
                    values = per_example(asked.measure(player.model, batch), batch, "measure")
                inputs = {**leaves, **{n: buffers[n] for n in statistics}}
                mine = torch.as_tensor(numbers[some] - rows.start, device=values.device)
                present, place = mine.unique(return_inverse=True)
                picks = torch.zeros(len(present), len(some), dtype=values.dtype, device=values.device)
                picks[place, torch.arange(len(some), device=values.device)] = 1
                found = backward([values], list(inputs.values()), [picks], self.plan.lanes) if values.requires_grad else [None] * len(inputs)
                for (n, t), g in zip(inputs.items(), found, strict=True):
                    held = total.setdefault(n, torch.zeros(rows.stop - rows.start, *t.shape, dtype=t.dtype, device=t.device))
                    if g is not None:
                        held.index_add_(0, present, g)
                assert size(batch) == len(some)
        return Cotangent({n: total[n] for n in final.weights}, {}, {n: total[n] for n in statistics})

    # -- names -----------------------------------------------------------------------------------------------------------------

    def _dtype(self) -> torch.dtype:
        lowest = torch.float32
        for p in self.player.model.parameters():
            lowest = torch.promote_types(lowest, p.dtype)
        return lowest

    def _key(self) -> str:
        asked: Asked = self.request.asked
        logs = [self.run.manifest.get(name) for name in ("steps", "order", "events")]
        run = [[self.run.weights_hash(step) for step in self.run.checkpoints], logs, self.run.architecture]
        data = [[s.fingerprint, task_identity(s.task)] for s in self.run.stages]
        questions = asked.identity
        plan = [self.plan.chunk, self.plan.lanes, self.request.batch_size]
        return content_hash("unrolled-2", run, data, self.name, *questions, plan)


class WalkJob(Job):
    """Scores, and the cotangent that goes on: the place is (chunk, steps walked back)."""

    def __init__(self, store: Store, key: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(store, key, [shape], dtype)
        self.carried = Cotangent({})
        self.report: dict[str, Any] = {}
        if self.resumed:
            flat = {n.removeprefix("carried/"): t for n, t in store.read(self.name).items() if n.startswith("carried/")}
            self.carried = Cotangent.of(flat, torch.device("cpu"))
            self.report = store.meta(self.name)["report"]

    def carry(self, cotangent: Cotangent, chunk: int, walked: int) -> None:
        """All that was walked is in the scores, and this is what goes on."""
        self.carried = cotangent
        self.reach(chunk, walked, 0)

    def save(self) -> None:
        carried = {f"carried/{n}": t.detach().cpu().contiguous() for n, t in self.carried.flat().items()}
        self.store.write(self.name, {"scores.0": self.scores[0], **carried}, {"place": list(self.place), "report": self.report})
        self._saved = time.monotonic()
