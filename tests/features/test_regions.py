"""Regions cover the input, hang together, and sum to the whole; their order is the greedy one."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, label

import headwater as hw
from headwater.errors import InputError
from headwater.features import regions
from headwater.result import FeatureScores


def images(n=3, channels=3, rows=30, columns=40, seed=0, smooth=2.0):
    return gaussian_filter(np.random.default_rng(seed).normal(size=(n, channels, rows, columns)), (0, 0, smooth, smooth))


def scores(values):
    n = len(values)
    return FeatureScores(values, np.zeros(n), np.zeros(n, int), values.reshape(n, -1).sum(1), np.zeros(n), "by hand", "f", "zeros")


# ---- superpixels


@pytest.mark.parametrize("smooth", [2.0, 0.0])
@pytest.mark.parametrize("count", [1, 12, 60, 250])
def test_superpixels_cover_hang_together_and_are_about_as_many(count, smooth):
    maps = regions.superpixels(images(smooth=smooth), count)
    assert maps.shape == (3, 3, 30, 40) and (maps == maps[:, :1]).all()
    for labels in maps[:, 0]:
        assert (np.unique(labels) == np.arange(labels.max() + 1)).all() and 0.7 * count <= labels.max() + 1 <= 1.35 * count + 1
        assert all(label(labels == k)[1] == 1 for k in range(labels.max() + 1))
        assert (np.diff(np.unique(labels, return_index=True)[1]) > 0).all()  # numbered in reading order


def test_superpixels_follow_edges():
    """Three flat areas with borders off the grid: no region lies in two of them, even at weak noise."""
    area = np.add.outer(np.arange(32) > 13, np.arange(32) > 18).astype(float)
    image = area + 0.02 * np.random.default_rng(0).normal(size=(32, 32))
    labels = regions.superpixels(image[None], 16, compactness=0.1)[0]
    shares = [np.bincount(area[labels == k].astype(int), minlength=3).max() / (labels == k).sum() for k in range(labels.max() + 1)]
    assert min(shares) > 0.95
    assert (labels[13, :18] != labels[14, :18]).mean() > 0.9


def test_superpixels_do_not_depend_on_brightness_contrast_batch_or_chance():
    x = images()
    maps = regions.superpixels(x, 40)
    np.testing.assert_array_equal(maps, regions.superpixels(7 * x - 3, 40))
    np.testing.assert_array_equal(maps[1:2], regions.superpixels(x[1:2], 40))
    np.testing.assert_array_equal(maps, regions.superpixels(torch.from_numpy(x), 40))
    last = regions.superpixels(np.moveaxis(x, 1, -1), 40)
    np.testing.assert_array_equal(last, np.moveaxis(maps, 1, -1))
    assert regions.superpixels(x[:, 0], 40).shape == (3, 30, 40)


def test_flat_images_fall_into_the_grid():
    labels = regions.superpixels(np.zeros((1, 12, 12)), 9)[0]
    np.testing.assert_array_equal(labels, regions.patches((12, 12), 4))


@pytest.mark.parametrize("channels_last", [False, True])
def test_groups_of_superpixels_sum_to_the_whole(channels_last):
    x = images()  # as many images as channels: nothing may be confused
    x = np.moveaxis(x, 1, -1) if channels_last else x
    values = np.random.default_rng(1).normal(size=x.shape)
    labels = regions.superpixels(x, 30)
    g = scores(values).group(labels)
    np.testing.assert_allclose(g.values.sum(1), values.sum((1, 2, 3)))
    flat = labels[..., 0] if channels_last else labels[:, 0]
    summed = values.sum(-1 if channels_last else 1)
    np.testing.assert_allclose(g.values[2, 5], summed[2][flat[2] == 5].sum())


# ---- patches and columns


@pytest.mark.parametrize(("shape", "size"), [((28, 28), 4), ((10, 7), (3, 2)), ((9,), 4), ((4, 5, 6), 2)])
def test_patches_are_boxes_that_cover(shape, size):
    labels = regions.patches(shape, size)
    steps = np.broadcast_to(size, len(shape))
    assert labels.shape == shape and labels.max() + 1 == np.prod([-(-a // b) for a, b in zip(shape, steps, strict=True)])
    for k in range(labels.max() + 1):
        where = np.argwhere(labels == k)
        low, high = where.min(0), where.max(0)
        assert len(where) == np.prod(high - low + 1) and (high - low < steps).all() and (low % steps == 0).all()
    assert (np.diff(np.unique(labels, return_index=True)[1]) > 0).all()


def test_patches_group_images_and_series():
    values = np.random.default_rng(0).normal(size=(2, 3, 12, 8))
    g = scores(values).group(regions.patches((12, 8), 4))
    np.testing.assert_allclose(g.values, values.reshape(2, 3, 3, 4, 2, 4).sum((1, 3, 5)).reshape(2, 6))
    series = scores(values[:, :, 0]).group(regions.patches((8,), 4))
    np.testing.assert_allclose(series.values, values[:, :, 0].reshape(2, 3, 2, 4).sum((1, 3)))


def test_columns_go_back_to_their_feature():
    names = ["capital_gain", "capital_loss", "job_a_b", "job", "x"]
    assert regions.columns(names, of=["capital_gain", "capital_loss", "job", "x"]) == ["capital_gain", "capital_loss", "job", "job", "x"]
    assert regions.columns(names) == ["capital", "capital", "job", "job", "x"]
    assert regions.columns(["job_a_b", "job_a", "job_b"], of=["job", "job_a"]) == ["job_a", "job_a", "job"]  # the longest that fits
    values = np.arange(10.0).reshape(2, 5)
    g = scores(values).group(regions.columns(names, of=["capital_gain", "capital_loss", "job", "x"]))
    assert g.feature_names == ("capital_gain", "capital_loss", "job", "x")
    np.testing.assert_array_equal(g.values[:, 2], values[:, 2] + values[:, 3])
    with pytest.raises(InputError, match="'x'"):
        regions.columns(names, of=["capital", "job"])
    with pytest.raises(InputError, match="separator"):
        regions.columns(names, separator="")


# ---- regions in order


def by_hand(values, maps):
    """The algorithm as the paper states it, with sets: take the region with the largest mean over its pixels that are not covered."""
    covered, steps = np.zeros(values.shape, bool), []
    while not covered.all():
        best = max(((values[(m == k) & ~covered].mean(), -i, -k) for i, m in enumerate(maps) for k in np.unique(m) if ((m == k) & ~covered).any()))
        new = (maps[-best[1]] == -best[2]) & ~covered
        steps.append((best[0], new))
        covered |= new
    return steps


def test_the_order_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 3, 12, 12))
    maps = [rng.integers(0, 5, (2, 12, 12)), regions.patches((12, 12), 4), regions.patches((12, 12), 5)]
    found = regions.ranked(scores(values), maps)
    for k in range(2):
        steps = by_hand(values[k].sum(0), [maps[0][k], *maps[1:]])
        np.testing.assert_allclose(found.gains[k], [gain for gain, _ in steps])
        np.testing.assert_allclose(found.areas[k], np.cumsum([new.mean() for _, new in steps]))
        for number, (gain, new) in enumerate(steps):
            np.testing.assert_array_equal(found.step[k] == number, new)
            np.testing.assert_allclose(found.heat[k][new], gain)
    np.testing.assert_allclose(found.heat.sum((1, 2)), values.sum((1, 2, 3)))


def test_regions_of_one_map_are_sorted_by_their_mean():
    values = np.random.default_rng(0).normal(size=(1, 1, 12, 12))
    labels = regions.patches((12, 12), 3)
    found = regions.ranked(scores(values), labels)
    means = [values[0, 0][labels == k].mean() for k in range(16)]
    np.testing.assert_allclose(found.gains[0], sorted(means, reverse=True))
    assert [k for _, k in found.regions[0]] == list(np.argsort(means)[::-1])
    assert found.mask(0.125).sum() == 18 and found.mask(0.01).sum() == 9 and found.mask(1.0).all()
    assert found.mask(0.125)[0][labels == found.regions[0][1][1]].all()


def test_a_planted_object_is_the_first_region():
    """A model that looks at a square alone: Integrated Gradients between black and white find the square's region first."""
    image = 0.3 * np.ones((1, 1, 24, 24))
    image[..., 6:14, 9:18] = 0.9
    weights = torch.zeros(1, 24, 24, dtype=torch.float64)
    weights[:, 6:14, 9:18] = 1.0
    between = hw.baselines.average(hw.baselines.constant(0.0), hw.baselines.constant(1.0))
    e = hw.explain(lambda x: (x * weights).sum((1, 2, 3)).tanh(), torch.from_numpy(image), baseline=between, progress=False)
    found = regions.ranked(e, [regions.superpixels(image, k) for k in (9, 25)])
    first = found.mask(0.01)[0]
    assert first[6:14, 9:18].sum() == first.sum() > 0


# ---- bad input


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: regions.patches((4, 4), 0), "patches"),
        (lambda: regions.patches((4, 4), (1, 2, 3)), "patches"),
        (lambda: regions.superpixels(np.zeros((4, 4))), "shape"),
        (lambda: regions.superpixels(np.full((1, 4, 4), np.nan)), "NaN"),
        (lambda: regions.superpixels(np.zeros((1, 4, 4)), 0), "count=0"),
        (lambda: regions.ranked(scores(np.zeros((2, 5))), np.zeros((2, 5), int)), "of kind table"),
        (lambda: regions.ranked(scores(np.zeros((2, 1, 9, 9))), np.zeros((8, 9), int)), "map of labels"),
        (lambda: regions.ranked(scores(np.zeros((2, 1, 9, 9))), []), "no maps"),
        (lambda: regions.ranked(scores(np.zeros((1, 3, 9, 9))), np.arange(243).reshape(1, 3, 9, 9)), "between the channels"),
        (lambda: regions.ranked(scores(np.zeros((2, 1, 9, 9))), np.zeros((9, 9), int)).mask(0), "mask"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(InputError, match=match):
        call()
