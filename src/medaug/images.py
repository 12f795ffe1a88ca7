"""Decode once, resize once, keep: files become a memory-mapped array keyed by content and transform."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from medaug.dicom import describe_dicom, is_dicom, open_dicom
from medaug.runtime import progress, replace_when_done

DECODER = 1  # raise it when decoding or resizing changes what comes out: old cache files are then left alone
BIT_DEPTHS = (8, 10, 12, 14, 16)
IMAGE_MODES = {"L": (), "RGB": (3,)}
STORED_BITS = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I": 32, "F": 32}
# What images are kept in. Pillow knows more, among them formats that start other programs (EPS).
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "JPEG2000")
# `open_image` compares sizes itself: a filter set for one call would not hold in threads
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def load_images(
    frame: pd.DataFrame, base: Path | str, size: int, mode: str = "L", cache: Path | str | None = None
) -> np.ndarray:
    """Return the images of `frame` in its order: uint8 (N, size, size), or (N, size, size, 3) for mode "RGB".

    `frame` needs the column `path`, relative to `base` or absolute; with a column `sha256` the files are also
    checked against it. The shorter side is resized to `size` (Lanczos, antialiased) and the centre is cut
    out: padding would turn the aspect ratio into a visible border, squashing would turn it into a
    deformation, and both can tell classes apart. Decoded images are kept under `cache` (default `base/cache`)
    and come back memory-mapped, copy-on-write. Raises ValueError or FileNotFoundError that names the file.
    """
    if mode not in IMAGE_MODES:
        raise ValueError(f"mode '{mode}' is unknown: choose L (grey) or RGB")
    hashes = frame["sha256"].astype(str).tolist() if "sha256" in frame.columns else None
    return _load_cached(frame["path"], hashes, Path(base), size, mode, cache)


def load_masks(
    frame: pd.DataFrame, base: Path | str, size: int, cache: Path | str | None = None
) -> np.ndarray:
    """Return the masks of `frame` (column `mask_path`), bool (N, size, size), cut like their images.

    A pixel of the smaller mask is on where at least half of its area was. Raises ValueError naming the first
    image that has no mask.
    """
    without = frame.loc[frame["mask_path"].fillna("") == ""]
    if len(without):
        raise ValueError(
            f"{len(without)} image(s) have no mask, first {without['path'].iloc[0]}: "
            "select rows with mask_path"
        )
    return _load_cached(frame["mask_path"], None, Path(base), size, "mask", cache).view(bool)


def open_image(source: Path | str | bytes, mode: str = "L", hint: int | None = None) -> Image.Image:
    """Decode one image file (path or its bytes) to a PIL image of mode "L" or "RGB", upright, 8 bits a
    channel.

    Handles EXIF rotation, palettes, alpha (laid over black), CMYK, 16 bits (scaled by the smallest usual
    bit depth, 8 to 16, that holds the brightest pixel) and DICOM (`medaug.dicom`); of several frames the first.
    `hint` lets a JPEG be decoded at a reduced scale not below 2 x `hint` pixels. Raises ValueError with the
    reason, without the name of the file.
    """
    try:
        if is_dicom(source):
            return open_dicom(source).convert(mode)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    try:
        with Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
        ) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            if hint and image.mode in ("L", "RGB"):
                image.draft(image.mode, (2 * hint, 2 * hint))
            image.load()
            return _to_8_bits(ImageOps.exif_transpose(image), mode)
    except Image.DecompressionBombError:
        raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels") from None
    except Image.UnidentifiedImageError:
        raise ValueError("not an image that Pillow can read") from None
    except MemoryError:
        raise ValueError("too large for this machine's memory") from None
    except Exception as error:  # decoders raise what the damaged bytes lead to
        raise ValueError(f"damaged image ({error})") from None


def describe_image(source: Path | str) -> dict:
    """Return how an image file is stored: `format, mode, channels, bit_depth, frames`; nothing is decoded.

    Raises ValueError or OSError as `open_image` does.
    """
    if is_dicom(source):
        return describe_dicom(source)
    with Image.open(source, formats=FORMATS) as stored:
        return {
            "format": stored.format,
            "mode": stored.mode,
            "channels": len(stored.getbands()),
            "bit_depth": STORED_BITS.get(stored.mode, 8),
            "frames": getattr(stored, "n_frames", 1),
        }


def resize_centre(image: Image.Image, size: int, resample: int = Image.Resampling.LANCZOS) -> Image.Image:
    """Resize the shorter side of a PIL image to `size` and cut out the centre: (W, H) -> (size, size)."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), method=resample)


def hash_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def hash_file(file: Path | str) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, without reading it whole. Raises OSError."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def map_files(function: Callable, items: list, desc: str, unit: str = "file") -> list:
    """Apply `function` to every item in threads (Pillow and hashlib release the interpreter lock); keep the
    order.
    """
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(progress(pool.map(function, items), desc=desc, total=len(items), unit=unit))


def _to_8_bits(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_scale_deep(np.asarray(image)))
    return image.convert(mode)


def _scale_deep(pixels: np.ndarray) -> np.ndarray:
    """Map integers of more than 8 bits, or floats, to uint8 0-255: (H, W) -> (H, W)."""
    pixels = pixels.astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("pixels that are not finite")
    low, high = min(pixels.min(), 0.0), pixels.max()
    if low < 0 or high >= 2**16:
        low, high = pixels.min(), max(pixels.max(), pixels.min() + 1)
    elif high > 1:
        high = 2 ** next(bits for bits in BIT_DEPTHS if high < 2**bits) - 1
    else:
        high = 1.0
    return np.round((pixels - low) / (high - low) * 255).astype(np.uint8)


def _load_cached(
    names: pd.Series, hashes: list[str] | None, base: Path, size: int, mode: str, cache: Path | str | None
) -> np.ndarray:
    """Serve rows from the cache's shards; decode what is missing into one new shard; keep the order of
    `names`.
    """
    files = [base / str(name) for name in names]
    if hashes is None:
        hashes = map_files(lambda file: hash_bytes(_read(file)), files, "hashing")
    folder = (Path(cache) if cache else base / "cache") / f"{mode}-{size}px-v{DECODER}"
    if not files:
        return np.zeros((0, size, size, *IMAGE_MODES.get(mode, ())), np.uint8)
    shards = {shard: shard.with_suffix(".txt").read_text().split() for shard in sorted(folder.glob("*.npy"))}
    known = set().union(*shards.values())
    missing = [(sha, file) for sha, file in zip(hashes, files, strict=True) if sha not in known]
    if missing:
        shards[_write_shard(folder, missing, size, mode)] = [sha for sha, _ in missing]
    for shard, rows in shards.items():
        if rows[: len(hashes)] == hashes:
            return np.load(shard, mmap_mode="c")[: len(hashes)]
    return _gather(shards, hashes, size, mode)


def _write_shard(folder: Path, missing: list[tuple[str, Path]], size: int, mode: str) -> Path:
    decoded = map_files(lambda item: _decode(*item, size, mode), missing, "decoding", "image")
    index = "".join(f"{sha}\n" for sha, _ in missing)
    shard = folder / f"{hash_bytes(index.encode())[:16]}.npy"
    # the list of hashes goes first: a shard that a reader can see always has its index
    with replace_when_done(shard.with_suffix(".txt")) as temporary:
        temporary.write_text(index)
    with replace_when_done(shard) as temporary, open(temporary, "wb") as file:
        np.save(file, np.stack(decoded))
    return shard


def _gather(shards: dict[Path, list[str]], hashes: list[str], size: int, mode: str) -> np.ndarray:
    images = np.empty((len(hashes), size, size, *IMAGE_MODES.get(mode, ())), np.uint8)
    position = pd.Series(range(len(hashes))).groupby(hashes).indices
    for shard, rows in shards.items():
        wanted = [(row, at) for row, sha in enumerate(rows) if sha in position for at in position[sha]]
        if wanted:
            source, target = np.array(wanted).T
            images[target] = np.load(shard, mmap_mode="r")[source]
    return images


def _decode(sha256: str, file: Path, size: int, mode: str) -> np.ndarray:
    data = _read(file)
    if hash_bytes(data) != sha256:
        raise ValueError(f"{file} has changed since the manifest was written: run 01-data-audit again")
    try:
        if mode == "mask":
            mask = resize_centre(open_image(data, "L"), size, Image.Resampling.BOX)
            return (np.asarray(mask) >= 128).astype(np.uint8)
        return np.asarray(resize_centre(open_image(data, mode, hint=size), size))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; leave it out of the manifest or replace it") from None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise FileNotFoundError(f"cannot read {file}: {error.strerror}") from None
