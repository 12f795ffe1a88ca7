"""A frozen backbone: features computed once and kept, against a forward pass at every step."""

import tempfile
import time

import numpy as np
import torch
from run import Comparison
from torch.nn import functional as F

from medaug import classifiers, training

N, STEPS, BATCH, SIZE, CLASSES = 128, 40, 32, 64, 3


def list_comparisons() -> list[Comparison]:
    """Return the one comparison: ten epochs of a linear head on a frozen MobileNetV2, the caching counted in."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images_u8 = rng.integers(0, 256, (N, SIZE, SIZE), dtype=np.uint8)
    labels = rng.integers(0, CLASSES, N)
    model = classifiers.build_classifier("mobilenetv2", CLASSES)
    classifiers.split_head(model)
    preprocessing = classifiers.Preprocessing(size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
    return [Comparison("frozen-features-64px", lambda: fit_cached(model, images_u8, labels, preprocessing),
                       lambda: fit_plainly(model, images_u8, labels, preprocessing),
                       "features kept beside forward passes at every step, 10 epochs")]  # fmt: skip


def fit_cached(model: torch.nn.Module, images_u8: np.ndarray, labels: np.ndarray,
               preprocessing: classifiers.Preprocessing) -> float:
    """Extract the features into an empty cache and train a head on them; return images per second."""
    plan = training.TrainingPlan(steps=STEPS, batch_size=BATCH, evaluations=1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        features = classifiers.extract_features(model, images_u8, preprocessing, cache=cache)
    training.fit_head(features, labels, features[:BATCH], labels[:BATCH], plan, CLASSES)
    return STEPS * BATCH / (time.perf_counter() - began)


def fit_plainly(model: torch.nn.Module, images_u8: np.ndarray, labels: np.ndarray,
                preprocessing: classifiers.Preprocessing) -> float:
    """Train the same head with a forward pass of the frozen network at every step; return images per second."""
    model.eval()
    head = torch.nn.Linear(1280, CLASSES)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    targets = torch.from_numpy(labels)
    began = time.perf_counter()
    for rows in training.draw_batches(N, BATCH, STEPS, seed=0):
        with torch.no_grad():
            image_01 = classifiers.to_image_01(images_u8[rows], preprocessing)
            features = model(classifiers.normalise_images(image_01, preprocessing))
        F.cross_entropy(head(features), targets[rows]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return STEPS * BATCH / (time.perf_counter() - began)
