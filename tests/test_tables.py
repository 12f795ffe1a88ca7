"""The contract of files: parts, merging, publishing."""

import json

import pandas as pd
import pytest

from medaug import engine, paths, tables
from medaug.runtime import Run, save_json


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    for name in ("RUNS", "RESULTS", "FIGURES"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    return Run(study="tiny", notebook="05-baselines", seed=0, device="cpu")


def make_rows(table: str, n: int = 2, value: float = 0.1) -> pd.DataFrame:
    return pd.DataFrame({column: [value] * n for column in tables.COLUMNS[table]})


def at(run: Run, notebook: str) -> Run:
    return Run(study=run.study, notebook=notebook, seed=0, device="cpu")


def test_a_part_must_have_the_columns_of_the_contract(run):
    with pytest.raises(ValueError, match=r"history.csv: the part of 05-baselines lacks the column\(s\) step, loss"):
        tables.save_part(run, "history.csv", make_rows("history.csv").drop(columns=["step", "loss"]))
    assert not run.dir.exists()


def test_parts_are_merged_in_story_order_whatever_the_order_of_writing(run):
    for notebook, n in (("05-baselines", 3), ("04-clip-lora", 2)):
        rows = make_rows("history.csv", n).assign(notebook=notebook, extra=1)
        tables.save_part(at(run, notebook), "history.csv", rows[["extra", *tables.COLUMNS["history.csv"]]])
    tables.merge_parts("tiny")
    merged = tables.read_table("tiny", "history.csv")
    assert merged["notebook"].tolist() == ["04-clip-lora"] * 2 + ["05-baselines"] * 3
    assert merged.columns.tolist() == [*tables.COLUMNS["history.csv"], "extra"]


def test_merging_twice_gives_the_same_bytes(run):
    tables.save_part(run, "classification.csv", make_rows("classification.csv", value=1 / 3))
    tables.save_part(run, "predictions.parquet", make_rows("predictions.parquet"))
    tables.save_part(run, "timing.csv", make_rows("timing.csv"))
    tables.merge_parts("tiny")
    first = engine.hash_tables("tiny")
    tables.merge_parts("tiny")
    assert engine.hash_tables("tiny") == first
    assert [line.split()[1] for line in first.splitlines()] == ["classification.csv", "predictions.parquet"]


def test_cards_are_merged_by_notebook(run):
    tables.save_audit(at(run, "01-data-audit"), {"n": 3})
    for notebook in ("02-sd-lora", "01-data-audit"):
        save_json(run.dir / "parts" / "run" / f"{notebook}.json", {"notebook": notebook})
    tables.merge_parts("tiny")
    assert tables.read_json("tiny", "audit.json") == {"n": 3}
    assert list(tables.read_json("tiny", "run.json")) == ["01-data-audit", "02-sd-lora"]


def test_a_run_is_read_before_what_is_published(run):
    with pytest.raises(FileNotFoundError, match="no history.csv for study 'tiny': run `make study STUDY=tiny`"):
        tables.read_table("tiny", "history.csv")
    published = paths.published_dir("tiny")
    published.mkdir(parents=True)
    make_rows("history.csv", 1).to_csv(published / "history.csv", index=False)
    assert len(tables.read_table("tiny", "history.csv")) == 1
    tables.save_part(run, "history.csv", make_rows("history.csv", 4))
    tables.merge_parts("tiny")
    assert len(tables.read_table("tiny", "history.csv")) == 4


@pytest.mark.parametrize("card, shown", [({"simulated": True}, True), ({"simulated": False}, False), (None, False)])
def test_pictures_are_published_of_simulated_images_only(run, card, shown):
    """A run without a card is treated as one on real patients."""
    tables.save_part(run, "history.csv", make_rows("history.csv"))
    tables.merge_parts("tiny")
    (run.dir / "figures").mkdir()
    (run.dir / "figures" / "montage.png").write_bytes(b"picture")
    (run.dir / "images").mkdir()
    (run.dir / "images" / "patient.png").write_bytes(b"picture")
    if card is not None:
        (run.dir / "manifest.json").write_text(json.dumps(card))
    engine.publish_study("tiny")
    assert (paths.published_dir("tiny") / "history.csv").is_file()
    pictures = [*paths.RESULTS.rglob("*.png"), *paths.FIGURES.rglob("*.png")]
    assert [picture.name for picture in pictures] == (["montage.png"] if shown else [])


def test_nothing_to_publish_is_said(run):
    with pytest.raises(FileNotFoundError, match="nothing to publish for 'tiny'"):
        engine.publish_study("tiny")
    assert not paths.RESULTS.exists()


def test_parts_of_a_notebook_that_is_skipped_are_dropped(run, monkeypatch):
    monkeypatch.setattr(engine.studies, "list_notebooks", lambda study: ["05-baselines"])
    for notebook in ("05-baselines", "06-segmentation"):
        tables.save_part(at(run, notebook), "history.csv", make_rows("history.csv"))
    engine.drop_stale_parts("tiny")
    assert [path.stem for path in (run.dir / "parts").glob("*/*")] == ["05-baselines"]
