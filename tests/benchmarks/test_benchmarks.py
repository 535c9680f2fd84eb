"""The speed benchmarks run in miniature, and what they compare is equal. Never a word about time."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from speed import contestant, problem, tables  # noqa: E402
from speed.meter import Meter, cpu_seconds  # noqa: E402

np = pytest.importorskip("numpy")


def run(*arguments, cwd):
    command = [sys.executable, str(BENCHMARKS / "run.py"), *arguments, "--tiny", "--repeats", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("problem")
    problem.make(place, [784, 12, 10], 40, 6)
    return place


def scores(place, label):
    return np.load(place / f"scores-{label}.npy")


@pytest.mark.parametrize("part", ["ekfac_mlp", "graddot", "scaling", "gpt2", "index", "unrolled"])
def test_every_part_prints_its_tables(part, tmp_path):
    printed = run(part, "--place", str(tmp_path), cwd=tmp_path)
    assert "| Headwater" in printed or "Headwater |" in printed or "training examples |" in printed or "from the index |" in printed or "states kept" in printed
    assert "in miniature" in printed and "torch" in printed
    assert "nan" not in printed


def test_headwater_is_measured_by_stage_and_its_tolerance_is_kept(place):
    report = contestant.run("headwater_side:influence", place, damping=1e-2, label="ours")
    contestant.run("headwater_side:influence", place, damping=1e-2, label="exact", tolerance=0.0)
    assert set(report["cpu"]) == {"set-up", "covariance", "eigendecomposition", "eigenvalue correction", "scores"}
    assert 0 < report["above"] < report["peak"] and report["dimension"] > 0
    assert np.linalg.norm(scores(place, "ours") - scores(place, "exact")) <= 1e-3 * np.linalg.norm(scores(place, "exact"))


def test_equal_factors_give_the_scores_of_kronfluence(place):
    pytest.importorskip("kronfluence")
    contestant.run("headwater_side:influence", place, damping=1e-2, label="exact", tolerance=0.0)
    contestant.run("kronfluence_side:influence", place, dampings=[1e-2], labels=["theirs"], batches=[16, 4, 16])
    difference, _, spearman = map(float, tables.agreement(scores(place, "exact"), scores(place, "theirs")))
    assert difference <= 1e-4 and spearman >= 0.9999


def test_grad_dot_is_that_of_dattri(place):
    pytest.importorskip("dattri")
    contestant.run("headwater_side:graddot", place, label="dot")
    contestant.run("dattri_side:graddot", place, label="theirs", batch=16)
    difference, _, spearman = map(float, tables.agreement(scores(place, "dot"), scores(place, "theirs")))
    assert difference <= 1e-4 and spearman >= 0.9999


def test_what_is_written_replaces_its_own_part_only(tmp_path, monkeypatch):
    import run as benchmarks

    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path / "RESULTS.md")
    benchmarks.write("a", "alpha\n")
    benchmarks.write("b", "beta\n")
    benchmarks.write("a", "gamma \\1\n")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "alpha" not in text and text.index("gamma \\1") < text.index("beta")


def test_a_stage_inside_another_is_booked_once():
    meter = Meter()
    start = cpu_seconds()
    with meter.stage("outer"):
        sum(range(10**6))
        with meter.stage("inner"):
            sum(range(10**6))
    spent = sum(meter.report()["cpu"].values())
    assert meter.stages["inner"][1] > 0 and spent <= cpu_seconds() - start + 1e-9


def test_agreement_sees_scale_sign_and_order():
    reference = np.arange(12.0).reshape(2, 6)
    assert tables.agreement(reference, reference) == ["0.0e+00", "0.0e+00", "1.000000"]
    assert float(tables.agreement(2 * reference, reference)[0]) == 1.0
    assert float(tables.agreement(-reference, reference)[2]) == -1.0
