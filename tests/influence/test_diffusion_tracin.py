"""Diffusion-TracIn and -ReTrac: closed forms, one gradient at a time, and the laws that tell the two apart."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InputError, RunError
from headwater.tasks.diffusion.events import noise_of
from tests.influence.denoisers import Brute, D, Linear, Network, T, agree, by_hand, close, images, labelled, made, trained

COSINE = hw.tasks.cosine(T)
TASK = hw.tasks.Diffusion(COSINE, timesteps=4)
TRAIN, ASKED = images(12, 1), images(3, 2)
STEPS = (3, 20, 44)


def values(run, method, queries=ASKED, **settings):
    return hw.trace(run, queries, method, progress=False, **settings).values


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("d") / "run", made(Network), TASK, TRAIN, checkpoints=[6, 12]).finish()


def everything(run, queries=ASKED):
    return [(q, c) for q in range(len(queries[0]) if isinstance(queries, tuple) else len(queries)) for c in range(run.size)]


# ------------------------------------------------------------------------------------------------------------ closed forms


def linear_run(path):
    return trained(path, made(Linear), TASK, TRAIN, checkpoints=[12]).finish()


def residuals(model, x, t, seed):
    """phi and the residual of one example at one event."""
    eps = noise_of(torch.tensor([[seed]]), x.shape, x.dtype, "cpu")[0, 0]
    phi = Linear.phi((COSINE.signal[t] * x + COSINE.noise[t] * eps)[None], torch.tensor([t]))[0]
    return phi, (model.fc.weight @ phi - eps).detach()


@pytest.mark.parametrize("events", ["expected", "replay"])
def test_a_linear_denoiser_has_the_closed_forms(events, tmp_path):
    """With r the residual and phi the features, at one event each: TracIn ``(4/d^2)(r.r')(phi.phi')``, ReTrac ``cos(r, r') cos(phi, phi')``."""
    run = linear_run(tmp_path / "run")
    model, step, t = run.load(run.model(), 12), 12, 20
    (_, seed) = TASK.grid((t,), 1, salt=step).of(np.zeros(1, int), "shared")
    met = Brute(run)
    tracin, retrac = np.empty((3, 12)), np.empty((3, 12))
    for q, x in enumerate(ASKED):
        phi_q, r_q = residuals(model, x, t, int(seed))
        for i, z in enumerate(TRAIN):
            phi, r = residuals(model, z, t, int(seed)) if events == "expected" else residuals(model, z, *met.met(run.stages[0], i, step)[0])
            rr, pp = float(r_q @ r), float(phi_q @ phi)
            tracin[q, i] = 4 / D**2 * rr * pp
            retrac[q, i] = rr / float(r_q.norm() * r.norm()) * pp / float(phi_q.norm() * phi.norm())
    w = 12 * 0.1 / 12
    assert close(values(run, hw.DiffusionTracIn((t,), events=events)), w * tracin, 1e-12)
    assert close(values(run, hw.DiffusionReTrac((t,), events=events)), w * retrac, 1e-12)


# ---------------------------------------------------------------------------------------------------- one gradient at a time

MODES = [
    {"timesteps": STEPS, "draws": 2},
    {"timesteps": 3, "draws": 1, "noise": "example", "seed": 5},
    {"timesteps": STEPS, "events": "replay"},
    {"timesteps": STEPS, "draws": 2, "events": "replay", "window": 2, "noise": "example"},
]


@pytest.mark.parametrize("kind", [hw.DiffusionTracIn, hw.DiffusionReTrac])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode_equals_one_gradient_at_a_time(run, kind, mode):
    method = kind(**mode)
    agree(values(run, method), by_hand(run, ASKED, method, everything(run)), 1e-9)


@pytest.mark.parametrize("kind", [hw.DiffusionTracIn, hw.DiffusionReTrac])
def test_in_float32_as_well(kind, tmp_path):
    train, asked = images(12, 1, torch.float32), images(3, 2, torch.float32)
    run = trained(tmp_path / "run", made(Network, dtype=torch.float32), TASK, train, checkpoints=[6, 12]).finish()
    for mode in MODES[::3]:
        method = kind(**mode)
        agree(values(run, method, asked), by_hand(run, asked, method, everything(run)), 1e-5)


@pytest.mark.parametrize("kind", [hw.DiffusionTracIn, hw.DiffusionReTrac])
def test_several_stages_with_their_own_loss_data_and_conditions_left_out(kind, tmp_path):
    """The second stage: another loss, other weights of timesteps, Adam, and classes that are sometimes left out."""
    classes = 3
    first = hw.tasks.Diffusion(COSINE, timesteps=3)
    second = hw.tasks.Diffusion(COSINE, loss="l1", timesteps=3, drop=0.4, null=classes)
    a, b, asked = labelled(8, 1, classes), labelled(9, 2, classes), labelled(3, 3, classes)
    model = made(Network, classes=classes)
    recorder = trained(tmp_path / "run", model, first, a, checkpoints=[4, 8])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    recorder.stage("second", train=b, optimizer=optimizer, task=second, checkpoints=[6], steps=6)
    run = trained(None, model, second, b, optimizer=optimizer, recorder=recorder, epochs=2, batch=4).finish()
    assert [s.name for s in run.stages] == ["train", "second"] and len(run.checkpoints) == 4
    for mode in ({"timesteps": STEPS, "draws": 2}, {"timesteps": STEPS, "events": "replay", "window": 2}):
        method = kind(**mode)
        pairs = [(q, c) for q in range(3) for c in (0, 3, 7, 8, 12, 16)]
        agree(values(run, method, asked), by_hand(run, asked, method, pairs), 1e-9)


# ------------------------------------------------------------------------------------------------------------- invariances

METHODS = [
    hw.DiffusionTracIn(**MODES[0], keep=("timestep",)),
    hw.DiffusionReTrac(**MODES[0], keep=("checkpoint",)),
    hw.DiffusionTracIn(**MODES[1]),
    hw.DiffusionReTrac(**MODES[3], keep=("timestep", "checkpoint")),
]


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"batch_size": 5, "memory": 20_000}], ids=str)
def test_batches_and_chunks_change_nothing(run, settings):
    plain, cut = (hw.trace(run, ASKED, METHODS, progress=False, **s) for s in ({}, settings))
    for a, b in zip(cut, plain, strict=True):
        assert close(a.values, b.values, 1e-11), a.method
        for axis in b.slices:
            assert close(a.by(axis).values, b.by(axis).values, 1e-11)
    for a, b in zip(*(hw.self_influence(run, METHODS[1:3], progress=False, **s) for s in (settings, {})), strict=True):
        assert close(a.values, b.values, 1e-11)


def test_the_order_of_queries_changes_nothing_where_noise_is_shared(run):
    for method in METHODS:
        back = values(run, method, ASKED.flip(0))[::-1]
        assert close(back, values(run, method), 1e-12) == (method.noise == "shared")  # an example's own noise goes by its number


def test_work_that_was_stopped_goes_on_to_the_same_scores(run, tmp_path, monkeypatch):
    from headwater.influence import scoring

    def opened(name):
        import shutil

        shutil.copytree(run.path, tmp_path / name, ignore=shutil.ignore_patterns("jobs", "factors"))
        return hw.Run.open(tmp_path / name, build=run.build, train=TRAIN, task=TASK)

    whole, cut = opened("whole"), opened("cut")
    settings = {"batch_size": 8, "memory": 1}
    truth = hw.trace(whole, ASKED, METHODS[:2], progress=False, **settings)
    contribution, calls = scoring.contribution, 0

    def stopping(*args):
        nonlocal calls
        calls += 1
        if calls in (7, 20):
            raise KeyboardInterrupt
        return contribution(*args)

    monkeypatch.setattr(scoring, "contribution", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            hw.trace(cut, ASKED, METHODS[:2], progress=False, **settings)
    found = hw.trace(cut, ASKED, METHODS[:2], progress=False, **settings)
    for a, b in zip(found, truth, strict=True):
        assert np.array_equal(a.values, b.values)
        assert all(np.array_equal(a.by(axis).values, b.by(axis).values) for axis in b.slices)


# -------------------------------------------------------------------------------------------------- what tells the two apart


def reweighted(run, weighting, tmp_path):
    """The same weights and record under a loss that weighs timesteps in another way."""
    task = hw.tasks.Diffusion(COSINE, timesteps=4, weighting=weighting)
    import shutil

    shutil.copytree(run.path, tmp_path / "other", ignore=shutil.ignore_patterns("jobs", "factors"))
    from headwater.store import read_json, write_json

    manifest = read_json(tmp_path / "other" / "manifest.json")
    manifest["stages"][0]["task"] = pickle.loads(pickle.dumps(task.describe()))
    write_json(tmp_path / "other" / "manifest.json", manifest)
    return hw.Run.open(tmp_path / "other", build=run.build, train=TRAIN, task=task)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_retrac_does_not_see_how_the_loss_weighs_timesteps_and_tracin_does(run, mode, tmp_path):
    other = reweighted(run, lambda t: 0.1 + 3 * torch.sin(t) ** 2, tmp_path)
    assert close(values(other, hw.DiffusionReTrac(**mode)), values(run, hw.DiffusionReTrac(**mode)), 1e-10)
    assert not close(values(other, hw.DiffusionTracIn(**mode)), values(run, hw.DiffusionTracIn(**mode)), 0.1)


def test_expected_tracin_is_the_product_of_mean_gradients_and_retrac_is_not(run):
    """One backward pass of the mean loss over all events is all of TracIn; ReTrac needs a gradient for each timestep."""
    model = run.model()
    products = [np.zeros((3, 12)), np.zeros((3, 12))]
    for step in run.checkpoints[1:]:
        run.load(model, step)
        grid = TASK.grid(STEPS, 2, salt=step)
        sides = []
        for data in (ASKED, TRAIN):
            losses = TASK.loss(model, TASK.examples(data).over(grid).batch(range(len(data))))
            sides.append(torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(v, list(model.parameters()), retain_graph=True)]) for v in losses]))
        products[0] += 0.6 / 12 * (sides[0] @ sides[1].mT).numpy()
        products[1] += 0.6 / 12 * (nn.functional.normalize(sides[0]) @ nn.functional.normalize(sides[1]).mT).numpy()
    tracin, retrac = (values(run, kind(STEPS, 2)) for kind in (hw.DiffusionTracIn, hw.DiffusionReTrac))
    assert close(tracin, products[0], 1e-10)
    assert not close(retrac, products[0], 0.1) and not close(retrac, products[1], 0.01)  # nor the cosine of mean gradients


class Silent(nn.Module):
    """A network that predicts an example perfectly: where x is zero and the answer is x itself."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((D,), 0.5, dtype=torch.float64))

    def forward(self, x, t, y):
        return self.scale * x * y[:, None]


def test_a_zero_gradient_gives_zero_and_no_nan(tmp_path):
    task = hw.tasks.Diffusion(hw.tasks.cosine(T, "sample"), timesteps=3)
    y = torch.ones(12, dtype=torch.float64)
    y[4] = 0  # its prediction does not depend on the weights
    model = Silent()
    run = trained(tmp_path / "run", model, task, (TRAIN, y), checkpoints=[12]).finish()
    asked = (ASKED, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    for kind in (hw.DiffusionTracIn, hw.DiffusionReTrac):
        for mode in MODES:
            found = hw.trace(run, asked, kind(**mode), progress=False).values
            assert np.isfinite(found).all() and (found[:, 4] == 0).all() and (found[1] == 0).all() and (np.delete(found[[0, 2]], 4, 1) != 0).all()
            assert hw.self_influence(run, kind(**mode), progress=False).values[0, 4] == 0


# -------------------------------------------------------------------------------------------------------------- the record


def test_an_example_that_training_never_met_is_refused(tmp_path):
    """A loop that drops its partial last batch: the examples left out have no event, rather than another's."""
    model = made(Network)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = hw.Recorder(tmp_path / "run", model, optimizer, task=TASK, train=TRAIN, checkpoints=[2], steps=2)
    for ids in torch.arange(10).split(5):
        events = TASK.draw(len(ids), torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        TASK.loss(model, TASK.noised(TRAIN[ids], events)).mean().backward()
        optimizer.step()
        recorder.step(ids, events=events)
    run = recorder.finish()
    for method in (hw.DiffusionTracIn(events="replay"), hw.DiffusionReTrac(events="replay")):
        with pytest.raises(InputError, match="example 10 without a recorded event"):
            values(run, method)
    assert np.isfinite(values(run, hw.DiffusionTracIn())).all()


def test_a_run_without_events_answers_expected_ones_alone(tmp_path):
    run = trained(tmp_path / "run", made(Network), TASK, TRAIN, checkpoints=[12], events=False).finish()
    with pytest.raises(RunError, match="does not know the noise events"):
        values(run, hw.DiffusionTracIn(events="replay"))
    assert np.isfinite(values(run, hw.DiffusionReTrac())).all()


def test_a_replay_meets_the_recorded_events_bit_by_bit(tmp_path):
    """From disk alone: the same timesteps, noise and losses as in the loop, with the weights of each step."""
    kept, losses, model = [], [], made(Network)
    recorded = trained(tmp_path / "run", model, TASK, TRAIN, epochs=2, checkpoints=[1, 2, 3, 4, 5, 6], keep=kept, losses=losses).finish()
    run = hw.Run.open(recorded.path, build=lambda: made(Network), train=TRAIN, task=TASK)
    for step, (ids, drawn) in enumerate(kept, 1):
        found = run.events_of(step)
        assert np.array_equal(run.order(step), ids.numpy()) and np.array_equal(found["t"], drawn.t.numpy()) and np.array_equal(found["seed"], drawn.seeds.numpy())
    for first, last in ((1, 3), (4, 6)):  # each epoch
        met = run.met(run.stages[0], last)
        batch = TASK.examples(TRAIN).over(met).batch(range(12))
        for step in range(first, last + 1):
            ids, drawn = kept[step - 1]
            truth = TASK.noised(TRAIN[ids], drawn)
            assert torch.equal(batch.eps[ids], truth.eps) and torch.equal(batch.time[ids], truth.time)
            weights = run.load(run.model(), step - 1)
            again = TASK.loss(weights, TASK.examples(TRAIN).over(met).batch(ids.numpy()))
            assert torch.equal(again, losses[step - 1])


# ------------------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_parts_sum_to_the_scores_and_are_the_scores_of_each_alone(run, mode):
    for kind in (hw.DiffusionTracIn, hw.DiffusionReTrac):
        whole = hw.trace(run, ASKED, kind(**mode, keep=("timestep", "checkpoint")), progress=False)
        timesteps = COSINE.strata(mode["timesteps"]) if isinstance(mode["timesteps"], int) else mode["timesteps"]
        assert whole.by("timestep").labels == timesteps and whole.by("checkpoint").labels == (6, 12)
        for axis in ("timestep", "checkpoint"):
            assert close(whole.by(axis).values.sum(0), whole.values, 1e-12)
        assert close(whole.values, values(run, kind(**mode)), 1e-12)
        until = values(run.until(6), kind(**mode))
        assert close(whole.by("checkpoint")[6], until, 1e-12)
        if mode.get("events") == "replay":  # the training side does not depend on the query's timestep
            alone = values(run, kind(**{**mode, "timesteps": (timesteps[1],)}))
            assert close(whole.by("timestep")[timesteps[1]] * len(timesteps), alone, 1e-12)


def test_self_influence_is_the_diagonal(run):
    for method in (m for m in METHODS if m.noise == "shared"):
        assert close(hw.self_influence(run, method, progress=False).values[0], np.diag(values(run, method, TRAIN)), 1e-11)


def test_scores_are_of_the_measure_and_rows_may_be_named(run):
    single = values(run, hw.DiffusionTracIn(STEPS))
    named = values(run, hw.DiffusionTracIn(STEPS), [hw.Query("two", ASKED[:2]), hw.Query("one", ASKED[2:])])
    assert close(named, np.stack([single[:2].sum(0), single[2]]), 1e-12)
    twice = hw.trace(run, ASKED, hw.DiffusionTracIn(STEPS), measure=lambda m, b: -2 * TASK.loss(m, b), progress=False).values
    assert close(twice, 2 * single, 1e-12)


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"events": "fresh"}, "'expected' or 'replay'"),
        ({"window": 3}, "above 1 only of recorded events"),
        ({"window": 0, "events": "replay"}, "at least 1"),
        ({"keep": ("epoch",)}, "checkpoint"),
        ({"timesteps": 0}, "0 timesteps"),
        ({"timesteps": (3, 50)}, "timesteps from 0 to 49"),
        ({"draws": 0}, "at least one of each"),
        ({"noise": "mine"}, "'shared' or 'example'"),
    ],
)
def test_bad_settings_are_refused(run, settings, message):
    with pytest.raises(InputError, match=message):
        values(run, hw.DiffusionTracIn(**settings))


def test_other_tasks_are_refused(tmp_path):
    from tests.influence.test_laws import ASKED as asked
    from tests.influence.test_laws import record, sgd

    with pytest.raises(InputError, match="Classification in stage 'train'"):
        hw.trace(record(tmp_path / "run", sgd(), steps=2), asked, hw.DiffusionReTrac(), progress=False)


def test_methods_asked_together_share_their_passes_and_answer_as_alone(run):
    methods = [hw.DiffusionTracIn(timesteps=3, draws=2, keep="checkpoint"), hw.DiffusionReTrac(timesteps=3, draws=2)]
    together = hw.trace(run, ASKED, methods, progress=False)
    alone = [hw.trace(run, ASKED, method, progress=False) for method in methods]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.values, other.values, rtol=0, atol=1e-12 * np.abs(other.values).max())
    np.testing.assert_allclose(together[0].by("checkpoint").values, alone[0].by("checkpoint").values, rtol=0, atol=1e-12)
    checkpoints = len(run.checkpoints) - 1
    passes = [scores.provenance["cost"]["plan"]["passes"] for scores in (together[0], *alone)]
    assert passes == [3 * checkpoints, checkpoints, 3 * checkpoints]


def test_a_measure_of_ones_own_is_taken_whole_where_it_is_no_sum_over_events(run):
    """It may ignore events, or be a function of their mean; and it may read weights past their modules."""
    weight = next(iter(dict(run.model().named_parameters())))

    def ignores(model, batch):
        return model(batch.batch, torch.full((len(batch.batch),), 500)).flatten(1).sum(1)

    def root(model, batch):
        return -TASK.loss(model, batch).sqrt()

    def reads(model, batch):
        return TASK.loss(model, batch) * 0 + dict(model.named_parameters())[weight].square().sum()

    model = run.load(run.model(), run.checkpoints[-1])
    parameters = list(model.parameters())
    query, train = TASK.examples(ASKED).asked(), TASK.examples(TRAIN)

    def flat(function, data, i):
        found = torch.autograd.grad(function(model, data.batch([i]))[0], parameters, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)])

    for measure in (ignores, root, reads):
        asked, taught = ([flat(f, data, i) for i in range(len(data))] for f, data in ((measure, query), (TASK.loss, train)))
        truth = -torch.stack(asked) @ torch.stack(taught).mT / len(TRAIN)
        assert close(hw.trace(run, ASKED, hw.GradDot(), measure=measure, progress=False).values, truth.numpy(), 1e-9)
