"""What is told of long work before it is done: the time of what is left, by calls that are warm."""

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

import headwater as hw
from headwater.evaluate.jobs import Job
from headwater.evaluate.retrain import Teller
from headwater.evaluate.workers import Outcome
from headwater.influence import plans, timing
from headwater.influence.engine import Engine
from headwater.influence.ensembles import school
from headwater.influence.index import build as index_build
from headwater.influence.timing import Pieces, seconds_of
from headwater.influence.trak import method as trak
from headwater.influence.unrolled import backwards
from headwater.report.numbers import duration

TASK = hw.tasks.Classification()
G = torch.Generator().manual_seed(0)
DATA = torch.randn(24, 5, generator=G), torch.randint(3, (24,), generator=G)
ASKED, OTHERS = [(torch.randn(4, 5, generator=G), torch.tensor(y)) for y in ([0, 1, 2, 0], [2, 2, 1, 0])]


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, *seconds):
        """A function that takes so long the first time, the second ..., and the last of them from then on."""
        self.calls = 0

        def work():
            self.now += seconds[min(self.calls, len(seconds) - 1)]
            self.calls += 1

        return work


# ---------------------------------------------------------------------------------------------------------------------- warm


def test_the_first_call_is_not_counted(monkeypatch):
    assert seconds_of(Clock(monkeypatch).work(90.0, 0.01)) == pytest.approx(0.01)


def test_one_slow_call_among_the_others_does_not_matter(monkeypatch):
    for k in (1, 2, 3):
        times = [9.0, 0.01, 0.01, 0.01]
        times[k] = 0.3
        assert seconds_of(Clock(monkeypatch).work(*times)) == pytest.approx(0.01), k


def test_long_work_is_tried_twice_and_not_four_times(monkeypatch):
    clock = Clock(monkeypatch)
    assert seconds_of(clock.work(90.0, 60.0)) == 60.0 and clock.calls == 2


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("cold", [1.0, 8.0])
def test_pieces_forget_the_cold_ones(at_once, cold):
    pieces = Pieces(["a"] * 20, at_once)
    for k in range(12):
        pieces.ended("a", cold if k < at_once else 2.0)
        assert pieces.left == (cold if k < at_once else 2.0) * -(-(19 - k) // at_once) and pieces.warm == (k >= at_once)


def test_pieces_have_news_first_and_where_the_estimate_was_wrong():
    pieces = Pieces(["a"] * 9)
    assert [pieces.ended("a", s) for s in (8.0, 1.0, 1.1, 1.0, 0.9, 3.0)] == [True, True, False, False, False, False]
    assert [pieces.ended("a", s) for s in (None, 1.0)] == [False, False]
    assert not Pieces(["a"]).ended("a", 8.0), "nothing is left to be told of"


def test_pieces_of_another_kind_have_their_own_time():
    pieces = Pieces(["whole", "whole", "light", "light", "light"])
    pieces.ended("whole", 10.0)
    assert pieces.left == 40.0
    pieces.ended("light", 1.0)
    assert pieces.left == 12.0


def test_retraining_tells_again_once_a_worker_is_warm(tmp_path, capsys):
    with Teller(100, 100, 2, tmp_path, True) as teller:
        for k in range(6):
            teller.ended(Outcome(Job(k, 0, None), np.zeros(1), 4.8 if k < 2 else 0.7))
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "to go" in line]
    assert told == [
        f"first model: 4.8 s, starting included; 99 to go, 2 at a time: about {duration(50 * 4.8)}",
        f"by the models so far; 97 to go, 2 at a time: about {duration(49 * 0.7)}",
    ]


def test_a_model_that_failed_foretells_nothing(tmp_path, capsys):
    with Teller(9, 9, 1, tmp_path, True) as teller:
        teller.ended(Outcome(Job(0, 0, None), None, 0.01, "Traceback\nValueError: no"))
        teller.ended(Outcome(Job(1, 0, None), np.zeros(1), 5.0))
    told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "to go" in line]
    assert told == [f"by the models so far; 7 to go, 1 at a time: about {duration(35)}"]


def test_the_timed_batches_of_a_run_are_warm(run, monkeypatch):
    """The first batch of gradients takes a hundred seconds, the others 8 for their 8 examples."""
    engine, clock = Engine.of(run, 8), Clock(monkeypatch)
    gradients, wait = engine.capture.gradients, clock.work(100.0, 8.0)
    monkeypatch.setattr(engine.capture, "gradients", lambda *given: (wait(), gradients(*given))[1])
    assert engine.seconds_per_example == 1.0


def test_unrolling_times_warm_steps(run, monkeypatch, capsys):
    """Reversing takes 100 s once and 2 s afterwards, and so it is told: the replays take none here."""
    clock, pull = Clock(monkeypatch), backwards.pull
    wait = clock.work(100.0, 2.0)
    monkeypatch.setattr(backwards, "pull", lambda *given: (wait(), pull(*given))[1])
    hw.trace(run, ASKED, hw.Unrolled(schedule="every"))
    assert "about 24 s by timed steps" in capsys.readouterr().err


def test_adapters_are_told_by_warm_steps(run, monkeypatch, capsys):
    clock, step = Clock(monkeypatch), school.School._one_step
    wait = clock.work(100.0, 2.0)
    monkeypatch.setattr(school.School, "_one_step", lambda *given: (wait(), step(*given))[1])
    hw.trace(run, ASKED, hw.LoraEnsemble(hw.GradDot(), members=2, rank=1, steps=3))
    assert f"2 of 2 adapters to train, 3 steps each: about {duration(2 * 3 * 2.0)}" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------- left


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


@pytest.fixture
def run(tmp_path):
    return recorded(tmp_path / "run")


def recorded(path):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hw.Recorder(path, model, optimizer, task=TASK, train=DATA, steps=12, checkpoints=3)
    for step in range(12):
        ids = torch.arange(6) + 6 * (step % 4)
        optimizer.zero_grad()
        TASK.loss(model, (DATA[0][ids], DATA[1][ids])).mean().backward()
        optimizer.step()
        recorder.step(ids)
    return recorder.finish()


class Bars:
    """The bars that were shown, and the death of one at its ``limit``."""

    def __init__(self, monkeypatch):
        self.shown, self.limit = [], None
        bars = self

        class Bar(tqdm):
            def __init__(self, *given, **settings):
                super().__init__(*given, **settings)
                self.first, self.seen = settings.get("initial", 0), 0
                bars.shown.append(self)

            def update(self, n=1):
                self.seen += n
                if bars.limit is not None and self.seen > bars.limit:
                    raise KeyboardInterrupt
                return super().update(n)

        for module in (plans, trak, index_build, backwards):
            monkeypatch.setattr(module, "tqdm", Bar)
        monkeypatch.setattr(Engine, "seconds_per_example", 1.0)  # what is told is then what is left
        monkeypatch.setattr(backwards.Backwards, "_pace", lambda *_: (1.0, 1.0))


WORK = {
    "SOURCE": lambda run: hw.trace(run, ASKED, hw.Source(segments=2), batch_size=4),
    "in chunks of queries": lambda run: hw.trace(run, ASKED, hw.TracIn(), batch_size=4, memory=1500),
    "refined": lambda run: hw.trace(run, ASKED, hw.Influence(damping=1.0, refine=3), batch_size=4),
    "on themselves": lambda run: hw.self_influence(run, hw.TracIn(), batch_size=4, memory=4000),
    "TRAK": lambda run: hw.trace(run, ASKED, hw.Trak(dim=16), batch_size=4),
    "TRAK without projection": lambda run: hw.trace(run, ASKED, hw.Trak(), batch_size=4, memory=14000),
    "unrolling": lambda run: hw.trace(run, ASKED, hw.Unrolled(schedule="sqrt")),
    "unrolling in chunks": lambda run: hw.trace(run, ASKED, hw.Unrolled(schedule="log"), memory=6000),
    "the index": lambda run: hw.index(run, segments=2, batch_size=4),
}


@pytest.mark.parametrize("name", WORK)
def test_what_is_told_is_what_is_left_and_is_done(name, tmp_path, monkeypatch, capsys):
    """From the beginning, and again after work was stopped on the way."""
    bars = Bars(monkeypatch)
    monkeypatch.setattr(index_build, "ROOM", 100)

    def done(run):
        """How much was told, and how much was done."""
        bars.shown.clear()
        WORK[name](run)
        left = bars.shown[0].total - bars.shown[0].first
        assert f"about {duration(left)} by timed" in capsys.readouterr().err
        return left, bars.shown[0].seen

    whole, seen = done(recorded(tmp_path / "whole"))
    assert whole == seen > 0
    stopped, bars.limit = recorded(tmp_path / "stopped"), int(0.95 * whole)
    with pytest.raises(KeyboardInterrupt):
        WORK[name](stopped)
    bars.limit = None
    capsys.readouterr()
    left, seen = done(stopped)
    assert left == seen and 0 < left < whole, (left, seen, whole)


def test_curvature_that_is_kept_is_not_told_again(run, monkeypatch):
    bars, lefts = Bars(monkeypatch), []
    for asked in (ASKED, OTHERS):
        hw.trace(run, asked, hw.Influence())
        lefts.append(bars.shown[-1].total - bars.shown[-1].first)
        assert bars.shown[-1].seen == lefts[-1]
    assert lefts[1] == 24 < lefts[0]  # the training examples themselves


def test_who_is_told_nothing_waits_for_no_timing(run, monkeypatch):
    monkeypatch.setattr(timing, "_now", lambda: pytest.fail("something was timed"))
    for method in (hw.Influence(), hw.Trak(dim=16), hw.Unrolled()):
        hw.trace(run, ASKED, method, progress=False)
