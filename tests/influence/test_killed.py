"""Death without warning: a process is killed in the middle of writing a file, early, late, or at the last moment. The same call then gives
the same bytes as one that never died, does not begin anew, and leaves nothing of the dead one's work lying about."""

import multiprocessing
import os
import shutil
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.influence import jobs
from headwater.influence.index import build as building
from headwater.influence.trak import features
from tests.evaluate.test_datamodel import EXPERIMENT
from tests.influence.test_laws import ASKED, TASK, TRAIN

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
BATCH = 8
PLACES = (0.0, 0.35, 0.7, 1.0)
"""Where in the writes of a whole call the process dies: the first, two on the way, the last."""


class Read(torch.utils.data.Dataset):
    """Training examples that count how often one of them is read."""

    def __init__(self, columns):
        self.rows, self.count = list(zip(*columns, strict=True)), 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.count += 1
        return self.rows[i]


DATA = Read(TRAIN)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.25), nn.Linear(6, 3)).double()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A training with dropout and momentum, 24 steps with 4 checkpoints."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    recorder = hw.Recorder(tmp_path_factory.mktemp("killed") / "run", model, optimizer, task=TASK, train=DATA, steps=24, checkpoints=4)
    for step in range(24):
        ids = [(step * BATCH + i) % 40 for i in range(BATCH)]
        optimizer.zero_grad()
        TASK.loss(model, tuple(t[ids] for t in TRAIN)).mean().backward()
        optimizer.step()
        recorder.step(ids)
    return recorder.finish().path


@pytest.fixture(autouse=True)
def _saves_at_every_chance(monkeypatch):
    """Small pieces of work, each saved when it is done; forcing them to the disk is only a place to die at."""
    monkeypatch.setattr(jobs, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(features, "SHARD", 16 * 9)
    monkeypatch.setattr(building, "ROOM", 16 * 31)
    monkeypatch.setattr(os, "fsync", lambda file: None)


def fresh(recorded, path):
    """The run in another directory, with nothing kept."""
    return hw.Run.open(shutil.copytree(recorded, path), build=build, train=DATA, task=TASK)


def writes(work, monkeypatch):
    """What ``work`` gives, how many files it writes, and how many examples it reads."""
    count, before = [0], DATA.count
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", lambda file: count.__setitem__(0, count[0] + 1))
        found = work()
    return found, count[0], DATA.count - before


def dies(work, at):
    """Do ``work`` in a process of its own, which is killed while it writes file ``at``: its content is there, its name is not."""
    count = [0]

    def die(file):
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    def life():
        torch.set_num_threads(1)
        os.fsync = die
        work()

    process = multiprocessing.get_context("fork").Process(target=life)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork.*", category=DeprecationWarning)
        process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it lived"


def bits(scores):
    return scores.values.tobytes(), b"" if scores.stderr is None else scores.stderr.tobytes()


LORA = {"members": 3, "steps": 6, "batch_size": 10, "lr": 0.02}
METHODS = {
    "unrolling, states in memory": hw.Unrolled(schedule="sqrt", keep="memory"),
    "unrolling, states on the disk": hw.Unrolled(schedule="sqrt", keep="disk"),
    "TRAK": hw.Trak(),
    "TRAK, projected": hw.Trak(dim=16),
    "LoGra": hw.LoGra(dim=3),
    "checkpoints": hw.CheckpointEnsemble(hw.Trak(dim=16), members=3),
    "masks": hw.DropoutEnsemble(hw.Influence(damping=0.01), members=3),
    "masks, forward only": hw.DropoutEnsemble(hw.Trak(dim=16), members=3, forward_only=True),
    "adapters": hw.LoraEnsemble(hw.GradDot(), **LORA),
    "adapters unrolled": hw.LoraEnsemble(hw.Unrolled(schedule="sqrt"), **LORA),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_call_continues_to_the_same_bytes(name, recorded, tmp_path, monkeypatch):
    def ask(run):
        return hw.trace(run, ASKED, METHODS[name], batch_size=BATCH, progress=False)

    untouched = fresh(recorded, tmp_path / "whole")
    whole, count, reads = writes(lambda: ask(untouched), monkeypatch)
    kept = files(untouched.path)
    assert count > 4
    for place in PLACES:
        run = fresh(recorded, tmp_path / f"killed{place}")
        dies(lambda run=run: ask(run), int(place * (count - 1)))
        again, _, read = writes(lambda run=run: ask(run), monkeypatch)
        assert bits(again) == bits(whole), place
        assert read < reads or place == 0.0, "it began anew"
        assert files(run.path) == kept, place


def files(path):
    """The files of a run, but for the half-written ones of a process that was killed, which no one reads."""
    return sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.suffix != ".part")


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_killed_index_continues_to_the_same_bytes(dtype, recorded, tmp_path, monkeypatch):
    def make(run):
        return hw.index(run, segments=2, dtype=dtype, batch_size=BATCH, progress=False)

    def content(index):
        return {str(f.relative_to(index.path)): f.read_bytes() for f in index.path.rglob("*.npy")}

    untouched = fresh(recorded, tmp_path / "whole")
    whole, count, reads = writes(lambda: make(untouched), monkeypatch)
    answer = hw.trace(whole, ASKED, hw.Source(segments=2), progress=False).values
    for place in PLACES:
        run = fresh(recorded, tmp_path / f"killed{place}")
        dies(lambda run=run: make(run), int(place * (count - 1)))
        again, _, read = writes(lambda run=run: make(run), monkeypatch)
        assert content(again) == content(whole), place
        assert read < reads or place == 0.0, "it began anew"
        assert np.array_equal(hw.trace(again, ASKED, hw.Source(segments=2), progress=False).values, answer)


def test_a_datamodel_of_a_killed_bank_is_that_of_a_whole_one(tmp_path, monkeypatch):
    def retrain(place):
        return hw.evaluate.retrain(EXPERIMENT, hw.evaluate.halves(16, 8, seed=1), 2, workers=1, directory=tmp_path / place, progress=False)

    whole, count, _ = writes(lambda: retrain("whole"), monkeypatch)
    for place in PLACES:
        dies(lambda place=place: retrain(f"killed{place}"), int(place * (count - 1)))
        bank, rest, _ = writes(lambda place=place: retrain(f"killed{place}"), monkeypatch)
        assert bits(hw.Datamodel(bank, alpha=1.0).scores()) == bits(hw.Datamodel(whole, alpha=1.0).scores())
        assert rest < count or place == 0.0, "it began anew"
