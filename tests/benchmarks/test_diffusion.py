"""The diffusion evidence in miniature: it runs, goes on where it was, and its measures are what they say. Never a word about values or times."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import diffusion_specificity  # noqa: E402
import diffusion_tables  # noqa: E402
import diffusion_truth  # noqa: E402
from diffusion_methods import PAIRS, RANDOM, methods, sweeps  # noqa: E402
from diffusion_networks import UNet, cifar, networks  # noqa: E402
from diffusion_trainings import Denoiser, Training, digits, generate  # noqa: E402

import headwater as hw  # noqa: E402


@pytest.fixture(scope="module")
def court(tmp_path_factory):
    trial = diffusion_truth.lean(diffusion_truth.Trial())
    return diffusion_truth.Court(trial, tmp_path_factory.mktemp("truth"))


def test_retraining_is_told_whole_and_goes_on_where_it_was(court):
    found = json.loads(json.dumps(dict(diffusion_truth.parts(court))))
    text = diffusion_tables.truth(found)
    for name in (*methods(court.trial.training), *sweeps()):
        assert name.replace("several models", "2 models") in text
    assert "nan" not in text and "Journey-TRAK" in text
    files = {f: f.stat().st_mtime_ns for f in court.place.rglob("*.np[yz]")}
    again = json.loads(json.dumps(dict(diffusion_truth.parts(diffusion_truth.Court(court.trial, court.place)))))
    assert again == found and files == {f: f.stat().st_mtime_ns for f in court.place.rglob("*.np[yz]")}


def test_values_are_chosen_by_queries_that_judge_nothing(court):
    groups = court.trial.groups
    assert not set(groups["aside"]) & (set(groups["generated"]) | set(groups["held-out"]))
    for sweep in court.sweeps.values():
        assert sweep["chosen"] == max(sweep["tried"], key=lambda row: row["aside"])["value"]


def test_removals_train_without_the_top_examples(court):
    ids = np.array([3, 1, 2, 0, 5, 4])
    moved, grown = court.without(ids, 0)
    t = court.trial
    experiment = t.training.experiment()
    with hw_settled(diffusion_truth.RECORDED):
        model = experiment.build()
        experiment.fit(model, experiment.train[6:], diffusion_truth.RECORDED)
    assert moved == pytest.approx(float((generate(model, t.training.process, range(t.traced))[0] - court.queries[0]).norm()), rel=1e-5)
    with torch.no_grad():
        change = court.judging.loss(model, court.queries[:1]) - court.judging.loss(diffusion_truth.final(court.run()), court.queries[:1])
    assert grown == pytest.approx(float(change[0]), abs=1e-6)


def hw_settled(seed):
    from headwater.training import settled

    return settled(seed, threads=1)


def test_specificity_is_told_and_its_measures_are_counts(tmp_path):
    trial = diffusion_specificity.lean(diffusion_specificity.Trial())
    found = diffusion_specificity.gather(trial, 0, tmp_path / "a")
    assert diffusion_specificity.gather(trial, 0, tmp_path / "a") == found
    text = diffusion_tables.specificity({"cosine, MSE": [found]})
    assert "at most a third" in text and all(name in text for name in found["methods"])
    run, (queries, parts) = trial.training.record(tmp_path / "a" / "run", 0), (None, None)
    queries, parts = diffusion_specificity.asked(trial, run, tmp_path)
    scores = hw.trace(run, queries, hw.DiffusionTracIn(trial.timesteps, trial.draws), progress=False)
    measures = found["methods"]["TracIn, expected, shared noise"]
    lists = np.argsort(-scores.values[: trial.generated], axis=1, kind="stable")[:, :10]
    assert measures["distinct"] == len(np.unique(lists))
    foreign = digits(trial.training.common, trial.training.foreign).foreign
    own = np.argsort(-scores.values[list(parts["own sevens"])], axis=1, kind="stable")[:, :10]
    assert measures["own sevens"] == pytest.approx(foreign[own].mean())


def test_lengths_are_those_of_autograd(tmp_path):
    training = diffusion_specificity.lean(diffusion_specificity.Trial()).training
    run = training.record(tmp_path / "run", 0)
    task = run.stages[0].task
    grid = task.grid((10, 500), noise="example", seed=5)
    found = diffusion_specificity.event_lengths(run, run.checkpoints[-1], grid)
    model, batch = run.load(run.model(), run.checkpoints[-1]), run.stages[0].data.over(grid).batch([7])
    for event in range(2):
        model.zero_grad()
        (task.loss(model, batch.rows(slice(event, event + 1))).sum() * batch.each).backward()
        assert found[7, event] == pytest.approx(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()), rel=1e-4)


def test_an_image_is_its_seeds_alone():
    torch.manual_seed(0)
    model, process = Denoiser(8), Training().process
    seen = {}
    together = generate(model, process, range(3), lambda t, clean: seen.update({t: clean}))
    alone = generate(model, process, [2])
    assert torch.allclose(together[2], alone[0], atol=1e-5) and torch.allclose(seen[0], together, atol=1e-5) and len(seen) == process.steps


def test_a_held_target_is_told_from_one_that_fails():
    def seed(before, after):
        other = {"widespread": 1}
        return {"methods": {"TracIn, replayed": {"widespread": before}, "ReTrac, expected, shared noise": {"widespread": after},
                            "ReTrac, replayed": other, "TracIn, expected, shared noise": other}}  # fmt: skip

    text = diffusion_tables.targets({"holds": [seed(9, 3), seed(6, 0)], "fails once": [seed(9, 4), seed(6, 2)], "nothing to bring down": [seed(0, 0)]})
    rows = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| ")}
    assert rows["holds"] == "yes" and rows["fails once"] == "1 of 2 seeds" and rows["nothing to bring down"] == "yes"


def test_the_networks_are_denoisers_and_the_large_one_has_the_published_size():
    for network in networks(tiny=True).values():
        out = network.build()(torch.randn(2, *network.shape), torch.tensor([3, 900]))
        assert getattr(out, "sample", out).shape == (2, *network.shape)
    with torch.device("meta"):
        assert round(sum(p.numel() for p in cifar().parameters()) / 1e6, 1) == 35.7  # Ho et al. 2020, appendix B
    assert isinstance(networks()["UNet, 16 x 16"].build(), UNet)


def test_pairs_name_methods():
    known = {*methods(Training()), *sweeps(), RANDOM}
    assert all(a in known and b in known for a, b in PAIRS)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["diffusion_speed.py", "gpu_diffusion.py"])
def test_speed_is_measured_in_miniature(script):
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / script), "--tiny", *(["--repeats", "1"] if "speed" in script else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    assert "ReTrac" in done.stdout and "nan" not in done.stdout
