"""Take in what others have packed, without trusting it: zip files, MedMNIST arrays, data sets from Kaggle."""

import errno
import os
import shutil
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pandas as pd
from PIL import Image

from medaug.runtime import progress, replace_when_done

BOMB_BYTES, BOMB_RATIO = 64 * 2**20, 500  # a member larger than both is made to fill the disk


def unpack_zip(file: Path | str, folder: Path | str) -> list[dict[str, str]]:
    """Unpack a zip into `folder` (made if need be); return the members left out: [{"file", "reason"}].

    Nothing is written outside `folder`: members whose path would leave it are left out, and so are links,
    encrypted or damaged members, a second member of one name, and members that unpack to more than 500 times
    their size. Raises ValueError where the file is no zip, OSError where the disk is too small.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} is not a zip archive that can be read ({error}): pack or copy it again"
        ) from None
    left_out, taken = [], set()
    with archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        reasons = []
        for member in members:
            reasons.append(_judge_member(member, taken))
            taken.add(member.filename)
        needed = sum(member.file_size for member, reason in zip(members, reasons, strict=True) if not reason)
        if needed > shutil.disk_usage(folder).free:
            raise OSError(
                errno.ENOSPC, f"no room to unpack {file}: it needs {needed / 2**30:.1f} GB in {folder}"
            )
        for member, reason in progress(zip(members, reasons, strict=True), "unpacking", len(members), "file"):
            reason = reason or _write_member(archive, member, folder)
            if reason:
                left_out.append({"file": member.filename, "reason": reason})
    return left_out


def _judge_member(member: zipfile.ZipInfo, taken: set[str]) -> str:
    """Return why a member may not be unpacked, "" if it may."""
    if not _is_inside(member.filename):
        return "its path leads out of the folder: not unpacked"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return "a link or device in a zip: not unpacked"
    if member.flag_bits & 0x1:
        return "encrypted: unpack the zip with its password first"
    if member.filename in taken:
        return "a second file of the same name in the zip: rename one of them"
    if member.file_size > max(BOMB_BYTES, BOMB_RATIO * member.compress_size):
        return f"unpacks to more than {BOMB_RATIO} times its size: a zip bomb"
    return ""


def _is_inside(name: str) -> bool:
    """Say whether a member's name stays below the folder, to any system's reading of slashes and drives."""
    windows = PureWindowsPath(name)
    parts = {*PurePosixPath(name).parts, *windows.parts}
    return (
        bool(parts)
        and ".." not in parts
        and not windows.drive
        and not windows.root
        and not name.startswith("/")
    )


def _write_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> str:
    target = folder.joinpath(*PureWindowsPath(member.filename).parts)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.resolve().is_relative_to(folder.resolve()):
            return "its path leads out of the folder: not unpacked"
        with archive.open(member) as source, open(target, "xb") as unpacked:
            shutil.copyfileobj(source, unpacked)
        return ""
    except Exception as error:  # damaged members raise what their compression leads to
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        if not isinstance(error, FileExistsError):
            target.unlink(missing_ok=True)
        return f"cannot be unpacked ({error})"


def unpack_medmnist(file: Path | str, folder: Path | str, classes: Sequence[str] = ()) -> pd.DataFrame:
    """Write the images of a MedMNIST `.npz` (Yang et al. 2023) as PNG below `folder`; return `path, label, split`.

    The file holds `train_images` uint8 (N, S, S) or (N, S, S, 3) and `train_labels` (N, 1), and so for val and
    test. `classes` names the labels in their order; without it they are called "0", "1" ... Raises ValueError
    where the file is something else (volumes, several labels an image, pickled objects).
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            parts = {
                split: _read_part(arrays, split)
                for split in ("train", "val", "test")
                if f"{split}_images" in arrays
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} is not a MedMNIST file of single images with one label each ({error})"
        ) from None
    if not parts:
        raise ValueError(
            f"{file} is not a MedMNIST file: it holds no train_images, val_images or test_images"
        )
    numbers = sorted({int(label) for _, labels in parts.values() for label in labels})
    if classes and max(numbers) >= len(classes):
        raise ValueError(
            f"{file} has labels up to {max(numbers)}, but {len(classes)} classes are named: name them all"
        )
    rows = []
    for split, (images_u8, labels) in parts.items():
        for index, (image_u8, label) in enumerate(
            progress(zip(images_u8, labels, strict=True), f"writing {split}", len(labels))
        ):
            path = Path(folder) / split / f"{index:06d}.png"
            with replace_when_done(path) as temporary:
                Image.fromarray(image_u8).save(temporary, format="PNG", compress_level=1)
            rows.append({"path": path, "label": classes[label] if classes else str(label), "split": split})
    return pd.DataFrame(rows)


def _read_part(arrays, split: str) -> tuple[np.ndarray, np.ndarray]:
    images_u8, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    if images_u8.dtype != np.uint8 or not (
        images_u8.ndim == 3 or (images_u8.ndim == 4 and images_u8.shape[3] == 3)
    ):
        raise ValueError(f"{split}_images are {images_u8.dtype} {images_u8.shape}")
    if labels.size != len(images_u8) or labels.dtype.kind not in "iu":
        raise ValueError(f"{split}_labels are {labels.dtype} {labels.shape} for {len(images_u8)} images")
    return images_u8, labels.reshape(-1)


def fetch_dataset(handle: str) -> Path:
    """Fetch a data set from Kaggle by its name ("owner/name", or "owner/name/versions/1") and return its folder.

    Only called where a study names one. kagglehub keeps what it has fetched and asks for an account where the
    data set needs one. Raises RuntimeError that says what to do instead.
    """
    page = "https://www.kaggle.com/datasets/" + handle.partition("/versions/")[0]
    instead = f"or download {page} yourself and give the folder (data)"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise RuntimeError(
            f"'{handle}' is not fetched, this run is offline: set `online: true` in the study, {instead}"
        )
    try:
        import kagglehub
    except ModuleNotFoundError:
        raise RuntimeError(
            f"'{handle}' cannot be fetched: the package kagglehub is missing; install it, {instead}"
        ) from None
    try:
        return Path(kagglehub.dataset_download(handle))
    except Exception as error:  # of requests, of kagglehub, of its unpacking: all mean that there are no data
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f"'{handle}' could not be fetched ({reason}): check the name and the network, {instead}"
        ) from None
