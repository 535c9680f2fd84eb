"""The doctor passes on a healthy house, and finds what is wrong in a sick one."""

import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from headwater import cli, doctor
from headwater.capture import RULES, rules
from headwater.doctor import explaining, gradients, regression, resume
from headwater.doctor.checks import Allowed, Check, Finding, at_least, at_most
from headwater.training import Run


def test_every_check_passes():
    failed = [str(finding) for finding in doctor.examine() if not finding.passed]
    assert not failed


def test_every_kind_of_layer_with_a_rule_is_examined():
    examined = {type(module) for case in gradients.CASES.values() for module in case.layer().modules()}
    assert set(RULES) <= examined


# ---- it finds what is wrong


def test_a_wrong_layer_rule_is_found(monkeypatch):
    right = rules.RULES[torch.nn.Linear]

    def wrong(module, x, g):
        return right.emit(module, x, 1.01 * g)

    monkeypatch.setitem(rules.RULES, torch.nn.Linear, rules.Rule(wrong, groups=right.groups))
    finding = next(doctor.examine([Check("linear", gradients.CHECKS["Linear"], at_most(1e-10))]))
    assert not finding.passed


def test_rates_without_their_momentum_are_found_by_the_slope(monkeypatch):
    right = Run.rates
    monkeypatch.setattr(Run, "rates", lambda run, start, stop: {name: rate / 10 for name, rate in right(run, start, stop).items()})  # 1 - momentum
    name, case = "momentum, cosine, decay", replace(regression.CASES["momentum, cosine, decay"])
    allowed = next(c.allowed for c in doctor.CHECKS if name in c.name and "slope" in c.name)
    assert not next(doctor.examine([Check(name, case.slope, allowed)])).passed


def test_unrolling_is_the_limit_of_leaving_out():
    """Both references are brute force of their own: they agree to first order, and better with more examples."""
    case = regression.Case(rate=0.1, stages=(3,))
    near = regression.Case(rate=0.1, stages=(3,), size=400)
    gaps = [float((c.unrolled - c.left_out).abs().max() / c.left_out.abs().max()) for c in (case, near)]
    assert gaps[1] < gaps[0] < 0.2


def test_a_resumed_trace_that_differs_is_found(monkeypatch):
    honest = resume._trace
    calls = iter((0.0, 1e-6))
    monkeypatch.setattr(resume, "_trace", lambda run, task: (honest(run, task)[0] + next(calls), task.meter.asked))
    check = Check("resume", resume.difference, at_most(0))
    assert not next(doctor.examine([check])).passed


def test_wrong_attributions_are_found(monkeypatch):
    honest = explaining.explain

    def wrong(*args, **settings):
        found = honest(*args, **settings)
        return found if "rule" in settings else replace(found, values=1.002 * found.values)  # the reference stays right

    monkeypatch.setattr(explaining, "explain", wrong)
    checks = [check for check in doctor.CHECKS if "attributions" in check.name]
    assert len(checks) >= 3 and not any(finding.passed for finding in doctor.examine(checks))


# ---- how it speaks


def broken():
    raise RuntimeError("no such instruction")


def test_what_a_check_raises_is_a_failure_with_its_reason():
    finding = next(doctor.examine([Check("a check", broken, at_most(1))]))
    assert not finding.passed
    assert "no such instruction" in str(finding) and "FAILED" in str(finding)


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [(at_most(1), (1.0, -9.0), (1.1, math.nan)), (at_least(1), (1.0, 9.0), (0.9, math.nan)), (Allowed(1, 2), (1.5,), (0.5, 2.5, math.nan))],
)
def test_figures_are_held_against_what_is_allowed(allowed, good, bad):
    assert all(Finding("x", value, allowed, 0.0).passed for value in good)
    assert not any(Finding("x", value, allowed, 0.0).passed for value in bad)


@pytest.mark.parametrize(("measured", "code"), [(0.5, 0), (2.0, 1)])
def test_the_exit_code_tells_a_script(monkeypatch, measured, code):
    finding = Finding("a figure", measured, at_most(1), seconds=0.1)
    monkeypatch.setattr(doctor, "examine", lambda: iter([finding]))
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == code
    assert f"torch {torch.__version__}" in done.output and "threads" in done.output
    assert ("a figure" in done.output) and (("1 of the checks failed: a figure" in done.output) == bool(code))
