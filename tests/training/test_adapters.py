"""Laws of adapters: they begin as nothing, their gradients are the chain rule's, and merged they give the same outputs. For every kind of layer."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from headwater.capture import Capture
from headwater.errors import GradientError, InputError, MissingExtra
from headwater.training.adapters import adapters_of, delta, draw, freeze, insert, insert_peft, keep, merge, moved, refuse_untrained, transplant
from headwater.training.targets import choose

SCALE = 0.7


class Conv1D(nn.Module):
    """What transformers calls Conv1D, under its name: a Linear whose weight is (in, out)."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"

LAYERS = {
    "Linear": (lambda: nn.Linear(5, 4), (5,)),
    "Linear along a sequence, without bias": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "square Conv1D of transformers": (lambda: Conv1D(5, 5), (3, 5)),
    "Conv1D of transformers": (lambda: Conv1D(4, 5), (3, 5)),
    "Conv1d, dilated": (lambda: nn.Conv1d(3, 4, 3, dilation=2, padding=1), (3, 7)),
    "Conv2d, strided": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), (3, 6, 5)),
    "Conv2d, circular, same": (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="circular", bias=False), (3, 5, 5)),
    "Conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 3, 3, 3)),
}


class Head(nn.Module):
    """A layer, something after it that is not linear, and one number of class scores for each example."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.tanh(self.layer(x)).flatten(1).cumsum(1)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def adapted(kind, trained=True, rank=2):
    """A model with an adapter, as if trained, a copy of it without, and a batch; float64."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    base = Head(make()).double()
    model = draw(insert(copy.deepcopy(base), {"layer": rank}, alpha=SCALE * rank), 1)
    if trained:
        nn.init.normal_(adapters_of(model)["layer"].up, generator=torch.Generator().manual_seed(2))
    return model, base, (torch.randn(6, *shape, dtype=torch.float64), torch.randint(0, 3, (6,)))


each_layer = pytest.mark.parametrize("kind", LAYERS)


@each_layer
def test_an_adapted_model_begins_as_the_model_itself(kind):
    model, base, (x, _) = adapted(kind, trained=False)
    assert torch.equal(model(x), base(x))
    assert bool(adapters_of(model)["layer"].down.all())


@each_layer
def test_merged_weights_give_what_the_adapter_gives(kind):
    model, base, (x, _) = adapted(kind)
    merged = merge(copy.deepcopy(model))
    assert not torch.allclose(model(x), base(x), rtol=0, atol=0.01)
    assert torch.allclose(merged(x), model(x), rtol=0, atol=1e-13)
    assert [(n, p.shape) for n, p in merged.named_parameters()] == [(n, p.shape) for n, p in base.named_parameters()]
    assert not merged.layer._forward_hooks


@each_layer
def test_gradients_are_the_chain_rule_of_the_whole_weights_gradient(kind):
    """``dA = s B^T G`` and ``dB = s G A^T`` with G of the merged weight, example by example, group by group."""
    model, _, batch = adapted(kind)
    pair, groups = adapters_of(model)["layer"], getattr(model.layer, "groups", 1)
    merged = merge(copy.deepcopy(model))
    truth_down, truth_up = [], []
    for i in range(len(batch[1])):
        whole = torch.autograd.grad(loss(merged, (batch[0][i : i + 1], batch[1][i : i + 1])).sum(), merged.layer.weight)[0]
        g = (whole.T if isinstance(model.layer, Conv1D) else whole).reshape(groups, -1, pair.down[0].numel())
        b, a = pair.up.reshape(groups, g.shape[1], -1), pair.down.reshape(groups, -1, g.shape[2])
        truth_down.append((SCALE * b.mT @ g).flatten())
        truth_up.append((SCALE * g @ a.mT).flatten())
    freeze(model)
    capture = Capture(model, loss, batch)
    found = capture.gradients(loss, batch)
    assert not any("fallback" in how for how in capture.coverage.values())
    assert torch.allclose(found["layer.lora.down.weight"].dense().flatten(1), torch.stack(truth_down).detach(), rtol=0, atol=1e-13)
    assert torch.allclose(found["layer.lora.up.weight"].dense().flatten(1), torch.stack(truth_up).detach(), rtol=0, atol=1e-13)


@each_layer
def test_the_models_own_names_and_state_stay(kind):
    model, base, _ = adapted(kind)
    assert set(dict(base.named_parameters())) < set(dict(model.named_parameters()))
    missing = model.load_state_dict(base.state_dict(), strict=False)
    assert missing.unexpected_keys == [] and set(missing.missing_keys) == {"layer.lora.down.weight", "layer.lora.up.weight"}
    assert isinstance(model.get_submodule("layer"), type(base.layer))


def test_a_tied_weight_is_not_merged():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(InputError, match="also that of '1'"):
        merge(insert(model, {"0": 1}))


def test_what_an_adapter_adds_has_its_rank_in_every_group():
    model, _, _ = adapted("Conv2d in groups", rank=1)
    added = delta(model.layer, adapters_of(model)["layer"]).reshape(2, 3, -1).detach()
    assert [int(torch.linalg.matrix_rank(a)) for a in added] == [1, 1]
    assert moved(model)["layer"] == pytest.approx(float(added.norm() / model.layer.weight.detach().norm()))


def test_adapters_take_their_layers_dtype():
    layer = nn.Sequential(nn.Linear(4, 3, dtype=torch.bfloat16))
    adapter = adapters_of(draw(insert(layer, {"0": 2}), 0))["0"]
    assert adapter.down.dtype == adapter.up.dtype == torch.bfloat16 and adapter.scale == 1.0
    assert layer(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_starts_belong_to_a_seed_and_a_layer():
    """Neither the global generators, nor other adapters, nor the rank change a number."""

    def started(seed, ranks):
        torch.manual_seed(ranks["0"])
        return {n: p.down.detach() for n, p in adapters_of(draw(insert(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)), ranks), seed)).items()}

    both, alone, other = started(1, {"0": 3, "1": 3}), started(1, {"0": 2}), started(2, {"0": 2})
    assert torch.equal(both["0"][:2], alone["0"]) and not torch.equal(alone["0"], other["0"])
    assert not torch.allclose(both["0"] * 5**0.5, both["1"][:, :5] * 6**0.5)
    again = nn.Sequential(nn.Linear(5, 6))
    nn.init.normal_(adapters_of(draw(insert(again, {"0": 3}), 2))["0"].up)
    assert not bool(adapters_of(draw(again, 1))["0"].up.any()) and torch.equal(adapters_of(again)["0"].down, both["0"])
    wide = adapters_of(draw(insert(nn.Sequential(nn.Linear(400, 50)), {"0": 50}), 1))["0"].down.detach()
    assert float(wide.std()) == pytest.approx(400**-0.5, rel=0.02) and abs(float(wide.mean())) < 0.001


def test_copies_have_adapters_of_their_own():
    model, _, (x, _) = adapted("Linear")
    before, other = model(x), copy.deepcopy(model)
    nn.init.zeros_(adapters_of(other)["layer"].up)
    assert torch.equal(model(x), before) and not torch.equal(other(x), before)


def test_only_the_adapters_are_trained_and_kept():
    model, _, _ = adapted("Linear")
    names = freeze(model)
    keep(model, names)
    assert names == ("layer.lora.down.weight", "layer.lora.up.weight") == tuple(model.state_dict())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == list(names)
    assert list(nn.ModuleDict({"inner": model}).state_dict()) == [f"inner.{n}" for n in names]
    assert model.load_state_dict(copy.deepcopy(model).state_dict(), strict=False).unexpected_keys == []


def test_adapters_that_were_never_trained_are_refused():
    model, _, _ = adapted("Linear", trained=False)
    with pytest.raises(GradientError, match="1 adapters that were never trained, in a test: B = 0"):
        refuse_untrained(model, "in a test")
    refuse_untrained(adapted("Linear")[0], "in a test")
    refuse_untrained(nn.Linear(2, 2), "without any")


# ------------------------------------------------------------------------------------------------------- which layers, what rank


class Net(nn.Module):
    """Layers that are called in another order than they were made in, one that is never called, and one whose weight is used elsewhere."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2, batch_first=True), "fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})
        self.spare = nn.Linear(4, 4)

    def forward(self, x):
        x = self.body["attn"](x, x, x, need_weights=False)[0]
        return self.head(self.body["fc2"](torch.tanh(self.body["fc1"](x))).mean(1))


def chosen(targets=None, rank=None, model=None):
    net = model or Net()
    return choose(net, lambda: net(torch.ones(2, 3, 4)), targets, rank)


def test_by_default_all_called_layers_are_adapted_in_the_order_of_their_calls():
    ranks, apart = chosen()
    assert list(ranks.items()) == [("body.fc1", 4), ("body.fc2", 4), ("head", 3)]
    assert sorted(apart) == ["body.attn.out_proj", "spare"]
    assert list(chosen(rank=2)[0].values()) == [2, 2, 2]
    wide = nn.Sequential(nn.Linear(20, 30))
    assert choose(wide, lambda: wide(torch.ones(1, 20)), None, None)[0] == {"0": 8}


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (1, ["head"]),
        (2, ["body.fc2", "head"]),
        ("fc2", ["body.fc2"]),
        ("body.fc1", ["body.fc1"]),
        ("body.*", ["body.fc1", "body.fc2"]),
        (["head", "*fc?"], ["body.fc1", "body.fc2", "head"]),
    ],
)
def test_targets_are_names_ends_of_names_patterns_or_the_last_layers(targets, names):
    assert list(chosen(targets)[0]) == names


@pytest.mark.parametrize(
    ("targets", "rank", "said"),
    [
        ("c_attn", None, r"targets='c_attn', which matches no layer\n.*\['body.fc1', 'body.fc2', 'head'\]"),
        ("ead", None, "targets='ead'"),
        (("head", "fc?"), None, r"targets='fc\?'"),
        ((), None, r"targets=\[\]"),
        (0, None, "targets=0"),
        (4, None, "targets=4"),
        ("out_proj", None, "'body.attn.out_proj' is never called by the forward pass: its weight is used elsewhere"),
        (None, 4, r"rank=4 for the layer 'head', whose weight is 3 x 4\n.*at most 3"),
    ],
)
def test_bad_choices_are_refused_by_name(targets, rank, said):
    with pytest.raises(InputError, match=said):
        chosen(targets, rank)


def test_the_rank_of_a_grouped_convolution_is_bounded_by_a_group():
    net = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2))
    with pytest.raises(InputError, match="2 groups"):
        choose(net, lambda: net(torch.ones(1, 4, 2, 2)), None, 3)
    assert choose(net, lambda: net(torch.ones(1, 4, 2, 2)), None, None)[0] == {"0": 2}


def test_models_without_such_layers_or_with_adapters_are_refused():
    bare = nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2))
    with pytest.raises(InputError, match="without a layer that can be adapted"):
        choose(bare, lambda: bare(torch.zeros(2, dtype=torch.long)), None, None)
    model, _, (x, _) = adapted("Linear")
    with pytest.raises(InputError, match="with adapters already"):
        choose(model, lambda: model(x), None, None)


# -------------------------------------------------------------------------------------------------------------------------- peft


@pytest.fixture(scope="module")
def gpt():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False)
    return transformers.GPT2LMHeadModel(config).double().eval()


def test_peft_gives_what_our_own_adapters_give(gpt):
    """The same layers, the same numbers: outputs, and gradients by exact rules, are equal, also where the head is tied to the embedding."""
    tokens = torch.randint(0, 11, (4, 6))
    ranks, _ = choose(gpt, lambda: gpt(tokens), None, None)
    assert set(ranks) == {"lm_head", *(f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = insert_peft(copy.deepcopy(gpt), {**ranks, "lm_head": 3}, alpha=2.0)
    ours = draw(insert(copy.deepcopy(gpt), {**ranks, "lm_head": 3}, alpha=2.0), 5)
    assert {n: (p.down.shape, p.up.shape, p.scale) for n, p in adapters_of(ours).items()} == {
        n: (p.down.shape, p.up.shape, p.scale) for n, p in adapters_of(theirs).items()
    }
    for pair in adapters_of(ours).values():
        nn.init.normal_(pair.up)
    transplant(ours, theirs)
    assert torch.allclose(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=1e-12)
    assert not torch.allclose(ours(tokens).logits, gpt(tokens).logits)

    def function(model, batch):
        return model(batch).logits.square().sum((1, 2))

    gradients = []
    for model in (ours, theirs):
        freeze(model)
        capture = Capture(model, function, tokens)
        assert set(capture.coverage.values()) == {"Linear"}
        gradients.append([g.dense() for g in capture.gradients(function, tokens).values()])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingExtra, match="through='hooks'"):
        insert_peft(nn.Sequential(nn.Linear(2, 2)), {"0": 1})


def test_convolutions_are_left_to_our_own_adapters():
    pytest.importorskip("peft")
    with pytest.raises(InputError, match="convolution '0' through peft"):
        insert_peft(nn.Sequential(nn.Conv2d(2, 2, 1)), {"0": 1})
