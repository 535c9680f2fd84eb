"""What holds for any model: rows belong to examples alone, sum to the batch's gradient, and nothing of the user's is touched."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from headwater.capture import Block, BlockGradient, Capture, Lookup, Outer, Rows
from headwater.capture.stream import stream
from headwater.errors import BatchCoupling, GradientError, GradientMismatch, InputError, NotFinite, TaskError
from headwater.tasks import Examples
from tests.capture import modules as m
from tests.capture.laws import captured, difference, loss, rows_of, truth
from tests.capture.test_rules import tokens

MODELS = {
    "MLP": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), lambda n: (torch.randn(n, 4),)),
    "tied language model": (m.Tied, tokens),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Tanh()), lambda n: (torch.randn(n, 2, 5, 5),)),
    "positions": (m.Positions, tokens),
    "flat": (m.Flat, tokens),
    "bare parameters": (m.Bare, lambda n: (torch.randn(n, 4),)),
    "attention": (m.Attention, lambda n: (torch.randn(n, 5, 4),)),
    "experts": (m.Experts, lambda n: (torch.randn(n, 3, 4),)),
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def float64():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(name, n=6):
    build, inputs = MODELS[name]
    return build().eval(), inputs(n)


def part(batch, index):
    return tuple(t[index] for t in batch)


@each_model
def test_rows_depend_neither_on_batch_size_nor_on_order(name):
    net, batch = made(name)
    capture, gradients = captured(net, batch)
    whole = rows_of(capture, gradients)
    for index in ([0], [5], [1, 2], [5, 4, 3, 2, 1, 0], [2, 2, 0]):
        few = rows_of(capture, capture.gradients(loss, part(batch, index)))
        assert difference(few, {k: rows[index] for k, rows in whole.items()}) <= 1e-10


@each_model
def test_the_sum_of_rows_is_the_batch_gradient_of_every_named_parameter(name):
    net, batch = made(name)
    capture, gradients = captured(net, batch)
    loss(net, batch).sum().backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
    assert difference({n: rows.sum(0) for n, rows in rows_of(capture, gradients).items()}, expected) <= 1e-10
    assert capture.coverage.keys() == expected.keys()


def test_padding_companions_change_nothing():
    """A padded example's rows equal those it has alone and unpadded."""
    net, long = m.Tied().eval(), torch.randint(0, 6, (3, 8))

    def masked(model, batch):
        logits = model(batch[0])[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch[0][:, 1:], ignore_index=6, reduction="none")
        return losses.sum(1)

    long[1, 3:] = 6
    capture, gradients = captured(net, (long,), masked)
    padded = rows_of(capture, gradients)
    alone = rows_of(capture, capture.gradients(masked, (long[1:2, :3],)))
    assert difference({k: r[1:2] for k, r in padded.items()}, alone) <= 1e-10


def test_every_column_of_a_function_has_its_own_gradients():
    net, batch = made("attention")
    capture = Capture(net, loss, batch)

    def two(model, batch):
        return torch.stack([loss(model, batch), model(*batch).square().flatten(1).sum(1)], 1)

    for column, gradients in enumerate(capture.each(two, batch)):
        assert difference(rows_of(capture, gradients), truth(net, two, batch, column)) <= 1e-10


def test_parameters_of_different_groups_never_share_a_block():
    net, batch = made("MLP")
    capture = Capture(net, loss, batch, group_of=lambda name: name.endswith("bias"))
    assert [b.parameters for b in capture.blocks.values()] == [("0.weight",), ("0.bias",), ("2.weight",), ("2.bias",)]
    assert difference(rows_of(capture, capture.gradients(loss, batch)), truth(net, loss, batch)) <= 1e-10


def test_a_tied_parameter_counts_once_under_whatever_name_it_is_given():
    net, batch = made("tied language model")
    capture = Capture(net, loss, batch, trained=("head.weight", "embedding.weight"))
    assert capture.trained == ("embedding.weight",)
    assert capture.coverage == {"embedding.weight": "Embedding"}


def test_parameters_that_need_no_gradient_can_be_asked_for():
    net, batch = made("MLP")
    expected = truth(net, loss, batch)
    net.requires_grad_(False)
    capture = Capture(net, loss, batch, trained=("0.weight", "0.bias"))
    found = rows_of(capture, capture.gradients(loss, batch))
    assert difference(found, {n: expected[n] for n in found}) <= 1e-10
    assert not any(p.requires_grad for p in net.parameters())


# ---- later batches that are unlike the first


def test_lengths_that_the_proof_has_not_seen():
    net = m.Positions().eval()
    capture = Capture(net, loss, tokens(2, 6))
    for n, length in ((4, 4), (5, 1), (1, 5), (3, 9)):
        batch = tokens(n, length)
        assert difference(rows_of(capture, capture.gradients(loss, batch)), truth(net, loss, batch)) <= 1e-10


def test_one_position_in_the_proof_and_more_later_still_take_the_rules():
    net = m.Flat().eval()
    capture = Capture(net, loss, tokens(2, 1))
    for n, length in ((4, 6), (3, 3), (1, 5)):
        batch = tokens(n, length)
        assert difference(rows_of(capture, capture.gradients(loss, batch)), truth(net, loss, batch)) <= 1e-10
    assert not capture.fallback


def test_a_later_batch_that_no_rule_can_read_keeps_the_blocks():
    """On the probe every position goes to one expert in order, so rules seem to do; a later batch shows that they do not."""
    net = m.Experts().eval()
    probe = torch.randn(2, 3, 4)
    probe[..., 0] = probe[..., 0].abs()
    capture = Capture(net, loss, (probe,))
    blocks = capture.blocks
    assert not capture.fallback
    for seed in range(4):
        batch = (torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(seed)),)
        batch[0][:, 0, 0], batch[0][:, 1, 0] = 1.0, -1.0
        gradients = capture.gradients(loss, batch)
        assert difference(rows_of(capture, gradients), truth(net, loss, batch)) <= 1e-10
        assert capture.blocks == blocks and all(g.dense().shape[1:] == blocks[n].shape for n, g in gradients.items())
    assert capture.fallback


def test_a_later_stage_whose_loss_uses_a_weight_outside_its_module_keeps_the_blocks():
    net, batch = made("MLP")
    capture = Capture(net, loss, batch)
    blocks = capture.blocks

    def penalised(model, batch):
        return loss(model, batch) + torch.tanh(batch[0] @ model[0].weight.T).sum(1)

    capture.prove(penalised, batch)
    assert capture.blocks == blocks and capture.fallback.keys() == {"0.weight", "0.bias"}
    for function in (loss, penalised):
        assert difference(rows_of(capture, capture.gradients(function, batch)), truth(net, function, batch)) <= 1e-10


def test_rows_that_only_seem_to_be_evenly_shared_out_are_noticed():
    """As many rows as if every example had the probe's two, but one has one and another three."""
    net = m.Experts().eval()

    def routed(counts):
        x = torch.randn(len(counts), 4, 4)
        x[..., 0] = torch.where(torch.arange(4) < torch.tensor(counts)[:, None], 1.0, -1.0) * x[..., 0].abs()
        return (x,)

    capture = Capture(net, loss, routed([2, 2]))
    capture.gradients(loss, routed([2, 2, 2]))
    assert not capture.fallback
    batch = routed([1, 3, 2, 2])
    assert difference(rows_of(capture, capture.gradients(loss, batch)), truth(net, loss, batch)) <= 1e-10
    assert capture.fallback.keys() == {f"experts.{k}.{p}" for k in range(2) for p in ("weight", "bias")}


def test_rows_of_a_fallback_in_a_matrix_block_rotate_like_factors():
    net = m.Experts().eval()
    probe = torch.ones(2, 3, 4)
    capture = Capture(net, loss, (probe,))
    gradient = capture.gradients(loss, (torch.randn(5, 3, 4),))["experts.1.weight"]
    left, right = (torch.linalg.qr(torch.randn(1, k, k))[0] for k in gradient.dense().shape[-2:])
    assert torch.allclose(gradient.rotated(left, right).dense(), left.mT @ gradient.dense() @ right)


# ---- nothing is touched


def state(net):
    return {
        "parameters": {n: p.detach().clone() for n, p in net.named_parameters()},
        "identities": [id(p) for p in net.parameters()],
        "buffers": {n: b.clone() for n, b in net.named_buffers()},
        "flags": [p.requires_grad for p in net.parameters()],
        "modes": [module.training for module in net.modules()],
        "hooks": [[len(getattr(module, k)) for k in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")] for module in net.modules()],
        "random": torch.get_rng_state(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("fails", [False, True])
@each_model
def test_nothing_of_the_users_is_touched(name, fails):
    net, batch = made(name)
    net.register_buffer("counter", torch.zeros(3))
    net.train()
    first = next(iter(net.parameters()))
    first.requires_grad_(False)
    for p in list(net.parameters())[1:]:
        p.grad = torch.full_like(p, 7.0)
    net[0].eval() if isinstance(net, nn.Sequential) else None
    before, grads = state(net), [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    calls = 0

    def function(model, batch):
        nonlocal calls
        calls += 1
        out = loss(model, batch)
        if fails and calls > 12:
            raise KeyError("the user's own mistake")
        return out

    try:
        capture = Capture(net, function, batch)
        for _ in range(6):
            capture.gradients(function, batch)
    except KeyError:
        assert fails
    else:
        assert not fails
    assert same(state(net), before)
    assert all((a is None and p.grad is None) or torch.equal(a, p.grad) for a, p in zip(grads, net.parameters(), strict=True))


def test_a_pass_left_half_way_leaves_the_model_as_it_was():
    net, batch = made("MLP")
    before = state(net)
    capture = Capture(net, loss, batch)
    columns = capture.each(lambda model, batch: model(*batch), batch)
    next(columns)
    assert same(state(net), before)
    columns.close()


def test_gradients_are_found_inside_no_grad_as_well():
    net, batch = made("bare parameters")
    with torch.no_grad():
        capture, gradients = captured(net, batch)
    assert difference(rows_of(capture, gradients), truth(net, loss, batch)) <= 1e-10


# ---- what is refused, and in which words


def test_batch_statistics_are_refused_by_name():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    with pytest.raises(BatchCoupling, match=r"BatchNorm1d '1' is in training mode(.|\n)*model.eval\(\)"):
        Capture(net, loss, (torch.randn(5, 4),))
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    with pytest.raises(BatchCoupling, match="'1' keeps no running statistics"):
        Capture(net, loss, (torch.randn(5, 4),))


@pytest.mark.parametrize("module", [nn.Dropout(0.01), nn.InstanceNorm1d(3, track_running_stats=True)], ids=lambda m: type(m).__name__)
def test_modules_that_differ_from_call_to_call_are_refused_by_name(module):
    net = nn.Sequential(nn.Conv1d(2, 3, 1), module).train()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(GradientError, match=rf"{type(module).__name__} '1' is in training mode(.|\n)*model.eval\(\)"):
        Capture(net, loss, (torch.randn(5, 2, 4),))
    assert same(dict(net.state_dict()), dict(before))


def test_dropout_without_a_module_is_noticed():
    net = nn.Linear(4, 3)
    with pytest.raises(GradientError, match="at the next call"):
        Capture(net, lambda model, batch: nn.functional.dropout(loss(model, batch), 0.5), (torch.randn(5, 4),))


def test_dropout_switched_on_after_the_proof_is_noticed_by_the_next():
    net = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval()
    batch = (torch.randn(5, 4),)
    capture = Capture(net, loss, batch)
    net.train()
    with pytest.raises(GradientError, match="drops at random"):
        capture.prove(loss, batch)


@pytest.mark.parametrize("coupled", [lambda v: v / len(v), lambda v: v - v.mean(), lambda v: v * v.detach().sum()], ids=["mean", "centred", "scaled"])
def test_a_loss_that_depends_on_the_rest_of_the_batch_is_refused(coupled):
    net, batch = made("MLP")
    with pytest.raises(BatchCoupling, match="does not depend on the rest of the batch"):
        Capture(net, lambda model, batch: coupled(loss(model, batch)), batch)


def test_a_mismatch_names_the_parameter():
    """A gradient that depends on how it is asked for: alone it is one thing, among others another."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.odd = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x) + Twisted.apply(self.odd(x))

    class Twisted(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            Twisted.calls += 1
            return g * Twisted.calls

    with pytest.raises(GradientMismatch, match=r"odd\.weight"):
        Capture(Odd(), loss, (torch.randn(5, 4),))


def test_a_nan_in_the_loss_or_in_the_gradient_alone_is_refused():
    net, batch = nn.Linear(4, 3), (torch.randn(5, 4),)
    with pytest.raises(NotFinite, match="a loss of"):
        Capture(net, lambda model, batch: loss(model, batch) * float("nan"), batch)

    def square_root_of_zero(model, batch):
        out = model(*batch)
        return loss(model, batch) + torch.where(out > 1e9, (out - out.detach()).sqrt(), 0.0).sum(1)

    with pytest.raises(NotFinite, match=r"'weight'(.|\n)*losses are finite"):
        Capture(net, square_root_of_zero, batch)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_with_the_way_out():
    with pytest.raises(GradientError, match="use_reentrant=False"):
        Capture(m.Checkpointed(reentrant=True), loss, (torch.randn(5, 4, requires_grad=True),))


@pytest.mark.parametrize("reduced", [lambda v: v.mean(), lambda v: float(v.sum()), lambda v: v[:, None, None]], ids=["number", "float", "three axes"])
def test_a_function_that_is_not_per_example_is_refused(reduced):
    net, batch = made("MLP")
    with pytest.raises(TaskError, match='reduction="none"'):
        Capture(net, lambda model, batch: reduced(loss(model, batch)), batch)


def test_a_function_with_too_few_rows_is_refused():
    net, batch = made("MLP")
    capture = Capture(net, loss, batch)
    with pytest.raises(TaskError, match=r"shape \(1, 1\) for 6 examples"):
        capture.gradients(lambda model, batch: loss(model, batch)[:1], batch)


def test_nothing_to_attribute_to_and_unknown_names_are_refused():
    net, batch = made("MLP")
    with pytest.raises(InputError, match="does not have"):
        Capture(net, loss, batch, trained=("0.weigth",))
    with pytest.raises(InputError, match="unfreeze"):
        Capture(net.requires_grad_(False), loss, batch)


# ---- streaming


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same_rows():
    net, (x,) = made("MLP", 23)
    examples, capture = Examples((x,)), Capture(net, loss, (x,))
    tried = []

    def process(batch, ids):
        tried.append(len(ids))
        rows = rows_of(capture, capture.gradients(loss, batch))
        if len(ids) > 5:
            raise (MemoryError, torch.OutOfMemoryError)[len(tried) % 2]("no more")
        return rows

    ids = np.arange(23)[::-1]
    parts = list(stream(examples, ids, process, batch_size=16))
    assert tried[:3] == [16, 8, 4] and max(tried[2:]) == 4
    assert np.array_equal(np.concatenate([part for part, _ in parts]), ids)
    whole = truth(net, loss, (x[ids.copy()],))
    assert difference({k: torch.cat([rows[k] for _, rows in parts]) for k in whole}, whole) <= 1e-10


def test_an_example_that_does_not_fit_alone_and_other_errors_are_raised():
    def full(batch, ids):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with pytest.raises(RuntimeError, match="allocate"):
        list(stream(Examples(torch.zeros(4, 1)), range(4), full, batch_size=4))

    def wrong(batch, ids):
        raise NotFinite("out of memory of the good days")

    with pytest.raises(NotFinite):
        list(stream(Examples(torch.zeros(4, 1)), range(4), wrong, batch_size=4))


# ---- blocks against dense tensors


def outer(n=5, groups=1, shared=1, inner=3, out=4):
    return Outer(torch.randn(n, groups, shared, inner), torch.randn(n, groups, shared, out))


def lookup(n=5, shared=6, entries=4, width=3):
    return Lookup(torch.randint(0, entries, (n, shared)), torch.randn(n, shared, width), entries)


PIECES = {
    "one outer product": lambda: [outer()],
    "grouped": lambda: [outer(groups=2)],
    "a sequence": lambda: [outer(shared=7)],
    "grouped sequence": lambda: [outer(groups=2, shared=7)],
    "lookup": lambda: [lookup()],
    "lookup and head": lambda: [lookup(), outer(shared=6)],
    "two lookups": lambda: [lookup(), lookup(shared=2)],
    "two uses": lambda: [outer(), outer(shared=2)],
    "rows": lambda: [Rows(torch.randn(5, 2, 4))],
    "fallback in a matrix block": lambda: [Rows(torch.randn(5, 1, 4, 3))],
}


def explicit(piece):
    """The definition, example by example and position by position."""
    if isinstance(piece, Rows):
        return piece.values
    if isinstance(piece, Lookup):
        full = torch.zeros(len(piece.a), 1, piece.entries, piece.a.shape[-1])
        for n, row in enumerate(piece.index):
            for s, entry in enumerate(row):
                full[n, 0, entry] += piece.a[n, s]
        return full
    return torch.einsum("ngso,ngsi->ngoi", piece.g, piece.a)


@pytest.mark.parametrize("chunk", [2**23, 7])
@pytest.mark.parametrize("case", PIECES)
def test_a_block_gradient_equals_its_dense_form(case, chunk, monkeypatch):
    monkeypatch.setattr("headwater.capture.blocks.CHUNK", chunk)
    pieces = PIECES[case]()
    gradient, dense = BlockGradient(tuple(pieces)), sum(explicit(p) for p in pieces)
    queries = torch.randn(3, *dense.shape[1:])
    assert torch.allclose(gradient.dense(), dense)
    assert torch.allclose(gradient.dense(slice(1, 3)), dense[1:3])
    assert torch.allclose(gradient.dot(queries), queries.flatten(1) @ dense.flatten(1).T)
    own = torch.randn_like(dense)
    assert torch.allclose(gradient.paired(own), (own * dense).flatten(1).sum(1))
    assert torch.allclose(gradient.squares(), dense.square().sum(0))
    assert torch.allclose(gradient.square_norms(), dense.square().flatten(1).sum(1))


@pytest.mark.parametrize("case", [name for name in PIECES if name != "rows"])
def test_rotations_and_covariances_equal_the_dense_ones(case):
    pieces = PIECES[case]()
    gradient, dense = BlockGradient(tuple(pieces)), sum(explicit(p) for p in pieces)
    left, right = (torch.linalg.qr(torch.randn(dense.shape[1], k, k))[0] for k in dense.shape[2:])
    indexed = any(isinstance(p, Lookup) for p in pieces)
    turned = gradient.rotated(None if indexed else left, right)
    assert torch.allclose(turned.dense(), (dense if indexed else left.mT @ dense) @ right)
    for piece in pieces:
        found_left, found_right = piece.covariances(not indexed, True)
        if isinstance(piece, Outer):
            assert torch.allclose(found_right, torch.einsum("ngsi,ngsj->gij", piece.a, piece.a))
            assert indexed or torch.allclose(found_left, torch.einsum("ngso,ngsp->gop", piece.g, piece.g))
        elif isinstance(piece, Lookup):
            assert found_left is None and torch.allclose(found_right[0], torch.einsum("nsi,nsj->ij", piece.a, piece.a))
        else:
            assert torch.allclose(found_right, torch.einsum("ngoi,ngoj->gij", piece.values, piece.values))
            assert torch.allclose(found_left, torch.einsum("ngoi,ngpi->gop", piece.values, piece.values))


@pytest.mark.parametrize(
    ("block", "shapes"),
    [
        (Block("w", ("w", "b"), (1, 4, 4), matrix=True), {"w": (4, 3), "b": (4,)}),
        (Block("w", ("w", "b"), (1, 4, 4), matrix=True, transpose=True), {"w": (3, 4), "b": (4,)}),
        (Block("w", ("w", "b"), (2, 3, 9), matrix=True), {"w": (6, 2, 2, 2), "b": (6,)}),
        (Block("w", ("w",), (2, 3, 8), matrix=True), {"w": (6, 2, 2, 2)}),
        (Block("w", ("w",), (3, 2)), {"w": (3, 2)}),
        (Block("w", ("w",), (1,)), {"w": ()}),
    ],
    ids=["linear", "transposed", "grouped convolution", "no bias", "any shape", "a single number"],
)
def test_unpacking_undoes_packing(block, shapes):
    values = {n: torch.randn(5, *shape) for n, shape in shapes.items()}
    packed = block.pack(values, lead=1)
    assert packed.shape == (5, *block.shape)
    back = block.unpack(packed, {n: torch.Size(s) for n, s in shapes.items()})
    assert back.keys() == values.keys() and all(torch.equal(back[n], values[n]) for n in values)
    assert torch.equal(block.pack({n: v[2] for n, v in values.items()}), packed[2])
