"""The simulated images: same seeds same bytes, findings where they belong, and no shortcut to the label."""

import numpy as np
import pytest
import torch

from medaug.phantom import chest, cohort, tissue

STUDY = chest.CLASSES[1:]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def paired():
    """The same 24 patients and images at 64 px, once under each study label."""
    seeds = np.arange(24)
    return {
        label: chest.render(seeds, seeds + 100, [label] * 24, size=64, difficulty=0.2)
        for label in chest.CLASSES
    }


@pytest.mark.parametrize("module, labels", [(chest, chest.CLASSES + chest.GENERIC), (tissue, tissue.CLASSES)])
def test_bytes_depend_on_the_seeds_alone(module, labels):
    n = len(labels)
    patients, images, labels = np.arange(n) + 5, np.arange(n) + 50, np.array(labels, dtype=object)
    whole = module.render(patients, images, labels, size=64, batch_size=n)
    order = np.random.default_rng(0).permutation(n)
    mixed = module.render(patients[order], images[order], labels[order], size=64, batch_size=3)
    for name, field in whole.items():
        assert np.array_equal(field[order], mixed[name]), name
    other = module.render(patients, images + 1, labels, size=64)["image_u8"]
    assert not (whole["image_u8"] == other).all(axis=tuple(range(1, other.ndim))).any()


def test_render_returns_the_documented_arrays():
    out = chest.render([1, 2], [3, 4], ["normal", "device"], size=96)
    assert out["image_u8"].shape == (2, 96, 96) and out["image_u8"].dtype == np.uint8
    assert out["lung_mask"].dtype == out["finding_mask"].dtype == bool
    patches = tissue.render([1, 2], [3, 4], ["fl", "mcl"], size=48)
    assert patches["image_u8"].shape == (2, 48, 48, 3) and patches["nucleus_mask"].shape == (2, 48, 48)
    wide = tissue.render([1, 2], [3, 4], ["fl", "mcl"], size=96, field=192.0)  # three times the width, the same nuclei
    edges, edges_wide = (np.diff(out["nucleus_mask"], axis=2).mean() for out in (tissue.render([1, 2], [3, 4], ["fl", "mcl"], size=96), wide))
    assert wide["image_u8"].shape == (2, 96, 96, 3) and edges_wide > 2 * edges
    assert chest.render([], [], [])["image_u8"].shape == (0, 64, 64)


def test_it_is_a_chest(paired):
    image, lung = paired["normal"]["image_u8"].astype(float), paired["normal"]["lung_mask"]
    assert (0.15 < lung.mean((1, 2))).all() and (lung.mean((1, 2)) < 0.50).all()
    assert (lung[:, :, :32].any((1, 2)) & lung[:, :, 32:].any((1, 2))).all()
    for picture, mask in zip(image, lung, strict=True):
        spine = picture[28:40, 29:35].mean()
        assert picture[mask].mean() < spine - 30  # air is dark, the mediastinum bright


@pytest.mark.parametrize("label", STUDY)
def test_a_finding_shows_inside_the_lungs_only(paired, label):
    plain, shown = paired["normal"], paired[label]
    assert not plain["finding_mask"].any() and shown["finding_mask"].any((1, 2)).all()
    assert not (shown["finding_mask"] & ~shown["lung_mask"]).any()
    assert np.array_equal(plain["lung_mask"], shown["lung_mask"])
    change = shown["image_u8"].astype(float) - plain["image_u8"]
    inside, rest = shown["finding_mask"], shown["lung_mask"] & ~shown["finding_mask"]
    assert change[inside].mean() > change[rest].mean() + 10
    assert (
        np.abs(change[~shown["lung_mask"]]).mean() < 0.1
    )  # grey levels of 255: the background does not know


@pytest.mark.parametrize("label", STUDY)
def test_brightness_does_not_carry_the_label(paired, label):
    plain, shown = (paired[name]["image_u8"].astype(float) for name in ("normal", label))
    shift = (shown.mean((1, 2)) - plain.mean((1, 2))).mean()
    contrast = (shown.std((1, 2)) - plain.std((1, 2))).mean()
    assert abs(shift) < 0.04 * plain.mean((1, 2)).std()
    assert abs(contrast) < 0.25 * plain.std((1, 2)).std()


def test_difficulty_is_a_dial():
    seeds, labels = np.arange(8), ["bacterial"] * 8
    plain = chest.render(seeds, seeds, ["normal"] * 8)["image_u8"].astype(float)
    change = [
        np.abs(chest.render(seeds, seeds, labels, difficulty=d)["image_u8"] - plain).mean()
        for d in (0, 0.5, 1)
    ]
    assert change[0] > change[1] > change[2] > 0


def test_generic_findings_are_no_pneumonia():
    seeds = np.arange(6)
    plain = chest.render(seeds, seeds, ["healthy"] * 6)
    assert np.array_equal(plain["image_u8"], chest.render(seeds, seeds, ["normal"] * 6)["image_u8"])
    for label in chest.GENERIC[1:]:
        assert (chest.render(seeds, seeds, [label] * 6)["image_u8"] != plain["image_u8"]).any((1, 2)).all(), (
            label
        )
    assert not set(chest.GENERIC) & set(chest.CLASSES)


def test_captions_say_what_the_image_shows():
    rows = cohort.draw_generic(160, seed=1)
    text = " ".join(rows["caption"])
    assert not any(word in text for word in ("pneumonia", "x-ray", "radiograph", "normal", *STUDY))
    images = chest.render(rows["patient_seed"], rows["image_seed"], rows["rendered_label"], size=32)[
        "image_u8"
    ]
    mean = images.mean((1, 2))
    dark, light = (
        rows["caption"].str.contains(word).to_numpy() for word in ("dark exposure", "light exposure")
    )
    assert mean[dark].mean() < mean[light].mean() - 5
    corner = {
        side: images[:, :10, columns].max((1, 2))
        for side, columns in (("R", slice(0, 8)), ("L", slice(-8, None)))
    }
    for side in "RL":
        here = rows["caption"].str.contains(f"marker {side}").to_numpy()
        assert np.median(corner[side][here]) > np.median(corner[side][~here]) + 20


def test_cohort_gives_one_label_per_patient_and_unique_images():
    rows = cohort.draw_cohort(200, class_probs=(0.2, 0.5, 0.3), seed=4)
    assert rows["image_id"].is_unique and rows["image_seed"].is_unique
    assert (rows.groupby("patient_id")[["label", "patient_seed"]].nunique() == 1).all(axis=None)
    assert set(rows.groupby("patient_id").size()) == {1, 2, 3, 4}
    assert rows["label"].equals(rows["rendered_label"])
    assert abs((rows.drop_duplicates("patient_id")["label"] == "bacterial").mean() - 0.5) < 0.12
    assert rows.equals(cohort.draw_cohort(200, class_probs=(0.2, 0.5, 0.3), seed=4))


def test_null_cohort_records_a_label_that_the_image_does_not_show():
    rows = cohort.draw_cohort(1500, seed=2, null=True).drop_duplicates("patient_id")
    assert abs((rows["label"] == rows["rendered_label"]).mean() - 1 / 3) < 0.04


def test_mean_colour_of_tissue_does_not_carry_the_class():
    seeds = np.arange(24)
    means = {
        label: tissue.render(seeds, seeds, [label] * 24)["image_u8"].mean((1, 2)) for label in tissue.CLASSES
    }
    for label in ("fl", "mcl"):
        shift = (means[label] - means["cll"]).mean(0)
        assert (np.abs(shift) < 0.3 * means["cll"].std(0)).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: chest.render([1], [1], ["flu"]), "no such label"),
        (lambda: chest.render([1, 2], [1], ["normal"]), "equally long"),
        (lambda: tissue.render([1], [1], ["normal"]), "no such tissue label"),
        (lambda: cohort.draw_cohort(0), "n_patients"),
        (lambda: cohort.draw_cohort(3, class_probs=(0.5, 0.5)), "one probability per class"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
