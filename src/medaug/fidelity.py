"""Judge synthetic images: are they real, varied and new?

Every measure compares two sets of feature vectors. A measure means little alone: put beside it what it says of real against
real (the floor), of copies and of noise, and how many images it saw. Intervals come from subsampling without replacement:
resampling with replacement puts copies into a set, which all of these measures read as a fault.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import interpolate, normalize
from torchvision.models import mobilenet_v2
from transformers import AutoImageProcessor, AutoModel, CLIPModel

from medaug import paths
from medaug.runtime import progress


@dataclass(frozen=True)
class Encoder:
    """An image encoder and the preprocessing that belongs to its weights (mean and std are those of image_01)."""

    name: str
    model: nn.Module
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_encoder(name: str, model_id: str = "", device: str = "cpu") -> Encoder:
    """Return the encoder `name`: "mobilenetv2", or a transformers vision model (CLIP and others) found at `model_id`.

    `model_id` is a hub id or local folder, by default the name itself. "mobilenetv2" reads `weights/mobilenet_v2_imagenet.safetensors` from the data folder (MEDAUG_DATA). Raises
    FileNotFoundError that says where it should be. safetensors only, no remote code.
    """
    if name == "mobilenetv2":
        path = Path(os.environ.get("MEDAUG_DATA", ".")) / "weights" / "mobilenet_v2_imagenet.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"encoder mobilenetv2: no {path}; set MEDAUG_DATA to the folder that holds weights/")
        model = mobilenet_v2()
        model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
        return Encoder(name, model.eval().to(device), 224, (0.5,) * 3, (0.5,) * 3)
    model_id = paths.resolve_model(model_id or name)
    processor = AutoImageProcessor.from_pretrained(model_id, trust_remote_code=False)
    model = AutoModel.from_pretrained(model_id, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    size = processor.size.get("shortest_edge") or processor.size["height"]
    return Encoder(name, model.eval().to(device), size, tuple(processor.image_mean), tuple(processor.image_std))


@torch.inference_mode()
def embed_images(encoder: Encoder, images_u8: np.ndarray, batch_size: int = 128) -> np.ndarray:
    """Return one feature vector per image, (N, D) float64, of grey (N, H, W) or RGB (N, H, W, 3) uint8 images.

    CLIP gives its projected embedding, which is trained by its direction alone and so is brought to length sqrt(D);
    MobileNetV2 its 1,280 pooled features; other models their pooled output.
    """
    device = next(encoder.model.parameters()).device
    mean = torch.tensor(encoder.mean, device=device)[:, None, None]
    std = torch.tensor(encoder.std, device=device)[:, None, None]
    parts = []
    for start in progress(range(0, len(images_u8), batch_size), desc=f"embed ({encoder.name})", unit="batch"):
        image_01 = torch.from_numpy(np.array(images_u8[start:start + batch_size])).to(device).float() / 255
        image_01 = image_01[:, None].expand(-1, 3, -1, -1) if image_01.ndim == 3 else image_01.permute(0, 3, 1, 2)
        if image_01.shape[-2:] != (encoder.image_size,) * 2:
            image_01 = interpolate(image_01, (encoder.image_size,) * 2, mode="bicubic", antialias=True).clamp(0, 1)
        parts.append(_forward(encoder.model, (image_01 - mean) / std).double().cpu())
    return torch.cat(parts).numpy()


def _forward(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    if isinstance(model, CLIPModel):
        embedding = model.get_image_features(pixel_values=pixel_values).pooler_output  # (B, D)
        return normalize(embedding) * embedding.shape[1] ** 0.5
    if hasattr(model, "features"):  # torchvision: the mean over the last feature map, (B, 1280, h, w) -> (B, 1280)
        return model.features(pixel_values).mean(dim=(2, 3))
    return model(pixel_values=pixel_values).pooler_output


def embed_pixels(images_u8: np.ndarray, side: int = 32) -> np.ndarray:
    """Return each image as `side` x `side` grey pixels with mean 0 and length 1, (N, D): no copy hides behind contrast."""
    image_01 = torch.from_numpy(np.array(images_u8)).float() / 255
    image_01 = image_01.mean(-1) if image_01.ndim == 4 else image_01  # RGB -> grey
    small = interpolate(image_01[:, None], (side, side), mode="area").flatten(1).double()
    return normalize(small - small.mean(1, keepdim=True)).numpy()


def compute_fid(real: np.ndarray, synthetic: np.ndarray) -> float:
    """Return the Frechet distance of two Gaussians fitted to (N, D) and (M, D) features (Heusel et al. 2017, eq. 6).

    Sample covariances, unshrunk. It is biased upwards by about 1/N: compare only at equal counts, and distrust it below
    N = D + 1, where the covariance has no inverse.
    """
    mean_gap = real.mean(0) - synthetic.mean(0)
    cov_real, cov_synthetic = np.cov(real, rowvar=False), np.cov(synthetic, rowvar=False)
    root = _matrix_root(cov_real)
    # The trace of sqrt(A B) equals that of sqrt(A^1/2 B A^1/2), which is symmetric: no complex round-off.
    trace = np.sqrt(np.linalg.eigvalsh(root @ cov_synthetic @ root).clip(min=0)).sum()
    return float(mean_gap @ mean_gap + np.trace(cov_real) + np.trace(cov_synthetic) - 2 * trace)


def compute_kid(real: np.ndarray, synthetic: np.ndarray, subset_size: int | None = None, subsets: int = 100,
                seed: int = 0) -> float:
    """Return the unbiased squared MMD with the kernel (x.y/D + 1)^3 (Binkowski et al. 2018, section 4).

    Over all images at once, or as the mean over `subsets` random subsets of `subset_size` images of each set. Being
    unbiased it may fall below zero where both sets are alike.
    """
    rng = np.random.default_rng(seed)
    if subset_size is None:
        return _kid(real, synthetic)
    if subset_size > min(len(real), len(synthetic)):
        raise ValueError(f"KID: subset_size {subset_size} exceeds the smaller set ({min(len(real), len(synthetic))})")
    draws = [[rng.choice(len(x), subset_size, replace=False) for x in (real, synthetic)] for _ in range(subsets)]
    return float(np.mean([_kid(real[i], synthetic[j]) for i, j in draws]))


def compute_cmmd(real: np.ndarray, synthetic: np.ndarray, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Return the squared MMD with a Gaussian kernel on CLIP embeddings of unit length (Jayasumana et al. 2024).

    With the paper's `sigma` and `scale`, and like its published code the biased estimator, which is above zero by about
    1/N even for equal distributions: read it beside the floor.
    """
    x, y = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (real, synthetic))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-_squared_distances(a, b) / (2 * sigma**2))

    return float(scale * (kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()))


def compute_prdc(real: np.ndarray, synthetic: np.ndarray, nearest_k: int = 5) -> dict[str, float]:
    """Return `precision`, `recall` (Kynkaanniemi et al. 2019), `density` and `coverage` (Naeem et al. 2020).

    Around each image lies a ball as wide as the distance to its k-th neighbour in its own set. precision: share of
    synthetic images inside some real ball; recall: share of real images inside some synthetic ball; density: how many real
    balls hold a synthetic image, over k; coverage: share of real balls that hold one.
    """
    radius_real = _neighbour_radius(real, nearest_k)
    radius_synthetic = _neighbour_radius(synthetic, nearest_k)
    distances = np.sqrt(_squared_distances(real, synthetic))  # (N, M)
    inside_real = distances < radius_real[:, None]
    return {
        "precision": float(inside_real.any(0).mean()),
        "recall": float((distances < radius_synthetic[None]).any(1).mean()),
        "density": float(inside_real.sum(0).mean() / nearest_k),
        "coverage": float((distances.min(1) < radius_real).mean()),
    }


def find_nearest(queries: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each query (N, D) the distance to its nearest training image and that image's row in `train`."""
    squared = _squared_distances(queries, train)
    nearest = squared.argmin(1)
    return np.sqrt(squared[np.arange(len(queries)), nearest]), nearest


def find_copies(queries: np.ndarray, train: np.ndarray, neighbours: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Return for each query (N, D) its distance to the nearest training image over that to the `neighbours` after it.

    Near 0: a copy; near 1: one image among many. And that image's row in `train`. The plain distance misleads, since a
    blurred image lies close to everything (Carlini et al. 2023, section 4.2, for the ratio).
    """
    squared = _squared_distances(queries, train)
    count = min(neighbours + 1, len(train))
    nearest = np.argpartition(squared, count - 1, axis=1)[:, :count]
    distances = np.sort(np.sqrt(np.take_along_axis(squared, nearest, 1)), axis=1)
    return distances[:, 0] / distances[:, 1:].mean(1), squared.argmin(1)


def compute_memorisation(synthetic: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Return `nn_ratio` and `memorised_share` of features (N, D), measured against real images held out of training.

    nn_ratio: median distance to the nearest training image, synthetic over held-out; below 1 the synthetic images lie
    closer to the training set than new patients do. memorised_share: the share closer than the closest 1 % of held-out
    images; 0.01 is what new patients give.
    """
    distance, _ = find_nearest(synthetic, train)
    usual, _ = find_nearest(held_out, train)
    return {"nn_ratio": float(np.median(distance) / np.median(usual)),
            "memorised_share": float((distance < np.quantile(usual, 0.01)).mean())}


def mark_images(labels: np.ndarray, confidence: np.ndarray, features: np.ndarray, pixels: np.ndarray,
                train_labels: np.ndarray, train_features: np.ndarray, train_pixels: np.ndarray) -> pd.DataFrame:
    """Return the marks by which images are selected, a row per image: `label, confidence, ratio, distance`.

    `confidence` (N,) is the probability that a judge gives to `labels` (N,); ratio: how near to a copy of a training image
    in `pixels` (see `find_copies`); distance: to the nearest training image of the same class, in `features`.
    """
    distance = np.empty(len(labels))
    for label in np.unique(labels):
        own = labels == label
        distance[own], _ = find_nearest(features[own], train_features[train_labels == label])
    ratio, _ = find_copies(pixels, train_pixels)
    return pd.DataFrame({"label": labels, "confidence": confidence, "ratio": ratio, "distance": distance})


def choose_limits(marks: pd.DataFrame, share: float = 0.1, copies: float = 0.01) -> pd.DataFrame:
    """Return the limits that `share` (per class), and of ratios `copies` (over all), of real validation images fail.

    `marks` of real images held out of training, never of test images. One row per class: `confidence` and `ratio` are the
    least, `distance` the most, that an image may have.
    """
    classes = marks.groupby("label")
    return pd.DataFrame({"confidence": classes["confidence"].quantile(share), "ratio": marks["ratio"].quantile(copies),
                         "distance": classes["distance"].quantile(1 - share)})


def select_images(marks: pd.DataFrame, limits: pd.DataFrame) -> pd.DataFrame:
    """Return `marks` with what each image passes (bool): `confident`, `new`, `inside`, and `selected` where it passes all.

    Raises ValueError for a class without limits.
    """
    if missing := sorted(set(marks["label"]) - set(limits.index)):
        raise ValueError(f"no limits for class '{missing[0]}': no validation image shows it; use another seed or fewer folds")
    own = limits.loc[marks["label"]].set_index(marks.index)
    passed = {"confident": marks["confidence"] >= own["confidence"], "new": marks["ratio"] >= own["ratio"],
              "inside": marks["distance"] <= own["distance"]}
    return marks.assign(**passed, selected=np.logical_and.reduce(list(passed.values())))


def compute_mia_auc(member_losses: np.ndarray, other_losses: np.ndarray) -> float:
    """Return how well a lower denoising loss (N,), (M,) tells training images from others: 0.5 is chance, 1 is certainty.

    Loss-based membership inference (Yeom et al. 2018, section 3); both sets must share timesteps and noise.
    """
    is_member = np.r_[np.ones(len(member_losses)), np.zeros(len(other_losses))]
    return float(roc_auc_score(is_member, -np.r_[member_losses, other_losses]))


def compute_fidelity(real: np.ndarray, synthetic: np.ndarray, with_cmmd: bool = True, nearest_k: int = 5,
                     ) -> dict[str, float]:
    """Return n_real, n_synthetic, fid, kid, cmmd (NaN unless the features are CLIP's), precision ... coverage."""
    return {"n_real": len(real), "n_synthetic": len(synthetic), "fid": compute_fid(real, synthetic),
            "kid": compute_kid(real, synthetic),
            "cmmd": compute_cmmd(real, synthetic) if with_cmmd else float("nan"),
            **compute_prdc(real, synthetic, nearest_k)}


def subsample_interval(compute: Callable[[np.ndarray, np.ndarray], float], real: np.ndarray, synthetic: np.ndarray,
                       groups: np.ndarray | None = None, draws: int = 100, level: float = 0.95,
                       seed: int = 0) -> tuple[float, float]:
    """Return an interval for `compute(real, synthetic)` from random halves, drawn without replacement.

    A half's score varies around the mean of the halves' scores as the whole's varies around its expectation (delete-half
    jackknife: Shao & Wu 1989), so the interval is the score plus the central `level` of those deviations; the halves'
    greater bias cancels. `groups` (N,) keeps the real images of one patient together. Measured coverage of the 90 %
    interval: 87 to 88 % of trials where the sets differ, more where they do not (cautious).
    """
    rng = np.random.default_rng(seed)
    groups = np.arange(len(real)) if groups is None else np.asarray(groups)
    scores = np.array([compute(real[_draw_half(groups, rng)], synthetic[_draw_half(np.arange(len(synthetic)), rng)])
                       for _ in range(draws)])
    low, high = np.quantile(scores - scores.mean(), [(1 - level) / 2, (1 + level) / 2])
    score = compute(real, synthetic)
    return score + low, score + high


def split_groups(groups: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a mask (N,) that puts about half of the groups (patients) of each class on either side, each group whole."""
    rng = np.random.default_rng(seed)
    names, first = np.unique(groups, return_index=True)
    chosen = []
    for label in np.unique(labels):
        own = names[labels[first] == label]  # a patient of two classes counts with the first
        chosen.extend(rng.permutation(own)[:(len(own) + 1) // 2])
    return np.isin(groups, chosen)


def _draw_half(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    names = np.unique(groups)
    return np.flatnonzero(np.isin(groups, rng.permutation(names)[:len(names) // 2]))


def _matrix_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _kid(x: np.ndarray, y: np.ndarray) -> float:
    n, m, dim = len(x), len(y), x.shape[1]
    k_xx, k_yy, k_xy = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1)) + (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
    return float(within - 2 * k_xy.mean())


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (N, M) of rows, not below zero."""
    return ((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T).clip(min=0)


def _neighbour_radius(features: np.ndarray, nearest_k: int) -> np.ndarray:
    """Distance of each row to its k-th nearest other row."""
    return np.sqrt(np.partition(_squared_distances(features, features), nearest_k, axis=1)[:, nearest_k])
