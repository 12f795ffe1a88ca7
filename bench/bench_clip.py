"""CLIP: what does not change is computed once, against computing it again at every step."""

import time

import numpy as np
import torch
from run import Comparison
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from medaug import clip as clips
from medaug.foundations import build_clip, build_image_processor, build_tokenizer

N, BATCH, EPOCHS, STEPS = 256, 32, 3, 6
CAPTIONS = ["chest x-ray of a child, normal lungs", "chest x-ray of a child, bacterial pneumonia", "chest x-ray of a child, viral pneumonia"]


def list_comparisons() -> list[Comparison]:
    """Return three comparisons on a small CLIP with random weights: the probe, text while tuning, text while predicting."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(CAPTIONS)
    clip, processor = build_clip(tokenizer).eval().requires_grad_(False), CLIPProcessor(build_image_processor(), tokenizer)
    rng = np.random.default_rng(0)
    images_u8, labels = rng.integers(0, 256, (N, 64, 64), dtype=np.uint8), np.arange(N) % len(CAPTIONS)
    return [
        Comparison("clip-probe-features", lambda: probe_cached(clip, processor, images_u8, labels),
                   lambda: probe_plainly(clip, processor, images_u8, labels),
                   f"linear probe, {EPOCHS} epochs: features kept beside a forward pass at every step"),
        Comparison("clip-text-while-tuning", lambda: tune_vision(clip, processor, images_u8, labels, keep_text=True),
                   lambda: tune_vision(clip, processor, images_u8, labels, keep_text=False),
                   "LoRA in the image tower: captions encoded once beside at every step"),
        Comparison("clip-text-while-predicting", lambda: predict_cached(clip, processor, images_u8),
                   lambda: predict_plainly(clip, processor, images_u8), "zero-shot: captions encoded once beside with every batch"),
    ]  # fmt: skip


def fit_head(features_of, labels: np.ndarray) -> None:
    """Train a linear head for EPOCHS epochs on what `features_of` gives for the rows of a batch."""
    head = torch.nn.Linear(192, len(CAPTIONS))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for step in range(EPOCHS * N // BATCH):
        rows = clips.draw_rows(N, BATCH, step, seed=0)
        F.cross_entropy(head(features_of(rows)), torch.from_numpy(labels[rows])).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def probe_cached(clip: CLIPModel, processor: CLIPProcessor, images_u8: np.ndarray, labels: np.ndarray) -> float:
    """Embed once, then train the probe; return images per second, the embedding counted in."""
    began = time.perf_counter()
    features = torch.from_numpy(clips.embed_dataset(clip, processor, images_u8, project=False))
    fit_head(lambda rows: features[rows], labels)
    return EPOCHS * N / (time.perf_counter() - began)


def probe_plainly(clip: CLIPModel, processor: CLIPProcessor, images_u8: np.ndarray, labels: np.ndarray) -> float:
    """Train the same probe with the frozen tower run at every step; return images per second."""

    @torch.no_grad()
    def embed(rows):
        return clips.embed_images(clip, processor, images_u8[rows], project=False)

    began = time.perf_counter()
    fit_head(embed, labels)
    return EPOCHS * N / (time.perf_counter() - began)


def tune_vision(clip: CLIPModel, processor: CLIPProcessor, images_u8: np.ndarray, labels: np.ndarray, keep_text: bool) -> float:
    """Take STEPS steps of LoRA in the image tower's last layer, as `fit_clip` does; return images per second."""
    model = CLIPModel(clip.config)
    model.load_state_dict(clip.state_dict())
    clips.add_lora(model, 16, 32, r".*vision_model.*layers\.3\..*\.(q_proj|k_proj|v_proj|fc1|fc2)")
    states = clips.cache_states(model, processor, images_u8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    began = time.perf_counter()
    kept = clips.embed_texts(model, processor, CAPTIONS) if keep_text else None
    for step in range(STEPS):
        rows = clips.draw_rows(N, BATCH, step, seed=0)
        text_embeds = clips.embed_texts(model, processor, CAPTIONS) if kept is None else kept
        image_embeds = clips.embed_images(model, processor, states[rows])
        clips.compute_class_prompt_loss(image_embeds, text_embeds, model.logit_scale.exp(), torch.from_numpy(labels[rows])).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return STEPS * BATCH / (time.perf_counter() - began)


def predict_cached(clip: CLIPModel, processor: CLIPProcessor, images_u8: np.ndarray) -> float:
    """Predict batch by batch with the captions encoded once; return images per second."""
    began = time.perf_counter()
    with torch.inference_mode():
        text_embeds = clips.embed_texts(clip, processor, CAPTIONS)
    clips.compute_probs(clip, clips.embed_dataset(clip, processor, images_u8, batch_size=BATCH), text_embeds)
    return N / (time.perf_counter() - began)


@torch.inference_mode()
def predict_plainly(clip: CLIPModel, processor: CLIPProcessor, images_u8: np.ndarray) -> float:
    """Predict with the library's own forward pass, captions and all, batch by batch; return images per second."""
    tokens = processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    began = time.perf_counter()
    for start in range(0, N, BATCH):
        pixel_values = clips.preprocess_images(images_u8[start:start + BATCH], processor)
        clip(pixel_values=pixel_values, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits_per_image.softmax(-1)
    return N / (time.perf_counter() - began)
