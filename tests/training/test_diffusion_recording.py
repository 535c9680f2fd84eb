"""Recording diffusion models: averaged weights beside the raw ones, adapters on a frozen base, events that a replay meets again, folders of diffusers."""

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import headwater as hw
from headwater.errors import DamagedFile, GradientError, InputError, MissingCheckpoint, RunError
from headwater.influence.request import Parts
from headwater.tasks.code import model_digest
from headwater.tasks.diffusion.events import dropped, noise_of
from headwater.training.folders import load, weights_file
from headwater.training.replay import Replay
from tests.influence.denoisers import Brute, D, Linear, Network, T, images, labelled, made, trained

TASK = hw.tasks.Diffusion(hw.tasks.cosine(T), timesteps=4)
TRAIN, ASKED = images(12, 1), images(3, 2)
DECAY = 0.8


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


# ---- averaged weights


def shadows(model):
    """diffusers' own average, with a decay that is reached at once."""
    from diffusers.training_utils import EMAModel

    kept = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY)
    return kept, lambda: kept.step(model.parameters())


def averaged_model(model):
    kept = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return kept, lambda: kept.update_parameters(model)


def a_copy(model):
    kept = copy.deepcopy(model)

    def step():
        with torch.no_grad():
            for mine, raw in zip(kept.parameters(), model.parameters(), strict=True):
                mine.lerp_(raw, 1 - DECAY)

    return kept, step


def by_name(model):
    """A loop's own dictionary, whose tensors are replaced by new ones."""
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    return kept, lambda: kept.update({n: torch.lerp(kept[n], p.detach(), 1 - DECAY) for n, p in model.named_parameters()})


def averaging(path, make, task=TASK, **settings):
    """A recorded training whose average ``make`` keeps; also every step's raw weights."""
    model = made(Network)
    kept, step = make(model)
    optimizer, seen = sgd(model), [{n: p.detach().clone() for n, p in model.named_parameters()}]

    def after(*_):
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        step()

    optimizer.register_step_post_hook(after)
    recorder = hw.Recorder(path, model, optimizer, task=task, train=TRAIN, checkpoints=[4, 8, 12], ema=kept)
    return trained(path, model, task, TRAIN, optimizer=optimizer, recorder=recorder, **settings).finish(), seen


@pytest.mark.parametrize("make", [shadows, averaged_model, a_copy, by_name])
def test_averages_lie_beside_the_raw_weights_of_every_checkpoint(make, tmp_path):
    run, seen = averaging(tmp_path / "run", make)
    again = hw.Run.open(tmp_path / "run", build=lambda: made(Network), train=TRAIN, task=TASK)
    begins = make is averaged_model or make is shadows  # both take the first step's weights as they are
    mean = dict(seen[1] if begins else seen[0])
    for step in range(1, 13):
        if step > 1 or not begins:
            mean = {n: torch.lerp(mean[n], p, 1 - DECAY) for n, p in seen[step].items()}
        if step in (4, 8, 12):
            raw, averaged, view = again.weights(step), again.weights(step, averaged=True), again.averaged().weights(step)
            for n in mean:
                torch.testing.assert_close(raw[n], seen[step][n], rtol=0, atol=0)
                torch.testing.assert_close(averaged[n], mean[n], rtol=1e-12, atol=1e-12)
                assert torch.equal(view[n], averaged[n]) and not torch.equal(raw[n], averaged[n])
    assert run.manifest["stages"][0]["ema"]["decay"] == (DECAY if make in (shadows, averaged_model) else None)
    assert run.averaged().architecture != run.architecture and run.averaged().averaged().which == "ema"


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory):
    return averaging(tmp_path_factory.mktemp("ema") / "run", shadows)[0]


def test_queries_are_asked_at_averaged_weights_and_training_examples_met_at_raw_ones(averaged_run):
    """One gradient at a time: TracIn's query gradients at each checkpoint's average, the training gradients at its raw weights."""
    run = averaged_run
    method = hw.DiffusionTracIn(timesteps=(3, 20), draws=2)
    found = hw.trace(run, ASKED, method, progress=False)
    asked, met, truth, start = Brute(run.averaged()), Brute(run), np.zeros((3, 12)), 0
    for step in (4, 8, 12):
        for q in range(3):
            u = asked.at(step).expected(run.stages[0], ASKED[q], q, "query", (3, 20), 2, "shared", 0, step).mean(0)
            for i in range(12):
                g = met.at(step).expected(run.stages[0], TRAIN[i], i, "train", (3, 20), 2, "shared", 0, step).mean(0)
                truth[q, i] += 0.1 * (step - start) / 12 * float(u @ g)
        start = step
    np.testing.assert_allclose(found.values, truth, rtol=1e-9, atol=1e-12)
    assert found.provenance["queries at"] == "ema weights (EMAModel, decay 0.8)" and found.provenance["training examples at"] == "raw weights"
    raw = hw.trace(run, ASKED, method, weights="raw", progress=False)
    assert np.abs(raw.values - truth).max() > 1e-3 * np.abs(truth).max() and raw.provenance["queries at"] == "raw weights"


@pytest.mark.parametrize("method", [hw.GradDot(), hw.Source(segments=2), hw.Influence(damping=0.1)], ids=lambda m: type(m).__name__)
def test_methods_with_one_query_gradient_take_it_at_the_final_average(method, averaged_run):
    """Each is linear in it: what many queries at raw weights score tells what any gradient would, so also that at the average."""
    run, many = averaged_run, images(400, 5)

    def one_pass(model, batch):
        """Any function whose gradients at many points span all directions."""
        x = batch.batch
        return batch.share.sum(1) * (model(3 * x, (x[:, 1].abs() * 20).long() % T) * x.roll(1, 1)).sum(1)

    def gradients(run, queries, measure):
        model = run.load(run.model(), 12)
        values = measure(model, TASK.examples(queries).batch(range(len(queries))))
        return np.stack([torch.cat([g.flatten() for g in torch.autograd.grad(v, list(model.parameters()), retain_graph=True)]).numpy() for v in values])

    spanning = gradients(run, many, one_pass)
    assert np.linalg.matrix_rank(spanning) == spanning.shape[1]
    through = np.linalg.lstsq(spanning, hw.trace(run, many, method, measure=one_pass, weights="raw", progress=False).values, rcond=None)[0]
    found = hw.trace(run, ASKED, method, progress=False).values
    np.testing.assert_allclose(found, gradients(run.averaged(), ASKED, TASK.measure) @ through, rtol=1e-6, atol=1e-7 * np.abs(found).max())
    assert np.abs(hw.trace(run, ASKED, method, weights="raw", progress=False).values - found).max() > 1e-3 * np.abs(found).max()


class Seen:
    """A method that computes by itself, and only remembers what it was asked."""

    def parts(self, request):
        self.request = request
        return Parts({"scores": np.zeros((request.asked.count, request.run.size))}, "seen", "rank only")

    def combine(self, members):
        return members[0]["scores"]


def test_a_method_in_one_space_takes_both_sides_at_the_average(averaged_run):
    found = hw.trace(averaged_run, ASKED, method := Seen(), progress=False)
    assert method.request.run.which == "ema" and not method.request.asked.averaged
    assert found.provenance["training examples at"].startswith("ema")
    hw.trace(averaged_run, ASKED, method, weights="raw", progress=False)
    assert method.request.run.which == "raw"


def test_self_influence_is_the_diagonal_of_trace_at_the_average_too(averaged_run):
    method = hw.DiffusionTracIn(timesteps=3)
    found = hw.self_influence(averaged_run, method, progress=False).values[0]
    np.testing.assert_allclose(found, np.diag(hw.trace(averaged_run, TRAIN, method, progress=False).values), rtol=1e-9)
    assert not np.allclose(found, hw.self_influence(averaged_run, method, weights="raw", progress=False).values[0], rtol=1e-4)


def test_unrolling_answers_for_the_raw_weights_alone(averaged_run):
    with pytest.raises(InputError, match="averaged"):
        hw.trace(averaged_run, ASKED, hw.Unrolled(), progress=False)
    assert hw.trace(averaged_run, ASKED, hw.Unrolled(), weights="raw", progress=False).values.any()


def test_what_holds_no_average_is_refused(tmp_path, averaged_run):
    plain = trained(tmp_path / "run", made(Network), TASK, TRAIN).finish()
    with pytest.raises(RunError, match=r"no averaged .* weights at step"):
        plain.averaged()
    with pytest.raises(RunError, match=r"no averaged .* weights at step"):
        hw.trace(plain, ASKED, hw.GradDot(), weights="ema")
    with pytest.raises(InputError, match="weights='swa'"):
        hw.trace(plain, ASKED, hw.GradDot(), weights="swa")
    with pytest.raises(InputError, match="seen at its averaged weights"):
        hw.trace(averaged_run.averaged(), ASKED, hw.GradDot(), weights="raw")


def test_an_average_of_another_model_or_one_that_stands_still_is_refused(tmp_path):
    model = made(Network)
    with pytest.raises(InputError, match="holds no copy of the model"):
        hw.Recorder(tmp_path / "a", model, sgd(model), task=TASK, train=TRAIN, ema=torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="averaged tensors for"):
        hw.Recorder(tmp_path / "b", model, sgd(model), task=TASK, train=TRAIN, ema=shadows(torch.nn.Linear(2, 2))[0])
    with pytest.raises(InputError, match="has shape"):
        hw.Recorder(tmp_path / "c", model, sgd(model), task=TASK, train=TRAIN, ema={"enter.weight": torch.zeros(2)})
    with pytest.raises(InputError, match="an average without"):
        hw.Recorder(tmp_path / "d", model, sgd(model), task=TASK, train=TRAIN, ema={"enter.weight": model.enter.weight.detach()})
    optimizer = sgd(model)
    recorder = hw.Recorder(tmp_path / "e", model, optimizer, task=TASK, train=TRAIN, ema=copy.deepcopy(model))
    trained(None, model, TASK, TRAIN, recorder=recorder, optimizer=optimizer)
    with pytest.raises(RunError, match="never updated"):
        recorder.finish()


# ---- recorded events, met again


def through_training(task, build, data, steps, rate, queries, drop=None, decay=0.0):
    """d measure(query) / d w_i at w = 1, by autograd through plain gradient descent written out here: ``steps`` of (ids, events), a batch each; at
    the average of the weights with this ``decay`` (0: at the last)."""
    model = build()
    images = data[0] if isinstance(data, tuple) else data
    w = torch.ones(len(images), dtype=torch.float64, requires_grad=True)
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    average = theta
    for ids, events in steps:
        t = events.t.long()
        a, b = task.process.signal[t][:, None], task.process.noise[t][:, None]
        eps = torch.stack([noise_of(s.view(1, 1), (D,), torch.float64, "cpu")[0, 0] for s in events.seeds])
        conditions = ()
        if drop is not None:
            conditions = (torch.where(dropped(events.seeds[:, None], drop)[:, 0], task.null, data[1][ids]),)
        out = torch.func.functional_call(model, theta, (a * images[ids] + b * eps, t, *conditions))
        loss = (w[ids] * ((out - eps) ** 2).mean(1)).sum() / len(ids)
        moved = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {n: p - rate * g for (n, p), g in zip(theta.items(), moved, strict=True)}
        average = {n: decay * average[n] + (1 - decay) * p for n, p in theta.items()}
    batch = task.examples(queries).asked().batch(range(len(queries[0] if isinstance(queries, tuple) else queries)))
    values = torch.func.functional_call(Measured(task, model), {f"model.{n}": p for n, p in average.items()}, (batch,))
    return np.stack([torch.autograd.grad(v, w, retain_graph=True)[0].numpy() for v in values])


class Measured(torch.nn.Module):
    """The measure as a module of its own, for functional_call."""

    def __init__(self, task, model):
        super().__init__()
        self.task, self.model = task, model

    def forward(self, batch):
        return self.task.measure(self.model, batch)


def test_unrolling_is_autograd_through_the_recorded_events(tmp_path):
    steps = []
    run = trained(tmp_path / "run", made(Network), TASK, TRAIN, keep=steps, epochs=5).finish()
    found = hw.trace(run, ASKED, hw.Unrolled(), progress=False)
    truth = through_training(TASK, lambda: made(Network), TRAIN, steps, 0.1, ASKED)
    np.testing.assert_allclose(found.values, truth, rtol=1e-9, atol=1e-10 * np.abs(truth).max())
    assert found.provenance["replay"]["bit_for_bit"]


def test_unrolling_leaves_out_the_conditions_that_training_left_out(tmp_path):
    task, data, asked = hw.tasks.Diffusion(hw.tasks.cosine(T), timesteps=4, drop=0.5, null=3), labelled(12, 1, 3), labelled(3, 2, 3)
    steps = []
    run = trained(tmp_path / "run", made(Network, classes=3), task, data, keep=steps).finish()
    found = hw.trace(run, asked, hw.Unrolled(), progress=False)
    truth = through_training(task, lambda: made(Network, classes=3), data, steps, 0.1, asked, drop=0.5)
    np.testing.assert_allclose(found.values, truth, rtol=1e-9, atol=1e-10 * np.abs(truth).max())
    with_all = through_training(task, lambda: made(Network, classes=3), data, steps, 0.1, asked, drop=0.0)
    assert np.abs(with_all - truth).max() > 1e-3 * np.abs(truth).max()


def test_an_example_that_comes_twice_in_a_batch_keeps_both_of_its_events(tmp_path):
    model, steps, g = made(Network), [], torch.Generator().manual_seed(5)
    optimizer = sgd(model)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, checkpoints=[6])
    for k in range(6):
        ids = torch.tensor([k, 3, 3, 7])
        events = TASK.draw(4, g)
        optimizer.zero_grad()
        TASK.loss(model, TASK.noised(TRAIN[ids], events)).mean().backward()
        optimizer.step()
        recorder.step(ids, events=events)
        steps.append((ids, events))
    found = hw.trace(recorder.finish(), ASKED, hw.Unrolled(), progress=False)
    truth = through_training(TASK, lambda: made(Network), TRAIN, steps, 0.1, ASKED)
    np.testing.assert_allclose(found.values, truth, rtol=1e-9, atol=1e-10 * np.abs(truth).max())


def against_unrolling(path, events_of, over, steps=200, rate=0.1):
    """Slope and rank correlation of SOURCE and TracIn with exact unrolling on a linear denoiser, whose batches are all of the data; ``over``: the
    events that scores are computed at."""
    model, data, asked = made(Linear), images(40, 1), images(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    recorder = hw.Recorder(path, model, optimizer, task=TASK, train=data, checkpoints=6, steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        TASK.loss(model, TASK.noised(data, events := events_of(step))).mean().backward()
        optimizer.step()
        recorder.step(torch.arange(40), events=events)
    run = recorder.finish()
    exact = hw.trace(run, asked, hw.Unrolled(), progress=False).values
    seen, methods = run.over(over(run)), (hw.Source(segments=3, curvature=hw.Dense()), hw.TracIn())
    found = [hw.trace(seen, asked, method, progress=False).values for method in methods]
    return [(float((s * exact).sum() / (s * s).sum()), np.mean([spearman(a, b) for a, b in zip(s, exact, strict=True)])) for s in found]


def test_source_is_unrolling_on_a_linear_denoiser_with_one_event_an_example_and_tracin_is_not(tmp_path):
    once = TASK.draw(40, torch.Generator().manual_seed(1))
    source, tracin = against_unrolling(tmp_path / "run", lambda step: once, lambda run: run.met(run.stages[0], 100), steps=100, rate=0.2)
    assert source[0] == pytest.approx(1, abs=0.01) and source[1] > 0.99
    assert abs(tracin[0] - 1) > 0.5 and tracin[1] < source[1]


def test_source_asked_at_an_average_is_near_the_derivative_of_the_average(tmp_path):
    """Its responses are the raw run's, which the average trails: a few per cent on a run that has nearly settled, the same model or not."""
    once, model, data, asked = TASK.draw(40, torch.Generator().manual_seed(1)), made(Linear), images(40, 1), images(8, 2)
    optimizer, (kept, step) = torch.optim.SGD(model.parameters(), 0.2), a_copy(model)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=data, checkpoints=6, steps=100, ema=kept)
    for _ in range(100):
        optimizer.zero_grad()
        TASK.loss(model, TASK.noised(data, once)).mean().backward()
        optimizer.step()
        step()
        recorder.step(torch.arange(40), events=once)
    run = recorder.finish()
    truth = through_training(TASK, lambda: made(Linear), data, [(torch.arange(40), once)] * 100, 0.2, asked, decay=DECAY)
    found = hw.trace(run.over(run.met(run.stages[0], 100)), asked, hw.Source(segments=3, curvature=hw.Dense()), progress=False).values
    assert np.linalg.norm(found - truth) < 0.1 * np.linalg.norm(truth), np.linalg.norm(found - truth) / np.linalg.norm(truth)
    assert np.mean([spearman(a, b) for a, b in zip(found, truth, strict=True)]) > 0.99


def test_source_has_the_slope_of_unrolling_where_events_come_anew_at_each_step(tmp_path):
    """Then SOURCE answers for the expected events, and unrolling for those of this very run, of which the last weigh most."""
    g = torch.Generator().manual_seed(1)
    source, tracin = against_unrolling(tmp_path / "run", lambda step: TASK.draw(40, g), lambda run: TASK.grid(tuple(range(0, T, 2)), draws=4))
    assert source[0] == pytest.approx(1, abs=0.15) and source[1] > 0.75
    assert abs(tracin[0] - 1) > 0.5 and tracin[1] < source[1]


def spearman(a, b):
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def test_a_replay_without_recorded_events_is_refused(tmp_path):
    run = trained(tmp_path / "run", made(Network), TASK, TRAIN, events=False).finish()
    with pytest.raises(RunError, match="does not know the noise events"):
        hw.trace(run, ASKED, hw.Unrolled(), progress=False)


# ---- a loop of diffusers' kind


def unet(**settings):
    """The smallest of diffusers' networks that has convolutions, group norms, time embeddings and attention."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(**SIZES, **kinds, **settings)


SIZES = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (4, 4), "norm_num_groups": 2, "attention_head_dim": 2,
}  # fmt: skip
PICTURES = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def scheduler(**settings):
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=50, **settings)


def accelerated(path, task, precision="no", average=False, wrap=lambda model: model):
    """A loop as in diffusers' scripts: two batches a step, clipping, an average. What each draw gave is kept."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers.training_utils import EMAModel

    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the process's first
    accelerator, model = Accelerator(gradient_accumulation_steps=2, cpu=True, mixed_precision=precision), unet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(TensorDataset(torch.arange(8), PICTURES), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(2))
    ema = EMAModel(model.parameters(), decay=0.9) if average else None
    model, optimizer, loader = accelerator.prepare(wrap(model), optimizer, loader)
    recorder, seen = hw.Recorder(path, model, optimizer, task=task, train=PICTURES, checkpoints=2, ema=ema), []
    torch.manual_seed(3)
    for ids, pictures in loader:
        with accelerator.accumulate(model):
            drawn = recorder.draw(ids, pictures)
            answer = model(drawn.noisy, drawn.timesteps).sample
            accelerator.backward(torch.nn.functional.mse_loss(answer.float(), drawn.target))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            optimizer.zero_grad()
        seen.append((ids, drawn))
        if accelerator.sync_gradients:
            if ema is not None:
                ema.step(model.parameters())
            recorder.step()
    return recorder.finish(), seen


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_draw_gives_what_the_scheduler_would(prediction):
    given = scheduler(prediction_type=prediction)
    task = hw.tasks.Diffusion(given)
    drawn = task.noisy(PICTURES, task.draw(8, torch.Generator().manual_seed(4)))
    targets = {"epsilon": drawn.noise, "v_prediction": given.get_velocity(PICTURES, drawn.noise, drawn.timesteps), "sample": PICTURES}
    torch.testing.assert_close(drawn.noisy, given.add_noise(PICTURES, drawn.noise, drawn.timesteps), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(drawn.target, targets[prediction], rtol=1e-5, atol=1e-6)
    assert abs(float(drawn.noise.std()) - 1) < 0.1 and len(set(drawn.timesteps.tolist())) > 4
    model = unet().eval()
    own = ((model(drawn.noisy, drawn.timesteps).sample - drawn.target) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(task.loss(model, drawn.batch), own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_accelerated_loop_is_recorded_by_its_draws_and_replayed_to_the_last_bit(precision, tmp_path):
    run, seen = accelerated(tmp_path / "run", hw.tasks.Diffusion(scheduler(), timesteps=4), precision, average=True)
    assert len(seen) == 4 and run.checkpoints[-1] == 2
    for step in (1, 2):
        pair = seen[2 * step - 2 : 2 * step]
        np.testing.assert_array_equal(run.order(step), np.concatenate([ids for ids, _ in pair]))
        np.testing.assert_array_equal(run.events_of(step)["seed"], np.concatenate([drawn.events.seeds for _, drawn in pair]))
        np.testing.assert_array_equal(run.events_of(step)["t"], np.concatenate([drawn.events.t for _, drawn in pair]))
    assert Replay(run).check()["bit_for_bit"]
    assert run.averages(2) and not torch.equal(run.weights(2)["conv_in.weight"], run.weights(2, averaged=True)["conv_in.weight"])


@pytest.mark.slow
def test_the_model_in_distributed_data_parallel_is_the_one_recorded(tmp_path):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        run, _ = accelerated(tmp_path / "run", hw.tasks.Diffusion(scheduler(), timesteps=4), wrap=DistributedDataParallel)
    finally:
        distributed.destroy_process_group()
    again = hw.Run.open(tmp_path / "run", build=unet, train=PICTURES, task=hw.tasks.Diffusion(scheduler(), timesteps=4))
    assert Replay(again).check()["bit_for_bit"] and run.events_of(2)["seed"].all()


def test_draws_and_told_steps_do_not_mix(tmp_path):
    model = made(Network)
    optimizer = sgd(model)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN)
    optimizer.step()
    with pytest.raises(InputError, match="without indices"):
        recorder.step()
    drawn = recorder.draw([1, 2])
    assert torch.equal(drawn.batch.batch, TRAIN[1:3])
    with pytest.raises(InputError, match=r"whose events recorder.draw\(\) gave"):
        recorder.step([1, 2])
    plain = hw.Recorder(tmp_path / "other", hw_linear := torch.nn.Linear(2, 2), sgd(hw_linear), task=hw.tasks.Regression(), train=(torch.zeros(3, 2), torch.zeros(3, 2)))
    with pytest.raises(InputError, match="whose task is Regression"):
        plain.draw([0])
    with pytest.raises(RunError, match=r"before recorder.watch"):
        hw.Recorder(tmp_path / "third", task=TASK, train=TRAIN).draw([0])


# ---- adapters on a frozen base


def adapters_by_sgd(model, rate=0.1):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)


def adapted(build=lambda: made(Network), targets=("enter", "leave")):
    """A model with peft's adapters, everything else frozen; as diffusers' scripts make it."""
    from peft import LoraConfig, inject_adapter_in_model

    model = build().requires_grad_(False)
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian", target_modules=list(targets)), model)
    return model


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory):
    model = adapted()
    return trained(
        tmp_path_factory.mktemp("lora") / "run", model, TASK, TRAIN, optimizer=adapters_by_sgd(model, 0.3), checkpoints=[6, 12]
    ).finish()


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def adapter_gradients(run, step, examples, events):
    """Of each example's loss at one event (or the mean of several), one at a time, in the adapters alone."""
    model = run.load(run.model(), step)
    parameters = [p for n, p in model.named_parameters() if "lora" in n]
    rows = []
    for i in range(len(examples)):
        batch = TASK.examples(examples).over(events).batch([i])
        a, b, t = batch.signal[0], batch.noise[0], batch.time[0]
        out = model(a[:, None] * examples[i] + b[:, None] * batch.eps[0], t)
        rows.append(flat(torch.autograd.grad(((out - batch.eps[0]) ** 2).mean(), parameters)))
    return torch.stack(rows).numpy()


def test_a_run_of_adapters_holds_the_frozen_base_once(adapted_run):
    run = adapted_run
    again = hw.Run.open(run.path, build=adapted, train=TRAIN, task=TASK)
    for step in (0, 6, 12):
        state = safetensors.torch.load_file(run.path / "checkpoints" / f"{step}.safetensors")
        assert state and all("lora" in name for name in state)
        held, model = again.weights(step), adapted()
        assert set(held) == set(model.state_dict())
        for name, p in model.named_parameters():
            assert torch.equal(held[name], p) == ("lora" not in name or (step == 0)), name
    assert set(safetensors.torch.load_file(run.path / "frozen.safetensors")) == {n for n in adapted().state_dict() if "lora" not in n}
    (run.path / "frozen.safetensors").rename(run.path / "hidden")
    with pytest.raises(DamagedFile, match=r"frozen.safetensors is missing"):
        hw.Run.open(run.path, build=adapted, train=TRAIN, task=TASK).weights(6)
    (run.path / "hidden").rename(run.path / "frozen.safetensors")


def test_a_frozen_weight_that_moves_all_the_same_is_kept_with_its_checkpoint(tmp_path):
    model = adapted()
    optimizer = adapters_by_sgd(model, 0.3)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, checkpoints=[1, 2, 3])
    for step in range(1, 4):
        TASK.loss(model, TASK.examples(TRAIN).batch(range(4))).mean().backward()
        optimizer.step()
        if step == 2:
            with torch.no_grad():
                model.leave.base_layer.bias.add_(1.0)
        recorder.step(range(4))
    run = recorder.finish()
    held = [run.weights(step)["leave.base_layer.bias"] for step in range(4)]
    assert torch.equal(held[0], held[1]) and torch.equal(held[2], held[0] + 1) and torch.equal(held[3], held[2])


def test_a_stage_that_unfreezes_the_base_records_it(tmp_path):
    model = adapted()
    optimizer = adapters_by_sgd(model, 0.3)
    recorder = trained(tmp_path / "run", model, TASK, TRAIN, optimizer=optimizer, epochs=1, checkpoints=[3])
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    recorder.stage("all", train=TRAIN, optimizer=optimizer, checkpoints=[3])
    trained(None, model, TASK, TRAIN, optimizer=optimizer, epochs=1, recorder=recorder)
    run = recorder.finish()
    for name, p in model.named_parameters():
        assert torch.equal(run.weights(6)[name], p.detach())
    assert torch.equal(run.weights(3)["enter.base_layer.weight"], adapted().enter.base_layer.weight)


@pytest.mark.parametrize("unit", [False, True], ids=["tracin", "retrac"])
@pytest.mark.parametrize("events", ["expected", "replay"])
def test_gradients_of_adapters_alone_are_compared(unit, events, adapted_run):
    run, kind = adapted_run, hw.DiffusionReTrac if unit else hw.DiffusionTracIn
    found = hw.trace(run, ASKED, kind(timesteps=(3, 20), events=events), progress=False).values
    scaled = (lambda g: g / np.linalg.norm(g, axis=1, keepdims=True)) if unit else lambda g: g
    truth, start = np.zeros((3, 12)), 0
    for step in (6, 12):
        asked = [scaled(adapter_gradients(run, step, ASKED, TASK.grid((t,), salt=step))) for t in (3, 20)]
        seen = [run.met(run.stages[0], step)] if events == "replay" else [TASK.grid((t,), salt=step) for t in (3, 20)]
        met = np.mean([scaled(adapter_gradients(run, step, TRAIN, e)) for e in seen], 0)
        truth += 0.3 * (step - start) / 12 * np.mean(asked, 0) @ met.T
        start = step
    np.testing.assert_allclose(found, truth, rtol=1e-8, atol=1e-10 * np.abs(truth).max())


def test_influence_of_adapters_is_that_of_their_own_gauss_newton_matrix(adapted_run):
    run = adapted_run
    found = hw.trace(run, ASKED, hw.Influence(damping=0.05, curvature=hw.Dense(fisher="exact")), progress=False).values
    model = run.load(run.model(), 12)
    parameters = [p for n, p in model.named_parameters() if "lora" in n]
    spread, H = TASK.examples(TRAIN).spread(), 0.0
    for i in range(len(spread)):
        batch = spread.batch([i])
        out = model(batch.signal[0] * TRAIN[i // 4][None] + batch.noise[0] * batch.eps[0], batch.time[0])[0]
        J = torch.stack([flat(torch.autograd.grad(o, parameters, retain_graph=True)) for o in out])
        H = H + 2 / D * J.T @ J / len(spread)
    u, g = adapter_gradients(run, 12, ASKED, TASK.events), adapter_gradients(run, 12, TRAIN, TASK.events)
    truth = u @ np.linalg.solve(H.numpy() + 0.05 * np.eye(len(H)), g.T) / 12
    np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-8 * np.abs(truth).max())


def test_unrolling_of_adapters_is_autograd_through_their_training(tmp_path):
    model, steps = adapted(), []
    optimizer = adapters_by_sgd(model, 0.3)
    run = trained(tmp_path / "run", model, TASK, TRAIN, optimizer=optimizer, keep=steps).finish()
    found = hw.trace(run, ASKED, hw.Unrolled(), progress=False).values
    truth = through_training(TASK, adapted, TRAIN, steps, 0.3, ASKED)
    np.testing.assert_allclose(found, truth, rtol=1e-9, atol=1e-10 * np.abs(truth).max())


def test_adapters_that_were_never_trained_are_refused(tmp_path):
    model = adapted()
    optimizer = adapters_by_sgd(model, 0.3)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN)
    optimizer.step()  # without gradients
    recorder.step([0])
    run = recorder.finish()
    with pytest.raises(GradientError, match="never trained"):
        hw.trace(run, ASKED, hw.DiffusionTracIn(), progress=False)


# ---- what diffusers leaves in folders


@pytest.mark.parametrize("kept", [{"max_shard_size": "10KB"}, {"safe_serialization": False}, {"variant": "fp16"}, {}], ids=["shards", "bin", "variant", "one"])
@pytest.mark.parametrize("place", [".", "unet", "transformer"])
def test_weights_are_found_in_folders_as_diffusers_writes_them(kept, place, tmp_path):
    model = unet()
    model.save_pretrained(tmp_path / place, **kept)
    found = load(weights_file(tmp_path))
    assert set(found) == set(model.state_dict())
    for name, t in model.state_dict().items():
        assert torch.equal(found[name], t)


def test_a_run_from_folders_of_diffusers_has_their_weights_and_averages(tmp_path):
    """Pretend training: at each step all weights move, and the model and its average are saved as diffusers' scripts do."""
    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    model, raw, averaged = unet(), {}, {}
    ema, folders = EMAModel(model.parameters(), decay=0.9, model_cls=UNet2DModel, model_config=model.config), {step: tmp_path / f"checkpoint-{step}" for step in (2, 4)}
    for step, folder in folders.items():
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        ema.step(model.parameters())
        model.save_pretrained(folder / "unet")
        ema.save_pretrained(folder / "unet_ema")
        raw[step] = {n: p.detach().clone() for n, p in model.named_parameters()}
        averaged[step] = dict(zip(raw[step], [t.clone() for t in ema.shadow_params], strict=True))
    settings = {"build": unet, "train": PICTURES, "task": hw.tasks.Diffusion(scheduler(), timesteps=2), "optimizer": sgd}
    run = hw.Run.from_checkpoints(tmp_path / "run", folders, **settings)
    for step in (2, 4):
        for name in raw[step]:
            assert torch.equal(run.weights(step)[name], raw[step][name])
            torch.testing.assert_close(run.weights(step, averaged=True)[name], averaged[step][name], rtol=0, atol=0)
    assert run.manifest["stages"][0]["ema"] == {"kind": "EMA", "decay": 0.9}
    scores = hw.trace(run, PICTURES[:2], hw.DiffusionTracIn(timesteps=1), progress=False)
    assert scores.values.all() and scores.provenance["queries at"].startswith("ema")
    inner = hw.Run.from_checkpoints(tmp_path / "inner", {step: str(folder / "unet") for step, folder in folders.items()}, averages={}, **settings)
    assert not inner.averages(4) and torch.equal(inner.weights(4)["conv_in.weight"], raw[4]["conv_in.weight"])
    with pytest.raises(InputError, match="and none at"):
        hw.Run.from_checkpoints(tmp_path / "half", folders, averages={4: folders[4] / "unet_ema"}, **settings)
    with pytest.raises(MissingCheckpoint, match="a folder that holds"):
        hw.Run.from_checkpoints(tmp_path / "none", {1: tmp_path}, **settings)


def test_what_accelerate_kept_of_adam_is_read_from_the_checkpoints_folder(tmp_path):
    model = unet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    model.save_pretrained(tmp_path / "checkpoint-1" / "unet")
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint-1" / "optimizer.bin")
    settings = {"build": unet, "train": PICTURES, "task": hw.tasks.Diffusion(scheduler(), timesteps=2), "optimizer": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3)}
    run = hw.Run.from_checkpoints(tmp_path / "run", {1: tmp_path / "checkpoint-1"}, **settings)
    torch.testing.assert_close(run.second_moments(1)["conv_in.weight"], torch.ones_like(model.conv_in.weight))


def conditional():
    """A text-conditional network with adapters in its attention."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    model = UNet2DConditionModel(**SIZES, **kinds, cross_attention_dim=6).requires_grad_(False)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    return model.double()


TEXTS = torch.randn(8, 3, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_a_run_from_saved_adapters_takes_the_base_from_build_and_compares_adapters(layout, tmp_path):
    """As pipelines save them (``unet.`` in front, ``lora.down``), or as the network does; scores equal gradients of one example at a time."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    task, model = hw.tasks.Diffusion(scheduler(), timesteps=(5, 30)), conditional()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(generator=torch.Generator().manual_seed(len(n)))
    state = get_peft_model_state_dict(model)
    if layout == "diffusers":
        state = {f"unet.{n}": t for n, t in convert_state_dict_to_diffusers(state).items()} | {"text_encoder.layer.lora.down.weight": torch.zeros(2, 2)}
    safetensors.torch.save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    pictures = PICTURES.double()
    run = hw.Run.from_checkpoints(tmp_path / "run", {3: tmp_path}, build=conditional, train=(pictures, TEXTS), task=task, optimizer=adapters_by_sgd)
    for name, p in model.named_parameters():
        assert torch.equal(run.weights(3)[name], p.detach()), name
    found = hw.trace(run, (pictures[:2], TEXTS[:2]), hw.DiffusionTracIn(timesteps=(5, 30)), progress=False).values
    model, data = run.load(run.model(), 3), task.examples((pictures, TEXTS)).over(task.grid((5, 30), salt=3))
    rows = []
    for i in range(8):
        batch, parameters = data.batch([i]), [p for n, p in model.named_parameters() if "lora" in n]
        total = 0.0
        for k in range(2):
            x, eps = pictures[i : i + 1], batch.eps[:, k]
            out = model(batch.signal[0, k] * x + batch.noise[0, k] * eps, batch.time[:, k], TEXTS[i : i + 1]).sample
            total = total + ((out - eps) ** 2).mean() / 2
        rows.append(flat(torch.autograd.grad(total, parameters)))
    G = torch.stack(rows)
    truth = (0.3 / 8 * G[:2] @ G.T).numpy()  # three steps at 0.1
    np.testing.assert_allclose(found, truth, rtol=1e-8, atol=1e-9 * np.abs(truth).max())


def test_a_network_of_diffusers_is_the_same_wherever_it_was_loaded_from_and_another_with_other_settings(tmp_path):
    from diffusers import UNet2DModel

    model = unet()
    model.save_pretrained(tmp_path / "here")
    loaded, configured = UNet2DModel.from_pretrained(tmp_path / "here"), UNet2DModel.from_config(model.config)
    assert model_digest(model) == model_digest(loaded) == model_digest(configured)
    others = [unet(act_fn="mish"), unet(flip_sin_to_cos=False), unet(norm_eps=1e-3), unet(resnet_time_scale_shift="scale_shift"), unet(freq_shift=1)]
    assert len({model_digest(m) for m in (model, *others)}) == 6


def test_ensembles_and_an_index_are_asked_at_the_average_too(averaged_run, tmp_path):
    run = averaged_run
    other = averaging(tmp_path / "other", shadows, seed=9)[0]
    single = [hw.trace(r, ASKED, hw.GradDot(), progress=False).values for r in (run, other)]
    np.testing.assert_allclose(hw.trace(run, ASKED, hw.Ensemble(hw.GradDot(), [run, other]), progress=False).values, np.mean(single, 0), rtol=1e-9)
    np.testing.assert_allclose(hw.trace(hw.index(run, progress=False), ASKED, hw.GradDot(), progress=False).values, single[0], rtol=1e-9)
    lora = hw.LoraEnsemble(hw.GradDot(), members=2, rank=2, steps=3)
    found, view, raw = (hw.trace(r, ASKED, lora, weights=w, progress=False) for r, w in ((run, None), (run.averaged(), None), (run, "raw")))
    np.testing.assert_array_equal(found.values, view.values)
    assert not np.allclose(found.values, raw.values) and found.provenance["training examples at"].startswith("ema")
