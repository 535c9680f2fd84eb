"""Floors and representations on a diffusion task compare images, and features at noise events; not whatever else a noised batch holds."""

import numpy as np
import pytest
import torch
from tests.influence.denoisers import Network, images, made

import headwater as hw
from headwater.tasks.diffusion.events import Drawn

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
