"""A data set explained in batches is the data set explained at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import headwater as hw
from headwater.errors import InputError
from headwater.features.dataset import summarize
from headwater.result.summary import Accumulator

ARRAYS = ("mean", "mean_abs", "std", "positive", "negative")
FACTS = ("names", "n", "missed", "shape", "kind", "baseline", "method")


def net(inputs=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def data(n=50, inputs=6):
    numbers = torch.Generator().manual_seed(1)
    return torch.randn(n, inputs, generator=numbers, dtype=torch.float64), torch.randint(0, 3, (n,), generator=numbers)


def same(found, wanted):
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-14, err_msg=name)
    assert [getattr(found, name) for name in FACTS] == [getattr(wanted, name) for name in FACTS]
    np.testing.assert_allclose([found.residual, found.worst_residual, found.evaluations], [wanted.residual, wanted.worst_residual, wanted.evaluations], atol=1e-14)


def whole(model, x, target, **settings):
    return hw.explain(model, x, target, progress=False, **settings).summary()


X, Y = data()
FORMS = {
    "tensor": (X, {}),
    "array": (X.numpy(), {}),
    "columns": ((X, Y), {"inputs": 0}),
    "dict of columns": ({"x": X, "y": Y}, {"inputs": "x"}),
    "data set": (TensorDataset(X, Y), {"inputs": 0}),
    "examples by number": (type("Rows", (), {"__len__": lambda self: 50, "__getitem__": lambda self, i: {"x": X[i], "label": Y[i]}})(), {"inputs": "x"}),
    "loader": (DataLoader(TensorDataset(X, Y), batch_size=7), {"inputs": 0}),
    "list of batches": ([(X[:20],), (X[20:],)], {"inputs": tuple}),
    "batches by function": ([(X[:20], Y[:20]), (X[20:], Y[20:])], {"inputs": lambda batch: batch[0]}),
    "generator": ((X[k : k + 9] for k in range(0, 50, 9)), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_data_of_every_form_are_summed_up_alike(form):
    given, settings = FORMS[form]
    found = summarize(net(), given, 1, at_once=16, progress=False, **settings)
    wanted = whole(net(), (X,) if form == "list of batches" else X, 1)
    if form == "list of batches":  # a tuple of one input has a name
        assert found.names[0].endswith("feature 0") and found.n == 50
    same(found, wanted)


@pytest.mark.parametrize("at_once", [1, 13, 50, 1000])
def test_the_size_of_a_batch_does_not_matter(at_once):
    b = hw.baselines.dataset(data(20)[0], 3)
    same(summarize(net(), X, 0, baseline=b, at_once=at_once, progress=False), whole(net(), X, 0, baseline=b))


TARGETS = {
    "labels": Y,
    "a list": Y.tolist(),
    "margin": hw.targets.margin(0, Y),
    "log odds": hw.targets.log_odds(Y.numpy()),
    "loss": hw.targets.loss(F.cross_entropy, Y),
    "one for all": hw.targets.margin(2, 1),
    "function": lambda out: out[:, 0] * out[:, 1],
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_of_each_example_are_those_of_its_batch(name):
    same(summarize(net(), X, TARGETS[name], at_once=16, progress=False), whole(net(), X, TARGETS[name]))


def test_a_batch_may_bring_its_own_settings():
    loader = DataLoader(TensorDataset(X, Y), batch_size=16)
    found = summarize(net(), loader, inputs=0, each=lambda batch: {"target": batch[1], "baseline": batch[0].mean(1, keepdim=True).expand(-1, 6)}, progress=False)
    same(found, whole(net(), X, Y, baseline=X.mean(1, keepdim=True).expand(-1, 6)))


def test_groups_and_names_are_kept():
    names = ["a", "b", "c", "d", "e", "f"]
    found = summarize(net(), X, 1, groups={"first": ["a", "b"]}, feature_names=names, at_once=16, progress=False)
    wanted = hw.explain(net(), X, 1, feature_names=names, progress=False).group({"first": ["a", "b"]}).summary()
    same(found, wanted)
    assert found.names == ("first", "(others)")


def test_images_keep_their_shape():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(2 * 49, 2)).double()
    x = torch.rand(12, 1, 9, 9, dtype=torch.float64)
    found = summarize(model, x, 0, at_once=5, progress=False)
    assert found.shape == (1, 9, 9) and found.kind == "image"
    same(found, whole(model, x, 0))


def test_estimators_take_frames_and_arrays():
    pandas, linear = pytest.importorskip("pandas"), pytest.importorskip("sklearn.linear_model")
    frame = pandas.DataFrame(X.numpy(), columns=list("abcdef"))
    model = linear.LogisticRegression().fit(frame, Y > 0)
    found = summarize(model, frame, at_once=16, progress=False)
    same(found, hw.explain(model, frame, progress=False).summary())
    assert found.names == tuple("abcdef")


def test_the_share_that_missed_the_tolerance_is_known():
    found = summarize(net(), X, 1, tolerance=1e-6, max_evaluations=40, at_once=16, progress=False)
    e = hw.explain(net(), X, 1, tolerance=1e-6, max_evaluations=40, progress=False)
    assert 0 < found.missed < 50 and found.missed_share == (~e.converged).mean()
    assert any("missed the tolerance" in note for note in found.notes)


def test_what_was_handled_is_said_once(tmp_path):
    model = nn.Sequential(net(), nn.Dropout(0.5))
    found = summarize(model, X, 1, at_once=5, progress=False)
    assert len(found.notes) == 1 and "training mode" in found.notes[0]
    assert "training mode" in found.to_html(tmp_path / "page.html").read_text()


def test_what_was_summed_up_survives_ctrl_c():
    def interrupted():
        yield X[:20]
        yield X[20:30]
        raise KeyboardInterrupt

    kept = Accumulator()
    with pytest.raises(KeyboardInterrupt):
        summarize(net(), interrupted(), 1, into=kept, progress=False)
    same(kept.summary(), whole(net(), X[:30], 1))
    same(summarize(net(), X[30:], 1, into=kept, progress=False), whole(net(), X, 1))


def test_an_error_says_where_and_keeps_what_was_before():
    kept, broken = Accumulator(), X.clone()
    broken[33] = float("nan")
    with pytest.raises(InputError) as caught:
        summarize(net(), broken, 1, at_once=10, into=kept, progress=False)
    assert "batch 3, after 30 examples" in caught.value.__notes__[0]
    same(kept.summary(), whole(net(), X[:30], 1))


@pytest.mark.parametrize(
    ("given", "settings", "match"),
    [
        ([(X, Y)], {}, "inputs=0 where"),
        ((X, Y), {}, "inputs=0 where"),
        ([(X, Y)], {"inputs": 5}, "inputs=5"),
        ([{"x": X}], {"inputs": "z"}, "inputs='z'"),
        (X, {"target": Y[:30]}, "30 targets for 50"),
        (X, {"target": hw.targets.loss(F.cross_entropy, Y[:30])}, "30 targets for 50"),
        ([X, X], {"target": Y}, "50 targets for example 99"),
        (X, {"at_once": 0}, "at_once=0"),
        (X, {"basline": 0}, "basline="),
        (X, {"target": 1, "each": lambda batch: {"target": 0}}, "target both"),
        (X, {"each": lambda batch: {"colour": 0}}, "'colour'"),
        (3, {}, "type int"),
        ([], {}, "no examples"),
        ([X, X[:, :5].repeat(1, 2)], {"model": lambda x: x.sum(1)}, "same parts"),
    ],
)
def test_bad_input_is_named(given, settings, match):
    settings = {"target": None if "each" in settings else 1, **settings}
    model, target = settings.pop("model", None), settings.pop("target")
    with pytest.raises(InputError, match=match):
        summarize(model or net(), given, target if model is None else None, progress=False, **settings)


def test_targets_are_checked_before_the_work():
    def model(x):
        raise AssertionError

    with pytest.raises(InputError, match="30 targets"):
        summarize(model, X, Y[:30], progress=False)


def test_empty_batches_add_nothing():
    same(summarize(net(), [X[:0], X, X[:0]], 1, progress=False), whole(net(), X, 1))
