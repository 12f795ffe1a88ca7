"""Masks: pairs by name, measures against hand-made and MONAI's answers, baselines, intervals and rankings."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.metrics import f1_score, jaccard_score

from medaug import masks


def draw_two_lungs(shift: int = 0, size: int = 64) -> np.ndarray:
    """A mask with two upright ellipses, moved by `shift` pixels."""
    y, x = np.mgrid[:size, :size] / size
    lungs = [((x - centre) / 0.13) ** 2 + ((y - 0.5) / 0.3) ** 2 < 1 for centre in (0.28, 0.72)]
    return np.roll(lungs[0] | lungs[1], shift, axis=0)


# -- pairs


@pytest.fixture
def folder(tmp_path):
    """Three images whose masks carry their names, and a manifest of them."""
    rows = []
    for name in ("b", "a", "c"):
        for part, pixels in (("images", np.full((64, 64), 90)), ("masks", draw_two_lungs() * 255)):
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / part / f"{name}.png")
        rows.append({"image_id": name, "path": f"images/{name}.png", "mask_path": f"masks/{name}.png", "width": 64,
                     "height": 64})
    return tmp_path, pd.DataFrame(rows)


def test_good_pairs_have_no_problem(folder):
    base, frame = folder
    Image.fromarray((draw_two_lungs(size=96) * 255).astype(np.uint8)).save(base / "masks" / "a.png")
    assert masks.find_mask_problems(frame, base).empty, "a mask may be larger than its image, in the same shape"


def test_pairs_made_by_sort_order_are_found(folder):
    base, frame = folder
    swapped = frame.assign(mask_path=sorted(frame["mask_path"]))
    found = masks.find_mask_problems(swapped, base)
    assert found["image_id"].tolist() == ["b", "a"]
    assert found["problem"].tolist() == ["belongs to another image (b.png)", "belongs to another image (a.png)"]


@pytest.mark.parametrize("pixels, says", [
    (np.zeros((64, 64)), "empty"), (np.full((64, 64), 255), "full"),
    (np.tile(draw_two_lungs() * 255, (2, 1)), "64x128 px does not fit the image's 64x64")])
def test_a_mask_that_cannot_be_used_is_named(folder, pixels, says):
    base, frame = folder
    Image.fromarray(pixels.astype(np.uint8)).save(base / "masks" / "a.png")
    assert masks.find_mask_problems(frame, base).to_dict("records") == [
        {"image_id": "a", "mask_path": "masks/a.png", "problem": says}]


def test_missing_lost_damaged_shared_and_extra_masks_are_named(folder):
    base, frame = folder
    (base / "masks" / "a.png").unlink()
    (base / "masks" / "c.png").write_bytes(b"no image")
    (base / "masks" / "z.png").write_bytes((base / "masks" / "b.png").read_bytes())
    more = pd.DataFrame([{"image_id": "d", "path": "images/d.png", "mask_path": "", "width": 64, "height": 64}])
    found = masks.find_mask_problems(pd.concat([frame, more], ignore_index=True), base).set_index("image_id")["problem"]
    assert found.to_dict() == {"a": "the mask file is lost", "c": "not an image that Pillow can read",
                               "d": "no mask of this name", "": "a mask without an image"}
    frame.loc[frame["image_id"] == "a", "mask_path"] = "masks/b.png"
    shared = masks.find_mask_problems(frame, base)
    assert shared.loc[shared["problem"] == "one mask for several images", "image_id"].tolist() == ["b", "a"]


# -- measures


def test_dice_per_image_is_f1_and_pooling_differs():
    rng = np.random.default_rng(0)
    truth, pred_masks = rng.random((5, 9, 9)) < 0.4, rng.random((5, 9, 9)) < 0.4
    truth[0] = False
    truth[0, 0, 0] = True
    pairs = list(zip(truth.reshape(5, -1), pred_masks.reshape(5, -1), strict=True))
    assert masks.compute_dice_per_image(pred_masks, truth) == pytest.approx([f1_score(m, p) for m, p in pairs])
    assert masks.compute_iou_per_image(pred_masks, truth) == pytest.approx([jaccard_score(m, p) for m, p in pairs])
    metrics = masks.segmentation_metrics(pred_masks, truth)
    assert metrics["dice_pooled"] == pytest.approx(f1_score(truth.ravel(), pred_masks.ravel()))
    assert metrics["dice_pooled"] > metrics["dice_per_image"]  # the tiny mask counts for one image, for no pixels


def test_surfaces_agree_with_monai():
    """The expected figures are MONAI 1.6.1's: compute_hausdorff_distance(percentile=95) and compute_surface_dice."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        field = ndimage.gaussian_filter(rng.standard_normal((n, 48, 40)), (0, 4, 4))
        return field > np.quantile(field, 0.6, axis=(1, 2), keepdims=True)

    a, b = draw(8), draw(8)
    b[4:] = np.roll(a[4:], (1, 2), axis=(1, 2))
    hd95, surface_dice = masks.compute_surface_per_image(a, b, tolerance=1.0)
    assert hd95 == pytest.approx([8.0623, 9.59, 13, 13.2105, 6.0403, 6.3629, 5, 8.7017], abs=1e-4)
    assert surface_dice == pytest.approx([0.2487, 0.2494, 0.2087, 0.3356, 0.6891, 0.6869, 0.5803, 0.5193], abs=1e-4)


def test_hd95_of_a_shifted_square():
    mask, shifted = np.zeros((1, 32, 32), bool), np.zeros((1, 32, 32), bool)
    mask[0, 8:16, 8:16], shifted[0, 8:16, 11:19] = True, True
    hd95, surface_dice = masks.compute_surface_per_image(shifted, mask, tolerance=3.0)
    assert hd95[0] == pytest.approx(3.0) and surface_dice[0] == 1


@pytest.mark.parametrize("pred, truth, dice, iou, hd95, surface_dice", [
    ("empty", "empty", 1, 1, 0, 1), ("empty", "full", 0, 0, np.hypot(8, 8), 0), ("full", "empty", 0, 0, np.hypot(8, 8), 0),
    ("full", "full", 1, 1, 0, 1), ("empty", "square", 0, 0, np.hypot(8, 8), 0), ("full", "square", 0.4, 0.25, np.sqrt(8), 0)])
def test_empty_and_full_masks_are_defined(pred, truth, dice, iou, hd95, surface_dice):
    known = {"empty": np.zeros((1, 8, 8), bool), "full": np.ones((1, 8, 8), bool)}
    known["square"] = np.pad(np.ones((1, 4, 4), bool), ((0, 0), (2, 2), (2, 2)))
    a, b = known[pred], known[truth]
    assert masks.compute_dice_per_image(a, b)[0] == pytest.approx(dice)
    assert masks.compute_iou_per_image(a, b)[0] == pytest.approx(iou)
    assert [s[0] for s in masks.compute_surface_per_image(a, b)] == pytest.approx([hd95, surface_dice])
    assert np.isfinite(masks.segmentation_metrics(a, b)["dice_per_image"])


def test_each_lung_is_scored_by_itself():
    truth = draw_two_lungs()
    only_left = truth & (np.arange(64) < 32)
    assert masks.compute_dice_per_lung(only_left[None], truth[None])[0].tolist() == [1, 0]
    whole = masks.segmentation_metrics(only_left[None], truth[None])
    assert (whole["dice_image_left"], whole["dice_image_right"]) == (1, 0) and 0.6 < whole["dice_per_image"] < 0.7


def test_one_component_is_not_two_lungs():
    joined = draw_two_lungs()
    joined[30:34, 20:44] = True
    assert np.isnan(masks.compute_dice_per_lung(joined[None], joined[None])).all()
    assert np.isnan(masks.segmentation_metrics(joined[None], joined[None])["dice_image_left"])


# -- baselines


def draw_films(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Bright bodies on dark air with two dark lungs, a dark border and noise."""
    rng = np.random.default_rng(1)
    truth = np.stack([draw_two_lungs(int(shift)) for shift in rng.integers(-4, 5, n)])
    body = np.zeros((64, 64), bool)
    body[3:, 5:59] = True
    films = np.where(truth, 70, np.where(body, 190, 15)) + rng.normal(0, 8, truth.shape)
    return ndimage.gaussian_filter(films, (0, 1, 1)).clip(0, 255).astype(np.uint8), truth


def test_the_threshold_finds_the_two_dark_regions_inside_the_body():
    films, truth = draw_films(12)
    constants = masks.fit_threshold(films[:6], truth[:6])
    dice = masks.compute_dice_per_image(masks.predict_threshold(films[6:], **constants) > 0.5, truth[6:])
    assert dice.min() > 0.9


def test_a_blank_image_has_no_lungs():
    blank = np.full((2, 64, 64), 100, np.uint8)
    assert masks.predict_threshold(blank).sum() == 0


def test_the_mean_mask_sees_no_image():
    _, truth = draw_films(4)
    probs = masks.predict_mean_mask(truth, 3)
    assert probs.shape == (3, 64, 64) and np.array_equal(probs[0], truth.mean(0, dtype=np.float32))


# -- intervals and rankings


def test_the_interval_widens_when_images_share_patients():
    values = np.repeat(np.random.default_rng(0).random(40), 5)
    apart = masks.bootstrap_mean(values, np.arange(200))
    shared = masks.bootstrap_mean(values, np.repeat(np.arange(40), 5))
    assert shared[1] - shared[0] > 1.5 * (apart[1] - apart[0])


def test_pairs_of_networks_are_compared_on_the_same_patients():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.9, 0.98, 80)
    dice = {"worst": np.stack([base - 0.03, base - 0.031]), "second": np.stack([base, base + 0.001]),
            "first": np.stack([base + 0.0002, base + 0.0011])}
    dice = {name: values + rng.normal(0, 0.003, values.shape) for name, values in dice.items()}
    pairs = masks.compare_networks(dice, np.arange(80) // 2).set_index(["better", "worse"])
    assert len(pairs) == 3 and (pairs["delta"] >= 0).all()
    last = pairs.loc[("first", "worst")]
    assert last["p"] < 1e-4 and last["ci_low"] > 0.025 and last["delta"] > last["seed_spread"]
    lead = pairs.loc[("first", "second")] if ("first", "second") in pairs.index else pairs.loc[("second", "first")]
    assert lead["delta"] < lead["seed_spread"], "a fourth digit is less than what a seed does"


def test_a_network_is_not_better_than_itself():
    dice = np.random.default_rng(0).random((2, 10))
    pair = masks.compare_networks({"a": dice, "b": dice.copy()}, np.arange(10)).iloc[0]
    assert pair["p"] == 1 and pair["delta"] == 0
