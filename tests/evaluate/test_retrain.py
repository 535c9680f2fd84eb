"""Retraining banks: the same in every kind of process, kept through kills, honest about failures."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from headwater.errors import DamagedFile, HeadwaterError, InputError, MissingExtra, RunError, StorageError
from headwater.evaluate import Bank, halves, lds, leave_out, removing, retrain, slope
from headwater.evaluate.identity import code_digest
from headwater.evaluate.jobs import Job, Work, measurements, select
from headwater.evaluate.retrain import duration
from headwater.evaluate.workers import Recruiter, _processes, _recruiter
from headwater.tasks import Examples, Regression, Task
from headwater.training.experiment import Experiment

EXPERIMENT = """
import os, time, torch
from headwater.tasks import Regression
from headwater.training.experiment import Experiment

STEPS = 8

def build():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5), torch.nn.Tanh(), torch.nn.Linear(4, 1))

def fit(model, train, seed, recorder=None):
    with open(os.environ["FITS"], "a") as log:
        log.write(f"{os.getpid()} {len(train[0])} {seed}\\n")
    time.sleep(float(os.environ.get("PAUSE", "0")))
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


@pytest.fixture
def fits(tmp_path, monkeypatch):
    """The log of trainings: one line each."""
    monkeypatch.setenv("FITS", str(tmp_path / "fits"))
    return lambda: (tmp_path / "fits").read_text().splitlines() if (tmp_path / "fits").exists() else []


@pytest.fixture
def source(tmp_path):
    """The file of a small experiment whose training depends on chance in every way."""
    path = tmp_path / "small_experiment.py"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture
def small(source, fits):
    return Experiment.load(source, name="experiment")


def unpicklable(experiment):
    """The same experiment, held by a closure: it cannot be sent by pickle, so its workers are forked."""
    return Experiment(lambda: experiment.build(), experiment.train, experiment.test, experiment.task, lambda *a: experiment.fit(*a), "small")


def same(one, other):
    return np.array_equal(one.values, other.values) and np.array_equal(one.base, other.base)


# ------------------------------------------------------------------------------------------------------------ determinism


def test_the_bank_does_not_depend_on_where_the_models_are_trained(small, fits, tmp_path):
    subsets = halves(20, 3)
    here = retrain(small, subsets, 2, workers=1, directory=tmp_path / "here", progress=False)
    assert len(fits()) == 8 and len({line.split()[0] for line in fits()}) == 1
    torch.manual_seed(99)
    forked = retrain(unpicklable(small), subsets, 2, workers=3, directory=tmp_path / "forked", progress=False)
    assert same(here, forked)
    pids = {line.split()[0] for line in fits()[8:]}
    assert len(pids) > 2 and str(os.getpid()) not in pids
    assert _recruiter(Work(small)).method == "spawn" and _recruiter(Work(unpicklable(small))).method == "fork"
    assert np.ptp(here.values, axis=0).min() > 0 and not np.array_equal(here.base[0], here.base[1])


def test_a_bank_reads_back_as_it_was(small, tmp_path):
    made = retrain(small, halves(20, 3, seed=5), (4, 7), workers=1, directory=tmp_path / "bank", progress=False)
    read = Bank.open(tmp_path / "bank")
    assert same(made, read) and read.seeds == (4, 7) and read.subsets.seed == 5 and read.name == "small"
    assert all(np.array_equal(a, b) for a, b in zip(made.subsets, read.subsets, strict=True))
    assert made.values.shape == (3, 2, 5) and made.seconds > 0 and made.finished.all()
    picked = made.at([3, 1])
    assert np.array_equal(picked.values, made.values[:, :, [3, 1]]) and np.array_equal(picked.base, made.base[:, [3, 1]])


def test_the_callers_chance_and_threads_are_left_alone(small, tmp_path):
    torch.manual_seed(3), np.random.seed(3)
    before = torch.rand(1), np.random.rand()
    torch.manual_seed(3), np.random.seed(3)
    threads = torch.get_num_threads()
    retrain(small, halves(20, 1), 1, workers=1, directory=tmp_path / "bank", progress=False)
    assert (torch.rand(1), np.random.rand()) == before and torch.get_num_threads() == threads


# --------------------------------------------------------------------------------------------------------------- resuming


def stamps(directory):
    """When each finished measurement was written; one that a kill met before its facts were written is none."""
    written = (directory / "measurements").glob("*.safetensors")
    return {p.name: p.stat().st_mtime_ns for p in written if p.with_name(f"{p.name.rsplit('-', 1)[0]}.json").exists()}


def test_a_finished_bank_trains_nothing_and_a_wider_one_only_what_is_new(small, fits, tmp_path):
    place = tmp_path / "bank"
    first = retrain(small, halves(20, 2), 1, workers=1, directory=place, progress=False)
    assert len(fits()) == 3
    old = stamps(place)
    assert same(first, retrain(small, halves(20, 2), 1, directory=place, progress=False)) and len(fits()) == 3
    wide = retrain(small, halves(20, 4), 2, workers=1, directory=place, progress=False)
    assert len(fits()) == 10 and wide.values.shape == (4, 2, 5)
    assert np.array_equal(wide.values[:2, :1], first.values)
    assert all(stamps(place)[name] == stamp for name, stamp in old.items())
    assert same(first, retrain(small, halves(20, 2), 1, directory=place, progress=False))
    assert Bank.open(place).values.shape == (4, 2, 5)


def stopped(process, place, how, enough=2):
    """Stop a slow retraining with a signal once some models are kept."""
    deadline = time.monotonic() + 240
    while alive(process.pid) and len(list(place.glob("measurements/*.json"))) < enough and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, how)


def continues(small, fits, place, tmp_path):
    """The interrupted bank, continued, equals one that never stopped, and nothing finished was trained again."""
    held, begun = stamps(place), len(fits())
    assert 2 <= len(held) < 12, f"stopped too late or too early: {sorted(held)}"
    half = Bank.open(place)
    resumed = retrain(small, halves(20, 5), 2, workers=1, directory=place, progress=False)
    assert len(fits()) - begun == 12 - len(held)
    assert all(stamps(place)[name] == stamp for name, stamp in held.items())
    assert same(resumed, retrain(small, halves(20, 5), 2, workers=1, directory=tmp_path / "whole", progress=False))
    assert half.finished.sum() + np.isfinite(half.base).all(axis=1).sum() == len(held)
    assert np.array_equal(half.values[half.finished], resumed.values[half.finished])


def all_gone(pids, patience=5.0):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, forks")
def test_a_kill_loses_nothing_and_leaves_no_worker_behind(small, fits, tmp_path, monkeypatch):
    place = tmp_path / "bank"
    monkeypatch.setenv("PAUSE", "0.1")
    work = {"subsets": halves(20, 5), "seeds": 2, "workers": 2, "directory": place, "progress": False}
    process = multiprocessing.get_context("fork").Process(target=retrain, args=(unpicklable(small),), kwargs=work)
    process.start()
    stopped(process, place, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.setenv("PAUSE", "0")
    assert all_gone({int(line.split()[0]) for line in fits()})
    continues(unpicklable(small), fits, place, tmp_path)


SCRIPT = """
from headwater.evaluate import halves, retrain
from headwater.training.experiment import Experiment
retrain(Experiment.load({source!r}, name="experiment"), halves(20, 5), 2, workers=2, directory={place!r})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_stops_the_workers_and_says_how_to_continue(small, source, fits, tmp_path):
    """In a real process, started from a script without a ``__main__`` guard, whose workers are spawned: they too agree with this process."""
    place, script = tmp_path / "bank", tmp_path / "script.py"
    script.write_text(SCRIPT.format(source=str(source), place=str(place)))
    settings = {**os.environ, "PAUSE": "0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, str(script)], env=settings, stderr=subprocess.PIPE, text=True)
    stopped(process, place, signal.SIGINT)
    said = process.communicate(timeout=240)[1]
    assert process.returncode != 0 and "KeyboardInterrupt" in said
    assert "stopped." in said and str(place) in said and "first model" in said and "about" in said
    workers = {int(line.split()[0]) for line in fits()}
    assert process.pid not in workers and not any(alive(pid) for pid in workers)
    continues(small, fits, place, tmp_path)


# ---------------------------------------------------------------------------------------------------------- other ways out


def changed(experiment, **new):
    fields = {name: getattr(experiment, name) for name in ("build", "train", "test", "task", "fit", "name")}
    return Experiment(**{**fields, **new})


def test_a_directory_of_another_experiment_is_refused_with_the_difference(small, source, fits, tmp_path):
    place = tmp_path / "bank"
    retrain(small, halves(20, 2), 1, workers=1, directory=place, progress=False)
    done = len(fits())
    x, y = small.train
    (tmp_path / "longer.py").write_text(EXPERIMENT.replace("STEPS = 8", "STEPS = 9"))
    cases = {
        "train.fingerprint": changed(small, train=(x, y + 1e-6)),
        "test.examples": changed(small, test=tuple(t[:4] for t in small.test)),
        "task.scale": changed(small, task=Regression(scale=2.0)),
        r"model\.weight": changed(small, build=lambda: torch.nn.Linear(3, 1)),
        "code.fit": Experiment.load(tmp_path / "longer.py", name="experiment"),
    }
    for words, other in cases.items():
        with pytest.raises(RunError, match=words):
            retrain(other, halves(20, 2), 1, workers=1, directory=place, progress=False)
    with pytest.raises(RunError, match="measure"):
        retrain(small, halves(20, 2), 1, workers=1, directory=place, measure=lambda m, b: m(b[0])[:, 0], progress=False)
    with pytest.raises(RunError, match="drawn with seed 0 there"):
        retrain(small, halves(20, 2, seed=1), 1, workers=1, directory=place, progress=False)
    assert len(fits()) == done
    (tmp_path / "commented.py").write_text(EXPERIMENT.replace("    time.sleep", "    # wait\n    time.sleep"))
    retrain(Experiment.load(tmp_path / "commented.py", name="experiment"), halves(20, 2), 1, directory=place, progress=False)
    assert len(fits()) == done


def ends_badly(experiment, subset_size, seed, how):
    """Trainings on a set of this size with this seed end as ``how`` says."""

    def fit(model, train, given, recorder=None):
        if len(train[0]) == subset_size and given == seed:
            how(model)
        return experiment.fit(model, train, given)

    return changed(experiment, fit=fit)


def raises(model):
    raise ValueError("no luck today")


def diverges(model):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
        model.register_forward_hook(lambda *a: a[2] * float("nan"))


@pytest.mark.parametrize(
    ("how", "words", "workers"),
    [
        (raises, "no luck today", 1),
        (raises, "no luck today", 2),
        (diverges, "NaN or infinite", 1),
        (lambda model: os.kill(os.getpid(), signal.SIGKILL), "out of memory", 2),
        (lambda model: os._exit(3), "exit code 3", 2),
    ],
)
def test_a_failed_training_is_named_and_the_others_go_on(small, fits, tmp_path, how, words, workers):
    place, subsets = tmp_path / "bank", removing(20, [range(5), range(6), range(7)])
    with pytest.raises(RunError, match=words) as caught:
        retrain(ends_badly(small, 14, 1, how), subsets, 2, workers=workers, directory=place, progress=False)
    assert "1 of 8 trainings failed: subset 1, seed 1" in str(caught.value) and "7 others are kept" in str(caught.value)
    bank = Bank.open(place)
    assert bank.finished.tolist() == [[True, True], [True, False], [True, True]] and np.isfinite(bank.base).all()
    assert [len(m) for m in bank.complete().subsets] == [15, 13]


def test_a_full_disk_stops_the_workers_at_once(small, fits, tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("no space")

    monkeypatch.setattr("headwater.evaluate.bank.Shelf.keep", full)
    with pytest.raises(StorageError) as caught:
        retrain(unpicklable(small), halves(20, 5), 2, workers=2, directory=tmp_path / "bank", progress=False)
    assert caught.value.__traceback__ is not None and not multiprocessing.active_children()


def test_an_experiment_that_workers_cannot_open_is_one_clear_error(small, source, tmp_path):
    source.write_text("raise ImportError('no such module here')")
    with pytest.raises(RunError, match="no such module here"):
        list(_processes(Recruiter("fork", pickle.dumps(Work(small))), [Job(None, 0, None)], 1))
    assert not multiprocessing.active_children()


def test_a_measure_that_is_not_per_example_is_refused(small, tmp_path):
    with pytest.raises(RunError, match="one number per example"):
        retrain(small, halves(20, 2), 1, workers=1, directory=tmp_path / "bank", measure=lambda m, b: m(b[0]).mean(), progress=False)


def test_a_damaged_measurement_is_named(small, tmp_path):
    retrain(small, halves(20, 2), 1, workers=1, directory=tmp_path / "bank", progress=False)
    victim = next(p for p in (tmp_path / "bank" / "measurements").glob("00001-0*") if not p.name.endswith(".json"))
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(bytes(content))
    with pytest.raises(DamagedFile, match="00001-0"):
        Bank.open(tmp_path / "bank")


def test_wrong_calls_are_refused_before_any_work(small, fits, tmp_path):
    for call, error in [
        (lambda: retrain(small, halves(21, 2)), InputError),
        (lambda: retrain(small, halves(20, 2), seeds=0), InputError),
        (lambda: retrain(small, halves(20, 2), seeds=(1, 1)), InputError),
        (lambda: retrain(small, halves(20, 2), engine="cloud"), InputError),
        (lambda: retrain(changed(small, test=tuple(t[:0] for t in small.test)), halves(20, 2)), InputError),
        (lambda: Bank.open(tmp_path), RunError),
    ]:
        with pytest.raises(error, match="To mend it") as caught:
            call()
        assert isinstance(caught.value, HeadwaterError)
    assert fits() == []


def test_ray_is_asked_for_only_when_used(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install headwater\[ray\]"):
        retrain(small, halves(20, 2), 1, engine="ray", directory=tmp_path / "bank", progress=False)


def test_the_screen_can_be_silenced_and_otherwise_tells_the_plan(small, tmp_path, capsys):
    retrain(small, halves(20, 2), 1, workers=1, directory=tmp_path / "one", progress=False)
    assert capsys.readouterr() == ("", "")
    retrain(small, halves(20, 2), 1, workers=1, directory=tmp_path / "two")
    out, err = capsys.readouterr()
    assert out == "" and "retraining 3 models, 1 at a time" in err and "2 to go" in err and str(tmp_path / "two") in err


def test_without_a_directory_the_bank_still_lies_somewhere(small):
    bank = retrain(small, halves(20, 1), 1, workers=1, progress=False)
    assert same(bank, Bank.open(bank.directory))


@pytest.mark.parametrize(("seconds", "words"), [(0.42, "0.4 s"), (41.6, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


# ------------------------------------------------------------------------------------------------------- data and measures


def test_a_subset_is_the_same_kind_of_thing_as_the_data():
    x, y, kept = torch.arange(12.0).reshape(6, 2), torch.arange(6), np.array([1, 4])
    assert select((x, y), None)[0] is x
    cut = select((x, y), kept)
    assert isinstance(cut, tuple) and cut[0].tolist() == [[2, 3], [8, 9]] and cut[1].tolist() == [1, 4]
    assert select({"x": x, "y": y}, kept)["y"].tolist() == [1, 4]
    wrapped = select(TensorDataset(x, y), kept)
    assert isinstance(wrapped, TensorDataset) and next(iter(DataLoader(wrapped, 2)))[1].tolist() == [1, 4]
    listed = select([{"a": i} for i in range(6)], kept)
    assert len(listed) == 2 and listed[1] == {"a": 4}
    seen = select(Examples([(float(i), i) for i in range(6)], collate=lambda items: torch.tensor([i for _, i in items])), kept)
    assert isinstance(seen, Examples) and seen.batch(range(2)).tolist() == [1, 4]


def test_measurements_are_taken_in_eval_mode_batch_by_batch(small, monkeypatch):
    model = small.build().train()
    whole = measurements(model, small)
    monkeypatch.setattr("headwater.evaluate.jobs.MEASURED_AT_ONCE", 2)
    model.train()
    assert np.allclose(measurements(model, small), whole, atol=1e-7) and whole.dtype == np.float64
    with torch.no_grad():
        assert np.allclose(whole, small.task.measure(model.eval(), small.test).double(), atol=1e-7)


def test_another_measure_takes_the_place_of_the_tasks(small, tmp_path):
    def output(model, batch):
        return model(batch[0])[:, 0]

    bank = retrain(small, halves(20, 1), 1, workers=1, directory=tmp_path / "bank", measure=output, progress=False)
    subset = bank.subsets[0]
    assert np.array_equal(bank.values[0, 0], Work(small, output)(Job(0, 0, subset)))
    assert not np.array_equal(bank.values[0, 0], Work(small)(Job(0, 0, subset)))


# ------------------------------------------------------------------------------------- where leave-one-out is known exactly


def ridge(n=30, d=4, strength=2.0):
    """Ridge regression trained to its exact optimum, and the exact effect of leaving each example out on each prediction."""
    g = torch.Generator().manual_seed(0)
    x, q = torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(6, d, generator=g, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + 0.5 * torch.randn(n, 1, generator=g, dtype=torch.float64)

    def fit(model, train, seed, recorder=None):
        a, b = train
        with torch.no_grad():
            model.weight.copy_(torch.linalg.solve(a.T @ a + strength * torch.eye(d, dtype=a.dtype), a.T @ b).T)
        return model

    task = Task(loss=lambda m, b: (m(b[0])[:, 0] - b[1][:, 0]) ** 2 / 2, measure=lambda m, b: m(b[0])[:, 0])
    experiment = Experiment(lambda: torch.nn.Linear(d, 1, bias=False, dtype=torch.float64), (x, y), (q, torch.zeros(6, 1)), task, fit, "ridge")
    inverse = torch.linalg.inv(x.T @ x + strength * torch.eye(d, dtype=x.dtype))
    residual = (y - x @ inverse @ x.T @ y)[:, 0]
    leverage = (x @ inverse * x).sum(1)
    influence = (q @ inverse @ x.T) * residual  # what training on i gave to prediction q, to first order
    return experiment, (influence / (1 - leverage)).numpy(), influence.numpy(), leverage.numpy()


def test_exact_leave_one_out_has_slope_one(tmp_path):
    experiment, exact, first_order, leverage = ridge()
    bank = retrain(experiment, leave_out(30, 30), 1, workers=1, directory=tmp_path / "bank", progress=False)
    result = slope(exact, bank)
    assert result.slope == pytest.approx(1, abs=1e-9) and result.spearman == pytest.approx(1, abs=1e-12)
    assert np.allclose(result.actual, result.predicted, atol=1e-10)
    assert lds(exact, bank).mean == pytest.approx(1, abs=1e-12)
    known = (exact * first_order).sum() / (first_order**2).sum()
    approximate = slope(first_order, bank)
    assert approximate.slope == pytest.approx(known, abs=1e-9)
    assert 1 < approximate.slope < (1 / (1 - leverage)).max()
    assert slope(-exact, bank).slope == pytest.approx(-1, abs=1e-9)


def test_the_sign_of_lds_follows_the_house(tmp_path):
    experiment, _, first_order, _ = ridge()
    bank = retrain(experiment, halves(30, 30), 1, workers=1, directory=tmp_path / "bank", progress=False)
    assert lds(first_order, bank).mean > 0.8 and lds(-first_order, bank).mean < -0.8


def test_experiments_are_told_apart_by_their_constants_only_where_those_matter(small):
    def make(rate, unused=0):
        def fit(model):
            return model, rate

        return fit

    assert code_digest(make(0.1)) == code_digest(make(0.1, unused=1)) != code_digest(make(0.2))
    assert code_digest(partial(small.fit, rate=1)) == code_digest(partial(small.fit, rate=1)) != code_digest(partial(small.fit, rate=2))
