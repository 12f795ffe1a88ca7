"""The faults of the five reports, re-enacted at toy size in our own code: each returns what its guard is
given.

They exist so that a reader and a test can watch each guard catch the very fault that it is for.
"""

import copy
import functools
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.fft import dctn, idctn
from torch import nn
from torch.utils.data import Dataset, Subset

# -- reports 0 and 1 ----------------------------------------------------------------------------------------


def predict_constant(counts: dict[str, int]) -> tuple[list[str], np.ndarray]:
    """Return `y_true` with `counts` images a class, and probabilities (N, k) that are 1/k for every image."""
    y_true = [label for label, n in counts.items() for _ in range(n)]
    return y_true, np.full((len(y_true), len(counts)), 1 / len(counts))


def step_without_gradient(seed: int = 0) -> tuple[nn.Module, dict, dict, float]:
    """Take report 0's training step: generate under `no_grad`, compare pixels with unpaired photographs.

    `backward()` runs, because the *photographs* were marked as needing a gradient; the generator gets none.
    Returns the generator, its weights before and after the step, and the loss that would be reported.
    """
    generator, noise, photographs = _build_generator(seed)
    photographs.requires_grad_(True)
    before = _copy_weights(generator)
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-2)
    with torch.no_grad():
        images = generator(noise)
    loss = nn.functional.mse_loss(images, photographs)
    loss.backward()
    optimizer.step()
    return generator, before, _copy_weights(generator), loss.item()


def lose_adapter_at_loading(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Save a LoRA-tuned generator and load its weights into the plain one with `strict=False`, as report 0
    did.

    The tuned weights have other names there, so none is loaded and nothing is said. Returns the images (N,
    16) before saving and after loading.
    """
    from peft import LoraConfig, get_peft_model

    generator, noise, _ = _build_generator(seed)
    tuned = get_peft_model(_build_generator(seed)[0], LoraConfig(r=2, target_modules=["0"]))
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:  # stands for training: B = 0 is a fresh adapter
                weight.normal_()
        before = tuned(noise)
        generator.load_state_dict(tuned.state_dict(), strict=False)
        return before, generator(noise)


def _build_generator(seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Sigmoid()), torch.randn(4, 8), torch.rand(4, 16)


def _copy_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


# -- report 2 -----------------------------------------------------------------------------------------------


def perturb_dct(images_u8: np.ndarray, sigma: float, seed: int = 0) -> np.ndarray:
    """Return images (N, H, W) with Gaussian noise of `sigma` on every DCT coefficient but the first.

    Report 2 took sigma from the standard deviation of a single number, which is 0.
    """
    noise = np.random.default_rng(seed).normal(0, 1, images_u8.shape) * sigma
    noise[:, 0, 0] = 0
    coefficients = dctn(images_u8.astype(np.float64), axes=(1, 2), norm="ortho") + noise
    return np.clip(np.rint(idctn(coefficients, axes=(1, 2), norm="ortho")), 0, 255).astype(np.uint8)


def leak_augmented_test_images(manifest: pd.DataFrame) -> pd.DataFrame:
    """Return a synthetic manifest whose images were made from every real image, the test images among
    them."""
    return pd.DataFrame(
        {
            "image_id": "dct-" + manifest["image_id"],
            "sha256": "dct-" + manifest["sha256"],
            "source_image_id": manifest["image_id"],
            "origin": "synthetic",
        }
    )


# -- report 3: five ways to 0.33 ----------------------------------------------------------------------------

PATH_FAULTS = (
    "none",
    "weights never loaded",
    "head never loaded",
    "left in training mode",
    "other normalisation",
    "other class order",
)


def follow_test_path(fault: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Train a small network on three Gaussian classes and send its validation set down a test path with
    `fault`.

    The validation images come class by class, as from a folder, 50 at a time. `fault` is one of
    `PATH_FAULTS`. Returns the labels (600,) and the probabilities (600, 3).
    """
    if fault not in PATH_FAULTS:
        raise ValueError(f"no fault '{fault}': choose from {', '.join(PATH_FAULTS)}")
    network, inputs, y_index = _train_network(seed)
    network = copy.deepcopy(network)
    torch.manual_seed(seed + 1)
    if fault == "weights never loaded":
        network = _build_network()
    if fault == "head never loaded":
        network[-1].reset_parameters()
    network.train(fault == "left in training mode")
    with torch.no_grad():
        raw = (
            fault == "other normalisation"
        )  # 0-255 with mean 120 and deviation 60, where (x - 120)/60 was trained
        batches = [network(60 * batch + 120 if raw else batch) for batch in inputs.split(50)]
    probs = torch.cat(batches).softmax(dim=1).numpy()
    return y_index.numpy(), probs[:, [1, 2, 0]] if fault == "other class order" else probs


def _build_network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))


@functools.cache
def _train_network(seed: int) -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    centres, network = torch.randn(3, 12), _build_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(150):
        y_index = torch.randint(0, 3, (64,))
        loss = nn.functional.cross_entropy(network(centres[y_index] + 1.2 * torch.randn(64, 12)), y_index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    y_index = torch.arange(3).repeat_interleave(200)
    return network, centres[y_index] + 1.2 * torch.randn(600, 12), y_index


# -- report 4 -----------------------------------------------------------------------------------------------


class _Images(Dataset):
    def __init__(self, images_u8: np.ndarray):
        self.images_u8, self.transform = images_u8, lambda image: image

    def __len__(self) -> int:
        return len(self.images_u8)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.transform(self.images_u8[index])


def overwrite_transform(images_u8: np.ndarray) -> np.ndarray:
    """Return the training images (N, H, W) as report 4's loader gave them.

    Both subsets share one dataset, and the transform is its attribute: the validation transform, set last, is
    the one that training gets.
    """
    dataset = _Images(images_u8)
    train, val = Subset(dataset, range(len(dataset))), Subset(dataset, [])
    train.dataset.transform = lambda image: image[
        :, ::-1
    ]  # flips; the report drew them with probability 0.75
    val.dataset.transform = lambda image: image
    return np.stack([train[index] for index in range(len(train))])


# -- the text -----------------------------------------------------------------------------------------------


def find_impossible_shares(percentages: Sequence[float], n: int) -> list[float]:
    """Return the percentages (two decimals, rounded or cut) that no whole number of `n` images gives.

    The GRIM test: Brown & Heathers, Social Psychological and Personality Science 8 (2017).
    """
    shares = 100 * np.arange(n + 1) / n
    possible = {*np.round(shares, 2), *(np.floor(shares * 100 + 1e-9) / 100).round(2)}
    return [share for share in percentages if round(share, 2) not in possible]
