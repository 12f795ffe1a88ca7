"""Sample a Stable Diffusion pipeline into files: seeded per image, batched, resumable, with their provenance.

Image i of class c and generator seed s has its own noise, drawn from (s, c, i) alone (and the fold, where there are folds),
and nothing else is random. So any image can be made again alone. Sums in another batch size round differently: the pixels
then agree to about one grey level; with the batches fixed by index, as here, a resumed run writes the same bytes.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from PIL import Image, PngImagePlugin
from torch import Tensor

from medaug import diffusion
from medaug.diffusion import halve_batch, hash_code, hash_weights, load_pipeline
from medaug.runtime import progress, replace_when_done, save_json

# All chance comes from each image's own seed. The first three are deterministic: it decides the first noise only. The others
# add new noise at each step, from the same seed; the last is for distilled models.
SCHEDULERS = {"ddim": DDIMScheduler, "dpm-solver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler,
              "sde-dpm-solver++": DPMSolverMultistepScheduler, "lcm": LCMScheduler}
ALGORITHMS = {"dpm-solver++": {"algorithm_type": "dpmsolver++"}, "sde-dpm-solver++": {"algorithm_type": "sde-dpmsolver++"}}


def load_generator(model_id: str, tuned: Sequence[Path] = (), device: str = "cpu") -> StableDiffusionPipeline:
    """Return the pipeline of `model_id` with what the folders in `tuned` hold, put on one after the other.

    A folder holds a LoRA, a whole UNet or autoencoder, or vectors of placeholders (see `tuning.save_generator`); the LoRA of
    a distilled model goes on top of the one that was distilled. LoRAs are folded into the weights: they then cost no time while
    sampling; sums round differently, by less than one grey level. Raises FileNotFoundError for a folder with none of them.
    """
    pipe = load_pipeline(model_id, device)
    for folder in map(Path, tuned):
        if (folder / "config.json").exists():
            name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
            part, kind = {"UNet2DConditionModel": ("unet", UNet2DConditionModel), "AutoencoderKL": ("vae", AutoencoderKL)}[name]
            setattr(pipe, part, kind.from_pretrained(folder, use_safetensors=True).to(device).eval())
        elif (folder / "pytorch_lora_weights.safetensors").exists():
            pipe.load_lora_weights(folder)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
        elif files := sorted(folder.glob("*.safetensors")):
            pipe.load_textual_inversion([str(file) for file in files])
        else:
            raise FileNotFoundError(f"no tuned generator in {folder}: list its method in 02-sd-lora (parameter methods)")
    return pipe


@contextmanager
def lend_device(pipe: StableDiffusionPipeline, device: str) -> Iterator[StableDiffusionPipeline]:
    """Have `pipe` on `device` inside the block and in main memory after it: a GPU need not hold several of full size."""
    try:
        yield pipe.to(device)
    finally:
        pipe.to("cpu")


def set_scheduler(pipe: StableDiffusionPipeline, name: str) -> None:
    """Give `pipe` the sampler `name` of `SCHEDULERS`, keeping the schedule of noise that the model was trained on."""
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler '{name}' is not known: use one of {', '.join(SCHEDULERS)}")
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config, **ALGORITHMS.get(name, {}))


def derive_seed(generator_seed: int, label: str, index: int, fold: int = -1) -> int:
    """Return the 48-bit seed of image `index` of class `label`: independent for neighbours, exact in a float column.

    With folds (`fold` 0, 1, ...) each fold has seeds of its own: the untuned base would draw the same images in all of them.
    """
    digest = hashlib.sha256(f"{generator_seed}/{label}/{index}{f'/{fold}' if fold >= 0 else ''}".encode()).digest()
    return int.from_bytes(digest[:6])


def draw_latents(pipe: StableDiffusionPipeline, generators: Sequence[torch.Generator], image_size: int) -> Tensor:
    """Return unit-normal initial latents (len(generators), C, h, w) on the CPU, each drawn from its own generator."""
    side = image_size // pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, side, side)
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators])


@torch.inference_mode()
def sample_images(pipe: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], image_size: int = 64,
                  num_inference_steps: int = 10, guidance_scale: float = 1.0, negative_prompt: str = "",
                  mode: str = "L") -> np.ndarray:
    """Return one image per prompt and seed, uint8: (N, H, W) for mode "L", (N, H, W, 3) for "RGB".

    `guidance_scale` as in diffusers: 1 follows the caption plainly, more exaggerates it (Ho & Salimans 2021).
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]  # one for each image, whatever the batch
    latents = draw_latents(pipe, generators, image_size).to(pipe.device, pipe.unet.dtype)
    negative_prompts = [negative_prompt] * len(prompts) if guidance_scale > 1 else None
    image_01 = pipe(list(prompts), negative_prompt=negative_prompts, latents=latents, height=image_size,
                    width=image_size, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                    generator=generators, output_type="pt").images.float()  # (N, 3, H, W)
    if mode == "L":
        image_01 = image_01.mean(1, keepdim=True)
    image_u8 = (image_01 * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return image_u8[..., 0] if mode == "L" else image_u8


def plan_images(generator: str, prompts: Mapping[str, str], counts: Mapping[str, int], generator_seed: int,
                fold: int = -1, first: Mapping[str, int] | None = None) -> pd.DataFrame:
    """Return a row per image to make: `image_id, path, label, generator, generator_seed, fold, index, prompt, seed`.

    `prompts` and `counts` have one entry per class; unequal counts serve to balance a data set. `fold` says which fold's
    generator draws (-1: there are none), `first` with which index each class begins (by default 0). `path` is relative to
    the run's folder.
    """
    first, within = first or {}, f"fold-{fold}" if fold >= 0 else ""
    folder, word = "/".join(filter(None, ["synthetic", generator, within])), "-".join(filter(None, [generator, within]))
    return pd.DataFrame([
        {"image_id": f"{word}-{label}-{generator_seed}-{index:05d}",
         "path": f"{folder}/{label}/{generator_seed}-{index:05d}.png", "label": label, "generator": generator,
         "generator_seed": generator_seed, "fold": fold, "index": index, "prompt": prompts[label],
         "seed": derive_seed(generator_seed, label, index, fold)}
        for label, count in counts.items() for index in range(first.get(label, 0), first.get(label, 0) + count)])


def generate(pipe: StableDiffusionPipeline, plan: pd.DataFrame, run_dir: Path, scheduler: str = "dpm-solver++",
             num_inference_steps: int = 10, guidance_scale: float = 1.0, negative_prompt: str = "",
             image_size: int = 64, batch_size: int = 64, mode: str = "L") -> tuple[pd.DataFrame, dict]:
    """Make the images of `plan` (see `plan_images`) as PNG files in `run_dir`; return their manifest and the timing.

    The manifest adds `sha256, model_hash, num_inference_steps, guidance_scale, scheduler, batch_size, origin` to the plan.
    Batches are fixed by row number, and a batch whose files are all there is not made again, so a killed run ends with the
    same bytes; files of other settings, weights or code are made anew. Out of memory halves the batch and says so; column
    `batch_size` marks it.
    """
    set_scheduler(pipe, scheduler)
    settings = {"model_hash": hash_pipeline(pipe), "scheduler": scheduler, "guidance_scale": guidance_scale,
                "num_inference_steps": num_inference_steps}
    content = {**settings, "negative_prompt": negative_prompt, "image_size": image_size, "mode": mode,
               "batch_size": batch_size, "code": hash_code(__file__, diffusion.__file__), "device": pipe.device.type,
               "plan": hashlib.sha256(plan.to_csv(index=False).encode()).hexdigest()[:16]}
    first = Path(run_dir) / plan["path"].iloc[0]
    card = first.parents[1] / f"settings-{first.parent.name}-{first.stem}.json"  # named after the plan's first image
    if not card.exists() or json.loads(card.read_text(encoding="utf-8"))["content"] != content:
        for path in plan["path"]:
            (Path(run_dir) / path).unlink(missing_ok=True)
        save_json(card, {"content": content})
    made, seconds, rows, bar = 0, 0.0, [], progress(desc=plan["generator"].iloc[0], total=len(plan), unit="image")
    for start in range(0, len(plan), batch_size):
        batch = plan.iloc[start:start + batch_size]
        files = [Path(run_dir) / path for path in batch["path"]]
        size = _read_batch_size(files)
        if size is None:
            began = time.perf_counter()
            images_u8, size = _sample_halving(
                pipe, batch, len(batch), image_size=image_size, num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale, negative_prompt=negative_prompt, mode=mode)
            for file, image_u8, (_, row) in zip(files, images_u8, batch.iterrows(), strict=True):
                save_png(file, image_u8, {**row[["prompt", "seed", "generator"]], **settings, "batch_size": size})
            made, seconds = made + len(batch), seconds + time.perf_counter() - began
        rows += [{"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "batch_size": size} for file in files]
        bar.update(len(batch))
    bar.close()
    manifest = plan.assign(**pd.DataFrame(rows, index=plan.index), **settings, origin="synthetic")
    if made == 0 and "seconds" in (kept := json.loads(card.read_text(encoding="utf-8"))):
        return manifest, {name: kept[name] for name in ("images", "seconds", "images_per_second")}
    timing = {"images": made, "seconds": seconds, "images_per_second": made / max(seconds, 1e-9)}
    save_json(card, {"content": content, **timing})
    return manifest, timing


def save_manifest(manifest: pd.DataFrame, run_dir: Path) -> Path:
    """Write `synthetic/manifest.parquet`, rows sorted, and delete images of earlier runs that it does not list."""
    path = Path(run_dir) / "synthetic" / "manifest.parquet"
    listed = {Path(run_dir) / name for name in manifest["path"]}
    for file in path.parent.rglob("*.png"):
        if file not in listed:
            file.unlink()
    with replace_when_done(path) as temporary:
        manifest.sort_values(["generator", "fold", "label", "generator_seed", "index"]).to_parquet(temporary, index=False)
    return path


def hash_pipeline(pipe: StableDiffusionPipeline) -> str:
    """Return 16 hex digits for the weights of UNet (adapter included), VAE and text encoder together."""
    parts = [hash_weights(module) for module in (pipe.unet, pipe.vae, pipe.text_encoder)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def _sample_halving(pipe: StableDiffusionPipeline, batch: pd.DataFrame, size: int, **settings) -> tuple[np.ndarray, int]:
    """Sample `batch` in pieces of `size`, halving `size` as often as memory asks; return images and size."""
    while True:
        try:
            parts = [batch.iloc[start:start + size] for start in range(0, len(batch), size)]
            return np.concatenate([sample_images(pipe, list(part["prompt"]), list(part["seed"]), **settings)
                                   for part in parts]), size
        except RuntimeError as error:
            size = halve_batch(size, error)


def save_png(path: Path, image_u8: np.ndarray, provenance: Mapping[str, object]) -> None:
    """Write the image with its provenance inside, so that a file that strays still says that it is synthetic."""
    text = PngImagePlugin.PngInfo()
    text.add_text("origin", "synthetic")
    for name, value in provenance.items():
        text.add_text(name, str(value))
    with replace_when_done(path) as temporary:
        Image.fromarray(image_u8).save(temporary, format="PNG", pnginfo=text, compress_level=1)


def _read_batch_size(files: Sequence[Path]) -> int | None:
    """Return the batch size with which `files` were made, or None if one of them is missing."""
    if not all(file.exists() for file in files):
        return None
    with Image.open(files[0]) as image:
        return int(image.text["batch_size"])
