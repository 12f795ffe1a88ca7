"""The contract of files: which tables there are, who writes which part, how parts become one table."""

import json
import shutil
from pathlib import Path

import pandas as pd

from medaug import paths
from medaug.runtime import Run, replace_when_done, save_json

KEYS = ["arm", "model", "seed", "generator_seed", "fold", "fraction", "ratio", "split"]
METRICS = ["n", "accuracy", "balanced_accuracy", "macro_f1", "macro_precision", "macro_recall", "auroc", "auprc", "ece",
           "brier"]

# Columns that each table must have; a part may carry more (for example a prompt set, an interval).
COLUMNS = {
    "classification.csv": [*KEYS, *METRICS, "steps", "params_trainable", "params_total"],
    "predictions.parquet": [*KEYS, "image_id", "patient_id", "y_true", "y_pred"],
    "history.csv": ["notebook", "model", "arm", "seed", "step", "loss"],
    "synthesis.csv": ["generator", "encoder", "label", "n_real", "n_synthetic", "fid", "kid", "cmmd", "precision",
                      "recall", "density", "coverage", "nn_ratio", "memorised_share", "mia_auc"],
    "segmentation.csv": ["model", "seed", "train_source", "test_source", "split", "dice_per_image", "dice_pooled",
                         "iou", "hd95", "n", "params_total"],
    "timing.csv": ["notebook", "arm", "model", "seed", "seconds", "images_per_second", "seconds_per_epoch",
                   "peak_memory_mb", "device"],
    "verdict.csv": ["arm", "control", "model", "metric", "delta", "ci_low", "ci_high", "p", "p_holm", "n_seeds",
                    "n_patients", "mde", "verdict"],
}
JSON_TABLES = ("audit.json", "run.json")


def save_part(run: Run, table: str, frame: pd.DataFrame) -> Path:
    """Write this notebook's part of `table` (a name in `COLUMNS`) under `runs/<study>/parts/`; return its path.

    Raises ValueError naming the columns that the contract asks for and `frame` lacks.
    """
    missing = [column for column in COLUMNS[table] if column not in frame.columns]
    if missing:
        raise ValueError(f"{table}: the part of {run.notebook} lacks the column(s) {', '.join(missing)}")
    path = run.dir / "parts" / table / f"{run.notebook}{Path(table).suffix}"
    first = COLUMNS[table]
    _write(frame[first + [c for c in frame.columns if c not in first]], path)
    return path


def save_audit(run: Run, audit: dict) -> Path:
    """Write `audit.json`: plain numbers, strings, lists and dicts only."""
    path = run.dir / "parts" / "audit.json" / f"{run.notebook}.json"
    save_json(path, audit)
    return path


def merge_parts(study: str) -> list[Path]:
    """Merge the parts of each table into `runs/<study>/tables/<table>`, in the order of the notebooks' names."""
    run_dir, written = paths.run_dir(study), []
    for table in COLUMNS:
        parts = sorted((run_dir / "parts" / table).glob(f"*{Path(table).suffix}"))
        if parts:
            merged = pd.concat([_read(part) for part in parts], ignore_index=True)
            written.append(_write(merged, run_dir / "tables" / table))
    for table, folder in (("audit.json", "audit.json"), ("run.json", "run")):
        parts = sorted((run_dir / "parts" / folder).glob("*.json"))
        if parts:
            cards = {part.stem: json.loads(part.read_text(encoding="utf-8")) for part in parts}
            save_json(run_dir / "tables" / table, cards if table == "run.json" else cards[parts[0].stem])
            written.append(run_dir / "tables" / table)
    return written


def find_table(study: str, table: str) -> Path | None:
    """Return the path of `table`: of the run if there is one, else the published one, else None."""
    for folder in (paths.run_dir(study) / "tables", paths.published_dir(study)):
        if (folder / table).exists():
            return folder / table
    return None


def read_table(study: str, table: str) -> pd.DataFrame:
    """Read `table` of `study` (the run's, else the published one). Raises FileNotFoundError that says what to run."""
    path = find_table(study, table)
    if path is None:
        raise FileNotFoundError(f"no {table} for study '{study}': run `make study STUDY={study}` first")
    return _read(path)


def read_json(study: str, table: str) -> dict:
    """Read `audit.json` or `run.json` of `study`, as `read_table` does."""
    path = find_table(study, table)
    if path is None:
        raise FileNotFoundError(f"no {table} for study '{study}': run `make study STUDY={study}` first")
    return json.loads(path.read_text(encoding="utf-8"))


def publish_tables(study: str) -> list[Path]:
    """Copy the merged tables of a run to `data/results/<study>/`; return the files written."""
    tables = sorted(p for p in (paths.run_dir(study) / "tables").glob("*") if p.name in (*COLUMNS, *JSON_TABLES))
    if not tables:
        raise FileNotFoundError(f"nothing to publish for '{study}': run `make study STUDY={study}` first")
    target = paths.published_dir(study)
    target.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(table, target / table.name)) for table in tables]


def _read(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)


def _write(frame: pd.DataFrame, path: Path) -> Path:
    with replace_when_done(path) as temporary:
        if path.suffix == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            frame.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    return path
