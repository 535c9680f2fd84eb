"""Diffusion models on the command line: recorded, traced by each word, measured."""

import pytest
import torch
from typer.testing import CliRunner

import headwater as hw
from headwater import cli

EXPERIMENT = '''
"""Tiny pictures, denoised."""
import torch
import headwater as hw

draw = torch.Generator().manual_seed(0)
x = torch.rand(26, 1, 8, 8, generator=draw) * 2 - 1
task = hw.tasks.Diffusion(hw.tasks.linear(), timesteps=3)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = torch.nn.Linear(65, 8), torch.nn.Linear(8, 64)

    def forward(self, x, t):
        return self.leave(torch.tanh(self.enter(torch.cat([x.flatten(1), t[:, None] / 1000], 1)))).view_as(x)


def fit(model, train, seed, recorder=None):
    optimizer, order = torch.optim.Adam(model.parameters(), lr=0.01), torch.Generator().manual_seed(seed)
    if recorder:
        recorder.watch(model, optimizer, steps=20)
    for _ in range(20):
        events = task.draw(len(train), order)
        loss = task.loss(model, task.noised(train, events)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if recorder:
            recorder.step(range(len(train)), events=events)
    return model


experiment = hw.Experiment(Net, x[:20], x[20:], task, fit, "pictures")
'''


def call(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "pictures.py").write_text(EXPERIMENT)
    assert call("record", folder / "pictures.py", "--out", folder / "run", "--checkpoints", 2).exit_code == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("word", "options", "method"),
    [
        ("diffusion-tracin", ("--timesteps", 4), hw.DiffusionTracIn(timesteps=4)),
        ("diffusion-retrac", ("--timesteps", 2, "--draws", 2), hw.DiffusionReTrac(timesteps=2, draws=2)),
        ("dtrak", ("--timesteps", 3), hw.DTrak(timesteps=3)),
        ("das", ("--timesteps", 3), hw.DAS(timesteps=3)),
        ("influence", (), hw.Influence()),
        ("unrolled", (), hw.Unrolled()),
    ],
)
def test_every_method_of_diffusion_has_its_word(recorded, word, options, method):
    done = call("trace", recorded, "--method", word, *options, "--queries", "0-2", "--out", recorded / "s.safetensors")
    assert done.exit_code == 0, done.output
    experiment = hw.Experiment.load(recorded.parent / "pictures.py")
    straight = hw.trace(experiment.open(recorded), experiment.test[:3], method, progress=False)
    torch.testing.assert_close(torch.from_numpy(hw.load(recorded / "s.safetensors").values), torch.from_numpy(straight.values))


def test_a_page_shows_the_pictures(recorded):
    page = recorded / "owed.html"
    assert call("trace", recorded, "--method", "diffusion-retrac", "--queries", "0,1", "--html", page).exit_code == 0
    assert page.read_text().count("data:image/png") >= 4


def test_worst_means_hardest_to_denoise(recorded):
    done = call("trace", recorded, "--method", "diffusion-tracin", "--queries", "worst", "--timesteps", 2)
    assert done.exit_code == 0 and "test example 5" in done.output


def test_evaluate_measures_diffusion_too(recorded):
    done = call("evaluate", recorded, "--subsets", 3, "--seeds", 1, "--workers", 1, "--methods", "diffusion-retrac,graddot")
    assert done.exit_code == 0 and "DiffusionReTrac" in done.output, done.output


def test_what_does_not_fit_is_said(recorded):
    done = call("trace", recorded, "--method", "diffusion-retrac", "--damping", "0.1")
    assert done.exit_code == 2 and "--damping only with --method influence" in " ".join(done.output.split())
    done = call("trace", recorded, "--method", "dtrack")
    assert done.exit_code == 2 and "dtrak" in done.output
