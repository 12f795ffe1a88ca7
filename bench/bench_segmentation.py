"""Lung masks: our training loop beside a plain loop in the manner of segmentation-models-pytorch's examples."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import segmentation_models_pytorch as smp
import torch
from run import Comparison
from torch.utils.data import DataLoader, TensorDataset

from medaug import runtime, segmentation

N, STEPS, BATCH, SIZE, RATE = 128, 12, 16, 64, 1e-3
OPTIONS = {"decoder_channels": [64, 48, 32, 16, 8]}


def list_comparisons() -> list[Comparison]:
    """Return the one comparison: a small U-Net, the same images, batches, loss and optimiser. Ours also moves images and
    masks at every step; both keep the images in memory, where the examples read files, so the loader's cost is left out.
    """
    images_u8, masks = draw_data()

    def state_memory(_: float) -> dict:
        return {f"peak_mb_{way.__name__.removeprefix('fit_')}": measure_memory(way) for way in (fit_ours, fit_plainly)}

    return [Comparison("segmentation-64px", lambda: fit_ours(images_u8, masks), lambda: fit_plainly(images_u8, masks),
                       "channels last and augmentation beside the library's defaults and none", extra=state_memory)]  # fmt: skip


def draw_data() -> tuple[np.ndarray, np.ndarray]:
    """Return N grey images and N masks of noise: speed and memory do not depend on what they show."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (N, SIZE, SIZE), dtype=np.uint8), rng.random((N, SIZE, SIZE)) < 0.3


def measure_memory(way: Callable) -> float:
    """Return the peak resident memory (MB) of a fresh process that trains in this way and does nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(report_peak, way).result()


def report_peak(way: Callable) -> float:
    way(*draw_data())
    return runtime.peak_memory_mb()


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    return segmentation.build_segmenter("unet", "tu-lcnet_050", **OPTIONS)


def fit_ours(images_u8: np.ndarray, masks: np.ndarray) -> float:
    """Train with `fit_segmenter`; return images per second."""
    network, plan = build(), segmentation.SegmenterPlan(steps=STEPS, batch_size=BATCH, learning_rate=RATE)
    began = time.perf_counter()
    segmentation.fit_segmenter(network, images_u8, masks, plan, seed=0)
    return STEPS * BATCH / (time.perf_counter() - began)


def fit_plainly(images_u8: np.ndarray, masks: np.ndarray) -> float:
    """Train the same network from a DataLoader with the library's losses; return images per second."""
    network = build().train()
    image_01 = torch.from_numpy(images_u8).float()[:, None] / 255
    loader = DataLoader(TensorDataset(image_01, torch.from_numpy(masks).float()[:, None]), BATCH, shuffle=True)
    dice_loss, cross_entropy = smp.losses.DiceLoss("binary"), smp.losses.SoftBCEWithLogitsLoss()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    began, step = time.perf_counter(), 0
    while step < STEPS:
        for image, mask in loader:
            logits = network(image)
            loss = dice_loss(logits, mask) + cross_entropy(logits, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()  # the examples log every step
            step += 1
            if step == STEPS:
                break
    return STEPS * BATCH / (time.perf_counter() - began)
