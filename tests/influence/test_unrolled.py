"""Exact unrolling against autograd through the whole training, finite differences and retraining; its schedules, weights and resumption."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import headwater as hw
from headwater.errors import GradientError, InputError, ReplayMismatch, TaskError
from headwater.influence.unrolled.backwards import Backwards
from headwater.influence.unrolled.schedule import Schedule, walk
from headwater.training.replay import Player, Replay

TASK = hw.tasks.Classification()
SCHEDULES = ("every", "sqrt", "log")


def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, (x[:, :3] + 0.3 * torch.randn(n, 3, generator=g, dtype=torch.float64)).argmax(1)


TRAIN, SECOND, ASKED = data(20, 1), data(8, 7), data(5, 2)


def net(*middle):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), *(m() for m in middle), nn.Tanh(), nn.Linear(5, 3)).double()

    return build


class Tied(nn.Module):
    """One matrix in two places, and a parameter that no loss sees."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.down.weight, self.unused = self.up.weight, nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def sgd(**settings):
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": 0.3, **settings})


def adam(kind=torch.optim.Adam, **settings):
    return lambda parameters: kind(parameters, **{"lr": 0.05, "eps": 1e-3, **settings})


OPTIMIZERS = {
    "SGD": sgd(),
    "momentum, dampening, decay": sgd(lr=0.1, momentum=0.8, dampening=0.2, weight_decay=0.05),
    "Nesterov": sgd(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.02),
    "Adam": adam(),
    "Adam, decay": adam(weight_decay=0.1, betas=(0.7, 0.9)),
    "AdamW": adam(torch.optim.AdamW, weight_decay=0.3),
    "AMSGrad": adam(amsgrad=True, betas=(0.5, 0.6)),
}


def moves(stages=1, steps=7, batch=6):
    """(stage, ids, learning rate factor) of every step: one schedule of rates, batches with repeats over the epochs, a short one."""
    g, out = torch.Generator().manual_seed(3), []
    for stage in range(stages):
        size = len((TRAIN, SECOND)[stage][0])
        out += [(stage, torch.randperm(size, generator=g)[: min(size, batch - (k == 2))], 1.0 / (1 + k / 10)) for k in range(steps)]
    return out


def record(path, build, optimizer, *, stages=1, chunks=1, steps=7, clip=None, reduction="mean", task=TASK, schedule=True, **settings):
    model, data_of = build(), (TRAIN, SECOND)
    recorder, moved = None, None
    torch.manual_seed(5)
    for k, (stage, ids, factor) in enumerate(moves(stages, steps)):
        if k % steps == 0:
            moved = optimizer(model.parameters())
            rates = [group["lr"] for group in moved.param_groups]
            if recorder is None:
                recorder = hw.Recorder(path, model, moved, task=task, train=data_of[0], steps=steps, checkpoints=3, reduction=reduction, **settings)
            else:
                recorder.stage("second", train=data_of[stage], optimizer=moved, steps=steps)
        for group, rate in zip(moved.param_groups, rates, strict=True):
            group["lr"] = rate * (factor if schedule else 1.0)
        moved.zero_grad()
        for part in ids.chunk(chunks):
            losses = task.loss(model, tuple(t[part] for t in data_of[stage]))
            (losses.sum() / (len(ids) if reduction == "mean" else 1)).backward()
        applied = 1.0
        if clip is not None:
            applied = clip(model, k)
        moved.step()
        recorder.step(ids, clip=applied)
    return recorder.finish()


class NormClip:
    """torch's clipping of the norm; step k's bound is ``bounds[k]``, cycled. ``eps=0``: a loop's own, without torch's 1e-6."""

    def __init__(self, *bounds, eps=1e-6):
        self.bounds, self.eps = bounds, eps

    def __call__(self, model, k):
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), self.bounds[k % len(self.bounds)] if self.eps else torch.inf)
        factor = float(self.factor(total, k))
        for p in model.parameters() if not self.eps else ():
            p.grad.mul_(factor)
        return factor

    def factor(self, norm, k):
        return torch.clamp(self.bounds[k % len(self.bounds)] / (norm + self.eps), max=1.0)


class Scaling:
    """Gradients multiplied with numbers that the loop chose."""

    def __init__(self, *factors):
        self.factors = factors

    def __call__(self, model, k):
        for p in model.parameters():
            p.grad.mul_(self.factor(None, k))
        return self.factor(None, k)

    def factor(self, norm, k):
        return self.factors[k % len(self.factors)]


def placed(model, values):
    return lambda x: functional_call(model, values, (x,))


def unrolled_training(run, build, optimizer, weights, *, stages=1, chunks=1, steps=7, reduction="mean", forward=None, task=TASK, clip=None, **_):
    """The same training as one differentiable function of the weights of examples, each optimizer in its own words: (parameters, buffers)."""
    model = build()
    model.train()
    p = {n: t.detach().clone().requires_grad_() for n, t in model.named_parameters()}
    buffers = {n: t.clone() for n, t in model.named_buffers()}
    facts, offset = None, (0, len(TRAIN[0]))
    torch.manual_seed(5)
    for k, (stage, ids, factor) in enumerate(moves(stages, steps)):
        if k % steps == 0:
            facts, memory, t = optimizer([nn.Parameter(torch.zeros(1))]), {}, 0
        o, t, held = facts.param_groups[0], t + 1, (TRAIN, SECOND)[stage]
        total = 0.0
        for part in ids.chunk(chunks):
            batch = tuple(x[part] for x in held)
            if forward is None:
                losses = task.loss(placed(model, {**p, **buffers}), batch)
            else:
                losses, buffers = forward(p, buffers, batch)
            total = total + (weights[part + offset[stage]] * losses).sum() / (len(ids) if reduction == "mean" else 1)
        used = torch.autograd.grad(total, list(p.values()), create_graph=True, allow_unused=True)
        norm, new = sum((g**2).sum() for g in used if g is not None).sqrt(), dict(p)
        by = 1.0 if clip is None else clip.factor(norm, k)
        for (n, theta), g in zip(p.items(), used, strict=True):
            if g is None:
                continue
            lr, decay, g = o["lr"] * factor, o["weight_decay"], g * by
            if isinstance(facts, torch.optim.SGD):
                g = g + decay * theta
                if o["momentum"]:
                    memory[n] = g if n not in memory else o["momentum"] * memory[n] + (1 - o["dampening"]) * g
                    g = g + o["momentum"] * memory[n] if o["nesterov"] else memory[n]
                new[n] = theta - lr * g
                continue
            if isinstance(facts, torch.optim.AdamW):
                theta = theta * (1 - lr * decay)
            else:
                g = g + decay * theta
            (b1, b2), (m, v, x) = o["betas"], memory.get(n, (0.0, 0.0, torch.zeros_like(theta)))
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            x = torch.maximum(x, v) if o["amsgrad"] else v
            memory[n] = m, v, x
            new[n] = theta - lr * (m / (1 - b1**t)) / ((x / (1 - b2**t) + 1e-200).sqrt() + o["eps"])  # a root at exactly 0 has no derivative
        p = new
    return model, p, buffers


def brute(run, build, optimizer, asked=ASKED, measure=TASK.measure, evaluate=None, **settings):
    """d measure / d weight of every example by autograd through all of it: (queries, examples)."""
    weights = torch.ones(run.size, dtype=torch.float64, requires_grad=True)
    model, p, buffers = unrolled_training(run, build, optimizer, weights, **settings)
    model.eval()
    values = measure(lambda x: functional_call(model, {**p, **buffers}, (x,)), asked) if evaluate is None else evaluate(p, buffers, asked)
    return torch.stack([torch.autograd.grad(v, weights, retain_graph=True)[0] for v in values]).numpy()


def scores(run, method=None, asked=ASKED, **settings):
    return hw.trace(run, asked, method or hw.Unrolled(), progress=False, **settings)


def close(a, b, tolerance=1e-8):
    return float(np.abs(a - b).max()) <= tolerance * float(np.abs(b).max())


# ---------------------------------------------------------------------------------- autograd through the whole training

CASES = {
    "one stage": (net(), {}),
    "two stages": (net(), {"stages": 2}),
    "dropout": (net(lambda: nn.Dropout(0.4)), {}),
    "micro-batches": (net(), {"chunks": 3}),
    "micro-batches with dropout, two stages": (net(lambda: nn.Dropout(0.4)), {"chunks": 3, "stages": 2}),
    "summed losses": (net(), {"reduction": "sum"}),
    "clipping": (net(), {"clip": NormClip(0.4)}),
    "clipping now and then, micro-batches": (net(), {"clip": NormClip(0.6), "chunks": 3, "stages": 2}),
    "tied and unused": (Tied, {}),
}


FOR_ALL = ("one stage", "micro-batches with dropout, two stages", "clipping now and then, micro-batches")
PAIRS = [(kind, case) for kind in OPTIMIZERS for case in CASES if kind in ("Nesterov", "AdamW") or case in FOR_ALL]


@pytest.mark.parametrize(("kind", "case"), PAIRS)
def test_it_is_autograd_through_the_whole_training(kind, case, tmp_path):
    build, settings = CASES[case]
    run = record(tmp_path / "run", build, OPTIMIZERS[kind], **settings)
    truth = brute(run, build, OPTIMIZERS[kind], **settings)
    if "now and then" in case:
        assert 0 < (run.steps["clip"] < 1).sum() < len(run.steps)
    found = [scores(run, hw.Unrolled(schedule=s)).values for s in SCHEDULES]
    assert close(found[0], truth)
    assert all(np.array_equal(f, found[0]) for f in found)  # every schedule walks through the same states, to the last bit
    if "dropout" not in case:
        assert close(scores(run, batch_size=2).values, truth)


@pytest.mark.parametrize(
    ("clip", "said", "truth"),
    [
        (NormClip(0.4, eps=0.0), "auto", NormClip(0.4, eps=0.0)),  # the record tells the 1e-6 from none
        (NormClip(0.4, 0.6), "norm", NormClip(0.4, 0.6)),  # a max_norm that changes
        (NormClip(0.4), "fixed", None),  # as the user says, not as it was
        (Scaling(0.5), "auto", Scaling(0.5)),
        (Scaling(0.5, 0.7, 1.0), "fixed", Scaling(0.5, 0.7, 1.0)),
    ],
)
@pytest.mark.parametrize("chunks", [1, 2])
def test_the_record_or_the_user_tells_what_a_factor_stands_for(clip, said, truth, chunks, tmp_path):
    run = record(tmp_path / "run", net(), OPTIMIZERS["Nesterov"], clip=clip, chunks=chunks)
    assert (run.steps["clip"] < 1).any()
    truth = truth or Scaling(*run.steps["clip"].tolist())
    assert close(scores(run, hw.Unrolled(clipping=said)).values, brute(run, net(), OPTIMIZERS["Nesterov"], clip=truth, chunks=chunks), 1e-10)


@pytest.mark.parametrize("clip", [NormClip(0.4, 0.6), Scaling(0.5, 0.7, 1.0)])
def test_a_factor_that_could_be_either_is_refused_before_any_work(clip, tmp_path):
    run = record(tmp_path / "run", net(), sgd(), clip=clip)
    assert Replay(run).check()["bit_for_bit"]
    for work in (lambda: scores(run), lambda: Replay(run).train(torch.ones(20))):
        with pytest.raises(GradientError, match=r"stage 'train'.*(\n.*)*clipping='norm'"):
            work()


def test_other_weights_are_clipped_anew(tmp_path):
    """As the loop would have: the replay with nudged weights gives the derivative, also where only some steps are clipped."""
    run = record(tmp_path / "run", net(), OPTIMIZERS["Adam"], clip=NormClip(0.6))
    assert 0 < (run.steps["clip"] < 1).sum() < 7
    found, model, replay, h, i = scores(run).values, run.model(), Replay(run), 1e-5, int(run.order(1)[0])

    def measured(weight):
        weights = torch.ones(20, dtype=torch.float64)
        weights[i] = weight
        model.load_state_dict(replay.train(weights), strict=False)
        return TASK.measure(model, ASKED).detach().numpy()

    assert np.abs(found[:, i] - (measured(1 + h) - measured(1 - h)) / (2 * h)).max() <= 1e-7 * np.abs(found).max()
    with pytest.raises(GradientError, match="to a bound that the record does not tell"):
        Replay(record(tmp_path / "changing", net(), sgd(), clip=NormClip(0.4, 0.6)), clipping="norm").train(torch.ones(20))


def normed_forward(p, buffers, batch, training=True, momentum=0.1, eps=1e-5):
    """Linear, BatchNorm, tanh, linear, with the running statistics in the graph."""
    x = batch[0] @ p["0.weight"].T + p["0.bias"]
    mean, var = (x.mean(0), x.var(0, unbiased=False)) if training else (buffers["1.running_mean"], buffers["1.running_var"])
    if training:
        new = {"1.running_mean": mean, "1.running_var": x.var(0, unbiased=True)}
        buffers = {n: (1 - momentum) * t + momentum * new[n] for n, t in buffers.items() if n in new}
    x = (x - mean) / (var + eps).sqrt() * p["1.weight"] + p["1.bias"]
    out = torch.tanh(x) @ p["3.weight"].T + p["3.bias"]
    return TASK.loss(lambda _: out, batch) if training else TASK.measure(lambda _: out, batch), buffers


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("kind", ["momentum, dampening, decay", "AdamW"])
def test_batch_norm_carries_through_the_batch_and_through_its_running_statistics(kind, chunks, tmp_path):
    build = net(lambda: nn.BatchNorm1d(5))
    run = record(tmp_path / "run", build, OPTIMIZERS[kind], chunks=chunks)
    truth = brute(run, build, OPTIMIZERS[kind], chunks=chunks, forward=normed_forward, evaluate=lambda p, b, asked: normed_forward(p, b, asked, False)[0])
    assert close(scores(run).values, truth)


def test_it_predicts_a_small_change_of_a_weight(tmp_path):
    """Central differences through the replay: dropout, Adam, two stages."""
    build = net(lambda: nn.Dropout(0.4))
    run = record(tmp_path / "run", build, OPTIMIZERS["AdamW"], stages=2)
    found, model, replay, h = scores(run).values, run.model(), Replay(run), 1e-5

    def measured(weights):
        model.load_state_dict(replay.train(weights), strict=False)
        return TASK.measure(model, ASKED).detach().numpy()

    for i in (int(run.order(1)[0]), 20 + int(run.order(12)[1])):
        up, down = (torch.ones(run.size, dtype=torch.float64) for _ in range(2))
        up[i] += h
        down[i] -= h
        truth = (measured(up) - measured(down)) / (2 * h)
        assert np.abs(found[:, i] - truth).max() <= 1e-7 * np.abs(found).max()


def convolutional():
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Conv2d(a, b, 2, padding=1), nn.BatchNorm2d(b), nn.GELU()) for a, b in ((1, 3), (3, 2)))
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), first, second, nn.Flatten(), nn.Linear(32, 3)).double()


def test_on_a_cnn_with_batch_norm_and_momentum_it_is_the_derivative(tmp_path):
    """Central differences through the replay, whose BatchNorm is torch's: the weight is the loss's, the statistics are of the whole batch."""
    run = record(tmp_path / "run", convolutional, sgd(lr=0.1, momentum=0.9))
    found, model, replay, h, i = scores(run).values, run.model().eval(), Replay(run), 1e-5, int(run.order(2)[0])

    def measured(weight):
        weights = torch.ones(20, dtype=torch.float64)
        weights[i] = weight
        model.load_state_dict(replay.train(weights), strict=False)
        return TASK.measure(model, ASKED).detach().numpy()

    assert np.abs(found[:, i] - (measured(1 + h) - measured(1 - h)) / (2 * h)).max() <= 1e-7 * np.abs(found).max()


def test_on_a_regression_it_foretells_leaving_one_out(tmp_path):
    """Many examples, one of them removed along the same batches: the first order is nearly all there is."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=g, dtype=torch.float64)
    train, task = (x, x @ torch.tensor([[1.0], [2.0], [-1.0]], dtype=torch.float64) + 0.3 * torch.randn(60, 1, generator=g, dtype=torch.float64)), hw.tasks.Regression()

    def predicted(model, batch):
        return model(batch[0]).squeeze(-1)

    model = nn.Linear(3, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=task, train=train, steps=40)
    for _ in range(40):
        ids = torch.randperm(60, generator=g)[:20]
        optimizer.zero_grad()
        task.loss(model, tuple(t[ids] for t in train)).mean().backward()
        optimizer.step()
        recorder.step(ids)
    run = recorder.finish()
    asked = tuple(t[:8] for t in train)
    found = hw.trace(run, asked, hw.Unrolled(), measure=predicted, progress=False).values
    probe, replay, caused = run.model(), Replay(run), np.zeros((8, 20))
    full = predicted(run.load(probe, run.checkpoints[-1]), asked).detach().numpy()
    for i in range(20):
        weights = torch.ones(60, dtype=torch.float64)
        weights[i] = 0
        probe.load_state_dict(replay.train(weights), strict=False)
        caused[:, i] = full - predicted(probe, asked).detach().numpy()
    found = found[:, :20]
    slope = (found * caused).sum() / (found**2).sum()
    assert 0.95 <= slope <= 1.2 and np.corrcoef(found.ravel(), caused.ravel())[0, 1] >= 0.995


# ------------------------------------------------------------------------------------------------------------------- laws


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("unrolled") / "run", net(), OPTIMIZERS["AdamW"])


def test_queries_together_are_queries_one_by_one(run):
    together = scores(run).values
    alone = np.concatenate([scores(run, asked=tuple(t[q : q + 1] for t in ASKED)).values for q in range(5)])
    assert close(together, alone, 1e-12)


def test_a_budget_splits_queries_states_and_lanes_without_changing_the_answer(run):
    whole, small = scores(run), scores(run, memory=3_000)
    plans = [s.provenance["cost"]["plan"] for s in (whole, small)]
    assert plans[0]["chunks"] == 1 and plans[1]["chunks"] == 5 and plans[1]["lanes"] == 1 and plans[1]["where"] == "disk"
    assert close(small.values, whole.values, 1e-12)
    assert not (run.path / "states").exists() or not any((run.path / "states").iterdir())


def test_a_set_of_queries_is_the_sum_of_its_members(run):
    named = scores(run, asked=[hw.Query("three", tuple(t[:3] for t in ASKED)), hw.Query("two", tuple(t[3:] for t in ASKED))])
    alone = scores(run).values
    assert named.query_names == ("three", "two")
    assert close(named.values, np.stack([alone[:3].sum(0), alone[3:].sum(0)]), 1e-12)


def test_an_example_that_no_step_saw_scores_nothing(tmp_path):
    few = record(tmp_path / "run", net(), OPTIMIZERS["Adam"], steps=1)
    seen = set(few.order(1).tolist())
    values = scores(few).values
    assert len(seen) == 6 and all((np.abs(values[:, i]).max() > 0) == (i in seen) for i in range(20))


def test_it_is_at_the_door_with_the_others(run):
    both = hw.trace(run, ASKED, [hw.TracIn(), hw.Unrolled()], progress=False)
    assert both[1].unit == "measurement" and both[1].values.shape == (5, 20) and both[1].stderr is None
    assert both[1].provenance["replay"]["bit_for_bit"] and both[1].provenance["replay"]["checkpoints"] == [2, 5, 7]


# -------------------------------------------------------------------------------------------------- what has a weight


def test_a_groups_score_is_the_sum_of_its_members(run):
    labels = ["even" if i % 2 == 0 else "odd" for i in range(20)]
    found, alone = scores(run, hw.Unrolled(weigh=hw.weigh.groups(labels))), scores(run).values
    assert found.provenance["columns"] == ["even", "odd"] and found.train_names == ("even", "odd")
    assert found.columns == "groups" and "5 queries x 2 groups;" in repr(found) and "even" in repr(found.top(1))
    assert close(found.values, np.stack([alone[:, ::2].sum(1), alone[:, 1::2].sum(1)], 1), 1e-12)


def test_terms_of_a_loss_sum_to_the_example_and_are_exact(tmp_path):
    """Squared error over two outputs: each output of each example with a weight of its own."""
    train, task = (TRAIN[0], TRAIN[0][:, :2].sin()), hw.tasks.Regression()
    model = net()()
    model[-1] = nn.Linear(5, 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=task, train=train, steps=5)
    for k in range(5):
        optimizer.zero_grad()
        task.loss(model, tuple(t[k : k + 6] for t in train)).mean().backward()
        optimizer.step()
        recorder.step(range(k, k + 6))
    run = recorder.finish()

    def halves(model, batch):
        return (model(batch[0]) - batch[1]) ** 2 / 2

    asked = tuple(t[:4] for t in train)
    found, alone = (scores(run, hw.Unrolled(weigh=w), asked).values for w in (hw.weigh.terms(halves, 2), hw.weigh.examples()))
    assert found.shape == (4, 40) and close(found.reshape(4, 20, 2).sum(2), alone, 1e-10)
    weights, replay, probe, h = torch.ones(20, 2, dtype=torch.float64), Replay(run), run.model(), 1e-5
    ends = []
    for sign in (1, -1):
        weights[7, 1] = 1 + sign * h
        probe.load_state_dict(replay.train(weights, lambda task, model, batch: halves(model, batch)), strict=False)
        ends.append(task.measure(probe, asked).detach().numpy())
    assert np.allclose(found[:, 15], (ends[0] - ends[1]) / (2 * h), atol=1e-8)


class Text(nn.Module):
    """A causal model of one attention layer, in torch's fused attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(7, 8), nn.Linear(8, 24), nn.Linear(8, 7)
        self.double()

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.mix(x).chunk(3, -1)
        return self.head(x + nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_tokens_have_weights_and_sum_to_their_example(tmp_path):
    g = torch.Generator().manual_seed(0)
    ids, task = torch.randint(7, (12, 6), generator=g), hw.tasks.Language()
    model = Text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-3)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=task, train=ids, steps=4)
    for k in range(4):
        optimizer.zero_grad()
        task.loss(model, ids[k : k + 4]).mean().backward()
        optimizer.step()
        recorder.step(range(k, k + 4))
    run = recorder.finish()
    told, plain = (scores(run, hw.Unrolled(weigh=w), ids[:3]) for w in (hw.weigh.tokens(), hw.weigh.examples()))
    assert "x 60 tokens;" in repr(told) and "x 12 training examples;" in repr(plain)
    found, alone = told.values, plain.values
    assert found.shape == (3, 12 * 5) and close(found.reshape(3, 12, 5).sum(2), alone, 1e-10)
    assert len(np.unique(np.abs(found.reshape(3, 12, 5)[0, 3]))) == 5


# ------------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize("length", [1, 2, 7, 40])
def test_a_walk_meets_every_step_backwards_within_its_states_at_the_least_cost(length):
    """The cost is that of the best schedule there is, found by dynamic programming."""
    for states in range(1, 8):
        seen, peak, cost = walked(length, states)
        assert seen == [(k, k) for k in reversed(range(length))]
        assert peak <= states and cost == best(length, states) == Schedule(length, states).replays


def walked(length, states):
    """The steps that a walk met, each with its state; how many states it held at most; how many steps it replayed."""
    held, sizes, costs, seen = {}, [], [], []

    def advance(state, at, to):
        assert state == at < to
        costs.append(to - at)
        return to

    def keep(k, state):
        held[k] = state
        sizes.append(len(held))

    walk(Schedule(length, states), 0, advance, lambda state, k: seen.append((state, k)), keep, held.pop, held.__getitem__)
    assert not held
    return seen, max(sizes), sum(costs)


def best(length, states, known={}):  # noqa: B006
    if length == 1 or states == 1:
        return length * (length - 1) // 2
    if (length, states) not in known:
        known[length, states] = min(m + best(length - m, states - 1) + best(m, states) for m in range(1, length))
    return known[length, states]


def test_the_laws_of_memory():
    """All but one of T states; sqrt(2 T); about log2(T) / 2; and never more replays than repetitions of the training."""
    for length in (64, 256, 1024, 4096):
        every, square, log = (Schedule.named(name, length) for name in SCHEDULES)
        assert every.states == length - 1 and every.replays == length - 1
        assert square.states <= np.sqrt(2 * length) and square.repetitions == 2
        assert log.states <= log.repetitions <= np.log2(length) / 2 + 2
        assert all(s.replays <= s.length * s.repetitions for s in (every, square, log))


def test_no_more_states_are_held_than_the_schedule_says(run, monkeypatch):
    from headwater.influence.unrolled import backwards

    keepers = []

    class Counting(backwards.Keeper):
        def __init__(self, *args):
            super().__init__(*args)
            keepers.append(self)

    monkeypatch.setattr(backwards, "Keeper", Counting)
    for schedule in SCHEDULES:
        plan = scores(run, hw.Unrolled(schedule=schedule)).provenance["cost"]["plan"]
        assert keepers[-1].most == plan["schedule"]["states"]


class Holding(nn.Module):
    """Uses a weight through a list of its own, as torch's recurrent layers do: leaves put in the weight's place are not seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.held = [self.layer.weight]
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(x @ self.held[0].T + self.layer(x)))


class Scale(nn.Module):
    """A weight that the graph keeps as it is, not as a view of it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((5,), 1.5))

    def forward(self, x):
        return x * self.weight


WITH_GRAPHS = {"plain": (net(Scale), {}), "dropout, clipping": (net(lambda: nn.Dropout(0.4)), {"clip": NormClip(0.6)}), "tied": (Tied, {"stages": 2})}
WITHOUT = {"BatchNorm": (net(lambda: nn.BatchNorm1d(5)), {}), "micro-batches": (net(), {"chunks": 2}), "a weight held elsewhere": (Holding, {})}


@pytest.mark.parametrize("case", [*WITH_GRAPHS, *WITHOUT])
def test_graphs_are_kept_where_not_a_bit_changes(case, tmp_path, monkeypatch):
    """With room for them each step is passed once (and tried out once for each kind), else once on the way there and once back."""
    build, settings = {**WITH_GRAPHS, **WITHOUT}[case]
    run = record(tmp_path / "run", build, OPTIMIZERS["AdamW"], **settings)
    passes, player = [], Player.call
    monkeypatch.setattr(Player, "call", lambda *args: passes.append(0) or player(*args))
    found, counts, plan = [], [], None
    for memory in (2**30, None):
        passes.clear()
        s = scores(run, hw.Unrolled(schedule="every"), memory=memory or 18 * plan["graph_bytes"])
        plan = s.provenance["cost"]["plan"]
        assert plan["with_graphs"] == (memory is not None) and plan["lanes"] == 5 and plan["where"] == "memory"
        found.append(s.values)
        counts.append(len(passes))
    assert np.array_equal(*found)
    steps = len(run.steps)
    if case in WITH_GRAPHS:
        kinds = {(k // 7, len(run.order(k + 1))) for k in range(steps)}
        assert counts == [2 + steps + len(kinds), 2 + 2 * steps]  # two to plan
    else:
        assert counts[0] >= counts[1]


# ------------------------------------------------------------------------------------------------ interruption, refusals


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_a_killed_walk_is_taken_up_to_the_identical_result(run, monkeypatch, keep):
    method = hw.Unrolled(schedule="log", keep=keep)
    whole = scores(run, method).values
    calls, pull = itertools.count(), Backwards._chunk.__globals__["pull"]

    def dying(*args):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return pull(*args)

    monkeypatch.setitem(Backwards._chunk.__globals__, "pull", dying)
    with pytest.raises(KeyboardInterrupt):
        scores(run, method)
    counted = itertools.count()

    def counting(*args):
        next(counted)
        return pull(*args)

    monkeypatch.setitem(Backwards._chunk.__globals__, "pull", counting)
    assert np.array_equal(scores(run, method).values, whole)
    assert next(counted) == 7 - 4  # what was walked is not walked again
    assert not list((run.path / "jobs").glob("*"))


def test_the_plan_is_told_and_true(run, capsys):
    found = hw.trace(run, ASKED, hw.Unrolled(schedule="sqrt"))
    said = capsys.readouterr().err
    assert "unrolling 7 steps for 5 queries" in said and "memory:" in said and "bit for bit" in said
    plan = found.provenance["cost"]["plan"]
    assert plan["replays"] == Schedule.named("sqrt", 7).replays + 1 and plan["reversed"] == 7


def test_a_replay_that_departs_is_refused_before_any_derivative(tmp_path, monkeypatch):
    monkeypatch.setitem(Backwards._chunk.__globals__, "pull", lambda *_: pytest.fail("a derivative of a training that did not happen"))
    tampered = record(tmp_path / "tampered", net(), sgd())
    tampered.steps["rate"][3] *= 1.5
    with pytest.raises(ReplayMismatch, match="departs from its record"):
        scores(tampered)


class Fused(torch.autograd.Function):
    """An operation without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Once(nn.Module):
    def forward(self, x):
        return Fused.apply(x)


def test_what_cannot_be_differentiated_twice_is_named(tmp_path):
    with pytest.raises(GradientError, match="cannot be differentiated twice"):
        scores(record(tmp_path / "run", net(Once), sgd()))


class Centred(nn.Module):
    """Keeps a running mean of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros(5, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            self.centre.lerp_(x.detach().mean(0), 0.1)
        return x - self.centre.clone()


def test_a_buffer_that_carries_influence_unseen_is_refused(tmp_path):
    run = record(tmp_path / "run", net(Centred), sgd())
    assert Replay(run).check()["bit_for_bit"]
    with pytest.raises(GradientError, match=r"1\.centre"):
        scores(run)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"schedule": "cube"}, InputError, "schedule="),
        ({"keep": "cloud"}, InputError, "keep="),
        ({"weigh": "examples"}, InputError, "weigh="),
        ({"tolerance": 0.0}, InputError, "tolerance="),
        ({"clipping": "value"}, InputError, "clipping="),
        ({"weigh": hw.weigh.groups([1, 2])}, InputError, "2 labels for 20"),
        ({"weigh": hw.weigh.tokens()}, TaskError, "tokens of the task"),
        ({"weigh": hw.weigh.terms(lambda model, batch: torch.ones(len(batch[0]), 2), 2)}, TaskError, "sum to"),
        ({"weigh": hw.weigh.terms(lambda model, batch: torch.ones(len(batch[0]), 3), 2)}, TaskError, "shape"),
    ],
)
def test_what_does_not_fit_is_refused(run, settings, error, match):
    with pytest.raises(error, match=match):
        scores(run, hw.Unrolled(**settings))
