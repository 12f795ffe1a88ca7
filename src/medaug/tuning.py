"""Other ways to tune a Stable Diffusion than a plain LoRA: the loop of `medaug.diffusion`, with another loss or other weights.

Full fine-tuning, textual inversion and DreamBooth's prior start from the untuned base; consistency distillation (4 steps in
place of 10 to 50), the reward of a classifier and the autoencoder's own decoder go on from a tuned model. What is learned is
saved in diffusers' formats.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from medaug import diffusion, parallel
from medaug.diffusion import (
    FitSettings,
    autocast,
    backward_batch,
    draw_batch,
    fingerprint_work,
    fit_weights,
    hash_code,
)
from medaug.runtime import replace_when_done

METHODS = ("lora", "full", "textual-inversion", "dreambooth", "lcm", "reward", "decoder")
GO_ON = ("lcm", "reward", "decoder")  # start from a tuned model, the others from the untuned base


@dataclass(frozen=True)
class Lesson:
    """What a generator learns from; image i has the caption `prompts[prompt_ids[i]]`."""

    latents: tuple[Tensor, Tensor]  # mean and std, each (N, C, h, w)
    prompt_ids: Tensor  # (N,)
    prompts: Sequence[str]  # (P,)
    negative_prompt: str = ""  # what a dropped caption becomes


def fit_captioned(pipe: StableDiffusionPipeline, lesson: Lesson, settings: FitSettings, checkpoint: Path | None = None,
                  validate: Callable[[UNet2DConditionModel, int], dict] | None = None,
                  keep: Callable[[UNet2DConditionModel, int], object] | None = None) -> tuple[list[dict], dict]:
    """Train what is trainable in `pipe.unet` with the denoising loss: an adapter, or (`requires_grad_`) every weight.

    `validate` and `keep` as in `diffusion.fit_lora`.
    """
    states = diffusion.encode_prompts(pipe, [*lesson.prompts, lesson.negative_prompt])
    return diffusion.fit_lora(pipe.unet, _noise_scheduler(pipe), lesson.latents, lesson.prompt_ids, states[:-1], states[-1],
                              settings, checkpoint, validate, keep)


def add_prior(lesson: Lesson, latents: tuple[Tensor, Tensor], prompt: str) -> Lesson:
    """Return `lesson` with images of the untuned base, `latents` (M, C, h, w), under a general `prompt` mixed in.

    DreamBooth's prior preservation (Ruiz et al. 2023, section 3.2): what the base draws for the general words stays in
    the lesson, so that it is not forgotten while the special words are learned. Images are drawn from the whole lesson,
    so the weight of the prior's loss (lambda in eq. 2) is M / N.
    """
    both = tuple(torch.cat(pair) for pair in zip(lesson.latents, latents, strict=True))
    prior_ids = torch.full((len(latents[0]),), len(lesson.prompts))
    return replace(lesson, latents=both, prompt_ids=torch.cat([lesson.prompt_ids, prior_ids]),
                   prompts=[*lesson.prompts, prompt])


def add_placeholders(pipe: StableDiffusionPipeline, prompts: Mapping[str, str]) -> dict[str, str]:
    """Put a new word, `<class>`, in place of the words in which a class's prompt differs from the others; return the prompts.

    The new word stands for as many vectors as the words had and starts as a copy of them, so that at first it says exactly
    the same. Raises ValueError where a prompt has no words of its own.
    """
    shared = os.path.commonprefix([f"{prompt} " for prompt in prompts.values()]) if len(prompts) > 1 else ""
    shared = shared[:shared.rfind(" ") + 1]  # whole words only
    own = {label: prompt[len(shared):].strip() for label, prompt in prompts.items()}
    for label, words in own.items():
        if not words:
            raise ValueError(f"textual inversion: the prompt of class '{label}' has no words of its own: '{prompts[label]}'")
    placeholders = {label: f"<{re.sub('[^a-z0-9]+', '-', label.lower()).strip('-')}>" for label in prompts}
    for label, words in own.items():
        token_ids = pipe.tokenizer(words, add_special_tokens=False).input_ids
        vectors = pipe.text_encoder.get_input_embeddings().weight.detach()[token_ids].clone()
        pipe.load_textual_inversion(vectors, token=placeholders[label])
    return {label: shared + word for label, word in placeholders.items()}


def fit_inversion(pipe: StableDiffusionPipeline, lesson: Lesson, settings: FitSettings, checkpoint: Path | None = None,
                  validate: Callable[[int], dict] | None = None) -> tuple[list[dict], dict]:
    """Textual inversion (Gal et al. 2022, section 3): learn the vectors of the placeholders in `lesson.prompts`, all else frozen.

    Make the placeholders with `add_placeholders`. The latents are cached as ever; the text encoder runs at each step, once
    for each prompt (not for each image). The learned vectors are in the text encoder when `validate(step)` is called.
    """
    unet, text_encoder, noise_scheduler = pipe.unet, pipe.text_encoder, _noise_scheduler(pipe)
    unet.eval().requires_grad_(False)
    text_encoder.requires_grad_(False)
    table = text_encoder.get_input_embeddings().weight  # (V, D)
    name = next(name for name, weight in text_encoder.named_parameters() if weight is table)
    ids = torch.tensor(_placeholder_ids(pipe), device=table.device)
    learned = nn.Embedding(len(ids), table.shape[1]).to(table.device)
    learned.weight.data.copy_(table.detach()[ids])
    texts = [pipe.maybe_convert_prompt(prompt, pipe.tokenizer) for prompt in lesson.prompts]
    tokens = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(table.device)
    empty_states = diffusion.encode_prompts(pipe, [lesson.negative_prompt])[0].to(table.device)
    snr_weights = diffusion.compute_snr_weights(noise_scheduler, settings.snr_gamma).to(table.device)

    def accumulate(step: int, micro_batch: int, backward: Callable[[Tensor], None]) -> float:
        vectors = table.index_copy(0, ids, learned.weight.to(table.dtype))
        hidden_states = functional_call(text_encoder, {name: vectors}, (tokens,)).last_hidden_state  # (P, L, D)
        leaf = hidden_states.detach().requires_grad_()  # collects over the micro-batches what the text encoder gets at once
        batch = draw_batch(lesson.latents, lesson.prompt_ids, noise_scheduler, settings, step)
        loss = backward_batch(unet, noise_scheduler, batch, leaf, empty_states, snr_weights, micro_batch,
                              settings.mixed_precision, backward)
        hidden_states.backward(leaf.grad)
        return loss

    def write() -> None:
        with torch.no_grad():
            table[ids] = learned.weight.to(table.dtype)

    def validate_written(step: int) -> dict:
        write()
        return validate(step)

    content = [*lesson.latents, lesson.prompt_ids, tokens, table, empty_states]
    fingerprint = fingerprint_work(unet, content, settings, hash_code(__file__))
    outcome = fit_weights(learned, accumulate, settings, fingerprint, checkpoint, validate and validate_written,
                          "textual inversion")
    write()
    return outcome


def fit_lcm(pipe: StableDiffusionPipeline, lesson: Lesson, settings: FitSettings, checkpoint: Path | None = None,
            guidance_scale: float = 1.0, solver_steps: int = 50, huber: float = 1e-3) -> tuple[list[dict], dict]:
    """Latent consistency distillation into the adapter of `pipe.unet` (Luo et al. 2023, algorithm 1; LCM-LoRA: 2311.05556).

    The teacher is the UNet without its adapter, so put a fresh adapter on a tuned model. The student learns to name, from
    any point of the teacher's path, the same end: what it says at one of `solver_steps` points must equal what it says
    (without gradient) one DDIM step of the teacher further on. `guidance_scale`, as in diffusers, is built in; sample with
    1 afterwards. The loss is pseudo-Huber with constant `huber`.
    """
    unet, noise_scheduler = pipe.unet, _noise_scheduler(pipe)
    consistency = LCMScheduler.from_config(noise_scheduler.config)
    states = diffusion.encode_prompts(pipe, [*lesson.prompts, lesson.negative_prompt]).to(unet.device)
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(unet.device)
    stride = len(alphas_cumprod) // solver_steps

    def predict(z: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(unet.device, settings.mixed_precision):
            model_pred = unet(z, t, encoder_hidden_states).sample
        return split_prediction(noise_scheduler, model_pred.float(), z, t)

    def name_end(z: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        c_skip, c_out = (c[:, None, None, None] for c in consistency.get_scalings_for_boundary_condition_discrete(t))
        return c_skip * z + c_out * predict(z, t, encoder_hidden_states)[0]

    @torch.no_grad()
    def step_teacher(z: Tensor, t: Tensor, t_next: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        with _without_adapter(unet):
            x0, eps = predict(z, t, encoder_hidden_states)
            if guidance_scale > 1:
                plain = predict(z, t, states[-1].expand_as(encoder_hidden_states))
                x0, eps = (base + guidance_scale * (own - base) for base, own in zip(plain, (x0, eps), strict=True))
        alpha = alphas_cumprod[t_next][:, None, None, None]
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps  # DDIM (Song et al. 2021, eq. 12, without noise)

    def accumulate(step: int, micro_batch: int, backward: Callable[[Tensor], None]) -> float:
        batch = draw_batch(lesson.latents, lesson.prompt_ids, noise_scheduler, settings, step)
        batch = {name: tensor.to(unet.device) for name, tensor in batch.items()}
        t = (batch["timesteps"] // stride + 1).clamp(max=solver_steps) * stride - 1
        t_next, total = (t - stride).clamp(min=0), 0.0
        z = noise_scheduler.add_noise(batch["latents"], batch["noise"], t)
        for start in range(0, len(t), micro_batch):
            part = slice(start, start + micro_batch)
            encoder_hidden_states = states[batch["prompt_ids"][part]]  # (b, L, D)
            z_next = step_teacher(z[part], t[part], t_next[part], encoder_hidden_states)
            with torch.no_grad():
                target = name_end(z_next, t_next[part], encoder_hidden_states)
            gap = name_end(z[part], t[part], encoder_hidden_states) - target
            loss = ((gap.square() + huber**2).sqrt() - huber).mean(dim=(1, 2, 3)).sum() / len(t)
            backward(loss)
            total += loss.item()
        return total

    content = [*lesson.latents, lesson.prompt_ids, states]
    fingerprint = fingerprint_work(unet, content, settings, hash_code(__file__), f"{guidance_scale} {solver_steps} {huber}")
    return fit_weights(unet, accumulate, settings, fingerprint, checkpoint, name="LCM")


def fit_reward(pipe: StableDiffusionPipeline, lesson: Lesson, settings: FitSettings,
               reward: Callable[[Tensor, Tensor], Tensor], checkpoint: Path | None = None, num_inference_steps: int = 10,
               gradient_steps: int = 1, anchor: float = 1.0, name: str = "") -> tuple[list[dict], dict]:
    """Raise `reward(image_01, prompt_ids)` of the images that are drawn, through the last `gradient_steps` of sampling.

    AlignProp (Prabhudesai et al. 2023) and DRaFT-K (Clark et al. 2023, section 4): `reward` maps images (B, 3, H, W) in 0-1
    and the rows of their prompts (B,) to (B,) and must be differentiable. A reward alone is soon cheated with pictures that
    only it likes, so the denoising loss on the lesson's images, times `anchor`, holds the model to what is real. `name`
    stands for the reward where a checkpoint is compared. The history's `loss` is the sum of both.
    """
    unet, vae, noise_scheduler = pipe.unet, pipe.vae, _noise_scheduler(pipe)
    vae.requires_grad_(False)
    states = diffusion.encode_prompts(pipe, [*lesson.prompts, lesson.negative_prompt]).to(unet.device)
    snr_weights = diffusion.compute_snr_weights(noise_scheduler, settings.snr_gamma).to(unet.device)

    def accumulate(step: int, micro_batch: int, backward: Callable[[Tensor], None]) -> float:
        batch = draw_batch(lesson.latents, lesson.prompt_ids, noise_scheduler, settings, step)
        total, size = 0.0, len(batch["noise"])
        if anchor:
            total = backward_batch(unet, noise_scheduler, batch, states[:-1], states[-1], snr_weights * anchor, micro_batch,
                                   settings.mixed_precision, backward)
        for start in range(0, size, micro_batch):
            part = slice(start, start + micro_batch)
            prompt_ids = batch["prompt_ids"][part].to(unet.device)
            with autocast(unet.device, settings.mixed_precision):
                image_01 = draw_images(pipe, batch["noise"][part].to(unet.device), states[prompt_ids], num_inference_steps,
                                       gradient_steps)
            loss = -reward(image_01.float(), prompt_ids).sum() / size
            backward(loss)
            total += loss.item()
        return total

    content = [*lesson.latents, lesson.prompt_ids, states]
    extra = f"{num_inference_steps} {gradient_steps} {anchor} {name}"
    fingerprint = fingerprint_work(unet, content, settings, hash_code(__file__), extra)
    return fit_weights(unet, accumulate, settings, fingerprint, checkpoint, name="reward")


def fit_decoder(vae: AutoencoderKL, images_u8: np.ndarray, latents: Tensor, settings: FitSettings,
                checkpoint: Path | None = None) -> tuple[list[dict], dict]:
    """Teach the decoder of `vae` to give training images back, its encoder left as it is, so that latents keep their meaning.

    What the autoencoder loses, no generator on it can draw; a domain whose signs it has never seen loses most. `images_u8`
    is (N, H, W) or (N, H, W, 3) uint8, `latents` (N, C, h, w) the posteriors' means (`diffusion.encode_latents`). As for
    Stability AI's `sd-vae-ft-mse` the loss is the squared error, here alone: a perceptual one would bring its network's taste.
    """
    vae.requires_grad_(False)
    trained = [part for part in (vae.decoder, vae.post_quant_conv) if part is not None]
    for part in trained:
        part.requires_grad_(True)

    def accumulate(step: int, micro_batch: int, backward: Callable[[Tensor], None]) -> float:
        rows, total = parallel.take_share({"rows": diffusion.draw_rows(len(latents), settings, step)})["rows"], 0.0
        for part in rows.split(micro_batch):
            target = diffusion.to_pixel_values(images_u8[part.numpy()]).to(vae.device)  # (b, 3, H, W) in -1..1
            with autocast(vae.device, settings.mixed_precision):
                decoded = vae.decode(latents[part].to(vae.device) / vae.config.scaling_factor).sample
            loss = (decoded.float() - target).square().mean(dim=(1, 2, 3)).sum() / len(rows)
            backward(loss)
            total += loss.item()
        return total

    content = [latents, torch.from_numpy(np.ascontiguousarray(images_u8))]
    fingerprint = fingerprint_work(vae, content, settings, hash_code(__file__))
    return fit_weights(vae, accumulate, settings, fingerprint, checkpoint, name="decoder")


def draw_images(pipe: StableDiffusionPipeline, noise: Tensor, encoder_hidden_states: Tensor, num_inference_steps: int,
                gradient_steps: int = 0) -> Tensor:
    """Return the images (B, 3, H, W) in 0-1 that DDIM makes of `noise` (B, C, h, w), with the last steps' gradient."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    latents, first = noise * scheduler.init_noise_sigma, num_inference_steps - gradient_steps
    for number, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(number >= first and torch.is_grad_enabled()):
            model_pred = pipe.unet(scheduler.scale_model_input(latents, t), t, encoder_hidden_states).sample
            latents = scheduler.step(model_pred, t, latents).prev_sample
    return (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def split_prediction(noise_scheduler: DDPMScheduler, model_pred: Tensor, noisy_latents: Tensor, timesteps: Tensor,
                     ) -> tuple[Tensor, Tensor]:
    """Return the clean latents and the noise, each (B, C, h, w), that `model_pred` stands for (noise or velocity)."""
    alpha = noise_scheduler.alphas_cumprod.to(model_pred.device)[timesteps][:, None, None, None]
    a, s = alpha.sqrt(), (1 - alpha).sqrt()
    if noise_scheduler.config.prediction_type == "epsilon":
        return (noisy_latents - s * model_pred) / a, model_pred
    return a * noisy_latents - s * model_pred, a * model_pred + s * noisy_latents  # Salimans & Ho 2022, section 2.4


def save_generator(pipe: StableDiffusionPipeline, method: str, folder: Path) -> Path:
    """Write to `folder` what `method` has changed in `pipe`, in diffusers' own formats; return the folder.

    An adapter (see `diffusion.save_lora`), the whole UNet, the whole autoencoder, or one file of vectors for each
    placeholder; `generation.load_generator` and a plain pipeline read all four.
    """
    if method in ("full", "decoder"):
        (pipe.unet if method == "full" else pipe.vae).save_pretrained(folder, safe_serialization=True)
    elif method == "textual-inversion":
        table = pipe.text_encoder.get_input_embeddings().weight.detach()
        for word, ids in _list_placeholders(pipe).items():
            with replace_when_done(Path(folder) / f"{word.strip('<>')}.safetensors") as temporary:
                save_file({word: table[ids].float().contiguous().cpu()}, temporary)
    else:
        diffusion.save_lora(pipe.unet, folder)
    return Path(folder)


def count_vectors(pipe: StableDiffusionPipeline) -> int:
    """Return how many numbers the placeholders in `pipe` hold: what textual inversion trains."""
    return len(_placeholder_ids(pipe)) * pipe.text_encoder.get_input_embeddings().weight.shape[1]


@contextmanager
def _without_adapter(unet: UNet2DConditionModel) -> Iterator[None]:
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def _noise_scheduler(pipe: StableDiffusionPipeline) -> DDPMScheduler:
    return DDPMScheduler.from_config(pipe.scheduler.config)


def _list_placeholders(pipe: StableDiffusionPipeline) -> dict[str, list[int]]:
    """Rows of the embedding table of each placeholder: `<word>` and, for the vectors after its first, `<word>_1` ..."""
    found: dict[str, list[int]] = {}
    for word, row in sorted(pipe.tokenizer.get_added_vocab().items(), key=lambda pair: pair[1]):
        match = re.fullmatch(r"(<[a-z0-9-]+>)(_\d+)?", word)
        if match:
            found.setdefault(match.group(1), []).append(row)
    return found


def _placeholder_ids(pipe: StableDiffusionPipeline) -> list[int]:
    rows = [row for ids in _list_placeholders(pipe).values() for row in ids]
    if not rows:
        raise ValueError("textual inversion: the tokenizer has no placeholder: call add_placeholders first")
    return rows
