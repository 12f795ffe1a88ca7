"""Every way of tuning on the real classes at toy size: it learns what it is for, resumes exactly, saves, loads, draws."""

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
from test_diffusion import SETTINGS, build_tiny_pipeline, draw_images

from medaug import diffusion, generation, tuning

PROMPTS = {"normal": "chest x-ray of a child, normal lungs", "Viral (2)": "chest x-ray of a child, viral pneumonia"}
SEEDS = list(range(4))


@pytest.fixture(scope="module")
def model_id(tmp_path_factory):
    return build_tiny_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def pipe(model_id):
    return diffusion.load_pipeline(model_id)


@pytest.fixture(scope="module")
def latents(model_id):
    return diffusion.encode_latents(diffusion.load_pipeline(model_id).vae, draw_images(20))


def build_lesson(latents, prompts=PROMPTS):
    return tuning.Lesson(latents, torch.arange(20) % 2, list(prompts.values()))


def draw(pipe, prompts=PROMPTS, **settings):
    texts = [list(prompts.values())[number % 2] for number in range(len(SEEDS))]
    return generation.sample_images(pipe, texts, SEEDS, 16, 4, **settings).astype(int)


def measure(pipe, latents, prompts=PROMPTS):
    states = diffusion.encode_prompts(pipe, list(prompts.values()))
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    losses = diffusion.compute_band_losses(pipe.unet, scheduler, latents[0], torch.arange(20) % 2, states)
    return diffusion.summarise_bands(losses)


def die(*_):
    raise KeyboardInterrupt


def test_full_tuning_moves_every_weight_and_comes_back(pipe, model_id, latents, tmp_path):
    before, loss = copy.deepcopy(pipe.unet.state_dict()), measure(pipe, latents)["val_loss"]
    pipe.unet.requires_grad_(True)
    tuning.fit_captioned(pipe, build_lesson(latents), replace(SETTINGS, steps=10, learning_rate=1e-3))
    assert measure(pipe, latents)["val_loss"] < loss
    moved = [name for name, weight in pipe.unet.state_dict().items() if not torch.equal(weight, before[name])]
    assert len(moved) > 0.95 * len(before)
    folder = tuning.save_generator(pipe, "full", tmp_path / "full")
    plain = StableDiffusionPipeline.from_pretrained(model_id, safety_checker=None,
                                                    unet=UNet2DConditionModel.from_pretrained(folder))
    loaded = generation.load_generator(model_id, [folder])
    assert np.array_equal(draw(pipe), draw(plain)) and np.array_equal(draw(pipe), draw(loaded))


def test_a_fresh_placeholder_says_what_its_words_said(pipe):
    words = diffusion.encode_prompts(pipe, list(PROMPTS.values()))
    prompts = tuning.add_placeholders(pipe, PROMPTS)
    assert prompts == {"normal": "chest x-ray of a child, <normal>", "Viral (2)": "chest x-ray of a child, <viral-2>"}
    assert torch.equal(diffusion.encode_prompts(pipe, list(prompts.values())), words)
    with pytest.raises(ValueError, match="class 'b' has no words of its own: 'a chest,'"):
        tuning.add_placeholders(pipe, {"a": "a chest, well", "b": "a chest,"})


def invert(model_id, latents, settings, checkpoint=None, validate=None):
    pipe = diffusion.load_pipeline(model_id)
    prompts = tuning.add_placeholders(pipe, PROMPTS)
    history, _ = tuning.fit_inversion(pipe, build_lesson(latents, prompts), settings, checkpoint,
                                      validate or (lambda step: measure(pipe, latents, prompts)))
    return pipe, prompts, history


def test_inversion_learns_vectors_and_nothing_else(model_id, pipe, latents, tmp_path):
    settings = replace(SETTINGS, steps=20, validate_every=10, learning_rate=0.1, caption_dropout=0.2)
    tuned, prompts, history = invert(model_id, latents, settings)
    assert history[-1]["val_loss"] < measure(pipe, latents)["val_loss"]
    assert diffusion.hash_weights(tuned.unet) == diffusion.hash_weights(pipe.unet)
    old = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(tuned.text_encoder.get_input_embeddings().weight[:len(old)], old)
    halves, _, _ = invert(model_id, latents, replace(settings, gradient_accumulation_steps=3))
    torch.testing.assert_close(tuned.text_encoder.get_input_embeddings().weight,
                               halves.text_encoder.get_input_embeddings().weight, atol=1e-3, rtol=1e-3)
    folder = tuning.save_generator(tuned, "textual-inversion", tmp_path / "words")
    loaded = generation.load_generator(model_id, [folder])
    assert np.array_equal(draw(loaded, prompts), draw(tuned, prompts))
    assert np.abs(draw(tuned, prompts) - draw(pipe)).max() > 0
    with pytest.raises(ValueError, match="call add_placeholders first"):
        tuning.fit_inversion(pipe, build_lesson(latents), SETTINGS)


def test_a_killed_inversion_resumes_to_the_same_vectors(model_id, latents, tmp_path):
    whole, _, history = invert(model_id, latents, SETTINGS, validate=lambda step: {})
    with pytest.raises(KeyboardInterrupt):
        invert(model_id, latents, SETTINGS, tmp_path / "checkpoint.pt", die)
    resumed, _, again = invert(model_id, latents, SETTINGS, tmp_path / "checkpoint.pt", lambda step: {})
    assert diffusion.hash_weights(whole.text_encoder) == diffusion.hash_weights(resumed.text_encoder) and history == again


def test_a_prior_is_mixed_in_by_its_share(pipe, latents):
    prior = tuple(part[:5] for part in latents)
    lesson = tuning.add_prior(build_lesson(latents), prior, "a chest x-ray")
    assert lesson.prompts == [*PROMPTS.values(), "a chest x-ray"]
    assert lesson.prompt_ids.tolist() == [0, 1] * 10 + [2] * 5
    assert torch.equal(lesson.latents[0][20:], prior[0]) and torch.equal(lesson.latents[1][:20], latents[1])
    diffusion.add_lora(pipe.unet, 4, 4)
    history, _ = tuning.fit_captioned(pipe, lesson, SETTINGS)
    assert np.isfinite([row["loss"] for row in history]).all()


def test_prior_images_are_learned_beside_the_others(model_id, latents):
    """Images unlike those of the lesson are denoised better if they were mixed in."""
    own, kept = (latents[0] + 3, latents[1]), []
    for lesson in (build_lesson(latents), tuning.add_prior(build_lesson(latents), own, "a chest x-ray")):
        pipe = build_student(model_id)
        tuning.fit_captioned(pipe, lesson, replace(SETTINGS, batch_size=16, learning_rate=2e-2))
        kept.append(measure(pipe, own, {"a": "a chest x-ray", "b": "a chest x-ray"})["val_loss"])
    assert kept[1] < kept[0]


def build_student(model_id):
    pipe = diffusion.load_pipeline(model_id)
    diffusion.add_lora(pipe.unet, 8, 8)
    return pipe


def test_a_decoder_learns_to_give_images_back_and_latents_keep_their_meaning(pipe, model_id, latents, tmp_path):
    images_u8, settings = draw_images(20), replace(SETTINGS, steps=30, learning_rate=1e-2)

    def lose(vae):
        return np.square(diffusion.reconstruct(vae, images_u8).astype(float) - images_u8).mean()

    before, encoder = lose(pipe.vae), diffusion.hash_weights(pipe.vae.encoder)
    tuning.fit_decoder(pipe.vae, images_u8, latents[0], settings)
    assert lose(pipe.vae) < 0.9 * before
    assert diffusion.hash_weights(pipe.vae.encoder) == encoder
    torch.testing.assert_close(diffusion.encode_latents(pipe.vae, images_u8), latents)
    folder = tuning.save_generator(pipe, "decoder", tmp_path / "decoder")
    loaded, untuned = generation.load_generator(model_id, [folder]), generation.load_generator(model_id)
    plain = StableDiffusionPipeline.from_pretrained(model_id, safety_checker=None, vae=AutoencoderKL.from_pretrained(folder))
    assert np.array_equal(draw(loaded), draw(pipe)) and np.array_equal(draw(plain), draw(pipe))
    assert np.abs(draw(untuned) - draw(pipe)).max() > 5
    assert diffusion.hash_weights(loaded.unet) == diffusion.hash_weights(untuned.unet)


def test_a_killed_decoder_resumes_and_parts_of_a_batch_add_up(model_id, latents, tmp_path, monkeypatch):
    def tune(settings, checkpoint=None):
        vae = diffusion.load_pipeline(model_id).vae
        tuning.fit_decoder(vae, draw_images(20), latents[0], settings, checkpoint)
        return vae

    whole, parts = tune(SETTINGS), tune(replace(SETTINGS, gradient_accumulation_steps=3))
    for name, weight in parts.state_dict().items():
        torch.testing.assert_close(weight, whole.state_dict()[name], atol=5e-3, rtol=0)
    encode, calls = AutoencoderKL.decode, iter(range(100))
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: die() if next(calls) == 4 else encode(self, z))
    with pytest.raises(KeyboardInterrupt):
        tune(SETTINGS, tmp_path / "checkpoint.pt")
    resumed = tune(SETTINGS, tmp_path / "checkpoint.pt")
    assert next(calls) == 7  # steps 0 to 3, the one that died, and 4 and 5: the checkpoint of step 4 was used
    assert diffusion.hash_weights(resumed) == diffusion.hash_weights(whole)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_prediction_is_split_into_image_and_noise(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    x0, eps, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    noisy, target = scheduler.add_noise(x0, eps, t), diffusion.compute_target(scheduler, x0, eps, t)
    for found, expected in zip(tuning.split_prediction(scheduler, target, noisy, t), (x0, eps), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def draw_ends(pipe, scheduler, steps):
    """Latents (64, 4, 2, 2) at the end of sampling from fixed noise."""
    generation.set_scheduler(pipe, scheduler)
    noise = torch.randn(64, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return pipe(["a chest"] * 64, latents=noise, num_inference_steps=steps, guidance_scale=1.0, height=16, width=16,
                    output_type="latent").images


def test_distillation_reaches_in_one_step_what_took_fifty(model_id):
    """The world is a Gaussian half as wide as the noise, so the teacher's path ends at a picture of its beginning."""
    lesson = tuning.Lesson((torch.zeros(20, 4, 2, 2), torch.full((20, 4, 2, 2), 0.5)), torch.arange(20) % 2,
                           ["a chest", "a lung"])
    teacher = diffusion.load_pipeline(model_id)
    teacher.unet.requires_grad_(True)
    tuning.fit_captioned(teacher, lesson, replace(SETTINGS, steps=100, batch_size=32, learning_rate=5e-3))
    ends = draw_ends(teacher, "ddim", 50)
    student = diffusion.load_pipeline(model_id)
    student.unet.load_state_dict(teacher.unet.state_dict())
    diffusion.add_lora(student.unet, 8, 8, (*diffusion.ATTENTION, "proj_in", "proj_out", "conv1", "conv2"))
    tuning.fit_lcm(student, lesson, replace(SETTINGS, steps=50, batch_size=32), solver_steps=10)
    gap, gap_before = ((draw_ends(pipe, "lcm", 1) - ends).square().mean() for pipe in (student, teacher))
    assert gap < 0.7 * gap_before
    x, t, states = torch.randn(2, 4, 2, 2), torch.tensor([10, 900]), torch.randn(2, 32, 16)
    with tuning._without_adapter(student.unet):  # the teacher is what it was
        assert torch.equal(student.unet(x, t, states).sample, teacher.unet(x, t, states).sample)


def test_guidance_is_built_into_the_distilled_model(model_id, latents):
    runs = []
    for guidance_scale in (1.0, 3.0):
        pipe = build_student(model_id)
        tuning.fit_lcm(pipe, build_lesson(latents), replace(SETTINGS, steps=2), guidance_scale=guidance_scale)
        runs.append(diffusion.hash_weights(pipe.unet))
    assert runs[0] != runs[1]


def test_a_killed_distillation_resumes_and_its_adapter_goes_on_top(model_id, latents, tmp_path):
    tuned = build_student(model_id)
    tuning.fit_captioned(tuned, build_lesson(latents), SETTINGS)
    first = tuning.save_generator(tuned, "lora", tmp_path / "lora")

    def distil(checkpoint=None, steps=6):
        pipe = generation.load_generator(model_id, [first])
        diffusion.add_lora(pipe.unet, 4, 8)
        tuning.fit_lcm(pipe, build_lesson(latents), replace(SETTINGS, steps=steps), checkpoint)
        return pipe

    whole = distil()
    interrupted = tmp_path / "checkpoint.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "_save_checkpoint", kill_after(diffusion._save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            distil(interrupted)
    assert diffusion.hash_weights(distil(interrupted).unet) == diffusion.hash_weights(whole.unet)
    second = tuning.save_generator(whole, "lcm", tmp_path / "lcm")
    loaded = generation.load_generator(model_id, [first, second])
    for pipeline in (whole, loaded):
        generation.set_scheduler(pipeline, "lcm")
    assert np.abs(draw(whole) - draw(loaded)).max() <= 1


def kill_after(save):
    def save_and_die(*args):
        save(*args)
        raise KeyboardInterrupt
    return save_and_die


def test_reward_rises_and_runs_again_alike(model_id, latents):
    def reward(image_01, prompt_ids):  # brighter for the first prompt, darker for the second
        return image_01.mean(dim=(1, 2, 3)) * (1 - 2 * prompt_ids)

    def score(pipe):
        states = diffusion.encode_prompts(pipe, list(PROMPTS.values()))
        noise, ids = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 2
        with torch.no_grad():
            return reward(tuning.draw_images(pipe, noise, states[ids], 4), ids).mean().item()

    runs = []
    for _ in range(2):
        pipe = build_student(model_id)
        before = score(pipe)
        tuning.fit_reward(pipe, build_lesson(latents), replace(SETTINGS, steps=10, learning_rate=3e-2), reward,
                          num_inference_steps=4, gradient_steps=2, anchor=0.01)
        assert score(pipe) > before
        runs.append(diffusion.hash_weights(pipe.unet))
    assert runs[0] == runs[1]


def test_images_are_those_of_the_library(pipe):
    states = diffusion.encode_prompts(pipe, list(PROMPTS.values()))
    noise = torch.randn(2, 4, 2, 2)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected = pipe(list(PROMPTS.values()), latents=noise, num_inference_steps=4, guidance_scale=1.0, height=16, width=16,
                    output_type="pt").images
    with torch.no_grad():
        torch.testing.assert_close(tuning.draw_images(pipe, noise, states, 4), expected, atol=1e-5, rtol=1e-5)


def test_a_folder_without_a_generator(model_id, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tuned generator in .*02-sd-lora"):
        generation.load_generator(model_id, [tmp_path])
