"""Augmentation of images by their discrete cosine transform (DCT), as report 2 published it and as its words describe it.

The published code (`KuijpersNick0/DeepLearning_DA_FT_DiffusionModel`, claims 2.09 and 2.10) has two methods. Their faults
are kept in `dct1` and `dct2`; the two `-corrected` methods do what the code or its text set out to do.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.fft import dctn, idctn

ZEROED_SHARE = 0.6  # of the coefficients, in the published random mask


def transform_dct(image_u8: np.ndarray, method: str, seed: int | Sequence[int] = 0) -> np.ndarray:
    """Return an image changed in its DCT coefficients, channel by channel: (H, W) or (H, W, 3) uint8 -> the same.

    `method` is one of `METHODS`; the transform is orthonormal and the first coefficient (the mean) is kept. `seed` matters
    to the corrected methods; the published ones turn out to draw nothing. Raises ValueError for another method.
    """
    if method not in METHODS:
        raise ValueError(f"no DCT method '{method}': choose from {', '.join(METHODS)}")
    coefficients = dctn(image_u8.astype(np.float64), axes=(0, 1), norm="ortho")
    change, store = METHODS[method]
    changed = change(coefficients.copy(), image_u8, np.random.default_rng(seed))
    changed[0, 0] = coefficients[0, 0]
    return store(idctn(changed, axes=(0, 1), norm="ortho"))


def _keep_range_of_pixels(coefficients: np.ndarray, image_u8: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Zero coefficients whose size lies outside mode +- 2 sd of the *pixels*; the published random mask is overwritten."""
    mode, reach = np.bincount(image_u8.ravel()).argmax(), 2 * image_u8.std()
    coefficients[(np.abs(coefficients) < mode - reach) | (np.abs(coefficients) > mode + reach)] = 0
    return coefficients


def _drop_at_random(coefficients: np.ndarray, image_u8: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Zero the share of coefficients that the published mask would have zeroed, drawn anew for each channel."""
    coefficients[rng.random(coefficients.shape) < ZEROED_SHARE] = 0
    return coefficients


def _add_nothing(coefficients: np.ndarray, image_u8: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add uniform noise times the standard deviation of a single number, which is 0."""
    sigma = np.std(np.std(image_u8.astype(np.float64))) / 2
    return coefficients + sigma * rng.uniform(-0.5, 0.5, coefficients.shape)


def _add_gaussian(coefficients: np.ndarray, image_u8: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add Gaussian noise of half the pixels' standard deviation, as the text says."""
    return coefficients + image_u8.std() / 2 * rng.normal(size=coefficients.shape)


def _cut_off(pixels: np.ndarray) -> np.ndarray:
    """Store as the published code did: decimals cut off, and what lies outside 0-255 wrapped around."""
    return pixels.astype(np.int64).astype(np.uint8)


def _round_and_clip(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


METHODS: dict[str, tuple[Callable, Callable]] = {
    "dct1": (_keep_range_of_pixels, _cut_off),
    "dct1-corrected": (_drop_at_random, _round_and_clip),
    "dct2": (_add_nothing, _cut_off),
    "dct2-corrected": (_add_gaussian, _round_and_clip),
}
