"""Random projections: what they keep (inner products, with the spread of the closed forms) and what they do not depend on."""

import pytest
import torch

from headwater.errors import InputError
from headwater.linalg import projections as pj
from headwater.linalg.projections import Gaussian, Rademacher
from headwater.linalg.structured import KhatriRao, SparseJL

DOUBLE = torch.float64
KINDS = {
    "rademacher": Rademacher,
    "gaussian": Gaussian,
    "sparse": lambda dim, seed=0: SparseJL(dim, seed, nonzeros=dim // 8),
    "khatri-rao": KhatriRao,
    "khatri-rao of three": lambda dim, seed=0: KhatriRao(dim, seed, terms=3),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def some(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@each_kind
def test_projecting_is_the_product_with_the_entries(make):
    projection, v = make(16), some(5, 4, 9)
    entries = projection.entries("w", range(4), range(9), dtype=DOUBLE).flatten(1)
    torch.testing.assert_close(projection.project("w", v), v.flatten(1) @ entries.mT * projection.scale, rtol=1e-12, atol=1e-12)


@each_kind
def test_a_smaller_dimension_is_the_beginning_of_a_larger_one(make):
    small, large = make(16), make(48)
    assert torch.equal(small.entries("w", range(3), range(200)), large.entries("w", range(3), range(200))[:16])


@each_kind
def test_a_larger_vector_keeps_the_entries_of_a_smaller_one(make):
    large = make(16).entries("w", range(7), range(300))
    assert torch.equal(make(16).entries("w", range(4), range(131)), large[:, :4, :131])
    assert torch.equal(make(16).entries("w", torch.tensor([6, 0, 3]), range(131, 200)), large[:, [6, 0, 3], 131:200])


@each_kind
@pytest.mark.parametrize(("keep", "size"), [(False, 6 * 16 * 2), (True, 6 * 16 * 2), (True, 4 * 16)])
def test_in_small_tiles_is_as_in_one(make, keep, size, monkeypatch):
    v = some(5, 11, 6)
    whole = make(16).project("w", v)
    monkeypatch.setattr(pj, "TILE", size)
    applied = make(16).on("w", 11, 6, dtype=DOUBLE, device="cpu", keep=keep)
    for _ in range(2):
        torch.testing.assert_close(applied(lambda r, c: v[:, r, c], 5) * make(16).scale, whole, rtol=1e-12, atol=1e-12)


@each_kind
def test_other_names_and_seeds_are_other_maps_and_wrappers_are_no_name(make):
    entries = make(16).entries("fc.weight", range(2), range(64))
    assert torch.equal(make(16).entries("_orig_mod.fc.weight", range(2), range(64)), entries)
    for other in (make(16).entries("fc.bias", range(2), range(64)), make(16, seed=1).entries("fc.weight", range(2), range(64))):
        assert not torch.equal(other, entries)


@each_kind
@pytest.mark.parametrize("kind", ["outer products", "matrices", "vectors", "same"])
def test_inner_products_are_kept_with_the_spread_of_the_closed_form(make, kind):
    out, inner = (1, 24) if kind == "vectors" else (4, 6)
    x, y = some(2, out, inner) + 0.3
    if kind == "outer products":
        x, y = some(out, 1, seed=2) * some(1, inner, seed=3), (some(out, 1, seed=2) + some(out, 1, seed=4)) * some(1, inner, seed=3)
    y = x if kind == "same" else y
    trials = 4000  # the numbers of one large projection, sixteen at a time, are as many small ones
    large = make(16 * trials).entries("w", range(out), range(inner), dtype=DOUBLE).unflatten(0, (trials, 16)).flatten(2)
    found = (large @ x.flatten() * (large @ y.flatten())).sum(1) * make(16).scale ** 2
    variance = make(16).variance(x, y)
    assert abs(float(found.mean() - (x * y).sum())) < 4.5 * (variance / trials) ** 0.5
    spread = float((found - found.mean()).square().mean() / variance)
    fourth = float(((found - found.mean()) / found.std()).pow(4).mean())
    assert abs(spread - 1) < 4.5 * ((fourth - 1) / trials) ** 0.5


@each_kind
def test_looked_up_rows_are_projected_from_the_rows_that_occur(make, monkeypatch):
    index, a = torch.tensor([[4, 0, 4, 1], [2, 2, 2, 2], [0, 1, 2, 3]]), some(3, 4, 7, seed=1)
    whole = torch.nn.functional.one_hot(index, 5).to(DOUBLE).mT @ a
    at = make(16).on("w", 5, 7, dtype=DOUBLE, device="cpu")
    expected = at(lambda r, c: whole[:, r, c], 3)
    torch.testing.assert_close(at.looked_up(index, a), expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(pj, "TILE", 7 * 16 * 2)
    torch.testing.assert_close(at.looked_up(index, a), expected, rtol=1e-12, atol=1e-12)


def test_paired_signs_project_outer_products_from_their_factors():
    at = KhatriRao(16, seed=2, terms=2).on("w", 5, 7, dtype=DOUBLE, device="cpu")
    g, a = some(3, 4, 5), some(3, 4, 7, seed=1)
    torch.testing.assert_close(at.outer(g, a), at(lambda r, c: (g.mT @ a)[:, r, c], 3), rtol=1e-12, atol=1e-12)


def test_the_spread_of_paired_signs_nears_that_of_independent_ones_with_more_terms():
    x = some(6, 1) * some(1, 8, seed=1)
    one, many, independent = (p.variance(x, x) for p in (KhatriRao(64), KhatriRao(64, terms=10**6), Rademacher(64)))
    assert one > 2 * independent
    assert abs(many / (independent + 2 * float(x.pow(4).sum()) / 64) - 1) < 1e-3  # but for what products of signs never repeat


@each_kind
def test_the_noise_is_what_squared_lengths_can_have_at_the_most(make):
    lengths = [x / x.norm() for x in (some(7, 9), some(40, 1) * some(1, 50, seed=1), some(1, 900), some(30, 30))]
    found = [make(16).variance(x, x) ** 0.5 for x in lengths]
    assert max(found) <= make(16).noise and max(found) > 0.85 * make(16).noise


def test_a_coordinate_goes_once_into_each_block():
    entries = SparseJL(24, nonzeros=4).entries("w", range(3), range(50)).view(4, 6, 150)
    assert torch.equal(entries.abs().sum(1), torch.ones(4, 150))


def test_a_matrix_has_columns_of_length_one_in_the_mean():
    for make in KINDS.values():
        assert abs(float(make(64).matrix("w", 500).square().sum(0).mean()) - 1) < 0.05


def test_kinds_and_dtypes_as_asked():
    for make in KINDS.values():
        assert make(16).matrix("w", 3, dtype=DOUBLE).dtype == DOUBLE
        assert make(16).project("w", torch.ones(2, 9)).shape == (2, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rademacher(0), "dim=0"),
        (lambda: Gaussian(2.5), "dim=2.5"),
        (lambda: Rademacher(True), "dim=True"),
        (lambda: SparseJL(10, nonzeros=4), "nonzeros=4 of dim=10"),
        (lambda: SparseJL(8, nonzeros=0), "nonzeros=0"),
        (lambda: KhatriRao(8, terms=0), "terms=0"),
    ],
)
def test_impossible_projections_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
