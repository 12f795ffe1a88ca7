"""Notebook 05 itself, cell by cell at toy size: what it writes, and the settings it refuses."""

import pandas as pd
import pytest

from medaug import guards, sources, tables

NOTEBOOK, CLASSES = "05-baselines", ["normal", "bacterial", "viral"]
CNN = {"network": "small-cnn", "weights": "none", "frozen": 0, "size": 64, "channels": 1, "steps": 60, "batch_size": 16,
       "learning_rate": [3e-3, 1e-2], "weight_decay": [0.01]}
TOY = {"study": "toy", "classes": CLASSES, "arms": ["real", "real+duplicates", "oracle"], "classifier_seeds": [0, 1],
       "evaluations": 2, "n_boot": 30}


@pytest.fixture
def toy(tmp_path):
    """A study of a few simulated patients; returns its folder."""
    counts = {"train": 40, "val": 24, "test": 24, "oracle": 60}
    sources.build_manifest("phantom", tmp_path / "toy", classes=CLASSES, n_patients=counts, images_per_patient=(1, 2))
    return tmp_path / "toy"


def test_arms_fractions_and_every_table(run_cells, toy):
    names = run_cells(NOTEBOOK, **TOY, models={"small-cnn": CNN}, fractions=[0.5, 1.0])
    scores = pd.read_csv(toy / "parts" / "classification.csv" / f"{NOTEBOOK}.csv")
    assert not scores.duplicated(tables.KEYS).any() and set(scores["steps"]) == {60}
    runs = scores[scores["split"] == "test"].groupby(["fraction", "arm"]).size().to_dict()
    assert runs == {(0.5, "real"): 2, (0.5, "real+duplicates"): 2, (1.0, "real"): 2, (1.0, "real+duplicates"): 2, (1.0, "oracle"): 2}
    assert names["choice"]["small-cnn", -1] in [(3e-3, 0.01), (1e-2, 0.01)]
    val = names["chosen"].set_index("learning_rate")["val_macro_f1"]
    assert names["choice"]["small-cnn", -1][0] == val.idxmax()
    predictions = pd.read_parquet(toy / "parts" / "predictions.parquet" / f"{NOTEBOOK}.parquet")
    test_patients = set(sources.read_manifest(toy).query("split == 'test'")["patient_id"])
    assert set(predictions.loc[predictions["split"] == "test", "patient_id"]) == test_patients


def test_a_network_that_learns_nothing_is_set_aside_and_alone_an_error(run_cells, toy, capsys):
    dead = CNN | {"network": "cnn5", "steps": 4, "learning_rate": [1e-6]}
    small = TOY | {"arms": ["real", "real+duplicates"]}
    names = run_cells(NOTEBOOK, until="cell-19", **small, models={"cnn5": dead, "small-cnn": CNN | {"learning_rate": [1e-2]}})
    assert "runs of cnn5, the first of them real, seed 0: the model predicts" in capsys.readouterr().out
    assert set(names["classification"]["model"]) == {"small-cnn"} == set(names["models"])
    with pytest.raises(guards.GuardError, match="real, seed 0: the model predicts"):
        run_cells(NOTEBOOK, until="cell-19", **small, models={"cnn5": dead})


def test_layers_that_were_never_trained_are_not_frozen(run_cells, toy):
    with pytest.raises(ValueError, match="models: 'half' freezes layers that were never trained"):
        run_cells(NOTEBOOK, until="cell-13", **TOY, models={"half": CNN | {"frozen": 1}})
