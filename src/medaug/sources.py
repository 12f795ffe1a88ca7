"""Where images come from: each source becomes one manifest, split by patient, frozen with a hash.

A reader lists records (`path, label, patient_id, split, mask_path`, and `group`, the key that may not be cut
by a split); what follows is the same for all: inspect every file, leave out and name what cannot be used,
split, write.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from medaug.archives import unpack_medmnist, unpack_zip
from medaug.dicom import is_dicom, name_patients
from medaug.fingerprints import compute_phash, find_near_pairs, group_pairs, inspect_files, stack_thumbnails
from medaug.images import hash_file, map_files
from medaug.paths import find_source
from medaug.runtime import progress, replace_when_done, save_json

COLUMNS = [
    "image_id",
    "path",
    "sha256",
    "label",
    "patient_id",
    "split",
    "fold",
    "mask_path",
    "width",
    "height",
    "origin",
]
SPLITS = ["train", "val", "test", "oracle"]
UNPACKED = "unpacked"  # folder of a run that holds what a zip held
STAND_IN = r"group-\d{5,}"  # a near-duplicate group in place of a patient
SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".dcm", ".dicom"}
GUANGZHOU_NAMES = [
    re.compile(r"(?P<number>person\d+)_(?P<finding>bacteria|virus)_\d+"),
    re.compile(r"(?P<finding>BACTERIA|VIRUS|NORMAL)-(?P<number>\d+)-\d+"),
    re.compile(r"(?P<series>NORMAL2-)?(?P<number>IM-\d+)-\d+"),
]
FINDINGS = {"bacteria": "bacterial", "virus": "viral", "normal": "normal"}
COVID_FOLDERS = {"covid": "COVID", "opacity": "Lung_Opacity", "normal": "Normal", "viral": "Viral Pneumonia"}


def build_manifest(
    source: str,
    run_dir: Path | str,
    data: str = "",
    classes: list[str] | None = None,
    seed: int = 0,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    n_folds: int = 0,
    **options,
) -> pd.DataFrame:
    """Build, split and write the manifest of `source`: `run_dir/manifest.parquet` and, beside it,
    `manifest.json`.

    `source` is one of `READERS`; `data` the folder (or CSV / parquet file) of a source that is not the
    phantom; `classes` the class order (None or []: the labels found, sorted); `options` go to the source's
    reader. A split that the source gives is kept; the rest is split by patient into train and val (and test,
    where the source has none), or into `n_folds` test folds. Raises FileNotFoundError or ValueError, each one
    line that says what to do.
    """
    if source not in READERS:
        raise ValueError(f"source '{source}' is unknown: choose one of {', '.join(READERS)}")
    run_dir = Path(run_dir)
    records, notes = READERS[source](run_dir, data, classes or [], seed=seed, **options)
    records, left_out = _inspect(records, run_dir)
    order, missing = _check_classes(records, classes, may_miss=source == "covid-radiography")
    records = records[records["label"].isin(order)].reset_index(drop=True)
    records, notes["patient_key"] = _name_patients(records, notes.get("patient_key", ""))
    records, copies = _leave_out_copies_of_test(records)
    records = assign_splits(records, val_fraction, test_fraction, n_folds, seed)
    manifest = _finish(records)
    left_out = notes.pop("left_out", []) + left_out + copies
    card = notes | {
        "source": source,
        "simulated": source == "phantom",
        "classes": order,
        "missing_classes": missing,
        "left_out": left_out,
        "n_images": len(manifest),
        "seed": seed,
        "n_folds": n_folds,
        "split_hash": hash_split(manifest),
    }
    save_manifest(manifest, card, run_dir)
    return manifest


def guess_source(path: Path | str) -> str:
    """Return the source that reads `path`: a folder or zip of class folders, a MedMNIST .npz, or a table."""
    path = Path(path).expanduser()
    if path.suffix.lower() == ".npz":
        return "medmnist"
    return "folder" if path.is_dir() or path.suffix.lower() == ".zip" else "manifest"


def save_manifest(manifest: pd.DataFrame, card: dict, run_dir: Path | str) -> None:
    """Write `manifest.parquet` and `manifest.json` (both atomically) under `run_dir`."""
    with replace_when_done(Path(run_dir) / "manifest.parquet") as temporary:
        manifest.to_parquet(temporary, index=False)
    save_json(Path(run_dir) / "manifest.json", card)


def read_card(run_dir: Path | str) -> dict:
    """Read `manifest.json`: source, class order, how patients are known, what was left out and why, the
    split's hash.
    """
    return json.loads((Path(run_dir) / "manifest.json").read_text(encoding="utf-8"))


def read_manifest(run_dir: Path | str) -> pd.DataFrame:
    """Read the manifest of a run. Raises ValueError where its split is not the one that was frozen."""
    path = Path(run_dir) / "manifest.parquet"
    if not path.exists():
        raise FileNotFoundError(f"no {path}: run 01-data-audit first")
    manifest = pd.read_parquet(path)
    if hash_split(manifest) != read_card(run_dir)["split_hash"]:
        raise ValueError(
            f"{path} is not the manifest that was frozen: run 01-data-audit again, and all after it"
        )
    return manifest


def hash_split(manifest: pd.DataFrame) -> str:
    """Return the SHA-256 of who is where: image, content, label, patient, split and fold of every row, in any
    order.
    """
    rows = manifest[["image_id", "sha256", "label", "patient_id", "split", "fold"]].astype(str)
    return hashlib.sha256("\n".join(sorted(rows.agg("\t".join, axis=1))).encode()).hexdigest()


def select_fold(manifest: pd.DataFrame, fold: int) -> pd.DataFrame:
    """Return the manifest with `split` set for one fold of a k-fold study: test = `fold`, val = the next one,
    train = rest.
    """
    n_folds = manifest["fold"].max() + 1
    if not 0 <= fold < n_folds:
        raise ValueError(
            f"fold {fold} does not exist: the manifest has {n_folds} fold(s); set n_folds in 01-data-audit"
        )
    split = np.where(
        manifest["fold"] == fold, "test", np.where(manifest["fold"] == (fold + 1) % n_folds, "val", "train")
    )
    return manifest.assign(split=split)


# ---------------------------------------------------------------- splitting


def assign_splits(
    records: pd.DataFrame, val_fraction: float, test_fraction: float, n_folds: int, seed: int
) -> pd.DataFrame:
    """Fill `split` (rows where it is "") and `fold` by group: no `group` is cut. Given test and oracle rows
    are kept.
    """
    records = records.assign(fold=-1)
    if records["group"].nunique() < 2:
        raise ValueError("all images belong to one patient: a split by patient needs at least two")
    if n_folds:
        if (records["split"] != "").any():
            raise ValueError("n_folds does not go with a source that has its own test set: set n_folds = 0")
        return select_fold(records.assign(fold=_number_folds(records, n_folds, seed)), 0)
    if not (records["split"] == "test").any():
        _take_part(records, "test", test_fraction, seed)
    if not (records["split"] == "val").any():
        _take_part(records, "val", val_fraction, seed)
    return records.assign(split=records["split"].replace("", "train"))


def _take_part(records: pd.DataFrame, split: str, fraction: float, seed: int) -> None:
    """Give `split` to about `fraction` of the rows that have none yet, whole groups, classes in proportion
    (in place).
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(f"{split}_fraction is {fraction}: choose more than 0 and at most 0.5")
    free = records["split"] == ""
    folds = _number_folds(records[free], round(1 / fraction), seed)
    records.loc[free, "split"] = np.where(folds == 0, split, "")


def _number_folds(records: pd.DataFrame, n_folds: int, seed: int) -> np.ndarray:
    groups = records.groupby("label")["group"].nunique()
    if groups.min() < n_folds:
        raise ValueError(
            f"class '{groups.idxmin()}' has {groups.min()} patient(s), fewer than the {n_folds} parts "
            "asked for: "
            "lower n_folds, or raise val_fraction and test_fraction"
        )
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    folds = np.zeros(len(records), int)
    for number, (_, held_out) in enumerate(splitter.split(folds, records["label"], records["group"])):
        folds[held_out] = number
    return folds


# ---------------------------------------------------------------- what all sources share


def _inspect(records: pd.DataFrame, run_dir: Path) -> tuple[pd.DataFrame, list[dict]]:
    """Add the measures of each file; leave out what cannot be read. Returns the rest and the list of what was
    left out.
    """
    inspected = inspect_files([run_dir / path for path in records["path"]], run_dir / "cache")
    problem = records["problem"].where(records["problem"] != "", inspected["problem"].to_numpy())
    left_out = records.assign(reason=problem)[problem != ""]
    listed = left_out[["image_id", "reason"]].to_dict("records")
    measures = (
        inspected[["sha256", "pixel_sha256", "width", "height", "thumbnail"]]
        if len(left_out) < len(records)
        else None
    )
    if measures is None:
        raise ValueError(
            f"no usable image: {len(records)} file(s) left out, "
            f"first {listed[0]['image_id']}: {listed[0]['reason']}"
        )
    usable = records.join(measures)[problem == ""].drop(columns="problem")
    return usable.reset_index(drop=True), listed


def _check_classes(
    records: pd.DataFrame, classes: list[str] | None, may_miss: bool
) -> tuple[list[str], list[str]]:
    """Return the class order and the missing classes; raise where what is left cannot be classified."""
    found = records["label"].value_counts()
    order = list(classes or sorted(found.index))
    missing = [label for label in order if label not in found]
    if missing and not may_miss:
        raise ValueError(
            f"class '{missing[0]}' has no images; found {', '.join(found.index)}: "
            "fill its folder or change classes"
        )
    order = [label for label in order if label in found]
    if len(order) < 2:
        raise ValueError(
            f"only one class ({order[0]}): a classifier needs at least two; check the folders and classes"
        )
    return order, missing


def _name_patients(records: pd.DataFrame, known: str) -> tuple[pd.DataFrame, str]:
    """Fill empty patient ids by near-duplicate group, and let `group` tie pictures that are the same: number
    it from 0.
    """
    links = [_link_equal(records["pixel_sha256"])]
    unnamed = (records["patient_id"] == "").to_numpy()
    if unnamed.any():
        thumbnails_u8 = stack_thumbnails(records)
        pairs = find_near_pairs(compute_phash(thumbnails_u8), thumbnails_u8)[["first", "second"]].to_numpy()
        number = group_pairs(len(records), *pairs.T)
        stand_in = np.array([f"group-{n:05d}" for n in number], object)
        records = records.assign(
            patient_id=np.where(unnamed, stand_in, records["patient_id"]),
            group=np.where(records["group"] == "", stand_in, records["group"]),
        )
        links.append(pairs)
        text = f"near-duplicate groups stand in for patients in {unnamed.sum()} of {len(records)} images"
        known = f"{known}; {text}" if known else text
    links.append(_link_equal(records["group"]))
    return records.assign(group=group_pairs(len(records), *np.concatenate(links).T)), known


def _link_equal(keys: pd.Series) -> np.ndarray:
    """Return pairs (N, 2) that link each row with the first row of the same key."""
    code = pd.factorize(keys)[0]
    first = np.unique(code, return_index=True)[1]
    return np.stack([first[code], np.arange(len(keys))], axis=1)


def _leave_out_copies_of_test(records: pd.DataFrame) -> tuple[pd.DataFrame, list[dict]]:
    """Where the source's own splits share a picture, keep it on one side only: in test, else in val.

    The same holds of near duplicates where their group stands in for the patient: no patient may be cut.
    """
    rank = records["split"].map({"test": 2, "val": 1}).fillna(0).astype(int)
    in_test = rank == 2
    copy = ~in_test & records["pixel_sha256"].isin(records.loc[in_test, "pixel_sha256"])
    near = records["patient_id"].str.fullmatch(STAND_IN) & (
        rank < rank.groupby(records["patient_id"]).transform("max")
    )
    reason = np.where(copy, "the same picture stands in the source's test set",
                      "a near duplicate stands in the source's test or validation set")  # fmt: skip
    gone = copy | near
    listed = records.loc[gone, ["image_id"]].assign(reason=reason[gone])
    return records[~gone].reset_index(drop=True), listed.to_dict("records")


def _finish(records: pd.DataFrame) -> pd.DataFrame:
    numbers = ("fold", "width", "height")
    manifest = records.assign(origin="real")[COLUMNS].astype(
        {c: int if c in numbers else str for c in COLUMNS}
    )
    order = pd.Categorical(manifest["split"], SPLITS)
    return (
        manifest.assign(order=order)
        .sort_values(["order", "image_id"])
        .drop(columns="order")
        .reset_index(drop=True)
    )


def _list_images(folder: Path, ignored: Counter) -> list[Path]:
    """List image files under `folder`, sorted; count in `ignored` what else is there; skip hidden files.

    Symbolic links to folders are not followed, so a loop ends. A file without a suffix is an image if it is DICOM.
    """
    files = []
    for where, folders, names in os.walk(
        folder, onerror=lambda _: ignored.update(["a folder that cannot be read"])
    ):
        ignored.update(
            ["a link to a folder" for name in folders if os.path.islink(os.path.join(where, name))]
        )
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            path = Path(where) / name
            if name.startswith("."):
                continue
            if path.suffix.lower() in SUFFIXES or (
                not path.suffix and path.is_file() and _begins_as_dicom(path)
            ):
                files.append(path)
            else:
                ignored[path.suffix.lower() or "no suffix"] += 1
    return files


def _begins_as_dicom(path: Path) -> bool:
    try:
        return is_dicom(path)
    except OSError:
        return False


def _read_headers(records: pd.DataFrame) -> pd.DataFrame:
    """Fill patients that nobody has named from the headers of DICOM files (hashed; no tag is copied)."""
    unnamed = (records["patient_id"] == "").to_numpy()
    named = records["patient_id"].to_numpy().copy()
    named[unnamed] = name_patients([Path(path) for path in records["path"][unnamed]])
    group = np.where(records["group"] == "", named, records["group"])
    return records.assign(patient_id=named, group=group)


def _make_records(files: list[Path], base: Path, **columns) -> pd.DataFrame:
    """One record a file: `image_id` is its path below `base` (without suffix where that stays unique)."""
    names = [_escape(file.relative_to(base).as_posix()) for file in files]
    stems = [name.rpartition(".")[0] for name in names]
    often = Counter(stems)
    problems = [
        "" if _escape(str(file)) == str(file) else "the name is not UTF-8: rename the file" for file in files
    ]
    records = (
        pd.DataFrame(
            {
                "image_id": [
                    stem if often[stem] == 1 else name for stem, name in zip(stems, names, strict=True)
                ],
                "path": [_escape(str(file)) for file in files],
                "label": "",
                "patient_id": "",
                "split": "",
                "mask_path": "",
                "problem": "",
            }
        )
        .astype(object)
        .assign(**columns)
    )
    records["problem"] = np.where(np.array(problems, object) != "", problems, records["problem"])
    return records if "group" in records else records.assign(group=records["patient_id"])


def _escape(name: str) -> str:
    """Return `name` with bytes that are no UTF-8 written as escapes, so that it can be stored and shown."""
    return name.encode("utf-8", "backslashreplace").decode()


def _locate(name: str, data: str) -> Path:
    """Return the folder of a named source: found by its name, or the very folder that was given."""
    try:
        return find_source(name, data)
    except FileNotFoundError:
        if data and Path(data).expanduser().is_dir():
            return Path(data).expanduser().resolve()
        raise


def _given_path(source: str, data: str) -> Path:
    if not data:
        raise FileNotFoundError(
            f"source '{source}' needs a path: set data (in the study) or DATA=/path (make)"
        )
    path = Path(data).expanduser().resolve()
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}; set data to an existing one")
    return path


# ---------------------------------------------------------------- readers


def read_guangzhou(run_dir: Path, data: str, classes: list[str], seed: int = 0) -> tuple[pd.DataFrame, dict]:
    """Read the paediatric X-rays of Kermany et al. (2018), in both public layouts; the publisher's test set
    is kept.

    A patient is *number + finding* (`person1-bacteria`). Train and val are drawn anew (the published val has
    16 images) by bare number, so that no reading of the names puts a patient in both.
    """
    folder = _locate("guangzhou", data)
    roots = [
        root
        for root in (folder, folder / "chest_xray", folder / "CellData" / "chest_xray")
        if (root / "train").is_dir()
    ]
    if not roots:
        raise FileNotFoundError(
            f"no Guangzhou images under {folder}: expected chest_xray/train and chest_xray/test "
            "with NORMAL and PNEUMONIA in each"
        )
    ignored = Counter()
    files = [file for part in ("train", "val", "test") for file in _list_images(roots[0] / part, ignored)]
    records = _make_records(files, roots[0])
    records["split"] = np.where(records["image_id"].str.startswith("test/"), "test", "")
    named = pd.DataFrame(
        [parse_guangzhou(file.name, file.parent.name) for file in files], index=records.index
    )
    records = records.assign(**{column: named[column] for column in ("label", "patient_id", "group")})
    records["problem"] = records["problem"].where(records["problem"] != "", named["problem"])
    key = "number and finding in the file name (person1 + bacteria); normals by series and number"
    return records, {"patient_key": key, "ignored": dict(ignored)}


def parse_guangzhou(name: str, folder: str) -> dict[str, str]:
    """Return label, patient_id, group (the bare number) and problem ("" if none) as a Guangzhou file name
    gives them.
    """
    match = next(filter(None, (pattern.match(name) for pattern in GUANGZHOU_NAMES)), None)
    if not match:
        return {
            "label": "",
            "patient_id": "",
            "group": "",
            "problem": "the name says neither finding nor patient",
        }
    parts = match.groupdict()
    finding = (parts.get("finding") or "normal").lower()
    problem = (
        ""
        if (finding == "normal") == (folder.upper() == "NORMAL")
        else f"folder {folder} but named {finding}"
    )
    series = parts.get("series") or ""
    return {
        "label": FINDINGS[finding],
        "patient_id": f"{series}{parts['number']}-{finding}",
        "group": parts["number"],
        "problem": problem,
    }


def read_covid(run_dir: Path, data: str, classes: list[str], seed: int = 0) -> tuple[pd.DataFrame, dict]:
    """Read the COVID-19 radiography database (Chowdhury, Rahman et al. 2020-21): four classes, lung masks by
    name.

    It names no patients. Images that are copies of Guangzhou images (found by perceptual hash where that
    source is at hand) take their patients; the others get near-duplicate groups.
    """
    folder = _locate("covid-radiography", data)
    if (folder / "COVID-19_Radiography_Dataset").is_dir():  # as its publisher packs it
        folder = folder / "COVID-19_Radiography_Dataset"
    ignored, parts = Counter(), []
    for label, name in COVID_FOLDERS.items():
        files = _list_images(folder / name / "images", ignored)
        if files:
            parts.append(_make_records(files, folder, label=label))
    if not parts:
        raise FileNotFoundError(
            f"no COVID radiography images under {folder}: expected COVID/images, Normal/images ..."
        )
    records = pd.concat(parts, ignore_index=True)
    records["mask_path"] = [_find_mask(Path(path)) for path in records["path"]]
    mapped = _map_to_guangzhou(records, run_dir, folder)
    key = f"{mapped} images are copies of Guangzhou images and take their patients" if mapped else ""
    return records, {"patient_key": key, "ignored": dict(ignored), "guangzhou_copies": mapped}


def _find_mask(image: Path) -> str:
    mask = image.parent.parent / "masks" / f"{image.stem}.png"
    return str(mask) if mask.exists() else ""


def _map_to_guangzhou(records: pd.DataFrame, run_dir: Path, folder: Path) -> int:
    """Give images that are also in Guangzhou their patients (in place); return how many there are, 0 without
    Guangzhou.
    """
    try:
        theirs, _ = read_guangzhou(run_dir, str(find_source("guangzhou", str(folder))), [])
    except FileNotFoundError:
        return 0
    measured = [
        inspect_files([Path(path) for path in frame["path"]], run_dir / "cache")
        for frame in (records, theirs)
    ]
    usable = [np.flatnonzero(frame["problem"] == "") for frame in measured]
    thumbnails = [stack_thumbnails(frame.iloc[rows]) for frame, rows in zip(measured, usable, strict=True)]
    hashes = [compute_phash(images_u8) for images_u8 in thumbnails]
    pairs = find_near_pairs(hashes[0], thumbnails[0], against=(hashes[1], thumbnails[1])).drop_duplicates(
        "first"
    )
    copies, originals = usable[0][pairs["first"]], usable[1][pairs["second"]]
    for column in ("patient_id", "group"):
        records.iloc[copies, records.columns.get_loc(column)] = theirs[column].to_numpy()[originals]
    return len(pairs)


def read_lungs(run_dir: Path, data: str, classes: list[str], seed: int = 0) -> tuple[pd.DataFrame, dict]:
    """Read the Montgomery and Shenzhen chest X-rays with lung masks (US National Library of Medicine; Jaeger
    et al. 2014).

    One image a patient; a name that ends in `_1` means tuberculosis, `_0` normal.
    """
    folder, ignored = _locate("lungs", data), Counter()
    files = [
        file
        for part in ("Montgomery", "Shenzhen")
        for file in _list_images(folder / part / "images", ignored)
    ]
    if not files:
        raise FileNotFoundError(
            f"no lung images under {folder}: expected Montgomery/images and Shenzhen/images"
        )
    stems = pd.Series([file.stem for file in files])
    labels = stems.str.extract(r"_([01])$")[0].map({"0": "normal", "1": "tuberculosis"}).fillna("")
    records = _make_records(
        files,
        folder,
        label=labels,
        patient_id=stems,
        mask_path=[_find_mask(file) for file in files],
        problem=np.where(labels == "", "the name does not end in _0 or _1", ""),
    )
    return records, {"patient_key": "one image a patient", "ignored": dict(ignored)}


def read_lymphoma(
    run_dir: Path, data: str, classes: list[str], seed: int = 0, block_size: int = 12
) -> tuple[pd.DataFrame, dict]:
    """Read the lymphoma images of IICBU-2008 (Shamir et al. 2008): CLL, FL, MCL, one folder each.

    No patients are named. Names of the public copy hold the slide (`sj-03-2810_001.tif`); in a numbered copy
    neighbouring numbers share a slide, so blocks of `block_size` numbers stand in. Use with `n_folds`.
    """
    folder, ignored = _locate("lymphoma", data), Counter()
    parts = []
    for label in ("CLL", "FL", "MCL"):
        files = _list_images(folder / label, ignored)
        slides = [_read_slide(file.stem, label, block_size) for file in files]
        parts.append(_make_records(files, folder, label=label.lower(), patient_id=slides))
    records = pd.concat(parts, ignore_index=True)
    if records.empty:
        raise FileNotFoundError(f"no lymphoma images under {folder}: expected the folders CLL, FL and MCL")
    numbered = records["patient_id"].str.contains("-block-").any()
    key = (
        f"blocks of {block_size} neighbouring numbers stand in for slides"
        if numbered
        else "slide in the file name"
    )
    return records, {"patient_key": key, "ignored": dict(ignored)}


def _read_slide(stem: str, label: str, block_size: int) -> str:
    if stem.isdigit():
        return f"{label}-block-{int(stem) // block_size:03d}"
    return f"{label}-" + re.sub(r"[_ ]\d+$", "", stem)


def read_folder(
    run_dir: Path, data: str, classes: list[str], seed: int = 0, patient_pattern: str = ""
) -> tuple[pd.DataFrame, dict]:
    """Read a plain folder (or a zip) with one sub-folder per class, or with train/val/test that hold them.

    `patient_pattern` is a regular expression; its first group, searched in the file's name, is the patient.
    Without it the headers of DICOM files name the patients (hashed), and for other files near-duplicate groups
    stand in.
    """
    folder, ignored, left_out = _given_path("folder", data), Counter(), []
    if folder.suffix.lower() == ".zip" and folder.is_file():
        folder, left_out = _unpack_once(folder, run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder: give one with one sub-folder per class, or use source 'manifest'"
        )
    files = _list_images(folder, ignored)
    if not files:
        raise FileNotFoundError(
            f"no images under {folder}: expected one sub-folder per class with PNG, JPEG or TIFF files"
        )
    base = _skip_single_folders(folder, files)
    parts = [file.relative_to(base).parts for file in files]
    has_splits = {part[0] for part in parts} <= {"train", "val", "test"}
    labels = [part[has_splits] if len(part) > 1 + has_splits else "" for part in parts]
    records = _make_records(
        files, folder, label=labels, split=[part[0] if has_splits else "" for part in parts]
    )
    records["split"] = records["split"].replace("train", "")
    records.loc[records["label"] == "", "problem"] = "not in a class folder"
    if patient_pattern:
        found = pd.Series([re.search(patient_pattern, file.name) for file in files])
        records["patient_id"] = records["group"] = [match.group(1) if match else "" for match in found]
        records.loc[found.isna(), "problem"] = (
            f"patient_pattern {patient_pattern!r} finds no patient in the name"
        )
        key = "patient_pattern in the file name"
    else:
        records = _read_headers(records)
        key = _tell_headers(records)
    return records, {"patient_key": key, "ignored": dict(ignored), "left_out": left_out}


def _tell_headers(records: pd.DataFrame) -> str:
    return (
        "patient id in the DICOM header, hashed"
        if records["patient_id"].str.startswith("dicom-").any()
        else ""
    )


def _skip_single_folders(folder: Path, files: list[Path]) -> Path:
    """Return the folder below which the names differ, for archives that hold one folder which holds the rest; a
    folder whose own files are images, or that holds one class or split only, is kept as it is.
    """
    if folder.parent.name != UNPACKED:
        return folder
    while len(below := {file.relative_to(folder).parts[0] for file in files}) == 1 and all(
        len(file.relative_to(folder).parts) > 2 for file in files
    ):
        folder = folder / below.pop()
    return folder


def _unpack_once(file: Path, run_dir: Path) -> tuple[Path, list[dict]]:
    """Unpack a zip to `run_dir/unpacked/<hash>`, unless that is done; return the folder and what was left out."""
    folder = run_dir / UNPACKED / hash_file(file)[:16]
    listing = folder.with_suffix(".json")
    if not listing.exists():
        shutil.rmtree(folder, ignore_errors=True)
        save_json(listing, {"left_out": unpack_zip(file, folder)})
    left_out = json.loads(listing.read_text(encoding="utf-8"))["left_out"]
    return folder, [{"image_id": _escape(row["file"]), "reason": row["reason"]} for row in left_out]


def read_medmnist(run_dir: Path, data: str, classes: list[str], seed: int = 0) -> tuple[pd.DataFrame, dict]:
    """Read a MedMNIST `.npz` (Yang et al. 2023) with one label an image; its three splits are kept.

    The images are written to `run_dir/images`. `classes` names the labels in their order (else "0", "1" ...). No
    patients are named: near-duplicate groups stand in.
    """
    file = _given_path("medmnist", data)
    listed = unpack_medmnist(file, run_dir / "images", classes)
    records = _make_records(
        listed["path"].tolist(), run_dir / "images", label=listed["label"], split=listed["split"]
    )
    records["path"] = "images/" + records["image_id"] + ".png"
    return records, {"patient_key": "", "ignored": {}}


def read_table(run_dir: Path, data: str, classes: list[str], seed: int = 0) -> tuple[pd.DataFrame, dict]:
    """Read a CSV or parquet manifest: columns `path, label`, and if known `patient_id, split, mask_path`.

    Paths are relative to the folder of the file, or absolute.
    """
    file = _given_path("manifest", data)
    if file.is_dir() or file.suffix.lower() not in (".csv", ".parquet"):
        raise ValueError(f"{file} is neither a CSV nor a parquet file: give one, or use source 'folder'")
    try:
        given = (
            pd.read_parquet(file)
            if file.suffix.lower() == ".parquet"
            else pd.read_csv(file, dtype=str, keep_default_na=False)
        )
    except (ValueError, OSError) as error:  # pandas' and pyarrow's own errors are among them
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file} is not a table that can be read ({reason}): write UTF-8 CSV or parquet"
        ) from None
    lacking = [column for column in ("path", "label") if column not in given]
    if lacking or given.empty:
        raise ValueError(
            f"{file} "
            + (f"lacks the column {lacking[0]}" if lacking else "has no rows")
            + ": needs path and label"
        )
    optional = {
        c: given[c].fillna("").astype(str)
        for c in ("label", "patient_id", "split", "mask_path")
        if c in given
    }
    unknown = set(optional.get("split", [])) - {*SPLITS, ""}
    if unknown:
        raise ValueError(
            f"{file}: split '{sorted(unknown)[0]}' is unknown: use train, val or test, or leave it empty"
        )
    if "mask_path" in optional:
        optional["mask_path"] = optional["mask_path"].map(
            lambda path: str(file.parent / path) if path else ""
        )
    paths = [file.parent / path for path in given["path"].astype(str)]
    names = [os.path.relpath(path, file.parent) for path in paths]
    records = _make_records([Path("/") / name for name in names], Path("/"), **optional).assign(
        path=[str(p) for p in paths]
    )
    records = _read_headers(records)
    key = "column patient_id" if "patient_id" in given else _tell_headers(records)
    return records, {"patient_key": key, "ignored": {}}


def render_phantom(
    run_dir: Path,
    data: str,
    classes: list[str],
    seed: int = 0,
    image_size: int = 64,
    n_patients: dict[str, int] | None = None,
    images_per_patient: tuple[int, int] = (1, 4),
    difficulty: float = 0.5,
    class_probs: list[float] | None = None,
    null: bool = False,
) -> tuple[pd.DataFrame, dict]:
    """Render simulated patients to `run_dir/images/*.png` and their lung masks to `run_dir/masks/*.png`.

    `n_patients` gives the patients per split (train, val, test, oracle), each a cohort of its own;
    `class_probs`, `difficulty` and `null` are the phantom's dials (see `medaug.phantom`).
    """
    from medaug.phantom import chest  # with torch, which no other source needs
    from medaug.phantom.cohort import draw_cohort

    counts = n_patients or {"train": 240, "val": 160, "test": 480, "oracle": 320}
    unknown = set(counts) - set(SPLITS)
    if unknown:
        raise ValueError(
            f"n_patients names the split '{sorted(unknown)[0]}': use train, val, test and oracle"
        )
    cohorts = [
        draw_cohort(
            count,
            classes or ["normal", "bacterial", "viral"],
            class_probs,
            images_per_patient,
            seed=len(SPLITS) * seed + SPLITS.index(split),
            null=null,
            prefix=split,
        ).assign(split=split)
        for split, count in counts.items()
        if count
    ]
    cohort = pd.concat(cohorts, ignore_index=True)
    for start in progress(range(0, len(cohort), 256), desc="rendering", unit="batch"):
        part = cohort.iloc[start : start + 256]
        rendered = chest.render(
            part["patient_seed"], part["image_seed"], part["rendered_label"], image_size, difficulty
        )
        masks_u8 = rendered["lung_mask"].astype(np.uint8) * 255
        for folder, pictures in (("images", rendered["image_u8"]), ("masks", masks_u8)):
            map_files(
                _save_png,
                [
                    (run_dir / folder / f"{name}.png", picture)
                    for name, picture in zip(part["image_id"], pictures, strict=True)
                ],
                folder,
            )
    for folder in ("images", "masks"):  # pictures of an earlier cohort of other size would only mislead
        for stale in {file.stem for file in (run_dir / folder).glob("*.png")} - set(cohort["image_id"]):
            (run_dir / folder / f"{stale}.png").unlink(missing_ok=True)
    records = cohort[["image_id", "label", "patient_id", "split"]].assign(
        path="images/" + cohort["image_id"] + ".png",
        mask_path="masks/" + cohort["image_id"] + ".png",
        group=cohort["patient_id"],
        problem="",
    )
    dials = {"difficulty": difficulty, "null": null, "class_probs": class_probs, "image_size": image_size}
    return records, {"patient_key": "simulated patients, known exactly", "ignored": {}, "phantom": dials}


def list_adult_films(run_dir: Path | str, data: str = "") -> pd.DataFrame:
    """List adult chest X-rays with captions, for a base model of a Guangzhou study: columns `path, sha256,
    caption`.

    COVID radiography (its COVID and Normal folders, less every image that is a copy of a Guangzhou image by
    perceptual hash) and the Montgomery and Shenzhen films. Writes nothing but the caches in `run_dir`.
    """
    run_dir = Path(run_dir)
    covid, _ = read_covid(run_dir, data, [])
    theirs, _ = read_guangzhou(run_dir, data, [])
    covid = covid[covid["label"].isin(["covid", "normal"]) & ~covid["patient_id"].isin(theirs["patient_id"])]
    lungs, _ = read_lungs(run_dir, data, [])
    words = {
        "covid": "frontal film of an adult chest, hazy shadows, archive one",
        "normal": "frontal film of an adult chest, unremarkable, archive one",
    }
    films = pd.concat(
        [
            covid.assign(caption=covid["label"].map(words)),
            lungs.assign(
                caption=lungs["label"].map(
                    {
                        "normal": "frontal film of an adult chest, unremarkable, archive two",
                        "tuberculosis": "frontal film of an adult chest, scars and cavities, archive two",
                    }
                )
            ),
        ]
    )
    films = films[films["problem"] == ""].reset_index(drop=True)
    usable, _ = _inspect(films, run_dir)
    return usable[["path", "sha256", "caption"]].drop_duplicates("sha256").reset_index(drop=True)


def _save_png(item: tuple[Path, np.ndarray]) -> None:
    path, picture_u8 = item
    with replace_when_done(path) as temporary:
        Image.fromarray(picture_u8).save(temporary, format="PNG")


READERS = {
    "phantom": render_phantom,
    "guangzhou": read_guangzhou,
    "covid-radiography": read_covid,
    "lungs": read_lungs,
    "lymphoma": read_lymphoma,
    "folder": read_folder,
    "manifest": read_table,
    "medmnist": read_medmnist,
}
