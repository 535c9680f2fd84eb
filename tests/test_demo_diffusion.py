"""The diffusion demo, in its quick size: what the page says is what was measured, and measuring again gives the same."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from headwater import cli, report
from headwater.demo.diffusion import QUICK, experiment, headline, measure, page
from headwater.demo.diffusion.experiment import ANY, CATEGORIES, TASK, WARM, emoji
from headwater.demo.diffusion.page import _fewer
from headwater.demo.diffusion.sampling import ddim
from headwater.demo.diffusion.study import EXPECTED, REPLAYED, RETRAC, TOP, Near, _recorded, methods
from headwater.errors import RunError
from headwater.training import Recorder, settled


def silently(_):
    return nullcontext()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def study(out):
    return measure(QUICK, out, silently, progress=False)


@pytest.fixture(scope="module")
def html(study):
    return report.render(page(study))


@pytest.fixture(scope="module")
def said(study):
    return report.text(page(study))


def flat(text):
    return " ".join(text.split())


# ---- generating


class Knows(nn.Module):
    """Answers as if the clean picture were the same always: one for a category, another for any."""

    def __init__(self, pictures, anything):
        super().__init__()
        self.weight, self.pictures, self.anything = nn.Parameter(torch.zeros(())), pictures, anything

    def forward(self, x, t, category):
        clean = torch.where((category == ANY)[:, None, None, None], self.anything, self.pictures[category.clamp_max(ANY - 1)])
        signal, noise = (table[t].to(x)[:, None, None, None] for table in (TASK.process.signal, TASK.process.noise))
        return (signal * x - clean) / noise  # the v that this clean picture amounts to


def test_the_sampler_ends_in_the_picture_that_a_network_is_sure_of():
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    found = ddim(Knows(pictures, torch.zeros(3, 32, 32)), torch.tensor([2, 0]), seed=0, steps=7, guidance=1)
    torch.testing.assert_close(found, pictures[[2, 0]], atol=1e-4, rtol=0)


def test_guidance_goes_beyond_the_category_away_from_any_and_pictures_stay_within_range():
    pictures, anything = torch.full((3, 3, 32, 32), 0.25), torch.full((3, 32, 32), 0.125)
    at_last = ddim(Knows(pictures, anything), torch.tensor([1]), seed=0, steps=5, guidance=3)
    torch.testing.assert_close(at_last, torch.full((1, 3, 32, 32), 0.5), atol=1e-4, rtol=0)  # .125 + 3 (.25 - .125)
    assert ddim(Knows(8 * pictures, anything), torch.tensor([1]), seed=0, steps=5, guidance=3).max() == 1


class Gaussian(nn.Module):
    """The exact answer for pictures of independent normal pixels of variance .04: the clean picture is expected at c x."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, category):
        signal, noise = (table[t].to(x)[:, None, None, None] for table in (TASK.process.signal, TASK.process.noise))
        return (signal * x - 0.04 * signal / (0.04 * signal**2 + noise**2) * x) / noise


def test_every_step_mixes_the_picture_with_the_noise_of_the_next_timestep():
    """A linear network makes the whole way a product: x' = (a' c + s' (1 - a c) / s) x, with signal a and noise s (DDIM, Eq. 12)."""
    a, s = (table.numpy() for table in (TASK.process.signal, TASK.process.noise))
    c, visited, factor = 0.04 * a / (0.04 * a**2 + s**2), [999, 799, 599, 400, 200, 0], 1.0
    for t, after in pairwise(visited):
        factor *= a[after] * c[t] + s[after] * (1 - a[t] * c[t]) / s[t]
    start = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    found = ddim(Gaussian(), torch.tensor([0, 1]), seed=3, steps=6, guidance=2.0)
    torch.testing.assert_close(found, (factor * c[0] * start).clamp(-1, 1), atol=1e-4, rtol=1e-3)
    assert 0.1 < factor * c[0] < 0.3  # near .2, the standard deviation of such pictures


def test_the_pictures_are_those_of_the_recorded_weights(study):
    model = study.run.load(study.run.model(), study.run.checkpoints[-1])
    with settled(0, QUICK.threads):
        again = ddim(model, study.made[1], seed=1, steps=QUICK.steps, guidance=QUICK.guidance)
    torch.testing.assert_close(study.made[0], again, atol=1e-4, rtol=1e-4)
    assert study.made[1].tolist() == [k for k in range(len(CATEGORIES)) for _ in range(QUICK.each)]


# ---- what is measured


def test_a_training_that_was_cut_off_is_done_again_to_the_same_weights(study, tmp_path, monkeypatch):
    step = Recorder.step

    def cut(self, *args, **kwargs):
        if self.taken == 5:
            raise KeyboardInterrupt
        step(self, *args, **kwargs)

    with settled(0, QUICK.threads):
        monkeypatch.setattr(Recorder, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            _recorded(experiment(QUICK), QUICK, tmp_path / "run")
        monkeypatch.setattr(Recorder, "step", step)
        run = _recorded(experiment(QUICK), QUICK, tmp_path / "run")
    assert [run.weights_hash(s) for s in run.checkpoints] == [study.run.weights_hash(s) for s in study.run.checkpoints]


def test_training_lowered_the_loss(study):
    model, x = study.run.model(), TASK.examples(emoji(QUICK)).batch(range(20))
    first, last = (float(TASK.loss(study.run.load(model, step), x).detach().mean()) for step in (study.run.checkpoints[0], study.run.checkpoints[-1]))
    assert last < first - 0.05


def test_scores_are_those_of_the_named_methods_and_kept_apart_by_timestep(study):
    assert [scores.method for scores in study.scores.values()] == [repr(m) for m in methods(QUICK.timesteps).values()]
    for name, scores in study.scores.items():
        assert scores.values.shape == (QUICK.made, QUICK.train) and study.own[name].values.shape == (QUICK.traced, QUICK.train)
        slices = scores.by("timestep")
        assert len(slices) == QUICK.timesteps
        np.testing.assert_allclose(slices.values.sum(0), scores.values, atol=1e-5 * np.abs(scores.values).max())


def test_lists_are_counted_as_by_hand(study):
    for name, scores in study.scores.items():
        tops = [sorted(range(QUICK.train), key=lambda i, row=row: -row[i])[:TOP] for row in scores.values]
        counts = [sum(i in top for top in tops) for i in range(QUICK.train)]
        assert study.lists[name].tolist() == counts
        assert study.top(name, 3) == tops[3]
        found = study.concentration[name]
        assert found["distinct"] == len(set().union(*tops))
        assert found["widespread"] == sum(c >= QUICK.made / 4 for c in counts)
        assert found["busiest"] == max(counts) / QUICK.made
        same = [study.train[1][i] == study.made[1][q] for q, top in enumerate(tops) for i in top]
        assert study.alike(name) == pytest.approx(np.mean(same))
        firsts = [max(range(QUICK.train), key=lambda i, row=row: row[i]) for row in study.own[name].values]
        assert study.itself(name) == np.mean(np.array(firsts) == study.traced)
        assert study.nearest_listed(name) == sum(int(near) in top for near, top in zip(study.near.ids, tops, strict=True))


def test_shares_of_timesteps_are_those_of_the_sizes(study):
    t, y = study.along(REPLAYED)
    sizes = [float(np.abs(values).sum()) for _, values in study.scores[REPLAYED].by("timestep")]
    np.testing.assert_allclose(y, np.array(sizes) / sum(sizes), rtol=1e-4)
    assert t.tolist() == list(TASK.process.strata(QUICK.timesteps))


def norm_of(model, batch):
    loss = TASK.loss(model, batch).sum()
    return float(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm())


def test_norms_are_those_of_autograd(study):
    sizes, run, data = study.norms, study.run, study.run.stages[0].data
    place = 2
    t = int(sizes.timesteps[place])
    for k, step in enumerate(sizes.steps):
        model = run.load(run.model(), step)
        expected = np.mean([norm_of(model, data.over(TASK.grid((t,))).batch([i])) for i in range(QUICK.probed)])
        assert sizes.along[k, place] == pytest.approx(expected, rel=1e-4)
    assert sizes.ratios[1] == pytest.approx(sizes.along[1].max() / sizes.along[1].min())
    met, start, steps = 0.0, 0, run.checkpoints[-1]
    rates = [QUICK.rate * (s + 1) / WARM * (1 + math.cos(math.pi * s / steps)) / 2 for s in range(steps)]
    for step in run.checkpoints[1:]:
        model = run.load(run.model(), step)
        met += sum(rates[start:step]) * norm_of(model, data.over(run.met(run.stages[0], step)).batch([7]))
        start = step
    assert sizes.met[7] == pytest.approx(met, rel=1e-4)


def test_the_nearest_are_those_of_plain_differences(study):
    made, train = ((part[0].numpy() + 1) / 2 for part in (study.made, study.train))
    for row in (0, QUICK.made - 1):
        distances = np.sqrt(((train - made[row]) ** 2).mean((1, 2, 3)))
        assert study.near.ids[row] == distances.argmin()
        assert study.near.distances[row] == pytest.approx(distances.min(), rel=1e-3)
    others = np.sqrt(((train - train[4]) ** 2).mean((1, 2, 3)))
    assert study.near.fellow[4] == pytest.approx(sorted(d for d in others if d > 1e-3)[0], rel=1e-3)
    assert Near(np.array([0, 1]), np.array([0.04, 0.06]), np.array([0.05, 0.1, 0.3])).close.tolist() == [True, False]


def test_what_was_done_is_not_done_again(study, out):
    kept = [file for place in ("run", "scores") for file in (out / place).rglob("*.safetensors")]
    before = [file.stat().st_mtime_ns for file in kept]
    again = measure(QUICK, out, silently, progress=False)
    assert [file.stat().st_mtime_ns for file in kept] == before and len(before) >= 8
    assert report.render(page(again)) == report.render(page(study))


def test_a_directory_of_another_demo_is_refused(study, out):
    with pytest.raises(RunError, match="holds another demo"):
        measure(replace(QUICK, train=50), out, silently, progress=False)


# ---- what the page says


def test_the_page_needs_nothing_else(html):
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert "http" not in html.replace("http-equiv", "")


def test_each_generation_has_its_lists_with_strips_and_counts(study, html):
    parts = [part for section in page(study).sections for part in section.parts if isinstance(part, report.Rankings) and part.query is not None]
    assert len(parts) == QUICK.made and html.count('data-testid="rankings"') == QUICK.made + 3
    for row, part in zip(study.shown, parts, strict=True):
        assert part.beside.cards[0].title == f"#{study.near.ids[row]}"
        assert [ranking.title for ranking in part.rows] == [REPLAYED, EXPECTED, RETRAC]
        for ranking in part.rows:
            ids = study.top(ranking.title, int(row), 8)
            assert [card.title for card in ranking.cards] == [f"#{i}" for i in ids]
            for i, card in zip(ids, ranking.cards, strict=True):
                assert card.strip.values == tuple(study.scores[ranking.title].by("timestep").values[:, row, i])
                count = study.lists[ranking.title][i]
                told = f"{count} of {QUICK.made}"
                assert (card.flag, card.badge) == ((told, None) if count >= QUICK.made / 4 else (None, told))
                assert np.abs(card.image / 255.0 - (study.train[0][i].permute(1, 2, 0).numpy() + 1) / 2).max() < 0.01


def test_the_page_says_what_was_measured(study, said):
    for figure in headline(study):
        assert figure.value in said and figure.note in said
    words = flat(said)
    assert f"largest at timestep {study.norms.peak} of 1,000: {study.norms.ratios[1]:.1f} times" in words
    for name, found in study.concentration.items():
        row = f"{name} {found['distinct']} {found['widespread']} {round(found['busiest'] * QUICK.made)} of {QUICK.made}"
        assert row in words, row
        assert f"{study.by_size(name):+.2f} by {name}".replace("-", "−") in words
    assert f"{study.near.close.sum()} of {QUICK.made} generations are that close" in words
    assert "Twemoji" in words and "CC BY 4.0" in words
    assert re.search(r"▕[ ·+#=%]{3}▏", said)  # a strip of three timesteps


@pytest.mark.parametrize(
    ("plain", "unit", "words"),
    [
        (0, 2, "nothing to remove here"),
        (9, 3, "0.33 times as many: the published third or less"),
        (9, 4, "not the published third"),
        (4, 4, "1.00 times as many: the same"),
        (3, 4, "more than TracIn"),
    ],
)
def test_the_verdict_follows_the_counts(plain, unit, words):
    assert words in _fewer(plain, unit, "With replayed events")


def test_the_command_ends_with_the_figures_and_the_page(study, out):
    done = CliRunner().invoke(cli.app, ["demo", "diffusion", "--quick", "--out", str(out)])
    assert done.exit_code == 0, done.output
    lines = done.stdout.strip().splitlines()
    assert [line.split(": ")[0] for line in lines[-5:-1]] == [figure.name for figure in headline(study)]
    assert lines[-1].startswith(f"The page: {out / 'report.html'}")
    assert (out / "report.html").read_text() == report.render(page(study))
    assert (out / "report.txt").read_text() == report.text(page(study))
    assert "Plan: train 24 steps on 60 emoji" in done.stderr


def test_another_subject_is_refused():
    done = CliRunner().invoke(cli.app, ["demo", "texts"])
    assert done.exit_code == 2 and "diffusion" in done.stderr
