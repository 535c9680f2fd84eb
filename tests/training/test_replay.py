"""A recorded training, repeated: torch.optim's own numbers to the last bit, and where it departs the error says when and what escaped."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import MissingCheckpoint, NotFinite, ReplayMismatch, RunError
from headwater.training.replay import Adam, Replay, Script, Sgd
from headwater.training.watching import Ears

TASK = hw.tasks.Classification()


def data(n=40, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return x, (x[:, :3] + 0.3 * torch.randn(n, 3, generator=g)).argmax(1)


TRAIN = data()


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def dropping():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def sgd(**settings):
    return lambda model: torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})


def mean_loss(model, batch):
    return TASK.loss(model, batch).mean()


def train(
    path, build=plain, optimizer=None, *, steps=12, batch=10, loss=mean_loss, task=TASK, before=None, between=None, clip=None, note=True, ids_of=None, **rest
):
    """A user's loop, with places to put what a record may miss. ``note``: whether the loss is recorded."""
    model = build()
    moved = (optimizer or sgd())(model)
    recorder = hw.Recorder(path, model, moved, task=task, train=TRAIN, steps=steps, checkpoints=3, **rest)
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    for k in range(steps):
        ids = torch.randperm(len(TRAIN[0]), generator=g)[:batch]
        if before is not None:
            before(model, k)
        moved.zero_grad()
        value = loss(model, tuple(t[ids] for t in TRAIN))
        value.backward()
        factor = 1.0
        if clip is not None:
            factor = clip(model)
        moved.step()
        if between is not None:
            between(model, k)
        recorder.step(ids if ids_of is None else ids_of(k), clip=factor, loss=value if note else None)
    return recorder.finish()


def clipped(model, most=0.3):
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return float(torch.clamp(most / (total + 1e-6), max=1.0))


# ---------------------------------------------------------------------------------------------- single steps are torch.optim's

RULES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}, Sgd(0.1)),
    "decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.2}, Sgd(0.1, decay=0.2)),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.2}, Sgd(0.1, 0.9, 0.3, False, 0.2)),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2}, Sgd(0.1, 0.9, 0.0, True, 0.2)),
    "adam": (torch.optim.Adam, {"lr": 0.1}, Adam(0.1, 0.9, 0.999, 1e-8)),
    "adam, decay": (torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.2}, Adam(0.1, 0.8, 0.95, 1e-8, 0.2)),
    "amsgrad": (torch.optim.Adam, {"lr": 0.1, "betas": (0.8, 0.9), "amsgrad": True}, Adam(0.1, 0.8, 0.9, 1e-8, amsgrad=True)),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.2}, Adam(0.1, 0.9, 0.999, 1e-3, 0.2, True)),
}


@pytest.mark.parametrize("name", RULES)
def test_a_step_is_torchs_to_the_last_bit(name):
    kind, settings, rule = RULES[name]
    g = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(50, generator=g))
    optimizer = kind([weight], **settings, foreach=False)
    mine, moments = weight.detach().clone(), rule.empty(weight.detach())
    for count in range(1, 8):
        weight.grad = torch.randn(50, generator=g) * 3.0 ** -count  # shrinking: AMSGrad's maxima then differ from the averages
        mine, moments = rule.forward(mine, moments, count, weight.grad.clone())
        optimizer.step()
        assert torch.equal(mine, weight)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("count", [1, 3])
def test_its_transpose_is_autograds(name, count):
    rule, g = RULES[name][2], torch.Generator().manual_seed(count)
    draw = lambda: torch.randn(9, generator=g, dtype=torch.float64)  # noqa: E731
    moments = {key: (draw() ** 2 + 0.01) * (count > 1) for key in rule.empty(draw())}
    inputs = [draw(), draw(), *moments.values()]

    def step(weight, gradient, *held):
        after, new = rule.forward(weight, dict(zip(moments, held, strict=True)), count, gradient)
        return (after, *(new.get(key, held[k]) for k, key in enumerate(moments)))

    cotangents = [torch.stack([draw(), draw()]) for _ in range(1 + len(moments))]
    upon, held, pull = rule.backward(inputs[0], moments, count, inputs[1], cotangents[0], dict(zip(moments, cotangents[1:], strict=True)))
    for q in range(2):
        _, truth = torch.autograd.functional.vjp(step, tuple(inputs), tuple(c[q] for c in cotangents))
        found = [upon[q], pull[q], *(held[key][q] for key in moments)]
        for a, b in zip(found, truth, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_an_entry_that_never_had_a_gradient_has_a_finite_derivative():
    """Adam's root has none at v = 0; the update does: ``- rate / eps`` times the share of the new gradient, bias corrected."""
    rule, zero = Adam(0.1, 0.9, 0.999, 1e-3), torch.zeros(1, dtype=torch.float64)
    _, _, pull = rule.backward(zero, rule.empty(zero), 1, zero, torch.ones(1, 1, dtype=torch.float64), {k: torch.zeros(1, 1) for k in rule.empty(zero)})
    h = 1e-12
    truth = (rule.forward(zero, rule.empty(zero), 1, zero + h)[0] - rule.forward(zero, rule.empty(zero), 1, zero - h)[0]) / (2 * h)
    assert float(pull) == pytest.approx(-0.1 / 1e-3) and float(pull) == pytest.approx(float(truth), rel=1e-6)


# --------------------------------------------------------------------------------------------------- whole trainings, bit for bit


def two_groups(model):
    return torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.02, "momentum": 0.5}, {"params": model[2].parameters(), "weight_decay": 0.1}], lr=0.1)


def cycled(model):
    """OneCycle moves Adam's beta1 at every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=13)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


TRAININGS = {
    "SGD": {},
    "momentum": {"optimizer": sgd(momentum=0.9, dampening=0.1, weight_decay=0.01)},
    "Nesterov": {"optimizer": sgd(momentum=0.9, nesterov=True)},
    "two groups": {"optimizer": two_groups},
    "Adam": {"optimizer": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1)},
    "AdamW": {"optimizer": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)},
    "AMSGrad": {"optimizer": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True, betas=(0.5, 0.6))},
    "a cycle of rates and betas": {"optimizer": cycled},
    "summed losses": {"loss": lambda m, b: TASK.loss(m, b).sum(), "reduction": "sum", "optimizer": sgd(lr=0.01)},
    "clipping": {"clip": clipped},
    "dropout": {"build": dropping},
    "BatchNorm": {"build": normed},
    "evaluation mode": {"build": dropping, "before": lambda m, k: m.eval()},
    "a mode that changes": {"build": normed, "before": lambda m, k: m.train(k % 3 != 0)},
    "autocast": {"loss": lambda m, b: torch.autocast("cpu", torch.bfloat16)(mean_loss)(m, b)},
    "an unused layer": {"build": lambda: nn.Sequential(plain(), nn.Identity()).append(nn.Identity()), "optimizer": sgd(momentum=0.5, weight_decay=0.1)},
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_replay_meets_every_checkpoint_to_the_last_bit(kind, tmp_path):
    run = train(tmp_path / "run", **TRAININGS[kind])
    report = Replay(run).check()
    assert report["bit_for_bit"] and report["checkpoints"] == [4, 8, 12] and report["norms"] == 12
    assert report["losses_apart"] <= 1e-6


def test_a_parameter_without_a_gradient_is_not_decayed(tmp_path):
    """As in torch, which skips it: the second layer is used in every other step only."""

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.turn = nn.Linear(4, 3), nn.Linear(4, 3), 0

        def forward(self, x):
            return self.a(x) + self.b(x) if float(x[0, 0]) > 0 else self.a(x)

    run = train(tmp_path / "run", Skipping, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.3))
    replay = Replay(run)
    assert replay.check()["bit_for_bit"]
    assert {frozenset(idle) for idle in replay.player.idle.values()} == {frozenset(), frozenset({"b.weight", "b.bias"})}


def micro(model, optimizer, ids, count):
    """One step in micro-batches, accumulated."""
    optimizer.zero_grad()
    for part in ids.chunk(count):
        (mean_loss(model, tuple(t[part] for t in TRAIN)) / count).backward()
    optimizer.step()


@pytest.mark.parametrize("build", [plain, dropping, normed])
def test_micro_batches_are_replayed_as_they_were(build, tmp_path):
    """Each with its own dropout mask, and its own statistics."""
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, steps=6)
    g = torch.Generator().manual_seed(3)
    for _ in range(6):
        ids = torch.randperm(40, generator=g)[:12]
        micro(model, optimizer, ids, 4)
        recorder.step(ids)
    run = recorder.finish()
    assert [(p.start, p.stop) for p in Script(run).move(1).parts] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert Replay(run).check()["bit_for_bit"]


def test_several_stages_begin_with_optimizers_of_their_own(tmp_path):
    model = dropping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, steps=5)
    second = data(20, 7)
    for k in range(10):
        if k == 5:
            optimizer = torch.optim.AdamW(model[3].parameters(), lr=0.01)
            recorder.stage("fine", train=second, optimizer=optimizer, steps=5)
        held = TRAIN if k < 5 else second
        optimizer.zero_grad()
        mean_loss(model, tuple(t[k : k + 8] for t in held)).backward()
        optimizer.step()
        recorder.step(range(k, k + 8))
    run = recorder.finish()
    assert Replay(run).check()["bit_for_bit"]
    opened = hw.Run.open(run.path, build=dropping, train={"train": TRAIN, "fine": second}, task=TASK)
    assert Replay(opened).check()["bit_for_bit"]


@pytest.mark.parametrize("kind", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True)])
def test_an_optimizer_that_had_taken_steps_before_is_remembered(kind, tmp_path):
    model = plain()
    optimizer = kind(model.parameters())
    micro(model, optimizer, torch.arange(8), 1)
    run = train(tmp_path / "run", lambda: model, lambda m: optimizer)
    assert Replay(run).check()["bit_for_bit"]
    (run.path / "optimizer" / "0.safetensors").unlink()
    with pytest.raises(RunError, match="is missing"):
        Replay(run).check()


def test_a_step_that_a_scaler_skipped_moves_nothing(tmp_path):
    model = plain()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, steps=6)
    for k in range(6):
        optimizer.zero_grad()
        mean_loss(model, tuple(t[k : k + 8] for t in TRAIN)).backward()
        if k != 2:
            optimizer.step()
        recorder.step(range(k, k + 8))
    run = recorder.finish()
    assert [move.moved for move in Script(run)] == [True, True, False, True, True, True]
    assert Replay(run).check()["bit_for_bit"]


def test_a_rate_of_zero_still_moves_the_moments(tmp_path):
    """A warm-up from 0 is no skipped step."""
    run = train(tmp_path / "run", optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=0.0), before=None, between=None)
    assert all(move.moved for move in Script(run)) and Replay(run).check()["bit_for_bit"]


def test_other_weights_are_those_of_a_loop_that_has_them(tmp_path):
    """Weight 0 along the same batches: the examples of one class left out, the normaliser kept."""
    weights = (TRAIN[1] != 2).float()
    run = train(tmp_path / "run", optimizer=sgd(momentum=0.9))
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    g = torch.Generator().manual_seed(3)
    for _ in range(12):
        ids = torch.randperm(40, generator=g)[:10]
        optimizer.zero_grad()
        ((weights[ids] * TASK.loss(model, tuple(t[ids] for t in TRAIN))).sum() / 10).backward()
        optimizer.step()
    found = Replay(run).train(weights)
    assert all(torch.allclose(found[n], p, atol=1e-6) for n, p in model.state_dict().items())
    assert all(torch.equal(t, run.weights(12)[n]) for n, t in Replay(run).train().items())


def test_the_generators_are_left_as_they_were(tmp_path):
    run = train(tmp_path / "run", dropping)
    torch.manual_seed(11)
    expected, threads = torch.get_rng_state(), torch.get_num_threads()
    Replay(run).check()
    Replay(run).train()
    assert torch.equal(expected, torch.get_rng_state()) and torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------------------------------ what is recorded


def test_recording_changes_nothing(tmp_path):
    """Neither the weights nor the random numbers of the training."""
    run = train(tmp_path / "run", dropping)
    model = dropping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    g = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    for _ in range(12):
        ids = torch.randperm(40, generator=g)[:10]
        optimizer.zero_grad()
        mean_loss(model, tuple(t[ids] for t in TRAIN)).backward()
        optimizer.step()
    assert all(torch.equal(p, run.weights(12)[n]) for n, p in model.state_dict().items())


def test_random_numbers_are_kept_only_where_they_were_drawn(tmp_path):
    assert not Script(train(tmp_path / "plain")).draws and not (np.load(tmp_path / "plain" / "random.npy")).size
    assert len(np.load((train(tmp_path / "dropping", dropping)).path / "random.npy")) == 12
    evaluated = train(tmp_path / "mixed", dropping, before=lambda m, k: m.train(k % 2 == 0))
    assert [move.parts[0].random is not None for move in Script(evaluated)] == [True, False] * 6


def test_a_validation_between_steps_is_not_heard(tmp_path):
    def validate(model, k):
        model.eval()
        with torch.no_grad():
            model(TRAIN[0])
        model.train()

    run = train(tmp_path / "run", dropping, between=validate)
    assert Replay(run).check()["bit_for_bit"]


def test_the_ears_stay_behind_when_a_model_is_copied_or_pickled():
    model = plain()
    ears = Ears(model)
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, thawed):
        other(TRAIN[0])
    assert ears.heard == []
    model(TRAIN[0])
    assert [batch for batch, *_ in ears.heard] == [40]
    ears.release()
    model(TRAIN[0])
    assert len(ears.heard) == 1


def test_the_finished_model_has_no_ears(tmp_path):
    run = train(tmp_path / "run")
    assert not run.model()._forward_hooks and not run.model()._forward_pre_hooks


# ------------------------------------------------------------------------------------------------ runs that were recorded before


def forget(run, *, groups=True):
    """The run as an older version would have left it."""
    path = run.path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["replay"]
    for stage in manifest["stages"]:
        stage.pop("remembered")
        for group in stage["optimizer"]["groups"]:
            del group["beta1"], group["amsgrad"]
    path.write_text(json.dumps(manifest))
    return hw.Run.open(run.path, build=plain, train=TRAIN, task=TASK)


def test_an_older_run_opens_scores_and_is_replayed_where_it_holds_enough(tmp_path):
    run = forget(train(tmp_path / "run", optimizer=sgd(momentum=0.9)))
    assert hw.trace(run, TRAIN, hw.TracIn(), progress=False).values.shape == (40, 40)
    report = Replay(run).check()
    assert report["bit_for_bit"] and report["norms"] == 0 and report["losses_apart"] is None


def test_an_older_run_of_adam_is_refused_by_name(tmp_path):
    run = forget(train(tmp_path / "run", optimizer=lambda m: torch.optim.Adam(m.parameters())))
    with pytest.raises(RunError, match="beta1"):
        Replay(run)


# ------------------------------------------------------------------------------------------------------------- what escaped


class Jittering(torch.utils.data.Dataset):
    """Random augmentation."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return TRAIN[0][i] + 0.1 * torch.randn(4), TRAIN[1][i]


def clip_quietly(model):
    clipped(model)
    return 1.0


def penalised(model, batch):
    return mean_loss(model, batch) + 0.05 * sum((p**2).sum() for p in model.parameters())


def hidden_penalty(model, batch):
    """The gradient of a penalty that the loss does not show."""
    penalty = 0.05 * sum((p**2).sum() for p in model.parameters())
    return mean_loss(model, batch) + penalty - penalty.detach()


class Called(nn.Module):
    """A model whose forward is not what the loop calls."""

    def __init__(self):
        super().__init__()
        self.inner = dropping()

    def forward(self, x):
        return self.inner(x)


def by_parts(model, batch):
    return mean_loss(model.inner, batch)


class Turned(nn.Module):
    """As Called, with a norm and no dropout."""

    def __init__(self):
        super().__init__()
        self.inner = normed()

    def forward(self, x):
        return self.inner(x)


def in_micro_batches(model, batch):
    return sum(mean_loss(model.inner, tuple(t[k : k + 5] for t in batch)) for k in (0, 5)) / 2


class TurnsBack(nn.Module):
    """Its inner model is in eval mode while it is trained, and in training mode when the recorder looks."""

    def __init__(self):
        super().__init__()
        self.inner = normed()

    def forward(self, x):
        return self.inner(x)


def turned_back(model, batch):
    model.inner.eval()
    value = mean_loss(model.inner, batch)
    model.inner.train()
    return value


class Swaying(nn.Module):
    """A kernel that gives another result at every call."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.inner = plain()

    def forward(self, x):
        Swaying.calls += 1
        return self.inner(x) * (1 + 0.01 * (Swaying.calls % 7))


def scaled_up(model, batch):
    return sum(mean_loss(model, tuple(t[k : k + 5] for t in batch)) for k in (0, 5))


def rescale(model, k):
    if k == 6:
        with torch.no_grad():
            model[0].weight.mul_(0.5)


ESCAPES = {
    "dropout": ({"build": Called, "loss": by_parts}, 1),
    "mode": ({"build": TurnsBack, "loss": turned_back}, 1),
    "batchnorm": ({"build": Turned, "loss": in_micro_batches}, 1),
    "clipping": ({"clip": clip_quietly}, None),
    "reduction": ({"loss": lambda m, b: TASK.loss(m, b).sum(), "optimizer": sgd(lr=0.01)}, 1),
    "scale": ({"loss": scaled_up}, 1),
    "order": ({"ids_of": lambda k: (np.arange(10) + 10 * k) % 40}, 1),
    "weights": ({"between": rescale}, 8),
    "kernels": ({"build": Swaying}, None),
    "loss": ({"loss": penalised}, 1),
    "penalty": ({"loss": hidden_penalty}, 1),
    "autocast": ({"build": lambda: nn.Sequential(plain()), "loss": lambda m, b: torch.autocast("cpu", torch.bfloat16)(mean_loss)(m[0], b)}, 1),
}


@pytest.mark.parametrize("what", ESCAPES)
def test_the_error_names_the_step_and_what_escaped(what, tmp_path):
    settings, step = ESCAPES[what]
    run = train(tmp_path / "run", **settings)
    with pytest.raises(ReplayMismatch) as caught:
        Replay(run).check()
    assert caught.value.escaped[0] == what, str(caught.value)
    assert step is None or caught.value.steps == (step, step)


@pytest.mark.parametrize(("what", "settings"), [("clipping", {"clip": clip_quietly}), ("mode", {"build": TurnsBack, "loss": turned_back})])
def test_without_norms_it_is_the_interval_between_checkpoints(what, settings, tmp_path):
    """As in runs that were recorded before norms were: the trials are held against the next checkpoint's weights."""
    run = train(tmp_path / "run", **settings)
    del run.manifest["replay"]
    if what == "clipping":
        run = train(tmp_path / "again", clip=lambda m: clipped(m, 0.25) * 0 + 1.0)
        del run.manifest["replay"]
    with pytest.raises(ReplayMismatch) as caught:
        Replay(run).check()
    assert caught.value.escaped[0] == what and caught.value.steps == (1, 4)


def test_augmentation_is_refused_before_any_work(tmp_path):
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=Jittering(), steps=1)
    micro(model, optimizer, torch.arange(8), 1)
    recorder.step(range(8))
    with pytest.raises(ReplayMismatch, match="augmentation") as caught:
        Replay(recorder.finish())
    assert caught.value.escaped == ("augmentation",)


def test_augmentation_that_began_later_is_found(tmp_path):
    """The dataset read the same when it was recorded."""

    class Later(Jittering):
        jitter = 0.0

        def __getitem__(self, i):
            return TRAIN[0][i] + self.jitter * torch.randn(4), TRAIN[1][i]

    run = train(tmp_path / "run")
    late = Later()
    opened = hw.Run.open(run.path, build=plain, train=TRAIN, task=TASK)
    object.__setattr__(opened.stages[0], "data", hw.tasks.Examples(late))
    assert Replay(opened).check()["bit_for_bit"]
    Later.jitter = 0.3
    with pytest.raises(ReplayMismatch, match="read twice"):
        Replay(opened).check()


def test_weights_changed_after_the_last_step_of_an_interval(tmp_path):
    """Every norm is met; the checkpoint is not."""

    def shrink(model, k):
        if k == 7:
            with torch.no_grad():
                model[0].weight.mul_(0.5)

    run = train(tmp_path / "run", between=shrink)
    with pytest.raises(ReplayMismatch) as caught:
        Replay(run).check()
    assert caught.value.steps == (8, 8) and caught.value.escaped[0] == "weights"


def test_a_run_from_checkpoints_has_no_order(tmp_path):
    run = hw.Run.from_checkpoints(tmp_path / "run", {0: plain().state_dict(), 4: plain().state_dict()}, build=plain, train=TRAIN, task=TASK, optimizer=sgd())
    with pytest.raises(RunError, match="which examples its steps saw"):
        Replay(run)


def test_a_run_without_its_beginning_is_refused(tmp_path):
    run = train(tmp_path / "run")
    del run.manifest["checkpoints"]["0"]
    with pytest.raises(MissingCheckpoint, match="before training"):
        Replay(run)


def test_a_training_that_diverged_is_named(tmp_path):
    task = hw.tasks.Task(lambda m, b: (m(b[0]) ** 4).sum(1), TASK.measure)
    run = train(tmp_path / "run", task=task, loss=lambda m, b: task.loss(m, b).mean(), optimizer=sgd(lr=1e6))
    with pytest.raises((NotFinite, ReplayMismatch), match="step"):
        Replay(run).check()
