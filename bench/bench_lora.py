"""The LoRA loop: latents and prompts encoded once, against encoding them at every step as the field's scripts do.

With DIFFUSERS_LORA_SCRIPT=/path/to/train_text_to_image_lora.py (of diffusers, fetched by you, run unchanged; it needs the
package `datasets`) that very script is a row of its own, on the same pipeline, images, batch and adapter.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from run import Comparison
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from medaug import diffusion, foundations

STEPS, BATCH, SIZE, RANK = 4, 32, 64, 8
SHARED_STEPS = 16
SCRIPT = os.environ.get("DIFFUSERS_LORA_SCRIPT", "")
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
    """Return the comparisons, each with the same UNet, adapter, optimiser, images and number of steps."""
    parts = build_parts()
    folder = Path(tempfile.mkdtemp()) if SCRIPT else None
    rng = np.random.default_rng(0)
    images_u8 = rng.integers(0, 256, (STEPS * BATCH, SIZE, SIZE), dtype=np.uint8)
    prompt_ids = torch.from_numpy(rng.integers(0, len(WORDS), len(images_u8)))
    if SCRIPT:
        save_for_script(parts, images_u8, prompt_ids, folder)
    diffusion.add_lora(parts["unet"], rank=RANK, lora_alpha=RANK)
    tokens = parts["tokenizer"](WORDS, padding="max_length", return_tensors="pt").input_ids
    cache = {"latents": diffusion.encode_latents(parts["vae"], images_u8),
             "states": parts["text_encoder"](tokens).last_hidden_state}  # fmt: skip
    most = count_most(parts)
    found = [Comparison("lora-64px", lambda: fit_cached(parts, cache, prompt_ids),
                        lambda: fit_plainly(parts, images_u8, tokens, prompt_ids),
                        "latents and text encoded once beside encoded at every step",
                        extra=lambda ratio: {"most": most, "share_of_most": ratio / most})]  # fmt: skip
    found.append(Comparison("lora-64px-shared", lambda: fit_cached(parts, cache, prompt_ids, steps=SHARED_STEPS, processes=2),
                            lambda: fit_cached(parts, cache, prompt_ids, steps=SHARED_STEPS),
                            "each batch shared by two processes beside one process, the start of the second not counted"))
    if SCRIPT:
        found.append(Comparison("lora-64px-script", lambda: fit_cached(parts, cache, prompt_ids), lambda: run_script(folder),
                                f"our loop beside {Path(SCRIPT).name}, unchanged, its start-up not counted"))
    return found


def count_most(parts: dict) -> float:
    """Return the most that caching can give, by counted operations: (UNet step + VAE + text) / UNet step, per image."""
    unet, side = parts["unet"], SIZE // 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    latents = torch.randn(1, unet.config.in_channels, side, side)
    tokens = parts["tokenizer"](WORDS[:1], padding="max_length", return_tensors="pt").input_ids
    with FlopCounterMode(display=False) as step:
        states = torch.randn(1, tokens.shape[1], unet.config.cross_attention_dim)
        unet(latents, torch.tensor([500]), states).sample.square().mean().backward()
    unet.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        parts["vae"].encode(torch.randn(1, 3, SIZE, SIZE))
        parts["text_encoder"](tokens)
    return 1 + encoding.get_total_flops() / step.get_total_flops()


def fit_cached(parts: dict, cache: dict, prompt_ids: torch.Tensor, batch_size: int = BATCH, steps: int = STEPS,
               mixed_precision: str = "no", processes: int = 1) -> float:
    """Run our loop for `steps` steps; return images per second of the steps, as of the plain loop's."""
    settings = diffusion.FitSettings(steps=steps, batch_size=batch_size, caption_dropout=0.0, mixed_precision=mixed_precision,
                                     processes=processes)
    _, timing = diffusion.fit_lora(parts["unet"], parts["noise_scheduler"], cache["latents"], prompt_ids, cache["states"],
                                   cache["states"][0], settings)
    return timing["images_per_second"]


def fit_plainly(parts: dict, images_u8: np.ndarray, tokens: torch.Tensor, prompt_ids: torch.Tensor,
                batch_size: int = BATCH, steps: int = STEPS, mixed_precision: str = "no") -> float:
    """Run the plain loop (encode, add noise, predict, step) for `steps` steps; return images per second."""
    unet, vae, noise_scheduler = parts["unet"].train(), parts["vae"], parts["noise_scheduler"]
    device = unet.device
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3, fused=True)
    began = time.perf_counter()
    for step in range(steps):
        rows = slice(step * batch_size, (step + 1) * batch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
            with torch.no_grad():
                pixel_values = diffusion.to_pixel_values(images_u8[rows]).to(device, vae.dtype)
                latents = vae.encode(pixel_values).latent_dist.sample().float() * vae.config.scaling_factor
                encoder_hidden_states = parts["text_encoder"](tokens[prompt_ids[rows]].to(device)).last_hidden_state
            noise = torch.randn_like(latents)
            timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (batch_size,), device=device)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        loss = F.mse_loss(model_pred.float(), noise_scheduler.get_velocity(latents, noise, timesteps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # both loops report the loss at every step
    return steps * batch_size / (time.perf_counter() - began)


def save_for_script(parts: dict, images_u8: np.ndarray, prompt_ids: torch.Tensor, folder: Path) -> None:
    """Write pipeline and images to `folder` as the script wants them (`sd/`, `images/` with metadata.jsonl)."""
    pipe = StableDiffusionPipeline(
        vae=parts["vae"], unet=parts["unet"], text_encoder=parts["text_encoder"], tokenizer=parts["tokenizer"],
        scheduler=parts["noise_scheduler"], safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(folder / "sd")
    (folder / "images").mkdir()
    lines = []
    for number, (image_u8, prompt) in enumerate(zip(images_u8, prompt_ids, strict=True)):
        Image.fromarray(image_u8).save(folder / "images" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": WORDS[prompt]}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_script(folder: Path, few: int = 2, many: int = 22) -> float:
    """Run the script for `few` and for `many` steps; return images per second of the steps between."""
    seconds = []
    for steps in (few, many):
        with tempfile.TemporaryDirectory() as output:
            command = [sys.executable, SCRIPT, f"--pretrained_model_name_or_path={folder / 'sd'}",
                       f"--train_data_dir={folder / 'images'}", f"--output_dir={output}", f"--resolution={SIZE}",
                       f"--train_batch_size={BATCH}", f"--max_train_steps={steps}", f"--rank={RANK}",
                       "--learning_rate=1e-3", "--seed=0", "--checkpointing_steps=1000000"]
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True,
                                  env={**os.environ, "HF_HOME": output, "OMP_NUM_THREADS": str(torch.get_num_threads())})
            if done.returncode:
                raise RuntimeError(f"{SCRIPT} failed: {done.stderr.strip().splitlines()[-1]}")
            seconds.append(time.perf_counter() - began)
    return (many - few) * BATCH / (seconds[1] - seconds[0])
