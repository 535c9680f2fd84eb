"""Carrying out one family of schemes, and metering it: CPU seconds of training and of serving, bytes, memory; one thread.

Every contribution of a member (a *piece*: scores of one model, mask or adapter) is made and metered once, in a copy of the recorded runs that
belongs to its family alone, so that nothing is charged less because another method had computed it before. A scheme costs what its pieces
cost; a piece that it shares with itself (the kernel of forward-only masks) is counted once.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ensembles_schemes import ADAPTED, MODEL_FREE, Scheme, methods
from ensembles_trainings import Training, fit

import headwater as hw
from headwater.influence.ensembles.carrying import Piece, contributions_of
from headwater.influence.methods import Method
from headwater.influence.queries import ask
from headwater.influence.request import Request

RECORDED = 100  # seeds of recorded models begin here: none of them is among the retrained ones


def carry_out(training: Training, place: Path, name: str, family: str, schemes: Sequence[Scheme], damping: float | None) -> None:
    """Score and meter the schemes of one family that are not there yet; their results go to ``place/cells``."""
    torch.set_num_threads(1)
    method, work = methods(training, damping)[name], place / "work" / f"{slug(name)}-{family}"
    resident = reset_peak()  # before anything was computed: memory that is freed often stays with the process
    warm(training, schemes[0].kind)
    for scheme in schemes:
        file = cell_file(place, name, scheme)
        if not file.exists():
            runs = [own_copy(training, place, work, k) for k in range(scheme.models)]
            values, facts = scored(scheme, name, method, runs, training, work)
            facts["memory"] -= resident
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file.with_suffix(".part.npz"), values=values, facts=json.dumps({**facts, "repr": repr(method)}))
            file.with_suffix(".part.npz").rename(file)
    shutil.rmtree(work, ignore_errors=True)


def warm(training: Training, kind: str) -> None:
    """The same in miniature: what a process loads when it does something for the first time is charged to nobody."""
    experiment = training.experiment()
    few = replace(experiment, train=tuple(c[:64] for c in experiment.train), fit=partial(fit, **{**training.settings, "epochs": 1}))
    with tempfile.TemporaryDirectory() as folder:
        run = few.record(Path(folder) / "run", checkpoints=1)
        hw.trace(run, tuple(c[:4] for c in experiment.test), Scheme(kind, 1, 1).ensemble(hw.GradDot(), [run]), progress=False)


def scored(scheme: Scheme, name: str, method: Any, runs: list[hw.Run], training: Training, work: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores (queries, train) of a scheme, and what it cost."""
    ensemble, queries = scheme.ensemble(method, runs), training.data()[1]
    request = Request(runs[0], ask(queries, training.task, None), progress=False)
    contributions = contributions_of(method, ensemble.members(runs[0]), request)
    pieces = {piece.name: piece for c in contributions for piece in c.pieces}
    meters = [metered(piece, request, work, scheme.kind in ADAPTED) for piece in pieces.values()]
    found = hw.trace(runs[0], queries, ensemble, progress=False)
    error = None if found.stderr is None else float(np.mean(found.stderr))
    modelled = name not in MODEL_FREE
    return found.values, {
        "training": sum(recorded_seconds(run) for run in runs) + sum(m["training"] for m in meters) if modelled else 0.0,
        "serving": sum(m["serving"] for m in meters),
        "weights": weights(method, (piece.member.home for piece in pieces.values())) if modelled else 0,
        "kept": sum(m["kept"] for m in meters),
        "memory": max(m["peak"] for m in meters),
        "pieces": len(pieces),
        "stderr": error,
    }  # fmt: skip


def metered(piece: Piece, request: Request, work: Path, adapters: bool) -> dict[str, Any]:
    """Make a piece, or read what making it had cost. ``adapters``: what the member's model takes to be made is training."""
    note, home = work / "meters" / f"{piece.name.rpartition('/')[2]}.json", piece.member.home.path
    if note.exists():
        return json.loads(note.read_text())
    note.parent.mkdir(parents=True, exist_ok=True)
    begun = work / f"{home.name}.begun"
    begun.touch()
    before = used_by(home)
    reset_peak()
    started = time.process_time()
    piece.member.request(request)
    prepared = time.process_time()
    piece.make(request)
    ended = time.process_time()
    facts = {
        "training": prepared - started if adapters else 0.0, "serving": ended - (prepared if adapters else started),
        "kept": used_by(home) - before, "peak": peak(), "member": piece.member.name,
    }  # fmt: skip
    note.write_text(json.dumps(facts))
    begun.unlink()
    return facts


# --------------------------------------------------------------------------------------------------------------------- meters


def used_by(run: Path) -> int:
    """Bytes of all files of a run but the answers themselves."""
    return sum(file.stat().st_size for file in run.rglob("*") if file.is_file() and file.relative_to(run).parts[0] != "members")


def reset_peak() -> int:
    """Forget the largest resident memory so far (Linux); the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The largest resident memory since the last reset, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def weights(method: Any, homes: Iterable[hw.Run]) -> int:
    """Bytes of the checkpoints that the method looks at (with Adam's second moments where they are recorded)."""
    files = set()
    for run in homes:
        steps = {run.checkpoints[-1]}
        if isinstance(method, Method):
            rows = method.plan(run).rows
            steps |= {step for row in rows for at in (*row.at, row.asking.at if row.asking else ()) for step in at}
        files |= {run.path / "checkpoints" / f"{step}.safetensors" for step in steps}
    return sum(file.stat().st_size for file in files)


def recorded_seconds(run: hw.Run) -> float:
    """CPU seconds that the training took."""
    return float((run.path / "seconds.txt").read_text())


# ----------------------------------------------------------------------------------------------------------------------- files


def own_copy(training: Training, place: Path, work: Path, number: int) -> hw.Run:
    """A family's own copy of recorded model ``number``; made anew where a piece was interrupted, since part of its work was done."""
    there = work / f"run-{number}"
    if (work / f"run-{number}.begun").exists():
        shutil.rmtree(work)
    if not there.exists():
        shutil.copytree(master(place, number), work / "part")
        (work / "part").rename(there)
    return training.experiment().open(there)


def master(place: Path, number: int) -> Path:
    """Where recorded model ``number`` lies."""
    return place / "models" / f"run-{number}"


def slug(name: str) -> str:
    """A method's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cell_file(place: Path, name: str, scheme: Scheme) -> Path:
    return place / "cells" / f"{slug(name)}-{scheme.file}.npz"


def read_cell(place: Path, name: str, scheme: Scheme) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores and facts of a scheme."""
    with np.load(cell_file(place, name, scheme)) as held:
        return held["values"], json.loads(str(held["facts"]))
