"""Journey-TRAK step by step against matrices written out, and the trajectories that it asks about."""

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InputError
from headwater.tasks.diffusion import Grid
from tests.influence.denoisers import Brute, D, Network, T, close, images, labelled, made, trained
from tests.influence.test_diffusion_kernels import OUTPUTS, kernel

COSINE = hw.tasks.cosine(T)
TASK = hw.tasks.Diffusion(hw.tasks.linear(T), timesteps=4)  # whose last step keeps much of the image: a network that is hardly trained does not blow it up
TRAIN = images(12, 1)
METHOD = hw.JourneyTrak(timesteps=3, draws=2, seed=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("j") / "run", made(Network), TASK, TRAIN, checkpoints=[12]).finish()


@pytest.fixture(scope="module")
def journey(run):
    return hw.tasks.Trajectory.sample(TASK, run.load(run.model(), 12), torch.empty(3, D, dtype=torch.float64), steps=4, seed=2)


def scores(run, queries, method=METHOD, **settings):
    return hw.trace(run, queries, method, progress=False, **settings)


def loss_gradients(brute, data, events):
    """Mean gradients of minus the loss, each example at its own (timestep, seed) pairs."""
    rows = [[brute.of_output(OUTPUTS["loss"], x, int(t), int(s)) for t, s in found] for x, found in zip(data, events, strict=True)]
    return torch.stack([torch.stack(row).mean(0) for row in rows]).numpy()


def test_each_step_is_the_kernel_of_what_the_image_was_taken_to_be_there(run, journey):
    assert all(float((journey.clean[:, k] - journey.clean[:, k + 1]).abs().max()) > 1e-3 for k in range(3))
    brute = Brute(run).at(12)
    met = METHOD._drawn(run.stages[0])
    train = loss_gradients(brute, TRAIN, [list(zip(*pair, strict=True)) for pair in zip(met.t, met.seeds, strict=True)])
    found, truth = scores(run, journey), []
    for k, t in enumerate(journey.timesteps):
        _, seeds = Grid((t,), 2, seed=6).of(np.zeros(1, int), "query")
        asked = loss_gradients(brute, journey.clean[:, k], [[(t, s) for s in seeds[0]]] * 3)
        truth.append(kernel(asked, train, 0.005))
        assert close(found.by("timestep")[t] * 4, truth[-1], 1e-9)
    assert close(found.values, np.mean(truth, axis=0), 1e-9) and found.unit == "rank only"
    assert close(scores(run, journey, batch_size=3).values, found.values, 1e-10)
    projected = [scores(run, journey, hw.JourneyTrak(dim=dim, timesteps=3, draws=2, seed=6)).values for dim in (10_000, 8)]
    assert close(projected[0], found.values, 1e-9) and not close(projected[1], found.values, 0.05)


def test_training_examples_are_met_at_timesteps_drawn_as_in_training():
    from types import SimpleNamespace

    stage = SimpleNamespace(task=TASK, size=4000, index=0, name="train")
    plain = hw.JourneyTrak(timesteps=5)._drawn(stage)
    counts = np.bincount(plain.t.astype(int).ravel(), minlength=T)
    assert plain.t.shape == (4000, 5) and len(np.unique(plain.seeds)) == 20_000 and len(counts) == T
    assert np.abs(counts - 400).max() < 5 * 20  # uniform over 50
    again = hw.JourneyTrak(timesteps=5)._drawn(SimpleNamespace(task=TASK, size=10, index=0, name="train"))
    assert np.array_equal(again.t, plain.t[:10]) and not np.array_equal(hw.JourneyTrak(timesteps=5, seed=1)._drawn(stage).t, plain.t)
    flow = hw.tasks.Diffusion(hw.tasks.flow(T, density="logit-normal"))
    uneven = hw.JourneyTrak(timesteps=5)._drawn(SimpleNamespace(task=flow, size=4000, index=0, name="train"))
    share = np.bincount(uneven.t.astype(int).ravel(), minlength=T) / 20_000
    expected = (flow.process.density / flow.process.density.sum()).numpy()
    assert np.abs(share - expected).max() < 5 * np.sqrt(expected.max() / 20_000)


def test_named_journeys_are_sums_and_other_methods_see_the_finished_images(run, journey):
    def part(rows):
        return hw.tasks.Trajectory(journey.batch[rows], journey.clean[rows], journey.timesteps)

    single = scores(run, journey)
    named = scores(run, [hw.Query("two", part(slice(0, 2))), hw.Query("one", part(slice(2, 3)))])
    assert close(named.values, np.stack([single.values[:2].sum(0), single.values[2]]), 1e-10) and named.query_names == ("two", "one")
    for method in (hw.DiffusionReTrac((3, 20)), hw.DTrak(timesteps=(3, 20)), hw.floors.inputs("dot")):
        assert np.array_equal(scores(run, journey, method).values, scores(run, journey.batch, method).values)
    assert torch.equal(journey.batch, journey.clean[:, -1])


def test_sweeps_and_ensembles_take_it(run, journey, tmp_path):
    sweep = scores(run, journey, hw.JourneyTrak(timesteps=3, draws=2, seed=6, regularisation=(0.005, 0.5)))
    assert close(sweep[0].values, scores(run, journey).values, 1e-12) and not close(sweep[1].values, sweep[0].values, 0.1)
    other = trained(tmp_path / "other", made(Network, seed=1), TASK, TRAIN, checkpoints=[12]).finish()
    both = scores(run, journey, hw.Ensemble(METHOD, [run, other]))
    assert close(both.values, (scores(run, journey).values + scores(other, journey).values) / 2, 1e-10)


def test_queries_without_a_journey_are_refused(run, journey):
    with pytest.raises(InputError, match="queries without a trajectory"):
        scores(run, TRAIN[:2])
    shorter = hw.tasks.Trajectory(journey.batch, journey.clean[:, :2], journey.timesteps[:2])
    with pytest.raises(InputError, match="different timesteps"):
        scores(run, [hw.Query("a", journey), hw.Query("b", shorter)])
    with pytest.raises(InputError, match="numbers of at least 1"):
        hw.JourneyTrak(timesteps=(1, 2))


# ------------------------------------------------------------------------------------------------------------- trajectories


class Ideal(nn.Module):
    """The best predictor for images that are normal with standard deviation s, by any prediction type."""

    def __init__(self, process, prediction, s=0.6):
        super().__init__()
        self.process, self.prediction, self.s = process, prediction, s

    def forward(self, x, t):
        row = (self.process.time[:, None] - t[None].double()).abs().argmin(0)
        a, b = (table[row][:, None].to(x) for table in (self.process.signal, self.process.noise))
        spread = a**2 * self.s**2 + b**2
        clean, eps = a * self.s**2 / spread * x, b / spread * x
        return {"epsilon": eps, "sample": clean, "v": a * eps - b * clean, "flow": eps - clean}[self.prediction]


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_sampling_without_chance_carries_noise_to_its_image(prediction):
    """Of normal images the path is known: ``x_t`` stays in the direction of its first noise, at the standard deviation of step t."""
    process = hw.tasks.flow(1000) if prediction == "flow" else hw.tasks.cosine(1000, prediction)
    task = hw.tasks.Diffusion(process)
    found = hw.tasks.Trajectory.sample(task, Ideal(process, prediction), torch.empty(5, 40, dtype=torch.float64), steps=1000, seed=1)
    direction = found.clean[:, 1] / found.clean[:, 1].norm(dim=1, keepdim=True)  # flow matching begins without any of the image
    assert torch.allclose(found.clean[:, 500] / found.clean[:, 500].norm(dim=1, keepdim=True), direction, atol=1e-8)
    assert abs(float(found.batch.std()) / 0.6 - 1) < 0.12  # 200 numbers
    coarse = hw.tasks.Trajectory.sample(task, Ideal(process, prediction), torch.empty(5, 40, dtype=torch.float64), steps=100, seed=1)
    assert float((coarse.batch - found.batch).abs().max()) < 0.1 and len(coarse.timesteps) == 100


def test_conditions_guidance_and_limits_reach_the_sampler():
    classes = 3
    task = hw.tasks.Diffusion(COSINE, drop=0.1, null=classes)
    model, (x, y) = made(Network, classes=classes).eval(), labelled(4, 1, classes)
    plain, same, guided = (hw.tasks.Trajectory.sample(task, model, (x, y), steps=5, guidance=g) for g in (None, 1.0, 3.0))
    assert torch.allclose(plain.batch[0], same.batch[0], atol=1e-10) and not torch.allclose(plain.batch[0], guided.batch[0], atol=1e-2)
    assert torch.equal(plain.batch[1], y)
    other = hw.tasks.Trajectory.sample(task, model, (x, (y + 1) % classes), steps=5)
    assert not torch.allclose(other.batch[0], plain.batch[0], atol=1e-3)
    clipped = hw.tasks.Trajectory.sample(task, model, (x, y), steps=5, clip=0.25)
    assert float(clipped.clean.abs().max()) == 0.25
    one = hw.tasks.Trajectory.sample(task, model, (x[:1], y[:1]), steps=5)
    assert torch.allclose(one.batch[0], plain.batch[0][:1], atol=1e-12)  # an image's noise is its own


@pytest.mark.parametrize("kind", ["DDIM", "flow"])
def test_a_watched_scheduler_gives_the_same_journey(kind):
    """diffusers' own sampler over every timestep, beside the plain one."""
    diffusers = pytest.importorskip("diffusers")
    flow = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T)
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=T, clip_sample=False) if kind == "DDIM" else flow
    task = hw.tasks.Diffusion(scheduler)
    model = made(Network, dtype=torch.float32).eval()
    truth = hw.tasks.Trajectory.sample(task, model, torch.empty(3, D), steps=T, seed=4)
    from headwater.philox import key_of
    from headwater.tasks.diffusion.noise import noise_of, seeds_of

    eps = noise_of(seeds_of(key_of("headwater", "trajectory", 4), np.arange(3), [(0, 0)]), torch.Size([D]), torch.float32, "cpu")[:, 0]
    with torch.no_grad(), hw.tasks.watched(scheduler, task) as watch:
        for _ in range(2):  # of two calls the last is kept
            scheduler.set_timesteps(T)
            x = float(task.process.noise[-1]) * eps
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t.expand(3)), t, x, return_dict=False)[0]
    found = watch.trajectory()
    assert found.timesteps == truth.timesteps
    assert float((found.clean - truth.clean).abs().max()) < 1e-4 and torch.allclose(found.batch, x)
    assert "step" not in vars(scheduler)
    named = watch.trajectory({"y": torch.zeros(3)})
    assert torch.equal(named.batch["images"], found.batch) and torch.equal(watch.trajectory((torch.zeros(3),)).batch[1], torch.zeros(3))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' own tables
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_other_schedulers_of_diffusers_are_watched_too(name):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(num_train_timesteps=100)
    task = hw.tasks.Diffusion(diffusers.DDPMScheduler(num_train_timesteps=100))
    image = 0.5 * torch.ones(2, 1, 4, 4)
    scheduler.set_timesteps(8)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    with hw.tasks.watched(scheduler, task) as watch:
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(x, t)
            row = int(t)
            eps = (given - task.process.signal[row].float() * image) / task.process.noise[row].float()  # of a network that knows the image
            x = scheduler.step(eps, t, x).prev_sample
    found = watch.trajectory()
    assert len(found.timesteps) == 8 and float((found.clean - image[:, None]).abs().max()) < 0.05


def test_what_is_no_journey_is_refused():
    x, steps = torch.zeros(2, D), torch.zeros(2, 3, D)
    for timesteps, clean in (((3, 2), steps), ((3, 2, 1), steps[:1])):
        with pytest.raises(InputError, match="steps of shape"):
            hw.tasks.Trajectory(x, clean, timesteps)
    with pytest.raises(InputError, match="descending"):
        hw.tasks.Trajectory(x, steps, (3, 3, 1))
    with hw.tasks.watched(type("S", (), {"step": None})(), TASK) as watch, pytest.raises(InputError, match="took no step"):
        watch.trajectory()


@pytest.mark.parametrize("kind", ["DDPM"])
def test_a_pipeline_of_diffusers_is_watched_while_it_samples(kind, tmp_path):
    """A small random UNet: the journey of its pipeline, traced step by step."""
    diffusers = pytest.importorskip("diffusers")

    def build():
        torch.manual_seed(0)
        blocks = {"block_out_channels": (8, 8), "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)

    schedulers = {"DDPM": diffusers.DDPMScheduler, "DDIM": diffusers.DDIMScheduler}
    pipeline = getattr(diffusers, f"{kind}Pipeline")(build(), schedulers[kind](num_train_timesteps=100))
    pipeline.set_progress_bar_config(disable=True)
    task = hw.tasks.Diffusion(pipeline.scheduler, timesteps=2)
    with hw.tasks.watched(pipeline.scheduler, task) as watch:
        made = pipeline(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
    journey = watch.trajectory()
    assert np.allclose(((journey.batch / 2 + 0.5).clamp(0, 1)).permute(0, 2, 3, 1).numpy(), made, atol=1e-6)
    assert len(journey.timesteps) == 4 and journey.clean.shape == (2, 4, 1, 8, 8)
    train = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = lambda m: torch.optim.SGD(m.parameters(), 0.1)  # noqa: E731
    run = hw.Run.from_checkpoints(tmp_path / "run", {1: build().state_dict()}, build=build, train=train, task=task, optimizer=optimizer)
    found = scores(run, journey, hw.JourneyTrak(dim=64, timesteps=2, draws=2))
    assert found.by("timestep").values.shape == (4, 2, 6) and np.isfinite(found.values).all() and (found.values != 0).all()
