"""Every layer rule, and every way of using a layer, against plain autograd, one example at a time, in float64."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tests.capture import modules as m
from tests.capture.laws import captured, difference, loss, rows_of, truth


def numbers(*shape):
    return lambda n: (torch.randn(n, *shape),)


def tokens(n, length=6):
    return (torch.randint(0, 7, (n, length)),)


def conv(kind, x, **settings):
    return lambda: nn.Sequential(kind(4, 6, 3, **settings), nn.Tanh()), numbers(4, *x)


def sequential(*builders):
    return lambda: nn.Sequential(*(build() for build in builders))


LINEAR = sequential(lambda: nn.Linear(4, 5), nn.Tanh, lambda: nn.Linear(5, 3))
SPACES = {1: (nn.Conv1d, nn.ConvTranspose1d, (9,)), 2: (nn.Conv2d, nn.ConvTranspose2d, (7, 6)), 3: (nn.Conv3d, nn.ConvTranspose3d, (5, 6, 5))}
RULES = {  # covered without the fallback
    "linear": (LINEAR, numbers(4)),
    "linear on a sequence": (LINEAR, numbers(7, 4)),
    "linear, four axes": (LINEAR, numbers(2, 3, 4)),
    "linear, no bias": (sequential(lambda: nn.Linear(4, 5, bias=False), nn.Tanh, lambda: nn.Linear(5, 3, bias=False)), numbers(3, 4)),
    "in-place successor": (sequential(lambda: nn.Linear(4, 5), lambda: nn.ReLU(inplace=True), lambda: nn.Linear(5, 3)), numbers(4)),
    "embedding with padding, LayerNorm": (sequential(lambda: nn.Embedding(7, 4, padding_idx=1), lambda: nn.LayerNorm(4), lambda: nn.Linear(4, 2)), tokens),
    "embedding, sparse": (sequential(lambda: nn.Embedding(7, 4, sparse=True), lambda: nn.Linear(4, 2)), tokens),
    "LayerNorm over two axes": (sequential(lambda: nn.Linear(4, 5), lambda: nn.LayerNorm((3, 5)), nn.Tanh), numbers(2, 3, 4)),
    "LayerNorm without a bias": (sequential(lambda: nn.Linear(4, 5), lambda: nn.LayerNorm(5, bias=False), nn.Tanh), numbers(3, 4)),
    "RMSNorm": (sequential(lambda: nn.Linear(4, 6), lambda: nn.RMSNorm(6)), numbers(3, 4)),
    "norms per head": (m.PerHead, numbers(5, 6)),
    "GroupNorm": (sequential(lambda: nn.Conv2d(4, 6, 3), lambda: nn.GroupNorm(2, 6), nn.Tanh), numbers(4, 6, 6)),
    "BatchNorm in eval": (sequential(lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6), nn.Tanh), numbers(4, 6, 6)),
    "BatchNorm1d": (sequential(lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), nn.Tanh), numbers(4)),
    "InstanceNorm": (lambda: nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.Tanh()), numbers(4, 6, 6)),
    "InstanceNorm, running": (lambda: nn.Sequential(nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.Tanh()), numbers(4, 6)),
    "one layer three times": (m.Repeated, numbers(3, 4)),
    "tied head": (m.Tied, tokens),
    "tied head, no bias": (lambda: m.Tied(bias=False), tokens),
    "tied head, embedding padded": (m.Tied, lambda n: (torch.tensor([[0, 1, 1, 6, 6, 6]]).repeat(n, 1),)),
    "frozen weight, trained bias": (m.frozen(LINEAR, "0.weight", "2.weight"), numbers(4)),
    "trained weight, frozen bias": (m.frozen(LINEAR, "0.bias"), numbers(7, 4)),
    "frozen bias of a norm": (m.frozen(m.PerHead, "layer.bias", "inner.weight"), numbers(5, 6)),
    "frozen convolution, trained bias": (m.frozen(lambda: nn.Sequential(nn.Conv2d(4, 6, 3)), "0.weight"), numbers(4, 6, 6)),
    "no gradient, never called": (m.Detached, numbers(4)),
    "positions": (m.Positions, tokens),
    "positions, as many as examples": (m.Positions, lambda n: tokens(n, n)),
    "positions with a first axis": (lambda: m.Positions(leading=True), tokens),
    "positions, projected": (lambda: m.Positions(project=True), tokens),
    "positions with a first axis, projected": (lambda: m.Positions(leading=True, project=True), tokens),
    "time-major": (m.TimeMajor, tokens),
    "time-major, as long as the batch": (m.TimeMajor, lambda n: tokens(n, n)),
    "flat": (m.Flat, tokens),
    "flat, one position": (m.Flat, lambda n: tokens(n, 1)),
    "checkpointed": (m.Checkpointed, numbers(4)),
    "checkpointed sequence": (m.Checkpointed, numbers(3, 4)),
    "by keyword, tuples inside": (m.Keywords, lambda n: {"gate": torch.randn(n, 4), "x": torch.randn(n, 4)}),
    "changed by the user's hook": (m.hooked, numbers(4)),
}
for dims, (kind, transposed, space) in SPACES.items():
    for mode in ("zeros", "reflect", "replicate", "circular"):
        RULES[f"Conv{dims}d {mode}"] = conv(kind, space, stride=2, padding=2, groups=2, padding_mode=mode)
    RULES[f"Conv{dims}d same, dilated"] = conv(kind, space, padding="same", dilation=2)
    RULES[f"Conv{dims}d valid, uneven stride"] = conv(kind, space, padding="valid", stride=2)
    RULES[f"Conv{dims}d even kernel"] = (lambda kind=kind: nn.Sequential(kind(4, 4, 2, padding="same", groups=4), nn.Tanh()), numbers(4, *space))
    RULES[f"ConvTranspose{dims}d"] = conv(transposed, space, stride=2, padding=1, output_padding=1, groups=2)
    RULES[f"ConvTranspose{dims}d dilated"] = conv(transposed, space, dilation=2, output_padding=1, bias=False)

FALLBACK = {  # exact all the same; with the parameters that no rule covers
    "tied by hand": (m.TiedByHand, tokens, {"embedding.weight"}),
    "bare parameters, one unused": (m.Bare, numbers(4), {"scale", "matrix", "unused"}),
    "bags": (m.bags, tokens, {"0.weight"}),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Tanh()),
        numbers(4),
        {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
    ),
    "embedding that renormalises": (sequential(lambda: nn.Embedding(7, 4, scale_grad_by_freq=True), lambda: nn.Linear(4, 2)), tokens, {"0.weight"}),
    "LSTM": (lambda: m.Recurrent(nn.LSTM), numbers(5, 4), {f"recurrent.{k}_l0" for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}),
    "GRU": (lambda: m.Recurrent(nn.GRU), numbers(5, 4), {f"recurrent.{k}_l0" for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}),
    "attention": (m.Attention, numbers(5, 4), {"attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias"}),
    "positions, time-major": (lambda: m.Positions(time_major=True), tokens, {"position.weight"}),
    "flat, position slowest": (lambda: m.Flat(swapped=True), tokens, {"token.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"}),
    "sorted": (m.Sorted, numbers(4), {"layer.weight", "layer.bias"}),
    "one by one": (m.OneByOne, numbers(4), {"layer.weight", "layer.bias"}),
    "experts": (m.Experts, numbers(3, 4), {f"experts.{k}.{p}" for k in range(2) for p in ("weight", "bias")}),
    "called as often as the data say": (m.Adaptive, numbers(4), {"rare.weight", "rare.bias"}),
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def running_statistics(net):
    """Running statistics as after some training: unlike their initial zeros and ones."""
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return net.eval()


@pytest.mark.parametrize("case", RULES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_rule_equals_autograd(case):
    build, inputs = RULES[case]
    net, batch = running_statistics(build()), inputs(5)
    capture, gradients = captured(net, batch)
    assert not capture.fallback
    assert difference(rows_of(capture, gradients), truth(net, loss, batch)) <= 1e-10


@pytest.mark.parametrize("case", FALLBACK)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_fallback_equals_autograd(case):
    build, inputs, uncovered = FALLBACK[case]
    net, batch = build().eval(), inputs(5)
    capture, gradients = captured(net, batch)
    assert set(capture.fallback) == uncovered
    assert difference(rows_of(capture, gradients), truth(net, loss, batch)) <= 1e-10


@pytest.mark.parametrize(
    ("build", "name", "why"),
    [
        (m.OneByOne, "layer.weight", "examples not found in its output"),
        (m.Sorted, "layer.weight", "examples not in order in its output"),
        (m.TiedByHand, "embedding.weight", "used outside its module"),
        (m.Bare, "matrix", "no rule"),
        (lambda: m.Positions(time_major=True), "position.weight", "cannot be expanded to the examples"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_the_coverage_says_why_a_parameter_takes_the_fallback(build, name, why):
    net = build().eval()
    capture, _ = captured(net, tokens(3) if hasattr(net, "embedding") or hasattr(net, "token") else (torch.randn(3, 4),))
    assert why in capture.coverage[name] and capture.coverage[name].startswith("exact fallback")


def test_a_weight_shared_by_modules_that_store_it_differently_takes_the_fallback():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), conv1d(4, 6)  # both weights are (6, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    net, batch = Net(), (torch.randn(5, 4),)
    capture, gradients = captured(net, batch)
    assert set(capture.fallback) == {"first.weight"}
    assert difference(rows_of(capture, gradients), truth(net, loss, batch)) <= 1e-10


def gpt2():
    transformers = pytest.importorskip("transformers")
    settings = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 12, "use_cache": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).double().eval()


def next_token(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return (losses * batch["attention_mask"][:, 1:]).sum(1)


def test_a_transformers_model_equals_autograd():
    net = gpt2()
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 4:] = 0
    batch = {"input_ids": torch.randint(0, 11, (4, 7)), "attention_mask": mask}
    capture, gradients = captured(net, batch, next_token)
    assert not capture.fallback  # the tied head, positions, Conv1D and norms are all covered by rules
    assert difference(rows_of(capture, gradients), truth(net, next_token, batch)) <= 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 5e-3)], ids=str)
@pytest.mark.parametrize(
    "case",
    ["linear on a sequence", "embedding with padding, LayerNorm", "GroupNorm", "BatchNorm in eval", "InstanceNorm, running", "tied head", "positions"],
)
def test_lower_precision_is_as_good_as_the_precision_allows(case, dtype, tolerance):
    build, inputs = RULES[case]
    net, batch = running_statistics(build()).to(dtype), tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs(5))
    capture, gradients = captured(net, batch)
    assert not capture.fallback
    assert all(piece.dense().dtype == torch.float32 for g in gradients.values() for piece in g.pieces)
    exact = truth(net.double(), loss, tuple(t.double() if t.is_floating_point() else t for t in batch))
    assert difference(rows_of(capture, gradients), exact) <= tolerance


def test_a_key_bias_without_a_gradient_does_not_send_attention_to_the_fallback():
    """In exact arithmetic the gradient is zero; in float32 two ways of computing it differ by rounding alone."""

    class Keys(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return torch.softmax(self.query(x) @ self.key(x).mT, -1) @ self.value(x)

    capture, _ = captured(Keys().float(), (torch.randn(5, 6, 8, dtype=torch.float32),))
    assert not capture.fallback
