"""Attacks, statistics of explanations and detectors: closed forms, oracles of other libraries, planted differences and their absence."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import headwater as hw
from headwater.audit import adversarial
from headwater.audit.logistic import Logistic
from headwater.errors import HeadwaterError, InputError, NotFinite
from headwater.features.calls import Call


def linear(weights):
    model = nn.Linear(len(weights[0]), len(weights), bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor(weights, dtype=torch.float64)
    return model


def network(activation=nn.GELU, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), activation(), nn.Linear(16, 8), activation(), nn.Linear(8, 3)).double()


def points(n=20, size=12, seed=1):
    return torch.rand(n, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- attacks


@pytest.mark.parametrize(("norm", "size"), [(math.inf, 0.1), (2, 0.2)])
def test_a_linear_model_is_attacked_as_strongly_as_can_be(norm, size):
    model, x = linear([[1.0, -2.0, 0.5], [-1.0, 1.0, 0.25]]), torch.full((4, 3), 0.5, dtype=torch.float64)
    direction = model.weight[1] - model.weight[0]  # what raises the loss of class 0 most
    best = x + size * (direction.sign() if norm == math.inf else direction / direction.norm())
    found = adversarial.pgd(model, x, torch.zeros(4, dtype=torch.int64), size, norm=norm, steps=40, step=size).inputs
    torch.testing.assert_close(found, best.detach(), atol=1e-9, rtol=0)
    if norm == math.inf:
        torch.testing.assert_close(adversarial.fgsm(model, x, [0] * 4, size).inputs, best.detach())


@pytest.mark.parametrize("norm", [math.inf, 2])
def test_attacks_stay_within_reach_and_in_the_box_and_raise_the_loss(norm):
    model, x, y = network(), points(), torch.arange(20) % 3
    found = adversarial.pgd(model, x, y, 0.3, norm=norm)
    away = (found.inputs - x).flatten(1)
    assert (away.norm(dim=1, p=norm) <= 0.3 + 1e-12).all()
    assert found.inputs.min() >= 0 and found.inputs.max() <= 1
    loss = nn.CrossEntropyLoss(reduction="none")
    assert (loss(model(found.inputs), y) > loss(model(x), y)).all()
    assert torch.equal(found.fooled, model(found.inputs).argmax(1) != y)


def test_an_attack_does_not_depend_on_the_batch_and_leaves_the_model_as_it_was():
    model, x, y = network(), points(), torch.arange(20) % 3
    model.train()
    whole = adversarial.pgd(model, x, y, 0.1, seed=3)
    assert torch.allclose(adversarial.pgd(model, x, y, 0.1, seed=3, batch_size=7).inputs, whole.inputs, atol=1e-12)
    assert not torch.equal(adversarial.pgd(model, x, y, 0.1, seed=4).inputs, whole.inputs)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0.0}, "size=0.0"),
        ({"labels": [5] * 20}, "labels up to 5"),
        ({"labels": [0] * 3}, "labels of shape"),
        ({"inputs": points() + 1}, "outside bounds"),
        ({"inputs": torch.zeros(20, 12, dtype=torch.int64)}, "not one floating tensor"),
        ({"norm": 1}, "norm=1"),
        ({"steps": 0}, "steps=0"),
        ({"bounds": (1.0, 0.0)}, "bounds="),
    ],
)
def test_bad_attacks_are_refused(change, message):
    asked = {"model": network(), "inputs": points(), "labels": [0] * 20, "size": 0.1, **change}
    with pytest.raises(InputError, match=message):
        adversarial.pgd(**asked)


# ---- statistics


def test_the_statistics_are_those_of_scipy_and_numpy():
    rng = np.random.default_rng(0)
    values = rng.standard_t(5, size=(6, 200))
    change = np.abs(values.sum(1))
    found = adversarial.dispersion(torch.from_numpy(values), torch.from_numpy(change)).numpy().T
    size, share = np.abs(values), np.abs(values) / np.abs(values).sum(1, keepdims=True)
    expected = [
        np.log(values.std(1) / change),
        np.log(size.sum(1) / change),
        stats.iqr(values, axis=1) / values.std(1),
        np.log(stats.kurtosis(values, axis=1, fisher=False)),
        np.sort(size, 1)[:, -2:].sum(1) / size.sum(1),
        np.sort(size, 1)[:, -20:].sum(1) / size.sum(1),
        stats.entropy(share, axis=1) / np.log(200),
        -np.minimum(values, 0).sum(1) / size.sum(1),
    ]
    assert len(found) == len(adversarial.DISPERSION)
    for name, mine, theirs in zip(adversarial.DISPERSION, found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9, err_msg=name)


def test_statistics_depend_on_neither_the_unit_nor_the_order_of_the_parts():
    values, change = points(5, 30) - 0.4, torch.rand(5, dtype=torch.float64) + 0.1
    first = adversarial.dispersion(values, change)
    torch.testing.assert_close(adversarial.dispersion(1000 * values, 1000 * change), first)
    torch.testing.assert_close(adversarial.dispersion(values[:, torch.randperm(30)], change), first)


def test_explanations_that_say_nothing_have_finite_statistics():
    found = adversarial.dispersion(torch.zeros(2, 5, dtype=torch.float64), torch.full((2,), 1e-12, dtype=torch.float64))
    assert torch.isfinite(found).all()
    with pytest.raises(InputError, match="single part"):
        adversarial.dispersion(torch.zeros(2, 1), torch.ones(2))


def test_a_fingerprint_is_of_the_predicted_class_and_says_what_it_measured():
    model, x = network(), points()
    found = adversarial.fingerprint(model, x, layers=["1", "3"])
    assert found.predicted.tolist() == model(x).argmax(1).tolist()
    assert len(found.names) == len(set(found.names)) == found.values.shape[1]
    assert {n.split(":")[0] for n in found.names} == {"input", "1", "3"}
    scores = hw.explain(model, x, model(x).argmax(1), rule=hw.quadrature.gauss_legendre(16), progress=False)
    alone = adversarial.fingerprint_of(scores)
    np.testing.assert_allclose(alone.values[:, :8], found.values[:, :8], rtol=1e-9)
    counted = adversarial.fingerprint(model, x, tolerance=1e-3)
    assert "input: evaluations" in counted.names
    assert "input: evaluations" not in found.names
    with pytest.raises(InputError, match="logits"):
        adversarial.fingerprint(lambda t: t.sum(1), x)


def test_plain_suspicions_are_what_they_say():
    model, x = network(), points()
    found, out = adversarial.plain(model, x), network()(x)
    np.testing.assert_allclose(found["softmax"], -out.softmax(1).max(1).values.detach(), rtol=1e-9)
    two = out.sort(1, descending=True).values.detach()
    np.testing.assert_allclose(found["margin"], two[:, 1] - two[:, 0], rtol=1e-9)
    np.testing.assert_allclose(found["roughness"], np.abs(np.diff(x.numpy(), axis=1)).mean(1))


# ---- the detector


def described(values, names=None):
    return adversarial.Fingerprint(tuple(names or (f"s{k}" for k in range(values.shape[1]))), values)


def test_logistic_regression_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(150, 4)), rng.normal(size=(40, 4)) + np.array([1.0, 0.0, -0.5, 0.2])]) * np.array([1.0, 10.0, 0.1, 1.0])
    second = np.arange(190) >= 150
    mine = Logistic.fit(np.c_[x, np.ones(190)], second, ridge=2.0)
    z = (x - x.mean(0)) / x.std(0)
    theirs = linear_model.LogisticRegression(C=0.5, class_weight="balanced", tol=1e-10, max_iter=1000).fit(z, second)
    np.testing.assert_allclose(mine(np.c_[x, np.ones(190)]), theirs.decision_function(z), atol=1e-4)
    assert mine.weights[4] == 0  # a column that does not vary


@pytest.mark.parametrize(("x", "second"), [(np.zeros((4, 2)), [False] * 4), (np.zeros((4, 2)), [True, False]), (np.zeros(4), [True, False, True, False])])
def test_logistic_regression_needs_rows_of_two_kinds(x, second):
    with pytest.raises(InputError, match="two kinds"):
        Logistic.fit(x, np.array(second))
    with pytest.raises(NotFinite):
        Logistic.fit(np.full((4, 2), np.nan), np.array([True, False, True, False]))


def test_one_class_is_the_mahalanobis_distance():
    values = np.random.default_rng(0).multivariate_normal([1, 2], [[1.0, 0.9], [0.9, 1.0]], size=4000)
    judge = adversarial.detector(described(values), shrink=1e-9)
    odd = described(np.array([[1.0, 2.0], [3.0, 4.0], [3.0, 0.0]]))
    assert judge(odd)[0] == pytest.approx(0, abs=0.02)
    np.testing.assert_allclose(judge(odd)[1:], [4 / 0.95, 4 / 0.05], rtol=0.1)  # dᵀ C⁻¹ d: along the correlation, and across it


@pytest.mark.parametrize("known", [False, True])
def test_a_planted_difference_is_found_at_the_rates_that_theory_gives(known):
    rng, shift = np.random.default_rng(1), 3.0
    draw = lambda n, far: described(rng.normal(size=(n, 3)) + np.array([far, 0, 0]))  # noqa: E731
    judge = adversarial.detector(draw(4000, 0), draw(2000, shift) if known else None)
    found = adversarial.detected(judge(draw(2000, 0)), {"planted": judge(draw(2000, shift))}, {"nothing": judge(draw(2000, 0))}, bootstrap=100)
    best = stats.norm.cdf(shift / np.sqrt(2))
    if known:  # a linear rule is the best there is
        assert found.auc["planted"].mean == pytest.approx(best, abs=0.01)
        assert found.found["planted"][0.05].mean == pytest.approx(stats.norm.sf(stats.norm.isf(0.05) - shift), abs=0.04)
    else:
        lengths = [(rng.normal(size=(20_000, 3)) + np.array([far, 0, 0])) ** 2 for far in (0, shift)]  # the distance cannot know the direction
        assert found.auc["planted"].mean == pytest.approx(hw.evaluate.auroc(np.concatenate(lengths).sum(1), np.arange(40_000) >= 20_000), abs=0.02)
        assert found.auc["planted"].mean < best
    assert found.flagged["nothing"][0.05].low < 0.05 < found.flagged["nothing"][0.05].high
    assert judge.flags(draw(4000, 0), 0.05).mean() == pytest.approx(0.05, abs=0.02)
    assert "never robust" in repr(judge) and "never robust" in repr(found)


def test_nothing_is_found_where_nothing_was_planted():
    covered = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        judge = adversarial.detector(described(rng.normal(size=(200, 6))), described(rng.normal(size=(60, 6))), seed=seed)
        auc = adversarial.detected(judge(described(rng.normal(size=(200, 6)))), {"none": judge(described(rng.normal(size=(100, 6))))}, bootstrap=100).auc["none"]
        covered += auc.low <= 0.5 <= auc.high
    assert covered >= 16


def test_the_interval_of_the_auc_covers_the_truth():
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        auc = adversarial.detected(rng.normal(size=80), {"a": rng.normal(size=60) + 1}, bootstrap=200, rates=(0.05,)).auc["a"]
        covered += auc.low <= stats.norm.cdf(1 / np.sqrt(2)) <= auc.high
    assert covered >= 34


def test_bad_fingerprints_and_suspicions_are_refused():
    one, judge = described(np.random.default_rng(0).normal(size=(50, 3))), adversarial.detector(described(np.random.default_rng(0).normal(size=(50, 3))))
    with pytest.raises(InputError, match="which the detector was fitted on"):
        judge(described(np.zeros((2, 3)), ("a", "b", "c")))
    with pytest.raises(InputError, match="rate="):
        judge.threshold(0.01)  # 25 benign examples do not say what one in a hundred does
    with pytest.raises(InputError, match="2 kinds"):
        adversarial.detector([one, described(np.zeros((9, 2)))])
    with pytest.raises(InputError, match="benign examples"):
        adversarial.detector(one.at([0, 1]))
    with pytest.raises(InputError, match="finite"):
        adversarial.detected([0.0, 1.0], {"a": [np.nan]}, rates=(0.5,))
    with pytest.raises(InputError, match="clean example above"):
        adversarial.detected([0.0, 1.0], {"a": [2.0]}, rates=(0.05,))


# ---- the attack that knows the detector


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
@pytest.mark.parametrize("baseline", [None, hw.baselines.dataset(points(9, seed=5), 3)])
def test_the_differentiable_suspicion_is_the_detectors(activation, baseline):
    model, x = network(activation), points()
    asked = {"baseline": baseline, "layers": ["1", "3"]}
    taken = adversarial.fingerprint(model, x, **asked)
    judge = adversarial.detector(taken, adversarial.fingerprint(model, points(seed=9), **asked))
    function = adversarial.suspicion(judge, model, x, softplus=None, **asked)
    np.testing.assert_allclose(function(x, torch.arange(20)).detach().numpy(), judge(taken), rtol=1e-7, atol=1e-7)


def test_its_gradient_is_the_finite_difference():
    model, x = network(), points(4)
    judge = adversarial.detector(adversarial.fingerprint(model, points(), layers=["1"]))
    function = adversarial.suspicion(judge, model, x, layers=["1"])
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(at, torch.arange(4)).sum(), at)
    for j in (0, 7):
        step = torch.zeros_like(x)
        step[:, j] = 1e-6
        difference = (function(x + step, torch.arange(4)) - function(x - step, torch.arange(4))) / 2e-6
        torch.testing.assert_close(gradient[:, j], difference.detach(), rtol=1e-4, atol=1e-4)


def trained():
    """A network that has learned which of three sums is the largest."""
    model, x = network(nn.ReLU), points(300, seed=7)
    y = x.reshape(300, 3, 4).sum(2).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def test_who_knows_the_detector_is_less_suspicious_and_still_fools_the_model():
    model, x = trained(), points(60)
    y = model(x).argmax(1)
    plain = adversarial.pgd(model, x, y, 0.25, steps=20)
    look = lambda p: adversarial.fingerprint(model, p)  # noqa: E731
    judge = adversarial.detector(look(x), look(plain.inputs[plain.fooled]))
    knowing = adversarial.evading(model, x, y, 0.25, adversarial.suspicion(judge, model, x), weight=0.3, steps=30)
    both = plain.fooled & knowing.fooled
    assert both.sum() >= 10 and knowing.fooled.sum() >= 0.8 * plain.fooled.sum()
    assert judge(look(knowing.inputs[both])).mean() < judge(look(plain.inputs[both])).mean() - 0.5
    assert (knowing.inputs - x).abs().max() <= 0.25 + 1e-12
    careless = adversarial.evading(model, x, y, 0.25, adversarial.suspicion(judge, model, x), weight=0.0, steps=30)
    assert careless.fooled.sum() >= plain.fooled.sum() - 2  # without the weight it is PGD of the margin
    both = careless.fooled & knowing.fooled
    assert (knowing.suspicion[both] - careless.suspicion[both]).mean() < -0.1


def test_of_all_points_on_its_way_the_least_suspicious_is_kept():
    model, x = trained(), points(60)
    y = model(x).argmax(1)
    judge = adversarial.detector(adversarial.fingerprint(model, x), adversarial.fingerprint(model, adversarial.pgd(model, x, y, 0.25).inputs))
    function = adversarial.suspicion(judge, model, x)
    short, long = (adversarial.evading(model, x, y, 0.25, function, weight=0.1, step=0.05, steps=steps) for steps in (8, 20))
    assert (long.fooled | ~short.fooled).all()
    both = short.fooled & long.fooled
    assert (long.suspicion[both] <= short.suspicion[both]).all()
    assert (long.suspicion[both] < short.suspicion[both]).any()
    torch.testing.assert_close(long.suspicion, function(long.inputs, torch.arange(60)).detach())


def test_a_detector_of_something_else_has_no_gradient():
    model, x = network(), points()
    judge = adversarial.detector(adversarial.fingerprint(model, x, tolerance=1e-2))
    with pytest.raises(HeadwaterError, match="a tolerance has no gradient"):
        adversarial.suspicion(judge, model, x)
    with pytest.raises(InputError, match="not one floating"):
        adversarial.pgd(model, (x, x), [0] * 20, 0.1)
    assert Call.of(model, x, None).n == 20
