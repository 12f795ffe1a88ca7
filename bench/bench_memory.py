"""Does a LoRA step of the full-size Stable Diffusion 2 fit a 24 GB GPU? Counted on fake tensors, so no GPU is needed.

Every tensor of one real step (forward, loss, backward) is made without its numbers, and the bytes that live at once are added
up: exact for what the step itself keeps, without the allocator's gaps and the libraries' work space. Counted in float32
throughout, and with bf16 autocast by the CPU's rules: a GPU's keep more in float32, so the truth in bf16 lies between.
"""

import weakref

import torch
from run import Comparison
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medaug import diffusion

BATCH, LENGTH, GPU_GB = 4, 77, 24
CASES = [(size, precision) for size in (512, 768) for precision in ("no", "bf16")]


class LiveBytes(TorchDispatchMode):
    """Add up the storage of all tensors alive that were made inside this mode: `now` and its `peak`, bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def list_comparisons() -> list[Comparison]:
    """Return one comparison for each image size and precision."""
    return [compare(diffusion.build_reference("sd2")["unet"], size, precision) for size, precision in CASES]


def compare(unet: torch.nn.Module, size: int, mixed_precision: str) -> Comparison:
    """Return the comparison for the meta `unet` at `size` px, 8 px to a latent: with checkpointing beside without."""
    unet = unet.to_empty(device="cpu")  # pages that nobody writes to take no memory
    diffusion.add_lora(unet, rank=16, lora_alpha=16)
    peaks = {checkpointing: count_step(unet, size // 8, mixed_precision, checkpointing) for checkpointing in (False, True)}
    name = f"sd2-{size}px-batch{BATCH}-" + ("float32" if mixed_precision == "no" else mixed_precision)
    return Comparison(name, lambda: BATCH / peaks[True], lambda: BATCH / peaks[False],
                      "LoRA step of SD 2, counted: gradient checkpointing beside none", "images/GB",
                      lambda ratio: {"peak_gb_checkpointed": peaks[True], "peak_gb": peaks[False],
                                     "fits_24_gb": peaks[False] < GPU_GB})  # fmt: skip


def count_step(unet: torch.nn.Module, side: int, mixed_precision: str, checkpointing: bool) -> float:
    """Return the peak (GB) of weights, adapter, its gradient and AdamW's two moments, and what one step keeps alive."""
    unet.train()
    unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        weights = {name: fake.from_tensor(weight.detach()).requires_grad_(weight.requires_grad)
                   for name, weight in unet.named_parameters()}
        adapter = [weight for weight in weights.values() if weight.requires_grad]
        latents = torch.randn(BATCH, unet.config.in_channels, side, side)
        timesteps = torch.randint(0, 1000, (BATCH,))
        encoder_hidden_states = torch.randn(BATCH, LENGTH, unet.config.cross_attention_dim)
        with LiveBytes() as live:
            with diffusion.autocast(torch.device("cpu"), mixed_precision):
                model_pred = functional_call(unet, weights, (latents, timesteps, encoder_hidden_states)).sample
            torch.autograd.grad((model_pred.float() - latents).square().mean(), adapter)
    kept = sum(weight.numel() * weight.element_size() for weight in weights.values())
    return (kept + 2 * sum(weight.numel() * 4 for weight in adapter) + live.peak) / 1e9
