"""Counter-based random numbers: the published vectors, and that a number depends on its key, row and column alone."""

import numpy as np
import pytest
import torch

from headwater import philox as px
from headwater.errors import InputError

KEY = px.key_of("fc.weight", "right", 3)
# Known answers of Random123 1.14 (Salmon et al.), file kat_vectors: counter, key, words of philox4x32 with 10 rounds.
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
def test_the_published_answers(counter, key, expected):
    found = px.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in found) == expected


def by_hand(key, row, block):
    """The same words by Python's whole numbers, which never wrap."""
    x, k = [block & 0xFFFFFFFF, row & 0xFFFFFFFF, row >> 32, block >> 32], list(key)
    for _ in range(10):
        p, q = x[0] * 0xD2511F53, x[2] * 0xCD9E8D57
        x = [(q >> 32) ^ x[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ x[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return x


def test_words_of_far_rows_and_blocks_are_those_of_whole_number_arithmetic():
    rows, blocks = torch.tensor([5, 2**33 + 7, 0]), range(2**32 - 1, 2**32 + 2)
    found = px.words(KEY, rows, blocks).view(3, 3, 4)
    assert [[found[r, b].tolist() for b in range(3)] for r in range(3)] == [[by_hand(KEY, int(row), block) for block in blocks] for row in rows]


def test_signs_are_the_bits_of_the_words():
    found = px.signs(KEY, range(3), range(300), dtype=torch.float64)
    bits = px.words(KEY, range(3), range(3)).numpy()
    expected = [[1.0 if bits[r, c // 32] >> (c % 32) & 1 else -1.0 for c in range(300)] for r in range(3)]
    assert found.tolist() == expected


DRAWS = {
    "signs": px.signs,
    "uniforms": px.uniforms,
    "normals": px.normals,
    "integers": lambda key, rows, columns: px.integers(key, rows, columns, 37),
}
each_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


@each_draw
def test_any_part_is_that_part_of_the_whole(draw):
    whole = draw(KEY, range(12), range(700))
    assert torch.equal(draw(KEY, range(4, 9), range(131, 517)), whole[4:9, 131:517])
    assert torch.equal(draw(KEY, torch.tensor([11, 0, 7]), range(1, 2)), whole[[11, 0, 7], 1:2])
    assert draw(KEY, range(3), range(5, 5)).shape == (3, 0)
    assert draw(KEY, range(0), range(5)).shape == (0, 5)


@each_draw
def test_more_counters_than_are_made_at_once_are_the_same(draw, monkeypatch):
    whole = draw(KEY, range(5), range(400))
    monkeypatch.setattr(px, "_CHUNK", 3)
    assert torch.equal(draw(KEY, range(5), range(400)), whole)


@each_draw
def test_another_key_gives_unrelated_numbers(draw):
    a, b = (draw(px.key_of("w", "left", seed), range(50), range(200)).double().flatten() for seed in (0, 1))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / len(a) ** 0.5


def test_numbers_have_the_moments_of_their_distributions():
    n = 200 * 1000
    s, u, z = (draw(KEY, range(200), range(1000)).double() for draw in (px.signs, px.uniforms, px.normals))
    assert abs(float(s.mean())) < 4 / n**0.5
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5 and float(u.min()) > 0 and float(u.max()) < 1
    assert abs(float(z.mean())) < 4 / n**0.5 and abs(float(z.square().mean()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float(z.pow(4).mean()) - 3) < 4 * (96 / n) ** 0.5  # the variance of z^4 is 105 - 9
    rows = s @ s.mT / 1000
    assert abs(float(rows[~torch.eye(200, dtype=torch.bool)].std()) * 1000**0.5 - 1) < 0.05
    counts = np.bincount(px.integers(KEY, range(37), range(1000), 37).flatten(), minlength=37)
    assert len(counts) == 37 and ((counts - 1000) ** 2 / 1000).sum() < 75  # chi-squared of 36 degrees: mean 36, s.d. 8.5


def test_wrapping_a_model_changes_no_key():
    wrapped = ["fc.weight", "module.fc.weight", "_orig_mod.fc.weight", "module._fsdp_wrapped_module.fc._fsdp_wrapped_module.weight", "base_model.model.fc.weight"]
    assert {px.plain_name(name) for name in wrapped} == {"fc.weight"}


@pytest.mark.parametrize("below", [0, 2**31 + 1])
def test_a_bound_that_cannot_be_drawn_below_is_refused(below):
    with pytest.raises(InputError, match="a bound from 1"):
        px.integers(KEY, range(1), range(1), below)


def test_columns_with_gaps_are_refused():
    with pytest.raises(InputError, match="without gaps"):
        px.signs(KEY, range(1), range(0, 10, 2))
