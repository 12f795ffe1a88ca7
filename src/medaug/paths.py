"""Where everything lives: one obvious place for each thing (a leaf: imports nothing of medaug)."""

import os
from pathlib import Path

ROOT = Path(os.environ.get("MEDAUG_ROOT") or Path(__file__).resolve().parents[2])

NOTEBOOKS = ROOT / "notebooks"
STUDIES = ROOT / "studies"
FOUNDATIONS = ROOT / "data" / "foundations"
RESULTS = ROOT / "data" / "results"
FIGURES = ROOT / "figures"
RUNS = Path(os.environ.get("MEDAUG_RUNS") or ROOT / "runs")


def run_dir(study: str) -> Path:
    """Folder that holds all that a run of `study` writes (not created here)."""
    return RUNS / study


def published_dir(study: str) -> Path:
    """Folder of the published tables of `study`, written by `make publish` and nothing else."""
    return RESULTS / study


def find_source(name: str, data: str = "") -> Path:
    """Return the folder of the data source `name` (for example "guangzhou").

    `data` (or, where it is empty, the environment variable MEDAUG_DATA) is either the folder of the source itself
    or the folder that holds it and its siblings. Raises FileNotFoundError that says what to set.
    """
    given = data or os.environ.get("MEDAUG_DATA", "")
    if not given:
        raise FileNotFoundError(f"source '{name}' needs a data folder: set DATA=/path (make) or MEDAUG_DATA=/path")
    base = Path(given).expanduser().resolve()
    for candidate in (base / name, base if base.name == name else None, base.parent / name):
        if candidate is not None and candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"no folder '{name}' in or beside {base}: set DATA or MEDAUG_DATA to the folder that holds it")


def resolve_model(model_id: str, data: str = "") -> str:
    """Return a local folder for `model_id` if there is one, else `model_id` itself (a hub id).

    "foundations/NAME" is a folder shipped under `data/foundations`; "runs/..." one that a run has written;
    a name found in the data folder (see `find_source`) is used from there.
    """
    if model_id.startswith("foundations/"):
        return str(FOUNDATIONS / model_id.removeprefix("foundations/"))
    if model_id.startswith("runs/"):
        return str(RUNS / model_id.removeprefix("runs/"))
    path = Path(model_id).expanduser()
    if path.exists():
        return str(path.resolve())
    if data or os.environ.get("MEDAUG_DATA"):
        head, _, tail = model_id.partition("/")
        try:
            candidate = find_source(head, data) / tail
        except FileNotFoundError:
            return model_id
        if candidate.exists():
            return str(candidate)
    return model_id
