"""Floors and representations on a diffusion task compare images, and features at noise events; not whatever else a noised batch holds."""

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.errors import InputError, TaskError
from headwater.tasks.diffusion.events import Drawn
from tests.influence.denoisers import Network, images, made

TRAIN, ASKED = images(12, 1), images(4, 2)


@pytest.fixture(scope="module", params=["bare", "with classes", "by name"])
def run(request, tmp_path_factory):
    classes = torch.arange(12) % 3
    network = made(Network, classes=0 if request.param == "bare" else 3)
    data = {"bare": TRAIN, "with classes": (TRAIN, classes), "by name": {"pictures": TRAIN, "y": classes}}[request.param]
    task = hw.tasks.Diffusion(hw.tasks.cosine(50), timesteps=4, images="pictures" if request.param == "by name" else "images")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    recorder = hw.Recorder(tmp_path_factory.mktemp("run") / "run", network, optimizer, task=task, train=data, steps=1)
    task.loss(network, data).mean().backward()
    optimizer.step()
    recorder.step(range(12))
    return recorder.finish()


def queries(run):
    """The asked-for images in the layout of the run's data."""
    held = run.stages[0].data.data
    if isinstance(held, dict):
        return {"pictures": ASKED, "y": held["y"][:4]}
    return (ASKED, held[1][:4]) if isinstance(held, tuple) else ASKED


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_inputs_are_the_images_without_noise(run, similarity):
    a, b = ASKED.numpy(), TRAIN.numpy()
    lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    truth = {"cosine": a @ b.T / lengths, "dot": a @ b.T, "l2": -np.linalg.norm(a[:, None] - b, axis=2)}[similarity]
    found = hw.trace(run, queries(run), hw.floors.inputs(similarity), progress=False).values
    assert np.allclose(found, truth, rtol=1e-9, atol=1e-9)


def test_representations_are_means_over_events(run):
    model, task = run.load(run.model(), run.checkpoints[-1]), run.stages[0].task

    def features(data):
        batch = task.examples(data).batch(range(4))
        assert isinstance(batch, Drawn) and batch.each == 4
        seen = []
        handle = model.leave.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        for event in range(batch.each):
            task.loss(model, batch.rows(slice(event, event + 1)))
        handle.remove()
        return torch.stack(seen).mean(0).numpy()

    held = run.stages[0].data.data
    some = {k: v[:4] for k, v in held.items()} if isinstance(held, dict) else tuple(v[:4] for v in held) if isinstance(held, tuple) else held[:4]
    found = hw.trace(run, queries(run), hw.Representations(similarity="dot"), progress=False).values[:, :4]
    assert np.allclose(found, features(queries(run)) @ features(some).T, rtol=1e-9)


def test_representations_at_events_of_their_own(run):
    """The middle layer at chosen timesteps, on both sides."""
    task, model = run.stages[0].task, run.load(run.model(), run.checkpoints[-1])
    grid = task.grid((5, 30), draws=2, seed=1)
    sides = []
    for data, ids in ((queries(run), range(4)), (run.stages[0].data.data, range(12))):
        batch, seen = task.examples(data).over(grid).batch(ids), []
        handle = model.enter.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out.detach()))
        task.loss(model, batch)
        handle.remove()
        sides.append(seen[0].unflatten(0, (len(ids), 4)).mean(1).numpy())
    found = hw.trace(run, queries(run), hw.Representations(layer="enter", similarity="dot", events=grid), progress=False)
    assert np.allclose(found.values, sides[0] @ sides[1].T, rtol=1e-9) and "(5, 30)" in found.method
    assert not np.allclose(found.values, hw.trace(run, queries(run), hw.Representations(layer="enter", similarity="dot"), progress=False).values, rtol=1e-2)


def test_an_embedding_of_ones_own_is_a_floor_too(run):
    def embed(batch):
        x = batch["pictures"] if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch
        return torch.stack([x.sum(1), x.square().sum(1)], 1)

    a, b = (embed(data).numpy() for data in (ASKED, TRAIN))
    assert np.allclose(hw.trace(run, queries(run), hw.floors.inputs("dot", embed=embed), progress=False).values, a @ b.T, rtol=1e-9)
    with pytest.raises(InputError, match="an embedding that returned shape"):
        hw.trace(run, queries(run), hw.floors.inputs("dot", embed=lambda batch: torch.zeros(3)), progress=False)


def test_gradient_norm_loss_and_cosine_are_of_mean_losses_over_the_tasks_events(run):
    """What they mean on a diffusion task: the loss at expected events, its gradient, and the angle between two of these."""
    task, model = run.stages[0].task, run.load(run.model(), run.checkpoints[-1])

    def gradients(data, n):
        losses = task.loss(model, task.examples(data).batch(range(n)))
        rows = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True, allow_unused=True) for v in losses]
        flat = [torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(model.parameters(), row, strict=True)]) for row in rows]
        return losses.detach().numpy(), torch.stack(flat).numpy()

    losses, train = gradients(run.stages[0].data.data, 12)
    _, asked = gradients(queries(run), 4)
    lengths = np.linalg.norm(train, axis=1)
    truth = [np.tile(losses, (4, 1)), np.tile(lengths, (4, 1)), asked @ train.T / lengths / np.linalg.norm(asked, axis=1)[:, None]]
    for found, expected in zip(hw.trace(run, queries(run), [hw.floors.loss(), hw.floors.gradient_norm(), hw.GradCos()], progress=False), truth, strict=True):
        assert np.allclose(found.values, expected, rtol=1e-9)


def test_classes_are_the_conditions(run):
    methods = [hw.floors.same_label(), hw.KNNShapley(k=3), hw.Representations(similarity="dot", labels="agree")]
    if isinstance(run.stages[0].data.data, torch.Tensor):
        for method in methods:
            with pytest.raises(InputError, match="no condition that is a class"):
                hw.trace(run, queries(run), method, progress=False)
        return
    same = (torch.arange(4) % 3)[:, None] == (torch.arange(12) % 3)[None]
    found, shapley, agree = (hw.trace(run, queries(run), method, progress=False).values for method in methods)
    assert np.array_equal(found, same.numpy())
    assert np.isfinite(shapley).all()
    plain = hw.trace(run, queries(run), hw.Representations(similarity="dot"), progress=False).values
    assert np.allclose(agree, np.where(same, plain, -plain), rtol=1e-12)


def test_trak_takes_the_loss_as_its_output_and_points_elsewhere_for_others(run):
    """Of minus the loss the push is 1: the kernel alone, which is D-TRAK of the loss at the same events."""
    task = run.stages[0].task
    found, exact = hw.trace(run, queries(run), [hw.Trak(output=task.output("loss")), hw.DTrak(output="loss", timesteps=4)], progress=False)
    assert np.allclose(found.values, exact.values, rtol=1e-8, atol=1e-12)
    doubled = hw.trace(run, queries(run), hw.Trak(output=lambda m, b: 2 * task.loss(m, b)), progress=False)  # f = 2 L: the push is -1/2, the kernel minus a half
    assert np.allclose(doubled.values, found.values / 4, rtol=1e-8, atol=1e-12)
    with pytest.raises(TaskError, match="the loss is no function"):
        hw.trace(run, queries(run), hw.Trak(output=task.output("square_norm")), progress=False)
    with pytest.raises(TaskError, match=r"hw.DTrak\(\)"):
        hw.trace(run, queries(run), hw.Trak(), progress=False)
