"""Random numbers keyed by example: of no batch, prefix stable, and of the right distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from headwater.tasks import Draws


@pytest.mark.parametrize("method", ["uniform", "normal"])
def test_numbers_belong_to_the_example_whatever_the_batch(method):
    def draw(ids, *shape):
        return getattr(Draws(3, ids), method)(*shape)

    whole = draw(range(20), 4)
    assert torch.equal(draw([7, 3, 3], 4), whole[[7, 3, 3]])
    assert torch.equal(draw(np.arange(20)[::-1].copy(), 4), whole.flip(0))
    assert torch.equal(draw(range(20), 2), whole[:, :2])
    assert torch.equal(draw(range(20), 2, 2).flatten(1), whole)
    assert not torch.equal(getattr(Draws(4, range(20)), method)(4), whole)


def test_a_stream_goes_on_where_it_was():
    whole = Draws(0, range(5)).uniform(7)
    draws = Draws(0, range(5))
    assert torch.equal(torch.cat([draws.uniform(3), draws.uniform().unsqueeze(1), draws.uniform(3)], 1), whole)


@pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 - 1])
def test_any_seed_will_do(seed):
    assert Draws(seed, [2**40]).uniform(3).shape == (1, 3)


def test_no_examples_give_no_numbers():
    assert Draws(0, []).normal(3).shape == (0, 3) and Draws(0, []).at(torch.arange(0)).uniform(2).shape == (0, 2)


def test_however_a_batch_is_cut_or_run_again_its_examples_meet_the_same_numbers():
    whole = Draws(5, [8, 9, 4])
    expected = Draws(5, [8, 9, 4]).uniform(5)
    for positions in ([0, 1, 2], [1], [2, 0], [0, 0]):
        part = whole.at(torch.tensor(positions))
        assert torch.equal(torch.cat([part.uniform(2), part.uniform(3)], 1), expected[positions])
    batched = torch.func.vmap(lambda position: whole.at(position.unsqueeze(0)).uniform(5)[0])(torch.arange(3))
    assert torch.equal(batched, expected)


def test_uniform_and_normal_numbers_are_that():
    draws = Draws(0, range(4000))
    assert stats.kstest(draws.uniform(5).flatten().numpy(), "uniform").pvalue > 1e-3
    normal = Draws(1, range(4000)).normal(5)
    assert torch.isfinite(normal).all() and stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    across = np.corrcoef(normal.numpy().T)
    assert np.abs(across - np.eye(5)).max() < 5 / 4000**0.5  # the numbers of one example do not go together


def test_neighbouring_examples_and_seeds_are_independent():
    u = Draws(0, range(3000)).uniform().numpy()
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 5 / 3000**0.5
    assert abs(np.corrcoef(u, Draws(1, range(3000)).uniform().numpy())[0, 1]) < 5 / 3000**0.5


def test_classes_come_as_often_as_the_softmax_says():
    logits = torch.tensor([1.0, float("-inf"), -1.0, 0.5])
    drawn = Draws(0, range(20_000)).categorical(logits.expand(20_000, 4))
    expected = 20_000 * logits.softmax(0)
    counts = torch.bincount(drawn, minlength=4)
    assert counts[1] == 0
    live = expected > 0
    assert stats.chisquare(counts[live].numpy(), expected[live].double().numpy() / expected.double().sum().item() * 20_000).pvalue > 1e-3


class Fixed(Draws):
    def __init__(self, u):
        self.u = u

    def uniform(self, *shape):
        return torch.full((1, *shape), self.u, dtype=torch.float64)


@pytest.mark.parametrize(("u", "expected"), [(0.0, 1), (0.2499999, 1), (0.25, 3), (0.7501, 4), (1 - 2**-53, 4)])
def test_the_inverse_of_the_distribution_function_at_its_steps(u, expected):
    """Probabilities 0, 1/4, 0, 1/2, 1/4: a class without probability is never drawn."""
    logits = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25]]).log()
    assert Fixed(u).categorical(logits).item() == expected


def test_positions_have_classes_of_their_own_however_many_are_held_at_once(monkeypatch):
    logits = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    whole = Draws(0, range(6)).categorical(logits)
    assert whole.shape == (6, 5)
    monkeypatch.setattr("headwater.tasks.draws._CHUNK", 9)
    assert torch.equal(Draws(0, range(6)).categorical(logits), whole)
    assert torch.equal(Draws(0, range(6)).categorical(logits[:, :3]), whole[:, :3])
