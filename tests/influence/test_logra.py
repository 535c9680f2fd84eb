"""LoGra: influence in a projected space, against explicit matrices; exact where nothing is projected; nothing left out and nothing left behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.curvature.projected import ProjectedFisher
from headwater.errors import InputError
from headwater.influence.engine import Engine
from headwater.influence.logra import RelativeInverse
from headwater.linalg.projected import Projected
from tests.influence.brute import Brute
from tests.influence.test_index import collate, picture, pictures, sentences, trained, words
from tests.influence.test_laws import ASKED, OPTIMIZERS, TASK, TRAIN, close, record, same_weights, sgd, softmax_hessian, values

LAYERS = [slice(0, 25), slice(25, 43)]  # weight and bias of the small network's two layers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("logra") / "run", sgd())


# ----------------------------------------------------------------------------------------------------- against explicit matrices


@pytest.mark.parametrize("projection", [hw.projections.Rademacher(6), hw.projections.Leading(6), hw.projections.Gaussian(9)], ids=repr)
def test_where_no_side_is_projected_it_is_exact_influence_of_each_layer(run, projection):
    brute, state = Brute(run), run.weights(60)
    fisher = brute.gauss_newton(state, TRAIN[0], softmax_hessian)
    u, g = brute.gradients(TASK.measure, state, ASKED), brute.gradients(TASK.loss, state, TRAIN)
    for damping in (0.1, 2.0):
        truth = 0.0
        for layer in LAYERS:
            own = fisher[layer, layer]
            truth = truth - u[:, layer] @ np.linalg.solve(own + damping * np.trace(own) / len(own) * np.eye(len(own)), g[:, layer].T) / len(g)
        assert close(values(run, method=hw.LoGra(projection=projection, damping=damping)), truth, 1e-7)


def written_out(run, method, asked, train, task):
    """The docstring's formula, with every gradient whole and every map a Kronecker product; the maps of random projections anew."""
    engine, (row,) = Engine.of(run, None), method.plan(run).rows
    engine.load(row.at[0])
    operators, total = engine.curvature(row.curvature).operators, 0.0
    gradients = [{n: b.dense() for n, b in engine.capture.gradients(f, batch).items()} for f, batch in ((task.measure, asked), (task.loss, train))]
    for name, block in engine.capture.blocks.items():
        u, g = (part[name] for part in gradients)
        if block.matrix:
            groups, out, inner = block.shape
            left, right = (side(method, f"{name}|{which}", groups, size) for which, size in (("left", out), ("right", inner)))
            u, g = ((left @ v @ right.mT) for v in (u, g))
        u, g = u.flatten(1), g.flatten(1)
        fisher = g.mT @ g / len(g)
        assert block.matrix or operators[name].dense(block.shape).shape == fisher.shape
        if fisher.trace() < 1e-25 * gradients[1][name].square().sum():
            continue  # the map sends the layer's gradients to zero: nothing but rounding is left
        ridge = method.damping * fisher.trace() / len(fisher)
        total = total - u @ torch.linalg.solve(fisher + ridge * torch.eye(len(fisher), dtype=fisher.dtype), g.mT) / len(g)
    return total.numpy()


def side(method, name, groups, size):
    dim = method.curvature.projection.dim
    if size <= dim:
        return torch.eye(size, dtype=torch.float64).expand(groups, -1, -1)
    return method.curvature.projection.matrix(name, groups * size, dtype=torch.float64).reshape(dim, groups, size).transpose(0, 1)


@pytest.mark.parametrize("projection", [hw.projections.Rademacher(3), hw.projections.Gaussian(4, seed=2), hw.projections.SparseJL(4, nonzeros=2)], ids=repr)
def test_projected_scores_are_the_formula(run, projection):
    method = hw.LoGra(projection=projection, fisher="empirical")
    assert close(values(run, method=method), written_out(run, method, ASKED, TRAIN, TASK), 1e-8)


def test_convolutions_in_groups_norms_and_biases(tmp_path):
    """The signs of the last layer's map are equal within each row, and its gradients sum to 0 over classes: that layer has no say."""
    run = trained(tmp_path / "run", picture, pictures(40, 1))
    method = hw.LoGra(dim=2, fisher="empirical")
    assert close(values(run, pictures(4, 2), method), written_out(run, method, pictures(4, 2), pictures(40, 1), TASK), 1e-7)


def test_embeddings_are_projected_by_looking_up_the_map(tmp_path):
    task = hw.tasks.Classification(collate=collate)
    train, asked = sentences(30, 1), sentences(5, 2)
    run = trained(tmp_path / "run", words, train, task=task)
    method = hw.LoGra(dim=4, fisher="empirical")
    assert close(values(run, asked, method), written_out(run, method, collate(asked), collate(train), task), 1e-7)


def test_leading_eigenvectors_are_those_of_the_layers_inputs_and_gradients(run):
    """Orthonormal, and no three directions hold more of the second moments."""
    engine, method = Engine.of(run, None), hw.LoGra(projection=hw.projections.Leading(3), fisher="empirical")
    fit = method.plan(run).rows[0].curvature
    operators = engine.curvature(fit).operators
    engine.load((60,))
    for name, gradient in engine.capture.gradients(TASK.loss, TRAIN).items():
        piece = gradient.pieces[0]
        for held, factor in ((operators[name].left, piece.g), (operators[name].right, piece.a)):
            t = factor[:, 0, 0]
            if t.shape[1] <= 3:
                assert held is None
                continue
            best = torch.linalg.eigvalsh(t.mT @ t)[-3:].sum()
            assert torch.allclose(held[0] @ held[0].mT, torch.eye(3).double()) and torch.allclose((t @ held[0].mT).square().sum(), best)


def test_the_operator_is_its_dense_matrix():
    torch.manual_seed(0)
    left, right, half = torch.randn(2, 3, 5).double(), torch.randn(2, 2, 4).double(), torch.randn(12, 12).double()
    spectrum, basis = torch.linalg.eigh(half @ half.mT)
    for a, b in ((left, right), (left, None), (None, right)):
        size = 2 * (3 if a is not None else 5) * (2 if b is not None else 4)
        full = torch.randn(size, size).double()
        spectrum, basis = torch.linalg.eigh(full @ full.mT)
        op = Projected(a, b, basis, spectrum)
        maps = [torch.kron(a[k] if a is not None else torch.eye(5).double(), b[k] if b is not None else torch.eye(4).double()) for k in range(2)]
        p = torch.block_diag(*maps)
        truth = p.mT @ (basis * spectrum.sqrt()) @ basis.mT @ p
        assert torch.allclose(op.map(torch.sqrt).dense((2, 5, 4)), truth)
        precision = torch.rand(2, 5, 4).double()
        assert torch.allclose(op.precision_in_basis(precision), ((p.mT @ basis) * (precision.reshape(-1, 1) * (p.mT @ basis))).sum(0))


# ------------------------------------------------------------------------------------------------------------------------ laws


def test_two_measures_give_two_answers_and_mix(run):
    def logit(k):
        return lambda model, batch: model(batch[0])[:, k]

    def mixed(model, batch):
        return 2 * model(batch[0])[:, 0] - 3 * model(batch[0])[:, 1]

    zero, one, both = (values(run, method=hw.LoGra(dim=3), measure=m) for m in (logit(0), logit(1), mixed))
    assert not close(zero, one, 0.1) and close(both, 2 * zero - 3 * one, 1e-9)


@pytest.mark.parametrize("kind", ["Adam, L2", "AdamW, groups and a frozen bias"])
def test_batches_and_chunks_change_nothing(kind, tmp_path):
    run = record(tmp_path / "run", OPTIMIZERS[kind])
    for method in (hw.LoGra(dim=3), hw.LoGra(projection=hw.projections.Leading(3))):
        plain = values(run, method=method)
        for path in (run.path / "factors").iterdir():
            path.unlink()  # curvature is made anew by the other batches
        assert close(values(run, method=method, batch_size=7, memory=3000), plain, 1e-9)


def test_the_damping_is_relative(tmp_path):
    """Ten times the loss is ten times the curvature and ten times the gradients: the scores stay what they are."""
    plain, scaled = (same_weights(tmp_path / str(scale), 0.1, task=hw.tasks.Classification(scale=scale)) for scale in (1.0, 10.0))
    assert close(values(scaled, method=hw.LoGra(dim=3)), values(plain, method=hw.LoGra(dim=3)), 1e-9)
    assert torch.equal(RelativeInverse(0.5)(torch.zeros(3)), torch.zeros(3))
    assert torch.allclose(RelativeInverse(0.5)(torch.tensor([1.0, 3.0])), 1 / torch.tensor([2.0, 4.0]))


def test_a_seed_is_a_map(run):
    one, again, other = (values(run, method=hw.LoGra(projection=hw.projections.Rademacher(3, seed=s))) for s in (1, 1, 2))
    assert np.array_equal(one, again) and not close(one, other, 0.1)


def test_self_influence_is_the_diagonal(run):
    for method in (hw.LoGra(dim=3), hw.LoGra(dim=30)):
        alone = hw.self_influence(run, method, progress=False)
        assert alone.unit == "rank only" and close(alone.values[0], np.diag(values(run, TRAIN, method)), 1e-9)


def test_an_index_serves_it_where_it_was_named(run):
    kept = hw.index(run, also=[hw.LoGra(dim=3)], progress=False)
    assert close(values(kept, method=hw.LoGra(dim=3)), values(run, method=hw.LoGra(dim=3)), 1e-9)
    with pytest.raises(InputError, match="was not estimated when the index was built"):
        values(kept, method=hw.LoGra(dim=4, damping=0.3))


def test_nothing_is_shared_between_runs_nor_written_elsewhere(tmp_path, monkeypatch):
    """The next run in the same folder, with fewer examples, has its own scores: no state lies around."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first, second = (trained(tmp_path / str(n), picture, pictures(n, 1)) for n in (40, 24))
    assert values(first, pictures(3, 2), hw.LoGra(dim=2)).shape == (3, 40) and values(second, pictures(3, 2), hw.LoGra(dim=2)).shape == (3, 24)
    assert list((tmp_path / "here").iterdir()) == [] and {f.name for f in tmp_path.iterdir()} == {"40", "24", "here"}


# -------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 2.5}, "dim=2.5"),
        ({"damping": -1}, "damping=-1"),
        ({"fisher": "true"}, "fisher='true'"),
        ({"projection": "random"}, "hw.projections"),
        ({"dim": 3, "projection": hw.projections.Gaussian(4)}, "one dimension"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        hw.LoGra(**settings)


def test_a_space_too_large_for_a_dense_matrix_names_the_layer(run, monkeypatch):
    monkeypatch.setattr("headwater.curvature.projected.MAX_SPACE", 11)
    with pytest.raises(InputError, match=r"16 numbers of '0.weight'(.|\n)*at most 11"):
        values(run, method=replace(hw.LoGra(), projection=hw.projections.Gaussian(4), dim=None, fisher="empirical"), batch_size=5)
    assert ProjectedFisher(hw.projections.Leading(2)).passes == 2
