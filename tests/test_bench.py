"""The benchmarks at toy size: both ways run, and the full-size comparison for a GPU runs on small modules anywhere."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from medaug import training

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import bench_features  # noqa: E402
import bench_generation  # noqa: E402
import bench_gpu  # noqa: E402
import bench_lora  # noqa: E402
import bench_memory  # noqa: E402
import bench_segmentation  # noqa: E402
import bench_statistics  # noqa: E402
import bench_training  # noqa: E402
import run  # noqa: E402


def build_meta():
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16,
                                         attention_head_dim=2, norm_num_groups=8,
                                         down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                         up_block_types=("UpBlock2D", "UpBlock2D")),
            "vae": AutoencoderKL(block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
                                 down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
            "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=1000, hidden_size=16, intermediate_size=32,
                                                         num_hidden_layers=1, num_attention_heads=2)),
        }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_full_size_comparison_runs_on_small_modules(checkpointing):
    comparison = bench_gpu.compare(bench_gpu.build_parts(build_meta(), "cpu", torch.bfloat16), 32, checkpointing, 1.5)
    row = run.measure(comparison, rounds=1)
    assert row["median_ours"] > 0 and row["median_plain"] > 0
    assert row["share_of_most"] == pytest.approx(row["ratio"] / 1.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run at full size")
def test_nothing_of_full_size_without_a_gpu():
    assert bench_gpu.list_comparisons() == []


def test_bytes_alive_are_counted_once_and_forgotten_when_freed():
    with bench_memory.LiveBytes() as live:
        first = torch.ones(1000)
        view, second = first.view(10, 100), first * 2
        assert live.now == 8000  # float32; a view is no new memory
        del first, view
        third = second + 1
    assert (live.now, live.peak) == (8000, 8000) and len(third) == 1000


def test_a_step_is_counted_without_being_made():
    found = {precision: run.measure(bench_memory.compare(build_meta()["unet"], 256, precision), 1) for precision in ("no", "bf16")}
    for row in found.values():
        assert row["peak_gb_checkpointed"] < row["peak_gb"] < 1 and row["fits_24_gb"]
        assert row["ratio"] == pytest.approx(row["peak_gb"] / row["peak_gb_checkpointed"])
    assert found["bf16"]["peak_gb"] < found["no"]["peak_gb"]


def test_the_script_gets_pipeline_and_images(tmp_path, monkeypatch):
    """A stand-in script checks what the real one reads, and says so by its exit status."""
    parts, images = bench_lora.build_parts(), torch.zeros(3, 64, 64, dtype=torch.uint8).numpy()
    bench_lora.save_for_script(parts, images, torch.tensor([0, 2, 1]), tmp_path)
    script = tmp_path / "script.py"
    script.write_text("import json, pathlib, sys\n"
                      "given = dict(a.lstrip('-').split('=') for a in sys.argv[1:])\n"
                      "rows = (pathlib.Path(given['train_data_dir']) / 'metadata.jsonl').read_text().splitlines()\n"
                      "files = [pathlib.Path(given['train_data_dir']) / json.loads(row)['file_name'] for row in rows]\n"
                      "index = pathlib.Path(given['pretrained_model_name_or_path']) / 'model_index.json'\n"
                      "sys.exit(0 if index.exists() and all(f.exists() for f in files) else 'something is missing')\n")
    monkeypatch.setattr(bench_lora, "SCRIPT", str(script))
    bench_lora.run_script(tmp_path, few=1, many=2)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(RuntimeError, match="something is missing"):
        bench_lora.run_script(tmp_path, few=1, many=2)


def test_the_distilled_model_is_timed_and_judged():
    beside_many, beside_four = bench_generation.list_comparisons(distil_steps=3, films=40, judged=32)
    assert beside_many.ours() > beside_many.plain() > 0 and beside_four.plain() > 0
    kid = beside_four.extra(1.0)
    assert kid["kid_ours"] < kid["kid_plain"] + 0.3  # a collapsed student stands at 1 and more


def test_kept_features_end_at_the_accuracy_of_the_plain_way(monkeypatch):
    monkeypatch.setattr(bench_features, "EPOCHS", 2)
    row = run.measure(*bench_features.list_comparisons(n=32, n_val=16), rounds=1)
    assert row["accuracy_ours"] == pytest.approx(row["accuracy_plain"], abs=1 / 16) and row["median_ours"] > 0


def test_both_ways_of_an_epoch_run():
    comparison, = bench_training.list_comparisons(("resnet18",), n=32, n_val=8)
    assert comparison.ours() > 0 and comparison.plain() > 0


def test_both_ways_of_learning_masks_run(monkeypatch):
    monkeypatch.setattr(bench_segmentation, "STEPS", 2)
    comparison, = bench_segmentation.list_comparisons()
    assert comparison.ours() > 0 and comparison.plain() > 0 and bench_segmentation.report_peak(bench_segmentation.fit_ours) > 100


@pytest.fixture
def little_world(monkeypatch):
    """Small studies of a small pool; returns the pool and its features."""
    for name, value in {"TRAIN": 20, "VAL": 10, "RATIO": 1.0, "N_BOOT": 50, "SEEDS": 2, "PLAN": training.TrainingPlan(steps=6, evaluations=1)}.items():
        monkeypatch.setattr(bench_statistics, name, value)
    return bench_statistics.draw_pool(150)


def test_a_null_study_has_labels_that_the_images_do_not_show(little_world):
    pool, features = little_world
    truth = pool.drop_duplicates("patient_id").set_index("patient_id")["label"]
    for null in (False, True):
        predictions = bench_statistics.simulate_study(pool, features, np.random.default_rng(0), 40, null)
        assert set(predictions) == set(bench_statistics.ARMS)
        tested = predictions["real"].drop_duplicates("patient_id")
        agree = (tested["y_true"].to_numpy() == truth[tested["patient_id"]].to_numpy()).mean()
        assert len(tested) == 40 and (agree < 0.6 if null else agree == 1)
        again = bench_statistics.simulate_study(pool, features, np.random.default_rng(0), 40, null)
        pd.testing.assert_frame_equal(predictions["oracle"], again["oracle"])
    with pytest.raises(ValueError, match="draw a larger pool"):
        bench_statistics.simulate_study(pool, features, np.random.default_rng(0), 90)


def test_alarms_and_power_are_shares_with_exact_intervals(little_world, monkeypatch):
    alarms = bench_statistics.count_alarms(*little_world, 2, 30)
    assert 0 <= alarms["alarms_family_low"] <= alarms["alarms_family"] <= alarms["alarms_family_high"] <= 1
    power = bench_statistics.measure_power(*little_world, 1, (10, 30))
    assert {"power_10", "power_30", "gain"} <= set(power)
    monkeypatch.setattr(bench_statistics, "decide", lambda predictions: ["helps", "hurts"])
    with pytest.raises(AssertionError, match="2 false alarms"):
        bench_statistics.count_alarms(*little_world, 2, 30)
