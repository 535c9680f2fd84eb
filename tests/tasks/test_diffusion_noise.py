"""Noise events: what an example meets depends on the seed, its number, the timestep and the draw, and on nothing else."""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InputError, TaskError
from headwater.tasks.diffusion import Draw, Grid, Listed
from headwater.tasks.diffusion.noise import noise_of

SHAPE = torch.Size([2, 3, 3])
OWN = Grid((1, 7, 30), draws=2, noise="example", seed=5)
SHARED = Grid((1, 7, 30), draws=2, seed=5)


def task(**settings):
    return hw.tasks.Diffusion(hw.tasks.cosine(40), **{"timesteps": (1, 7, 30), "draws": 2, "seed": 5, **settings})


def images(n=9, dtype=torch.float32, shape=SHAPE):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def noise_by_id(ids, grid=OWN, namespace="train", dtype=torch.float32):
    return noise_of(grid.of(np.asarray(ids), namespace)[1], SHAPE, dtype, "cpu")


# ------------------------------------------------------------------------------------------------------------ its keys


@pytest.mark.parametrize("grid", [OWN, SHARED], ids=["own", "shared"])
def test_noise_is_the_examples_in_any_batch_and_order(grid):
    ids = np.array([8, 3, 5, 3, 1_000_000_007, 0])  # not in order, not contiguous, one twice
    whole = noise_by_id(ids, grid)
    assert whole.shape == (6, 6, *SHAPE)
    for k, one in enumerate(ids):
        assert torch.equal(noise_by_id([one], grid)[0], whole[k])
    assert torch.equal(noise_by_id(ids[::-1], grid), whole.flip(0))


def test_examples_timesteps_draws_seeds_salts_and_queries_have_noise_of_their_own():
    drawn = noise_by_id(range(4)).flatten(0, 1)
    assert len(torch.unique(drawn[:, 0, 0, 0])) == 4 * OWN.count
    others = [noise_by_id(range(4), Grid(OWN.timesteps, 2, "example", **keys)) for keys in ({"seed": 6}, {"seed": 5, "salt": 1})]
    others += [noise_by_id(range(4), namespace="query"), noise_by_id(range(4), SHARED)]
    for other in others:
        assert not torch.isin(other.flatten(0, 1)[:, 0, 0, 0], drawn[:, 0, 0, 0]).any()


def test_shared_noise_is_one_for_all_and_for_queries_too():
    noise = noise_by_id(range(4), SHARED)
    assert (noise == noise[:1]).all() and torch.equal(noise, noise_by_id(range(4), SHARED, namespace="query"))
    assert noise.stride(0) == 0  # one copy


def test_a_timestep_has_its_noise_in_any_grid_and_another_where_it_stands_twice():
    alone = noise_by_id(range(4), Grid((7,), 2, "example", 5))
    assert torch.equal(alone, noise_by_id(range(4))[:, 2:4])
    assert torch.equal(noise_by_id(range(4), Grid((7, 1, 7), 2, "example", 5))[:, [0, 1, 4, 5]], noise_by_id(range(4), Grid((7,), 4, "example", 5)))


def test_noise_is_standard_normal():
    noise = noise_by_id(range(400)).double()
    flat = noise.flatten()  # 43,200 numbers: errors of the moments within five standard deviations
    assert abs(float(flat.mean())) < 5 / 208 and abs(float(flat.var()) - 1) < 5 * 2**0.5 / 208 and abs(float(flat.pow(4).mean()) - 3) < 5 * 96**0.5 / 208
    apart = np.corrcoef(noise.flatten(2).transpose(0, 1).flatten(1).numpy())  # of events
    assert np.abs(apart - np.eye(6)).max() < 5 / 85


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_noise_of_another_precision_is_the_same_noise_rounded(dtype):
    assert torch.equal(noise_by_id(range(4), dtype=dtype), noise_by_id(range(4), dtype=torch.float64).to(torch.promote_types(dtype, torch.float32)).to(dtype))


def test_seeds_fit_into_the_record():
    seeds = OWN.of(np.arange(1000), "train")[1]
    assert seeds.min() >= 0 and seeds.max() < 2**62 and len(torch.unique(seeds)) == 6000


def test_an_offset_moves_each_channel_of_an_event_by_a_number_of_its_own():
    x, moved = images(200), task(noise="example", noise_offset=0.5)
    plain, batch = task(noise="example").examples(x).batch(range(200)), moved.examples(x).batch(range(200))
    shift = (batch.eps - plain.eps).flatten(3)
    torch.testing.assert_close(shift, shift[..., :1].expand_as(shift), rtol=0, atol=1e-6)
    own = shift[..., 0].flatten() / 0.5  # 2,400 numbers
    assert len(torch.unique(own)) == 2400 and abs(float(own.mean())) < 5 / 49 and abs(float(own.var()) - 1) < 5 * 2**0.5 / 49
    assert torch.equal(moved.examples(x).batch([7, 3]).eps, batch.eps[[7, 3]])
    model = Sees()  # what is shown is mixed with it, and it is asked for
    loss = moved.loss(model, moved.examples(x).batch([7]))
    a, b = (table[[1, 1, 7, 7, 30, 30]].float().view(6, 1, 1, 1) for table in (moved.process.signal, moved.process.noise))
    torch.testing.assert_close(loss, (a * x[7] + b * batch.eps[7] - batch.eps[7]).square().mean()[None])


# ------------------------------------------------------------------------------------------------------------ in batches


class Sees(nn.Module):
    """Answers with what it was shown, so that losses say it; keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, t):
        self.x, self.t = x, t
        return self.weight * x


@pytest.mark.parametrize("noise", ["shared", "example"])
@pytest.mark.parametrize("shape", [(6,), (2, 9), (2, 3, 3), (2, 2, 3, 3)], ids=["vectors", "signals", "images", "videos"])
def test_losses_depend_on_no_batch(noise, shape):
    examples, model = task(noise=noise).examples(images(9, shape=shape)), Sees()
    whole = task().loss(model, examples.batch(range(9)))
    order = np.random.default_rng(0).permutation(9)
    apart = torch.cat([task().loss(model, examples.batch(part)) for part in np.split(order, [1, 3, 7])])
    torch.testing.assert_close(apart, whole[order], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_network_of_another_precision_is_shown_the_same(dtype):
    tables, model = task().process, Sees().to(dtype)
    x = images(dtype=dtype)
    batch = task().examples(x).batch(range(9))
    loss = task().loss(model, batch)
    assert model.x.dtype == dtype and loss.dtype == batch.eps.dtype == torch.promote_types(dtype, torch.float32)
    mixed = tables.signal[7] * x[4].double() + tables.noise[7] * batch.eps[4, 3].double()
    torch.testing.assert_close(model.x[4 * 6 + 3].double(), mixed, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-12)


def test_networks_of_diffusion_are_told_whole_timesteps_and_those_of_flows_levels():
    model, flow = Sees(), hw.tasks.Diffusion(hw.tasks.flow(40), timesteps=(0, 19, 39))
    task(draws=1).loss(model, images(2))
    assert model.t.dtype == torch.int64 and model.t.tolist() == [1, 7, 30] * 2
    flow.loss(model, images(2))
    assert model.t.tolist() == [1, 20, 40] * 2
    flow.loss(model, images(2, torch.bfloat16))
    assert model.t.dtype == torch.float32  # in bfloat16 timesteps near 1000 would be the same
    told = hw.tasks.Diffusion(hw.tasks.flow(40), timesteps=(0, 19, 39), time=1 / 40)
    told.loss(model, images(2))
    torch.testing.assert_close(model.t, torch.tensor([0.025, 0.5, 1.0] * 2))
    backwards = hw.tasks.Diffusion(hw.tasks.cosine(40), timesteps=(0, 39), time=lambda t: 39 - t)
    backwards.loss(model, images(1))
    assert model.t.tolist() == [39, 0] and model.t.dtype == torch.int64


def test_a_spread_holds_each_event_alone():
    examples = task(noise="example").examples(images())
    spread, whole = examples.spread(), examples.batch([7, 2])
    assert len(spread) == 9 * 6
    found = spread.batch([7 * 6 + 4, 2 * 6])
    assert torch.equal(found.eps[:, 0], torch.stack([whole.eps[0, 4], whole.eps[1, 0]])) and found.share.tolist() == [[1.0], [1.0]]
    assert found.time.tolist() == [[30], [1]] and torch.equal(found.batch, images()[[7, 2]])


def test_training_meets_what_its_draw_says():
    drawing, model, x = task(), Sees(), images()
    events = drawing.draw(x, torch.Generator().manual_seed(3))
    loss = drawing.loss(model, drawing.noised(x, events))
    listed = drawing.examples(x).over(Listed(events.t.numpy()[:, None], events.seeds.numpy()[:, None]))
    assert torch.equal(drawing.loss(model, listed.batch(range(9))), loss)
    again = drawing.draw(9, torch.Generator().manual_seed(3))
    assert torch.equal(again.t, events.t) and torch.equal(again.seeds, events.seeds)
    torch.manual_seed(3)
    assert torch.equal(drawing.draw(x).seeds, events.seeds)


@dataclass
class Packed:
    images: torch.Tensor
    y: torch.Tensor


@pytest.mark.parametrize(
    "pack",
    [lambda x: x, lambda x: (x,), lambda x: {"images": x}, lambda x: [*x], lambda x: x.numpy(), lambda x: Packed(x, torch.zeros(len(x)))],
    ids=["tensor", "tuple", "mapping", "dataset", "numpy", "dataclass"],
)
def test_images_are_found_in_any_batch(pack):
    class Net(Sees):
        def forward(self, x, t, y=None):
            return super().forward(x, t)

    examples = task().examples(pack(images()))
    torch.testing.assert_close(task().loss(Net(), examples.batch([4, 2])), task().loss(Net(), task().examples(images()).batch([4, 2])))


# ------------------------------------------------------------------------------------------------------------ refused


def sizes():
    return [torch.zeros(3, 8, 8), torch.zeros(3, 8, 8), torch.zeros(3, 8, 10)]


BAD = {
    "bytes": (lambda: task().examples(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)).batch([0]), "Tensor of torch.uint8.*\n.*network's own range.*\n.*-1..1"),
    "bytes in a field": (lambda: task().examples({"images": torch.zeros(4, 3, dtype=torch.uint8)}).batch([0]), "torch.uint8"),
    "another field": (lambda: task().examples({"pixel_values": images()}).batch([0]), "pixel_values.*\n.*\n.*Diffusion\\(images="),
    "single numbers": (lambda: task().examples(torch.zeros(4)).batch([0]), r"shape \(1,\)"),
    "sizes": (lambda: task().examples(sizes()).batch([0, 2]), r"different sizes.*\(3, 8, 8\), \(3, 8, 10\).*\n.*\n.*resize or crop"),
    "sizes in tuples": (lambda: task().examples([(x, 0) for x in sizes()]).batch([0, 1, 2]), "different sizes"),
    "sizes by one's own collate": (lambda: task(collate=torch.stack).examples(sizes()).batch([0, 2]), "different sizes"),
    "timesteps beyond": (lambda: task(timesteps=(0, 40)), "timesteps from 0 to 39"),
    "timesteps before": (lambda: task().grid((-1,)), "timesteps from 0 to 39"),
    "no timesteps": (lambda: task(timesteps=()), "0 timesteps"),
    "timesteps recorded beyond": (lambda: task().examples(images(1)).over(Listed(np.array([[40.0]]), np.array([[1]]))).batch([0]), "0 to 39"),
    "timesteps recorded that are none": (lambda: task().examples(images(1)).over(Listed(np.array([[np.nan]]), np.array([[1]]))).batch([0]), "0 to 39"),
    "an offset below nothing": (lambda: task(noise_offset=-0.1), "noise offset of -0.1"),
    "no such noise": (lambda: task(noise="each"), "noise='each'"),
    "events of others": (lambda: task().noised(images(4), Draw(torch.zeros(3), torch.zeros(3, dtype=torch.int64))), "events of 3 examples for a batch of 4"),
    "no numbers for own noise": (lambda: task(noise="example").loss(Sees(), images()), "a batch without events"),
    "events of another dataset": (lambda: task().examples(images(4)).over(Listed(np.zeros((3, 1)), np.zeros((3, 1)))), "events of 3 examples for 4"),
    "an event not recorded": (lambda: task().examples(images(2)).over(Listed(np.zeros((2, 1)), np.array([[4], [-1]]))).batch([0, 1]), "example 1 without"),
}


@pytest.mark.parametrize(("do", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_seen_is_refused_in_plain_words(do, said):
    with pytest.raises((InputError, TaskError), match=said):
        do()


def test_an_example_that_fails_otherwise_says_so_itself():
    with pytest.raises(RuntimeError, match="broken"):
        task(collate=lambda items: (_ for _ in ()).throw(RuntimeError("broken"))).examples([torch.zeros(3)] * 2).batch([0, 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_device_has_the_same_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seeds = OWN.of(np.arange(50), "train")[1]
        torch.testing.assert_close(noise_of(seeds, SHAPE, torch.float32, "cuda").cpu(), noise_of(seeds, SHAPE, torch.float32, "cpu"), rtol=2e-7, atol=1e-7)
