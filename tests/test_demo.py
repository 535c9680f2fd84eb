"""The demo, in its quick size: what the page says is what was measured, and measuring again gives the same."""

import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import headwater as hw
from headwater import cli, report
from headwater.demo import QUICK, experiment, headline, measure, page
from headwater.errors import RunError


def silently(_):
    return nullcontext()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def study(out):
    return measure(QUICK, out, silently)


@pytest.fixture(scope="module")
def html(study):
    return report.render(page(study))


# ---- what is measured


def test_the_recorded_training_is_the_one_that_is_repeated(study, out):
    """The bank's training on the full set, with the recorded seed, ends in the recorded model."""
    plan, bank = experiment(QUICK), hw.evaluate.Bank.open(out / "bank")
    model = study.run.load(study.run.model(), study.run.checkpoints[-1])
    recorded = plan.task.measure(model, plan.test).detach().numpy()
    np.testing.assert_allclose(bank.base[0], recorded, rtol=1e-4, atol=1e-4)


def test_the_network_has_learned_something_and_not_everything(study):
    assert 0.6 < study.accuracy < 0.97


def test_the_flipped_labels_are_those_that_differ_and_are_found_better_than_by_chance(study):
    digits = study.digits
    assert torch.equal(digits.flipped, digits.train[1] != digits.truth)
    assert int(digits.flipped.sum()) == round(0.05 * QUICK.train)
    assert study.found["self-influence"].auroc > 0.8
    assert study.found["self-influence"].auroc == hw.evaluate.auroc(study.suspicion, digits.flipped)


def test_the_reported_figures_are_those_of_the_bank_on_disk(study, out):
    bank = hw.evaluate.Bank.open(out / "bank").at(study.asked)
    for name, scores in study.scores.items():
        assert study.agreement[name].mean == hw.evaluate.lds(scores, bank).mean
    assert study.ahead.difference == hw.evaluate.paired(study.scores["SOURCE"], study.scores["Influence"], bank).difference
    assert study.ahead.difference == pytest.approx(study.agreement["SOURCE"].mean - study.agreement["Influence"].mean)


def test_the_damping_is_chosen_on_digits_that_are_not_reported(study, out):
    assert set(study.asked).isdisjoint(range(QUICK.chosen_on))
    best = max(study.sweep, key=lambda tried: tried.lds)
    assert study.scores["Influence"].method == best.method
    plan = experiment(QUICK)
    chosen_on = tuple(column[: QUICK.chosen_on] for column in plan.test)
    damping = float(best.method.removeprefix("Influence(damping=").removesuffix(")"))
    again = hw.trace(study.run, chosen_on, hw.Influence(damping=damping), progress=False)
    judge = hw.evaluate.Bank.open(out / "bank").at(range(QUICK.chosen_on))
    assert hw.evaluate.lds(again, judge).mean == pytest.approx(best.lds, abs=0.02)


def test_wrong_digits_are_shown_first(study):
    labels = study.digits.test[1].numpy()[study.asked]
    right = (study.probabilities.argmax(1) == labels)[study.shown]
    assert len(right) == QUICK.shown == len(set(study.shown))
    assert list(right) == sorted(right)
    assert not right[0]


def test_what_was_done_is_not_done_again(study, out):
    kept = [file for place in ("run", "scores", "bank/measurements") for file in (out / place).rglob("*.safetensors")]
    before = [file.stat().st_mtime_ns for file in kept]
    again = measure(QUICK, out, silently)
    assert [file.stat().st_mtime_ns for file in kept] == before
    assert headline(again) == headline(study)
    assert report.render(page(again)) == report.render(page(study))


def test_a_directory_of_another_demo_is_refused(study, out):
    with pytest.raises(RunError, match=r"train\.examples"):
        measure(replace(QUICK, train=300), out, silently)


# ---- what the page says


def test_the_page_needs_nothing_else(html):
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert "http" not in html.replace("http-equiv", "")


def test_the_page_has_every_part(html, study):
    assert html.count('data-testid="attribution"') == QUICK.shown
    for part in ("figures", "bars", "curve", "gallery", "region"):
        assert part in html
    said = report.text(page(study))
    for words in ("noise ceiling", "chance", "ideal", "example gradients", "proponent", "opponent", "log-odds", "wrong label: it is a"):
        assert words in said, words


def test_the_page_says_what_was_measured(study):
    said = report.text(page(study))
    for figure in headline(study):
        assert figure.value in said and figure.note in said
    assert f"{study.agreement['SOURCE'].mean:.2f}" == headline(study)[0].value
    assert f"{study.ahead.difference:+.3f}" == headline(study)[1].value
    assert f"{100 * study.found['self-influence'].at(0.05):.0f}\N{NO-BREAK SPACE}%" == headline(study)[2].value
    assert f"{study.size_of.slope:.2f} times the predicted" in said.replace("\n", " ")


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.01, 0.03, "SOURCE is better here"), (-0.03, -0.01, "SOURCE is worse here"), (-0.01, 0.01, "no difference could be shown")]
)
def test_the_verdict_follows_the_interval(study, low, high, words):
    other = replace(study, ahead=replace(study.ahead, low=low, high=high))
    assert words in headline(other)[1].note
    assert words in report.text(page(other)).replace("\n", " ")


def test_a_flag_marks_every_flipped_example_and_no_other(study):
    flipped = set(torch.nonzero(study.digits.flipped).flatten().tolist())
    parts = [part for section in page(study).sections for part in section.parts]
    cards = [card for part in parts for card in (*getattr(part, "proponents", ()), *getattr(part, "opponents", ()), *getattr(part, "cards", ()))]
    assert len(cards) > 50
    assert all((int(card.title[1:]) in flipped) == (card.flag is not None) for card in cards)


def test_the_command_ends_with_the_figures_and_the_page(study, out):
    done = CliRunner().invoke(cli.app, ["demo", "--quick", "--out", str(out)])
    assert done.exit_code == 0, done.output
    lines = done.stdout.strip().splitlines()
    assert [line.split(": ")[0] for line in lines[-4:-1]] == [figure.name for figure in headline(study)]
    assert lines[-1] == f"The page: {out / 'report.html'}"
    assert (out / "report.html").read_text() == report.render(page(study))
