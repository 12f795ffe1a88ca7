"""Seeds, threads, progress, safe writing and the run card (a leaf: imports only `medaug.paths`)."""

import contextlib
import json
import os
import platform
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from medaug import paths

PARTIAL = ".partial-"  # how the folders of half-written files begin
VERSIONED = ("torch", "torchvision", "diffusers", "transformers", "peft", "scikit-learn", "seaborn", "papermill")


@dataclass(frozen=True)
class Run:
    """One notebook at work on one study: where it writes, and when it began (seconds since the epoch)."""

    study: str
    notebook: str
    seed: int
    device: str
    started: float = field(default_factory=time.time)

    @property
    def dir(self) -> Path:
        """Folder of the whole study's run, `runs/<study>`."""
        return paths.run_dir(self.study)


def start_run(study: str, notebook: str, seed: int = 0, threads: int = 1, device: str = "auto") -> Run:
    """Seed everything, fix the number of threads, print the versions, and return the `Run` to save with.

    Threads are fixed because the order of floating-point sums depends on them: equal settings, equal bytes.
    """
    import torch

    torch.set_num_threads(threads)
    seed_everything(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling each new tensor with NaN costs a tenth of the time
    run = Run(study=study, notebook=notebook, seed=seed, device=pick_device(device))
    run.dir.mkdir(parents=True, exist_ok=True)
    versions = ", ".join(f"{name} {version}" for name, version in read_versions().items())
    print(f"study {study} · notebook {notebook} · seed {seed} · device {run.device} · {threads} thread(s)\n{versions}")
    return run


def finish_run(run: Run) -> None:
    """Write this notebook's part of the run card: versions, device, wall time (s) and peak memory (MB)."""
    card = {
        "notebook": run.notebook,
        "seed": run.seed,
        "device": run.device,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": read_versions(),
        "wall_seconds": round(time.time() - run.started, 1),
        "peak_memory_mb": round(peak_memory_mb()),
    }
    save_json(run.dir / "parts" / "run" / f"{run.notebook}.json", card)
    print(f"{run.notebook} finished in {card['wall_seconds']:.0f} s, peak memory {card['peak_memory_mb']:.0f} MB")


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators (library code draws from them)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(device: str = "auto") -> str:
    """Return `device`, or for "auto" the first of cuda, mps, cpu that is there."""
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def read_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that the results depend on."""
    return {name: metadata.version(name) for name in VERSIONED}


def peak_memory_mb() -> float:
    """Return this process's peak resident memory in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform != "darwin" else peak / 1024**2


def progress(iterable: Iterable | None = None, desc: str = "", total: int | None = None, unit: str = "it"):
    """Return a tqdm bar with an estimate; headless (MEDAUG_HEADLESS=1) it goes to the terminal, not into the notebook."""
    from tqdm.std import tqdm as terminal_bar

    if os.environ.get("MEDAUG_HEADLESS") != "1":
        # warns where ipywidgets is missing, so not before it is needed
        from tqdm.auto import tqdm as notebook_bar

        return notebook_bar(iterable, desc=desc, total=total, unit=unit, leave=False)
    try:
        terminal = open("/dev/tty", "w")
    except OSError:  # no terminal (a cluster job, CI): the log shows papermill's own progress
        return terminal_bar(iterable, desc=desc, total=total, unit=unit, disable=True)
    return terminal_bar(iterable, desc=desc, total=total, unit=unit, file=terminal, leave=False, mininterval=0.5)


@contextlib.contextmanager
def replace_when_done(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path and move the file to `path` on success, so no reader meets half a file.

    It is in a hidden folder of its own beside `path`: what a killed process leaves there matches no reader's pattern.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent, ignore_cleanup_errors=True) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def is_partial(path: Path) -> bool:
    """Say whether `path` is a half-written file of `replace_when_done`, or its folder."""
    return any(part.startswith(PARTIAL) for part in path.parts)


def save_json(path: Path | str, value: dict) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    with replace_when_done(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
