"""The training loop of every classifier: a fixed number of optimiser steps, chosen on validation patients.

All arms are trained by `fit_classifier` for the same number of steps, so that an arm with more images is not
also trained longer. Imports `medaug.classifiers`, because a network must be trained on exactly the pixel values
that its frozen features are computed from.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize_scalar
from sklearn.metrics import f1_score
from torch import Tensor, nn

from medaug.classifiers import BLOCK_SIZE, Preprocessing, normalise_images, to_image_01
from medaug.runtime import replace_when_done


@dataclass(frozen=True)
class TrainingPlan:
    """How one classifier is trained: `steps` optimiser steps, whatever the number of images."""

    steps: int = 400
    batch_size: int = 32
    learning_rate: float = 1e-3  # the peak of the schedule
    weight_decay: float = 1e-2
    schedule: str = "one-cycle"  # "cosine" (no warming up, to zero) or "constant"
    optimizer: str = "adamw"  # or "adam", whose weight decay is an L2 penalty (the reports' choice)
    evaluations: int = 10  # times that validation is scored on the way; the best macro F1 is kept
    bf16: bool = False  # bfloat16 autocast
    seed: int = 0


@dataclass(frozen=True)
class Examples:
    """What a classifier is trained or selected on; row i of every field belongs together.

    `inputs`: images (N, H, W) or (N, H, W, 3) uint8, or cached features (N, ...) float. `labels` (N,) class
    indices. `weights` (N,) factors of the loss. `augment` (N,) bool: transform this image anew at each draw.
    """

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None
    augment: np.ndarray | None = None


# -- augmentation --------------------------------------------------------------------------------------------


def augment_images(image_01: Tensor, generator: torch.Generator, rotate: float = 10.0, shift: float = 0.08,
                   zoom: float = 0.1, brightness: float = 0.15, contrast: float = 0.2,
                   flip: bool = True) -> Tensor:
    """Return classically augmented copies, all geometry in one resampling: (N, C, H, W) 0-1 -> the same.

    Drawn per image, uniformly within +-: `rotate` degrees, `shift` and `zoom` as shares of the side,
    `brightness` (added) and `contrast` (a factor about the mean); mirrored with probability 1/2 if `flip`.
    What comes in from outside repeats the border.
    """
    n = len(image_01)
    u = torch.rand(7, n, generator=generator) * 2 - 1  # (7, N) in -1..1
    angle, scale = u[0] * rotate * torch.pi / 180, 1 + u[1] * zoom
    mirror = torch.where(u[6] < 0, -1.0, 1.0) if flip else torch.ones(n)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos * mirror, -sin, 2 * shift * u[2]], 1),
                         torch.stack([sin * mirror, cos, 2 * shift * u[3]], 1)], 1)  # (N, 2, 3)
    grid = F.affine_grid(theta.to(image_01), list(image_01.shape), align_corners=False)
    moved = F.grid_sample(image_01, grid, padding_mode="border", align_corners=False)
    gain, offset = ((v.to(image_01).view(-1, 1, 1, 1)) for v in (1 + u[4] * contrast, u[5] * brightness))
    mean = moved.mean((1, 2, 3), keepdim=True)
    return ((moved - mean) * gain + mean + offset).clamp(0, 1)


def augment_once(images_u8: np.ndarray, seed: int) -> np.ndarray:
    """Return one fixed augmented view of each image (uint8, same shape), for features that are computed once."""
    generator, views = torch.Generator().manual_seed(seed), []
    as_it_is = Preprocessing(images_u8.shape[1], (0.0,) * (1 if images_u8.ndim == 3 else 3))
    for start in range(0, len(images_u8), BLOCK_SIZE):
        image_01 = to_image_01(images_u8[start:start + BLOCK_SIZE], as_it_is)
        view = augment_images(image_01, generator).mul(255).round().to(torch.uint8)  # (N, C, H, W)
        views.append((view[:, 0] if images_u8.ndim == 3 else view.permute(0, 2, 3, 1)).numpy())
    return np.concatenate(views)


# -- heads on frozen features --------------------------------------------------------------------------------


class Standardise(nn.Module):
    """Shift and scale features (N, D) by a fixed mean and standard deviation (buffers, not trained)."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


def build_head(features: np.ndarray, num_classes: int, hidden: int = 0) -> nn.Sequential:
    """Return a head for frozen features: standardised by `features` (N, D), then linear or one hidden layer.

    Give the features of the *real* training images for every arm, so that arms do not differ in scaling.
    """
    reference = torch.from_numpy(np.asarray(features, np.float32))
    width = reference.shape[1]
    layers = [Standardise(reference.mean(0), reference.std(0).clamp_min(1e-6))]
    if hidden:
        layers += [nn.Linear(width, hidden), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(hidden or width, num_classes))


def fit_head(features: np.ndarray, labels: np.ndarray, val_features: np.ndarray, val_labels: np.ndarray,
             plan: TrainingPlan, num_classes: int, hidden: int = 0) -> tuple[nn.Sequential, pd.DataFrame]:
    """Train a head on cached features (N, D) for `plan.steps` optimiser steps; return (head, history)."""
    torch.manual_seed(plan.seed)
    head = build_head(features, num_classes, hidden)
    return head, fit_classifier(head, Examples(features, labels), Examples(val_features, val_labels), plan)


# -- training ------------------------------------------------------------------------------------------------


def fit_classifier(model: nn.Module, train: Examples, val: Examples, plan: TrainingPlan,
                   preprocessing: Preprocessing | None = None, checkpoint: Path | str | None = None,
                   device: str = "cpu") -> pd.DataFrame:
    """Train `model` in place for exactly `plan.steps` steps; leave it at its best validation macro F1.

    `preprocessing` None: the inputs are cached features. Returns the history, one row per evaluation: `step,
    loss` (mean since the row before), `val_loss, val_macro_f1, learning_rate`. With `checkpoint` (a safetensors
    file, removed at the end) a killed run goes on from its last evaluation and ends at the same weights. Out of
    memory: the batch is computed in 2, 4 ... parts, and that is said (the step is the same, but for batch norm).
    Raises FloatingPointError for a loss that is not finite, ValueError for data that cannot be trained on.
    """
    _check_examples(train, val)
    trainer = _Trainer(model, plan, preprocessing, device)
    trainer.resume(checkpoint)
    batches = draw_batches(len(train.labels), plan.batch_size, plan.steps, plan.seed)
    marks = {round(plan.steps * (i + 1) / plan.evaluations) for i in range(plan.evaluations)}
    losses = []
    with torch.random.fork_rng():
        for step in range(trainer.step, plan.steps):
            losses.append(trainer.take_step(train, batches[step], step))
            if step + 1 in marks:
                trainer.evaluate(val, step + 1, float(np.mean(losses)))
                trainer.save(checkpoint)
                losses = []
    model.load_state_dict(trainer.best)
    if checkpoint is not None:
        Path(checkpoint).unlink(missing_ok=True)
    return pd.DataFrame(trainer.history)


def draw_batches(n: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Return row numbers (steps, batch_size): all n rows in a new random order, again and again, cut up."""
    rng = np.random.default_rng([seed, n])
    rounds = -(-steps * batch_size // n)
    order = np.concatenate([rng.permutation(n) for _ in range(rounds)])
    return order[:steps * batch_size].reshape(steps, batch_size)


def predict_probs(model: nn.Module, inputs: np.ndarray, preprocessing: Preprocessing | None = None,
                  batch_size: int = 256, device: str = "cpu", bf16: bool = False,
                  temperature: float = 1.0) -> np.ndarray:
    """Return class probabilities (N, k) float32, softmax(logits / temperature), in eval mode.

    `inputs` and `preprocessing` as in training (see `Examples` and `fit_classifier`).
    """
    model, logits, memory_format = model.to(device).eval(), [], pick_memory_format(model, device)
    with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        for start in range(0, len(inputs), batch_size):
            batch = _to_batch(inputs[start:start + batch_size], preprocessing, device, memory_format=memory_format)
            logits.append(model(batch).float().cpu())
    return torch.softmax(torch.cat(logits).double() / temperature, 1).float().numpy()


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature that minimises the log loss of *validation* probabilities (N, k), 0.05 to 20.

    Dividing the logits by it changes no decision, only the confidence (Guo et al. 2017, section 4.2).
    """
    logits = torch.from_numpy(np.log(np.clip(probs.astype(np.float64), 1e-12, None)))
    target = torch.tensor(np.asarray(labels))

    def log_loss(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / np.exp(log_temperature), target))

    return float(np.exp(minimize_scalar(log_loss, bounds=(-3, 3), method="bounded").x))


def _check_examples(train: Examples, val: Examples) -> None:
    for name, examples in (("training", train), ("validation", val)):
        if len(examples.labels) == 0 or len(examples.inputs) != len(examples.labels):
            raise ValueError(f"{name} has {len(examples.inputs)} inputs for {len(examples.labels)} labels")
    if len(np.unique(train.labels)) < 2:
        raise ValueError("training has one class only: there is nothing to tell apart")


def pick_memory_format(model: nn.Module, device: str) -> torch.memory_format:
    """Return the layout in which `model` is fastest: channels last, but for wide plain convolutions on a CPU.

    oneDNN computes ResNets and their like a seventh faster from the default layout (`make bench`); depthwise and
    narrow convolutions, and GPUs, gain up to a half from channels last.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    wide = max((c.out_channels for c in convolutions), default=0) >= 256 and all(c.groups == 1 for c in convolutions)
    return torch.contiguous_format if wide and torch.device(device).type == "cpu" else torch.channels_last


def _to_batch(inputs: np.ndarray, preprocessing: Preprocessing | None, device: str, augment: np.ndarray | None = None,
              generator: torch.Generator | None = None, memory_format: torch.memory_format = torch.channels_last) -> Tensor:
    """Return a batch for the network: images scaled, some augmented, normalised; features as they are."""
    if preprocessing is None:
        return torch.from_numpy(np.asarray(inputs)).to(device).float()
    image_01 = to_image_01(inputs, preprocessing)
    if augment is not None and augment.any():
        image_01 = image_01.contiguous()
        image_01[torch.from_numpy(augment)] = augment_images(image_01[torch.from_numpy(augment)], generator)
    return normalise_images(image_01.to(device), preprocessing).contiguous(memory_format=memory_format)


class _Trainer:
    """A model in training: its optimiser, its schedule, the best weights so far, and how to save and resume."""

    def __init__(self, model: nn.Module, plan: TrainingPlan, preprocessing: Preprocessing | None, device: str):
        self.memory_format = pick_memory_format(model, device)
        self.model = model.to(device).to(memory_format=self.memory_format)
        self.plan, self.preprocessing, self.device = plan, preprocessing, device
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _build_optimizer(trainable, plan)
        self.scheduler = _build_schedule(self.optimizer, plan)
        self.step, self.parts, self.history, self.best = 0, 1, [], None

    def take_step(self, train: Examples, rows: np.ndarray, step: int) -> float:
        """Take one optimiser step on `rows`, in more parts if memory runs out; return the loss.

        Each step draws from a stream of its own, so that a resumed run draws what it would have drawn.
        """
        seed = int(np.random.SeedSequence([self.plan.seed, step]).generate_state(1)[0])
        while True:
            torch.manual_seed(seed)
            self.optimizer.zero_grad()
            try:
                loss = self.backward(train, np.array_split(rows, self.parts), torch.Generator().manual_seed(seed))
                break
            except RuntimeError as error:
                if not _is_out_of_memory(error) or self.parts >= len(rows):
                    raise
            self.parts *= 2
            print(f"out of memory: a batch of {len(rows)} images is computed in {self.parts} parts from here on")
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step + 1}: lower the learning rate "
                                     f"({self.plan.learning_rate:g}) or look for broken images")
        self.optimizer.step()
        self.scheduler.step()
        return loss

    def backward(self, train: Examples, parts: list[np.ndarray], generator: torch.Generator) -> float:
        """Add up the gradient of the weighted mean cross-entropy over `parts` of one batch; return its value."""
        weights = np.ones(len(train.labels)) if train.weights is None else train.weights
        total, value = sum(weights[rows].sum() for rows in parts), 0.0
        self.model.train()
        for rows in parts:
            augment = None if train.augment is None else train.augment[rows]
            batch = _to_batch(train.inputs[rows], self.preprocessing, self.device, augment, generator, self.memory_format)
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.plan.bf16):
                logits = self.model(batch)
            target, share = (torch.from_numpy(v[rows]).to(self.device) for v in (train.labels, weights / total))
            loss = (F.cross_entropy(logits.float(), target, reduction="none") * share.float()).sum()
            loss.backward()
            value += loss.item()
        return value

    def evaluate(self, val: Examples, step: int, loss: float) -> None:
        """Score the validation images, note it in the history, and keep the weights if they are the best."""
        probs = predict_probs(self.model, val.inputs, self.preprocessing, device=self.device, bf16=self.plan.bf16)
        log_probs = np.log(np.clip(probs[np.arange(len(probs)), val.labels], 1e-12, None))
        score = f1_score(val.labels, probs.argmax(1), average="macro", labels=range(probs.shape[1]), zero_division=0)
        if self.best is None or score > max(row["val_macro_f1"] for row in self.history):
            self.best = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self.step = step
        self.history.append({"step": step, "loss": loss, "val_loss": float(-log_probs.mean()),
                             "val_macro_f1": float(score), "learning_rate": self.scheduler.get_last_lr()[0]})

    def save(self, path: Path | str | None) -> None:
        """Write weights, best weights, optimiser and progress to one safetensors file."""
        if path is None:
            return
        optimizer = self.optimizer.state_dict()
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"best/{name}": t for name, t in self.best.items()}
        tensors |= {f"optimizer/{i}/{name}": t for i, slots in optimizer["state"].items() for name, t in slots.items()}
        card = {"plan": asdict(self.plan), "groups": optimizer["param_groups"], "step": self.step,
                "history": self.history, "last_epoch": self.scheduler.last_epoch, "parts": self.parts}
        with replace_when_done(path) as temporary:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary,
                      {"card": json.dumps(card)})

    def resume(self, path: Path | str | None) -> None:
        """Go on from what `save` wrote under the same plan; without it, or with another plan, start afresh."""
        if path is None or not Path(path).exists():
            return
        with safe_open(path, "pt") as file:
            card = json.loads(file.metadata()["card"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if card["plan"] != asdict(self.plan):
            return
        parameters = self.optimizer.param_groups[0]["params"]
        state: dict[int, dict] = {index: {} for index in range(len(parameters))}
        for name, tensor in tensors.items():
            if name.startswith("optimizer/"):
                _, index, slot = name.split("/", 2)
                like = parameters[int(index)]  # fused AdamW pairs elements by their place in memory
                same = tensor.shape == like.shape
                state[int(index)][slot] = torch.empty_like(like).copy_(tensor) if same else tensor
        self.optimizer.load_state_dict({"state": state, "param_groups": card["groups"]})
        self.model.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
        self.best = {n.removeprefix("best/"): t for n, t in tensors.items() if n.startswith("best/")}
        self.step, self.history, self.parts = card["step"], card["history"], card["parts"]
        self.scheduler.last_epoch = card["last_epoch"]


def _build_optimizer(parameters: list[nn.Parameter], plan: TrainingPlan) -> torch.optim.Optimizer:
    known = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    if plan.optimizer not in known:
        raise ValueError(f"no optimizer '{plan.optimizer}': choose adamw or adam")
    return known[plan.optimizer](parameters, plan.learning_rate, weight_decay=plan.weight_decay, fused=True)


def _build_schedule(optimizer: torch.optim.Optimizer, plan: TrainingPlan) -> torch.optim.lr_scheduler.LRScheduler:
    if plan.schedule == "one-cycle":
        warm_up = 0.2 if plan.steps > 4 else 0.3  # of four steps a fifth is none, and PyTorch divides by its length
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=plan.steps + 1,
                                                   pct_start=warm_up, cycle_momentum=False)
    if plan.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    if plan.schedule == "constant":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    raise ValueError(f"no schedule '{plan.schedule}': choose one-cycle, cosine or constant")


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
