"""Do lists of top examples say something about the query? Raw and normalised gradients over noise events, in three settings.

Everything here is read off scores and gradients, without retraining: a method can be specific and wrong.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusion_methods import KINDS, modes
from diffusion_trainings import SETTINGS, Training, digits, generate
from torch import Tensor

import headwater as hw
from headwater.capture.stream import stream
from headwater.influence.engine import Engine

TOP = 10
TRAINING = Training(width=128, common=340, foreign=20, epochs=400, batch=36)


@dataclass(frozen=True)
class Trial:
    """``generated`` images and every ``traced``-th training image are asked about, with all foreign ones and ``sevens`` held-out ones.
    ``norms``: at how many timesteps gradient norms are taken."""

    training: Training = TRAINING
    generated: int = 64
    sevens: int = 16
    traced: int = 11
    timesteps: int = 20
    draws: int = 2
    norms: int = 50


def gather(trial: Trial, seed: int, place: Path) -> dict[str, Any]:
    """All measures of one training; kept at ``place``."""
    file = place / "measures.json"
    if not file.exists():
        run = trial.training.record(place / "run", seed)
        queries, parts = asked(trial, run, place)
        norms = gradient_norms(trial, run)
        found: dict[str, Any] = {"norms": norms, "methods": {}}
        lengths = replayed_lengths(trial, run)
        for kind in KINDS:
            for name, method in modes(kind, trial.timesteps, trial.draws, trial.training.window).items():
                started = time.process_time()
                scores = hw.trace(run, queries, method, progress=False)
                found["methods"][name] = {**measures(scores, parts, trial, lengths), "seconds": time.process_time() - started}
        file.write_text(json.dumps(found, indent=1))
    return json.loads(file.read_text())


def asked(trial: Trial, run: hw.Run, place: Path) -> tuple[Tensor, dict[str, Any]]:
    """Queries of four kinds, one after the other, and where each kind lies."""
    data = digits(trial.training.common, trial.training.foreign)
    model = run.load(run.model(), run.checkpoints[-1])
    kinds = {
        "generated": generate(model, trial.training.process, range(trial.generated)),
        "own sevens": data.train[data.foreign],
        "held-out sevens": data.sevens[: trial.sevens],
        "themselves": data.train[: trial.training.common : trial.traced],
    }
    ends = np.cumsum([0, *map(len, kinds.values())])
    return torch.cat(list(kinds.values())), {name: range(int(a), int(b)) for name, a, b in zip(kinds, ends[:-1], ends[1:], strict=True)}


def measures(scores: hw.TrainingScores, parts: dict[str, range], trial: Trial, lengths: np.ndarray) -> dict[str, float]:
    """Distinct ids in the lists of generated images, ids in a quarter of them, the busiest one's share of lists; Spearman of mean |score|
    with the gradient's length at the replayed events; the share of sevens in the lists of sevens; how often a training image is its own top example."""
    made = scores.at(list(parts["generated"]))
    foreign = digits(trial.training.common, trial.training.foreign).foreign
    sevens = {kind: float(foreign[scores.at(list(parts[kind])).top(TOP).indices].mean()) for kind in ("own sevens", "held-out sevens")}
    own = np.arange(0, trial.training.common, trial.traced)
    first = scores.values[list(parts["themselves"])].argmax(axis=1)
    return {**made.concentration(TOP), "norm correlation": spearman(np.abs(made.values).mean(0), lengths), **sevens, "itself first": float((first == own).mean())}


def gradient_norms(trial: Trial, run: hw.Run) -> dict[str, Any]:
    """Mean over training images of the gradient's length at evenly spaced timesteps, at the first and the last checkpoint."""
    times = run.stages[0].task.process.strata(trial.norms)
    found: dict[str, Any] = {"timesteps": list(times)}
    for where, step in (("first", run.checkpoints[1]), ("last", run.checkpoints[-1])):
        lengths = event_lengths(run, step, run.stages[0].task.grid(times, noise="example", seed=5))
        found[where] = lengths.mean(axis=0).tolist()
    return found


def replayed_lengths(trial: Trial, run: hw.Run) -> np.ndarray:
    """Each training image's gradient length at the event that training met last before each checkpoint, mean over checkpoints, (train,)."""
    return np.mean([event_lengths(run, step, run.met(run.stages[0], step))[:, 0] for step in run.checkpoints[1:]], axis=0)


def event_lengths(run: hw.Run, step: int, events: Any) -> np.ndarray:
    """Lengths of gradients, (train, events of each)."""
    engine, stage = Engine.of(run, None), run.stages[0]
    engine.load((step,))
    data = stage.data.over(events).spread()

    def process(batch: Any, _: np.ndarray) -> Tensor:
        return torch.stack([g.square_norms() for g in engine.capture.gradients(stage.task.loss, batch).values()]).sum(0).sqrt()

    parts = [lengths for _, lengths in stream(data, range(len(data)), process, batch_size=engine.batch_size, device=run.device)]
    return torch.cat(parts).view(stage.size, -1).numpy()


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def bias(norms: dict[str, Any], where: str, bins: int = 10) -> float:
    """Largest over smallest mean norm of ``bins`` equal stretches of the timesteps."""
    means = [float(np.mean(part)) for part in np.array_split(np.array(norms[where]), bins)]
    return max(means) / min(means)


def settings(trial: Trial) -> dict[str, Trial]:
    """The same trial under each schedule and loss."""
    return {name: replace(trial, training=replace(trial.training, setting=name)) for name in SETTINGS}


def lean(trial: Trial) -> Trial:
    """In miniature."""
    small = replace(trial.training, common=40, foreign=4, epochs=8, batch=11, width=8, checkpoints=2, window=3)
    return replace(trial, training=small, generated=4, sevens=3, timesteps=3, norms=10)
