"""Classifiers: one factory, features that are computed once, and one training loop with a fixed number of steps.

Every arm of the report is trained by `fit_classifier`, for the same number of optimiser steps, so that an arm with more
images is not also trained longer. Factories return the library's own module.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from sklearn.metrics import f1_score
from torch import Tensor, nn

from medaug.paths import resolve_model
from medaug.runtime import progress, replace_when_done

# Name in the tables: name in the library. Report 3 trained the convolutional ones, report 4 the large ones.
TORCHVISION = {
    "alexnet": "alexnet", "vgg16": "vgg16", "resnet18": "resnet18", "resnet50": "resnet50",
    "resnext101-64x4d": "resnext101_64x4d", "densenet161": "densenet161", "mobilenetv2": "mobilenet_v2",
    "efficientnet-b0": "efficientnet_b0", "efficientnetv2-l": "efficientnet_v2_l", "convnext-b": "convnext_base",
    "vit-b16": "vit_b_16", "swin-b": "swin_b",
}
TIMM = {
    "vit-tiny": "vit_tiny_patch16_224", "dinov2-b": "vit_base_patch14_dinov2.lvd142m",
    "beitv2-b": "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
}
BLOCK_SIZE = 512  # images per file of cached features: what a killed run loses at most


@dataclass(frozen=True)
class Preprocessing:
    """What a network's weights expect: square size (px), and mean and std per channel of the image scaled to 0-1."""

    size: int = 64
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class TrainingPlan:
    """How one classifier is trained: `steps` optimiser steps (AdamW), whatever the number of images."""

    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 1e-3  # the peak of the schedule
    weight_decay: float = 1e-2
    schedule: str = "one-cycle"  # or "constant"
    evaluations: int = 10  # times that the validation patients are scored; the best macro F1 is kept
    bf16: bool = False  # bfloat16 autocast
    seed: int = 0


@dataclass
class Examples:
    """What a classifier is trained or selected on: row i of every field belongs together.

    `inputs` are images (N, H, W) or (N, H, W, 3) uint8, or cached features (N, ...) float; `labels` (N,) class indices;
    `weights` (N,) factors of the loss; `augment` (N,) whether each draw of this image is transformed anew.
    """

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None
    augment: np.ndarray | None = None


# -- networks ----------------------------------------------------------------------------------------------------------


def build_classifier(name: str, num_classes: int, weights: str = "none", in_chans: int = 3,
                     image_size: int = 224) -> nn.Module:
    """Return the network `name` with a fresh last layer of `num_classes` outputs (logits).

    `weights`: "none" (from scratch), "hub" (the library's own ImageNet weights, fetched) or a safetensors file in the
    library's parameter names (cast to float32). Where the file has another number of classes its last layer is left
    out; any other difference is an error. `in_chans` and `image_size` matter to networks from scratch only.
    """
    if name in SMALL:
        model = SMALL[name](num_classes, in_chans, image_size)
    elif name in TIMM:
        sizes = {"img_size": image_size} if "vit" in TIMM[name] else {}
        model = timm.create_model(TIMM[name], pretrained=weights == "hub", num_classes=num_classes, in_chans=in_chans,
                                  **sizes)
    elif name in TORCHVISION:
        model = _build_torchvision(TORCHVISION[name], num_classes, weights == "hub", in_chans)
    else:
        known = ", ".join([*SMALL, *TORCHVISION, *TIMM])
        raise ValueError(f"no classifier '{name}': choose one of {known}")
    if weights not in ("none", "hub"):
        load_weights(model, weights)
    return model


def build_cnn2(num_classes: int, in_chans: int = 1, image_size: int = 64) -> nn.Module:
    """Return report 3's baseline: two convolutions, a 2x2 pooling and two fully connected layers."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (image_size // 2) ** 2, 64), nn.ReLU(), nn.Linear(64, num_classes),
    )


def build_cnn5(num_classes: int, in_chans: int = 1, image_size: int = 64) -> nn.Module:
    """Return report 3's second network: five convolutions, three fully connected layers, dropout.

    The report does not give the widths, and names one pooling layer: it is applied after each convolution here.
    """
    widths, layers = (in_chans, 16, 32, 64, 64, 64), []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * (image_size // 32) ** 2, 128), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, num_classes),
    )


def build_small_cnn(num_classes: int, in_chans: int = 1, image_size: int = 64) -> nn.Module:
    """Return the embedded study's network: four strided convolutions with batch norm, global average, one linear layer.

    Works at any size; made for 64 px on one core.
    """
    widths, layers = (in_chans, 16, 32, 64, 128), []
    for depth, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        kernel = 5 if depth == 0 else 3
        layers += [nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2, bias=False),
                   nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes))


SMALL: dict[str, Callable[..., nn.Module]] = {"small-cnn": build_small_cnn, "cnn2": build_cnn2, "cnn5": build_cnn5}


def _build_torchvision(name: str, num_classes: int, pretrained: bool, in_chans: int) -> nn.Module:
    if in_chans != 3:
        raise ValueError(f"torchvision's {name} takes 3 channels, not {in_chans}: repeat the grey channel (mode RGB)")
    if not pretrained:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    model = torchvision.models.get_model(name, weights="DEFAULT")
    parent, child = _find_head(model)
    setattr(parent, child, nn.Linear(getattr(parent, child).in_features, num_classes))
    return model


def load_weights(model: nn.Module, path: str) -> nn.Module:
    """Load a safetensors file into `model`, float32; leave the last layer fresh where its shape differs.

    Raises ValueError that names what is missing or too much: a network that is only half loaded trains, and scores,
    but is not the one that the report names (claim 3.15).
    """
    file = Path(resolve_model(path))
    if not file.is_file():
        raise FileNotFoundError(f"no weights file {path}: give a safetensors file, 'hub' or 'none'")
    loaded = {name: t.float() if t.is_floating_point() else t for name, t in load_file(file).items()}
    own = model.state_dict()
    parent, child = _find_head(model)
    prefix = next(name for name, module in model.named_modules() if module is getattr(parent, child))
    for key in (f"{prefix}.weight", f"{prefix}.bias"):
        if key in loaded and loaded[key].shape != own[key].shape:
            loaded[key] = own[key]
    wrong = [key for key in own.keys() & loaded.keys() if own[key].shape != loaded[key].shape]
    wrong += sorted(own.keys() ^ loaded.keys())
    if wrong:
        raise ValueError(f"{file.name} does not fit {type(model).__name__}: {len(wrong)} tensor(s) differ, first {wrong[0]}")
    model.load_state_dict(loaded, strict=True)
    return model


def _find_head(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the parent module and the attribute name of the last linear layer."""
    name = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, child = name.rpartition(".")
    return model.get_submodule(parent), child


def split_head(model: nn.Module) -> nn.Module:
    """Replace the last linear layer by nothing, in place: the module now returns features (N, D)."""
    parent, child = _find_head(model)
    setattr(parent, child, nn.Identity())
    return model


def split_model(model: nn.Module, frozen_blocks: int) -> tuple[nn.Module, nn.Module]:
    """Cut `model` after its first `frozen_blocks` blocks: (frozen body, trainable tail), tail(body(x)) == model(x).

    For torchvision's networks that are `features`, a pooling and a `classifier` (MobileNetV2 has 19 blocks), and for
    plain chains. The body is in eval mode for good, so its activations may be kept (`extract_features`).
    """
    if isinstance(model, nn.Sequential):
        blocks, rest = list(model), []
    elif isinstance(model, torchvision.models.MobileNetV2 | torchvision.models.EfficientNet):
        blocks, rest = list(model.features), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *model.classifier]
    else:
        raise ValueError(f"{type(model).__name__} cannot be cut into blocks: use frozen_blocks = 0 or 'all'")
    if not 0 < frozen_blocks <= len(blocks):
        raise ValueError(f"{type(model).__name__} has {len(blocks)} blocks: frozen_blocks = {frozen_blocks} does not fit")
    body, tail = nn.Sequential(*blocks[:frozen_blocks]), nn.Sequential(*blocks[frozen_blocks:], *rest)
    return body.eval().requires_grad_(False), tail


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, total) numbers of parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


# -- preprocessing and augmentation ------------------------------------------------------------------------------------


def read_preprocessing(name: str, weights: str, size: int, channels: int) -> Preprocessing:
    """Return the preprocessing that belongs to the weights: the library's for "hub", (x - 0.5) / 0.5 from scratch.

    A weights file does not say what it was trained with: build its `Preprocessing` from the study's values.
    """
    if weights == "hub" and name in TORCHVISION:
        given = torchvision.models.get_model_weights(TORCHVISION[name]).DEFAULT.transforms()
        return Preprocessing(size, tuple(given.mean), tuple(given.std), given.interpolation.value)
    if weights == "hub":
        cfg = timm.get_pretrained_cfg(TIMM[name])
        return Preprocessing(size, tuple(cfg.mean), tuple(cfg.std), cfg.interpolation)
    if weights != "none":
        raise ValueError(f"say with which mean and std {weights} was trained: a file does not tell")
    return Preprocessing(size, (0.5,) * channels, (0.5,) * channels)


def to_image_01(images_u8: np.ndarray, size: int, channels: int, interpolation: str = "bilinear") -> Tensor:
    """Return float32 images 0-1: (N, H, W) or (N, H, W, 3) uint8 -> (N, channels, size, size)."""
    image_01 = torch.from_numpy(np.ascontiguousarray(images_u8)).float().div_(255)
    image_01 = image_01[:, None] if image_01.ndim == 3 else image_01.permute(0, 3, 1, 2)  # (N, C, H, W)
    if image_01.shape[-1] != size or image_01.shape[-2] != size:
        image_01 = F.interpolate(image_01, (size, size), mode=interpolation, antialias=True)
    if image_01.shape[1] == channels:
        return image_01
    return image_01.mean(1, keepdim=True) if channels == 1 else image_01.expand(-1, channels, -1, -1)


def normalise_images(image_01: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return `pixel_values`: (x - mean) / std per channel, (N, C, H, W) -> (N, C, H, W)."""
    shape = (1, -1, 1, 1)
    mean, std = (torch.tensor(v, device=image_01.device).view(shape) for v in (preprocessing.mean, preprocessing.std))
    return (image_01 - mean) / std


def augment_images(image_01: Tensor, generator: torch.Generator, rotate: float = 10.0, shift: float = 0.08,
                   zoom: float = 0.1, brightness: float = 0.15, contrast: float = 0.2, flip: bool = True) -> Tensor:
    """Return classically augmented copies, all transforms in one resampling: (N, C, H, W) 0-1 -> the same.

    Per image, uniformly within +-: `rotate` degrees, `shift` and `zoom` as shares of the side, `brightness` added,
    `contrast` as a factor about the mean; mirrored with probability 1/2 if `flip`. The border is repeated outwards.
    """
    n = len(image_01)

    def draw(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale = draw(rotate * torch.pi / 180), 1 + draw(zoom)
    mirror = (torch.rand(n, generator=generator) < 0.5).float() * -2 + 1 if flip else torch.ones(n)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos * mirror, -sin, draw(2 * shift)], 1),
                         torch.stack([sin * mirror, cos, draw(2 * shift)], 1)], 1)  # (N, 2, 3)
    grid = F.affine_grid(theta.to(image_01), list(image_01.shape), align_corners=False)
    moved = F.grid_sample(image_01, grid, padding_mode="border", align_corners=False)
    gain, offset = (v.to(image_01).view(-1, 1, 1, 1) for v in (1 + draw(contrast), draw(brightness)))
    mean = moved.mean((1, 2, 3), keepdim=True)
    return ((moved - mean) * gain + mean + offset).clamp(0, 1)


def augment_once(images_u8: np.ndarray, seed: int) -> np.ndarray:
    """Return one fixed augmented view of each image, uint8, same shape: what a cached feature can be computed from."""
    generator = torch.Generator().manual_seed(seed)
    channels = 1 if images_u8.ndim == 3 else 3
    views = []
    for start in range(0, len(images_u8), BLOCK_SIZE):
        image_01 = to_image_01(images_u8[start:start + BLOCK_SIZE], images_u8.shape[1], channels)
        view = augment_images(image_01, generator).mul(255).round().to(torch.uint8)
        views.append((view[:, 0] if channels == 1 else view.permute(0, 2, 3, 1)).numpy())
    return np.concatenate(views)


# -- frozen features, computed once ------------------------------------------------------------------------------------


def extract_features(model: nn.Module, images_u8: np.ndarray, preprocessing: Preprocessing, batch_size: int = 64,
                     cache: Path | str | None = None, device: str = "cpu", bf16: bool = False,
                     dtype: type = np.float32) -> np.ndarray:
    """Return the output of the frozen `model` for every image, (N, ...) of `dtype`, forwarding each image once ever.

    Files of `BLOCK_SIZE` images under `cache` are keyed by pixels, weights and preprocessing, so a killed run goes on
    where it stopped and a changed image is computed again. A `CLIPModel` gives its projected image features.
    """
    model = model.to(device).eval()
    settings = hash_values(hash_weights(model), asdict(preprocessing), bf16, np.dtype(dtype).name)
    blocks = []
    starts = range(0, len(images_u8), BLOCK_SIZE)
    for start in progress(starts, desc="features", unit="block") if len(starts) > 1 else starts:
        block_u8 = np.ascontiguousarray(images_u8[start:start + BLOCK_SIZE])
        key = hash_values(settings, block_u8.shape, hashlib.blake2b(block_u8.tobytes()).hexdigest())
        file = Path(cache) / f"{key}.npy" if cache else None
        if file is not None and file.exists():
            blocks.append(np.load(file, mmap_mode="r"))
            continue
        features = _forward(model, block_u8, preprocessing, batch_size, device, bf16).astype(dtype)
        if file is not None:
            with replace_when_done(file) as temporary, open(temporary, "wb") as handle:
                np.save(handle, features)
        blocks.append(features)
    return np.concatenate(blocks)


def embed_batch(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return what `model` makes of a batch; for a `CLIPModel` the projected image features (transformers 4 and 5)."""
    if not hasattr(model, "get_image_features"):
        return model(pixel_values)
    output = model.get_image_features(pixel_values=pixel_values)
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.no_grad()
def _forward(model: nn.Module, inputs: np.ndarray, preprocessing: Preprocessing | None, batch_size: int, device: str,
             bf16: bool) -> np.ndarray:
    outputs = []
    for start in range(0, len(inputs), batch_size):
        batch = _to_batch(inputs[start:start + batch_size], preprocessing, device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            outputs.append(embed_batch(model, batch).float().cpu().numpy())
    return np.concatenate(outputs)


def _to_batch(inputs: np.ndarray, preprocessing: Preprocessing | None, device: str, augment: np.ndarray | None = None,
              generator: torch.Generator | None = None) -> Tensor:
    """Return one batch for the network: images are scaled, some augmented, and normalised; features pass as they are."""
    if preprocessing is None:
        return torch.from_numpy(np.asarray(inputs)).float().to(device)
    channels = len(preprocessing.mean)
    image_01 = to_image_01(inputs, preprocessing.size, channels, preprocessing.interpolation)
    if augment is not None and augment.any():
        which = torch.from_numpy(augment)
        image_01 = image_01.contiguous()
        image_01[which] = augment_images(image_01[which], generator)
    pixel_values = normalise_images(image_01.to(device), preprocessing)
    return pixel_values.contiguous(memory_format=torch.channels_last)


# -- training ----------------------------------------------------------------------------------------------------------


class Standardise(nn.Module):
    """Shift and scale features (N, D) by a fixed mean and standard deviation (buffers, not trained)."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def build_head(features: np.ndarray, num_classes: int, hidden: int = 0, dropout: float = 0.0) -> nn.Sequential:
    """Return a head for frozen features: standardised by those given (N, D), then linear, or one hidden layer.

    Give the features of the *real* training images for every arm, so that arms do not differ in scaling.
    """
    reference = torch.from_numpy(np.asarray(features, np.float32))
    width = reference.shape[1]
    layers: list[nn.Module] = [Standardise(reference.mean(0), reference.std(0).clamp_min(1e-6))]
    if hidden:
        layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(hidden or width, num_classes))


def fit_head(features: np.ndarray, labels: np.ndarray, val_features: np.ndarray, val_labels: np.ndarray,
             plan: TrainingPlan, num_classes: int, hidden: int = 0, weights: np.ndarray | None = None,
             reference: np.ndarray | None = None) -> tuple[nn.Sequential, pd.DataFrame]:
    """Train a head on cached features (N, D) for `plan.steps` optimiser steps; return (head, history).

    `reference`: the features that fix the scaling (default `features`); the rest as in `fit_classifier`.
    """
    torch.manual_seed(plan.seed)
    head = build_head(features if reference is None else reference, num_classes, hidden)
    history = fit_classifier(head, Examples(features, labels, weights), Examples(val_features, val_labels), plan)
    return head, history


def draw_batches(n: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Return row numbers (steps, batch_size): all n rows in a new random order, again and again, cut into batches."""
    rng = np.random.default_rng([seed, n])
    rounds = -(-steps * batch_size // n)
    order = np.concatenate([rng.permutation(n) for _ in range(rounds)])
    return order[:steps * batch_size].reshape(steps, batch_size)


def fit_classifier(model: nn.Module, train: Examples, val: Examples, plan: TrainingPlan,
                   preprocessing: Preprocessing | None = None, checkpoint: Path | str | None = None,
                   device: str = "cpu") -> pd.DataFrame:
    """Train `model` in place for exactly `plan.steps` AdamW steps; leave it at the best validation macro F1.

    `preprocessing` None means that the inputs are cached features. Returns the history: `step, loss` (mean since the
    row before), `val_loss, val_macro_f1, learning_rate`. With `checkpoint` (a safetensors file) a killed run goes on
    from the last evaluation and ends at the same weights; the file goes when training is done. Out of memory: the batch
    is computed in two halves, then four (the step stays the same except in batch norm), and it is said. Raises
    FloatingPointError on a loss that is not finite and ValueError on empty data.
    """
    _check_examples(train, val)
    model.to(device).to(memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    scheduler = _build_schedule(optimizer, plan)
    batches = draw_batches(len(train.labels), plan.batch_size, plan.steps, plan.seed)
    marks = {round(plan.steps * (i + 1) / plan.evaluations) for i in range(plan.evaluations)}
    state = _resume(checkpoint, model, optimizer, scheduler, plan) or {"step": 0, "history": [], "best": None}
    losses, chunks, generator = [], 1, torch.Generator()
    with torch.random.fork_rng():
        for step in range(state["step"], plan.steps):
            generator.manual_seed(_seed_step(plan.seed, step))
            loss, chunks = _take_step(model, optimizer, train, batches[step], plan, preprocessing, device, generator, chunks)
            if not np.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step + 1}: lower learning_rate ({plan.learning_rate:g})"
                                         " or look for broken images")
            scheduler.step()
            losses.append(loss)
            if step + 1 in marks:
                row = {"step": step + 1, "loss": float(np.mean(losses)), **_score(model, val, plan, preprocessing, device),
                       "learning_rate": scheduler.get_last_lr()[0]}
                state["history"].append(row)
                losses, state["step"] = [], step + 1
                if state["best"] is None or row["val_macro_f1"] > max(r["val_macro_f1"] for r in state["history"][:-1]):
                    state["best"] = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
                _save_state(checkpoint, model, optimizer, scheduler, plan, state)
    model.load_state_dict(state["best"])
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return pd.DataFrame(state["history"])


def predict_probs(model: nn.Module, inputs: np.ndarray, preprocessing: Preprocessing | None = None,
                  batch_size: int = 256, device: str = "cpu", bf16: bool = False, temperature: float = 1.0) -> np.ndarray:
    """Return class probabilities (N, k) float32 in eval mode, softmax(logits / temperature); inputs as in `Examples`."""
    model = model.to(device).eval()
    logits = _forward(model, inputs, preprocessing, batch_size, device, bf16)
    return torch.softmax(torch.from_numpy(logits).double() / temperature, 1).float().numpy()


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that minimises the log loss on *validation* probabilities (Guo et al. 2017, section 4.2).

    `probs` (N, k), `labels` (N,) class indices. Dividing the logits by it changes no decision.
    """
    logits = np.log(np.clip(probs.astype(np.float64), 1e-12, None))

    def log_loss(log_temperature: float) -> float:
        scaled = torch.from_numpy(logits / np.exp(log_temperature))
        return float(F.cross_entropy(scaled, torch.from_numpy(np.asarray(labels))))

    return float(np.exp(minimize_scalar(log_loss, bounds=(-3, 3), method="bounded").x))


def _check_examples(train: Examples, val: Examples) -> None:
    for name, examples in (("training", train), ("validation", val)):
        if len(examples.labels) == 0 or len(examples.inputs) != len(examples.labels):
            raise ValueError(f"{name} has {len(examples.inputs)} inputs and {len(examples.labels)} labels: need as many, not 0")
    if len(np.unique(train.labels)) < 2:
        raise ValueError("training has one class only: there is nothing to tell apart")


def _build_schedule(optimizer: torch.optim.Optimizer, plan: TrainingPlan) -> torch.optim.lr_scheduler.LRScheduler:
    if plan.schedule == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=plan.steps + 1,
                                                   pct_start=0.2, cycle_momentum=False)
    if plan.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    raise ValueError(f"no schedule '{plan.schedule}': choose one-cycle or constant")


def _seed_step(seed: int, step: int) -> int:
    """Return the seed of one step: each step draws from its own stream, so a resumed run draws what it would have."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)


def _take_step(model: nn.Module, optimizer: torch.optim.Optimizer, train: Examples, rows: np.ndarray,
               plan: TrainingPlan, preprocessing: Preprocessing | None, device: str, generator: torch.Generator,
               chunks: int) -> tuple[float, int]:
    """Take one optimiser step on `rows`, in `chunks` parts; return (loss, chunks), with chunks doubled if memory ran out."""
    seed = generator.initial_seed()
    while True:
        try:
            generator.manual_seed(seed)
            torch.manual_seed(seed)
            optimizer.zero_grad(set_to_none=True)
            model.train()
            loss = _backward(model, train, np.array_split(rows, chunks), plan, preprocessing, device, generator)
            if np.isfinite(loss):
                optimizer.step()
            return loss, chunks
        except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a plain one
            out_of_memory = isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
            if not out_of_memory or chunks >= len(rows):
                raise
        chunks *= 2
        print(f"out of memory: a batch of {len(rows)} images is now computed in {chunks} parts")


def _backward(model: nn.Module, train: Examples, parts: list[np.ndarray], plan: TrainingPlan,
              preprocessing: Preprocessing | None, device: str, generator: torch.Generator) -> float:
    """Accumulate the gradient of the weighted mean cross-entropy over `parts`; return its value."""
    weights = train.weights if train.weights is not None else np.ones(len(train.labels))
    whole, loss = sum(weights[rows].sum() for rows in parts), 0.0
    for rows in parts:
        augment = None if train.augment is None else train.augment[rows]
        batch = _to_batch(train.inputs[rows], preprocessing, device, augment, generator)
        target = torch.from_numpy(train.labels[rows]).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=plan.bf16):
            logits = model(batch)
        losses = F.cross_entropy(logits.float(), target, reduction="none")
        part = (losses * torch.from_numpy(weights[rows] / whole).to(losses)).sum()
        part.backward()
        loss += part.item()
    return loss


def _score(model: nn.Module, val: Examples, plan: TrainingPlan, preprocessing: Preprocessing | None,
           device: str) -> dict[str, float]:
    probs = predict_probs(model, val.inputs, preprocessing, device=device, bf16=plan.bf16)
    chosen = np.clip(probs[np.arange(len(probs)), val.labels], 1e-12, None)
    return {"val_loss": float(-np.log(chosen).mean()),
            "val_macro_f1": float(f1_score(val.labels, probs.argmax(1), average="macro", zero_division=0,
                                           labels=range(probs.shape[1])))}


def _save_state(path: Path | str | None, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler,
                plan: TrainingPlan, state: dict) -> None:
    """Write weights, best weights, optimiser and progress to one safetensors file (no pickle)."""
    if path is None:
        return
    saved = optimizer.state_dict()
    tensors = {f"model/{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"best/{name}": t for name, t in state["best"].items()}
    tensors |= {f"optimizer/{i}/{name}": t for i, slots in saved["state"].items() for name, t in slots.items()}
    card = {"plan": asdict(plan), "groups": saved["param_groups"], "step": state["step"], "history": state["history"],
            "scheduler": {k: v for k, v in scheduler.state_dict().items() if isinstance(v, int | float | list)}}
    with replace_when_done(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary,
                  {"card": json.dumps(card)})


def _resume(path: Path | str | None, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler,
            plan: TrainingPlan) -> dict | None:
    """Load what `_save_state` wrote, if it belongs to the same plan; return the progress, or None to start afresh."""
    if path is None or not Path(path).exists():
        return None
    with safe_open(path, "pt") as file:
        card = json.loads(file.metadata()["card"])
        if card["plan"] != asdict(plan):
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    pick = {kind: {n.split("/", 1)[1]: t for n, t in tensors.items() if n.startswith(f"{kind}/")}
            for kind in ("model", "best", "optimizer")}
    model.load_state_dict(pick["model"])
    slots: dict[int, dict] = {}
    for name, tensor in pick["optimizer"].items():
        index, slot = name.split("/", 1)
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": card["groups"]})
    scheduler.load_state_dict(card["scheduler"])
    return {"step": card["step"], "history": card["history"], "best": pick["best"]}


# -- keys of what is kept ----------------------------------------------------------------------------------------------


def hash_weights(model: nn.Module) -> str:
    """Return a hash of every parameter and buffer of `model` (names, shapes, values)."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous().view(-1)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_values(*values) -> str:
    """Return a short hash of plain values (numbers, strings, lists, dicts): the key of a cached result."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
