"""Lung masks: pairs by name, measures with the aggregation in their names, baselines that learn nothing, rankings."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage, stats
from skimage import filters, measure, morphology
from skimage.segmentation import clear_border, expand_labels

# ---------------------------------------------------------------- pairs


def find_mask_problems(frame: pd.DataFrame, base: Path | str) -> pd.DataFrame:
    """Return one row per image or mask that has no usable partner: `image_id`, `mask_path`, `problem`.

    `frame` has `image_id, path, mask_path` (relative to `base` or absolute), `width` and `height`. Named are: an image
    without a mask, a mask that is lost, unreadable, empty, full, of another shape than its image or shared by two
    images, a mask file that no image of `frame` has, and a pair whose file names differ.
    """
    base, problems = Path(base), []
    with_mask = frame[frame["mask_path"].fillna("") != ""]
    shared = with_mask["mask_path"].duplicated(keep=False)
    for row, is_shared in zip(with_mask.itertuples(), shared, strict=True):
        problem = "one mask for several images" if is_shared else _judge_pair(row, base / row.mask_path)
        problems.append((row.image_id, str(row.mask_path), problem))
    missing = frame[frame["mask_path"].fillna("") == ""]
    problems += [(image_id, "", "no mask of this name") for image_id in missing["image_id"]]
    known = {base / path for path in with_mask["mask_path"]}
    stray = {mask for folder in {path.parent for path in known} if folder.is_dir() for mask in folder.iterdir()} - known
    problems += [("", str(mask), "a mask without an image") for mask in sorted(stray) if mask.is_file()]
    found = pd.DataFrame(problems, columns=["image_id", "mask_path", "problem"])
    return found[found["problem"] != ""].reset_index(drop=True)


def _judge_pair(row, file: Path) -> str:
    try:
        with Image.open(file) as mask:
            low, high = mask.convert("L").getextrema()
            width, height = mask.size
    except FileNotFoundError:
        return "the mask file is lost"
    except OSError:
        return "not an image that Pillow can read"
    if Path(row.path).stem != file.stem:
        return f"belongs to another image ({Path(row.path).name})"
    # A mask may be stored larger or smaller than its image, but not in another shape: one pixel of rounding is allowed.
    if abs(width * row.height - height * row.width) > max(row.width, row.height, width, height):
        return f"{width}x{height} px does not fit the image's {row.width}x{row.height}"
    return "empty" if high < 128 else "full" if low >= 128 else ""


# ---------------------------------------------------------------- baselines


def predict_mean_mask(train_masks: np.ndarray, n: int) -> np.ndarray:
    """Return the training masks' mean as the probability of every pixel, n times: the baseline that sees no image."""
    return np.repeat(train_masks.mean(0, dtype=np.float32)[None], n, 0)


def predict_threshold(images_u8: np.ndarray, block: float = 0.5, smooth: float = 0.0, grow: float = 0.03) -> np.ndarray:
    """Return masks (N, H, W) in {0, 1} by a local threshold and morphology: the baseline that learns three constants.

    Lungs are darker than their surroundings: below the Gaussian mean of a neighbourhood (`block`). Of the dark regions
    that do not touch the border the largest on either side of the image counts, filled to its convex hull and grown by
    `grow` to the edge that the threshold leaves. All lengths are shares of the image's height, `smooth` is the sigma of
    a Gaussian that wipes out the ribs.
    """
    return np.stack([_threshold(image, block, smooth, grow) for image in images_u8]).astype(np.float32)


def fit_threshold(images_u8: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Return the constants of `predict_threshold` with the best mean Dice on these training images (a grid of 18)."""
    def score(constants: dict[str, float]) -> float:
        return compute_dice_per_image(predict_threshold(images_u8, **constants) > 0.5, masks).mean()

    grid = itertools.product((0.3, 0.4, 0.5), (0.0, 1 / 64), (0.0, 1 / 64, 2 / 64))
    return max((dict(zip(("block", "smooth", "grow"), values, strict=True)) for values in grid), key=score)


def _threshold(image_u8: np.ndarray, block: float, smooth: float, grow: float) -> np.ndarray:
    height, width = image_u8.shape
    image = ndimage.gaussian_filter(image_u8.astype(np.float32), smooth * height)
    window = 2 * round(block * height / 2) + 1  # the library wants an odd number
    dark = image < filters.threshold_local(image, window, method="gaussian", mode="nearest")
    regions = measure.regionprops(measure.label(clear_border(dark), connectivity=1))
    mask = np.zeros(image_u8.shape, bool)
    for side in (0, 1):
        on_side = [region for region in regions if (region.centroid[1] >= width / 2) == side]
        if on_side:
            largest = max(on_side, key=lambda region: region.area)
            mask[largest.slice] |= largest.image_convex
    return ndimage.binary_dilation(mask, morphology.disk(round(grow * height)))


# ---------------------------------------------------------------- measures


def compute_dice_per_image(pred_masks: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return hard Dice (N,) of bool masks (N, H, W); two empty masks agree and score 1, one empty mask scores 0."""
    overlap, total = (pred_masks & masks).sum((1, 2)), pred_masks.sum((1, 2)) + masks.sum((1, 2))
    return np.where(total == 0, 1.0, 2 * overlap / np.maximum(total, 1))


def compute_iou_per_image(pred_masks: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return intersection over union (N,) of bool masks (N, H, W); empty masks as for Dice. IoU = Dice / (2 - Dice)."""
    dice = compute_dice_per_image(pred_masks, masks)
    return dice / (2 - dice)


def compute_surface_per_image(pred_masks: np.ndarray, masks: np.ndarray,
                              tolerance: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return HD95 (N,) in pixels and surface Dice (N,) at `tolerance` pixels, of bool masks (N, H, W).

    HD95 is the larger of the two directed 95th percentiles of the distances between the outlines, surface Dice the
    share of both outlines that lies within the tolerance of the other (Maier-Hein et al. 2024; Nikolov et al. 2021).
    The figures are MONAI's; distances come from SciPy because MONAI takes longer to import than this takes to run. Two
    empty masks score 0 and 1; with one empty mask HD95 is the image's diagonal, the largest there can be, and surface
    Dice 0. A mask that fills the image has the image's border for its outline.
    """
    scores = [_compare_outlines(a, b, tolerance) for a, b in zip(pred_masks, masks, strict=True)]
    return np.array([s[0] for s in scores]), np.array([s[1] for s in scores])


def _compare_outlines(pred_mask: np.ndarray, mask: np.ndarray, tolerance: float) -> tuple[float, float]:
    if not pred_mask.any() and not mask.any():
        return 0.0, 1.0
    if not pred_mask.any() or not mask.any():
        return float(np.hypot(*mask.shape)), 0.0
    cut = ndimage.find_objects((pred_mask | mask).astype(np.uint8))[0]  # what lies outside has no outline
    edges = [m[cut] & ~ndimage.binary_erosion(m[cut], border_value=0) for m in (pred_mask, mask)]
    to_mask, to_pred = (ndimage.distance_transform_edt(~edge) for edge in reversed(edges))
    distances = to_mask[edges[0]], to_pred[edges[1]]
    within = sum((d <= tolerance).sum() for d in distances) / sum(map(len, distances))
    return float(max(np.quantile(d, 0.95) for d in distances)), float(within)


def compute_dice_per_lung(pred_masks: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return Dice (N, 2) of the lung on the image's left side (the patient's right) and of the other, from bool masks
    (N, H, W).

    The lungs are the two largest connected components of the true mask; a predicted pixel belongs to the nearer of them.
    NaN where the true mask does not show two: a single component, or one under a tenth of the other.
    """
    return np.array([_split_dice(a, b) for a, b in zip(pred_masks, masks, strict=True)]).reshape(-1, 2)


def _split_dice(pred_mask: np.ndarray, mask: np.ndarray) -> list[float]:
    regions = sorted(measure.regionprops(measure.label(mask, connectivity=1)), key=lambda region: -region.area)[:2]
    if len(regions) < 2 or regions[1].area < 0.1 * regions[0].area:
        return [np.nan, np.nan]
    lungs = np.zeros(mask.shape, np.uint8)
    for side, region in enumerate(sorted(regions, key=lambda region: region.centroid[1])):
        lungs[tuple(region.coords.T)] = side + 1
    nearer = expand_labels(lungs, distance=sum(mask.shape))
    return [float(compute_dice_per_image((pred_mask & (nearer == side))[None], (lungs == side)[None])[0])
            for side in (1, 2)]


def segmentation_metrics(pred_masks: np.ndarray, masks: np.ndarray, tolerance: float = 1.0) -> dict[str, float]:
    """Return `dice_per_image`, `dice_pooled`, `iou`, `hd95`, `surface_dice`, `dice_image_left`, `dice_image_right`, `n`.

    Bool masks (N, H, W). All are means over images save `dice_pooled`, which counts the pixels of all images as one
    picture: it weighs an image by the size of its masks, so small and badly segmented lungs hardly count. (The fourth
    report's figures were soft and pooled over batches.)
    """
    total = pred_masks.sum() + masks.sum()
    hd95, surface_dice = compute_surface_per_image(pred_masks, masks, tolerance)
    per_lung = compute_dice_per_lung(pred_masks, masks)
    two = ~np.isnan(per_lung[:, 0])
    left, right = per_lung[two].mean(0) if two.any() else (np.nan, np.nan)
    return {
        "dice_per_image": float(compute_dice_per_image(pred_masks, masks).mean()),
        "dice_pooled": float(2 * (pred_masks & masks).sum() / total) if total else 1.0,
        "iou": float(compute_iou_per_image(pred_masks, masks).mean()),
        "hd95": float(hd95.mean()),
        "surface_dice": float(surface_dice.mean()),
        "dice_image_left": float(left),
        "dice_image_right": float(right),
        "n": len(masks),
    }


# ---------------------------------------------------------------- intervals and rankings


def bootstrap_mean(values: np.ndarray, clusters: Sequence[str], n_boot: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of `values` (N,) when whole clusters (patients) are drawn with replacement."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (n_boot, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return tuple(np.quantile(means, [0.025, 0.975]))


def compare_networks(dice: Mapping[str, np.ndarray], clusters: Sequence[str], n_boot: int = 2000,
                     seed: int = 0) -> pd.DataFrame:
    """Return each pair of networks, the better one first: `better, worse, delta, ci_low, ci_high, p, seed_spread`.

    `dice` maps a network to its Dice (seeds, N) on the same N images. `p` is Wilcoxon's signed-rank test of the
    patients' mean differences (mean over seeds); correct it over the family (Holm). `seed_spread` is the largest
    difference of means that a change of seed makes to one of the two: a lead below it may be luck.
    """
    names = sorted(dice, key=lambda name: -dice[name].mean())
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    rows = []
    for better, worse in itertools.combinations(names, 2):
        delta = dice[better].mean(0) - dice[worse].mean(0)  # (seeds, N) -> (N,)
        by_patient = np.bincount(index, delta) / np.bincount(index)
        p = stats.wilcoxon(by_patient).pvalue if by_patient.any() else 1.0
        low, high = bootstrap_mean(delta, clusters, n_boot, seed)
        spread = max(np.ptp(dice[name].mean(1)) for name in (better, worse))
        rows.append({"better": better, "worse": worse, "delta": float(delta.mean()), "ci_low": low, "ci_high": high,
                     "p": float(p), "seed_spread": float(spread)})
    return pd.DataFrame(rows, columns=["better", "worse", "delta", "ci_low", "ci_high", "p", "seed_spread"])
