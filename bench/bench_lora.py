"""The LoRA loop: latents and prompts encoded once, against encoding them at every step as the field's scripts do."""

import time

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from run import Comparison
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from medaug import diffusion

STEPS, BATCH, SIZE, PROMPTS, LENGTH = 4, 8, 64, 3, 32


def build_parts() -> dict:
    """Return a random pipeline of the embedded study's shape (UNet 5.6 M, VAE 1 M), so that no weights are needed."""
    torch.manual_seed(0)
    text = CLIPTextConfig(vocab_size=1000, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                          num_attention_heads=4, max_position_embeddings=LENGTH)  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(32, 64, 64, 64), latent_channels=16, norm_num_groups=8,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=16, out_channels=16, block_out_channels=(96, 192), layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128, attention_head_dim=8)  # fmt: skip
    for module in (vae, unet):
        module.requires_grad_(False)
    return {"vae": vae.eval(), "unet": unet, "text_encoder": CLIPTextModel(text).eval().requires_grad_(False),
            "noise_scheduler": DDPMScheduler(prediction_type="v_prediction")}  # fmt: skip


def list_comparisons() -> list[Comparison]:
    """Return the one comparison: the same UNet, adapter, optimiser, images and number of steps."""
    parts = build_parts()
    diffusion.add_lora(parts["unet"], rank=8, lora_alpha=8)
    rng = np.random.default_rng(0)
    images_u8 = rng.integers(0, 256, (STEPS * BATCH, SIZE, SIZE), dtype=np.uint8)
    tokens = torch.from_numpy(rng.integers(0, 1000, (PROMPTS, LENGTH)))
    prompt_ids = torch.from_numpy(rng.integers(0, PROMPTS, len(images_u8)))
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
