"""Arms: which images a classifier is trained on. Arms differ in what is added to the real images, and in nothing else.

Every arm that adds images adds the same number of them, with the classes in the shares of the real training images, and
every arm is trained for the same number of optimiser steps (CLAIMS: Pink & Sykes, PMLR 318, 2026).
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd

COLUMNS = ["image_id", "path", "label", "origin", "weight", "augment", "view", "phase"]
PLAIN = {"weight": 1.0, "augment": False, "view": "", "phase": 0}


def build_arm(name: str, train: pd.DataFrame, synthetic: pd.DataFrame | None = None, oracle: pd.DataFrame | None = None,
              ratio: float = 1.0, seed: int = 0, generator_seed: int = 0, generator: str = "lora") -> pd.DataFrame:
    """Return the rows to train on: `image_id, path, label, origin, weight` (of the loss), `augment` (transform each draw),
    `view` (the fixed transformation to train on, a method of `medaug.dct`; "" for the image itself) and `phase` (0, 1: what
    is trained on one after the other, an equal number of steps each).

    `train`: the manifest's training rows; `synthetic`: rows of `synthetic/manifest.parquet`; `oracle`: the manifest's
    oracle rows. An arm adds `round(ratio * n)` images to the n real ones of each class; `seed` chooses which.
    `generator_seed` and `generator` say whose images the arms with synthetic images take (`real+untuned`: the untuned
    one's), `real+selected` only those whose column `selected` is true. Raises ValueError where an
    arm lacks its images, or where held-out images would enter it.
    """
    if name not in ARMS:
        raise ValueError(f"no arm '{name}': choose from {', '.join(ARMS)}")
    _check_train(train)
    source = _pick_source(name, train, synthetic, oracle, generator_seed, generator)
    rng = np.random.default_rng([seed, generator_seed, 7])
    rows = ARMS[name](train.assign(**PLAIN), source, ratio, rng)
    return rows[COLUMNS].reset_index(drop=True)


def take_fraction(train: pd.DataFrame, fraction: float, seed: int = 0) -> pd.DataFrame:
    """Return the rows of a `fraction` (over 0, at most 1) of each class's patients, rounded up, in the order of `train`.

    Of one `seed` the smaller fractions lie inside the larger ones. A patient counts in the class of the first image.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}: choose more than 0 and at most 1")
    rng, chosen = np.random.default_rng([seed, 11]), set()
    label_of = train.groupby("patient_id")["label"].first()  # sorted by patient
    for _, patients in label_of.groupby(label_of):
        count = math.ceil(round(fraction * len(patients), 9))
        chosen |= set(rng.permutation(patients.index.to_numpy())[:count])
    return train[train["patient_id"].isin(chosen)].reset_index(drop=True)


def count_added(train: pd.DataFrame, ratio: float) -> dict[str, int]:
    """Return how many images of each class an arm adds: `ratio` times the real ones, rounded."""
    return {label: round(ratio * n) for label, n in train["label"].value_counts().sort_index().items()}


def weigh_classes(labels: pd.Series) -> pd.Series:
    """Return one weight per row, n / (k n_c), so that each of the k classes counts as much (mean weight 1)."""
    counts = labels.value_counts()
    return len(labels) / (len(counts) * labels.map(counts).astype(float))


def _real(train, source, ratio, rng):
    return train


def _real_weighted(train, source, ratio, rng):
    return train.assign(weight=weigh_classes(train["label"]))


def _real_oversampled(train, source, ratio, rng):
    most = train["label"].value_counts().max()
    missing = {label: most - n for label, n in train["label"].value_counts().sort_index().items()}
    return pd.concat([train, _copy(train, missing, rng)])


def _real_downsampled(train, source, ratio, rng):
    least = train["label"].value_counts().min()
    return _draw(train, dict.fromkeys(sorted(train["label"].unique()), least), rng)


def _real_duplicates(train, source, ratio, rng):
    return pd.concat([train, _copy(train, count_added(train, ratio), rng)])


def _real_classical(train, source, ratio, rng):
    return pd.concat([train, _copy(train, count_added(train, ratio), rng).assign(augment=True)])


def _real_viewed(train, source, ratio, rng, view):
    return pd.concat([train, _copy(train, count_added(train, ratio), rng).assign(view=view)])


def _real_added(train, source, ratio, rng):
    return pd.concat([train, _draw(source, count_added(train, ratio), rng)])


def _synthetic_only(train, source, ratio, rng):
    return _draw(source, count_added(train, ratio), rng)


def _synthetic_first(train, source, ratio, rng):
    return pd.concat([_draw(source, count_added(train, ratio), rng), train.assign(phase=1)])


ARMS: dict[str, Callable[..., pd.DataFrame]] = {
    "real": _real,
    "real-weighted": _real_weighted,
    "real-oversampled": _real_oversampled,
    "real-downsampled": _real_downsampled,
    "real+duplicates": _real_duplicates,
    "real+classical": _real_classical,
    "real+dct1": partial(_real_viewed, view="dct1"),
    "real+dct1-corrected": partial(_real_viewed, view="dct1-corrected"),
    "real+dct2": partial(_real_viewed, view="dct2"),
    "real+dct2-corrected": partial(_real_viewed, view="dct2-corrected"),
    "real+untuned": _real_added,
    "real+synthetic": _real_added,
    "real+selected": _real_added,
    "synthetic->real": _synthetic_first,
    "synthetic": _synthetic_only,
    "oracle": _real_added,
}
# whose images an arm takes; "" = the generator under study
GENERATORS = {"real+untuned": "untuned", **dict.fromkeys(["real+synthetic", "real+selected", "synthetic->real", "synthetic"], "")}


def _copy(rows: pd.DataFrame, counts: dict[str, int], rng: np.random.Generator) -> pd.DataFrame:
    """Copy `counts[label]` rows of each class: all rows as often as they fit, the rest drawn without repetition."""
    copies = []
    for label, count in counts.items():
        pool = rows[rows["label"] == label]
        whole, rest = divmod(count, len(pool))
        copies += [pool] * whole + [pool.iloc[np.sort(rng.choice(len(pool), rest, replace=False))]]
    return pd.concat(copies)


def _draw(rows: pd.DataFrame, counts: dict[str, int], rng: np.random.Generator) -> pd.DataFrame:
    """Draw `counts[label]` different rows of each class; ValueError where there are not so many."""
    for label, count in counts.items():
        found = int((rows["label"] == label).sum())
        if found < count:
            raise ValueError(f"the arm adds {count} images of class '{label}' and there are {found}: lower ratio, or make more "
                             "(n_per_class in 03-generation)")
    return _copy(rows, counts, rng)


def _pick_source(name: str, train: pd.DataFrame, synthetic: pd.DataFrame | None, oracle: pd.DataFrame | None,
                 generator_seed: int, generator: str) -> pd.DataFrame | None:
    """Return the rows that arm `name` may add, after checking where they come from."""
    if name == "oracle":
        return _check_oracle(train, oracle)
    if name not in GENERATORS:
        return None
    wanted = GENERATORS[name] or generator
    if synthetic is None or len(synthetic) == 0:
        raise ValueError(f"arm '{name}' has no synthetic images: run 03-generation first (with the same folds, if the study "
                         "has any), or leave the arm out")
    _check_synthetic(train, synthetic)
    chosen = synthetic[(synthetic["generator"] == wanted) & (synthetic["generator_seed"] == generator_seed)]
    if len(chosen) == 0:
        found = sorted({f"{g} {s}" for g, s in zip(synthetic["generator"], synthetic["generator_seed"], strict=True)})
        raise ValueError(f"arm '{name}' wants generator '{wanted}' with seed {generator_seed}; there are only "
                         f"{', '.join(found)}: list generator_seeds that 03-generation made")
    return (_keep_selected(chosen) if name == "real+selected" else chosen).assign(**PLAIN)


def _keep_selected(synthetic: pd.DataFrame) -> pd.DataFrame:
    if "selected" not in synthetic.columns:
        raise ValueError("arm 'real+selected' needs the column 'selected' of the synthetic manifest: let 03-generation select, "
                         "or leave the arm out")
    return synthetic[synthetic["selected"].eq(True)]  # not-a-number (another generator) is not true


def _check_train(train: pd.DataFrame) -> None:
    for column, only in (("split", "train"), ("origin", "real")):
        strange = sorted(set(train[column]) - {only})
        if strange:
            raise ValueError(f"training rows must have {column} '{only}', found '{strange[0]}': select them from the manifest")
    if train["label"].nunique() < 2:
        raise ValueError("the training rows hold fewer than two classes: there is nothing to tell apart")


def _check_oracle(train: pd.DataFrame, oracle: pd.DataFrame | None) -> pd.DataFrame:
    if oracle is None or len(oracle) == 0:
        raise ValueError("arm 'oracle' needs extra true images, which only the phantom has: leave the arm out")
    if set(oracle["split"]) != {"oracle"}:
        raise ValueError("the oracle arm may add rows of the split 'oracle' only, never of val or test")
    shared = set(train["patient_id"]) & set(oracle["patient_id"])
    if shared:
        raise ValueError(f"{len(shared)} oracle patient(s) are training patients, first {min(shared)}: they must be new")
    return oracle.assign(**PLAIN)


def _check_synthetic(train: pd.DataFrame, synthetic: pd.DataFrame) -> None:
    """Check the provenance: made by a generator, and made from nothing but these training images."""
    if set(synthetic["origin"]) != {"synthetic"}:
        raise ValueError("the synthetic manifest holds rows whose origin is not 'synthetic': run 03-generation again")
    if "split" in synthetic.columns and set(synthetic["split"]) != {"train"}:
        raise ValueError("synthetic rows must come from a generator that saw the training split only (column split)")
    if "source_image_id" in synthetic.columns:
        sources = set(synthetic["source_image_id"].dropna()) - {""}
        if not sources <= set(train["image_id"]):
            raise ValueError("synthetic images were made from images outside the training split (source_image_id)")
    unknown = sorted(set(train["label"]) ^ set(synthetic["label"]))
    if unknown:
        raise ValueError(f"class '{unknown[0]}' stands in only one of the training and the synthetic images")
