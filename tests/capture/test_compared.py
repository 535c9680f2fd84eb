"""Inner products and lengths at once: those of gradients formed whole, however they are tiled."""

import pytest
import torch

from headwater.capture import Capture, blocks
from headwater.capture.blocks import BlockGradient, Late, Lookup, Outer, Rows
from headwater.capture.capture import regroup


def outer(n, groups, shared, inner, out, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Outer(*(torch.randn(n, groups, shared, f, generator=g, dtype=torch.float64) for f in (inner, out)))


KINDS = {
    "several positions": BlockGradient((outer(70, 1, 3, 5, 4),)),
    "groups": BlockGradient((outer(70, 2, 3, 5, 4),)),
    "one position": BlockGradient((outer(70, 1, 1, 5, 4),)),
    "one position, groups": BlockGradient((outer(70, 2, 1, 5, 4),)),
    "used twice": BlockGradient((outer(70, 1, 3, 5, 4), outer(70, 1, 2, 5, 4, seed=1))),
    "as they are": BlockGradient((Rows(torch.randn(70, 6, dtype=torch.float64)),)),
    "mixed": BlockGradient((outer(70, 1, 3, 5, 4), Rows(torch.randn(70, 1, 4, 5, dtype=torch.float64)))),
    "looked up": BlockGradient((Lookup(torch.arange(210).view(70, 3) % 4, torch.randn(70, 3, 5, dtype=torch.float64), 4),)),
}


@pytest.mark.parametrize("chunk", [7, 50, 1000, 2**21])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_lengths_are_those_of_whole_gradients(kind, chunk, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", chunk)
    gradient = KINDS[kind]
    whole = gradient.dense()
    queries = torch.randn(3, *whole.shape[1:], dtype=torch.float64)
    dots, squares = gradient.dot_and_squares(queries)
    assert torch.allclose(dots, queries.flatten(1) @ whole.flatten(1).T, rtol=1e-12, atol=1e-12)
    assert torch.allclose(gradient.dot(queries), dots, rtol=1e-12, atol=1e-12)
    assert torch.allclose(squares, whole.flatten(1).square().sum(1), rtol=1e-12, atol=1e-12)


def test_large_matrices_are_formed_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", 640)
    assert KINDS["several positions"]._tile() == (64, 2)  # 64 examples x 2 rows x 5 inputs
    monkeypatch.setattr(blocks, "CHUNK", 2000)
    assert KINDS["several positions"]._tile() == (100, 0)  # whole gradients find room


def late(x, parts):
    """The activations of ``x``, which say which rows were asked for."""
    piece = outer(*x)

    def make(rows):
        parts.append(rows.indices(len(piece))[:2])
        return piece.a[rows]

    return piece, Late(make, piece.g, piece.inner)


@pytest.mark.parametrize("each", [1, 2])
def test_what_is_made_late_is_what_was_there(each, monkeypatch):
    asked: list = []
    plain, lazy = late((12, 2, 3, 5, 4), asked)
    plain, lazy = regroup(plain, 12 // each), regroup(lazy, 12 // each)
    assert (len(lazy), lazy.groups, lazy.shared, lazy.inner, lazy.numel) == (12 // each, 2, 3 * each, 5, 40) and not asked
    one, other = BlockGradient((plain,)), BlockGradient((lazy,))
    queries = torch.randn(3, 2, 4, 5, dtype=torch.float64)
    monkeypatch.setattr(blocks, "CHUNK", 100)
    monkeypatch.setattr(blocks, "MANY", 2)
    for a, b in zip(one.dot_and_squares(queries), other.dot_and_squares(queries), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert len(set(asked)) == len(asked) > 1  # part by part, each once
    turn = torch.randn(2, 5, 5, dtype=torch.float64)
    for part in (slice(None), slice(1, 4)):
        assert torch.equal(plain.part(part).dense(), lazy.part(part).dense())
        assert torch.equal(plain.part(part).part(slice(1, None)).dense(), lazy.part(part).part(slice(1, None)).dense())
    assert torch.equal(plain.rotated(None, turn).a, lazy.rotated(None, turn).a)
    assert all(torch.equal(a, b) for a, b in zip(plain.covariances(True, True), lazy.covariances(True, True), strict=True))
    asked.clear()
    assert torch.equal(plain.a, lazy.a) and torch.equal(lazy.made().a, plain.a) and torch.equal(lazy.part(slice(2, 3)).a, plain.a[2:3])
    assert len(asked) == 1  # read once, it is kept


def test_the_patches_of_a_function_with_columns_are_made_once(monkeypatch):
    from headwater.capture import rules

    calls, unfold = [], rules.unfold
    monkeypatch.setattr(rules, "unfold", lambda *a, **k: calls.append(1) or unfold(*a, **k))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    x = torch.randn(5, 1, 4, 4)
    capture = Capture(model, lambda m, b: m(b).sum(1), x)
    calls.clear()
    found = [g["0.weight"].dense() for g in capture.each(lambda m, b: m(b), x)]
    assert len(found) == 3 and len(calls) == 1
