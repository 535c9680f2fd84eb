"""Sensors: closed forms where f is known, planted faults, and what must be refused."""

import dataclasses

import numpy as np
import pytest
import torch

import headwater as hw
from headwater import audit
from headwater.errors import InputError


def readings(n=40, sensors=3, steps=20, seed=0):
    return torch.randn(n, sensors, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- switched off


def test_where_sensors_add_up_each_does_exactly_what_was_said():
    f = lambda x: x[:, 0].sum(1) ** 2 + x[:, 1].sum(1) ** 3 - 2 * x[:, 2].sum(1)  # noqa: E731
    x = readings()
    scores = hw.explain(f, x, progress=False)
    found = audit.switched_off(scores, f, x, sensors=["a", "b", "c"], axis=1)
    assert found.names == ("a", "b", "c")
    np.testing.assert_allclose(found.predicted, found.real, atol=1e-9)
    np.testing.assert_allclose(found.real[:, 0], x[:, 0].sum(1).numpy() ** 2)
    for name in found.names:
        assert found.correlation[name].mean == pytest.approx(1)
        assert found.slope[name].mean == pytest.approx(1)
    assert found.top_correlation.mean == pytest.approx(1) and found.top_slope.mean == pytest.approx(1)
    assert found.shuffled < 0.4


def test_where_two_sensors_need_each_other_each_is_worth_twice_what_was_said():
    f = lambda left, right: left.sum((1, 2)) * right.sum((1, 2))  # noqa: E731
    inputs = {"left": readings(seed=1), "right": readings(seed=2)}
    scores = hw.explain(f, inputs, progress=False)
    found = audit.switched_off(scores, f, inputs)
    product = (inputs["left"].sum((1, 2)) * inputs["right"].sum((1, 2))).numpy()
    for k in range(2):
        np.testing.assert_allclose(found.predicted[:, k], product / 2, atol=1e-9)  # φ = ab / 2 each
        np.testing.assert_allclose(found.real[:, k], product, atol=1e-9)
    assert found.slope["left"].mean == pytest.approx(2)
    assert found.correlation["right"].mean == pytest.approx(1)


def test_a_silent_sensor_reads_the_baseline_unless_told_otherwise():
    f = lambda x: x.sum((1, 2))  # noqa: E731
    x = readings()
    scores = hw.explain(f, x, baseline=1.0, progress=False)
    asked = {"sensors": {"first": [0]}, "axis": 1}
    at_baseline, at_zero = (audit.switched_off(scores, f, x, off=off, **asked) for off in (None, 0.0))
    np.testing.assert_allclose(at_baseline.real[:, 0], (x[:, 0] - 1).sum(1).numpy())
    np.testing.assert_allclose(at_zero.real[:, 0], x[:, 0].sum(1).numpy())
    assert at_zero.names == ("first",)


def test_shuffled_attributions_predict_nothing():
    f = lambda x: x[:, 0].sum(1) ** 2 + x[:, 1].sum(1)  # noqa: E731
    x = readings(200)
    scores = hw.explain(f, x, progress=False)
    wrong = np.random.default_rng(0).permutation(200)
    shuffled = dataclasses.replace(scores, values=scores.values[wrong])
    found = audit.switched_off(shuffled, f, x, sensors=["a", "b", "c"], axis=1)
    assert abs(found.correlation["a"].mean) < 0.2


def test_scores_of_something_else_are_refused():
    f = lambda x: x.sum((1, 2))  # noqa: E731
    x = readings()
    scores = hw.explain(f, x, progress=False)
    for model, inputs in ((f, x[:, :2]), (lambda x: 2 * x.sum((1, 2)), x)):
        with pytest.raises(InputError, match=r"the scores of these inputs|the same model"):
            audit.switched_off(scores, model, inputs, sensors=["a", "b", "c"][: inputs.shape[1]] + ["c"] * (3 - inputs.shape[1]), axis=1)
    with pytest.raises(InputError, match="three examples"):
        audit.switched_off(scores.at([0, 1]), f, x[:2], sensors=["a", "b", "c"], axis=1)


# ---- unusual readings


def test_a_planted_fault_is_found_in_its_sensor_and_at_its_time_and_the_healthy_are_not_strong():
    f = lambda x: (x**2).sum((1, 2))  # noqa: E731
    known, now = hw.explain(f, readings(100), progress=False), readings(30, seed=5)
    faulty = now.clone()
    faulty[:, 1, 10:15] = 5.0
    found = audit.unusual(hw.explain(f, faulty, progress=False), known, width=5)
    assert (found.sensor == 1).all()
    assert (found.time == 2).all()
    healthy = audit.unusual(hw.explain(f, now, progress=False), known, width=5)
    assert np.median(found.strength) > 3 * np.median(healthy.strength)
    assert np.bincount(healthy.sensor, minlength=3).max() < 25


def test_a_fault_in_a_sensor_that_the_model_does_not_use_shows_in_the_readings_alone():
    f = lambda x: x[:, 0].sum(1) + x[:, 1].sum(1)  # noqa: E731
    known, faulty = readings(100), readings(20, seed=5)
    faulty[:, 2] = 4.0
    by_use = audit.unusual(hw.explain(f, faulty, progress=False), hw.explain(f, known, progress=False), width=5)
    by_reading = audit.unusual(faulty, known, width=5)
    assert (by_reading.sensor == 2).all()
    assert (by_use.sensor != 2).all()


def test_distances_are_those_of_a_plain_loop():
    known, now = readings(50).numpy(), readings(3, seed=1).numpy()
    found = audit.unusual(now, known, width=8)  # the last bin is shorter
    assert found.z.shape == (3, 3, 3)
    for k, (start, stop) in enumerate(((0, 8), (8, 16), (16, 20))):
        then = known[:, :, start:stop].sum(2)
        np.testing.assert_allclose(found.z[:, :, k], (now[:, :, start:stop].sum(2) - then.mean(0)) / then.std(0, ddof=1))
    np.testing.assert_allclose(found.strength, np.abs(found.z).max((1, 2)))
    both = audit.unusual((now[:, :1], now[:, 1:]), (known[:, :1], known[:, 1:]), width=8)
    np.testing.assert_allclose(both.z, found.z)


@pytest.mark.parametrize(
    ("now", "known", "asked", "message"),
    [
        (np.ones((2, 3, 20)), np.ones((2, 3, 20)), {}, "five known"),
        (np.ones((2, 3, 20)), np.ones((9, 2, 20)), {}, "the same sensors"),
        (np.ones((2, 20)), np.ones((9, 20)), {}, "of series"),
        (np.ones((2, 3, 20)), np.ones((9, 3, 20)), {"width": 21}, "width=21"),
        (np.ones((2, 3, 20)), np.ones((9, 3, 20)), {"floor": 0.0}, "floor=0.0"),
    ],
)
def test_bad_questions_about_readings_are_refused(now, known, asked, message):
    with pytest.raises(InputError, match=message):
        audit.unusual(now, known, **asked)


# ---- flicker


def test_the_flicker_of_a_linear_model_is_its_weights():
    x = readings(10)
    scores = hw.explain(lambda x: 3 * x.sum((1, 2)), x, progress=False)
    np.testing.assert_allclose(audit.flicker(scores), np.full(9, 3.0))
    x[4] = x[3]
    found = audit.flicker(hw.explain(lambda x: 3 * x.sum((1, 2)), x, progress=False))
    assert np.isnan(found[3]) and not np.isnan(np.delete(found, 3)).any()
    with pytest.raises(InputError, match="two frames"):
        audit.flicker(scores.at(0))
