"""Headwater as a contestant."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import headwater as hw
from headwater.curvature import ekfac
from speed.meter import Meter
from speed.problem import Problem, read

TASK = hw.tasks.Classification()
hw.trace, hw.Run, hw.Influence  # noqa: B018  (imported at first use: part of the baseline, as the peers' imports are)


def minus_loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The measurement all contestants are asked about: minus the query's loss."""
    return -TASK.loss(model, batch)


def traced(place: Path, method: Any, label: str, tolerance: float | None = None, limit: int | None = None) -> tuple[dict[str, Any], hw.Run]:
    """Trace by ``method``, measured; scores go to a file."""
    problem = read(place)
    meter = Meter()
    meter.book(ekfac, "accumulate", lambda call: ("covariance", "eigenvalue correction")[call > 1])
    meter.book(ekfac, "eigh", "eigendecomposition")
    with meter.stage("scores"):
        with meter.stage("set-up"):
            run = opened(place, problem)
        queries = tuple(t[:limit] for t in problem.queries)
        scores = hw.trace(run, queries, method, measure=minus_loss, tolerance=tolerance, progress=False)
    report = meter.report()
    np.save(place / f"scores-{label}.npy", scores.values)
    return report, run


def opened(place: Path, problem: Problem) -> hw.Run:
    """A copy of the recorded run, without what others computed from it."""
    folder = Path(tempfile.mkdtemp(prefix="headwater-bench-")) / "run"
    shutil.copytree(place / "run", folder, ignore=shutil.ignore_patterns("factors", "jobs"))
    return hw.Run.open(folder, build=problem.build, train=problem.train, task=TASK)


def influence(place: Path, damping: float, label: str, tolerance: float | None = None, fisher: str = "empirical") -> dict[str, Any]:
    report, run = traced(place, hw.Influence(damping, hw.EKFAC(fisher=fisher)), label, tolerance)
    entry = next((run.path / "factors").glob("*.json")).stem
    spectra = [t.double() for name, t in run.store.read(f"factors/{entry}").items() if name.endswith("spectrum")]
    return {**report, "dimension": sum(float((s / (s + damping)).sum()) for s in spectra)}


def graddot(place: Path, label: str) -> dict[str, Any]:
    return traced(place, hw.GradDot(), label)[0]


def source(place: Path, label: str, limit: int | None = None) -> dict[str, Any]:
    return traced(place, hw.Source(segments=1, curvature=hw.EKFAC(fisher="empirical")), label, limit=limit)[0]
