"""Integrated Hessians: closed forms, the definition by brute force, sums that must agree, and the alarm where they cannot."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headwater as hw
from headwater.errors import InputError, NotFinite
from headwater.features.interactions import interactions as asked_interactions
from headwater.features.quadrature import gauss_log
from headwater.features.softening import Softening


def interactions(*args, **settings):
    return asked_interactions(*args, progress=False, **settings)


def smooth(inputs=5, outputs=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 12), nn.GELU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, outputs)).double()


def points(n=4, inputs=5, seed=1):
    return torch.randn(n, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the rule


@pytest.mark.parametrize("n", [1, 2, 5, 16, 40, 150])
def test_gauss_log_has_the_moments_of_minus_the_logarithm(n):
    rule = gauss_log(n)
    found = [float(rule.weights @ rule.nodes**k) for k in range(2 * n)]
    np.testing.assert_allclose(found, [float(Fraction(1, (k + 1) ** 2)) for k in range(2 * n)], rtol=1e-12)
    assert (np.diff(rule.nodes) > 0).all() and rule.nodes[0] > 0 and rule.nodes[-1] < 1 and (rule.weights > 0).all()
    assert abs(rule.weights @ rule.nodes ** (2 * n) - 1 / (2 * n + 1) ** 2) > 1e-3 / 16.0**n  # and no more than that: it is Gauss's


def test_gauss_log_has_the_tabulated_nodes():
    """Abramowitz and Stegun, table 25.7: n = 3."""
    rule = gauss_log(3)
    np.testing.assert_allclose(rule.nodes, [0.063890793087325, 0.368997063715619, 0.766880303938941], atol=1e-14)
    np.testing.assert_allclose(rule.weights, [0.513404552232363, 0.391980041201488, 0.0946154065661491], atol=1e-14)


def test_a_rule_with_a_weight_is_no_rule_for_attributions():
    with pytest.raises(InputError, match="quadrature"):
        hw.explain(smooth(), points(), 0, rule=gauss_log(8), progress=False)
    with pytest.raises(InputError, match="0 points"):
        interactions(smooth(), points(), 0, points=0)


# ---- closed forms and the definition


@pytest.mark.parametrize("powers", [(1, 1), (2, 1), (1, 1, 1), (3, 0, 2), (1,), (2, 2, 3)])
def test_a_product_of_powers_shares_by_the_powers(powers):
    """f = prod x_i^a_i, degree A: Gamma = a a^T / A^2 f(x), since the integral of (-ln u) u^(A-1) is 1 / A^2."""
    a = torch.tensor(powers, dtype=torch.float64)
    x = 0.5 + torch.rand(3, len(powers), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    e = interactions(lambda x: (x**a).prod(1), x, points=8)
    wanted = torch.outer(a, a) / a.sum() ** 2 * (x**a).prod(1)[:, None, None]
    np.testing.assert_allclose(e.values, wanted.numpy(), atol=1e-13)


def test_a_linear_model_has_no_interactions():
    x, b = points(), points(1, seed=2)[0]
    linear = nn.Linear(5, 2).double()
    e = interactions(linear, x, 1, baseline=b, points=1)
    np.testing.assert_allclose(e.values, torch.diag_embed(linear.weight[1] * (x - b)).detach().numpy(), atol=1e-15)


def attributions(f, x, b, rule):
    """(n, p) Integrated Gradients, differentiable with respect to x."""
    total = 0
    for t, w in zip(rule.nodes, rule.weights, strict=True):
        at = b + t * (x - b)
        total = total + w * torch.autograd.grad(f(at).sum(), at, create_graph=True)[0]
    return (x - b) * total


def by_definition(f, x, b, nodes=24):
    """(n, p, p) Integrated Gradients of each attribution: n^2 points, nothing reduced."""
    rule, rows = hw.quadrature.gauss_legendre(nodes), []
    for i in range(x.shape[1]):
        total = 0
        for t, w in zip(rule.nodes, rule.weights, strict=True):
            at = (b + t * (x - b)).requires_grad_()
            total = total + w * torch.autograd.grad(attributions(f, at, b, rule)[:, i].sum(), at)[0]
        rows.append((x - b) * total)
    return torch.stack(rows, 1).numpy()


def test_interactions_are_attributions_of_attributions():
    net, x, b = smooth(), points(), points(1, seed=2)[0]
    wanted = by_definition(lambda z: net(z)[:, 1], x, b)
    e = interactions(net, x, 1, baseline=b)
    np.testing.assert_allclose(e.values, wanted, atol=1e-12)
    coarse = np.abs(interactions(net, x, 1, baseline=b, points=3).values - wanted).max()
    assert 1e-12 < coarse < 1e-2


def test_sums_agree():
    net, x = smooth(), points()
    e = interactions(net, x, 2)
    base = net(torch.zeros(1, 5).double())[:, 2]
    np.testing.assert_allclose(e.values.sum((1, 2)), (net(x)[:, 2] - base).detach().numpy(), atol=1e-11)
    alone = hw.explain(net, x, 2, rule=hw.quadrature.gauss_legendre(40), progress=False)
    np.testing.assert_allclose(e.values.sum(2), alone.values, atol=1e-11)
    np.testing.assert_allclose(e.attributions, alone.values, atol=1e-13)
    assert np.abs(e.residual).max() < 1e-11 and np.abs(e.row_residual).max() < 1e-11
    assert e.provenance["asymmetry"] < 1e-14 and not e.notes
    np.testing.assert_array_equal(e.values, e.values.swapaxes(1, 2))
    np.testing.assert_array_equal(e.evaluations, 34 + 16 * 6)


# ---- what counts as a part


def test_the_row_of_a_chosen_feature_is_that_of_the_matrix():
    net, x = smooth(), points()
    e = interactions(net, x, 0)
    one = interactions(net, x, 0, feature="d", feature_names=list("abcde"))
    assert one.feature == 3 and (one.evaluations < e.evaluations).all()
    np.testing.assert_allclose(one.values, e.values[:, 3], atol=1e-15)
    np.testing.assert_allclose(one.residual, 0, atol=1e-11)
    np.testing.assert_array_equal(interactions(net, x, 0, feature=-2).values, one.values)


def test_groups_are_sums_of_blocks():
    net, x = smooth(), points()
    e = interactions(net, x, 0)
    member = np.array([[1, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 1]])
    g = interactions(net, x, 0, groups={"outer": [0, 3], "middle": [2]})
    assert g.feature_names == ("outer", "middle", "(others)")
    np.testing.assert_allclose(g.values, member @ e.values @ member.T, atol=1e-15)
    np.testing.assert_allclose(g.attributions, e.attributions @ member.T, atol=1e-15)
    one = interactions(net, x, 0, groups=["a", "b", "c", "a", "b"], feature="b")
    np.testing.assert_allclose(one.values[:, 1], g.values[:, 2, 2], atol=1e-15)


def test_maps_of_labels_may_differ_from_example_to_example():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.SiLU(), nn.Flatten(), nn.Linear(12, 1)).double()
    x = torch.randn(3, 2, 4, 4).double()
    labels = np.random.default_rng(0).integers(0, 3, (3, 4, 4))
    full = interactions(net, x).values
    g = interactions(net, x, groups=labels, batch_size=16).values
    for k in range(3):
        member = np.stack([np.tile(labels[k].ravel() == c, 2) for c in range(3)]).astype(float)
        np.testing.assert_allclose(g[k], member @ full[k] @ member.T, atol=1e-14)


def test_several_inputs_are_one_long_input():
    net, x = smooth(), points()
    whole = interactions(net, x, 1)
    parts = interactions(lambda a, b: net(torch.cat([a, b.flatten(1)], 1)), (x[:, :3], x[:, 3:, None]), 1)
    np.testing.assert_allclose(parts.values, whole.values, atol=1e-15)
    assert parts.names()[0] == "input 0: feature 0" and parts.inputs is None and whole.inputs is not None
    shares = interactions(lambda a, b: net(torch.cat([a, b], 1)), {"a": x[:, :3], "b": x[:, 3:]}, 1, groups="inputs")
    np.testing.assert_allclose(shares.values[:, 0, 1], whole.values[:, :3, 3:].sum((1, 2)), atol=1e-15)
    assert shares.feature_names == ("a", "b")


class Reader(nn.Module):
    """Attention over embedded tokens, with torch's fused kernel, which has no second derivative."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.mix, self.head = nn.Embedding(11, 4), nn.Linear(4, 12), nn.Linear(4, 2)

    def read(self, e, attend):
        q, k, v = self.mix(e)[:, None].chunk(3, -1)
        return self.head((e + attend(q, k, v)[:, 0]).tanh().mean(1))

    def forward(self, ids):
        return self.read(self.embed(ids), F.scaled_dot_product_attention)


def test_tokens_are_parts_as_a_whole():
    net = Reader().double()
    ids = torch.randint(1, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    e = interactions(net, ids, 1, baseline=hw.baselines.token(0))
    written_out = lambda q, k, v: (q @ k.mT / 2).softmax(-1) @ v  # noqa: E731
    base = net.embed(torch.zeros(6, dtype=torch.int64)).detach()
    flat = interactions(lambda z: net.read(z, written_out), net.embed(ids).detach(), 1, baseline=base).values.reshape(2, 6, 4, 6, 4)
    np.testing.assert_allclose(e.values, flat.sum((2, 4)), atol=1e-14)
    assert e.values.shape == (2, 6, 6) and e.names(0)[2] == "position 2" and np.abs(e.row_residual).max() < 1e-8


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_have_second_derivatives(kind):
    torch.manual_seed(0)
    layer, head = kind(3, 4, batch_first=True), nn.Linear(4, 1)
    e = interactions(lambda x: head(layer(x)[0][:, -1]), torch.randn(2, 4, 3))
    assert np.abs(e.row_residual).max() < 1e-6 and np.abs(e.pairs()).max() > 1e-3


def test_a_layer_is_the_input_of_what_follows():
    net, x = smooth(), points()
    e = interactions(net, x, 1, layer="1")
    hidden, base = net[:2](x).detach(), net[:2](torch.zeros(1, 5).double()).detach()
    np.testing.assert_allclose(e.values, interactions(net[2:], hidden, 1, baseline=base).values, atol=1e-14)


# ---- several baselines, chunks, precision, the model itself


def test_several_baselines_are_averaged_with_their_spread():
    net, x = smooth(), points()
    b = hw.baselines.dataset(points(7, seed=5), 4)
    e = interactions(net, x, 0, baseline=b)
    each = np.stack([interactions(net, x, 0, baseline=point[0]).values for point in b.references((x,), 0).points[0]])
    np.testing.assert_allclose(e.values, each.mean(0), atol=1e-14)
    np.testing.assert_allclose(e.stderr, each.std(0, ddof=1) / 2, atol=1e-14)
    np.testing.assert_allclose(e.residual, 0, atol=1e-11)
    np.testing.assert_allclose(e.reference[0], b.references((x,), 0).points[0][:, 0].mean(0).numpy(), atol=1e-15)


@pytest.mark.parametrize("chunk", [1, 7, 32, 4096])
def test_nothing_depends_on_how_the_work_is_cut(chunk):
    net, x = smooth(), points()
    whole = interactions(net, x, [0, 1, 2, 0])
    np.testing.assert_allclose(interactions(net, x, [0, 1, 2, 0], batch_size=chunk).values, whole.values, atol=1e-15)
    for k in range(4):
        np.testing.assert_allclose(interactions(net, x[k : k + 1], [0, 1, 2, 0][k], batch_size=chunk).values[0], whole.values[k], atol=1e-15)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 0.05)])
def test_lower_precision_is_close(dtype, close):
    net, x = smooth(), points()
    wanted = interactions(net, x, 0)
    e = interactions(copy.deepcopy(net).to(dtype), x.to(dtype), 0)
    assert np.abs(e.values - wanted.values).max() < close * np.abs(wanted.values).max()
    assert e.values.dtype == np.float64


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    x, before, random = points(), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    e = interactions(net, x, 1, softplus=5)
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and not any(m._forward_hooks for m in net.modules())
    assert any("training mode" in note for note in e.notes) and torch.relu(torch.tensor(-1.0)) == 0


# ---- kinks


def kinked(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.LeakyReLU(0.1), nn.Linear(8, 2)).double()


def test_rows_of_a_relu_network_raise_the_alarm():
    with pytest.warns(UserWarning, match=r"kinks \(leaky_relu, relu\)"):
        e = interactions(kinked(), points(), 0)
    assert np.abs(e.pairs()).max() == 0  # a diagonal answer, and wrong
    assert np.abs(e.row_residual).max() > 0.01 and any("softplus=10" in note for note in e.notes)


def test_softplus_is_the_same_network_written_with_softplus():
    net, x = kinked(), points()
    e = interactions(net, x, 0, softplus=8)
    leaky = lambda z: 0.1 * z + 0.9 * F.softplus(z, 8, 100)  # noqa: E731
    written = lambda z: net[4](leaky(net[2](F.softplus(net[0](z), 8, 100))))  # noqa: E731
    np.testing.assert_allclose(e.values, interactions(written, x, 0).values, atol=1e-14)
    np.testing.assert_allclose(e.output, written(x)[:, 0].detach().numpy(), atol=1e-14)
    assert np.abs(e.row_residual).max() < 1e-4 * np.abs(e.attributions).max()
    moved = float((written(x) - net(x))[:, 0].abs().max().detach())
    assert f"{moved:.3g} at most" in e.notes[0] and moved > 1e-3 and "sharpness 8" in e.method


def test_what_keeps_its_kinks_is_named():
    net = nn.Sequential(nn.Conv1d(1, 2, 2), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 1)).double()
    e = interactions(net, points()[:, None], softplus=10)
    assert "max_pool1d kept their kinks" in e.notes[0]
    assert "found no ReLU" in interactions(smooth(), points(), 0, softplus=10).notes[0]


ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.PReLU(3, 0.3), nn.RReLU(0.1, 0.3), nn.Hardtanh(-0.5, 2), nn.Hardsigmoid(), nn.Hardswish()),
    *(nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True), nn.RReLU(0.1, 0.3, inplace=True), nn.Hardtanh(inplace=True), nn.Hardswish(inplace=True)),
    *(torch.relu, F.relu, F.relu6, torch.Tensor.relu, F.hardtanh, F.leaky_relu, lambda x: F.relu(input=x), lambda x: F.hardtanh(x, max_val=3.0)),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", type(a).__name__))
def test_every_ramp_is_softened_and_nearly_the_same(activation):
    activation = activation.eval() if isinstance(activation, nn.Module) else activation
    x = torch.linspace(-8, 8, 99, dtype=torch.float64).view(33, 3)
    activation = activation.double() if isinstance(activation, nn.Module) else activation
    plain = activation(x.clone())
    with Softening(200.0) as soft:
        found = activation(x.clone())
    assert soft.replaced.total() == 1 and not soft.left
    assert 1e-9 < float((found - plain).abs().max().detach()) <= 8 * np.log(2) / 200
    at = x.clone().requires_grad_()
    with Softening(2.0):
        slope = torch.autograd.grad(activation(at * 1).sum(), at, create_graph=True)[0]
    assert float(torch.autograd.grad(slope.sum(), at)[0].abs().max()) > 0.01


@pytest.mark.parametrize("change", [torch.Tensor.relu_, torch.relu_, lambda x: F.relu(x, inplace=True), lambda x: F.leaky_relu_(x, 0.0)])
def test_what_is_changed_in_place_is_changed(change):
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    y = x.clone()
    with Softening(4.0):
        change(y)
    np.testing.assert_allclose(y, F.softplus(x, 4.0, 100), atol=1e-15)


def test_random_slopes_stay_random():
    with Softening(4.0) as soft:
        F.rrelu(torch.ones(3), 0.1, 0.3, True)
        F.rrelu(torch.ones(3), training=True)
        torch.rrelu(torch.ones(3), 0.1, 0.3, True)
    assert not soft.replaced and soft.left["rrelu"] == 3
    with Softening(4.0) as soft:
        torch.rrelu(torch.ones(3), 0.1, 0.3, False)
    assert soft.replaced["rrelu"] == 1


def test_a_tolerance_takes_more_points_where_they_are_needed():
    """LayerNorm divides by a norm that vanishes at a baseline of zeros."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.LayerNorm(6, eps=1e-2), nn.GELU(), nn.Linear(6, 1)).double()
    x = points() * torch.tensor([[0.02], [1.0], [2.0], [0.05]])
    e = interactions(net, x, points=4, tolerance=1e-6)
    assert e.converged.all() and np.ptp(e.evaluations) > 0
    assert (np.linalg.norm(e.row_residual, axis=1) <= 1e-6 * np.linalg.norm(e.attributions, axis=1)).all()
    with pytest.warns(UserWarning, match="take more points"):
        short = interactions(net, x, points=2, tolerance=1e-6, max_points=4)
    assert not short.converged.all() and any("missed the tolerance" in note for note in short.notes)


# ---- functions of arrays


def test_a_smooth_function_of_an_array_is_differentiated_by_differences():
    net, x, b = smooth(), points(), points(1, seed=2)[0]
    rows = []

    def function(z):
        rows.append(len(z))
        return net(torch.from_numpy(z)).detach().numpy()

    wanted = interactions(net, x, 1, baseline=b)
    e = interactions(function, x.numpy(), 1, baseline=b.numpy())
    np.testing.assert_allclose(e.values, wanted.values, atol=1e-6 * np.abs(wanted.output).max())
    np.testing.assert_allclose(e.attributions, wanted.attributions, atol=1e-7)
    assert f"{sum(rows):,} rows" in e.notes[-1] and max(rows) <= 4096
    margin = hw.targets.function(lambda out: out[:, 0] * out[:, 2])  # bends by itself
    wanted = interactions(net, x, margin, groups=list("aabbb"))
    e = interactions(function, x.numpy(), margin, groups=list("aabbb"))
    np.testing.assert_allclose(e.values, wanted.values, atol=1e-6)


def test_units_of_features_do_not_matter_to_differences():
    x, units = points().numpy(), np.array([1e-6, 1.0, 1e6, 3.0, 1e3])

    def function(z):
        return np.tanh(z.sum(1)) * z[:, 1]

    wanted = interactions(function, x, groups=list("abcde")).values
    found = interactions(lambda z: function(z / units), x * units).values
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_steps_of_differences_follow_the_way_and_not_the_size():
    """Years: large numbers that move little."""
    x = points().numpy()

    def function(z):
        return np.tanh(z.sum(1)) * z[:, 1]

    wanted = interactions(function, x).values
    found = interactions(lambda z: function(z - 2000), x + 2000, baseline=2000.0).values
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_steps_raise_the_alarm():
    with pytest.warns(UserWarning, match="change of the output, by up to 100%"):
        interactions(lambda z: np.round(z.sum(1)), 3 + points().numpy())


@pytest.mark.parametrize(
    ("model", "inputs", "match"),
    [
        (lambda z: z.sum(), np.ones((2, 3)), "returned shape"),
        (lambda z: z.sum(1).astype(np.float32), np.ones((2, 3)), "float64"),
        (lambda z: z[:, 0], np.array([["a", "b"]]), "array of numbers"),
        (lambda z: z[:, 0], 3.0, "array of numbers"),
    ],
)
def test_functions_and_arrays_that_do_not_fit_are_named(model, inputs, match):
    with pytest.raises(InputError, match=match):
        interactions(model, inputs)


# ---- bad input


class Once(torch.autograd.Function):
    """A cube whose gradient is not written for being differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0] ** 2


def test_a_model_without_a_second_derivative_is_refused():
    with pytest.raises(InputError, match="cannot be differentiated again"):
        interactions(lambda x: torch.cdist(x[:, None], torch.eye(5).double()[None], p=3.0).sum((1, 2)), points())
    with pytest.warns(UserWarning, match="without a second derivative"):  # torch itself says nothing here
        interactions(lambda x: Once.apply(x.cumsum(1)).sum(1), points())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"feature": 5}, "feature=5 of 5"),
        ({"feature": "z"}, "feature='z'"),
        ({"feature": True}, "feature=True"),
        ({"softplus": 0}, "softplus=0"),
        ({"softplus": "on"}, "softplus='on'"),
        ({"tolerance": 2.0}, "tolerance=2"),
        ({"axis": 1}, "axis=1 without groups"),
        ({"groups": ["a", "b"]}, "2 group names"),
        ({"feature_names": ["a", "b"]}, "2 feature_names"),
        ({"target": 7}, "target 7"),
        ({"baseline": torch.zeros(3)}, "baseline"),
    ],
)
def test_bad_arguments_are_named(settings, match):
    with pytest.raises(InputError, match=match):
        interactions(smooth(), points(), **{"target": 0, **settings})


def test_what_is_no_network_and_what_is_too_large_is_refused():
    tree = type("Forest", (), {"predict": lambda self, x: x[:, 0]})()
    with pytest.raises(InputError, match=r"model\.predict; a tree ensemble jumps"):
        interactions(tree, np.ones((2, 3)))
    wide = nn.Sequential(nn.Linear(20_000, 2), nn.GELU())
    with pytest.raises(InputError, match="group parts"):
        interactions(wide, torch.randn(2, 20_000), 0)
    assert interactions(wide, torch.randn(2, 20_000), 0, feature=3).values.shape == (2, 20_000)


def test_an_infinite_second_derivative_is_named():
    def model(x):  # the square root of |x| from -1 to 1 has no derivative in the middle, where the one node lies
        return (x - gauss_log(1).nodes[0]).abs().sqrt().sum(1) * x.sum(1)

    with pytest.raises(NotFinite, match="example"):
        interactions(model, torch.ones(2, 2).double(), points=1)
