"""The door of this room: ``trace`` and ``self_influence``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from headwater.errors import InputError
from headwater.influence.ensembles import LoraEnsemble
from headwater.influence.index import Index
from headwater.influence.index.answering import by_index
from headwater.influence.methods import Method, Table
from headwater.influence.queries import ask, check, methods_of
from headwater.influence.request import Answering, Request, Scorer, column_names
from headwater.influence.tabled import by_tables, self_by_tables
from headwater.result import TrainingScores
from headwater.tasks import Measure
from headwater.training import Run
from headwater.training.run import EMA, RAW

BUDGET = 2**30  # bytes for the query side of one chunk, when nothing else is said: a second chunk costs every pass again


def trace(
    run: Run | Index,
    queries: Any,
    method: Any,
    *,
    measure: Measure | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
    memory: int = BUDGET,
    tolerance: float | None = None,
    progress: bool = True,
) -> Any:
    """Which training examples are these predictions owed to?

    ``score[q, m]`` is the predicted change of ``measure(query q)`` that training on example m caused: positive means that it pushed
    the measurement up, and that removing it would lower it by about that much. ``unit`` of the result says whether scores are in
    the measurement's own unit or only rank.

    Args:
        run: a recorded training, or what :func:`headwater.index` kept of one: then the training data are not read, and the methods that
            need more than stored gradients are refused.
        queries: a dataset or batch of examples (one row each), or a :class:`Query` (a named set: one row), or a list of them.
        method: what to score by: ``hw.Source()``, ``hw.Influence(...)``, ``hw.TracIn()``, ``hw.GradDot()``, ``hw.GradCos()``. A list of
            methods (or a sweep of dampings) is scored in shared passes and gives a list of results.
        measure: ``(model, batch) -> (n,)``, larger is better; default: the last stage's ``task.measure``.
        weights: of the model that is asked, where the run holds a moving average of them (``hw.Recorder(..., ema=...)``): "ema" or "raw"; default:
            "ema" where it was recorded at all checkpoints, since that is the model in use. Gradients of queries are then taken at the averaged
            weights and those of training examples at the raw ones, which training moved. Methods that compare both in one space
            (hw.Trak, hw.Representations, ...) take both at the averaged weights; hw.Unrolled refuses. The average itself, which trails
            the raw weights by some steps, is not unrolled.
        batch_size: examples at once; default: from the model's size. One that does not fit in memory is halved.
        memory: bytes for the query side; more queries than fit are worked off in chunks.
        tolerance: relative error (root mean square) that scores may have in exchange for speed, in layers applied once per
            example: eigenvalues too small to matter count as zero. 0 is exact. Default: 1e-4 (of an index 6e-3, and 1e-2 for queries that
            were carried through later segments), and 0 for a float64 model.
        progress: show a plan and progress on stderr.

    Returns:
        :class:`TrainingScores` (queries, training examples), or a list of them.

    Raises:
        QueryError, TaskError: before any work is done. GradientMismatch, BatchCoupling: the self-check failed. NotFinite: named.

    Work that was interrupted resumes when the same call is made again, and gives the identical result. Curvature is kept in the
    run's directory, keyed by a hash of weights, data and settings.
    """
    if isinstance(run, Index):
        methods, many = methods_of(method, (Method,))
        asked = ask(queries, run.run.stages[-1].task, measure).of(run.run, weights)
        answers = by_index(run, asked, methods, batch_size=batch_size, memory=memory, tolerance=tolerance, progress=progress)
        found = [_told(scores, run.run, asked.averaged) for scores in answers]
        return found if many else found[0]
    methods, many = methods_of(_run(run, method), (Method, Scorer, Answering))
    request = Request(run, ask(queries, run.stages[-1].task, measure).of(run, weights), batch_size, memory, tolerance, progress)
    tables = {k: m.plan(run) for k, m in enumerate(methods) if isinstance(m, Method)}
    results: dict[int, TrainingScores] = dict(zip(tables, by_tables(request, list(tables.values())), strict=True)) if tables else {}
    for k, m in enumerate(methods):
        if k not in tables:
            results[k] = _answer(m, request)
    found = [_told(results[k], run, request.asked.averaged, _in_one_space(m)) for k, m in enumerate(methods)]
    return found if many else found[0]


def _in_one_space(method: Any) -> bool:
    """Whether a method, or that of an ensemble's members, meets training examples at the weights at which queries are asked."""
    return isinstance(method, Scorer | LoraEnsemble) or isinstance(getattr(method, "method", None), Scorer)


def _told(scores: TrainingScores, run: Run, averaged: bool, both: bool = False) -> TrainingScores:
    """Scores that say which weights were asked, where the run holds both kinds; ``both``: and training examples met there too."""
    facts = run.manifest["stages"][-1].get("ema")
    if facts is None:
        return scores
    kept = f"{EMA} weights ({facts['kind']}" + (f", decay {facts['decay']:g})" if facts["decay"] is not None else ")")
    names = {EMA: kept, RAW: "raw weights"}
    told = {"queries at": names[EMA if averaged else run.which], "training examples at": names[EMA if averaged and both else run.which]}
    return replace(scores, provenance={**scores.provenance, **told})


def _answer(method: Scorer | Answering, request: Request) -> TrainingScores:
    """The answer of a method that is no table."""
    check(request.asked, request.run.load(request.run.model(), request.run.checkpoints[-1]), request.run.stages[-1].data, request.run.device)
    if isinstance(method, Answering):
        return method.answer(request)
    parts = method.parts(request.in_one_place)
    values, names = method.combine([parts.arrays]), column_names(parts.provenance)
    return TrainingScores(values, None, parts.name, parts.unit, request.asked.names, names, parts.provenance, parts.slices)


def self_influence(
    run: Run,
    method: Any,
    *,
    measure: Measure | None = None,
    weights: str | None = None,
    batch_size: int | None = None,
    memory: int = BUDGET,
    tolerance: float | None = None,
    progress: bool = True,
) -> Any:
    """The influence of each training example on its own measurement: the diagonal of ``trace(run, train)``, without the rest.

    Large values mark examples that the model could only have learned from themselves: rare, atypical or mislabelled ones. Arguments,
    sign and unit as for :func:`trace`; ``measure`` defaults to each stage's own ``task.measure``.

    Returns:
        :class:`TrainingScores` of shape (1, training examples), or a list of them for a list of methods.
    """
    methods, many = methods_of(_run(run, method), (Method,))
    tables: list[Table] = [m.plan(run) for m in methods]
    found = self_by_tables(run, tables, measure=measure, batch_size=batch_size, memory=memory, tolerance=tolerance, progress=progress, weights=weights)
    averaged = ask(run.stages[-1].data, run.stages[-1].task, measure).of(run, weights).averaged
    results = [_told(scores, run, averaged) for scores in found]
    return results if many else results[0]


def _run(run: Any, method: Any) -> Any:
    """The method, where ``run`` is one to ask."""
    if not isinstance(run, Run):
        raise InputError(f"a {type(run).__name__} where a run belongs", "a hw.Run", "hw.Run.open(path, build=, train=, task=), or recorder.finish()")
    return method
