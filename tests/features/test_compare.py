"""Two models and two inputs: attributions of a difference are differences of attributions, and more precise where it is small."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headwater as hw
from headwater.errors import InputError
from headwater.features.compare import compare_models

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).double()


def near(model, share=1e-3):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.add_(share * torch.randn(24, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return other


@pytest.mark.parametrize(
    "target",
    [1, Y, hw.targets.log_odds(2), hw.targets.loss(F.cross_entropy, Y), lambda out: out.logsumexp(1)],
    ids=["index", "one each", "log_odds", "loss", "function"],
)
def test_the_difference_of_two_models_is_linear(target):
    e = compare_models(net(0), net(1), X, target, progress=False)
    one, two = (hw.explain(net(k), X, target, progress=False) for k in (0, 1))
    np.testing.assert_allclose(e.values, one.values - two.values, atol=1e-13)
    np.testing.assert_allclose(e.output, one.output - two.output, atol=1e-13)
    np.testing.assert_allclose(e.values.sum(1) - e.residual, e.output - e.baseline_output, atol=1e-13)
    assert "first model minus second" in e.target and "first model's" in e.notes[-1]


def test_a_tolerance_is_kept_for_the_difference():
    model, settings = net(), {"tolerance": 1e-2, "max_evaluations": 4096, "progress": False}
    e = compare_models(model, near(model), X, 1, **settings)
    apart = hw.explain(model, X, 1, **settings).minus(hw.explain(near(model), X, 1, **settings))
    assert e.converged.all() and (e.relative_residual < 1e-2).all()
    assert (apart.relative_residual > 3e-2).any()  # each within its tolerance, their difference not
    fine = compare_models(model, near(model), X, 1, rule=hw.quadrature.midpoint(6000), progress=False)
    assert np.linalg.norm(e.values - fine.values, axis=1).max() < np.linalg.norm(apart.values - fine.values, axis=1).max() / 2


def test_the_spread_over_baselines_is_that_of_the_difference():
    model, b = net(), hw.baselines.dataset(X + 1, 6)
    e = compare_models(model, near(model), X, 1, baseline=b, progress=False)
    apart = hw.explain(model, X, 1, baseline=b, progress=False).minus(hw.explain(near(model), X, 1, baseline=b, progress=False))
    np.testing.assert_allclose(e.values, apart.values, atol=1e-13)
    each = [compare_models(model, near(model), X, 1, baseline=point[0], progress=False).values for point in b.references((X,), 0).points[0]]
    np.testing.assert_allclose(e.stderr, np.std(each, 0, ddof=1) / np.sqrt(6), atol=1e-13)
    assert e.stderr.mean() < apart.stderr.mean() / 50


def test_networks_of_tokens_are_compared_each_through_its_own_embedding():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 1), nn.Tanh()) for _ in range(2)]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    e = compare_models(*models, ids, progress=False)
    one, two = (hw.explain(model, ids, progress=False) for model in models)
    np.testing.assert_array_equal(e.values, one.values - two.values)
    assert e.notes[-1].startswith("Positive")


def test_estimators_are_compared_too():
    linear = pytest.importorskip("sklearn.linear_model")
    one, two = linear.Ridge(1.0).fit(X.numpy(), X[:, 0].numpy() + Y.numpy()), linear.Ridge(10.0).fit(X.numpy(), X[:, 1].numpy())
    e = compare_models(one, two, X.numpy(), progress=False)
    base = e.values - X.numpy() * (one.coef_ - two.coef_)
    np.testing.assert_allclose(base, np.broadcast_to(base[:1], base.shape), atol=1e-12)


def test_models_are_left_as_they_were():
    models = [nn.Sequential(net(k), nn.Dropout(0.5)) for k in range(2)]
    e = compare_models(*models, X, 1, progress=False)
    assert all(m.training for m in models) and "training mode" in e.notes[0]


def test_two_inputs_are_compared_by_taking_one_as_the_baseline():
    model = net()
    one, other = X[:4], X[4:]
    e = hw.explain(model, one, 1, baseline=other, rule=hw.quadrature.midpoint(2000), progress=False)
    np.testing.assert_allclose(e.values.sum(1), (model(one) - model(other))[:, 1].detach().numpy(), atol=1e-3)
    back = hw.explain(model, other, 1, baseline=one, rule=hw.quadrature.midpoint(2000), progress=False)
    np.testing.assert_allclose(e.values, -back.values, atol=1e-12)


@pytest.mark.parametrize(
    ("second", "settings", "match"),
    [
        (lambda: net()[:4], {}, "shapes"),
        (lambda: net().float(), {}, "one precision"),
        (net, {"layer": "0"}, "layer="),
        (net, {"target": 9}, "target 9"),
        (lambda: lambda x: x.sum(), {}, "shapes"),
    ],
)
def test_bad_input_is_named(second, settings, match):
    with pytest.raises(InputError, match=match):
        compare_models(net(), second(), X, progress=False, **{"target": 1, **settings})
