"""The vendored datasets: what the docstrings promise, the same on every machine, and faithful to the files they came from."""

import hashlib
import lzma
import sys
from importlib import resources

import numpy as np
import pytest
import torch

from headwater import data
from headwater.errors import InputError, MissingExtra

# Of the array bytes at the time they were vendored: an edit of the files must be a decision.
DIGESTS = {
    ("mnist.npz", "images"): "2913c6b6527114b7",
    ("mnist.npz", "labels"): "41b7b0a9d94690a3",
    ("concrete.npz", "features"): "c4f7f8fda5b3d88e",
    ("concrete.npz", "strength"): "6a51bf8690343094",
    ("motions.npz", "signals"): "575d09809eaff3e2",
    ("motions.npz", "labels"): "c10be8104bbcac67",
    ("emoji.npz", "images"): "574731a0449e9153",
    ("emoji.npz", "labels"): "66d52987a0480c0b",
    ("adult.npz", "age"): "c366c5d5201b261c",
    ("adult.npz", "hours-per-week"): "5e51bf5e93101324",
    ("adult.npz", "capital-gain"): "447fc17bf8fe01b1",
    ("adult.npz", "occupation"): "18e21d0f5e3216f0",
    ("adult.npz", "sex"): "838fb665865a3dd4",
    ("adult.npz", "income"): "fbb4fd549817ddaf",
}


def stored(name, key):
    with resources.as_file(resources.files(data) / name) as path, np.load(path, allow_pickle=False) as arrays:
        return arrays[key]


@pytest.mark.parametrize(("name", "key"), DIGESTS)
def test_the_vendored_arrays_are_the_ones_that_were_vendored(name, key):
    assert hashlib.sha256(stored(name, key).tobytes()).hexdigest()[:16] == DIGESTS[name, key]


def test_mnist_has_the_promised_shapes_units_and_every_image_of_the_file():
    images, labels = data.mnist()
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == [500] * 10
    pairs = sorted((label, image.tobytes()) for label, image in zip(labels.tolist(), (images * 255).round().to(torch.uint8).numpy(), strict=True))
    assert pairs == sorted((int(label), image.tobytes()) for label, image in zip(stored("mnist.npz", "labels"), stored("mnist.npz", "images"), strict=True))


def test_mnist_is_shuffled_the_same_way_each_time_so_that_any_cut_holds_every_class():
    (images, labels), (again, same) = data.mnist(), data.mnist()
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert torch.bincount(labels[:4500], minlength=10).tolist() == [440, 460, 448, 447, 449, 454, 451, 466, 446, 439]
    assert torch.bincount(labels[:300], minlength=10).min() > 15


def test_motions_are_what_the_activities_would_make_a_watch_feel():
    signals, labels = data.motions()
    assert signals.shape == (80, 6, 100)
    assert (signals.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.bincount(labels).tolist() == [20] * 4
    assert torch.bincount(labels[:40], minlength=4).min() >= 8  # shuffled: any cut holds every activity
    assert len(data.MOTION_SENSORS) == 6
    swing = {name: signals[labels == k].std(dim=(0, 2)) for k, name in enumerate(data.MOTIONS)}
    assert (swing["standing"] < swing["walking"]).all() and (swing["walking"] < swing["running"]).all()
    assert (swing["badminton"] > 2 * swing["walking"]).all()
    assert torch.equal(data.motions()[0], signals)


def test_emoji_are_the_pictures_of_the_file_in_the_categories_asked_for():
    images, labels = data.emoji()
    assert images.shape == (1911, 3, 32, 32) and (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    found = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    pairs = sorted((label, image.tobytes()) for label, image in zip(labels.tolist(), found, strict=True))
    assert pairs == sorted((int(label), image.tobytes()) for label, image in zip(stored("emoji.npz", "labels"), stored("emoji.npz", "images"), strict=True))
    assert torch.bincount(labels[:400]).min() >= 1 and (images[:, :, 0, 0] > 0.98).all(1).float().mean() > 0.7  # shuffled, and on white
    two, which = data.emoji(("Symbols", "Flags"))
    for k, name in enumerate(("Symbols", "Flags")):
        assert torch.equal(two[which == k], images[labels == data.EMOJI.index(name)])
    yellow = data.emoji("Smileys & Emotion")[0].mean((0, 2, 3))
    assert yellow[0] > yellow[1] > yellow[2] + 0.2


@pytest.mark.parametrize("categories", [(), ("Flags", "Flags"), ("Faces",), "faces"])
def test_emoji_refuses_categories_that_there_are_none_of(categories):
    with pytest.raises(InputError, match="categories="):
        data.emoji(categories)


def test_concrete_is_standardised_in_the_rows_of_the_raw_numbers():
    (features, strength), (raw, mpa) = data.concrete(), data.concrete(standardize=False)
    assert features.shape == (1030, 8) == raw.shape
    assert strength.shape == (1030,) == mpa.shape
    assert {t.dtype for t in (features, strength, raw, mpa)} == {torch.float32}
    for column, original in [*zip(features.T, raw.T, strict=True), (strength, mpa)]:
        torch.testing.assert_close(column, (original - original.mean()) / original.std(correction=0), atol=2e-5, rtol=1e-4)
    assert mpa.mean().item() == pytest.approx(35.8, abs=0.05)  # the two numbers the docstring gives
    assert mpa.std().item() == pytest.approx(16.7, abs=0.05)
    assert sorted(mpa.tolist()) == sorted(stored("concrete.npz", "strength").astype(np.float32).tolist())


def test_the_columns_of_concrete_carry_their_names():
    raw, _ = data.concrete(standardize=False)
    means = dict(zip(data.CONCRETE_FEATURES, raw.mean(0).tolist(), strict=True))
    assert 140 < means["water"] < 220  # kg per cubic metre, as any concrete
    assert means["superplasticizer"] < 10 < means["fly_ash"] < means["blast_furnace_slag"] < means["cement"] < means["fine_aggregate"] < means["coarse_aggregate"]
    assert set(raw[:, 7].tolist()) <= {1, 3, 7, 14, 28, 56, 90, 91, 100, 120, 180, 270, 360, 365}  # ages in days


def test_split_keeps_every_example_once_and_the_columns_together():
    columns = (torch.arange(50), torch.arange(50) * 2)
    for seed in (None, 0, 1):
        train, test = data.split(columns, train=40, seed=seed)
        assert (len(train[0]), len(test[0])) == (40, 10)
        both = torch.cat([train[0], test[0]])
        assert sorted(both.tolist()) == list(range(50))
        assert torch.equal(torch.cat([train[1], test[1]]), both * 2)
        assert torch.equal(both, columns[0]) == (seed is None)
    assert not torch.equal(data.split(columns, 40, seed=0)[0][0], data.split(columns, 40, seed=1)[0][0])


def test_split_takes_a_fraction():
    train, test = data.split((torch.arange(50),), train=0.9)
    assert (len(train[0]), len(test[0])) == (45, 5)


@pytest.mark.parametrize("train", [0, 50, 51, -1, 0.0, 0.001, 0.999])
def test_split_refuses_an_empty_part(train):
    with pytest.raises(InputError, match="of 50 examples"):
        data.split((torch.arange(50),), train=train)


@pytest.mark.parametrize("columns", [(), (torch.arange(3), torch.arange(4)), torch.arange(3), (torch.tensor(1),)])
def test_split_refuses_what_is_not_a_tuple_of_columns(columns):
    with pytest.raises(InputError, match="share their first axis"):
        data.split(columns, train=2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
def test_flip_labels_flips_exactly_what_the_mask_says_and_always_to_another_class(dtype, fraction):
    labels = data.mnist()[1].to(dtype)
    before = labels.clone()
    noisy, flipped = data.flip_labels(labels, fraction=fraction)
    assert torch.equal(labels, before)
    assert noisy.dtype == dtype
    assert torch.equal(noisy != labels, flipped)
    assert flipped.sum() == round(5000 * fraction)
    assert noisy.max() <= 9


def test_flipped_labels_land_on_every_other_class_alike():
    labels = data.mnist()[1]
    noisy, flipped = data.flip_labels(labels, fraction=1.0)
    moves = torch.bincount(((noisy - labels) % 10)[flipped], minlength=10)
    assert moves[0] == 0
    assert (moves[1:] - 5000 / 9).abs().max() < 4 * (5000 * (1 / 9) * (8 / 9)) ** 0.5


def test_flip_labels_depends_on_its_seed_and_on_nothing_else():
    labels = data.mnist()[1]
    torch.manual_seed(1)
    first = data.flip_labels(labels, seed=3)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, data.flip_labels(labels, seed=3), strict=True))
    assert not torch.equal(first[1], data.flip_labels(labels, seed=4)[1])
    assert first[1].nonzero()[:5, 0].tolist() == [20, 28, 104, 166, 186]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.zeros(3), {}, "torch.float32"),
        (torch.zeros(3, dtype=torch.bool), {}, "torch.bool"),
        (torch.zeros(3, 1, dtype=torch.int64), {}, r"shape \(3, 1\)"),
        (torch.zeros(0, dtype=torch.int64), {}, r"shape \(0,\)"),
        (torch.arange(3), {"fraction": 1.5}, "fraction=1.5"),
        (torch.arange(3), {"fraction": float("nan")}, "fraction=nan"),
        (torch.arange(3), {"classes": 2}, "from 0 to 2 with classes=2"),
        (torch.arange(-1, 2), {}, "from -1 to 1"),
        (torch.zeros(3, dtype=torch.int64), {}, "classes=1"),
    ],
)
def test_flip_labels_refuses_what_it_cannot_flip(labels, options, message):
    with pytest.raises(InputError, match=message):
        data.flip_labels(labels, **options)


def test_adult_has_the_counts_that_its_source_states():
    train, test = data.adult()
    assert (len(train), len(test)) == (32_561, 16_281)
    assert [int(part["income"].sum()) for part in (train, test)] == [7_841, 3_846]
    assert list(train.columns) == list(test.columns)
    assert int((train == "?").to_numpy().sum()) == 4_262  # as its documentation counts them
    assert sorted(name for name in train if train[name].dtype.kind == "i") == sorted(
        ["age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week", "income"]
    )


def test_adult_s_rank_of_education_is_one_name_each():
    train, test = data.adult()
    for part in (train, test):
        assert (part.groupby("education")["education-num"].nunique() == 1).all()
    assert set(train.loc[train["education"] == "Doctorate", "education-num"]) == {16}


def test_adult_s_first_rows_are_those_of_the_source():
    train, test = data.adult()
    assert train.iloc[0].tolist() == [
        39, "State-gov", 77516, "Bachelors", 13, "Never-married", "Adm-clerical", "Not-in-family", "White", "Male", 2174, 0, 40, "United-States", 0,
    ]  # fmt: skip
    assert test.index[0] == 0
    train.loc[0, "age"] = 0  # a copy: the next reader gets the data as they are
    assert data.adult()[0].loc[0, "age"] == 39


def test_spam_is_the_one_that_was_vendored_and_repeats_nothing():
    with resources.as_file(resources.files(data) / "spam.jsonl.xz") as path:
        assert hashlib.sha256(lzma.decompress(path.read_bytes())).hexdigest()[:16] == "9493f76e86a99bad"
    texts, labels = data.spam()
    assert len(texts) == len(set(texts)) == len(labels) == 3_000
    assert labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == [2_119, 881]
    assert all(text == text.strip() and text for text in texts)
    assert 0.2 < labels[:500].double().mean() < 0.4  # shuffled: any cut holds both


def test_adult_without_pandas_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match="pip install"):
        data.adult()


def test_austen_is_the_text_that_was_vendored_from_first_word_to_last():
    with resources.as_file(resources.files(data) / "austen.txt.xz") as path:
        assert hashlib.sha256(lzma.decompress(path.read_bytes())).hexdigest()[:16] == "b6a140dee7fe140f"
    novels = data.austen()
    assert list(novels) == ["Northanger Abbey", "Persuasion"]
    northanger, persuasion = novels.values()
    assert northanger.startswith("NORTHANGER ABBEY") and northanger.endswith("Vol. II, Rambler.")
    assert persuasion.startswith("Persuasion") and persuasion.endswith("Finis")
    assert [text.count("Wentworth") > 100 for text in (northanger, persuasion)] == [False, True]
    assert [text.count("Tilney") > 100 for text in (northanger, persuasion)] == [True, False]
    assert all("Gutenberg" not in text and text.isascii() and max(map(len, text.split("\n"))) <= 73 for text in novels.values())
