"""Batches of every container, datasets as batches, and fingerprints of content."""

import collections
import random
import subprocess
import sys
from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from headwater.errors import InputError
from headwater.tasks import Examples, fingerprint
from headwater.tasks.batches import leaves, size, take, to, tree_map

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)
Pair = collections.namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "constant"


class Encoding(UserDict):
    """As transformers' BatchEncoding: a mapping that is no dict, made from a dict, with more to it."""

    @property
    def ids(self):
        return self["x"]


class Ordered(collections.OrderedDict):
    pass


class Picky(collections.abc.Mapping):
    """A mapping that cannot be made from a dict."""

    def __init__(self, x, y):
        self.parts = {"x": x, "y": y}

    def __getitem__(self, key):
        return self.parts[key]

    def __iter__(self):
        return iter(self.parts)

    def __len__(self):
        return 2


BATCHES = {
    "tensor": X,
    "array": X.numpy(),
    "tuple": (X, Y),
    "tuple of arrays": (X.numpy(), Y.numpy()),
    "list": [X, Y],
    "dict": {"x": X, "y": Y, "split": "train", "count": 3},
    "OrderedDict": Ordered(x=X, y=Y),
    "mapping": Encoding({"x": X, "y": Y}),
    "picky mapping": Picky(X, Y),
    "dataclass": Record(X, Y),
    "namedtuple": Pair(X, Y),
    "nested": ({"a": [X, X.half()], "b": Pair(X, (Y,))}, Y),
}
each_batch = pytest.mark.parametrize("kind", BATCHES)


@each_batch
def test_a_batch_keeps_its_container_and_cuts_every_tensor(kind):
    batch = BATCHES[kind]
    assert size(batch) == 6
    index = torch.tensor([4, 1])
    cut = take(batch, index)
    expected = {"array": torch.Tensor, "picky mapping": dict}.get(kind, type(batch))
    assert isinstance(cut, expected) and size(cut) == 2
    for part, whole in zip(leaves(cut), leaves(batch), strict=True):
        assert torch.equal(part, whole[index])
    if kind == "dict":
        assert cut["split"] == "train" and cut["count"] == 3
    if kind == "dataclass":
        assert cut.name == "constant"
    if kind == "mapping":
        assert torch.equal(cut.ids, X[index])


@each_batch
def test_moving_a_batch_moves_every_tensor(kind):
    assert all(t.device.type == "meta" for t in leaves(to(BATCHES[kind], "meta")))


@pytest.mark.parametrize("bad", [(X, Y[:5]), {"x": X, "n": torch.tensor(3)}, {"x": "text"}, [], None], ids=["uneven", "a number", "text", "empty", "None"])
def test_a_batch_without_one_number_of_examples_is_refused(bad):
    with pytest.raises(InputError, match=r"same first axis(.|\n)*collate="):
        size(bad)


@each_batch
def test_slicing_examples_equals_indexing(kind):
    if kind == "list":  # a list is a dataset of its items
        return
    examples = Examples(BATCHES[kind])
    assert len(examples) == 6
    for chosen in (range(1, 4), range(6), range(5, -1, -2), [2, 2, 0], np.array([5, 0], dtype=np.uint32), np.arange(6)[::-1], []):
        found = [*leaves(examples.batch(chosen))]
        for part, whole in zip(found, leaves(BATCHES[kind]), strict=True):
            assert torch.equal(part, whole[torch.tensor([*map(int, chosen)], dtype=torch.long)])


def test_any_dataset_gives_the_batches_that_its_columns_would():
    class Map:
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return X[i], int(Y[i])

    @dataclass
    class Held:  # a dataset that happens to be a dataclass
        x: torch.Tensor

        def __len__(self):
            return len(self.x)

        def __getitem__(self, i):
            return self.x[i], Y[i]

    datasets = [TensorDataset(X, Y), (X, Y), (X.numpy(), Y.numpy()), Map(), Held(X), [(x, y) for x, y in zip(X, Y, strict=True)], Examples((X, Y)), Examples(Map())]
    for data in datasets:
        x, y = Examples(data).batch([3, 1, 4])
        assert torch.equal(x, X[[3, 1, 4]]) and torch.equal(y, Y[[3, 1, 4]])
        one = Examples(data)[3]
        assert torch.equal(torch.as_tensor(one[0]), X[3])


def test_a_list_or_a_ragged_tuple_of_tensors_is_a_dataset_of_them():
    assert len(Examples([X, X, X])) == 3 and Examples([X, X, X]).batch([0, 2]).shape == (2, 6, 2)
    assert len(Examples((torch.tensor(1), torch.tensor(2)))) == 2


def test_collate_is_used_where_it_is_given_and_asked_for_where_it_is_missing():
    ragged = [torch.arange(n) for n in (3, 1, 2)]

    def pad(items):
        return torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-1)

    assert Examples(ragged, pad).batch([0, 1]).tolist() == [[0, 1, 2], [0, -1, -1]]
    assert Examples(Examples(ragged, pad)).batch([1]).tolist() == [[0]]
    with pytest.raises(InputError, match=r"default_collate cannot stack(.|\n)*collate="):
        Examples(ragged).batch([0, 1])
    with pytest.raises(InputError, match=r"type Record(.|\n)*collate="):
        Examples([Record(X[0], Y[0])]).batch([0])


def test_a_dataset_without_a_length_is_refused():
    with pytest.raises(InputError, match=r"without a length(.|\n)*list of examples"):
        Examples(iter([1, 2]))


def test_tree_map_leaves_what_is_no_tensor_alone():
    thing = object()
    batch = {"x": X, "why": thing, "deep": [{"names": ("a", "b")}]}
    mapped = tree_map(lambda t: t + 1, batch)
    assert mapped["why"] is thing and mapped["deep"] == [{"names": ("a", "b")}] and torch.equal(mapped["x"], X + 1)


# ---- fingerprints


class Opaque:
    """An object whose repr is its address."""

    def __init__(self, x, label):
        self.x, self.label = x, label


class Slots:
    """An object that shows nothing of itself but its address."""

    __slots__ = ("x",)


def items(change=lambda i, x: x):
    return [(change(i, X[i].clone()), int(Y[i])) for i in range(6)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: (X.clone(), Y.clone()),
        lambda: TensorDataset(X.clone(), Y.clone()),
        items,
        lambda: [{"x": x, "y": y, "tags": {"b", "a"}} for x, y in items()],
        lambda: [Record(x, torch.tensor(y)) for x, y in items()],
        lambda: [Opaque(x, y) for x, y in items()],
        lambda: [(x, Slots()) for x, _ in items()],
        lambda: [(x.numpy(), str(y)) for x, y in items()],
        lambda: [np.array(["text", "more"], dtype=object) for _ in range(3)],
        lambda: [x.numpy().astype(">f4") for x, _ in items()],
        lambda: [x.bfloat16() for x, _ in items()],
    ],
    ids=[
        *("tuple", "TensorDataset", "list", "dicts", "dataclasses", "objects", "objects without contents"),
        *("arrays and texts", "arrays of objects", "big-endian", "bfloat16"),
    ],
)
def test_a_fingerprint_is_of_content_not_of_identity(make):
    first, second = make(), make()
    assert fingerprint(first) == fingerprint(second) == fingerprint(Examples(second))
    assert not fingerprint(first).startswith("unstable")


@pytest.mark.parametrize(
    "other",
    [
        lambda: items()[::-1],
        lambda: items(lambda i, x: x + (i == 3) * 1e-6),
        lambda: items(lambda i, x: x.double()),
        lambda: items(lambda i, x: x.reshape(2, 1)),
        lambda: items()[:-1],
        lambda: [(x, y + 1) for x, y in items()],
        lambda: [{"x": x, "y": y} for x, y in items()],
    ],
    ids=["order", "one value", "dtype", "shape", "length", "labels", "container"],
)
def test_any_change_of_content_changes_the_fingerprint(other):
    assert fingerprint(items()) != fingerprint(other())


def test_numbers_do_not_run_together():
    assert fingerprint([[1, 23]]) != fingerprint([[12, 3]])
    assert fingerprint([{"a": "bc"}]) != fingerprint([{"ab": "c"}])
    assert fingerprint([[[1], 2]]) != fingerprint([[1, [2]]])


def test_a_fingerprint_is_the_same_in_another_process():
    code = (
        "import torch; from headwater.tasks import fingerprint\n"
        "class Opaque:\n    def __init__(self, x, label): self.x, self.label = x, label\n"
        "print(fingerprint([(Opaque(torch.arange(3), 1), {'b', 'a', 'c'}, 'text', 1.5, None, b'x')]))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"})
    assert other.stdout.strip() == fingerprint([(Opaque(torch.arange(3), 1), {"b", "a", "c"}, "text", 1.5, None, b"x")])


def test_random_augmentation_is_unstable_and_leaves_the_users_randomness_alone():
    class Flipped:
        def __len__(self):
            return 40

        def __getitem__(self, i):
            flips = torch.rand(()) < 0.3, np.random.rand() < 0.3, random.random() < 0.3
            return torch.full((2,), float(i)) + torch.tensor([float(any(flips)), 0.0])

    torch.manual_seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert fingerprint(Flipped()) == "unstable-40"
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


def test_a_long_dataset_is_sampled_and_says_so(monkeypatch):
    monkeypatch.setattr("headwater.tasks.batches._LIMIT", 5)
    assert fingerprint(range(1000)).startswith("sampled-")
    assert fingerprint(range(1000)) != fingerprint(range(1001))
    assert not fingerprint(torch.arange(1000)).startswith("sampled")  # columns are hashed whole, however long
