"""What ``--target``, ``--baseline`` and ``--path`` mean."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import headwater as hw
from headwater.cli import files
from headwater.errors import InputError
from headwater.features.targets import Target
from headwater.tasks.batches import take

if TYPE_CHECKING:
    from headwater.cli.subjects import Background, Subject

WORDS = {"predicted": "the predicted class", "label": "the example's own label"}


# ---- targets --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Named:
    """A target by another name."""

    of: Target
    name: str

    def pick(self, output: Tensor, rows: Tensor) -> Tensor:
        """As it is."""
        return self.of.pick(output, rows)


@dataclass(frozen=True, eq=False)
class Asked:
    """What a task asks (its measure or its loss) as a target: the task is handed the output in place of a model that computes it."""

    ask: Callable[[Any, Any], Tensor]
    batch: Any
    name: str

    def pick(self, output: Tensor, rows: Tensor) -> Tensor:
        """The task's answer for the examples ``rows`` (m,), from the output (m, ...)."""
        return self.ask(lambda *_, **__: output, take(self.batch, rows))

    def checked(self, model: Any, output: Tensor) -> Asked:
        """Itself, where the task's answer is one that depends on the model through its output alone. Raises InputError."""
        try:
            with torch.no_grad():
                true, found = self.ask(model, self.batch), self.pick(output, torch.arange(len(output), device=output.device))
        except (AttributeError, TypeError, RuntimeError) as error:
            raise self._refused(str(error).splitlines()[0]) from error
        if not torch.allclose(true, found, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise self._refused("the output alone gives another value")
        return self

    def _refused(self, reason: str) -> InputError:
        given = f"{self.name} of a task that asks more of the model than its output for the inputs ({reason})"
        return InputError(given, "one that is computed from the output", "use --target with the number of an output")


def target(word: str | None, subject: Subject) -> Any:
    """From the words of a command line to ``target=``.

    ``3``: an output, or a class; ``predicted``, ``label``: each example's own; ``a-b``: the first less the second, of any of these; ``measure``,
    ``loss``: what the task asks. Anything else is the name of a class.
    """
    word = subject.target if word is None else word.strip()
    if word is None or word in ("measure", "loss"):
        return None if word is None else subject.asked(word)
    pair = re.fullmatch(r"(\d+|predicted|label)\s*-\s*(\d+|predicted|label)", word)
    if pair is not None:
        return _between(pair[1], pair[2], subject)
    which = _index(word, subject)
    return which if which is None or not subject.network or word not in WORDS else Named(hw.targets.output(which), f"the output of {WORDS[word]}")


def _index(word: str, subject: Subject) -> Any:
    """The output or the class that a word means, or one for each example; None where there is one output only."""
    if word in WORDS:
        return subject.classes(word)
    if word.isdecimal():
        return int(word)
    if subject.network:
        raise InputError(f"--target {word}", "the number of an output, predicted, label, measure, loss, or a-b for one less another", "--target 3, say")
    return word


def _between(first: str, second: str, subject: Subject) -> Any:
    a, b = _index(first, subject), _index(second, subject)
    if a is None or b is None:
        raise InputError(f"--target {first}-{second} and a model with one output", "several outputs", "leave --target out")
    alike = np.atleast_1d(np.asarray(a == b))
    if alike.any():
        which = "every example" if alike.all() else f"{subject.names[int(alike.argmax())]}"
        raise InputError(f"--target {first}-{second}, which are the same for {which}", "two different ones", "ask about others: --queries wrong, say")
    if not subject.network:
        return a, b
    said = [f"output {word}" if word.isdecimal() else f"{start} of {WORDS[word]}" for start, word in (("the output", first), ("that", second))]
    return Named(hw.targets.margin(a, b), " minus ".join(said))


# ---- baselines ------------------------------------------------------------------------------------------------------------------


BASELINES = "zeros, a number, mean, data:N, row:K, nearest, blur:SIGMA, uniform:N, token:ID, or a file (.npy, .csv) with a row or with one for each"


def baseline(text: str, subject: Subject) -> tuple[Any, str | None]:
    """From the words of a command line to ``baseline=``, and what to call it where the library cannot know. Commas between: their average."""
    if Path(text).suffix.lower() in files.TABLES:  # a file name may hold commas
        return _baseline(text, subject)
    found = [_baseline(word.strip(), subject) for word in text.split(",")]
    if len(found) == 1:
        return found[0]
    names = [name for _, name in found]
    return hw.baselines.average(*(b for b, _ in found)), None if not any(names) else f"the average over {text}"


def _baseline(word: str, subject: Subject) -> tuple[Any, str | None]:
    kind, _, value = word.partition(":")
    store, data = subject.background, hw.baselines
    if subject.ids and kind in ("mean", "nearest", "blur", "uniform"):
        raise InputError(f"--baseline {word} of inputs that are ids", "zeros (of the embedding), token:ID, data:N or row:K", "a mean or a blur of ids is no id")
    if Path(word).suffix.lower() in files.TABLES:
        return files.table(Path(word)), f"what {word} holds"
    if kind == "row":
        row = _whole(word, value)
        if row >= store.size:
            raise InputError(f"--baseline {word} and {store.size:,} examples of {store.name}", f"row:0 to row:{store.size - 1}", "choose another")
        return store.rows(np.array([row])), f"example {row} of {store.name}"
    if kind == "token":
        return data.token(int(value) if value.isdecimal() else value or "pad"), None
    made: dict[str, Callable[[], Any]] = {
        "zeros": lambda: data.zeros(),
        "constant": lambda: data.constant(_number(word, value)),
        "mean": lambda: data.mean(store.all),
        "data": lambda: _dataset(store, _whole(word, value or "32")),
        "blur": lambda: data.blur(_number(word, value or "4")),
        "uniform": lambda: data.uniform(draws=_whole(word, value or "8")),
        "nearest": lambda: _nearest(subject),
    }
    if kind in made and (not value or kind not in ("zeros", "mean", "nearest")):
        return made[kind](), None
    try:
        return data.constant(float(word)), None
    except ValueError:
        raise InputError(f"--baseline {word}", BASELINES, "headwater explain --help describes them; commas between average several") from None


def _dataset(store: Background, count: int) -> Any:
    return hw.baselines.dataset(store.drawn(count), count)


def _nearest(subject: Subject) -> Any:
    if subject.background.labels is None:
        raise InputError("--baseline nearest with a model from a file", "a run of a classification", "labels are known of a run only; use row:K")
    return hw.baselines.nearest(subject.background.all, subject.background.labels(), subject.classes("label"))


# ---- paths ----------------------------------------------------------------------------------------------------------------------


def path(text: str) -> Any:
    """From the words of a command line to ``path=``; None for the straight line.

    >>> path("blur:3"), path("straight")
    (Blur(sigma=3.0), None)
    """
    kind, _, value = text.strip().partition(":")
    if kind == "straight" and not value:
        return None
    if kind == "blur":
        return hw.paths.blur(_number(text, value or "8"))
    if kind == "guided":
        return hw.paths.guided(_whole(text, value or "100"))
    raise InputError(f"--path {text}", "straight, blur:SIGMA or guided:STEPS", "blur:8, say")


def _number(word: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise InputError(f"{word!r}", f"a number after {word.partition(':')[0]}:", f"{word.partition(':')[0]}:4, say") from None


def _whole(word: str, value: str) -> int:
    if not value.isdecimal():
        raise InputError(f"{word!r}", f"a whole number after {word.partition(':')[0]}:", f"{word.partition(':')[0]}:8, say")
    return int(value)
