"""Methods with a kernel on diffusion models: D-TRAK, the attribution score DAS and Journey-TRAK, against matrices written out."""

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.errors import InputError
from headwater.influence.ensembles.members import model_key, seed_of
from tests.influence.denoisers import Brute, D, Linear, Network, T, close, images, labelled, made, trained

COSINE = hw.tasks.cosine(T)
TASK = hw.tasks.Diffusion(COSINE, timesteps=4)
TRAIN, ASKED = images(12, 1), images(3, 2)
STEPS = (3, 20, 44)
OUTPUTS = {
    "square_norm": lambda out, x, eps: out.square().mean(),
    "mean": lambda out, x, eps: out.mean(),
    "l1_norm": lambda out, x, eps: out.abs().mean(),
    "loss": lambda out, x, eps: -(out - eps).square().mean(),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("k") / "run", made(Network), TASK, TRAIN, checkpoints=[12]).finish()


def values(run, method, queries=ASKED, **settings):
    return hw.trace(run, queries, method, progress=False, **settings).values


def features(run, data, output, side, grid):
    """Mean gradients of an output over events, (n, p): one example and event at a time."""
    brute = Brute(run).at(run.checkpoints[-1])
    rows = []
    for i, x in enumerate(data):
        t, seeds = grid.of(np.array([i]), side)
        rows.append(torch.stack([brute.of_output(OUTPUTS[output], x, int(a), int(b)) for a, b in zip(t[0], seeds[0], strict=True)]).mean(0))
    return torch.stack(rows).numpy()


def kernel(asked, train, relative):
    shift = relative * (train**2).sum()
    return asked @ np.linalg.solve(train.T @ train + shift * np.eye(train.shape[1]), train.T)


# ------------------------------------------------------------------------------------------------------------------ D-TRAK


@pytest.mark.parametrize("noise", ["shared", "example"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_dtrak_is_the_kernel_of_mean_gradients(run, output, noise):
    """Exact: from inner products (fewer examples than parameters), and with as many features as parameters."""
    grid = TASK.grid(STEPS, 2, noise=noise, seed=3)
    train, asked = features(run, TRAIN, output, "train", grid), features(run, ASKED, output, "query", grid)
    settings = {"timesteps": STEPS, "draws": 2, "noise": noise, "seed": 3, "output": output}
    for relative in (0.005, 0.3):
        truth = kernel(asked, train, relative)
        assert close(values(run, hw.DTrak(regularisation=relative, **settings)), truth, 1e-9)
        assert close(values(run, hw.DTrak(dim=10_000, regularisation=relative, **settings)), truth, 1e-9)


@pytest.mark.parametrize("dim", [8, 24])
def test_a_projected_kernel_is_solved_in_the_smaller_space(run, dim):
    """24 features of 12 examples: the dual form; 8: the primal one. Features by the projection of gradients, averaged before or after."""
    method = hw.DTrak(dim=dim, timesteps=STEPS, draws=2)
    from headwater.influence.engine import Engine
    from headwater.influence.trak.projecting import Projector

    grid = TASK.grid(STEPS, 2)
    engine = Engine.of(run, None)
    engine.load((12,))
    projector = Projector(engine.capture.blocks, method.sketch, torch.device("cpu"))
    sides = [projector(engine.capture.gradients(TASK.output("square_norm"), TASK.examples(data).over(grid).batch(range(len(data))))).numpy() for data in (ASKED, TRAIN)]
    found = hw.trace(run, ASKED, method, progress=False)
    assert close(found.values, kernel(*sides, 0.005), 1e-9)
    assert found.unit == "rank only" and found.provenance["effective_dimension"] <= dim


def test_a_sweep_is_as_many_results_from_one_pass(run, tmp_path):
    sweep = (0.001, 0.01, 0.1)
    for dim in (8, None):
        method = hw.DTrak(dim=dim, timesteps=(7, 31), regularisation=sweep, seed=8)
        found = hw.trace(run, ASKED, method, progress=False)
        assert [s.method for s in found] == [repr(m) for m in method.sweep()]
        for value, scores in zip(sweep, found, strict=True):
            assert close(scores.values, values(run, hw.DTrak(dim=dim, timesteps=(7, 31), regularisation=value, seed=8)), 1e-12)
        assert [s.provenance["cost"]["example_gradients"] > 0 for s in found] == [True, False, False]  # gradients are taken once


def test_scores_do_not_depend_on_the_scale_of_the_output_batches_or_order(run):
    plain = values(run, hw.DTrak(dim=8, timesteps=STEPS))
    scaled = values(run, hw.DTrak(dim=8, timesteps=STEPS, output=lambda m, b: 7 * TASK.output("square_norm")(m, b)))
    assert close(scaled, plain, 1e-9)  # lambda goes with the trace
    other = hw.Run.open(run.path, build=lambda: made(Network), train=TRAIN, task=TASK)
    for name in (run.path / "trak").glob("*"):
        name.unlink()
    assert close(values(other, hw.DTrak(dim=8, timesteps=STEPS), ASKED.flip(0), batch_size=2)[::-1], plain, 1e-10)


def test_the_measure_is_not_looked_at_and_a_loss_output_has_the_sign_of_a_proponent(run):
    method = hw.DTrak(timesteps=STEPS, output="loss")
    found = values(run, method, TRAIN)
    assert (np.diag(found) > 0).all()  # training on an example lowers its own loss
    assert close(values(run, method, TRAIN, measure=TASK.output("mean")), found, 1e-12)
    named = values(run, method, [hw.Query("all", TRAIN)])
    assert close(named[0], found.sum(0), 1e-12)


def test_stages_share_one_kernel_each_under_its_own_task(tmp_path):
    classes = 3
    first, second = hw.tasks.Diffusion(COSINE, timesteps=3), hw.tasks.Diffusion(COSINE, loss="l1", timesteps=3)
    a, b, asked = labelled(8, 1, classes), labelled(9, 2, classes), labelled(3, 3, classes)
    model = made(Network, classes=classes)
    recorder = trained(tmp_path / "run", model, first, a, checkpoints=[8])
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    recorder.stage("second", train=b, optimizer=optimizer, task=second, checkpoints=[6], steps=6)
    run = trained(None, model, second, b, optimizer=optimizer, recorder=recorder, epochs=2).finish()
    rows = []
    run.load(model := run.model(), run.checkpoints[-1])
    for task, data in ((first, a), (second, b), (second, asked)):
        losses = task.loss(model, task.examples(data).over(task.grid(STEPS)).batch(range(len(data[0]))))
        rows.append(torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(v, list(model.parameters()), retain_graph=True)]) for v in losses]))
    truth = kernel(rows[2].numpy(), torch.cat(rows[:2]).numpy(), 0.005)
    assert close(values(run, hw.DTrak(timesteps=STEPS, output="loss"), asked), truth, 1e-9)


def test_members_of_an_ensemble_have_projections_of_their_own(run, tmp_path):
    assert hw.DTrak(dim=8).member(2).sketch != hw.DTrak(dim=8).sketch and hw.DTrak().member(2) == hw.DTrak()
    other = trained(tmp_path / "other", made(Network, seed=1), TASK, TRAIN, checkpoints=[12]).finish()
    found = hw.trace(run, ASKED, hw.Ensemble(hw.DTrak(dim=8, timesteps=STEPS), [run, other]), progress=False)
    each = [values(one, hw.DTrak(dim=8, timesteps=STEPS).member(seed_of(model_key(one)))) for one in (run, other)]
    assert close(found.values, np.mean(each, axis=0), 1e-10) and found.stderr.max() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularisation": 0.0}, "regularisation=0"),
        ({"regularisation": (0.1, 0.0)}, "regularisation=0"),
        ({"regularisation": -1.0}, "at least 0"),
        ({"regularisation": ()}, "empty sweep"),
        ({"output": "magnitude"}, "output 'magnitude'"),
        ({"output": 3}, "output=3"),
        ({"output": TASK.output("mean", events=TASK.grid(3))}, "events of its own"),
        ({"dim": 0}, "dim"),
        ({"timesteps": 0}, "0 timesteps"),
    ],
)
def test_bad_settings_of_dtrak_are_refused(run, settings, message):
    with pytest.raises(InputError, match=message):
        values(run, hw.DTrak(**settings))


# --------------------------------------------------------------------------------------------------------------------- DAS


def test_das_of_a_linear_denoiser_is_the_exact_change_when_an_example_is_left_out(tmp_path):
    """Ridge regression of the noise, solved again without each example: ``|out_without_i(q) - out(q)|^2``, at each example's own event."""
    t, relative = 20, 0.01
    task = hw.tasks.Diffusion(COSINE, timesteps=(t,), noise="example", seed=4)
    held, asked = (task.examples(data).batch(range(len(data))) for data in (TRAIN, task.examples(ASKED).asked()))

    def features_of(batch, data):
        x = batch.signal * data + batch.noise * batch.eps[:, 0]
        return Linear.phi(x, torch.full((len(x),), t))

    phi, phi_q, eps = features_of(held, TRAIN), features_of(asked, ASKED), held.eps[:, 0]

    def solution(keep):
        shift = relative * float(phi.square().sum())
        return torch.linalg.solve(phi[keep].mT @ phi[keep] + shift * torch.eye(D + 2, dtype=torch.float64), phi[keep].mT @ eps[keep]).mT

    whole = solution(torch.ones(12, dtype=torch.bool))
    truth = np.array([[float((phi_q[q] @ (solution(torch.arange(12) != i) - whole).mT).square().sum()) for i in range(12)] for q in range(3)])
    build = lambda: made(Linear)  # noqa: E731
    optimizer = lambda m: torch.optim.SGD(m.parameters(), 0.1)  # noqa: E731
    run = hw.Run.from_checkpoints(tmp_path / "run", {1: {"fc.weight": whole}}, build=build, train=TRAIN, task=task, optimizer=optimizer)
    method = hw.DAS(timesteps=(t,), noise="example", seed=4, regularisation=relative)
    assert close(values(run, method), truth, 1e-10)
    assert close(values(run, hw.DAS(dim=10_000, timesteps=(t,), noise="example", seed=4, regularisation=relative)), truth, 1e-10)


@pytest.mark.parametrize("dim", [None, 8, 24])
def test_das_is_the_formula_on_any_network_and_event(run, dim):
    grid = TASK.grid(STEPS, 2)
    method = hw.DAS(dim=dim, timesteps=STEPS, draws=2)
    train, asked = features(run, TRAIN, "mean", "train", grid), features(run, ASKED, "mean", "query", grid)
    if dim:
        from headwater.influence.engine import Engine
        from headwater.influence.trak.projecting import Projector

        engine = Engine.of(run, None)
        engine.load((12,))
        projector = Projector(engine.capture.blocks, method.sketch, torch.device("cpu"))
        asked, train = (projector(engine.capture.gradients(TASK.output("mean"), TASK.examples(d).over(grid).batch(range(len(d))))).numpy() for d in (ASKED, TRAIN))
    model = run.load(run.model(), 12)
    with torch.no_grad():
        missed = (6 * TASK.loss(model, TASK.examples(TRAIN).over(grid).batch(range(12)))).sqrt().numpy()  # of the mean over 6 numbers
    leverage = np.diag(kernel(train, train, 0.005))
    found = hw.trace(run, ASKED, method, progress=False)
    assert close(found.values, (kernel(asked, train, 0.005) * missed / (1 - leverage)) ** 2, 1e-9)
    assert found.provenance["largest_leverage"] == pytest.approx(leverage.max(), abs=1e-6) and leverage.max() < 1
    assert found.unit == "magnitude" and (found.values >= 0).all() and "no opponents" in repr(found)


def test_das_is_swept_and_measured_as_other_methods_are(run):
    sweep = hw.trace(run, ASKED, hw.DAS(timesteps=STEPS, regularisation=(0.001, 0.1)), progress=False)
    assert len(sweep) == 2 and not close(sweep[0].values, sweep[1].values, 0.1)
    assert hw.evaluate.against(sweep[0], {"other": sweep[1]}, k=3).found["other"].slope is None  # magnitudes of no unit
    with pytest.raises(InputError, match="regularisation=0"):
        hw.DAS(regularisation=0.0)
