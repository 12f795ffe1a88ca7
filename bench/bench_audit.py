"""The audit of 5,856 films with and without kept measures, near duplicates among 20,000, and loading from the cache.

The first comparison needs the Guangzhou films (MEDAUG_DATA) and is left out without them. "Cold" means that no measure
is kept; the system's own cache of the disk cannot be emptied from here. No learned features are in any of these.
"""

import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import imagehash
import numpy as np
import pandas as pd
import torch
from PIL import Image
from run import Comparison
from torchvision import datasets, transforms

from medaug import fingerprints, folder_audit, images

FILMS = 5856
HASHES, PLAIN_HASHES = 20_000, 400  # the plain way takes one pair at a time
PICTURES, SIDE, SIZE, BATCH = 1000, 224, 64, 64


def list_comparisons() -> list[Comparison]:
    """Return the comparisons that can be made here; temporary folders live as long as they are used."""
    return [*compare_audit(), *compare_near_pairs(), *compare_loading()]


# ---------------------------------------------------------------- the audit


def compare_audit() -> list[Comparison]:
    """Compare `medaug audit` with measures kept and anew: at most 20 s and 60 s on two quiet cores."""
    folder = Path(os.environ.get("MEDAUG_DATA", "")) / "guangzhou"
    if not os.environ.get("MEDAUG_DATA") or not folder.is_dir():
        print("audit-guangzhou: left out, MEDAUG_DATA names no folder with guangzhou/", file=sys.stderr)
        return []
    kept = tempfile.TemporaryDirectory(prefix="medaug-bench-")

    def warm() -> float:
        return time_audit(folder, Path(kept.name))

    def cold() -> float:
        with tempfile.TemporaryDirectory(prefix="medaug-bench-") as empty:
            return time_audit(folder, Path(empty))

    what = f"measures kept beside measured anew (in time for 20 s: {FILMS / 20:.0f}, for 60 s: {FILMS / 60:.0f} images/s)"
    return [Comparison("audit-guangzhou", warm, cold, what)]


def time_audit(folder: Path, cache: Path) -> float:
    """Audit the folder once; return images per second."""
    began = time.perf_counter()
    report = folder_audit.audit_path(folder, cache=cache, threads=len(os.sched_getaffinity(0)))
    assert report["files"]["images"] == FILMS and report["copies"]["identical_pictures"]["groups"] == 30
    return FILMS / (time.perf_counter() - began)


# ---------------------------------------------------------------- near duplicates


def compare_near_pairs() -> list[Comparison]:
    """Compare the search of all pairs in blocks with `imagehash`'s own difference, pair by pair."""
    rng = np.random.default_rng(0)
    knots = rng.normal(size=(HASHES, 8, 8)).repeat(4, axis=1).repeat(4, axis=2)
    thumbnails_u8 = np.clip(128 + 40 * knots, 0, 255).astype(np.uint8)
    thumbnails_u8[HASHES // 2 :: 50] = thumbnails_u8[: HASHES // 2 : 50]  # one in fifty of the second half is a copy
    began = time.perf_counter()
    tracemalloc.start()
    pairs = fingerprints.find_near_pairs(fingerprints.compute_phash(thumbnails_u8), thumbnails_u8)
    peak_gb = tracemalloc.get_traced_memory()[1] / 1e9
    tracemalloc.stop()
    assert len(pairs) >= HASHES // 100
    what = f"{HASHES:,} fingerprints in blocks ({time.perf_counter() - began:.1f} s, peak {peak_gb:.2f} GB) beside pair by pair"
    return [Comparison("near-pairs-20000", lambda: search_blocks(thumbnails_u8),
                       lambda: search_pairs(thumbnails_u8[:PLAIN_HASHES]), what, "pairs/s")]  # fmt: skip


def search_blocks(thumbnails_u8: np.ndarray) -> float:
    """Hash and compare all pairs; return pairs per second."""
    began = time.perf_counter()
    fingerprints.find_near_pairs(fingerprints.compute_phash(thumbnails_u8), thumbnails_u8)
    return count_pairs(thumbnails_u8) / (time.perf_counter() - began)


def search_pairs(thumbnails_u8: np.ndarray) -> float:
    """Do the same with one `ImageHash` for each picture; return pairs per second."""
    began = time.perf_counter()
    hashes = [imagehash.phash(Image.fromarray(picture_u8)) for picture_u8 in thumbnails_u8]
    sum(first - second <= 4 for number, first in enumerate(hashes) for second in hashes[number + 1 :])
    return count_pairs(thumbnails_u8) / (time.perf_counter() - began)


def count_pairs(pictures: np.ndarray) -> int:
    return len(pictures) * (len(pictures) - 1) // 2


# ---------------------------------------------------------------- loading


def compare_loading() -> list[Comparison]:
    """Compare one pass over a folder of JPEG files: from the cache, and with torchvision's `ImageFolder`."""
    place = tempfile.TemporaryDirectory(prefix="medaug-bench-")
    folder, cache = Path(place.name) / "films", Path(place.name) / "cache"
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        knots = rng.integers(0, 256, (16, 16), dtype=np.uint8)
        picture = Image.fromarray(knots).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        file = folder / f"class-{number % 2}" / f"{number:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file, quality=90)
    resize = transforms.Compose([transforms.Grayscale(), lambda picture: images.resize_centre(picture, SIZE),
                                 transforms.PILToTensor()])  # fmt: skip
    dataset = datasets.ImageFolder(folder, resize)
    paths = pd.Series([path for path, _ in dataset.samples])
    manifest = pd.DataFrame({"path": paths, "sha256": paths.map(images.hash_file)})  # as a study has it
    images_u8 = images.load_images(manifest, place.name, SIZE, cache=cache)
    assert all((dataset[row][0][0].numpy() == images_u8[row]).all() for row in (0, 1, PICTURES - 1))

    def ours() -> float:
        loaded = torch.from_numpy(images.load_images(manifest, place.name, SIZE, cache=cache))
        return time_pass(lambda: loaded[:, None].split(BATCH))

    def plain() -> float:
        return time_pass(lambda: (batch for batch, _ in torch.utils.data.DataLoader(dataset, BATCH)))

    return [Comparison(f"loading-{SIZE}px", ours, plain, f"{PICTURES:,} JPEG files of {SIDE} px: from the cache beside ImageFolder")]


def time_pass(batches: Callable) -> float:
    """Take every batch once, as floats; return images per second."""
    began = time.perf_counter()
    seen = sum(len(batch.float()) for batch in batches())
    assert seen == PICTURES
    return PICTURES / (time.perf_counter() - began)
