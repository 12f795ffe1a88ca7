"""The audit finds each fault that is put in, and stays silent where there is none."""

import os

import imagehash
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from medaug import audit, fingerprints, sources

CLASSES = ["normal", "bacterial", "viral"]


def draw_smooth(rng, count: int, size: int = 64) -> np.ndarray:
    """Smooth random pictures, uint8 (count, size, size)."""
    knots = rng.integers(0, 256, (count, 6, 6), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(k).resize((size, size), Image.Resampling.BICUBIC)) for k in knots]
    )


def draw_people(rng, patients: int = 150, images_each: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, 8) that show who it is and nothing else, labels and patients (N,)."""
    features = np.repeat(rng.normal(size=(patients, 8)), images_each, axis=0)
    features += 0.05 * rng.normal(size=features.shape)
    label = np.repeat(np.array(CLASSES)[np.arange(patients) % 3], images_each)
    return features, label, np.repeat(np.arange(patients), images_each)


# ---------------------------------------------------------------- fingerprints


def test_measures_are_taken_once_per_content_and_faults_have_a_reason(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for index, image_u8 in enumerate(draw_smooth(rng, 3)):
        Image.fromarray(image_u8).save(tmp_path / f"{index}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    (tmp_path / "empty.png").write_bytes(b"")
    deep = np.full((20, 40), 1000, np.uint16)
    deep[:5] = 4000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    files = [
        tmp_path / name
        for name in ("0.png", "1.png", "2.png", "copy.png", "empty.png", "deep.png", "gone.png")
    ]
    first = fingerprints.inspect_files(files, tmp_path / "cache")
    assert first["problem"].tolist()[:4] == [""] * 4 and first["problem"].tolist()[5] == ""
    assert (
        first["problem"][4] == "not an image: the file is empty" and "cannot be read" in first["problem"][6]
    )
    assert first["pixel_sha256"][0] == first["pixel_sha256"][3] and first["pixel_sha256"].nunique() == 4
    assert first.loc[5, ["width", "height", "bit_depth"]].tolist() == [40, 20, 16]
    assert first.loc[5, "border_top_mean"] > first.loc[5, "border_bottom_mean"]
    monkeypatch.setattr(fingerprints, "measure_file", lambda file: pytest.fail(f"{file} was decoded twice"))
    pd.testing.assert_frame_equal(fingerprints.inspect_files(files, tmp_path / "cache"), first)


def test_the_perceptual_hash_is_that_of_imagehash(tmp_path):
    for index, image_u8 in enumerate(draw_smooth(np.random.default_rng(1), 20, 96)):
        Image.fromarray(image_u8).save(tmp_path / f"{index:02d}.png")
    files = sorted(tmp_path.glob("*.png"))
    ours = fingerprints.compute_phash(fingerprints.stack_thumbnails(fingerprints.inspect_files(files)))
    theirs = [int(str(imagehash.phash(Image.open(file))), 16) for file in files]
    assert ours.tolist() == theirs


def test_resized_and_recompressed_copies_are_found_and_only_they(tmp_path):
    pictures = draw_smooth(np.random.default_rng(2), 40, 128)
    for index, image_u8 in enumerate(pictures):
        Image.fromarray(image_u8).save(tmp_path / f"{index:02d}.png")
    for index in (3, 17):
        Image.fromarray(pictures[index]).resize((100, 100)).save(
            tmp_path / f"{index:02d}-copy.jpg", quality=60
        )
    files = sorted(tmp_path.iterdir())
    thumbnails_u8 = fingerprints.stack_thumbnails(fingerprints.inspect_files(files))
    phash = fingerprints.compute_phash(thumbnails_u8)
    pairs = fingerprints.find_near_pairs(phash, thumbnails_u8, block=7)
    assert [
        {files[a].stem[:2], files[b].stem[:2]} for a, b in zip(pairs["first"], pairs["second"], strict=True)
    ] == [{"03"}, {"17"}]
    group = fingerprints.group_pairs(len(files), pairs["first"], pairs["second"])
    assert len(np.unique(group)) == 40
    against = fingerprints.find_near_pairs(phash[:5], thumbnails_u8[:5], against=(phash, thumbnails_u8))
    assert sorted(against["first"]) == [0, 1, 2, 3, 3, 4, 4] and (against["correlation"] > 0.98).all()


# ---------------------------------------------------------------- counts and patients


def make_manifest() -> pd.DataFrame:
    rows = [
        ("train", "bacterial", "person1-bacteria"),
        ("train", "viral", "person2-virus"),
        ("test", "viral", "person1-virus"),
        ("test", "normal", "IM-1-normal"),
        ("train", "bacterial", "person1-bacteria"),
    ]
    manifest = pd.DataFrame(rows, columns=["split", "label", "patient_id"])
    return manifest.assign(image_id=[f"i{n}" for n in range(len(rows))])


def test_patients_are_counted_under_each_reading():
    manifest = make_manifest()
    readings = audit.read_patients(manifest)
    own, bare = (audit.count_crossings(patients, manifest["split"]).iloc[0] for patients in readings.values())
    assert (own["patients"], own["images"]) == (0, 0)
    assert (bare["patients"], bare["images"]) == (1, 3)
    counts = audit.count_images(manifest, CLASSES).set_index(["split", "label"])
    assert counts.loc[("train", "bacterial"), ["images", "patients"]].tolist() == [2, 1]
    assert counts.loc[("test", "viral"), "share"] == 0.5


def test_published_counts_are_compared_where_there_are_any():
    compared = audit.compare_counts(make_manifest(), "guangzhou").set_index(["part", "label"])
    assert compared.loc[("train+val", "bacterial"), ["published", "found", "difference"]].tolist() == [
        2538,
        2,
        -2536,
    ]
    assert audit.compare_counts(make_manifest(), "folder").empty


def test_copies_are_counted_within_and_across():
    found = audit.summarise_copies(make_manifest(), ["a", "b", "b", "c", "a"])
    assert found == {
        "groups": 2,
        "extra_files": 2,
        "across_classes": 0,
        "across_splits": 1,
        "across_patients": 1,
    }


# ---------------------------------------------------------------- scores and intervals


def test_patients_never_stand_on_both_sides_of_a_fold():
    features, label, patients = draw_people(np.random.default_rng(3))
    model = KNeighborsClassifier(1)
    right = {
        name: (
            np.unique(label)[audit.predict_held_out(model, features, label, groups).argmax(axis=1)] == label
        ).mean()
        for name, groups in (("image", None), ("patient", patients))
    }
    assert right["image"] > 0.95 and right["patient"] < 0.45
    few = audit.predict_held_out(
        model, features[:18], label[:18], patients[:18]
    )  # two patients a class: two folds
    assert few.sum(axis=1) == pytest.approx(np.ones(18))
    with pytest.raises(ValueError, match="class 'bacterial' has one patient: nothing can be held out"):
        audit.predict_held_out(model, features[:9], label[:9], patients[:9])


def test_the_interval_is_that_of_resampled_patients():
    rng = np.random.default_rng(4)
    label, patients = np.repeat(["a", "b", "b"], 100), np.repeat(np.arange(75), 4)
    correct = np.repeat(rng.random(75) < 0.6, 4).astype(
        float
    )  # all images of a patient are right or wrong together
    assert audit.balanced_accuracy(correct, label) == pytest.approx(
        balanced_accuracy_score(label, np.where(correct == 1, label, np.where(label == "a", "b", "a")))
    )
    draws = audit.bootstrap_accuracy(correct, label, patients)
    naive = audit.bootstrap_accuracy(correct, label, np.arange(300))
    assert draws.mean() == pytest.approx(audit.balanced_accuracy(correct, label), abs=0.01)
    assert draws.std() == pytest.approx(2 * naive.std(), rel=0.2)  # four images that agree are worth one
    np.testing.assert_array_equal(draws, audit.bootstrap_accuracy(correct, label, patients))


def test_the_bootstrap_of_the_auc_agrees_with_scikit_learn():
    rng = np.random.default_rng(11)
    y_true, patients = rng.random(90) < 0.4, np.arange(90) // 2
    y_score = np.round(rng.normal(size=90) + y_true, 1)  # rounded: with ties
    number, times = audit.draw_patients(patients, seed=5, draws=20)
    theirs = [roc_auc_score(y_true, y_score, sample_weight=weight[number]) for weight in times]
    np.testing.assert_allclose(audit.bootstrap_auc(y_true, y_score, patients, seed=5, draws=20), theirs)


def test_a_shortcut_is_found_where_it_is_and_nowhere_else():
    rng = np.random.default_rng(5)
    label = np.array(CLASSES)[np.arange(1200) % 3]
    border = rng.normal(size=(1200, 4))
    border[label == "viral"] += 1.0
    views = {
        "size": np.ones((1200, 2)),
        "mean": rng.normal(size=(1200, 2)),
        "border": border,
        "thumbnail": border,
    }
    scores = audit.score_shortcuts(
        views, label, np.arange(1200) // 2, trees=30, coarse=["thumbnail"]
    ).set_index("view")
    assert scores["verdict"].tolist() == ["constant", "equivalent to chance", "above chance", "above chance"]
    assert (
        scores.loc["border", "ci_low"]
        < scores.loc["border", "balanced_accuracy"]
        < scores.loc["border", "ci_high"]
    )
    assert (
        "may be visible" in scores.loc["thumbnail", "sentence"]
        and "may be visible" not in scores.loc["border", "sentence"]
    )
    few = audit.score_shortcuts({"mean": rng.normal(size=(60, 2))}, label[:60], np.arange(60), trees=30)
    assert few["verdict"].tolist() == ["undecided"]


def test_a_split_by_image_flatters_the_neighbour():
    features, label, patients = draw_people(np.random.default_rng(6))
    split = np.where(patients < 100, "train", np.where(patients < 120, "val", "test"))
    manifest = pd.DataFrame({"label": label, "patient_id": patients, "split": split})
    row = audit.compare_splits(features, manifest, repeats=2).set_index("model").loc["nearest neighbour"]
    assert row["difference"] == pytest.approx(row["by_image"] - row["by_patient"]) and row["ci_low"] > 0.4
    assert row["test_low"] < 1 / 3 < row["test_high"]  # these patients show nothing of their class
    assert audit.share_nearest_patient(features, patients) > 0.95
    noise = np.random.default_rng(7).normal(size=features.shape)
    honest = audit.compare_splits(noise, manifest).set_index("model").loc["nearest neighbour"]
    assert honest["ci_low"] < 0 and abs(honest["difference"]) < 0.05
    assert audit.share_nearest_patient(noise, patients) < 0.05


def test_a_shifted_test_set_is_told_apart_and_an_equal_one_is_not():
    rng = np.random.default_rng(8)
    manifest = pd.DataFrame(
        {
            "label": "normal",
            "split": np.repeat(["train", "test", "oracle"], [300, 100, 50]),
            "patient_id": np.arange(450) // 2,
        }
    )
    features = rng.normal(size=(450, 10))
    same = audit.compare_train_test(features, manifest, ["normal"]).iloc[0]
    assert same["ci_low"] < 0.5 < same["ci_high"] and (same["n_train"], same["n_test"]) == (300, 100)
    moved = features + 1.2 * (manifest["split"] == "test").to_numpy()[:, None]
    shifted = audit.compare_train_test(moved, manifest, ["normal"]).iloc[0]
    assert shifted["ci_low"] > 0.9 and shifted["floor_high"] < 0.65
    few = manifest.assign(
        patient_id=np.where(manifest["split"] == "test", "one", manifest["patient_id"].astype(str))
    )
    assert audit.compare_train_test(features, few, ["normal"]).empty
    shares = audit.compare_prevalence(
        pd.DataFrame({"label": ["a", "a", "b", "b"], "split": ["train", "val", "train", "test"]}), ["a", "b"]
    )
    assert shares["difference"].round(3).tolist() == [-0.667, 0.667]


# ---------------------------------------------------------------- views


def test_a_preparation_takes_out_a_shift_of_brightness_and_the_map_shows_where_one_lies():
    rng = np.random.default_rng(3)
    manifest = pd.DataFrame(
        {
            "label": np.tile(["a", "b"], 200),
            "split": np.repeat(["train", "test"], [260, 140]),
            "patient_id": np.arange(400),
        }
    )
    pictures = rng.normal(100, 12, (400, 32, 32))
    pictures[manifest["label"] == "b", 8:20, 8:20] += 25  # the class: a block that is brighter than the rest
    pictures[manifest["split"] == "test"] += 30  # the shift: brighter films
    images_u8 = pictures.clip(0, 255).astype(np.uint8)
    features = {
        name: audit.shrink(audit.prepare_images(images_u8, name), 16)
        for name in ("as stored", "standardised")
    }
    table = audit.compare_preparations(features, manifest, ["a", "b"]).set_index("preparation")
    assert table.loc["as stored", "auc"] > 0.95 and table.loc["as stored", "change"] == 0
    assert table.loc["standardised", "auc"] < 0.65 and table.loc["standardised", "ci_high"] < 0
    assert table["balanced_accuracy"].min() > 0.9  # the classes survive either
    assert table.loc["as stored", ["gain", "gain_low", "gain_high"]].eq(0).all()
    gained = table.loc["standardised"]
    assert gained["gain_low"] <= gained["gain"] <= gained["gain_high"]
    assert gained["gain"] == pytest.approx(gained["balanced_accuracy"] - table.loc["as stored", "balanced_accuracy"])
    noise = rng.normal(size=features["as stored"].shape)  # what knows the classes beats what does not, beyond doubt
    known = audit.compare_preparations({"noise": noise} | features, manifest, ["a", "b"])
    assert known.loc[known["chosen"], "preparation"].tolist() == [known.loc[known["balanced_accuracy"].idxmax(), "preparation"]]
    unknown = audit.compare_preparations({"noise": noise, "again": noise + 1e-9}, manifest, ["a", "b"])
    assert unknown["chosen"].tolist() == [True, False]
    for name in audit.PREPARATIONS:
        prepared = audit.prepare_images(images_u8[:3], name)
        assert prepared.shape == (3, 32, 32) and 0 <= prepared.min() and prepared.max() <= 1.0001, name
    with pytest.raises(ValueError, match="no preparation 'sharpened'"):
        audit.prepare_images(images_u8[:1], "sharpened")

    edges = rng.normal(100, 5, (200, 64, 64))
    edges[100:, :16, :16] += 60 * (
        np.arange(16) % 4 < 2
    )  # stripes in the upper left corner of the second half
    weights = audit.map_domain_weights(audit.embed_hog(edges), np.repeat([False, True], 100))
    assert weights.shape == (7, 7) and max(np.unravel_index(weights.argmax(), weights.shape)) <= 1


def test_views_hide_what_they_say_they_hide():
    images_u8 = draw_smooth(np.random.default_rng(9), 2, 32)
    masks = np.zeros((2, 32, 32), bool)
    masks[0, 8:12, 4:6] = masks[0, 20:24, 20:28] = True
    hidden = audit.hide_lungs(images_u8, masks)
    assert hidden[0, 8:24, 4:28].max() == 0
    outside = np.ones((32, 32), bool)
    outside[8:24, 4:28] = False
    np.testing.assert_array_equal(hidden[0][outside], images_u8[0][outside])
    np.testing.assert_array_equal(hidden[1], images_u8[1])
    small = audit.shrink(images_u8, 8)
    assert small.shape == (2, 64) and small[1, 9] == pytest.approx(images_u8[1, 4:8, 4:8].mean(), rel=1e-5)
    assert audit.project_images(draw_smooth(np.random.default_rng(10), 50), components=5).shape == (50, 5)


def test_findings_are_sentences_with_a_status():
    nothing = {"groups": 0, "extra_files": 0, "across_classes": 0, "across_splits": 0, "across_patients": 0}
    view = {
        "view": "border",
        "coarse": False,
        "verdict": "above chance",
        "balanced_accuracy": 0.6,
        "ci_low": 0.5,
        "ci_high": 0.7,
        "chance": 0.33,
        "sentence": "border: tells",
    }
    report = {
        "published_counts": [
            {"part": "test", "label": "viral", "published": 148, "found": 100, "difference": -48}
        ],
        "missing_classes": ["opacity"],
        "corrupt_files": [{"image_id": "a", "reason": "empty"}],
        "exact_duplicates": nothing | {"groups": 1, "across_splits": 1},
        "near_duplicates": nothing,
        "patient_readings": [
            {"reading": "as in the manifest", "patients": 9, "patients_in_several_splits": 0},
            {"reading": "bare number", "patients": 8, "patients_in_several_splits": 1},
        ],
        "split_by_image": [
            {"model": "nearest neighbour", "difference": 0.1, "ci_low": 0.05, "ci_high": 0.15}
        ],
        "shortcut_scores": [view, view | {"view": "8 × 8", "coarse": True}],
        "train_test_shift": [
            {"label": "normal", "auc": 0.9, "ci_low": 0.85, "ci_high": 0.95, "floor_high": 0.55}
        ],
        "prevalence": [{"difference": 0.02}],
    }
    findings = audit.list_findings(report)
    assert findings["status"].tolist() == [
        "note",
        "note",
        "note",
        "warning",
        "fine",
        "fine",
        "note",
        "warning",
        "warning",
        "note",
        "warning",
        "fine",
    ]
    assert "viral (test): 100 of 148 published" in findings["finding"][0]


# ---------------------------------------------------------------- the real thing


@pytest.mark.skipif(not os.environ.get("MEDAUG_DATA"), reason="MEDAUG_DATA is not set: no real data at hand")
def test_the_audit_of_guangzhou_finds_what_is_known_about_it(tmp_path):
    manifest = sources.build_manifest("guangzhou", tmp_path, classes=CLASSES)
    inspected = fingerprints.inspect_files([tmp_path / path for path in manifest["path"]], tmp_path / "cache")
    exact = audit.summarise_copies(manifest, inspected["pixel_sha256"])
    assert (exact["groups"], exact["extra_files"], exact["across_classes"], exact["across_splits"]) == (
        30,
        32,
        0,
        0,
    )
    readings = audit.read_patients(manifest)
    crossings = {
        name: audit.count_crossings(patients, manifest["split"]) for name, patients in readings.items()
    }
    assert crossings["as in the manifest"]["patients"].sum() == 0
    test_with = crossings["bare number (person1)"].query("second == 'test'")
    assert test_with["patients"].sum() == 170  # the bare numbers of train and val do not overlap
    normal = manifest["label"] == "normal"
    thumbnails_u8 = fingerprints.stack_thumbnails(inspected[normal])
    shift = audit.compare_train_test(
        audit.shrink(thumbnails_u8, 16), manifest[normal], ["normal"], n_floors=1
    ).iloc[0]
    assert shift["auc"] > 0.85 and shift["floor_high"] < 0.65
