"""What goes wrong in long work: kills, full memory, bad input. Nothing computed is lost, and every error names the thing and the way out."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.influence import scoring
from headwater.influence.jobs import Job
from tests.influence.test_laws import ASKED, METHODS, TASK, TRAIN, build, close, record, sgd, values

CHUNKED = {"batch_size": 8, "memory": 3000}
FEW = [hw.GradCos(), hw.Influence(damping=0.01), hw.Source()]


@pytest.fixture
def run(tmp_path):
    return record(tmp_path / "run", sgd(momentum=0.5))


def files(run, folder):
    return sorted(p.name for p in (run.path / folder).glob("*")) if (run.path / folder).exists() else []


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kill_after", [1, 11])
def test_an_interrupted_trace_resumes_to_the_identical_result(run, kill_after, monkeypatch, capsys):
    whole = values(run, method=FEW, **CHUNKED)
    count = [0]
    monkeypatch.setattr("headwater.influence.jobs.SAVE_EVERY", 0.0)
    reached = Job.reach

    def interrupted(self, *place):
        reached(self, *place)
        count[0] += 1
        if count[0] == kill_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Job, "reach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        values(run, method=FEW, **CHUNKED)
    assert len(files(run, "jobs")) == 2
    monkeypatch.setattr(Job, "reach", reached)
    passed = [0]
    gradients = scoring.contribution

    def counted(*args):
        passed[0] += 1
        return gradients(*args)

    monkeypatch.setattr(scoring, "contribution", counted)
    capsys.readouterr()
    resumed = [s.values for s in hw.trace(run, ASKED, FEW, **CHUNKED)]
    assert "resuming" in capsys.readouterr().err
    assert all(np.array_equal(a, b) for a, b in zip(resumed, whole, strict=True))
    assert files(run, "jobs") == []
    partly, passed[0] = passed[0], 0
    values(run, method=FEW, **CHUNKED)
    assert partly == passed[0] - kill_after  # what was done is not done again


def test_an_interrupted_self_influence_resumes_to_the_identical_result(run, monkeypatch):
    whole = [s.values for s in hw.self_influence(run, FEW, progress=False, **CHUNKED)]
    count = [0]
    monkeypatch.setattr("headwater.influence.jobs.SAVE_EVERY", 0.0)
    reached = Job.reach

    def interrupted(self, *place):
        reached(self, *place)
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Job, "reach", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hw.self_influence(run, FEW, progress=False, **CHUNKED)
    monkeypatch.setattr(Job, "reach", reached)
    again = [s.values for s in hw.self_influence(run, FEW, progress=False, **CHUNKED)]
    assert all(np.array_equal(a, b) for a, b in zip(again, whole, strict=True))


SCRIPT = """
import sys, time
import headwater as hw
from headwater.influence import scoring
import headwater.influence.jobs as jobs
from tests.influence.test_laws import ASKED, TASK, TRAIN, build
from tests.influence.test_robust import FEW
jobs.SAVE_EVERY = 0.0
slow = scoring.contribution
scoring.contribution = lambda *a: (time.sleep(0.05), slow(*a))[1]
run = hw.Run.open(sys.argv[1], build=build, train=TRAIN, task=TASK)
hw.trace(run, ASKED, FEW, batch_size=8, memory=3000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_a_kill_loses_at_most_a_moment(run, tmp_path):
    whole = values(run, method=FEW, **CHUNKED)
    for place in (run.path / "factors", run.path / "jobs"):
        for file in place.glob("*"):
            file.unlink()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(run.path)], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not files(run, "jobs") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and any(name.endswith(".json") for name in files(run, "jobs"))
    assert all(np.array_equal(a, b) for a, b in zip(values(run, method=FEW, **CHUNKED), whole, strict=True))


def test_other_questions_do_not_share_saved_work(run, monkeypatch):
    """The name of saved work holds everything it depends on."""
    names = set()
    opened = Job.__init__

    def noted(self, store, key, *rest):
        names.add(key)
        opened(self, store, key, *rest)

    monkeypatch.setattr(Job, "__init__", noted)
    calls = [
        {"method": hw.Source()},
        {"method": hw.Source(segments=2)},
        {"method": hw.Source(curvature=hw.EKFAC(fisher="sampled"))},
        {"method": hw.Source(curvature=hw.EKFAC(fisher="sampled", seed=1))},
        {"method": hw.Influence(damping=0.1)},
        {"method": hw.Influence(damping=0.1000001)},
        {"method": hw.Source(), "queries": tuple(t[:5] for t in ASKED)},
        {"method": hw.Source(), "measure": lambda m, b: m(b[0])[:, 0]},
        {"method": hw.Source(), "batch_size": 3},
    ]
    for call in calls:
        values(run, **call)
    assert len(names) == len(calls)


# --------------------------------------------------------------------------------------------------------------- caches


def test_curvature_is_kept_and_found_by_what_it_depends_on(run, monkeypatch):
    first = values(run)
    kept = files(run, "factors")
    assert len(kept) == 6  # three segments, tensors and facts
    monkeypatch.setattr(hw.EKFAC, "fit", lambda *a: pytest.fail("curvature was made again"))
    assert np.array_equal(values(run), first)
    assert np.array_equal(values(hw.Run.open(run.path, build=build, train=TRAIN, task=TASK)), first)
    assert files(run, "factors") == kept


def test_a_damaged_factor_is_named_and_made_again_on_request(run):
    first = values(run)
    victim = next((run.path / "factors").glob("*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    with pytest.raises(hw.errors.DamagedFile, match=victim.name) as caught:
        values(run)
    facts = victim.with_name(victim.name.rsplit("-", 1)[0] + ".json")
    assert str(facts) in str(caught.value)
    facts.unlink()
    assert np.array_equal(values(run), first)


def test_a_full_disk_is_one_clear_error(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(hw.errors.StorageError, match="free some space"):
        values(run)
    monkeypatch.undo()
    assert not list(run.path.rglob("*.part"))
    values(run)


# --------------------------------------------------------------------------------------------------------------- memory


class Tight(nn.Module):
    """A network that has no room for more than ``room`` examples at a time."""

    room = 6

    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, x):
        if torch.is_grad_enabled() and len(x) > self.room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate many bytes")
        return self.inner(x)


def test_a_batch_that_does_not_fit_is_halved(tmp_path, monkeypatch):
    monkeypatch.setattr(Tight, "room", 1000)
    run = record(tmp_path / "run", sgd(), model=Tight())
    roomy = values(run, method=METHODS)
    for file in (run.path / "factors").glob("*"):
        file.unlink()
    monkeypatch.setattr(Tight, "room", 6)
    for method, tight, plain in zip(METHODS, values(run, method=METHODS, batch_size=32), roomy, strict=True):
        assert close(tight, plain, 1e-10), method


@pytest.mark.parametrize("factored", [[True, False, False], [False, True, False]])
def test_a_layer_that_goes_to_the_fallback_between_two_batches_of_queries(run, monkeypatch, factored):
    """Some queries are then held as factors and others whole."""
    plain, made, forms = values(run, method=METHODS), scoring.vectors_of, iter(factored * 1000)
    monkeypatch.setattr(scoring, "vectors_of", lambda gradient, factored: made(gradient, factored and next(forms)))
    for method, mixed, expected in zip(METHODS, values(run, method=METHODS, batch_size=2), plain, strict=True):
        assert close(mixed, expected, 1e-10), method


def test_a_single_example_that_does_not_fit_is_the_error_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(Tight, "room", 1000)
    run = record(tmp_path / "run", sgd(), model=Tight())
    monkeypatch.setattr(Tight, "room", 0)
    with pytest.raises(RuntimeError, match="allocate"):
        values(run)


# ------------------------------------------------------------------------------------------------------------ bad input


def spoilt_loss(model, batch):
    spoilt = batch[0][:, 0] == TRAIN[0][17, 0]
    return TASK.loss(model, batch) * torch.where(spoilt, float("nan"), 1.0)


CALLS = {
    "not a run": (lambda run: hw.trace("runs/mnist", ASKED, hw.Source()), hw.errors.InputError, "Run.open"),
    "no method": (lambda run: hw.trace(run, ASKED, "source"), hw.errors.InputError, "hw.Source"),
    "a class": (lambda run: hw.trace(run, ASKED, hw.Source), hw.errors.InputError, "construct it"),
    "empty list": (lambda run: hw.trace(run, ASKED, []), hw.errors.InputError, "at least one method"),
    "no queries": (lambda run: hw.trace(run, tuple(t[:0] for t in ASKED), hw.Source()), hw.errors.QueryError, "at least one"),
    "wrong width": (lambda run: hw.trace(run, (ASKED[0][:, :3], ASKED[1]), hw.Source()), hw.errors.QueryError, r"\(4,\)"),
    "wrong label": (lambda run: hw.trace(run, (ASKED[0], ASKED[1] + 5), hw.Source()), hw.errors.TaskError, "renumber"),
    "reduced measure": (lambda run: hw.trace(run, ASKED, hw.Source(), measure=lambda m, b: m(b[0]).mean()), hw.errors.TaskError, "reduction"),
    "infinite measure": (lambda run: hw.trace(run, ASKED, hw.Source(), measure=lambda m, b: (m(b[0])[:, 0] * 0).log()), hw.errors.NotFinite, "log"),
    "negative damping": (lambda run: hw.Influence(damping=-1.0), hw.errors.InputError, "at least 0"),
    "no segments": (lambda run: hw.Source(segments=0), hw.errors.InputError, "at least one"),
    "too many segments": (lambda run: hw.trace(run, ASKED, hw.Source(segments=7)), hw.errors.InputError, "checkpoints=14"),
    "average": (lambda run: hw.Source(average="weights"), hw.errors.InputError, "'parameters'"),
    "fisher": (lambda run: hw.EKFAC(fisher="true"), hw.errors.InputError, "sampled"),
    "tolerance": (lambda run: hw.trace(run, ASKED, hw.Source(), tolerance=2), hw.errors.InputError, "below 1"),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_input_is_refused_with_the_way_out(run, case):
    call, kind, words = CALLS[case]
    with pytest.raises(kind, match=words) as caught:
        call(run)
    assert caught.value.given and caught.value.expected and caught.value.mend
    assert files(run, "jobs") == []


def test_a_training_example_without_a_gradient_is_named(tmp_path):
    task = hw.tasks.Task(loss=spoilt_loss, measure=TASK.measure)
    run = hw.Run.from_checkpoints(tmp_path / "r", {30: build().state_dict()}, build=build, train=TRAIN, task=task, optimizer=sgd())
    with pytest.raises(hw.errors.NotFinite, match="example 17"):
        values(run, method=hw.GradDot())


def test_a_diverged_checkpoint_is_named(tmp_path):
    state = build().state_dict()
    state["2.weight"][0, 0] = float("inf")
    run = hw.Run.from_checkpoints(tmp_path / "r", {10: build().state_dict(), 20: state}, build=build, train=TRAIN, task=TASK, optimizer=sgd())
    with pytest.raises(hw.errors.NotFinite, match=r"2\.weight.*step 20"):
        values(run, method=hw.Source(segments=2))


def test_a_frozen_rate_is_refused(tmp_path):
    run = hw.Run.from_checkpoints(tmp_path / "r", {10: build().state_dict()}, build=build, train=TRAIN, task=TASK, optimizer=sgd(), rates=lambda k: 0.0)
    with pytest.raises(hw.errors.RunError, match="positive learning rate"):
        values(run, method=hw.Source(segments=1))


# --------------------------------------------------------------------------------------------------------------- screen


def test_the_plan_is_told_before_the_work_and_can_be_silenced(run, capsys):
    values(run)
    assert capsys.readouterr() == ("", "")
    hw.trace(run, ASKED, [hw.Source(), hw.GradDot()])
    out, err = capsys.readouterr()
    assert out == "" and "memory" in err and "passes" in err and "43 by Linear" in err


def test_the_users_model_and_chance_are_left_alone(run, tmp_path):
    model = build().train()
    recorder = hw.Recorder(tmp_path / "own", model, torch.optim.SGD(model.parameters(), lr=0.1), task=TASK, train=TRAIN)
    recorder._watched.optimizer.step()
    recorder.step([0])
    own = recorder.finish()
    before = {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    values(own, method=hw.Source(segments=1))
    assert torch.rand(1) == expected and model.training
    assert all(torch.equal(p, before[n]) and p.grad is None and p.requires_grad for n, p in model.named_parameters())


# ------------------------------------------------------------------------------------------ what a name must tell apart


def custom(power, scale=1.0):
    """A task of plain functions: everything that tells two of them apart is in their code and what it captures."""
    direction = torch.full((3,), scale, dtype=torch.float64)
    return hw.tasks.Task(
        loss=lambda m, b: TASK.loss(m, b) ** power,
        measure=lambda m, b: m(b[0]) @ direction,
        sample=lambda m, b, draws: (b[0], draws.categorical(m(b[0]))),
    )


def test_a_changed_loss_never_meets_the_curvature_of_the_old_one(tmp_path):
    first = hw.Run.from_checkpoints(tmp_path / "r", {30: build().state_dict()}, build=build, train=TRAIN, task=custom(1), optimizer=sgd())
    method = hw.Influence(damping=0.1)
    values(first, method=method)
    changed = hw.Run.open(tmp_path / "r", build=build, train=TRAIN, task=custom(2))
    found = values(changed, method=method)
    for file in (tmp_path / "r" / "factors").glob("*"):
        file.unlink()
    assert np.array_equal(found, values(changed, method=method))


def test_measures_that_differ_in_what_they_capture_do_not_share_saved_work(run, monkeypatch):
    names, opened = set(), Job.__init__

    def noted(self, store, key, *rest):
        names.add(key)
        opened(self, store, key, *rest)

    def toward(vector):
        return lambda m, b: m(b[0]) @ vector

    monkeypatch.setattr(Job, "__init__", noted)
    measures = [toward(torch.tensor(v, dtype=torch.float64)) for v in ([1.0, 0, 0], [0, 1.0, 0])]
    measures += [lambda m, b: m(b[0])[:, 0], lambda m, b: m(b[0])[:, 1], custom(1).measure, custom(1, 2.0).measure]
    for measure in measures:
        values(run, measure=measure)
        hw.self_influence(run, hw.GradDot(), measure=measure, progress=False)
    assert len(names) == 2 * len(measures)
    values(run, measure=toward(torch.tensor([1.0, 0, 0], dtype=torch.float64)))
    assert len(names) == 2 * len(measures)  # the same question again has the same name
