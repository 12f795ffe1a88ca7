"""Sampling to files: any image can be made again alone, a killed run ends with the same bytes, provenance is inside."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_diffusion import build_tiny_pipeline

from medaug import diffusion, generation

PROMPTS = {"normal": "chest x-ray of a child, normal lungs", "viral": "chest x-ray of a child, viral pneumonia"}
FAST = {"image_size": 16, "num_inference_steps": 2, "batch_size": 3}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return diffusion.load_pipeline(build_tiny_pipeline(tmp_path_factory.mktemp("sd")))


def plan(generator_seed=0, normal=5, viral=2):
    return generation.plan_images("lora", PROMPTS, {"normal": normal, "viral": viral}, generator_seed)


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_plan_has_one_seed_per_image_that_depends_on_nothing_else():
    first, second = plan(0), plan(1)
    assert list(first["label"]) == ["normal"] * 5 + ["viral"] * 2
    assert pd.concat([first, second])["seed"].is_unique
    assert first["seed"].max() < 2**48
    longer = plan(0, normal=9)
    assert longer.merge(first, on="image_id")["seed_x"].eq(first["seed"]).all()


def test_folds_have_names_files_and_seeds_of_their_own():
    plans = [plan(0), *(generation.plan_images("lora", PROMPTS, {"normal": 5, "viral": 2}, 0, fold) for fold in (0, 1))]
    every = pd.concat(plans)
    assert every["image_id"].is_unique and every["path"].is_unique and every["seed"].is_unique
    assert [set(part["fold"]) for part in plans] == [{-1}, {0}, {1}]
    assert plans[2]["path"].iloc[0] == "synthetic/lora/fold-1/normal/0-00000.png"


def test_a_later_plan_goes_on_where_the_first_ended(pipe, tmp_path):
    first, _ = generation.generate(pipe, plan(), tmp_path, **FAST)
    more = generation.plan_images("lora", PROMPTS, {"viral": 3}, 0, first={"normal": 5, "viral": 2})
    assert list(more["image_id"]) == [f"lora-viral-0-0000{index}" for index in (2, 3, 4)]
    made, timing = generation.generate(pipe, more, tmp_path, **FAST)
    assert timing["images"] == 3 and made["sha256"].is_unique
    kept, again = generation.generate(pipe, plan(), tmp_path, **FAST)  # the first plan's images were not touched
    pd.testing.assert_frame_equal(first, kept)


def test_manifest_and_files(pipe, tmp_path):
    manifest, timing = generation.generate(pipe, plan(), tmp_path, guidance_scale=1.5, **FAST)
    assert timing["images"] == 7
    assert set(manifest["origin"]) == {"synthetic"} and set(manifest["scheduler"]) == {"dpm-solver++"}
    row = manifest.iloc[5]
    assert (row["label"], row["index"], row["generator_seed"], row["guidance_scale"]) == ("viral", 0, 0, 1.5)
    with Image.open(tmp_path / row["path"]) as image:
        assert image.mode == "L" and image.size == (16, 16)
        assert image.text["origin"] == "synthetic" and image.text["seed"] == str(row["seed"])
        assert image.text["model_hash"] == row["model_hash"]
    assert manifest["sha256"].is_unique


def test_an_image_can_be_made_again_alone(pipe, tmp_path):
    manifest, _ = generation.generate(pipe, plan(), tmp_path, **FAST)
    row = manifest.iloc[4]
    alone = generation.sample_images(pipe, [row["prompt"]], [row["seed"]], 16, 2)[0].astype(int)
    kept = np.array(Image.open(tmp_path / row["path"])).astype(int)
    assert np.abs(alone - kept).max() <= 1  # the sums of another batch size round differently


@pytest.mark.parametrize("scheduler", list(generation.SCHEDULERS))
def test_samplers_are_deterministic(pipe, scheduler):
    generation.set_scheduler(pipe, scheduler)
    torch.manual_seed(1)
    first = generation.sample_images(pipe, list(PROMPTS.values()), [1, 2], 16, 4, mode="RGB")
    torch.manual_seed(2)
    assert np.array_equal(first, generation.sample_images(pipe, list(PROMPTS.values()), [1, 2], 16, 4, mode="RGB"))
    assert first.shape == (2, 16, 16, 3) and first.dtype == np.uint8


def test_a_folded_adapter_draws_what_the_adapter_draws(tmp_path):
    model_id = build_tiny_pipeline(tmp_path / "sd")
    tuned = diffusion.load_pipeline(model_id)
    diffusion.add_lora(tuned.unet, 4, 8)
    for name, weight in tuned.unet.named_parameters():
        if "lora_B" in name:  # stands for training
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    diffusion.save_lora(tuned.unet, tmp_path / "lora")
    folded = generation.load_generator(model_id, [tmp_path / "lora"])
    assert not any("lora" in name for name, _ in folded.unet.named_parameters())
    drawn = [generation.sample_images(pipe, list(PROMPTS.values()), [1, 2], 16, 4).astype(int)
             for pipe in (tuned, folded, generation.load_generator(model_id))]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1 < np.abs(drawn[1] - drawn[2]).max()


def test_manifest_is_sorted_and_old_images_go(pipe, tmp_path):
    generation.generate(pipe, plan(normal=9), tmp_path, **FAST)
    manifest, _ = generation.generate(pipe, plan(), tmp_path, **FAST)
    kept = pd.read_parquet(generation.save_manifest(manifest.sample(frac=1, random_state=0), tmp_path))
    pd.testing.assert_frame_equal(kept, manifest)
    assert len(read_files(tmp_path)) == len(manifest)


def test_unknown_scheduler(pipe):
    with pytest.raises(ValueError, match="'euler' is not known: use one of ddim"):
        generation.set_scheduler(pipe, "euler")


def test_a_killed_run_ends_with_the_same_bytes(pipe, tmp_path, monkeypatch):
    whole, _ = generation.generate(pipe, plan(), tmp_path / "whole", **FAST)
    sample, calls = generation.sample_images, []

    def die_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(generation, "sample_images", die_at_second)
    with pytest.raises(KeyboardInterrupt):
        generation.generate(pipe, plan(), tmp_path / "killed", **FAST)
    assert len(read_files(tmp_path / "killed")) == 3
    resumed, timing = generation.generate(pipe, plan(), tmp_path / "killed", **FAST)
    assert timing["images"] == 4  # the first batch was kept
    assert read_files(tmp_path / "killed") == read_files(tmp_path / "whole")
    pd.testing.assert_frame_equal(whole, resumed)


def test_finished_work_is_kept_and_other_settings_are_made_anew(pipe, tmp_path, monkeypatch):
    first, timing = generation.generate(pipe, plan(), tmp_path, **FAST)
    sample = generation.sample_images
    monkeypatch.setattr(generation, "sample_images", None)  # nothing may be sampled again
    kept, again = generation.generate(pipe, plan(), tmp_path, **FAST)
    pd.testing.assert_frame_equal(first, kept)
    assert again == timing
    monkeypatch.setattr(generation, "sample_images", sample)
    other, _ = generation.generate(pipe, plan(), tmp_path, guidance_scale=3.0, **FAST)
    assert not set(other["sha256"]) & set(first["sha256"])


def test_out_of_memory_halves_the_batch_and_marks_it(pipe, tmp_path, monkeypatch, capsys):
    whole, _ = generation.generate(pipe, plan(), tmp_path / "whole", **FAST)
    sample = generation.sample_images

    def hungry(pipe, prompts, *args, **kwargs):
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(pipe, prompts, *args, **kwargs)

    monkeypatch.setattr(generation, "sample_images", hungry)
    manifest, _ = generation.generate(pipe, plan(), tmp_path / "small", **FAST)
    assert "out of memory at 3 images" in capsys.readouterr().out
    assert set(manifest["batch_size"]) == {1} and set(whole["batch_size"]) == {3, 1}
    for path in manifest["path"]:
        pixels = [np.array(Image.open(tmp_path / name / path)).astype(int) for name in ("whole", "small")]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
