"""How often the verdict cries wolf, and how often it finds what is there, in whole simulated studies; and its speed.

A study here is a draw of simulated patients with the foundation CLIP's features of their films: arms built, a head trained
for each arm and seed, the test patients' predictions compared and corrected as in notebook 7. In the null world every
patient's label is drawn anew, so that no image says anything about it and any verdict but "no difference" is a false alarm.
In the other world the labels are true and the arm `oracle` adds RATIO times as many true images, so a verdict is a discovery.
"""

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from run import Comparison
from sklearn.metrics import f1_score
from statsmodels.stats.proportion import proportion_confint

from medaug import arms, classifiers, clip, paths, statistics, training
from medaug.phantom.chest import render
from medaug.phantom.cohort import draw_cohort

CLASSES = ("normal", "bacterial", "viral")
ARMS, SEEDS, MARGIN, ALPHA = ("real", "real+duplicates", "oracle"), 5, 0.02, 0.05
FAMILY = (("oracle", "real"), ("oracle", "real+duplicates"))  # as a study's, with the oracle where the generator stands
POOL, TRAIN, VAL, RATIO = 1000, 40, 30, 3.0  # patients; images that an arm adds per real one
TEST = (40, 80, 160, 320, 640)  # patients: the power is measured at each
NULL_STUDIES, TRUE_STUDIES, N_BOOT = 200, 40, 2000
PLAN = training.TrainingPlan(steps=40, batch_size=64, learning_rate=1e-2, evaluations=2)


def list_comparisons(null_studies: int = NULL_STUDIES, true_studies: int = TRUE_STUDIES, pool_patients: int = POOL,
                     test: Sequence[int] = TEST) -> list[Comparison]:
    """Return the one comparison: resampled patients by counts beside scikit-learn on every resample. Its row carries the
    share of null studies with a false alarm and the share of true studies in which the oracle was found to help."""
    pool, features = draw_pool(pool_patients)
    predictions = simulate_study(pool, features, np.random.default_rng(0), max(test))

    def ours() -> float:
        began = time.perf_counter()
        statistics.paired_difference(predictions["oracle"], predictions["real"], n_boot=N_BOOT, seed=int(began * 1e6) % 2**31)
        return N_BOOT / (time.perf_counter() - began)

    def simulate(_: float) -> dict:
        return {**count_alarms(pool, features, null_studies, test[-2]), **measure_power(pool, features, true_studies, test)}

    return [Comparison("verdict", ours, lambda: resample_plainly(predictions["oracle"], predictions["real"]),
                       f"paired bootstrap of {max(test)} patients and {SEEDS} seeds: counts beside scikit-learn on each resample",
                       "resamples/s", simulate)]


def draw_pool(n_patients: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Return simulated patients' images, one row each, and their frozen features (N, D)."""
    pool = draw_cohort(n_patients, CLASSES, images_per_patient=(1, 3), seed=11)
    images_u8 = np.asarray(render(pool["patient_seed"], pool["image_seed"], pool["rendered_label"], size=64)["image_u8"])
    model, processor = clip.load_clip(paths.resolve_model("foundations/clip"))
    card = processor.image_processor
    preprocessing = classifiers.Preprocessing(64, tuple(card.image_mean), tuple(card.image_std), "bicubic")
    features = classifiers.extract_features(model, images_u8, preprocessing)
    return pool.assign(path="", origin="real", row=np.arange(len(pool))), features


def simulate_study(pool: pd.DataFrame, features: np.ndarray, rng: np.random.Generator, n_test: int, null: bool = False,
                   names: Sequence[str] = ARMS) -> dict[str, pd.DataFrame]:
    """Return the test predictions of each arm: other patients for training, validation, oracle and test in every study."""
    patients = rng.permutation(pool["patient_id"].unique())
    ends = np.cumsum([TRAIN, VAL, round(2 * RATIO * TRAIN), n_test])  # twice what is added, so that no class runs short
    if ends[-1] > len(patients):
        raise ValueError(f"a study needs {ends[-1]} patients and the pool has {len(patients)}: draw a larger pool")
    role = pd.Series(np.repeat(["train", "val", "oracle", "test"], np.diff(ends, prepend=0)), index=patients[:ends[-1]])
    rows = pool.assign(split=pool["patient_id"].map(role)).dropna(subset="split")
    if null:  # the images keep what they show, the patients get other labels
        rows["label"] = rows["patient_id"].map(pd.Series(rng.choice(CLASSES, len(patients)), index=patients))
    part = {split: frame for split, frame in rows.groupby("split")}
    first = int(rng.integers(2**31))
    return {name: pd.concat([run_arm(name, part, features, first + seed, seed) for seed in range(SEEDS)]) for name in names}


def run_arm(name: str, part: dict[str, pd.DataFrame], features: np.ndarray, draw: int, seed: int) -> pd.DataFrame:
    """Train one head on an arm and return its test predictions, as `predictions.parquet` has them."""
    chosen = arms.build_arm(name, part["train"], None, part["oracle"], ratio=RATIO, seed=draw)
    row_of = pd.concat(part.values()).set_index("image_id")["row"]
    at = row_of[chosen["image_id"]].to_numpy()
    torch.manual_seed(draw)
    head = training.build_head(features[part["train"]["row"]], len(CLASSES))
    train, val = (training.Examples(features[r], labels.map(CLASSES.index).to_numpy()) for r, labels in (
        (at, chosen["label"]), (part["val"]["row"].to_numpy(), part["val"]["label"])))  # fmt: skip
    training.fit_classifier(head, train, val, training.TrainingPlan(**{**PLAN.__dict__, "seed": draw}))
    probs = training.predict_probs(head, features[part["test"]["row"]])
    table = part["test"][["image_id", "patient_id"]].assign(
        y_true=part["test"]["label"], y_pred=np.asarray(CLASSES)[probs.argmax(1)], seed=seed, generator_seed=-1)
    return table.assign(**{f"p_{label}": probs[:, i] for i, label in enumerate(CLASSES)})


def decide(predictions: dict[str, pd.DataFrame], patients: Sequence[str] | None = None) -> list[str]:
    """Return the verdict on each comparison of the family, on some or all test patients, as notebook 7 comes to it."""
    if patients is not None:
        predictions = {name: frame[frame["patient_id"].isin(patients)] for name, frame in predictions.items()}
    found = [statistics.paired_difference(predictions[arm], predictions[control], n_boot=N_BOOT) for arm, control in FAMILY]
    corrected = statistics.holm([result["p"] for result in found])
    return [statistics.decide_verdict(result["delta"], (result["ci_low"], result["ci_high"]), p, MARGIN, ALPHA)
            for result, p in zip(found, corrected, strict=True)]


def count_alarms(pool: pd.DataFrame, features: np.ndarray, studies: int, n_test: int) -> dict:
    """Return the share of null studies with any false alarm in the family, its exact 95 % interval, and the same for one
    uncorrected comparison. Raises AssertionError where an interval lies above the promised rate."""
    rng, family, single = np.random.default_rng(1), 0, 0
    for _ in range(studies):
        predictions = simulate_study(pool, features, rng, n_test, null=True)
        family += bool({"helps", "hurts"} & set(decide(predictions)))
        single += statistics.paired_difference(predictions["real+duplicates"], predictions["real"], n_boot=N_BOOT)["p"] <= ALPHA
    found = {"null_studies": studies, "null_patients": n_test}
    for name, alarms in (("family", family), ("single", single)):
        low, high = proportion_confint(alarms, studies, method="beta")
        if low > ALPHA:
            raise AssertionError(f"{alarms} false alarms ({name}) in {studies} null studies: more than {ALPHA:.0%} promised")
        found |= {f"alarms_{name}": alarms / studies, f"alarms_{name}_low": low, f"alarms_{name}_high": high}
    return found


def measure_power(pool: pd.DataFrame, features: np.ndarray, studies: int, test: Sequence[int]) -> dict:
    """Return the share of true studies whose verdict is that the oracle helps over `real`, at each number of test patients,
    and the mean gain on all of them."""
    rng, found, gains = np.random.default_rng(2), dict.fromkeys(test, 0), []
    for _ in range(studies):
        predictions = simulate_study(pool, features, rng, max(test))
        gains.append(statistics.pair_values(predictions["oracle"], predictions["real"])["delta"].mean())
        patients = rng.permutation(predictions["real"]["patient_id"].unique())
        for n in test:
            found[n] += decide(predictions, patients[:n])[0] == "helps"
    return {"true_studies": studies, "gain": float(np.mean(gains)), **{f"power_{n}": hits / studies for n, hits in found.items()}}


def resample_plainly(arm: pd.DataFrame, control: pd.DataFrame, resamples: int = 20) -> float:
    """Resample patients and score each resample with scikit-learn, as one would; return resamples per second."""
    rng, began = np.random.default_rng(0), time.perf_counter()
    by_patient = [dict(list(frame.groupby("patient_id"))) for frame in (arm, control)]
    patients = list(by_patient[0])
    for _ in range(resamples):
        drawn = rng.choice(patients, len(patients))
        both = [pd.concat([frames[patient] for patient in drawn]) for frames in by_patient]
        scores = [both_of.groupby("seed")[["y_true", "y_pred"]].apply(
            lambda run: f1_score(run["y_true"], run["y_pred"], average="macro")) for both_of in both]  # fmt: skip
        assert len(scores[0] - scores[1]) == SEEDS
    return resamples / (time.perf_counter() - began)
