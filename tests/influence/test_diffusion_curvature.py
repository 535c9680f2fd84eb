"""Influence functions, SOURCE, ensembles and the index on diffusion models: closed forms of the linear denoiser, and exact unrolling of it."""

import numpy as np
import pytest
import torch
from torch import nn

import headwater as hw
from headwater.errors import InputError
from headwater.evaluate.accord import spearman
from tests.influence.denoisers import D, Linear, Network, T, close, images, made, trained

COSINE = hw.tasks.cosine(T)
N, RATE, STEPS = 60, 0.3, 90
TASK = hw.tasks.Diffusion(COSINE, timesteps=8, noise="example", seed=1)
TRAIN, ASKED = images(N, 1), images(6, 2)


def parts_of(task, data, model, asked=False):
    """phi (n, k, features), residuals (n, k, d) of each example and event."""
    examples = task.examples(data)
    batch = (examples.asked() if asked else examples).batch(range(len(data)))
    x = batch.signal[:, :, None] * data[:, None] + batch.noise[:, :, None] * batch.eps
    phi = Linear.phi(x.flatten(0, 1), batch.time.flatten()).unflatten(0, x.shape[:2])
    return phi, (phi @ model.fc.weight.T - batch.eps).detach()


def gradients(task, data, model, asked=False):
    """Of the mean squared error over events, ``(2/d) mean r phi^T``, (n, d, features)."""
    phi, r = parts_of(task, data, model, asked)
    return 2 / D * torch.einsum("nkd,nkf->ndf", r, phi) / phi.shape[1]


def second_moment(task, data):
    phi, _ = parts_of(task, data, made(Linear))
    phi = phi.flatten(0, 1)
    return phi.mT @ phi / len(phi)


@pytest.fixture(scope="module")
def descent(tmp_path_factory):
    """Gradient descent of the linear denoiser on its expected loss: the run, and its weights step by step."""
    torch.manual_seed(0)
    model = Linear()
    optimizer, held = torch.optim.SGD(model.parameters(), RATE), TASK.examples(TRAIN).batch(range(N))
    recorder = hw.Recorder(tmp_path_factory.mktemp("c") / "run", model, optimizer, task=TASK, train=TRAIN, checkpoints=6, steps=STEPS)
    weights = []
    for _ in range(STEPS):
        weights.append(model.fc.weight.detach().clone())
        optimizer.zero_grad()
        TASK.loss(model, held).mean().backward()
        optimizer.step()
        recorder.step(range(N))
    return recorder.finish(), weights


def values(run, method, **settings):
    return hw.trace(run, ASKED, method, progress=False, tolerance=0, **settings).values


# --------------------------------------------------------------------------------------------------------------- influence


@pytest.mark.parametrize("curvature", [hw.EKFAC(fisher="exact"), hw.Dense(fisher="exact")], ids=["EKFAC", "Dense"])
@pytest.mark.parametrize("damping", [0.3, 1e-3])
def test_influence_of_a_linear_denoiser_is_exact(descent, curvature, damping):
    """``H = (2/d) I (x) E[phi phi^T]``, over the events that curvature is estimated on; with the scale of the loss, which damping sees."""
    run, _ = descent
    model = run.load(run.model(), STEPS)
    h = 2 / D * second_moment(TASK, TRAIN) + damping * torch.eye(D + 2, dtype=torch.float64)
    truth = torch.einsum("qdf,ndf->qn", gradients(TASK, ASKED, model, asked=True) @ torch.linalg.inv(h), gradients(TASK, TRAIN, model)) / N
    assert close(values(run, hw.Influence(damping=damping, curvature=curvature)), truth, 1e-9)


def test_a_sampled_fisher_has_the_scale_of_the_loss(descent):
    """Noise of unit variance in place of ``sqrt(d/2)`` would make H too small by 2/d, and scores too large by as much: seen at any damping."""
    run, _ = descent
    for damping in (0.01, 0.1):
        exact, sampled = (values(run, hw.Influence(damping=damping, curvature=hw.EKFAC(fisher=fisher))) for fisher in ("exact", "sampled"))
        slope = float((exact * sampled).sum() / (sampled**2).sum())
        assert abs(slope - 1) < 0.1 and np.corrcoef(exact.ravel(), sampled.ravel())[0, 1] > 0.98


def test_at_one_event_influence_is_the_published_closed_form(tmp_path):
    """``(4/d^2) (r_q . r_i) phi_q^T ((2/d) C + lambda I)^-1 phi_i / N``."""
    task = hw.tasks.Diffusion(COSINE, timesteps=(20,), noise="example")
    run = trained(tmp_path / "run", made(Linear), task, TRAIN, checkpoints=[60]).finish()
    model = run.load(run.model(), run.checkpoints[-1])
    (phi_q, r_q), (phi, r) = parts_of(task, ASKED, model, asked=True), parts_of(task, TRAIN, model)
    h = 2 / D * second_moment(task, TRAIN) + 0.01 * torch.eye(D + 2, dtype=torch.float64)
    truth = 4 / D**2 * (r_q[:, 0] @ r[:, 0].mT) * (phi_q[:, 0] @ torch.linalg.solve(h, phi[:, 0].mT)) / N
    assert close(values(run, hw.Influence(damping=0.01, curvature=hw.EKFAC(fisher="exact"))), truth, 1e-9)


# ------------------------------------------------------------------------------------------------------------------ SOURCE


def unrolled(weights):
    """Exactly: the derivative of the last weights by each example's weight in every step's mean, (n, d, features)."""
    contraction = torch.eye(D + 2, dtype=torch.float64) - RATE * 2 / D * second_moment(TASK, TRAIN)
    model, delta = Linear(), torch.zeros(N, D, D + 2, dtype=torch.float64)
    for w in weights:
        model.fc.weight.data = w
        delta = delta @ contraction - RATE / N * gradients(TASK, TRAIN, model)
    return delta


def test_source_agrees_with_exact_unrolling_of_the_linear_denoiser(descent):
    """In rank and in size: one slope of 1, at the loss that training minimised and with the Gauss-Newton matrix at its scale."""
    run, weights = descent
    model = run.load(run.model(), STEPS)
    truth = -torch.einsum("qdf,ndf->qn", gradients(TASK, ASKED, model, asked=True), unrolled(weights)).numpy()
    for curvature in (hw.EKFAC(fisher="exact"), hw.EKFAC(fisher="sampled")):
        found = values(run, hw.Source(segments=3, curvature=curvature))
        assert spearman(found, truth).mean() > 0.99
        assert abs(float((found * truth).sum() / (found**2).sum()) - 1) < 0.1
    dot = values(run, hw.GradDot())
    assert spearman(dot, truth).mean() < spearman(found, truth).mean()


def test_source_and_influence_run_on_any_task_of_this_kind(tmp_path):
    """Every loss and prediction: finite, the diagonal positive, and the same in batches of any size."""
    for prediction, loss in (("v", "l1"), ("flow", "huber")):
        process = hw.tasks.flow(T) if prediction == "flow" else hw.tasks.cosine(T, prediction)
        task = hw.tasks.Diffusion(process, loss=loss, timesteps=3)
        run = trained(tmp_path / prediction, made(Network), task, TRAIN[:12], checkpoints=2).finish()
        for method in (hw.Source(segments=2), hw.Influence(damping=0.1)):
            found = hw.self_influence(run, method, progress=False).values
            assert np.isfinite(found).all() and (found > 0).all()
            assert close(hw.trace(run, ASKED, method, progress=False, batch_size=5).values, hw.trace(run, ASKED, method, progress=False).values, 1e-8)


# ------------------------------------------------------------------------------------------------------ ensembles and index


class Dropping(Network):
    """With dropout between its layers."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x, t):
        return self.leave(self.drop(torch.tanh(self.enter(Linear.phi(x, t)))))


SHARED = hw.tasks.Diffusion(COSINE, timesteps=4)
METHODS = [hw.DiffusionTracIn((3, 20)), hw.DiffusionReTrac((3, 20), events="replay"), hw.DAS(dim=8, timesteps=(3, 20))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("e")
    return [trained(path / str(k), made(Dropping, seed=k), SHARED, TRAIN[:12], checkpoints=[6, 12], seed=k).finish() for k in range(3)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_ensembles_of_these_methods_are_means_with_errors(runs, method):
    found = hw.trace(runs[0], ASKED, hw.Ensemble(method, runs), progress=False)
    if not isinstance(method, hw.DAS):  # whose members have projections of their own
        each = np.stack([hw.trace(run, ASKED, method, progress=False).values for run in runs])
        assert close(found.values, each.mean(0), 1e-10) and close(found.stderr, each.std(0, ddof=1) / 3**0.5, 1e-8)
    assert found.stderr.shape == found.values.shape and found.stderr.min() > 0
    masked = hw.trace(runs[0], ASKED, hw.DropoutEnsemble(method, members=3), progress=False)
    assert masked.stderr.max() > 0 and np.isfinite(masked.values).all()


def test_checkpoints_are_members_too(runs):
    method = hw.DTrak(timesteps=(3, 20))
    found = hw.trace(runs[0], ASKED, hw.CheckpointEnsemble(method), progress=False)
    each = np.stack([hw.trace(runs[0].until(step), ASKED, method, progress=False).values for step in (6, 12)])
    assert close(found.values, each.mean(0), 1e-10)


def test_an_index_answers_what_needs_one_gradient_an_example_and_refuses_the_rest(runs):
    index = hw.index(runs[0], segments=2, progress=False)
    for method in (hw.GradDot(), hw.GradCos(), hw.TracIn(), hw.Influence(damping=0.1), hw.Source(segments=2)):
        truth = hw.trace(runs[0], ASKED, method, progress=False, tolerance=0).values
        assert close(hw.trace(index, ASKED, method, progress=False, tolerance=0).values, truth, 1e-8)
    for method in (hw.DiffusionTracIn(), hw.DiffusionReTrac(), hw.DiffusionTracIn(events="replay")):
        with pytest.raises(InputError, match="noise events of its own choice"):
            hw.trace(index, ASKED, method, progress=False)
    for method in (hw.DTrak(), hw.DAS(), hw.JourneyTrak()):
        with pytest.raises(InputError, match="trace the run for others"):
            hw.trace(index, ASKED, method, progress=False)
