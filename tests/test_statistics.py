"""The statistics against scikit-learn, scipy, torchmetrics, known answers, and worlds whose truth is
known."""

import numpy as np
import pandas as pd
import pytest
from scipy import special
from scipy import stats as distributions
from sklearn import metrics as sk

from medaug import statistics, tables

CLASSES = ["normal", "bacterial", "viral"]


def simulate_predictions(
    rng,
    n_patients=80,
    images_each=2,
    seeds=5,
    generator_seeds=(-1,),
    skill=1.5,
    patient_sd=0.7,
    seed_sd=0.1,
    run_sd=0.7,
    labels=None,
    base=None,
):
    """One arm's rows of predictions.parquet: image difficulty + patient effect + seed effect + noise of the
    run.

    `base` (N, 3) logits and `labels` (N,) shared by two arms make them paired on images, as in a study.
    """
    n, patient = n_patients * images_each, np.repeat(np.arange(n_patients), images_each)
    labels = rng.integers(0, 3, n_patients)[patient] if labels is None else labels
    if base is None:
        base = rng.normal(0, 1, (n, 3)) + rng.normal(0, patient_sd, (n_patients, 3))[patient]
    frames = []
    for seed in range(seeds):
        shift = rng.normal(0, seed_sd, 3)
        for generator_seed in generator_seeds:
            logits = base + shift + rng.normal(0, run_sd, (n, 3)) + skill * np.eye(3)[labels]
            probs = special.softmax(logits, axis=1).astype(np.float32)
            frames.append(
                pd.DataFrame(
                    {
                        "seed": seed,
                        "generator_seed": generator_seed,
                        "image_id": [f"i{i:04d}" for i in range(n)],
                        "patient_id": [f"p{p:03d}" for p in patient],
                        "y_true": np.array(CLASSES)[labels],
                        "y_pred": np.array(CLASSES)[probs.argmax(1)],
                        **{f"p_{c}": probs[:, j] for j, c in enumerate(CLASSES)},
                    }
                )
            )
    return pd.concat(frames, ignore_index=True), labels, base


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    control, labels, base = simulate_predictions(rng)
    return simulate_predictions(rng, skill=2.0, labels=labels, base=base)[0], control


def probs_of(frame):
    return frame[[f"p_{label}" for label in CLASSES]].to_numpy()


# -- the metrics of one run ----------------------------------------------------------------------------------


def test_metrics_are_scikit_learns(pair):
    frame = pair[0].query("seed == 0")
    y_true, probs = frame["y_true"].to_numpy(), probs_of(frame)
    preds, found = (
        np.array(CLASSES)[probs.argmax(1)],
        statistics.classification_metrics(y_true, probs, CLASSES),
    )
    onehot = (y_true[:, None] == np.array(CLASSES)).astype(float)
    assert list(found) == tables.METRICS
    assert found["n"] == len(frame)
    for name, expected in {
        "accuracy": sk.accuracy_score(y_true, preds),
        "balanced_accuracy": sk.balanced_accuracy_score(y_true, preds),
        "macro_f1": sk.f1_score(y_true, preds, average="macro"),
        "macro_precision": sk.precision_score(y_true, preds, average="macro"),
        "macro_recall": sk.recall_score(y_true, preds, average="macro"),
        "auroc": sk.roc_auc_score(onehot, probs, average="macro"),
        "auprc": sk.average_precision_score(onehot, probs, average="macro"),
        "brier": np.mean(np.sum((probs.astype(float) - onehot) ** 2, axis=1)),
    }.items():
        assert found[name] == pytest.approx(expected, abs=1e-12), name


def test_metrics_do_not_depend_on_the_storage(pair, tmp_path):
    """float64 probabilities, and the same after a trip through the parquet file, give the same numbers."""
    frame = pair[0].query("seed == 1")
    frame.to_parquet(tmp_path / "predictions.parquet")
    stored = pd.read_parquet(tmp_path / "predictions.parquet")
    before = statistics.classification_metrics(frame["y_true"], probs_of(frame).astype(np.float64), CLASSES)
    assert before == statistics.classification_metrics(stored["y_true"], probs_of(stored), CLASSES)


def test_ece_by_its_definition(pair):
    """Guo et al. 2017, eq. 3, bin by bin."""
    probs, y_true = probs_of(pair[0]).astype(float), pair[0]["y_true"].to_numpy()
    frame = pd.DataFrame({"confidence": probs.max(1), "right": np.array(CLASSES)[probs.argmax(1)] == y_true})
    bins = frame.groupby(pd.cut(frame["confidence"], np.linspace(0, 1, 16)), observed=True)
    expected = sum(len(b) / len(frame) * abs(b["right"].mean() - b["confidence"].mean()) for _, b in bins)
    y_index = np.array([CLASSES.index(label) for label in y_true])
    assert statistics.calibration_error(y_index, probs) == pytest.approx(expected, abs=1e-12)
    assert statistics.calibration_error(np.array([0, 0]), np.array([[1.0, 0.0], [0.0, 1.0]])) == 0.5


def test_report_0s_numbers_follow_from_the_label_counts():
    found = statistics.classification_metrics(
        ["normal"] * 234 + ["pneumonia"] * 390, np.full((624, 2), 0.5), ["normal", "pneumonia"]
    )
    assert (found["accuracy"], found["macro_recall"]) == (0.375, 0.5)
    assert found["macro_f1"] == pytest.approx(0.2727, abs=5e-5)
    assert found["auroc"] == 0.5


def test_a_class_without_images():
    found = statistics.classification_metrics(
        ["normal", "viral"], [[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]], CLASSES
    )
    assert (found["balanced_accuracy"], found["auroc"]) == (1.0, 1.0)
    assert found["macro_recall"] == pytest.approx(2 / 3)
    assert np.isnan(statistics.classification_metrics(["normal"], [[0.8, 0.1, 0.1]], CLASSES)["auroc"])


@pytest.mark.parametrize(
    "y_true, probs, message",
    [
        ([], np.zeros((0, 3)), "no images"),
        (["cat"], [[1, 0, 0]], "labels cat"),
        (["viral"], [[1, 0]], "shape"),
        (["viral"], [[3.0, -1.0, 0.5]], "softmax"),
        (["viral"], [[np.nan, 0.5, 0.5]], "finite"),
    ],
)
def test_bad_input_gets_one_clear_line(y_true, probs, message):
    with pytest.raises(ValueError, match=message):
        statistics.classification_metrics(y_true, probs, CLASSES)


# -- counts and replicates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", statistics.COUNTED_METRICS)
def test_scores_from_counts_are_those_from_predictions(pair, metric):
    runs, totals = statistics.count_outcomes(pair[0])
    scores = statistics.score_totals(totals.sum(axis=1), metric)
    for seed, score in zip(runs["seed"], scores, strict=True):
        frame = pair[0][pair[0]["seed"] == seed]
        expected = statistics.classification_metrics(frame["y_true"], probs_of(frame), CLASSES)[metric]
        assert score == pytest.approx(expected, abs=1e-7)


def test_a_replicate_is_the_metric_of_the_resampled_images(pair):
    """Draw the patients by hand, stack their images, ask scikit-learn: the same number as the matrix
    product."""
    frame = pair[0].query("seed == 2")
    _, totals = statistics.count_outcomes(frame)
    replicates = statistics.resample_patients(totals, "macro_f1", n_boot=3, seed=7)
    weights = np.random.default_rng(7).multinomial(80, np.full(80, 1 / 80), size=3)
    by_patient = [rows for _, rows in frame.groupby("patient_id", sort=True)]
    for draw, replicate in zip(weights, replicates[:, 0], strict=True):
        sample = pd.concat([rows for rows, times in zip(by_patient, draw) for _ in range(times)])
        assert replicate == pytest.approx(sk.f1_score(sample["y_true"], sample["y_pred"], average="macro"))


def test_unequal_runs_are_refused(pair):
    frame = pair[0]
    with pytest.raises(ValueError, match="different images"):
        statistics.count_outcomes(frame.iloc[1:])
    with pytest.raises(ValueError, match="tested twice"):
        statistics.count_outcomes(pd.concat([frame, frame]))
    with pytest.raises(ValueError, match="cannot be had from counts"):
        statistics.paired_difference(*pair, metric="auroc")


# -- paired differences --------------------------------------------------------------------------------------


def test_difference_is_the_mean_over_seeds(pair):
    arm, control = pair
    found = statistics.paired_difference(arm, control, n_boot=200)
    per_seed = [
        sk.f1_score(a["y_true"], a["y_pred"], average="macro")
        - sk.f1_score(c["y_true"], c["y_pred"], average="macro")
        for a, c in ((arm[arm["seed"] == s], control[control["seed"] == s]) for s in range(5))
    ]
    assert found["delta"] == pytest.approx(np.mean(per_seed), abs=1e-12)
    assert list(statistics.pair_values(arm, control)["delta"]) == pytest.approx(per_seed, abs=1e-12)
    assert (found["n_seeds"], found["n_generator_seeds"], found["n_patients"], found["n_images"]) == (
        5,
        0,
        80,
        160,
    )
    assert found["ci_low"] < found["delta"] < found["ci_high"]
    assert (found["p"] < 0.05) == (found["ci_low"] > 0 or found["ci_high"] < 0)
    again = statistics.paired_difference(control, arm, n_boot=200)
    assert again["delta"] == pytest.approx(-found["delta"]) and again["p"] == pytest.approx(found["p"])
    assert found == statistics.paired_difference(arm.sample(frac=1, random_state=0), control, n_boot=200)


def test_identical_arms_differ_by_nothing(pair):
    found = statistics.paired_difference(pair[0], pair[0], n_boot=100)
    assert (found["delta"], found["ci_low"], found["ci_high"], found["p"], found["mde"]) == (0, 0, 0, 1, 0)


def test_without_patient_noise_it_is_the_t_test_over_seeds():
    """All patients alike: only the seeds vary, and five numbers are tested as five numbers."""

    def make(hits):
        rows = [
            dict(
                seed=s,
                generator_seed=-1,
                image_id=f"{p}-{i}",
                patient_id=str(p),
                y_true="a",
                y_pred="a" if i < hit else "b",
                p_a=0.5,
                p_b=0.5,
            )
            for s, hit in enumerate(hits)
            for p in range(6)
            for i in range(10)
        ]
        return pd.DataFrame(rows)

    found = statistics.paired_difference(
        make([7, 8, 6, 9, 8]), make([6, 6, 6, 7, 5]), metric="accuracy", n_boot=50
    )
    test = distributions.ttest_1samp([0.1, 0.2, 0.0, 0.2, 0.3], 0)
    assert found["p"] == pytest.approx(test.pvalue)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(tuple(test.confidence_interval()))
    assert found["se_patients"] == pytest.approx(0, abs=1e-9) and found["df"] == pytest.approx(4)


def test_without_seed_noise_it_is_the_binomial_error():
    """Independent images, seeds all alike: the standard error of an accuracy is sqrt(p(1 - p)/n)."""
    rng = np.random.default_rng(1)
    one, _, _ = simulate_predictions(rng, n_patients=400, images_each=1, seeds=1)
    frame = pd.concat([one.assign(seed=s) for s in range(3)])
    found = statistics.cluster_bootstrap(frame, "accuracy")
    p = found["delta"]
    assert found["se"] == pytest.approx(np.sqrt(p * (1 - p) / 400), rel=0.05)
    assert found["se_seeds"] == 0 and found["df"] == pytest.approx(399)
    doubled = pd.concat(
        [frame, frame.assign(image_id=frame["image_id"] + "b")]
    )  # a copy is no new information
    assert statistics.cluster_bootstrap(doubled, "accuracy")["se"] == pytest.approx(found["se"], rel=1e-6)


def test_pairing_by_generator_seed():
    rng = np.random.default_rng(2)
    arm, labels, base = simulate_predictions(rng, generator_seeds=(0, 1))
    real, _, _ = simulate_predictions(rng, labels=labels, base=base)
    found = statistics.paired_difference(arm, real, n_boot=100)
    assert (found["n_seeds"], found["n_generator_seeds"]) == (5, 2)
    one = [
        statistics.paired_difference(arm[arm["generator_seed"] == g], real, n_boot=100)["delta"]
        for g in (0, 1)
    ]
    assert found["delta"] == pytest.approx(np.mean(one))
    shifted = arm.assign(generator_seed=arm["generator_seed"] + 1)  # seeds (1, 2): only 1 is in both
    assert statistics.paired_difference(arm.query("generator_seed == 1"), shifted, n_boot=100)["delta"] != 0
    assert statistics.paired_difference(arm, arm.sample(frac=1, random_state=0), n_boot=100)["delta"] == 0


def test_a_poor_generator_seed_widens_the_interval():
    """One of three generator seeds spoils all its runs: the spread between generators must enter the
    interval."""
    rng = np.random.default_rng(3)
    real, labels, base = simulate_predictions(rng, seed_sd=0)
    arms = [
        simulate_predictions(rng, seed_sd=0, skill=skill, labels=labels, base=base)[0]
        for skill in (1.5, 1.5, 0.3)
    ]
    same, poor = arms[0], arms[2]
    mixed = pd.concat([arm.assign(generator_seed=g) for g, arm in enumerate(arms)])
    alike = pd.concat([same.assign(generator_seed=g) for g in range(3)])
    found = {
        name: statistics.paired_difference(arm, real, n_boot=200)
        for name, arm in dict(mixed=mixed, alike=alike, poor=poor).items()
    }
    assert found["poor"]["p"] < 0.001
    assert (
        found["mixed"]["se"] > 3 * found["poor"]["se"]
        and found["mixed"]["p"] > 0.05
        and found["mixed"]["df"] < 4
    )
    assert found["alike"]["se"] == pytest.approx(statistics.paired_difference(same, real, n_boot=200)["se"])


def test_null_worlds_with_shared_generator_seeds():
    """Three generator seeds dealt to five classifier seeds in turn, each with an effect of its own: still no
    more false alarms than promised."""
    rng, alarms = np.random.default_rng(4), 0
    runs = pd.DataFrame({"seed": range(5), "generator_seed": [0, 1, 2, 0, 1]})
    for _ in range(200):
        arm, control = simulate_totals(
            rng, seed_sd=0.5, run_sd=0.3, generator_sd=0.5, generators=runs["generator_seed"]
        )
        alarms += statistics.compare_totals(runs, arm, control, np.eye(5), n_boot=200)["p"] <= 0.05
    assert alarms <= distributions.binom(200, 0.05).ppf(0.975)


def test_unpairable_arms_are_refused(pair):
    arm, control = pair
    with pytest.raises(ValueError, match="different images"):
        statistics.paired_difference(arm[arm["image_id"] != "i0000"], control)
    with pytest.raises(ValueError, match="1 common seed"):
        statistics.paired_difference(arm[arm["seed"] == 0], control)
    with pytest.raises(ValueError, match="1 patient"):
        statistics.paired_difference(arm.assign(patient_id="x"), control.assign(patient_id="x"))


def simulate_totals(
    rng,
    n_patients=40,
    images_each=2,
    seeds=5,
    skills=(1.5, 1.5),
    seed_sd=0.1,
    run_sd=0.7,
    generator_sd=0.0,
    generators=(0, 0, 0, 0, 0),
):
    """The counts of arm and control (each (seeds, n_patients, 10)) on the same images: as
    `simulate_predictions`, but fast. Classifier seeds that share a generator seed share its effect in the
    arm; the control has as much of it, drawn anew for each seed, so that equal skills are a null world."""
    n, patient = n_patients * images_each, np.repeat(np.arange(n_patients), images_each)
    labels = rng.integers(0, 3, n_patients)[patient]
    base = rng.normal(0, 1, (n, 3)) + rng.normal(0, 0.7, (n_patients, 3))[patient]
    arms, generated = (
        [],
        rng.normal(0, generator_sd, (max(generators) + 1, 3))[np.asarray(generators)][:, None],
    )
    for skill in skills:
        shared = rng.normal(0, generator_sd, (seeds, 1, 3)) if arms else generated
        noise = shared + rng.normal(0, seed_sd, (seeds, 1, 3)) + rng.normal(0, run_sd, (seeds, n, 3))
        preds = (base + noise + skill * np.eye(3)[labels]).argmax(axis=2)  # (seeds, n)
        totals = np.zeros((seeds, n_patients, 10))
        np.add.at(totals, (np.arange(seeds)[:, None], patient, labels * 3 + preds), 1)
        arms.append(totals)
    return arms


def compare_simulated(arms, n_boot=300):
    runs = pd.DataFrame({"seed": range(len(arms[0])), "generator_seed": -1})
    return statistics.compare_totals(runs, *arms, np.eye(len(runs)), n_boot=n_boot)


WORLDS = {"noise of each run": dict(seed_sd=0.0, run_sd=0.7), "noise of seeds": dict(seed_sd=1.0, run_sd=0.2)}


@pytest.mark.parametrize("world", WORLDS)
def test_null_worlds_raise_no_more_false_alarms_than_promised(world):
    """300 studies in which the arm is the control trained anew: at most 5 % alarms, within binomial error.

    In the second world the interval that knows only the patients would fail this very test.
    """
    rng, alarms, naive = np.random.default_rng(11), 0, 0
    for _ in range(300):
        found = compare_simulated(simulate_totals(rng, **WORLDS[world]))
        alarms += found["p"] <= 0.05
        naive += abs(found["delta"]) > 1.96 * found["se_patients"]
    most = distributions.binom(300, 0.05).ppf(0.975)
    assert alarms <= most
    if world == "noise of seeds":
        assert naive > 2 * most


def test_power_and_coverage_are_as_promised():
    """Worlds with a true difference near the minimum detectable effect: found in about the promised share of
    them, and inside the interval in about 95 %."""
    rng = np.random.default_rng(5)
    found = [compare_simulated(simulate_totals(rng, n_patients=80, skills=(1.85, 1.5))) for _ in range(200)]
    truth, mde = np.mean([f["delta"] for f in found]), np.mean([f["mde"] for f in found])
    promised = distributions.norm.cdf(0.84 + 2.8 * (truth - mde) / mde)
    assert 0.5 < promised < 0.95
    assert np.mean([f["p"] <= 0.05 for f in found]) == pytest.approx(promised, abs=0.12)
    assert 0.91 < np.mean([f["ci_low"] <= truth <= f["ci_high"] for f in found]) < 0.995


# -- what may be said ----------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.01, np.nan, 0.03]) == pytest.approx([0.02, np.nan, 0.03], nan_ok=True)
    assert np.isnan(statistics.holm([np.nan])).all()


@pytest.mark.parametrize(
    "delta, ci, p, verdict",
    [
        (0.03, (0.01, 0.05), 0.01, "helps"),
        (-0.03, (-0.05, -0.01), 0.01, "hurts"),
        (0.005, (-0.01, 0.015), 0.4, "no difference within ±0.02"),
        (0.02, (-0.01, 0.05), 0.2, "undecided"),
        (0.03, (0.01, 0.05), 0.06, "undecided"),
        (0.0, (0.0, 0.0), 1.0, "no difference within ±0.02"),
    ],
)
def test_verdicts(delta, ci, p, verdict):
    assert statistics.decide_verdict(delta, ci, p, margin=0.02) == verdict


def test_the_plan_brings_the_detectable_effect_to_the_target(pair):
    result = statistics.paired_difference(*pair, n_boot=200) | {"se_seeds": 0.01, "se_patients": 0.02}
    result |= {"se": np.hypot(0.01, 0.02), "mde": 2.8 * np.hypot(0.01, 0.02)}
    plan = statistics.plan_decision(result, effect=0.04)
    se = np.sqrt(0.02**2 * result["n_patients"] / plan["n_patients"] + 0.01**2)
    assert 2.8 * se == pytest.approx(0.04)
    assert plan["n_images"] == pytest.approx(2 * plan["n_patients"])
    assert (
        statistics.plan_decision(result, effect=0.01)["n_patients"] == np.inf
    )  # the seeds alone are too loud
    assert statistics.plan_decision(result, effect=0.07)["n_seeds"] < 5


def test_mcnemar_is_the_binomial_test_and_wants_independent_images():
    y_true, a = ["x"] * 20, ["x"] * 9 + ["y"] + ["x"] * 10
    b = ["y"] * 9 + ["x"] + ["x"] * 10
    found = statistics.mcnemar_test(y_true, a, b, clusters=range(20))
    assert (found["only_a_right"], found["only_b_right"]) == (9, 1)
    assert found["p"] == pytest.approx(distributions.binomtest(9, 10).pvalue)
    with pytest.raises(ValueError, match="not independent"):
        statistics.mcnemar_test(y_true, a, b, clusters=[0] * 20)
