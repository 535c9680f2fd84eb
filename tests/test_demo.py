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
from headwater.demo.pixels import TOLERANCE
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


# ---- which pixels


def test_pixels_are_about_the_number_that_the_traces_are_about(study):
    plan = experiment(QUICK)
    model = study.run.load(study.run.model(), study.run.checkpoints[-1])
    measured = plan.task.measure(model, plan.test).detach().numpy()[study.asked]
    np.testing.assert_allclose(study.pixels.asked.output, measured, rtol=1e-4, atol=1e-4)


def test_pixels_of_every_digit_sum_to_the_change_within_the_tolerance(study):
    for scores in (study.pixels.asked, study.pixels.training):
        sums = scores.values.astype(np.float64).sum((1, 2, 3))
        change = scores.output - scores.baseline_output
        assert (np.abs(sums - change) <= TOLERANCE * np.abs(change) + 1e-5).all()
        assert scores.converged.all()
        np.testing.assert_allclose(scores.reference[0], study.digits.train[0].mean(0), atol=1e-6)
    assert study.pixels.gaps.max() <= TOLERANCE


def test_proponents_are_explained_for_the_class_that_was_asked_about(study):
    model = study.run.load(study.run.model(), study.run.checkpoints[-1])
    ids, classes = (torch.tensor(column) for column in zip(*study.pixels.pairs, strict=True))
    with torch.no_grad():
        expected = hw.targets.log_odds(classes).pick(model(study.digits.train[0][ids]), torch.arange(len(ids)))
    np.testing.assert_allclose(study.pixels.training.output, expected, rtol=1e-4, atol=1e-4)
    wanted = {(i, study.label(row)) for row in study.shown for i in study.proponents(row)}
    assert wanted == set(study.pixels.pairs) and len(wanted) > 2 * QUICK.shown


def test_taking_pixels_away_in_their_order_costs_more_than_at_random(study):
    judged = study.pixels.asked.provenance["deletion"]
    assert judged["area"] < judged["random"] - 0.3


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


def test_each_digit_and_its_proponents_have_a_picture_of_their_pixels(html, study):
    proponents = sum(len(study.proponents(row)) for row in study.shown)
    assert html.count('data-testid="carried"') == QUICK.shown + proponents
    alts = re.findall(r'data-testid="carried"><img[^>]*?alt="([^"]*)"', html)
    assert len(alts) == QUICK.shown + proponents and all("pushed up sum to +" in alt and "pushed down to" in alt for alt in alts)
    assert html.count('data-testid="overlay"') == 1
    parts = [part for section in page(study).sections for part in section.parts if isinstance(part, report.Attribution)]
    for row, part in zip(study.shown, parts, strict=True):
        np.testing.assert_array_equal(part.query.overlay.values, study.pixels.asked.values[row].sum(0))
        assert f"for class {study.label(row)}" in part.proponents[0].overlay.title and part.opponents[0].overlay is None


def test_the_page_says_how_far_the_pixels_can_be_trusted(study):
    said = " ".join(report.text(page(study)).split())
    assert "Every digit met that." in said and "pixels ▲" in said
    assert f"the change of its log-odds is {100 * study.pixels.gaps.max():.2f} % of the change" in said
    assert f"in random order, {100 * study.pixels.asked.provenance['deletion']['random']:.0f} %" in said
    missed = np.arange(study.pixels.asked.n) != study.shown[0]
    other = replace(study, pixels=replace(study.pixels, asked=replace(study.pixels.asked, converged=missed)))
    said = " ".join(report.text(page(other)).split())
    assert "1 missed that, and is flagged" in said and "⚑ missed the tolerance" in said


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
    assert [line.split(": ")[0] for line in lines[-5:-2]] == [figure.name for figure in headline(study)]
    assert lines[-2] == f"The page: {out / 'report.html'}"
    assert lines[-1].startswith("Next: headwater demo diffusion")
    assert (out / "report.html").read_text() == report.render(page(study))
