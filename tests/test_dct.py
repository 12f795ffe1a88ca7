"""Report 2's DCT methods: the published faults are there, and the corrected forms have none of them."""

import numpy as np
import pytest
from scipy.fft import dctn

from medaug import guards
from medaug.dct import METHODS, ZEROED_SHARE, transform_dct


@pytest.fixture(params=[(31, 40), (31, 40, 3)], ids=["grey", "colour"])
def image_u8(request) -> np.ndarray:
    """A smooth picture with grain, brightest where it is 255: (H, W) or (H, W, 3) uint8."""
    rng = np.random.default_rng(0)
    shape = request.param
    rows = np.linspace(0, np.pi, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return np.clip(120 + 100 * np.sin(rows) + rng.normal(0, 20, shape), 0, 255).astype(np.uint8)


def transform_back(image_u8: np.ndarray) -> np.ndarray:
    return dctn(image_u8.astype(float), axes=(0, 1), norm="ortho")


@pytest.mark.parametrize("method", METHODS)
def test_size_type_and_seed(image_u8, method):
    before = image_u8.copy()
    one, two = (transform_dct(image_u8, method, seed=[3, 1]) for _ in range(2))
    assert one.shape == image_u8.shape and one.dtype == np.uint8 and (one == two).all() and (image_u8 == before).all()


@pytest.mark.parametrize(("method", "draws"), [("dct1", False), ("dct2", False), ("dct1-corrected", True), ("dct2-corrected", True)])
def test_only_the_corrected_methods_draw_anything(image_u8, method, draws):
    assert (transform_dct(image_u8, method, 0) != transform_dct(image_u8, method, 1)).any() == draws


def test_published_method_2_is_a_duplicate_and_the_guard_says_so(image_u8):
    copy = transform_dct(image_u8, "dct2")
    assert (image_u8.astype(int) - copy).min() >= 0 and (image_u8.astype(int) - copy).max() == 1  # decimals are cut off
    with pytest.raises(guards.GuardError, match="plain duplicates"):
        guards.check_augmentation_changes(image_u8[None], copy[None])


def test_published_method_1_zeroes_by_grey_levels():
    """Every wave outside mode +- 2 sd of the pixels is gone: here all but the mean, since no wave is that large."""
    image_u8 = np.full((16, 16), 200, np.uint8)
    image_u8[::2, ::2] = 202
    assert (transform_dct(image_u8, "dct1") == 200).all()


def test_published_method_1_wraps_around():
    """A bright picture whose edges overshoot 255 comes back with black pixels in it."""
    image_u8 = np.full((32, 32), 250, np.uint8)
    image_u8[:, :6] = 140
    wrapped = transform_dct(image_u8, "dct1")
    assert image_u8.min() == 140 and wrapped.min() < 20


def test_corrected_method_1_zeroes_the_share_of_the_mask(image_u8):
    kept = transform_dct(image_u8, "dct1-corrected")
    sizes = np.abs(transform_back(kept)) < 2  # rounding to grey levels leaves a little in each
    assert abs(sizes.mean() - np.mean(np.abs(transform_back(image_u8)) < 2) * (1 - ZEROED_SHARE) - ZEROED_SHARE) < 0.05
    assert abs(kept.mean() - image_u8.mean()) < 3


def test_corrected_method_2_adds_half_the_standard_deviation():
    image_u8 = np.tile(np.linspace(100, 156, 64).astype(np.uint8), (64, 1))  # far from 0 and 255, so nothing is clipped
    change = transform_dct(image_u8, "dct2-corrected").astype(float) - image_u8
    assert change.std() == pytest.approx(image_u8.std() / 2, rel=0.05) and abs(change.mean()) < 0.1


@pytest.mark.parametrize("method", ["dct1-corrected", "dct2-corrected"])
def test_corrected_methods_change_images(image_u8, method):
    assert guards.check_augmentation_changes(image_u8[None], transform_dct(image_u8, method)[None]) == 1


def test_an_unknown_method_is_named(image_u8):
    with pytest.raises(ValueError, match="no DCT method 'dct3'"):
        transform_dct(image_u8, "dct3")
