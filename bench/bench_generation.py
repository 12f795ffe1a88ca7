"""Sampling: four steps of a distilled model, against fifty steps with guidance; the KID of both stands beside the speed.

The shipped base is distilled here, briefly, on simulated films of its own kind. The control is the base as it is, at four
steps of a better sampler: what distilling is worth beyond that.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from run import Comparison

from medaug import diffusion, fidelity, generation, paths, tuning
from medaug.phantom.chest import render
from medaug.phantom.cohort import draw_generic

GUIDANCE, SIZE, IMAGES, BATCH = 2.0, 64, 32, 32
DISTIL_STEPS, FILMS, JUDGED = 150, 800, 200


def list_comparisons(distil_steps: int = DISTIL_STEPS, films: int = FILMS, judged: int = JUDGED) -> list[Comparison]:
    """Return both comparisons, after distilling; `judged` images of each way are held against as many real films."""
    cohort = draw_generic(films + judged, seed=5)
    images_u8 = np.asarray(render(cohort["patient_seed"], cohort["image_seed"], cohort["label"], size=SIZE)["image_u8"])
    captions = list(cohort["caption"])
    model_id = paths.resolve_model("foundations/sd")
    teacher, solver, student = (diffusion.load_pipeline(model_id) for _ in range(3))
    distil(student, images_u8[:films], captions[:films], distil_steps)
    for pipe, scheduler in ((teacher, "ddim"), (solver, "dpm-solver++"), (student, "lcm")):
        generation.set_scheduler(pipe, scheduler)
    few = student, {"num_inference_steps": 4, "guidance_scale": 1.0}
    four = solver, {"num_inference_steps": 4, "guidance_scale": GUIDANCE}
    many = teacher, {"num_inference_steps": 50, "guidance_scale": GUIDANCE}

    def judge(plain: tuple[StableDiffusionPipeline, dict]) -> dict:
        encoder = fidelity.load_encoder("clip-foundation", "foundations/clip")
        real = fidelity.embed_images(encoder, images_u8[films:])
        floor = fidelity.embed_images(encoder, images_u8[:judged])
        drawn = [fidelity.embed_images(encoder, draw(pipe, captions[films:], how)) for pipe, how in (few, plain)]
        kids = [fidelity.compute_kid(real, features) for features in (*drawn, floor)]
        return dict(zip(("kid_ours", "kid_plain", "kid_floor"), kids, strict=True)) | {"n_judged": judged}

    return [Comparison(name, time_drawing(few[0], captions[:IMAGES], few[1]), time_drawing(plain[0], captions[:IMAGES], plain[1]),
                       f"4 LCM steps beside {words} with guidance {GUIDANCE}", extra=lambda _, plain=plain: judge(plain))
            for name, plain, words in (("lcm-4-steps", many, "50 DDIM steps"),
                                       ("lcm-4-steps-undistilled", four, "4 DPM-Solver++ steps of the base itself"))]


def distil(pipe: StableDiffusionPipeline, images_u8: np.ndarray, captions: list[str], steps: int) -> None:
    """Put an adapter on `pipe` and distil the pipeline, with its guidance, into it."""
    prompts = sorted(set(captions))
    prompt_ids = torch.tensor([prompts.index(caption) for caption in captions])
    lesson = tuning.Lesson(diffusion.encode_latents(pipe.vae, images_u8), prompt_ids, prompts)
    diffusion.add_lora(pipe.unet, 32, 32, (*diffusion.ATTENTION, "proj_in", "proj_out", "conv1", "conv2"))
    settings = diffusion.FitSettings(steps=steps, batch_size=32, learning_rate=1e-4)  # at 1e-3 it collapses
    tuning.fit_lcm(pipe, lesson, settings, guidance_scale=GUIDANCE)


def draw(pipe: StableDiffusionPipeline, prompts: list[str], how: dict) -> np.ndarray:
    """Images (len(prompts), SIZE, SIZE) uint8, in batches."""
    starts = range(0, len(prompts), BATCH)
    return np.concatenate([generation.sample_images(pipe, prompts[start:start + BATCH], range(start, min(start + BATCH, len(prompts))),
                                                    SIZE, **how) for start in starts])


def time_drawing(pipe: StableDiffusionPipeline, prompts: list[str], how: dict) -> Callable[[], float]:
    """Return a function that draws one image for each prompt and returns images per second."""
    def once() -> float:
        began = time.perf_counter()
        draw(pipe, prompts, how)
        return len(prompts) / (time.perf_counter() - began)

    return once
