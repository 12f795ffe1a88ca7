"""LoRA on the real Stable Diffusion classes at toy size: counts, caches, training, resume, save and load."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from medaug import diffusion
from medaug.diffusion import FitSettings
from medaug.foundations import build_tokenizer

PROMPTS = ["chest x-ray of a child, normal lungs", "chest x-ray of a child, viral pneumonia", ""]
WIDE = (*diffusion.ATTENTION, "proj_in", "proj_out")
SETTINGS = FitSettings(steps=6, batch_size=8, learning_rate=1e-2, warmup_steps=1, validate_every=3, save_every=2)


def build_tiny_pipeline(folder, prediction_type="v_prediction"):
    """Save a random `StableDiffusionPipeline` for 16 px images (2x2x4 latents) to `folder` and return the folder."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(PROMPTS, vocab_size=150)
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=32, bos_token_id=tokenizer.bos_token_id,
                          eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    unet = UNet2DConditionModel(sample_size=2, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
                                block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("UpBlock2D", "UpBlock2D"), cross_attention_dim=16,
                                attention_head_dim=2)
    vae = AutoencoderKL(sample_size=16, latent_channels=4, layers_per_block=1, block_out_channels=(8,) * 4,
                        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
    StableDiffusionPipeline(vae=vae, unet=unet, text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
                            scheduler=scheduler, safety_checker=None, feature_extractor=None,
                            requires_safety_checker=False).save_pretrained(folder)
    return str(folder)


def draw_images(count, size=16, channels=(), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, *channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def model_id(tmp_path_factory):
    return build_tiny_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def base(model_id):
    return diffusion.load_pipeline(model_id)


@pytest.fixture
def pipe(base):
    """The random pipeline with a UNet of its own, which a test may change."""
    copied = copy.copy(base)
    copied.unet = copy.deepcopy(base.unet)
    return copied


def fit(pipe, settings=SETTINGS, checkpoint=None, validate=None, target_modules=WIDE, dropout=0.1):
    """Add an adapter to a copy of the UNet, fit it on 20 random images; return the UNet, its history and timing."""
    unet = copy.deepcopy(pipe.unet)
    diffusion.add_lora(unet, 4, 8, target_modules, dropout=dropout)
    states = diffusion.encode_prompts(pipe, PROMPTS)
    history, timing = diffusion.fit_lora(
        unet, DDPMScheduler.from_config(pipe.scheduler.config), diffusion.encode_latents(pipe.vae, draw_images(20)),
        torch.arange(20) % 2, states[:2], states[2], settings, checkpoint, validate)
    return unet, history, timing


def read_adapter(unet):
    return {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}


def equal(a, b):
    a, b = read_adapter(a), read_adapter(b)
    return len(a) > 0 and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_close(a, b):
    b = read_adapter(b)
    for name, weight in read_adapter(a).items():
        torch.testing.assert_close(weight, b[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("version, targets, modules, params", [
    ("sd2", diffusion.ATTENTION, 128, 829_952), ("sd2", WIDE, 160, 1_029_632), ("sd2", ("proj_in",), 16, 99_840),
    ("sd1.5", diffusion.ATTENTION, 128, 797_184), ("sd1.5", WIDE, 160, 996_864)])
def test_lora_counts_of_the_published_models(version, targets, modules, params):
    unet = diffusion.build_reference(version)["unet"]
    before = diffusion.count_parameters(unet)
    counted = diffusion.add_lora(unet, rank=4, lora_alpha=4, target_modules=targets)
    assert counted == {"modules": modules, "params_trainable": params, "params_total": before + params}


def test_reference_sizes():
    sizes = {name: diffusion.count_parameters(part) for name, part in diffusion.build_reference("sd2").items()}
    assert sizes == {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}
    old = diffusion.build_reference("sd1.5")
    assert diffusion.count_parameters(old["unet"]) == 859_520_964
    assert diffusion.count_parameters(old["text_encoder"]) == 123_060_480


def test_a_target_without_a_match_is_an_error(pipe):
    with pytest.raises(ValueError, match="attn, k_proj match no layer.*to_out.0"):
        diffusion.add_lora(pipe.unet, 4, 4, ("attn", "to_q", "k_proj"))
    assert all(p.requires_grad for p in pipe.unet.parameters())  # nothing was touched


def test_fresh_adapter_changes_nothing_and_is_seeded(pipe):
    x, t, states = torch.randn(2, 4, 2, 2), torch.tensor([10, 900]), torch.randn(2, 32, 16)
    again, other = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.unet)
    before = pipe.unet(x, t, states).sample
    diffusion.add_lora(pipe.unet, 4, 16, WIDE, seed=3)
    assert torch.equal(pipe.unet(x, t, states).sample, before)
    diffusion.add_lora(again, 4, 16, WIDE, seed=3)
    diffusion.add_lora(other, 4, 16, WIDE, seed=4)
    assert equal(pipe.unet, again) and not equal(pipe.unet, other)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_latents_are_those_of_the_vae_and_kept_by_content(pipe, tmp_path, channels, monkeypatch):
    images = draw_images(5, channels=channels)
    mean, std = diffusion.encode_latents(pipe.vae, images, tmp_path, batch_size=2)
    posterior = pipe.vae.encode(diffusion.to_pixel_values(images)).latent_dist
    scale = pipe.vae.config.scaling_factor
    torch.testing.assert_close(mean, posterior.mean * scale)
    torch.testing.assert_close(std, posterior.std * scale)
    monkeypatch.setattr(pipe.vae, "encode", None)  # a second call must not need the VAE
    kept = diffusion.encode_latents(pipe.vae, images, tmp_path)
    assert torch.equal(kept[0], mean) and torch.equal(kept[1], std)
    with pytest.raises(TypeError):  # other images are other content
        diffusion.encode_latents(pipe.vae, images[::-1], tmp_path)


def test_encoding_and_decoding_halve_their_batch(pipe, monkeypatch, capsys):
    images_u8, encode = draw_images(5), pipe.vae.encode
    whole = diffusion.encode_latents(pipe.vae, images_u8), diffusion.reconstruct(pipe.vae, images_u8)

    def hungry(pixel_values):
        if len(pixel_values) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixel_values)

    monkeypatch.setattr(pipe.vae, "encode", hungry)
    torch.testing.assert_close(diffusion.encode_latents(pipe.vae, images_u8, batch_size=4), whole[0])
    np.testing.assert_allclose(diffusion.reconstruct(pipe.vae, images_u8, batch_size=4), whole[1], atol=1)
    assert capsys.readouterr().out.count("out of memory at 4 images: going on with 2") == 2


def test_reconstruction_is_the_mean_decoded_and_grey_stays_grey(pipe):
    images_u8 = draw_images(3)
    rgb = np.repeat(images_u8[..., None], 3, -1)
    with torch.inference_mode():
        decoded = pipe.vae.decode(pipe.vae.encode(diffusion.to_pixel_values(rgb)).latent_dist.mean).sample
    expected = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).numpy()
    colour, grey = diffusion.reconstruct(pipe.vae, rgb, batch_size=2), diffusion.reconstruct(pipe.vae, images_u8)
    assert colour.shape == (3, 16, 16, 3) and grey.shape == (3, 16, 16) and grey.dtype == np.uint8
    np.testing.assert_allclose(colour, expected, atol=1)
    np.testing.assert_allclose(grey, ((decoded.mean(1) + 1) * 127.5).clamp(0, 255).numpy(), atol=1)


def test_prompt_states_are_those_of_the_text_encoder(pipe, tmp_path):
    states = diffusion.encode_prompts(pipe, PROMPTS, tmp_path)
    tokens = pipe.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    torch.testing.assert_close(states, pipe.text_encoder(tokens).last_hidden_state)
    assert torch.equal(diffusion.encode_prompts(pipe, PROMPTS, tmp_path), states)
    assert len(list(tmp_path.glob("prompts-*"))) == 1


def test_each_step_draws_latents_anew_and_each_epoch_sees_each_image():
    mean, std = torch.zeros(12, 4, 2, 2), torch.ones(12, 4, 2, 2)
    settings, scheduler = FitSettings(batch_size=5, caption_dropout=0.5), DDPMScheduler()
    batches = [diffusion.draw_batch((mean, std), torch.arange(12), scheduler, settings, step) for step in range(12)]
    seen = torch.cat([batch["prompt_ids"] for batch in batches])  # 60 draws = 5 epochs of 12
    assert [sorted(epoch.tolist()) for epoch in seen.split(12)] == [list(range(12))] * 5
    latents = torch.cat([batch["latents"] for batch in batches])
    assert len(latents.flatten(1).unique(dim=0)) == 60 and abs(latents.std().item() - 1) < 0.1
    assert 0.3 < torch.cat([batch["dropped"] for batch in batches]).float().mean() < 0.7
    assert torch.equal(diffusion.draw_batch((mean, std), torch.arange(12), scheduler, settings, 3)["noise"],
                       batches[3]["noise"])


def test_noise_offset_moves_the_mean_of_a_channel():
    latents, scheduler = (torch.zeros(64, 4, 8, 8), torch.zeros(64, 4, 8, 8)), DDPMScheduler()
    spread = [diffusion.draw_batch(latents, torch.zeros(64), scheduler, FitSettings(noise_offset=offset), 0)["noise"]
              .mean(dim=(2, 3)).std().item() for offset in (0.0, 1.0)]
    assert spread[0] == pytest.approx(1 / 8, rel=0.2) and spread[1] == pytest.approx(1.0, rel=0.2)


def test_snr_weights():
    for kind, extra in (("epsilon", 0), ("v_prediction", 1)):
        scheduler = DDPMScheduler(prediction_type=kind)
        snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
        weights = diffusion.compute_snr_weights(scheduler, 5.0)
        assert weights[999] == pytest.approx((snr[999] / (snr[999] + extra)).item())  # low SNR: as without the clamp
        assert weights[0] == pytest.approx((5 / (snr[0] + extra)).item())
    assert torch.equal(diffusion.compute_snr_weights(scheduler, None), torch.ones(1000))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_perfect_prediction_has_no_loss(kind):
    """The UNet's target and the sampler's inversion belong together: the target recovers the clean latents."""
    scheduler = DDPMScheduler(prediction_type=kind, clip_sample=False)
    latents, noise, t = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2), torch.tensor([400])
    target = diffusion.compute_target(scheduler, latents, noise, t)
    step = scheduler.step(target, 400, scheduler.add_noise(latents, noise, t))
    torch.testing.assert_close(step.pred_original_sample, latents, atol=1e-5, rtol=1e-4)
    scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match="not supported"):
        diffusion.compute_target(scheduler, latents, noise, t)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_on_fixed_noise_falls(pipe, kind):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=kind)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    mean, _ = diffusion.encode_latents(pipe.vae, draw_images(20))
    states = diffusion.encode_prompts(pipe, PROMPTS)

    def validate(unet, step=0):
        losses = diffusion.compute_band_losses(unet, scheduler, mean, torch.arange(20) % 2, states)
        assert losses.shape == (20, 4)
        return diffusion.summarise_bands(losses)

    before = validate(pipe.unet)
    unet, history, timing = fit(pipe, replace(SETTINGS, steps=20, validate_every=10), validate=validate, dropout=0.0)
    assert [row["step"] for row in history] == [10, 20]
    assert history[-1]["val_loss"] < before["val_loss"]
    assert history[-1]["val_loss"] == pytest.approx(validate(unet)["val_loss"])  # what is left is what was scored
    assert timing["images"] == 160 and timing["images_per_second"] > 0


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_killed_run_resumes_to_the_same_weights(pipe, tmp_path, ema_decay, capsys):
    settings = replace(SETTINGS, ema_decay=ema_decay)
    whole, history, _ = fit(pipe, settings, validate=lambda unet, step: {"val_loss": 0.0})

    def kill(unet, step):  # at step 3, after the checkpoint of step 2
        raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(pipe, settings, checkpoint, kill)
    resumed, again, _ = fit(pipe, settings, checkpoint, lambda unet, step: {"val_loss": 0.0})
    assert "resumed at step 2" in capsys.readouterr().out
    assert equal(whole, resumed) and again == history


def script_losses(overall, fine, coarse):
    """A `validate` that tells these losses, one set a validation, and notes the weights of each step at which it was asked."""
    asked = {}

    def validate(unet, step):
        asked[step] = read_adapter(unet)
        row = len(asked) - 1
        return {"val_loss": overall[row], "val_loss_0_250": fine[row], "val_loss_750_1000": coarse[row]}

    return validate, asked


def test_training_ends_when_no_band_reaches_a_new_low_and_keeps_the_best(pipe, tmp_path):
    settings = replace(SETTINGS, steps=20, validate_every=2, save_every=2, patience=2)
    # the overall loss is lowest at step 4; the fine band still falls at step 6
    validate, asked = script_losses([1.0, 0.8, 0.9, 0.9, 0.9, 0.9], [0.5, 0.5, 0.4, 0.5, 0.5, 0.5], [1.0, 0.7, 0.8, 0.8, 0.8, 0.8])
    kept, history, timing = fit(pipe, settings, tmp_path / "checkpoint.pt", validate)
    assert list(asked) == [2, 4, 6, 8, 10] and timing["images"] == 10 * settings.batch_size
    assert all(torch.equal(weight, asked[4][name]) for name, weight in read_adapter(kept).items())
    again, told, _ = fit(pipe, settings, tmp_path / "checkpoint.pt", validate)  # it has ended: nothing more is trained
    assert list(asked) == [2, 4, 6, 8, 10] and told == history and equal(again, kept)


def test_patience_needs_losses_and_zero_never_ends():
    rows = [{"val_loss": 1.0 + row, "val_loss_0_250": 1.0 + row, "loss": 3.0} for row in range(9)]
    assert diffusion.has_settled(rows, 8) and not diffusion.has_settled(rows, 9)
    assert not diffusion.has_settled(rows, 0) and not diffusion.has_settled([{"loss": 1.0}] * 9, 2) and not diffusion.has_settled([], 2)


def test_a_tracker_sees_every_step_and_decides_nothing(pipe, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    validate = lambda unet, step: {"val_loss": 1.0 / step}  # noqa: E731
    plain, history, _ = fit(pipe, validate=validate)
    tracked, again, _ = fit(pipe, replace(SETTINGS, tracker="tensorboard"), tmp_path / "checkpoint.pt", validate)
    assert equal(plain, tracked) and again == history
    files = sorted((tmp_path / "logs").rglob("events*"))
    read = [EventAccumulator(str(file)).Reload() for file in files]
    told = {tag: events.Scalars(tag) for events in read for tag in events.Tags()["scalars"]}
    assert [event.step for event in told["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [round(event.value, 3) for event in told["val_loss"]] == [0.333, 0.167]
    with pytest.raises(ValueError, match="tracker 'paper' is not known"):
        fit(pipe, replace(SETTINGS, tracker="paper"))
    monkeypatch.setattr(diffusion.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="tracker 'wandb' needs the package of that name"):
        fit(pipe, replace(SETTINGS, tracker="wandb"))


def test_half_precision_scales_its_loss_and_resumes(pipe, tmp_path):
    settings = replace(SETTINGS, mixed_precision="fp16")
    whole, _, _ = fit(pipe, settings)
    exact, _, _ = fit(pipe)
    apart = max((a - b).abs().max().item() for a, b in zip(whole.state_dict().values(), exact.state_dict().values(), strict=True))
    assert 0 < apart < 0.05  # six steps of at most 0.01

    def kill(unet, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(pipe, settings, tmp_path / "checkpoint.pt", kill)
    resumed, _, _ = fit(pipe, settings, tmp_path / "checkpoint.pt")
    assert equal(whole, resumed)
    with pytest.raises(ValueError, match="mixed_precision 'fp8' is not known"):
        fit(pipe, replace(SETTINGS, mixed_precision="fp8"))


def test_another_optimizer_is_named_or_asked_for(pipe):
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="needs the package bitsandbytes"):
            fit(pipe, replace(SETTINGS, optimizer="adamw-8bit"))
    else:
        tuned = read_adapter(fit(pipe, replace(SETTINGS, optimizer="adamw-8bit"))[0])
        assert all(weight.abs().max() > 0 for name, weight in tuned.items() if "lora_B" in name)  # they start at zero
    with pytest.raises(ValueError, match="optimizer 'sgd' is not known"):
        fit(pipe, replace(SETTINGS, optimizer="sgd"))


def test_a_checkpoint_of_other_settings_is_not_used(pipe, tmp_path, capsys):
    fit(pipe, SETTINGS, tmp_path / "checkpoint.pt")
    other = replace(SETTINGS, learning_rate=1e-3)
    unet, _, _ = fit(pipe, other, tmp_path / "checkpoint.pt")
    assert "starting afresh" in capsys.readouterr().out
    assert equal(unet, fit(pipe, other)[0])


def test_accumulation_and_precision(pipe):
    whole, _, _ = fit(pipe, dropout=0.0)
    assert_close(fit(pipe, replace(SETTINGS, gradient_accumulation_steps=3), dropout=0.0)[0], whole)
    half, _, _ = fit(pipe, replace(SETTINGS, mixed_precision="bf16"), dropout=0.0)
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in read_adapter(half).values())
    assert not equal(whole, half)


def test_nan_stops_and_keeps_the_last_checkpoint(pipe, tmp_path):
    def spoil(unet, step):
        next(p for p in unet.parameters() if p.requires_grad).data.fill_(float("nan"))
        return {}

    with pytest.raises(FloatingPointError, match="nan at step 3.*lower learning_rate.*checkpoint.pt"):
        fit(pipe, SETTINGS, tmp_path / "checkpoint.pt", spoil)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 2 and all(weight.isfinite().all() for weight in kept["weights"])


def test_out_of_memory_halves_the_batch(pipe, capsys, monkeypatch):
    forward = UNet2DConditionModel.forward
    whole, _, _ = fit(pipe, dropout=0.0)

    def hungry(self, sample, *args, **kwargs):
        if len(sample) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", hungry)
    unet, _, _ = fit(pipe, dropout=0.0)
    assert "out of memory at 8 images: going on with 4" in capsys.readouterr().out
    assert_close(unet, whole)
    with pytest.raises(MemoryError, match="batch of one image"):
        diffusion.halve_batch(1, torch.OutOfMemoryError("x"))
    with pytest.raises(RuntimeError, match="shape"):
        diffusion.halve_batch(8, RuntimeError("shape mismatch"))


def test_adapter_survives_save_and_load_in_a_plain_pipeline(pipe, model_id, tmp_path):
    tuned, _, _ = fit(pipe)
    path = diffusion.save_lora(tuned, tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(model_id, safety_checker=None)
    plain.load_lora_weights(path.parent)
    x, t, states = torch.randn(2, 4, 2, 2), torch.tensor([10, 900]), torch.randn(2, 32, 16)
    with torch.inference_mode():
        expected, loaded, untuned = (unet(x, t, states).sample for unet in (tuned, plain.unet, pipe.unet))  # dropout would show
    assert torch.equal(expected, loaded)  # lora_alpha (8) is not rank (4): without the metadata this fails
    assert (expected - untuned).abs().max() > 1e-3
    # The library writes the header's keys in no fixed order, so the files are compared by what they hold.
    with safe_open(path, "pt") as first, safe_open(diffusion.save_lora(tuned, tmp_path / "again"), "pt") as again:
        assert first.metadata() == again.metadata() and set(first.keys()) == set(again.keys())
        assert all(torch.equal(first.get_tensor(name), again.get_tensor(name)) for name in first.keys())


def test_the_kohya_file_holds_the_same_adapter(pipe, model_id, tmp_path):
    tuned, _, _ = fit(pipe)
    path = diffusion.export_kohya(diffusion.save_lora(tuned, tmp_path / "lora"), tmp_path / "kohya.safetensors")
    names = set(load_file(path))
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= names
    assert len(names) == 3 * sum(hasattr(module, "lora_A") for module in tuned.modules())
    plain = StableDiffusionPipeline.from_pretrained(model_id, safety_checker=None)
    plain.load_lora_weights(tmp_path, weight_name=path.name)
    x, t, states = torch.randn(2, 4, 2, 2), torch.tensor([10, 900]), torch.randn(2, 32, 16)
    with torch.inference_mode():
        torch.testing.assert_close(plain.unet.eval()(x, t, states).sample, tuned(x, t, states).sample)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bf16_on_a_gpu(model_id):
    pipe = diffusion.load_pipeline(model_id, "cuda", torch.bfloat16)
    unet, _, _ = fit(pipe, replace(SETTINGS, mixed_precision="bf16"))
    assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in read_adapter(unet).values())


def test_kept_steps_are_the_weights_of_those_steps(pipe):
    kept = {}
    settings = replace(SETTINGS, keep_steps=(3, 6))

    def fit_and_keep(settings):
        unet = copy.deepcopy(pipe.unet)
        diffusion.add_lora(unet, 4, 8, WIDE)
        mean, std = diffusion.encode_latents(pipe.vae, draw_images(20))
        states = diffusion.encode_prompts(pipe, PROMPTS)
        scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        diffusion.fit_lora(unet, scheduler, (mean, std), torch.arange(20) % 2, states[:2], states[2], settings,
                           keep=lambda module, step: kept.update({step: read_adapter(module)}))
        return read_adapter(unet)

    last = fit_and_keep(settings)
    assert sorted(kept) == [3, 6]
    assert all(torch.equal(kept[6][name], last[name]) for name in last)
    assert any(not torch.equal(kept[3][name], last[name]) for name in last)
    averaged = fit_and_keep(replace(settings, ema_decay=0.9))
    assert all(torch.equal(kept[6][name], averaged[name]) for name in averaged)  # the average is kept, not the last step
