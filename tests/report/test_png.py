"""Pictures: read back by a reader of the format that shares no line with the writer, and by pillow where it is installed."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.report.png import data_uri, png, shrink
from tests.report.reading import picture, pixels


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_pixels_come_back(height, width, colour, seed):
    image = picture(seed, height, width, 3) if colour else picture(seed, height, width)
    np.testing.assert_array_equal(pixels(data_uri(image)), image)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_another_library_reads_the_same(shape):
    pillow = pytest.importorskip("PIL.Image")
    np.testing.assert_array_equal(np.asarray(pillow.open(io.BytesIO(png(picture(0, *shape))))), picture(0, *shape))


def test_views_that_are_not_contiguous_come_back():
    image = picture(0, 8, 6, 3).transpose(1, 0, 2)[::2]
    np.testing.assert_array_equal(pixels(data_uri(image)), image)


@pytest.mark.parametrize("shape", [(512, 512), (300, 1000, 3), (1, 5000), (257, 2)])
def test_large_images_shrink_to_means(shape):
    small = shrink(picture(0, *shape))
    assert max(small.shape[:2]) <= 256 and min(small.shape[:2]) >= 1 and small.ndim == len(shape)
    assert shrink(np.full(shape, 77, np.uint8)).min() == 77 == shrink(np.full(shape, 77, np.uint8)).max()
    assert small.mean() == pytest.approx(picture(0, *shape).mean(), abs=3)


def test_small_images_are_left_alone():
    image = picture(0, 256, 10)
    assert shrink(image) is image
