"""Engines: ways to get a list of jobs done. Each takes (work, jobs, workers) and yields an :class:`Outcome` as each job ends.

The other engine, ``ray``, is in :mod:`headwater.evaluate.fleet`.

``local`` uses processes with one torch thread each, started in the safest way that this experiment and this machine allow:

==================================================  =========================================================================
experiment                                          workers
==================================================  =========================================================================
can be sent by pickle, from an importable file      spawned; the calling script is not imported again in them
is defined in the script itself or a notebook,      forked, on Linux and before CUDA has started; a script elsewhere is spawned,
or uses lambdas and closures                        with Python's rule about ``if __name__ == "__main__":``
none of these                                       the jobs run one by one in the calling process
==================================================  =========================================================================
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch

from headwater.errors import RunError
from headwater.evaluate.jobs import Job, Work

PATIENCE = 5.0  # seconds that a worker told to stop gets before it is killed


@dataclass(frozen=True, eq=False)
class Outcome:
    """How one job ended: ``values`` (queries,) or, where it failed, ``failure`` (a traceback); ``seconds`` it took."""

    job: Job
    values: np.ndarray | None
    seconds: float
    failure: str | None = None


Engine = Callable[[Work, Sequence[Job], int | None], Generator[Outcome, None, None]]
"""``workers`` is how many jobs run at a time; None where only the engine knows."""


def attempt(work: Work, job: Job) -> Outcome:
    """Do one job; an exception becomes an outcome that carries its traceback."""
    start = time.perf_counter()
    try:
        values, failure = work(job), None
    except Exception:  # whatever the user's training raises must not stop the other trainings
        values, failure = None, traceback.format_exc()
    return Outcome(job, values, time.perf_counter() - start, failure)


def local(work: Work, jobs: Sequence[Job], workers: int | None = None) -> Generator[Outcome, None, None]:
    """Worker processes on this machine, or this process where there is one worker or no safe way to start more."""
    workers = default_crew(work.experiment) if workers is None else workers
    crew = _recruiter(work) if min(workers, len(jobs)) > 1 else None
    return in_process(work, jobs) if crew is None else _processes(crew, jobs, workers)


def in_process(work: Work, jobs: Sequence[Job], workers: int | None = 1) -> Generator[Outcome, None, None]:
    """One job after the other, here."""
    return (attempt(work, job) for job in jobs)


def default_crew(experiment: Any) -> int:
    """One worker per core that we may use; one per GPU where the model is built on a GPU."""
    if on_gpu(experiment):
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_gpu(experiment: Any) -> bool:
    """Whether ``build`` puts the model on a GPU."""
    with torch.random.fork_rng(devices=[]):
        return any(p.is_cuda for p in experiment.build().parameters())


# ---------------------------------------------------------------------------------------------------------- starting workers


@dataclass(frozen=True)
class Recruiter:
    """How workers are started: the start ``method``, and the ``work`` as they get it (pickled, or as it is for a fork)."""

    method: str
    work: bytes | Work
    reads_script: bool = True

    def hire(self) -> Worker:
        """Start one worker process."""
        context: Any = mp.get_context(self.method)
        here, there = context.Pipe()
        carried = None if isinstance(self.work, bytes) else self.work
        process = context.Process(target=_serve, args=(there, carried), name="headwater-retrain")
        with warnings.catch_warnings(), _script_hidden(not self.reads_script):
            # Python warns of forking beside threads; the child sets one torch thread before it computes anything.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
            process.start()
        there.close()
        return Worker(process, here, self.work if isinstance(self.work, bytes) else None)


def _recruiter(work: Work) -> Recruiter | None:
    """The table at the top of this file."""
    packed = _pickled(work)
    if packed is not None and b"__main__" not in packed:
        return Recruiter("spawn", packed, reads_script=False)
    if sys.platform == "linux" and not torch.cuda.is_initialized():
        return Recruiter("fork", work)
    if packed is not None and hasattr(sys.modules["__main__"], "__file__"):
        return Recruiter("spawn", packed)
    return None


def _pickled(work: Work) -> bytes | None:
    try:
        return pickle.dumps(work)
    except Exception:  # pickle raises PicklingError, AttributeError, TypeError and whatever a __reduce__ raises
        return None


@contextmanager
def _script_hidden(hide: bool) -> Iterator[None]:
    """A spawned process imports the caller's script again, and runs it where ``if __name__ == "__main__":`` is missing.

    An experiment that can be imported by itself does not need that, so the script is hidden while the process starts.
    """
    script = sys.modules["__main__"].__dict__
    kept = {key: script.pop(key) for key in ("__file__",) if hide and key in script}
    spec = script.get("__spec__")
    try:
        if hide:
            script["__spec__"] = None
        yield
    finally:
        script.update(kept)
        if hide:
            script["__spec__"] = spec


# --------------------------------------------------------------------------------------------------------- inside one worker


def _serve(line: Connection, work: Work | None) -> None:
    """A worker's life: say that it is ready, receive the work (a fork has it already), then one outcome for each job, until None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone decides
    torch.set_num_threads(1)
    _end_with_parent()
    line.send(None)
    try:
        work = work or pickle.loads(line.recv_bytes())
    except Exception:
        line.send(traceback.format_exc())
        return
    while (job := line.recv()) is not None:
        line.send(attempt(work, job))


def _end_with_parent() -> None:
    """A worker whose parent was killed stops at once."""
    parent = mp.parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# --------------------------------------------------------------------------------------------------------- seen from outside


@dataclass(eq=False)
class Worker:
    """One process, the line to it, the pickled work it is sent (None for a fork), and what it is busy with. ``ready``: it has said so."""

    process: Any
    line: Connection
    packed: bytes | None = None
    job: Job | None = None
    ready: bool = False

    def give(self, job: Job | None) -> None:
        """Hand over the next job, or None: no more work."""
        self.job = job
        with suppress(OSError):  # it may have died meanwhile; take() will say so
            self.line.send(job)

    def take(self) -> Outcome | None:
        """The outcome that arrived, or None for the news that the worker is ready."""
        try:
            news = self.line.recv()
        except (EOFError, OSError):
            return self._lost()
        if isinstance(news, str):
            raise RunError(
                "the experiment could not be opened in a worker process",
                "an experiment that imports on its own",
                f"see below, or use workers=1\n\n{news}",
            )
        if not self.ready and self.packed is not None:
            self.line.send_bytes(self.packed)  # only now: a process that still starts up would keep the caller waiting
        self.ready = True
        return news

    def _lost(self) -> Outcome:
        self.process.join()
        how = f"exit code {self.process.exitcode}"
        if not self.ready or self.job is None:
            raise RunError(
                f"a worker process ended with {how} before it could start",
                "a script that can be imported",
                'put the call under `if __name__ == "__main__":`, keep the Experiment in its own file, or use workers=1',
            )
        why = "out of memory? use fewer workers" if self.process.exitcode == -signal.SIGKILL else "the process died"
        return Outcome(self.job, None, 0.0, f"the worker process ended with {how} ({why})")

    def stop(self) -> None:
        """End the process, with force where it does not listen."""
        self.process.terminate()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.line.close()


def _processes(recruiter: Recruiter, jobs: Sequence[Job], workers: int) -> Generator[Outcome, None, None]:
    """Give each worker its next job as soon as it is free; replace a worker that died. All are stopped when this ends, however it ends."""
    waiting = deque(jobs)
    crew: list[Worker] = []
    try:
        crew.extend(recruiter.hire() for _ in range(min(workers, len(jobs))))
        while crew:
            lines = {worker.line: worker for worker in crew}
            for worker in (lines[line] for line in wait(list(lines))):  # type: ignore[index]
                outcome = worker.take()
                if outcome is not None:
                    yield outcome
                if waiting and not worker.process.is_alive():
                    crew.append(recruiter.hire())
                if not waiting or not worker.process.is_alive():
                    crew.remove(worker)
                    worker.stop()
                else:
                    worker.give(waiting.popleft())
    finally:
        for worker in crew:
            worker.stop()
