"""`medaug audit`, called as a user calls it: every kind of place, every kind of copy, every output."""

import html.parser
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medaug import cli, folder_audit

DATA = os.environ.get("MEDAUG_DATA")
NO_DATA = "MEDAUG_DATA is not set: no real data at hand"


def draw(seed: int, size: int = 64) -> Image.Image:
    """A smooth random picture."""
    knots = np.random.default_rng(seed).integers(30, 226, (6, 6), dtype=np.uint8)
    return Image.fromarray(knots).resize((size, size), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def make_classes(folder: Path, per_class: int = 24, first: int = 0) -> Path:
    for number, label in enumerate(("sick", "well")):
        for n in range(per_class):
            save(draw(first + 1000 * number + n), folder / label / f"p{n // 2}_{n}.png")
    return folder


def call(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "medaug.cli", "audit", *map(str, arguments)], capture_output=True,
                          text=True, timeout=300, **options)  # fmt: skip


def find(report: dict, check: str) -> list[tuple[str, str]]:
    return [(row["status"], row["finding"]) for row in report["findings"] if row["check"] == check]


# ---------------------------------------------------------------- the command


class Page(html.parser.HTMLParser):
    """Collects what a page refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.refers, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refers += [value for key, value in attrs if key in ("src", "href")]


def test_the_command_finds_every_fault_that_was_put_in(tmp_path):
    mine, other = make_classes(tmp_path / "mine"), make_classes(tmp_path / "other", 6, first=5000)
    save(draw(0), mine / "sick" / "again.bmp")  # the same picture in another format
    (mine / "well" / "label.png").write_bytes((mine / "sick" / "p1_3.png").read_bytes())  # one file in both classes
    save(draw(1004).resize((48, 48)), mine / "well" / "small.jpg", quality=80)  # a near duplicate
    save(draw(1010).resize((50, 50)), other / "sick" / "taken.jpg", quality=85)  # recompressed, of another class there
    (mine / "sick" / "broken.png").write_bytes(b"")
    (mine / "list.txt").write_text("not an image")
    for n in range(24):  # a frame around one class only
        framed = np.array(Image.open(mine / "well" / f"p{n // 2}_{n}.png"))
        framed[:4] = 0
        Image.fromarray(framed).save(mine / "well" / f"p{n // 2}_{n}.png")
    save(Image.open(mine / "well" / "p5_10.png").resize((50, 50)), other / "sick" / "taken.jpg", quality=85)
    save(Image.open(mine / "well" / "p2_4.png").resize((48, 48)), mine / "well" / "small.jpg", quality=80)
    done = call(mine, "--against", other, "--json", tmp_path / "a.json", "--html", tmp_path / "a.html",
                "--cache", tmp_path / "cache", "--pictures")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert report["files"] == {"found": 53, "images": 51, "failed": 1, "others": 1}
    assert report["failed"] == [{"file": "sick/broken.png", "reason": "not an image: the file is empty"}]
    assert report["others"] == [{"file": "list.txt", "reason": "not an image, and not called one (.txt)"}]
    copies = report["copies"]
    assert {frozenset(group["files"]): group["same_bytes"] for group in copies["identical_groups"]} == {
        frozenset({"sick/again.bmp", "sick/p0_0.png"}): False,
        frozenset({"sick/p1_3.png", "well/label.png"}): True,
    }
    assert copies["identical_files"]["groups"] == copies["identical_files"]["across_classes"] == 1
    assert [{pair["first"], pair["second"]} for pair in copies["near_pairs"]] == [{"well/p2_4.png", "well/small.jpg"}]
    assert report["against"]["images"] == 1 and report["against"]["identical_pictures"] == 0
    assert report["against"]["pairs"][0]["first"] == "well/p5_10.png"
    assert report["against"]["pairs"][0]["second_class"] == "sick"
    assert {"label": "well", "shared": 1, "by_hash": 1, "images": 26} in report["against"]["by_class"]
    verdicts = {row["view"]: row["verdict"] for row in report["shortcuts"]["scores"]}
    assert verdicts["border (outer sixteenth)"] == "above chance"
    statuses = {status for check in ("identical files", "overlap", "files") for status, _ in find(report, check)}
    assert "warning" in statuses
    # on the terminal
    assert done.stdout.splitlines()[0].endswith("53 files = 51 images + 1 that cannot be read + 1 that are no images")
    for told in ("sick/broken.png: not an image", "WARNING shortcut: border", "well/p5_10.png ~ sick/taken.jpg"):
        assert told in done.stdout
    # the page
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    refers = Page(page).refers
    assert len(refers) == 4 and all(address.startswith("data:image/png;base64,") for address in refers)
    assert "script" not in Page(page).tags and "http" not in page and "png\":" not in (tmp_path / "a.json").read_text()
    assert page.count('class="badge warning"') == sum(row["status"] == "warning" for row in report["findings"])


def test_without_being_asked_the_page_shows_no_pictures(tmp_path, capsys):
    save(draw(0), tmp_path / "flat" / "a.png")
    save(draw(0).resize((50, 50)), tmp_path / "flat" / "b.png")
    options = ["--html", str(tmp_path / "a.html"), "--cache", str(tmp_path / "cache")]
    assert cli.main(["audit", str(tmp_path / "flat"), *options]) == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Near duplicates" in page and Page(page).refers == []
    assert "shortcut: not looked for" in capsys.readouterr().out


def test_strict_turns_warnings_into_an_exit_code(tmp_path):
    save(draw(0), tmp_path / "set" / "a.png")
    options = ["--strict", "--cache", str(tmp_path / "cache")]
    assert cli.main(["audit", str(tmp_path / "set"), *options]) == 0
    (tmp_path / "set" / "b.png").write_bytes(b"text")
    assert cli.main(["audit", str(tmp_path / "set"), *options]) == 1


@pytest.mark.parametrize("arguments, says", [
    (["gone"], "no such file or folder: gone; give a folder of images"),
    (["empty"], "holds no files: give the folder that the images are in"),
    (["text.zip"], "text.zip is not a zip archive that can be read"),
    (["bad.csv"], "bad.csv lacks the column path: needs path and label"),
    (["bytes.csv"], "bytes.csv is not a table that can be read"),
    (["bad.parquet"], "bad.parquet is not a table that can be read"),
    (["bad.npz"], "bad.npz is not a MedMNIST file"),
    (["text.zip", "--json", "gone/a.json"], "cannot write gone/a.json: there is no folder"),
    (["one.png", "--patients", "(p"], "--patients '(p' is no regular expression with one group"),
    (["one.png", "--against", "gone"], "no such file or folder: gone"),
])  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("text.zip", "bad.parquet", "bad.npz"):
        (tmp_path / name).write_text("this is text")
    (tmp_path / "bad.csv").write_text("file,class\na.png,x\n")
    (tmp_path / "bytes.csv").write_bytes(b"path,label\n\xff\xfe.png,x\n")
    save(draw(0), tmp_path / "one.png")
    assert cli.main(["audit", *arguments, "--cache", str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert says in said[-1] and said[-1].startswith("medaug: ") and sum(line.startswith("medaug: ") for line in said) == 1


def test_the_help_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["audit", "--help"])
    text = capsys.readouterr().out
    for word in ("--against", "--json", "--html", ".npz", "DICOM", "near duplicates", "shortcuts", "medaug audit films/"):
        assert word in text


# ---------------------------------------------------------------- every kind of place


def test_zip_table_medmnist_flat_folder_and_file_give_the_same_pictures(tmp_path):
    folder = make_classes(tmp_path / "set", 4)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, Path("wrapped") / file.relative_to(folder))
    rows = [{"path": f"set/{file.relative_to(folder)}", "label": file.parent.name, "patient_id": file.name[:2],
             "split": "train" if n % 2 else "test"} for n, file in enumerate(sorted(folder.rglob("*.png")))]  # fmt: skip
    pd.DataFrame(rows).to_csv(tmp_path / "set.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "set.parquet", index=False)
    pictures = np.stack([np.asarray(Image.open(tmp_path / row["path"])) for row in rows])
    labels = np.array([row["label"] == "well" for row in rows], np.uint8)
    np.savez(tmp_path / "set.npz", train_images=pictures, train_labels=labels[:, None])
    flat = tmp_path / "flat"
    for n, row in enumerate(rows):
        save(Image.open(tmp_path / row["path"]), flat / f"{n}.png")
    for name in ("set", "set.zip", "set.csv", "set.parquet", "set.npz", "flat"):
        report = folder_audit.audit_path(tmp_path / name, against=folder)
        assert report["files"]["found"] == report["files"]["images"] == 8
        assert report["against"]["images"] == report["against"]["identical_pictures"] == 8, name
        classes = sorted(row["label"] for row in report["classes"])
        expected = {"set.npz": ["0", "1"], "flat": [""], "set.csv": ["sick", "sick", "well", "well"]}
        assert classes == expected.get(name.replace("parquet", "csv"), ["sick", "well"])
    assert folder_audit.audit_path(flat / "3.png")["files"]["images"] == 1
    table = folder_audit.audit_path(tmp_path / "set.csv")
    assert (table["patients"], table["patients_in_several_splits"]) == (2, 2)
    assert find(table, "patients") == [("warning", "2 of 2 patients stand in several splits")]


def test_splits_and_classes_are_read_from_the_folders_and_masks_are_told_apart(tmp_path):
    for n, (where, name) in enumerate([("train/NORMAL", "a"), ("train/SICK", "b"), ("test/NORMAL", "c")]):
        save(draw(n), tmp_path / "set" / "chest" / where / "images" / f"{name}.png")
        save(draw(9 + n), tmp_path / "set" / "chest" / where / "masks" / f"{name}.png")
    (tmp_path / "set" / ".DS_Store").write_bytes(b"x")
    report = folder_audit.audit_path(tmp_path / "set")
    found = {(row["split"], row["label"]) for row in report["classes"]}
    assert found == {("train", "NORMAL"), ("train", "SICK"), ("test", "NORMAL")}
    reasons = sorted(row["reason"] for row in report["others"])
    assert reasons == ["a mask (by its folder)"] * 3 + ["hidden"] and report["files"]["found"] == 7


def test_patients_hold_folds_together_and_are_checked_across_splits(tmp_path):
    for split in ("train", "test"):
        for n in range(4):
            save(draw(n + 50 * (split == "test")), tmp_path / split / "any" / f"P{n if n else 0}_{n}.png")
    report = folder_audit.audit_path(tmp_path, patient_pattern=r"^(P\d)_")
    assert (report["patients"], report["patients_in_several_splits"]) == (4, 4)


def test_a_missing_row_of_a_table_is_a_failure_and_a_place_without_writing_is_no_obstacle(tmp_path):
    save(draw(0), tmp_path / "a.png")
    (tmp_path / "set.csv").write_text("path,label\na.png,x\ngone.png,x\n")
    (tmp_path / "taken").write_text("a file where the cache should be")
    report = folder_audit.audit_path(tmp_path / "set.csv", cache=tmp_path / "taken")
    assert report["failed"] == [{"file": "gone.png", "reason": "cannot be read (No such file or directory)"}]
    assert report["files"] == {"found": 2, "images": 1, "failed": 1, "others": 0}


def test_only_damaged_files_still_make_a_report(tmp_path):
    (tmp_path / "set").mkdir()
    for n in range(3):
        (tmp_path / "set" / f"{n}.png").write_bytes(b"x" * n)
    report = folder_audit.audit_path(tmp_path / "set", against=tmp_path / "set")
    assert report["files"] == {"found": 3, "images": 0, "failed": 3, "others": 0}
    assert report["against"]["images"] == 0 and "3 that cannot be read" in folder_audit.format_summary(report)
    assert "Cannot be read" in folder_audit.render_page(report)


def test_many_blank_pictures_are_copies_and_no_burden(tmp_path):
    for n in range(400):
        save(Image.new("L", (16 + n % 5, 16)), tmp_path / f"{n}.png")
    copies = folder_audit.audit_path(tmp_path)["copies"]
    assert copies["identical_pictures"]["groups"] == 5 and copies["identical_pictures"]["extra_files"] == 395


# ---------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.mark.skipif(not DATA, reason=NO_DATA)
def test_guangzhou_holds_its_thirty_groups_of_identical_pictures(kept):
    report = folder_audit.audit_path(Path(DATA) / "guangzhou", cache=kept, trees=10)
    found = report["copies"]["identical_pictures"]
    assert report["files"]["images"] == 5856 and report["files"]["failed"] == 0
    assert (found["groups"], found["extra_files"], found["across_classes"], found["across_splits"]) == (30, 32, 0, 0)


@pytest.mark.skipif(not DATA, reason=NO_DATA)
def test_every_viral_image_of_covid_radiography_is_a_guangzhou_image(kept):
    covid, guangzhou = Path(DATA) / "covid-radiography", Path(DATA) / "guangzhou"
    report = folder_audit.audit_path(covid, against=guangzhou, cache=kept, trees=10)
    overlap = pd.DataFrame(report["against"]["by_class"]).set_index("label")
    assert overlap.loc["Viral Pneumonia", ["by_hash", "shared", "images"]].tolist() == [1345, 1345, 1345]
    # 544 by the hash; of one pair (Normal-2381) the pictures differ, with a correlation of 0.46
    assert overlap.loc["Normal", ["by_hash", "shared", "images"]].tolist() == [544, 543, 4000]
    assert overlap.loc["COVID", "shared"] == 0
    assert {pair["second_split"] for pair in report["against"]["pairs"]} == {"train"}
    assert report["copies"]["identical_pictures"]["extra_files"] == 59
