"""Headwater follows a model's prediction upstream: which training examples is it owed to, and how far can the answer be trusted?

    recorder = hw.Recorder("runs/mnist", model, optimizer, task=task, train=train_set)
    ...; optimizer.step(); recorder.step(indices)          # one line in your own loop
    run = recorder.finish()
    scores = hw.trace(run, queries, method=hw.Source())
    scores.top(10)

Details: `hw.tasks` (what you provide), `hw.evaluate` (how far to trust it), `hw.errors`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headwater import audit, data, errors, evaluate, tasks
    from headwater.curvature import EKFAC, Dense, Diagonal
    from headwater.errors import HeadwaterError
    from headwater.evaluate import Datamodel
    from headwater.features import Smooth, baselines, paths, quadrature, regions, targets
    from headwater.features.compare import compare_models
    from headwater.features.dataset import summarize
    from headwater.features.explain import explain
    from headwater.features.interactions import interactions
    from headwater.influence import GradCos, GradDot, Influence, KNNShapley, Query, Refine, Representations, Source, TracIn, floors, projections
    from headwater.influence.diffusion import DAS, DiffusionReTrac, DiffusionTracIn, DTrak, JourneyTrak
    from headwater.influence.ensembles import CheckpointEnsemble, DropoutEnsemble, Ensemble, LoraEnsemble
    from headwater.influence.index import Index, index
    from headwater.influence.logra import LoGra
    from headwater.influence.trace import self_influence, trace
    from headwater.influence.trak import Trak
    from headwater.influence.unrolled import Unrolled, weigh
    from headwater.result import Accumulator, FeatureScores, InteractionScores, Summary, TrainingScores, load
    from headwater.training import Experiment, Recorder, Run

__all__ = [
    "DAS",
    "EKFAC",
    "Accumulator",
    "CheckpointEnsemble",
    "DTrak",
    "Datamodel",
    "Dense",
    "Diagonal",
    "DiffusionReTrac",
    "DiffusionTracIn",
    "DropoutEnsemble",
    "Ensemble",
    "Experiment",
    "FeatureScores",
    "GradCos",
    "GradDot",
    "HeadwaterError",
    "Index",
    "Influence",
    "InteractionScores",
    "JourneyTrak",
    "KNNShapley",
    "LoGra",
    "LoraEnsemble",
    "Query",
    "Recorder",
    "Refine",
    "Representations",
    "Run",
    "Smooth",
    "Source",
    "Summary",
    "TracIn",
    "TrainingScores",
    "Trak",
    "Unrolled",
    "audit",
    "baselines",
    "compare_models",
    "data",
    "errors",
    "evaluate",
    "explain",
    "floors",
    "index",
    "interactions",
    "load",
    "paths",
    "projections",
    "quadrature",
    "regions",
    "self_influence",
    "summarize",
    "targets",
    "tasks",
    "trace",
    "weigh",
]
__version__ = "0.1.0"

_ROOMS = {
    "curvature": ("EKFAC", "Dense", "Diagonal"),
    "errors": ("HeadwaterError",),
    "evaluate": ("Datamodel",),
    "features": ("Smooth", "baselines", "paths", "quadrature", "regions", "targets"),
    "features.compare": ("compare_models",),
    "features.dataset": ("summarize",),
    "features.explain": ("explain",),
    "features.interactions": ("interactions",),
    "influence": ("GradCos", "GradDot", "Influence", "Query", "Refine", "Source", "TracIn", "floors", "projections", "self_influence", "trace"),
    "influence.diffusion": ("DAS", "DTrak", "DiffusionReTrac", "DiffusionTracIn", "JourneyTrak"),
    "influence.ensembles": ("CheckpointEnsemble", "DropoutEnsemble", "Ensemble", "LoraEnsemble"),
    "influence.index": ("Index", "index"),
    "influence.logra": ("LoGra",),
    "influence.shapley": ("KNNShapley",),
    "influence.similarity": ("Representations",),
    "influence.trak": ("Trak",),
    "influence.unrolled": ("Unrolled", "weigh"),
    "result": ("Accumulator", "FeatureScores", "InteractionScores", "Summary", "TrainingScores", "load"),
    "training": ("Experiment", "Recorder", "Run"),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load what the door shows when it is first used (PEP 562), so that `headwater --help` need not wait for torch."""
    if name in _HOMES:
        return globals().setdefault(name, getattr(import_module(f"headwater.{_HOMES[name]}"), name))
    if name in __all__:
        return import_module(f"headwater.{name}")
    raise AttributeError(f"module 'headwater' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
