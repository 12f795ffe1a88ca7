"""Where a classifier looks: Grad-CAM by captum, and how much of a map lies outside the lungs."""

import itertools

import numpy as np
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

MIN_SIDE = 7  # cells: the maps that ImageNet's networks end with at 224 px, as in the paper of Grad-CAM


def find_layer(network: nn.Module, pixel_values: Tensor, min_side: int = MIN_SIDE) -> nn.Module:
    """Return the part of `network` that ends with its deepest feature maps of at least `min_side` x `min_side` cells.

    `pixel_values` (N, C, H, W): one image is enough. Deeper maps know more of the class and less of the place.
    Raises ValueError where there are none, as in a transformer that turns the image into tokens at once.
    """
    seen: list[tuple[nn.Module, torch.Size]] = []

    def note(module: nn.Module, _, output) -> None:
        if isinstance(output, Tensor):
            seen.append((module, output.shape))

    handles = [module.register_forward_hook(note) for module in network.modules()]
    try:
        with torch.no_grad():
            network.eval()(pixel_values[:1])
    finally:
        for handle in handles:
            handle.remove()
    before_tokens = itertools.takewhile(lambda part: len(part[1]) != 3, seen)  # (N, L, D): places have become a list
    found = [module for module, shape in before_tokens if len(shape) == 4 and min(shape[2:]) >= min_side]
    if not found or (isinstance(found[-1], nn.Conv2d) and found[-1].in_channels == pixel_values.shape[1]):
        raise ValueError(f"{type(network).__name__} has no feature maps of {min_side} x {min_side} cells behind its "
                         "first layer: Grad-CAM is for convolutional networks")
    return found[-1]


def explain_images(network: nn.Module, pixel_values: Tensor, class_index: np.ndarray, layer: nn.Module | None = None,
                   batch_size: int = 64) -> np.ndarray:
    """Return Grad-CAM maps (N, H, W) float32, not negative: where the evidence for class `class_index` (N,) was found.

    `pixel_values` (N, C, H, W) as the network wants them, on its device; `layer` as `find_layer` gives it. Each
    channel of the layer is weighted by its mean gradient, the sum is cut at zero (Selvaraju et al. 2017, eq. 1 and 2)
    and enlarged bilinearly. A map may be zero everywhere. Leaves the network in eval mode.
    """
    layer = find_layer(network, pixel_values) if layer is None else layer
    target, maps = torch.as_tensor(class_index, device=pixel_values.device), []
    grad_cam = LayerGradCam(network.eval(), layer)
    for images, classes in zip(pixel_values.split(batch_size), target.split(batch_size), strict=True):
        cells = grad_cam.attribute(images, classes, relu_attributions=True).detach()  # (B, 1, h, w)
        enlarged = LayerAttribution.interpolate(cells, tuple(images.shape[2:]), "bilinear")  # (B, 1, H, W)
        maps.append(enlarged[:, 0].float().cpu().numpy())
    return np.concatenate(maps)


def share_outside(attribution: np.ndarray, lung_masks: np.ndarray) -> np.ndarray:
    """Return the share (N,) 0 to 1 of each map's positive attribution that lies outside the lungs; NaN for an empty map.

    `attribution` (N, H, W), `lung_masks` (N, H, W) bool. A flat map scores the share of the image outside the lungs.
    Raises ValueError where the shapes differ.
    """
    if attribution.shape != lung_masks.shape:
        raise ValueError(f"maps {attribution.shape} and masks {lung_masks.shape} differ: load the masks in the size of the maps")
    positive = np.clip(attribution, 0, None).astype(np.float64)
    outside, all_of_it = np.where(lung_masks, 0, positive).sum(axis=(1, 2)), positive.sum(axis=(1, 2))
    return np.divide(outside, all_of_it, out=np.full(len(positive), np.nan), where=all_of_it > 0)
