"""The LoRA loop: latents and prompts encoded once, against encoding them at every step as the field's scripts do."""

import time

import numpy as np
import torch
from run import Comparison
from torch.nn import functional as F

from medaug import diffusion, foundations

STEPS, BATCH, SIZE = 4, 32, 64
WORDS = [f"chest x-ray of a child, {finding}" for finding in ("normal lungs", "bacterial pneumonia", "viral pneumonia")]


def build_parts() -> dict:
    """Return the embedded study's pipeline with random weights: speed does not depend on them."""
    torch.manual_seed(0)
    tokenizer = foundations.build_tokenizer(WORDS)
    parts = {"vae": foundations.build_vae(SIZE).eval(), "unet": foundations.build_unet(),
             "text_encoder": foundations.build_clip(tokenizer).text_model.eval()}
    for module in parts.values():
        module.requires_grad_(False)
    return parts | {"tokenizer": tokenizer, "noise_scheduler": foundations.build_noise_scheduler()}


def list_comparisons() -> list[Comparison]:
    """Return the one comparison: the same UNet, adapter, optimiser, images and number of steps."""
    parts = build_parts()
    diffusion.add_lora(parts["unet"], rank=8, lora_alpha=8)
    rng = np.random.default_rng(0)
    images_u8 = rng.integers(0, 256, (STEPS * BATCH, SIZE, SIZE), dtype=np.uint8)
    tokens = parts["tokenizer"](WORDS, padding="max_length", return_tensors="pt").input_ids
    prompt_ids = torch.from_numpy(rng.integers(0, len(WORDS), len(images_u8)))
    cache = {"latents": diffusion.encode_latents(parts["vae"], images_u8),
             "states": parts["text_encoder"](tokens).last_hidden_state}  # fmt: skip
    return [Comparison("lora-64px", lambda: fit_cached(parts, cache, prompt_ids),
                       lambda: fit_plainly(parts, images_u8, tokens, prompt_ids),
                       "latents and text encoded once beside encoded at every step")]  # fmt: skip


def fit_cached(parts: dict, cache: dict, prompt_ids: torch.Tensor) -> float:
    """Run our loop for STEPS steps; return images per second."""
    settings = diffusion.FitSettings(steps=STEPS, batch_size=BATCH, caption_dropout=0.0)
    began = time.perf_counter()
    diffusion.fit_lora(parts["unet"], parts["noise_scheduler"], cache["latents"], prompt_ids, cache["states"],
                       cache["states"][0], settings, checkpoint=None)
    return STEPS * BATCH / (time.perf_counter() - began)


def fit_plainly(parts: dict, images_u8: np.ndarray, tokens: torch.Tensor, prompt_ids: torch.Tensor) -> float:
    """Run the plain loop (encode, add noise, predict, step) for STEPS steps; return images per second."""
    unet, vae, noise_scheduler = parts["unet"].train(), parts["vae"], parts["noise_scheduler"]
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3, fused=True)
    began = time.perf_counter()
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        with torch.no_grad():
            pixel_values = diffusion.to_pixel_values(images_u8[rows])
            latents = vae.encode(pixel_values).latent_dist.sample() * vae.config.scaling_factor
            encoder_hidden_states = parts["text_encoder"](tokens[prompt_ids[rows]]).last_hidden_state
        noise = torch.randn_like(latents)
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (BATCH,))
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        F.mse_loss(model_pred, noise_scheduler.get_velocity(latents, noise, timesteps)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return STEPS * BATCH / (time.perf_counter() - began)
