"""What the words of a command line mean: methods, queries, and which experiment a run belongs to."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

import headwater as hw
from headwater.errors import InputError, QueryError, RunError
from headwater.store import read_json, write_json
from headwater.tasks import Examples
from headwater.tasks.batches import to
from headwater.tasks.task import logits_of, split

METHODS: dict[str, type] = {
    "source": hw.Source,
    "influence": hw.Influence,
    "tracin": hw.TracIn,
    "graddot": hw.GradDot,
    "gradcos": hw.GradCos,
    "trak": hw.Trak,
    "logra": hw.LoGra,
    "representations": hw.Representations,
    "knnshapley": hw.KNNShapley,
    "unrolled": hw.Unrolled,
    "diffusiontracin": hw.DiffusionTracIn,
    "diffusionretrac": hw.DiffusionReTrac,
    "dtrak": hw.DTrak,
    "das": hw.DAS,
}
BESIDE = "experiment.json"  # in the run directory: where the experiment's file is
WORST = 10
"""How many queries ``worst`` means."""


def method(word: str, **settings: Any) -> Any:
    """The method of that name, with the settings that are not None.

    >>> method("source", segments=2)
    Source(segments=2, average='gradients', curvature=EKFAC(fisher='auto', seed=0, examples=None), refine=None)
    """
    kind = METHODS.get(word.strip().lower().replace("-", "").replace("_", ""))
    if kind is None:
        close = difflib.get_close_matches(word.lower(), METHODS, 1)
        raise InputError(f"a method {word!r}", f"one of {', '.join(METHODS)}", f"did you mean {close[0]}?" if close else "headwater trace --help describes them")
    given = {key: value for key, value in settings.items() if value is not None}
    unknown = [key for key in given if key not in kind.__dataclass_fields__]  # type: ignore[attr-defined]
    if unknown:
        owners = [name for name, k in METHODS.items() if unknown[0] in k.__dataclass_fields__]  # type: ignore[attr-defined]
        raise InputError(f"--{unknown[0]} with --method {word}", f"--{unknown[0]} only with --method {' or '.join(owners)}", "leave one of them out")
    return kind(**given)


def ensembled(method: Any, run: hw.Run, beside: list[Path], experiment: hw.Experiment, masks: int | None) -> Any:
    """The method averaged over dropout masks of each model (``--masks``), over this run and those ``--beside`` it, or both."""
    averaged = method if masks is None else hw.DropoutEnsemble(method, members=masks)
    return hw.Ensemble(averaged, [run, *(experiment.open(path) for path in beside)]) if beside else averaged


def numbers(text: str) -> list[float]:
    """Numbers with commas between.

    >>> numbers("0.1, 1e-3")
    [0.1, 0.001]
    """
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"{text!r}", "numbers with commas between", "0.001,0.01,0.1, say") from None


def chosen(text: str, experiment: hw.Experiment, run: hw.Run) -> np.ndarray:
    """The rows of the experiment's test set that ``--queries`` names."""
    test = Examples(experiment.test, experiment.task.collate)
    word = text.strip().lower()
    if word == "all":
        return np.arange(len(test))
    if word == "worst":
        return np.argsort(answers(experiment, run, experiment.task.measure), kind="stable")[:WORST]
    if word == "wrong":
        return _wrong(experiment, run)
    return ranges(text, len(test))


def ranges(text: str, count: int) -> np.ndarray:
    """Numbers and ranges of them, both ends included; an end beyond the last example means the last.

    >>> ranges("0,3,5-9", 8).tolist()
    [0, 3, 5, 6, 7]
    """
    found: dict[int, None] = {}
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", word)
        if match is None:
            raise QueryError(f"--queries {text!r}", "numbers and ranges such as 0,3,5-9, or all, wrong, worst", f"mend {word!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first >= count or last < first:
            raise QueryError(f"--queries {text!r}, where {word.strip()!r} names no example", f"numbers from 0 to {count - 1}", "mend that part")
        found |= dict.fromkeys(range(first, min(last, count - 1) + 1))
    return np.array(list(found))


def answers(experiment: hw.Experiment, run: hw.Run, ask: Any) -> np.ndarray:
    """``ask(model, batch)`` of the recorded model for every example of the test set, in batches."""
    test = experiment.task.examples(experiment.test)
    model = run.load(run.model(), run.checkpoints[-1])
    with torch.no_grad():
        batches = (to(test.batch(range(i, min(i + 256, len(test)))), run.device) for i in range(0, len(test), 256))
        return torch.cat([ask(model, batch).cpu() for batch in batches]).numpy()


def _wrong(experiment: hw.Experiment, run: hw.Run) -> np.ndarray:
    task = experiment.task
    if not isinstance(task, hw.tasks.Classification):
        raise QueryError(f"--queries wrong with the task {type(task).__name__}", "a Classification", "use --queries worst: the ten of lowest measure")

    def mistaken(model: Any, batch: Any) -> torch.Tensor:
        args, kwargs, labels = split(batch, task.labels)
        logits = logits_of(model(*args, **kwargs))
        said = logits.argmax(-1) if logits.ndim == 2 and logits.shape[1] > 1 else (logits.reshape(len(logits)) > 0).long()
        return said != labels.reshape(len(labels), -1)[:, 0]

    found = np.flatnonzero(answers(experiment, run, mistaken))
    if not len(found):
        raise QueryError("--queries wrong, and the model gets the whole test set right", "a misclassified example", "use --queries worst")
    return found


def newest_index(run: hw.Run) -> hw.Index:
    """The index of a run that was built last by ``headwater index``. Raises InputError where there is none."""
    built = sorted((run.path / "index").glob("*/manifest.json"), key=lambda file: file.stat().st_mtime)
    for file in reversed(built):
        held = read_json(file)
        segments = held["segments"] if isinstance(held["segments"], int) else tuple(held["segments"])
        if held["estimate"] == repr(hw.EKFAC()):  # the estimate of every method of the command line
            return hw.index(run, segments, dim=held["dim"], dtype=held["dtype"])
    raise InputError(f"--index, and no index of {run.path}", "one that was built before", f"headwater index {run.path}")


# ------------------------------------------------------------------------------------------------------ whose run is this?


def remember(run: Path, file: Path, name: str | None) -> None:
    """Note in the run directory which file its experiment stands in."""
    write_json(run / BESIDE, {"file": str(file.resolve()), "name": name})


def recalled(run: Path, file: Path | None, name: str | None) -> hw.Experiment:
    """The experiment of a run: from ``file``, or from where it was when the run was recorded."""
    if not (run / "manifest.json").exists():
        raise RunError(f"{run} holds no run", "a directory written by `headwater record` or hw.Recorder", "check the path, or record one: headwater record EXPERIMENT.py")
    if file is not None:
        return hw.Experiment.load(file, name)
    if not (run / BESIDE).exists():
        raise InputError(f"the run {run}, which does not know its experiment's file", "that file", f"headwater trace {run} --experiment FILE.py")
    noted = read_json(run / BESIDE)
    if not Path(noted["file"]).exists():
        raise InputError(f"{noted['file']}, which the run {run} was recorded from, is gone", "that file", f"headwater trace {run} --experiment FILE.py, where it is now")
    return hw.Experiment.load(noted["file"], name or noted["name"])
