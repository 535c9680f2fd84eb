"""Refined products: functions of the whole Gauss-Newton matrix, held against the same matrix written out; and Krylov subspaces by themselves."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.curvature import GaussNewton, Point, Setting, products
from headwater.errors import GradientError, InputError, TaskError
from headwater.influence import refine
from headwater.influence.engine import Engine
from headwater.influence.responses import Accumulated, DampedInverse, Surviving
from headwater.linalg import krylov
from tests.influence.test_laws import ASKED, CLASSES, OPTIMIZERS, TASK, TRAIN, close, record, sgd, values

EXACT = hw.Refine(steps=60, tolerance=1e-8)
LIGHT = hw.Source(2, average="parameters", refine=EXACT)
THREE = tuple(t[:3] for t in ASKED)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("refine") / "run", sgd(momentum=0.5, weight_decay=0.01))


# ------------------------------------------------------------------------------------- the dense function of the dense matrix


@pytest.mark.parametrize("kind", ["SGD, groups and a frozen bias", "Adam, L2", "AdamW, groups and a frozen bias"])
def test_refined_source_is_the_dense_matrixs(kind, tmp_path):
    """``hw.Dense`` is held against explicit matrices in test_laws.py."""
    made = record(tmp_path / "run", OPTIMIZERS[kind])
    dense, refined = values(made, method=[hw.Source(2, curvature=hw.Dense()), hw.Source(2, refine=EXACT)])
    assert close(refined, dense, 1e-6)


@pytest.mark.parametrize(("kind", "preconditioned"), [("Adam, L2", False), ("momentum, dampening, weight decay", True), ("AdamW, groups and a frozen bias", True)])
def test_refined_influence_is_the_dense_matrixs(kind, preconditioned, tmp_path):
    made = record(tmp_path / "run", OPTIMIZERS[kind])
    exact = hw.Refine(steps=80, tolerance=1e-9, preconditioned=preconditioned)
    damping = None if kind.startswith("Adam") else 0.03
    dense, refined = values(made, method=[hw.Influence(damping, hw.Dense()), hw.Influence(damping, refine=exact)])
    assert close(refined, dense, 1e-6)


def test_preconditioned_source_is_the_last_segments_damped_inverse(run):
    """Of one segment: influence at damping 1/t; begun and steered by EK-FAC, it ends at the whole matrix."""
    exact = hw.Refine(steps=80, tolerance=1e-10, preconditioned=True)
    time = sum(run.rates(0, 60).values()) / len(run.rates(0, 60))
    (source,) = [values(run, method=hw.Source(1, average="parameters", refine=exact))]
    row = hw.Source(1, average="parameters", curvature=hw.Dense()).plan(run).rows[0]
    engine = Engine.of(run, None)
    u = {n: g.dense() for n, g in _gradients(engine, (run.checkpoints[-1],), TASK.measure, ASKED).items()}
    seen = engine.flow(row).respond(DampedInverse(1 / time))(u)
    g = {n: g.dense() for n, g in _gradients(engine, row.at[0], TASK.loss, TRAIN).items()}
    truth = -sum(seen[n].flatten(1) @ g[n].flatten(1).mT for n in g) / len(TRAIN[0])
    assert close(source, truth.numpy(), 1e-6)


def _gradients(engine, weights, function, batch):
    engine.load(weights)
    return engine.capture.gradients(function, batch)


def test_a_frozen_parameter_of_an_earlier_stage_is_carried_exactly(tmp_path):
    """Stage one moves everything, stage two only the last layer: what the first did to the rest comes through the coupling."""
    from tests.influence.test_laws import build

    model = build()
    recorder = hw.Recorder(tmp_path / "run", task=TASK, train=TRAIN, checkpoints=2)
    for stage in (0, 1):
        optimizer = torch.optim.SGD(model.parameters() if stage == 0 else model[2].parameters(), lr=0.1)
        if stage:
            model[0].requires_grad_(False)
        if stage == 0:
            recorder.watch(model, optimizer, steps=20)
        else:
            recorder.stage("second", train=TRAIN, optimizer=optimizer, steps=20)
        for _ in range(20):
            optimizer.zero_grad()
            TASK.loss(model, TRAIN).mean().backward()
            optimizer.step()
            recorder.step(range(len(TRAIN[0])))
    made = recorder.finish()
    dense, refined = values(made, method=[hw.Source((1, 1), curvature=hw.Dense()), hw.Source((1, 1), refine=EXACT)])
    assert close(refined, dense, 1e-6)


# ------------------------------------------------------------------------------------------------------------------- invariances


def test_no_steps_are_no_refinement(run):
    plain, none, nothing = values(run, method=[hw.Source(), hw.Source(refine=0), hw.Source(refine=hw.Refine(steps=0))])
    assert close(none, plain, 1e-14) and close(nothing, plain, 1e-14)
    plain, none = values(run, method=[hw.Influence(), hw.Influence(refine=0)])
    assert close(none, plain, 1e-14)


@pytest.mark.parametrize("method", [LIGHT, hw.Influence(refine=hw.Refine(60, 1e-8, preconditioned=True))], ids=["source", "influence"])
def test_batches_chunks_and_the_order_of_queries_do_not_matter(run, method, monkeypatch):
    whole = values(run, THREE, method=method)
    assert close(values(run, THREE, method=method, batch_size=15), whole, 1e-6)
    assert close(values(run, THREE, method=method, memory=1), whole, 1e-6)
    monkeypatch.setattr(refine, "MEMORY", 1)  # one query at a time
    backwards = tuple(t.flip(0) for t in THREE)
    assert close(values(run, backwards, method=method)[::-1], whole, 1e-6)


def test_fewer_examples_are_the_matrix_of_those(run):
    some = hw.trace(run, ASKED, hw.Source(1, "parameters", refine=hw.Refine(60, 1e-8, examples=8)), progress=False)
    dense = values(run, method=hw.Source(1, "parameters", hw.Dense(examples=8)))
    assert close(some.values, dense, 1e-6)


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_the_fisher_is_the_estimates(run, fisher):
    dense, refined = values(run, method=[hw.Source(1, "parameters", c, r) for c, r in ((hw.Dense(fisher=fisher, seed=3), None), (hw.EKFAC(fisher, 3), EXACT))])
    assert close(refined, dense, 1e-6)


class Many(hw.tasks.Classification):
    """More outputs than EK-FAC would take a pass each for."""

    def outputs(self, model, batch):
        return 1000


def test_auto_is_exact_for_any_number_of_outputs(tmp_path):
    made = record(tmp_path / "run", sgd(), task=Many())
    dense, refined = values(made, method=[hw.Source(1, "parameters", hw.Dense(fisher="exact")), hw.Source(1, "parameters", refine=EXACT)])
    assert close(refined, dense, 1e-6)


# --------------------------------------------------------------------------------------------------------- trust, and what it costs


def test_provenance_says_what_it_took_and_a_miss_is_told(run):
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = hw.trace(run, ASKED, hw.Source(refine=hw.Refine(3, 1e-8)), progress=False).provenance["refined"]
    assert any("18 of 18 refined products stopped after 3 steps above the tolerance of 1e-08" in str(w.message) for w in heard)
    assert found["products"] == 3 * 18 and found["most"] == 3 and found["missed"] > 0 and found["bound"] > 1e-8
    json.dumps(found)
    found = hw.trace(run, ASKED, LIGHT, progress=False).provenance["refined"]
    assert found["missed"] == 0 and 0 <= found["bound"] <= 1e-8 and found["products"] < 60 * 12


def test_the_estimate_is_only_made_where_it_steers(tmp_path):
    made = record(tmp_path / "run", sgd())
    hw.trace(made, ASKED, hw.Source(1, "parameters", refine=hw.Refine(steps=30)), progress=False)
    assert not list((made.path / "factors").glob("*"))
    hw.trace(made, ASKED, hw.Influence(refine=hw.Refine(40, 1e-2, preconditioned=True)), progress=False)
    assert len(list((made.path / "factors").glob("*.json"))) == 1


def test_interrupted_refinement_resumes_to_the_identical_result(tmp_path, monkeypatch):
    made = record(tmp_path / "run", sgd())
    monkeypatch.setattr(refine, "SAVE_ABOVE", 0.0)
    monkeypatch.setattr(refine, "MEMORY", 1)
    whole = values(made, THREE, method=LIGHT)
    calls, real = [], GaussNewton.__call__

    def killed(self, v):
        calls.append(len(v))
        if len(calls) == 25:
            raise KeyboardInterrupt
        return real(self, v)

    monkeypatch.setattr(GaussNewton, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        values(made, THREE, method=LIGHT)
    assert list((made.path / "jobs").glob("refined-*.json"))
    resumed = values(made, THREE, method=LIGHT)
    spent = len(calls)
    assert not list((made.path / "jobs").glob("*"))  # what was kept for resuming has done its duty
    again = values(made, THREE, method=LIGHT)
    assert (resumed == whole).all() and (again == whole).all()
    assert spent - 25 < len(calls) - spent


# -------------------------------------------------------------------------------------------------------------------- products


def gauss_newton(model, task, batch, device="cpu", **settings):
    from headwater.capture import Capture
    from headwater.tasks import Examples

    capture = Capture(model, task.loss, batch)
    point = Point(lambda: None, Examples(batch, None), task, "here")
    return GaussNewton((point,), Setting(capture, 4, torch.device(device)), **settings)


@pytest.mark.parametrize("layers", ["tied", "convolution", "attention"])
def test_products_are_those_of_the_outer_products(layers):
    """``G v = sum_k <g_k, v> g_k / n`` over per-example gradients of the pseudo-losses, which are proved against autograd."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, x):
            return self.out(self.embedding(x).tanh().mean(1))

    nets = {
        "tied": (Tied(), torch.randint(7, (9, 3))),
        "convolution": (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 4)), torch.randn(9, 2, 4, 4)),
        "attention": (nn.Sequential(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(24, 3)), torch.randn(9, 3, 8)),
    }
    model, x = nets[layers]
    model = model.double().eval()
    batch = (x.double() if x.is_floating_point() else x, torch.zeros(9, dtype=torch.long))
    matrix = gauss_newton(model, TASK, batch)
    capture = matrix.setting.capture
    rows = torch.cat([torch.cat([g.dense().flatten(1) for g in column.values()], 1) for column in capture.each(TASK.exact, batch)])
    v = torch.randn(5, rows.shape[1], dtype=torch.float64)
    assert torch.allclose(matrix(v), (v @ rows.mT) @ rows / 9, rtol=1e-9, atol=1e-12)


def test_one_by_one_is_the_same_and_takes_over(run, monkeypatch):
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(products, "one_by_one", None)  # not needed where vectorising works
        whole = values(run, THREE, method=LIGHT)

    def refuses(*given):
        asked.append(given)
        raise RuntimeError("no forward mode here")

    monkeypatch.setattr(products, "vectorised", refuses)
    assert close(values(run, THREE, method=LIGHT), whole, 1e-6) and asked
    monkeypatch.setattr(products, "one_by_one", refuses)
    with pytest.raises(GradientError, match=r"neither forwards .* nor twice"):
        values(run, THREE, method=LIGHT)


# --------------------------------------------------------------------------------------------------------------- Krylov subspaces


def matrix(size=40, rank=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))[0]
    s = torch.cat([torch.logspace(1, -3, rank, dtype=torch.float64), torch.zeros(size - rank, dtype=torch.float64)])
    return (q * s) @ q.mT, torch.randn(4, size, generator=g, dtype=torch.float64)


def function(m, f, w):
    s, v = torch.linalg.eigh(m)
    return w @ ((v * f(s.clamp_min(0))) @ v.mT)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6, 1e-10])
def test_the_bound_holds_and_is_reached(tolerance):
    m, w = matrix()
    w[2] = 0
    f, s = Accumulated(20.0), Surviving(20.0)
    space, trust = krylov.lanczos(lambda v: v @ m, w, krylov.exponential_bound(f, s, 20.0), f, tolerance, 40)
    x, y = space.apply(f), space.apply(s)
    scale = torch.maximum(krylov.lengths(y), krylov.lengths(w) / 100)
    errors = krylov.ratio(krylov.lengths(x - function(m, f, w)), krylov.lengths(x)), krylov.ratio(krylov.lengths(y - function(m, s, w)), scale)
    assert (errors[0] <= trust.bound + 1e-12).all() and (errors[1] <= trust.bound + 1e-9).all()
    assert (trust.bound <= tolerance).all() and trust.products[2] == 0 and (trust.products[[0, 1, 3]] < 40).all()
    inverse = DampedInverse(0.05)
    space, trust = krylov.lanczos(lambda v: v @ m, w, krylov.inverse_bound(inverse, 0.05), inverse, tolerance, 40)
    error = krylov.ratio(krylov.lengths(space.apply(inverse) - function(m, inverse, w)), krylov.lengths(space.apply(inverse)))
    assert (error <= trust.bound + 1e-12).all() and (trust.bound <= tolerance).all()


def test_every_vector_stops_by_itself():
    """Neither keeps the others going nor stops them: an eigenvector takes one product, zero none, others as many as when alone."""
    m, w = matrix()
    w[0], w[2] = torch.linalg.eigh(m)[1][:, -1], 0
    f = Accumulated(20.0)
    bound = krylov.exponential_bound(f, None, 20.0)
    rows: list[int] = []

    def product(v):
        rows.append(len(v))
        return v @ m

    _, together = krylov.lanczos(product, w, bound, f, 1e-6, 40)
    alone = [int(krylov.lanczos(lambda v: v @ m, w[k : k + 1], bound, f, 1e-6, 40)[1].products) for k in range(4)]
    assert together.products.tolist() == alone and alone[0] == 1 and alone[2] == 0 and alone[1] > 10
    assert sum(rows) == sum(alone)


def test_bounds_are_not_far_above_the_error():
    m, w = matrix()
    f = Accumulated(20.0)
    space, trust = krylov.lanczos(lambda v: v @ m, w, krylov.exponential_bound(f, None, 20.0), f, 0.0, 12)
    error = krylov.lengths(space.apply(f) - function(m, f, w)) / krylov.lengths(space.apply(f))
    assert (error <= trust.bound).all() and (trust.bound < 100 * error).all()


def test_conjugate_gradients_keep_what_they_are_given():
    """Started at the solution they stop at once; an exact inverse as preconditioner needs one step more; zero stays zero."""
    m, w = matrix()
    a = m + 0.05 * torch.eye(40, dtype=torch.float64)
    exact = torch.linalg.inv(a)
    x, trust = krylov.conjugate_gradients(lambda v: v @ a, lambda v: v @ exact, w, w @ exact, 0.05, 1e-10, 20)
    assert trust.products.tolist() == [1, 1, 1, 1] and torch.allclose(x, w @ exact)
    x, trust = krylov.conjugate_gradients(lambda v: v @ a, lambda v: v @ exact, w, torch.zeros_like(w), 0.05, 1e-10, 20)
    assert trust.products.tolist() == [2, 2, 2, 2] and torch.allclose(x, w @ exact)
    x, trust = krylov.conjugate_gradients(lambda v: v @ a, lambda v: v / a.diag(), w, torch.zeros_like(w), 0.05, 1e-6, 200)
    error = krylov.lengths(x - w @ exact) / krylov.lengths(x)
    assert (error <= trust.bound).all() and (error < 1e-4).all()
    x, _ = krylov.conjugate_gradients(lambda v: v @ a, lambda v: v, 0 * w, 0 * w, 0.05, 1e-6, 20)
    assert (x == 0).all()


# -------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: hw.Refine(steps=-1), "steps=-1"),
        (lambda: hw.Refine(steps=2.5), "steps=2.5"),
        (lambda: hw.Refine(tolerance=1.0), "tolerance=1.0"),
        (lambda: hw.Refine(examples=0), "examples=0"),
        (lambda: hw.Source(refine="yes"), "refine='yes'"),
        (lambda: hw.Source(refine=True), "refine=True"),
        (lambda: hw.Influence(damping=0, refine=10), "damping=0"),
        (lambda: hw.Source(curvature=hw.Dense("hessian"), refine=10), "Hessian"),
    ],
)
def test_bad_settings_are_refused_at_once(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_a_task_without_outputs_or_labels_of_its_own_is_refused(tmp_path):
    plain = hw.tasks.Task(loss=TASK.loss, measure=TASK.measure)
    made = record(tmp_path / "run", sgd(), task=plain)
    with pytest.raises(TaskError, match="labels drawn from the model"):
        values(made, method=hw.Source(refine=EXACT))
    dense, refined = values(made, method=[hw.Source(1, "parameters", c, r) for c, r in ((hw.Dense(fisher="empirical"), None), (hw.EKFAC("empirical"), EXACT))])
    assert close(refined, dense, 1e-6)


def test_a_single_precision_model_is_refined_without_a_warning(tmp_path):
    from tests.influence.test_laws import build

    torch.manual_seed(0)
    x = TRAIN[0].float(), TRAIN[1]
    model = build().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=x, checkpoints=3)
    for _ in range(30):
        optimizer.zero_grad()
        TASK.loss(model, x).mean().backward()
        optimizer.step()
        recorder.step(range(len(x[0])))
    made = recorder.finish()
    asked = (ASKED[0].float(), ASKED[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense, refined = values(made, asked, [hw.Source(curvature=hw.Dense()), hw.Source(refine=hw.Refine(tolerance=1e-3))], tolerance=0)
    assert close(refined, dense, 2e-3) and np.isfinite(refined).all() and CLASSES == 3
