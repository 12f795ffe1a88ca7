"""The statistics of the report: metrics of one run, paired differences of arms, and what may be said of them.

How a difference gets its interval. An arm's macro F1 varies for three reasons: which patients are in the test
set, which seed the classifier started from, and which seed the generator drew from. `paired_difference`
estimates the three parts of the variance (Searle, Casella & McCulloch, "Variance Components", 1992, for the
method of moments; Field & Welsh 2007 for the patient-clustered bootstrap of the metric), adds them, and uses
Student's t with Satterthwaite's degrees of freedom (1946), because five seeds are five numbers. Resampling
patients and seeds together and reading off percentiles is no substitute: it counts the noise between image
and seed three times (Owen, "The pigeonhole bootstrap", 2007), yet is too narrow where the seeds themselves
matter; the tests measure both.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats as distributions
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    precision_recall_fscore_support,
    roc_auc_score,
)
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

# -- the metrics of one run ---------------------------------------------------------------------------------


def classification_metrics(y_true: Sequence[str], probs, classes: Sequence[str]) -> dict[str, float]:
    """Return the metrics of `classification.csv` for one run, by scikit-learn.

    `y_true` (N,) labels, `probs` (N, k) in the order of `classes`, rows summing to 1; they are rounded to
    float32 first, as `predictions.parquet` stores them, so anyone gets the same figures from that file. Macro
    averages run over all `classes` with zero_division=0; balanced accuracy is the mean recall of the classes
    present; AUROC and AUPRC are macro one-vs-rest over the classes that have both positives and negatives
    (NaN if none has); ECE as in `calibration_error`; Brier is the mean over images of the sum over classes of
    (p - y)^2 (Brier 1950), 0 to 2. Raises ValueError on an empty set, unknown labels, wrong shape, or rows
    that are no probabilities.
    """
    y_index, probs = _as_indices(y_true, classes), _as_probs(probs, len(y_true), classes)
    k, preds = len(classes), probs.argmax(axis=1)
    onehot = np.eye(k)[y_index]  # (N,) -> (N, k)
    precision, recall, f1, support = precision_recall_fscore_support(
        y_index, preds, labels=list(range(k)), zero_division=0
    )
    usable = [c for c in range(k) if 0 < support[c] < len(y_index)]
    aurocs = [roc_auc_score(onehot[:, c], probs[:, c]) for c in usable]
    auprcs = [average_precision_score(onehot[:, c], probs[:, c]) for c in usable]
    return {
        "n": len(y_index),
        "accuracy": float(accuracy_score(y_index, preds)),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "macro_f1": float(f1.mean()),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "auroc": float(np.mean(aurocs)) if usable else float("nan"),
        "auprc": float(np.mean(auprcs)) if usable else float("nan"),
        "ece": calibration_error(y_index, probs),
        "brier": float(((probs - onehot) ** 2).sum(axis=1).mean()),
    }


def calibration_error(y_index: np.ndarray, probs: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017, eq. 3) of the top label, 0 to 1.

    `y_index` (N,) true class indices, `probs` (N, k). Equal-width bins over (0, 1], closed on the right.
    """
    confidence, correct = probs.max(axis=1), probs.argmax(axis=1) == y_index
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=confidence - correct, minlength=bins)  # (bins,): n_b * (conf_b - acc_b)
    return float(np.abs(gaps).sum() / len(y_index))


def _as_indices(y_true: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    index = {label: position for position, label in enumerate(classes)}
    unknown = sorted({str(label) for label in y_true if label not in index})
    if len(y_true) == 0 or unknown:
        raise ValueError(
            "no images to score"
            if len(y_true) == 0
            else f"labels {', '.join(unknown)} are not among the classes {', '.join(classes)}"
        )
    return np.array([index[label] for label in y_true])


def _as_probs(probs, n: int, classes: Sequence[str]) -> np.ndarray:
    probs = np.asarray(probs, dtype=np.float32).astype(np.float64)
    if probs.shape != (n, len(classes)):
        raise ValueError(f"probs has shape {probs.shape}, expected ({n}, {len(classes)}): images by classes")
    if not np.isfinite(probs).all() or (probs < 0).any() or np.abs(probs.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError(
            "probs must be finite, not negative and sum to 1 in each row: apply softmax to the logits"
        )
    return probs


# -- many runs: counts per patient, from which every replicate follows by one matrix product -----------------

COUNTED_METRICS = ("macro_f1", "accuracy", "balanced_accuracy", "macro_precision", "macro_recall", "brier")
RUN_KEYS = ["seed", "generator_seed"]


def count_outcomes(
    predictions: pd.DataFrame, clusters: str = "patient_id"
) -> tuple[pd.DataFrame, np.ndarray]:
    """Return `runs` (the R pairs of classifier and generator seed) and `totals` (R, P, k*k + 1), per patient.

    `predictions` are rows of `predictions.parquet` of one arm, model and split. The last axis holds the
    confusion counts (true class first, classes as in the `p_` columns) and the summed Brier score; all are
    sums over images, so any resampling of patients is a weighted sum. Raises ValueError where the runs were
    not tested on the same images once each.
    """
    classes = [column[2:] for column in predictions.columns if column.startswith("p_")]
    frame = predictions.sort_values([*RUN_KEYS, "image_id"], kind="stable")
    runs = frame[RUN_KEYS].drop_duplicates().reset_index(drop=True)
    images = frame["image_id"].to_numpy()
    if len(images) % len(runs) or (images.reshape(len(runs), -1) != images[: len(images) // len(runs)]).any():
        raise ValueError(
            "the runs of one arm were tested on different images: select one split, fraction and ratio"
        )
    if len(set(images)) * len(runs) != len(images):
        raise ValueError(
            "an image was tested twice in one run: select one arm, model, split, fraction and ratio"
        )
    k, which = len(classes), np.arange(len(frame)) // (len(frame) // len(runs))
    patients, patient = np.unique(frame[clusters].to_numpy(str), return_inverse=True)
    y_true, y_pred = (_as_indices(frame[column].to_numpy(), classes) for column in ("y_true", "y_pred"))
    probs = frame[[f"p_{label}" for label in classes]].to_numpy(np.float64)
    totals = np.zeros((len(runs), len(patients), k * k + 1))
    np.add.at(totals, (which, patient, y_true * k + y_pred), 1)
    np.add.at(totals, (which, patient, k * k), ((probs - np.eye(k)[y_true]) ** 2).sum(axis=1))
    return runs, totals


def score_totals(totals: np.ndarray, metric: str) -> np.ndarray:
    """Return `metric` (one of `COUNTED_METRICS`) of summed counts: (..., k*k + 1) -> (...)."""
    if metric not in COUNTED_METRICS:
        raise ValueError(
            f"metric '{metric}' cannot be had from counts; use one of {', '.join(COUNTED_METRICS)}"
        )
    k = math.isqrt(totals.shape[-1])
    confusion = totals[..., :-1].reshape(*totals.shape[:-1], k, k)
    hits, true, predicted = np.einsum("...ii->...i", confusion), confusion.sum(-1), confusion.sum(-2)
    match metric:
        case "accuracy":
            return hits.sum(-1) / true.sum(-1)
        case "brier":
            return totals[..., -1] / true.sum(-1)
        case "balanced_accuracy":
            return (_divide(hits, true)).sum(-1) / (true > 0).sum(-1)
        case "macro_recall":
            return _divide(hits, true).mean(-1)
        case "macro_precision":
            return _divide(hits, predicted).mean(-1)
    return _divide(2 * hits, true + predicted).mean(-1)  # macro F1


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def resample_patients(totals: np.ndarray, metric: str, n_boot: int = 2000, seed: int = 0) -> np.ndarray:
    """Return the metric of each run in `n_boot` patient-clustered bootstrap samples: (R, P, m) -> (n_boot,
    R).

    All runs share each sample, so differences of columns are paired over patients. One seed, one set of
    samples.
    """
    n_runs, n_patients, width = totals.shape
    weights = _draw_patients(n_patients, n_boot, seed)
    flat = totals.transpose(1, 0, 2).reshape(n_patients, n_runs * width)
    return score_totals((weights @ flat).reshape(n_boot, n_runs, width), metric)


@functools.lru_cache(maxsize=4)
def _draw_patients(n_patients: int, n_boot: int, seed: int) -> np.ndarray:
    """Return how often each patient is drawn, (n_boot, n_patients); the same for all arms of a study."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=n_boot).astype(np.float64)


# -- estimates with intervals -------------------------------------------------------------------------------


def cluster_bootstrap(
    predictions: pd.DataFrame,
    metric: str = "macro_f1",
    clusters: str = "patient_id",
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Return the mean of `metric` over an arm's runs with its 95 % interval (keys as in `paired_difference`,
    the estimate under `delta`). `predictions` as for `count_outcomes`; two or more seeds."""
    runs, totals = count_outcomes(predictions, clusters)
    replicates = resample_patients(totals, metric, n_boot, seed)
    return _estimate(runs, score_totals(totals.sum(axis=1), metric), replicates, totals)


def paired_difference(
    predictions_arm: pd.DataFrame,
    predictions_control: pd.DataFrame,
    metric: str = "macro_f1",
    clusters: str = "patient_id",
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Return how much better the arm is than its control, paired over patients and seeds.

    Each run of the arm is paired with the control's run of the same classifier (and, where the control has
    it, generator) seed, on the same images. Keys: `delta, ci_low, ci_high` (95 %), `p` (two-sided), `mde`
    (the true difference that would have been found with 80 % power), `se`, its parts `se_patients` and
    `se_seeds`, `df`, and the counts `n_seeds, n_generator_seeds, n_patients, n_images`. Raises ValueError if
    the two were tested on different images or share fewer than two seeds.
    """
    return compare_totals(*_pair(predictions_arm, predictions_control, clusters), metric, n_boot, seed)


def compare_totals(
    runs: pd.DataFrame,
    totals: np.ndarray,
    control_totals: np.ndarray,
    pairing: np.ndarray,
    metric: str = "macro_f1",
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Return what `paired_difference` returns, from counts: `runs` and `totals` (R, P, m) of the arm as
    `count_outcomes` gives them, `control_totals` (R_control, P, m), and `pairing` (R, R_control), whose rows
    sum to 1.
    """
    values = score_totals(totals.sum(axis=1), metric) - pairing @ score_totals(
        control_totals.sum(axis=1), metric
    )
    replicates = resample_patients(totals, metric, n_boot, seed)
    replicates = replicates - resample_patients(control_totals, metric, n_boot, seed) @ pairing.T
    return _estimate(runs, values, replicates, totals)


def pair_values(
    predictions_arm: pd.DataFrame, predictions_control: pd.DataFrame, metric: str = "macro_f1"
) -> pd.DataFrame:
    """Return the points behind a `paired_difference`, one row per run: `seed, generator_seed, value, control,
    delta`.
    """
    runs, totals, control_totals, pairing = _pair(predictions_arm, predictions_control, "image_id")
    values = score_totals(totals.sum(axis=1), metric)
    control = pairing @ score_totals(control_totals.sum(axis=1), metric)
    return runs.assign(value=values, control=control, delta=values - control).reset_index(drop=True)


def _pair(predictions_arm: pd.DataFrame, predictions_control: pd.DataFrame, clusters: str) -> tuple:
    if set(predictions_arm["image_id"]) != set(predictions_control["image_id"]):
        raise ValueError("arm and control were tested on different images: nothing can be paired")
    runs, totals = count_outcomes(predictions_arm, clusters)
    control_runs, control_totals = count_outcomes(predictions_control, clusters)
    shared = runs["seed"].isin(control_runs["seed"]).to_numpy()
    runs, totals = runs[shared], totals[shared]
    return runs, totals, control_totals, _pair_runs(runs, control_runs)  # (R, R_control), rows sum to 1


def _pair_runs(runs: pd.DataFrame, control_runs: pd.DataFrame) -> np.ndarray:
    same_seed = runs["seed"].to_numpy()[:, None] == control_runs["seed"].to_numpy()
    same_generator = runs["generator_seed"].to_numpy()[:, None] == control_runs["generator_seed"].to_numpy()
    both = same_seed & same_generator
    partners = np.where(both.any(axis=1, keepdims=True), both, same_seed).astype(np.float64)
    return partners / partners.sum(axis=1, keepdims=True)


def _estimate(
    runs: pd.DataFrame, values: np.ndarray, replicates: np.ndarray, totals: np.ndarray
) -> dict[str, float]:
    n_patients, seeds = totals.shape[1], runs["seed"].to_numpy()
    if len(set(seeds)) < 2 or n_patients < 2:
        raise ValueError(
            f"{len(set(seeds))} common seed(s) and {n_patients} patient(s): an interval needs two of each"
        )
    by_seed = _averaging(seeds)
    bessel = n_patients / (n_patients - 1)
    patients_variance = bessel * (replicates @ by_seed.T).mean(axis=1).var(ddof=1)
    parts = [_classifier_part(by_seed, values, replicates, bessel), _generator_part(runs, values)]
    seeds_variance = sum(excess for excess, _, _ in parts)
    variance = patients_variance + seeds_variance
    doubt = patients_variance**2 / (n_patients - 1) + sum(
        spread**2 / df for excess, spread, df in parts if excess
    )
    delta, se = float((by_seed @ values).mean()), math.sqrt(variance)
    df = variance**2 / doubt if doubt else math.inf  # Satterthwaite
    t = distributions.t(df)
    return {
        "delta": delta,
        "ci_low": delta - t.ppf(0.975) * se,
        "ci_high": delta + t.ppf(0.975) * se,
        "p": float(2 * t.sf(abs(delta) / se)) if se else float(delta == 0),
        "mde": float((t.ppf(0.975) + t.ppf(0.8)) * se),
        "se": se,
        "se_patients": math.sqrt(patients_variance),
        "se_seeds": math.sqrt(seeds_variance),
        "df": float(df),
        "n_seeds": len(set(seeds)),
        "n_generator_seeds": len(set(runs["generator_seed"]) - {-1}),
        "n_patients": n_patients,
        "n_images": int(totals[0, :, :-1].sum()),
    }


def _averaging(groups: np.ndarray) -> np.ndarray:
    """Return the matrix (G, R) that takes the mean over the runs of each group."""
    members = (np.unique(groups)[:, None] == groups).astype(np.float64)
    return members / members.sum(axis=1, keepdims=True)


def _classifier_part(by_seed: np.ndarray, values: np.ndarray, replicates: np.ndarray, bessel: float) -> tuple:
    """Return what classifier seeds add to the variance of the mean beyond the patients' noise in each, the
    raw variance that this was estimated from, and its degrees of freedom."""
    n_seeds = len(by_seed)
    spread = (by_seed @ values).var(ddof=1) / n_seeds
    noise = bessel * (replicates @ by_seed.T).var(axis=0, ddof=1).mean() / n_seeds
    return max(spread - noise, 0.0), spread, n_seeds - 1


def _generator_part(runs: pd.DataFrame, values: np.ndarray) -> tuple:
    """Return the same for generator seeds that several classifier seeds share, from three seeds up.

    One generator seed per classifier seed is already in the classifiers' part. Two cannot tell their spread
    from luck (one degree of freedom), so nothing is added: say so where `n_generator_seeds` is 1 or 2.
    """
    table = runs.assign(value=values).pivot(index="generator_seed", columns="seed", values="value").to_numpy()
    n_generators, n_seeds = table.shape
    if n_generators < 3 or n_generators == len(runs):
        return 0.0, 0.0, 1
    means = np.nanmean(table, axis=1)
    spread = means.var(ddof=1) / n_generators
    residuals, df = table - means[:, None], len(runs) - n_generators
    if not np.isnan(table).any():  # every classifier seed met every generator seed: its own effect cancels
        residuals, df = residuals - table.mean(axis=0) + table.mean(), (n_generators - 1) * (n_seeds - 1)
    per_mean = np.mean(1 / (~np.isnan(table)).sum(axis=1))
    noise = np.nansum(residuals**2) / df * per_mean / n_generators
    return max(spread - noise, 0.0), spread, n_generators - 1


# -- what may be said ---------------------------------------------------------------------------------------


def holm(p: Sequence[float]) -> np.ndarray:
    """Return p-values corrected over their family by Holm (1979); NaN stays NaN and does not count."""
    p = np.asarray(p, dtype=np.float64)
    corrected, known = np.full(p.shape, np.nan), ~np.isnan(p)
    if known.any():
        corrected[known] = multipletests(p[known], method="holm")[1]
    return corrected


def decide_verdict(
    delta: float, ci: tuple[float, float], p_holm: float, margin: float, alpha: float = 0.05
) -> str:
    """Return the verdict in words: "helps", "hurts", "no difference within ±margin" or "undecided".

    A difference is claimed when the corrected p allows it; equivalence when the whole 95 % interval lies
    inside the margin that was named beforehand (stricter than two one-sided tests, Schuirmann 1987). Absence
    of proof of a difference is not proof of absence: the rest is undecided.
    """
    if p_holm <= alpha:
        return "helps" if delta > 0 else "hurts"
    if -margin < ci[0] and ci[1] < margin:
        return f"no difference within ±{margin:g}"
    return "undecided"


def plan_decision(result: dict[str, float], effect: float) -> dict[str, float]:
    """Return how many patients (and images) or how many seeds would bring the minimum detectable effect of a
    `paired_difference` down to `effect`, the rest unchanged; infinity where that alone cannot do it.

    The patients' part of the variance falls as 1/patients, the seeds' part as 1/seeds.
    """
    allowed = (effect * result["se"] / result["mde"]) ** 2 if result["mde"] else math.inf
    patients, seeds = result["se_patients"] ** 2, result["se_seeds"] ** 2
    n_patients = result["n_patients"] * patients / (allowed - seeds) if allowed > seeds else math.inf
    n_seeds = result["n_seeds"] * seeds / (allowed - patients) if allowed > patients else math.inf
    return {
        "n_patients": n_patients,
        "n_images": n_patients * result["n_images"] / result["n_patients"],
        "n_seeds": n_seeds,
    }


def mcnemar_test(
    y_true: Sequence[str], preds_a: Sequence[str], preds_b: Sequence[str], clusters: Sequence[str]
) -> dict[str, float]:
    """Return McNemar's test (1947; exact under 25 disagreements) of two classifiers' right and wrong answers.

    Only for independent images: raises ValueError if a cluster (patient) holds more than one.
    """
    y_true, preds_a, preds_b = (np.asarray(x) for x in (y_true, preds_a, preds_b))
    if len(set(clusters)) < len(y_true):
        raise ValueError("several images of one patient are not independent: use paired_difference")
    right_a, right_b = preds_a == y_true, preds_b == y_true
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    test = mcnemar([[0, only_a], [only_b, 0]], exact=only_a + only_b < 25)
    return {"only_a_right": only_a, "only_b_right": only_b, "p": float(test.pvalue)}
