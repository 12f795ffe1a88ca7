"""Every source becomes the same manifest: whole patients on one side, frozen, what is left out named."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medaug import guards, sources


def save_noise(path, seed: int, size: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image_u8 = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    Image.fromarray(image_u8).save(path)


def make_class_folders(folder, per_class: int = 10, classes=("sick", "well")):
    for number, label in enumerate(classes):
        for index in range(per_class):
            save_noise(folder / label / f"p{index // 2}_{index}.png", 1000 * number + index)
    return folder


def make_guangzhou(folder, layout: str):
    """A few files in each of the two public layouts; returns the folder of the source."""
    root = folder / "guangzhou" / "chest_xray"
    # bare numbers stand in both train and test, number + finding does not: as in the real set
    persons = {
        ("train", "bacteria"): range(5, 17),
        ("train", "virus"): range(1, 13),
        ("train", "normal"): range(1, 13),
        ("test", "bacteria"): range(1, 5),
        ("test", "virus"): range(13, 17),
        ("test", "normal"): range(101, 105),
    }
    for number, ((part, finding), range_) in enumerate(persons.items()):
        for person in range_:
            old = (
                f"IM-{person:04d}-0001.jpeg"
                if finding == "normal"
                else f"person{person}_{finding}_{person}.jpeg"
            )
            new = f"{finding.upper()}-{7000 + 100 * number + person}-0001.jpeg"
            where = root / part / ("NORMAL" if finding == "normal" else "PNEUMONIA")
            save_noise(where / (old if layout == "old" else new), 1000 * number + person)
    if layout == "old":
        save_noise(root / "val" / "NORMAL" / "NORMAL2-IM-1427-0001.jpeg", 77)
    return folder / "guangzhou"


# ---------------------------------------------------------------- what all share


def check_contract(manifest: pd.DataFrame, run_dir) -> None:
    """What holds for every source."""
    assert list(manifest.columns) == sources.COLUMNS
    assert manifest["image_id"].is_unique and (manifest["origin"] == "real").all()
    assert set(manifest["split"]) <= set(sources.SPLITS)
    guards.check_split_integrity(manifest)
    assert all((run_dir / path).exists() for path in manifest["path"])
    pd.testing.assert_frame_equal(sources.read_manifest(run_dir), manifest)


def test_the_phantom_is_rendered_with_masks_and_twice_the_same(tmp_path):
    options = dict(
        classes=["normal", "viral"],
        image_size=32,
        n_patients={"train": 8, "val": 4, "test": 4, "oracle": 2},
        seed=3,
    )
    first = sources.build_manifest("phantom", tmp_path / "a", **options)
    check_contract(first, tmp_path / "a")
    assert first.groupby("split")["patient_id"].nunique().to_dict() == {
        "train": 8,
        "val": 4,
        "test": 4,
        "oracle": 2,
    }
    mask = np.asarray(Image.open(tmp_path / "a" / first["mask_path"].iloc[0]))
    assert mask.shape == (32, 32) and set(np.unique(mask)) == {0, 255}
    save_noise(tmp_path / "b" / "images" / "stale.png", 0)
    second = sources.build_manifest("phantom", tmp_path / "b", **options)
    pd.testing.assert_frame_equal(first, second)
    assert not (tmp_path / "b" / "images" / "stale.png").exists()
    assert sources.read_card(tmp_path / "a")["simulated"]
    other = sources.build_manifest("phantom", tmp_path / "c", **{**options, "seed": 4})
    assert not set(other["sha256"]) & set(first["sha256"])


@pytest.mark.parametrize("layout", ["old", "new"])
def test_guangzhou_in_both_layouts_keeps_the_publishers_test_set(tmp_path, layout):
    manifest = sources.build_manifest(
        "guangzhou", tmp_path / "run", str(make_guangzhou(tmp_path, layout)), val_fraction=0.25
    )
    check_contract(manifest, tmp_path / "run")
    assert manifest["label"].value_counts().to_dict() == {
        "normal": 16 + (layout == "old"),
        "bacterial": 16,
        "viral": 16,
    }
    is_test = manifest["image_id"].str.startswith("test/")
    assert (is_test == (manifest["split"] == "test")).all()
    # both findings of one person stay on one side of train and val, whichever reading of the names is right
    rest = manifest[manifest["split"] != "test"]
    bare = rest["patient_id"].str.rpartition("-")[0]
    assert rest.groupby(bare)["split"].nunique().max() == 1 and rest["split"].nunique() == 2


@pytest.mark.parametrize(
    "name, folder, expected",
    [
        ("person1_bacteria_1.jpeg", "PNEUMONIA", ("bacterial", "person1-bacteria", "person1", "")),
        ("person1_virus_6.jpeg", "PNEUMONIA", ("viral", "person1-virus", "person1", "")),
        ("person1_virus_6_2.jpeg", "PNEUMONIA", ("viral", "person1-virus", "person1", "")),
        ("IM-0115-0001-0002.jpeg", "NORMAL", ("normal", "IM-0115-normal", "IM-0115", "")),
        ("NORMAL2-IM-0115-0001.jpeg", "NORMAL", ("normal", "NORMAL2-IM-0115-normal", "IM-0115", "")),
        ("BACTERIA-8290580-0003.jpeg", "PNEUMONIA", ("bacterial", "8290580-bacteria", "8290580", "")),
        (
            "person1_virus_6.jpeg",
            "NORMAL",
            ("viral", "person1-virus", "person1", "folder NORMAL but named virus"),
        ),
        ("scan.jpeg", "NORMAL", ("", "", "", "the name says neither finding nor patient")),
    ],
)
def test_guangzhou_names(name, folder, expected):
    assert tuple(sources.parse_guangzhou(name, folder).values()) == expected


def test_covid_reports_a_missing_class_pairs_masks_by_name_and_takes_guangzhou_patients(tmp_path):
    guangzhou = make_guangzhou(tmp_path, "old") / "chest_xray" / "train" / "PNEUMONIA"
    base = tmp_path / "covid-radiography"
    for index in range(8):
        save_noise(base / "COVID" / "images" / f"COVID-{index}.png", 500 + index)
        save_noise(base / "Normal" / "images" / f"Normal-{index}.png", 600 + index)
        copy = base / "Viral Pneumonia" / "images" / f"Viral Pneumonia-{index}.png"
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(guangzhou / f"person{index + 1}_virus_{index + 1}.jpeg").save(copy)
    save_noise(base / "Viral Pneumonia" / "masks" / "Viral Pneumonia-3.png", 1)
    manifest = sources.build_manifest(
        "covid-radiography",
        tmp_path / "run",
        str(base),
        ["normal", "covid", "opacity", "viral"],
        val_fraction=0.5,
        test_fraction=0.25,
    )
    check_contract(manifest, tmp_path / "run")
    card = sources.read_card(tmp_path / "run")
    assert card["missing_classes"] == ["opacity"] and card["classes"] == ["normal", "covid", "viral"]
    viral = manifest[manifest["label"] == "viral"].set_index("image_id")
    assert viral.loc["Viral Pneumonia/images/Viral Pneumonia-3", "patient_id"] == "person4-virus"
    assert (viral["mask_path"] != "").sum() == 1 and card["guangzhou_copies"] == 8


def test_lungs_give_a_patient_and_a_mask_each(tmp_path):
    for index in range(8):
        for kind in ("images", "masks"):
            save_noise(
                tmp_path / "lungs" / "Shenzhen" / kind / f"CHNCXR_{index:04d}_{index % 2}.png",
                index + 50 * (kind == "masks"),
            )
    manifest = sources.build_manifest(
        "lungs", tmp_path / "run", str(tmp_path), val_fraction=0.5, test_fraction=0.5
    )
    check_contract(manifest, tmp_path / "run")
    assert manifest["patient_id"].is_unique and (manifest["mask_path"] != "").all()
    assert manifest.set_index("patient_id").loc["CHNCXR_0003_1", "label"] == "tuberculosis"


@pytest.mark.parametrize("slides", [True, False])
def test_lymphoma_folds_hold_whole_slides_or_blocks(tmp_path, slides):
    for number, label in enumerate(("CLL", "FL", "MCL")):
        for index in range(12):
            name = f"sj-05-{index // 4}_{index % 4:03d}.tif" if slides else f"{12 * number + index:03d}.png"
            save_noise(tmp_path / "lymphoma" / label / name, 100 * number + index)
    manifest = sources.build_manifest(
        "lymphoma", tmp_path / "run", str(tmp_path), n_folds=3, **({} if slides else {"block_size": 4})
    )
    check_contract(manifest, tmp_path / "run")
    assert (
        manifest.groupby("patient_id").agg({"fold": "nunique", "image_id": "size"}).to_numpy().tolist()
        == [[1, 4]] * 9
    )
    tested = [sources.select_fold(manifest, fold) for fold in range(3)]
    assert sum((part["split"] == "test").astype(int).to_numpy() for part in tested).tolist() == [1] * 36
    for part in tested:
        guards.check_split_integrity(part)
        assert part.groupby("split")["label"].nunique().eq(3).all()
    with pytest.raises(ValueError, match="fold 3 does not exist"):
        sources.select_fold(manifest, 3)


# ---------------------------------------------------------------- your own images


def test_a_plain_folder_with_a_patient_pattern(tmp_path):
    folder = make_class_folders(tmp_path / "data", 20)
    manifest = sources.build_manifest("folder", tmp_path / "run", str(folder), patient_pattern=r"(p\d+)_")
    check_contract(manifest, tmp_path / "run")
    assert manifest["patient_id"].nunique() == 10 and set(manifest["split"]) == {"train", "val", "test"}


def test_near_duplicates_stand_in_for_patients_and_are_called_that(tmp_path):
    folder = make_class_folders(tmp_path / "data", 12)
    for label in ("sick", "well"):
        for index in range(4):
            smooth = Image.open(folder / label / f"p{index // 2}_{index}.png").resize(
                (96, 96), Image.Resampling.BICUBIC
            )
            smooth.save(folder / label / f"copy{index}.jpg", quality=90)
    manifest = sources.build_manifest(
        "folder", tmp_path / "run", str(folder), val_fraction=0.3, test_fraction=0.3
    )
    check_contract(manifest, tmp_path / "run")
    by_id = manifest.set_index("image_id")["patient_id"]
    assert all(
        by_id[f"{label}/copy{i}"] == by_id[f"{label}/p{i // 2}_{i}"]
        for label in ("sick", "well")
        for i in range(4)
    )
    assert "near-duplicate groups stand in" in sources.read_card(tmp_path / "run")["patient_key"]


def test_a_table_keeps_its_own_split(tmp_path):
    make_class_folders(tmp_path, 8)
    rows = [
        {
            "path": f"{label}/p{i // 2}_{i}.png",
            "label": label,
            "patient_id": f"{label}{i // 2}",
            "split": ("train", "train", "val", "test")[i // 2],
        }
        for label in ("sick", "well")
        for i in range(8)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    manifest = sources.build_manifest(
        "manifest", tmp_path / "run", str(tmp_path / "mine.csv"), ["well", "sick"]
    )
    check_contract(manifest, tmp_path / "run")
    assert manifest["split"].value_counts().to_dict() == {"train": 8, "val": 4, "test": 4}
    assert sources.read_card(tmp_path / "run")["classes"] == ["well", "sick"]


def test_the_frozen_split_cannot_be_changed_unnoticed(tmp_path):
    folder = make_class_folders(tmp_path / "data", 20)
    manifest = sources.build_manifest("folder", tmp_path / "run", str(folder), patient_pattern=r"(p\d+)_")
    assert sources.hash_split(manifest.sample(frac=1, random_state=0)) == sources.hash_split(manifest)
    manifest.loc[manifest.index[manifest["split"] == "train"][0], "split"] = "test"
    manifest.to_parquet(tmp_path / "run" / "manifest.parquet")
    with pytest.raises(ValueError, match="not the manifest that was frozen"):
        sources.read_manifest(tmp_path / "run")


def test_a_copy_of_a_test_image_leaves_the_training_set(tmp_path):
    folder = make_guangzhou(tmp_path, "old")
    parts = folder / "chest_xray"
    shutil.copy(
        parts / "test" / "NORMAL" / "IM-0102-0001.jpeg", parts / "train" / "NORMAL" / "IM-0900-0001.jpeg"
    )
    manifest = sources.build_manifest("guangzhou", tmp_path / "run", str(folder), val_fraction=0.25)
    check_contract(manifest, tmp_path / "run")
    assert sources.read_card(tmp_path / "run")["left_out"] == [
        {
            "image_id": "train/NORMAL/IM-0900-0001",
            "reason": "the same picture stands in the source's test set",
        }
    ]


def test_damaged_files_are_left_out_and_named(tmp_path):
    folder = make_class_folders(tmp_path / "data", 20)
    (folder / "sick" / "p90_0.png").write_bytes(b"")
    (folder / "sick" / "p91_0.png").write_text("this is text")
    (folder / "well" / "p92_0.png").write_bytes((folder / "well" / "p0_0.png").read_bytes()[:300])
    (folder / "well" / "notes.txt").write_text("not an image, and not called one")
    shutil.copy(folder / "well" / "p0_0.png", folder / "loose.png")
    os.symlink(folder, folder / "well" / "loop")
    names = {"sick/p90_0", "sick/p91_0", "well/p92_0", "loose"}
    try:
        shutil.copy(folder / "well" / "p0_0.png", os.fsencode(folder / "well") + b"/p93_\xff.png")
        names.add("well/p93_\\udcff")
    except OSError:
        pass  # a file system that takes UTF-8 names only cannot hold this fault
    manifest = sources.build_manifest(
        "folder", tmp_path / "run", str(folder), patient_pattern=r"p?(p\d+)_|loose"
    )
    check_contract(manifest, tmp_path / "run")
    card = sources.read_card(tmp_path / "run")
    assert {entry["image_id"] for entry in card["left_out"]} == names and all(
        entry["reason"] for entry in card["left_out"]
    )
    assert card["ignored"] == {".txt": 1, "a link to a folder": 1} and len(manifest) == 40


# ---------------------------------------------------------------- one line each


def break_empty_class(folder):
    return {"classes": ["sick", "well", "other"]}


def break_one_class(folder):
    shutil.rmtree(folder / "well")
    return {}


def break_one_patient(folder):
    return {"patient_pattern": r"^(p)"}


def break_few_patients(folder):
    return {"patient_pattern": r"(p\d+)_", "n_folds": 11}


def break_all_files(folder):
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    return {}


@pytest.mark.parametrize(
    "fault, message",
    [
        (break_empty_class, "class 'other' has no images; found sick, well"),
        (break_one_class, "only one class"),
        (break_one_patient, "all images belong to one patient"),
        (break_few_patients, "has 5 patient.s., fewer than the 11 parts asked for: lower n_folds"),
        (break_all_files, "no usable image: 20 file.s. left out, first sick/p0_0: not an image"),
    ],
)
def test_what_cannot_be_studied_is_one_clear_line_and_writes_nothing(tmp_path, fault, message):
    folder = make_class_folders(tmp_path / "data")
    options = fault(folder)
    with pytest.raises(ValueError, match=message) as caught:
        sources.build_manifest("folder", tmp_path / "run", str(folder), **options)
    assert "\n" not in str(caught.value)
    assert (
        not (tmp_path / "run" / "manifest.parquet").exists()
        and not (tmp_path / "run" / "manifest.json").exists()
    )


def test_a_missing_place_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDAUG_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set DATA=/path"):
        sources.build_manifest("guangzhou", tmp_path)
    with pytest.raises(FileNotFoundError, match="needs a path"):
        sources.build_manifest("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*gone"):
        sources.build_manifest("folder", tmp_path, str(tmp_path / "gone"))
    (tmp_path / "guangzhou").mkdir()
    with pytest.raises(FileNotFoundError, match="no Guangzhou images under"):
        sources.build_manifest("guangzhou", tmp_path, str(tmp_path))
    with pytest.raises(ValueError, match="source 'gouangzhou' is unknown: choose one of phantom, guangzhou"):
        sources.build_manifest("gouangzhou", tmp_path)
    (tmp_path / "bad.csv").write_text("file,label\na.png,x\n")
    with pytest.raises(ValueError, match="lacks the column path"):
        sources.build_manifest("manifest", tmp_path, str(tmp_path / "bad.csv"))


# ---------------------------------------------------------------- the real thing


@pytest.mark.skipif(not os.environ.get("MEDAUG_DATA"), reason="MEDAUG_DATA is not set: no real data at hand")
def test_the_whole_guangzhou_set_has_its_published_counts(tmp_path):
    manifest = sources.build_manifest("guangzhou", tmp_path, classes=["normal", "bacterial", "viral"])
    check_contract(manifest, tmp_path)
    trained = manifest[manifest["split"] != "test"]["label"].value_counts().to_dict()
    tested = manifest[manifest["split"] == "test"]["label"].value_counts().to_dict()
    assert trained == {"bacterial": 2538, "normal": 1349, "viral": 1345}
    assert tested == {"bacterial": 242, "normal": 234, "viral": 148} and len(manifest) == 5856
    assert sources.read_card(tmp_path)["left_out"] == []
