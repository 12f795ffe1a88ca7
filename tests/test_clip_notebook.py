"""Notebook 04 itself, cell by cell at toy size: any number of classes, the arms, the variants, and what it writes."""

import pandas as pd
import pytest

from medaug import images, sources, studies, tables
from medaug.phantom import chest

NOTEBOOK = "04-clip-lora"
TOY = {"seeds": [0, 1], "steps": 4, "evaluate_every": 2, "batch_size": 8, "published_steps": 8, "n_boot": 30, "n_explained": 6,
       "probe_strengths": [0.01], "neighbours": [3, 500], "generator_seeds": [0]}


def make_study(run_dir, classes):
    """A manifest of simulated patients, two images each."""
    counts = {"train": 20, "val": 12, "test": 12}
    return sources.build_manifest("phantom", run_dir, classes=classes, n_patients=counts, images_per_patient=(2, 2))


def make_synthetic(run_dir, classes, each=16):
    """Stand for a generator: films of new simulated patients, with the provenance that notebook 3 would write."""
    rows = pd.DataFrame([{"label": label, "image_id": f"lora-0-{label}-{i}"} for label in classes for i in range(each)])
    seeds = range(10_000, 10_000 + len(rows))
    films = chest.render(seeds, seeds, rows["label"], 64, 0.5)["image_u8"]
    for name, film in zip(rows["image_id"], films, strict=True):
        sources._save_png((run_dir / "synthetic" / f"{name}.png", film))
    paths_ = "synthetic/" + rows["image_id"] + ".png"
    rows = rows.assign(path=paths_, sha256=[images.hash_file(run_dir / path) for path in paths_], origin="synthetic", split="train",
                       generator="lora", generator_seed=0)
    rows.to_parquet(run_dir / "synthetic" / "manifest.parquet", index=False)


def test_four_classes_with_arms_and_variants(run_cells, tmp_path):
    """The fourth report's classes and captions; LoRA in the text tower alone, in float32, and on squashed images."""
    settings = studies.resolve_parameters("covid", NOTEBOOK)
    classes = settings["classes"]
    make_study(tmp_path / "four", classes)
    (tmp_path / "four" / "synthetic").mkdir()
    make_synthetic(tmp_path / "four", classes)
    variants = {"text-only": {"target_modules": r".*text_model.*\.(q_proj|fc1)", "rank": 4}, "squashed": {"preprocessing": "squashed"},
                "float32": {"mixed_precision": "no", "lora_layers": [1, 2]}}
    run_cells(NOTEBOOK, **TOY | dict(study="four", classes=classes, prompt_sets=settings["prompt_sets"],
                                       tuning_prompts=settings["tuning_prompts"], lora_variants=variants))

    scores = pd.read_csv(tmp_path / "four" / "parts" / "classification.csv" / f"{NOTEBOOK}.csv")
    assert not scores.duplicated(tables.KEYS).any()
    arms = scores[(scores["model"] == "clip-lora") & (scores["split"] == "test")].groupby("arm")
    assert arms["seed"].nunique().to_dict() == {"real": 2, "real+duplicates": 2, "real+synthetic": 2}
    assert arms["ratio"].first().to_dict() == {"real": 0.0, "real+duplicates": 0.5, "real+synthetic": 0.5}
    assert arms["generator_seed"].first().to_dict() == {"real": -1, "real+duplicates": -1, "real+synthetic": 0}
    assert {f"clip-lora-{name}" for name in variants} | {"clip-knn", "clip-linear-probe-squashed"} <= set(scores["model"])
    predictions = pd.read_parquet(tmp_path / "four" / "parts" / "predictions.parquet" / f"{NOTEBOOK}.parquet")
    assert {f"p_{label}" for label in classes} <= set(predictions.columns)
    assert len(predictions.groupby(tables.KEYS)) == len(scores)
    history = pd.read_csv(tmp_path / "four" / "parts" / "history.csv" / f"{NOTEBOOK}.csv")
    curves = history[(history["model"] == "clip-lora") & (history["arm"] == "real+synthetic")]
    assert curves["step"].tolist() == [2, 4, 2, 4]
    assert curves[["train_accuracy", "train_macro_f1", "val_accuracy", "val_macro_recall", "val_macro_f1"]].notna().all(axis=None)


def test_a_study_without_a_generator_says_so(run_cells, tmp_path, capsys):
    make_study(tmp_path / "plain", ["normal", "bacterial", "viral"])
    names = run_cells(NOTEBOOK, **TOY | dict(study="plain", seeds=[0, 1], n_explained=0))
    assert "no synthetic images (notebook 3 has not run in it): real+synthetic" in capsys.readouterr().out
    assert names["added_arms"] == ["real+duplicates"]
    assert set(names["classification"]["arm"]) == {"none", "real", "real+duplicates"}


def test_a_variant_with_an_unknown_setting_is_named(run_cells, tmp_path):
    make_study(tmp_path / "plain", ["normal", "bacterial", "viral"])
    with pytest.raises(ValueError, match="lora_variants: 'bold' sets alpha; a variant may set rank, lora_alpha"):
        run_cells(NOTEBOOK, **TOY | dict(study="plain", lora_variants={"bold": {"alpha": 8}}))
