"""Judgements that call the explanation, or the training, again: stability, remove-and-retrain, parameter randomisation."""

import copy

import numpy as np
import pandas
import pytest
import torch
from torch import nn

import headwater as hw
from headwater import evaluate, report
from headwater.errors import InputError, NotFinite
from headwater.evaluate.randomisation import ssim

# ---- max-sensitivity -------------------------------------------------------------------------------------------------------------


def test_scores_proportional_to_the_input_change_as_the_input_does():
    x = np.random.default_rng(0).normal(size=(6, 10))
    found = evaluate.max_sensitivity(lambda z: 3 * z, x, radius=0.1, draws=200)
    most = 0.1 * np.sqrt(10) / np.linalg.norm(x, axis=1)
    assert (found.values < most).all() and (found.values > 0.6 * most).all()
    assert np.allclose(evaluate.max_sensitivity(lambda z: -70 * z, x, radius=0.1, draws=200).values, found.values)


def test_the_largest_draw_counts_and_more_draws_find_no_less():
    x = np.random.default_rng(0).normal(size=(6, 10))
    few, many = (evaluate.max_sensitivity(lambda z: z**2, x, draws=draws, seed=4) for draws in (3, 30))
    assert np.array_equal(few.changes, many.changes[:3]) and np.array_equal(many.values, many.changes.max(0)) and (many.values > few.values).any()


def test_only_what_can_move_moves_and_by_no_more_than_its_radius():
    ids, x = torch.arange(6).reshape(3, 2), torch.ones(3, 2)
    seen = []

    def explain(inputs):
        seen.append(inputs)
        return inputs["x"].numpy()

    evaluate.max_sensitivity(explain, {"ids": ids, "x": x}, radius={"ids": 9.0, "x": np.array([0.5, 0.0])})
    first, *others = seen
    assert first["x"] is x and all(torch.equal(s["ids"], ids) and torch.equal(s["x"][:, 1], x[:, 1]) for s in others)
    moves = torch.stack([s["x"][:, 0] - 1 for s in others])
    assert moves.abs().max() <= 0.5 and moves.abs().max() > 0.4 and moves.std() > 0.2


def test_frames_move_in_their_columns_of_floats():
    frame = pandas.DataFrame({"a": [1.0, 2.0], "name": ["x", "y"], "count": [1, 2]})
    seen = []
    evaluate.max_sensitivity(lambda f: (seen.append(f), f[["a"]].to_numpy())[1], frame, radius=0.5, draws=2)
    assert (seen[1]["a"] != frame["a"]).all() and all((seen[1][c] == frame[c]).all() for c in ("name", "count"))


def test_a_network_is_more_stable_nearby():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(8, 5)
    near, far = (evaluate.max_sensitivity(lambda z: hw.explain(net, z, target=0, progress=False), x, radius=r) for r in (0.01, 0.5))
    assert near.mean.high < far.mean.low and "good: small" in repr(near) and len(near.to_frame()) == 8


def test_scores_of_nothing_have_no_relative_change():
    assert np.isnan(evaluate.max_sensitivity(lambda z: 0 * z, np.ones((2, 3))).values).all()


@pytest.mark.parametrize(
    ("explain", "inputs", "settings", "error"),
    [
        (lambda z: z, np.ones((2, 3)), {"draws": 0}, InputError),
        (lambda z: z, np.ones((2, 3)), {"radius": 0.0}, InputError),
        (lambda z: z, np.ones((2, 3)), {"radius": np.ones(4)}, InputError),
        (lambda z: z, np.ones((2, 3), dtype=int), {}, InputError),
        (lambda z: z * np.nan, np.ones((2, 3)), {}, NotFinite),
    ],
)
def test_max_sensitivity_refuses(explain, inputs, settings, error):
    with pytest.raises(error):
        evaluate.max_sensitivity(explain, inputs, **settings)


# ---- parameter randomisation -----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A network with every kind of state: dropout, a norm with running statistics, convolutions."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 3)  # registered first, runs last
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 3, stride=2, padding=1), nn.ReLU())

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def trained(seed=0):
    """Images of a bar whose row tells the class, and a network that has learned it."""
    torch.manual_seed(seed)
    y = torch.arange(48) % 3
    x = 0.3 * torch.randn(48, 1, 8, 8)
    x[torch.arange(48), 0, 1 + 2 * y] += 2
    model = Small()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.train(), x[:12], y[:12]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in b)


def test_integrated_gradients_forget_with_the_model_and_an_edge_detector_does_not():
    model, x, y = trained()
    model.eval()
    edges = np.abs(np.diff(x.numpy(), axis=2, append=0))
    good = evaluate.randomisation(model, lambda m: hw.explain(m, x, target=y, progress=False))
    bad = evaluate.randomisation(model, lambda m: edges)
    assert good.verdict == "pass" and good.passed and bad.verdict == "fail" and not bad.passed
    assert all(np.allclose(values, 1) for values in bad.cascading.values())
    assert good.means["spearman"][-1].high < 0.6 < good.control["spearman"].mean()


def test_an_edge_detector_with_a_touch_of_the_model_is_still_flagged():
    model, x, y = trained()
    edges = np.abs(np.diff(x.numpy(), axis=2, append=0))
    mixed = evaluate.randomisation(model, lambda m: edges + 0.02 * hw.explain(m, x, target=y, progress=False).values)
    assert mixed.verdict == "fail"


def test_the_model_is_put_back_exactly_after_success_and_after_failure():
    model, x, y = trained()
    before, grads, random = state(model), [p.grad.clone() for p in model.parameters() if p.grad is not None], torch.get_rng_state()
    evaluate.randomisation(model, lambda m: hw.explain(m, x, target=y, progress=False))
    assert same(before, state(model)) and torch.equal(random, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(grads, [p.grad for p in model.parameters() if p.grad is not None], strict=True))
    calls = []

    def failing(m):
        calls.append(state(m))
        if len(calls) == 4:
            raise RuntimeError("in the middle")
        return x.numpy()

    with pytest.raises(RuntimeError, match="in the middle"):
        evaluate.randomisation(model, failing)
    assert not same(before, calls[3]) and same(before, state(model)) and torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


def test_layers_go_from_the_output_down_in_the_order_that_they_run():
    model, x, y = trained()
    seen = []

    def explain(m):
        seen.append(state(m))
        return hw.explain(m, x, target=y, progress=False)

    found = evaluate.randomisation(model, explain)
    assert found.layers == ("head", "body.4", "body.1", "body.0") and found.alone == ("head", "body.4", "body.0")
    assert any("body.1" in note for note in found.notes)
    kinds = {name: [key for key in seen[0] if key.startswith(name + ".") and "num" not in key] for name in found.layers}

    def changed(at):
        return {name for name, keys in kinds.items() if not all(torch.equal(seen[0][k], seen[at][k]) for k in keys)}

    cascade = [changed(2 + k) for k in range(4)]  # after the model itself and the control
    assert cascade == [set(found.layers[: k + 1]) for k in range(4)]
    move = seen[1]["head.weight"] - seen[0]["head.weight"]
    assert move.std() == pytest.approx(0.01 * float(seen[0]["head.weight"].std()), rel=0.2) and changed(1) == set(found.layers)
    assert [changed(6 + k) for k in range(3)] == [{name} for name in found.alone]


def test_scores_that_read_one_layer_change_with_that_layer_only():
    model, x, _ = trained()
    found = evaluate.randomisation(model, lambda m: (m(x), m.body[4].weight.detach().reshape(12, 6).numpy())[1])
    alone = dict(zip(found.alone, found.independent["spearman"], strict=True))
    assert (alone["head"] == 1).all() and (alone["body.0"] == 1).all() and np.abs(alone["body.4"]).mean() < 0.6
    assert found.cascading["spearman"][0].min() == 1 and found.cascading["spearman"][1].mean() < 0.5
    unseen = evaluate.randomisation(model, lambda m: m.body[4].weight.detach().reshape(12, 6).numpy())
    assert unseen.layers == ("body.4", "body.1", "body.0", "head")  # the model did not run: the last registered first


def test_parameters_without_a_reset_or_a_call_of_their_own_are_redrawn_too():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.linspace(1, 2, 4)), nn.MultiheadAttention(4, 2, batch_first=True)
            self.held = nn.Linear(4, 4)

        def forward(self, x):
            return (self.inner(x * self.scale, x, x, need_weights=False)[0] @ self.held.weight).sum((1, 2))

    torch.manual_seed(0)
    model, seen = Odd(), []
    x = torch.randn(5, 3, 4)
    found = evaluate.randomisation(model, lambda m: (seen.append(state(m)), m(x), x.numpy())[2])
    assert found.layers == ("(the model)", "inner")
    last = seen[3]
    assert all(not torch.equal(seen[0][k], last[k]) for k in ("scale", "held.weight", "inner.in_proj_weight", "inner.out_proj.weight"))


def test_chosen_layers_alone():
    model, x, y = trained()
    found = evaluate.randomisation(model, lambda m: hw.explain(m, x, target=y, progress=False), layers=["body"])
    assert found.layers == ("body",)
    for layers in (["nothing"], [], ["body", "body"], ["body.2"]):
        with pytest.raises(InputError):
            evaluate.randomisation(model, lambda m: x.numpy(), layers=layers)
    with pytest.raises(InputError):
        evaluate.randomisation(lambda z: z, lambda m: x.numpy())


def test_scores_that_are_random_themselves_are_undecided():
    model, x, _ = trained()
    rng = np.random.default_rng(0)
    assert evaluate.randomisation(model, lambda m: rng.normal(size=x.shape)).verdict == "undecided"


def test_randomisation_can_be_shown():
    model, x, y = trained()
    found = evaluate.randomisation(model, lambda m: hw.explain(m, x, target=y, progress=False))
    page = report.Page("Sane?", sections=(report.Section("", parts=(found.curve,)),))
    assert "layers randomised" in report.text(page) and "good: near 0" in repr(found)
    assert len(found.to_frame()) == 12 * (4 + 3) and set(found.cascading) == {"spearman", "spearman of sizes", "ssim"}


def test_ssim_is_that_of_the_definition():
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    a, b = rng.random((2, 20, 16))
    found = ssim(a[None], b[None])[0]

    def local(image):
        return gaussian_filter(image, 1.5, mode="nearest")

    va, vb, ab = local(a * a) - local(a) ** 2, local(b * b) - local(b) ** 2, local(a * b) - local(a) * local(b)
    expected = (2 * local(a) * local(b) + 1e-4) * (2 * ab + 9e-4) / ((local(a) ** 2 + local(b) ** 2 + 1e-4) * (va + vb + 9e-4))
    assert found == pytest.approx(expected.mean(), abs=2e-3) and ssim(a[None], a[None])[0] == pytest.approx(1) and abs(found) < 0.2


# ---- remove and retrain ----------------------------------------------------------------------------------------------------------


def centroids(inputs, labels, seed):
    """The nearest class mean: a training in one line."""
    means = np.stack([np.asarray(inputs)[np.asarray(labels) == c].mean(0) for c in (0, 1)])
    return lambda X: ((np.asarray(X)[:, None] - means) ** 2).reshape(len(X), 2, -1).sum(2).argmin(1)


def planted(n=300, columns=10, seed=0):
    """Column 3 tells the class, the others nothing."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(size=(n, columns))
    x[:, 3] += 6 * y - 3
    return (x[:200], y[:200]), (x[200:], y[200:])


def test_without_the_one_informative_column_a_retrained_model_is_at_chance():
    train, test = planted()
    right = np.eye(10)[3]
    found = evaluate.roar(
        train, test, centroids, {"right": lambda m, X: np.tile(right, (len(X), 1)), "wrong": lambda m, X: np.tile(1 - right, (len(X), 1))}, fractions=(0.1, 0.5), seeds=2
    )
    right_line, wrong_line = ([m.mean for m in found.lines[name]] for name in ("right", "wrong"))
    assert right_line[0] > 0.95 and right_line[1] < 0.65 and wrong_line[1] > 0.95 and wrong_line[2] > 0.95
    assert found.advantage["random (right)"].low > 0.1 and found.advantage["random (wrong)"].high < 0
    assert found.values["random"].shape == (2, 3, 100) and "faster than both controls" in repr(found) and len(found.to_frame()) == 9


def test_train_and_test_get_the_mean_of_the_training_data_where_scores_are_largest():
    train, test = planted()
    seen = []

    def fit(inputs, labels, seed):
        seen.append(inputs)
        model = centroids(inputs, labels, seed)
        return lambda X: (seen.append(X), model(X))[1]

    scores = np.arange(10.0) * np.where(np.arange(10) % 2, -1, 1)  # the size counts
    evaluate.roar(train, test, fit, lambda m, X: np.tile(scores, (len(X), 1)), fractions=(0.3,), seeds=(5,), measure=lambda m, X, y: (m(X) == y).astype(float))
    original, changed, changed_test = seen[0], seen[2], seen[3]
    assert np.array_equal(original, train[0])
    for x, of in ((changed, train[0]), (changed_test, test[0])):
        assert np.array_equal(x[:, :7], of[:, :7]) and np.allclose(x[:, 7:], train[0].mean(0)[7:])


def test_images_get_a_blurred_control_and_networks_a_default_measure():
    torch.manual_seed(0)
    y = torch.arange(80) % 2
    x = torch.randn(80, 1, 8, 8)
    x[:, :, :2, :2] += (4 * y - 2)[:, None, None, None]

    def fit(inputs, labels, seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), labels).backward()
            optimizer.step()
        return net

    def explain(m, inputs):
        return hw.explain(m, inputs, target=m(inputs).argmax(1), progress=False)

    found = evaluate.roar((x[:60], y[:60]), (x[60:], y[60:]), fit, explain, fractions=(0.1,), seeds=2, parts=2)
    assert set(found.lines) == {"the scores", "random", "random, blurred"} == set(found.values) and set(found.advantage) == {"random", "random, blurred"}
    assert found.lines["the scores"][0].mean > 0.9 and all(found.advantage[name].low > 0.1 for name in ("random", "random, blurred"))
    page = report.Page("Roar", sections=(report.Section("", parts=(found.curve,)),))
    assert "quality after retraining" in report.text(page)


def test_regressors_are_measured_by_their_squared_error():
    from sklearn.linear_model import LinearRegression

    rng = np.random.default_rng(0)
    X = rng.normal(size=(150, 4))
    y = X @ [3.0, 1.0, 0.0, 0.0] + 0.1 * rng.normal(size=150)
    found = evaluate.roar((X[:100], y[:100]), (X[100:], y[100:]), lambda a, b, s: LinearRegression().fit(a, b), lambda m, a: hw.explain(m, a, progress=False), seeds=1)
    model = LinearRegression().fit(X[:100], y[:100])
    assert found.lines["the scores"][0].mean == pytest.approx(-((model.predict(X[100:]) - y[100:]) ** 2).mean())


def test_roar_refuses_what_cannot_be_judged():
    train, test = planted()
    explain = lambda m, X: np.ones((len(X), 10))  # noqa: E731
    good = {"train": train, "test": test, "fit": centroids, "explain": explain, "seeds": 1, "fractions": (0.5,)}
    worse = [
        {"train": train[0]},
        {"train": (train[0].astype(int), train[1])},
        {"train": (train[0][:50], train[1])},
        {"test": (test[0][:, :4], test[1])},
        {"train": (np.where(train[0] > 2, np.nan, train[0]), train[1])},
        {"fractions": (0.0,)},
        {"fractions": ()},
        {"seeds": 0},
        {"seeds": (1, 1)},
        {"explain": {}},
        {"explain": {"random": explain}},
        {"measure": lambda m, X, y: 1.0},
        {"explain": lambda m, X: np.ones((len(X), 3))},
    ]
    for change in worse:
        with pytest.raises(InputError):
            evaluate.roar(**{**good, **change})
    with pytest.raises(NotFinite):
        evaluate.roar(**{**good, "measure": lambda m, X, y: np.full(len(X), np.nan)})
    copied = copy.deepcopy(train)
    evaluate.roar(**good)
    assert np.array_equal(copied[0], train[0])


def test_the_blurred_control_removes_whole_regions_and_the_random_one_scattered_pixels():
    rng, seen = np.random.default_rng(0), []
    x, y = rng.normal(size=(40, 1, 12, 12)), np.arange(40) % 2

    def fit(inputs, labels, seed):
        seen.append(inputs)
        return centroids(inputs, labels, seed)

    evaluate.roar((x[:30], y[:30]), (x[30:], y[30:]), fit, lambda m, X: np.ones(X.shape), fractions=(0.5,), seeds=1)
    alike = [((m := (changed != x[:30]))[..., 1:] == m[..., :-1]).mean() for changed in seen[1:]]  # do neighbours share their fate?
    assert abs(alike[1] - 0.5) < 0.05 and alike[2] > 0.75
    assert all(((changed != x[:30]).sum((1, 2, 3)) == 72).all() for changed in seen[1:])


def test_intervals_of_roar_are_those_of_the_mean_over_test_examples():
    train, test = planted(n=600)
    found = evaluate.roar(train, test, lambda a, b, s: None, lambda m, X: np.ones((len(X), 10)), fractions=(0.5,), seeds=2, measure=lambda m, X, y: X[:, 0])
    clean, values = found.lines["the scores"][0], test[0][:, 0]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert clean.mean == pytest.approx(values.mean()) and clean.high - clean.low == pytest.approx(2 * half, rel=0.15)
