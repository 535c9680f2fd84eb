"""Building an index: every training example's gradients, rotated into the curvature's eigenbasis once and kept."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from headwater.capture import Gradients
from headwater.capture.stream import stream
from headwater.curvature import EKFAC, Estimate
from headwater.errors import InputError, NotFinite
from headwater.influence.engine import Engine
from headwater.influence.index.files import REDUCED, Files, check_dtype
from headwater.influence.index.layout import COORDINATES, KEPT, Form, Panel, forms, panels_of
from headwater.influence.index.reading import Index
from headwater.influence.index.rows import Basis, Keeper, Unfit, bases_of, scale_of
from headwater.influence.index.truncation import effective, measured
from headwater.influence.methods import Fit, Method, Weights
from headwater.report.numbers import duration
from headwater.store import content_hash, write_array
from headwater.tasks.batches import Batch, to
from headwater.tasks.code import task_identity
from headwater.training import Run

SCHEMA = 1
ROOM = 2**26  # numbers of a block of rows held at once


def index(
    run: Run,
    segments: int | tuple[int, ...] = 3,
    *,
    dim: int | None = None,
    curvature: Estimate = EKFAC(),
    dtype: str | None = None,
    also: Sequence[Method] = (),
    batch_size: int | None = None,
    progress: bool = True,
) -> Index:
    """Keep every training example's gradients in the curvature's eigenbasis, so that questions need the training data no more.

    ``hw.trace(index, queries, method)`` then answers Grad-Dot, Grad-Cos, influence functions of any damping, SOURCE and (where each
    checkpoint is held) TracIn, with the query's gradients as the only gradients computed. A response of the curvature is diagonal in
    its eigenbasis, so one set of rows serves all of them.

    Held are, for each segment, the mean of its checkpoints' gradients, and the gradients at the final weights; where a layer's gradient
    is an outer product its two factors are kept, which is exact and small, and then every checkpoint is held by itself. Layers applied
    at many positions take as many numbers as they have parameters, unless ``dim`` says how many to keep.

    Args:
        run: a recorded training.
        segments: of SOURCE, as in :class:`headwater.Source`; as many as there are checkpoints hold each by itself.
        dim: numbers per example and set of weights; None keeps all. What is kept are the coordinates whose eigenvalues are largest,
            wherever they lie in the product of the two bases: a response's share of a score grows with the eigenvalue for every
            method, and the leading eigenvectors of each side would miss most of them. What that costs is measured on the way.
        curvature: whose eigenbasis.
        dtype: None (the model's own, exact), "float32", "float64", "float16" or "int8" (coordinates are brought to one scale first, one
            scale for each row and layer).
        also: further methods whose curvature is to be estimated now, such as ``hw.Source(segments=1)`` of a three-segment index.
        batch_size, progress: as for :func:`headwater.trace`.

    Returns:
        An :class:`Index`; ``print(index.report())`` says how far its answers are from those of the run itself. It lies in the run's
        directory, in plain ``.npy`` files; the same call opens it again, and continues where it was interrupted.

    Raises:
        InputError: ``dim`` below what layers without eigenbasis need. NotFinite, StorageError, DamagedFile.
    """
    if not isinstance(run, Run):
        raise InputError(f"a {type(run).__name__} where a run belongs", "a hw.Run", "hw.Run.open(path, build=, train=, task=), or recorder.finish()")
    check_dtype(dtype)
    if dim is not None and dim < 1:
        raise InputError(f"dim={dim}", "a number of at least 1, or None to keep all", "hw.index(run, dim=4096), say")
    engine = Engine.of(run, batch_size)
    whole: frozenset[str] = frozenset()
    while True:
        build = _Build(engine, segments, dim, curvature, dtype, tuple(also), progress, whole)
        try:
            return build.carried_out()
        except Unfit as problem:  # its rows have to be kept as coordinates
            build.files.clear()
            whole = whole | {str(problem)}


class _Build:
    """One build with its settings."""

    def __init__(
        self,
        engine: Engine,
        segments: int | tuple[int, ...],
        dim: int | None,
        curvature: Estimate,
        dtype: str | None,
        also: tuple[Method, ...],
        progress: bool,
        whole: frozenset[str],
    ) -> None:
        self.engine, self.run, self.dim, self.dtype, self.progress = engine, engine.run, dim, dtype, progress
        self.segments, self.curvature, self.also = segments, curvature, also
        self.panels, self.forms = self._choose(whole)
        self.key = self._key(whole)
        self.files = Files(self.run.path / "index" / self.key)

    def _choose(self, whole: frozenset[str]) -> tuple[list[Panel], list[dict[str, Form]]]:
        """Each checkpoint by itself where that takes no more room than means over segments; and how each block is kept."""
        probe = self._probe()
        found = []
        for each in (True, False):
            panels = panels_of(self.run, self.segments, self.curvature, each)
            kept = [self._within(forms(self.engine.capture.blocks, probe[p.stage], len(p.at), whole)) for p in panels]
            size = sum(self.run.stages[p.stage].size * sum(f.numbers for f in form.values()) for p, form in zip(panels, kept, strict=True))
            found.append((size, panels, kept))
        return min(found, key=lambda item: item[0])[1:]

    def _probe(self) -> list[Gradients]:
        """Two examples' gradients in each stage: the form that they come in."""
        capture = self.engine.capture
        return [capture.gradients(s.task.loss, to(s.data.batch(range(min(2, s.size))), self.run.device)) for s in self.run.stages]

    def _within(self, given: dict[str, Form]) -> dict[str, Form]:
        """With ``dim``: factors where they take no more than a block's share of it, coordinates elsewhere, as many as are left."""
        if self.dim is None or sum(f.numbers for f in given.values()) <= self.dim:
            return given
        share = self.dim / sum(f.whole for f in given.values())
        cheap = {n: f for n, f in given.items() if f.kind != COORDINATES and f.numbers <= share * f.whole}
        fixed = {n: f for n, f in given.items() if n not in cheap and not self._may_drop(n)}
        left = self.dim - sum(f.numbers for f in [*cheap.values(), *fixed.values()])
        if left < 0 or (left == 0 and len(cheap) + len(fixed) < len(given)):
            raise InputError(
                f"dim={self.dim}",
                f"more than {self.dim - left:,}: layers without an eigenbasis of two sides ({', '.join(list(fixed)[:3])} ...) are kept whole",
                f"dim={2 * (self.dim - left):,}, say",
            )
        rest = sum(f.whole for n, f in given.items() if n not in cheap and n not in fixed)
        return {n: cheap.get(n) or fixed.get(n) or Form(KEPT, left * f.whole // max(rest, 1), f.whole) for n, f in given.items()}

    def _may_drop(self, name: str) -> bool:
        """Whether the curvature tells how much each coordinate of a block matters (small blocks have a dense matrix instead)."""
        return isinstance(self.curvature, EKFAC) and self.engine.capture.blocks[name].matrix

    def _key(self, whole: frozenset[str]) -> str:
        blocks = [[n, list(b.shape), list(b.parameters)] for n, b in self.engine.capture.blocks.items()]
        weights = [[p.describe(), [[self.run.weights_hash(step) for step in w] for w in p.at]] for p in self.panels]
        data = [[s.fingerprint, task_identity(s.task)] for s in self.run.stages]
        paces = [[sorted(self.run.rates(p.pace.start, p.pace.stop).items()) if p.pace else None] for p in self.panels]
        return content_hash("index-1", weights, paces, data, blocks, self.run.architecture, self.dim, self.dtype, sorted(whole))

    # -- the work --------------------------------------------------------------------------------------------------------------

    def carried_out(self) -> Index:
        """Build what is not there yet; the index."""
        if self.files.finished:
            self._fit()
            return Index(self.run, self.files, self.panels)
        started = time.perf_counter()
        work, left = self._work()
        if self.progress:
            tqdm.write(self._plan(work, left), file=sys.stderr)
        with tqdm(total=work, initial=work - left, unit=" examples", disable=not self.progress, desc="index", leave=False, file=sys.stderr, mininterval=0.5) as bar:
            self.engine.advance = bar.update
            try:
                self._fit()
            finally:
                self.engine.advance = lambda n: None
            self.keepers = self._keepers()
            self._write(bar.update)
            held = {**self._facts(), "effective": effective(self.engine, self.panels[-1]), "files": self.files.seal(), "measured": []}
            held["measured"] = measured(self.engine, Index(self.run, self.files, self.panels, held), self.curvature, self.segments)
        self.files.finish({**held, "seconds": round(time.perf_counter() - started, 3)})
        return Index(self.run, self.files, self.panels)

    def _fit(self) -> None:
        for fit in self._fits():
            self.engine.curvature(fit)

    def _fits(self) -> list[Fit]:
        rows = [row for method in self.also for row in method.plan(self.run).rows]
        return list(dict.fromkeys([p.fit for p in self.panels] + [row.curvature for row in rows if row.curvature is not None]))

    def _keepers(self) -> list[dict[str, Keeper]]:
        found = []
        for panel, form in zip(self.panels, self.forms, strict=True):
            bases = bases_of(self.engine, panel)
            keep = self._kept(form, bases)
            found.append({n: self._keeper(n, form[n].kind, bases[n], keep.get(n)) for n in form})
        return found

    def _keeper(self, name: str, kind: str, basis: Basis, keep: Tensor | None) -> Keeper:
        white = None
        if kind in (COORDINATES, KEPT) and self.dtype in REDUCED and basis.energy is not None:
            white = scale_of(basis.energy) if keep is None else scale_of(basis.energy)[keep]
        return Keeper(name, kind, basis, keep, white)

    def _kept(self, form: dict[str, Form], bases: dict[str, Basis]) -> dict[str, Tensor]:
        """The coordinates of largest expected square, over all blocks of which some are left out together."""
        names = [n for n, f in form.items() if f.kind == KEPT]
        if not names:
            return {}
        energies = [bases[n].energy for n in names]
        assert self.dim is not None and all(e is not None for e in energies)
        flat = torch.cat([e.flatten() for e in energies if e is not None])
        left = self.dim - sum(f.numbers for f in form.values() if f.kind != KEPT)
        chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        chosen[flat.argsort(descending=True, stable=True)[:left]] = True
        parts = chosen.split([form[n].whole for n in names])
        return {n: part.nonzero().flatten() for n, part in zip(names, parts, strict=True)}

    def _passes(self) -> dict[int, list[Weights]]:
        """For each stage the weights at which its examples' gradients are needed."""
        found: dict[int, dict[Weights, None]] = {}
        for panel in self.panels:
            found.setdefault(panel.stage, {}).update(dict.fromkeys(panel.at))
        return {stage: list(weights) for stage, weights in found.items()}

    def _blocks(self) -> list[list[slice]]:
        """For each stage the blocks of rows that are written at once."""
        step = max(1, ROOM // max(1, max(sum(f.numbers for f in form.values()) for form in self.forms)))
        return [[slice(i, min(i + step, s.size)) for i in range(0, s.size, step)] for s in self.run.stages]

    def _work(self) -> tuple[int, int]:
        """Example gradients of rows and curvature, all of them and those that are not kept yet."""
        blocks, passes = self._blocks(), self._passes()
        done = self.files.done(self._facts(), [len(b) for b in blocks])
        total = left = 0
        for stage, weights in passes.items():
            for rows, kept in zip(blocks[stage], done[stage], strict=True):
                count = (rows.stop - rows.start) * len(weights)
                total, left = total + count, left + (0 if kept else count)
        for fit in self._fits():
            cost = self.engine.cost(fit)
            total, left = total + cost, left + (0 if self.engine.holds(fit) else cost)
        return total, left

    def _write(self, advance: Callable[[int], Any]) -> None:
        blocks = self._blocks()
        done = self.files.start(self._facts(), [len(b) for b in blocks])
        for p, keepers in enumerate(self.keepers):
            for b, keeper in enumerate(keepers.values()):
                for field, values in (("keep", keeper.keep), ("white", keeper.white)):
                    if values is not None:
                        write_array(self.files.path / f"{p}/{b}.{field}.npy", values.cpu().numpy())
        for stage, weights in self._passes().items():
            for k, rows in enumerate(blocks[stage]):
                if not done[stage][k]:
                    self._write_rows(stage, weights, rows)
                    done[stage][k] = 1
                    self.files.mark(done)
                    advance((rows.stop - rows.start) * len(weights))

    def _write_rows(self, stage: int, weights: list[Weights], rows: slice) -> None:
        """Some examples' rows in every panel of a stage."""
        mine = [p for p, panel in enumerate(self.panels) if panel.stage == stage]
        parts: dict[tuple[int, str], list[list[dict[str, Tensor]]]] = {}
        for w in weights:
            for p in mine:
                if w in self.panels[p].at:
                    for name in self.keepers[p]:
                        parts.setdefault((p, name), []).append([])
            for taken in self._taken(stage, w, rows, [p for p in mine if w in self.panels[p].at]):
                for key, fields in taken.items():
                    parts[key][-1].append(fields)
        for p in mine:
            for b, (name, keeper) in enumerate(self.keepers[p].items()):
                batches = parts.pop((p, name))
                fields = keeper.averaged(batches)
                if "norms" in batches[0][0] and len(batches) == 1:
                    fields["norms"] = torch.cat([batch["norms"] for batch in batches[0]])
                for field, values in fields.items():
                    values = values.to(torch.int32) if field == "index" else values
                    self.files.put(f"{p}/{b}.{field}", rows, values, self.run.stages[stage].size, self.dtype)

    def _taken(self, stage: int, weights: Weights, rows: slice, panels: list[int]) -> Any:
        """Batch by batch, what each panel and block keeps of the gradients at ``weights``."""
        record = self.run.stages[stage]
        self.engine.load(weights)

        def process(batch: Batch, ids: np.ndarray) -> dict[tuple[int, str], dict[str, Tensor]]:
            gradients = self.engine.capture.gradients(record.task.loss, batch)
            found = {}
            for name, gradient in gradients.items():
                norms = gradient.square_norms().sqrt()
                bad = (~torch.isfinite(norms)).nonzero()
                if len(bad):
                    where = f"training example {ids[int(bad[0])]} of stage {record.name!r} at step {weights[-1]}"
                    raise NotFinite(f"a NaN or infinite gradient of {name!r} for {where}", "finite losses and gradients", "look at that example and its loss")
                for p in panels:
                    keeper = self.keepers[p][name]
                    found[p, name] = keeper.taken(gradient)
                    if keeper.kind == KEPT or self.dtype in REDUCED:
                        found[p, name]["norms"] = norms
            return found

        for _, taken in stream(record.data, np.arange(rows.start, rows.stop), process, batch_size=self.engine.batch_size, device=self.run.device):
            yield taken

    # -- what is told ----------------------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        run, capture = self.run, self.engine.capture
        blocks = [
            {"name": n, "parameters": list(b.parameters), "shape": list(b.shape), "matrix": b.matrix, "transpose": b.transpose, "indexed": b.indexed}
            for n, b in capture.blocks.items()
        ]
        weights = [[[run.weights_hash(step) for step in w] for w in p.at] for p in self.panels]
        kept = [{n: {"kind": f.kind, "numbers": f.numbers} for n, f in form.items()} for form in self.forms]
        panels = [{**p.describe(), "weights": w, "blocks": b} for p, w, b in zip(self.panels, weights, kept, strict=True)]
        return {
            "schema": SCHEMA,
            "key": self.key,
            "run": str(run.path),
            "variant": run.variant,
            "segments": self.segments,
            "estimate": repr(self.curvature),
            "dim": self.dim,
            "dtype": self.dtype,
            "stages": [{"name": s.name, "examples": s.size, "data": s.fingerprint} for s in run.stages],
            "blocks": blocks,
            "panels": panels,
            "coverage": capture.coverage,
            "torch": torch.__version__,
        }

    def _plan(self, work: int, left: int) -> str:
        number = {"int8": 1, "float16": 2, "float32": 4, "float64": 8, None: next(self.engine.model.parameters()).element_size()}[self.dtype]
        size = sum(number * self.run.stages[p.stage].size * sum(f.numbers for f in form.values()) for p, form in zip(self.panels, self.forms, strict=True))
        spared = f" ({left:,} of them left)" if left < work else ""
        seconds = duration(left * self.engine.seconds_per_example)
        lines = (
            f"an index of {self.run.size:,} training examples: {len(self.panels)} sets of gradients, about {size / 2**20:,.0f} MB in {self.files.path}",
            f"{work:,} example gradients in all, those for the curvature included{spared}, "
            f"about {seconds} by timed batches for the gradients alone; batches of {self.engine.batch_size}",
        )
        return "\n".join("headwater: " + line for line in lines)
