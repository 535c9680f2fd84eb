"""Adapters as members: each is a recorded training of adapters alone, and scores are what autograd gives for those parameters."""

import json
import shutil
import warnings
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import headwater as hw
from headwater.errors import GradientError, InputError, NotFinite
from headwater.influence.trak.method import Trak
from headwater.influence.unrolled.method import Unrolled
from headwater.training import finetune
from headwater.training.adapters import adapters_of, delta, draw, freeze, insert
from tests.influence.brute import Brute, source
from tests.influence.test_laws import ASKED, TASK, TRAIN, build, close, record, sgd, softmax_hessian, values
from tests.influence.test_laws import data as make_data

FAST = {"steps": 12, "batch_size": 10, "lr": 0.02}


def lora(method=None, members=2, **settings):
    return hw.LoraEnsemble(method or hw.GradDot(), members=members, **{**FAST, **settings})


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing here pulls the plug: files need not be forced to the disk one by one."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record(tmp_path_factory.mktemp("lora") / "run", sgd(momentum=0.5, weight_decay=0.01))


@pytest.fixture
def run(recorded, tmp_path):
    """A copy of the recorded run, without anything that was computed from it."""
    ignored = shutil.ignore_patterns("adapters", "members", "factors", "jobs")
    return hw.Run.open(shutil.copytree(recorded.path, tmp_path / "run", ignore=ignored), build=build, train=TRAIN, task=TASK)


def members(ensemble, run):
    """The members' runs, in their own order."""
    return [member.view() for member in ensemble.variants(run)]


def folders(run):
    return sorted((run.path / "adapters").glob("*/adapters.json")) if (run.path / "adapters").exists() else []


# ------------------------------------------------------------------------------------------------- against autograd by hand


def gradients(member, function, batch, step=None):
    """Gradients (n, parameters) with respect to the adapters, one example at a time, and with them alone as free parameters."""
    model = member.load(member.model(), step or member.checkpoints[-1])
    free = {n: p.detach() for n, p in model.named_parameters() if n in member.stages[0].trainable}

    def single(values, row):
        return function(lambda *x: functional_call(model, values, x), tuple(t.unsqueeze(0) for t in row))[0]

    rows = vmap(grad(single), (None, 0))(free, batch)
    return torch.cat([rows[n].flatten(1) for n in free], 1).numpy()


def test_a_members_scores_are_those_of_its_adapters_by_autograd(run):
    (member,) = members(lora(members=1), run)
    assert sorted(member.stages[0].trainable) == ["0.lora.down.weight", "0.lora.up.weight", "2.lora.down.weight", "2.lora.up.weight"]
    u, g = gradients(member, TASK.measure, ASKED), gradients(member, TASK.loss, TRAIN)
    assert u.shape == (6, 4 * 4 + 5 * 4 + 5 * 3 + 3 * 3)  # rank 4 and 3: as much as the layers have
    assert close(values(run, method=lora(members=1)), -u @ g.T / 40, 1e-10)
    norms = np.linalg.norm(u, axis=1)[:, None] * np.linalg.norm(g, axis=1)
    assert close(values(run, method=lora(hw.GradCos(), members=1)), -u @ g.T / norms, 1e-10)
    brute = Brute(member)
    h = brute.gauss_newton(member.weights(member.checkpoints[-1]), TRAIN[0], softmax_hessian)
    truth = -u @ np.linalg.solve(h + 0.01 * np.eye(len(h)), g.T) / 40
    assert close(values(run, method=lora(hw.Influence(damping=0.01, curvature=hw.Dense()), members=1)), truth, 1e-8)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_methods_that_follow_training_follow_that_of_the_adapters(run, optimizer):
    """SOURCE and TracIn on a member equal the formulas with explicit matrices over the adapters' own checkpoints, rates and moments."""
    from headwater.training import segments

    (member,) = members(lora(members=1, optimizer=optimizer), run)
    brute = Brute(member)
    truth = source(brute, TASK.measure, ASKED, segments(member, 3), lambda state, stage: brute.gauss_newton(state, TRAIN[0], softmax_hessian))
    assert close(values(run, method=lora(hw.Source(curvature=hw.Dense()), members=1, optimizer=optimizer)), truth, 1e-8)
    truth, start = 0.0, 0
    for step in member.checkpoints[1:]:
        p = brute.each(member.rates(start, step))
        if optimizer == "adamw":
            p = p / (np.sqrt(brute.flat(member.second_moments(step))) + 1e-8)
        truth, start = truth - (gradients(member, TASK.measure, ASKED, step) * p) @ gradients(member, TASK.loss, TRAIN, step).T / 40, step
    assert close(values(run, method=lora(hw.TracIn(), members=1, optimizer=optimizer)), truth, 1e-8)


def test_trak_averages_kernels_and_weights_of_adapters_apart(run):
    """With a large regularisation, which is relative to the trace, a kernel is that of inner products over the trace, up to a constant."""
    kernels, weights = [], []
    for member in members(lora(members=3), run):
        u, g = gradients(member, TASK.measure, ASKED), gradients(member, TASK.measure, TRAIN)  # of the log-odds, both
        kernels.append(u @ g.T / (g**2).sum())
        weights.append(1 - np.exp(-TASK.loss(member.load(member.model(), member.checkpoints[-1]), TRAIN).detach().numpy()))
    found, truth = values(run, method=lora(Trak(regularisation=1e10), members=3)), np.mean(kernels, 0) * np.mean(weights, 0)
    assert close(found / np.linalg.norm(found), truth / np.linalg.norm(truth), 1e-8)


def test_exact_unrolling_follows_the_training_of_adapters(run):
    """Along the recorded adapters a training repeated with a little more weight on one example ends where the derivative says."""
    (member,) = members(lora(members=1, optimizer="sgd"), run)
    found = values(run, method=lora(Unrolled(), members=1, optimizer="sgd"))
    step = 1e-5

    def ended(weight):
        model = member.load(member.model(), 0)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=FAST["lr"], momentum=0.9)
        for t in range(1, FAST["steps"] + 1):
            ids = torch.from_numpy(member.order(t).astype(np.int64))
            optimizer.zero_grad()
            (TASK.loss(model, tuple(x[ids] for x in TRAIN)) * (1 + (weight - 1) * (ids == 7).double())).mean().backward()
            optimizer.step()
        with torch.no_grad():
            return TASK.measure(model, ASKED).numpy()

    assert any(7 in member.order(t) for t in range(1, FAST["steps"] + 1))
    assert close(found[:, 7], (ended(1 + step) - ended(1 - step)) / (2 * step), 1e-5)


def test_a_merged_member_is_the_model_with_other_weights(run):
    """The same as tracing a run whose recorded final weights are the merged ones, with gradients of everything."""
    (member,) = members(lora(members=1), run)
    model, weights = member.load(member.model(), member.checkpoints[-1]), run.weights(run.checkpoints[-1])
    with torch.no_grad():
        for name, pair in adapters_of(model).items():
            weights[f"{name}.weight"] += delta(model.get_submodule(name), pair)
    last = run.checkpoints[-1]
    other = hw.Run.from_checkpoints(
        run.path.parent / "merged", {last: weights}, build=build, train=TRAIN, task=TASK, optimizer=sgd(momentum=0.5, weight_decay=0.01), batch_size=10
    )
    for method in (hw.GradDot(), hw.Influence(damping=0.01), hw.Influence()):
        assert close(values(run, method=lora(method, members=1, merged=True)), values(other, method=method), 1e-9)
    assert not close(values(run, method=lora(members=1, merged=True)), values(run, method=hw.GradDot()), 0.01)
    assert len(folders(run)) == 1  # the same adapters, merged or not


# ------------------------------------------------------------------------------------------------------------ as an ensemble


@pytest.mark.parametrize("method", [hw.GradDot(), hw.GradCos(), hw.Influence(damping=0.01), hw.TracIn(), hw.Source()], ids=lambda m: type(m).__name__)
def test_scores_are_the_mean_of_members_with_the_error_of_a_mean(run, method):
    found = hw.trace(run, ASKED, lora(method, members=3), progress=False)
    each = np.stack([hw.trace(member, ASKED, method, progress=False).values for member in members(lora(members=3), run)])
    assert close(found.values, each.mean(0), 1e-12)
    assert close(found.stderr, each.std(0, ddof=1) / 3**0.5, 1e-9) and found.stderr.min() > 0
    assert close(values(run, method=lora(method, members=3), batch_size=7), found.values, 1e-9)
    if not isinstance(method, hw.GradCos):
        assert close(values(run, [hw.Query("all", ASKED)], lora(method, members=3))[0], found.values.sum(0), 1e-9)


def test_more_members_cost_only_themselves_and_give_the_same_bits(run, tmp_path, monkeypatch):
    trained = []
    real = finetune._train
    monkeypatch.setattr(finetune, "_train", lambda *args: trained.append(1) or real(*args))
    values(run, method=lora(members=2))
    assert len(trained) == 2
    later = values(run, method=lora(members=3))
    assert len(trained) == 3 and len(folders(run)) == 3
    again = values(run, method=lora(hw.Influence(damping=0.1), members=3))
    assert len(trained) == 3 and not np.array_equal(again, later)
    fresh = hw.Run.open(shutil.copytree(run.path, tmp_path / "fresh", ignore=shutil.ignore_patterns("adapters", "members")), build=build, train=TRAIN, task=TASK)
    assert np.array_equal(values(fresh, method=lora(members=3)), later)
    assert len(trained) == 6


def test_members_reproduce_bit_by_bit_whatever_the_global_generators_hold(run, tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = members(lora(), run)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    fresh = hw.Run.open(shutil.copytree(run.path, tmp_path / "fresh", ignore=shutil.ignore_patterns("adapters")), build=build, train=TRAIN, task=TASK)
    second = members(lora(), fresh)
    for a, b in zip(first, second, strict=True):
        assert a.manifest["checkpoints"] == b.manifest["checkpoints"] and a.manifest["order"] == b.manifest["order"]
    assert first[0].manifest["checkpoints"] != first[1].manifest["checkpoints"]
    assert not np.array_equal(first[0].order(1), first[1].order(1))
    assert np.array_equal(np.sort(np.concatenate([first[0].order(t) for t in range(1, 5)])), np.arange(40))  # once through the examples
    assert members(lora(seed=1), run)[0].manifest["checkpoints"] != first[0].manifest["checkpoints"]


@pytest.mark.parametrize(
    "setting",
    [
        {"rank": 1},
        {"targets": 1},
        {"alpha": 3.0},
        {"steps": 13},
        {"lr": 0.01},
        {"batch_size": 9},
        {"optimizer": "sgd"},
        {"training": True},
        {"seed": 1},
        {"merged": True},
    ],
)
def test_members_of_other_settings_are_others(run, setting):
    assert {m.key for m in lora().variants(run)}.isdisjoint(m.key for m in lora(**setting).variants(run))


def test_a_killed_training_is_begun_again_and_finished_ones_are_kept(run, monkeypatch, capsys):
    whole = values(run, method=lora(members=3))
    shutil.rmtree(run.path / "adapters")
    shutil.rmtree(run.path / "members")
    steps, real = [0], hw.Recorder.step

    def interrupted(self, *args, **settings):
        steps[0] += 1
        if steps[0] == 18:  # within the second member
            raise KeyboardInterrupt
        return real(self, *args, **settings)

    monkeypatch.setattr(hw.Recorder, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        values(run, method=lora(members=3))
    assert len(folders(run)) == 1 and len(list((run.path / "adapters").iterdir())) == 2
    steps[0] = 100
    assert np.array_equal(values(run, method=lora(members=3)), whole)
    assert steps[0] == 124


def test_two_levels_have_adapters_of_every_model(run, tmp_path):
    def other():
        model = build()
        with torch.no_grad():
            model[0].weight.mul_(1.1)
        return model

    second = record(tmp_path / "second", sgd(momentum=0.5, weight_decay=0.01), model=other())
    found = hw.trace(run, ASKED, hw.Ensemble(lora(members=2), [run, second]), progress=False)
    each = [values(r, method=lora(members=2)) for r in (run, second)]
    assert close(found.values, np.mean(each, 0), 1e-12)
    assert close(found.stderr, np.abs(each[0] - each[1]) / 2, 1e-9)
    starts = [member.weights(0)["2.lora.down.weight"] for r in (run, second) for member in members(lora(members=2), r)]
    assert len({float(w[0, 0]) for w in starts}) == 4  # a start of its own for each


# -------------------------------------------------------------------------------------------------------- what a member holds


def test_a_member_is_a_run_of_adapters_alone_and_the_model_stays_as_it_was(run):
    before = {step: run.weights_hash(step) for step in run.checkpoints}
    (member,) = members(lora(members=1), run)
    assert set(member.weights(member.checkpoints[-1])) == member.stages[0].trainable
    assert {step: hw.Run.open(run.path, build=build, train=TRAIN, task=TASK).weights_hash(step) for step in run.checkpoints} == before
    model = member.load(member.model(), 0)
    base = run.load(run.model(), run.checkpoints[-1])
    assert torch.equal(model(ASKED[0]), base(ASKED[0]))  # it begins as the model
    assert all(torch.equal(t, model.get_parameter(n)) for n, t in base.named_parameters())
    assert [s.columns for s in member.stages] == [s.columns for s in run.stages]
    facts = json.loads(folders(run)[0].read_text())
    assert facts["ranks"] == {"0": 4, "2": 3} and all(0.05 < moved < 2 for moved in facts["moved"].values())
    assert all(0 < loss < 1 for loss in facts["loss"]["train"])
    trained = member.load(member.model(), member.checkpoints[-1])
    with torch.no_grad():
        assert float(TASK.loss(trained, TRAIN).mean()) < float(TASK.loss(base, TRAIN).mean())


def test_a_run_that_is_recorded_anew_leaves_no_adapters_of_the_old_one(run):
    values(run, method=lora(members=1))
    assert (run.path / "adapters").exists() and (run.path / "members").exists()
    again = record(run.path, sgd(), steps=4, overwrite=True)
    assert not (again.path / "adapters").exists() and not (again.path / "members").exists()
    values(again, method=lora(members=1))
    assert len(folders(again)) == 1


def with_norm():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(a=nn.Linear(4, 6), norm=nn.BatchNorm1d(6), relu=nn.Tanh(), drop=nn.Dropout(0.5), b=nn.Linear(6, 3))).double()


def test_dropout_and_batch_statistics_stand_still_unless_they_are_asked_for(tmp_path):
    run = record(tmp_path / "run", sgd(), model=with_norm())
    still, alive = (members(lora(members=1, training=training), run)[0] for training in (False, True))
    assert set(still.weights(still.checkpoints[-1])) == still.stages[0].trainable
    moving = alive.weights(alive.checkpoints[-1])
    assert not torch.equal(moving["norm.running_mean"], run.weights(run.checkpoints[-1])["norm.running_mean"])
    assert alive.model().training is False
    model = alive.load(alive.model(), alive.checkpoints[-1])
    assert torch.equal(model.norm.running_mean, moving["norm.running_mean"])
    shutil.rmtree(run.path / "adapters")
    torch.manual_seed(3)
    assert members(lora(members=1, training=True), run)[0].manifest["checkpoints"] == alive.manifest["checkpoints"]


# ------------------------------------------------------------------------------------------------------------ several stages


@pytest.fixture
def staged(tmp_path):
    model, first = build(), make_data(20, 7)
    recorder = hw.Recorder(tmp_path / "staged", model, optimizer := sgd()(model), task=TASK, train=first, steps=6, stage="pretraining")
    for stage, batch in (("pretraining", first), ("tuning", TRAIN)):
        if stage == "tuning":
            recorder.stage("tuning", train=TRAIN, optimizer=optimizer, steps=6)
        for _ in range(6):
            optimizer.zero_grad()
            TASK.loss(model, batch).mean().backward()
            optimizer.step()
            recorder.step(range(len(batch[0])))
    return recorder.finish()


def test_all_stages_are_columns_whichever_adapters_are_trained_on(staged):
    """Trained on the last stage alone, earlier stages' examples are scored at the trained adapters."""
    first = make_data(20, 7)
    (last,), (both,) = (members(lora(members=1, stages=stages), staged) for stages in ("last", "all"))
    assert [s.name for s in last.stages] == [s.name for s in both.stages] == ["pretraining", "tuning"]
    assert [s.stop - s.start for s in last.stages] == [1, 12] and [s.stop - s.start for s in both.stages] == [12, 12]
    assert [s.columns for s in last.stages] == [range(20), range(20, 60)]
    assert max(last.rates(0, 1).values()) == 0 and torch.equal(last.weights(1)["0.lora.down.weight"], last.weights(0)["0.lora.down.weight"])
    for stages, member in (("last", last), ("all", both)):
        found = values(staged, method=lora(members=1, stages=stages))
        u = gradients(member, TASK.measure, ASKED)
        truth = np.concatenate([-u @ gradients(member, TASK.loss, batch).T / len(batch[0]) for batch in (first, TRAIN)], 1)
        assert close(found, truth, 1e-10)


def test_following_training_needs_adapters_of_all_stages(staged):
    for method in (hw.TracIn(), hw.Source(segments=2), Unrolled()):
        with pytest.raises(InputError, match=r"adapters trained on the last of 2 stages(.|\n)*stages='all'"):
            values(staged, method=lora(method, members=1))
        found = values(staged, method=lora(method, members=1, stages="all"))
        assert found.shape == (6, 60) and np.abs(found[:, :20]).min() > 0
    assert values(staged, method=lora(hw.Influence(), members=1)).shape == (6, 60)


# -------------------------------------------------------------------------------------------------------------- other models


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 4, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x.view(-1, 1, 2, 2))).flatten(1))


def test_convolutions_are_adapted_too(tmp_path):
    run = record(tmp_path / "run", sgd(), model=Convolutions().double(), steps=10)
    found = hw.trace(run, ASKED, lora(), progress=False)
    assert set(found.provenance["coverage"].values()) == {"Conv2d", "Linear"}
    u, g = (np.stack([gradients(m, f, b) for m in members(lora(), run)]) for f, b in ((TASK.measure, ASKED), (TASK.loss, TRAIN)))
    assert close(found.values, -np.mean([a @ b.T for a, b in zip(u, g, strict=True)], 0) / 40, 1e-10)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A tiny GPT-2 recorded for a few steps: the run and its data."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False)
    model, tokens = transformers.GPT2LMHeadModel(config).double().eval(), torch.randint(0, 11, (12, 6))
    data, task = {"input_ids": tokens, "labels": tokens}, hw.tasks.Language()
    return fitted(tmp_path_factory.mktemp("language") / "run", model, data, task), data


def fitted(path, model, data, task):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    recorder = hw.Recorder(path, model, optimizer, task=task, train=data, steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        task.loss(model, data).mean().backward()
        optimizer.step()
        recorder.step(range(12))
    return recorder.finish()


def test_a_transformer_is_adapted_through_peft_as_by_our_own(language):
    run, data = language
    some = {k: v[:3] for k, v in data.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = hw.trace(run, some, lora(members=1, targets="c_attn", rank=2), progress=False)
    ours = hw.trace(run, some, lora(members=1, targets="c_attn", rank=2, through="hooks"), progress=False)
    assert set(theirs.provenance["coverage"]) == {f"transformer.h.0.attn.c_attn.lora_{k}.default.weight" for k in "AB"}
    assert set(theirs.provenance["coverage"].values()) == set(ours.provenance["coverage"].values()) == {"Linear"}
    assert close(theirs.values, ours.values, 1e-9) and np.abs(ours.values).min() > 0
    merged = [values(run, some, lora(members=1, targets="c_attn", rank=2, through=through, merged=True)) for through in ("peft", "hooks")]
    assert close(*merged, 1e-9) and not close(merged[0], ours.values, 0.1)


def test_peft_is_for_any_model_that_asks_for_it(run):
    pytest.importorskip("peft")
    theirs = hw.trace(run, ASKED, lora(members=1, through="peft"), progress=False)
    assert set(theirs.provenance["coverage"]) == {f"{layer}.lora_{part}.default.weight" for layer in "02" for part in "AB"}
    assert close(theirs.values, values(run, method=lora(members=1)), 1e-9)


def test_a_users_own_peft_training_needs_nothing(language, tmp_path):
    """A model that was trained with peft, whose adapters alone are trained: exact rules, and what autograd gives."""
    import peft

    run, data = language
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft still asks transformers by an old name
        model = peft.get_peft_model(run.load(run.model(), 4), peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))
    own = fitted(tmp_path / "peft", model, data, hw.tasks.Language())
    found = hw.trace(own, {k: v[:3] for k, v in data.items()}, hw.GradDot(), progress=False)
    assert set(found.provenance["coverage"].values()) == {"Linear"} and len(found.provenance["coverage"]) == 4
    task, model = own.stages[0].task, own.load(own.model(), 4)
    free = [p for n, p in model.named_parameters() if n in own.stages[0].trainable]

    def by_hand(function, i):
        return torch.cat([g.flatten() for g in torch.autograd.grad(function(model, {k: v[i : i + 1] for k, v in data.items()})[0], free)])

    u, g = (torch.stack([by_hand(f, i) for i in range(n)]) for f, n in ((task.measure, 3), (task.loss, 12)))
    assert close(found.values, (-u @ g.T / 12).numpy(), 1e-9)


# ------------------------------------------------------------------------------------------------------------- what is told


def test_what_will_be_trained_is_told_before_it_starts(run, capsys):
    hw.trace(run, ASKED, lora(members=3))
    said = capsys.readouterr().err
    assert "3 of 3 adapters to train, 12 steps each: about" in said and "each 60 parameters in 2 layers" in said
    assert said.count("adapters to train") == 1
    hw.trace(run, ASKED, lora(hw.GradCos(), members=3))
    assert "to train" not in capsys.readouterr().err
    hw.trace(run, ASKED, lora(hw.TracIn(), members=4))
    assert "1 of 4 adapters to train" in capsys.readouterr().err
    hw.trace(run, ASKED, lora(seed=9), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"members": 0}, "members=0"),
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"stages": "first"}, "stages='first'"),
        ({"through": "magic"}, "through='magic'"),
        ({"method": hw.Influence(damping=(0.1, 1.0))}, "a sweep of 2 dampings"),
        ({"method": hw.GradDot}, "construct it"),
    ],
)
def test_bad_settings_are_refused_when_they_are_said(settings, said):
    with pytest.raises(InputError, match=said):
        lora(**settings)


def test_bad_choices_are_refused_before_anything_is_trained(run):
    for settings, said in (
        ({"rank": 5}, "rank=5 for the layer '0', whose weight is 5 x 4"),
        ({"targets": "fc"}, r"matches no layer\n.*\['0', '2'\]"),
        ({"merged": True, "method": hw.Source()}, "merged adapters"),
        ({"merged": True, "method": Unrolled()}, "merged adapters"),
    ):
        with pytest.raises(InputError, match=said):
            values(run, method=lora(**settings))
    assert folders(run) == []


def own(measure=None, sample=None):
    """A classification as a task of plain functions: it knows no output function, and draws no labels."""
    return hw.tasks.Task(loss=TASK.loss, measure=measure or TASK.measure, sample=sample)


class Counted:
    """A build() that counts how often the model's forward pass is run."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self):
        model = build()
        model.register_forward_hook(lambda *_: self.calls.append(1))
        return model


REFUSED = [
    (Trak(), own(), "a Task without a known output function"),
    (Trak(output=lambda model, batch: model(batch[0])[:, 0]), own(), "of which the loss is no function"),
    (hw.Influence(damping=0.1, curvature=hw.EKFAC(fisher="sampled")), own(), "without sample="),
    (hw.Source(curvature=hw.EKFAC(fisher="exact")), own(), "does not know its outputs"),
    (hw.LoGra(), own(), "without sample="),
    (Unrolled(weigh=hw.weigh.tokens()), TASK, "tokens of the task"),
    (Unrolled(weigh=hw.weigh.groups(["a", "b"])), TASK, "2 labels for 40"),
    (hw.Representations(layer="nowhere"), TASK, "layer='nowhere'"),
    (hw.KNNShapley(layer="nowhere"), TASK, "layer='nowhere'"),
    (hw.floors.same_label(), hw.tasks.Regression(), "classes"),
]


@pytest.mark.parametrize(
    ("ensemble", "method", "task", "said"),
    [(kind, *case) for kind in ("lora", "merged", "runs") for case in REFUSED if kind != "merged" or not isinstance(case[0], hw.Source | Unrolled)],
    ids=repr,
)
def test_a_method_that_cannot_work_is_refused_before_anything_is_trained(ensemble, method, task, said, run):
    """At the price of a few forward passes (an ensemble of adapters looks for their layers too), and with nothing written."""
    calls: list[int] = []
    numbers = isinstance(task, hw.tasks.Regression)
    train, asked = ((x, nn.functional.one_hot(y, 3).double()) if numbers else (x, y) for x, y in (TRAIN, ASKED))
    again = replace(run, build=Counted(calls), stages=(replace(run.stages[0], data=hw.tasks.Examples(train), task=task),))
    before = sorted(again.path.rglob("*"))
    made = hw.Ensemble(method, [again]) if ensemble == "runs" else lora(method, merged=ensemble == "merged")
    with pytest.raises(hw.HeadwaterError, match=said) as caught:
        values(again, asked, method=made)
    assert any("tried before any of its members was computed" in note for note in caught.value.__notes__)
    assert sorted(again.path.rglob("*")) == before and len(calls) <= 8


def test_an_exact_kernel_without_room_is_refused_before_anything_is_trained(run):
    """60 parameters of adapters are more than 40 examples, so that the matrix of all pairs would be needed; the same at rank 1 are fewer."""
    with pytest.raises(InputError, match="the exact kernel of 40 training examples"):
        values(run, method=lora(Trak()), memory=20 * 40**2 - 1)
    assert folders(run) == []
    assert values(run, method=lora(Trak(), rank=1), memory=20 * 40**2 - 1).shape == (6, 40)


def test_a_diverging_training_says_what_to_lower(run):
    with pytest.raises(NotFinite, match=r"step \d+ of training adapters \(stage 'train', lr=1e\+200\)"):
        values(run, method=lora(optimizer="sgd", lr=1e200))
    assert folders(run) == []


def test_a_model_that_diverged_is_not_blamed_on_its_adapters(tmp_path):
    run = record(tmp_path / "run", sgd(lr=1e308), steps=4)
    with pytest.raises(NotFinite, match=r"at step 4 of .*, before any adapter is trained"):
        values(run, method=lora())


def test_a_module_used_twice_has_one_adapter(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.same = nn.Linear(4, 4)
            self.again, self.head = self.same, nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.again(torch.tanh(self.same(x)))))

    run = record(tmp_path / "run", sgd(), model=Twice().double(), steps=6)
    (member,) = members(lora(members=1), run)
    u, g = gradients(member, TASK.measure, ASKED), gradients(member, TASK.loss, TRAIN)
    assert u.shape[1] == 32 + 21 and close(values(run, method=lora(members=1)), -u @ g.T / 40, 1e-10)


def test_adapters_that_cannot_be_trained_are_refused(tmp_path):
    """A layer that the forward pass calls, on which the loss does not depend: no step would ever move its adapter."""

    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.head, self.aside, self.dead = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x):
            self.aside(x)
            return self.head(x) + 0 * self.dead(x)

    run = record(tmp_path / "run", lambda m: torch.optim.SGD(m.head.parameters(), lr=0.1), model=Aside().double(), steps=4)
    with pytest.raises(GradientError, match=r"adapters of \['aside'\], on which the loss does not depend"):
        values(run, method=lora())
    with pytest.raises(GradientError, match="adapters that were never trained, after 12 steps"):
        values(run, method=lora(targets="dead"))
    assert close(values(run, method=lora(targets=("head", "dead"))), values(run, method=lora(targets="head")), 1e-12)


def test_a_run_whose_adapters_were_never_trained_is_refused(tmp_path):
    def adapted():
        model = draw(insert(build(), {"0": 2, "2": 2}), 0)
        freeze(model)
        return model

    def still(model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    run = record(tmp_path / "run", still, model=adapted(), steps=4)
    with pytest.raises(GradientError, match="2 adapters that were never trained, at the final weights of"):
        values(run, method=hw.GradDot())
