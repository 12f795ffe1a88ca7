"""What could fool a reader of this data: counts, copies, patients across splits, shortcuts, and a shifted
test set.

Every score here comes from small models of scikit-learn, cross-validated with whole patients held out, and
carries an interval from a bootstrap over patients (Efron and Tibshirani 1993, ch. 6; clusters: Field and
Welsh 2007). The interval describes the images at hand; it does not contain the spread of training the model
again on other patients.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from skimage import exposure
from skimage.feature import hog
from skimage.filters import gaussian
from skimage.transform import resize
from sklearn.decomposition import PCA
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

SPLITS = ["train", "val", "test", "oracle"]
MARGIN = 0.05  # equivalence bound, in balanced accuracy
DRAWS = 2000

# Kermany et al. 2018 (images per split and class as published) and the other sources' own descriptions.
PUBLISHED = {
    "guangzhou": {
        "train+val": {"normal": 1349, "bacterial": 2538, "viral": 1345},
        "test": {"normal": 234, "bacterial": 242, "viral": 148},
    },
    "covid-radiography": {"all": {"covid": 3616, "opacity": 6012, "normal": 10192, "viral": 1345}},
    "lymphoma": {"all": {"cll": 113, "fl": 139, "mcl": 122}},
    "lungs": {"all": {"normal": 406, "tuberculosis": 394}},
}


# ---------------------------------------------------------------- counts and patients


def count_images(manifest: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Return one row per split and class: `split, label, images, patients, images_per_patient, share` (of the
    split).
    """
    rows = []
    for split in [s for s in SPLITS if (manifest["split"] == s).any()]:
        part = manifest[manifest["split"] == split]
        for label in classes:
            of_class = part[part["label"] == label]
            images, patients = len(of_class), of_class["patient_id"].nunique()
            rows.append(
                {
                    "split": split,
                    "label": label,
                    "images": images,
                    "patients": patients,
                    "images_per_patient": images / max(patients, 1),
                    "share": images / len(part),
                }
            )
    return pd.DataFrame(rows)


def compare_counts(manifest: pd.DataFrame, source: str) -> pd.DataFrame:
    """Return published and found images per part and class of a known source (columns `part, label,
    published, found, difference`); empty for a source without published counts.
    """
    parts = {
        "all": manifest,
        "test": manifest[manifest["split"] == "test"],
        "train+val": manifest[manifest["split"].isin(["train", "val"])],
    }
    rows = [
        {
            "part": part,
            "label": label,
            "published": count,
            "found": int((parts[part]["label"] == label).sum()),
        }
        for part, counts in PUBLISHED.get(source, {}).items()
        for label, count in counts.items()
    ]
    table = pd.DataFrame(rows, columns=["part", "label", "published", "found"])
    return table.assign(difference=table["found"] - table["published"])


def read_patients(manifest: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the readings of who is a patient: as the manifest has it, and by the bare number where names
    hold a finding.

    "person1-bacteria" and "person1-virus" are two patients in the first reading, one in the second.
    """
    readings = {"as in the manifest": manifest["patient_id"]}
    bare = manifest["patient_id"].str.extract(r"^(person\d+)-(?:bacteria|virus)$")[0]
    if bare.notna().any():
        readings["bare number (person1)"] = bare.fillna(manifest["patient_id"])
    return readings


def count_crossings(patients: pd.Series, split: pd.Series) -> pd.DataFrame:
    """Return for each pair of splits how many patients stand in both, and how many images they have there."""
    where = pd.crosstab(patients, split)
    names = [name for name in SPLITS if name in where]
    rows = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = where[(where[first] > 0) & (where[second] > 0)]
            images = both[[first, second]].to_numpy().sum()
            rows.append({"first": first, "second": second, "patients": len(both), "images": int(images)})
    return pd.DataFrame(rows, columns=["first", "second", "patients", "images"])


# ---------------------------------------------------------------- duplicates


def summarise_copies(manifest: pd.DataFrame, group: Sequence) -> dict[str, int]:
    """Count groups of two or more rows that share `group`: extra files, and groups across classes, splits and
    patients.
    """
    table = (
        manifest.assign(group=np.asarray(group))
        .groupby("group")
        .agg(
            images=("image_id", "size"),
            label=("label", "nunique"),
            split=("split", "nunique"),
            patient_id=("patient_id", "nunique"),
        )
    )
    copies = table[table["images"] > 1]
    crossing = {
        f"across_{word}": int((copies[column] > 1).sum())
        for word, column in (("classes", "label"), ("splits", "split"), ("patients", "patient_id"))
    }
    return {"groups": len(copies), "extra_files": int((copies["images"] - 1).sum())} | crossing


# ---------------------------------------------------------------- scores and intervals


def predict_held_out(
    model, features: np.ndarray, y_true: Sequence, groups: Sequence | None, seed: int = 0, n_folds: int = 5
) -> np.ndarray:
    """Return the class probabilities (N, K), classes in sorted order, of `model` for images it was not fitted
    on.

    Folds hold out whole `groups` (patients); with None they are drawn image by image. `features` is (N, D).
    Where a class has fewer patients than `n_folds`, there are as many folds as it has. Raises ValueError
    where that is one.
    """
    y_true = np.asarray(y_true)
    classes = np.unique(y_true)
    owners = (
        pd.Series(np.arange(len(y_true)) if groups is None else np.asarray(groups)).groupby(y_true).nunique()
    )
    if owners.min() < 2:
        raise ValueError(
            f"class '{owners.idxmin()}' has one patient: nothing can be held out; leave the class out"
        )
    n_folds = min(n_folds, int(owners.min()))
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(
        n_folds, shuffle=True, random_state=seed
    )
    probs = np.zeros((len(y_true), len(classes)))
    for train, held_out in splitter.split(features, y_true, groups):
        fitted = model.fit(features[train], y_true[train])
        columns = np.searchsorted(classes, fitted.classes_)
        probs[np.ix_(held_out, columns)] = fitted.predict_proba(features[held_out])
    return probs


def draw_patients(patients: Sequence, seed: int = 0, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """Return the patient number of each image (N,), and how often each patient is drawn (draws, P), with
    replacement.
    """
    number = pd.factorize(np.asarray(patients))[0]
    count = number.max() + 1
    return number, np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)


def bootstrap_accuracy(
    correct: np.ndarray, y_true: Sequence, patients: Sequence, seed: int = 0
) -> np.ndarray:
    """Return bootstrap draws over patients of the balanced accuracy, (draws,); `correct` (N,) is 0/1, or a
    difference of two such for a paired comparison. Balanced accuracy is the mean over classes of the share
    that is right.
    """
    number, times = draw_patients(patients, seed)
    recalls = []
    for label in np.unique(y_true):
        of_class = np.asarray(y_true) == label
        right = np.bincount(number[of_class], weights=correct[of_class], minlength=times.shape[1])
        images = np.bincount(number[of_class], minlength=times.shape[1])
        recalls.append(times @ right / np.maximum(times @ images, 1))
    return np.mean(recalls, axis=0)


def balanced_accuracy(correct: np.ndarray, y_true: Sequence) -> float:
    """Return the mean over classes of the mean of `correct`."""
    return float(pd.Series(correct).groupby(np.asarray(y_true)).mean().mean())


# ---------------------------------------------------------------- shortcut classifiers


def score_shortcuts(
    views: dict[str, np.ndarray],
    y_true: Sequence,
    patients: Sequence,
    seed: int = 0,
    n_folds: int = 5,
    trees: int = 100,
    threads: int = 1,
    coarse: Sequence[str] = (),
) -> pd.DataFrame:
    """Score what each view of the images, (N, D) numbers, says about the class.

    Views should not hold the disease; name those that may in `coarse`. One row per view: `view, coarse,
    features, balanced_accuracy, ci_low, ci_high` (90 %, patients resampled), `chance, verdict, sentence`. The
    model is extremely randomised trees (Geurts et al. 2006) with balanced class weights, one for all views.
    "equivalent to chance" means that the 90 % interval lies within 5 points of chance: two one-sided tests at
    5 % (Schuirmann 1987).
    """
    rows = []
    for view, features in views.items():
        if (features == features[:1]).all():
            rows.append(
                _judge_view(view, view in coarse, features.shape[1], None, 0, 0, len(np.unique(y_true)))
            )
            continue
        model = ExtraTreesClassifier(
            trees, min_samples_leaf=3, class_weight="balanced", random_state=seed, n_jobs=threads
        )
        correct = _mark_correct(model, features, np.asarray(y_true), patients, seed, n_folds)
        low, high = np.quantile(bootstrap_accuracy(correct, y_true, patients, seed), [0.05, 0.95])
        score = balanced_accuracy(correct, y_true)
        rows.append(
            _judge_view(view, view in coarse, features.shape[1], score, low, high, len(np.unique(y_true)))
        )
    return pd.DataFrame(rows)


def _judge_view(
    view: str, coarse: bool, features: int, score: float | None, low: float, high: float, n_classes: int
) -> dict:
    chance = 1 / n_classes
    if score is None:
        score = low = high = chance
        verdict, sentence = (
            "constant",
            f"{view}: the same for every image, so it cannot tell classes apart here",
        )
    elif low > chance - MARGIN and high < chance + MARGIN:
        verdict, sentence = "equivalent to chance", f"{view}: no shortcut worth {100 * MARGIN:.0f} points"
    elif low > chance:
        verdict, sentence = "above chance", f"{view}: tells the classes apart better than chance"
        sentence += ", but the disease itself may be visible in it" if coarse else ""
    else:
        verdict, sentence = "undecided", f"{view}: too few patients to say"
    return {
        "view": view,
        "coarse": coarse,
        "features": features,
        "balanced_accuracy": score,
        "ci_low": float(low),
        "ci_high": float(high),
        "chance": chance,
        "verdict": verdict,
        "sentence": sentence,
    }


def shrink(images_u8: np.ndarray, size: int) -> np.ndarray:
    """Average images down to `size` x `size` and flatten: uint8, float or bool (N, H, W) -> float32 (N, size *
    size).

    H and W must be multiples of `size`, or the remainder at the right and lower edge is left out.
    """
    n, height, width = images_u8.shape
    h, w = height // size, width // size
    blocks = images_u8[:, : h * size, : w * size].reshape(n, size, h, size, w)
    return blocks.mean(axis=(2, 4), dtype=np.float32).reshape(n, -1)


def hide_lungs(images_u8: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Blacken the smallest upright box around each lung mask: uint8 (N, H, W), bool (N, H, W) -> uint8 (N, H,
    W).

    A box, not the outline: the outline of a lung is itself a finding. An image whose mask is empty is kept as
    it is.
    """
    hidden = images_u8.copy()
    for image_u8, mask in zip(hidden, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows):
            image_u8[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
    return hidden


def project_images(images_u8: np.ndarray, size: int = 16, components: int = 40) -> np.ndarray:
    """Return principal components of images averaged down to `size`, each pixel standardised first: uint8 (N,
    H, W) -> float32 (N, components). No label and no split is used.
    """
    pixels = StandardScaler().fit_transform(shrink(images_u8, size))
    return PCA(min(components, *pixels.shape), svd_solver="full").fit_transform(pixels)


# ---------------------------------------------------------------- by image against by patient


def compare_splits(
    features: np.ndarray, manifest: pd.DataFrame, seed: int = 0, n_folds: int = 5, repeats: int = 5
) -> pd.DataFrame:
    """Score the same models on the same images, folds drawn by image and by patient: what leakage alone is
    worth.

    One row per model: `model, by_image, by_patient, difference, ci_low, ci_high` (95 %, paired over
    patients), and `on_test, test_low, test_high`: fitted once on all of them, scored on the test split. All
    in balanced accuracy. Folds are drawn `repeats` times and averaged: the luck of one draw is as large as
    the effect. `features` (N, D) has the rows of `manifest`; train and val are cross-validated.
    """
    models = {
        "nearest neighbour": KNeighborsClassifier(1),
        "logistic regression": LogisticRegression(C=0.1, class_weight="balanced", max_iter=500),
    }
    pool, test = manifest["split"].isin(["train", "val"]).to_numpy(), (manifest["split"] == "test").to_numpy()
    y_true, patients = manifest["label"].to_numpy(), manifest["patient_id"].to_numpy()
    rows = []
    for name, model in models.items():
        right = {
            reading: np.mean(
                [
                    _mark_correct(model, features[pool], y_true[pool], groups, seed + k, n_folds)
                    for k in range(repeats)
                ],
                axis=0,
            )
            for reading, groups in (("by_image", None), ("by_patient", patients[pool]))
        }
        extra = right["by_image"] - right["by_patient"]
        low, high = np.quantile(bootstrap_accuracy(extra, y_true[pool], patients[pool], seed), [0.025, 0.975])
        scores = {reading: balanced_accuracy(correct, y_true[pool]) for reading, correct in right.items()}
        tested = (model.fit(features[pool], y_true[pool]).predict(features[test]) == y_true[test]).astype(
            float
        )
        test_low, test_high = np.quantile(
            bootstrap_accuracy(tested, y_true[test], patients[test], seed), [0.025, 0.975]
        )
        rows.append(
            {
                "model": name,
                **scores,
                "difference": balanced_accuracy(extra, y_true[pool]),
                "ci_low": float(low),
                "ci_high": float(high),
                "on_test": balanced_accuracy(tested, y_true[test]),
                "test_low": float(test_low),
                "test_high": float(test_high),
            }
        )
    return pd.DataFrame(rows)


def _mark_correct(
    model, features: np.ndarray, y_true: np.ndarray, groups, seed: int, n_folds: int
) -> np.ndarray:
    probs = predict_held_out(model, features, y_true, groups, seed, n_folds)
    return (np.unique(y_true)[probs.argmax(axis=1)] == y_true).astype(float)


def share_nearest_patient(features: np.ndarray, patients: Sequence) -> float:
    """Return the share of images, among those whose patient has another one, whose nearest neighbour is that
    patient's.
    """
    patients = np.asarray(patients)
    nearest = NearestNeighbors(n_neighbors=2).fit(features).kneighbors(features, return_distance=False)
    nearest = np.where(nearest[:, 0] == np.arange(len(patients)), nearest[:, 1], nearest[:, 0])
    several = pd.Series(patients).duplicated(keep=False).to_numpy()
    return float((patients[nearest] == patients)[several].mean()) if several.any() else 0.0


# ---------------------------------------------------------------- train against test


def embed_hog(images: np.ndarray) -> np.ndarray:
    """Return histograms of oriented gradients (Dalal and Triggs 2005) of images (N, H, W) of any value range:
    float32 (N, D), cells of H / 8.
    """
    cell = max(images.shape[1] // 8, 2)
    return np.stack(
        [hog(image, orientations=8, pixels_per_cell=(cell, cell), cells_per_block=(2, 2)) for image in images]
    ).astype(np.float32)


def compare_train_test(
    features: np.ndarray,
    manifest: pd.DataFrame,
    classes: Sequence[str],
    seed: int = 0,
    n_floors: int = 3,
    n_folds: int = 5,
) -> pd.DataFrame:
    """Ask of each class whether a linear model can tell its test images from its training images (adversarial
    validation).

    One row per class: `label, n_train, n_test, auc, ci_low, ci_high` (95 %, patients resampled), `floor_low,
    floor_high`: the range of the same procedure on training patients only, where a random part of them plays
    the test set (`n_floors` times). AUC 0.5 means alike. `features` (N, D) has the rows of `manifest`; val
    counts as train. A class with fewer than 4 patients on one side is left out.
    """
    rows = []
    for label in classes:
        of_class = (
            (manifest["label"] == label) & manifest["split"].isin(["train", "val", "test"])
        ).to_numpy()
        x, patients = features[of_class], manifest.loc[of_class, "patient_id"].to_numpy()
        is_test = (manifest.loc[of_class, "split"] == "test").to_numpy()
        if min(len(np.unique(patients[is_test])), len(np.unique(patients[~is_test]))) < 4:
            continue
        y_score = predict_domain(x, is_test, patients, seed, n_folds)
        auc = roc_auc_score(is_test, y_score)
        low, high = np.nanquantile(bootstrap_auc(is_test, y_score, patients, seed), [0.025, 0.975])
        train_x, train_patients, floors = x[~is_test], patients[~is_test], []
        for k in range(n_floors):
            pretend = _pretend_test(train_patients, is_test.mean(), seed + k)
            floors.append(
                roc_auc_score(pretend, predict_domain(train_x, pretend, train_patients, seed, n_folds))
            )
        rows.append(
            {
                "label": label,
                "n_train": int((~is_test).sum()),
                "n_test": int(is_test.sum()),
                "auc": auc,
                "ci_low": low,
                "ci_high": high,
                "floor_low": min(floors),
                "floor_high": max(floors),
            }
        )
    columns = ["label", "n_train", "n_test", "auc", "ci_low", "ci_high", "floor_low", "floor_high"]
    return pd.DataFrame(rows, columns=columns)


def predict_domain(
    features: np.ndarray, is_test: np.ndarray, patients: Sequence, seed: int = 0, n_folds: int = 5
) -> np.ndarray:
    """Return how much each image (N,) looks like a test image to a linear model on `features` (N, D);
    patients held out.
    """
    return predict_held_out(_linear_model(), features, is_test, patients, seed, n_folds)[:, 1]


def _linear_model():
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.001, class_weight="balanced", max_iter=300))


def prepare_images(images_u8: np.ndarray, preparation: str) -> np.ndarray:
    """Return the images after one of `PREPARATIONS`: uint8 (N, H, W) -> float32 (N, H, W), 0-1, the same size.

    `standardised`: each image's mean becomes 0.5 and its standard deviation 0.2; `equalised`: its histogram becomes flat
    (Gonzalez and Woods 2018, section 3.3); `clahe`: the same in tiles, with limited contrast (Pizer et al. 1987);
    `blurred`: Gaussian of 1.5 % of the height, which takes away the traces of sharpening and compression; `centre`: the
    middle 80 %, which takes away borders, letters and much of the framing. Raises ValueError for another name.
    """
    if preparation not in PREPARATIONS:
        raise ValueError(f"no preparation '{preparation}': choose from {', '.join(PREPARATIONS)}")
    prepare = PREPARATIONS[preparation]
    return np.stack([prepare(image_u8 / np.float32(255)) for image_u8 in images_u8]).astype(np.float32)


def _standardise(image: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 0.2 * (image - image.mean()) / max(image.std(), 1e-3), 0, 1)


def _cut_centre(image: np.ndarray) -> np.ndarray:
    rows, columns = (round(0.1 * side) for side in image.shape)
    return resize(image[rows : image.shape[0] - rows, columns : image.shape[1] - columns], image.shape)


PREPARATIONS = {
    "as stored": lambda image: image,
    "standardised": _standardise,
    "equalised": exposure.equalize_hist,
    "clahe": lambda image: exposure.equalize_adapthist(image, clip_limit=0.02),
    "blurred": lambda image: gaussian(image, 0.015 * image.shape[0]),
    "centre": _cut_centre,
}


def compare_preparations(
    features: dict[str, np.ndarray],
    manifest: pd.DataFrame,
    classes: Sequence[str],
    seed: int = 0,
    n_folds: int = 5,
) -> pd.DataFrame:
    """Ask of each preparation what it leaves of the shift between train and test, and what of the classes.

    `features`: preparation -> (N, D), rows as `manifest`; the first is the one that the others are compared with.
    One row each: `preparation, balanced_accuracy` (of the classes, cross-validated by patient on train and val
    alone), `gain, gain_low, gain_high` (of that against the first), `chosen` (by these alone: the highest, if its
    gain is beyond doubt, and otherwise the first), `auc` (test told from training images of the same class, mean
    over classes), `change, ci_low, ci_high` (of `auc` against the first). Intervals: 95 %, patients resampled, paired.
    """
    split, y_true = manifest["split"], manifest["label"].to_numpy()
    pool = split.isin(["train", "val"]).to_numpy()
    rows, draws, first, as_first = [], {}, next(iter(features)), None
    for name, x in features.items():
        own = manifest["patient_id"].to_numpy()
        correct = _mark_correct(_linear_model(), x[pool], y_true[pool], own[pool], seed, n_folds)
        as_first = correct if name == first else as_first
        gains = bootstrap_accuracy(correct - as_first, y_true[pool], own[pool], seed)
        aucs, resampled = [], []
        for label in classes:
            of_class = ((y_true == label) & split.isin(["train", "val", "test"])).to_numpy()
            is_test = (split[of_class] == "test").to_numpy()
            y_score = predict_domain(x[of_class], is_test, own[of_class], seed, n_folds)
            aucs.append(roc_auc_score(is_test, y_score))
            resampled.append(
                bootstrap_auc(is_test, y_score, own[of_class], seed)
            )  # the same patients for each name
        draws[name] = np.mean(resampled, axis=0)
        low, high = np.nanquantile(draws[name] - draws[first], [0.025, 0.975])
        gain_low, gain_high = np.quantile(gains, [0.025, 0.975])
        rows.append(
            {
                "preparation": name,
                "balanced_accuracy": balanced_accuracy(correct, y_true[pool]),
                "gain": balanced_accuracy(correct - as_first, y_true[pool]),
                "gain_low": float(gain_low),
                "gain_high": float(gain_high),
                "auc": float(np.mean(aucs)),
                "ci_low": float(low),
                "ci_high": float(high),
            }
        )
    table = pd.DataFrame(rows)
    table.insert(6, "change", table["auc"] - table["auc"].iloc[0])
    best = table["balanced_accuracy"].idxmax()
    table.insert(5, "chosen", table.index == (best if table.loc[best, "gain_low"] > 0 else 0))
    return table


def map_domain_weights(features: np.ndarray, is_test: np.ndarray) -> np.ndarray:
    """Return where a linear model on `embed_hog` features (N, D) looks to tell test from training images.

    Mean absolute weight of each place, (B, B) >= 0 with B blocks a side: features are standardised, so weights compare.
    """
    weights = np.abs(_linear_model().fit(features, is_test)[-1].coef_[0]).reshape(-1, 2 * 2 * 8).mean(axis=1)
    side = round(np.sqrt(len(weights)))
    return weights.reshape(side, side)


def bootstrap_auc(
    y_true: np.ndarray, y_score: np.ndarray, patients: Sequence, seed: int = 0, draws: int = 1000
) -> np.ndarray:
    """Return bootstrap draws over patients of the area under the ROC curve, (draws,); `y_true` (N,) is 0/1.

    The area is the share of pairs (positive, negative) in which the positive scores higher; ties count half.
    """
    number, times = draw_patients(patients, seed, draws)
    order = np.argsort(y_score, kind="stable")
    starts = np.flatnonzero(
        np.diff(np.asarray(y_score)[order], prepend=-np.inf)
    )  # first image of each distinct score
    weight, positive = times[:, number[order]], np.asarray(y_true, int)[order]  # (draws, N)
    positives = np.add.reduceat(weight * positive, starts, axis=1)
    negatives = np.add.reduceat(weight * (1 - positive), starts, axis=1)
    below = negatives.cumsum(axis=1) - negatives / 2
    return (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))


def _pretend_test(patients: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Mark the images of a random `share` of the patients, two at least."""
    names = np.unique(patients)
    chosen = np.random.default_rng(seed).permutation(names)[: max(2, round(share * len(names)))]
    return np.isin(patients, chosen)


def compare_prevalence(manifest: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Return each class's share of the images in train + val and in test: `label, train, test, difference`."""
    split = manifest["split"].replace("val", "train")
    shares = pd.crosstab(manifest["label"], split, normalize="columns").reindex(
        index=list(classes), columns=["train", "test"]
    )
    shares = shares.fillna(0.0).rename_axis(None, axis=1).reset_index()
    return shares.assign(difference=shares["test"] - shares["train"])


# ---------------------------------------------------------------- what was found


def list_findings(report: dict) -> pd.DataFrame:
    """Turn the audit (the dict saved as audit.json) into plain sentences: columns `check, status, finding`.

    `status` is "fine", "note" (true, but know it) or "warning" (could fool a reader).
    """
    rows = [*_find_in_files(report), *_find_in_patients(report), *_find_in_scores(report)]
    return pd.DataFrame(rows, columns=["check", "status", "finding"])


def _find_in_files(report: dict) -> list[tuple[str, str, str]]:
    rows = []
    if report["published_counts"]:
        off = [row for row in report["published_counts"] if row["difference"]]
        text = "; ".join(
            f"{row['label']} ({row['part']}): {row['found']:,} of {row['published']:,} published"
            for row in off
        )
        rows.append(("counts", "note" if off else "fine", text or "every count is the published one"))
    if report["missing_classes"]:
        rows.append(("classes", "note", f"no image of: {', '.join(report['missing_classes'])}"))
    corrupt = report["corrupt_files"]
    text = (
        f"{len(corrupt)} file(s), first {corrupt[0]['image_id']}: {corrupt[0]['reason']}"
        if corrupt
        else "every file can be used"
    )
    rows.append(("files left out", "note" if corrupt else "fine", text))
    exact, near = report["exact_duplicates"], report["near_duplicates"]
    status = (
        "warning"
        if exact["across_splits"] or exact["across_classes"]
        else "note"
        if exact["groups"]
        else "fine"
    )
    rows.append(
        (
            "identical pictures",
            status,
            f"{exact['groups']} group(s) with {exact['extra_files']} extra file(s); "
            f"{exact['across_classes']} across classes, {exact['across_splits']} across splits",
        )
    )
    status = (
        "warning" if near["across_splits"] or near["across_classes"] else "note" if near["groups"] else "fine"
    )
    rows.append(
        (
            "near duplicates",
            status,
            f"{near['groups']} group(s); {near['across_classes']} across classes, "
            f"{near['across_splits']} across splits, {near['across_patients']} across patients",
        )
    )
    return rows


def _find_in_patients(report: dict) -> list[tuple[str, str, str]]:
    rows = []
    for crossing in report["patient_readings"]:
        own, count = crossing["reading"] == "as in the manifest", crossing["patients_in_several_splits"]
        status = "fine" if not count else "warning" if own else "note"
        rows.append(
            (
                "patients across splits",
                status,
                f"{count} of {crossing['patients']:,} patients, read {crossing['reading']}",
            )
        )
    for row in report["split_by_image"]:
        points, low, high = (100 * row[key] for key in ("difference", "ci_low", "ci_high"))
        rows.append(
            (
                "split by image",
                "warning" if low > 0 else "fine",
                f"{row['model']}: {points:+.1f} points of balanced accuracy "
                f"for nothing ({low:+.1f} to {high:+.1f})",
            )
        )
    return rows


def _find_in_scores(report: dict) -> list[tuple[str, str, str]]:
    rows = []
    for row in report["shortcut_scores"]:
        told = "note" if row["coarse"] else "warning"
        status = {"above chance": told, "undecided": "note"}.get(row["verdict"], "fine")
        score = f"{row['balanced_accuracy']:.3f} ({row['ci_low']:.3f} to {row['ci_high']:.3f})"
        score += f", chance {row['chance']:.3f}"
        rows.append(
            (
                "shortcut",
                status,
                f"{row['sentence']}: {score}" if row["verdict"] != "constant" else row["sentence"],
            )
        )
    for row in report["train_test_shift"]:
        shifted = row["ci_low"] > max(row["floor_high"], 0.5)
        rows.append(
            (
                "test set",
                "warning" if shifted else "fine",
                f"{row['label']}: test images are told from training images with AUC "
                f"{row['auc']:.2f} ({row['ci_low']:.2f} to {row['ci_high']:.2f}); "
                f"train against train up to {row['floor_high']:.2f}",
            )
        )
    worst = max((abs(row["difference"]) for row in report["prevalence"]), default=0)
    rows.append(
        (
            "class shares",
            "note" if worst > 0.05 else "fine",
            f"train and test differ by at most {100 * worst:.1f} points",
        )
    )
    return rows
