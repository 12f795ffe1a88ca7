"""Every claim has its line, what is settled has its evidence, and the re-enacted faults are what they say."""

import numpy as np
import pandas as pd
import pytest
import torch

from medaug import claims, faults, guards


@pytest.fixture(scope="module")
def alone():
    """The claims with no study's tables at all: arithmetic, counting and re-enacted faults only."""
    torch.set_num_threads(1)
    return claims.evaluate_claims({}).set_index("id")


def test_there_are_94_claims_each_with_what_it_needs():
    listed = claims.load_claims()
    assert len(listed) == 94 and listed["id"].is_unique
    assert listed["id"].str.split(".").str[0].value_counts().to_dict() == {"0": 34, "4": 25, "3": 18, "2": 17}
    assert (listed[["claim", "published_value", "needs"]] != "").all().all()
    assert set(claims.SETTLERS) <= set(listed["id"])


def test_every_claim_has_a_line_and_nothing_without_evidence_is_settled(alone):
    assert list(alone.reset_index().columns) == claims.COLUMNS and len(alone) == 94
    assert set(alone["verdict"]) <= set(claims.VERDICTS)
    assert (alone["evidence"] != "").all()
    settled = alone[alone["verdict"] != "not testable here"]
    assert settled["evidence"].str.match(r"([\w-]+/)?\d\d-[\w-]+(#[\w-]+)?$").all()
    assert (settled["value"] != "").all()


@pytest.mark.parametrize(
    "claim, verdict, value",
    [
        ("0.06", "reproduced", "865,910,724"),
        ("0.07", "corrected", "23 layers, 340,387,840"),
        ("0.09", "refuted", "16 modules (proj_in only), 99,840"),
        ("0.15", "corrected", "79 x"),
        ("0.16", "corrected", "1.25% of CLIP, 0.012%"),
        ("0.17", "reproduced", "5,406,720 / 433,023,233 / 1.2486%"),
        ("0.18", "refuted", "ln 2"),
        ("0.25", "reproduced", "0.3750 / 0.5000 / 0.2727 / 0.6931"),
        ("0.26", "corrected", "37.5% are right"),
        ("0.29", "corrected", "the training table has 3 epochs"),
        ("2.02", "reproduced", "12,291"),
        ("2.11", "corrected", "34.49, 50.67"),
        ("2.13", "reproduced", "p = 0.24"),
        ("3.09", "answered", "85.2-90.3 % and 83.1-88.6 %"),
        ("4.12", "refuted", "0.9436"),
        ("4.13", "refuted", "0.9634"),
        ("4.15", "corrected", "3.08 x is the least"),
        ("4.22", "refuted", "ConvNeXt is third of 6"),
        ("4.07", "not testable here", "possible"),
    ],
)
def test_known_answers(alone, claim, verdict, value):
    assert alone.loc[claim, "verdict"] == verdict
    assert value in alone.loc[claim, "value"]


@pytest.mark.parametrize("claim", ["0.10", "0.11", "0.20", "2.10", "4.04"])
def test_re_enacted_faults_refute(alone, claim):
    assert alone.loc[claim, "verdict"] in ("refuted", "corrected")
    assert alone.loc[claim, "evidence"] == claims.CAUGHT


def test_maps_are_a_claim_only_where_they_were_measured(alone):
    assert alone.loc["0.34", "verdict"] == "not testable here"
    runs = pd.DataFrame({"model": "small-cnn", "arm": ["real", "real", "oracle"], "cam_outside": [np.nan, 0.561, 0.4],
                         "cam_outside_flat": [np.nan, 0.66, 0.66]})  # fmt: skip
    found = claims.evaluate_claims({"phantom": {"classification.csv": runs}}).set_index("id").loc["0.34"]
    assert found["verdict"] == "answered" and found["evidence"] == "phantom/05-baselines"
    assert "56% of the attribution" in found["value"] and "66%" in found["value"]


def test_the_effect_comes_from_the_verdict_table():
    row = dict(
        arm="real+synthetic",
        control="real",
        metric="macro_f1",
        model="small-cnn",
        family=True,
        delta=0.012,
        ci_low=-0.003,
        ci_high=0.027,
    )
    found = claims.evaluate_claims({"phantom": {"verdict.csv": pd.DataFrame([row])}}).set_index("id")
    assert "small-cnn): +1.2 points of macro F1 [-0.3, +2.7]" in found.loc["0.24", "value"]


def test_the_lymphoma_arms_come_from_their_study(alone):
    assert set(alone.loc[list(claims.LYMPHOMA_ARMS), "verdict"]) == {"not testable here"}
    arms = sorted({arm for wanted in claims.LYMPHOMA_ARMS.values() for arm in wanted})
    verdict = pd.DataFrame({"arm": arms, "control": "real", "metric": "macro_f1", "model": "mobilenetv2-frozen", "n_images": 374,
                            "delta": 0.011, "ci_low": -0.02, "ci_high": 0.042})  # fmt: skip
    made = pd.DataFrame({"generator": ["lora@40", "lora", "lora@guidance_scale=2.5", "lora@guidance_scale=40.0"], "label": "all",
                         "encoder": "clip-foundation", "kid": [0.9, 0.4, 0.4, 3.0], "class_recovery": [0.4, 0.6, 0.6, 0.9]})
    study = {"verdict.csv": verdict, "synthesis.csv": made}
    found = claims.evaluate_claims({"lymphoma-local": study}).set_index("id")
    assert set(found.loc[list(claims.LYMPHOMA_ARMS), "verdict"]) == {"answered"}
    assert "real+dct2 +1.1 [-2.0, +4.2]" in found.loc["2.14", "value"] and "374 images" in found.loc["2.14", "value"]
    assert found.loc["2.05", "value"].endswith("40: KID 0.90, class recovered 40%; lora: KID 0.40, class recovered 60%")
    assert found.loc["2.07", "value"].endswith("2.5: KID 0.40, class recovered 60%; 40.0: KID 3.00, class recovered 90%")
    fewer = claims.evaluate_claims({"lymphoma-local": study | {"verdict.csv": verdict[verdict["arm"] != "real+dct2"]}}).set_index("id")
    assert fewer.loc["2.14", "verdict"] == "not testable here" and fewer.loc["2.08", "verdict"] == "answered"


def test_ways_of_tuning_are_compared_only_where_all_were_judged(alone):
    assert set(alone.loc[list(claims.WAYS_OF_TUNING), "verdict"]) == {"not testable here"}
    names = sorted({name for wanted in claims.WAYS_OF_TUNING.values() for name in wanted})
    made = pd.DataFrame({"generator": names, "encoder": "clip-foundation", "label": "all", "kid": 0.25, "recall": 0.5,
                         "class_recovery": 0.75, "second_recovery": [float("nan") if "@" in name else 0.625 for name in names]})
    made.loc[made["generator"] == "reward", ["kid", "class_recovery"]] = 0.5, 0.875
    found = claims.evaluate_claims({"phantom-full": {"synthesis.csv": made}}).set_index("id")
    assert found.loc["0.32", "value"] == ("lora: KID 0.25, recall 0.50, class recovered 75%, by a second judge 62%; "
                                          "reward: KID 0.50, recall 0.50, class recovered 88%, by a second judge 62%")
    assert "50 DDIM steps with guidance" in found.loc["0.31", "value"] and "lora in steps: 4: KID" in found.loc["0.31", "value"]
    fewer = claims.evaluate_claims({"phantom-full": {"synthesis.csv": made[made["generator"] != "full"]}}).set_index("id")
    assert list(fewer.loc[["0.31", "0.32", "0.33", "2.04"], "verdict"]) == ["answered", "answered", *["not testable here"] * 2]


def test_prompts_are_compared_where_they_were_swept(alone):
    assert alone.loc["0.13", "verdict"] == "not testable here"
    made = pd.DataFrame({"generator": ["lora", "lora@prompts=findings", "lora@prompts=shorter"], "encoder": "clip-foundation",
                         "label": "all", "kid": [0.1, 0.7, 0.2], "class_recovery": [0.9, 0.1, 0.3]})
    found = claims.evaluate_claims({"phantom-full": {"synthesis.csv": made}}).set_index("id")
    assert found.loc["0.13", "value"].endswith("tuned with: KID 0.10, class recovered 90%; findings: KID 0.70, class recovered 10%; "
                                               "shorter: KID 0.20, class recovered 30%")
    one = claims.evaluate_claims({"phantom-full": {"synthesis.csv": made.iloc[:2]}}).set_index("id")
    assert one.loc["0.13", "verdict"] == "not testable here"


def test_learning_curves_need_several_fractions():
    runs = pd.DataFrame([dict(arm=arm, model="small-cnn", split="test", seed=seed, fraction=fraction, ratio=ratio, macro_f1=fraction)
                         for arm, ratio in (("real", 0.0), ("real+synthetic", 0.25)) for seed in range(2) for fraction in (0.5, 1.0)])
    found = claims.evaluate_claims({"covid-local": {"classification.csv": runs}}).set_index("id")
    assert found.loc["4.17", "value"].endswith("2 seeds: 100%: real 1.000, real+synthetic 1.000; 50%: real 0.500, real+synthetic 0.500")
    whole = claims.evaluate_claims({"covid-local": {"classification.csv": runs[runs["fraction"] == 1]}}).set_index("id")
    assert whole.loc["4.17", "verdict"] == "not testable here"


def test_runs_on_fewer_patients_count_for_no_claim():
    ways = ["real", "real-downsampled", "real-weighted", "real-oversampled"]
    runs = pd.DataFrame([dict(arm=way, model="mobilenetv2-frozen", split="test", seed=seed, fraction=fraction, macro_f1=score)
                         for way in ways for seed in range(2) for fraction, score in ((1.0, 0.75), (0.25, 0.5))])
    found = claims.evaluate_claims({"guangzhou-local": {"classification.csv": runs}}).set_index("id")
    assert "real 0.750" in found.loc["3.02", "value"]


def make_runs(accuracy, split="test", model="mobilenetv2"):
    return pd.DataFrame(
        [
            dict(
                arm="real",
                model=model,
                split=split,
                seed=seed,
                fraction=1.0,
                n=624,
                accuracy=accuracy + 0.01 * (seed - 2),
            )
            for seed in range(5)
        ]
    )


@pytest.mark.parametrize("accuracy, verdict", [(0.775, "reproduced"), (0.70, "corrected")])
def test_mobilenet_is_compared_with_its_published_accuracy(accuracy, verdict):
    found = claims.evaluate_claims(
        {"guangzhou-local": {"classification.csv": make_runs(accuracy)}}
    ).set_index("id")
    assert found.loc["3.10", "verdict"] == verdict
    assert found.loc["3.10", "evidence"] == "guangzhou-local/05-baselines"
    assert f"{accuracy:.1%}" in found.loc["3.10", "value"]
    assert found.loc["3.17", "verdict"] == "not testable here"


def test_networks_from_scratch_are_told_on_both_splits():
    runs = pd.concat([make_runs(0.8, "val", "cnn5"), make_runs(0.6, "test", "cnn5")])
    found = claims.evaluate_claims({"guangzhou-local": {"classification.csv": runs}}).set_index("id")
    assert found.loc["3.05", "verdict"] == "not testable here"
    assert "accuracy 80.0% on validation patients, 60.0% on the official test" in found.loc["3.06", "value"]


def test_validation_beside_test():
    both = pd.concat([make_runs(0.77), make_runs(0.95, "val")])
    found = claims.evaluate_claims({"guangzhou-local": {"classification.csv": both}}).set_index("id")
    assert found.loc["3.17", "verdict"] == "answered"
    assert "validation 95.0%, test 77.0%" in found.loc["3.17", "value"]


def test_numbers_are_read_as_published():
    assert claims.read_numbers("5,406,720 / 433,023,233 / 1.2486 %") == [5406720, 433023233, 1.2486]
    assert claims.read_numbers("34.49, 50.67 / 48") == [34.49, 50.67, 48]
    assert claims.read_numbers("1e-3 / 128 / no") == [0.001, 128]


# -- the faults ----------------------------------------------------------------------------------------------


def test_the_step_without_gradient_runs_and_trains_nothing():
    generator, before, after, loss = faults.step_without_gradient()
    assert loss > 0 and all(weight.grad is None for weight in generator.parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_real_sigma_changes_images_and_keeps_their_mean():
    images_u8 = np.random.default_rng(0).integers(60, 200, (10, 32, 32), dtype=np.uint8)
    changed = faults.perturb_dct(images_u8, sigma=5)
    assert guards.check_augmentation_changes(images_u8, changed) == 1
    assert (
        np.abs(changed.mean(axis=(1, 2)) - images_u8.mean(axis=(1, 2))).max() < 0.2
    )  # the first coefficient stays
    assert np.std(changed - images_u8.astype(float)) == pytest.approx(
        5, rel=0.05
    )  # the transform is orthonormal


def test_every_fault_of_the_test_path_is_seen():
    y_index, probs = faults.follow_test_path("none")
    healthy = (probs.argmax(axis=1) == y_index).mean()
    assert healthy > 0.85
    for fault in faults.PATH_FAULTS[1:]:
        y_index, probs = faults.follow_test_path(fault)
        with pytest.raises(guards.GuardError):
            guards.check_same_path(healthy, (probs.argmax(axis=1) == y_index).mean())
    with pytest.raises(ValueError, match="no fault 'gremlins'"):
        faults.follow_test_path("gremlins")


def test_impossible_shares():
    assert faults.find_impossible_shares([33.33, 66.66, 66.67, 50.0], 3) == [50.0]
    assert faults.find_impossible_shares([34.45, 34.44, 34.49], 299) == [34.49]  # 103 of 299, rounded or cut


def test_counts_come_from_the_audit():
    counts = [
        dict(split=s, label=c, images=n)
        for s, c, n in (
            ("train", "normal", 3),
            ("val", "normal", 1),
            ("test", "normal", 2),
            ("train", "bacterial", 5),
            ("train", "viral", 4),
        )
    ]
    audit = dict(
        n_images=15,
        classes=["normal", "bacterial", "viral"],
        counts=counts,
        patient_readings=[dict(patients=9, reading="by name")],
        split_by_image=[dict(model="nearest neighbour", difference=0.015, ci_low=0.006, ci_high=0.024)],
    )
    found = claims.evaluate_claims({"guangzhou-local": {"audit.json": audit}}).set_index("id")
    assert found.loc["0.01", "verdict"] == "corrected"
    assert "15 images (12 in train, 1 in val, 2 in test)" in found.loc["0.01", "value"]
    assert "5 / 4 / 4 is the training part" in found.loc["0.02", "value"]
    assert "5 / 6 / 4 in all" in found.loc["0.02", "value"]
    assert found.loc["0.04", "value"] == "15 images of 9 patients, by name"
    assert "+1.5 points" in found.loc["3.03", "value"] and found.loc["4.02", "verdict"] == "not testable here"
    assert found.loc["2.01", "verdict"] == "not testable here"


def test_training_losses_and_missed_patients_come_from_the_tables():
    history = pd.DataFrame(
        [dict(model=m, arm="real", seed=0, loss=loss, val_loss=v) for m, loss, v in (
            ("clip-lora-in-batch-index", 1.38, None), ("clip-lora", 0.5, None), ("clip-lora-contrastive", 0.7, None),
            ("lora", 0.3, 0.30), ("lora", 0.2, 0.25))]
    )  # fmt: skip
    y_true, y_pred = ["normal", "viral", "viral", "bacterial"], ["normal", "normal", "viral", "bacterial"]
    predictions = pd.DataFrame(dict(arm="real", model="mobilenetv2", split="test", seed=0, y_true=y_true, y_pred=y_pred))
    runs = pd.DataFrame([dict(arm=a, model="mobilenetv2-frozen", split="test", fraction=1.0, macro_f1=f) for a, f in (
        ("real", 0.7), ("real-downsampled", 0.72), ("real-weighted", 0.74), ("real-oversampled", 0.73))])  # fmt: skip
    found = claims.evaluate_claims(
        {"phantom": {"history.csv": history},
         "guangzhou-local": {"predictions.parquet": predictions, "classification.csv": runs}}).set_index("id")  # fmt: skip
    assert "as published 1.380, class prompts 0.500" in found.loc["0.19", "value"]
    assert "0.300 to 0.250" in found.loc["2.16", "value"]
    assert "1 to 1 of 3 ill test images" in found.loc["3.16", "value"]
    assert "real-downsampled 0.720" in found.loc["3.02", "value"]
    assert found.loc["0.27", "verdict"] == "not testable here"


def test_clip_is_set_beside_the_network_of_the_same_study():
    runs = pd.DataFrame([dict(arm="real", model=m, split="test", macro_f1=f) for m, f in (("clip-lora", 0.5), ("small-cnn", 0.75))])
    found = claims.evaluate_claims({"phantom": {"classification.csv": runs}}).set_index("id")
    assert found.loc["0.27", "evidence"] == "phantom/04-clip-lora"
    assert "clip-lora 0.500 (1 seeds), small-cnn 0.750" in found.loc["0.27", "value"]


def test_clip_claims_come_from_the_arm_real_and_the_first_study_that_has_both():
    scores = {"clip-linear-probe": 0.52, "clip-linear-probe-squashed": 0.48, "clip-lora": 0.44, "clip-lora-float32": 0.45}
    runs = pd.DataFrame([dict(arm="real", model=m, split="test", seed=0, fraction=1.0, macro_f1=f) for m, f in scores.items()])
    more = pd.DataFrame([dict(arm="real+synthetic", model="clip-lora", split="test", seed=0, macro_f1=0.9)])
    runs = pd.concat([runs, more])
    found = claims.evaluate_claims({"phantom": {"classification.csv": runs}}).set_index("id")
    assert "0.520 (1 run(s)) and 0.480 (1 run(s)); simulated films are square" in found.loc["0.21", "value"]
    assert "0.440 (1 run(s)) and 0.450" in found.loc["0.22", "value"]
    both = {"phantom": {"classification.csv": runs}, "guangzhou-local": {"classification.csv": runs}}
    assert claims.evaluate_claims(both).set_index("id").loc["0.21", "evidence"] == "guangzhou-local/04-clip-lora"
    assert claims.evaluate_claims({}).set_index("id").loc["0.22", "verdict"] == "not testable here"


def test_the_effect_on_clip_is_told_beside_the_endpoints():
    row = dict(arm="real+synthetic", control="real", metric="macro_f1", delta=0.012, ci_low=-0.003, ci_high=0.027)
    rows = [row | dict(model=m, family=f) for m, f in (("small-cnn", True), ("clip-lora", False), ("clip-probe", False))]
    value = claims.evaluate_claims({"phantom": {"verdict.csv": pd.DataFrame(rows)}}).set_index("id").loc["0.24", "value"]
    assert "phantom, small-cnn" in value and "phantom, clip-lora" in value and "clip-probe" not in value


def test_two_tasks_are_set_beside_one():
    masks = pd.DataFrame([dict(model=m, split="test", dice_per_image=d) for m, d in (("unet", 0.91), ("multitask", 0.9))])
    runs = pd.DataFrame([dict(model=m, split="test", macro_f1=f) for m, f in (("singletask", 0.5), ("multitask", 0.6))])
    tables = {"segmentation.csv": masks, "classification.csv": runs}
    found = claims.evaluate_claims({"phantom": tables}).set_index("id")
    assert "Dice 0.900 with two tasks, 0.910 with one; macro F1 0.600" in found.loc["4.21", "value"]
    assert claims.evaluate_claims({"phantom": {"segmentation.csv": masks}}).set_index("id").loc["4.21", "verdict"] == "not testable here"


def test_eight_networks_are_ranked_only_where_all_eight_were_trained_with_several_seeds():
    names = ["unet", "unetplusplus", "manet", "fpn", "pspnet", "pan", "deeplabv3", "deeplabv3plus"]
    rows = [{"model": name, "seed": s, "train_source": "phantom", "test_source": "phantom", "split": "test",
             "dice_per_image": 0.90 + 0.001 * k + 0.005 * s} for k, name in enumerate(names) for s in (0, 1)]  # fmt: skip

    def settle(rows):
        return claims.evaluate_claims({"phantom-full": {"segmentation.csv": pd.DataFrame(rows)}}).set_index("id").loc["4.20"]

    found = settle(rows)
    assert found["verdict"] == "answered" and "(deeplabv3plus)" in found["value"]
    assert "differ by 0.0010, a change of seed moves a network by up to 0.0050" in found["value"]
    for fewer in (rows[2:], [row for row in rows if row["seed"] == 0]):
        assert settle(fewer)["verdict"] == "not testable here"
    assert claims.evaluate_claims({}).set_index("id").loc["4.25", "verdict"] == "answered"


def test_an_easy_data_set_is_corrected_only_where_the_border_gives_the_classes_away():
    row = {"sentence": "border: tells the classes apart better than chance", "balanced_accuracy": 0.8, "chance": 0.333,
           "ci_low": 0.79, "ci_high": 0.81}  # fmt: skip

    def settle(border):
        return claims.evaluate_claims({"covid-local": {"audit.json": {"shortcut_scores": [border]}}}).set_index("id").loc["4.23"]

    found = settle(row)
    assert found["verdict"] == "corrected" and "0.800 balanced accuracy [0.790, 0.810], chance 0.333" in found["value"]
    assert settle(row | {"ci_low": 0.32})["verdict"] == "not testable here"
