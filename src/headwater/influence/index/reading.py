"""An index that is there: what it holds, how far its answers are off, and its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.capture import BlockGradient, Gradients
from headwater.influence.engine import Engine
from headwater.influence.index.files import Files
from headwater.influence.index.layout import COORDINATES, FACTORS, KEPT, LOOKUP, Panel
from headwater.influence.index.rows import Keeper, bases_of
from headwater.training import Run

ROOM = 2**23  # numbers of stored rows in memory at once


class Index:
    """Gradients of a run's training examples in the curvature's eigenbasis, kept by :func:`headwater.index`.

    ``path``: its folder, of plain ``.npy`` files. ``run``: whose. ``hw.trace(index, queries, method)`` asks it.
    """

    def __init__(self, run: Run, files: Files, panels: list[Panel], manifest: dict[str, Any] | None = None) -> None:
        self.run, self.files, self.panels, self.path = run, files, panels, files.path
        self.manifest = manifest or files.manifest()

    def __repr__(self) -> str:
        held = self.manifest
        kept = "all coordinates" if held["dim"] is None else f"{held['dim']:,} numbers"
        worst = max((m["error"] for m in held["measured"]), default=0.0)
        return f"Index({str(self.path)!r}; {self.run.size:,} training examples, {len(held['panels'])} sets of gradients, {kept} each; answers off by at most {worst:.2g})"

    @property
    def bytes(self) -> int:
        """Its size on the disk."""
        return sum(file.stat().st_size for file in self.files)

    def report(self) -> str:
        """What is held, and how far answers on a sample are from the run's own: relative error (root mean square) and the lowest rank
        correlation of any query."""
        held = self.manifest
        lines = [repr(self), f"{self.bytes / 2**20:,.0f} MB; built in {held['seconds']:,.0f} s; curvature {held['estimate']}", ""]
        lines += [f"{'method':<44}{'error':>10}{'Spearman':>10}"]
        lines += [f"{m['method']:<44}{m['error']:>10.2g}{m['spearman']:>10.4f}" for m in held["measured"]]
        lines += ["", f"{'layer, at the final weights':<34}{'kept as':>12}{'numbers':>10}{'of':>12}{'d_eff':>10}"]
        last = held["panels"][-1]
        sizes = {b["name"]: torch.Size(b["shape"]).numel() for b in held["blocks"]}
        for name, form in last["blocks"].items():
            effective = held["effective"].get(name)
            said = "" if effective is None else f"{effective:,.1f}"
            lines.append(f"{name:<34}{form['kind']:>12}{form['numbers']:>10,}{sizes[name]:>12,}{said:>10}")
        return "\n".join(lines)

    # -- rows ------------------------------------------------------------------------------------------------------------------

    def keepers(self, engine: Engine, p: int) -> dict[str, Keeper]:
        """How panel ``p`` keeps each block, with the basis that it is kept in."""
        bases, forms = bases_of(engine, self.panels[p]), self.manifest["panels"][p]["blocks"]
        found = {}
        for b, name in enumerate(forms):
            keep, white = (self._whole(f"{p}/{b}.{field}", engine) for field in ("keep", "white"))
            found[name] = Keeper(name, forms[name]["kind"], bases[name], keep, white)
        return found

    def _whole(self, name: str, engine: Engine) -> Tensor | None:
        if not self.files.has(name, self.manifest):
            return None
        return torch.from_numpy(np.array(self.files.get(name, self.manifest))).to(engine.run.device)

    def gradients(self, p: int, keepers: dict[str, Keeper], rows: slice, dtype: torch.dtype) -> Gradients:
        """Rows of panel ``p``, as gradients in its coordinates."""
        return {name: self.gradient(p, keeper, rows, dtype) for name, keeper in keepers.items()}

    def gradient(self, p: int, keeper: Keeper, rows: slice, dtype: torch.dtype) -> BlockGradient:
        """As :meth:`gradients`, of one block."""
        b = list(self.manifest["panels"][p]["blocks"]).index(keeper.name)
        fields = [f for f in FIELDS[keeper.kind] if self.files.has(f"{p}/{b}.{f}", self.manifest)]
        held = {f: self.files.rows(f"{p}/{b}.{f}", rows, self.manifest, dtype).to(self.run.device) for f in fields}
        return keeper.gradient(held, self._shape(keeper.name)[1])

    def parts(self, p: int) -> Iterator[slice]:
        """Panel ``p``'s rows, so many at once that they fit in memory."""
        size = self.run.stages[self.panels[p].stage].size
        step = max(1, ROOM // max(1, sum(form["numbers"] for form in self.manifest["panels"][p]["blocks"].values())))
        return (slice(i, min(i + step, size)) for i in range(0, size, step))

    def _shape(self, name: str) -> list[int]:
        shape = next(b["shape"] for b in self.manifest["blocks"] if b["name"] == name)
        return shape if len(shape) > 1 else [1, *shape]


FIELDS = {FACTORS: ("g", "a", "norms"), LOOKUP: ("index", "a", "norms"), COORDINATES: ("rows", "norms"), KEPT: ("rows", "norms")}
