"""What a recorder keeps: exactly what the optimizer did, whatever the loop looks like."""

import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InputError, RunError, StorageError, TaskError, UnknownOptimizer
from headwater.store import read_json
from headwater.training import segments as segments_of
from headwater.training.places import Places

TASK = hw.tasks.Regression()
TRAIN = (torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.randn(24, 1, generator=torch.Generator().manual_seed(1)))


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def step(model, optimizer, ids):
    optimizer.zero_grad()
    TASK.loss(model, tuple(t[ids] for t in TRAIN)).mean().backward()
    optimizer.step()


def trained(path, optimizer=None, steps=12, model=None, total=None, **settings):
    model = model or build()
    optimizer = (optimizer or (lambda m: torch.optim.SGD(m.parameters(), lr=0.1)))(model)
    recorder = hw.Recorder(path, model, optimizer, task=TASK, train=TRAIN, steps=total, **settings)
    g = torch.Generator().manual_seed(2)
    for _ in range(steps):
        ids = torch.randint(24, (5,), generator=g)
        step(model, optimizer, ids)
        recorder.step(ids)
    return recorder.finish()


def opened(run, **changes):
    return hw.Run.open(run.path, **{"build": build, "train": TRAIN, "task": TASK, **changes})


# ------------------------------------------------------------------------------------------------------ what is recorded


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_rates_are_those_of_the_step_itself(tmp_path, scheduler_first):
    """Also where the scheduler is stepped between the optimizer and the recorder."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.1 / (k + 1))
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, steps=8)
    for _ in range(8):
        step(model, optimizer, [0, 1, 2])
        if scheduler_first:
            scheduler.step()
        recorder.step([0, 1, 2])
        if not scheduler_first:
            scheduler.step()
    run = recorder.finish()
    assert run.steps["rate"].tolist() == [0.1 / (k + 1) for k in range(8)]
    assert run.rates(2, 5)["0.weight"] == pytest.approx(0.1 / 3 + 0.1 / 4 + 0.1 / 5)
    assert opened(run).rates(0, 8) == run.rates(0, 8)


def test_groups_momentum_dampening_clipping_and_decay(tmp_path):
    model = build()
    groups = [{"params": model[0].parameters(), "lr": 0.2, "momentum": 0.5, "dampening": 0.1, "weight_decay": 0.3}, {"params": [model[3].weight]}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, steps=4)
    for clip in (1.0, 0.5, 3.0, 0.25):
        step(model, optimizer, [0, 1])
        recorder.step([0, 1], clip=clip)
    run = recorder.finish()
    total = 1 + 0.5 + 1 + 0.25
    assert run.rates(0, 4) == pytest.approx({"0.weight": 0.2 * total * 0.9 / 0.5, "0.bias": 0.2 * total * 0.9 / 0.5, "3.weight": 0.1 * total})
    assert run.stages[0].trainable == {"0.weight", "0.bias", "3.weight"}
    # decay acts once a step however the gradient is clipped: sum of rate * decay over sum of rate * clip
    assert run.decays(0, 4)["0.weight"] == pytest.approx(0.3 * 4 / total) and run.decays(0, 4)["3.weight"] == 0


def test_a_scheduled_momentum_counts_step_by_step(tmp_path):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, steps=2)
    for momentum in (0.5, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        step(model, optimizer, [0, 1])
        recorder.step([0, 1])
    assert recorder.finish().rates(0, 2)["0.weight"] == pytest.approx(0.1 / 0.5 + 0.1 / 0.1)


def test_the_order_of_examples(tmp_path):
    run = trained(tmp_path / "run", steps=6)
    g = torch.Generator().manual_seed(2)
    expected = [torch.randint(24, (5,), generator=g).tolist() for _ in range(6)]
    assert [run.order(k).tolist() for k in range(1, 7)] == expected == [opened(run).order(k).tolist() for k in range(1, 7)]


def test_replaying_the_record_gives_the_recorded_weights(tmp_path):
    """Nothing that SGD needs is missing: rates and order rebuild every checkpoint."""
    run = trained(tmp_path / "run", lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01), steps=10, checkpoints=5)
    model = run.load(run.model(), 0).train()
    group = run.stages[0].optimizer.groups[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=group.momentum, weight_decay=group.weight_decay)
    for k in range(1, 11):
        optimizer.param_groups[0]["lr"] = float(run.steps["rate"][k - 1])
        step(model, optimizer, run.order(k).astype(int))
        if k in run.checkpoints:
            held = run.weights(k)
            assert all(torch.equal(t, held[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "decoupled"),
    [
        (lambda m: torch.optim.Adam(m.parameters(), lr=0.01, betas=(0.8, 0.9)), False),
        (lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True, weight_decay=0.1), False),
        (lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1), True),
        (lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True), True),
    ],
)
def test_second_moments_are_bias_corrected(tmp_path, make, decoupled):
    """Rebuilt by hand from the gradients of every step."""
    model = build()
    optimizer = make(model)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, steps=6, checkpoints=[3, 6])
    beta, v, largest, decay = optimizer.param_groups[0]["betas"][1], 0.0, torch.zeros(()), optimizer.param_groups[0]["weight_decay"]
    for k in range(1, 7):
        before = model[0].weight.detach().clone()
        step(model, optimizer, [0, 1, 2])
        g = model[0].weight.grad + (0 if decoupled else decay * before)
        v = beta * v + (1 - beta) * g**2
        largest = torch.maximum(largest, v)
        recorder.step([0, 1, 2])
        if k == 3:
            expected = (largest if optimizer.param_groups[0]["amsgrad"] else v) / (1 - beta**3)
    run = opened(recorder.finish())
    assert torch.allclose(run.second_moments(3)["0.weight"], expected, rtol=1e-5)
    assert set(run.second_moments(6)) == {n for n, _ in model.named_parameters()} and run.second_moments(0) == {}
    assert run.stages[0].optimizer.kind == "adam" and run.stages[0].optimizer.groups[0].decoupled is decoupled
    assert "moment" not in "".join(run.weights(6))


def test_the_manifest_says_what_happened(tmp_path):
    run = trained(tmp_path / "run", lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True), seed=7)
    manifest = read_json(run.path / "manifest.json")
    stage = manifest["stages"][0]
    assert manifest["finished"] and manifest["seed"] == 7 and manifest["versions"]["torch"] == torch.__version__
    assert stage["data"] == {"examples": 24, "fingerprint": hw.tasks.fingerprint(TRAIN)} and stage["task"] == TASK.describe()
    assert stage["optimizer"]["kind"] == "sgd" and stage["optimizer"]["groups"][0]["nesterov"] and stage["reduction"] == "mean"
    assert not [p for p in run.path.rglob("*") if p.suffix in (".pt", ".pkl", ".pickle", ".part")]
    assert "finished" not in repr(run) and "24 examples" in repr(run)


def test_buffers_and_tied_weights_are_kept_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight
            self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, 1)

        def forward(self, x):
            return self.out(self.norm(self.second(self.first(x))))

    run = trained(tmp_path / "run", model=Tied())
    held = run.weights(run.checkpoints[-1])
    assert "second.weight" not in held and "norm.running_mean" in held
    other = run.load(run.model(), 12)
    assert other.second.weight is other.first.weight and torch.equal(other.norm.running_mean, held["norm.running_mean"])


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("steps", "count"), [(12, 6), (7, 3), (100, 6), (5, 6)])
def test_checkpoints_at_the_ends_of_equal_intervals(tmp_path, steps, count):
    run = trained(tmp_path / "run", steps=steps, checkpoints=count, total=steps)
    assert list(run.checkpoints) == sorted({round(j * steps / count) for j in range(count + 1)})
    assert sorted(int(p.stem) for p in (run.path / "checkpoints").glob("*")) == list(run.checkpoints)


@pytest.mark.parametrize("steps", [1, 5, 6, 13, 100, 1000])
def test_without_a_known_end_they_are_still_spread_evenly(steps):
    places = Places(6, None)
    most = 0
    for k in range(1, steps + 1):
        if places.wanted(k):
            places.thin()
        most = max(most, len(places.held))
    if not places.held or places.held[-1] != steps:
        places.wanted(steps, final=True)
    places.settle(steps)
    assert most <= 12 and places.held[-1] == steps and len(places.held) == min(6, steps)
    ideal = [steps * j / len(places.held) for j in range(1, len(places.held) + 1)]
    assert max(abs(a - b) for a, b in zip(places.held, ideal, strict=True)) <= max(1, steps / 12 + 1)


def test_chosen_steps_are_chosen_steps(tmp_path):
    assert trained(tmp_path / "run", checkpoints=[2, 3, 12]).checkpoints == (0, 2, 3, 12)
    assert trained(tmp_path / "other", checkpoints=[2, 3]).checkpoints == (0, 2, 3, 12)  # the final model always is one


# --------------------------------------------------------------------------------------------------------------- stages


def two_stages(path, **settings):
    model = build()
    recorder = hw.Recorder(path, task=TASK, train=TRAIN, checkpoints=2, stage="pre", **settings)
    first = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder.watch(model, first, steps=4)
    for _ in range(4):
        step(model, first, [0, 1])
        recorder.step([0, 1])
    second, scaled = torch.optim.AdamW(model[3].parameters(), lr=0.01), hw.tasks.Regression(scale=0.5)
    recorder.stage("fine", train=tuple(t[:7] for t in TRAIN), task=scaled, optimizer=second, checkpoints=3, steps=6)
    for _ in range(6):
        step(model, second, [2, 3, 4])
        recorder.step([2, 3, 4])
    return recorder.finish(), {"pre": TASK, "fine": scaled}


def test_stages_have_their_own_data_task_optimizer_and_columns(tmp_path):
    run, tasks = two_stages(tmp_path / "run")
    for again in (run, hw.Run.open(run.path, build=build, train={"pre": TRAIN, "fine": tuple(t[:7] for t in TRAIN)}, task=tasks)):
        pre, fine = again.stages
        assert (pre.name, pre.start, pre.stop, fine.start, fine.stop) == ("pre", 0, 4, 4, 10)
        assert again.checkpoints == (0, 2, 4, 6, 8, 10) and again.size == 31
        assert pre.columns == range(24) and fine.columns == range(24, 31)
        assert fine.trainable == {"3.weight", "3.bias"} and fine.optimizer.kind == "adam" and fine.task.scale == 0.5
        assert again.rates(0, 4)["0.weight"] == pytest.approx(0.4) and "0.weight" not in again.rates(4, 10)
        assert again.rates(0, 10)["3.weight"] == pytest.approx(0.4 + 0.06)
    segments = segments_of(run, 3)
    assert [(s.stage, s.start, s.stop, s.checkpoints) for s in segments] == [(0, 0, 4, (2, 4)), (1, 4, 8, (6, 8)), (1, 8, 10, (10,))]
    assert len(segments_of(run, (1, 2))) == 3


def test_several_stages_need_data_for_each(tmp_path):
    run, tasks = two_stages(tmp_path / "run")
    with pytest.raises(InputError, match="'pre', 'fine'"):
        hw.Run.open(run.path, build=build, train=TRAIN[:1], task=tasks)
    with pytest.raises(InputError, match="at least one for each"):
        segments_of(run, 1)


# ------------------------------------------------------------------------------------------------------ loops of all kinds


def test_wrapped_optimizers_and_compiled_models(tmp_path):
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hw.Recorder(tmp_path / "run", torch.compile(model, backend="eager"), Wrapper(optimizer), task=TASK, train=TRAIN)
    step(model, optimizer, [0, 1])
    recorder.step([0, 1])
    assert set(recorder.finish().weights(1)) == set(model.state_dict())


def test_a_step_that_a_scaler_skipped_moved_nothing(tmp_path):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN)
    recorder.step([0, 1])
    step(model, optimizer, [0, 1])
    recorder.step([0, 1])
    run = recorder.finish()
    assert run.steps["rate"].tolist() == [0.0, 0.1] and run.rates(0, 2)["0.weight"] == pytest.approx(0.1)


def test_the_recorder_leaves_chance_and_the_optimizer_alone(tmp_path):
    def numbers(record):
        torch.manual_seed(0)
        model = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        recorder = hw.Recorder(tmp_path / f"run-{record}", model, optimizer, task=TASK, train=TRAIN) if record else None
        for _ in range(20):
            ids = torch.randint(24, (4,))
            step(model, optimizer, ids)
            if recorder:
                recorder.step(ids)
        if recorder:
            recorder.finish()
        assert not optimizer._optimizer_step_pre_hooks
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(numbers(True), numbers(False))


def test_looking_at_the_task_leaves_the_model_as_it_was(tmp_path):
    model = nn.Sequential(build(), nn.Dropout(0.5)).train()
    model[0][1].eval()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    hw.Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1), task=TASK, train=TRAIN)
    assert torch.rand(1) == expected and model[1].training and not model[0][1].training
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_a_context_lets_go_of_the_optimizer(tmp_path):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="broke"), hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN):
        raise ValueError("broke")
    assert not optimizer._optimizer_step_pre_hooks


KILLED = """
import sys, torch
import headwater as hw
from tests.training.test_recorder import TASK, TRAIN, build, step
model = build()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recorder = hw.Recorder(sys.argv[1], model, optimizer, task=TASK, train=TRAIN, checkpoints=4)
while True:
    step(model, optimizer, [0, 1, 2]); recorder.step([0, 1, 2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_a_killed_training_leaves_a_readable_run(tmp_path):
    place = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(place)], env=environment)
    deadline = time.monotonic() + 240
    while len(list(place.glob("checkpoints/*"))) < 8 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.warns(UserWarning, match="not recorded to its end"):
        run = hw.Run.open(place, build=build, train=TRAIN, task=TASK)
    last = run.checkpoints[-1]
    assert last >= 4 and run.stages[0].stop == last and not run.finished and "not finished" in repr(run)
    assert run.rates(0, last)["0.weight"] == pytest.approx(0.1 * last)
    assert hw.trace(run, tuple(t[:2] for t in TRAIN), hw.Source(segments=2), progress=False).values.shape == (2, 24)


# ------------------------------------------------------------------------------------------------------------ bad input


class Odd(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})


def recorder(tmp_path, **changes):
    model = build()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "task": TASK, "train": TRAIN, **changes}
    return hw.Recorder(tmp_path / "run", **given)


def twice(tmp_path):
    r = recorder(tmp_path)
    for _ in range(2):
        step(r._watched.model, r._watched.optimizer, [0, 1])
    r.step([0, 1])


def other_object(tmp_path):
    r = recorder(tmp_path)
    r.step([0])
    r.finish()


CALLS = {
    "unknown optimizer": (lambda t: recorder(t, optimizer=Odd(build().parameters())), UnknownOptimizer, "SGD"),
    "no optimizer": (lambda t: recorder(t, optimizer=None), UnknownOptimizer, "NoneType"),
    "rmsprop": (lambda t: recorder(t, optimizer=torch.optim.RMSprop(build().parameters())), UnknownOptimizer, "RMSprop"),
    "maximize": (lambda t: recorder(t, model=(m := build()), optimizer=torch.optim.SGD(m.parameters(), lr=0.1, maximize=True)), UnknownOptimizer, "negate"),
    "another model": (lambda t: recorder(t, optimizer=torch.optim.SGD(build().parameters(), lr=0.1)), InputError, "does not have"),
    "nothing trained": (lambda t: recorder(t, model=(m := build().requires_grad_(False)), optimizer=torch.optim.SGD(m.parameters(), lr=0.1)), InputError, "unfreeze"),
    "empty data": (lambda t: recorder(t, train=tuple(x[:0] for x in TRAIN)), InputError, "empty"),
    "iterable data": (lambda t: recorder(t, train=iter([1, 2])), InputError, "list of examples"),
    "reduced loss": (lambda t: recorder(t, task=hw.tasks.Task(lambda m, b: m(b[0]).mean(), TASK.measure)), TaskError, "one number per example"),
    "failing loss": (lambda t: recorder(t, train=TRAIN[::-1]), TaskError, "first training examples"),
    "reduction": (lambda t: recorder(t, reduction="median"), InputError, "mean"),
    "checkpoints": (lambda t: recorder(t, checkpoints=0), InputError, "checkpoints=6"),
    "ids too large": (lambda t: recorder(t).step([24]), InputError, "0 to 23"),
    "ids negative": (lambda t: recorder(t).step([-1]), InputError, "0 to 23"),
    "ids not whole": (lambda t: recorder(t).step([0.5]), InputError, "integer"),
    "no ids": (lambda t: recorder(t).step([]), InputError, "integer ids"),
    "two steps": (twice, RunError, "2 optimizer steps"),
    "no optimizer step": (other_object, RunError, "that very object"),
    "no step": (lambda t: recorder(t).finish(), RunError, "ends without a step"),
    "no model": (lambda t: hw.Recorder(t / "run", task=TASK, train=TRAIN).finish(), RunError, "watch"),
    "step before watch": (lambda t: hw.Recorder(t / "run", task=TASK, train=TRAIN).step([0]), RunError, "watch"),
    "second stage first": (lambda t: hw.Recorder(t / "run", task=TASK, train=TRAIN).stage("x", train=TRAIN, optimizer=None), RunError, "watch"),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_input_is_refused_with_the_way_out(case, tmp_path):
    call, kind, words = CALLS[case]
    with pytest.raises(kind, match=words) as caught:
        call(tmp_path)
    assert caught.value.mend


def test_a_run_is_not_overwritten_unasked(tmp_path):
    first = trained(tmp_path / "run", steps=3)
    (first.path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="overwrite=True"):
        trained(tmp_path / "run")
    second = trained(tmp_path / "run", steps=5, overwrite=True)
    assert second.checkpoints[-1] == 5 and (second.path / "notes.txt").exists()
    assert sorted(int(p.stem) for p in (second.path / "checkpoints").glob("*")) == list(second.checkpoints)


def test_a_full_disk_while_recording_is_one_clear_error_and_the_run_stays_readable(tmp_path, monkeypatch):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    r = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, checkpoints=[2, 4])
    for k in range(1, 5):
        step(model, optimizer, [0, 1])
        if k == 4:
            monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(StorageError, match="free some space"):
                r.step([0, 1])
            monkeypatch.undo()
        else:
            r.step([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = hw.Run.open(tmp_path / "run", build=build, train=TRAIN, task=TASK)
    assert run.checkpoints[-1] == 2 and np.all(np.isfinite(run.weights(2)["0.weight"].numpy()))
