"""Headwater follows a model's prediction upstream: which training examples is it owed to, and how far can the answer be trusted?

    recorder = hw.Recorder("runs/mnist", model, optimizer, task=task, train=train_set)
    ...; optimizer.step(); recorder.step(indices)          # one line in your own loop
    run = recorder.finish()
    scores = hw.trace(run, queries, method=hw.Source())
    scores.top(10)

Details: `hw.tasks` (what you provide), `hw.evaluate` (how far to trust it), `hw.errors`.
"""

from headwater import data, errors, evaluate, tasks
from headwater.curvature import EKFAC, Dense, Diagonal
from headwater.errors import HeadwaterError
from headwater.influence import GradCos, GradDot, Influence, Query, Source, TracIn, self_influence, trace
from headwater.result import TrainingScores, load
from headwater.training import Experiment, Recorder, Run

__all__ = [
    "EKFAC",
    "Dense",
    "Diagonal",
    "Experiment",
    "GradCos",
    "GradDot",
    "HeadwaterError",
    "Influence",
    "Query",
    "Recorder",
    "Run",
    "Source",
    "TracIn",
    "TrainingScores",
    "data",
    "errors",
    "evaluate",
    "load",
    "self_influence",
    "tasks",
    "trace",
]
__version__ = "0.1.0"
