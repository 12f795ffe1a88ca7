"""Segmentation networks by name, one training function for all of them, and masks for images of any size."""

import json
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medaug.runtime import progress, replace_when_done

# The eight of the fourth report, in the words of segmentation-models-pytorch.
ARCHITECTURES = ("unet", "unetplusplus", "manet", "fpn", "pspnet", "pan", "deeplabv3", "deeplabv3plus")
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
SCHEDULES = ("one-cycle", "constant")
LEARNED = "learned"
# Grey films with ImageNet's mean and spread. Each encoder begins with a convolution and a batch norm, so for other
# weights the exact scale matters little; one rule for training, prediction and `medaug segment` matters more.
MEAN, STD = 0.449, 0.226


@dataclass(frozen=True)
class SegmenterPlan:
    """How to train: `steps` optimiser steps of `batch_size` images, the same for every network of a comparison."""

    steps: int
    batch_size: int = 16
    learning_rate: float = 3e-3
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    schedule: str = "one-cycle"  # or "constant"


# ---------------------------------------------------------------- networks


def build_segmenter(architecture: str, encoder: str, encoder_weights: str | None = None, num_classes: int = 0,
                    **options) -> nn.Module:
    """Return the library's own network: pixel values (B, 1, H, W) -> mask logits (B, 1, H, W).

    `encoder` is a name of segmentation-models-pytorch or "tu-" + a timm name. `encoder_weights`: None (from scratch), a
    name of the library ("imagenet": fetched from its hub), or a local file of safetensors in the encoder's own names.
    With `num_classes` > 0 the encoder also feeds a classification head and the network returns (mask logits, class
    logits (B, num_classes)). `options` go to the library's constructor (for example decoder_channels). Raises
    ValueError for a name that is not in `ARCHITECTURES`, FileNotFoundError for weights that are not there.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture '{architecture}' is unknown: choose one of {', '.join(ARCHITECTURES)}")
    head = {"aux_params": {"classes": num_classes, "pooling": "avg", "dropout": 0.2}} if num_classes else {}
    local = encoder_weights if encoder_weights and encoder_weights.endswith(".safetensors") else ""
    if not local:
        return smp.create_model(architecture, encoder, encoder_weights or None, in_channels=1, classes=1, **head, **options)
    if not Path(local).is_file():
        raise FileNotFoundError(f"no encoder weights {local}: give a file of safetensors, 'imagenet' or nothing")
    if encoder.startswith("tu-"):  # timm reads the file, renames its keys and adapts the first layer to grey images
        return smp.create_model(architecture, encoder, True, in_channels=1, classes=1, **head, **options,
                                pretrained_cfg_overlay={"file": local, "hf_hub_id": None, "num_classes": 0})
    network = smp.create_model(architecture, encoder, None, in_channels=3, classes=1, **head, **options)
    network.encoder.load_state_dict({name: tensor.float() for name, tensor in load_file(local).items()})
    network.encoder.set_in_channels(1, pretrained=True)  # sums the three colours' weights
    return network


def save_segmenter(path: Path | str, network: nn.Module, card: dict) -> None:
    """Write the weights as safetensors. `card` (architecture, encoder, num_classes, options, image_size, threshold, and
    what else is worth knowing) goes into the file, so the file alone is enough for `load_segmenter`."""
    state = {name: tensor.contiguous().cpu() for name, tensor in network.state_dict().items()}
    with replace_when_done(path) as temporary:
        save_file(state, temporary, metadata={"medaug": json.dumps(card, sort_keys=True)})


def load_segmenter(path: Path | str) -> tuple[nn.Module, dict]:
    """Return the network that `save_segmenter` wrote, in eval mode, and its card. Raises FileNotFoundError, or ValueError
    for a file that holds no such network."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights {path}: give a .safetensors file that 06-segmentation wrote")
    try:
        with safe_open(path, "pt") as file:
            card = json.loads((file.metadata() or {})["medaug"])
        network = build_segmenter(card["architecture"], card["encoder"], None, card["num_classes"], **card["options"])
        network.load_state_dict(load_file(path))
    except Exception as error:  # safetensors raises its own type
        raise ValueError(f"{path} is no network of 06-segmentation ({error}): give a .safetensors file from a run") from None
    return network.eval(), card


# ---------------------------------------------------------------- training


def augment_together(image_01: Tensor, mask: Tensor, generator: torch.Generator, rotate: float = 8.0,
                     shift: float = 0.06, scale: float = 0.1) -> tuple[Tensor, Tensor]:
    """Move each image (B, 1, H, W) and its mask (B, 1, H, W) by the same random affine map, and jitter the image only.

    `rotate` in degrees, `shift` as a share of half the width, `scale` as a share of 1. Half of the images are mirrored.
    The image's contrast and brightness vary by up to 20 % and 0.1; its values stay in 0..1.
    """
    batch = len(image_01)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * (high - low) + low

    angle, size = torch.deg2rad(draw(-rotate, rotate)), draw(1 - scale, 1 + scale)
    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    cos, sin, offset = angle.cos() * size, angle.sin() * size, draw(-shift, shift, 2)
    theta = torch.stack([torch.stack([cos * mirror, -sin, offset[:, 0]], 1),
                         torch.stack([sin * mirror, cos, offset[:, 1]], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(image_01.shape), align_corners=False)
    moved = F.grid_sample(image_01, grid, mode="bilinear", align_corners=False)
    moved_mask = F.grid_sample(mask, grid, mode="nearest", align_corners=False)
    gain, bias = draw(0.8, 1.2, 1, 1, 1), draw(-0.1, 0.1, 1, 1, 1)
    return (moved * gain + bias).clamp(0, 1), moved_mask


def fit_segmenter(model: nn.Module, images_u8: np.ndarray, masks: np.ndarray, plan: SegmenterPlan, *, seed: int,
                  device: str = "cpu", labels: np.ndarray | None = None, mask_weight: float | str = 1.0,
                  desc: str = "segmenter") -> list[dict]:
    """Train in place by `plan`; return the loss history, twenty rows `step, loss` (and `mask_weight` if it is learned).

    `images_u8` (N, H, W) uint8, `masks` (N, H, W) bool, `labels` (N,) class indices for a network with a classification
    head. Mask loss: binary cross-entropy + Dice; with labels the loss is `mask_weight` * mask loss +
    (1 - `mask_weight`) * cross-entropy, or, for "learned", the sum of exp(-s) * loss + s / 2 over both tasks with s
    learned (Kendall et al. 2018, eq. 10). At weight 0 the decoder is not run at all. Raises FloatingPointError on a
    loss that is not finite.
    """
    if plan.schedule not in SCHEDULES or plan.optimizer not in OPTIMIZERS:
        raise ValueError(f"plan {plan.optimizer} + {plan.schedule}: choose of {list(OPTIMIZERS)} and {list(SCHEDULES)}")
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout draws from the global generator
    model.to(device, memory_format=torch.channels_last).train()
    log_variances = torch.zeros(2, device=device, requires_grad=mask_weight == LEARNED)
    optimizer, scheduler = _build_optimizer(model, log_variances, plan)
    history, running = [], []
    for step in progress(range(plan.steps), desc=desc, unit="step"):
        # a batch larger than the training set repeats images
        chosen = np.sort(rng.choice(len(images_u8), plan.batch_size, replace=len(images_u8) < plan.batch_size))
        image_01, mask = augment_together(to_image_01(images_u8[chosen]), _to_mask(masks[chosen]), generator)
        pixel_values = to_pixel_values(image_01).to(device, memory_format=torch.channels_last)
        target = None if labels is None else torch.as_tensor(labels[chosen], device=device)
        losses = _compute_losses(model, pixel_values, mask.to(device), target, needs_mask=mask_weight != 0)
        loss = _weigh_losses(losses, mask_weight, log_variances)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{desc}: loss is {loss.item()} at step {step}; lower learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        running.append(loss.item())
        if (step + 1) % max(1, plan.steps // 20) == 0:
            row = {"step": step + 1, "loss": float(np.mean(running))}
            if mask_weight == LEARNED:
                row["mask_weight"] = float(F.softmax(-log_variances.detach(), 0)[0])  # the share of exp(-s)
            history.append(row)
            running = []
    return history


def _build_optimizer(model: nn.Module, log_variances: Tensor, plan: SegmenterPlan) -> tuple:
    groups, rates = [{"params": list(model.parameters())}], [plan.learning_rate]
    if log_variances.requires_grad:  # two numbers that have further to go than the weights, in as many steps
        groups, rates = [*groups, {"params": [log_variances], "weight_decay": 0.0}], [*rates, 10 * plan.learning_rate]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    optimizer = OPTIMIZERS[plan.optimizer](groups, weight_decay=plan.weight_decay)
    if plan.schedule == "constant":
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    warm_up = 0.2 if plan.steps > 5 else 0.3  # of five steps a fifth has no length, and PyTorch divides by it
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=plan.steps, pct_start=warm_up)


def _compute_losses(model: nn.Module, pixel_values: Tensor, mask: Tensor, target: Tensor | None,
                    needs_mask: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return (mask loss, class loss), None for a task that this network or this run does not have."""
    if not needs_mask:
        return None, F.cross_entropy(model.classification_head(model.encoder(pixel_values)[-1]), target)
    mask_logits, class_logits = split_outputs(model(pixel_values))
    dice_loss = smp.losses.DiceLoss("binary", from_logits=True)
    mask_loss = F.binary_cross_entropy_with_logits(mask_logits, mask) + dice_loss(mask_logits, mask)
    both = class_logits is not None and target is not None
    return mask_loss, F.cross_entropy(class_logits, target) if both else None


def _weigh_losses(losses: tuple[Tensor | None, Tensor | None], mask_weight: float | str, log_variances: Tensor) -> Tensor:
    mask_loss, class_loss = losses
    if mask_weight == LEARNED:
        return sum(torch.exp(-s) * loss + s / 2 for s, loss in zip(log_variances, (mask_loss, class_loss), strict=True))
    if mask_loss is None or class_loss is None:
        return class_loss if mask_loss is None else mask_loss
    return mask_weight * mask_loss + (1 - mask_weight) * class_loss


# ---------------------------------------------------------------- prediction


@torch.no_grad()
def predict_masks(model: nn.Module, images_u8: np.ndarray, batch_size: int = 64,
                  device: str = "cpu") -> tuple[np.ndarray, np.ndarray | None]:
    """Return mask probabilities (N, H, W) in 0..1 and, for a network with a head, class probabilities (N, k)."""
    model.to(device, memory_format=torch.channels_last).eval()
    masks, classes = [], []
    for start in range(0, len(images_u8), batch_size):
        pixel_values = to_pixel_values(to_image_01(images_u8[start:start + batch_size]))
        outputs = model(pixel_values.to(device, memory_format=torch.channels_last))
        mask_logits, class_logits = split_outputs(outputs)
        masks.append(mask_logits[:, 0].sigmoid().cpu().numpy())  # (B, 1, H, W) -> (B, H, W)
        if class_logits is not None:
            classes.append(class_logits.softmax(1).cpu().numpy())
    return np.concatenate(masks), np.concatenate(classes) if classes else None


@torch.no_grad()
def predict_own_size(model: nn.Module, image_u8: np.ndarray, image_size: int, device: str = "cpu") -> np.ndarray:
    """Return the mask probabilities (H, W) of one whole image (H, W) uint8 of any size and shape.

    The shorter side is brought to `image_size`, the size of training; nothing is cut off. The sides are padded by
    their edge to a multiple of 32, as the encoders want, and the probabilities go back to the image's own size.
    """
    height, width = image_u8.shape
    scale = image_size / min(height, width)
    small = max(image_size, round(height * scale)), max(image_size, round(width * scale))
    image_01 = F.interpolate(to_image_01(image_u8[None]), small, mode="bilinear", antialias=True)
    padded = F.pad(image_01, (0, -small[1] % 32, 0, -small[0] % 32), mode="replicate")
    model.to(device, memory_format=torch.channels_last).eval()
    mask_logits, _ = split_outputs(model(to_pixel_values(padded).to(device, memory_format=torch.channels_last)))
    probs = mask_logits.sigmoid()[:, :, :small[0], :small[1]]
    return F.interpolate(probs, (height, width), mode="bilinear", antialias=True)[0, 0].cpu().numpy()


def segment_folder(folder: Path, output: Path, model: nn.Module, *, image_size: int, threshold: float,
                   open_image: Callable, suffixes: Container[str]) -> tuple[int, list[str]]:
    """Write `output/<same place and name>.png`, 0 and 255 in the image's own size, for each image under `folder`.

    `open_image` turns a file into a grey PIL image and raises ValueError with the reason where it cannot. Return the
    number of masks written and one line for each file that could not be read. Two images of one name (a.png, a.jpg) keep
    their suffix in the mask's name. Raises FileNotFoundError without images, ValueError where masks would replace them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give the folder that holds the images")
    if output.resolve() == folder.resolve():
        raise ValueError(f"--output is the folder of the images, {folder}: masks would replace them; give another one")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in suffixes and file.is_file()
                   and not file.name.startswith(".") and output.resolve() not in file.resolve().parents)
    if not files:
        raise FileNotFoundError(f"no images under {folder}: expected {', '.join(sorted(suffixes))}")
    often, unread = Counter(file.with_suffix("") for file in files), []
    for file in progress(files, desc="masks", unit="image"):
        try:
            image_u8 = np.asarray(open_image(file))  # (H, W)
        except ValueError as error:
            unread.append(f"{file}: {error}")
            continue
        mask_u8 = (predict_own_size(model, image_u8, image_size) > threshold).astype(np.uint8) * 255
        name = file.with_suffix(".png") if often[file.with_suffix("")] == 1 else file.with_name(f"{file.name}.png")
        with replace_when_done(output / name.relative_to(folder)) as temporary:
            Image.fromarray(mask_u8).save(temporary, format="PNG")
    return len(files) - len(unread), unread


def to_image_01(images_u8: np.ndarray) -> Tensor:
    """(B, H, W) uint8 -> (B, 1, H, W) float32 in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(images_u8)).float()[:, None] / 255


def to_pixel_values(image_01: Tensor) -> Tensor:
    """0..1 -> standardised by the mean and spread of ImageNet's grey values."""
    return (image_01 - MEAN) / STD


def split_outputs(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return (mask logits, class logits or None), whether or not the network has a classification head."""
    return (outputs, None) if isinstance(outputs, Tensor) else (outputs[0], outputs[1])


def _to_mask(masks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(masks)).float()[:, None]
