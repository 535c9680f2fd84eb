"""Retraining on subsets: the truth that every attribution is judged by."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headwater.errors import InputError, RunError
from headwater.evaluate.bank import Bank, Shelf, all_jobs
from headwater.evaluate.fleet import ray
from headwater.evaluate.identity import identity
from headwater.evaluate.jobs import Work
from headwater.evaluate.subsets import Subsets
from headwater.evaluate.workers import Engine, Outcome, default_crew, local
from headwater.influence.timing import Pieces
from headwater.report.numbers import duration

ENGINES: dict[str, tuple[Engine, Callable[[Any], int | None]]] = {"local": (local, default_crew), "ray": (ray, lambda experiment: None)}
"""Each with how many trainings it does at a time where nothing is said; None where only the engine knows."""

def retrain(
    experiment: Any,
    subsets: Subsets,
    seeds: int | Sequence[int] = 2,
    *,
    engine: str = "local",
    workers: int | None = None,
    directory: str | Path | None = None,
    measure: Callable[..., Any] | None = None,
    progress: bool = True,
) -> Bank:
    """Train the experiment anew on every subset and on the full set, with every seed, and measure ``experiment.test`` each time.

    The truth that this defines: ``experiment.fit`` decides how long to train, so a fit that counts epochs takes fewer steps on a
    subset (the dose per example is kept), and one that counts steps sees each example more often. Before each training ``random``,
    numpy and torch are seeded with the seed, and one thread is used: the same seeds give the same bank, however many workers there are.

    Args:
        experiment: a :class:`headwater.Experiment`: build, train, test, task, fit.
        subsets: from :func:`halves`, :func:`leave_out` or :func:`removing`, over the examples of ``experiment.train``.
        seeds: how many (they are then 0, 1, ...), or which.
        engine: ``"local"`` (processes on this machine) or ``"ray"``: a Ray that is initialised, else the cluster at ``RAY_ADDRESS``, else
            a local one for as long as the call lasts. Each training there has one CPU, and one GPU where ``build`` puts the model on one;
            one whose worker is lost is sent again, twice. Experiments from scripts, notebooks and files travel with their code.
        workers: trainings at a time; by default one per core (one per GPU where ``build`` puts the model on a GPU), with Ray as many as
            the cluster takes.
        directory: where each model's measurements are kept as it ends. A call with the same arguments continues there, also with more
            subsets or seeds. By default a new temporary directory, named on the screen; ``bank.directory`` tells it too.
        measure: ``(model, batch) -> (n,)``, in place of ``experiment.task.measure``.
        progress: show a bar and an estimate on stderr.

    Returns:
        The :class:`Bank`.

    Raises:
        RunError: trainings failed (all others are done and kept), the directory belongs to another experiment, or a Ray cluster went away
            (what was done is kept, and the same call continues).
        KeyboardInterrupt: after Ctrl-C has stopped the workers; what was done is kept.

    Example::

        bank = hw.evaluate.retrain(experiment, hw.evaluate.halves(len(train), 50), seeds=2, directory="banks/mnist")
    """
    chosen = _seeds(seeds)
    _check(experiment, subsets, engine)
    place = Path(directory) if directory is not None else Path(tempfile.mkdtemp(prefix="headwater-bank-"))
    shelf = Shelf.prepare(place, experiment.name, identity(experiment, measure), subsets, chosen)
    jobs = all_jobs(subsets, chosen)
    waiting = [job for job in jobs if not shelf.has(job)]
    if waiting:
        carry_out, default = ENGINES[engine]
        crew = default(experiment) if workers is None else max(1, workers)
        with Teller(len(jobs), len(waiting), crew if crew is None else min(crew, len(waiting)), place, progress) as teller:
            failed = _carry_out(carry_out(Work(experiment, measure), waiting, crew), shelf, teller)
        _report(failed, len(jobs), place)
    return shelf.bank(subsets, chosen)


def _carry_out(outcomes: Generator[Outcome, None, None], shelf: Shelf, teller: Teller) -> list[Outcome]:
    """Keep each outcome as it comes; give back those that failed."""
    failed = []
    with closing(outcomes):  # Ctrl-C or a full disk in here must stop the workers at once, not when the traceback is forgotten
        for outcome in outcomes:
            if outcome.values is None:
                failed.append(outcome)
            else:
                shelf.keep(outcome.job, outcome.values, outcome.seconds)
            teller.ended(outcome)
    return failed


class Teller:
    """Says on stderr how the work goes: a bar, an estimate once the first model has ended, and where things are after Ctrl-C."""

    def __init__(self, total: int, waiting: int, workers: int | None, place: Path, speaks: bool) -> None:
        self.waiting, self.workers, self.place, self.speaks, self.done, self.kept = waiting, workers, place, speaks, 0, total - waiting
        self.pace = Pieces(["model"] * waiting, workers or 1)
        self.bar = tqdm(total=total, initial=self.kept, unit="model", desc="retraining", file=sys.stderr, disable=not speaks)

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self.speaks:
            tqdm.write(line, file=sys.stderr)

    def ended(self, outcome: Outcome) -> None:
        """Count one training; the first one tells how long all will take, and later ones tell it again where they take longer or less."""
        self.done += 1
        if outcome.failure is not None:
            self.say(f"training on {outcome.job} failed: {outcome.failure.strip().splitlines()[-1]}")
        else:
            self.kept += 1
        self._tell(outcome.seconds if outcome.failure is None else None)
        self.bar.update()

    def _tell(self, seconds: float | None) -> None:
        which = f"first model: {duration(seconds)}, starting included" if self.done == 1 and seconds is not None else "by the models so far"
        news, to_go = self.pace.ended("model", seconds), f"{self.waiting - self.done} to go"
        if self.workers is None:  # how many are trained at a time is known to the cluster, and how fast that goes to the bar
            if self.done == 1 and self.waiting > 1:
                self.say(f"{which}; {to_go}")
        elif news:
            self.say(f"{which}; {to_go}, {self.workers} at a time: about {duration(self.pace.left)}")

    def __enter__(self) -> Teller:
        crew = "as many at a time as the cluster takes" if self.workers is None else f"{self.workers} at a time"
        self.say(f"retraining {self.waiting} models, {crew}; measurements go to {self.place}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.bar.close()
        if kind is KeyboardInterrupt:
            kept = f"{self.kept} of {self.bar.total} models are kept in {self.place}"
            self.say(f"stopped. {kept}; the same call with directory={str(self.place)!r} continues there.")


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(int(s) for s in seeds)
    if not chosen or len(set(chosen)) < len(chosen) or min(chosen) < 0:
        raise InputError(f"seeds={seeds!r}", "a number of seeds, or different seeds from 0 upwards", "use seeds=2 or seeds=(0, 1)")
    return chosen


def _check(experiment: Any, subsets: Subsets, engine: str) -> None:
    if engine not in ENGINES:
        raise InputError(f"engine={engine!r}", f"one of {sorted(ENGINES)}", "use engine='local'")
    if len(experiment.task.examples(experiment.test)) == 0:
        raise InputError("an experiment with an empty test set", "at least one query to measure", "give Experiment(test=...) some examples")
    n = len(experiment.task.examples(experiment.train))
    if subsets.n != n:
        raise InputError(f"subsets of {subsets.n} examples, and an experiment with {n} training examples", "the same number", f"use halves({n}, ...)")


def _report(failed: list[Outcome], total: int, place: Path) -> None:
    if failed:
        raise RunError(
            f"{len(failed)} of {total} trainings failed: {', then '.join(str(o.job) for o in failed[:10])}{' ...' if len(failed) > 10 else ''}.\n"
            f"The first of them:\n{failed[0].failure}",
            "trainings that end with a model",
            f"mend the cause and call retrain again with directory={str(place)!r}: the {total - len(failed)} others are kept there "
            "and are not repeated; hw.evaluate.Bank.open reads them as they are",
        )
