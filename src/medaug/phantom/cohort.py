"""Cohorts of simulated patients: who has what, how many images each, and from which seeds they are
rendered.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from medaug.phantom import chest


def draw_cohort(
    n_patients: int,
    classes: Sequence[str] = ("normal", "bacterial", "viral"),
    class_probs: Sequence[float] | None = None,
    images_per_patient: tuple[int, int] = (1, 4),
    seed: int = 0,
    null: bool = False,
    prefix: str = "ph",
) -> pd.DataFrame:
    """Draw patients with one label each and a few images each; one row per image.

    Columns: `image_id` ("ph0-p00012-2"), `patient_id`, `label` (recorded), `rendered_label` (what the pixels
    show), `patient_seed` and `image_seed` (int64). `class_probs` is the imbalance dial (equal when None).
    With `null` the rendered label is drawn again, independently, so that no image can help any classifier.
    Serves chest and tissue alike.
    """
    low, high = images_per_patient
    if n_patients < 1 or not 1 <= low <= high:
        raise ValueError(
            "phantom: a cohort needs n_patients >= 1 and images_per_patient (low, high) with 1 <= low <= high"
        )
    if class_probs is not None and (len(class_probs) != len(classes) or not np.isclose(sum(class_probs), 1)):
        raise ValueError("phantom: class_probs needs one probability per class, and a sum of 1")
    rng = np.random.default_rng([3, seed])
    label = rng.choice(len(classes), n_patients, p=class_probs)
    count = rng.integers(low, high + 1, n_patients)
    patient_seed = draw_seeds(rng, n_patients)
    shown = rng.choice(len(classes), n_patients, p=class_probs) if null else label
    row = np.repeat(np.arange(n_patients), count)
    number = np.concatenate([np.arange(c) for c in count])
    names = np.asarray(classes, dtype=object)
    return pd.DataFrame(
        {
            "image_id": [f"{prefix}{seed}-p{i:05d}-{k}" for i, k in zip(row, number, strict=True)],
            "patient_id": [f"{prefix}{seed}-p{i:05d}" for i in row],
            "label": names[label[row]],
            "rendered_label": names[shown[row]],
            "patient_seed": patient_seed[row],
            "image_seed": draw_seeds(rng, len(row)),
        }
    )


def draw_generic(n: int, seed: int = 0) -> pd.DataFrame:
    """Draw n generic chests, a patient each, with captions: what the foundation weights are trained on.

    Columns as in `draw_cohort`, and `caption`. The labels are `chest.GENERIC`: none of the study's pneumonia
    patterns.
    """
    rows = draw_cohort(n, chest.GENERIC, images_per_patient=(1, 1), seed=seed, prefix="generic")
    return rows.assign(
        caption=chest.describe(rows["patient_seed"], rows["image_seed"], rows["rendered_label"])
    )


def draw_seeds(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draw n seeds, non-negative int64."""
    return rng.integers(0, 2**63 - 1, n, dtype=np.int64)
