"""Classifiers: one factory, the preprocessing that belongs to the weights, and features that are computed once.

Factories return the library's own module. Training is in `medaug.training`.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from timm.layers import SelectAdaptivePool2d, global_pool_nlc
from torch import Tensor, nn

from medaug.paths import resolve_model
from medaug.runtime import progress, replace_when_done

# Name in the tables: name in the library. Report 3 trained the convolutional ones, report 4 the large ones.
TORCHVISION = {
    "alexnet": "alexnet", "vgg16": "vgg16", "resnet18": "resnet18", "resnet50": "resnet50",
    "resnext101-64x4d": "resnext101_64x4d", "densenet161": "densenet161", "mobilenetv2": "mobilenet_v2",
    "efficientnet-b0": "efficientnet_b0", "efficientnetv2-l": "efficientnet_v2_l",
    "convnext-b": "convnext_base", "vit-b16": "vit_b_16", "swin-b": "swin_b",
}  # fmt: skip
TIMM = {
    "vit-tiny": "vit_tiny_patch16_224",
    "dinov2-b": "vit_base_patch14_dinov2.lvd142m",
    "beitv2-b": "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
}
BLOCK_SIZE = 512  # images per file of cached features: what a killed run loses at most


@dataclass(frozen=True)
class Preprocessing:
    """What the weights expect: square size (px), and mean and std per channel of the image scaled to 0-1."""

    size: int = 64
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: str = "bilinear"


# -- networks ------------------------------------------------------------------------------------------------


def build_classifier(name: str, num_classes: int, weights: str = "none", in_chans: int = 3,
                     image_size: int = 224) -> nn.Module:
    """Return the network `name` with a fresh last layer of `num_classes` outputs (logits).

    `weights`: "none" (from scratch), "hub" (the library's own ImageNet weights, fetched) or a safetensors
    file in the library's parameter names. `in_chans` matters to small and timm networks, `image_size` to those
    whose layers depend on it. Raises ValueError for a name, a channel count or weights that do not fit.
    """
    if name in SMALL:
        model = SMALL[name](num_classes, in_chans, image_size)
    elif name in TIMM:
        size = {"img_size": image_size} if weights != "hub" else {}
        model = timm.create_model(TIMM[name], pretrained=weights == "hub", num_classes=num_classes,
                                  in_chans=in_chans, **size)
    elif name in TORCHVISION:
        model = _build_torchvision(TORCHVISION[name], num_classes, weights == "hub", in_chans)
    else:
        raise ValueError(f"no classifier '{name}': choose one of {', '.join([*SMALL, *TORCHVISION, *TIMM])}")
    return model if weights in ("none", "hub") else load_weights(model, weights)


def build_cnn2(num_classes: int, in_chans: int = 1, image_size: int = 64) -> nn.Sequential:
    """Return report 3's baseline: two convolutions, a 2x2 pooling and two fully connected layers."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * (image_size // 2) ** 2, 64), nn.ReLU(), nn.Linear(64, num_classes),
    )  # fmt: skip


def build_cnn5(num_classes: int, in_chans: int = 1, image_size: int = 64) -> nn.Sequential:
    """Return report 3's second network: five convolutions, three fully connected layers, dropout.

    The report gives no widths and names one kind of pooling layer; here it follows each convolution.
    """
    widths, layers = (in_chans, 16, 32, 64, 64, 64), []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * (image_size // 32) ** 2, 128), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, num_classes),
    )  # fmt: skip


def build_small_cnn(num_classes: int, in_chans: int = 1, image_size: int = 64) -> nn.Sequential:
    """Return the embedded study's network, made for 64 px on one core (95,000 parameters; any `image_size`).

    Each image is standardised (exposure and contrast say nothing of disease), then three strided convolutions
    with batch norm. Mean *and* maximum are pooled: a lobar finding is local, an interstitial one is everywhere.
    """
    layers: list[nn.Module] = [nn.InstanceNorm2d(in_chans)]
    for before, after, kernel, stride, padding in ((in_chans, 32, 8, 4, 2), (32, 64, 3, 2, 1), (64, 128, 3, 2, 1)):
        layers += [nn.Conv2d(before, after, kernel, stride, padding, bias=False), nn.BatchNorm2d(after),
                   nn.ReLU(inplace=True)]
    pool = SelectAdaptivePool2d(pool_type="catavgmax", flatten=True)  # (N, 128, h, w) -> (N, 256)
    return nn.Sequential(*layers, pool, nn.Linear(256, num_classes))


SMALL: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": build_small_cnn,
    "cnn2": build_cnn2,
    "cnn5": build_cnn5,
}


def _build_torchvision(name: str, num_classes: int, pretrained: bool, in_chans: int) -> nn.Module:
    if in_chans != 3:
        raise ValueError(f"torchvision's {name} takes 3 channels, not {in_chans}: give it 3 (grey is repeated)")
    if not pretrained:
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    model = torchvision.models.get_model(name, weights="DEFAULT")
    parent, child = _find_head(model)
    setattr(parent, child, nn.Linear(getattr(parent, child).in_features, num_classes))
    return model


def load_weights(model: nn.Module, path: str) -> nn.Module:
    """Load a safetensors file into `model`, cast to float32; a last layer of another size stays fresh.

    Raises ValueError naming what is missing or too much: a network that is only half loaded trains, and
    scores, but is not the one that the report names (claim 3.15).
    """
    file = Path(resolve_model(path))
    if not file.is_file():
        raise FileNotFoundError(f"no weights file {path}: give a safetensors file, 'hub' or 'none'")
    loaded = {key: t.float() if t.is_floating_point() else t for key, t in load_file(file).items()}
    own, head = model.state_dict(), _find_head_name(model)
    for key in (f"{head}.weight", f"{head}.bias"):
        if key in loaded and loaded[key].shape != own[key].shape:
            loaded[key] = own[key]
    wrong = sorted(own.keys() ^ loaded.keys())
    wrong += [key for key in own.keys() & loaded.keys() if own[key].shape != loaded[key].shape]
    if wrong:
        raise ValueError(f"{file.name} does not fit {type(model).__name__}: {len(wrong)} tensor(s) differ, "
                         f"first {wrong[0]}")
    model.load_state_dict(loaded, strict=True)
    return model


def split_head(model: nn.Module) -> nn.Module:
    """Take the last linear layer off, in place: the module now returns features (N, D)."""
    parent, child = _find_head(model)
    setattr(parent, child, nn.Identity())
    return model.eval().requires_grad_(False)


def split_model(model: nn.Module, frozen_blocks: int) -> tuple[nn.Module, nn.Module]:
    """Cut `model` after its first `frozen_blocks` blocks: (frozen body, tail), tail(body(x)) == model(x).

    For plain chains, for torchvision's MobileNetV2 (19 blocks) and EfficientNets, and for timm's transformers (12
    blocks of DINOv2-B and BEiTv2-B, whose embedding of patches is frozen with the first). The body stays in eval
    mode, so that its activations may be kept (`extract_features`) and never computed again.
    """
    before: list[nn.Module] = []
    if isinstance(model, nn.Sequential):
        blocks, rest = list(model), []
    elif isinstance(model, timm.models.VisionTransformer | timm.models.Beit):
        before, blocks, rest = _cut_transformer(model)
    elif isinstance(model, torchvision.models.MobileNetV2 | torchvision.models.EfficientNet):
        blocks, rest = list(model.features), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *model.classifier]
    else:
        raise ValueError(f"{type(model).__name__} cannot be cut into blocks: freeze nothing (0) or all of it")
    if not 0 < frozen_blocks <= len(blocks):
        raise ValueError(f"{type(model).__name__} has {len(blocks)} blocks, so {frozen_blocks} cannot be frozen")
    body, tail = nn.Sequential(*before, *blocks[:frozen_blocks]), nn.Sequential(*blocks[frozen_blocks:], *rest)
    return body.eval().requires_grad_(False), tail


class _Tokens(nn.Module):
    """The first part of a timm transformer: patches, class token and positions, (N, C, H, W) -> (N, L, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.forward_features(pixel_values)


class _PoolTokens(nn.Module):
    """One vector of all tokens, as the network itself pools them: (N, L, D) -> (N, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.pool_type, self.prefix = model.global_pool, model.num_prefix_tokens

    def forward(self, tokens: Tensor) -> Tensor:
        return global_pool_nlc(tokens, self.pool_type, num_prefix_tokens=self.prefix)


def _cut_transformer(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """Return what stands before a timm transformer's blocks, the blocks, and what follows; `model` is taken apart."""
    blocks = list(model.blocks)
    rest = [model.norm, _PoolTokens(model), model.fc_norm, model.head_drop, model.head]
    model.blocks = nn.Sequential()
    model.norm = model.fc_norm = model.head = nn.Identity()
    return [_Tokens(model)], blocks, rest


def count_parameters(*models: nn.Module) -> tuple[int, int]:
    """Return (trainable, total) numbers of parameters of all `models` together."""
    sizes = [(p.numel(), p.requires_grad) for model in models for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def _find_head_name(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def _find_head(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the parent module and the attribute name of the last linear layer."""
    parent, _, child = _find_head_name(model).rpartition(".")
    return model.get_submodule(parent), child


# -- preprocessing -------------------------------------------------------------------------------------------


def read_preprocessing(name: str, weights: str, size: int, channels: int) -> Preprocessing:
    """Return the preprocessing that belongs to the weights; from scratch, (x - 0.5) / 0.5 per channel.

    Raises ValueError for a weights file, which does not say what it was trained with: build its
    `Preprocessing` from the study's values.
    """
    if weights == "none":
        return Preprocessing(size, (0.5,) * channels, (0.5,) * channels)
    if weights != "hub":
        raise ValueError(f"{weights} does not tell its preprocessing: give the mean and std it was trained with")
    if name in TORCHVISION:
        given = torchvision.models.get_model_weights(TORCHVISION[name]).DEFAULT.transforms()
        return Preprocessing(size, tuple(given.mean), tuple(given.std), given.interpolation.value)
    given = timm.get_pretrained_cfg(TIMM[name])
    return Preprocessing(size, tuple(given.mean), tuple(given.std), given.interpolation)


def to_image_01(images_u8: np.ndarray, preprocessing: Preprocessing) -> Tensor:
    """Return float32 images 0-1 in the network's size: (N, H, W) or (N, H, W, 3) uint8 -> (N, C, h, w)."""
    size, channels = preprocessing.size, len(preprocessing.mean)
    image_01 = torch.from_numpy(np.ascontiguousarray(images_u8)).float().div_(255)
    image_01 = image_01[:, None] if image_01.ndim == 3 else image_01.permute(0, 3, 1, 2)  # (N, C, H, W)
    if image_01.shape[2:] != (size, size):
        image_01 = F.interpolate(image_01, (size, size), mode=preprocessing.interpolation, antialias=True)
        image_01 = image_01.clamp(0, 1)  # bicubic overshoots
    if image_01.shape[1] == channels:
        return image_01
    return image_01.mean(1, keepdim=True) if channels == 1 else image_01.expand(-1, channels, -1, -1)


def normalise_images(image_01: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return `pixel_values`, (x - mean) / std per channel, channels last in memory: (N, C, h, w) -> the same."""
    mean, std = (torch.tensor(v, device=image_01.device).view(1, -1, 1, 1)
                 for v in (preprocessing.mean, preprocessing.std))
    return ((image_01 - mean) / std).contiguous(memory_format=torch.channels_last)


# -- frozen features, computed once --------------------------------------------------------------------------


def extract_features(model: nn.Module, images_u8: np.ndarray, preprocessing: Preprocessing, batch_size: int = 64,
                     cache: Path | str | None = None, device: str = "cpu", bf16: bool = False,
                     dtype: type = np.float32) -> np.ndarray:
    """Return the output of the frozen `model` for every image, (N, ...) of `dtype`; forward each image once.

    Files of `BLOCK_SIZE` images under `cache` are keyed by pixels, weights and preprocessing, so that a killed
    run goes on where it stopped and a changed image is computed again. A `CLIPModel` gives its projected image
    features.
    """
    model = model.to(device).eval()
    settings = [hash_weights(model), asdict(preprocessing), batch_size, bf16, np.dtype(dtype).name]
    starts = range(0, len(images_u8), BLOCK_SIZE)
    blocks = []
    for start in progress(starts, desc="features", unit="block") if len(starts) > 1 else starts:
        block_u8 = np.ascontiguousarray(images_u8[start:start + BLOCK_SIZE])
        key = hash_values(*settings, block_u8.shape, hashlib.blake2b(block_u8).hexdigest())
        file = Path(cache) / f"{key}.npy" if cache else None
        if file is None or not file.exists():
            blocks.append(_embed_block(model, block_u8, preprocessing, batch_size, device, bf16).astype(dtype))
            if file is not None:
                with replace_when_done(file) as temporary, open(temporary, "wb") as handle:
                    np.save(handle, blocks[-1])
        else:
            blocks.append(np.load(file, mmap_mode="r"))
    return np.concatenate(blocks)


@torch.no_grad()
def _embed_block(model: nn.Module, block_u8: np.ndarray, preprocessing: Preprocessing, batch_size: int,
                 device: str, bf16: bool) -> np.ndarray:
    model, outputs = model.to(memory_format=torch.channels_last), []
    for start in range(0, len(block_u8), batch_size):
        image_01 = to_image_01(block_u8[start:start + batch_size], preprocessing).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            output = embed_batch(model, normalise_images(image_01, preprocessing))
        outputs.append(output.float().cpu().numpy())
    return np.concatenate(outputs)


def embed_batch(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Return what `model` makes of a batch; for a `CLIPModel` its projected image features (N, projection)."""
    if not hasattr(model, "get_image_features"):
        return model(pixel_values)
    output = model.get_image_features(pixel_values=pixel_values)
    return output if isinstance(output, Tensor) else output.pooler_output  # transformers 4 | 5


def hash_weights(model: nn.Module) -> str:
    """Return a hash of every parameter and buffer of `model` (names, shapes, values)."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_values(*values) -> str:
    """Return a short hash of plain values (numbers, strings, lists, dicts): the key of a kept result."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
