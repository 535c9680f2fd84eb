"""An image with the signed scores of its pixels laid over it: the pixels, and their html."""

from __future__ import annotations

import numpy as np

from headwater.report import readings
from headwater.report.explanations import Overlay
from headwater.report.grid import table
from headwater.report.markup import Markup, tag
from headwater.report.numbers import number
from headwater.report.png import data_uri

# Blue and orange: told apart with every common kind of colour blindness, both visible on the greys between FAINT and BRIGHT, and of different
# brightness, so that a copy without colours still tells them apart.
UP, DOWN = np.array([0, 104, 152.0]), np.array([236, 112, 18.0])
FAINT, BRIGHT = 92.0, 236.0  # black and white of the image under the colours
COVER = 0.92  # opacity of a full colour, so that the image can still be made out
PIXELS = 96  # images up to this size are drawn with crisp pixels


def blend(values: np.ndarray, limit: float, image: np.ndarray | None = None) -> np.ndarray:
    """The scores over a grey image: hue by sign, opacity by size, full at ``limit``.

    Args:
        values: (h, w), stretched over the image where that is larger. Scores that are not finite have no colour.
        image: uint8 (height, width) or (height, width, 3), or None for a plain ground.

    Returns:
        uint8 (height, width, 3).

    >>> blend(np.array([[1.0, -1.0, 0.0]]), 1.0).shape
    (1, 3, 3)
    """
    shape = values.shape if image is None else (max(values.shape[0], image.shape[0]), max(values.shape[1], image.shape[1]))
    scores = np.nan_to_num(stretched(values, shape), nan=0.0, posinf=limit, neginf=-limit)
    ground = np.full(shape, BRIGHT) if image is None else FAINT + (BRIGHT - FAINT) / 255 * stretched(grey(image), shape)
    opacity = COVER * np.clip(np.abs(scores) / limit, 0, 1)[..., None]
    colour = np.where(scores[..., None] > 0, UP, DOWN)
    return np.rint(ground[..., None] * (1 - opacity) + colour * opacity).astype(np.uint8)


def grey(image: np.ndarray) -> np.ndarray:
    """(height, width) brightness from 0 to 255 (weights of ITU-R BT.601 for colours)."""
    return image.astype(np.float64) if image.ndim == 2 else image @ np.array([0.299, 0.587, 0.114])


def stretched(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Each value repeated over the pixels that it stands for.

    >>> stretched(np.array([[1, 2]]), (2, 4)).tolist()
    [[1, 1, 2, 2], [1, 1, 2, 2]]
    """
    rows, columns = (np.arange(length) * had // length for length, had in zip(shape, values.shape, strict=True))
    return values[rows][:, columns]


def ramp(width: int = 201) -> np.ndarray:
    """The colours from the most negative to the most positive score, (10, width, 3)."""
    return blend(np.tile(np.linspace(-1, 1, width), (10, 1)), 1.0)


def overlay(part: Overlay) -> Markup:
    """The image, its baseline and the scores side by side, the scale of colours, and the strongest pixels behind a fold."""
    shown = {readings.INPUT: part.image, readings.BASELINE: part.baseline, readings.PUSHED: blend(part.values, part.limit, part.image)}
    panes = [_pane(image, name, part.title) for name, image in shown.items() if image is not None]
    scale = tag(
        "div",
        tag("span", number(-part.limit), aria_hidden="true"),
        tag("img", src=data_uri(ramp()), alt="The scale of colours, from pushed down at the left over nothing in the middle to pushed up at the right"),
        tag("span", "+" + number(part.limit), aria_hidden="true"),
        class_="ramp",
    )
    words = tag("p", readings.overlay_words(part), class_="legend-line")
    numbers = tag("details", tag("summary", "Numbers"), table(readings.strongest_pixels(part)), class_="numbers")
    return tag(
        "figure",
        heading(part.title, part.subtitle, part.flag),
        tag("div", panes, class_="panes"),
        scale,
        words,
        numbers,
        class_="panel overlay explained",
        data_testid="overlay",
    )


def _pane(image: np.ndarray, name: str, title: str) -> Markup:
    crisp = "crisp" if max(image.shape[:2]) <= PIXELS else None
    picture = tag("div", tag("img", src=data_uri(image), alt=f"{title}: {name}", class_=crisp, decoding="async"), class_="picture")
    return tag("div", picture, tag("p", name, class_="pane-name"), class_="pane", data_testid="pane")


def heading(title: str, subtitle: str, flag: str | None) -> Markup:
    """The name of an example, a line about it, and what to notice."""
    small = subtitle and tag("small", subtitle)
    chip = flag and tag("p", tag("span", "⚑", aria_hidden="true"), " ", flag, class_="flag", data_testid="flag")
    return tag("figcaption", tag("h3", title, " ", small), chip)
