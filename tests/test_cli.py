"""The command line: what it prints is what the door computes, and whatever goes wrong says what to do."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import headwater as hw
from headwater import cli
from headwater.cli import asking
from headwater.cli.naming import Asked
from headwater.errors import HeadwaterError, InputError, QueryError
from headwater.result.interactions import InteractionScores

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


def test_every_rung_of_the_ladder_has_its_word(recorded, file, tmp_path):
    experiment = hw.Experiment.load(file)
    run = experiment.open(recorded)
    asked = tuple(column[:3] for column in experiment.test)
    words = {"trak --dim 6": hw.Trak(dim=6), "logra --dim 2": hw.LoGra(dim=2), "knn-shapley": hw.KNNShapley(), "unrolled": hw.Unrolled()}
    for said, method in words.items():
        done = call("trace", recorded, "--method", *said.split(), "--queries", "0-2", "--out", tmp_path / "s")
        assert done.exit_code == 0, done.output
        np.testing.assert_array_equal(hw.load(tmp_path / "s").values, hw.trace(run, asked, method, progress=False).values)


def test_runs_beside_a_run_are_averaged_with_it(recorded, file, tmp_path):
    other = tmp_path / "other"
    assert call("record", file, "--out", other, "--seed", 1).exit_code == 0
    done = call("trace", recorded, "--beside", other, "--method", "graddot", "--queries", "0", "--out", tmp_path / "s")
    assert done.exit_code == 0, done.output
    experiment = hw.Experiment.load(file)
    each = [hw.trace(experiment.open(place), tuple(column[:1] for column in experiment.test), hw.GradDot(), progress=False).values for place in (recorded, other)]
    kept = hw.load(tmp_path / "s")
    np.testing.assert_allclose(kept.values, np.mean(each, axis=0), rtol=1e-6)
    assert kept.stderr is not None


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


# ---- explain


def explained(*words, out):
    done = call("explain", *words, "--out", out)
    assert done.exit_code == 0, done.output
    return hw.load(out), done.output


def last_model(recorded, file):
    run = hw.Experiment.load(file).open(recorded)
    return run.load(run.model(), run.checkpoints[-1])


def test_a_recorded_run_is_explained_by_its_path_alone(recorded, file, tmp_path):
    scores, said = explained(recorded, "--queries", "3,0", out=tmp_path / "why.safetensors")
    model, x = last_model(recorded, file), hw.Experiment.load(file).test[0][[3, 0]]
    weight, chosen = model.weight.detach(), model(x).argmax(1)
    np.testing.assert_allclose(scores.values, (weight[chosen] * x).numpy(), rtol=1e-5, atol=1e-6)  # a linear model, in closed form
    assert scores.example_names == ("test example 3", "test example 0")
    assert "the output of the predicted class against zeros" in " ".join(said.split())
    assert "test example 3" in said and "Every example met the tolerance" in said and f"headwater trace {recorded}" in said


def test_targets_are_what_their_words_say(recorded, file, tmp_path):
    model, (x, y) = last_model(recorded, file), (column[:6] for column in hw.Experiment.load(file).test)
    weight, predicted, wrong = model.weight.detach(), model(x).argmax(1), None
    wrong = np.flatnonzero((model(hw.Experiment.load(file).test[0]).argmax(1) != hw.Experiment.load(file).test[1]).numpy())
    cases = {"1": weight[1] * x, "label": weight[y] * x, "predicted": weight[predicted] * x, "1-0": (weight[1] - weight[0]) * x}
    cases["measure"] = (2 * y[:, None] - 1) * (weight[1] - weight[0]) * x  # the log-odds of one of two classes
    for word, expected in cases.items():
        scores, _ = explained(recorded, "--queries", "0-5", "--target", word, out=tmp_path / "s")
        np.testing.assert_allclose(scores.values, expected.numpy(), rtol=1e-4, atol=1e-6, err_msg=word)
    scores, said = explained(recorded, "--queries", "wrong", "--target", "predicted-label", out=tmp_path / "s")
    assert scores.n == len(wrong) > 0 and (scores.output > 0).all()
    assert "the output of the predicted class minus that of the example's own label" in " ".join(said.split())
    scores, _ = explained(recorded, "--queries", "0-5", "--target", "loss", "--tolerance", "1e-4", out=tmp_path / "s")
    np.testing.assert_allclose(scores.output, hw.Experiment.load(file).task.loss(model, (x, y)).detach(), rtol=1e-5)


def test_baselines_are_what_their_words_say(recorded, file, tmp_path):
    experiment = hw.Experiment.load(file)
    model, (train, labels), (x, y) = last_model(recorded, file), experiment.train, tuple(column[:4] for column in experiment.test)
    row = tmp_path / "row.npy"
    np.save(row, np.array([0.25, -1.0], np.float32))
    cases = {
        "zeros": 0.0,
        "0.5": 0.5,
        "constant:-1": -1.0,
        "mean": train.mean(0),
        "row:7": train[7],
        "data:40": train.mean(0),  # all of them
        "0,1": 0.5,  # a linear model: the average over baselines is their average
        str(row): np.load(row),
        "nearest": hw.baselines.nearest(train, labels, y),
        "blur:2": hw.baselines.blur(2),
        "uniform:3": hw.baselines.uniform(draws=3),
    }
    for word, expected in cases.items():
        scores, _ = explained(recorded, "--queries", "0-3", "--target", "1", "--baseline", word, out=tmp_path / "s")
        right = hw.explain(model, x, 1, baseline=expected, progress=False)
        np.testing.assert_allclose(scores.values, right.values, rtol=1e-4, atol=1e-5, err_msg=word)
    assert explained(recorded, "--baseline", "row:7", out=tmp_path / "s")[0].baseline == "example 7 of the training set"
    assert explained(recorded, "--baseline", "data:8", out=tmp_path / "s")[0].stderr is not None


def test_of_many_examples_a_terminal_is_shown_the_first(recorded, tmp_path):
    scores, said = explained(recorded, "--queries", "all", "--show", "waterfall", "--html", tmp_path / "all.html", out=tmp_path / "s")
    assert scores.n == 30 and len(re.findall("^ +output at the baseline", said, re.M)) == 5 and "Shown are 5 of 30 examples" in said
    assert len(re.findall(r"^test example \d+ .* met$", said, re.M)) == 15 and "and 15 lines more" in said
    assert (tmp_path / "all.html").read_text().count('data-testid="waterfall"') > 20


def test_paths_points_and_layers_reach_the_door(file, tmp_path):
    file.write_text(EXPERIMENT.replace("torch.nn.Linear(2, 2)", "torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))"))
    assert call("record", file, "--out", tmp_path / "run").exit_code == 0
    cases = {
        ("--points", "5"): "Gauss-Legendre(5)",
        ("--tolerance", "1e-3"): "adaptive, tolerance 0.001",
        (): "adaptive, tolerance 0.01",
        ("--path", "guided:7"): "a guided path of 7 steps",
        ("--path", "blur:2", "--tolerance", "0.1"): "a path from blurred (sigma 2) to sharp",
        ("--layer", "0"): "layer 0",
    }
    for words, expected in cases.items():
        scores, _ = explained(tmp_path / "run", "--queries", "0-2", *words, out=tmp_path / "s")
        assert expected in scores.method, (words, scores.method)
        assert scores.values.shape == (3, 5 if "--layer" in words else 2)
    assert scores.n == 3


LANGUAGE = '''
"""Sequences that count up."""
import torch
import headwater as hw

starts = torch.randint(0, 9, (50, 1), generator=torch.Generator().manual_seed(0))
ids = (starts + torch.arange(6)) % 9


def build():
    return torch.nn.Sequential(torch.nn.Embedding(9, 6), torch.nn.Linear(6, 9))


def fit(model, train, seed, recorder=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if recorder:
        recorder.watch(model, optimizer, steps=10)
    for step in range(10):
        loss = task.loss(model, train).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if recorder:
            recorder.step(range(len(train)))
    return model


task = hw.tasks.Language()
experiment = hw.Experiment(build, ids[:40], ids[40:], task, fit, "counting")
'''


def test_a_language_model_is_explained_by_its_measure(tmp_path):
    (tmp_path / "count.py").write_text(LANGUAGE)
    assert call("record", tmp_path / "count.py", "--out", tmp_path / "run").exit_code == 0
    scores, said = explained(tmp_path / "run", "--queries", "0-3", out=tmp_path / "s")
    experiment = hw.Experiment.load(tmp_path / "count.py")
    model = last_model(tmp_path / "run", tmp_path / "count.py")
    np.testing.assert_allclose(scores.output, experiment.task.measure(model, experiment.test[:4]).detach(), rtol=1e-5)
    np.testing.assert_allclose(scores.values.sum(1), scores.output - scores.baseline_output, rtol=1e-2)
    assert (scores.values[:, -1] == 0).all() and "the measure against zeros" in " ".join(said.split())  # the last token predicts nothing
    token, _ = explained(tmp_path / "run", "--queries", "0-3", "--baseline", "token:3", out=tmp_path / "s")
    assert (token.values[experiment.test[:4].numpy() == 3] == 0).all() and np.abs(token.values).max() > 0.1
    assert call("explain", tmp_path / "run", "--baseline", "mean").exit_code == 2


def test_a_measure_that_is_not_of_the_output_is_refused():
    model = torch.nn.Linear(2, 1)
    batch = torch.ones(3, 2), torch.zeros(3)
    for measure in (lambda m, b: m(2 * b[0])[:, 0], lambda m, b: m.weight.sum() * b[1]):
        with pytest.raises(InputError, match="more of the model than its output"):
            Asked(measure, batch, "the measure").checked(model, model(batch[0]))
    honest = Asked(lambda m, b: -((m(b[0])[:, 0] - b[1]) ** 2), batch, "the measure")
    assert honest.checked(model, model(batch[0])) is honest


@pytest.fixture(scope="module")
def wine(tmp_path_factory):
    """A table of 13 columns with three classes, and models of it in files: (model in memory, file)."""
    from sklearn.datasets import load_wine

    place = tmp_path_factory.mktemp("wine")
    x, y = load_wine(return_X_y=True, as_frame=True)
    x.assign(vineyard=y)[["vineyard", *x.columns[::-1]]].to_csv(place / "wine.csv", index=False)  # another order, and a column too many
    np.save(place / "wine.npy", x.to_numpy())
    return place, x, y


def test_xgboost_files_are_explained_with_their_own_columns(wine, tmp_path):
    xgboost = pytest.importorskip("xgboost")
    place, x, y = wine
    model = xgboost.XGBClassifier(n_estimators=4, max_depth=3, n_jobs=1).fit(x, y == 1)
    right = hw.explain(model, x.iloc[57:62], baseline=x.iloc[[100]])
    for suffix in ("json", "ubj"):
        model.save_model(tmp_path / f"m.{suffix}")
        words = ("--model", tmp_path / f"m.{suffix}", "--data", place / "wine.csv", "--queries", "57-61", "--baseline", "row:100")
        scores, said = explained(*words, out=tmp_path / "s")
        np.testing.assert_allclose(scores.values, right.values, atol=1e-12)
        assert scores.feature_names == tuple(x.columns) and "Left out, as no feature of the model: vineyard." in said
    drawn, said = explained("--model", tmp_path / "m.json", "--data", place / "wine.csv", "--background", place / "wine.npy", out=tmp_path / "s")
    assert drawn.baseline == "32 examples of the data" and drawn.n == 10
    own, _ = explained(*words, "--target", "predicted", out=tmp_path / "s")
    signs = np.where(model.predict(x.iloc[57:62]) == 1, 1, -1)
    assert {1, -1} == set(signs)
    np.testing.assert_allclose(own.values, signs[:, None] * right.values, atol=1e-12)


def test_lightgbm_and_catboost_files_are_explained(wine, tmp_path):
    lightgbm, catboost = pytest.importorskip("lightgbm"), pytest.importorskip("catboost")
    place, x, y = wine
    light = lightgbm.LGBMClassifier(n_estimators=3, verbose=-1, n_jobs=1).fit(x.to_numpy(), y)
    light.booster_.save_model(tmp_path / "m.txt")
    cat = catboost.CatBoostClassifier(iterations=3, depth=3, verbose=0, allow_writing_files=False, thread_count=1).fit(x, y.map({0: "red", 1: "dry", 2: "old"}))
    cat.save_model(str(tmp_path / "m.cbm"))
    mean = ("--baseline", "mean", "--queries", "all")
    scores, _ = explained("--model", tmp_path / "m.txt", "--data", place / "wine.npy", *mean, "--target", "2", out=tmp_path / "s")
    np.testing.assert_allclose(scores.values, hw.explain(light, x.to_numpy(), 2, baseline=x.to_numpy().mean(0)).values, atol=1e-12)
    scores, _ = explained("--model", tmp_path / "m.cbm", "--data", place / "wine.csv", *mean, "--target", "old", out=tmp_path / "s")
    np.testing.assert_allclose(scores.values, hw.explain(cat, x, "old", baseline=x.to_numpy().mean(0)).values, atol=1e-12)
    own, _ = explained("--model", tmp_path / "m.cbm", "--data", place / "wine.csv", *mean, "--target", "predicted", out=tmp_path / "s")
    np.testing.assert_allclose(own.values, hw.explain(cat, x, cat.predict(x)[:, 0], baseline=x.to_numpy().mean(0)).values, atol=1e-12)


PYTHON = '''
"""A model and what to explain."""
import numpy as np
import torch
from sklearn.datasets import load_wine
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

x, y = load_wine(return_X_y=True, as_frame=True)


def model():
    return {}


def inputs():
    return x
'''


def test_a_python_file_gives_any_model(wine, tmp_path):
    place, x, _ = wine
    file = tmp_path / "mine.py"
    file.write_text(PYTHON.format("make_pipeline(StandardScaler(), SVC()).fit(x, y)"))
    scores, _ = explained("--model", file, "--queries", "0,70", "--baseline", "row:100", out=tmp_path / "s")
    assert scores.feature_names == tuple(x.columns) and np.abs(scores.residual).max() < 1e-9
    assert (scores.output > 0).all()  # of three classes, each row's own
    file.write_text(PYTHON.format("lambda x: np.asarray(x) @ np.arange(13.0)") + "\n\ndef settings():\n    return dict(baseline=1.0)\n")
    scores, _ = explained("--model", file, "--data", place / "wine.npy", "--queries", "0-1", out=tmp_path / "s")
    np.testing.assert_allclose(scores.values, (x.to_numpy()[:2] - 1) * np.arange(13.0), rtol=1e-7)
    assert "settings() of the file says too" in call("explain", "--model", file, "--baseline", "0").stderr
    file.write_text(PYTHON.format("torch.nn.Linear(13, 3)"))
    scores, _ = explained("--model", file, "--data", place / "wine.npy", "--queries", "0-3", "--target", "0-2", out=tmp_path / "s")
    assert scores.target == "output 0 minus output 2" and scores.values.shape == (4, 13) and scores.converged.all()


def test_pages_and_tables_of_explanations_are_written_and_saved_ones_shown_again(recorded, tmp_path):
    import pandas

    scores, said = explained(recorded, "--queries", "0-2", "--csv", tmp_path / "why.csv", "--html", tmp_path / "why.html", out=tmp_path / "why.safetensors")
    table, page = pandas.read_csv(tmp_path / "why.csv"), (tmp_path / "why.html").read_text()
    np.testing.assert_allclose(table["score"].to_numpy().reshape(3, 2), scores.values, rtol=1e-5)
    assert page.count('data-testid="waterfall"') == 3 and not re.search(r'(?:src|href)="(?!data:|#)', page)
    again = call("report", tmp_path / "why.safetensors", "--html", tmp_path / "again.html", "--csv", tmp_path / "again.csv")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.html").read_text() == page and (tmp_path / "again.csv").read_text() == (tmp_path / "why.csv").read_text()
    assert said.startswith(again.stdout.split("The table")[0])
    call("trace", recorded, "--queries", "0-2", "--out", tmp_path / "owed.safetensors")
    shown = call("report", tmp_path / "owed.safetensors", "--top", 2, "--html", tmp_path / "owed.html")
    assert shown.exit_code == 0 and "proponents" in shown.stdout and (tmp_path / "owed.html").read_text().count('data-testid="attribution"') == 3
    pairs = InteractionScores(
        values=np.array([[[0.5, 0.25], [0.25, 0.0]]]), residual=np.zeros(1), evaluations=np.zeros(1, int), output=np.ones(1), baseline_output=np.zeros(1),
        method="by hand", target="f", baseline="zeros",
    )  # fmt: skip
    shown = call("report", pairs.save(tmp_path / "pairs"), "--html", tmp_path / "pairs.html")
    assert shown.exit_code == 0 and "+0.500" in shown.stdout, shown.output


def test_what_cannot_be_explained_is_said_in_three_lines(recorded, wine, tmp_path):
    place, _, _ = wine
    (tmp_path / "m.json").write_text('{"learner": 1}')
    (tmp_path / "m.txt").write_text("no trees")
    (tmp_path / "m.pkl").write_bytes(b"")
    (tmp_path / "bare.py").write_text('"""Nothing."""')
    (tmp_path / "alone.py").write_text("def model():\n    return lambda x: x.sum(1)\n")
    np.savez(tmp_path / "two.npz", a=np.ones(2), b=np.ones(2))
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    alone = ["explain", "--model", tmp_path / "alone.py"]
    cases = [
        (["explain"], "neither a run nor a model"),
        (["explain", recorded, "--model", tmp_path / "m.json"], "both the run"),
        (["explain", recorded, "--data", place / "wine.csv"], "with a run"),
        (["explain", tmp_path / "nothing"], "holds no run"),
        (["explain", recorded, "--target", "7"], "0 to 1"),
        (["explain", recorded, "--target", "cat"], "--target cat"),
        (["explain", recorded, "--target", "1-1"], "the same for every example"),
        (["explain", recorded, "--target", "predicted-label", "--queries", "all"], "--queries wrong"),
        (["explain", recorded, "--layer", "conv"], "layer='conv'"),
        (["explain", recorded, "--baseline", "gray"], "--baseline gray"),
        (["explain", recorded, "--baseline", "row:99"], "row:0 to row:39"),
        (["explain", recorded, "--baseline", "data:99"], "1 to 40"),
        (["explain", recorded, "--baseline", "blur:much"], "a number after blur:"),
        (["explain", recorded, "--baseline", tmp_path / "gone.npy"], "is not a file"),
        (["explain", recorded, "--path", "curved"], "straight, blur:SIGMA or guided:STEPS"),
        (["explain", recorded, "--path", "blur:2", "--baseline", "0"], "one of them"),
        (["explain", recorded, "--path", "guided:5", "--tolerance", "0.1"], "guided"),
        (["explain", recorded, "--tolerance", "0.1", "--points", "5"], "one of them"),
        (["explain", recorded, "--tolerance", "2"], "between 0 and 1"),
        (["explain", recorded, "--queries", "99"], "from 0 to 29"),
        (["explain", recorded, "--show", "pie"], "--show pie"),
        (["explain", recorded, "--html", tmp_path / "no" / "a.html"], "there is no folder"),
        (["explain", recorded, "--csv", tmp_path], "is a folder"),
        (["explain", "--model", tmp_path / "gone.json", "--data", place / "wine.csv"], "is not a file"),
        (["explain", "--model", tmp_path / "m.json", "--data", place / "wine.csv"], "XGBoost cannot read"),
        (["explain", "--model", tmp_path / "m.txt", "--data", place / "wine.csv"], "LightGBM cannot read"),
        (["explain", "--model", tmp_path / "m.pkl", "--data", place / "wine.csv"], "pickles are not read"),
        (["explain", "--model", tmp_path / "bare.py"], "gives no model"),
        (alone, "nothing to explain"),
        ([*alone, "--data", tmp_path / "two.npz"], "a, b"),
        ([*alone, "--data", tmp_path / "object.npy"], "cannot be read"),
        ([*alone, "--data", tmp_path / "m.txt"], "as a table"),
        ([*alone, "--data", place / "wine.npy", "--queries", "wrong"], "known of a run only"),
        ([*alone, "--data", place / "wine.npy", "--target", "label"], "known of a run only"),
        ([*alone, "--data", place / "wine.npy", "--experiment", "x.py"], "a model from a file"),
        (["report", tmp_path / "gone.safetensors"], "where no file is"),
    ]
    for words, expected in cases:
        done = call(*words)
        assert done.exit_code == 2, (words, done.output)
        assert expected in done.stderr, (words, done.stderr)
        assert all(f"{name}: " in done.stderr for name in ("Given", "Expected", "To mend it")), (words, done.stderr)
        assert "Traceback" not in done.output
    assert not (tmp_path / "a.html").exists()


def test_ctrl_c_stops_an_explanation_cleanly(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import numpy as np\ndef model():\n    def f(x):\n        raise KeyboardInterrupt\n    return f\ndef inputs():\n    return np.ones((2, 3))\n"
    )
    done = call("explain", "--model", tmp_path / "slow.py", "--out", tmp_path / "s.safetensors", "--html", tmp_path / "s.html")
    assert done.exit_code == 130 and "start it again" in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "s.safetensors").exists() and not (tmp_path / "s.html").exists()


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
        (["trace", recorded, "--method", "source", "--dim", "8"], "only with --method trak"),
        (["trace", recorded, "--masks", "3"], "dropout"),
        (["trace", recorded, "--beside", nothing], "holds no run"),
        (["trace", recorded, "--beside", recorded], "twice"),
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
    for command in ("demo", "record", "trace", "explain", "report", "evaluate", "doctor"):
        said = call(command, "--help")
        assert said.exit_code == 0 and command in overview
        assert command == "doctor" or "Example" in said.output or "Next:" in said.output


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
