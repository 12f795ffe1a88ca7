"""What a file is, apart from its label: content hashes, size, brightness, borders; and which files are the
same picture.
"""

import stat
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medaug.images import describe_image, hash_bytes, hash_file, map_files, open_image
from medaug.runtime import replace_when_done

VERSION = 2  # raise it when a measure changes: the kept measures are then taken anew
THUMBNAIL = 32
PAIRS_AT_ONCE = 32768  # 256 MB of thumbnails
SIDES = ("top", "right", "bottom", "left")
CORNERS = ("top_left", "top_right", "bottom_right", "bottom_left")
BORDER_FEATURES = [f"border_{side}_{measure}" for side in SIDES for measure in ("mean", "std")]
BORDER_FEATURES += [f"corner_{corner}_mean" for corner in CORNERS]
SIZE_FEATURES = ["width", "height", "aspect", "bit_depth", "channels"]


def inspect_files(files: list[Path], cache: Path | str | None = None) -> pd.DataFrame:
    """Hash and measure each file, one row each in the order of `files`: `sha256`, `problem` and what
    `measure_file` gives.

    `problem` is the reason why a file cannot be used (then the measures are missing), else "". With `cache`
    (a folder) the measures are kept there, keyed by the file's SHA-256, and only new contents are decoded.
    """
    rows = pd.DataFrame(map_files(_hash_file, files, "hashing"), columns=["sha256", "problem"], dtype=str)
    kept_at = Path(cache) / f"files-v{VERSION}.parquet" if cache else None
    kept = (
        pd.read_parquet(kept_at) if kept_at and kept_at.exists() else pd.DataFrame({"sha256": []}, dtype=str)
    )
    new = rows.assign(file=files)[rows["problem"] == ""].drop_duplicates("sha256")
    new = new[~new["sha256"].isin(kept["sha256"])]
    if len(new):
        measured = pd.DataFrame(map_files(_measure, new["file"].tolist(), "inspecting"), index=new.index)
        kept = pd.concat([kept, measured.assign(sha256=new["sha256"])], ignore_index=True)
        if kept_at:
            with replace_when_done(kept_at) as temporary:
                kept.to_parquet(temporary, index=False)
    rows = rows.merge(kept, on="sha256", how="left", suffixes=("", "_decoding"))
    if "problem_decoding" in rows:
        rows["problem"] = rows["problem"].where(
            rows["problem"] != "", rows.pop("problem_decoding").fillna("")
        )
    return rows


def measure_file(file: Path) -> dict:
    """Decode one image file and return its measures: size (px); format, mode, channels, bit depth and frames as
    stored; grey levels (0-255) of the whole and of the outer sixteenth (four sides, four corners), a hash of its pixels and a
    squashed 32 x 32 thumbnail.

    The pixel hash is of the upright 8-bit grey image and its size, so two files that decode alike share it.
    Raises ValueError with the reason.
    """
    image = open_image(
        file, "L"
    )  # before the description: it gives the reason where there is nothing to describe
    image_u8 = np.asarray(image)
    height, width = image_u8.shape
    measures = {
        "width": width,
        "height": height,
        "aspect": width / height,
        **describe_image(file),
        "bytes": file.stat().st_size,
        "pixel_sha256": hash_bytes(f"{width}x{height}:".encode() + image_u8.tobytes()),
        "mean": float(image_u8.mean()),
        "std": float(image_u8.std()),
        "black_share": float((image_u8 < 8).mean()),
        "white_share": float((image_u8 > 247).mean()),
        "thumbnail": image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS).tobytes(),
    }
    return measures | _measure_border(image_u8)


def stack_thumbnails(inspected: pd.DataFrame) -> np.ndarray:
    """Return the thumbnails of `inspect_files` as uint8 (N, 32, 32)."""
    flat = np.frombuffer(b"".join(inspected["thumbnail"]), np.uint8)
    return flat.reshape(-1, THUMBNAIL, THUMBNAIL)


def compute_phash(thumbnails_u8: np.ndarray) -> np.ndarray:
    """Return the 64-bit perceptual hash of each thumbnail, (N, 32, 32) -> uint64 (N,), as `imagehash.phash`
    defines it.

    Bits: is each of the 8 x 8 lowest DCT coefficients above their median (Zauner 2010, section 3.2.1)? One
    call for all images; `imagehash` takes them one by one.
    """
    spectrum = dctn(thumbnails_u8.astype(np.float64), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
    bits = spectrum > np.median(spectrum, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)[:, 0]


def find_near_pairs(
    phash: np.ndarray,
    thumbnails_u8: np.ndarray,
    max_distance: int = 4,
    min_correlation: float = 0.98,
    against: tuple[np.ndarray, np.ndarray] | None = None,
    block: int = 512,
) -> pd.DataFrame:
    """Return the pairs of images that look the same: columns `first, second, distance, correlation`, rows of
    the input.

    A pair is found by the Hamming distance of the hashes (all pairs, by popcount, in blocks: memory O(block x
    N)) and confirmed by the correlation of the two thumbnails. With `against=(phash, thumbnails_u8)`,
    `second` counts in that set.
    """
    other_hash, other_thumbnails = against or (phash, thumbnails_u8)
    unit = _standardise(thumbnails_u8)
    other_unit = _standardise(other_thumbnails) if against else unit
    found = []
    for start in range(0, len(phash), block):
        distance = np.bitwise_count(phash[start : start + block, None] ^ other_hash[None])
        first, second = np.nonzero(distance <= max_distance)
        if not against:
            first, second = first[first + start < second], second[first + start < second]
        correlation = _correlate(unit, first + start, other_unit, second)
        found.append(
            pd.DataFrame(
                {
                    "first": first + start,
                    "second": second,
                    "distance": distance[first, second],
                    "correlation": correlation.astype(float).round(4),
                }
            )
        )
    pairs = pd.concat(found, ignore_index=True)
    return pairs[pairs["correlation"] >= min_correlation].reset_index(drop=True)


def match_hashes(
    phash: np.ndarray, others: np.ndarray, max_distance: int = 4, block: int = 512
) -> np.ndarray:
    """Say of each hash, (N,), whether any of `others` is within `max_distance` bits: the first opinion alone."""
    parts = range(0, len(phash), block)
    near = [
        (np.bitwise_count(phash[at : at + block, None] ^ others[None]) <= max_distance).any(axis=1)
        for at in parts
    ]
    return np.concatenate([np.zeros(0, bool), *near])


def group_pairs(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return for each of `count` items the number of its group, where paired items share a group
    (transitively).
    """
    graph = coo_array((np.ones(len(first)), (np.asarray(first), np.asarray(second))), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _hash_file(file: Path) -> tuple[str, str]:
    """Return a file's SHA-256 and "", or "" and why it cannot be read. Opens nothing that could wait for ever."""
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            return "", "not a file (a folder, pipe or device)"
        if not found.st_size:
            return "", "not an image: the file is empty"
        return hash_file(file), ""
    except OSError as error:
        return "", f"cannot be read ({error.strerror})"
    except ValueError as error:  # a name that no file can have
        return "", f"cannot be read ({error})"


def _measure(file: Path) -> dict:
    try:
        return {"problem": ""} | measure_file(file)
    except (OSError, ValueError) as error:
        return {"problem": str(error), "thumbnail": b""}


def _measure_border(image_u8: np.ndarray) -> dict[str, float]:
    height, width = image_u8.shape
    h, w = max(1, height // 16), max(1, width // 16)
    top, bottom, left, right = image_u8[:h], image_u8[-h:], image_u8[:, :w], image_u8[:, -w:]
    strips = dict(zip(SIDES, (top, right, bottom, left), strict=True))
    measures = {f"border_{side}_mean": float(strip.mean()) for side, strip in strips.items()}
    measures |= {f"border_{side}_std": float(strip.std()) for side, strip in strips.items()}
    corners = (top[:, :w], top[:, -w:], bottom[:, -w:], bottom[:, :w])
    return measures | {
        f"corner_{name}_mean": float(c.mean()) for name, c in zip(CORNERS, corners, strict=True)
    }


def _correlate(unit: np.ndarray, first: np.ndarray, other_unit: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the product of rows `first` and `second`, (P,); in parts, as many blank pictures are many pairs."""
    parts = range(0, len(first), PAIRS_AT_ONCE)
    products = [
        np.einsum(
            "np,np->n", unit[first[at : at + PAIRS_AT_ONCE]], other_unit[second[at : at + PAIRS_AT_ONCE]]
        )
        for at in parts
    ]
    return np.concatenate([np.zeros(0, np.float32), *products])


def _standardise(thumbnails_u8: np.ndarray) -> np.ndarray:
    """(N, h, w) grey levels -> (N, h w) rows of mean 0 and length 1 (a flat image stays 0)."""
    rows = thumbnails_u8.reshape(len(thumbnails_u8), -1).astype(np.float32)
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
