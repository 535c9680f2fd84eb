"""Examples become the cards that their owner would draw: pictures keep their pixels, texts their words, numbers their first digits."""

import numpy as np
import pytest
import torch

from headwater.report import Card, Exhibit, attribution
from headwater.report.examples import picture, wording

GREY = (np.arange(28 * 28) % 256).reshape(28, 28).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY.T])


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (GREY, GREY),
        (GREY[None], GREY),
        (GREY[..., None], GREY),
        (COLOUR, COLOUR.transpose(1, 2, 0)),
        (COLOUR.transpose(1, 2, 0), COLOUR.transpose(1, 2, 0)),
        (GREY / 255, GREY),
        (torch.from_numpy(GREY / 255).requires_grad_(), GREY),
        (GREY.astype(np.int64), GREY),
        ((GREY / 255 - 0.1307) / 0.3081, GREY),  # standardised: stretched back to its full range
    ],
)
def test_a_picture_keeps_its_pixels(part, expected):
    np.testing.assert_array_equal(picture(part), expected)


def test_a_dim_picture_stays_dim():
    assert picture(np.full((28, 28), 0.25)).max() == 64


@pytest.mark.parametrize("part", [np.zeros(784), np.zeros((28, 4)), np.zeros((5, 28, 28)), np.float32(3), "text", None, np.zeros((0, 28)), object()])
def test_what_is_no_picture_is_not_drawn(part):
    assert picture(part) is None


def test_constant_and_broken_pictures_are_drawn():
    assert picture(np.full((9, 9), -5.0)).shape == (9, 9)
    assert picture(np.where(np.eye(9) > 0, np.nan, np.linspace(-1, 1, 9))).shape == (9, 9)


def test_texts_and_numbers_are_written():
    assert wording(("a sentence", 3)) == "a sentence"
    assert wording({"input_ids": np.arange(3), "text": "said"}) == "said"
    assert wording(np.arange(20)) == "0, 1, 2, 3, 4, 5, 6, 7, … (20 numbers)"
    assert len(wording("x" * 10_000)) < 1000
    assert wording(object()) is None


@pytest.mark.parametrize(
    "data",
    [
        (np.stack([GREY, GREY]), np.array([7, 8])),
        (torch.from_numpy(np.stack([GREY, GREY])), torch.tensor([7, 8])),
        {"pixels": np.stack([GREY, GREY]), "labels": np.array([7, 8])},
        [(GREY, 7), (GREY, 8)],
        torch.utils.data.TensorDataset(torch.from_numpy(np.stack([GREY, GREY])), torch.tensor([7, 8])),
    ],
    ids=["arrays", "tensors", "mapping", "list", "dataset"],
)
def test_any_kind_of_dataset_is_indexed(data):
    card = Exhibit(data, flags={1: "look"}).card(1, 0.5, 0.1)
    assert (card.title, card.subtitle, card.score, card.stderr, card.flag) == ("#1", "label 8", 0.5, 0.1, "look")
    np.testing.assert_array_equal(card.image, GREY)


def test_proponents_are_the_largest_positive_scores_and_opponents_the_smallest_negative_ones():
    values = np.array([0.5, -1.0, 2.0, 0.0, -3.0, 1.0])
    shown = attribution(Card("query"), values, 0.1 * abs(values), Exhibit(), k=2)
    assert [(c.title, c.score) for c in shown.proponents] == [("#2", 2.0), ("#5", 1.0)]
    assert [(c.title, c.score) for c in shown.opponents] == [("#4", -3.0), ("#1", -1.0)]
    assert shown.opponents[0].stderr == pytest.approx(0.3)
    assert attribution(Card("query"), np.zeros(3), None, Exhibit()).proponents == ()
