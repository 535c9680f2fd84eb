"""Headwater on the GPT-2 shape."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import headwater as hw
from headwater import store
from headwater.curvature import ekfac
from speed import gpt2
from speed.meter import Meter

DAMPING = 1e-3


def passes(place: Path, tiny: bool, amp: bool) -> dict[str, Any]:
    shape = gpt2.start(tiny)
    train, queries = gpt2.sequences(shape)
    task = hw.tasks.Task(loss=lambda model, ids: gpt2.loss(model, ids, amp), measure=lambda model, ids: -gpt2.loss(model, ids, amp))
    meter = Meter(gpt2.wait)
    meter.book(ekfac, "accumulate", lambda call: ("covariance", "eigenvalue correction")[call > 1])
    meter.book(ekfac, "eigh", "eigendecomposition")
    meter.book(store, "write_tensors", "disk")
    with meter.stage("set-up"):
        run = opened(shape, train, task)
    with meter.stage("pairwise"):  # what is booked apart inside it does not count in it
        scores = hw.trace(run, queries, method(), batch_size=shape.batch, memory=2**35, progress=False)
    np.save(place / "scores-headwater.npy", scores.values)
    return gpt2.costs(meter)


def method() -> Any:
    return hw.Influence(damping=DAMPING, curvature=hw.EKFAC(fisher="empirical"))


def opened(shape: gpt2.Shape, train: torch.Tensor, task: Any) -> hw.Run:
    return hw.Run.from_checkpoints(
        Path(tempfile.mkdtemp(prefix="headwater-bench-")) / "run",
        {1: {name: t.cpu() for name, t in gpt2.build(shape).state_dict().items()}},
        build=lambda: gpt2.build(shape),
        train=train,
        task=task,
        optimizer=lambda model: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3),
    )
