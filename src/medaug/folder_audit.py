"""The audit for someone who has just images: a folder, a zip, a table, a MedMNIST file. No study, no training.

Every file is accounted for: it is an image, or it stands in a list with the reason why not.
"""

import base64
import io
import json
import os
import re
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from medaug import audit, fingerprints, paths, sources
from medaug.archives import unpack_medmnist, unpack_zip
from medaug.dicom import name_patients
from medaug.images import describe_image
from medaug.runtime import save_json

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
          "testing": "test"}  # fmt: skip
INNER = {"image", "images", "img", "imgs"}  # folders inside a class folder that say nothing
MASKS = {"mask", "masks"}
NAMED = {"PNG": {".png"}, "JPEG": {".jpg", ".jpeg", ".jfif"}, "MPO": {".jpg", ".jpeg"}, "TIFF": {".tif", ".tiff"},
         "BMP": {".bmp"}, "WEBP": {".webp"}, "GIF": {".gif"}, "DICOM": {".dcm", ".dicom", ".ima", ""},
         "PPM": {".ppm", ".pgm", ".pbm", ".pnm"}, "JPEG2000": {".jp2", ".j2k", ".jpx"}}  # fmt: skip
SUFFIXES = set().union(*NAMED.values()) - {""}
FEWEST = 20  # images that a class needs before a shortcut is looked for
GREY = ["mean", "std", "black_share", "white_share"]
COLUMNS = ["name", "file", "label", "split", "patient_id"]
SHOWN = 50  # rows of a list on the page; the JSON has all


@dataclass
class Listing:
    """What lies at a place: image files as (name, file), and [{"file", "reason"}] of what fails and what is no image."""

    found: list[tuple[str, Path]] = field(default_factory=list)
    failed: list[dict] = field(default_factory=list)
    others: list[dict] = field(default_factory=list)
    zips: list[tuple[str, Path]] = field(default_factory=list)


def audit_path(
    path: Path | str,
    against: Path | str = "",
    cache: Path | str | None = None,
    patient_pattern: str = "",
    max_distance: int = 4,
    min_correlation: float = 0.98,
    trees: int = 60,
    seed: int = 0,
    threads: int = 1,
    pictures: bool = False,
) -> dict:
    """Audit the images at `path` and return the report (a dict that JSON can hold).

    `path` and `against` are folders, zip files, tables (CSV or parquet with `path` and `label`), MedMNIST files, or
    single images. Measures are kept under `cache` by content, so a second look decodes nothing.
    `patient_pattern` is a regular expression whose first group, in a file's name, is the patient. `pictures` adds
    thumbnails of the pairs. Raises FileNotFoundError or ValueError, each one line.
    """
    with tempfile.TemporaryDirectory(prefix="medaug-") as workspace:
        images, listing = _take_in(Path(path), Path(workspace) / "path", patient_pattern, cache)
        report = {"path": _escape(str(path)), "files": _count_files(images, listing)}
        report |= {"failed": listing.failed, "others": listing.others, "notes": _note_files(images)}
        report |= _describe(images)
        groups, report["copies"] = _find_copies(images, max_distance, min_correlation, pictures)
        report["shortcuts"] = _score_shortcuts(images, groups, trees, seed, threads)
        report["against"] = None
        if str(against):
            theirs, their_listing = _take_in(Path(against), Path(workspace) / "against", "", cache)
            counted = {"path": _escape(str(against)), "files": _count_files(theirs, their_listing)}
            overlap = _find_overlap(images, theirs, max_distance, min_correlation, pictures)
            report["against"] = counted | {"failed": their_listing.failed} | overlap
    report["findings"] = list_findings(report).to_dict("records")
    return report


def _take_in(
    path: Path, workspace: Path, patient_pattern: str, cache: Path | str | None
) -> tuple[pd.DataFrame, Listing]:
    """Return the usable images at `path` with their measures, and the listing of everything that is there."""
    listed, listing = list_files(path, workspace, patient_pattern)
    inspected = fingerprints.inspect_files(listed["file"].tolist(), _writable(cache))
    problem = inspected["problem"].to_numpy(str)
    listing.failed += [
        {"file": name, "reason": reason}
        for name, reason in zip(listed["name"], problem, strict=True)
        if reason
    ]
    images = listed.join(inspected.drop(columns="problem"))[problem == ""]
    return images.reset_index(drop=True), listing


# ---------------------------------------------------------------- what is there


def list_files(path: Path, workspace: Path, patient_pattern: str = "") -> tuple[pd.DataFrame, Listing]:
    """List everything at `path`: image files (columns `name, file, label, split, patient_id`), and the whole listing.

    `name` is what is shown (below `path`, bytes that are no UTF-8 escaped); `file` the file to open. Zip files
    inside a folder are unpacked below `workspace` and listed as folders. Raises FileNotFoundError or ValueError.
    """
    path = path.expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"no such file or folder: {path}; give a folder of images, a zip, a table or an .npz"
        )
    listing, suffix = Listing(), path.suffix.lower()
    if path.is_dir():
        _walk(path, listing)
        for name, file in listing.zips:
            _unpack(file, f"{name}/", workspace, listing)
    elif suffix in (".csv", ".parquet"):
        return _list_table(path), listing
    elif suffix == ".npz":
        listed = unpack_medmnist(path, workspace)
        names = [file.relative_to(workspace).as_posix() for file in listed["path"]]
        return listed.assign(name=names, file=listed["path"], patient_id="")[COLUMNS], listing
    elif suffix == ".zip":
        _unpack(path, "", workspace, listing)
    else:
        listing.found = [(_escape(path.name), path)]
    if not (listing.found or listing.failed or listing.others):
        raise FileNotFoundError(f"{path} holds no files: give the folder that the images are in")
    return _label(listing.found, patient_pattern), listing


def _walk(folder: Path, listing: Listing, prefix: str = "") -> None:
    """Add everything below `folder` to `listing`, sorted. Links to folders are not followed, so a loop ends."""

    def name(path: Path | str) -> str:
        return prefix + _escape(Path(path).relative_to(folder).as_posix())

    def refuse(error: OSError) -> None:
        reason = f"a folder that cannot be read ({error.strerror})"
        listing.failed.append({"file": name(error.filename), "reason": reason})

    for where, folders, files in os.walk(folder, onerror=refuse):
        links = [entry for entry in folders if os.path.islink(os.path.join(where, entry))]
        folders[:] = sorted(set(folders) - set(links))
        reason = "a link to a folder: not followed"
        listing.others += [{"file": name(Path(where) / entry), "reason": reason} for entry in sorted(links)]
        for file in (Path(where) / entry for entry in sorted(files)):
            reason = _judge_file(file, file.relative_to(folder))
            if reason:
                listing.others.append({"file": name(file), "reason": reason})
            elif file.suffix.lower() == ".zip":
                listing.zips.append((name(file), file))
            else:
                listing.found.append((name(file), file))


def _judge_file(file: Path, inside: Path) -> str:
    """Return why a file is not taken for an image, "" if it is. What is called an image is taken for one."""
    if any(part.startswith(".") or part == "__MACOSX" for part in inside.parts):
        return "hidden"
    if MASKS & {part.lower() for part in inside.parts[:-1]}:
        return "a mask (by its folder)"
    if file.suffix.lower() in SUFFIXES | {".zip"}:
        return ""
    try:
        if stat.S_ISREG(file.stat().st_mode):
            describe_image(file)
            return ""  # an image whatever its name
    except Exception:  # decoders raise what the bytes lead to; here that only means: no image
        pass
    return f"not an image, and not called one ({file.suffix.lower() or 'no suffix'})"


def _unpack(file: Path, prefix: str, workspace: Path, listing: Listing) -> None:
    """Unpack one zip below `workspace` and add what it held; inside a folder, a zip that is none is a failure."""
    folder = workspace / f"zip-{len(list(workspace.glob('*')))}"
    try:
        left_out = unpack_zip(file, folder)
    except (ValueError, FileNotFoundError, PermissionError) as error:
        if not prefix:
            raise
        reason = "a zip that cannot be read (cut off, or something else by that name)"
        listing.failed.append(
            {"file": prefix[:-1], "reason": reason if isinstance(error, ValueError) else str(error)}
        )
        return
    inside = Listing()
    _walk(folder, inside, prefix)
    listing.found += inside.found
    listing.others += inside.others
    listing.failed += inside.failed
    listing.failed += [{"file": prefix + _escape(row["file"]), "reason": row["reason"]} for row in left_out]
    listing.failed += [
        {"file": name, "reason": "a zip inside a zip: unpack it first"} for name, _ in inside.zips
    ]
    if prefix and not (inside.found or inside.others or inside.zips or left_out):
        listing.others.append({"file": prefix[:-1], "reason": "an empty zip"})


def _list_table(file: Path) -> pd.DataFrame:
    """Read a manifest; missing files become failures later, like any that cannot be read."""
    records, _ = sources.read_table(Path(), str(file), [])
    names = [os.path.relpath(path, file.parent) for path in records["path"]]
    return records.assign(name=names, file=[Path(path) for path in records["path"]])[COLUMNS]


def _label(found: list[tuple[str, Path]], patient_pattern: str) -> pd.DataFrame:
    """Read split, class and patient from the files' places and names, or from the header of DICOM files."""
    frame = pd.DataFrame(found, columns=["name", "file"]).astype(object)
    parts = [name.split("/")[:-1] for name in frame["name"]]
    parts = [[part for part in row if part.lower() not in INNER] for row in parts]
    shared = len(os.path.commonprefix([[*row, ""] for row in parts])) if parts else 0
    parts = [row[shared:] for row in parts]
    split = [SPLITS.get(row[0].lower(), "") if row else "" for row in parts]
    label = [row[bool(of)] if len(row) > bool(of) else "" for row, of in zip(parts, split, strict=True)]
    if patient_pattern:
        try:
            matches = [re.search(patient_pattern, Path(name).name) for name in frame["name"]]
            patients = [match.group(1) if match else "" for match in matches]
        except (re.error, IndexError) as error:
            raise ValueError(
                f"--patients {patient_pattern!r} is no regular expression with one group ({error})"
            ) from None
    else:
        patients = name_patients(frame["file"].tolist())
    return frame.assign(label=label, split=split, patient_id=patients)[COLUMNS]


def _escape(name: str) -> str:
    """Return `name` with bytes that are no UTF-8, line breaks and control codes as escapes, to be stored and shown."""
    shown = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _writable(cache: Path | str | None) -> Path | None:
    """Return the folder of the kept measures, or None where nothing can be written: the audit then measures anew."""
    if cache is None:
        return None
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return Path(cache) if os.access(cache, os.W_OK) else None


def _count_files(images: pd.DataFrame, listing: Listing) -> dict[str, int]:
    counts = {"images": len(images), "failed": len(listing.failed), "others": len(listing.others)}
    return {"found": sum(counts.values())} | counts


def _note_files(images: pd.DataFrame) -> list[dict]:
    """Return [{"file", "note"}] of images that can be read but are not what they seem."""
    notes = []
    for row in images.itertuples():
        suffix = Path(row.name).suffix.lower()
        if suffix not in NAMED.get(row.format, {suffix}):
            notes.append({"file": row.name, "note": f"is a {row.format} file, called {suffix or 'nothing'}"})
        if row.frames > 1:
            notes.append(
                {"file": row.name, "note": f"holds {int(row.frames)} frames: only the first is read"}
            )
        if "\\udc" in row.name:
            notes.append({"file": row.name, "note": "its name is not UTF-8: a study would ask to rename it"})
    return notes


def _describe(images: pd.DataFrame) -> dict:
    """Return counts and means: per class and split, per size, per way of storing."""
    if images.empty:
        return {"classes": [], "sizes": [], "modes": [], "patients": 0, "patients_in_several_splits": 0}
    classes = images.groupby(["label", "split"], sort=True)
    means = classes[["width", "height", "bit_depth", *GREY]].mean().astype(float)
    sizes = images.groupby(["width", "height"]).size().sort_values(ascending=False, kind="stable")
    modes = images.groupby(["format", "mode", "bit_depth"]).size().sort_values(ascending=False, kind="stable")
    named = images[images["patient_id"] != ""]
    several = named.groupby("patient_id")["split"].nunique() > 1
    return {
        "classes": means.assign(images=classes.size()).reset_index().to_dict("records"),
        "sizes": sizes.rename("images").reset_index().astype(int).to_dict("records"),
        "modes": modes.rename("images").reset_index().astype({"bit_depth": int}).to_dict("records"),
        "patients": len(several),
        "patients_in_several_splits": int(several.sum()),
    }


# ---------------------------------------------------------------- what is there twice


def _find_copies(
    images: pd.DataFrame, max_distance: int, min_correlation: float, pictures: bool
) -> tuple[np.ndarray, dict]:
    """Return the group of each image (N,), and identical files, identical pictures and near duplicates.

    Near duplicates are pairs of *different* pictures; groups tie them and the identical ones together.
    """
    if images.empty:
        nothing = audit.summarise_copies(_as_manifest(images), [])
        empty = {"identical_files": nothing, "identical_pictures": nothing, "near_duplicates": nothing}
        return np.zeros(0, int), empty | {"identical_groups": [], "near_pairs": []}
    number = pd.factorize(images["pixel_sha256"])[0]
    first = np.unique(number, return_index=True)[1]
    thumbnails_u8 = fingerprints.stack_thumbnails(images.iloc[first])
    phash = fingerprints.compute_phash(thumbnails_u8)
    pairs = fingerprints.find_near_pairs(phash, thumbnails_u8, max_distance, min_correlation)
    groups = fingerprints.group_pairs(len(first), pairs["first"], pairs["second"])[number]
    rows = pairs.assign(first=first[pairs["first"]], second=first[pairs["second"]])
    manifest = _as_manifest(images)
    return groups, {
        "identical_files": audit.summarise_copies(manifest, images["sha256"]),
        "identical_pictures": audit.summarise_copies(manifest, number),
        "near_duplicates": audit.summarise_copies(manifest, groups),
        "identical_groups": _list_groups(images, number),
        "near_pairs": _list_pairs(images, images, rows, pictures),
    }


def _as_manifest(images: pd.DataFrame) -> pd.DataFrame:
    return images[["label", "split", "patient_id"]].assign(image_id=images["name"])


def _list_groups(images: pd.DataFrame, number: np.ndarray) -> list[dict]:
    """Return the groups of identical pictures: their files, their classes and splits, and whether the bytes agree."""
    several = images.assign(number=number)[pd.Series(number).duplicated(keep=False).to_numpy()]
    return [
        {
            "files": group["name"].tolist(),
            "classes": sorted(set(group["label"])),
            "splits": sorted(set(group["split"])),
            "same_bytes": group["sha256"].nunique() == 1,
        }
        for _, group in several.groupby("number")
    ]


def _list_pairs(ours: pd.DataFrame, theirs: pd.DataFrame, pairs: pd.DataFrame, pictures: bool) -> list[dict]:
    """Return the pairs as names, most alike first; with thumbnails (PNG, base64) for those that the page shows."""
    rows = []
    ordered = pairs.sort_values(
        ["correlation", "first", "second"], ascending=[False, True, True], kind="stable"
    )
    for number, pair in enumerate(ordered.itertuples()):
        row = {"distance": int(pair.distance), "correlation": float(pair.correlation)}
        for side, frame, at in (("first", ours, pair.first), ("second", theirs, pair.second)):
            image = frame.iloc[at]
            row[side], row[f"{side}_class"], row[f"{side}_split"] = (
                image["name"],
                image["label"],
                image["split"],
            )
            if pictures and number < SHOWN:
                row[f"{side}_png"] = _draw(image["thumbnail"])
        rows.append(row)
    return rows


def _draw(thumbnail: bytes) -> str:
    from PIL import Image

    side = fingerprints.THUMBNAIL
    drawn = io.BytesIO()
    Image.frombytes("L", (side, side), thumbnail).save(drawn, format="PNG")
    return base64.b64encode(drawn.getvalue()).decode()


def _find_overlap(
    ours: pd.DataFrame, theirs: pd.DataFrame, max_distance: int, min_correlation: float, pictures: bool
) -> dict:
    """Say which of our images are in the other set too: identical, or the same picture resized or compressed again.

    `by_hash` counts what the perceptual hash alone takes for a copy, `shared` what the thumbnails confirm: chests are
    alike, and among some ten million pairs a few hashes agree by chance.
    """
    overlap = {"identical_pictures": 0, "images": 0, "by_hash": 0, "by_class": [], "pairs": []}
    if ours.empty or theirs.empty:
        return overlap
    own, other = (fingerprints.stack_thumbnails(frame) for frame in (ours, theirs))
    hashes, other_hashes = fingerprints.compute_phash(own), fingerprints.compute_phash(other)
    pairs = fingerprints.find_near_pairs(
        hashes, own, max_distance, min_correlation, against=(other_hashes, other)
    )
    best = pairs.sort_values("correlation", ascending=False, kind="stable").drop_duplicates("first")
    identical = ours["pixel_sha256"].isin(theirs["pixel_sha256"]).to_numpy()
    found = ours[["label"]].assign(
        shared=np.isin(np.arange(len(ours)), best["first"]) | identical,
        by_hash=fingerprints.match_hashes(hashes, other_hashes, max_distance) | identical,
        images=1,
    )
    by_class = found.groupby("label")[["shared", "by_hash", "images"]].sum()
    return {
        "identical_pictures": int(identical.sum()),
        "images": int(found["shared"].sum()),
        "by_hash": int(found["by_hash"].sum()),
        "by_class": by_class.reset_index().to_dict("records"),
        "pairs": _list_pairs(ours, theirs, best, pictures),
    }


# ---------------------------------------------------------------- what betrays the class


def _score_shortcuts(images: pd.DataFrame, groups: np.ndarray, trees: int, seed: int, threads: int) -> dict:
    """Score what the file, the grey levels, the border and an 8 x 8 thumbnail say about the class.

    Folds hold out whole patients where they are known, else whole groups of near duplicates. Classes with fewer than
    20 images, and images without a class, are left out; with fewer than two classes there is nothing to score.
    """
    sizes = images.loc[images["label"] != "", "label"].value_counts() if len(images) else pd.Series(dtype=int)
    large = sorted(sizes.index[sizes >= FEWEST])
    result = {"classes": large, "left_out": sorted(set(sizes.index) - set(large)), "scores": []}
    if len(large) < 2:
        return result
    kept = images["label"].isin(large).to_numpy()
    part = images[kept]
    owner = np.where(part["patient_id"] != "", part["patient_id"], [f"group-{g}" for g in groups[kept]])
    if pd.Series(owner).groupby(part["label"].to_numpy()).nunique().min() < 2:
        return result | {"left_out": large, "classes": []}
    stored = pd.get_dummies(part[["format", "mode"]]).to_numpy(float)
    views = {  # not the size in bytes: what a picture shows decides how well it can be compressed
        "size and format of the file": np.hstack([part[fingerprints.SIZE_FEATURES].to_numpy(float), stored]),
        "brightness and contrast": part[GREY].to_numpy(float),
        "border (outer sixteenth)": part[fingerprints.BORDER_FEATURES].to_numpy(float),
        "8 x 8 thumbnail": audit.shrink(fingerprints.stack_thumbnails(part), 8),
    }
    scores = audit.score_shortcuts(views, part["label"], owner, seed, 5, trees, threads, ["8 x 8 thumbnail"])
    return result | {"scores": scores.to_dict("records")}


# ---------------------------------------------------------------- in words


def list_findings(report: dict) -> pd.DataFrame:
    """Turn the report into sentences: columns `check, status, finding`; status is "fine", "note" or "warning"."""
    rows = [*_find_in_files(report), *_find_in_copies(report["copies"]), *_find_in_scores(report)]
    return pd.DataFrame(rows, columns=["check", "status", "finding"])


def _find_in_files(report: dict) -> list[tuple[str, str, str]]:
    files, failed = report["files"], report["failed"]
    text = f"{failed[0]['file']}: {failed[0]['reason']}" if failed else ""
    rows = [("files", "warning" if failed else "fine", f"{len(failed):,} of {files['images'] + files['failed']:,} "
             f"image file(s) cannot be read{', first ' + text if text else ''}")]  # fmt: skip
    if report["notes"]:
        rows.append(("files", "note", f"{len(report['notes']):,} file(s) are not what they seem, first "
                     f"{report['notes'][0]['file']}: {report['notes'][0]['note']}"))  # fmt: skip
    if len(report["sizes"]) > 1:
        rows.append(("sizes", "note", f"{len(report['sizes']):,} sizes of image; "
                     f"most often {report['sizes'][0]['width']} x {report['sizes'][0]['height']}"))  # fmt: skip
    if len(report["modes"]) > 1:
        stored = ", ".join(
            f"{row['format']} {row['mode']} {row['bit_depth']} bit" for row in report["modes"][:4]
        )
        rows.append(("modes", "note", f"{len(report['modes'])} ways of storing: {stored}"))
    if report["patients"]:
        crossing = report["patients_in_several_splits"]
        rows.append(("patients", "warning" if crossing else "fine",
                     f"{crossing:,} of {report['patients']:,} patients stand in several splits"))  # fmt: skip
    return rows


def _find_in_copies(copies: dict) -> list[tuple[str, str, str]]:
    rows = []
    for key, name in (("identical_files", "identical files"), ("identical_pictures", "identical pictures"),
                      ("near_duplicates", "near duplicates")):  # fmt: skip
        found = copies[key]
        crosses = found["across_splits"] or found["across_classes"]
        text = (
            f"{found['groups']:,} group(s) with {found['extra_files']:,} extra file(s); "
            if found["groups"]
            else "none"
        )
        if found["groups"]:
            text += f"{found['across_classes']} across classes, {found['across_splits']} across splits"
        rows.append((name, "warning" if crosses else "note" if found["groups"] else "fine", text))
    return rows


def _find_in_scores(report: dict) -> list[tuple[str, str, str]]:
    rows, shortcuts, against = [], report["shortcuts"], report["against"]
    for row in shortcuts["scores"]:
        told = "note" if row["coarse"] else "warning"
        status = {"above chance": told, "undecided": "note"}.get(row["verdict"], "fine")
        sentence = row["sentence"] if report["patients"] else row["sentence"].replace("patients", "images")
        score = f": {row['balanced_accuracy']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f}), chance {row['chance']:.2f}"
        rows.append(("shortcut", status, sentence + ("" if row["verdict"] == "constant" else score)))
    if not shortcuts["scores"]:
        rows.append(
            ("shortcut", "note", f"not looked for: fewer than two classes with {FEWEST} images or more")
        )
    if against:
        shares = ", ".join(f"{row['shared']:,} of {row['images']:,} {row['label'] or 'images'}"
                           for row in against["by_class"] if row["shared"])  # fmt: skip
        doubtful = against["by_hash"] - against["images"]
        shares += f"; {doubtful:,} more by the hash alone, which the thumbnails do not confirm" if doubtful else ""
        rows.append(("overlap", "warning" if against["images"] else "fine",
                     f"{against['images']:,} image(s) are also in {against['path']}" + (f": {shares}" if shares else "")))  # fmt: skip
    return rows


def format_summary(report: dict) -> str:
    """Return the report as lines for a terminal: what is there, what was found, the first files of each list."""
    files = report["files"]
    lines = [f"{report['path']}: {files['found']:,} files = {files['images']:,} images + {files['failed']:,} that cannot "
             f"be read + {files['others']:,} that are no images", ""]  # fmt: skip
    for row in report["classes"]:
        where = " ".join(filter(None, [row["split"], row["label"] or "(no class)"]))
        lines.append(f"  {where:28} {row['images']:>8,} images, mean {row['width']:.0f} x {row['height']:.0f} px, "
                     f"brightness {row['mean']:.0f}")  # fmt: skip
    lines.append("")
    marks = {"fine": "  ok     ", "note": "  note   ", "warning": "  WARNING"}
    lines += [f"{marks[row['status']]} {row['check']}: {row['finding']}" for row in report["findings"]]
    lines += _list_few("cannot be read", report["failed"], lambda row: f"{row['file']}: {row['reason']}")
    lines += _list_few("no images", report["others"], lambda row: f"{row['file']}: {row['reason']}")
    lines += _list_few("not what they seem", report["notes"], lambda row: f"{row['file']}: {row['note']}")
    lines += _list_few(
        "identical pictures", report["copies"]["identical_groups"], lambda row: " = ".join(row["files"])
    )
    lines += _list_few("near duplicates", report["copies"]["near_pairs"], _tell_pair)
    lines += _list_few("in both sets", (report["against"] or {"pairs": []})["pairs"], _tell_pair)
    return "\n".join(lines)


def _list_few(title: str, rows: list[dict], tell, count: int = 5) -> list[str]:
    if not rows:
        return []
    rest = [f"  ... and {len(rows) - count:,} more (--json lists all)"] if len(rows) > count else []
    return ["", f"{title} ({len(rows):,}):", *(f"  {tell(row)}" for row in rows[:count]), *rest]


def _tell_pair(row: dict) -> str:
    return f"{row['first']} ~ {row['second']} (r = {row['correlation']:.3f})"


def save_report(report: dict, file: Path) -> None:
    """Write the report as JSON, without the thumbnails."""
    text = json.dumps(report, default=lambda number: number.item())  # of numpy
    save_json(
        file,
        json.loads(text, object_hook=lambda row: {k: v for k, v in row.items() if not k.endswith("_png")}),
    )


def render_page(report: dict) -> str:
    """Return the report as one HTML page that needs no other file and no network."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(paths.ROOT / "assets"), trim_blocks=True, autoescape=True
    )
    return environment.get_template("audit.html.j2").render(report=report, shown=SHOWN, margin=audit.MARGIN)
