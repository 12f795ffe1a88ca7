"""Data-parallel training: several processes, one for each GPU (or CPU core), share one training, each a part of every batch.

The caller, in its notebook, is process 0 and keeps what is done once: validation, pictures, files, progress. The helpers run
the same loop in lockstep and write nothing. accelerate's launcher cannot serve here: it starts all processes by itself, and
refuses to once a notebook has touched the GPU.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import cloudpickle
import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 2**25  # numbers that are summed at a time: 128 MB of float32
PATIENCE = timedelta(hours=6)  # helpers wait for process 0 while it validates
HOST = "127.0.0.1"

_helpers: list[tuple[subprocess.Popen, Path]] = []  # of process 0, with the files of what they print


def rank() -> int:
    """Return this process's number: 0 for the notebook's own, or where nothing is shared."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """Return how many processes share the training: 1 where nothing is shared."""
    return dist.get_world_size() if dist.is_initialized() else 1


def take_share(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's rows of a batch (each tensor (B, ...)): every `count()`-th from the `rank()`-th on."""
    return {name: tensor[rank()::count()] for name, tensor in batch.items()}


def weigh_share(batch_size: int) -> float:
    """Return this process's part of a batch of `batch_size`, as a share of 1; raises ValueError if some process has none."""
    if batch_size < count():
        raise ValueError(f"a batch of {batch_size} cannot be shared by {count()} processes: lower processes, or raise batch_size")
    return len(range(rank(), batch_size, count())) / batch_size


def sum_shares(loss: float, share: float) -> float:
    """Return the processes' losses added up, each weighted with its process's share: the mean over the whole batch."""
    summed = torch.tensor([loss * share], dtype=torch.float64, device=_device())
    _wait(dist.all_reduce(summed, async_op=True))
    return summed.item()


def sum_gradients(weights: Sequence[Tensor], share: float) -> None:
    """Replace the gradient of each weight, in place, by the processes' gradients added up, each weighted with its share."""
    gradients, start = [weight.grad for weight in weights if weight.grad is not None], 0
    while start < len(gradients):
        end, size = start, 0
        while end < len(gradients) and (size == 0 or size + gradients[end].numel() <= BUCKET):
            end, size = end + 1, size + gradients[end].numel()
        bucket = gradients[start:end]
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]) * share
        _wait(dist.all_reduce(flat, async_op=True))
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))
        start = end


def agree(word: bool) -> bool:
    """Return what process 0 says."""
    said = torch.tensor([float(word)], device=_device())
    _wait(dist.broadcast(said, 0, async_op=True))
    return bool(said.item())


def check_same(weights: Sequence[Tensor]) -> None:
    """Raise RuntimeError unless all processes have the same weights: a shared training that drifts apart trains nothing."""
    total = sum(weight.detach().double().abs().sum() for weight in weights).to(_device())
    ends = torch.stack([total, -total])
    _wait(dist.all_reduce(ends, dist.ReduceOp.MAX, async_op=True))
    if ends[0] != -ends[1]:
        raise RuntimeError(f"the processes' weights have drifted apart (sums from {-ends[1]:.6g} to {ends[0]:.6g}): use processes = 1")


@contextmanager
def open_team(function: Callable, arguments: tuple, processes: int, device: torch.device) -> Iterator[None]:
    """Inside the block, `processes - 1` helpers call `function(*arguments)` on their own copies, in lockstep with the caller.

    The arguments may hold modules and nested functions (cloudpickle); what lies on the caller's GPU (the first) lies on the
    helper's own there. Raises ValueError for more processes than GPUs, RuntimeError with a helper's last words if it stops.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"processes = {processes} needs device cpu or cuda, not {device.type}: use processes = 1")
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise ValueError(f"processes = {processes}, but there are {torch.cuda.device_count()} GPU(s) here")
    store = dist.TCPStore(HOST, 0, processes, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    with tempfile.TemporaryDirectory(prefix="medaug-team-") as folder:
        task = {"function": function, "arguments": arguments, "processes": processes, "port": store.port,
                "device": device.type, "threads": torch.get_num_threads(),
                "deterministic": torch.are_deterministic_algorithms_enabled()}
        torch.save(task, Path(folder) / "task.pt", pickle_module=cloudpickle)
        try:
            for number in range(1, processes):
                log = Path(folder) / f"helper-{number}.log"
                command = [sys.executable, "-c", f"from medaug import parallel; parallel.help_out({folder!r}, {number})"]
                with log.open("wb") as words:
                    _helpers.append((subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words,
                                                      start_new_session=True), log))
            while not store.check([f"ready-{number}" for number in range(1, processes)]):
                _check_helpers()
                time.sleep(0.05)
            _join(store, 0, processes, device.type)
            yield
            if device.type == "cuda":  # NCCL's processes take leave together
                dist.destroy_process_group()
            for helper, _ in _helpers:
                helper.wait()
            _check_helpers()
        finally:
            for helper, _ in _helpers:  # whoever is still there waits for a process 0 that has failed
                helper.kill()
                helper.wait()
            _helpers.clear()
            if dist.is_initialized():
                dist.destroy_process_group()


def help_out(folder: str, number: int) -> None:
    """Be helper `number` of the team whose task lies in `folder`, until the work is done or process 0 is gone."""
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    if torch.cuda.is_available():
        torch.cuda.set_device(number)
    task = torch.load(Path(folder) / "task.pt", weights_only=False,  # written by process 0, for this call alone
                      map_location=lambda storage, place: storage.cuda(number) if place.startswith("cuda") else storage)
    torch.set_num_threads(task["threads"])
    torch.use_deterministic_algorithms(task["deterministic"], warn_only=True)
    store = dist.TCPStore(HOST, task["port"], task["processes"], is_master=False, timeout=PATIENCE)
    store.set(f"ready-{number}", "")
    _join(store, number, task["processes"], task["device"])
    task["function"](*task["arguments"])
    dist.destroy_process_group()


def _join(store: dist.Store, number: int, processes: int, device: str) -> None:
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=processes, timeout=PATIENCE)


def _device() -> torch.device:
    """Where this team's sums are made: NCCL knows GPUs only."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _wait(work: dist.Work) -> None:
    """Wait for a sum over all processes; process 0 looks meanwhile whether the others are still there."""
    try:
        while not work.is_completed():
            _check_helpers()
            time.sleep(1e-4)
        work.wait()
    except RuntimeError:
        time.sleep(1)  # a connection breaks a moment before its process ends
        _check_helpers()
        raise


def _check_helpers() -> None:
    for number, (helper, log) in enumerate(_helpers, start=1):
        if helper.poll():
            words = log.read_text(errors="replace").strip().splitlines() or ["no word"]
            raise RuntimeError(f"process {number} of the {len(_helpers) + 1} that share the training has stopped: {words[-1]}")


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
