"""Removal curves, infidelity, sensitivity-n and completeness against closed forms of linear models and against plain loops."""

import dataclasses
import itertools

import numpy as np
import pandas
import pytest
import torch
from torch import nn

import headwater as hw
from headwater import evaluate, report
from headwater.errors import InputError, NotFinite
from headwater.evaluate.means import mean_of

W = np.array([4.0, 3.0, 2.0, 1.0])
ONES = np.ones((3, 4))


def linear(X):
    return np.asarray(X) @ W


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 2)).double()


def pictures(n=5, seed=1):
    return torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explained(seed=0):
    net, x = small_net(seed), pictures()
    return net, x, hw.explain(net, x, target=1, progress=False)


# ---- removal ---------------------------------------------------------------------------------------------------------------------


def test_the_curves_of_a_linear_model_are_running_sums():
    down = evaluate.deletion(W * ONES, linear, ONES)
    up = evaluate.insertion(W * ONES, linear, ONES)
    assert np.allclose(down.line, [1, 0.6, 0.3, 0.1, 0], atol=1e-15) and np.allclose(up.line, [0, 0.4, 0.7, 0.9, 1], atol=1e-15)
    assert np.allclose(down.values, (0.5 + 0.6 + 0.3 + 0.1) / 4) and np.allclose(up.values, (0.4 + 0.7 + 0.9 + 0.5) / 4)
    assert np.allclose(down.outputs[0], [10, 6, 3, 1, 0])


def by_hand(net, x, ranking, b, shares, keep):
    """Outputs (n, shares): cells of 2 x 2 pixels replaced one after the other, in plain loops."""
    rows = []
    for i, image in enumerate(x):
        cells = [(r, c) for r in range(2) for c in range(2)]
        size = [float(ranking[i, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].sum()) for r, c in cells]
        row = []
        for share in shares:
            point = b[i].clone() if keep else image.clone()
            for j in np.argsort(size)[::-1][: round(share * 4)]:
                r, c = (2 * k for k in cells[j])
                point[:, r : r + 2, c : c + 2] = (image if keep else b[i])[:, r : r + 2, c : c + 2]
            row.append(net(point[None])[0, 1].item())
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(("how", "keep"), [(evaluate.deletion, False), (evaluate.insertion, True)])
def test_curves_over_cells_with_a_blurred_fill_equal_a_plain_loop(how, keep):
    net, x, e = explained()
    found = how(e, net, x, 1, parts=2, fill=hw.baselines.blur(1.0))
    b = hw.baselines.smoothed(x, 1.0)
    way = np.sign(net(x)[:, 1].detach().numpy() - net(b)[:, 1].detach().numpy())
    expected = by_hand(net, x, e.values * way[:, None, None, None], b, found.shares, keep)
    assert np.allclose(found.outputs, expected, atol=1e-12) and len(found.shares) == 5


def test_scores_of_a_falling_output_give_the_curve_of_the_rising_one():
    x = np.abs(np.random.default_rng(0).normal(size=(6, 4)))
    down = evaluate.deletion(W * x, linear, x)
    mirrored = evaluate.deletion(-W * x, lambda X: -linear(X), x)
    assert np.allclose(down.values, mirrored.values, atol=1e-14) and np.allclose(down.line, mirrored.line, atol=1e-14)


def test_several_fills_at_once_are_averaged():
    net, x, e = explained()
    settings = {"steps": 4, "parts": 2}
    one, other = (evaluate.deletion(e, net, x, 1, fill=b, **settings) for b in (0.0, 1.0))
    both = evaluate.deletion(e, net, x, 1, fill=hw.baselines.average(0.0, 1.0), **settings)
    kept = np.sign(both.output - both.filled) == np.sign(one.output - one.filled)
    kept &= np.sign(both.output - both.filled) == np.sign(other.output - other.filled)
    assert kept.sum() >= 2 and np.allclose(both.outputs[kept], (one.outputs + other.outputs)[kept] / 2, atol=1e-12)


def test_true_scores_beat_random_and_shuffled_ones_do_not():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 12))
    w = rng.normal(size=12)
    true = w * x
    shuffled = rng.permuted(true, axis=1)
    for how in (evaluate.deletion, evaluate.insertion, evaluate.comprehensiveness, evaluate.sufficiency):
        good = how(true, lambda X: X @ w, x, against={"shuffled": shuffled})
        bad = how(shuffled, lambda X: X @ w, x)
        assert good.against["random"].advantage.low > 0 and good.against["shuffled"].advantage.low > 0, how
        assert bad.against["random"].advantage.low < 0 < bad.against["random"].advantage.high, how


def test_networks_are_compared_with_their_gradient_and_gradient_times_input():
    net, x, e = explained()
    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(at)[:, 1].sum(), at)
    found = evaluate.comprehensiveness(e, net, x, 1, against={"by hand": gradient * x, "sizes": gradient.abs()})
    assert np.allclose(found.against["by hand"].values, found.against["gradient x input"].values, atol=1e-12)
    assert np.allclose(found.against["sizes"].values, found.against["|gradient|"].values, atol=1e-12)
    assert found.against["by hand"].advantage.mean == pytest.approx(float((found.values - found.against["by hand"].values).mean()))


def test_rationales_of_a_linear_model_in_closed_form():
    x = np.ones((2, 20))
    w = np.arange(20.0, 0, -1)
    scores = w * x
    needed = evaluate.comprehensiveness(scores, lambda X: X @ w, x)
    enough = evaluate.sufficiency(scores, lambda X: X @ w, x)
    tops = np.array([w[:k].sum() for k in (1, 1, 2, 4, 10)])  # 1 % of 20 parts is one part
    assert np.allclose(needed.values, tops.mean()) and np.allclose(enough.values, (w.sum() - tops).mean())


def test_equal_scores_go_in_random_order():
    """Not in the order of the columns, of which the first matters most here."""
    w = 2.0 ** -np.arange(10)
    x = np.ones((400, 10))
    found = evaluate.deletion(np.ones((400, 10)), lambda X: X @ w, x)
    assert found.mean.low < 0.5 < found.mean.high


def test_parts_may_differ_between_examples_in_kind_and_number():
    labels = np.array([[0, 0, 0, 1], [0, 1, 2, 3]])
    found = evaluate.deletion(W * ONES[:2], linear, ONES[:2], parts=labels)
    assert np.allclose(found.outputs[0], [10, 10, 1, 0, 0])  # of two parts: none, one and both at the nearest number
    assert np.allclose(found.outputs[1], [10, 6, 3, 1, 0])


def test_scores_summed_over_channels_or_embeddings_stand_for_the_whole_place():
    net, x, e = explained()
    pixels = evaluate.deletion(e.values.sum(1, keepdims=True), net, x, 1, steps=4, fill=0.0)
    grouped = evaluate.deletion(e, net, x, 1, steps=4, parts=1)
    flat = evaluate.deletion(e.values.sum(1), net, x, 1, steps=4, fill=0.0)
    assert np.allclose(pixels.outputs, grouped.outputs) and np.allclose(pixels.outputs, flat.outputs)


@pytest.mark.parametrize("named", [False, True])
def test_parts_of_several_inputs_are_ranked_together(named):
    def f(a, b):
        return a @ torch.tensor([4.0, 1.0]) + (b * torch.tensor([[3.0, 2.0]])).sum((1, 2))

    a, b = torch.ones(3, 2), torch.ones(3, 1, 2)
    inputs = {"a": a, "b": b} if named else (a, b)
    e = hw.explain(f, inputs, progress=False)
    found = evaluate.deletion(e, f, inputs, against={"backwards": {"a": -a, "b": -b} if named else (-a, -b)})
    assert np.allclose(found.line, [1, 0.6, 0.3, 0.1, 0], atol=1e-6)
    moved = evaluate.deletion(e, f, inputs, fill={"a": 0.5, "b": np.zeros((1, 2))} if named else (0.5, np.zeros((1, 2))))
    assert np.allclose(moved.outputs[0], [10, 8, 5, 3, 2.5], atol=1e-6)
    sides = evaluate.comprehensiveness(e, f, inputs, parts=(np.zeros(2, int), np.zeros((1, 2), int)), shares=(0.5,))
    assert np.allclose(sides.values, 5, atol=1e-6)  # either input holds half


def test_an_example_that_is_its_own_fill_is_undefined_and_counted():
    x = np.vstack([ONES, np.zeros((1, 4))])
    found = evaluate.deletion(W * x, linear, x)
    assert np.isnan(found.values).tolist() == [False, False, False, True] and found.mean.examples == 3
    nothing = evaluate.deletion(W * ONES, lambda X: 0 * linear(X), ONES)
    assert np.isnan(nothing.values).all() and nothing.mean.examples == 0 and np.isnan(nothing.line).all()
    assert "1 examples undefined" in repr(found) and any("undefined" in note for note in found.notes)


class Reader(nn.Module):
    """A text model: a masked mean of embeddings; keeps the masks that it saw."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.masks = nn.Embedding(30, 4), nn.Linear(4, 2), []

    def forward(self, input_ids, attention_mask):
        self.masks.append(attention_mask)
        weight = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        return self.head((self.embed(input_ids) * weight).sum(1))


def test_tokens_are_replaced_and_their_mask_stays():
    model, ids = Reader(), torch.arange(1, 19).reshape(3, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]] * 3)}
    e = hw.explain(model, inputs, target=1, baseline={"input_ids": 0, "attention_mask": None}, progress=False)
    model.masks.clear()
    found = evaluate.deletion(e, model, inputs, 1, fill=hw.baselines.token(0), steps=6)
    assert all((m == inputs["attention_mask"][0]).all() for m in model.masks)
    order = np.argsort(-e.values["input_ids"][0] * np.sign(found.output[0] - found.filled[0]), kind="stable")
    changed = ids[:1].clone()
    changed[0, order[:1]] = 0
    expected = model(changed, inputs["attention_mask"][:1])[0, 1].item()
    assert found.outputs[0, 1] == pytest.approx(expected, abs=1e-6) and "gradient x input" in found.against and found.fill == "token 0"
    assert evaluate.infidelity(e, model, inputs, 1, fill=0).relative_mean.mean < 1e-10  # a fixed mask makes the logit linear in the embeddings


def test_what_belongs_to_no_word_of_a_text_stays():
    """Scores of texts know their words: special tokens and padding are no parts, of any metric."""
    model, ids = Reader(), torch.arange(1, 19).reshape(3, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]] * 3)}
    e = hw.explain(model, inputs, target=1, baseline={"input_ids": 0, "attention_mask": None}, progress=False)
    special = np.array([True, False, False, False, True, True])
    values = np.where(special, 0, e.values["input_ids"])
    e = dataclasses.replace(e, values=values, kind="text", inputs=None, reference=None, provenance={"word_ids": [[None, 0, 1, 2, None]] * 3})
    seen = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    found = evaluate.deletion(e, model, inputs, 1, fill=0, steps=6)
    assert found.shares.tolist() == [0, 1 / 3, 2 / 3, 1] and np.allclose(found.outputs[:, -1], found.filled)
    evaluate.sensitivity_n(e, model, inputs, 1, fill=0)
    fidelity = evaluate.infidelity(dataclasses.replace(e, values=np.where(special, 7.0, values)), model, inputs, 1, fill=0)
    assert fidelity.relative_mean.mean < 1e-10
    changed = torch.cat(seen)
    assert ((changed == 0).sum(0) > 0).tolist() == (~special).tolist()


def test_several_fills_in_one_table():
    net, x, e = explained()
    found = evaluate.removal(e, net, x, 1, fills={"zeros": 0.0, "blur": hw.baselines.blur(1.0), "mean": hw.baselines.mean(pictures(9, 7))}, steps=4)
    assert [row[:2] for row in found.table.rows] == [(k, f) for f in ("zeros", "blur", "mean") for k in ("deletion", "insertion")]
    alone = evaluate.insertion(e, net, target=1, fill=hw.baselines.blur(1.0), steps=4)  # the inputs are those that the scores hold
    assert np.array_equal(found["insertion", "blur"].values, alone.values)
    assert "deletion" in repr(found) and "blur" in repr(found)


def test_what_does_not_fit_is_refused():
    net, x, e = explained()
    cases = [
        lambda: evaluate.deletion(e, net, x, 0),  # another target
        lambda: evaluate.deletion(e, small_net(9), x, 1),  # another model
        lambda: evaluate.deletion(e.values[:, :, :2], net, x, 1),
        lambda: evaluate.deletion(e.values, net, None, 1),
        lambda: evaluate.deletion(e, lambda z: net(z), None, 1),
        lambda: evaluate.deletion(e, net, x, 1, steps=0),
        lambda: evaluate.deletion(e, net, x, 1, random=0),
        lambda: evaluate.deletion(e, net, x, 1, batch_size=0),
        lambda: evaluate.deletion(e, net, x, 1, parts=np.full((4, 4), 0.5)),
        lambda: evaluate.deletion(e, net, x, 1, parts=np.zeros((3, 3), int)),
        lambda: evaluate.deletion(e.values.sum(1), net, x, 1, parts=np.arange(32).reshape(2, 4, 4)),
        lambda: evaluate.deletion(e, net, x, 1, against={"other": e.values.sum(1)}),
        lambda: evaluate.comprehensiveness(e, net, x, 1, shares=(0.0, 0.5)),
        lambda: evaluate.removal(e, net, x, 1, fills={}),
        lambda: evaluate.deletion(np.ones((2, 3)), nn.Embedding(5, 1), torch.ones(2, 3, dtype=torch.long)),
        lambda: evaluate.infidelity(e, net, x, 1, perturbation="masks"),
        lambda: evaluate.infidelity(e, net, x, 1, perturbation=evaluate.masks(0.0)),
        lambda: evaluate.infidelity(e, net, x, 1, perturbation=evaluate.gaussian(0.1), parts=2),
        lambda: evaluate.infidelity(e, net, x, 1, draws=1),
        lambda: evaluate.sensitivity_n(e, net, x, 1, sizes=[32]),
        lambda: evaluate.sensitivity_n(np.ones((1, 1)), lambda X: X[:, 0], np.ones((1, 1))),
        lambda: evaluate.completeness(e.at([])),
    ]
    for case in cases:
        with pytest.raises(InputError):
            case()
    with pytest.raises(NotFinite):
        evaluate.deletion(np.full((3, 4), np.nan), linear, ONES)
    with pytest.raises(NotFinite):
        evaluate.deletion(W * ONES, lambda X: np.where(linear(X) > 0, linear(X), np.inf), ONES)  # at the fill


def test_smoothed_scores_explain_a_mean_and_a_note_says_so():
    net, x = small_net(), pictures()
    net[3].weight.data *= 5
    e = hw.explain(net, x, target=1, smooth=hw.Smooth(draws=2, spread=1.0), progress=False)
    assert any("noisy copies" in note for note in evaluate.deletion(e, net, x, 1).notes)


# ---- any model -------------------------------------------------------------------------------------------------------------------


def table(n=120, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 5))
    return X, (X[:, 0] - X[:, 1] + 0.3 * rng.normal(size=n) > 0).astype(int)


def estimators():
    from sklearn.ensemble import GradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return [LogisticRegression(), make_pipeline(StandardScaler(), LogisticRegression()), GradientBoostingClassifier(n_estimators=5)]


@pytest.mark.parametrize("which", range(3), ids=["linear", "pipeline", "trees"])
def test_estimators_are_asked_for_what_was_explained(which):
    """The decision value of the class of each example: f(x), and f with the strongest column at its fill, by the library itself."""
    X, y = table()
    model = estimators()[which].fit(X, y)
    x, target = X[:8], np.array([0, 1] * 4)
    sign = np.where(target == 1, 1.0, -1.0)
    found = evaluate.deletion(hw.explain(model, x, target=target, progress=False), model, x, target, steps=5, fill=hw.baselines.mean(X))
    assert np.allclose(found.output, sign * model.decision_function(x), atol=1e-6)
    e = hw.explain(model, x, target=target, progress=False)
    first = np.argmax(e.values * np.sign(found.output - found.filled)[:, None], axis=1)
    changed = x.copy()
    changed[np.arange(8), first] = X.mean(0)[first]
    assert np.allclose(found.outputs[:, 1], sign * model.decision_function(changed), atol=1e-6)


def test_targets_of_estimators_are_labels_pairs_of_them_or_one_for_each_example():
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    X, _ = table()
    y = np.array(["a", "b", "c"])[X[:, :3].argmax(1)]
    line, forest = LogisticRegression().fit(X, y), RandomForestClassifier(3, random_state=0).fit(X, y)
    for target, columns, less in (("b", [1] * 6, None), (("a", "c"), [0] * 6, [2] * 6), (y[:6], ["abc".index(label) for label in y[:6]], None)):
        for model, outputs in ((line, line.decision_function(X[:6])), (forest, forest.predict_proba(X[:6]))):
            expected = outputs[np.arange(6), columns] - (0 if less is None else outputs[np.arange(6), less])
            assert np.allclose(evaluate.sufficiency(np.ones((6, 5)), model, X[:6], target).output, expected, atol=1e-12)


def test_frames_with_text_columns_are_changed_column_by_column():
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    X, y = table()
    frame = pandas.DataFrame(X[:, :2], columns=["a", "b"]).assign(colour=np.where(X[:, 2] > 0, "red", "blue"))
    model = make_pipeline(make_column_transformer((StandardScaler(), ["a", "b"]), (OneHotEncoder(), ["colour"])), LogisticRegression()).fit(frame, y)
    x, other = frame[:10], frame.iloc[[20]]
    e = hw.explain(model, x, target=1, baseline=other, progress=False)
    assert evaluate.infidelity(e, model, x, 1, fill=other).relative_mean.mean < 1e-20
    changed = x.assign(colour=other["colour"].item())
    found = evaluate.comprehensiveness(np.array([[0.0, 0.0, 1.0]] * 10), model, x, 1, shares=(0.1,), fill=other)
    assert np.allclose(found.outputs[:, 0], model.decision_function(changed), atol=1e-9)


def test_functions_get_targets_as_explain_takes_them():
    from sklearn.linear_model import LogisticRegression

    X, y = table()
    call = LogisticRegression().fit(X, y).predict_proba
    e = hw.explain(call, X[:6], target=1, progress=False)
    by_index = evaluate.sufficiency(e, call, X[:6], 1)
    by_function = evaluate.sufficiency(e, call, X[:6], lambda out: out[:, 1])
    kinds = []
    evaluate.sufficiency(e.values, lambda z: (kinds.append(z.dtype), z[:, 0])[1], X[:6].astype(np.float32))
    assert set(kinds) == {np.dtype("float32")}
    assert np.array_equal(by_index.values, by_function.values) and np.allclose(by_index.output, call(X[:6])[:, 1])


# ---- infidelity ------------------------------------------------------------------------------------------------------------------


def test_infidelity_of_matching_scores_of_a_linear_model_is_zero():
    x = np.random.default_rng(0).normal(size=(5, 4))
    e = hw.explain(linear, x, baseline=0.5, progress=False)
    assert evaluate.infidelity(e, linear, x).values.max() < 1e-16
    assert evaluate.infidelity(e, linear, x, perturbation=evaluate.gaussian(0.3)).values.max() < 1e-12  # contributions become slopes
    assert evaluate.infidelity(np.tile(W, (5, 1)), linear, x, perturbation=evaluate.gaussian(0.3)).values.max() < 1e-24


def test_infidelity_of_wrong_scores_in_closed_form():
    """Errors δ: ``E[(mᵀδ)²] = p(1-p)Σδ² + p²(Σδ)²`` for masks, ``σ²Σδ²`` for Gaussian noise."""
    delta, p, sigma = np.array([0.5, -1.0, 0.25, 2.0]), 0.3, 0.2
    wrong = W * ONES + delta
    by_masks = evaluate.infidelity(wrong, linear, ONES, perturbation=evaluate.masks(p), draws=40_000)
    by_noise = evaluate.infidelity(wrong, linear, ONES, perturbation=evaluate.gaussian(sigma), draws=40_000)
    assert np.allclose(by_masks.values, p * (1 - p) * (delta**2).sum() + p**2 * delta.sum() ** 2, rtol=0.03)
    assert np.allclose(by_noise.values, sigma**2 * (delta**2).sum(), rtol=0.03)


def test_infidelity_equals_the_mean_over_all_masks_on_a_network():
    net, x, e = explained()
    found = evaluate.infidelity(e, net, x, 1, parts=2, draws=20_000)
    errors = []
    for mask in itertools.product([0, 1], repeat=4):
        m = torch.tensor(mask).reshape(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
        errors.append(((e.values * m.numpy()).sum((1, 2, 3)) - (net(x) - net(x * (1 - m)))[:, 1].detach().numpy()) ** 2)
    assert np.allclose(found.values, np.mean(errors, 0), rtol=0.05)


def test_the_order_of_the_scores_is_judged_against_the_same_scores_shuffled():
    x = np.random.default_rng(0).normal(size=(30, 8))
    w = np.linspace(-2, 3, 8)
    true = w * x
    good = evaluate.infidelity(true, lambda X: X @ w, x)
    bad = evaluate.infidelity(np.random.default_rng(1).permuted(true, axis=1), lambda X: X @ w, x)
    assert good.advantage.low > 0 and good.shuffled.mean == pytest.approx(good.advantage.mean)
    assert bad.advantage.low < 0 < bad.advantage.high and bad.relative_mean.mean == pytest.approx(bad.shuffled.mean, rel=0.5)
    alike = evaluate.infidelity(np.ones((3, 4)), linear, ONES)
    assert np.allclose(alike.advantage.mean, 0)  # equal scores have no order


def test_the_best_scale_undoes_a_wrong_unit():
    found = evaluate.infidelity(5 * W * ONES, linear, ONES, scaled=True)
    assert np.allclose(found.beta, 0.2) and found.values.max() < 1e-20 and "beta" in repr(found)
    assert evaluate.infidelity(5 * W * ONES, linear, ONES).relative_mean.mean == pytest.approx(16)
    assert evaluate.infidelity(0 * ONES, linear, ONES).relative.tolist() == [1, 1, 1]  # what predicting no change gets


# ---- sensitivity-n ---------------------------------------------------------------------------------------------------------------


def test_sensitivity_n_of_a_linear_model_is_one_at_every_size_in_any_unit():
    x = np.random.default_rng(0).normal(size=(5, 4))
    for factor, expected in ((1, 1), (7, 1), (-2, -1)):
        found = evaluate.sensitivity_n(factor * W * x, linear, x)
        assert found.sizes.tolist() == [1, 2, 3] and np.allclose(found.correlations, expected, atol=1e-12)


def test_sensitivity_1_is_the_correlation_with_taking_out_one_part():
    net, x, e = explained()
    found = evaluate.sensitivity_n(e, net, x, 1, sizes=[1], draws=6000)
    flat, f = x.flatten(1), net(x)[:, 1].detach().numpy()
    alone = np.stack([f - net((flat * (torch.arange(32) != j)).reshape(x.shape))[:, 1].detach().numpy() for j in range(32)], 1)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(e.values.reshape(5, -1), alone, strict=True)]
    assert np.allclose(found.values, expected, atol=0.03)


def test_sensitivity_n_replaces_as_many_parts_as_it_says():
    seen = []

    def counting(X):
        seen.append((X == 0).sum(1))
        return X @ W

    evaluate.sensitivity_n(W * ONES, counting, ONES, sizes=[3], draws=50)
    assert set(np.concatenate(seen[2:]).tolist()) == {3}


def test_constant_scores_have_no_correlation():
    found = evaluate.sensitivity_n(np.ones((3, 4)), linear, ONES)
    assert np.isnan(found.correlations).all() and found.mean.examples == 0 and np.isnan(found.mean.mean)


# ---- completeness, means, reports ------------------------------------------------------------------------------------------------


def test_completeness_by_hand():
    residual, change = np.array([0.1, -0.002, 0.0]), np.array([2.0, 1.0, 0.0])
    e = hw.FeatureScores(np.zeros((3, 2)), residual, np.ones(3, int), change, np.zeros(3), "by hand", "f", "zeros", error=np.array([0.3, 0.1, 0.2]))
    found = evaluate.completeness(e, tolerance=0.01)
    assert np.allclose(found.relative, [0.05, 0.002, 0]) and found.met.tolist() == [False, True, True] and found.share == pytest.approx(2 / 3)
    assert found.rows["absolute residual"] == (0.002, 0.1, 0.1) and found.rows["estimated error"] == (0.2, 0.3, 0.3)
    assert "necessary, not sufficient" in repr(found) and len(found.to_frame()) == 3


def test_intervals_are_those_of_the_mean():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    found = mean_of(np.append(values, np.nan), bootstrap=4000)
    half = 1.96 * values.std() / 20
    assert found.examples == 400 and found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03) and found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert np.isnan(mean_of(np.array([1.0])).low) and "no interval" in repr(mean_of(np.array([1.0])))


def test_everything_can_be_shown_and_says_what_is_good():
    net, x, e = explained()
    curves = [f(e, net, x, 1, steps=4) for f in (evaluate.deletion, evaluate.insertion)]
    rationales = [f(e, net, x, 1) for f in (evaluate.comprehensiveness, evaluate.sufficiency)]
    n = evaluate.sensitivity_n(e, net, x, 1)
    fidelity, whole = evaluate.infidelity(e, net, x, 1), evaluate.completeness(e)
    assert all("good:" in repr(r) for r in (*curves, *rationales, n, fidelity, whole))
    assert all(r.bars.rows[r.bars.leader].label == r.method for r in curves)  # the best is set off, where low is good too
    parts = [*(r.curve for r in (*curves, *rationales, n)), *(r.bars for r in (*curves, *rationales)), whole.table]
    page = report.Page("Faithful?", sections=(report.Section("", parts=tuple(parts)),))
    assert "Integrated Gradients" in report.text(page) and "<svg" in report.render(page)
    frame = curves[0].to_frame()
    assert len(frame) == 5 * 5 and np.allclose(frame.normalised[frame.share == 0], 1)
    assert len(fidelity.to_frame()) == 5 and len(n.to_frame()) == n.correlations.size
