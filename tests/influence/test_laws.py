"""Laws of scores: limits, splitting, linearity, invariances; and every optimizer against SOURCE written out with explicit matrices."""

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.influence.responses import Accumulated, DampedInverse, Surviving
from headwater.training import segments
from tests.influence.brute import Brute, source

CLASSES = 3
METHODS = [hw.GradDot(), hw.GradCos(), hw.TracIn(), hw.Influence(), hw.Influence(damping=0.01), hw.LoGra(dim=3), hw.Source(), hw.Source(average="parameters")]


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def data(n, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, (x[:, :CLASSES] + 0.3 * torch.randn(n, CLASSES, generator=g, dtype=torch.float64)).argmax(1)


TRAIN, ASKED, TASK = data(40, 1), data(6, 2), hw.tasks.Classification()


def record(path, make_optimizer, model=None, steps=60, batch=10, scale=1.0, task=TASK, schedule=None, **settings):
    model = model or build()
    optimizer = make_optimizer(model)
    recorder = hw.Recorder(path, model, optimizer, task=task, train=TRAIN, steps=steps, **settings)
    g = torch.Generator().manual_seed(3)
    for step in range(steps):
        ids = torch.randperm(len(TRAIN[0]), generator=g)[:batch]
        if schedule:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
        optimizer.zero_grad()
        (scale * task.loss(model, tuple(t[ids] for t in TRAIN))).mean().backward()
        optimizer.step()
        recorder.step(ids)
    return recorder.finish()


def sgd(**settings):
    return lambda model: torch.optim.SGD(model.parameters(), **{"lr": 0.1, **settings})


def groups(kind, **settings):
    """The first layer at a tenth of the second's rate, with more weight decay, and its bias frozen."""

    def make(model):
        model[0].bias.requires_grad_(False)
        first = {"params": [model[0].weight], "lr": 0.01, "weight_decay": 0.05}
        return kind([first, {"params": model[2].parameters()}], **settings)

    return make


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("laws") / "run", sgd(momentum=0.5, weight_decay=0.01))


def values(run, queries=ASKED, method=None, **settings):
    found = hw.trace(run, queries, method or hw.Source(), progress=False, **settings)
    return [s.values for s in found] if isinstance(found, list) else found.values


def close(a, b, tolerance=1e-9):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) <= tolerance * float(np.abs(b).max())


# -------------------------------------------------------------------------------------------- against explicit matrices

OPTIMIZERS = {
    "SGD": sgd(),
    "momentum, dampening, weight decay": sgd(momentum=0.8, dampening=0.2, weight_decay=0.05),
    "Nesterov": sgd(lr=0.05, momentum=0.8, nesterov=True),
    "SGD, groups and a frozen bias": groups(torch.optim.SGD, lr=0.1, momentum=0.5, weight_decay=0.01),
    "Adam, L2": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.02),
    "Adam, AMSGrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, amsgrad=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.3),
    "AdamW, groups and a frozen bias": groups(torch.optim.AdamW, lr=0.01, weight_decay=0.3),
}


def softmax_hessian(logits):
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


@pytest.mark.parametrize("average", ["gradients", "parameters"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_dense_source_equals_the_formula_for_every_optimizer(kind, average, tmp_path):
    run = record(tmp_path / "run", OPTIMIZERS[kind], schedule=None if "groups" in kind else lambda step: 0.1 / (1 + step / 20))
    brute = Brute(run)
    truth = source(brute, TASK.measure, ASKED, segments(run, 3), lambda state, stage: brute.gauss_newton(state, TRAIN[0], softmax_hessian), average)
    assert close(values(run, method=hw.Source(average=average, curvature=hw.Dense())), truth, 1e-8)


def test_dense_influence_equals_the_formula(run):
    brute, final = Brute(run), run.weights(run.checkpoints[-1])
    h = brute.gauss_newton(final, TRAIN[0], softmax_hessian) + 0.01 * np.eye(sum(brute.sizes))
    u, g = brute.gradients(TASK.measure, final, ASKED), brute.gradients(TASK.loss, final, TRAIN)
    for damping in (0.1, 1e-3):
        truth = -u @ np.linalg.solve(h + damping * np.eye(len(h)), g.T) / len(g)
        assert close(values(run, method=hw.Influence(damping=damping, curvature=hw.Dense())), truth, 1e-8)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_tracin_equals_the_formula_for_every_optimizer(kind, tmp_path):
    """Summed rates of each parameter, times Adam's preconditioner at that checkpoint, times the product of gradients there."""
    run = record(tmp_path / "run", OPTIMIZERS[kind])
    brute, truth, start = Brute(run), 0.0, 0
    for step in run.checkpoints[1:]:
        state, rates, group = run.weights(step), run.rates(start, step), run.stages[0].optimizer.groups
        p = brute.each(rates)
        if run.stages[0].optimizer.kind == "adam":
            p = p / (np.sqrt(brute.flat(run.second_moments(step))) + brute.each({n: g.eps for g in group for n in g.names}) + (p == 0))
        u, g = brute.gradients(TASK.measure, state, ASKED), brute.gradients(TASK.loss, state, TRAIN)
        truth, start = truth - (u * p) @ g.T / len(TRAIN[0]), step
    assert close(values(run, method=hw.TracIn()), truth, 1e-8)


def test_ekfac_adam_is_the_harmonic_projection(tmp_path):
    """``p = 1 / diag(Q^T P^-1 Q)`` in EK-FAC's own basis, block by block, with explicit Kronecker products."""
    run = record(tmp_path / "run", OPTIMIZERS["Adam, L2"])
    found = values(run, method=hw.Source(segments=2))
    from headwater.influence.engine import Engine

    engine = Engine.of(run, None)
    u = {n: g.dense().flatten(1) for n, g in _gradients(engine, run.checkpoints[-1], TASK.measure, ASKED).items()}
    truth = 0.0
    for row in reversed(hw.Source(segments=2).plan(run).rows):
        t = max(run.rates(row.pace.start, row.pace.stop).values())
        g = [{n: b.dense().flatten(1) for n, b in _gradients(engine, w[0], TASK.loss, TRAIN).items()} for w in row.at]
        for name, op in engine.curvature(row.curvature).operators.items():
            q = torch.kron(op.left[0], op.right[0])
            v = torch.stack([engine.capture.blocks[name].pack(run.second_moments(w[0])).flatten() for w in row.at]).mean(0)
            p = 1 / ((q**2).T @ (v.sqrt() + 1e-8))
            s = p * (op.spectrum.flatten() + 0.02)
            x = (u[name] @ q) * p * torch.from_numpy(np.asarray(Accumulated(t)(s)))
            truth = truth - (x @ q.T) @ torch.stack([b[name] for b in g]).mean(0).T / len(TRAIN[0])
            u[name] = ((u[name] @ q) * torch.exp(-t * s)) @ q.T
    assert close(found, truth.numpy(), 1e-8)


def _gradients(engine, step, function, batch):
    engine.load((step,))
    return engine.capture.gradients(function, batch)


# --------------------------------------------------------------------------------------------------------------- limits


def test_responses_at_their_limits():
    for x in (0.0, 1e-300, 1e-12, 1e-8, 1e-4, 1.0, 1e3):
        s = torch.tensor([x], dtype=torch.float64)
        exact = 0.7 if x < 1e-12 else -np.expm1(-0.7 * x) / x
        assert float(Accumulated(0.7)(s)) == pytest.approx(exact, rel=1e-12)
        assert float(Accumulated(0.7)(s.float())) == pytest.approx(exact, rel=1e-6)
    s = torch.logspace(-6, 6, 2001, dtype=torch.float64)
    ratio = Accumulated(1.0)(s) / DampedInverse(1.0)(s)
    assert float(ratio.min()) >= 1 and float(ratio.max()) == pytest.approx(1.2984, abs=1e-4)
    parts = Surviving(0.7)(s) * Accumulated(0.4)(s) + Accumulated(0.7)(s)
    assert torch.allclose(parts, Accumulated(1.1)(s), rtol=1e-12)


def same_weights(path, rates, optimizer=sgd(), checkpoints=(10, 20, 30), task=TASK):
    """A run whose checkpoints all hold the same weights: curvature and gradients are constant, so only the table is at work."""
    state = build().state_dict()
    return hw.Run.from_checkpoints(path, dict.fromkeys(checkpoints, state), build=build, train=TRAIN, task=task, optimizer=optimizer, rates=lambda k: rates)


def test_long_training_is_undamped_influence_and_short_training_grad_dot(tmp_path):
    decayed = sgd(weight_decay=0.05)
    long = same_weights(tmp_path / "long", 1e4, decayed)
    one, undamped = values(long, method=[hw.Source(segments=1), hw.Influence(damping=0.0)])
    assert close(one, undamped, 1e-9)
    short = same_weights(tmp_path / "short", 1e-10, decayed)
    one, dot, tracin = values(short, method=[hw.Source(segments=1), hw.GradDot(), hw.TracIn()])
    assert close(one, 30e-10 * dot, 1e-7) and close(tracin, 30e-10 * dot, 1e-12)


def test_splitting_a_segment_changes_nothing_where_nothing_moves(tmp_path):
    run = same_weights(tmp_path / "run", 0.3)
    one, two, three = values(run, method=[hw.Source(segments=k) for k in (1, 2, 3)])
    assert close(two, one) and close(three, one)


def test_momentum_is_a_larger_rate(tmp_path):
    with_momentum = same_weights(tmp_path / "a", 0.02, sgd(momentum=0.9))
    without = same_weights(tmp_path / "b", 0.2)
    assert close(values(with_momentum), values(without))


def test_a_larger_loss_at_a_smaller_rate_is_the_same_training(tmp_path):
    """Catches every confusion of Fisher and Gauss-Newton, mean and sum: a Fisher of raw gradients would scale with the square."""
    for fisher in ("exact", "sampled"):
        method = hw.Source(curvature=hw.EKFAC(fisher=fisher))
        plain = values(same_weights(tmp_path / f"{fisher}-a", 0.3), method=method)
        scaled = values(same_weights(tmp_path / f"{fisher}-b", 0.03, task=hw.tasks.Classification(scale=10.0)), method=method)
        assert close(scaled, plain, 1e-8)


def test_a_sum_over_the_batch_is_a_mean_at_a_larger_rate(tmp_path):
    mean = record(tmp_path / "mean", sgd(weight_decay=0.02))
    summed = record(tmp_path / "sum", sgd(lr=0.01, weight_decay=0.2), scale=10.0, reduction="sum", task=TASK)
    assert close(values(summed), values(mean), 1e-8)


# ---------------------------------------------------------------------------------------------------------- linearity


def test_scores_are_linear_in_the_measure(run):
    def logit(k):
        return lambda model, batch: model(batch[0])[:, k]

    def mixed(model, batch):
        return 2 * model(batch[0])[:, 0] - 3 * model(batch[0])[:, 1]

    for method in (hw.Source(), hw.Influence(), hw.TracIn(), hw.GradDot()):
        zero, one, both = (values(run, method=method, measure=m) for m in (logit(0), logit(1), mixed))
        assert close(both, 2 * zero - 3 * one)


def test_a_named_query_is_the_sum_of_its_members(run):
    each, several = (values(run, method=METHODS), values(run, [hw.Query("a", tuple(t[:4] for t in ASKED)), hw.Query("b", tuple(t[4:] for t in ASKED))], METHODS))
    for method, single, named in zip(METHODS, each, several, strict=True):
        if not isinstance(method, hw.GradCos):
            assert close(named, np.stack([single[:4].sum(0), single[4:].sum(0)]))
    scores = hw.trace(run, hw.Query("all", ASKED), hw.GradDot(), progress=False)
    assert scores.query_names == ("all",) and scores.values.shape == (1, 40)


def test_duplicates_share_their_score(tmp_path):
    twice = tuple(torch.cat([t, t[:1]]) for t in TRAIN)
    run = hw.Run.from_checkpoints(tmp_path / "r", {30: build().state_dict()}, build=build, train=twice, task=TASK, optimizer=sgd())
    for found in values(run, method=[hw.Source(segments=1), hw.Influence(), hw.GradDot()]):
        assert close(found[:, 0], found[:, 40])


def test_self_influence_is_the_diagonal(run):
    alone = hw.self_influence(run, METHODS, progress=False)
    for single, pairs in zip(alone, values(run, TRAIN, METHODS), strict=True):
        assert single.values.shape == (1, 40) and close(single.values[0], np.diag(pairs), 1e-8)


# --------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 7}, {"memory": 1}, {"batch_size": 16, "memory": 3000}], ids=str)
def test_batches_and_chunks_change_nothing(run, settings):
    for method, plain, cut in zip(METHODS, values(run, method=METHODS), values(run, method=METHODS, **settings), strict=True):
        assert close(cut, plain, 1e-10), method
    for plain, cut in zip(hw.self_influence(run, METHODS, progress=False), hw.self_influence(run, METHODS, progress=False, **settings), strict=True):
        assert close(cut.values, plain.values, 1e-10)


def test_order_of_queries_and_company_of_methods_change_nothing(run):
    back = tuple(t.flip(0) for t in ASKED)
    for method, together in zip(METHODS, values(run, method=METHODS), strict=True):
        assert close(values(run, method=method), together, 1e-12)
        assert close(values(run, back, method)[::-1], together, 1e-12)


def test_queries_may_be_a_dataset_a_list_or_a_batch(run):
    listed = [(x, y) for x, y in zip(*ASKED, strict=True)]
    for queries in (torch.utils.data.TensorDataset(*ASKED), listed):
        assert close(values(run, queries), values(run), 1e-12)


def test_a_sweep_of_dampings_costs_one_pass_and_equals_single_ones(run):
    sweep = hw.trace(run, ASKED, hw.Influence(damping=(1.0, 0.1, 0.01)), progress=False)
    assert [s.method for s in sweep] == ["Influence(damping=1)", "Influence(damping=0.1)", "Influence(damping=0.01)"]
    for damping, found in zip((1.0, 0.1, 0.01), sweep, strict=True):
        assert close(values(run, method=hw.Influence(damping=damping)), found.values, 1e-12)
    single = hw.trace(run, ASKED, hw.Influence(damping=0.1), progress=False)
    assert sweep[0].provenance["cost"]["example_gradients"] <= single.provenance["cost"]["example_gradients"]


def test_the_default_damping_is_one_over_the_summed_rate(run):
    t = max(run.rates(0, 60).values())
    assert t == pytest.approx(60 * 0.1 / 0.5)
    assert close(values(run, method=hw.Influence()), values(run, method=hw.Influence(damping=1 / t)), 1e-12)


def test_a_tolerance_stays_within_what_it_promises(tmp_path):
    """In float32 the default drops eigenvalues that do not matter; the scores move by far less than what scores are good for."""
    torch.manual_seed(0)
    x = torch.randn(200, 40)
    y = x[:, :3].argmax(1)

    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))

    model, task = make(), TASK
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=task, train=(x, y), steps=40)
    for step in range(40):
        ids = torch.arange(step * 50, step * 50 + 50) % 200
        optimizer.zero_grad()
        task.loss(model, (x[ids], y[ids])).mean().backward()
        optimizer.step()
        recorder.step(ids)
    run = recorder.finish()
    methods = [hw.Source(segments=1), hw.Influence(), hw.Source()]
    for exact, loose in zip(values(run, (x[:20], y[:20]), methods, tolerance=0.0), values(run, (x[:20], y[:20]), methods, tolerance=1e-2), strict=True):
        error = np.sqrt(((exact - loose) ** 2).mean() / (exact**2).mean())
        assert error < 2e-2


def test_the_last_segment_alone_sees_its_own_checkpoints(run):
    """Gradients come from each segment's own weights: scores change when a middle checkpoint is replaced by the final one."""
    final = dict.fromkeys((s for s in run.checkpoints if s), run.weights(run.checkpoints[-1]))
    optimizer = sgd(momentum=0.5, weight_decay=0.01)
    moved = hw.Run.from_checkpoints(run.path.parent / "moved", final, build=build, train=TRAIN, task=TASK, optimizer=optimizer)
    assert not close(values(moved), values(run), 1e-2)
