"""Runs read back: refused where they do not fit, rebuilt from checkpoints where nobody recorded."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import headwater as hw
from headwater.errors import DamagedFile, DataMismatch, InputError, MissingCheckpoint, ModelMismatch, RunError
from headwater.training import settled
from tests.training.test_recorder import TASK, TRAIN, build, opened, step, trained


@pytest.fixture
def run(tmp_path):
    return trained(tmp_path / "run")


def spoil(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------- what does not fit


def test_a_missing_checkpoint_is_named(run):
    last = run.checkpoints[-1]
    (run.path / "checkpoints" / f"{last}.safetensors").unlink()
    with pytest.raises(MissingCheckpoint, match=rf"{last}\.safetensors is missing"):
        hw.trace(opened(run), TRAIN, hw.GradDot(), progress=False)
    with pytest.raises(MissingCheckpoint, match="no checkpoint of step 5"):
        run.weights(5)


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_damaged_checkpoint_is_named(run, place):
    victim = run.path / "checkpoints" / f"{run.checkpoints[-1]}.safetensors"
    spoil(victim, place)
    with pytest.raises(DamagedFile, match=victim.name):
        hw.trace(opened(run), TRAIN, hw.GradDot(), progress=False)


@pytest.mark.parametrize("name", ["steps.npy", "order.npy"])
def test_damaged_records_are_named(run, name):
    spoil(run.path / name)
    again = opened(run)
    with pytest.raises(DamagedFile, match=name):
        again.rates(0, 12), again.order(12)


def test_a_damaged_manifest_is_named(run):
    (run.path / "manifest.json").write_text("{")
    with pytest.raises(DamagedFile, match=r"manifest\.json"):
        opened(run)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = build()


MODELS = {
    "another width": (lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)), r"0\.weight.*\[5, 3\].*\[4, 3\]"),
    "another depth": (lambda: nn.Sequential(*build(), nn.Linear(1, 1)), r"4\.weight.*not there"),
    "another name": (Deep, r"not there"),
    "another dtype": (lambda: build().double(), "float64.*float32"),
}


@pytest.mark.parametrize("case", MODELS)
def test_another_model_is_refused_with_the_first_difference(run, case):
    make, words = MODELS[case]
    with pytest.raises(ModelMismatch, match=words):
        opened(run, build=make)


def test_another_dataset_is_refused(run):
    x, y = TRAIN
    for data, words in [((x, y + 1e-6), "content differs"), ((x.flip(0), y.flip(0)), "same order"), ((x[:20], y[:20]), "20 examples")]:
        with pytest.raises(DataMismatch, match=words):
            opened(run, train=data)


def test_another_task_is_refused(run):
    with pytest.raises(RunError, match=r"scale: 1\.0 then, 2\.0 now"):
        opened(run, task=hw.tasks.Regression(scale=2.0))
    with pytest.raises(InputError, match="a function where a task belongs"):
        opened(run, task=lambda m, b: 0)


def test_what_is_not_a_run_is_refused(tmp_path, run):
    with pytest.raises(RunError, match="holds no run"):
        hw.Run.open(tmp_path / "nowhere", build=build, train=TRAIN, task=TASK)
    manifest = run.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1', '"schema": 99'))
    with pytest.raises(RunError, match="schema 99"):
        opened(run)


def test_opening_leaves_chance_alone_and_models_come_in_eval_mode(run):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    again = hw.Run.open(run.path, build=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)), train=TRAIN, task=TASK)
    model = again.load(again.model(), 12)
    assert torch.rand(1) == expected and not model.training and again.device == torch.device("cpu")
    assert all(torch.equal(t, again.weights(12)[n]) for n, t in model.state_dict().items())


# --------------------------------------------------------------------------------------------- runs from checkpoints


def plain_checkpoints(optimizer, schedule, steps=12, at=(4, 8, 12)):
    """A training that nobody recorded: state dicts of the model and of the optimizer."""
    model = build()
    optimizer = optimizer(model)
    weights, states, g = {}, {}, torch.Generator().manual_seed(2)
    for k in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = schedule(k)
        step(model, optimizer, torch.randint(24, (5,), generator=g))
        if k in at:
            weights[k] = {n: t.clone() for n, t in model.state_dict().items()}
            states[k] = pickle.loads(pickle.dumps(optimizer.state_dict()))
    return weights, states


def schedule(k):
    return 0.1 / k


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.01),
}


def recorded(path, optimizer):
    model = build()
    optimizer = optimizer(model)
    recorder, g = hw.Recorder(path, model, optimizer, task=TASK, train=TRAIN, checkpoints=[4, 8, 12]), torch.Generator().manual_seed(2)
    for k in range(1, 13):
        optimizer.param_groups[0]["lr"] = schedule(k)
        ids = torch.randint(24, (5,), generator=g)
        step(model, optimizer, ids)
        recorder.step(ids)
    return recorder.finish()


@pytest.mark.parametrize("form", ["function", "list", "files"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_from_checkpoints_scores_like_the_recorded_one(tmp_path, kind, form):
    weights, states = plain_checkpoints(OPTIMIZERS[kind], schedule)
    rates = [schedule(k) for k in range(1, 13)] if form == "list" else schedule
    if form == "files":
        for k in weights:
            safetensors.torch.save_file(weights[k], tmp_path / f"{k}.safetensors")
            torch.save(states[k], tmp_path / f"{k}.pt")
        weights, states = {k: tmp_path / f"{k}.safetensors" for k in weights}, {k: str(tmp_path / f"{k}.pt") for k in states}
    settings = {"build": build, "train": TRAIN, "task": TASK, "optimizer": OPTIMIZERS[kind], "rates": rates, "states": states if kind == "adamw" else None}
    rebuilt = hw.Run.from_checkpoints(tmp_path / "rebuilt", weights, **settings)
    truth = recorded(tmp_path / "recorded", OPTIMIZERS[kind])
    methods = [hw.Source(), hw.Influence(), hw.TracIn()]
    for a, b in zip(hw.trace(rebuilt, TRAIN, methods, progress=False), hw.trace(truth, TRAIN, methods, progress=False), strict=True):
        assert np.allclose(a.values, b.values, rtol=1e-5, atol=1e-7 * np.abs(b.values).max())
    with pytest.raises(RunError, match="which examples"):
        rebuilt.order(3)


def from_checkpoints(path, checkpoints=None, **changes):
    given = {"build": build, "train": TRAIN, "task": TASK, "optimizer": OPTIMIZERS["sgd"], **changes}
    return hw.Run.from_checkpoints(path, {4: build().state_dict()} if checkpoints is None else checkpoints, **given)


REFUSED = {
    "no checkpoints": ({"checkpoints": {}}, InputError, "at least one"),
    "adam without states": ({"optimizer": OPTIMIZERS["adamw"]}, InputError, "second moments"),
    "short schedule": ({"rates": [0.1, 0.1]}, InputError, "4 learning rates"),
    "negative rate": ({"rates": lambda k: -0.1}, InputError, "at least 0"),
    "too many groups": ({"rates": np.ones((4, 3))}, InputError, "3 groups"),
    "another model's weights": ({"checkpoints": {4: nn.Linear(3, 1).state_dict()}}, ModelMismatch, "step 4"),
    "a part of the weights": ({"checkpoints": {4: {k: v for k, v in build().state_dict().items() if k != "3.bias"}}}, ModelMismatch, r"missing \['3.bias'\]"),
    "no such file": ({"checkpoints": {4: "nowhere.safetensors"}}, MissingCheckpoint, "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_checkpoints_are_refused_with_the_way_out(tmp_path, case):
    changes, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        from_checkpoints(tmp_path / "run", **changes)
    assert caught.value.mend


def test_a_broken_checkpoint_file_is_named(tmp_path):
    (tmp_path / "4.safetensors").write_bytes(b"nothing")
    with pytest.raises(DamagedFile, match=r"4\.safetensors"):
        from_checkpoints(tmp_path / "run", {4: tmp_path / "4.safetensors"})


# -------------------------------------------------------------------------------------------------------- experiments

FILE = """
from __future__ import annotations
import torch
from dataclasses import dataclass
import headwater as hw
from beside import RATE

@dataclass
class Settings:
    rate: float = RATE

def build():
    return torch.nn.Linear(3, 1)

def fit(model, train, seed, recorder=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=Settings().rate)
    if recorder:
        recorder.watch(model, optimizer, steps=12)
    for _ in range(12):
        ids = torch.randint(len(train[0]), (4,))
        optimizer.zero_grad()
        ((model(train[0][ids]) - train[1][ids]) ** 2).mean().backward()
        optimizer.step()
        if recorder:
            recorder.step(ids)
    return model

data = torch.arange(30.0).reshape(10, 3) / 30, torch.arange(10.0).reshape(10, 1)
experiment = hw.Experiment(build, data, data, hw.tasks.Regression(), fit, "a line")
if __name__ == "__main__":
    raise SystemExit("not meant to run here")
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside.py").write_text("RATE = 0.1\n")
    (tmp_path / "line.py").write_text(FILE)
    return tmp_path / "line.py"


def test_an_experiment_records_what_retraining_repeats(file, tmp_path):
    """The recorded model is the bank's model of the full set with the same seed, to the last bit."""
    experiment = hw.Experiment.load(file)
    run = experiment.record(tmp_path / "run", seed=3, checkpoints=4)
    assert run.manifest["seed"] == 3 and len(run.checkpoints) == 5 and run.finished
    bank = hw.evaluate.retrain(experiment, hw.evaluate.halves(10, 2), seeds=(3,), workers=1, directory=tmp_path / "bank", progress=False)
    model = run.load(run.model(), run.checkpoints[-1])
    with torch.no_grad():
        assert np.array_equal(experiment.task.measure(model, experiment.test).double().numpy(), bank.base[0])
    again = experiment.open(tmp_path / "run")
    assert again.weights_hash(12) == run.weights_hash(12)


def test_experiments_travel_to_processes_that_never_saw_their_file(file, tmp_path):
    content = tmp_path / "content"
    content.write_bytes(pickle.dumps(hw.Experiment.load(file)))
    code = f"import pickle; e = pickle.load(open({str(content)!r}, 'rb')); e.fit(e.build(), e.train, 0); print(e.name)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if "pytest" not in p)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path.parent)
    assert said.stdout.strip() == "a line"


def test_files_that_are_no_experiment_are_refused(file, tmp_path):
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "two.py").write_text(FILE + "\nother = hw.Experiment(build, data, data, hw.tasks.Regression(), fit)\n")
    cases = [("none.py", None, "no experiment"), ("two.py", None, "'experiment', 'other'"), ("line.py", "model", "'model'"), ("gone.py", None, "not a file")]
    for name, variable, words in cases:
        with pytest.raises(InputError, match=words):
            hw.Experiment.load(tmp_path / name, variable)
    assert hw.Experiment.load(tmp_path / "two.py", "other").name is None


STAGED = FILE.replace("recorder.watch(model, optimizer, steps=12)", "recorder.watch(model, optimizer, steps=6, train=parts(train)['old'], stage='old')").replace(
    "    for _ in range(12):",
    "    for k in range(12):\n        if recorder and k == 6:\n            recorder.stage('new', train=parts(train)['new'], optimizer=optimizer, steps=6)",
)
STAGED = STAGED.replace("torch.randint(len(train[0]), (4,))", "torch.randint(5, (4,))").replace("fit, \"a line\")", "fit, \"a line\", parts)")
STAGED = STAGED.replace("def build", "def parts(train):\n    return {'old': tuple(t[:5] for t in train), 'new': tuple(t[5:] for t in train)}\n\ndef build")


def test_an_experiment_of_several_stages_says_what_each_is_trained_on(file, tmp_path):
    file.write_text(STAGED)
    experiment = hw.Experiment.load(file)
    run = experiment.record(tmp_path / "run", checkpoints=2)
    assert [(s.name, s.start, s.stop, s.columns) for s in run.stages] == [("old", 0, 6, range(5)), ("new", 6, 12, range(5, 10))]
    scores = hw.trace(experiment.open(tmp_path / "run"), experiment.test, hw.Source(segments=2), progress=False)
    assert scores.values.shape == (10, 10)
    with pytest.raises(InputError, match="one for each stage"):
        hw.Experiment(experiment.build, experiment.train, experiment.test, experiment.task, experiment.fit).open(tmp_path / "run")


def test_settled_puts_everything_back():
    torch.manual_seed(1), np.random.seed(1)
    before, threads = (torch.get_rng_state(), np.random.get_state()[1].copy()), torch.get_num_threads()
    with settled(5, threads=1):
        one = torch.rand(2), np.random.rand()
        assert torch.get_num_threads() == 1
    with settled(5):
        assert torch.equal(torch.rand(2), one[0]) and np.random.rand() == one[1]
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1]) and torch.get_num_threads() == threads
