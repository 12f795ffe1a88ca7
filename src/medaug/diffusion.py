"""Tune any diffusers Stable Diffusion with LoRA: cached latents drawn anew, covered targets, exact resume.

A run costs only what the UNet costs: the VAE and the text encoder are run once and their answers kept on disk, keyed by
content. The VAE's answer is kept as mean and standard deviation, so each step still sees a fresh draw.
"""

import hashlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from medaug import parallel
from medaug.runtime import progress, replace_when_done

T = TypeVar("T")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # what diffusers' own LoRA script adapts
BANDS = ((0, 250), (250, 500), (500, 750), (750, 1000))  # timesteps: fine detail ... coarse anatomy

# What separates the two published families; everything else is diffusers' and transformers' default.
REFERENCE_UNET = {
    "sd2": {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True},
    "sd1.5": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
}
REFERENCE_TEXT = {
    "sd2": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
    "sd1.5": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def load_pipeline(model_id: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Return the `StableDiffusionPipeline` at `model_id` (local folder or hub id), safetensors only.

    The safety checker is left out: it is trained on photographs and blacks out medical images. From here on the loaders'
    own bars and notes are silent, in this process.
    """
    for logging in (diffusers.logging, transformers.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(model_id, safety_checker=None, use_safetensors=True,
                                                   trust_remote_code=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


def build_reference(version: str = "sd2") -> dict[str, nn.Module]:
    """Return the full-size `unet`, `vae` and `text_encoder` of "sd2" or "sd1.5" on the meta device: shapes, no weights."""
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(**REFERENCE_UNET[version]),
            "vae": AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                                 down_block_types=("DownEncoderBlock2D",) * 4,
                                 up_block_types=("UpDecoderBlock2D",) * 4),
            "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=49408, **REFERENCE_TEXT[version])),
        }


def count_parameters(module: nn.Module, trainable: bool = False) -> int:
    """Return the number of parameters of `module`, or of those that require a gradient."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def hash_weights(module: nn.Module) -> str:
    """Return 16 hex digits of the SHA-256 over the names and bytes of all weights: the model's identity."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(_tensor_bytes(tensor))
    return digest.hexdigest()[:16]


def encode_latents(vae: AutoencoderKL, images_u8: np.ndarray, cache: Path | None = None,
                   batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (N, C, H/8, W/8) of the scaled latents of grey or RGB `images_u8`.

    `images_u8` is (N, H, W) or (N, H, W, 3) uint8. Both are float32 on the CPU. With `cache` (a folder) they are kept
    there, keyed by the images, the VAE's weights and the threads. To keep one draw instead of both is a known fault of
    caches. Out of memory halves the batch and says so.
    """
    scale = vae.config.scaling_factor
    images_u8 = np.ascontiguousarray(images_u8)
    # sums over other numbers of threads differ in the last bit, and so would all that is trained on them
    key = _hash(images_u8.tobytes(), str(images_u8.shape), hash_weights(vae), f"{scale} {torch.get_num_threads()}")

    def encode(batch_u8: np.ndarray) -> Tensor:
        posterior = vae.encode(to_pixel_values(batch_u8).to(vae.device, vae.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).float().cpu() * scale  # (B, 2, C, h, w)

    def compute() -> dict[str, Tensor]:
        mean, std = torch.cat(_map_batches(encode, images_u8, batch_size, "encode images")).unbind(1)
        return {"mean": mean.contiguous(), "std": std.contiguous()}

    kept = _keep(cache, f"latents-{key}", compute)
    return kept["mean"], kept["std"]


def reconstruct(vae: AutoencoderKL, images_u8: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Return grey (N, H, W) or RGB (N, H, W, 3) `images_u8` as the VAE gives them back (posterior's mean), same shape.

    What is lost here, no generator on this VAE can draw. Out of memory halves the batch and says so.
    """
    def rebuild(batch_u8: np.ndarray) -> np.ndarray:
        pixel_values = to_pixel_values(batch_u8).to(vae.device, vae.dtype)
        decoded = vae.decode(vae.encode(pixel_values).latent_dist.mode()).sample.float().cpu()  # (B, 3, H, W)
        image = decoded.mean(1) if images_u8.ndim == 3 else decoded.permute(0, 2, 3, 1)  # grey: the mean of equal channels
        return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()

    return np.concatenate(_map_batches(rebuild, images_u8, batch_size, "through the autoencoder"))


@torch.inference_mode()
def _map_batches(function: Callable[[np.ndarray], T], images_u8: np.ndarray, batch_size: int, words: str) -> list[T]:
    """Return what `function` makes of each batch, in order; a batch too large for the memory is tried again at half."""
    results, start = [], 0
    with progress(total=len(images_u8), desc=words, unit="image") as bar:
        while start < len(images_u8):
            batch_u8 = images_u8[start:start + batch_size]
            try:
                results.append(function(batch_u8))
            except RuntimeError as error:
                batch_size = halve_batch(batch_size, error)
                continue
            start += len(batch_u8)
            bar.update(len(batch_u8))
    return results


def encode_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str], cache: Path | None = None) -> Tensor:
    """Return the text encoder's hidden states (len(prompts), L, D), float32 on the CPU, kept in `cache` if given."""
    tokens = pipe.tokenizer(list(prompts), padding="max_length", truncation=True).input_ids
    key = _hash(*prompts, str(tokens), hash_weights(pipe.text_encoder))

    @torch.inference_mode()
    def compute() -> dict[str, Tensor]:
        hidden_states, _ = pipe.encode_prompt(list(prompts), pipe.device, 1, do_classifier_free_guidance=False)
        return {"hidden_states": hidden_states.float().cpu().contiguous()}

    return _keep(cache, f"prompts-{key}", compute)["hidden_states"]


def to_pixel_values(images_u8: np.ndarray) -> Tensor:
    """(N, H, W) or (N, H, W, 3) uint8 -> (N, 3, H, W) float32 in -1..1, as Stable Diffusion's VAE expects."""
    images = torch.from_numpy(np.array(images_u8)).float() / 127.5 - 1.0
    return images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)


def add_lora(unet: UNet2DConditionModel, rank: int, lora_alpha: float, target_modules: Sequence[str] = ATTENTION,
             dropout: float = 0.0, seed: int = 0) -> dict[str, int]:
    """Freeze `unet`, add a LoRA adapter (Hu et al. 2021) to `target_modules`, and return how much that is.

    A target is a module's name or the end of it ("to_out.0"). peft is content when some target matches; here each must,
    or ValueError lists those that do not. A is drawn from `seed`, B is zero: a fresh adapter changes nothing. Adapter
    weights are float32 whatever the base is. Returns `modules`, `params_trainable`, `params_total`.
    """
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    unmatched = [target for target in target_modules
                 if not any(name == target or name.endswith(f".{target}") for name in names)]
    if unmatched:
        parts = [name.split(".") for name in names]
        endings = sorted({".".join(part[-2:] if part[-1].isdigit() else part[-1:]) for part in parts})
        raise ValueError(f"LoRA target(s) {', '.join(unmatched)} match no layer and would be left out in silence; "
                         f"layers here end in: {', '.join(endings)}")
    unet.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=lora_alpha, lora_dropout=dropout, init_lora_weights="gaussian",
                                    target_modules=list(target_modules)))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return {"modules": sum(hasattr(module, "lora_A") for module in unet.modules()),
            "params_trainable": count_parameters(unet, trainable=True), "params_total": count_parameters(unet)}


def save_lora(unet: UNet2DConditionModel, folder: Path) -> Path:
    """Write the adapter to `folder` in diffusers' own format, lora_alpha included; return the file's path.

    The names stay peft's (`lora_A`, `lora_B`): the renaming that diffusers' scripts do (`convert_state_dict_to_diffusers`)
    covers the attention layers only, and of such a mixed file its loader drops half with a mere warning. Without the
    metadata a plain pipeline would assume lora_alpha = rank and so scale the adapter wrongly.
    """
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet),
                                              unet_lora_adapter_metadata=_read_lora_config(unet))
    return Path(folder) / "pytorch_lora_weights.safetensors"


def export_kohya(adapter: Path, target: Path) -> Path:
    """Write the file `adapter` (see `save_lora`) to `target` with kohya's names, for ComfyUI and others; return `target`.

    diffusers converts the names. Its converter puts the rank where kohya keeps lora_alpha, so that is set right here. Not
    into the adapter's own folder: a loader that is given a folder expects one file in it.
    """
    with safe_open(adapter, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    alpha = torch.tensor(float(config["unet.lora_alpha"]))
    renamed = {name: alpha.clone() if name.endswith(".alpha") else weight.contiguous()
               for name, weight in convert_state_dict_to_kohya(weights).items()}
    with replace_when_done(target) as temporary:
        save_file(renamed, temporary, {"format": "pt"})
    return Path(target)


@dataclass(frozen=True)
class FitSettings:
    """All that decides a LoRA run besides the data and the model."""

    steps: int = 400  # optimiser steps
    batch_size: int = 64  # images per optimiser step
    learning_rate: float = 1e-3  # peak; linear warm-up, then cosine to a hundredth
    warmup_steps: int = 20
    snr_gamma: float | None = 5.0  # min-SNR weighting (Hang et al. 2023); None: plain mean squared error
    caption_dropout: float = 0.1  # share of captions replaced by the empty one (Ho & Salimans 2021)
    noise_offset: float = 0.0  # one more normal draw per channel, times this: lets mean brightness move
    ema_decay: float = 0.0  # exponential moving average of the adapter; 0: none
    gradient_accumulation_steps: int = 1  # micro-batches per optimiser step, in each process
    processes: int = 1  # GPUs (or CPU processes) that share each batch; the sum over them stays that of the whole batch
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"  # or "adamw-8bit", whose state takes a quarter of the memory (package bitsandbytes)
    mixed_precision: str = "no"  # "no", "bf16" or "fp16" (with a loss scale that adapts)
    patience: int = 0  # validations in a row in which no band of timesteps reaches a new low, after which training stops; 0: never
    validate_every: int = 100  # steps
    save_every: int = 100  # steps
    keep_steps: tuple[int, ...] = ()  # steps after which `keep` is called, with the weights as they are then
    tracker: str = ""  # "tensorboard" or "wandb" (offline), through accelerate: to watch a run; it decides nothing
    seed: int = 0


def fit_lora(unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler, latents: tuple[Tensor, Tensor],
             prompt_ids: Tensor, hidden_states: Tensor, empty_states: Tensor, settings: FitSettings,
             checkpoint: Path | None = None, validate: Callable[[UNet2DConditionModel, int], dict] | None = None,
             keep: Callable[[UNet2DConditionModel, int], object] | None = None) -> tuple[list[dict], dict]:
    """Train the trainable weights of `unet` on cached latents; return the history and the timing (see `fit_weights`).

    `latents` are mean and std, each (N, C, h, w), drawn anew at each step; image i has the caption
    `hidden_states[prompt_ids[i]]` (P, L, D), or `empty_states` (L, D) when its caption is dropped. The target is noise or
    velocity, as `noise_scheduler` says. `validate(unet, step)` returns numbers for the history's rows, `keep(unet, step)` may save
    the weights of one of `settings.keep_steps`. What is trainable decides the method: an adapter (`add_lora`), or all.
    """
    hidden_states, empty_states = hidden_states.to(unet.device), empty_states.to(unet.device)
    snr_weights = compute_snr_weights(noise_scheduler, settings.snr_gamma).to(unet.device)

    def accumulate(step: int, micro_batch: int, backward: Callable[[Tensor], None]) -> float:
        batch = draw_batch(latents, prompt_ids, noise_scheduler, settings, step)
        return backward_batch(unet, noise_scheduler, batch, hidden_states, empty_states, snr_weights, micro_batch,
                              settings.mixed_precision, backward)

    fingerprint = fingerprint_work(unet, [*latents, prompt_ids, hidden_states, empty_states], settings)
    return fit_weights(unet, accumulate, settings, fingerprint, checkpoint, validate and (lambda step: validate(unet, step)),
                       keep=keep and (lambda step: keep(unet, step)))


def fit_weights(module: nn.Module, accumulate: Callable[[int, int, Callable], float], settings: FitSettings, fingerprint: str,
                checkpoint: Path | None = None, validate: Callable[[int], dict] | None = None, name: str = "LoRA",
                keep: Callable[[int], object] | None = None) -> tuple[list[dict], dict]:
    """Train the trainable weights of `module`, by any loss; return the history and the timing.

    `accumulate(step, micro_batch, backward)` adds up the gradients of that step's batch (`draw_batch`; with
    `settings.processes` each process has its share of it), `micro_batch` images at a time, by `backward(loss)`, and returns
    the batch's loss. `validate(step)` returns numbers for the history's rows, `keep(step)` is called after each of
    `settings.keep_steps`; `fingerprint` names all that decides the run. With `settings.patience` the weights that are left
    are those of the lowest `val_loss`, and the run may end early.

    All randomness of step k comes from (`settings.seed`, k), so a run killed at any moment and started again with the
    same `checkpoint` ends with the same weights. Out of memory halves the micro-batch and says so; the sum over
    micro-batches stays that of the whole batch. Raises FloatingPointError on a loss that is not finite; the last
    checkpoint stays.
    """
    weights = [p for p in module.parameters() if p.requires_grad]
    device = weights[0].device
    if settings.processes > 1 and parallel.count() == 1:
        work = (module, accumulate, settings, fingerprint, checkpoint)
        with parallel.open_team(fit_weights, work, settings.processes, device):
            return fit_weights(*work, validate, name, keep)
    alone, first, share = parallel.count() == 1, parallel.rank() == 0, parallel.weigh_share(settings.batch_size)
    optimizer = _build_optimizer(weights, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.mixed_precision == "fp16")
    state = {"step": 0, "seconds": 0.0, "history": [], "losses": [], "scaler": scaler.state_dict(),
             "average": [p.detach().clone() for p in weights] if settings.ema_decay else [], "best": []}
    _restore(checkpoint, fingerprint, weights, optimizer, state)
    if state["scaler"]:  # empty unless it scales
        scaler.load_state_dict(state["scaler"])
    log, close = _open_tracker(settings if first else replace(settings, tracker=""), name, checkpoint)
    micro_batch = math.ceil(settings.batch_size * share / settings.gradient_accumulation_steps)
    module.train()
    bar = progress(desc=name, total=settings.steps * settings.batch_size, unit="image")
    bar.update(state["step"] * settings.batch_size)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for step in range(state["step"], settings.steps):
            settled = has_settled(state["history"], settings.patience)
            if settled if alone else parallel.agree(settled):
                break
            began = time.perf_counter()
            torch.manual_seed(settings.seed + 7919 * step + 104_729 * parallel.rank())  # dropout inside the adapter
            while True:
                try:
                    loss = accumulate(step, micro_batch, lambda loss: scaler.scale(loss).backward())
                    break
                except RuntimeError as error:
                    optimizer.zero_grad(set_to_none=True)
                    micro_batch = halve_batch(micro_batch, error)
            if not alone:
                parallel.sum_gradients(weights, share)
                loss = parallel.sum_shares(loss, share)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}: lower learning_rate"
                                         + (f" (the last good checkpoint is {checkpoint})" if checkpoint else ""))
            learning_rate = _schedule(settings, step)
            optimizer.param_groups[0]["lr"] = learning_rate
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(weights, settings.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if settings.ema_decay:
                decay = min(settings.ema_decay, (step + 1) / (step + 10))
                torch._foreach_lerp_(state["average"], [p.detach() for p in weights], 1 - decay)
            state["losses"].append(loss)
            state["seconds"] += time.perf_counter() - began
            state["step"], state["scaler"] = step + 1, scaler.state_dict()
            log({"loss": loss, "learning_rate": learning_rate}, step + 1)
            bar.update(settings.batch_size)
            if keep and step + 1 in settings.keep_steps:
                with _averaged(weights, state["average"]):
                    keep(step + 1)
            last = step + 1 == settings.steps
            if last or (step + 1) % settings.validate_every == 0:
                row = {"step": step + 1, "loss": float(np.mean(state["losses"])), "learning_rate": learning_rate}
                if not alone:
                    parallel.check_same(weights)
                with _averaged(weights, state["average"]):
                    state["history"].append({**row, **(validate(step + 1) if validate else {})})
                    if settings.patience and _is_lowest(state["history"]):
                        state["best"] = [p.detach().clone() for p in weights]
                log({key: value for key, value in state["history"][-1].items() if key.startswith("val_")}, step + 1)
                module.train()
                state["losses"] = []
                bar.set_postfix(loss=f"{row['loss']:.4f}")
            if checkpoint and first and (last or (step + 1) % settings.save_every == 0):
                _save_checkpoint(checkpoint, fingerprint, weights, optimizer, state)
    bar.close()
    close()
    _copy(weights, state["best"] or state["average"])
    module.eval()
    images = state["step"] * settings.batch_size
    return state["history"], {"seconds": state["seconds"], "images": images,
                              "images_per_second": images / max(state["seconds"], 1e-9)}


def draw_batch(latents: tuple[Tensor, Tensor], prompt_ids: Tensor, noise_scheduler: DDPMScheduler,
               settings: FitSettings, step: int) -> dict[str, Tensor]:
    """Return the batch of `step`: `latents`, `noise` (B, C, h, w), `timesteps`, `prompt_ids`, `dropped` (B,).

    Drawn on the CPU, so that a GPU sees the same batch. Where several processes share the training, each draws the whole
    batch and returns its own rows.
    """
    mean, std = latents
    rng = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    index = draw_rows(len(mean), settings, step)
    shape = (len(index), *mean.shape[1:])
    noise = torch.randn(shape, generator=rng)
    if settings.noise_offset:
        noise += settings.noise_offset * torch.randn((*shape[:2], 1, 1), generator=rng)
    return parallel.take_share({
        "latents": mean[index] + std[index] * torch.randn(shape, generator=rng),
        "noise": noise,
        "timesteps": torch.randint(noise_scheduler.config.num_train_timesteps, shape[:1], generator=rng),
        "prompt_ids": prompt_ids[index],
        "dropped": torch.rand(shape[0], generator=rng) < settings.caption_dropout,
    })


def draw_rows(count: int, settings: FitSettings, step: int) -> Tensor:
    """Return which of `count` images make the batch of `step` (B,): each epoch is a permutation, seeded, without a gap."""
    start = step * settings.batch_size
    epochs = range(start // count, (start + settings.batch_size - 1) // count + 1)
    order = torch.cat([torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed * 100_003 + epoch))
                       for epoch in epochs])
    first = start - epochs[0] * count
    return order[first:first + settings.batch_size]


def backward_batch(unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler, batch: Mapping[str, Tensor],
                   hidden_states: Tensor, empty_states: Tensor, snr_weights: Tensor, micro_batch: int,
                   mixed_precision: str = "no", backward: Callable[[Tensor], None] = Tensor.backward) -> float:
    """Add up the gradients of the denoising loss of one batch (see `draw_batch`) in micro-batches; return the loss."""
    device, total = unet.device, 0.0
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    noisy_latents = noise_scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    target = compute_target(noise_scheduler, batch["latents"], batch["noise"], batch["timesteps"])
    weight = snr_weights[batch["timesteps"]] / len(target)
    for start in range(0, len(target), micro_batch):
        part = slice(start, start + micro_batch)
        encoder_hidden_states = torch.where(batch["dropped"][part, None, None], empty_states,
                                            hidden_states[batch["prompt_ids"][part]])  # (b, L, D)
        with autocast(device, mixed_precision):
            model_pred = unet(noisy_latents[part], batch["timesteps"][part], encoder_hidden_states).sample
        error = (model_pred.float() - target[part]).square().mean(dim=(1, 2, 3))  # (B,)
        loss = (error * weight[part]).sum()
        backward(loss)
        total += loss.item()
    return total


def autocast(device: torch.device, mixed_precision: str) -> torch.autocast:
    """Return the context in which a network computes in "bf16" or "fp16"; in "no" it changes nothing."""
    known = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if mixed_precision not in known:
        raise ValueError(f"mixed_precision '{mixed_precision}' is not known: use one of {', '.join(known)}")
    return torch.autocast(device.type, known[mixed_precision], enabled=mixed_precision != "no")


def has_settled(history: Sequence[Mapping[str, float]], patience: int) -> bool:
    """Say whether for `patience` validations in a row no loss of the history (`val_loss...`, overall and per band of
    timesteps) has reached a new low. With 0, or without such losses, never."""
    names = [name for name in (history[0] if history else {}) if name.startswith("val_loss")]
    lowest = [min(range(len(history)), key=lambda row: history[row][name]) for name in names]
    return bool(patience and names) and len(history) - 1 - max(lowest) >= patience


def compute_target(noise_scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the UNet is asked for: the noise, or the velocity (Salimans & Ho 2022, section 2.4)."""
    kind = noise_scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction_type '{kind}' is not supported: use epsilon or v_prediction")


def compute_snr_weights(noise_scheduler: DDPMScheduler, snr_gamma: float | None) -> Tensor:
    """Return the loss weight of each timestep (T,): min-SNR-gamma (Hang et al. 2023, section 3.4), or ones for None."""
    alphas_cumprod = noise_scheduler.alphas_cumprod
    if snr_gamma is None:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    extra = 1 if noise_scheduler.config.prediction_type == "v_prediction" else 0
    return snr.clamp(max=snr_gamma) / (snr + extra)


@torch.inference_mode()
def compute_band_losses(unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler, latents: Tensor,
                        prompt_ids: Tensor, hidden_states: Tensor, bands: Sequence[tuple[int, int]] = BANDS,
                        draws: int = 1, batch_size: int = 128, seed: int = 0) -> Tensor:
    """Return the denoising loss (N, bands) of each image in each band of timesteps, on noise fixed by `seed`.

    `latents` (N, C, h, w) are the posterior's means. The `draws` timesteps of a band are spread evenly over it and are
    the same for all images, so that two models, or two sets of images, differ in nothing but themselves.
    """
    was_training, device = unet.training, unet.device
    unet.eval()
    losses = torch.zeros(len(latents), len(bands))
    for band, (low, high) in enumerate(bands):
        for draw in range(draws):
            timestep = int(low + (draw + 0.5) / draws * (high - low))
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed + 31 * draw + 1009 * band))
            timesteps = torch.full((len(latents),), timestep)
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            target = compute_target(noise_scheduler, latents, noise, timesteps)
            for start in range(0, len(latents), batch_size):
                part = slice(start, start + batch_size)
                states = hidden_states[prompt_ids[part]].to(device, unet.dtype)
                model_pred = unet(noisy_latents[part].to(device, unet.dtype), timesteps[part].to(device), states).sample
                error = (model_pred.float().cpu() - target[part]).square().mean(dim=(1, 2, 3))
                losses[part, band] += error / draws
    unet.train(was_training)
    return losses


def summarise_bands(losses: Tensor, bands: Sequence[tuple[int, int]] = BANDS) -> dict[str, float]:
    """Return `val_loss` and one `val_loss_<low>_<high>` per band, the means over the images of `losses` (N, bands)."""
    means = losses.mean(0)
    named = {f"val_loss_{low}_{high}": float(mean) for (low, high), mean in zip(bands, means, strict=True)}
    return {"val_loss": float(means.mean()), **named}


def fingerprint_work(module: nn.Module, tensors: Sequence[Tensor], settings: FitSettings, *extra: str) -> str:
    """Return 16 hex digits for all that decides a run: weights, tensors, settings, code, and what else is given."""
    decides = asdict(settings) | {"tracker": ""}
    return _hash(hash_weights(module), hash_code(__file__), str(decides), *[_tensor_bytes(t) for t in tensors],
                 *extra)


def halve_batch(batch_size: int, error: Exception) -> int:
    """Return half of `batch_size` and say so if `error` is a lack of memory; raise `error` if it is anything else."""
    words = str(error).lower()
    if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in words:
        raise error
    if batch_size == 1:
        raise MemoryError("not enough memory for a batch of one image: use a smaller image or model, or bf16") from error
    print(f"out of memory at {batch_size} images: going on with {batch_size // 2} at a time")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return batch_size // 2


def hash_code(*sources: str) -> str:
    """Return 16 hex digits for the source files and the libraries' versions: work kept from other code is not used."""
    versions = [metadata.version(name) for name in ("torch", "diffusers", "peft")]
    return _hash(*[Path(source).read_bytes() for source in sources], *versions)


def _read_lora_config(unet: UNet2DConditionModel) -> dict:
    """The adapter's configuration as diffusers stores it, lists sorted: sets have no order, and a file should have one.

    Without its dropout: who loads an adapter gets its layers in training mode, and would draw at random.
    """
    config = unet.peft_config["default"].to_dict() | {"lora_dropout": 0.0}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}


def _schedule(settings: FitSettings, step: int) -> float:
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.learning_rate * warmup * max(cosine, 0.01)


def _build_optimizer(weights: Sequence[Tensor], settings: FitSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    if settings.optimizer != "adamw-8bit":
        raise ValueError(f"optimizer '{settings.optimizer}' is not known: use adamw or adamw-8bit")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ImportError("optimizer adamw-8bit needs the package bitsandbytes: install it, or use adamw") from None
    return AdamW8bit(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _open_tracker(settings: FitSettings, name: str, checkpoint: Path | None) -> tuple[Callable[[dict, int], None], Callable[[], None]]:
    """Return what logs numbers of a step and what ends the log; they are written to `logs/` beside the checkpoint."""
    if not settings.tracker:
        return lambda values, step: None, lambda: None
    if settings.tracker not in ("tensorboard", "wandb"):
        raise ValueError(f"tracker '{settings.tracker}' is not known: use tensorboard or wandb")
    if importlib.util.find_spec(settings.tracker) is None:  # accelerate would go on without a word
        raise ImportError(f"tracker '{settings.tracker}' needs the package of that name: install it, or use tensorboard")
    from accelerate import Accelerator

    os.environ.setdefault("WANDB_MODE", "offline")
    folder = (checkpoint.parent if checkpoint else Path.cwd()) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(log_with=settings.tracker, project_dir=folder)
    config = {key: value if isinstance(value, int | float | str) else str(value) for key, value in asdict(settings).items()}
    accelerator.init_trackers(name.replace(" ", "-"), config)
    return lambda values, step: accelerator.log(values, step=step), accelerator.end_training


def _is_lowest(history: Sequence[Mapping[str, float]]) -> bool:
    """Say whether the last row of the history has its lowest `val_loss`."""
    return "val_loss" in history[-1] and history[-1]["val_loss"] <= min(row["val_loss"] for row in history)


@contextmanager
def _averaged(weights: Sequence[Tensor], average: Sequence[Tensor]) -> Iterator[None]:
    """Put the moving average in place of the weights for a while (nothing happens without one)."""
    current = [p.detach().clone() for p in weights] if average else []
    _copy(weights, average)
    yield
    _copy(weights, current)


def _copy(weights: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for weight, new in zip(weights, source, strict=False):
            weight.copy_(new)


def _save_checkpoint(path: Path, fingerprint: str, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer,
                     state: dict) -> None:
    with replace_when_done(path) as temporary:
        torch.save({"fingerprint": fingerprint, "weights": [p.detach() for p in weights],
                    "optimizer": optimizer.state_dict(), **state}, temporary)


def _restore(path: Path | None, fingerprint: str, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer,
             state: dict) -> None:
    if path is None or not path.exists():
        return
    kept = torch.load(path, weights_only=True, map_location=weights[0].device)
    if kept["fingerprint"] != fingerprint:
        print(f"{path.name} belongs to other settings, data or weights: starting afresh")
        return
    _copy(weights, kept["weights"])
    optimizer.load_state_dict(kept["optimizer"])
    state.update({name: kept[name] for name in state})
    print(f"resumed at step {state['step']}")


def _keep(cache: Path | None, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return `compute()`, or what an earlier call kept as `cache/name.safetensors`."""
    if cache is None:
        return compute()
    path = Path(cache) / f"{name}.safetensors"
    if not path.exists():
        with replace_when_done(path) as temporary:
            save_file(compute(), temporary)
    return load_file(path)


def _hash(*parts: bytes | str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8))
        digest.update(data)
    return digest.hexdigest()[:16]


def _tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
