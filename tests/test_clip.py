"""CLIP's real classes at toy size: preprocessing, prompts, losses, adapters, training, resuming, accounting."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from medaug import clip as clips
from medaug import foundations, guards

CLASSES = ["normal", "bacterial", "viral"]
PROMPTS = {
    "plain": {"normal": "a normal chest", "bacterial": "bacterial pneumonia", "viral": "viral pneumonia"},
    "long": {"normal": "a film of clear lungs", "bacterial": "one lobe is white", "viral": "both lungs are hazy"},
}
CAPTIONS = list(PROMPTS["plain"].values())


@pytest.fixture(scope="module")
def processor():
    texts = [text for prompts in PROMPTS.values() for text in prompts.values()]
    tokenizer = foundations.build_tokenizer(texts, vocab_size=200)
    return CLIPProcessor(foundations.build_image_processor(16), tokenizer)


@pytest.fixture()
def clip(processor):
    """Three vision layers of width 32 on 16-pixel images; the same weights for every test."""
    torch.manual_seed(0)
    config = foundations.build_clip(processor.tokenizer, image_size=16, patch_size=8).config
    for tower, layers in ((config.vision_config, 3), (config.text_config, 2)):
        tower.hidden_size, tower.intermediate_size, tower.num_attention_heads = 32, 64, 2
        tower.num_hidden_layers = layers
    config._attn_implementation = "eager"
    return CLIPModel(config).eval()


@pytest.fixture(scope="module")
def films():
    """Sixty 16-pixel images of three classes that differ in where they are bright; 0-255."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images_u8 = rng.integers(0, 120, (60, 16, 16))
    for label in range(3):
        images_u8[labels == label, 5 * label:5 * label + 5] += 90
    return images_u8.astype(np.uint8), labels


def fit(clip, processor, films, tmp_path=None, **changes):
    images_u8, labels = films
    plan = clips.ClipPlan(**{"steps": 6, "batch_size": 8, "evaluate_every": 3, "learning_rate": 3e-3, **changes})
    return clips.fit_clip(clip, processor, images_u8[:45], labels[:45], CAPTIONS, plan, (images_u8[45:], labels[45:]),
                          tmp_path)


# -- loading and preprocessing -----------------------------------------------------------------------------------------


def test_a_half_precision_folder_loads_as_float32_and_embeds_alike(clip, processor, films, tmp_path):
    clip.half().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = clips.load_clip(str(tmp_path))
    assert loaded.dtype == torch.float32 and not loaded.training
    assert torch.allclose(clips.embed_images(loaded, loaded_processor, films[0][:4]),
                          clips.embed_images(clip.float(), processor, films[0][:4]), atol=1e-5)


def test_a_missing_folder_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no CLIP at 'foundations/absent'"):
        clips.load_clip("foundations/absent")


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 25), (2, 21, 50, 3)])
def test_preprocessing_is_the_processors_own(processor, shape):
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((shape[0], 1 if len(shape) == 3 else 3, 6, 6))).float()
    smooth = F.interpolate(coarse, shape[1:3], mode="bicubic").clamp(0, 1)
    images_u8 = (smooth * 255).byte().permute(0, 2, 3, 1).squeeze(-1).numpy()
    rgb = images_u8 if images_u8.ndim == 4 else np.repeat(images_u8[..., None], 3, axis=-1)
    theirs = processor.image_processor(list(rgb), return_tensors="pt", input_data_format="channels_last").pixel_values
    ours = clips.preprocess_images(images_u8, processor)
    grey_level = 1 / 255 / 0.25  # the two resizers may round a pixel differently
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 2.01 * grey_level
    if shape[1:3] == (16, 16):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_processor_decides_mean_and_std(films):
    clip_std = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = type("Processor", (), {"image_processor": clip_std})
    pixel_values = clips.preprocess_images(films[0][:1], processor)
    expected = (films[0][0, 0, 0] / 255 - clip_std.image_mean[2]) / clip_std.image_std[2]
    assert pixel_values[0, 2, 0, 0] == pytest.approx(expected, abs=1e-5)


def test_embeddings_are_the_librarys_own(clip, processor, films):
    pixel_values = clips.preprocess_images(films[0][:4], processor)
    tokens = processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip(pixel_values=pixel_values, **tokens)
        assert torch.allclose(clips.embed_images(clip, processor, films[0][:4]), out.image_embeds, atol=1e-6)
        assert torch.allclose(clips.embed_texts(clip, processor, CAPTIONS), out.text_embeds, atol=1e-6)
    probs = clips.predict_probs(clip, processor, films[0][:4], CAPTIONS)
    assert np.allclose(probs, out.logits_per_image.softmax(-1).numpy(), atol=1e-5) and probs.dtype == np.float32


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_zero_shot_covers_every_set_and_their_ensemble(clip, processor, films):
    probs = clips.zero_shot_probs(clip, processor, films[0], PROMPTS, CLASSES)
    assert list(probs) == ["plain", "long", "ensemble"]
    assert all(p.shape == (60, 3) and np.allclose(p.sum(1), 1, atol=1e-5) for p in probs.values())
    embeds = clips.encode_prompts(clip, processor, PROMPTS, CLASSES)
    assert torch.allclose(embeds["ensemble"], F.normalize(embeds["plain"] + embeds["long"], dim=-1), atol=1e-6)


def test_zero_shot_follows_the_class_order_and_not_the_dicts(clip, processor, films):
    probs = clips.zero_shot_probs(clip, processor, films[0], PROMPTS, CLASSES)["plain"]
    turned = clips.zero_shot_probs(clip, processor, films[0], PROMPTS, CLASSES[::-1])["plain"]
    assert np.allclose(probs, turned[:, ::-1], atol=1e-6)


@pytest.mark.parametrize("prompts, message", [
    ({"normal": "a", "bacterial": "b"}, "prompt set 'bad' lacks viral"),
    ({"normal": "a", "bacterial": "b", "virus": "c"}, "lacks viral and names the unknown virus"),
])
def test_a_prompt_set_that_does_not_fit_the_classes_is_named(prompts, message):
    with pytest.raises(ValueError, match=message):
        clips.check_prompt_sets({**PROMPTS, "bad": prompts}, CLASSES)


def test_labels_become_class_indices_and_a_strange_one_is_named():
    assert clips.index_labels(["viral", "normal", "viral"], CLASSES).tolist() == [2, 0, 2]
    with pytest.raises(ValueError, match=r"label\(s\) covid are not among the classes normal, bacterial, viral"):
        clips.index_labels(["normal", "covid"], CLASSES)


def test_tokens_are_counted_before_they_are_cut(processor):
    short, long = clips.count_tokens(processor, ["a", "viral pneumonia " * 40])
    assert short < processor.tokenizer.model_max_length < long


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_all_targets_match(clip, processor, films):
    before = clips.predict_probs(clip, processor, films[0], CAPTIONS)
    found = clips.add_lora(clip, rank=4, lora_alpha=8)
    assert np.array_equal(before, clips.predict_probs(clip, processor, films[0], CAPTIONS))
    # (3 vision + 2 text layers) x (q, k, v: 4*(32+32) each; fc1, fc2: 4*(32+64) each)
    assert found["modules"] == 25 and found["params_trainable"] == 5 * 4 * (3 * 64 + 2 * 96)
    assert guards.check_lora_coverage(clip, clips.LORA_TARGETS, 25) == {"modules": 25, "params": found["params_trainable"]}


def test_layers_and_patterns_restrict_the_adapter(clip):
    assert clips.add_lora(clip, 2, 4, layers=[2])["modules"] == 5  # the text tower has layers 0 and 1 only
    assert clips.count_frozen_layers(clip) == 2


def test_one_tower_alone_can_be_adapted(clip):
    assert clips.add_lora(clip, 2, 4, r".*text_model.*\.fc1")["modules"] == 2
    assert clips.count_frozen_layers(clip) == 3


def test_the_seed_decides_the_adapter_and_leaves_the_callers_stream_alone(clip, processor, films):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    clips.add_lora(clip, 2, 4, seed=1)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("targets, rank, trainable, total", [
    (["mlp.fc1", "mlp.fc2"], 16, 5_406_720, 433_023_233),  # what reports 0 and 1 ran
    (clips.LORA_TARGETS, 16, 8_650_752, 436_267_265),  # what they meant to run
])
def test_accounting_of_vit_l_14(targets, rank, trainable, total):
    reference = clips.build_reference()
    assert clips.count_parameters(reference)["params_total"] == 427_616_513
    found = clips.add_lora(reference, rank, 16, targets)
    assert (found["params_trainable"], found["params_total"]) == (trainable, total)
    guards.check_lora_coverage(reference, targets, expected_params=trainable)


def test_the_published_targets_are_caught_by_name():
    reference = clips.build_reference()
    published = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc1", "mlp.fc2"]
    assert clips.add_lora(reference, 16, 16, published)["params_trainable"] == 5_406_720  # peft says nothing
    with pytest.raises(guards.GuardError, match="attn.q_proj, attn.k_proj, attn.v_proj matched no module"):
        guards.check_lora_coverage(reference, published)


def test_targets_that_match_nothing_at_all_are_refused(clip):
    with pytest.raises(ValueError, match=r"LoRA target\(s\) nothing_such match no layer of this CLIP: its layers are called self_attn.q_proj"):
        clips.add_lora(clip, 2, 4, ["nothing_such"])


def test_what_was_trained_is_put_back_into_a_model_built_alike(clip, processor, films):
    blank = CLIPModel(clip.config).eval()
    blank.load_state_dict(clip.state_dict())
    other = CLIPModel(clip.config)
    clips.add_lora(clip, 2, 4)
    fit(clip, processor, films)
    weights = clips.copy_trained(clip)
    clips.add_lora(blank, 2, 4, seed=9)
    again = clips.load_trained(blank, weights).eval()
    assert np.array_equal(*[clips.predict_probs(m, processor, films[0], CAPTIONS) for m in (clip, again)])
    clips.add_lora(other, 2, 4, ["mlp.fc1"])
    with pytest.raises(KeyError, match="build it with the same adapter"):
        clips.load_trained(other, weights)


# -- the frozen layers, computed once ----------------------------------------------------------------------------------


def test_cached_layers_change_no_prediction_and_no_training_step(clip, processor, films):
    clips.add_lora(clip, 2, 4, layers=[1, 2])
    start = {name: p.clone() for name, p in clip.state_dict().items()}
    history, _ = fit(clip, processor, films)
    plain = clips.predict_probs(clip, processor, films[0], CAPTIONS)
    clip.load_state_dict(start)
    states = clips.cache_states(clip, processor, films[0])
    assert states.depth == 1 and len(states[:7]) == 7
    again, _ = fit(clip, processor, (states, films[1]))
    assert np.allclose(history["loss"], again["loss"], atol=1e-5)
    assert np.allclose(plain, clips.predict_probs(clip, processor, states, CAPTIONS), atol=1e-4)


def test_states_of_layers_that_train_are_refused(clip, processor, films):
    clips.add_lora(clip, 2, 4, layers=[0])
    with pytest.raises(ValueError, match="no frozen layer"):
        clips.cache_states(clip, processor, films[0])
    stale = clips.cache_states(clip, processor, films[0], depth=2)
    with pytest.raises(ValueError, match="cached after layer 2, but layer 1 trains"):
        fit(clip, processor, (stale, films[1]))


# -- losses ------------------------------------------------------------------------------------------------------------


def unit(rows, dim=8, seed=0):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_losses_at_chance_are_the_log_of_what_they_choose_from():
    same, labels = unit(1).expand(12, -1), torch.arange(12) % 3
    losses = {name: loss(same, same[:3], torch.tensor(50.0), labels).item() for name, loss in clips.LOSSES.items()}
    assert losses["class-prompt"] == pytest.approx(math.log(3))
    assert [losses["contrastive"], losses["in-batch-index"]] == pytest.approx([math.log(12)] * 2)


def test_perfect_embeddings_bring_each_loss_to_its_floor():
    texts, labels = torch.eye(3), torch.arange(12) % 3
    losses = {name: loss(texts[labels], texts, torch.tensor(100.0), labels).item() for name, loss in clips.LOSSES.items()}
    assert losses["class-prompt"] == pytest.approx(0, abs=1e-5)
    assert losses["contrastive"] == pytest.approx(math.log(12 / 3))
    assert losses["in-batch-index"] == pytest.approx(math.log(4)), "labels 0, 1, 2 stand first in this batch, by luck"


def test_contrastive_with_one_image_per_caption_is_clips_own(clip, processor):
    images, texts, labels = unit(5), unit(5, seed=1), torch.arange(5)
    logits = 20 * images @ texts.T
    own = 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels))
    assert torch.isclose(clips.compute_contrastive_loss(images, texts, torch.tensor(20.0), labels), own)


def test_the_published_loss_is_least_when_the_logits_say_nothing():
    """Over shuffled batches its mean never falls below ln B, not even for embeddings that know every class."""
    texts, rng = torch.eye(3), np.random.default_rng(0)
    means = []
    for scale in (0.0, 2.0, 10.0):
        batches = [torch.from_numpy(rng.integers(0, 3, 4)) for _ in range(4000)]
        means.append(np.mean([clips.compute_in_batch_index_loss(texts[b], texts, torch.tensor(scale), b).item()
                              for b in batches]))
    assert means[0] == pytest.approx(math.log(4), abs=1e-6) and means[0] < means[1] < means[2]


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["class-prompt", "contrastive"])
def test_lora_learns_what_the_films_show(clip, processor, films, loss):
    clips.add_lora(clip, 8, 16)
    before = {name: p.detach().clone() for name, p in clip.named_parameters() if p.requires_grad}
    history, timing = fit(clip, processor, films, loss=loss, steps=60, evaluate_every=30, batch_size=15, learning_rate=1e-2)
    after = {name: p.detach() for name, p in clip.named_parameters() if p.requires_grad}
    assert guards.check_weights_change(before, after) > 0.9
    probs = clips.predict_probs(clip, processor, films[0][45:], CAPTIONS)
    scored = f1_score(films[1][45:], probs.argmax(1), average="macro")
    assert scored > 0.8 and scored == pytest.approx(history["val_macro_f1"].iloc[-1])
    assert history["step"].tolist() == [30, 60] and timing["images_per_second"] > 0


def test_full_fine_tuning_moves_both_towers(clip, processor, films):
    clip.requires_grad_(True)
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    fit(clip, processor, films, learning_rate=1e-3)
    moved = {name for name, p in clip.named_parameters() if not torch.equal(p, before[name])}
    assert any("vision_model.embeddings" in n for n in moved) and any("text_model" in n for n in moved)


def test_two_runs_are_byte_identical_and_seeds_differ(clip, processor, films):
    clips.add_lora(clip, 2, 4, dropout=0.1)
    start = {name: p.clone() for name, p in clip.state_dict().items()}
    runs = []
    for seed in (0, 0, 1):
        clip.load_state_dict(start)
        torch.manual_seed(len(runs))  # what the caller drew before must not matter
        history, _ = fit(clip, processor, films, seed=seed)
        runs.append((history.to_csv(), clips.predict_probs(clip, processor, films[0], CAPTIONS).tobytes()))
    assert runs[0] == runs[1] != runs[2]


def test_a_killed_run_resumes_to_the_same_weights(clip, processor, films, tmp_path, monkeypatch):
    clips.add_lora(clip, 2, 4, dropout=0.1)
    start = {name: p.clone() for name, p in clip.state_dict().items()}
    whole, _ = fit(clip, processor, films)
    undisturbed = clips.predict_probs(clip, processor, films[0], CAPTIONS)

    clip.load_state_dict(start)
    real_step = clips._take_step
    monkeypatch.setattr(clips, "_take_step", lambda *a: stop() if a[7] == 4 else real_step(*a))

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(clip, processor, films, tmp_path / "run.safetensors")
    monkeypatch.undo()
    clip.load_state_dict(start)  # a new process starts from the same adapter
    resumed, _ = fit(clip, processor, films, tmp_path / "run.safetensors")
    assert resumed.to_csv() == whole.to_csv()
    assert np.array_equal(undisturbed, clips.predict_probs(clip, processor, films[0], CAPTIONS))

    clip.load_state_dict(start)
    monkeypatch.setattr(clips, "_take_step", lambda *a: stop())  # finished: loaded, not trained again
    again, _ = fit(clip, processor, films, tmp_path / "run.safetensors")
    assert again.to_csv() == whole.to_csv()


def test_float16_takes_all_its_steps_and_resumes(clip, processor, films, tmp_path, monkeypatch):
    """The first scale of a GradScaler overflows now and then: such a step is taken again, never left out."""
    clips.add_lora(clip, 2, 4)
    start = {name: p.clone() for name, p in clip.state_dict().items()}
    history, _ = fit(clip, processor, films)
    clip.load_state_dict(start)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=2.0**40, enabled=enabled))
    half, _ = fit(clip, processor, films, tmp_path / "run.safetensors", mixed_precision="fp16")
    assert np.allclose(history["loss"], half["loss"], rtol=0.02) and history.to_csv() != half.to_csv()
    clip.load_state_dict(start)
    again, _ = fit(clip, processor, films, tmp_path / "run.safetensors", mixed_precision="fp16")
    assert again.to_csv() == half.to_csv()


def test_another_plan_does_not_take_the_old_checkpoint(clip, processor, films, tmp_path):
    clips.add_lora(clip, 2, 4)
    start = {name: p.clone() for name, p in clip.state_dict().items()}
    fit(clip, processor, films, tmp_path / "run.safetensors")
    clip.load_state_dict(start)
    longer, _ = fit(clip, processor, films, tmp_path / "run.safetensors", learning_rate=1e-3)
    clip.load_state_dict(start)
    fresh, _ = fit(clip, processor, films, learning_rate=1e-3)
    assert longer.to_csv() == fresh.to_csv()


def test_bfloat16_stays_close_to_float32(clip, processor, films):
    clips.add_lora(clip, 2, 4)
    start = {name: p.clone() for name, p in clip.state_dict().items()}
    history, _ = fit(clip, processor, films)
    clip.load_state_dict(start)
    half, _ = fit(clip, processor, films, mixed_precision="bf16")
    assert np.allclose(history["loss"], half["loss"], rtol=0.02) and history.to_csv() != half.to_csv()


def test_the_adapter_saves_in_pefts_format_and_comes_back(clip, processor, films, tmp_path):
    base = {name: p.clone() for name, p in clip.state_dict().items()}
    clips.add_lora(clip, 2, 4)
    fit(clip, processor, films)
    tuned = clips.predict_probs(clip, processor, films[0], CAPTIONS)
    clip.save_pretrained(tmp_path)
    fresh = CLIPModel(clip.config).eval()
    fresh.load_state_dict(base)
    fresh.load_adapter(str(tmp_path))
    guards.check_round_trip(tuned, clips.predict_probs(fresh, processor, films[0], CAPTIONS), tolerance=1e-6)
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("change, labels, message", [
    ({"loss": "triplet"}, None, "no loss 'triplet'"),
    ({"mixed_precision": "fp8"}, None, "mixed_precision 'fp8'"),
    ({}, np.full(60, 3), "a label is 3, but there are 3 captions"),
    ({}, np.arange(10), "45 images and 10 labels"),
])
def test_settings_that_cannot_be_are_one_clear_line(clip, processor, films, change, labels, message):
    clips.add_lora(clip, 2, 4)
    with pytest.raises(ValueError, match=message):
        fit(clip, processor, (films[0], films[1] if labels is None else labels), **change)


def test_a_frozen_model_and_a_loss_that_is_not_finite_stop_the_run(clip, processor, films):
    with pytest.raises(ValueError, match="nothing in this CLIP trains"):
        fit(clip.requires_grad_(False), processor, films)
    clip.requires_grad_(True)
    clip.logit_scale.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan at step 1: lower learning_rate"):
        fit(clip, processor, films)


def test_batches_cover_each_epoch_once_and_depend_on_seed_and_step_alone():
    rows = np.concatenate([clips.draw_rows(20, 5, step, seed=3) for step in range(4)])
    assert sorted(rows) == list(range(20))
    assert not np.array_equal(rows[:5], clips.draw_rows(20, 5, 4, seed=3))
    assert len(clips.draw_rows(3, 8, 7, seed=0)) == 3
    assert clips._schedule(clips.ClipPlan(), 0) < 1 == clips._schedule(clips.ClipPlan(), 5)
    assert clips._schedule(replace(clips.ClipPlan(), steps=30), 29) < 0.01


# -- the probe ---------------------------------------------------------------------------------------------------------


def test_probe_chooses_its_strength_on_validation(clip, processor, films):
    features = clips.embed_dataset(clip, processor, films[0], project=False)
    assert features.shape == (60, 32) and not np.allclose(np.linalg.norm(features, axis=1), 1)
    probe, tried = clips.fit_probe(features[:45], films[1][:45], features[45:], films[1][45:])
    best = tried.loc[tried["val_macro_f1"].idxmax()]
    assert probe[-1].C == best["C"] and best["val_macro_f1"] > 0.8
    assert probe.predict_proba(features[45:]).shape == (15, 3)


def test_neighbours_vote_and_their_number_is_chosen_on_validation(clip, processor, films):
    features = clips.embed_dataset(clip, processor, films[0], project=False)
    vote, tried = clips.fit_knn(features[:45], films[1][:45], features[45:], films[1][45:], (1, 5, 900))
    assert tried["neighbours"].tolist() == [1, 5], "more neighbours than images are left out"
    assert vote[-1].n_neighbors == tried.loc[tried["val_macro_f1"].idxmax(), "neighbours"]
    assert np.allclose(vote.predict_proba(features[45:] * 3), vote.predict_proba(features[45:])), "by cosine: length does not matter"
    with pytest.raises(ValueError, match=r"neighbours \[900\] are all more than the 45 training images"):
        clips.fit_knn(features[:45], films[1][:45], features[45:], films[1][45:], (900,))


# -- where it looks ----------------------------------------------------------------------------------------------------


def test_attention_maps_find_the_patch_that_decides(processor):
    """Classes that differ in one bright patch: after training, more relevance lies there than before."""
    torch.manual_seed(0)
    config = foundations.build_clip(processor.tokenizer, image_size=16, patch_size=4).config
    for tower in (config.vision_config, config.text_config):
        tower.hidden_size, tower.intermediate_size, tower.num_attention_heads, tower.num_hidden_layers = 32, 64, 2, 2
    config._attn_implementation = "sdpa"
    clip = CLIPModel(config)
    rng = np.random.default_rng(0)
    labels, images_u8 = np.arange(48) % 3, rng.integers(0, 60, (48, 16, 16)).astype(np.uint8)
    inside = np.zeros((48, 16, 16), bool)
    for label, (top, left) in enumerate([(0, 0), (4, 8), (12, 4)]):
        inside[labels == label, top:top + 4, left:left + 4] = True
    images_u8[inside] += 150
    untrained = clips.explain_attention(clip, processor, images_u8, CAPTIONS, labels)
    clip.requires_grad_(True)
    plan = clips.ClipPlan(steps=80, batch_size=24, learning_rate=3e-3, evaluate_every=80)
    history, _ = clips.fit_clip(clip, processor, images_u8, labels, CAPTIONS, plan, (images_u8, labels))
    assert history["val_macro_f1"].iloc[-1] > 0.9
    maps = clips.explain_attention(clip, processor, images_u8, CAPTIONS, labels)
    assert maps.shape == (48, 16, 16) and maps.min() >= 0 and np.allclose(maps.sum((1, 2)), 1, atol=1e-4)
    assert maps[inside].sum() > 1.5 * untrained[inside].sum()
    assert clip.config._attn_implementation == "sdpa"
