"""Writing safely, seeding, and the run card."""

import json
import random

import numpy as np
import pytest
import torch

from medaug import paths, runtime


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "deep" / "table.csv"
    with runtime.replace_when_done(target) as temporary:
        temporary.write_text("old")
        assert not list(target.parent.glob("*.csv"))  # if the process were killed here, no reader would find the half
    with pytest.raises(RuntimeError), runtime.replace_when_done(target) as temporary:
        temporary.write_text("half of the new")
        assert target.read_text() == "old"
        raise RuntimeError("disk full")
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["table.csv"]


def test_json_has_the_same_bytes_whatever_the_order(tmp_path):
    runtime.save_json(tmp_path / "a.json", {"b": 1, "a": [1.5, "é"]})
    runtime.save_json(tmp_path / "b.json", {"a": [1.5, "é"], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def draw() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_seed_fixes_all_generators():
    runtime.seed_everything(3)
    first = draw()
    runtime.seed_everything(3)
    assert draw() == first
    runtime.seed_everything(4)
    assert not set(draw()) & set(first)


def test_a_run_fixes_threads_and_leaves_a_card(capsys):
    run = runtime.start_run("tiny", "01-data-audit", seed=5, threads=1, device="cpu")
    assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
    assert run.dir == paths.run_dir("tiny") and run.dir.is_dir()
    runtime.finish_run(run)
    card = json.loads((run.dir / "parts" / "run" / "01-data-audit.json").read_text())
    assert (card["seed"], card["device"], card["notebook"]) == (5, "cpu", "01-data-audit")
    assert card["peak_memory_mb"] > 50 and card["versions"]["torch"] == torch.__version__.split("+")[0]
    said = capsys.readouterr().out
    assert "study tiny" in said and "seed 5" in said and "finished in" in said


def test_progress_yields_everything_and_writes_nothing_into_a_headless_notebook(monkeypatch, capsys):
    monkeypatch.setenv("MEDAUG_HEADLESS", "1")
    assert list(runtime.progress(range(3), desc="steps")) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_device_that_is_named_is_taken():
    assert runtime.pick_device("cpu") == "cpu"
    assert runtime.pick_device("auto") in ("cuda", "mps", "cpu")
