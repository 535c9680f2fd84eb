"""Datamodels: planted effects are found, least squares is the limit, standard errors cover, and a bank is no judge of what it was fitted to."""

import warnings

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.errors import DataMismatch, InputError, QueryError
from headwater.evaluate import Bank, Subsets, halves, lds, leave_out, paired, retrain, slope
from headwater.evaluate.ridge import Gram, chosen_alpha
from headwater.training import Experiment


def planted(effects, subsets, noise=0.0, seeds=1, seed=0):
    """A bank whose measurements are sums of effects (queries, n) plus noise; the models of the full set have none."""
    rng = np.random.default_rng(seed)
    values = subsets.sums(effects)[:, None] + 0.7 + noise * rng.normal(size=(len(subsets), seeds, len(effects)))
    return Bank(subsets, tuple(range(seeds)), values, np.tile(effects.sum(axis=1) + 0.7, (seeds, 1)))


def sizes(n, count, seed=0):
    """Subsets that keep each example with probability 1/2: of several sizes."""
    rng = np.random.default_rng(seed)
    return Subsets(n, tuple(np.flatnonzero(rng.random(n) < 0.5) for _ in range(count)), "each by a coin")


EFFECTS = np.random.default_rng(5).normal(size=(4, 20)) + 0.3


@pytest.mark.parametrize("subsets", [halves(20, 200), sizes(20, 200), leave_out(20, 200, 3)], ids=["halves", "coins", "without 3"])
def test_planted_effects_are_found_with_their_level(subsets):
    found = hw.Datamodel(planted(EFFECTS, subsets)).scores()
    assert np.allclose(found.values, EFFECTS, atol=1e-6) and found.unit == "measurement" and found.stderr.max() < 1e-3
    assert found.provenance["explained"] == pytest.approx(1)


@pytest.mark.parametrize("make", [halves, sizes])
def test_the_limit_is_least_squares(make):
    bank = planted(EFFECTS, make(20, 120), noise=1.0)
    found = hw.Datamodel(bank, alpha=0.0).scores()
    x, y = bank.subsets.mask().astype(float), bank.values.mean(axis=1)
    design = np.column_stack([np.ones(len(x)), x])
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(x) - rank
    noise = ((y - design @ solution) ** 2).sum(axis=0) / freedom
    differences = found.values - found.values.mean(axis=1, keepdims=True)  # halves leave the level to the full models
    assert np.allclose(differences, (solution[1:] - solution[1:].mean(axis=0)).T, atol=1e-9)
    if make is sizes:
        assert np.allclose(found.values, solution[1:].T, atol=1e-9)
        assert np.allclose(found.stderr.T, np.sqrt(np.outer(np.diag(np.linalg.inv(design.T @ design))[1:], noise)), rtol=1e-9)
    tiny = hw.Datamodel(bank, alpha=1e-7).scores()
    assert np.allclose(tiny.values, found.values, atol=1e-6) and np.allclose(tiny.stderr, found.stderr, rtol=0.2)


@pytest.mark.parametrize(("rows", "examples"), [(12, 30), (40, 30)])
def test_the_dual_form_is_ridge(rows, examples):
    rng = np.random.default_rng(0)
    x, y, alpha = rng.normal(size=(rows, examples)), rng.normal(size=(rows, 3)), 0.7
    cx, cy = x - x.mean(0), y - y.mean(0)
    inverse = np.linalg.inv(cx.T @ cx + alpha * np.eye(examples))
    line = Gram.of(x, y).line(alpha)
    assert np.allclose(line.slope, inverse @ cx.T @ cy, atol=1e-10) and np.allclose(line.intercept, y.mean(0) - x.mean(0) @ line.slope)
    freedom = rows - 1 - np.trace(cx @ inverse @ cx.T)
    noise = ((cy - cx @ line.slope) ** 2).sum(0) / freedom
    assert np.allclose(line.stderr, np.sqrt(np.outer(np.diag(inverse), noise)), rtol=1e-8)  # sigma^2 (X'X + alpha)^-1: the posterior


def test_the_penalty_is_the_one_that_predicts_best():
    """The curve of errors on left-out rows, computed plainly."""
    bank = planted(EFFECTS, halves(20, 40), noise=3.0)
    x, y = bank.subsets.mask().astype(float), bank.values.mean(axis=1)
    alpha, explained = chosen_alpha(x, y, 5, 0)
    dealt = np.random.default_rng(0).permutation(40) % 5

    def error(a):
        total, plain = np.zeros(4), np.zeros(4)
        for fold in range(5):
            kept = dealt != fold
            cx = x[kept] - x[kept].mean(0)
            solution = np.linalg.solve(cx.T @ cx + a * np.eye(20), cx.T @ (y[kept] - y[kept].mean(0)))
            total += ((y[~kept] - y[kept].mean(0) - (x[~kept] - x[kept].mean(0)) @ solution) ** 2).sum(0)
            plain += ((y[~kept] - y[kept].mean(0)) ** 2).sum(0)
        return (total / plain).mean()

    assert explained == pytest.approx(1 - error(alpha)) and 0 < explained < 1
    assert error(alpha) <= min(error(alpha / 10), error(alpha * 10), error(alpha * 3), error(alpha / 3))


@pytest.mark.parametrize("count", [15, 60, 200])
def test_standard_errors_cover_also_where_subsets_are_few(count):
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(60, 40))
    found = hw.Datamodel(planted(effects, halves(40, count, seed=1), noise=2.0, seed=count)).scores()
    assert np.isfinite(found.values).all() and np.isfinite(found.stderr).all() and found.stderr.min() > 0
    off = (found.values - effects) / found.stderr
    assert 0.9 < off.std() < (1.4 if count == 15 else 1.15)  # they take the penalty as given: from few subsets it is uncertain too
    assert count > 15 or found.stderr.mean() > 0.6  # 15 subsets say little of 40 examples: most of the width of effects is left


def test_measurements_that_depend_on_nobody_are_told():
    bank = planted(np.zeros((3, 30)), halves(30, 12), noise=1.0, seed=2)
    with pytest.warns(UserWarning, match="no better than their mean"):
        found = hw.Datamodel(bank).scores()
    assert np.abs(found.values).max() < 0.2
    with pytest.warns(UserWarning, match="no better"):
        still = hw.Datamodel(planted(np.zeros((3, 30)), halves(30, 12))).scores()
    assert np.abs(still.values).max() < 1e-12


def test_without_models_of_the_full_set_the_level_is_unknown_and_said_so():
    bank = planted(EFFECTS, halves(20, 200))
    bank.base[:] = np.nan
    found = hw.Datamodel(bank).scores()
    assert np.allclose(found.values, EFFECTS - EFFECTS.mean(axis=1, keepdims=True), atol=1e-6) and "unknown" in found.provenance["level"]


def test_missing_trainings_are_left_out():
    bank = planted(EFFECTS, halves(20, 60), noise=0.5, seeds=2)
    kept = np.delete(np.arange(60), 7)
    truth = hw.Datamodel(bank.take(kept)).scores()
    bank.values[7, 1] = np.nan
    found = hw.Datamodel(bank).scores()
    assert np.array_equal(found.values, truth.values) and found.provenance["subsets"] == 59


def test_wrong_settings_are_refused():
    bank = planted(EFFECTS, halves(20, 10))
    for arguments in (("bank",), (bank, -1.0), (bank, float("inf")), (bank, None, 1)):
        with pytest.raises(InputError, match="To mend it"):
            hw.Datamodel(*arguments)
    with pytest.raises(InputError, match="more subsets than examples"):
        hw.Datamodel(bank, alpha=0.0).scores()


# ------------------------------------------------------------------------------------------------------------------ judging


def test_a_split_has_no_subset_in_common_and_every_one_in_some_part():
    bank = planted(EFFECTS, halves(20, 30), noise=0.5)
    first, second = bank.split(0.7, seed=3)
    assert len(first.subsets) == 21 and not set(first.marks()) & set(second.marks()) and {*first.marks(), *second.marks()} == set(bank.marks())
    place = {mark: i for i, mark in enumerate(bank.marks())}
    assert all(np.array_equal(second.values[i], bank.values[place[mark]]) for i, mark in enumerate(second.marks()))
    for fraction in (0.0, 0.02, 0.98):
        with pytest.raises(InputError, match="two subsets or more"):
            bank.split(fraction)


def test_a_bank_is_warned_of_as_the_judge_of_what_was_fitted_to_it(tmp_path):
    bank = planted(EFFECTS, halves(20, 60), noise=2.0)
    fitted, judging = bank.split(0.5)
    found = hw.Datamodel(fitted).scores()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        honest = lds(found, judging).mean
    kept = hw.load(found.save(tmp_path / "scores.safetensors"))
    for judge in (lambda s: lds(s, fitted), lambda s: slope(s, fitted), lambda s: paired(s, s, fitted), lambda s: lds(s, fitted.at([2, 0, 1, 3]))):
        with pytest.warns(UserWarning, match="30 of the 30 subsets"):
            judge(kept)
    with pytest.warns(UserWarning, match="30 of the 60 subsets"):
        lds(found, bank)
    with pytest.warns(UserWarning, match="30 of the 30"):
        assert lds(found, fitted).mean > honest + 0.02  # which is why


# -------------------------------------------------------------------------------------------------------------- with a run


def data(count, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=g, dtype=torch.float64)
    return x, x.sum(1, keepdim=True) + 0.3 * torch.randn(count, 1, generator=g, dtype=torch.float64)


def build():
    return torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)


def fit(model, train, seed, recorder=None):
    with torch.no_grad():
        model.weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if recorder:
        recorder.watch(model, optimizer, steps=12)
    for _ in range(12):
        optimizer.zero_grad()
        ((model(train[0]) - train[1]) ** 2).sum().mul(1 / 16).backward()
        optimizer.step()
        if recorder:
            recorder.step(range(len(train[0])))
    return model


def output(model, batch):
    return model(batch[0])[:, 0]


TASK = hw.tasks.Task(loss=lambda m, b: (m(b[0])[:, 0] - b[1][:, 0]) ** 2, measure=output)
EXPERIMENT = Experiment(build, data(16, 0), data(5, 1), TASK, fit, "line")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    place = tmp_path_factory.mktemp("datamodel")
    return EXPERIMENT.record(place / "run"), retrain(EXPERIMENT, halves(16, 60, seed=1), 1, workers=1, directory=place / "bank", progress=False)


def ask(run, queries, bank, **settings):
    return hw.trace(run, queries, hw.Datamodel(bank), progress=False, **settings)


def test_it_answers_like_any_method_and_finds_what_retraining_finds(traced):
    run, bank = traced
    fitted, judging = bank.split(0.7)
    found = ask(run, EXPERIMENT.test, fitted)
    assert found.values.shape == (5, 16) and lds(found, judging).mean > 0.85
    assert np.array_equal(found.values, hw.Datamodel(fitted).scores().values) and found.provenance["queries_compared"]
    assert np.array_equal(ask(run, EXPERIMENT.test, Bank.open(bank.directory)).values, ask(run, EXPERIMENT.test, bank).values)
    both = hw.trace(run, EXPERIMENT.test, [hw.GradDot(), hw.Datamodel(fitted)], progress=False)
    assert np.array_equal(both[1].values, found.values) and both[0].method.startswith("GradDot")


def test_some_of_the_queries_are_asked_with_the_bank_cut_alike(traced):
    run, bank = traced
    part = tuple(t[[3, 1]] for t in EXPERIMENT.test)
    found = hw.trace(run, part, hw.Datamodel(bank.at([3, 1]), alpha=1.0), progress=False)
    assert np.allclose(found.values, hw.Datamodel(bank, alpha=1.0).scores().values[[3, 1]], atol=1e-12) and not found.provenance["queries_compared"]
    assert bank.at([3, 1]).at([0]).picked == (3,)


def test_named_queries_are_sums(traced):
    run, bank = traced
    named = [hw.Query("a", tuple(t[:2] for t in EXPERIMENT.test)), hw.Query("b", tuple(t[2:] for t in EXPERIMENT.test))]
    found = hw.trace(run, named, hw.Datamodel(bank, alpha=1.0), progress=False)
    plain = hw.Datamodel(bank, alpha=1.0).scores().values
    assert np.allclose(found.values, [plain[:2].sum(0), plain[2:].sum(0)], atol=1e-12) and found.query_names == ("a", "b")


def test_banks_of_other_experiments_are_refused(traced, tmp_path):
    run, bank = traced
    x, y = EXPERIMENT.test
    cases = [
        (EXPERIMENT.test, planted(EFFECTS, halves(20, 10)), {}, DataMismatch, "20 training examples, and a run of 16"),
        (tuple(t[:4] for t in EXPERIMENT.test), bank, {}, QueryError, "4 queries, and a bank that measured 5"),
        ((x.flip(0), y.flip(0)), bank, {}, QueryError, "other queries than those"),
        (EXPERIMENT.test, bank, {"measure": lambda m, b: -m(b[0])[:, 0]}, QueryError, "another measure"),
    ]
    for queries, given, settings, error, words in cases:
        with pytest.raises(error, match=words):
            ask(run, queries, given, **settings)
    other = Experiment(build, data(16, 9), EXPERIMENT.test, TASK, fit, "line").record(tmp_path / "run")
    with pytest.raises(DataMismatch, match="other examples than the run's"):
        ask(other, EXPERIMENT.test, bank)
    by_hand = Bank(bank.subsets, bank.seeds, bank.values, bank.base)  # knows nothing of its experiment: sizes are all that can be compared
    assert ask(other, EXPERIMENT.test, by_hand).provenance["queries_compared"] is False
