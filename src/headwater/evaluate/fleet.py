"""Retraining on a Ray cluster: the same jobs, sent to whatever machines there are.

What travels: an experiment that installed packages define, by their names; what a script, a notebook or a file of one's own defines
(and the modules beside it), as code, so that no machine of the cluster needs the file. Headwater must be installed on each.

What can go wrong, and what is then done:

=====================================  =====================================================================================
a training raises                      its outcome says so; the others go on
a worker or its machine is lost        the job is sent again, :data:`RETRIES` times; then its outcome says so
the cluster is gone                    RunError; what ended before is kept, and the same call continues
Ctrl-C                                 what runs is stopped; a Ray that was started here is shut down
=====================================  =====================================================================================
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import time
import traceback
from collections import ChainMap, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import Any

from headwater.errors import MissingExtra, RunError
from headwater.evaluate.jobs import Job, Work
from headwater.evaluate.workers import Outcome, attempt, on_gpu
from headwater.store import bytes_hash
from headwater.training import Experiment
from headwater.training.experiment import OWN_FILES

RETRIES = 2  # times that a job is sent again whose worker was lost
BEAT = 1.0  # seconds between looks at the cluster
PATIENCE = 15.0  # seconds that the cluster's head may be out of reach; Ray itself ends the whole program after 60
STRANDED = 120.0  # seconds that nothing may run for want of machines
QUEUED = 1000  # jobs handed over at a time where nothing else is said: Ray decides how many run
GONE = "the trainings that ended are kept in the bank: start the cluster again, or use engine='local', and make the same call: it continues"


def ray(work: Work, jobs: Sequence[Job], workers: int | None = None) -> Generator[Outcome, None, None]:
    """An engine (see :mod:`headwater.evaluate.workers`): at most ``workers`` jobs at a time, else as many as the cluster takes; each has
    one CPU, and one GPU where ``build`` puts the model on a GPU.

    A Ray that is initialised is used as it is (and its log, which is silenced otherwise); else the cluster at ``RAY_ADDRESS``; else a
    local one is started with ``workers`` CPUs (default: all), and stopped afterwards.
    """
    try:
        library = importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtra('engine="ray" without the library ray', "ray", "pip install headwater[ray], or use engine='local'") from error
    need = {"num_cpus": 1, "num_gpus": int(on_gpu(work.experiment))}
    packed = _packed(work, library.cloudpickle)
    with _joined(library, workers) as cluster:
        cluster.require(need)
        boxed = [library.put(packed)]  # in a list, so that a worker fetches it once and not for each job
        remote = library.remote(max_retries=0, **need)(_there)
        yield from _done(cluster, lambda job: remote.remote(bytes_hash(packed), boxed, job), jobs, workers or QUEUED)


def _done(cluster: _Cluster, send: Any, jobs: Sequence[Job], limit: int) -> Generator[Outcome, None, None]:
    """Keep up to ``limit`` jobs with the cluster, and hand on each outcome; send again what was lost."""
    errors = cluster.library.exceptions
    waiting, running, lost = deque(jobs), dict[Any, Job](), dict[str, int]()
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                job = waiting.popleft()
                running[send(job)] = job
            for task in cluster.ended(list(running)):
                job = running.pop(task)
                try:
                    outcome = cluster.library.get(task)
                except errors.LocalRayletDiedError as error:
                    cluster.dead = True
                    raise _gone(f"Ray on this machine ended ({_first(error)})") from error
                except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:
                    raise _unopened(str(error)) from error
                except errors.RayError as error:  # a worker or a machine that died, or was killed for its memory
                    lost[job.name] = lost.get(job.name, 0) + 1
                    if lost[job.name] <= RETRIES:
                        waiting.append(job)
                        continue
                    outcome = Outcome(job, None, 0.0, f"its worker was lost {lost[job.name]} times (out of memory?): {_first(error)}")
                if isinstance(outcome, str):
                    raise _unopened(outcome)
                yield outcome
    finally:
        if not cluster.dead:
            for task in running:
                with suppress(Exception):
                    cluster.library.cancel(task, force=True)


def _there(key: str, boxed: list[Any], job: Job) -> Outcome | str:
    """One job, in a worker of the cluster; a traceback where the work cannot be opened there."""
    try:
        if key not in _OPENED:
            library = importlib.import_module("ray")
            _OPENED.clear()
            _OPENED[key] = _unpacked(library.get(boxed[0]), library.cloudpickle)
        work = _OPENED[key]
    except Exception:  # noqa: BLE001  whatever importing the user's code raises
        return traceback.format_exc()
    return attempt(work, job)


_OPENED: dict[str, Work] = {}


# ---------------------------------------------------------------------------------------------------------------- the cluster


class _Cluster:
    """Ray, and whether its head is still there."""

    def __init__(self, library: Any) -> None:
        self.library, self.dead, self.need = library, False, dict[str, int]()
        self.address = _address(library)
        self.reached = self.busy = time.monotonic()

    def require(self, need: dict[str, int]) -> None:
        """RunError where no machine of the cluster could take a job."""
        self.need = need
        if lacking := self._lacking():
            raise RunError(f"a Ray cluster without a {lacking}", "a machine with one that can take a training", "start one, or use engine='local'")

    def _lacking(self) -> str:
        held = self.library.cluster_resources()
        return next((kind for kind in ("CPU", "GPU") if held.get(kind, 0) < self.need[f"num_{kind.lower()}s"]), "")

    def ended(self, tasks: list[Any]) -> list[Any]:
        """Which tasks have ended, after at most one beat; RunError where the cluster is gone."""
        try:
            done, _ = self.library.wait(tasks, num_returns=len(tasks), timeout=0)
            done = done or self.library.wait(tasks, num_returns=1, timeout=BEAT)[0]
        except (ConnectionError, self.library.exceptions.RaySystemError) as error:
            self.dead = True
            raise _gone(f"the connection to it was lost ({_first(error)})") from error
        now = time.monotonic()
        if done or (self.address is not None and _answers(self.address)):
            self.reached = now
        if self.address is not None and now - self.reached > PATIENCE:
            self.dead = True
            raise _gone(f"its head at {self.address[0]}:{self.address[1]} has not answered for {PATIENCE:g} s")
        if done or now > self.reached or not self._lacking():  # a head that does not answer must not be asked
            self.busy = now
        if now - self.busy > STRANDED:
            raise _gone(f"for {STRANDED:g} s it has had no machine that could take a training")
        return done


@contextmanager
def _joined(library: Any, workers: int | None) -> Iterator[_Cluster]:
    """Ray as it is, or initialised for as long as this lasts. One that is gone is left at once: it would end the program."""
    ours = not library.is_initialized()
    if ours:
        _initialise(library, workers)
    cluster = None
    try:
        cluster = _Cluster(library)
        yield cluster
    finally:
        if ours or (cluster is not None and cluster.dead):
            library.shutdown()


def _initialise(library: Any, workers: int | None) -> None:
    address, quiet = os.environ.get("RAY_ADDRESS"), {"logging_level": logging.ERROR, "log_to_driver": False}
    place = _host_and_port(address) if address else None
    try:
        if place is not None and not _answers(place):  # Ray itself would try for minutes, and then end the program
            raise ConnectionError("nobody answers")
        if address and address != "local":
            library.init(address=address, **quiet)
        else:
            library.init(address="local", num_cpus=workers or _cores(), include_dashboard=False, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"at RAY_ADDRESS={address}" if address else "on this machine"
        raise RunError(f"no Ray {where}: {_first(error)}", "a cluster that answers", "check the address, start it (ray start --head), or use engine='local'") from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _address(library: Any) -> tuple[str, int] | None:
    """Where the cluster's head listens; None where Ray does not say (through its client, which notices by itself)."""
    try:
        return _host_and_port(library.get_runtime_context().gcs_address)
    except Exception:  # noqa: BLE001  what it raises through a client is not documented
        return None


def _host_and_port(address: str) -> tuple[str, int] | None:
    """``host:port``, also of ``ray://host:port``; None for names such as auto and local."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdigit() else None


def _answers(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=2).close()
    except OSError:
        return False
    return True


def _gone(how: str) -> RunError:
    return RunError(f"the Ray cluster went away: {how}", "a cluster that lasts until the trainings end", GONE)


def _unopened(trace: str) -> RunError:
    return RunError(
        "the experiment could not be opened on the Ray cluster",
        "headwater, and every package that the experiment imports, installed on each machine, in the same versions",
        f"install what is missing (see below)\n\n{trace}",
    )


def _first(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


# --------------------------------------------------------------------------------------------------------------- what travels


def _packed(work: Work, cloudpickle: Any) -> bytes:
    """The work as bytes; code that no other machine could import goes with it."""
    holder = BytesIO()

    known = ChainMap({Experiment: _by_fields}, cloudpickle.CloudPickler.dispatch_table)
    pickler: Any = type("Pickler", (cloudpickle.CloudPickler,), {"dispatch_table": known})(holder)
    modules = list(_own_modules())
    held = [m for m in modules if m.__name__ not in cloudpickle.list_registry_pickle_by_value()]
    for module in held:
        cloudpickle.register_pickle_by_value(module)
    try:
        pickler.dump(work)
    except Exception as error:  # pickle raises PicklingError, AttributeError, TypeError and whatever a __reduce__ raises
        raise RunError(
            f"an experiment that cannot be sent to another machine: {_first(error)}",
            "datasets and functions that cloudpickle can take",
            "leave open files, locks and connections out of it (open them in build or fit), or use engine='local'",
        ) from error
    finally:
        for module in held:
            cloudpickle.unregister_pickle_by_value(module)
    return holder.getvalue()


def _unpacked(packed: bytes, cloudpickle: Any) -> Work:
    return cloudpickle.loads(packed)


def _by_fields(experiment: Experiment) -> tuple[Any, ...]:
    """An experiment as its parts, each of which travels in its own way; its own way of being pickled sends the path of a file."""
    return Experiment, tuple(getattr(experiment, f.name) for f in fields(experiment))


def _own_modules() -> Iterator[Any]:
    """Modules that only this machine has: files that experiments were loaded from, and whatever was imported from beside them or from
    beside the script that runs. (The script itself always travels as code.)"""
    loaded = {name: module for name, module in sys.modules.items() if getattr(module, "__file__", None)}
    sources = [module for name, module in loaded.items() if name.startswith(OWN_FILES)]
    script = [loaded["__main__"]] if "__main__" in loaded else []
    folders = {Path(str(module.__file__)).resolve().parent for module in [*sources, *script]}
    folders = {folder for folder in folders if not _installed(folder)}
    yield from sources
    for name, module in loaded.items():
        top = loaded.get(name.partition(".")[0])
        if top is None or name.startswith(OWN_FILES) or name in ("__main__", "__mp_main__") or name.partition(".")[0] == "headwater":
            continue
        file = Path(str(top.__file__)).resolve()
        if (file.parent.parent if file.name == "__init__.py" else file.parent) in folders:
            yield module


def _installed(folder: Path) -> bool:
    return bool({"site-packages", "dist-packages"} & set(folder.parts)) or folder.is_relative_to(Path(os.__file__).resolve().parent)
