"""Segmentation networks by name, one training function for all, and Dice with its aggregation in the name."""

from collections.abc import Sequence

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage import filters, morphology
from torch import Tensor, nn

from medaug.runtime import progress

# The eight of the fourth report, in the words of segmentation-models-pytorch.
ARCHITECTURES = ("unet", "unetplusplus", "manet", "fpn", "pspnet", "pan", "deeplabv3", "deeplabv3plus")


def build_segmenter(architecture: str, encoder: str, encoder_weights: str | None = None, num_classes: int = 0,
                    **options) -> nn.Module:
    """Return the library's own network: (B, 1, H, W) in 0..1 -> mask logits (B, 1, H, W).

    `encoder` is a name of segmentation-models-pytorch or "tu-" + a timm name. With `num_classes` > 0 the encoder also
    feeds a classification head and the network returns (mask logits, class logits (B, num_classes)). `options` go to the
    library's constructor (for example decoder_channels). Raises ValueError for a name that is not in `ARCHITECTURES`.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture '{architecture}' is unknown: choose one of {', '.join(ARCHITECTURES)}")
    head = {"aux_params": {"classes": num_classes, "pooling": "avg", "dropout": 0.2}} if num_classes else {}
    return smp.create_model(architecture, encoder, encoder_weights, in_channels=1, classes=1, **head, **options)


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


def fit_segmenter(model: nn.Module, images_u8: np.ndarray, masks: np.ndarray, *, steps: int, batch_size: int,
                  learning_rate: float, seed: int, device: str = "cpu", labels: np.ndarray | None = None,
                  mask_weight: float = 1.0, desc: str = "segmenter") -> list[dict]:
    """Train in place for `steps` optimiser steps (the same budget for every network); return the loss history.

    `images_u8` (N, H, W) uint8, `masks` (N, H, W) bool, `labels` (N,) class indices for a network with a classification
    head. Loss: `mask_weight` * (binary cross-entropy + Dice) + (1 - `mask_weight`) * cross-entropy. AdamW, one cycle.
    Raises FloatingPointError on a loss that is not finite.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout draws from the global generator
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
    dice_loss = smp.losses.DiceLoss("binary", from_logits=True)
    history, running = [], []
    for step in progress(range(steps), desc=desc, unit="step"):
        chosen = np.sort(rng.choice(len(images_u8), batch_size, replace=len(images_u8) < batch_size))
        image_01, mask = augment_together(to_image_01(images_u8[chosen]), _to_mask(masks[chosen]), generator)
        mask_logits, class_logits = split_outputs(model(image_01.to(device)))
        mask = mask.to(device)
        mask_loss = F.binary_cross_entropy_with_logits(mask_logits, mask) + dice_loss(mask_logits, mask)
        loss = mask_weight * mask_loss
        if class_logits is not None and labels is not None:
            target = torch.as_tensor(labels[chosen], device=device)
            loss = loss + (1 - mask_weight) * F.cross_entropy(class_logits, target)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{desc}: loss is {loss.item()} at step {step}; lower learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        running.append(loss.item())
        if (step + 1) % max(1, steps // 20) == 0:
            history.append({"step": step + 1, "loss": float(np.mean(running))})
            running = []
    return history


@torch.no_grad()
def predict_masks(model: nn.Module, images_u8: np.ndarray, batch_size: int = 64,
                  device: str = "cpu") -> tuple[np.ndarray, np.ndarray | None]:
    """Return mask probabilities (N, H, W) in 0..1 and, for a network with a head, class probabilities (N, k)."""
    model.to(device).eval()
    masks, classes = [], []
    for start in range(0, len(images_u8), batch_size):
        mask_logits, class_logits = split_outputs(model(to_image_01(images_u8[start:start + batch_size]).to(device)))
        masks.append(mask_logits[:, 0].sigmoid().cpu().numpy())  # (B, 1, H, W) -> (B, H, W)
        if class_logits is not None:
            classes.append(class_logits.softmax(1).cpu().numpy())
    return np.concatenate(masks), np.concatenate(classes) if classes else None


def predict_mean_mask(train_masks: np.ndarray, n: int) -> np.ndarray:
    """Return the training masks' mean as the probability of every pixel, n times: the baseline that sees no image."""
    return np.repeat(train_masks.mean(0, dtype=np.float32)[None], n, 0)


def predict_threshold(images_u8: np.ndarray) -> np.ndarray:
    """Return masks (N, H, W) in {0, 1} by Otsu's threshold and morphology: dark regions that do not touch the border."""
    masks = np.zeros(images_u8.shape, np.float32)
    for mask, image in zip(masks, images_u8, strict=True):
        dark = image < filters.threshold_otsu(image) if image.min() < image.max() else np.zeros(image.shape, bool)
        opened = morphology.opening(dark, morphology.disk(max(1, image.shape[0] // 64)))
        regions, count = ndimage.label(opened)
        at_border = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
        sizes = ndimage.sum_labels(opened, regions, np.arange(count + 1))
        sizes[at_border] = 0
        mask[:] = np.isin(regions, [r for r in np.argsort(sizes)[-2:] if sizes[r] > 0])
    return masks


def compute_dice_per_image(pred_masks: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return hard Dice (N,) of bool masks (N, H, W); two empty masks agree and score 1, one empty mask scores 0."""
    overlap, total = (pred_masks & masks).sum((1, 2)), pred_masks.sum((1, 2)) + masks.sum((1, 2))
    return np.where(total == 0, 1.0, 2 * overlap / np.maximum(total, 1))


def compute_hd95_per_image(pred_masks: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the 95th percentile of the symmetric surface distance (N,) in pixels (Maier-Hein et al. 2024, HD95).

    Two empty masks score 0; if only one is empty the distance is the image's diagonal, the largest there can be.
    """
    return np.array([_hd95(a, b) for a, b in zip(pred_masks, masks, strict=True)])


def segmentation_metrics(pred_masks: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Return `dice_per_image` (mean over images), `dice_pooled` (all pixels as one image), `iou`, `hd95`, `n`.

    Bool masks (N, H, W). The pooled score weighs an image by the size of its masks, so that small and badly segmented
    lungs hardly count; the fourth report's figures were soft and pooled over batches.
    """
    overlap, union = (pred_masks & masks).sum((1, 2)), (pred_masks | masks).sum((1, 2))
    total = pred_masks.sum() + masks.sum()
    return {
        "dice_per_image": float(compute_dice_per_image(pred_masks, masks).mean()),
        "dice_pooled": float(2 * overlap.sum() / total) if total else 1.0,
        "iou": float(np.where(union == 0, 1.0, overlap / np.maximum(union, 1)).mean()),
        "hd95": float(compute_hd95_per_image(pred_masks, masks).mean()),
        "n": len(masks),
    }


def bootstrap_mean(values: np.ndarray, clusters: Sequence[str], n_boot: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `values` (N,) when whole clusters (patients) are drawn with replacement."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (n_boot, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return tuple(np.quantile(means, [0.025, 0.975]))


def to_image_01(images_u8: np.ndarray) -> Tensor:
    """(B, H, W) uint8 -> (B, 1, H, W) float32 in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(images_u8)).float()[:, None] / 255


def split_outputs(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return (mask logits, class logits or None), whether or not the network has a classification head."""
    return (outputs, None) if isinstance(outputs, Tensor) else (outputs[0], outputs[1])


def _to_mask(masks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(masks)).float()[:, None]


def _hd95(pred_mask: np.ndarray, mask: np.ndarray) -> float:
    if not pred_mask.any() and not mask.any():
        return 0.0
    if not pred_mask.any() or not mask.any():
        return float(np.hypot(*mask.shape))
    edges = [m & ~ndimage.binary_erosion(m, border_value=0) for m in (pred_mask, mask)]
    to_mask, to_pred = (ndimage.distance_transform_edt(~edge) for edge in reversed(edges))
    return float(np.quantile(np.concatenate([to_mask[edges[0]], to_pred[edges[1]]]), 0.95))
