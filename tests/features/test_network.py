"""Networks: the laws of Integrated Gradients under every setting, and everything else that stays as it was."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import headwater as hw
from headwater.errors import BatchCoupling, InputError, NotFinite
from tests.features.nets import Linear, brute, exact_relu, kinked, picture_net, smooth, states

torch.manual_seed(1)
X = torch.randn(5, 6, dtype=torch.float64)
B = torch.randn(6, dtype=torch.float64)
explain = partial(hw.explain, progress=False)

RULES = {
    "gauss_legendre": {"rule": hw.quadrature.gauss_legendre(32)},
    "midpoint": {"rule": hw.quadrature.midpoint(400)},
    "trapezoid": {"rule": hw.quadrature.trapezoid(400)},
    "gauss_kronrod": {"rule": hw.quadrature.gauss_kronrod(31)},
    "tolerance": {"tolerance": 1e-6},
}
each_rule = pytest.mark.parametrize("how", RULES.values(), ids=RULES)
PATHS = {
    "straight": hw.paths.straight(),
    "through": hw.paths.through(torch.ones(6, dtype=torch.float64), 0.3),
    "custom": hw.paths.custom(lambda x, b, t: b + t**2 * (x - b)),
    "guided": hw.paths.guided(steps=300, fraction=0.34),
}


# ---- laws -----------------------------------------------------------------------------------------------------------------------


@each_rule
def test_completeness_and_what_it_says(how):
    model = smooth()
    e = explain(model, X, 1, baseline=B, **how)
    with torch.no_grad():
        change = (model(X) - model(B[None]))[:, 1].numpy()
    assert np.abs(e.values.sum(1) - change).max() < 2e-5
    assert np.allclose(e.residual, e.values.sum(1) - change, atol=1e-14) and np.allclose(e.output - e.baseline_output, change, atol=1e-14)


@pytest.mark.parametrize(
    "rule", [hw.quadrature.gauss_legendre(1), hw.quadrature.midpoint(3), hw.quadrature.left(1), hw.quadrature.right(2), hw.quadrature.trapezoid(2)], ids=repr
)
def test_a_linear_model_is_exact_for_every_rule(rule):
    model = Linear()
    e = explain(model, X, baseline=B, rule=rule)
    assert np.abs(e.values - (model.w * (X - B)).detach().numpy()).max() < 1e-12 and np.abs(e.residual).max() < 1e-12


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_linear_model_is_exact_on_every_path(path):
    model = Linear()
    e = explain(model, X, baseline=B, path=path)
    assert np.abs(e.values - (model.w * (X - B)).detach().numpy()).max() < 1e-12


def test_polynomials_have_their_closed_form():
    ones, zero = torch.tensor([[2.0, 3.0, 5.0]], dtype=torch.float64), 0.0
    e = explain(lambda x: x[:, 0] * x[:, 1] * x[:, 2], ones, baseline=zero)
    assert np.abs(e.values - 10.0).max() < 1e-12
    e = explain(lambda x: x[:, 0] ** 2 * x[:, 1], ones, baseline=zero)
    assert np.abs(e.values - np.array([[8.0, 4.0, 0.0]])).max() < 1e-12  # 2/3 and 1/3 of 12, and the ignored input exactly nothing
    assert e.values[0, 2] == 0


def test_a_smooth_float64_network_is_exact_by_32_points():
    model = smooth()
    e = explain(model, X, 0, baseline=B)
    assert np.abs(e.residual).max() < 1e-10
    for k in range(2):
        assert np.abs(e.values[k] - brute(lambda p: model(p)[:, 0], X[k], B).numpy()).max() < 1e-7


@each_rule
def test_a_feature_at_its_baseline_gets_nothing_and_so_does_an_ignored_one(how):
    x = X.clone()
    x[:, 2] = B[2]
    net = smooth(5)
    e = explain(lambda p: net(torch.cat([p[:, :4], p[:, 5:]], 1))[:, 0], x, baseline=B, **how)
    assert (e.values[:, 2] == 0).all() and (e.values[:, 4] == 0).all() and np.abs(e.values[:, 0]).max() > 0


@pytest.mark.parametrize("how", [RULES["gauss_legendre"], RULES["midpoint"]], ids=["gauss_legendre", "midpoint"])
def test_swapping_the_ends_turns_the_sign(how):
    model = smooth()
    there = explain(model, X, 2, baseline=B, **how).values
    back = explain(model, B.expand(5, -1), 2, baseline=X, **how).values
    assert np.abs(there + back).max() < 1e-13


def test_linearity_symmetry_and_scaling_of_features():
    f, g = smooth(seed=0), smooth(seed=1)
    values = [explain(m, X, 0, baseline=B).values for m in (f, g, lambda p: 2 * f(p) - 3 * g(p))]
    assert np.abs(values[2] - (2 * values[0] - 3 * values[1])).max() < 1e-13
    e = explain(lambda p: torch.sin(p[:, 0] + p[:, 1]) * p[:, 2], torch.tensor([[0.4, 0.4, 1.0]], dtype=torch.float64), baseline=0.1)
    assert abs(e.values[0, 0] - e.values[0, 1]) < 1e-15
    scale = torch.tensor([2.0, 0.5, -3.0, 1.0, 10.0, 0.1], dtype=torch.float64)
    stretched = explain(lambda p: f(p / scale), X * scale, 0, baseline=B * scale).values
    assert np.abs(stretched - values[0]).max() < 1e-13


@each_rule
@pytest.mark.parametrize("make", [smooth, kinked])
def test_a_batch_is_its_examples_one_by_one_however_it_is_cut(how, make):
    model, together = make(), None
    for size in (None, 1, 3, 7):
        e = explain(model, X, 1, baseline=B, batch_size=size, **how)
        together = e if together is None else together
        assert np.abs(e.values - together.values).max() < 1e-12 and (e.evaluations == together.evaluations).all()
    alone = np.concatenate([explain(model, X[k : k + 1], 1, baseline=B, **how).values for k in range(5)])
    assert np.abs(alone - together.values).max() < 1e-12


# ---- how far it is off ------------------------------------------------------------------------------------------------------------


MANY = torch.randn(120, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("points", [8, 16, 32])
def test_the_estimated_error_of_a_fixed_rule_is_near_the_true_one_where_there_are_kinks(points):
    model = kinked()
    truth = np.stack([exact_relu(model, x, B, 1).detach().numpy() for x in MANY])
    e = explain(model, MANY, 1, baseline=B, rule=hw.quadrature.gauss_legendre(points))
    ratio = e.error / (np.linalg.norm(e.values - truth, axis=1) / np.linalg.norm(truth, axis=1))
    assert 0.5 < np.median(ratio) < 6 and np.percentile(ratio, 5) > 0.7
    assert np.median(e.error) > 2 * np.median(e.relative_residual)  # which is smaller than the error: it cancels


@pytest.mark.parametrize("points", [4, 6, 8])
def test_the_estimated_error_of_a_fixed_rule_falls_as_fast_as_the_true_one_where_the_model_is_smooth(points):
    model = smooth()
    truth = explain(model, MANY, 1, baseline=B, rule=hw.quadrature.gauss_legendre(64)).values
    e = explain(model, MANY, 1, baseline=B, rule=hw.quadrature.gauss_legendre(points))
    ratio = e.error / (np.linalg.norm(e.values - truth, axis=1) / np.linalg.norm(truth, axis=1))
    assert np.percentile(ratio, 10) > 0.5 and np.median(ratio) < 1e3
    assert np.median(e.error) < {4: 1e-3, 6: 1e-6, 8: 1e-8}[points]
    assert explain(model, X, 1, baseline=B, rule=hw.quadrature.midpoint(32)).error is None  # a rule that gives no means to tell


def test_kinks_are_followed_until_the_tolerance_is_met():
    model = kinked()
    truth = np.stack([exact_relu(model, x, B, 1).detach().numpy() for x in X])
    for tolerance in (1e-2, 1e-3, 1e-4):
        e = explain(model, X, 1, baseline=B, tolerance=tolerance, max_evaluations=2000)
        off = np.linalg.norm(e.values - truth, axis=1) / np.linalg.norm(truth, axis=1)
        assert e.converged.all() and (e.relative_residual <= 1.01 * tolerance).all()
        assert np.median(off) <= tolerance and off.max() <= 3 * tolerance
        assert (e.error <= tolerance).all() and np.median(off / e.error) < 1.5


def test_a_kink_between_two_nodes_is_found_exactly():
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    e = explain(lambda p: torch.relu(p[:, 0] - 0.37) * 3 + torch.relu(1.1 - p[:, 1]), x, tolerance=1e-2)
    assert np.abs(e.values - np.array([[3 * 0.63, -1.1]])).max() < 1e-12  # where a node stands for half a gap it is off by about 1e-2


def test_the_tangents_need_fewer_points_than_a_fixed_rule():
    model = kinked()
    truth = np.stack([exact_relu(model, x, B, 1).detach().numpy() for x in X])

    def off(e):
        return np.median(np.linalg.norm(e.values - truth, axis=1) / np.linalg.norm(truth, axis=1))

    e = explain(model, X, 1, baseline=B, tolerance=1e-4, max_evaluations=2000)
    fixed = explain(model, X, 1, baseline=B, rule=hw.quadrature.gauss_legendre(int(e.evaluations.mean())))
    assert off(e) < off(fixed) / 3


def test_smooth_examples_stop_at_the_first_level_and_hard_ones_go_on():
    steep = lambda x: torch.sigmoid(x[:, 0] * 40 - 20) + 0.1 * x[:, 1] ** 2  # noqa: E731
    x = torch.tensor([[0.1, 1.0], [1.0, 1.0]], dtype=torch.float64)
    e = explain(steep, x, tolerance=1e-4, max_evaluations=400)
    assert e.evaluations[0] == 10 and e.evaluations[1] > 26 and e.converged.all()
    assert np.abs(e.residual).max() < 1e-4


def test_what_misses_the_tolerance_is_flagged_and_told():
    e = explain(kinked(), X, 1, baseline=B, tolerance=1e-6, max_evaluations=40)
    assert not e.converged.any() and (e.evaluations <= 40).all() and "missed the tolerance" in " ".join(e.notes) and "missed" in repr(e)
    assert (e.error > 1e-6).all()


def test_no_change_of_output_divides_by_nothing():
    even = lambda x: (x**2).sum(1)  # noqa: E731
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    e = explain(even, x, baseline=-x[0], tolerance=1e-3)
    assert abs(float(e.residual[0])) < 1e-12 and e.converged.all() and np.isfinite(e.values).all()
    constant = explain(lambda p: p[:, 0] * 0 + 3.0, x, tolerance=1e-3)
    assert (constant.values == 0).all() and constant.converged.all()


def test_float32_does_not_read_kinks_out_of_rounding():
    model = smooth().float()
    e = explain(model, X.float(), 0, baseline=B.float(), tolerance=1e-4)
    exact = explain(smooth(), X, 0, baseline=B).values
    assert e.converged.all() and (e.evaluations <= 58).all() and np.abs(e.values - exact).max() < 1e-4 * np.abs(exact).max()


# ---- baselines, paths, noise -----------------------------------------------------------------------------------------------------


def test_several_baselines_are_the_mean_of_one_by_one_with_its_standard_error():
    model, data = smooth(), torch.randn(40, 6, dtype=torch.float64)
    e = explain(model, X, 1, baseline=hw.baselines.dataset(data, 5), seed=3)
    points = hw.baselines.dataset(data, 5).references((X,), 3).points[0][:, 0]
    each = np.stack([explain(model, X, 1, baseline=p).values for p in points])
    assert np.abs(e.values - each.mean(0)).max() < 1e-12
    assert np.abs(e.stderr - each.std(0, ddof=1) / np.sqrt(5)).max() < 1e-12
    assert np.abs(e.residual).max() < 1e-6 and e.evaluations.tolist() == [5 * 34] * 5


def test_weights_of_baselines_count():
    model = smooth()
    values = [explain(model, X, 0, baseline=b).values for b in (0.0, 1.0)]
    e = explain(model, X, 0, baseline=hw.baselines.average(0.0, 1.0, weights=[3, 1]))
    assert np.abs(e.values - (0.75 * values[0] + 0.25 * values[1])).max() < 1e-13


def test_a_polyline_is_the_sum_of_its_legs():
    model, stop = smooth(), torch.ones(6, dtype=torch.float64)
    e = explain(model, X, 0, baseline=B, path=hw.paths.through(stop))
    legs = explain(model, stop.expand(5, -1), 0, baseline=B).values + explain(model, X, 0, baseline=stop).values
    assert np.abs(e.values - legs).max() < 1e-12 and np.abs(e.residual).max() < 1e-10


@pytest.mark.parametrize("n", [50, 100])
def test_curved_paths_are_second_order(n):
    model, curve = smooth(), hw.paths.custom(lambda x, b, t: b + (x - b) * torch.stack([t[:, 0] ** (1 + k / 3) for k in range(6)], 1))
    off = [np.abs(explain(model, X, 0, baseline=B, path=curve, rule=hw.quadrature.midpoint(k)).residual).max() for k in (n, 2 * n)]
    assert off[1] < off[0] / 3
    assert np.abs(explain(model, X, 0, baseline=B, path=curve, tolerance=1e-4).relative_residual).max() < 1e-4


def test_blur_goes_from_the_blurred_picture_to_the_picture():
    model, pictures = picture_net().double(), torch.rand(3, 2, 8, 8, dtype=torch.float64)
    e = explain(model, pictures, 0, path=hw.paths.blur(3.0), rule=hw.quadrature.midpoint(200))
    with torch.no_grad():
        model.eval()
        start = model(hw.baselines.blur(3.0).references((pictures,), 0).points[0][0])[:, 0]
    assert np.abs(e.baseline_output - start.numpy()).max() < 1e-10 and np.abs(e.residual).max() < 1e-3
    assert "blurred" in e.baseline


def test_the_guided_path_avoids_what_the_straight_one_crosses():
    wall = lambda x: 50 * torch.exp(-50 * (x[:, 0] - 0.5) ** 2) * (1 - x[:, 1]) ** 4 + x[:, 1]  # noqa: E731
    x = torch.ones(1, 2, dtype=torch.float64)
    straight = explain(wall, x, rule=hw.quadrature.gauss_legendre(64))
    guided = explain(wall, x, path=hw.paths.guided(steps=400, fraction=0.5))
    assert np.abs(guided.residual).max() < 0.1 and abs(guided.values[0, 0]) < abs(straight.values[0, 0]) / 2
    ends = explain(smooth(), X, 0, baseline=B, path=hw.paths.guided(200))
    with torch.no_grad():
        assert np.abs(ends.output - smooth()(X)[:, 0].numpy()).max() < 1e-12
    assert np.abs(ends.residual).max() < 1e-2


def test_noise_is_averaged_with_its_standard_error_and_does_not_depend_on_the_batch():
    model = smooth()
    e = explain(model, X, 0, baseline=B, smooth=hw.Smooth(draws=6, spread=0.05))
    alone = explain(model, X[:1], 0, baseline=B, smooth=hw.Smooth(draws=6, spread=0.05))
    assert np.abs(e.values[:1] - alone.values).max() < 1e-12 and (e.stderr > 0).all() and np.abs(e.residual).max() < 1e-8
    still = explain(model, X, 0, baseline=B, smooth=hw.Smooth(draws=3, spread=0.0))
    assert np.abs(still.values - explain(model, X, 0, baseline=B).values).max() < 1e-12


def test_an_input_that_is_its_baseline_is_pointed_out():
    x = X.clone()
    x[3] = B
    with pytest.warns(UserWarning, match="baseline equals the input of example 3"):
        e = explain(smooth(), x, 0, baseline=B)
    assert (e.values[3] == 0).all() and any("example 3" in note for note in e.notes)


# ---- targets -------------------------------------------------------------------------------------------------------------------------


def test_targets_mean_what_their_names_say():
    model = smooth()
    index = [0, 2, 1, 0, 2]
    each = explain(model, X, index, baseline=B)
    one = [explain(model, X, k, baseline=B).values for k in range(3)]
    assert np.abs(each.values - np.stack([one[k][i] for i, k in enumerate(index)])).max() < 1e-13
    assert np.abs(explain(model, X, hw.targets.margin(2, 0), baseline=B).values - (one[2] - one[0])).max() < 1e-13
    assert np.abs(explain(model, X, lambda out: out[:, 1] * 2, baseline=B).values - 2 * one[1]).max() < 1e-13
    labels = torch.tensor(index)
    loss = explain(model, X, hw.targets.loss(F.cross_entropy, labels), baseline=B)
    with torch.no_grad():
        assert np.abs(loss.output - F.cross_entropy(model(X), labels, reduction="none").numpy()).max() < 1e-12
    odds, chance = explain(model, X, hw.targets.log_odds(labels), baseline=B), explain(model, X, hw.targets.probability(1), baseline=B)
    with torch.no_grad():
        p = model(X).softmax(1)
        picked = p[torch.arange(5), labels]
    assert np.abs(odds.output - (picked / (1 - picked)).log().numpy()).max() < 1e-10 and np.abs(chance.output - p[:, 1].numpy()).max() < 1e-12
    grid = explain(lambda x: torch.stack([model(x), 2 * model(x)], 2), X, (1, 1), baseline=B)
    assert np.abs(grid.values - 2 * one[1]).max() < 1e-12


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (3, "0 to 2"),
        (None, "which output"),
        ((1, 1), "2 numbers for outputs of shape"),
        ([0, 1], "2 targets for example"),
        ([0.5] * 5, "whole numbers"),
        (True, "number of an output"),
        ("cat", "target='cat'"),
        (lambda out: out, "one number each"),
        (hw.targets.loss(F.cross_entropy, torch.zeros(2, dtype=torch.long)), "2 labels"),
        (hw.targets.margin(0, 7), "0 to 2"),
    ],
)
def test_targets_that_name_nothing_are_refused(target, match):
    with pytest.raises(InputError, match=match):
        explain(smooth(), X, target)


# ---- inputs of every kind ----------------------------------------------------------------------------------------------------------


class Sensors(nn.Module):
    """Two inputs, and two arguments that are not explained: one for each example, one for all."""

    def forward(self, camera, radar, gain=None, offset=0.0):
        out = (camera**2).sum((1, 2, 3)) + camera[:, 0, 0, 0] * radar[:, 0] + radar.sum(1)
        return out * (1.0 if gain is None else gain[:, 0]) + offset


CAMERA, RADAR, GAIN = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 1, dtype=torch.float64)


def test_several_inputs_and_extra_arguments_in_every_structure():
    by_place = explain(Sensors(), (CAMERA, RADAR), extra=(GAIN, 3.0))
    by_name = explain(Sensors(), {"camera": CAMERA, "radar": RADAR}, extra={"gain": GAIN, "offset": 3.0}, batch_size=3)
    assert isinstance(by_place.values, tuple) and set(by_name.values) == {"camera", "radar"}
    assert np.abs(by_place.values[0] - by_name.values["camera"]).max() < 1e-12 and np.abs(by_place.residual).max() < 1e-12
    own = (GAIN * (RADAR + torch.cat([CAMERA[:, 0, 0, :1] * RADAR[:, :1] / 2, torch.zeros(4, 4)], 1))).numpy()
    assert np.abs(by_place.values[1] - own).max() < 1e-12
    unused = explain(lambda a, b: (a**2).sum((1, 2, 3)), (CAMERA, RADAR))
    assert (unused.values[1] == 0).all()


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_floating_type(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).to(kind)
    exact = explain(model.double(), X, 0, baseline=B).values
    e = explain(model.to(kind), X.to(kind), 0, baseline=B.to(kind))
    size = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[kind]
    assert e.values.dtype == np.float64 and np.abs(e.values - exact).max() < size * np.abs(exact).max() + (0 if kind != torch.float64 else 1e-12)


def test_numpy_arrays_take_the_type_of_the_model():
    assert np.abs(explain(smooth().float(), X.numpy(), 0).values - explain(smooth(), X, 0).values).max() < 1e-5


class Words(nn.Module):
    """Embeddings scaled inside, positions added, a recurrent layer, dropout: what makes token attribution go wrong elsewhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(30, 8), nn.Embedding(9, 8)
        self.recur, self.out, self.drop = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 2), nn.Dropout(0.3)

    def forward(self, ids, attention_mask=None):
        h = self.words(ids) * 8**0.5 + self.places(torch.arange(ids.shape[1]))
        h, _ = self.recur(h)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        return self.out(self.drop((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)))


IDS = torch.randint(0, 30, (3, 9), generator=torch.Generator().manual_seed(0))


def test_ids_are_explained_at_their_embedding():
    model = Words().double()
    e = explain(model, IDS, 1, rule=hw.quadrature.gauss_legendre(40))
    assert e.values.shape == (3, 9) and np.abs(e.residual).max() < 1e-10 and "training mode" in " ".join(e.notes)
    assert model.training and model.drop.training

    def from_vectors(v):
        h, _ = model.recur(v * 8**0.5 + model.places(torch.arange(9)))
        return model.out(h.mean(1))[:, 1]

    vectors = model.words(IDS).detach()
    own = np.stack([brute(from_vectors, v, torch.zeros_like(v), 2000).sum(-1).numpy() for v in vectors])
    assert np.abs(e.values - own).max() < 1e-6
    token = explain(model, {"ids": IDS, "attention_mask": torch.ones_like(IDS)}, 1, baseline=hw.baselines.token(7))
    same = explain(model, IDS, 1, baseline=7)
    assert np.abs(token.values["ids"] - same.values).max() < 1e-12 and (token.values["attention_mask"] == 0).all()
    assert "attention_mask was kept" in " ".join(token.notes) and same.baseline == "token 7"
    several = explain(model, IDS, 1, baseline=hw.baselines.dataset(torch.randint(0, 30, (20, 9)), 3))
    assert several.stderr.shape == (3, 9)


def test_a_mean_of_ids_and_a_token_for_quantities_are_refused():
    with pytest.raises(InputError, match="mean of token ids"):
        explain(Words().double(), IDS, 1, baseline=hw.baselines.mean(IDS))

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = Words()

        def forward(self, ids, age):
            return self.words(ids)[:, 0] * age[:, 0]

    both = {"ids": IDS, "age": torch.ones(3, 1)}
    with pytest.raises(InputError, match="token as the baseline of floating inputs"):
        explain(Mixed(), both, baseline=hw.baselines.token(3))
    e = explain(Mixed(), both, baseline={"ids": hw.baselines.token(3), "age": 0.0})
    assert np.abs(e.residual).max() < 1e-5 and e.values["age"].shape == (3, 1)


def test_state_is_left_alone_also_when_something_goes_wrong():
    model, pictures = picture_net(), torch.rand(3, 2, 8, 8)
    before, numbers = states(model), torch.random.get_rng_state()
    explain(model, pictures, 0)
    explain(model, pictures, 0, layer="0", space="input", rule=hw.quadrature.midpoint(4))
    with pytest.raises(InputError):
        explain(model, pictures, 99)
    with pytest.raises(InputError):
        explain(model, pictures, 0, layer="0", neuron=(99, 0, 0))
    assert states(model) == before and torch.equal(torch.random.get_rng_state(), numbers)


def test_a_model_in_training_mode_is_explained_in_eval_mode_and_that_is_said():
    model, pictures = picture_net(), torch.rand(3, 2, 8, 8)
    e = explain(model, pictures, 0)
    model.eval()
    quiet = explain(model, pictures, 0)
    assert np.array_equal(e.values, quiet.values) and "BatchNorm2d and Dropout" in e.notes[0] and not quiet.notes
    model.train()
    wrapped = explain(lambda x: model(x)[:, 0], pictures)  # also where the module hides in a function
    assert np.abs(wrapped.values - quiet.values).max() < 1e-6 and model.training


def test_works_where_gradients_are_off_and_gives_plain_arrays():
    model = smooth()
    with torch.no_grad():
        quiet = explain(model, X, 0).values
    with torch.inference_mode():
        inference = explain(model, X.clone(), 0).values
    given = explain(model, X.clone().requires_grad_(), 0)
    assert np.array_equal(quiet, inference) and np.array_equal(quiet, given.values) and type(given.values) is np.ndarray


# ---- layers and neurons ------------------------------------------------------------------------------------------------------------


def test_a_layer_is_explained_as_the_network_after_it():
    model = smooth()
    e = explain(model, X, 1, baseline=B, layer="1")
    with torch.no_grad():
        at, start = model[:2](X), model[:2](B[None])
    own = explain(model[2:], at, 1, baseline=start[0])
    assert np.abs(e.values - own.values).max() < 1e-12 and np.abs(e.residual).max() < 1e-10 and "layer 1" in e.method
    assert np.abs(explain(model, X, 1, baseline=B, layer=model[1]).values - e.values).max() == 0


def test_conductance_sums_to_the_change_is_linear_exact_and_second_order():
    torch.manual_seed(0)
    line = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).double()
    e = explain(line, X, 0, baseline=B, layer="0", space="input", rule=hw.quadrature.midpoint(2))
    with torch.no_grad():
        own = (line[1].weight[0] * (line[0](X) - line[0](B[None]))).numpy()
    assert np.abs(e.values - own).max() < 1e-13
    model = smooth()
    off = [np.abs(explain(model, X, 0, baseline=B, layer="1", space="input", rule=hw.quadrature.midpoint(n)).residual).max() for n in (20, 40)]
    assert off[1] < off[0] / 3


def test_conductance_is_the_integral_along_the_input_path():
    model = smooth()
    e = explain(model, X[:1], 0, baseline=B, layer="1", space="input", rule=hw.quadrature.midpoint(400))
    t = (torch.arange(4000, dtype=torch.float64) + 0.5)[:, None] / 4000
    with torch.no_grad():
        ends = model[:2](B + torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None] * (X[0] - B))
    h = model[:2](B + t * (X[0] - B)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model[2:](h)[:, 0].sum(), h)
    assert np.abs(e.values[0] - (slope * ends.diff(dim=0)).sum(0).numpy()).max() < 1e-5
    assert np.abs(e.values - explain(model, X[:1], 0, baseline=B, layer="1").values).max() > 1e-5  # another question than the layer's own path


def test_a_neuron_is_explained_like_an_output():
    model = smooth()
    e = explain(model, X, baseline=B, layer="1", neuron=5)
    own = explain(model[:2], X, 5, baseline=B)
    assert np.abs(e.values - own.values).max() < 1e-13 and e.target == "neuron (5,) of 1"


def test_what_flows_through_neurons_sums_over_inputs_and_over_neurons():
    model = smooth()
    through = [explain(model, X[:2], 0, baseline=B, layer="1", neuron=u, rule=hw.quadrature.midpoint(60)) for u in range(16)]
    units = explain(model, X[:2], 0, baseline=B, layer="1", space="input", rule=hw.quadrature.midpoint(60)).values
    assert np.abs(np.stack([e.values.sum(1) for e in through], 1) - units).max() < 1e-3
    whole = explain(model, X[:2], 0, baseline=B, rule=hw.quadrature.midpoint(60)).values
    assert np.abs(sum(e.values for e in through) - whole).max() < 1e-12


def test_several_layers_tuples_and_in_place_activations():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.relu = nn.Linear(6, 4), nn.Linear(6, 4), nn.GELU()

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return (a.mul_(2) * torch.tanh(b)).sum(1)  # in place, on the layer's own output

    model = Two().double()
    e = explain(model, X, baseline=B, layer=["a", "b"])
    assert isinstance(e.values, tuple) and [v.shape for v in e.values] == [(5, 4), (5, 4)] and np.abs(e.residual).max() < 1e-10
    words = Words().double()
    out = explain(words, IDS, 1, layer="recur")  # gives (output, (h, c)): the output has a row for each example
    assert out.values.shape == (3, 9, 12) and np.abs(out.residual).max() < 1e-10


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"layer": "nowhere"}, "name of a module"),
        ({"layer": nn.Linear(2, 2)}, "no part of the model"),
        ({"layer": 3}, "layer=3"),
        ({"layer": "1", "neuron": 99}, "neuron="),
        ({"layer": "1", "neuron": (1, 2)}, "1 numbers"),
        ({"neuron": 1}, "without a layer"),
        ({"space": "input"}, "without a layer"),
        ({"layer": "1", "space": "sideways"}, "sideways"),
        ({"layer": "1", "path": hw.paths.straight()}, "path together with a layer"),
        ({"rule": 50}, "one of hw.quadrature"),
        ({"path": "straight"}, "one of hw.paths"),
        ({"tolerance": 2.0}, "between 0 and 1"),
        ({"tolerance": 1e-3, "rule": hw.quadrature.midpoint(3)}, "one of them"),
        ({"max_evaluations": 100}, "without a tolerance"),
        ({"tolerance": 1e-3, "max_evaluations": 4}, "at least 10"),
        ({"batch_size": 0}, "at least 1"),
        ({"path": hw.paths.blur(2.0), "baseline": 0.0}, "blur path and a baseline"),
        ({"path": hw.paths.custom(lambda x, b, t: b)}, "does not end at the input"),
        ({"path": hw.paths.custom(lambda x, b, t: x[:1])}, "shape"),
        ({"path": hw.paths.guided(10), "tolerance": 1e-3}, "guided"),
        ({"output": "probability"}, "no output"),
        ({"discrete": [0]}, "no discrete"),
        ({"baseline": torch.zeros(5)}, "of shape"),
        ({"example_names": ["a"]}, "1 example_names"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, match):
    with pytest.raises(InputError, match=match):
        explain(smooth(), X, 0, **arguments)


def test_a_layer_that_runs_twice_or_never_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.f(self.f(x)).sum(1)

    model = Twice().double()
    with pytest.raises(InputError, match="ran 2 times"):
        explain(model, X, layer="f")
    with pytest.raises(InputError, match="ran 0 times"):
        explain(model, X, layer="idle")


# ---- models and inputs that cannot be explained -------------------------------------------------------------------------------------

COUPLED = nn.BatchNorm1d(6, track_running_stats=False).double()


@pytest.mark.parametrize(
    ("model", "inputs", "kind", "match"),
    [
        (lambda x: x.sum(), X, InputError, "one row for each example"),
        (lambda x: x.detach()[:, 0], X, InputError, "does not depend on the input"),
        (lambda x: x[:, 0] - x.mean(0)[1], X, BatchCoupling, "another stands beside it"),
        (lambda x: COUPLED(x)[:, 0], X, BatchCoupling, "alone"),
        (lambda x: x[:, 0] + torch.rand(1), X, InputError, "another output for the same input"),
        (lambda x: 1 / (x[:, 0] - 0.5), torch.ones(1, 6), NotFinite, "0.5 of the way"),
        (lambda x: torch.exp(1000 * x[:, 0]), torch.ones(2, 6), NotFinite, "example 0, 1"),
        (smooth(), torch.full((2, 6), float("nan"), dtype=torch.float64), InputError, "NaN or infinity"),
        (smooth(), torch.ones(2, 6, dtype=torch.long), InputError, "no embedding"),
        (smooth(), torch.ones(0, 6, dtype=torch.float64), InputError, "at least one example"),
        (Sensors(), (CAMERA, RADAR[:2]), InputError, "same number"),
        (smooth(), torch.tensor(3.0), InputError, "single number"),
        (lambda x: x**2, torch.ones(3), InputError, "at least two axes"),
        (smooth(), ["text"], InputError, "array"),
        ("not a model", X, InputError, "model of type"),
    ],
)
def test_models_and_inputs_that_cannot_be_explained_are_refused(model, inputs, kind, match):
    target = 0 if isinstance(model, nn.Module) and not isinstance(model, Sensors) else None
    rule = hw.quadrature.midpoint(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(kind, match=match):
            explain(model, inputs, target, rule=None if isinstance(model, str) else rule)


def test_leaving_half_precision_is_told():
    with pytest.raises(NotFinite, match="half-precision"):
        explain(lambda x: (x * x).sum(1), torch.full((2, 6), 300.0, dtype=torch.float16))


# ---- memory -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [2, 7])
def test_no_more_points_are_ever_at_once_than_a_chunk(chunk):
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return (x**3).sum(1)

    for points in (4, 200):
        explain(Watch(), X, rule=hw.quadrature.gauss_legendre(points), batch_size=chunk)
    explain(Watch(), X, tolerance=1e-9, batch_size=chunk)
    assert max(seen) <= chunk


def test_memory_that_does_not_suffice_halves_the_chunk():
    calls = []

    class Small(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            if len(x) > 4:
                raise torch.OutOfMemoryError("out of memory")
            return (x**2).sum(1)

    e = explain(Small(), X)
    assert np.abs(e.values - (X**2).numpy()).max() < 1e-12 and max(calls) > 4
