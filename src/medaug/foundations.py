"""Small foundations trained from scratch: a Stable Diffusion and a CLIP of the libraries' own classes.

They stand where a downloaded SD 2 and CLIP ViT-L/14 would stand: pre-trained on *other* images with *other* words than
the study's, so that LoRA has something to teach. Every object is the library's own and loads with `from_pretrained`.
"""

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
)

from medaug.phantom import chest, cohort, tissue
from medaug.runtime import progress, replace_when_done

MAX_TOKENS = 32
NO_CLASS = 10 / 9  # the tissue's difficulty at which its classes' traits are all at their common mean
# Below and above the median. Short: to a tokenizer that learned other words a letter can be a token, and 32 are read.
TISSUE_WORDS = {"haematoxylin": ("pale", "dark"), "eosin": ("faint", "pink"), "contrast": ("soft", "hard"),
                "gaps": ("whole", "torn")}


def build_tokenizer(texts: Iterable[str], vocab_size: int = 600) -> CLIPTokenizer:
    """Return a byte-pair `CLIPTokenizer` trained on `texts`; unseen words fall apart into known pieces."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,-()/+")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, end_of_word_suffix="</w>",
                                  special_tokens=["<|startoftext|>", "<|endoftext|>"], show_progress=False)
    # Each letter alone, so that every letter exists as the end of a word too and no word is unknown.
    bpe.train_from_iterator([*texts, *(" ".join(alphabet) for _ in range(3))], trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in trained["merges"]]
    # The trainer numbers single letters in the order of a hash table; numbered anew, equal texts give equal tokens.
    special, joined = ["<|startoftext|>", "<|endoftext|>"], ["".join(merge) for merge in merges]
    letters = sorted(set(trained["vocab"]) - {*special, *joined})
    vocab = {token: number for number, token in enumerate(dict.fromkeys([*special, *letters, *joined]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_clip(tokenizer: CLIPTokenizer, image_size: int = 64, patch_size: int = 8) -> CLIPModel:
    """Return an untrained small `CLIPModel` (about 3 M parameters) for grey images repeated to three channels."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    text = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": MAX_TOKENS, "projection_dim": 128, **ends}
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6,
              "image_size": image_size, "patch_size": patch_size, "projection_dim": 128}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def build_image_processor(image_size: int = 64) -> CLIPImageProcessor:
    """Return the processor that belongs to `build_clip`: (N, H, W, 3) uint8 -> pixel_values in about -2..2."""
    side = {"shortest_edge": image_size}
    crop = {"height": image_size, "width": image_size}
    return CLIPImageProcessor(size=side, crop_size=crop, image_mean=[0.5] * 3, image_std=[0.25] * 3)


def build_vae(image_size: int = 64) -> AutoencoderKL:
    """Return an untrained small `AutoencoderKL`: (B, 3, H, W) in -1..1 -> (B, 16, H/8, W/8) latents."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, sample_size=image_size, layers_per_block=1,
        block_out_channels=(16, 32, 64, 128), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


def build_unet(latent_size: int = 8) -> UNet2DConditionModel:
    """Return an untrained small `UNet2DConditionModel` (about 4 M parameters) on (B, 16, 8, 8) latents."""
    return UNet2DConditionModel(
        sample_size=latent_size, in_channels=16, out_channels=16, layers_per_block=1, block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)


def build_noise_scheduler() -> DDPMScheduler:
    """Return Stable Diffusion 2's training schedule: 1,000 steps, scaled-linear betas, v-prediction."""
    return DDPMScheduler(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         prediction_type="v_prediction", clip_sample=False)


def to_pixel_values(images_u8: np.ndarray | Tensor) -> Tensor:
    """(B, H, W) grey or (B, H, W, 3) RGB uint8 -> (B, 3, H, W) float32 in -1..1, as Stable Diffusion's VAE expects."""
    return _to_channels(torch.as_tensor(images_u8).float() / 127.5 - 1.0)


def compute_vae_loss(vae: AutoencoderKL, images_u8: np.ndarray | Tensor, kl_weight: float = 1e-6) -> Tensor:
    """Return 10 * squared error + L1 of image gradients (keeps edges sharp without a discriminator) + `kl_weight` * KL.

    After Rombach et al. 2022, section 3.1, whose perceptual and adversarial terms need larger networks. In short runs
    the squared error converges faster than L1; with ten times this `kl_weight` the latents stay mostly noise.
    """
    pixel_values = to_pixel_values(images_u8)
    posterior = vae.encode(pixel_values).latent_dist
    reconstruction = vae.decode(posterior.sample()).sample
    error = reconstruction - pixel_values
    error = error.mean(1) if images_u8.ndim == 3 else error  # grey: the three channels are one image
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return 10 * error.square().mean() + edges + kl_weight * posterior.kl().mean()


def compute_clip_loss(clip: CLIPModel, pixel_values: Tensor, tokens: dict[str, Tensor], same: Tensor) -> Tensor:
    """Return the symmetric contrastive loss; `same` (B, B) marks pairs that share a caption and all count as positive.

    Radford et al. 2021, section 2.3; shared captions as in supervised contrastive learning (Khosla et al. 2020).
    """
    logits = clip(pixel_values=pixel_values, **tokens).logits_per_image  # (B, B)
    target = same.float() / same.float().sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def compute_denoising_loss(unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler, latents: Tensor,
                           encoder_hidden_states: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean squared error of the v-prediction (Salimans & Ho 2022) on freshly drawn noise and timesteps."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, latents.shape[:1], generator=generator,
                              device=latents.device)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    target = noise_scheduler.get_velocity(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
    return F.mse_loss(model_pred, target)


def fit(module: nn.Module, compute_loss: Callable[[nn.Module, int], Tensor], steps: int, learning_rate: float,
        checkpoint: Path, desc: str, ema_decay: float = 0.999, save_every: int = 250) -> tuple[nn.Module, list[dict]]:
    """Train `module` for `steps` optimiser steps; return its exponential moving average and the loss history.

    `compute_loss(module, step)` draws its own batch from `step` alone, so a run resumed from `checkpoint` sees what an
    undisturbed run sees. AdamW, linear warm-up, cosine decay, gradients clipped at norm 1. Raises FloatingPointError on
    a loss that is not finite; the last checkpoint stays.
    """
    device = next(module.parameters()).device
    average = copy.deepcopy(module).requires_grad_(False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.01)
    start, history = 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        module.load_state_dict(state["module"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, history = state["step"], state["history"]
    bar = progress(desc=desc, total=steps, unit="step")
    bar.update(start)
    running = []
    for step in range(start, steps):
        warmup = min(1.0, (step + 1) / 200)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * max(decay, 0.01)
        loss = compute_loss(module, step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{desc}: loss is {loss.item()} at step {step}; lower the learning rate and resume")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            weight = 1 - min(ema_decay, (step + 1) / (step + 10))
            for kept, new in zip(average.parameters(), module.parameters(), strict=True):
                kept.lerp_(new, weight)
        running.append(loss.item())
        bar.update()
        if (step + 1) % save_every == 0 or step + 1 == steps:
            history.append({"step": step + 1, "loss": float(np.mean(running))})
            running = []
            bar.set_postfix(loss=f"{history[-1]['loss']:.4f}")
            with replace_when_done(checkpoint) as temporary:
                torch.save({"module": module.state_dict(), "average": average.state_dict(), "history": history,
                            "optimizer": optimizer.state_dict(), "step": step + 1}, temporary)
    bar.close()
    return average.eval(), history


def draw_batch(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Return `batch_size` indices below `count` that depend on (`seed`, `step`) alone."""
    return np.random.default_rng((seed, step)).integers(0, count, batch_size)


@torch.no_grad()
def encode_dataset(vae: AutoencoderKL, images_u8: np.ndarray, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Return the posterior's mean and standard deviation, each (N, 16, h, w), of all images (N, H, W) uint8."""
    means, stds = [], []
    device = next(vae.parameters()).device
    for start in progress(range(0, len(images_u8), batch_size), desc="encode", unit="batch"):
        posterior = vae.encode(to_pixel_values(images_u8[start:start + batch_size]).to(device)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return torch.cat(means), torch.cat(stds)


@torch.no_grad()
def encode_captions(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, captions: Sequence[str],
                    batch_size: int = 512) -> Tensor:
    """Return the text encoder's last hidden states (N, 32, 128)."""
    states = []
    for start in range(0, len(captions), batch_size):
        tokens = tokenizer(list(captions[start:start + batch_size]), padding="max_length", truncation=True,
                           max_length=MAX_TOKENS, return_tensors="pt")
        states.append(text_encoder(tokens.input_ids.to(text_encoder.device)).last_hidden_state)
    return torch.cat(states)


def save_pipeline(folder: Path, vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel,
                  tokenizer: CLIPTokenizer, noise_scheduler: DDPMScheduler) -> StableDiffusionPipeline:
    """Save a `StableDiffusionPipeline` with fp16 safetensors (the float32 objects given stay as they are)."""
    scheduler = DDIMScheduler.from_config(noise_scheduler.config, set_alpha_to_one=False, steps_offset=1)
    parts = [copy.deepcopy(part).to(torch.float16) for part in (vae, unet, text_encoder)]
    pipe = StableDiffusionPipeline(vae=parts[0], unet=parts[1], text_encoder=parts[2], tokenizer=tokenizer,
                                   scheduler=scheduler, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)
    pipe.save_pretrained(folder, safe_serialization=True)
    return pipe


def save_clip(folder: Path, clip: CLIPModel, tokenizer: CLIPTokenizer, image_size: int = 64) -> None:
    """Save the `CLIPModel` (fp16 safetensors) with its processor, so that `CLIPProcessor.from_pretrained` loads it."""
    copy.deepcopy(clip).to(torch.float16).save_pretrained(folder)
    CLIPProcessor(build_image_processor(image_size), tokenizer).save_pretrained(folder)


def render_films(n: int, image_size: int, seed: int, cache: Path) -> tuple[np.ndarray, list[str]]:
    """Return n generic simulated films (N, H, W) uint8 and their captions; rendered once, then read from `cache`."""
    rows = cohort.draw_generic(n, seed)
    kept = cache / f"films-{n}-{image_size}-{seed}.npy"
    if not kept.exists():
        films = chest.render(rows["patient_seed"], rows["image_seed"], rows["rendered_label"], size=image_size,
                             show_progress=True)["image_u8"]
        with replace_when_done(kept) as temporary, open(temporary, "wb") as file:
            np.save(file, films)
    return np.load(kept), rows["caption"].tolist()


def render_tissue(n: int, image_size: int, seed: int, cache: Path, field: float = tissue.FIELD) -> tuple[np.ndarray, list[str]]:
    """Return n generic simulated H&E patches (N, H, W, 3) uint8, `field` micrometres wide, and their captions; rendered once,
    then read from `cache`.

    Their nuclei have the mean of the three lymphomas' traits, so no class is shown; a caption names stains and section.
    """
    rng = np.random.default_rng([6, seed])
    patients, shots = cohort.draw_seeds(rng, n), cohort.draw_seeds(rng, n)
    kept = cache / f"tissue-{n}-{image_size}-{seed}-{field:g}um.npy"
    if not kept.exists():
        labels = np.resize(np.asarray(tissue.CLASSES, dtype=object), n)
        patches = tissue.render(patients, shots, labels, image_size, NO_CLASS, show_progress=True, field=field)["image_u8"]
        with replace_when_done(kept) as temporary, open(temporary, "wb") as file:
            np.save(file, patches)
    drawn, _ = tissue.draw_parameters(patients, shots)
    ranges = tissue.SLIDE | tissue.IMAGE
    above = {name: (drawn[name].flatten() > sum(ranges[name]) / 2).tolist() for name in TISSUE_WORDS}
    words = [", ".join(TISSUE_WORDS[name][above[name][row]] for name in TISSUE_WORDS) for row in range(n)]
    return np.load(kept), [f"tissue, {found}" for found in words]


def train_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, images_u8: np.ndarray, captions: Sequence[str], *, steps: int,
               batch_size: int, learning_rate: float, seed: int, checkpoint: Path,
               mixed_precision: bool = True) -> tuple[CLIPModel, list[dict]]:
    """Train both towers on images (N, H, W) or (N, H, W, 3) uint8 and their captions; return the averaged model and the history."""
    tokens, caption_ids = _tokenize_unique(tokenizer, captions)
    clip.set_attn_implementation("eager")  # on a CPU the fused attention's bfloat16 backward is the slower one

    def compute_loss(model: CLIPModel, step: int) -> Tensor:
        chosen = draw_batch(len(images_u8), batch_size, step, seed)
        ids = caption_ids[chosen]
        pixel_values = _to_clip_pixels(images_u8[chosen]).to(model.device)
        batch = {name: value[ids].to(model.device) for name, value in tokens.items()}
        same = torch.as_tensor(ids[:, None] == ids[None, :], device=model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_precision):
            return compute_clip_loss(model, pixel_values, batch, same)

    return fit(clip, compute_loss, steps, learning_rate, checkpoint, "CLIP")


def train_vae(vae: AutoencoderKL, images_u8: np.ndarray, *, steps: int, batch_size: int, learning_rate: float, seed: int,
              checkpoint: Path, mixed_precision: bool = True) -> tuple[AutoencoderKL, list[dict]]:
    """Train the autoencoder on images (N, H, W) or (N, H, W, 3) uint8; return the averaged model and the history."""
    vae = vae.to(memory_format=torch.channels_last)  # 1.3 times as fast as the default layout on two cores

    def compute_loss(model: AutoencoderKL, step: int) -> Tensor:
        torch.manual_seed(seed * 1_000_003 + step)  # the posterior's sample draws from the global generator
        batch = torch.as_tensor(images_u8[draw_batch(len(images_u8), batch_size, step, seed)]).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed_precision):
            return compute_vae_loss(model, batch)

    return fit(vae, compute_loss, steps, learning_rate, checkpoint, "autoencoder")


def train_denoiser(unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
                   noise_scheduler: DDPMScheduler, images_u8: np.ndarray, captions: Sequence[str], *, steps: int,
                   batch_size: int, learning_rate: float, caption_dropout: float, seed: int,
                   checkpoint: Path) -> tuple[UNet2DConditionModel, list[dict]]:
    """Train the denoiser on cached latents and caption states; return the averaged model and the history."""
    means, stds = encode_dataset(vae, images_u8)
    unique = sorted(set(captions))
    states = encode_captions(text_encoder, tokenizer, [*unique, ""])  # (U + 1, 32, 128); the last one is "no caption"
    position = {caption: index for index, caption in enumerate(unique)}
    caption_ids = np.array([position[caption] for caption in captions])

    def compute_loss(model: UNet2DConditionModel, step: int) -> Tensor:
        generator = torch.Generator(means.device).manual_seed(seed * 1_000_003 + step)
        chosen = draw_batch(len(images_u8), batch_size, step, seed)
        latents = means[chosen] + stds[chosen] * torch.randn(means[chosen].shape, generator=generator, device=means.device)
        dropped = np.random.default_rng((seed, step, 1)).random(batch_size) < caption_dropout
        ids = np.where(dropped, len(unique), caption_ids[chosen])
        return compute_denoising_loss(model, noise_scheduler, latents * vae.config.scaling_factor, states[ids], generator)

    return fit(unet, compute_loss, steps, learning_rate, checkpoint, "denoiser")


@torch.no_grad()
def score_retrieval(clip: CLIPModel, tokenizer: CLIPTokenizer, images_u8: np.ndarray,
                    captions: Sequence[str]) -> dict[str, float]:
    """Return the share of films whose own caption ranks first (`top1`) or in the first five (`top5`) of all captions."""
    tokens, caption_ids = _tokenize_unique(tokenizer, captions)
    tokens = {name: value.to(clip.device) for name, value in tokens.items()}
    logits = clip(pixel_values=_to_clip_pixels(images_u8).to(clip.device), **tokens).logits_per_image.cpu()  # (N, U)
    own = logits.gather(1, torch.as_tensor(caption_ids)[:, None])
    rank = (logits > own).sum(1)
    return {"n": len(captions), "chance": 1 / logits.shape[1], "top1": (rank < 1).float().mean().item(),
            "top5": (rank < 5).float().mean().item()}


def compute_psnr(images_u8: np.ndarray, reconstructed_u8: np.ndarray) -> np.ndarray:
    """Return the peak signal-to-noise ratio (N,) in decibels of 8-bit images (N, H, W) or (N, H, W, 3)."""
    error = ((images_u8.astype(np.float64) - reconstructed_u8) ** 2).reshape(len(images_u8), -1)
    return 10 * np.log10(255**2 / np.maximum(error.mean(1), 1e-9))


def compute_scaling_factor(vae: AutoencoderKL, images_u8: np.ndarray) -> float:
    """Return 1 / standard deviation of the latents, which brings them to unit variance (Rombach et al. 2022, G.1)."""
    mean, std = encode_dataset(vae, images_u8)
    return float(1 / (mean.var() + (std**2).mean()).sqrt())


def sample_films(folder: Path, prompts: Sequence[str], seed: int = 0, num_inference_steps: int = 25,
                 guidance_scale: float = 2.0, device: str = "cpu", mode: str = "L") -> np.ndarray:
    """Load the pipeline in `folder` as anyone would and draw an image a prompt: (N, H, W) uint8, or RGB (N, H, W, 3)."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.vae.config.sample_size
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    images = pipe(list(prompts), height=size, width=size, num_inference_steps=num_inference_steps,
                  guidance_scale=guidance_scale, generator=generators, output_type="np").images  # (N, H, W, 3) in 0..1
    return ((images.mean(-1) if mode == "L" else images) * 255).round().astype(np.uint8)


def write_cards(output_dir: Path, source: str, scores: Sequence[dict], n_images: int, image_size: int) -> None:
    """Write a model card (README.md) with the measured `scores` (rows: part, parameters, steps, score) into each folder."""
    lines = ["| part | parameters | steps | measured on held-out images |", "|---|---|---|---|"]
    lines += [f"| {row['part']} | {row['parameters']:,} | {row['steps']:,} | {row['score']} |" for row in scores]
    for name, title in (("sd", "Small Stable Diffusion"), ("clip", "Small CLIP")):
        text = f"""# {title} ({source})

Trained from scratch by `notebooks/00-foundations.ipynb` on {n_images:,} images of {image_size} px
(source: `{source}`), none of which shows a class of the study. It stands where a downloaded foundation model would
stand, at a size that two cores can tune. Weights are stored in half precision; load them in float32 on a CPU.

{chr(10).join(lines)}

**Meant for** the embedded study of this project and its tests. **Not meant for** anything clinical: this is research
software and no diagnostic device. **Limits:** small, trained briefly, blind to anything its training images do not show.
"""
        (output_dir / name / "README.md").write_text(text, encoding="utf-8")


def _to_clip_pixels(images_u8: np.ndarray) -> Tensor:
    # The same arithmetic as `build_image_processor` on images that already have the right size.
    return _to_channels((torch.as_tensor(images_u8).float() / 255 - 0.5) / 0.25)


def _to_channels(images: Tensor) -> Tensor:
    """(B, H, W) or (B, H, W, 3) -> (B, 3, H, W)."""
    return images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)


def _tokenize_unique(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> tuple[dict[str, Tensor], np.ndarray]:
    unique = sorted(set(captions))
    position = {caption: index for index, caption in enumerate(unique)}
    tokens = tokenizer(unique, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    ids = np.array([position[caption] for caption in captions])
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}, ids
