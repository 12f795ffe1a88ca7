"""A frozen backbone for twenty epochs: its features computed once and kept, against a forward pass in every epoch.

With MEDAUG_DATA (a folder with weights/) MobileNetV2 has its ImageNet weights, else random ones: the speed is the same.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from run import Comparison
from sklearn.metrics import f1_score
from torch.nn import functional as F

from medaug import classifiers, training
from medaug.phantom.chest import render
from medaug.phantom.cohort import draw_cohort

CLASSES = ("normal", "bacterial", "viral")
N, N_VAL, EPOCHS, BATCH, SIZE = 96, 32, 20, 32, 96
WEIGHTS = Path(os.environ.get("MEDAUG_DATA", "")) / "weights" / "mobilenet_v2_imagenet.safetensors"
PREPROCESSING = classifiers.Preprocessing(SIZE, (0.5,) * 3, (0.5,) * 3)


def list_comparisons(n: int = N, n_val: int = N_VAL) -> list[Comparison]:
    """Return the one comparison: the same head, batches, optimiser and schedule, validation scored in every epoch; the
    first pass over the images is counted in. Both ways end at the same validation accuracy, or it is an error."""
    cohort = draw_cohort(n + n_val, CLASSES, images_per_patient=(1, 1), seed=0)
    images_u8 = np.asarray(render(cohort["patient_seed"], cohort["image_seed"], cohort["rendered_label"], size=SIZE)["image_u8"])
    data = images_u8, cohort["label"].map(CLASSES.index).to_numpy(), n
    torch.manual_seed(0)
    weights = str(WEIGHTS) if WEIGHTS.is_file() else "none"
    model = classifiers.split_head(classifiers.build_classifier("mobilenetv2", len(CLASSES), weights))
    plan = training.TrainingPlan(EPOCHS * n // BATCH, BATCH, evaluations=EPOCHS)
    features = classifiers.extract_features(model, images_u8[:n], PREPROCESSING)  # the plain head needs their mean and spread
    found: dict[str, float] = {}

    def ours() -> float:
        rate, found["ours"] = fit_cached(model, data, plan)
        return rate

    def plain() -> float:
        rate, found["plain"] = fit_plainly(model, data, plan, features)
        return rate

    def compare_accuracy(_: float) -> dict:
        if abs(found["ours"] - found["plain"]) > 1 / n_val:
            raise AssertionError(f"the two ways end at different accuracies: {found}")
        return {"accuracy_ours": found["ours"], "accuracy_plain": found["plain"], "epochs": EPOCHS}

    return [Comparison(f"frozen-features-{SIZE}px", ours, plain,
                       f"MobileNetV2's features kept beside forward passes in each of {EPOCHS} epochs", extra=compare_accuracy)]


def fit_cached(model: torch.nn.Module, data: tuple[np.ndarray, np.ndarray, int], plan: training.TrainingPlan) -> tuple[float, float]:
    """Extract the features into an empty cache and train a head on them; return (images per second, validation accuracy)."""
    images_u8, labels, n = data
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        features = classifiers.extract_features(model, images_u8, PREPROCESSING, cache=cache)
    head, _ = training.fit_head(features[:n], labels[:n], features[n:], labels[n:], plan, len(CLASSES))
    seconds = time.perf_counter() - began
    accuracy = (training.predict_probs(head, features[n:]).argmax(1) == labels[n:]).mean()
    return plan.steps * plan.batch_size / seconds, float(accuracy)


def fit_plainly(model: torch.nn.Module, data: tuple[np.ndarray, np.ndarray, int], plan: training.TrainingPlan,
                features: np.ndarray) -> tuple[float, float]:
    """Train the same head with a forward pass of the frozen network at every step; return what `fit_cached` returns."""
    images_u8, labels, n = data
    torch.manual_seed(plan.seed)
    head = training.build_head(features, len(CLASSES))
    optimizer = torch.optim.AdamW(head.parameters(), plan.learning_rate, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=plan.steps + 1, pct_start=0.2,
                                                   cycle_momentum=False)  # fmt: skip
    targets, scores = torch.from_numpy(labels.copy()), []
    began = time.perf_counter()
    for step, rows in enumerate(training.draw_batches(n, plan.batch_size, plan.steps, plan.seed), start=1):
        loss = F.cross_entropy(head(embed(model, images_u8[rows])), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (plan.steps // plan.evaluations) == 0:
            with torch.no_grad():
                preds = head(embed(model, images_u8[n:])).argmax(1)
            scores.append((f1_score(labels[n:], preds, average="macro", labels=range(len(CLASSES)), zero_division=0),
                           float((preds == targets[n:]).float().mean())))
    seconds = time.perf_counter() - began
    best = max(range(len(scores)), key=lambda i: (scores[i][0], -i))  # the first epoch of the best score, as in ours
    return plan.steps * plan.batch_size / seconds, scores[best][1]


@torch.no_grad()
def embed(model: torch.nn.Module, images_u8: np.ndarray) -> torch.Tensor:
    return model(classifiers.normalise_images(classifiers.to_image_01(images_u8, PREPROCESSING), PREPROCESSING))
