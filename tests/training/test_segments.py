"""Automatic segments: borders where gradients change, as few as it takes, the best of all cuts."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InputError
from headwater.training import segments
from headwater.training.segments import LEFT, shares

TRAIN = torch.zeros(4, 3), torch.zeros(4, 1)


def build():
    return nn.Linear(3, 2, bias=False)


def run_of(path, gradients, rates, start=True):
    """A run whose weights move by minus ten steps' rate times a given gradient between checkpoints."""
    weight, states, schedule = torch.zeros(2, 3), {}, []
    if start:
        states[0] = {"weight": weight.clone()}
    for k, (g, rate) in enumerate(zip(gradients, rates, strict=True)):
        weight = weight - 10 * rate * torch.as_tensor(g, dtype=torch.float32).reshape(2, 3)
        states[10 * (k + 1)] = {"weight": weight.clone()}
        schedule += 10 * [rate]
    task = hw.tasks.Regression()
    settings = {"build": build, "train": TRAIN, "task": task, "optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=1.0), "rates": schedule}
    return hw.Run.from_checkpoints(path, states, **settings)


def eye(k):
    return np.eye(6)[k]


@pytest.mark.parametrize("start", [True, False])
def test_borders_lie_where_gradients_turn(tmp_path, start):
    """Two directions: the fewest segments are two, and the border is between them whatever the rates."""
    gradients = [eye(0), eye(0), eye(1), eye(1), eye(1), eye(1)]
    made = run_of(tmp_path / "run", gradients, [0.1, 0.5, 0.5, 0.2, 0.1, 0.01], start)
    assert [s.checkpoints for s in segments(made, "auto")] == [(10, 20), (30, 40, 50, 60)]
    assert [(s.start, s.stop) for s in segments(made, "auto")] == [(0, 20), (20, 60)]


def test_a_constant_gradient_is_one_segment_whatever_the_schedule(tmp_path):
    made = run_of(tmp_path / "run", [eye(2)] * 5, [0.01, 1.0, 0.5, 0.1, 0.001])
    assert len(segments(made, "auto")) == 1


def test_every_checkpoint_its_own_where_each_has_its_own_direction(tmp_path):
    made = run_of(tmp_path / "run", [eye(k) for k in range(5)], [0.1] * 5)
    assert [s.checkpoints for s in segments(made, "auto")] == [(10,), (20,), (30,), (40,), (50,)]


def drift(gradients, times, sizes):
    parts = np.split(np.arange(len(times)), np.cumsum(sizes)[:-1])
    return sum((times[p] * ((gradients[p] - np.average(gradients[p], axis=0, weights=times[p])) ** 2).sum(1)).sum() for p in parts)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best_of_all_cuts(tmp_path, seed):
    g = np.random.default_rng(seed)
    gradients, rates = np.cumsum(g.normal(size=(7, 6)), 0), g.uniform(0.01, 1, 7)
    made = run_of(tmp_path / "run", gradients, rates)
    for count in range(1, 8):
        cuts = [np.diff((0, *borders, 7)) for borders in combinations(range(1, 7), count - 1)]
        best = min(cuts, key=lambda sizes: drift(gradients, rates, sizes))
        if drift(gradients, rates, best) <= LEFT * drift(gradients, rates, [7]):
            break
    assert shares(made, made.stages[0]) == best.tolist()


def test_one_checkpoint_is_one_segment_and_other_words_are_refused(tmp_path):
    made = run_of(tmp_path / "run", [eye(0)], [0.1])
    assert [s.checkpoints for s in segments(made, "auto")] == [(10,)]
    assert len(hw.Source("auto").plan(made).rows) == 1
    with pytest.raises(InputError, match="'automatic'"):
        hw.Source("automatic")


def test_segments_cover_every_step_of_every_stage_once(tmp_path):
    model = build()
    recorder = hw.Recorder(tmp_path / "run", task=hw.tasks.Regression(outputs="mean"), train=(torch.randn(4, 3), torch.randn(4, 2)), checkpoints=4, stage="one")
    for name in ("one", "two"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if name == "one":
            recorder.watch(model, optimizer, steps=12)
        else:
            recorder.stage(name, train=(torch.randn(4, 3), torch.randn(4, 2)), optimizer=optimizer, steps=8)
        for _ in range(12 if name == "one" else 8):
            optimizer.zero_grad()
            (model(torch.randn(4, 3)) - 1).square().mean().backward()
            optimizer.step()
            recorder.step(range(4))
    made = recorder.finish()
    found = segments(made, "auto")
    assert found[0].start == 0 and found[-1].stop == 20 and all(a.stop == b.start for a, b in pairwise(found))
    assert 12 in {s.stop for s in found} and [c for s in found for c in s.checkpoints] == [c for c in made.checkpoints if c]
