"""The foundations: real classes at toy size, trained two steps, saved, loaded, used; and the shipped folders."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel

from medaug import foundations, paths
from medaug.phantom import tissue

CAPTIONS = ["frontal film of a chest, large heart", "slim build, small nodule", "dark exposure, marker l"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return foundations.build_tokenizer(CAPTIONS, vocab_size=160)


@pytest.fixture(scope="module")
def films():
    return np.random.default_rng(0).integers(0, 255, (12, 64, 64), np.uint8)


def test_unseen_words_fall_into_known_pieces(tokenizer):
    ids = tokenizer("viral pneumonia of a child")["input_ids"]
    assert tokenizer.eos_token_id not in ids[1:-1] and len(ids) > 4


def test_equal_texts_give_equal_tokens(tokenizer):
    again = foundations.build_tokenizer(CAPTIONS, vocab_size=160)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_shared_captions_count_as_right_answers(tokenizer):
    torch.manual_seed(0)
    clip = foundations.build_clip(tokenizer)
    pixel_values = torch.randn(4, 3, 64, 64)
    tokens = dict(tokenizer(["a"] * 4, padding="max_length", max_length=32, return_tensors="pt"))
    every = foundations.compute_clip_loss(clip, pixel_values, tokens, torch.ones(4, 4).bool())
    own = foundations.compute_clip_loss(clip, pixel_values, tokens, torch.eye(4).bool())
    # With one caption for all, which film a caption came with cannot matter, and ln 4 is the least loss there is.
    assert every.item() == pytest.approx(own.item(), abs=1e-5) and every.item() >= np.log(4) - 1e-5


def test_a_killed_training_resumes_to_the_same_weights(tmp_path, tokenizer, films):
    def train(steps, checkpoint, stop=None):
        torch.manual_seed(0)
        clip = foundations.build_clip(tokenizer)
        compute = _clip_loss(tokenizer, films, stop)
        return foundations.fit(clip, compute, steps, 1e-3, checkpoint, "CLIP", save_every=2)

    whole, history = train(4, tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(4, tmp_path / "killed.pt", stop=3)
    resumed, resumed_history = train(4, tmp_path / "killed.pt")
    assert history == resumed_history
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def _clip_loss(tokenizer, films, stop):
    tokens = tokenizer(CAPTIONS, padding="max_length", max_length=32, return_tensors="pt")

    def compute(model, step):
        if step == stop:
            raise KeyboardInterrupt
        pixel_values = torch.as_tensor(films[:4]).float()[:, None].expand(-1, 3, -1, -1) / 255
        batch = {"input_ids": tokens.input_ids[:4], "attention_mask": tokens.attention_mask[:4]}
        return foundations.compute_clip_loss(model, pixel_values, batch, torch.eye(4).bool())

    return compute


def test_a_loss_that_is_not_finite_stops_with_the_remedy(tmp_path):
    module = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        foundations.fit(module, lambda m, _: m.weight.sum() * float("nan"), 1, 1e-3, tmp_path / "c.pt", "toy")


def test_train_save_load_generate(tmp_path, tokenizer, films):
    torch.manual_seed(0)
    clip, vae, unet = foundations.build_clip(tokenizer), foundations.build_vae(), foundations.build_unet()
    vae, _ = foundations.train_vae(vae, films, steps=2, batch_size=4, learning_rate=1e-3, seed=0,
                                   checkpoint=tmp_path / "vae.pt")
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    noise_scheduler = foundations.build_noise_scheduler()
    before = [p.clone() for p in unet.parameters()]
    unet, history = foundations.train_denoiser(
        unet, vae, text_encoder, tokenizer, noise_scheduler, films, CAPTIONS, steps=2, batch_size=4, learning_rate=1e-3,
        caption_dropout=0.5, seed=0, checkpoint=tmp_path / "unet.pt")
    assert any(not torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))
    assert history[-1]["step"] == 2 and np.isfinite(history[-1]["loss"])
    foundations.save_pipeline(tmp_path / "sd", vae, unet, text_encoder, tokenizer, noise_scheduler)
    foundations.save_clip(tmp_path / "clip", clip, tokenizer)
    samples = foundations.sample_films(tmp_path / "sd", ["slim build"] * 2, num_inference_steps=2)
    assert samples.shape == (2, 64, 64) and samples.dtype == np.uint8
    inputs = CLIPProcessor.from_pretrained(tmp_path / "clip")(
        text=["slim build"], images=[np.repeat(films[0][..., None], 3, -1)], return_tensors="pt", padding=True)
    logits = CLIPModel.from_pretrained(tmp_path / "clip").float()(**inputs).logits_per_image
    assert logits.shape == (1, 1)


def test_the_cached_pixels_equal_the_processor(films):
    processor = foundations.build_image_processor()
    rgb = [np.repeat(film[..., None], 3, -1) for film in films[:3]]
    expected = processor(images=rgb, return_tensors="pt").pixel_values
    assert torch.allclose(foundations._to_clip_pixels(films[:3]), expected, atol=1e-5)


def test_tissue_shows_no_class_and_its_captions_name_none(tmp_path):
    patches, captions = foundations.render_tissue(6, 32, 0, tmp_path)
    assert patches.shape == (6, 32, 32, 3) and patches.dtype == np.uint8 and len(set(captions)) > 1
    assert max(len(caption.replace(" ", "")) for caption in captions) <= foundations.MAX_TOKENS - 2  # a token a letter
    wide, same = foundations.render_tissue(6, 32, 0, tmp_path, 256.0)
    assert same == captions and not np.array_equal(wide, patches)  # another file in the same cache
    traits = tissue.mix_traits(list(tissue.CLASSES), foundations.NO_CLASS)
    for values in traits.values():
        assert torch.allclose(values, values[:1].expand_as(values), atol=1e-6)


def test_colour_images_keep_their_colours(tmp_path, tokenizer):
    rgb = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), np.uint8)
    assert foundations.to_pixel_values(rgb).shape == foundations._to_clip_pixels(rgb).shape == (6, 3, 64, 64)
    torch.manual_seed(0)
    vae, _ = foundations.train_vae(foundations.build_vae(), rgb, steps=1, batch_size=2, learning_rate=1e-3, seed=0,
                                   checkpoint=tmp_path / "vae.pt")
    swapped = rgb[:2].copy()
    swapped[..., 0], swapped[..., 2] = rgb[:2, ..., 2], rgb[:2, ..., 0]  # a grey loss could not tell these two apart
    torch.manual_seed(1)
    losses = [foundations.compute_vae_loss(vae, batch).item() for batch in (rgb[:2], swapped)]
    assert losses[0] != losses[1]
    assert foundations.compute_psnr(rgb, rgb + np.uint8(0)).min() > 80


def test_psnr_of_a_known_error():
    image = np.zeros((1, 4, 4), np.uint8)
    assert foundations.compute_psnr(image, image + 255)[0] == pytest.approx(0.0)
    assert foundations.compute_psnr(image, image + 51)[0] == pytest.approx(20 * np.log10(5))


def test_the_shipped_foundations_load_and_stay_small():
    files = [p for p in paths.FOUNDATIONS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 40e6
    assert max(p.stat().st_size for p in files) < 16e6
    pipe = StableDiffusionPipeline.from_pretrained(paths.FOUNDATIONS / "sd", safety_checker=None)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert CLIPModel.from_pretrained(paths.FOUNDATIONS / "clip").config.projection_dim == 128
    assert {p.parent.name for p in files if p.name == "README.md"} == {"sd", "clip"}
