"""The command line: what it prints is what the door computes, and whatever goes wrong says what to do."""

import re
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import headwater as hw
from headwater import cli
from headwater.cli import asking
from headwater.errors import HeadwaterError, InputError, QueryError

EXPERIMENT = '''
"""Two classes in the plane."""
import torch
import headwater as hw

draw = torch.Generator().manual_seed(0)
x = torch.randn(70, 2, generator=draw)
y = (x.sum(1) + torch.randn(70, generator=draw) > 0).long()


def build():
    return torch.nn.Linear(2, 2)


def fit(model, train, seed, recorder=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    if recorder:
        recorder.watch(model, optimizer, steps=30)
    for step in range(30):
        if step == STOP_AT:
            raise KeyboardInterrupt
        loss = torch.nn.functional.cross_entropy(model(train[0]), train[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if recorder:
            recorder.step(range(len(train[1])))
    return model


STOP_AT = None
experiment = hw.Experiment(build, (x[:40], y[:40]), (x[40:], y[40:]), hw.tasks.Classification(), fit, "plane")
'''


def call(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


@pytest.fixture
def file(tmp_path):
    place = tmp_path / "plane.py"
    place.write_text(EXPERIMENT)
    return place


@pytest.fixture
def recorded(file, tmp_path):
    done = call("record", file, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    return tmp_path / "run"


# ---- it does what the door does


def test_a_recorded_run_can_be_traced_by_its_path_alone(recorded, file, tmp_path):
    done = call("trace", recorded, "--queries", "3,0", "--top", 2, "--out", tmp_path / "s.safetensors")
    assert done.exit_code == 0, done.output
    experiment = hw.Experiment.load(file)
    asked = tuple(column[[3, 0]] for column in experiment.test)
    expected = hw.trace(experiment.open(recorded), asked, hw.Source(), progress=False)
    kept = hw.load(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(kept.values, expected.values)
    assert kept.query_names == ("test example 3", "test example 0")
    ids, scores = next(iter(expected.top(1)))
    assert f"▲ {scores[0]:+.3g} #{ids[0]} label {int(experiment.train[1][ids[0]])}" in done.output
    assert f"headwater evaluate {recorded}" in done.output


def test_method_options_reach_the_method(recorded, tmp_path):
    for words, expected in (("source --segments 2", "Source(segments=2"), ("influence --damping 0.5", "Influence(damping=0.5)"), ("graddot", "GradDot()")):
        assert call("trace", recorded, "--method", *words.split(), "--out", tmp_path / "s").exit_code == 0
        assert hw.load(tmp_path / "s").method.startswith(expected)


def test_wrong_means_misclassified_and_worst_means_lowest_measure(recorded, file):
    experiment = hw.Experiment.load(file)
    run = experiment.open(recorded)
    model = run.load(run.model(), run.checkpoints[-1])
    images, labels = experiment.test
    wrong = (model(images).argmax(1) != labels).nonzero().flatten().tolist()
    assert asking.chosen("wrong", experiment, run).tolist() == wrong != []
    measure = experiment.task.measure(model, experiment.test)
    assert asking.chosen("worst", experiment, run).tolist() == measure.argsort(stable=True)[:10].tolist()
    assert asking.chosen("all", experiment, run).tolist() == list(range(30))


def test_a_page_of_scores_shows_every_query_and_needs_nothing_else(recorded, tmp_path):
    assert call("trace", recorded, "--queries", "0-2", "--html", tmp_path / "owed.html").exit_code == 0
    page = (tmp_path / "owed.html").read_text()
    assert page.count('data-testid="attribution"') == 3
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)


def test_evaluate_prints_the_lds_of_its_bank(recorded, file, tmp_path):
    words = ["--subsets", 4, "--seeds", 2, "--workers", 1, "--queries", "0-9", "--methods", "graddot,source", "--html", tmp_path / "trust.html"]
    done = call("evaluate", recorded, *words)
    assert done.exit_code == 0, done.output
    experiment = hw.Experiment.load(file)
    bank = hw.evaluate.Bank.open(tmp_path / "run-bank").at(range(10))
    asked = tuple(column[:10] for column in experiment.test)
    for scores in hw.trace(experiment.open(recorded), asked, [hw.GradDot(), hw.Source()], progress=False):
        found = hw.evaluate.lds(scores, bank)
        assert re.search(rf"{re.escape(scores.method)} .*{found.mean:.2f}\s+{found.low:.2f} to {found.high:.2f}", done.output)
    assert re.search(rf"noise ceiling .*{found.ceiling:.2f}", done.output)
    assert "bars" in (tmp_path / "trust.html").read_text()


def test_a_sweep_of_dampings_is_reported_one_by_one(recorded):
    done = call("evaluate", recorded, "--subsets", 2, "--seeds", 1, "--workers", 1, "--methods", "influence", "--damping", "0.1,1")
    assert done.exit_code == 0, done.output
    assert "Influence(damping=0.1)" in done.output and "Influence(damping=1)" in done.output


# ---- it says what to do


def test_what_cannot_be_done_is_said_in_three_lines(recorded, file, tmp_path):
    nothing = tmp_path / "nothing"
    empty = tmp_path / "empty.py"
    empty.write_text('"""No experiment."""')
    cases = [
        (["trace", nothing], "holds no run"),
        (["evaluate", tmp_path], "holds no run"),
        (["record", tmp_path / "gone.py"], "is not a file"),
        (["record", empty], "defines no experiment"),
        (["record", file, "--out", recorded], "overwrite"),
        (["trace", recorded, "--method", "sauce"], "did you mean source?"),
        (["trace", recorded, "--method", "tracin", "--segments", "2"], "only with --method source"),
        (["trace", recorded, "--queries", "3-"], "numbers and ranges"),
        (["trace", recorded, "--queries", "99"], "from 0 to 29"),
        (["trace", recorded, "--segments", "50"], "checkpoint"),
        (["evaluate", recorded, "--methods", "influence", "--damping", "much"], "numbers with commas"),
    ]
    for words, expected in cases:
        done = call(*words)
        assert done.exit_code == 2, (words, done.output)
        assert expected in done.stderr
        assert all(f"{name}: " in done.stderr for name in ("Given", "Expected", "To mend it")), done.stderr
        assert "Traceback" not in done.output


def test_an_experiment_that_moved_is_asked_for(recorded, file, tmp_path):
    moved = file.rename(tmp_path / "moved.py")
    assert "--experiment FILE.py" in call("trace", recorded).stderr
    assert call("trace", recorded, "--experiment", moved, "--queries", "0").exit_code == 0


def test_a_recording_by_hand_asks_for_its_experiment(recorded):
    (recorded / asking.BESIDE).unlink()
    done = call("trace", recorded)
    assert (done.exit_code, "--experiment FILE.py" in done.stderr) == (2, True)


def test_wrong_flags_and_missing_arguments_are_refused():
    for words in (["trace", "run", "--bogus"], ["trace"], ["sing"], ["trace", "run", "--top", "0"]):
        assert call(*words).exit_code == 2


def test_ctrl_c_says_how_to_go_on(file, tmp_path):
    file.write_text(EXPERIMENT.replace("STOP_AT = None", "STOP_AT = 5"))
    done = call("record", file, "--out", tmp_path / "run")
    assert done.exit_code == 130
    assert "--overwrite" in done.stderr


def test_debug_shows_the_error_itself_wherever_it_stands(monkeypatch, tmp_path):
    for words in (["--debug", "trace", str(tmp_path)], ["trace", str(tmp_path), "--debug"]):
        monkeypatch.setattr(sys, "argv", ["headwater", *words])
        with pytest.raises(HeadwaterError):
            cli.main()
    monkeypatch.setattr(sys, "argv", ["headwater", "trace", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


# ---- it is quick, and it teaches


def test_help_does_not_wait_for_torch():
    code = "import sys\nfrom headwater.cli import main\nsys.argv[1:] = ['--help']\ntry: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("False"), done.stdout + done.stderr


def test_every_command_says_what_comes_next():
    overview = call("--help").output
    for command in ("demo", "record", "trace", "evaluate", "doctor"):
        said = call(command, "--help")
        assert said.exit_code == 0 and command in overview
        assert command == "doctor" or "Example:" in said.output or "Next:" in said.output


def test_version():
    assert call("--version").output.strip() == f"headwater {hw.__version__}"


# ---- what words mean


def test_ranges_are_read_in_the_order_given_without_repeats():
    assert asking.ranges("5-7, 2,6", 10).tolist() == [5, 6, 7, 2]
    assert asking.ranges("0-99", 3).tolist() == [0, 1, 2]
    for text in ("", "a", "3-1", "-1", "1,,2", "3"):
        with pytest.raises(QueryError):
            asking.ranges(text, 3)


def test_methods_by_the_names_people_type():
    assert asking.method("Grad-Dot") == hw.GradDot()
    assert asking.method("SOURCE", segments=2) == hw.Source(segments=2)
    with pytest.raises(InputError, match="one of source"):
        asking.method("xyz")
