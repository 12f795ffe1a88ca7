"""One epoch of training a whole network: our loop beside a plain one in the manner of torchvision's reference scripts."""

import time

import numpy as np
import torch
from run import Comparison
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from medaug import classifiers, training
from medaug.phantom.chest import render
from medaug.phantom.cohort import draw_cohort

CLASSES = ("normal", "bacterial", "viral")
N, N_VAL, BATCH, SIZE, RATE = 192, 32, 32, 64, 1e-3
PREPROCESSING = classifiers.Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3)


def list_comparisons(networks: tuple[str, ...] = ("small-cnn", "mobilenetv2", "resnet18", "vit-tiny"), n: int = N, n_val: int = N_VAL) -> list[Comparison]:
    """Return one comparison for each network: our own, two of torchvision and one of timm. Both ways keep the images in memory, start at the
    same weights, take one epoch of AdamW steps and score the validation images once."""
    cohort = draw_cohort(n + n_val, CLASSES, images_per_patient=(1, 1), seed=0)
    images_u8 = np.asarray(render(cohort["patient_seed"], cohort["image_seed"], cohort["rendered_label"], size=SIZE)["image_u8"])
    data = images_u8, cohort["label"].map(CLASSES.index).to_numpy(), n
    return [Comparison(f"epoch-{name}-{SIZE}px", lambda name=name: fit_ours(build(name), data),
                       lambda name=name: fit_plainly(build(name), data), "fit_classifier beside a plain loop over a DataLoader")
            for name in networks]  # fmt: skip


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return classifiers.build_classifier(name, len(CLASSES), image_size=SIZE)


def fit_ours(network: torch.nn.Module, data: tuple[np.ndarray, np.ndarray, int]) -> float:
    """Train for one epoch with `fit_classifier`; return images per second."""
    images_u8, labels, n = data
    plan = training.TrainingPlan(n // BATCH, BATCH, RATE, evaluations=1)
    began = time.perf_counter()
    training.fit_classifier(network, training.Examples(images_u8[:n], labels[:n]), training.Examples(images_u8[n:], labels[n:]),
                            plan, PREPROCESSING)  # fmt: skip
    return n / (time.perf_counter() - began)


def fit_plainly(network: torch.nn.Module, data: tuple[np.ndarray, np.ndarray, int]) -> float:
    """Train for one epoch with a DataLoader and torchvision's transforms; return images per second."""
    images_u8, labels, n = data
    dataset = TensorDataset(torch.from_numpy(images_u8)[:, None].expand(-1, 3, -1, -1), torch.from_numpy(labels))
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std)])
    train, val = (torch.utils.data.Subset(dataset, rows) for rows in (range(n), range(n, len(dataset))))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    began = time.perf_counter()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=n // BATCH + 1)
    network.train()
    for images, targets in DataLoader(train, BATCH, shuffle=True):
        loss = F.cross_entropy(network(transform(images)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss.item()  # both loops report the loss at every step
    network.eval()
    with torch.no_grad():
        hits = sum((network(transform(images)).argmax(1) == targets).sum().item() for images, targets in DataLoader(val, 256))
    assert 0 <= hits <= len(val)
    return n / (time.perf_counter() - began)
