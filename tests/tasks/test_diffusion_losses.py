"""The loss of a diffusion task against its formulas written out: errors, weightings, densities, conditions, the variational bound, curvature."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

import headwater as hw
from headwater import curvature, tasks
from headwater.capture import Capture
from headwater.errors import InputError, TaskError
from headwater.tasks import CosMap, LogitNormal, MinSNR, Mode
from headwater.tasks.diffusion import Grid, Listed
from headwater.tasks.diffusion.noise import noise_of
from headwater.tasks.diffusion.processes import Process

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr

T, D = 40, 3
LINEAR = tasks.linear(T, 0.01, 0.3)


class Net(nn.Module):
    """Two layers over image, time and a condition."""

    def __init__(self, conditions=0):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(D + 1 + conditions, 4, dtype=torch.float64)
        self.leave = nn.Linear(4, D, dtype=torch.float64)

    def forward(self, x, t, *conditions):
        told = [c.to(x.dtype).view(len(x), -1) for c in conditions]
        return self.leave(torch.tanh(self.enter(torch.cat([x, t[:, None].to(x.dtype) / T, *told], 1))))


def images(n=5, seed=1):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def events_of(task, n=1, grid=None):
    """(timestep, noise) of each event of the shared grid."""
    t, seeds = (grid or task.events).of(np.arange(n), "train")
    return [(int(t[0, k]), noise_of(seeds[:1, k : k + 1], torch.Size([D]), torch.float64, "cpu")[0, 0]) for k in range(t.shape[1])]


def answers(model, task, x, t, eps, *conditions):
    """The network's answers for images x at one event, straight from the tables."""
    time = task.process.time[t].expand(len(x))
    return model(task.process.signal[t] * x + task.process.noise[t] * eps, time, *conditions)


# ------------------------------------------------------------------------------------------------------------ errors

ERRORS = {
    "l2": lambda out, y: F.mse_loss(out, y, reduction="none").mean(1),
    "l1": lambda out, y: F.l1_loss(out, y, reduction="none").mean(1),
    "huber": lambda out, y: F.huber_loss(out, y, delta=0.7, reduction="none").mean(1),
    "pseudo-huber": lambda out, y: (2 * 0.7 * (((out - y) ** 2 + 0.7**2) ** 0.5 - 0.7)).mean(1),  # diffusers' scripts, huber_c = 0.7
}
PREDICTIONS = {
    "epsilon": (LINEAR, lambda x, eps, s, n: eps.expand(x.shape)),
    "v": (tasks.linear(T, 0.01, 0.3, prediction="v"), lambda x, eps, s, n: s * eps - n * x),
    "sample": (tasks.linear(T, 0.01, 0.3, prediction="sample"), lambda x, eps, s, n: x),
    "flow": (tasks.flow(T, shift=2.0), lambda x, eps, s, n: eps - x),
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_weighted_mean_over_events(kind, prediction):
    process, target = PREDICTIONS[prediction]
    task = tasks.Diffusion(process, loss=kind, delta=0.7, weighting=lambda t: 1 + t / 7, timesteps=4, draws=2)
    model, x = Net(), images()
    terms = []
    for t, eps in events_of(task):
        s, n = process.signal[t], process.noise[t]
        terms.append((1 + t / 7) * ERRORS[kind](answers(model, task, x, t, eps), target(x, eps, s, n)))
    assert len(terms) == 8 and task.prediction == prediction
    torch.testing.assert_close(task.loss(model, x), sum(terms) / 8, rtol=1e-12, atol=0)
    torch.testing.assert_close(task.measure(model, x), -sum(terms) / 8, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------------ weightings


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_what_the_scripts_of_diffusers_weigh_by(prediction, gamma):
    scheduler = diffusers.DDPMScheduler()
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    capped = snr.clamp(max=gamma)
    expected = {"epsilon": capped / snr, "v": capped / (snr + 1), "sample": capped}[prediction]
    for weighting in [MinSNR(gamma), *(["min-snr"] if gamma == 5.0 else [])]:
        found = tasks.Diffusion(tasks.linear(prediction=prediction), weighting=weighting).weights
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)  # theirs in float32


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_weights_of_flows_are_those_of_diffusers(scheme):
    process = tasks.flow(T, shift=3.0)
    found = tasks.Diffusion(process, weighting=scheme.replace("_", "-")).weights
    torch.testing.assert_close(found, compute_loss_weighting_for_sd3(scheme, process.noise).double(), rtol=1e-6, atol=0)


def test_weights_enter_the_loss_of_each_event():
    plain, heavy = (tasks.Diffusion(LINEAR, weighting=w, timesteps=(3, 30)) for w in (None, lambda t: (t == 30) * 2.0))
    late = tasks.Diffusion(LINEAR, timesteps=(30,))
    torch.testing.assert_close(heavy.loss(Net(), images()), late.loss(Net(), images()), rtol=1e-12, atol=0)
    assert not torch.allclose(plain.loss(Net(), images()), heavy.loss(Net(), images()))


# ------------------------------------------------------------------------------------------------------------ densities


def drawn_by_diffusers(scheme, **numbers):
    """How often each row of the (rising) tables is met by the scripts of diffusers: indices into a table that descends."""
    numbers = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29} | numbers
    u = compute_density_for_timestep_sampling(scheme, 400_000, generator=torch.Generator().manual_seed(0), **numbers)
    rows = T - 1 - (u * T).long().clamp(max=T - 1)
    return torch.bincount(rows, minlength=T).double() / len(u)


@pytest.mark.parametrize(
    ("density", "theirs"),
    [
        ("logit-normal", drawn_by_diffusers("logit_normal")),
        (LogitNormal(mean=-0.5, std=0.7), drawn_by_diffusers("logit_normal", logit_mean=0.5, logit_std=0.7)),
        ("mode", drawn_by_diffusers("mode")),
        (Mode(0.4), drawn_by_diffusers("mode", mode_scale=0.4)),
        (Mode(-0.9), drawn_by_diffusers("mode", mode_scale=-0.9)),
        ("uniform", drawn_by_diffusers("none")),
    ],
    ids=["logit-normal", "logit-normal, moved", "mode", "mode, weaker", "mode, towards the ends", "uniform"],
)
def test_densities_are_those_of_the_scripts_of_diffusers(density, theirs):
    found = tasks.flow(T, density=density).density
    found = torch.ones(T) / T if found is None else found / T
    assert float(((found - theirs) / (found / 400_000).sqrt()).abs().max()) < 5  # standard deviations


def test_cosmap_is_its_density_integrated():
    s = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    density = 2 / (math.pi - 2 * math.pi * s + 2 * math.pi * s**2)
    integral = torch.cumulative_trapezoid(density, s)
    torch.testing.assert_close(CosMap()(s)[1:], integral, rtol=0, atol=1e-9)
    torch.testing.assert_close(tasks.flow(T, density="cosmap").density / T, CosMap()(torch.linspace(0, 1, T + 1)).diff().double(), rtol=1e-4, atol=1e-7)


def test_training_draws_by_the_density_and_strata_stand_for_it():
    process = tasks.flow(T, density="logit-normal")
    task = tasks.Diffusion(process)
    met = torch.bincount(task.draw(100_000, torch.Generator().manual_seed(0)).t.long(), minlength=T) / 100_000
    assert float(((met - process.density / T) / (process.density / T / 1e5).sqrt()).abs().max()) < 5
    strata = torch.tensor(process.strata(2000))
    torch.testing.assert_close(torch.bincount(strata, minlength=T) / 2000, (process.density / T).float(), rtol=0, atol=1 / 2000)
    few, level = process.strata(4), (process.density / T).cumsum(0)
    assert all(level[t - 1] <= (k + 0.5) / 4 <= level[t] for k, t in enumerate(few))
    assert process.strata(4, evenly=True) == tasks.flow(T).strata(4) != few


def test_any_scheduler_takes_a_density():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=T, shift=3.0)
    torch.testing.assert_close(tasks.Diffusion(scheduler, density="mode").process.density, tasks.flow(T, density="mode").density)
    table = torch.arange(T, dtype=torch.float64)
    assert tasks.Diffusion(LINEAR, density=table).process.strata(1)[0] == int(torch.searchsorted(table.cumsum(0) / table.sum(), 0.5))


# ------------------------------------------------------------------------------------------------------------ other outputs


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_is_the_sum_of_its_kl_divergences(prediction):
    """KL of q(x_{t-1} | x_t, x) from p(x_{t-1} | x_t) = q with the network's image for x, summed over all steps but the reconstruction."""
    process, _ = PREDICTIONS[prediction]
    process = Process(process.kind, process.signal[: T - 1], process.noise[: T - 1], process.time[: T - 1], process.prediction)  # flows end in noise alone
    task = tasks.Diffusion(process, timesteps=T - 1)
    model, x, total = Net(), images(3), 0
    for t, eps in events_of(task):
        if t == 0:
            continue
        (a, b), (a0, b0) = ((process.signal[k], process.noise[k]) for k in (t, t - 1))
        out = answers(model, task, x, t, eps)
        x_t = a * x + b * eps
        if prediction == "epsilon":
            guess = (x_t - b * out) / a
        elif prediction == "v":
            guess = a * x_t - b * out
        else:
            guess = out if prediction == "sample" else x_t - b * out
        r = a / a0  # x_t given x_{t-1}: mean r x_{t-1}, variance b^2 - r^2 b0^2
        variance = 1 / (1 / b0**2 + r**2 / (b**2 - r**2 * b0**2))
        total = total + ((variance * a0 / b0**2 * (guess - x)) ** 2).sum(1) / (2 * variance)
    torch.testing.assert_close(task.output("elbo")(model, x), -total, rtol=1e-9, atol=0)


def test_the_bound_is_asked_evenly_whatever_training_draws():
    short = tasks.Diffusion(tasks.flow(T, density="logit-normal"), timesteps=5)
    assert short.output("elbo").events.timesteps == tasks.flow(T).strata(5) != short.events.timesteps
    assert tasks.Diffusion(LINEAR).output("elbo").events is None


def test_other_outputs_are_means_over_events():
    task = tasks.Diffusion(LINEAR, timesteps=3, draws=2)
    model, x = Net(), images()
    outs = torch.stack([answers(model, task, x, t, eps) for t, eps in events_of(task)])
    for kind, value in {"square_norm": outs**2, "mean": outs, "l1_norm": outs.abs()}.items():
        torch.testing.assert_close(task.output(kind)(model, x), value.mean((0, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(task.output("loss")(model, x), task.measure(model, x), rtol=1e-12, atol=0)


def test_the_loss_at_one_timestep_is_asked_through_its_events(tmp_path):
    task, x, model = tasks.Diffusion(LINEAR, timesteps=4), images(), Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=task, train=x, checkpoints=1, steps=2)
    for _ in range(2):
        optimizer.zero_grad()
        task.loss(model, x).mean().backward()
        optimizer.step()
        recorder.step(range(5))
    run, grid = recorder.finish(), task.grid((30,), draws=3)
    asked = hw.trace(run, x[:2], hw.GradDot(), measure=task.output("loss", events=grid), progress=False).values
    final = run.load(run.model(), 2)
    losses = torch.stack([ERRORS["l2"](answers(final, task, x, t, eps), eps.expand(x.shape)) for t, eps in events_of(task, grid=grid)]).mean(0)
    train = task.loss(final, x)

    def grads(values):
        return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(v, list(final.parameters()), retain_graph=True)]) for v in values])

    expected = (grads(losses[:2]) @ grads(train).T).numpy()
    np.testing.assert_allclose(asked / asked.flat[0], expected / expected.flat[0], rtol=1e-9)  # GradDot only ranks
    assert asked.flat[0] * expected.flat[0] > 0


# ------------------------------------------------------------------------------------------------------------ conditions


def conditioned(**settings):
    return tasks.Diffusion(LINEAR, **{"timesteps": (3, 30), "null": -1.0, **settings})


def test_guidance_goes_beyond_the_condition():
    task, model, x, y = conditioned(), Net(1), images(), torch.arange(5.0)
    for kind, value in {"mean": lambda out, eps: out.mean(1), "loss": lambda out, eps: -ERRORS["l2"](out, eps.expand(x.shape))}.items():
        expected = []
        for t, eps in events_of(task):
            with_it, without_it = (answers(model, task, x, t, eps, c) for c in (y, torch.full_like(y, -1)))
            expected.append(value(without_it + 2.5 * (with_it - without_it), eps))
        torch.testing.assert_close(task.output(kind, guidance=2.5)(model, (x, y)), sum(expected) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(task.output("mean", guidance=1.0)(model, (x, y)), task.output("mean")(model, (x, y)), rtol=1e-12, atol=0)


class Keeps(nn.Module):
    """Keeps what it was told."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, *told, **named):
        self.told = told or named
        return self.w * x


def test_conditions_are_left_out_in_training_events_alone():
    task, model, n = conditioned(drop=0.3), Keeps(), 4000
    x, y = images(n), torch.arange(n)
    events = task.draw(n, torch.Generator().manual_seed(0))
    task.loss(model, task.noised((x, y), events))
    left_out = model.told[0] == -1
    assert model.told[0].dtype == torch.int64 and ((model.told[0] == y) | left_out).all()
    assert abs(float(left_out.double().mean()) - 0.3) < 5 * (0.21 / n) ** 0.5
    recorded = task.examples((x, y)).over(Listed(events.t.numpy()[:, None], events.seeds.numpy()[:, None]))
    order = np.random.default_rng(0).permutation(n)[:50]
    task.loss(model, recorded.batch(order))
    assert torch.equal(model.told[0] == -1, left_out[order])  # the same ones, in any batch
    for expected in (task.examples((x, y)).batch(range(50)), task.examples((x, y)).asked().batch(range(50)), task.examples((x, y)).spread().batch(range(50))):
        task.loss(model, expected)
        assert not (model.told[0] == -1).any()


def test_nulls_by_name_by_place_and_nested():
    x, n = images(2), 2
    text, size, pooled = torch.ones(n, 3, 2), torch.ones(n, 4), torch.ones(n, 2)
    named = {"images": x, "text": text, "more": {"pooled": pooled, "size": size}}
    task = conditioned(timesteps=1, null={"text": torch.full((3, 2), 7.0), "more": {"pooled": 5.0}})
    model = Keeps()
    task.predict(model, task._drawn(named), guidance=2.0)  # its last call leaves all out
    assert (model.told["text"] == 7).all() and (model.told["more"]["pooled"] == 5).all() and (model.told["more"]["size"] == 1).all()
    task = conditioned(timesteps=1, null=[None, 3])
    task.predict(model, task._drawn((x, pooled, size)), guidance=2.0)
    assert (model.told[0] == 1).all() and (model.told[1] == 3).all()


def test_what_every_call_shares_is_fixed():
    task, model = conditioned(fixed={"ids": torch.arange(3)}, timesteps=1), Keeps()
    task.loss(model, {"images": images(2), "y": torch.zeros(2)})
    assert torch.equal(model.told["ids"], torch.arange(3)) and model.told["y"].shape == (2,)


# ------------------------------------------------------------------------------------------------------------ curvature


class Each:
    """Draws that are each unit vector in turn: summing over them is the expectation over standard normal numbers."""

    def __init__(self, k):
        self.k = k

    def normal(self, *shape):
        return torch.eye(math.prod(shape), dtype=torch.float64)[self.k].view(1, *shape)


def flat(values):
    return torch.cat([t.reshape(t.shape[0], -1) for t in values.values()], 1)


def gauss_newton(model, task, kind, x, weights):
    """Sum over events of share * w * J^T D J, with D by torch.func from the loss as written above (for l1 the Fisher information of the Laplace
    distribution with -log density |r| / d: the second moment of its score)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    events = events_of(task)
    total = 0
    for t, eps in events:
        shown = (task.process.signal[t] * x + task.process.noise[t] * eps, task.process.time[t].expand(1))
        out = model(*shown).detach()[0]
        jacobian = flat(jacrev(lambda values, shown=shown: functional_call(model, values, shown)[0])(parameters))
        if kind == "l1":
            score = torch.tensor([1 / D, -1 / D], dtype=torch.float64)
            second = torch.eye(D, dtype=torch.float64) * (score**2).mean()
        else:
            second = jacrev(jacrev(lambda o, eps=eps: ERRORS[kind](o[None], eps[None])[0]))(out)
        total = total + weights(t) / len(events) * jacobian.T @ second @ jacobian
    return total


def outer(model, values):
    total = 0
    for value in values.reshape(-1):
        g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])
        total = total + torch.outer(g, g)
    return total


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("weighting", [None, "min-snr"])
@pytest.mark.parametrize("events", [{"timesteps": (20,)}, {"timesteps": (3, 20, 35), "draws": 2}], ids=["one event", "six events"])
def test_pseudo_losses_have_the_gauss_newton_matrix_of_the_mean_loss(kind, weighting, events):
    task = tasks.Diffusion(LINEAR, loss=kind, delta=0.7, weighting=weighting, **events)
    model, x = Net(), images(1)
    expected = gauss_newton(model, task, kind, x, lambda t: float(task.weights[t]))
    assert float(expected.diagonal().max()) > 1e-4
    sampled = sum(outer(model, task.sampled(model, x, Each(k))) for k in range(task.events.count * D))
    torch.testing.assert_close(sampled, expected, rtol=1e-9, atol=1e-14)
    exact = task.exact(model, x)
    assert exact.shape == (1, task.outputs(model, x)) == (1, task.events.count * D)
    torch.testing.assert_close(outer(model, exact), expected, rtol=1e-9, atol=1e-14)


class Denoiser(nn.Module):
    """``W phi(x_t, t)``: its Gauss-Newton matrix is ``(2 / d) I (x) E[phi phi^T]``, exactly Kronecker."""

    def __init__(self, d):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(d + 1, d, bias=False, dtype=torch.float64)

    def forward(self, x, t):
        return self.fc(torch.cat([x, t[:, None].to(x.dtype) / T], 1))


def fitted(estimate, net, task, examples):
    setting = curvature.Setting(Capture(net, task.loss, examples.batch(range(2))), 7, torch.device("cpu"))
    return estimate.fit([curvature.Point(lambda: None, examples.spread(), task, "")], setting)


def test_curvatures_over_the_spread_are_the_linear_denoisers_closed_form():
    task, net, x = tasks.Diffusion(LINEAR, timesteps=5, draws=2), Denoiser(D), images(8)
    examples = task.examples(x)
    phis = []
    for i, (t, seeds) in enumerate(zip(*Grid(task.events.timesteps, 2, "example").of(np.arange(8), "train"), strict=True)):
        for k in range(10):
            eps = noise_of(seeds[k : k + 1, None], torch.Size([D]), torch.float64, "cpu")[0, 0]
            row = int(t[k])
            phis.append(torch.cat([task.process.signal[row] * x[i] + task.process.noise[row] * eps, torch.tensor([row / T], dtype=torch.float64)]))
    phi = torch.stack(phis)
    truth = torch.kron(torch.eye(D, dtype=torch.float64), 2 / D * phi.T @ phi / 80)
    torch.testing.assert_close(fitted(curvature.EKFAC(), net, task, examples).operators["fc.weight"].dense((1, D, D + 1)), truth, rtol=1e-12, atol=1e-14)
    for matrix in ("gauss_newton", "hessian"):
        torch.testing.assert_close(fitted(curvature.Dense(matrix), net, task, examples).operator.dense((D * (D + 1),)), truth, rtol=1e-12, atol=1e-14)


def test_sampled_labels_have_the_right_scale_where_outputs_are_many():
    """36 outputs: one random draw an event stands for them; with unit variance in place of d/2 the matrix would be 18 times too small."""
    d = 36
    task, net = tasks.Diffusion(LINEAR, timesteps=5, noise="example"), Denoiser(d)
    x = torch.randn(60, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    examples = task.examples(x)
    batch = examples.spread().batch(range(300))
    phi = torch.cat([batch.signal * batch.batch + batch.noise * batch.eps[:, 0], batch.time.double() / T], 1)
    truth = 2 / d * phi.square().sum() / 300 * d  # the trace
    found = fitted(curvature.EKFAC(fisher="sampled"), net, task, examples).operators["fc.weight"].dense((1, d, d + 1)).trace()
    assert abs(float(found / truth) - 1) < 0.15


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tasks.Diffusion(LINEAR, loss="l3"), "loss='l3'"),
        (lambda: tasks.Diffusion(LINEAR, loss="huber", delta=0.0), "delta=0"),
        (lambda: tasks.Diffusion(LINEAR, weighting="snr"), "weighting='snr'"),
        (lambda: tasks.Diffusion(LINEAR, weighting="cosmap"), "weighting='cosmap' on a process of kind 'diffusion'"),
        (lambda: tasks.Diffusion(tasks.flow(), weighting="min-snr"), "for flow matching"),
        (lambda: tasks.Diffusion(LINEAR, weighting=lambda t: -t), "finite numbers of at least 0"),
        (lambda: tasks.Diffusion(LINEAR, weighting=lambda t: t[:3]), "gives shape"),
        (lambda: tasks.Diffusion(LINEAR, density="beta"), "density='beta'"),
        (lambda: tasks.Diffusion(tasks.flow(density="mode"), density="mode"), "density= for a process that has one"),
        (lambda: tasks.flow(density=lambda s: -s), "density of timesteps"),
        (lambda: Mode(2.0), "Mode"),
        (lambda: tasks.Diffusion(LINEAR, drop=0.1), "drop=0.1 with null=None"),
        (lambda: tasks.Diffusion(LINEAR, drop=1.0, null=0), "drop=1.0"),
        (lambda: tasks.Diffusion(LINEAR).output("likelihood"), "output 'likelihood'"),
        (lambda: tasks.Diffusion(LINEAR).output(guidance=3.0), "guidance=3.0 for a task without null="),
        (lambda: tasks.Diffusion(Process("diffusion", torch.tensor([1.0, 0.0]), torch.tensor([0.1, 1.0]), torch.arange(2), "epsilon")).output("elbo"), "timestep 1"),
        (lambda: conditioned(null=torch.zeros(3)).output("mean", guidance=2.0)(Net(1), (images(2), torch.zeros(2, 2))), r"null= of shape \(3,\)"),
    ],
)
def test_settings_that_say_nothing_or_too_much_are_refused(make, said):
    with pytest.raises((TaskError, InputError), match=said):
        make()


def test_a_task_describes_all_that_fixes_its_loss():
    variants = [
        {}, {"loss": "l1"}, {"weighting": "min-snr"}, {"weighting": MinSNR(1.0)}, {"weighting": lambda t: t}, {"delta": 0.5}, {"density": "mode"},
        {"time": 0.5}, {"fixed": {"ids": torch.ones(2)}}, {"null": 0}, {"null": 0, "drop": 0.1}, {"timesteps": 3}, {"draws": 2}, {"noise": "example"},
        {"seed": 1}, {"noise_offset": 0.1},
    ]  # fmt: skip
    told = [repr(tasks.Diffusion(LINEAR, **settings)) for settings in variants]
    assert len(set(told)) == len(told) and repr(tasks.Diffusion(LINEAR)) == told[0]
