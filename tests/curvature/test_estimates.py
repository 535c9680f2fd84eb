"""Curvature estimates against the same quantities written out from explicit per-example gradients, by torch.func where there is one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev

from headwater import curvature, tasks
from headwater.capture import Capture
from headwater.errors import InputError, NotFinite
from tests.capture import modules as m
from tests.capture.laws import truth


@pytest.fixture(autouse=True)
def float64():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def point(net, task, data, state=None):
    return curvature.Point((lambda: None) if state is None else lambda: net.load_state_dict(state), tasks.Examples(data), task, "")


def fit(estimate, net, task, data, batch_size=4, capture=None, states=(None,)):
    capture = capture or Capture(net, task.loss, data)
    points = [point(net, task, data, state) for state in states]
    return estimate.fit(points, curvature.Setting(capture, batch_size, torch.device("cpu"))), capture


def near(found, expected, tolerance=1e-8):
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


class Scores(nn.Module):
    """A body with three scores an example: sums over everything between."""

    def __init__(self, body, width):
        super().__init__()
        self.body, self.out = body, nn.Linear(width, 3)

    def forward(self, x):
        hidden = self.body(x)
        return self.out(hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden.sum(1) if hidden.ndim == 3 else hidden)


NETS = {
    "linear": (lambda: Scores(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), 5), lambda n: torch.randn(n, 4)),
    "sequence": (lambda: Scores(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Tanh()), 4), lambda n: torch.randn(n, 6, 4)),
    "grouped convolution": (lambda: Scores(nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh()), 6), lambda n: torch.randn(n, 4, 4, 4)),
    "transposed convolution": (lambda: Scores(nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.Tanh()), 6), lambda n: torch.randn(n, 4, 2, 2)),
    "embedding": (lambda: Scores(nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Tanh()), 4), lambda n: torch.randint(0, 7, (n, 5))),
    "one layer three times": (lambda: Scores(m.Repeated(), 2), lambda n: torch.randn(n, 3, 4)),
    "tied weights": (lambda: Scores(m.Tied(), 7), lambda n: torch.randint(0, 7, (n, 5))),
    "tied by hand": (lambda: Scores(m.TiedByHand(), 7), lambda n: torch.randint(0, 7, (n, 5))),
    "bare parameters": (lambda: Scores(m.Bare(), 3), lambda n: torch.randn(n, 4)),
    "recurrent": (lambda: Scores(m.Recurrent(nn.GRU), 2), lambda n: torch.randn(n, 3, 4)),
}


def problem(name, n=10):
    build, inputs = NETS[name]
    return build().eval(), (inputs(n), torch.randint(0, 3, (n,)))


def explicit_gradients(net, task, data, capture, fisher, seed=0):
    """{block: (columns, n, *shape)}: pseudo-gradients by autograd, one example and column at a time, packed as the blocks are."""
    functions = {
        "exact": task.exact,
        "empirical": lambda model, batch: task.loss(model, batch).unsqueeze(1),
    }
    if fisher == "sampled":
        draws = [tasks.Draws(seed, [i]) for i in range(len(data[0]))]
        rows = [truth_columns(net, lambda model, b, d=d: task.sampled(model, b, d), tuple(t[i : i + 1] for t in data), 1) for i, d in enumerate(draws)]
        columns = [{name: torch.cat([row[0][name] for row in rows]) for name in rows[0][0]}]
    else:
        function = functions[fisher]
        columns = truth_columns(net, function, data, function(net, data).shape[1])
    return {name: torch.stack([block.pack(column, lead=1) for column in columns]) for name, block in capture.blocks.items()}


def truth_columns(net, function, data, count):
    return [truth(net, function, data, column) for column in range(count)]


def rotated(op, g):
    """The explicit gradient in the operator's own eigenbasis."""
    g = g if op.left is None else op.left.mT @ g
    return g if op.right is None else g @ op.right


# ---- EK-FAC


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_ekfac_eigenvalues_are_mean_squares_in_the_eigenbasis(name, fisher):
    net, data = problem(name)
    task = tasks.Classification()
    found, capture = fit(curvature.EKFAC(fisher=fisher, seed=3), net, task, data)
    explicit = explicit_gradients(net, task, data, capture, fisher, seed=3)
    assert found.operators.keys() == capture.blocks.keys() == explicit.keys()  # never nothing
    for block, g in explicit.items():
        op = found.operators[block]
        if capture.blocks[block].matrix:
            near(op.spectrum, rotated(op, g).square().sum(0).mean(0))
            for side in (op.left, op.right):
                assert side is None or torch.allclose(side.mT @ side, torch.eye(side.shape[-1]).expand_as(side))
        else:
            rows = g.flatten(2)
            near(op.dense(capture.blocks[block].shape), torch.einsum("cni,cnj->ij", rows, rows) / g.shape[1])


def test_ekfac_bases_are_eigenvectors_of_the_covariances():
    net, data = problem("sequence")
    found, capture = fit(curvature.EKFAC(fisher="empirical"), net, tasks.Classification(), data)
    gradients = capture.gradients(tasks.Classification().loss, data)
    for name, block in capture.blocks.items():
        if block.matrix:
            (piece,), op = gradients[name].pieces, found.operators[name]
            for factor, basis in ((piece.g, op.left), (piece.a, op.right)):
                turned = basis.mT @ torch.einsum("ngsi,ngsj->gij", factor, factor) @ basis
                near(turned, torch.diag_embed(torch.diagonal(turned, dim1=-2, dim2=-1)), 1e-10)


def test_an_embeddings_entries_are_never_mixed():
    net, data = problem("embedding")
    found, _ = fit(curvature.EKFAC(), net, tasks.Classification(), data)
    assert found.operators["body.0.weight"].left is None and found.operators["body.0.weight"].right is not None
    net, data = problem("tied weights")
    tied, _ = fit(curvature.EKFAC(), net, tasks.Classification(), data)
    assert tied.operators["body.embedding.weight"].left is None


def test_an_embedding_that_some_batches_do_not_reach_keeps_its_entries_apart():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.out = nn.Embedding(7, 3), nn.Linear(3, 3)

        def forward(self, tokens):
            out = self.out(torch.ones(len(tokens), 3))
            return out + self.embedding(tokens).sum(1) if bool((tokens > 0).any()) else out

    data = (torch.cat([torch.zeros(5, 2, dtype=torch.long), torch.randint(1, 7, (5, 2))]), torch.randint(0, 3, (10,)))
    task, net = tasks.Classification(), Gate()
    capture = Capture(net, task.loss, tuple(t[5:] for t in data))
    found, _ = fit(curvature.EKFAC(fisher="empirical"), net, task, data, batch_size=5, capture=capture)
    assert found.operators["embedding.weight"].left is None
    g = torch.cat([truth(net, task.loss, tuple(t[i : i + 1] for t in data))["embedding.weight"] for i in range(10)]).unsqueeze(1)
    near(found.operators["embedding.weight"].spectrum, rotated(found.operators["embedding.weight"], g).square().mean(0))


@pytest.mark.parametrize(("limit", "kind"), [(512, "Dense"), (20, "Diagonal")])
def test_parameters_outside_layers_get_a_dense_block_or_a_diagonal_one(limit, kind, monkeypatch):
    monkeypatch.setattr("headwater.curvature.ekfac.MAX_DENSE", limit)
    net, data = nn.Sequential(nn.Linear(4, 24), nn.LayerNorm(24), nn.Linear(24, 3)), (torch.randn(9, 4), torch.randint(0, 3, (9,)))
    found, capture = fit(curvature.EKFAC(fisher="empirical"), net, tasks.Classification(), data)
    g = explicit_gradients(net, tasks.Classification(), data, capture, "empirical")["1.weight"][0]
    op = found.operators["1.weight"]
    assert type(op).__name__ == kind
    near(op.dense((24,)), g.T @ g / 9 if kind == "Dense" else torch.diag(g.square().mean(0)))


def test_a_side_too_long_to_decompose_keeps_its_axes(monkeypatch):
    monkeypatch.setattr("headwater.curvature.ekfac.MAX_SIDE", 4)
    net, data = problem("linear")
    found, capture = fit(curvature.EKFAC(), net, tasks.Classification(), data)
    op = found.operators["body.0.weight"]
    assert op.left is None and op.right is None  # 5 outputs, 4 inputs and a bias
    g = explicit_gradients(net, tasks.Classification(), data, capture, "exact")["body.0.weight"]
    near(op.spectrum, g.square().sum(0).mean(0))


def test_over_several_points_covariances_are_pooled_and_eigenvalues_averaged_in_one_basis():
    net, data = problem("sequence")
    task, states = tasks.Classification(), []
    for _ in range(3):
        states.append({k: v.clone() for k, v in net.state_dict().items()})
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p) * 0.3)
    found, capture = fit(curvature.EKFAC(), net, task, data, states=states)
    squares, covariances = {}, {}
    for state in states:
        net.load_state_dict(state)
        for name, g in explicit_gradients(net, task, data, capture, "exact").items():
            if capture.blocks[name].matrix:
                squares.setdefault(name, []).append(rotated(found.operators[name], g).square().sum(0).mean(0))
        for gradients in capture.each(task.exact, data):
            for name, block in capture.blocks.items():
                if block.matrix:
                    covariances[name] = covariances.get(name, 0) + gradients[name].pieces[0].covariances(True, False)[0]
    for name, each in squares.items():
        near(found.operators[name].spectrum, torch.stack(each).mean(0))
        basis = found.operators[name].left
        turned = basis.mT @ covariances[name] @ basis
        near(turned, torch.diag_embed(torch.diagonal(turned, dim1=-2, dim2=-1)), 1e-9)


def test_points_with_other_data_and_other_tasks_count_by_their_examples():
    net = nn.Linear(4, 3)
    a, b = ((torch.randn(n, 4), torch.randn(n, 3)) for n in (5, 11))
    one, two = tasks.Regression(outputs="sum"), tasks.Regression(scale=0.5, outputs="sum")
    capture = Capture(net, one.loss, a)
    setting = curvature.Setting(capture, 3, torch.device("cpu"))
    found = curvature.Dense().fit([point(net, one, a), point(net, two, b)], setting).operator.dense((15,))
    x = torch.cat([torch.cat([t[0], torch.ones(len(t[0]), 1)], 1) * s for t, s in ((a, 2**0.5), (b, 1.0))])
    near(found, torch.kron(torch.eye(3), x.T @ x / 16))


# ---- labels drawn from the model


@pytest.mark.parametrize("estimate", [curvature.EKFAC, curvature.Dense, curvature.Diagonal])
@pytest.mark.parametrize("fisher", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("name", ["linear", "bare parameters", "tied by hand"])
def test_no_estimate_depends_on_the_batch_size(name, estimate, fisher):
    """With sampled labels too: rules, torch.func and the plain loop must meet the same labels, in whatever parts they run."""
    net, data = problem(name)
    task, kind = tasks.Classification(), estimate(fisher=fisher, seed=5)
    whole, capture = fit(kind, net, task, data, batch_size=10)
    for size in (1, 2, 3):
        fresh, _ = fit(kind, net, task, data, batch_size=size)  # its first batches are as small as those that layouts are found with
        again, _ = fit(kind, net, task, data, batch_size=size, capture=capture)
        for other in (fresh, again):
            for (key, t), (same, u) in zip(kind.tensors(other).items(), kind.tensors(whole).items(), strict=True):
                assert key == same
                if key.endswith("spectrum"):
                    near(t, u)


@pytest.mark.parametrize("name", ["linear", "bare parameters", "tied by hand", "recurrent"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_sampled_labels_are_those_of_the_example_in_every_parameter(name):
    """Dense holds the terms between rule-covered and fallback parameters, which labels that differ would spoil."""
    net, data = problem(name)
    task = tasks.Classification()
    found, capture = fit(curvature.Dense(fisher="sampled", seed=2), net, task, data, batch_size=3)
    rows = torch.cat([g[0].flatten(1) for g in explicit_gradients(net, task, data, capture, "sampled", seed=2).values()], 1)
    near(found.operator.dense((rows.shape[1],)), rows.T @ rows / len(rows))


def test_sampled_labels_are_reproducible_and_the_seed_matters():
    net, data = problem("linear")
    spectra = [fit(curvature.EKFAC(fisher="sampled", seed=s), net, tasks.Classification(), data)[0].operators["out.weight"].spectrum for s in (1, 1, 2)]
    assert torch.equal(spectra[0], spectra[1]) and not torch.allclose(spectra[0], spectra[2])


def test_a_task_of_ones_own_can_sample():
    net, data = nn.Linear(4, 2), (torch.randn(8, 4), torch.randn(8, 2))

    def sample(model, batch, draws):
        mean = model(batch[0])  # without no_grad: what is drawn is held fixed all the same
        return batch[0], mean.detach() + draws.normal(2).to(mean) * 0.5**0.5

    own = tasks.Task(loss=lambda mod, b: (mod(b[0]) - b[1]).square().sum(1), measure=lambda mod, b: -(mod(b[0]) - b[1]).square().sum(1), sample=sample)
    ours = fit(curvature.EKFAC(fisher="sampled"), net, tasks.Regression(outputs="sum"), data)[0]
    near(fit(curvature.EKFAC(), net, own, data)[0].operators["weight"].spectrum, ours.operators["weight"].spectrum)


def test_auto_is_exact_up_to_32_outputs_and_sampled_beyond():
    for outputs, kind in ((32, "exact"), (33, "sampled")):
        net, data = nn.Linear(2, outputs), (torch.randn(4, 2), torch.zeros(4, dtype=torch.long))
        automatic, named = (fit(curvature.Diagonal(fisher=f), net, tasks.Classification(), data)[0].operators["weight"].spectrum for f in ("auto", kind))
        assert torch.equal(automatic, named)


# ---- dense matrices by torch.func


def flat(tree, blocks):
    """Parameters' derivatives {name: (..., *shape)} with one leading axis, in the order of the blocks."""
    return torch.cat([block.pack({p: tree[p] for p in block.parameters}, lead=1).flatten(1) for block in blocks.values()], 1)


WEIGHTED = {"weight": torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64), "label_smoothing": 0.2, "scale": 0.7}


@pytest.mark.parametrize("settings", [{}, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", ["linear", "grouped convolution", "tied weights", "bare parameters"])
def test_dense_gauss_newton_is_jacobian_hessian_jacobian(name, settings):
    net, data = problem(name)
    task = tasks.Classification(**settings)
    found, capture = fit(curvature.Dense(), net, task, data)
    values = {n: p.detach() for n, p in net.named_parameters()}
    total = 0
    for i in range(10):
        x, y = data[0][i : i + 1], data[1][i : i + 1]
        j = flat(jacrev(lambda v, x=x: functional_call(net, v, (x,), tie_weights=True)[0])(values), capture.blocks)
        z = net(x).detach()
        a = jacrev(jacrev(lambda z, y=y: task.scale * F.cross_entropy(z, y, task.weight, label_smoothing=task.label_smoothing, reduction="sum")))(z)
        total = total + j.T @ a.reshape(3, 3) @ j
    near(found.operator.dense((total.shape[0],)), total / 10, 1e-10)


@pytest.mark.parametrize("name", ["linear", "tied weights", "bare parameters"])
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_dense_hessian_is_that_of_torch_func(name):
    net, data = problem(name)
    task = tasks.Classification()
    found, capture = fit(curvature.Dense("hessian"), net, task, data, batch_size=3)
    values = {n: p.detach() for n, p in net.named_parameters()}
    h = hessian(lambda v: F.cross_entropy(functional_call(net, v, (data[0],), tie_weights=True), data[1]))(values)
    rows = {a: flat({b: h[b][a].reshape(*h[b][a].shape[: values[b].ndim], -1).movedim(-1, 0) for b in values}, capture.blocks) for a in values}
    rows = {a: r.reshape(*values[a].shape, -1) for a, r in rows.items()}
    matrix = flat({a: r.movedim(-1, 0) for a, r in rows.items()}, capture.blocks)
    near(found.operator.dense((len(matrix),)), matrix, 1e-10)


def test_a_hessian_that_torch_func_cannot_vectorise():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            table = torch.zeros(len(x), 3)
            table[:, 0] = torch.tanh(self.layer(x)).sum(1)
            return table

    net, data = InPlace(), (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    found, _ = fit(curvature.Dense("hessian"), net, tasks.Classification(), data)
    loss = tasks.Classification().loss(net, data).mean()
    g = torch.autograd.grad(loss, [*net.parameters()], create_graph=True)
    entries = torch.cat([part.flatten() for part in g])
    h = [torch.cat([part.flatten() for part in torch.autograd.grad(value, [*net.parameters()], retain_graph=True)]) for value in entries]
    order = torch.tensor([*[k for row in range(3) for k in (*range(row * 4, row * 4 + 4), 12 + row)]])
    near(found.operator.dense((15,)), torch.stack(h)[order][:, order], 1e-10)


def test_the_empirical_diagonal_is_the_mean_of_squares():
    net, data = problem("embedding")
    found, capture = fit(curvature.Diagonal(fisher="empirical"), net, tasks.Classification(), data)
    for name, g in explicit_gradients(net, tasks.Classification(), data, capture, "empirical").items():
        near(found.operators[name].spectrum, g[0].square().mean(0))


# ---- settings, storage, refusals


ESTIMATES = [curvature.EKFAC(), curvature.Dense(), curvature.Dense("hessian"), curvature.Diagonal()]
each_estimate = pytest.mark.parametrize("estimate", ESTIMATES, ids=repr)


@each_estimate
def test_a_curvature_is_rebuilt_from_its_tensors_exactly(estimate):
    net, data = problem("bare parameters")
    found, capture = fit(estimate, net, tasks.Classification(), data)
    tensors = {k: t.clone() for k, t in estimate.tensors(found).items()}
    again = estimate.rebuild(tensors, capture)
    vectors = {n: torch.randn(2, *b.shape) for n, b in capture.blocks.items()}
    flows = [c.flow(dict.fromkeys(vectors, 0.7), dict.fromkeys(vectors, 0.1), dict.fromkeys(vectors, 0.0)) for c in (found, again)]
    for act in (lambda f: f.respond(lambda s: 1 / (s + 0.1)), lambda f: f.carry(lambda s: torch.exp(-s))):
        a, b = (act(f)(vectors) for f in flows)
        assert a.keys() == b.keys() == vectors.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert all(torch.equal(t, u) for t, u in zip(estimate.tensors(again).values(), tensors.values(), strict=True))


@each_estimate
def test_adams_gains_reach_every_kind_of_block(estimate):
    """One gain per parameter, in blocks of one, two and three axes."""
    net, data = problem("bare parameters")
    found, capture = fit(estimate, net, tasks.Classification(), data)
    gain = {n: torch.rand(b.shape) + 0.1 for n, b in capture.blocks.items()}
    flow = found.flow(gain, dict.fromkeys(gain, 0.1), dict.fromkeys(gain, 0.0))
    vectors = {n: torch.randn(2, *b.shape) for n, b in capture.blocks.items()}
    for out in (flow.respond(lambda s: torch.exp(-s))(vectors), flow.carry(lambda s: torch.exp(-s))(vectors)):
        assert all(out[n].shape == v.shape and torch.isfinite(out[n]).all() for n, v in vectors.items())


def test_gains_and_decays_of_a_joint_matrix_lie_where_their_parameters_do():
    net, data = problem("linear")
    found, capture = fit(curvature.Dense(), net, tasks.Classification(), data)
    gain = {n: torch.rand(b.shape) + 0.1 if k else 0.7 for k, (n, b) in enumerate(capture.blocks.items())}
    decay = {n: 0.1 * k for k, n in enumerate(capture.blocks)}
    vectors = {n: torch.randn(2, *b.shape) for n, b in capture.blocks.items()}
    flow = found.flow(gain, decay, dict.fromkeys(gain, 0.05))
    size = sum(b.size for b in capture.blocks.values())
    p, d = (torch.cat([torch.as_tensor(v[n]).expand(b.shape).flatten() for n, b in capture.blocks.items()]) for v in (gain, decay))
    matrix = p.sqrt()[:, None] * (found.operator.dense((size,)) + torch.diag(d)) * p.sqrt() + 0.05 * torch.eye(size)
    s, v = torch.linalg.eigh(matrix)
    u = torch.cat([t.flatten(1) for t in vectors.values()], 1)
    expected = u @ (p.sqrt()[:, None] * (v @ torch.diag(torch.exp(-s)) @ v.T) * p.sqrt())
    near(torch.cat([t.flatten(1) for t in flow.respond(lambda s: torch.exp(-s))(vectors).values()], 1), expected)


@each_estimate
def test_examples_takes_so_many_evenly_spaced(estimate):
    net, data = problem("linear", 21)
    few = type(estimate)(**{**vars(estimate), "examples": 5})
    found, _ = fit(few, net, tasks.Classification(), data)
    chosen, _ = fit(estimate, net, tasks.Classification(), tuple(t[[0, 5, 10, 15, 20]] for t in data))
    for (key, t), u in zip(estimate.tensors(found).items(), estimate.tensors(chosen).values(), strict=True):
        if key.endswith("spectrum"):
            near(t, u)


@each_estimate
def test_a_batch_that_does_not_fit_is_halved(estimate, monkeypatch):
    net, data = problem("linear")
    task = tasks.Classification()
    whole, capture = fit(estimate, net, task, data)
    real = task._logits

    def small(model, batch):
        if len(batch[0]) > 3:
            raise MemoryError
        return real(model, batch)

    monkeypatch.setattr(task, "_logits", small)
    found, _ = fit(estimate, net, task, data, batch_size=10, capture=capture)
    for (key, t), u in zip(estimate.tensors(found).items(), estimate.tensors(whole).values(), strict=True):
        if key.endswith("spectrum"):
            near(t, u)


def test_progress_counts_every_example_of_every_pass():
    net, data = problem("linear")
    for estimate in ESTIMATES:
        done = []
        capture = Capture(net, tasks.Classification().loss, data)
        estimate.fit([point(net, tasks.Classification(), data)] * 2, curvature.Setting(capture, 4, torch.device("cpu"), done.append))
        assert sum(done) == 2 * 10 * estimate.passes


def test_a_dense_matrix_of_a_large_model_is_refused_with_the_way_out():
    net, data = nn.Linear(4000, 3), (torch.randn(2, 4000), torch.zeros(2, dtype=torch.long))
    for matrix in ("gauss_newton", "hessian"):
        with pytest.raises(InputError, match=r"12,003 trained parameters(.|\n)*at most 12,000(.|\n)*hw.EKFAC\(\)"):
            fit(curvature.Dense(matrix), net, tasks.Classification(), data)


@pytest.mark.parametrize("make", [curvature.EKFAC, curvature.Dense, curvature.Diagonal])
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(InputError, match=r"fisher='true'(.|\n)*'empirical'"):
        make(fisher="true")
    with pytest.raises(InputError, match=r"examples=0(.|\n)*at least one"):
        make(examples=0)
    with pytest.raises(InputError, match="'gauss_newton' or 'hessian'"):
        curvature.Dense("fisher")


@each_estimate
def test_a_nan_in_the_weights_is_refused(estimate):
    net, data = problem("linear")
    capture = Capture(net, tasks.Classification().loss, data)
    with torch.no_grad():
        net.out.bias[0] = float("nan")
    with pytest.raises(NotFinite, match="curvature"):
        fit(estimate, net, tasks.Classification(), data, capture=capture)
