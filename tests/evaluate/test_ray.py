"""Retraining on a local Ray: the same bank, through lost workers, a lost cluster, Ctrl-C, and code that no other machine could import."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from headwater.errors import InputError, RunError
from headwater.evaluate import Bank, fleet, removing, retrain
from headwater.evaluate.bank import Shelf
from headwater.evaluate.jobs import Job, Work
from headwater.evaluate.workers import Outcome
from headwater.training import Experiment

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own sockets and files
]

EXPERIMENT = """
import os, signal, time, torch
from headwater.tasks import Regression
from headwater.training import Experiment
from beside_it import STEPS, taken

HERE = {here!r}

def build():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Tanh(), torch.nn.Linear(4, 1))

def fit(model, train, seed, recorder=None):
    with open(HERE + "/fits", "a") as log:
        log.write(f"{{os.getpid()}} {{len(train[0])}} {{seed}}\\n")
    if os.path.exists(f"{{HERE}}/kill-{{len(train[0])}}-{{seed}}") and taken(f"{{HERE}}/kill-{{len(train[0])}}-{{seed}}"):
        os.kill(os.getpid(), signal.SIGKILL)
    if os.path.exists(f"{{HERE}}/raise-{{len(train[0])}}-{{seed}}"):
        raise ValueError("no luck today")
    while os.path.exists(HERE + "/hold") and len(train[0]) < 20:
        time.sleep(0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(STEPS):
        rows = torch.randint(len(train[0]), (4,))
        optimizer.zero_grad()
        ((model(train[0][rows]) - train[1][rows]) ** 2).mean().backward()
        optimizer.step()
    return model

def data(count, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=g)
    return x, x.sum(1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=g)

experiment = Experiment(build, data(20, 0), data(5, 1), Regression(), fit, "small")
"""

BESIDE = """
import os

STEPS = 8

def taken(path):
    left = int(open(path).read())
    with open(path, "w") as file:
        file.write(str(left - 1))
    return left > 0
"""

SUBSETS = removing(20, [range(5), range(6), range(7)])


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two CPUs that the caller has initialised. It was started before any file of these tests was written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield found
    ray.shutdown()


@pytest.fixture
def small(tmp_path, monkeypatch):
    (tmp_path / "small_experiment.py").write_text(EXPERIMENT.format(here=str(tmp_path)))
    (tmp_path / "beside_it.py").write_text(BESIDE)
    yield Experiment.load(tmp_path / "small_experiment.py")
    sys.modules.pop("beside_it")


@pytest.fixture
def fits(tmp_path):
    """Process, examples and seed of each training so far."""
    return lambda: [tuple(map(int, line.split())) for line in (tmp_path / "fits").read_text().splitlines()] if (tmp_path / "fits").exists() else []


def same(one, other):
    return np.array_equal(one.values, other.values) and np.array_equal(one.base, other.base)


def at_most(seconds, condition):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------------------ in any test run


def test_the_bank_is_the_same_bit_by_bit_and_what_is_there_is_not_trained_again(cluster, small, fits, tmp_path):
    """The workers know neither the experiment's file nor the one beside it: both travel as code."""
    here = retrain(small, SUBSETS, 2, workers=1, directory=tmp_path / "here", progress=False)
    begun = len(fits())
    first = retrain(small, SUBSETS.take([0, 1]), 2, engine="ray", directory=tmp_path / "there", progress=False)
    assert len(fits()) - begun == 6 and os.getpid() not in {pid for pid, *_ in fits()[begun:]}
    there = retrain(small, SUBSETS, 2, engine="ray", directory=tmp_path / "there", progress=False)
    assert len(fits()) - begun == 8 and same(here, there) and np.array_equal(first.values, here.values[:2])
    assert same(there, retrain(small, SUBSETS, 2, engine="ray", directory=tmp_path / "there", progress=False)) and len(fits()) - begun == 8
    assert ray.is_initialized()  # it is the caller's
    assert b"_revive" not in fleet._packed(Work(small), ray.cloudpickle)  # which would read the file there
    assert "beside_it" not in ray.cloudpickle.list_registry_pickle_by_value()


def test_an_experiment_that_cannot_be_opened_there_is_one_clear_error(cluster, small, tmp_path, monkeypatch):
    monkeypatch.setattr("headwater.evaluate.fleet._packed", lambda work, cloudpickle: b"no pickle")
    with pytest.raises(RunError, match="could not be opened on the Ray cluster"):
        retrain(small, SUBSETS, 1, engine="ray", directory=tmp_path / "bank", progress=False)


def test_a_machine_with_what_a_training_needs_is_asked_for(cluster, small, tmp_path, monkeypatch):
    monkeypatch.setattr("headwater.evaluate.fleet.on_gpu", lambda experiment: True)
    with pytest.raises(RunError, match="Ray cluster without a GPU"):
        retrain(small, SUBSETS, 1, engine="ray", directory=tmp_path / "bank", progress=False)


def test_what_cannot_travel_is_refused(small):
    lock = threading.Lock()
    held = Experiment(lambda: lock and small.build(), small.train, small.test, small.task, small.fit)
    with pytest.raises(RunError, match="cannot be sent to another machine"):
        fleet._packed(Work(held), ray.cloudpickle)


def test_no_cluster_at_the_address_is_said_at_once(small, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(RunError, match=r"no Ray at RAY_ADDRESS=127\.0\.0\.1:9") as caught:
        retrain(small, SUBSETS, 1, engine="ray", directory=tmp_path / "bank", progress=False)
    assert time.monotonic() - started < 10 and not isinstance(caught.value, InputError)


def test_a_lost_worker_is_replaced_and_the_bank_is_the_same(cluster, small, fits, tmp_path):
    here = retrain(small, SUBSETS, 1, workers=1, directory=tmp_path / "here", progress=False)
    begun = len(fits())
    (tmp_path / "kill-14-0").write_text("1")
    there = retrain(small, SUBSETS, 1, engine="ray", workers=2, directory=tmp_path / "there", progress=False)
    tried = [pid for pid, size, _ in fits()[begun:] if size == 14]
    assert same(here, there) and len(tried) == 2 and len(set(tried)) == 2 and len(fits()) - begun == 5


class Double:
    """A cluster in memory: task i of a job ends as ``fate(job)`` says, with an outcome or an error."""

    exceptions = ray.exceptions

    def __init__(self, fate):
        self.fate, self.library, self.dead, self.cancelled, self.most = fate, self, False, [], 0

    def ended(self, tasks):
        self.most = max(self.most, len(tasks))
        return tasks[:1]

    def get(self, task):
        found = self.fate(task[1])
        if isinstance(found, Exception):
            raise found
        return found

    def cancel(self, task, force):
        self.cancelled.append(task[1])


def sent(fate, jobs, limit):
    cluster, numbers = Double(fate), count()
    return cluster, fleet._done(cluster, lambda job: (next(numbers), job), jobs, limit)


def test_a_job_that_always_loses_its_worker_fails_after_its_retries_and_the_others_go_on():
    jobs, tries = [Job(number, 0, None) for number in range(4)], Counter()

    def fate(job):
        tries[job.subset] += 1
        return ray.exceptions.WorkerCrashedError() if job.subset == 1 or (job.subset == 2 and tries[2] == 1) else Outcome(job, np.ones(1), 0.1)

    cluster, outcomes = sent(fate, jobs, 2)
    found = {o.job.subset: o for o in outcomes}
    assert tries == {0: 1, 1: 1 + fleet.RETRIES, 2: 2, 3: 1} and cluster.most == 2 and not cluster.cancelled
    assert found[1].values is None and "lost 3 times" in found[1].failure and all(found[k].values is not None for k in (0, 2, 3))


def test_what_stops_the_loop_cancels_what_runs():
    jobs = [Job(number, 0, None) for number in range(5)]
    cluster, outcomes = sent(lambda job: Outcome(job, np.ones(1), 0.1), jobs, 3)
    assert next(outcomes).job is jobs[0]
    outcomes.close()
    assert cluster.cancelled == jobs[1:3]
    cluster, outcomes = sent(lambda job: ray.exceptions.LocalRayletDiedError(), jobs, 3)
    with pytest.raises(RunError, match="the Ray cluster went away"):
        next(outcomes)
    assert cluster.dead and not cluster.cancelled


PLACES = {"10.0.0.1:6379": ("10.0.0.1", 6379), "ray://h:10001": ("h", 10001), "[::1]:5": ("::1", 5), "auto": None, "local": None}


@pytest.mark.parametrize(("address", "place"), PLACES.items())
def test_addresses(address, place):
    assert fleet._host_and_port(address) == place


# --------------------------------------------------------------------------------- a minute: workers and clusters that start again


@pytest.mark.slow
def test_trainings_that_fail_there_fail_alone(cluster, small, fits, tmp_path):
    (tmp_path / "kill-14-0").write_text("99")
    (tmp_path / "raise-13-0").write_text("")
    with pytest.raises(RunError, match="2 of 4 trainings failed") as caught:
        retrain(small, SUBSETS, 1, engine="ray", directory=tmp_path / "bank", progress=False)
    assert "subset 1, seed 0" in str(caught.value) and "subset 2, seed 0" in str(caught.value)
    assert [size for _, size, _ in fits()].count(14) == 1 + fleet.RETRIES and [size for _, size, _ in fits()].count(13) == 1
    assert Bank.open(tmp_path / "bank").finished.ravel().tolist() == [True, False, False]
    (tmp_path / "kill-14-0").unlink()
    (tmp_path / "raise-13-0").unlink()
    whole = retrain(small, SUBSETS, 1, engine="ray", directory=tmp_path / "bank", progress=False)
    assert whole.finished.all() and same(whole, retrain(small, SUBSETS, 1, workers=1, directory=tmp_path / "here", progress=False))


SCRIPT = """
import sys
from headwater.evaluate import retrain, removing
{experiment}
if __name__ == "__main__":
    retrain(experiment, removing(20, [range(5), range(6), range(7)]), 1, engine="ray", directory={place!r})
"""


@pytest.mark.slow
def test_a_script_finds_the_cluster_by_its_address_and_ctrl_c_stops_its_trainings(cluster, small, fits, tmp_path):
    """The experiment is the script's own. Stopped while trainings run, the same script goes on where it was."""
    place, script = tmp_path / "bank", tmp_path / "script.py"
    script.write_text(SCRIPT.format(experiment=EXPERIMENT.format(here=str(tmp_path)), place=str(place)))
    settings = {**os.environ, "RAY_ADDRESS": cluster.address_info["gcs_address"], "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    (tmp_path / "hold").touch()
    process = subprocess.Popen([sys.executable, str(script)], env=settings, stderr=subprocess.PIPE, text=True, cwd="/")
    assert at_most(60, lambda: (place / "measurements").exists() and len(fits()) >= 3)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "KeyboardInterrupt" in said and "stopped. 1 of 4 models are kept" in said
    assert "as many at a time as the cluster takes" in said and "(raylet)" not in said
    assert at_most(10, lambda: not any(alive(pid) for pid, size, _ in fits() if size < 20))
    (tmp_path / "hold").unlink()
    begun = len(fits())
    done = subprocess.run([sys.executable, str(script)], env=settings, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(size for _, size, _ in fits()[begun:]) == [13, 14, 15]
    assert same(Bank.open(place), retrain(small, SUBSETS, 1, workers=1, directory=tmp_path / "here", progress=False))


@pytest.mark.slow
def test_a_cluster_that_goes_away_is_one_error_and_the_same_call_continues(cluster, small, fits, tmp_path, monkeypatch):
    """Last of all: it ends the cluster, then starts one of its own, which ends with the call."""
    monkeypatch.setattr("headwater.evaluate.fleet.PATIENCE", 1.0)
    monkeypatch.setattr("headwater.evaluate.fleet.BEAT", 0.2)
    (tmp_path / "hold").touch()
    head = [pid for pid in children() if "gcs_server" in command(pid)]
    kept = after_the_first(monkeypatch, lambda: [os.kill(pid, signal.SIGKILL) for pid in head])
    with pytest.raises(RunError, match="the Ray cluster went away") as caught:
        retrain(small, SUBSETS, 1, engine="ray", directory=tmp_path / "bank", progress=False)
    assert "the same call: it continues" in str(caught.value) and len(kept) == 1 and not ray.is_initialized()
    (tmp_path / "hold").unlink()
    monkeypatch.setattr("headwater.evaluate.fleet.PATIENCE", 15.0)
    begun = len(fits())
    whole = retrain(small, SUBSETS, 1, engine="ray", workers=1, directory=tmp_path / "bank", progress=False)
    assert sorted(size for _, size, _ in fits()[begun:]) == [13, 14, 15] and not ray.is_initialized()
    assert same(whole, retrain(small, SUBSETS, 1, workers=1, directory=tmp_path / "here", progress=False))


def after_the_first(monkeypatch, then):
    """The jobs that the bank keeps, in the making; ``then()`` is called after the first."""
    keep, kept = Shelf.keep, []

    def noting(self, job, values, seconds):
        keep(self, job, values, seconds)
        kept.append(job)
        if len(kept) == 1:
            then()

    monkeypatch.setattr(Shelf, "keep", noting)
    return kept


def children():
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if parent == os.getpid():
                found.append(int(place.name))
    return found


def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
