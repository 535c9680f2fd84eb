"""Noise processes from schedulers of diffusers: mixes and targets are the scheduler's own, whatever it was used for before."""

import warnings

import pytest
import torch

import headwater as hw
from headwater.errors import InputError, TaskError
from headwater.tasks.diffusion.processes import Process, process_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers turning tensors to arrays
T = 40
SCALED = {"num_train_timesteps": T, "beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.15}
# Those that add noise at the scale the network is trained at; and samplers that have a scale of their own.
PLAIN = ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "LCMScheduler"]
OWN_SCALE = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"]


def batch(n=5):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 3, 3, generator=g), torch.randn(n, 2, 3, 3, generator=g)


def mixed(process, x, eps, t):
    """x_t and the tables, broadcast over images."""
    signal, noise = (table[t].float()[:, None, None, None] for table in (process.signal, process.noise))
    return signal * x + noise * eps, signal, noise


@pytest.mark.parametrize("name", PLAIN)
def test_images_are_mixed_as_add_noise_does(name):
    scheduler = getattr(diffusers, name)(**SCALED)
    x, eps = batch()
    t = torch.tensor([0, 3, 17, T - 2, T - 1])
    process = process_of(scheduler)
    if hasattr(scheduler, "sigmas"):  # these solvers add the noise of the other end of the schedule until they are told their timesteps
        scheduler.set_timesteps(T)
        t = scheduler.timesteps[[0, 1, 20, T - 2, T - 1]]
    torch.testing.assert_close(mixed(process, x, eps, t)[0], scheduler.add_noise(x, eps, t))


@pytest.mark.parametrize("name", OWN_SCALE)
def test_a_sampler_of_its_own_scale_stands_for_the_networks_process(name):
    scheduler = getattr(diffusers, name)(**SCALED)
    process = process_of(scheduler)
    x, eps = batch()
    t = torch.tensor([0, 3, 17, T - 2, T - 1])
    training = diffusers.DDPMScheduler(**SCALED)
    torch.testing.assert_close(mixed(process, x, eps, t)[0], training.add_noise(x, eps, t))
    sampling = scheduler.add_noise(x, eps, t.float())  # x + sigma eps: another scale by the factor that the sampler then divides by
    torch.testing.assert_close(mixed(process, x, eps, t)[0], sampling * process.signal[t].float()[:, None, None, None], rtol=1e-4, atol=1e-5)
    assert (sampling - mixed(process, x, eps, t)[0]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"])
def test_a_schedule_with_nothing_left_at_the_end_is_ddpms(name):
    """Samplers put 2^-24 in place of the last abar, to divide by it; training never did."""
    process = process_of(getattr(diffusers, name)(**SCALED, rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    training = diffusers.DDPMScheduler(**SCALED, rescale_betas_zero_snr=True)
    torch.testing.assert_close(process.signal.square(), training.alphas_cumprod.double(), rtol=0, atol=1e-7)
    assert process.signal[-1] == 0 and process.noise[-1] == 1 and process.prediction == "v"
    weights = hw.tasks.Diffusion(process, weighting="min-snr").weights
    assert torch.isfinite(weights).all() and weights[-1] == 0


def test_betas_of_ones_own_are_taken():
    betas = [0.1, 0.3, 0.2]
    process = process_of(diffusers.DDPMScheduler(num_train_timesteps=3, trained_betas=betas))
    torch.testing.assert_close(process.signal, hw.tasks.from_betas(betas).signal, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("declared", "prediction"), [("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "sample")])
def test_targets_are_the_schedulers_own(declared, prediction):
    scheduler = diffusers.DDPMScheduler(**SCALED, prediction_type=declared)
    task = hw.tasks.Diffusion(scheduler)
    x, eps = batch()
    t = torch.tensor([0, 3, 17, T - 2, T - 1])
    expected = {"epsilon": eps, "v": scheduler.get_velocity(x, eps, t), "sample": x}[prediction]
    x_t, signal, noise = mixed(task.process, x, eps, t)
    assert task.prediction == prediction
    torch.testing.assert_close(task.process.target(prediction, x, eps, signal, noise), expected)
    torch.testing.assert_close(task.process.clean(prediction, expected, x_t, signal, noise), x, rtol=1e-4, atol=1e-4)


FLOWS = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T),
    "euler, shifted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=3.0),
    "euler, shifted by resolution": lambda: diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=3.0, use_dynamic_shifting=True),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=T, shift=2.0),
}


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("used", [False, True], ids=["new", "after sampling"])
def test_flow_matching_is_scale_noise_at_the_training_tables(make, used):
    training, given = make(), make()
    if used:
        given.set_timesteps(7, **({"mu": 0.5} if given.config.get("use_dynamic_shifting") else {}))
        assert len(given.sigmas) < T
    process = process_of(given)
    assert process.steps == T and (process.noise.diff() > 0).all() and process.prediction == "flow"
    x, eps = batch()
    rows = torch.tensor([0, 5, 11, T - 2, T - 1])
    expected = torch.cat([make().scale_noise(x[k : k + 1], training.timesteps.flip(0)[t : t + 1], eps[k : k + 1]) for k, t in enumerate(rows)])  # heun takes one
    torch.testing.assert_close(mixed(process, x, eps, rows)[0], expected)
    torch.testing.assert_close(process.time[rows].float(), training.timesteps.flip(0)[rows])


def test_a_flow_written_here_is_the_schedulers():
    own, theirs = hw.tasks.flow(T, shift=3.0), process_of(diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=3.0))
    torch.testing.assert_close(own.noise, theirs.noise, rtol=1e-6, atol=0)
    torch.testing.assert_close(own.time, theirs.time, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_a_solver_of_a_flow_is_a_flow_of_its_shift(name):
    scheduler = getattr(diffusers, name)(num_train_timesteps=T, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    process = process_of(scheduler)
    torch.testing.assert_close(process.noise, hw.tasks.flow(T, shift=3.0).noise)
    scheduler.set_timesteps(T - 1)
    sampled = scheduler.sigmas[: T - 1].double()  # each of its levels is one of the table's
    assert (sampled[:, None] - process.noise).abs().min(1).values.max() < 1e-5 < (sampled[:, None] - hw.tasks.flow(T).noise).abs().min(1).values.max()


# ------------------------------------------------------------------------------------------------------------ refused


REFUSED = {
    "EDM by name": (lambda: diffusers.EDMEulerScheduler(), "EDMEulerScheduler, whose scale"),
    "a consistency model": (lambda: diffusers.CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler, whose scale"),
    "a variance-exploding process": (lambda: diffusers.ScoreSdeVeScheduler(), "ScoreSdeVeScheduler, whose scale"),
    "a class": (lambda: diffusers.DDPMScheduler, "construct it: DDPMScheduler"),
    "something else": (lambda: object(), "object where a scheduler belongs"),
    "a prediction type unknown": (lambda: diffusers.SCMScheduler(), "trigflow"),
    "another number of betas": (lambda: diffusers.DDPMScheduler(num_train_timesteps=10, trained_betas=[0.1, 0.2]), "num_train_timesteps=10 and a schedule of 2"),
    "variances above 1": (lambda: diffusers.DDPMScheduler(num_train_timesteps=2, trained_betas=[0.1, 1.2]), "variances beta from 0 to 1"),
    "a flow that is none": (lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas=True, and neither|'flow_prediction' together"),
    "no flow that is one": (lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "'flow_prediction' together"),
    "time told backwards": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "backwards"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_or_contradicts_itself_is_refused(make, said):
    with pytest.raises((TaskError, InputError), match=said):
        process_of(make())


def test_a_prediction_type_must_be_declared_once():
    unsaid = Process("diffusion", torch.ones(2), torch.ones(2), torch.arange(2))
    with pytest.raises(TaskError, match="declared nowhere"):
        hw.tasks.Diffusion(unsaid)
    assert hw.tasks.Diffusion(unsaid, "v").prediction == "v"
    with pytest.raises(TaskError, match="prediction='v' with a scheduler whose prediction type is 'epsilon'"):
        hw.tasks.Diffusion(diffusers.DDPMScheduler(), "v")
    with pytest.raises(TaskError, match="prediction='flow' on a process of kind 'diffusion'"):
        hw.tasks.Diffusion(unsaid, "flow")
    with pytest.raises(TaskError, match="one of"):
        hw.tasks.Diffusion(unsaid, "eps")
    with pytest.raises(TaskError, match="declared nowhere"):  # this one names no prediction type
        hw.tasks.Diffusion(diffusers.RePaintScheduler())


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"kind": "sde"}, "kind 'sde'"),
        ({"prediction": "x0"}, "prediction 'x0'"),
        ({"noise": torch.ones(2)}, "whose noise has shape"),
        ({"signal": torch.tensor([1.0, float("nan"), 0.0])}, "whose signal"),
        ({"noise": -torch.ones(3)}, "negative"),
        ({"density": torch.tensor([1.0, -1.0, 1.0])}, "density of timesteps"),
        ({"density": torch.ones(2)}, "density of timesteps"),
    ],
)
def test_a_process_of_ones_own_is_looked_at(tables, said):
    good = {"kind": "diffusion", "signal": torch.ones(3), "noise": torch.ones(3), "time": torch.arange(3)}
    assert Process(**good).steps == 3
    with pytest.raises(InputError, match=said):
        Process(**{**good, **tables})
