"""The pseudo-losses against the Gauss-Newton matrix written out by torch.func: J^T A J, with A the loss's Hessian in the outputs."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

from headwater.tasks import Classification, Draws, Language, Regression


@pytest.fixture(autouse=True)
def float64():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def flat(tensors):
    return torch.cat([t.reshape(t.shape[0], -1) for t in tensors.values()], 1)


def jacobian(net, x):
    """d outputs / d parameters, (outputs, parameters), by torch.func."""
    values = {n: p.detach() for n, p in net.named_parameters()}
    out = jacrev(lambda v: functional_call(net, v, (x,)).reshape(-1))(values)
    return flat(out)


def gauss_newton(net, batch, loss):
    """Summed over examples: J^T (Hessian of the loss in the outputs) J."""
    total = 0
    for i in range(len(batch[0])):
        x, y = batch[0][i : i + 1], batch[1][i : i + 1]
        j, z = jacobian(net, x), net(x).detach()
        a = jacrev(jacrev(lambda out, y=y, z=z: loss(out.reshape(z.shape), y)))(z.reshape(-1))
        total = total + j.T @ a @ j
    return total


def outer(net, values):
    """Summed outer products of the gradients of every entry of ``values``."""
    total = 0
    for value in values.reshape(-1):
        g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(value, list(net.parameters()), retain_graph=True)])
        total = total + torch.outer(g, g)
    return total


def net(outputs):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


WEIGHT = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
CLASSIFIERS = {
    "plain": ({}, 3),
    "scaled": ({"scale": 0.3}, 3),
    "class weights": ({"weight": WEIGHT}, 3),
    "smoothed": ({"label_smoothing": 0.3}, 3),
    "smoothed, class weights": ({"weight": WEIGHT, "label_smoothing": 0.3, "scale": 2.0}, 3),
    "one output": ({}, 1),
    "one output, class weights": ({"weight": WEIGHT[1:]}, 1),
}


def classified(case):
    settings, outputs = CLASSIFIERS[case]
    model, task = net(outputs), Classification(**settings)
    batch = (torch.randn(4, 3), torch.randint(0, max(outputs, 2), (4,)))

    def loss(z, y):
        z = torch.cat([torch.zeros_like(z), z], 1) if outputs == 1 else z
        return task.scale * F.cross_entropy(z, y, task.weight, label_smoothing=task.label_smoothing, reduction="sum")

    return model, task, batch, gauss_newton(model, batch, loss)


def near(found, expected):
    assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_exact_classification(case):
    model, task, batch, expected = classified(case)
    values = task.exact(model, batch)
    assert values.shape == (4, task.outputs(model, batch))
    near(outer(model, values), expected)


class Class(Draws):
    """Draws that always give one class, or one number of standard deviations."""

    def __init__(self, value):
        self.value = value

    def categorical(self, logits):
        return torch.full(logits.shape[:-1], self.value)

    def normal(self, *shape):
        return torch.broadcast_to(self.value, (len(self.value) if self.value.ndim > 1 else 1, *shape))


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_sampled_classification_in_expectation(case):
    """Every class drawn once, weighed by its probability: the expectation itself, without chance."""
    model, task, batch, expected = classified(case)
    z = model(batch[0]).detach()
    p = torch.cat([torch.zeros_like(z), z], 1).softmax(1) if z.shape[1] == 1 else z.softmax(1)
    total = 0
    for c in range(p.shape[1]):
        values = task.sampled(model, batch, Class(c))
        assert values.shape == (4, 1)
        total = total + outer(model, p[:, c : c + 1].sqrt() * values)
    near(total, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("outputs", [1, 3])
def test_exact_and_sampled_regression(outputs, scale, reduction):
    model, task = net(outputs), Regression(scale=scale, outputs=reduction)
    batch = (torch.randn(4, 3), torch.randn(4, outputs))
    factor = scale / (outputs if reduction == "mean" else 1)
    expected = gauss_newton(model, batch, lambda z, y: factor * (z - y).square().sum())
    values = task.exact(model, batch)
    assert values.shape == (4, outputs) and task.outputs(model, batch) == outputs
    near(outer(model, values), expected)
    # E[xi xi^T] = 1 also for xi uniform over sqrt(outputs) times the axes: an expectation that can be enumerated
    total = 0
    for k in range(outputs):
        axis = torch.zeros(outputs)
        axis[k] = outputs**0.5
        total = total + outer(model, task.sampled(model, batch, Class(axis))) / outputs
    near(total, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "tokens"])
def test_sampled_language_in_expectation(reduction):
    """Two counted positions of three, every pair of tokens enumerated."""

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(3, 2), nn.Linear(2, 3)

        def forward(self, ids):
            return self.head(torch.tanh(self.embedding(ids).cumsum(1)))

    class Pair(Draws):
        def __init__(self, tokens):
            self.tokens = tokens

        def categorical(self, logits):
            return torch.tensor(self.tokens).expand(logits.shape[:-1])

    model, ids, targets = Tiny(), torch.tensor([[0, 2, 1], [1, 1, 2]]), torch.tensor([[2, -100, 0], [0, 1, -100]])
    task = Language(reduction=reduction, mean_tokens=2.5 if reduction == "tokens" else None)
    factor = {"sum": 1.0, "mean": 0.5, "tokens": 1 / 2.5}[reduction]
    expected = gauss_newton(model, (ids, targets), lambda z, y: factor * F.cross_entropy(z.transpose(1, 2), y, reduction="sum"))
    total = 0
    for i in range(2):
        one = (ids[i : i + 1], targets[i : i + 1])
        p = model(one[0]).detach().softmax(-1)[0]
        for tokens in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
            chance = torch.stack([p[position, token] for position, token in enumerate(tokens)]).prod()
            total = total + chance * outer(model, task.sampled(model, one, Pair(tokens)))
    near(total, expected)
