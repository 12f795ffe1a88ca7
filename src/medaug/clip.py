"""Read images with CLIP: zero-shot by prompts, LoRA under two losses, baselines, attention maps, what exactly is trained.

A caption stands for a class throughout: row k of `text_embeds` is the text of class k, and the logits are the scaled
cosine similarities of an image with the k captions (Radford et al. 2021, section 3.1.2).
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.utils import logging

from medaug.paths import resolve_model
from medaug.runtime import progress, replace_when_done

# What makes a CLIP a ViT-L/14; everything else is transformers' default.
REFERENCE_CONFIG = {
    "projection_dim": 768,
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                      "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "projection_dim": 768},
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                    "num_attention_heads": 12, "projection_dim": 768},
}
LORA_TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1", "mlp.fc2")
RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as a processor's config gives them
MAX_LOGIT_SCALE = math.log(100)  # Radford et al. 2021, section 2.5
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # accelerate's words for autocast


# -- the model and what is trained in it -------------------------------------------------------------------------------


def load_clip(model_id: str, device: str = "cpu",
              dtype: torch.dtype = torch.float32) -> tuple[CLIPModel, CLIPProcessor]:
    """Return the `CLIPModel` (eval mode, weights cast to `dtype`) and the `CLIPProcessor` at `model_id`.

    `model_id` is a local folder or a hub id (see `paths.resolve_model`); safetensors only, no remote code. Raises
    FileNotFoundError in one line where there is none.
    """
    folder = resolve_model(model_id)
    logging.disable_progress_bar()  # of loading, which takes a moment and would stand in the notebook for ever
    # On a CPU the fused attention's bfloat16 backward takes longer than all the rest of a small CLIP's step.
    attention = "eager" if torch.device(device).type == "cpu" else "sdpa"
    try:
        clip = CLIPModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention, use_safetensors=True,
                                         trust_remote_code=False)
        processor = CLIPProcessor.from_pretrained(folder, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(f"no CLIP at '{model_id}': give a folder with config.json, *.safetensors and the "
                                "processor's files, or a hub id that this machine can reach") from error
    return clip.to(device).eval(), processor


def build_reference() -> CLIPModel:
    """Return CLIP ViT-L/14, reports 0 and 1's model, on the meta device: shapes and names, no weights."""
    with torch.device("meta"):
        return CLIPModel(CLIPConfig(**REFERENCE_CONFIG))


def count_parameters(clip: nn.Module) -> dict[str, int]:
    """Return `params_trainable` (those that require a gradient) and `params_total`."""
    sizes = [(p.numel(), p.requires_grad) for p in clip.parameters()]
    return {"params_trainable": sum(n for n, trains in sizes if trains), "params_total": sum(n for n, _ in sizes)}


def add_lora(clip: CLIPModel, rank: int, lora_alpha: float, target_modules: Sequence[str] | str = LORA_TARGETS,
             layers: Sequence[int] | None = None, dropout: float = 0.0, seed: int = 0) -> dict[str, int]:
    """Freeze `clip` and add a LoRA adapter (Hu et al. 2021) in place; return `modules` and the parameter counts.

    `target_modules` are endings of module names in both towers, or one regular expression (to adapt one tower);
    `layers` keeps to those layer numbers (none: all; a regular expression names its own). A is drawn from `seed`, B is
    zero, so a fresh adapter changes nothing. Raises ValueError where no target matches; where only a part of the list
    does, peft is silent: follow with `guards.check_lora_coverage`.
    """
    clip.requires_grad_(False)
    by_pattern = isinstance(target_modules, str)
    config = LoraConfig(r=rank, lora_alpha=lora_alpha, lora_dropout=dropout,
                        target_modules=target_modules if by_pattern else list(target_modules),
                        layers_to_transform=list(layers) if layers and not by_pattern else None)
    device = next(clip.parameters()).device
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        try:
            clip.add_adapter(config)
        except ValueError as error:
            wanted = target_modules if by_pattern else ", ".join(target_modules)
            raise ValueError(f"LoRA target(s) {wanted} match no layer of this CLIP: its layers are called "
                             f"{', '.join(LORA_TARGETS)} (see named_modules())") from error
    for parameter in clip.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # adapters train in float32 whatever the base is
    return {"modules": sum(hasattr(module, "lora_A") for module in clip.modules()), **count_parameters(clip)}


def count_frozen_layers(clip: CLIPModel) -> int:
    """Return how many of the vision tower's first layers hold nothing that trains: what `cache_states` may skip."""
    vision = clip.vision_model
    if _trains(vision.embeddings) or _trains(vision.pre_layrnorm):
        return 0
    layers = vision.encoder.layers
    return next((depth for depth, layer in enumerate(layers) if _trains(layer)), len(layers))


def copy_trained(clip: CLIPModel) -> dict[str, Tensor]:
    """Return copies, on the CPU, of all that trains in `clip`: an adapter is small where its model is not."""
    return {name: p.detach().cpu().clone() for name, p in clip.named_parameters() if p.requires_grad}


def load_trained(clip: CLIPModel, weights: Mapping[str, Tensor]) -> CLIPModel:
    """Put `copy_trained` weights into a model that was built alike, and return it; KeyError for any other model."""
    trains = {name: p for name, p in clip.named_parameters() if p.requires_grad}
    if trains.keys() != weights.keys():
        raise KeyError(f"the weights train {len(weights)} tensors, this model {len(trains)}: build it with the same adapter")
    for name, parameter in trains.items():
        parameter.data.copy_(weights[name])
    return clip


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


# -- from images and captions to unit vectors --------------------------------------------------------------------------


@dataclass(frozen=True)
class HiddenStates:
    """Images as the vision tower sees them after its first `depth` layers: `values` (N, tokens, width)."""

    values: Tensor
    depth: int

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows) -> "HiddenStates":
        return HiddenStates(self.values[rows], self.depth)


Images = np.ndarray | HiddenStates


def preprocess_images(images_u8: np.ndarray, processor: CLIPProcessor) -> Tensor:
    """Return pixel_values (N, 3, H, W) float32 of grey (N, h, w) or RGB (N, h, w, 3) uint8 images.

    Size, crop, mean and std are the processor's own, so they belong to the weights; the aspect is kept (shorter side
    to the processor's size, then the centre). All images at once, where the processor takes them one by one.
    """
    config = processor.image_processor
    images = torch.from_numpy(np.array(images_u8))
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    shorter, side = config.size["shortest_edge"], config.crop_size["height"]
    height, width = images.shape[-2:]
    if config.do_resize and min(height, width) != shorter:
        scaled = [max(shorter, int(edge * shorter / min(height, width))) for edge in (height, width)]
        images = F.interpolate(images.float(), scaled, mode=RESAMPLE[int(config.resample)], antialias=True)
        images = images.round().clamp(0, 255)
    top, left = ((edge - side) // 2 for edge in images.shape[-2:])
    images = images[..., top:top + side, left:left + side]
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.image_mean, config.image_std))
    return (images.float() * config.rescale_factor - mean) / std


def embed_images(clip: CLIPModel, processor: CLIPProcessor, images: Images, project: bool = True) -> Tensor:
    """Return image embeddings (N, D) as unit vectors, or without `project` the features before the projection.

    `images` are uint8 (see `preprocess_images`) or `HiddenStates`, from which only the later layers are run. Gradients
    flow.
    """
    vision = clip.vision_model
    if isinstance(images, HiddenStates):
        hidden, start = images.values.to(clip.device), images.depth
    else:
        pixel_values = preprocess_images(images, processor).to(clip.device, clip.dtype)
        hidden, start = vision.pre_layrnorm(vision.embeddings(pixel_values)), 0  # (N, tokens, width)
    layers = vision.encoder.layers[start:]
    for layer in layers[:-1]:
        hidden = layer(hidden, None)
    hidden = _end_layer(layers[-1], hidden) if len(layers) else hidden
    features = vision.post_layernorm(hidden[:, 0])  # (N, width): the class token
    return F.normalize(clip.visual_projection(features).float(), dim=-1) if project else features.float()


def _end_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Run a layer for the class token alone, all that is read of the last one: (N, tokens, width) -> (N, 1, width).

    The same sums as the layer's own, without those that nobody asks for: four fifths of the layer.
    """
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    queries, keys, values = (
        projection(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # (N, heads, 1 or tokens, head_dim)
        for projection, x in ((attention.q_proj, normed[:, :1]), (attention.k_proj, normed), (attention.v_proj, normed)))
    weights = (queries @ keys.transpose(-1, -2) * attention.scale).softmax(-1).to(values.dtype)  # (N, heads, 1, tokens)
    mixed = F.dropout(weights, attention.dropout, attention.training) @ values
    hidden = hidden[:, :1] + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def embed_texts(clip: CLIPModel, processor: CLIPProcessor, captions: Sequence[str]) -> Tensor:
    """Return text embeddings (P, D) as unit vectors; gradients flow. Captions beyond the context length are cut."""
    tokens = processor.tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(clip.device)
    features = clip.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
    features = getattr(features, "pooler_output", features)  # an output object since transformers 5, once a tensor
    return F.normalize(features.float(), dim=-1)


def count_tokens(processor: CLIPProcessor, captions: Sequence[str]) -> list[int]:
    """Return the number of tokens of each caption, uncut: what exceeds the context length never reaches the model."""
    return [len(ids) for ids in processor.tokenizer(list(captions), truncation=False, verbose=False).input_ids]


@torch.inference_mode()
def cache_states(clip: CLIPModel, processor: CLIPProcessor, images_u8: np.ndarray, depth: int | None = None,
                 batch_size: int = 256, mixed_precision: str = "no") -> HiddenStates:
    """Run the first `depth` vision layers once and keep what they give (float32, N x tokens x width x 4 bytes).

    `depth` defaults to `count_frozen_layers(clip)`; must be 1 or more. Training then costs only the later layers.
    """
    depth = count_frozen_layers(clip) if depth is None else depth
    if depth < 1:
        raise ValueError("no frozen layer to cache: pass the images themselves")
    vision, parts = clip.vision_model, []
    for start in progress(range(0, len(images_u8), batch_size), desc="frozen layers", unit="batch"):
        pixel_values = preprocess_images(images_u8[start:start + batch_size], processor).to(clip.device, clip.dtype)
        with _autocast(clip, mixed_precision):
            hidden = vision.pre_layrnorm(vision.embeddings(pixel_values))
            for layer in vision.encoder.layers[:depth]:
                hidden = layer(hidden, None)
        parts.append(hidden.float().cpu())
    return HiddenStates(torch.cat(parts).clone(), depth)


@torch.inference_mode()
def embed_dataset(clip: CLIPModel, processor: CLIPProcessor, images: Images, project: bool = True,
                  batch_size: int = 256, mixed_precision: str = "no") -> np.ndarray:
    """Return `embed_images` of all images, in batches, as float32 (N, D)."""
    clip.eval()
    parts = []
    for start in range(0, len(images), batch_size):
        with _autocast(clip, mixed_precision):
            parts.append(embed_images(clip, processor, images[start:start + batch_size], project))
    return torch.cat(parts).cpu().numpy()


def _autocast(clip: CLIPModel, mixed_precision: str) -> torch.autocast:
    if mixed_precision not in PRECISIONS:
        raise ValueError(f"mixed_precision '{mixed_precision}' is not supported: use {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[mixed_precision]
    return torch.autocast(clip.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


# -- reading by prompts ------------------------------------------------------------------------------------------------


def index_labels(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return class indices (N,) of label names; ValueError that names the labels which are no class."""
    unknown = sorted({str(label) for label in labels} - set(classes))
    if unknown:
        raise ValueError(f"label(s) {', '.join(unknown)} are not among the classes {', '.join(classes)}: add them to "
                         "`classes` and to every prompt set, or leave their images out of the manifest")
    return np.array([list(classes).index(label) for label in labels], dtype=np.int64)


def check_prompt_sets(prompt_sets: Mapping[str, Mapping[str, str]], classes: Sequence[str]) -> None:
    """Raise ValueError that names the set and the class if a prompt set lacks a class or names an unknown one."""
    for name, prompts in prompt_sets.items():
        missing = [label for label in classes if label not in prompts]
        unknown = [label for label in prompts if label not in classes]
        if missing or unknown:
            wrong = " and ".join(f"{word} {', '.join(labels)}" for word, labels in
                                 (("lacks", missing), ("names the unknown", unknown)) if labels)
            raise ValueError(f"prompt set '{name}' {wrong}: write one caption for each of {', '.join(classes)}")


@torch.inference_mode()
def encode_prompts(clip: CLIPModel, processor: CLIPProcessor, prompt_sets: Mapping[str, Mapping[str, str]],
                   classes: Sequence[str]) -> dict[str, Tensor]:
    """Return the text embeddings (k, D) of each prompt set, in class order, and of their `ensemble`.

    Computed once, since the prompts are fixed. The ensemble is the mean of the sets' unit vectors, brought back to unit
    length (Radford et al. 2021, section 3.1.4).
    """
    check_prompt_sets(prompt_sets, classes)
    embeds = {name: embed_texts(clip, processor, [prompts[label] for label in classes])
              for name, prompts in prompt_sets.items()}
    return {**embeds, "ensemble": F.normalize(torch.stack(list(embeds.values())).mean(0), dim=-1)}


def compute_probs(clip: CLIPModel, image_embeds: np.ndarray, text_embeds: Tensor) -> np.ndarray:
    """Return class probabilities (N, k) float32 of unit vectors (N, D) and (k, D), at the model's own logit scale."""
    with torch.inference_mode():
        cosines = torch.from_numpy(image_embeds).double() @ text_embeds.double().cpu().T
        return torch.softmax(clip.logit_scale.exp().double().cpu() * cosines, dim=-1).float().numpy()


def zero_shot_probs(clip: CLIPModel, processor: CLIPProcessor, images: Images,
                    prompt_sets: Mapping[str, Mapping[str, str]], classes: Sequence[str],
                    mixed_precision: str = "no") -> dict[str, np.ndarray]:
    """Return the probabilities (N, k) of each prompt set and of their `ensemble`; the images are embedded once."""
    image_embeds = embed_dataset(clip, processor, images, mixed_precision=mixed_precision)
    text_embeds = encode_prompts(clip, processor, prompt_sets, classes)
    return {name: compute_probs(clip, image_embeds, embeds) for name, embeds in text_embeds.items()}


def predict_probs(clip: CLIPModel, processor: CLIPProcessor, images: Images, captions: Sequence[str],
                  mixed_precision: str = "no") -> np.ndarray:
    """Return the probabilities (N, k) float32 of the classes whose captions are given, in their order."""
    with torch.inference_mode():
        text_embeds = embed_texts(clip.eval(), processor, captions)
    return compute_probs(clip, embed_dataset(clip, processor, images, mixed_precision=mixed_precision), text_embeds)


# -- three losses: two that make sense, and the one that reports 0 and 1 used ------------------------------------------


def compute_class_prompt_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy over the k class captions: (B, D), (k, D), (B,) -> scalar. At chance it is ln k."""
    return F.cross_entropy(logit_scale * image_embeds @ text_embeds.T, labels)


def compute_contrastive_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, labels: Tensor) -> Tensor:
    """Return CLIP's symmetric loss over the batch, all pairs that share a caption being positive.

    Radford et al. 2021, figure 3, with the several positives of Khosla et al. 2020. At chance it is ln B; its floor is
    not zero but about ln(B / k), because B/k images share each caption and no score can tell them apart.
    """
    logits = logit_scale * image_embeds @ text_embeds[labels].T  # (B, B)
    same = (labels[:, None] == labels).float()
    target = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def compute_in_batch_index_loss(image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor,
                                labels: Tensor) -> Tensor:
    """Return reports 0 and 1's loss, which is a mistake: the class index picks a column of the *batch's* captions.

    Column 2 is the caption of whichever image stands third, so the target has nothing to do with the image; the least
    mean loss is ln B, and equal logits for everything reach it.
    """
    logits = logit_scale * image_embeds @ text_embeds[labels].T  # (B, B): one column per image of the batch, not per class
    return F.cross_entropy(logits, labels)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "class-prompt": compute_class_prompt_loss,
    "contrastive": compute_contrastive_loss,
    "in-batch-index": compute_in_batch_index_loss,
}


# -- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipPlan:
    """All that decides a training run besides the data and the model."""

    steps: int = 90  # optimiser steps (AdamW), whatever the number of images
    batch_size: int = 32
    learning_rate: float = 1e-3  # peak; linear warm-up, then cosine to zero
    warmup_steps: int = 5
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    loss: str = "class-prompt"  # a name in LOSSES
    evaluate_every: int = 30  # steps between two rows of the history
    mixed_precision: str = "no"  # a name in PRECISIONS; weights and optimiser stay in float32
    seed: int = 0


def fit_clip(clip: CLIPModel, processor: CLIPProcessor, images: Images, labels: np.ndarray, captions: Sequence[str],
             plan: ClipPlan, val: tuple[Images, np.ndarray], checkpoint: Path | None = None) -> tuple[pd.DataFrame, dict]:
    """Train whatever in `clip` requires a gradient (an adapter, or all of it), in place; return history and timing.

    `images` (N, ...) uint8 or `HiddenStates`, `labels` (N,) class indices, `captions` one per class; `val` likewise is
    scored at each row of the history and chooses nothing. The weights of the last step are kept. Each step draws from
    (`plan.seed`, step) alone, and `checkpoint` (a safetensors file) holds weights and optimiser, so a run that was
    killed and started again ends with the same weights; a finished one is only loaded. Raises FloatingPointError when
    the loss is not finite, ValueError when labels, captions or layers do not fit.
    """
    _check_fit(clip, images, labels, captions, plan)
    weights = {name: p for name, p in clip.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    scaler = torch.amp.GradScaler(clip.device.type, enabled=plan.mixed_precision == "fp16")
    fingerprint = _fingerprint(clip, images, labels, captions, plan, val)
    state = _load_state(checkpoint, fingerprint, weights, optimizer) or _fresh_state()
    scaler.load_state_dict(state["scaler"] or scaler.state_dict())
    fixed_text = None if _text_trains(clip) else embed_texts(clip, processor, captions).detach()
    bar = progress(desc=f"CLIP, {plan.loss}", total=plan.steps, unit="step")
    bar.update(state["step"])
    with torch.random.fork_rng():
        for step in range(state["step"], plan.steps):
            began = time.perf_counter()
            rows = draw_rows(len(labels), plan.batch_size, step, plan.seed)
            optimizer.param_groups[0]["lr"] = plan.learning_rate * _schedule(plan, step)
            loss, preds = _take_step(clip, processor, images[rows], labels[rows], captions, fixed_text, plan, step, optimizer,
                                     scaler)
            state["losses"].append(loss)
            state["seen"].append([rows.tolist(), preds])
            state["seconds"] += time.perf_counter() - began
            state["step"] = step + 1
            bar.update()
            if (step + 1) % plan.evaluate_every == 0 or step + 1 == plan.steps:
                state["history"].append(_summarise(clip, processor, captions, plan, labels, val, state))
                state["losses"], state["seen"], state["scaler"] = [], [], scaler.state_dict()
                _save_state(checkpoint, fingerprint, weights, optimizer, state)
    bar.close()
    clip.eval()
    seen = plan.steps * min(plan.batch_size, len(labels))
    return pd.DataFrame(state["history"]), {"seconds": state["seconds"], "images_per_second": seen / state["seconds"],
                                            "seconds_per_epoch": state["seconds"] * len(labels) / seen}


def draw_rows(count: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Return the rows of the batch of `step`: each epoch is one permutation, its incomplete last batch left out."""
    batch_size = min(batch_size, count)
    epoch, position = divmod(step, count // batch_size)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[position * batch_size:(position + 1) * batch_size]


def _take_step(clip: CLIPModel, processor: CLIPProcessor, images: Images, labels: np.ndarray, captions: Sequence[str],
               fixed_text: Tensor | None, plan: ClipPlan, step: int,
               optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> tuple[float, list[int]]:
    """Take one optimiser step; return the loss and the classes predicted for the batch before it.

    A step whose float16 gradients overflow is taken again at half the scale: steps stay as many as were planned.
    """
    clip.train()
    torch.manual_seed(plan.seed * 1_000_003 + step)  # dropout inside the adapter
    target = torch.from_numpy(labels).to(clip.device)
    with _autocast(clip, plan.mixed_precision):
        image_embeds = embed_images(clip, processor, images)  # (B, D)
        text_embeds = embed_texts(clip, processor, captions) if fixed_text is None else fixed_text  # (k, D)
    logit_scale = clip.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    loss = LOSSES[plan.loss](image_embeds, text_embeds, logit_scale, target)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}: lower learning_rate "
                                 f"({plan.learning_rate:g}) or look for broken images")
    optimizer.zero_grad(set_to_none=True)
    scale = scaler.get_scale()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], plan.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() < scale:
        if scale < 1:
            raise FloatingPointError(f"the float16 gradients of step {step + 1} overflow at any scale: use bf16")
        return _take_step(clip, processor, images, labels, captions, fixed_text, plan, step, optimizer, scaler)
    return loss.item(), (image_embeds @ text_embeds.T).argmax(dim=1).tolist()


def _summarise(clip: CLIPModel, processor: CLIPProcessor, captions: Sequence[str], plan: ClipPlan, labels: np.ndarray,
               val: tuple[Images, np.ndarray], state: dict) -> dict:
    """Return one row of the history: means since the last row for training, all of `val` for validation."""
    rows = np.concatenate([rows for rows, _ in state["seen"]])
    probs = predict_probs(clip, processor, val[0], captions, plan.mixed_precision)
    chosen = np.clip(probs[np.arange(len(probs)), val[1]], 1e-12, None)
    train_preds = np.concatenate([preds for _, preds in state["seen"]])
    return {"step": state["step"], "epoch": state["step"] * min(plan.batch_size, len(labels)) / len(labels),
            "loss": float(np.mean(state["losses"])), "val_loss": float(-np.log(chosen).mean()),
            **_score("train", labels[rows], train_preds, len(captions)),
            **_score("val", val[1], probs.argmax(1), len(captions))}


def _score(prefix: str, labels: np.ndarray, preds: np.ndarray, k: int) -> dict[str, float]:
    macro = {"labels": list(range(k)), "average": "macro", "zero_division": 0}
    return {f"{prefix}_accuracy": float(accuracy_score(labels, preds)),
            f"{prefix}_macro_recall": float(recall_score(labels, preds, **macro)),
            f"{prefix}_macro_f1": float(f1_score(labels, preds, **macro))}


def _check_fit(clip: CLIPModel, images: Images, labels: np.ndarray, captions: Sequence[str], plan: ClipPlan) -> None:
    if plan.loss not in LOSSES:
        raise ValueError(f"no loss '{plan.loss}': choose one of {', '.join(LOSSES)}")
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"training has {len(images)} images and {len(labels)} labels: need as many, not 0")
    if labels.min() < 0 or labels.max() >= len(captions):
        raise ValueError(f"a label is {labels.max()}, but there are {len(captions)} captions: write one per class, in class order")
    if isinstance(images, HiddenStates) and images.depth > count_frozen_layers(clip):
        raise ValueError(f"the states were cached after layer {images.depth}, but layer {count_frozen_layers(clip) + 1} "
                         "trains: cache fewer layers")
    if not count_parameters(clip)["params_trainable"]:
        raise ValueError("nothing in this CLIP trains: add_lora(clip, ...) or clip.requires_grad_(True) first")


def _text_trains(clip: CLIPModel) -> bool:
    return _trains(clip.text_model) or _trains(clip.text_projection)


def _schedule(plan: ClipPlan, step: int) -> float:
    """Return the factor of the learning rate: linear warm-up, then half a cosine down to zero."""
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


# -- resuming ----------------------------------------------------------------------------------------------------------


def _fresh_state() -> dict:
    return {"step": 0, "seconds": 0.0, "history": [], "losses": [], "seen": [], "scaler": {}}


def _fingerprint(clip: CLIPModel, images: Images, labels: np.ndarray, captions: Sequence[str], plan: ClipPlan,
                 val: tuple[Images, np.ndarray]) -> str:
    """Return a hash of everything that decides the run, this file included: an equal hash means an equal result."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([asdict(plan), list(captions), str(clip.device)]).encode())
    digest.update(Path(__file__).read_bytes())
    for name, tensor in sorted(clip.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    for part in (images, labels, *val):
        values = part.values.numpy() if isinstance(part, HiddenStates) else np.ascontiguousarray(part)
        digest.update(values)
    return digest.hexdigest()


def _save_state(path: Path | None, fingerprint: str, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
                state: dict) -> None:
    """Write weights, AdamW's moments and the progress to one safetensors file."""
    if path is None:
        return
    tensors = {}
    for name, weight in weights.items():
        moments = optimizer.state[weight]
        tensors |= {f"weight/{name}": weight.detach(), f"exp_avg/{name}": moments["exp_avg"],
                    f"exp_avg_sq/{name}": moments["exp_avg_sq"]}
    card = json.dumps({"fingerprint": fingerprint, **state})
    with replace_when_done(path) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, {"card": card})


def _load_state(path: Path | None, fingerprint: str, weights: Mapping[str, Tensor],
                optimizer: torch.optim.Optimizer) -> dict | None:
    """Load what `_save_state` wrote if it belongs to the same run; return its progress, or None to start afresh."""
    if path is None or not Path(path).exists():
        return None
    with safe_open(path, "pt") as file:
        state = json.loads(file.metadata()["card"])
        if state.pop("fingerprint") != fingerprint:
            return None
        for name, weight in weights.items():
            weight.data.copy_(file.get_tensor(f"weight/{name}"))
            optimizer.state[weight] = {"step": torch.tensor(float(state["step"])),
                                       "exp_avg": file.get_tensor(f"exp_avg/{name}").to(weight.device),
                                       "exp_avg_sq": file.get_tensor(f"exp_avg_sq/{name}").to(weight.device)}
    return state


# -- baselines on frozen features --------------------------------------------------------------------------------------


def fit_probe(features: np.ndarray, labels: np.ndarray, val_features: np.ndarray, val_labels: np.ndarray,
              strengths: Sequence[float] = tuple(10.0 ** np.arange(-4, 3))) -> tuple[Pipeline, pd.DataFrame]:
    """Return logistic regression on frozen features (N, D) and the validation score of every strength tried.

    Radford et al. 2021, section 3.2: the features before the projection. `strengths` are scikit-learn's C; the best
    macro F1 on `val_features` wins, the smallest C among equals. The fit is deterministic: it has no seed.
    """
    probes = {strength: make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
              for strength in sorted(strengths)}
    return _choose("C", probes, features, labels, val_features, val_labels)


def fit_knn(features: np.ndarray, labels: np.ndarray, val_features: np.ndarray, val_labels: np.ndarray,
            neighbours: Sequence[int] = (5, 15, 45)) -> tuple[Pipeline, pd.DataFrame]:
    """Return the vote of the nearest training images by cosine (N, D) and the validation score of every number tried.

    Wu et al. 2018 ("Instance discrimination"), section 3.4, with equal votes: nothing is fitted, so this is what the
    features alone know. Numbers beyond the training images are left out; the best macro F1 on `val_features` wins.
    """
    votes = {n: make_pipeline(Normalizer(), KNeighborsClassifier(n))
             for n in sorted(neighbours) if n <= len(features)}
    if not votes:
        raise ValueError(f"neighbours {list(neighbours)} are all more than the {len(features)} training images: try fewer")
    return _choose("neighbours", votes, features, labels, val_features, val_labels)


def _choose(name: str, models: Mapping[float, Pipeline], features: np.ndarray, labels: np.ndarray,
            val_features: np.ndarray, val_labels: np.ndarray) -> tuple[Pipeline, pd.DataFrame]:
    """Fit each model; return the one with the best validation macro F1, the first among equals, and all scores."""
    rows = []
    for value, model in models.items():
        model.fit(features, labels)
        rows.append({name: value, **_score("val", val_labels, model.predict(val_features), len(model.classes_))})
    tried = pd.DataFrame(rows)
    return models[tried.loc[tried["val_macro_f1"].idxmax(), name]], tried


# -- where it looks ----------------------------------------------------------------------------------------------------


def explain_attention(clip: CLIPModel, processor: CLIPProcessor, images_u8: np.ndarray, captions: Sequence[str],
                      class_index: np.ndarray) -> np.ndarray:
    """Return where the image tower looks for class `class_index` (N,): relevance (N, H, W) float32, each summing to 1.

    Chefer, Gur & Wolf 2021 ("Generic attention-model explainability"), equations 5 and 6: attention weighted by the
    gradient of the class's logit, its positive part averaged over heads and carried through the layers; the class
    token's row is laid over the pixels that the model was given (H, W: after the processor's crop). A picture of a
    model's attention is not a reason for its answer: compare with a model that was not trained.
    """
    implementation = clip.config._attn_implementation
    clip.eval().set_attn_implementation("eager")  # fused attention gives no weights
    pixel_values = preprocess_images(images_u8, processor).to(clip.device, clip.dtype).requires_grad_()
    try:
        with torch.enable_grad():
            seen = clip.vision_model(pixel_values=pixel_values, output_attentions=True)
            image_embeds = F.normalize(clip.visual_projection(seen.pooler_output), dim=-1)  # (N, D)
            text_embeds = embed_texts(clip, processor, captions).detach()[torch.as_tensor(class_index)]  # (N, D)
            gradients = torch.autograd.grad((image_embeds * text_embeds).sum(), seen.attentions)
    finally:
        clip.set_attn_implementation(implementation)
    relevance = torch.eye(seen.attentions[0].shape[-1], device=clip.device)  # (T, T)
    for weights, gradient in zip(seen.attentions, gradients, strict=True):  # (N, heads, T, T)
        relevance = relevance + (weights * gradient).clamp_min(0).mean(1).detach() @ relevance
    patches = relevance[:, 0, 1:].float().cpu()  # (N, T - 1)
    side = math.isqrt(patches.shape[1])
    maps = F.interpolate(patches.view(-1, 1, side, side), pixel_values.shape[-2:], mode="bilinear")[:, 0]
    return (maps / maps.sum((1, 2), keepdim=True).clamp_min(1e-12)).numpy()
