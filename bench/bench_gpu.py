"""Stable Diffusion 2 at full size, from its configuration with random weights: only where there is a GPU.

The same two loops as in bench_lora.py at 512 and 768 px, with and without gradient checkpointing; beside the ratio stand
the peak memory of our step and how much of what caching can give by operation counts was reached.
"""

import numpy as np
import torch
from bench_lora import fit_cached, fit_plainly
from run import Comparison

from medaug import diffusion, foundations

STEPS, BATCH, LENGTH = 6, 4, 77
MOST = {512: 1.72, 768: 1.62}  # (UNet step + VAE + text) / UNet step, counted in operations per image


def list_comparisons() -> list[Comparison]:
    """Return one comparison for each image size, with and without checkpointing; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    parts = build_parts(diffusion.build_reference("sd2"), "cuda", torch.bfloat16)
    return [compare(parts, size, checkpointing, MOST[size]) for size in MOST for checkpointing in (False, True)]


def build_parts(modules: dict[str, torch.nn.Module], device: str, dtype: torch.dtype) -> dict:
    """Give meta `modules` (unet, vae, text_encoder) random weights on `device`, and the UNet an adapter."""
    torch.manual_seed(0)
    for name, module in modules.items():
        module = modules[name] = module.to_empty(device=device).to(dtype).eval().requires_grad_(False)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for buffer_name, buffer in module.named_buffers():
            if buffer_name.endswith("position_ids"):  # a meta module's buffers come up empty too
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    diffusion.add_lora(modules["unet"], rank=16, lora_alpha=16)
    return {**modules, "noise_scheduler": foundations.build_noise_scheduler()}


def compare(parts: dict, size: int, checkpointing: bool, most: float) -> Comparison:
    """Return the comparison at `size` px."""
    rng = np.random.default_rng(0)
    images_u8 = rng.integers(0, 256, (STEPS * BATCH, size, size), dtype=np.uint8)
    tokens = torch.from_numpy(rng.integers(0, 1000, (1, LENGTH)))
    prompt_ids = torch.zeros(len(images_u8), dtype=torch.long)
    settings = {"batch_size": BATCH, "steps": STEPS, "mixed_precision": "bf16"}
    unet, device = parts["unet"], parts["unet"].device

    def prepare() -> dict:
        unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
        side, channels = size // 2 ** (len(parts["vae"].config.block_out_channels) - 1), unet.config.in_channels
        mean = torch.randn(len(images_u8), channels, side, side, generator=torch.Generator().manual_seed(0))
        states = torch.randn(1, LENGTH, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(0))
        return {"latents": (mean, torch.ones_like(mean)), "states": states}

    def ours() -> float:
        return fit_cached(parts, prepare(), prompt_ids, **settings)

    def plain() -> float:
        prepare()
        return fit_plainly(parts, images_u8, tokens, prompt_ids, **settings)

    def measure_memory(ratio: float) -> dict:
        found = {"most": most, "share_of_most": ratio / most}
        if device.type == "cuda":
            for module in (parts["vae"], parts["text_encoder"]):  # a cached run has sent them away
                module.cpu()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            found["seconds_per_step"] = BATCH / ours()
            found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            for module in (parts["vae"], parts["text_encoder"]):
                module.to(device)
        return found

    name = f"sd2-{size}px-batch{BATCH}" + ("-checkpointed" if checkpointing else "")
    return Comparison(name, ours, plain, "SD 2, LoRA of rank 16: encoded once beside encoded at every step", extra=measure_memory)
