"""What others have packed: nothing leaves the folder, what is left out is named, nothing is fetched unasked."""

import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from medaug import archives, sources


def write_zip(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def list_below(folder) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


# ---------------------------------------------------------------- zip


@pytest.mark.parametrize(
    "name", ["../out.png", "a/../../out.png", "/out.png", "//server/out.png", "..\\out.png", "a\\..\\..\\out.png",
             "C:\\out.png", "C:out.png", "\\out.png", ".."]
)  # fmt: skip
def test_no_path_leaves_the_folder(tmp_path, name):
    file = write_zip(tmp_path / "a.zip", {"in/side.png": b"1", name: b"2"})
    left_out = archives.unpack_zip(file, tmp_path / "here" / "unpacked")
    assert [row["reason"] for row in left_out] == ["its path leads out of the folder: not unpacked"]
    assert list_below(tmp_path) == {"a.zip", "here/unpacked/in/side.png"}


def test_a_link_in_the_folder_is_not_followed_out_of_it(tmp_path):
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "outside").mkdir()
    os.symlink(tmp_path / "outside", tmp_path / "unpacked" / "door")
    file = write_zip(tmp_path / "a.zip", {"door/out.png": b"1"})
    assert "leads out" in archives.unpack_zip(file, tmp_path / "unpacked")[0]["reason"]
    assert list_below(tmp_path / "outside") == set()


def test_what_is_refused_is_named_and_the_rest_is_unpacked(tmp_path):
    file = write_zip(tmp_path / "a.zip", {"a/1.png": b"1" * 99, "bomb.png": bytes(70 * 2**20), "a": b"file and folder"})
    left_out = {row["file"]: row["reason"] for row in archives.unpack_zip(file, tmp_path / "unpacked")}
    assert set(left_out) == {"bomb.png", "a"} and "zip bomb" in left_out["bomb.png"]
    assert list_below(tmp_path / "unpacked") == {"a/1.png"}
    for data in (b"no zip", b""):
        (tmp_path / "b.zip").write_bytes(data)
        with pytest.raises(ValueError, match="b.zip is not a zip archive that can be read"):
            archives.unpack_zip(tmp_path / "b.zip", tmp_path / "unpacked")


def test_a_study_reads_a_zip_once_and_says_what_it_left_out(tmp_path):
    rng, members = np.random.default_rng(0), {"../evil.png": b"1"}
    for label in ("sick", "well"):
        for n in range(12):
            Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(tmp_path / "one.png")
            members[f"films/{label}/{n}.png"] = (tmp_path / "one.png").read_bytes()
    file = write_zip(tmp_path / "films.zip", members)
    manifest = sources.build_manifest("folder", tmp_path / "run", str(file))
    assert manifest["label"].value_counts().to_dict() == {"sick": 12, "well": 12}
    assert sources.read_card(tmp_path / "run")["left_out"][0]["image_id"] == "../evil.png"
    unpacked = next((tmp_path / "run" / "unpacked").glob("*/films"))
    before = unpacked.stat().st_mtime_ns
    again = sources.build_manifest("folder", tmp_path / "run", str(file))
    assert again.equals(manifest) and unpacked.stat().st_mtime_ns == before
    assert not (tmp_path / "run" / "evil.png").exists() and not (tmp_path / "run" / "unpacked" / "evil.png").exists()


# ---------------------------------------------------------------- MedMNIST


def make_medmnist(path, colour: bool = False, **changed):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 24), ("val", 8), ("test", 8)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28, *[3] * colour), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)[:, None]
    np.savez(path, **(arrays | changed))
    return path, arrays | changed


@pytest.mark.parametrize("colour", [False, True])
def test_medmnist_keeps_its_images_labels_and_splits(tmp_path, colour):
    file, arrays = make_medmnist(tmp_path / "pneumoniamnist.npz", colour)
    manifest = sources.build_manifest("medmnist", tmp_path / "run", str(file), ["well", "sick"])
    assert manifest["split"].value_counts().to_dict() == {"train": 24, "val": 8, "test": 8}
    row = manifest.set_index("image_id").loc["val/000005"]
    assert row["label"] == "sick"
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "run" / row["path"])), arrays["val_images"][5])
    assert sources.guess_source(file) == "medmnist"


def test_near_duplicates_of_given_splits_stay_in_the_test_set(tmp_path):
    _, arrays = make_medmnist(tmp_path / "a.npz")
    knots = np.random.default_rng(1).integers(60, 200, (5, 5), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(knots).resize((28, 28), Image.Resampling.BICUBIC))
    arrays["test_images"][0], arrays["train_images"][0], arrays["val_images"][0] = smooth, smooth + 1, smooth + 2
    np.savez(tmp_path / "a.npz", **arrays)
    manifest = sources.build_manifest("medmnist", tmp_path / "run", str(tmp_path / "a.npz"))
    left_out = {row["image_id"]: row["reason"] for row in sources.read_card(tmp_path / "run")["left_out"]}
    assert set(left_out) == {"train/000000", "val/000000"} and "near duplicate" in left_out["train/000000"]
    assert "test/000000" in set(manifest["image_id"]) and manifest.groupby("patient_id")["split"].nunique().max() == 1


@pytest.mark.parametrize("changed, message", [
    ({"train_labels": np.zeros((24, 14), np.uint8)}, "one label each"),
    ({"val_images": np.zeros((8, 28, 28, 28), np.uint8)}, "single images"),
    ({"test_images": np.zeros((8, 28, 28), np.float32)}, "float32"),
    ({"test_images": np.array([{"a": 1}] * 8, dtype=object)}, "allow_pickle"),
])  # fmt: skip
def test_other_arrays_are_refused_in_one_line(tmp_path, changed, message):
    file, _ = make_medmnist(tmp_path / "a.npz", **changed)
    with pytest.raises(ValueError, match=message) as caught:
        archives.unpack_medmnist(file, tmp_path / "images")
    assert "\n" not in str(caught.value) and not (tmp_path / "images").exists()


def test_too_few_class_names_are_an_error(tmp_path):
    file, _ = make_medmnist(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="labels up to 1, but 1 classes are named"):
        archives.unpack_medmnist(file, tmp_path / "images", ["well"])


# ---------------------------------------------------------------- Kaggle


def test_what_kagglehub_has_is_used_and_no_network_is_needed(tmp_path):
    """A data set with its version that lies in kagglehub's own cache is served from there."""
    held = tmp_path / "datasets" / "someone" / "films" / "versions" / "3"
    held.mkdir(parents=True)
    (held.parents[1] / "3.complete").touch()
    code = "from medaug.archives import fetch_dataset; print(fetch_dataset('someone/films/versions/3'))"
    environment = os.environ | {"KAGGLEHUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == str(held), done.stderr


def test_a_data_set_that_cannot_be_had_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match="this run is offline: set `online: true` in the study, or download"):
        archives.fetch_dataset("someone/films")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(RuntimeError, match="'someone/films' could not be fetched .*: check the name") as caught:
        archives.fetch_dataset("someone/films")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # as if it were not installed
    with pytest.raises(RuntimeError, match="the package kagglehub is missing; install it, or download"):
        archives.fetch_dataset("someone/films")


def test_nothing_imports_kagglehub_before_it_is_needed():
    code = "import sys, medaug.sources; print('kagglehub' in sys.modules, 'pydicom' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
