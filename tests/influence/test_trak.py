"""TRAK: features, kernels and weights against autograd and explicit inverses; what must not matter; and what is refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import nn

import headwater as hw
from headwater.errors import InputError, NotFinite, TaskError
from headwater.influence.engine import Engine
from headwater.influence.projections import Gaussian, KhatriRao, Rademacher, SparseJL
from headwater.influence.queries import ask
from headwater.influence.request import Request
from headwater.influence.trak import exact, features, kernel, outputs
from headwater.influence.trak.kernel import Ridge
from headwater.influence.trak.projecting import Projector
from tests.capture.modules import Tied
from tests.influence.test_laws import ASKED, TASK, TRAIN, build, data, record, sgd, values

SKETCHES = [Rademacher(16), Gaussian(16, seed=2), SparseJL(16), KhatriRao(16), KhatriRao(16, terms=2)]
METHODS = [hw.Trak(), hw.Trak(dim=16), hw.Trak(dim=1000), *(hw.Trak(projection=p) for p in (Rademacher(41), SparseJL(16)))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("trak") / "run", sgd(momentum=0.5, weight_decay=0.01))


def made(path, model_of, train, task):
    """A run whose only checkpoint is what ``model_of`` makes."""
    return hw.Run.from_checkpoints(path, {10: model_of().state_dict()}, build=model_of, train=train, task=task, optimizer=sgd())


def close(found, expected, tolerance=1e-9):
    found, expected = (t.detach().numpy() if isinstance(t, torch.Tensor) else np.asarray(t) for t in (found, expected))
    return found.shape == expected.shape and float(np.abs(found - expected).max()) <= tolerance * float(np.abs(expected).max())


def asked(run, queries=ASKED, **settings):
    return Request(run, ask(queries, run.stages[-1].task, None), progress=False, **settings)


def rows_of(run, function, batch, names=None):
    """Gradients (n, parameters) of a function by plain autograd, one example at a time: {parameter: (n, *shape)}."""
    model = run.load(run.model(), run.checkpoints[-1])
    chosen = {n: p for n, p in model.named_parameters() if names is None or n in names}
    n = len(batch[0]) if isinstance(batch, tuple) else len(batch)
    found = []
    for i in range(n):
        one = tuple(t[i : i + 1] for t in batch) if isinstance(batch, tuple) else batch[i : i + 1]
        found.append(torch.autograd.grad(function(model, one).sum(), list(chosen.values()), materialize_grads=True))
    return {name: torch.stack([row[k] for row in found]) for k, name in enumerate(chosen)}


def flat(rows):
    return torch.cat([r.reshape(len(r), -1) for r in rows.values()], 1)


def explicit(phi_q, phi, regularisation):
    a = phi.T @ phi
    return phi_q @ torch.linalg.solve(a + regularisation * a.trace() * torch.eye(len(a), dtype=a.dtype), phi.T)


# ------------------------------------------------------------------------------------------------ against explicit matrices


class Pixels(nn.Module):
    """Convolutions, two of them in groups, the last at a single position, with a norm between."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second, self.head = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 2, groups=2, bias=False), nn.Linear(6, 3)
        self.third = nn.Conv2d(6, 6, 3, groups=2)

    def forward(self, x):
        return self.head(torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.norm(self.first(x))))))).flatten(1))


class Scaled(nn.Module):
    """A parameter that no layer rule knows."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift, self.layer = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.linspace(0, 1, 4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(torch.tanh(self.scale * x + self.shift))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.norm, self.head = nn.Embedding(7, 4, padding_idx=0), nn.LayerNorm(4), nn.Linear(4, 7)

    def forward(self, tokens):
        return self.head(torch.tanh(self.norm(self.token(tokens).cumsum(1))))


def seeded(kind):
    def make():
        torch.manual_seed(4)
        return kind().double()

    return make


def some(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


CLASSES = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 2, 0])
TOKENS = torch.tensor([[1, 4, 4, 2, 6], [3, 3, 0, 5, 5], [6, 2, 1, 0, 2], [1, 5, 3, 3, 4], [2, 2, 2, 6, 1], [5, 0, 5, 1, 3]])
MODELS = {
    "linear layers": (build, TRAIN, TASK),
    "convolutions": (seeded(Pixels), (some(12, 2, 6, 6), CLASSES), TASK),
    "bare parameters": (seeded(Scaled), (some(12, 4), CLASSES), TASK),
    "tokens": (seeded(Words), TOKENS, hw.tasks.Language(reduction="sum")),
    "tied": (seeded(Tied), TOKENS, hw.tasks.Language(reduction="mean")),
}
each_model = pytest.mark.parametrize("name", MODELS)


def truth_of(run):
    """Gradients of the outputs and of the measure of the training examples, (n, parameters)."""
    stage = run.stages[0]
    value = outputs.output_of(stage.task, None).value
    return flat(rows_of(run, value, stage.data.data)), flat(rows_of(run, stage.task.measure, stage.data.data))


@each_model
def test_the_exact_kernel_is_the_formula(name, tmp_path):
    run = made(tmp_path / "run", *MODELS[name])
    g, t = truth_of(run)
    for method in (hw.Trak(regularisation=0.02), hw.Trak(dim=g.shape[1], regularisation=0.02)):
        found = method.parts(asked(run, run.stages[0].data.data)).arrays["kernel"]
        assert close(found, explicit(t, g, 0.02), 1e-8)


@each_model
@pytest.mark.parametrize("sketch", SKETCHES, ids=repr)
def test_features_are_the_projection_of_autograds_gradients(name, sketch, tmp_path):
    run = made(tmp_path / "run", *MODELS[name])
    engine = Engine.of(run, None)
    engine.load((10,))
    value = outputs.output_of(run.stages[0].task, None).value
    rows, expected = rows_of(run, value, run.stages[0].data.data), 0.0
    for block in engine.capture.blocks.values():
        packed = block.pack({p: rows[p] for p in block.parameters}, lead=1)
        expected = expected + sketch.project(block.name, packed.flatten(1, 2) if block.matrix else packed.reshape(len(packed), -1))
    found = Projector(engine.capture.blocks, sketch, run.device)(engine.capture.gradients(value, run.stages[0].data.batch(range(run.size))))
    assert close(found, expected, 1e-10)
    kernel = hw.Trak(projection=sketch, regularisation=0.1).parts(asked(run, run.stages[0].data.data)).arrays["kernel"]
    asked_for = expected if name not in ("tokens", "tied") else None  # there the measure is not the output
    if asked_for is not None:
        assert close(kernel, explicit(asked_for, expected, 0.1), 1e-8)


def test_scores_are_kernel_times_weight_and_members_average_each(run):
    parts = [hw.Trak(dim=16).member(k).parts(asked(run)).arrays for k in range(3)]
    method = hw.Trak(dim=16)
    assert close(values(run, method=method), parts[0]["kernel"] * parts[0]["weight"], 1e-12)
    whole = method.combine(parts)
    assert close(whole, np.mean([p["kernel"] for p in parts], 0) * np.mean([p["weight"] for p in parts], 0), 1e-12)
    halved = [{**parts[0], "weight": parts[1]["weight"] / 2}, parts[1]]
    assert not close(method.combine(halved), np.mean([p["kernel"] * p["weight"] for p in halved], 0), 1e-3)
    assert close(method.combine([*parts, *parts]), whole, 1e-12) and close(method.combine(parts[::-1]), whole, 1e-12)


def test_members_have_projections_of_their_own_and_share_the_weight(run):
    first, second, again = (hw.Trak(dim=16).member(k).parts(asked(run)).arrays for k in (0, 5, 5))
    assert np.array_equal(second["kernel"], again["kernel"]) and not close(first["kernel"], second["kernel"], 1e-2)
    assert np.array_equal(first["weight"], second["weight"])
    assert hw.Trak().member(3) == hw.Trak()
    assert hw.Trak(projection=Gaussian(16, seed=2)).member(3).projection == Gaussian(16, seed=5)


def test_the_weight_alone_is_that_of_the_parts(run):
    model = run.load(run.model(), run.checkpoints[-1])
    with torch.no_grad():
        missing = 1 - model(TRAIN[0]).softmax(1)[torch.arange(40), TRAIN[1]]
    assert close(hw.Trak().weight(asked(run)), missing, 1e-9)
    for method in (hw.Trak(), hw.Trak(dim=16)):
        assert close(method.parts(asked(run)).arrays["weight"], missing, 1e-9)


def test_several_stages_make_one_matrix_each_with_its_own_output(tmp_path):
    model, second = build(), (some(15, 4), CLASSES.repeat(2)[:15])
    recorder = hw.Recorder(tmp_path / "run", model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1), task=TASK, train=TRAIN, steps=3)
    weighted = hw.tasks.Classification(weight=torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64), scale=2.0)
    for task, batch in ((TASK, TRAIN), (weighted, second)):
        if task is weighted:
            recorder.stage("second", train=second, task=weighted, optimizer=optimizer, steps=3)
        for _ in range(3):
            optimizer.zero_grad()
            task.loss(model, batch).mean().backward()
            optimizer.step()
            recorder.step(range(len(batch[0])))
    run = recorder.finish()
    g = torch.cat([flat(rows_of(run, TASK.measure, batch)) for batch in (TRAIN, second)])
    t = flat(rows_of(run, TASK.measure, ASKED))
    weight = torch.cat([1 - run.load(run.model(), 6)(b[0]).softmax(1).gather(1, b[1][:, None]).squeeze(1) for b in (TRAIN, second)])
    weight[40:] *= 2 * weighted.weight[second[1]]
    for method in (hw.Trak(regularisation=0.02), hw.Trak(dim=300, regularisation=0.02)):
        for settings in ({}, {"memory": 20 * 55**2}):
            assert close(values(run, method=method, **settings), explicit(t, g, 0.02) * weight, 1e-8)


# --------------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 7}, {"memory": 20 * 40**2}, {"batch_size": 16, "memory": 20 * 40**2}], ids=str)
def test_batches_and_chunks_change_nothing(settings, run, tmp_path):
    other = hw.Run.from_checkpoints(tmp_path / "r", {60: run.weights(60)}, build=build, train=TRAIN, task=TASK, optimizer=sgd())  # nothing kept yet
    for method in METHODS:
        assert close(values(other, method=method, **settings), values(run, method=method), 1e-8), method


def test_an_exact_kernel_by_small_chunks_of_rows_is_as_in_one(run, tmp_path, monkeypatch):
    whole = values(run, method=hw.Trak())
    monkeypatch.setattr(exact, "_rows", lambda *_: 7)
    other = hw.Run.from_checkpoints(tmp_path / "r", {60: run.weights(60)}, build=build, train=TRAIN, task=TASK, optimizer=sgd())
    found = hw.trace(other, ASKED, hw.Trak(), batch_size=9, progress=False)
    assert close(found.values, whole, 1e-8)


def test_small_shards_are_as_one(run, tmp_path, monkeypatch):
    whole = {dim: values(run, method=hw.Trak(dim=dim)) for dim in (16, 45)}
    monkeypatch.setattr(features, "SHARD", 16 * 9)
    other = hw.Run.from_checkpoints(tmp_path / "r", {60: run.weights(60)}, build=build, train=TRAIN, task=TASK, optimizer=sgd())
    for dim, expected in whole.items():
        assert close(values(other, method=hw.Trak(dim=dim)), expected, 1e-8)
    assert len(list((tmp_path / "r" / "trak").glob("*.json"))) == 5 + 14


def test_a_named_query_is_the_sum_of_its_members_and_the_measure_is_the_query_s(run):
    def logit(model, batch):
        return model(batch[0])[:, 1]

    t, g = flat(rows_of(run, logit, ASKED)), flat(rows_of(run, TASK.measure, TRAIN))
    groups = [hw.Query("a", tuple(x[:4] for x in ASKED)), hw.Query("b", tuple(x[4:] for x in ASKED))]
    for method in METHODS:
        each, named = (values(run, queries, method, measure=logit) for queries in (ASKED, groups))
        assert close(named, np.stack([each[:4].sum(0), each[4:].sum(0)]), 1e-9)
    assert close(hw.Trak(regularisation=0.1).parts(Request(run, ask(ASKED, TASK, logit), progress=False)).arrays["kernel"], explicit(t, g, 0.1), 1e-8)


def test_scaling_an_output_scales_kernel_and_weight_against_each_other(run):
    def louder(model, batch):
        return 7 * TASK.measure(model, batch)

    for dim in (None, 16):
        plain, loud = (hw.Trak(dim=dim, output=o).parts(asked(run)).arrays for o in (None, louder))
        assert close(loud["kernel"], plain["kernel"] / 7, 1e-8) and close(loud["weight"], plain["weight"] / 7, 1e-8)


def test_an_orthogonal_map_of_features_changes_no_kernel():
    phi, phi_q = some(30, 12), some(4, 12)
    turn = torch.linalg.qr(some(12, 12))[0]
    for a, b in ((phi, phi_q), (phi @ turn, phi_q @ turn)):
        assert close(b @ Ridge.of(a.T @ a, 0.03, 1e-15).solve(a.T), explicit(phi_q, phi, 0.03), 1e-10)


def test_a_kernel_is_the_same_from_either_side_and_by_either_decomposition(monkeypatch):
    for n, k in ((30, 12), (12, 30)):
        phi, phi_q = some(n, k), some(4, k)
        for decomposed in (1024, 0):
            monkeypatch.setattr(kernel, "DECOMPOSED", decomposed)
            primal, dual = Ridge.of(phi.T @ phi, 0.03, 1e-15), Ridge.of(phi @ phi.T, 0.03, 1e-15)
            assert close(phi_q @ primal.solve(phi.T), explicit(phi_q, phi, 0.03), 1e-10)
            assert close(dual.solve(phi @ phi_q.T).T, explicit(phi_q, phi, 0.03), 1e-10)
            s = torch.linalg.svdvals(phi).square()
            for ridge in (primal, dual):
                assert ridge.effective_dimension == pytest.approx(float((s / (s + 0.03 * s.sum())).sum()), rel=1e-10)


def test_the_effective_dimension_of_a_large_matrix_is_estimated_to_a_few_percent(monkeypatch):
    monkeypatch.setattr(kernel, "DECOMPOSED", 0)
    monkeypatch.setattr(kernel, "COUNTED", 0)
    phi = some(400, 400) / torch.arange(1, 401) ** 0.5
    s = torch.linalg.svdvals(phi).square()
    for regularisation in (0.1, 0.01, 0.001):
        expected = float((s / (s + regularisation * s.sum())).sum())
        found = Ridge.of(phi @ phi.T, regularisation, 1e-15).effective_dimension
        assert abs(found - expected) < 4 * expected**0.5 / 8


def test_without_regularisation_a_singular_matrix_has_its_pseudo_inverse(monkeypatch):
    phi = some(20, 6) @ some(6, 9)
    expected = phi @ torch.linalg.pinv(phi.T @ phi, rtol=1e-10) @ phi.T
    for decomposed in (1024, 0):  # Cholesky gives up, and the spectrum decides
        monkeypatch.setattr(kernel, "DECOMPOSED", decomposed)
        ridge = Ridge.of(phi.T @ phi, 0.0, 1e-15)
        assert close(phi @ ridge.solve(phi.T), expected, 1e-8)
        assert ridge.rank == 6 and ridge.effective_dimension == pytest.approx(6) and ridge.shift == 0


def test_a_duplicated_training_example_shares_its_score(tmp_path):
    twice = tuple(torch.cat([t, t[:1]]) for t in TRAIN)
    run = made(tmp_path / "run", build, twice, TASK)
    for method in [hw.Trak(regularisation=0.0), *METHODS]:
        found = values(run, method=method)
        assert close(found[:, 0], found[:, 40], 1e-6 if method.regularisation == 0 else 1e-9)


# -------------------------------------------------------------------------------------------------------------------- the sign


def test_the_sign_and_order_are_those_of_retraining_without_an_example(tmp_path):
    """Logistic regression, retrained by Newton without each example: positive scores belong to those that pushed the log-odds up."""
    x, y = data(60, 7)
    x, y, decay = x.numpy(), (y > 0).numpy().astype(float), 0.05

    def fit(keep):
        w = np.zeros(4)
        for _ in range(30):
            p = 1 / (1 + np.exp(-x @ w))
            w -= np.linalg.solve((x * (keep * p * (1 - p))[:, None]).T @ x + decay * np.eye(4), x.T @ (keep * (p - y)) + decay * w)
        return w

    whole = fit(np.ones(60))

    def model_of():
        model = nn.Linear(4, 1, bias=False).double()
        model.weight.data[:] = torch.from_numpy(whole)
        return model

    run = made(tmp_path / "run", model_of, (torch.from_numpy(x), torch.from_numpy(y).long()), TASK)
    sign = 2 * y[:10] - 1
    truth = np.stack([sign * (x[:10] @ (whole - fit(1.0 - np.eye(60)[i]))) for i in range(60)], 1)
    found = values(run, (torch.from_numpy(x[:10]), torch.from_numpy(y[:10]).long()), hw.Trak(regularisation=1e-4))
    assert np.mean([spearmanr(a, b).statistic for a, b in zip(found, truth, strict=True)]) > 0.9
    assert np.diag(found[:, :10]).min() > 0


# ------------------------------------------------------------------------------------------------------------- output functions


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)])
def test_the_push_of_classes_is_minus_the_loss_s_derivative_by_the_given_logit(smoothing, weight):
    task = hw.tasks.Classification(weight=weight, label_smoothing=smoothing, scale=1.5)
    logits, labels = some(5, 3).requires_grad_(), torch.tensor([0, 1, 2, 1, 0])
    identity = nn.Identity()
    slope = torch.autograd.grad(task.loss(identity, (logits, labels)).sum(), logits)[0]
    assert close(outputs.output_of(task, None).push(identity, (logits, labels)).detach(), -slope.gather(1, labels[:, None]).squeeze(1), 1e-10)


def test_the_push_of_a_regression_is_minus_the_loss_s_derivative_by_the_prediction():
    task, f, y = hw.tasks.Regression(scale=0.7), some(5, 1).requires_grad_(), some(6)[1:]
    output = outputs.output_of(task, None)
    slope = torch.autograd.grad(task.loss(nn.Identity(), (f, y)).sum(), f)[0].squeeze(1)
    assert close(output.push(nn.Identity(), (f, y)).detach(), -slope, 1e-10)
    assert torch.equal(output.value(nn.Identity(), (f, y)), f.squeeze(1))


@pytest.mark.parametrize("settings", [{"reduction": "sum"}, {"reduction": "mean"}, {"reduction": "tokens", "mean_tokens": 2.5}], ids=str)
def test_the_push_of_tokens_is_that_of_moving_all_log_odds_alike(settings):
    task, logits = hw.tasks.Language(**settings), some(2, 4, 5)
    targets = torch.tensor([[1, 0, -100, 4], [2, 2, 3, -100]])
    output, counted = outputs.output_of(task, None), targets != -100
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    moved = logits + F.one_hot(targets.clamp_min(0), 5) * (shift[:, None] / counted.sum(1, keepdim=True)).unsqueeze(2)  # f grows by the shift
    values = output.value(nn.Identity(), (moved, targets))
    assert close(torch.autograd.grad(values.sum(), shift, retain_graph=True)[0], np.ones(2))
    slope = torch.autograd.grad(task.loss(nn.Identity(), (moved, targets)).sum(), shift)[0]
    assert close(output.push(nn.Identity(), (logits, targets)), -slope, 1e-9)


def test_the_slope_of_a_loss_by_a_given_output_is_found_from_the_model_s_outputs(run):
    def as_pair(model, batch):
        return TASK.measure(model, batch)

    plain = values(run, method=hw.Trak())
    own = hw.tasks.Task(loss=TASK.loss, measure=TASK.measure)
    assert close(hw.Trak(output=TASK.measure).weight(asked(run)), hw.Trak().weight(asked(run)), 1e-8)
    assert close(values(run, method=hw.Trak(output=(as_pair, lambda m, b: torch.sigmoid(-TASK.measure(m, b))))), plain, 1e-8)
    cubed = outputs.output_of(own, lambda model, batch: TASK.measure(model, batch) ** 3)
    model = run.load(run.model(), 60)
    f = TASK.measure(model, TRAIN).detach()
    assert close(cubed.push(model, TRAIN).detach(), torch.sigmoid(-f) / (3 * f**2), 1e-7)


def test_a_task_with_a_measure_of_its_own_still_has_log_odds_for_outputs(run, tmp_path):
    class Logit(hw.tasks.Classification):
        def measure(self, model, batch):
            return model(batch[0])[:, 0]

    other = made(tmp_path / "run", lambda: run.load(run.model(), 60), TRAIN, Logit())
    t, g = flat(rows_of(run, Logit().measure, ASKED)), flat(rows_of(run, TASK.measure, TRAIN))
    assert close(hw.Trak(regularisation=0.1).parts(asked(other)).arrays["kernel"], explicit(t, g, 0.1), 1e-8)


def test_the_loss_itself_as_output_is_influence_under_the_empirical_fisher(run):
    loss = flat(rows_of(run, TASK.loss, TRAIN))
    t = flat(rows_of(run, TASK.measure, ASKED))
    found = values(run, method=hw.Trak(regularisation=0.01, output=lambda model, batch: -TASK.loss(model, batch)))
    assert close(found, -explicit(t, loss, 0.01), 1e-8)


def test_sure_predictions_have_finite_outputs_and_gradients_in_single_precision(tmp_path):
    """Log-odds of 45, where the probability is 1 to the last bit: naive log-odds are infinite there, and their gradients NaN."""

    def sure():
        model = nn.Linear(2, 3, bias=False)
        model.weight.data = torch.tensor([[45.0, 0.0], [0.0, 0.0], [-3.0, 0.0]])
        return model

    x, y = torch.tensor([[1.0, 0.2], [1.0, -0.1], [1.0, 0.4], [0.02, 1.0]]), torch.tensor([0, 0, 0, 0])
    run = made(tmp_path / "run", sure, (x, y), TASK)
    parts = hw.Trak(dim=16).parts(asked(run, (x, y)))
    assert np.isfinite(parts.arrays["kernel"]).all() and parts.provenance["zero_rows"] == 0
    assert parts.arrays["weight"][0] == pytest.approx(np.exp(-45) * (1 + np.exp(-3)), rel=1e-4, abs=0)
    assert np.abs(parts.arrays["kernel"]).max(0).min() > 1e-3


# ------------------------------------------------------------------------------------------------- what is reported and kept


def test_examples_without_a_gradient_are_counted_and_warned_of(tmp_path):
    def dead():
        model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False)).double()
        torch.manual_seed(0)
        for p in model.parameters():
            p.data = torch.rand(p.shape, dtype=torch.float64)
        return model

    x = some(12, 4).abs()
    x[[2, 5]] *= -1  # every hidden unit is off
    run = made(tmp_path / "run", dead, (x, CLASSES), TASK)
    said = {hw.Trak(): "outputs whose gradient is exactly zero", hw.Trak(dim=8): "so small a projection lost them", hw.Trak(dim=16): "a larger dim= would tell"}
    for method, why in said.items():
        with pytest.warns(UserWarning, match=f"2 of 12 training examples have .*{why}"):
            scores = hw.trace(run, (x, CLASSES), method, progress=False)
        assert scores.provenance["zero_rows"] == 2
        assert np.flatnonzero(np.abs(scores.values).max(0) < 1e-12).tolist() == [2, 5]


def test_provenance_says_what_was_done(run):
    facts = {repr(m): hw.trace(run, ASKED, m, progress=False).provenance for m in METHODS}
    plain = facts["Trak()"]
    g = flat(rows_of(run, TASK.measure, TRAIN))
    s = torch.linalg.svdvals(g).square()
    assert plain["projection"] == "none: inner products of 43 parameters" and plain["rank"] == np.linalg.matrix_rank(g.numpy()) == 37
    assert plain["effective_dimension"] == pytest.approx(float((s / (s + plain["regularisation"]["absolute"])).sum()), abs=0.01)
    assert plain["regularisation"]["absolute"] == pytest.approx(plain["regularisation"]["relative"] * float(s.sum()))
    assert facts["Trak(dim=1000)"]["projection"] == "none: 43 parameters" and facts["Trak(dim=1000)"]["constant_columns"] == 0
    assert facts["Trak(dim=16)"]["projection"] == "KhatriRao(dim=16, seed=0, terms=1) of 43 parameters" and facts["Trak(dim=16)"]["rank"] == 16
    assert facts["Trak(dim=16)"]["projection_noise"] == pytest.approx((8 / 16) ** 0.5, abs=1e-4)
    assert plain["projection_noise"] is None and facts["Trak(dim=1000)"]["projection_noise"] is None
    assert set(plain["coverage"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_other_queries_and_regularisations_read_the_features_that_are_kept(tmp_path):
    run = record(tmp_path / "run", sgd())
    for method in (hw.Trak(dim=16), hw.Trak(dim=30), hw.Trak(dim=100)):
        first = hw.trace(run, ASKED, method, progress=False)
        assert first.provenance["cost"]["example_gradients"] == 46
        for queries, regularisation in ((ASKED, 1.0), (TRAIN, 0.005)):
            again = hw.trace(run, queries, hw.Trak(dim=method.dim, regularisation=regularisation), progress=False)
            assert again.provenance["cost"]["example_gradients"] == len(queries[0])
    assert hw.trace(run, ASKED, hw.Trak(), progress=False).provenance["cost"]["example_gradients"] == 6 + 40 + 80
    assert hw.trace(run, ASKED, hw.Trak(regularisation=1.0), progress=False).provenance["cost"]["example_gradients"] == 6 + 40


def test_features_of_a_view_another_output_or_another_seed_are_not_those_of_the_run(run):
    from dataclasses import replace

    hw.trace(run, ASKED, hw.Trak(dim=16), progress=False)
    others = [(replace(run, variant="another"), hw.Trak(dim=16)), (run, hw.Trak(dim=16).member(9)), (run, hw.Trak(dim=16, output=lambda m, b: 2 * TASK.measure(m, b)))]
    for other, method in others:
        assert hw.trace(other, ASKED, method, progress=False).provenance["cost"]["example_gradients"] == 46


class Counted:
    """How many examples went through the model with a gradient, and where to stop."""

    def __init__(self):
        self.seen, self.limit = 0, 10**9

    def add(self, count):
        self.seen += count
        if self.seen > self.limit:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", [hw.Trak(), hw.Trak(dim=16)], ids=repr)
def test_work_that_was_stopped_goes_on_to_the_identical_result(method, tmp_path):
    whole = values(record(tmp_path / "whole", sgd()), method=method, batch_size=4)
    asked_for = Counted()

    class Stopping(hw.tasks.Classification):
        def _logits(self, model, batch):
            asked_for.add(len(batch[0]) if torch.is_grad_enabled() else 0)
            return super()._logits(model, batch)

    counted, run = (record(tmp_path / name, sgd(), task=Stopping()) for name in ("counted", "run"))
    asked_for.seen = 0
    values(counted, method=method, batch_size=4)
    total, asked_for.seen, asked_for.limit = asked_for.seen, 0, int(0.9 * asked_for.seen)
    with pytest.raises(KeyboardInterrupt):
        values(run, method=method, batch_size=4)
    assert list((tmp_path / "run" / "jobs").glob("*.json")), "nothing was kept"
    asked_for.seen, asked_for.limit = 0, 10**9
    assert np.array_equal(values(run, method=method, batch_size=4), whole)
    assert asked_for.seen < 0.9 * total
    assert not list((tmp_path / "run" / "jobs").glob("*.json"))


# ------------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 16, "projection": Rademacher(32)}, "one dimension"),
        ({"projection": 16}, "a value of hw.projections"),
        ({"projection": Rademacher}, "a value of hw.projections"),
        ({"regularisation": -1.0}, "regularisation=-1.0"),
        ({"regularisation": float("nan")}, "regularisation=nan"),
        ({"output": 3}, "output=3"),
        ({"output": (len, len, len)}, "a pair of them"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_done(settings, message):
    with pytest.raises(InputError, match=message):
        hw.Trak(**settings)


def test_tasks_without_a_known_output_are_refused(tmp_path):
    own = hw.tasks.Task(loss=TASK.loss, measure=TASK.measure)
    with pytest.raises(TaskError, match="without a known output function"):
        values(made(tmp_path / "own", build, TRAIN, own), method=hw.Trak())
    several = hw.tasks.Regression()
    with pytest.raises(TaskError, match="a regression with 3 outputs"):
        values(made(tmp_path / "several", build, (TRAIN[0], some(40, 3)), several), (ASKED[0], some(6, 3)), hw.Trak())


def test_an_output_of_which_the_loss_is_no_function_is_refused(run):
    def margin(model, batch):
        return model(batch[0]).gather(1, batch[1][:, None]).squeeze(1)

    with pytest.raises(TaskError, match="of which the loss is no function"):
        values(run, method=hw.Trak(output=margin))
    with pytest.raises(TaskError, match="other inputs than the loss"):
        values(run, method=hw.Trak(output=lambda model, batch: TASK.measure(model, (2 * batch[0], batch[1]))))
    with pytest.raises(TaskError, match="one number per example"):
        values(run, method=hw.Trak(output=lambda model, batch: model(batch[0])))


def test_more_pairs_than_fit_in_memory_are_refused_before_work(run):
    with pytest.raises(InputError, match=r"the exact kernel of 40 training examples.*\n.*\n.*hw.Trak\(dim=4096\)"):
        values(run, method=hw.Trak(), memory=1000)


def test_outputs_that_are_not_finite_are_named(run, tmp_path):
    def some_bad(model, batch):
        return TASK.measure(model, batch) * torch.where(batch[0][:, 0] == TRAIN[0][17, 0], float("inf"), 1.0)

    for method in (hw.Trak(output=(some_bad, TASK.measure)), hw.Trak(dim=16, output=(some_bad, TASK.measure))):
        with pytest.raises(NotFinite, match="training example 17"):
            values(run, method=method)


def test_a_name_says_what_an_output_does_and_not_where_it_lies():
    one, two = (lambda c: hw.Trak(dim=8, output=lambda m, b: c * TASK.measure(m, b)))(2.0), (lambda c: hw.Trak(dim=8, output=lambda m, b: c * TASK.measure(m, b)))(3.0)
    assert repr(one) != repr(two) and "0x" not in repr(one)
    assert repr(hw.Trak(projection=Rademacher(8), regularisation=0.1)) == "Trak(projection=Rademacher(dim=8, seed=0), regularisation=0.1)"
