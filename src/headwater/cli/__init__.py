"""The command line: each command is a line or two onto the door. What takes long to load is loaded when a command needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from headwater.cli import screen

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: headwater demo      Then your own: headwater record EXPERIMENT.py",
)

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.py", help="A Python file with a hw.Experiment at its top level.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The directory that `headwater record` wrote.", show_default=False)]
Found = Annotated[
    Path | None, typer.Option("--experiment", metavar="FILE.py", help="The experiment's file; default: where it was when the run was recorded.", show_default=False)
]
Name = Annotated[str | None, typer.Option(help="Which Experiment of the file, where it has several.", show_default=False)]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write one self-contained page.", show_default=False)]


@app.callback(invoke_without_command=True)
def headwater(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Which parts of the input carried a prediction, which training examples is it owed to, and how far can the answers be trusted?"""
    screen.debugging = debug
    if version:
        typer.echo(f"headwater {screen.version()}")
        raise typer.Exit


@app.command()
@screen.answering("what was done is kept; `headwater demo` with the same options continues there")
def demo(
    subject: Annotated[Literal["digits", "diffusion"], typer.Argument(help="What is traced: a classifier of digits, or a diffusion model's pictures.")] = "digits",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to keep everything; default: runs/demo, runs/demo-diffusion.", show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small version in seconds, whose figures mean little.")] = False,
) -> None:
    """See what Headwater does: a small network, traced, on one page.

    digits: trains a network on 2,000 digits, 100 of them with a wrong label; traces test digits back to them; finds the wrong labels; retrains
    the network on random halves to see how far that can be trusted. One to three minutes on two cores, no download.

    diffusion: trains a small diffusion model on 663 emoji, generates pictures, traces them by Diffusion-TracIn and Diffusion-ReTrac, and shows
    what sets the two apart. Some twenty minutes on two cores, fewer with a GPU, no download.

    Next: open the page it names; then try your own training with headwater record.
    """
    from headwater.cli.commands import run_demo, run_diffusion_demo

    (run_demo if subject == "digits" else run_diffusion_demo)(out, quick)


@app.command()
@screen.answering("a recording cannot be continued: start it again with --overwrite")
def record(
    experiment: ExperimentFile,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run directory; default: runs/NAME-OF-THE-FILE.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seeds the model's weights and the training.")] = 0,
    checkpoints: Annotated[int, typer.Option(min=1, help="How many to keep, at equal distances.")] = 6,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")] = False,
    name: Name = None,
) -> None:
    """Train an experiment once, and record it.

    Example: headwater record examples/mnist.py --out runs/mnist

    The file defines experiment = hw.Experiment(build, train, test, task, fit), and fit tells the recorder of each step; see the files in
    examples/. Next: headwater trace RUN.
    """
    from headwater.cli.commands import record_experiment

    record_experiment(experiment, name, out, seed, checkpoints, overwrite)


@app.command()
@screen.answering("the same command continues where it stopped")
def trace(
    run: RunFolder,
    experiment: Found = None,
    name: Name = None,
    method: Annotated[
        str,
        typer.Option(
            help="source, influence, tracin, graddot, gradcos, trak, logra, representations, knnshapley, unrolled; "
            "of diffusion models also diffusion-tracin, diffusion-retrac, dtrak, das."
        ),
    ] = "source",
    segments: Annotated[int | None, typer.Option(min=1, help="source: how many segments to cut training into (3).", show_default=False)] = None,
    damping: Annotated[float | None, typer.Option(min=0, help="influence: the damping; default: 1 / summed learning rates.", show_default=False)] = None,
    dim: Annotated[int | None, typer.Option(min=1, help="trak, logra, dtrak, das: to how many numbers gradients are projected.", show_default=False)] = None,
    timesteps: Annotated[int | None, typer.Option(min=1, help="Diffusion models: at how many timesteps (10).", show_default=False)] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Diffusion models: noises at each timestep (1).", show_default=False)] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Average over this recording of the same training too (another --seed of record); repeat for more.", show_default=False),
    ] = None,
    masks: Annotated[int | None, typer.Option(min=1, help="Average over so many dropout masks of each model.", show_default=False)] = None,
    queries: Annotated[str, typer.Option(help="Examples of the experiment's test set: 0,3,5-9, all, wrong (misclassified) or worst (the ten lowest).")] = "0-9",
    top: Annotated[int, typer.Option(min=1, help="How many training examples to show each way.")] = 10,
    index: Annotated[bool, typer.Option("--index", help="Answer from the index that `headwater index` built last, without the training data.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE.safetensors", help="Save all scores; hw.load reads them.", show_default=False)] = None,
    html: Html = None,
) -> None:
    """Which training examples are these predictions owed to?

    Example: headwater trace runs/mnist --queries wrong --html owed.html

    A positive score says that training on the example pushed the query's measure up, and that without it the measure would be lower by about that much.
    Next: headwater evaluate RUN, which says how far that can be trusted.
    """
    from headwater.cli.commands import trace_run

    settings = {"segments": segments, "damping": damping, "dim": dim, "timesteps": timesteps, "draws": draws}
    trace_run(run, experiment, name, method, settings, beside or [], masks, queries, top, index, out, html)


@app.command()
@screen.answering("the same command continues where it stopped")
def index(
    run: RunFolder,
    experiment: Found = None,
    name: Name = None,
    segments: Annotated[int, typer.Option(min=1, help="How many segments to cut training into, as for trace --method source.")] = 3,
    dim: Annotated[int | None, typer.Option(min=1, help="Numbers to keep of each example and segment; default: all.", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float16 or int8: smaller, and rounded; default: the model's own.", show_default=False)] = None,
) -> None:
    """Keep the training gradients, so that many questions can be answered soon.

    Example: headwater index runs/mnist

    Gradients are kept in the curvature's eigenbasis, where every method and damping is a multiplication. How far the answers are from
    those of the run itself is measured and printed. Next: headwater trace RUN --index.
    """
    from headwater.cli.commands import index_run

    index_run(run, experiment, name, segments, dim, dtype)


@app.command()
@screen.answering("nothing was written; start it again")
def explain(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="The directory that `headwater record` wrote.", show_default=False)] = None,
    experiment: Found = None,
    name: Name = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead of a run: XGBoost .json or .ubj, LightGBM .txt, CatBoost .cbm, or a FILE.py with functions model() and inputs().",
            show_default=False,
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="TABLE", help="With --model: the inputs, .csv, .tsv, .parquet, .npy or .npz.", show_default=False)] = None,
    background: Annotated[
        Path | None, typer.Option(metavar="TABLE", help="With --model: what mean, data and row of --baseline are taken from; default: the data.", show_default=False)
    ] = None,
    queries: Annotated[str, typer.Option(help="Examples of the test set, or rows of the data: 0,3,5-9 or all; of a run also wrong and worst, as for trace.")] = "0-9",
    target: Annotated[
        str | None,
        typer.Option(
            help="What is explained: an output or class (3), predicted, label, one less another (3-5, predicted-label), measure or loss of the task. "
            "Default: predicted for classes.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Compared with: zeros, a number, mean, data:N (N examples), row:K, nearest (of another class), blur:SIGMA, uniform:N, token:ID, or a "
            "file with a row. Commas between: their average. Default: zeros for networks (of texts: padding), data:32 for other models.",
            show_default=False,
        ),
    ] = None,
    path: Annotated[str, typer.Option(help="From the baseline to the input: straight, blur:SIGMA or guided:STEPS.")] = "straight",
    tolerance: Annotated[
        float | None, typer.Option(help="Networks: the error allowed, relative to the change of the output (0.01); trees are exact.", show_default=False)
    ] = None,
    points: Annotated[int | None, typer.Option(min=1, help="Networks: a fixed number of points on the path, in place of a tolerance.", show_default=False)] = None,
    layer: Annotated[str | None, typer.Option(metavar="NAME", help="Networks: explain by the outputs of this module.", show_default=False)] = None,
    show: Annotated[str | None, typer.Option(help="Drawn as: image, text, series, waterfall, beeswarm or bars; default: what the input is.", show_default=False)] = None,
    top: Annotated[int, typer.Option(min=1, help="How many parts to name in a table.")] = 10,
    out: Annotated[Path | None, typer.Option(metavar="FILE.safetensors", help="Save the values; hw.load and headwater report read them.", show_default=False)] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Also write a table: a row for each example and part.", show_default=False)] = None,
    html: Html = None,
) -> None:
    """Which parts of the input carried these predictions?

    Examples:

    headwater explain runs/mnist --queries wrong --target predicted-label --baseline mean --html why.html

    headwater explain --model trees.json --data patients.csv --queries 0-99

    A positive value says that the part raised the output above that of the baseline. The values of an example sum to the change of its
    output, but for the residual that is printed with it. Next: headwater trace RUN, which says which training examples it is owed to.
    """
    from headwater.cli.explaining import explain as answer

    answer(run, experiment, name, model, data, background, queries, target, baseline, path, tolerance, points, layer, show, top, out, csv, html)


@app.command()
@screen.answering("start it again")
def report(
    scores: Annotated[Path, typer.Argument(metavar="SCORES.safetensors", help="What trace or explain saved with --out, or scores.save(path).", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="How many to name.")] = 10,
    csv: Annotated[Path | None, typer.Option(metavar="FILE.csv", help="Also write a table.", show_default=False)] = None,
    html: Html = None,
) -> None:
    """Show scores that were saved.

    Example: headwater report why.safetensors --html why.html
    """
    from headwater.cli.explaining import show

    show(scores, html, csv, top)


@app.command()
@screen.answering("trainings that ended are kept; the same command continues there")
def evaluate(
    run: RunFolder,
    experiment: Found = None,
    name: Name = None,
    methods: Annotated[str, typer.Option(help="Which to compare, with commas between.")] = "graddot,tracin,influence,source",
    damping: Annotated[str | None, typer.Option(help="influence: one damping or several, with commas between: each is reported.", show_default=False)] = None,
    subsets: Annotated[int, typer.Option(min=2, help="How many random halves of the training set to retrain on.")] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="How often each, with different seeds; two or more give a noise ceiling.")] = 2,
    workers: Annotated[int | None, typer.Option(min=1, help="Trainings at a time; default: one per core or GPU.", show_default=False)] = None,
    queries: Annotated[str, typer.Option(help="As for trace.")] = "0-99",
    bank: Annotated[Path | None, typer.Option(metavar="DIR", help="Where retrained answers are kept; default: beside the run, RUN-bank.", show_default=False)] = None,
    html: Html = None,
) -> None:
    """How far can the scores be trusted? Retrains on random halves and compares.

    Example: headwater evaluate runs/mnist --subsets 50 --seeds 2

    LDS is the rank correlation between predicted and really retrained answers: 1 is perfect, 0 is worthless. The noise ceiling is what
    perfect scores would reach. It takes (subsets + 1) x seeds trainings; more subsets later continue from these.
    """
    from headwater.cli.commands import evaluate_run

    evaluate_run(run, experiment, name, methods, damping, subsets, seeds, workers, queries, bank, html)


@app.command()
@screen.answering("start it again")
def doctor() -> None:
    """Does Headwater compute correctly on this machine? About one minute.

    Compares gradients with autograd, curvature with the dense matrix, SOURCE with exact unrolling and with real leave-one-out, an
    interrupted computation with an uninterrupted one, and attributions to inputs with closed forms and Shapley values. Each check prints
    its measured figure and its tolerance. Exit code 1 if one fails.
    """
    from headwater.doctor import examine, machine

    screen.say(machine())

    if not screen.told(examine()):
        raise typer.Exit(1)


def main() -> None:
    """The console's entry point. ``--debug`` may stand anywhere."""
    words = sys.argv[1:]
    rest = [word for word in words if word != "--debug"]
    app(["--debug", *rest] if len(rest) < len(words) else rest, prog_name="headwater")
