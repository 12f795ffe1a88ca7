"""The results tables as a reader sees them: which are there, and each as a table of Markdown with means and
intervals.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medaug import paths, tables
from medaug.wording import (
    BASELINE,
    CONTROL,
    METRIC_NAMES,
    format_interval,
    format_number,
    format_points,
    in_div,
    link_notebook,
    make_study_table,
    make_table,
    show_arm,
    show_verdict,
)

MANY_GENERATORS = 12  # sweeps and floors count too


@dataclass(frozen=True)
class Tables:
    """Where numbers come from: the run's tables, else the published ones; with `published`, only those."""

    published: bool = False
    studies: tuple[str, ...] = ()

    def find(self, study: str, table: str) -> Path | None:
        """Return the path of a study's table, or None."""
        if self.published:
            path = paths.published_dir(study) / table
            return path if path.exists() else None
        return tables.find_table(study, table)

    def read(self, study: str, table: str) -> pd.DataFrame | None:
        """Return a study's table, or None if there is none or it is empty."""
        path = self.find(study, table)
        frame = pd.read_csv(path) if path else None
        return frame if frame is not None and len(frame) else None

    def read_json(self, study: str, table: str) -> dict:
        """Return `audit.json` or `run.json` of a study ({} if there is none)."""
        path = self.find(study, table)
        return json.loads(path.read_text(encoding="utf-8")) if path else {}

    def read_claims(self) -> pd.DataFrame | None:
        """Return the claims with all columns as text, or None."""
        places = (
            [paths.RESULTS / "claims.csv"]
            if self.published
            else [paths.RUNS / "report" / "claims.csv", paths.RESULTS / "claims.csv"]
        )
        for path in places:
            if path.exists():
                return pd.read_csv(path, dtype=str, keep_default_na=False)
        return None


def find_studies(published: bool = False) -> list[str]:
    """Return the studies that have tables: the phantom ones first, then those on real data, then a user's
    own.
    """
    known = [
        "phantom",
        "phantom-full",
        "guangzhou-local",
        "lymphoma-local",
        "covid-local",
        "lungs-local",
        "guangzhou",
        "lymphoma",
        "covid",
        "covid-segmentation",
    ]
    folders = {path.parent.name for path in paths.RESULTS.glob("*/*.csv")}
    if not published:
        folders |= {path.parents[1].name for path in paths.RUNS.glob("*/tables/*.csv")}
    return sorted(folders, key=lambda name: (known.index(name) if name in known else len(known), name))


def primary_rows(verdict: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the endpoint that the study named beforehand: its metric and model (`primary`, else
    the first).
    """
    if "primary" in verdict.columns and verdict["primary"].any():
        return verdict[verdict["primary"].astype(bool)]
    first = verdict.iloc[0]
    return verdict[(verdict["model"] == first["model"]) & (verdict["metric"] == first["metric"])]


def pick_row(rows: pd.DataFrame, arm: str, control: str):
    """Return the row that compares `arm` with `control`, or None."""
    found = rows[(rows["arm"] == arm) & (rows["control"] == control)]
    return found.iloc[0] if len(found) else None


def endpoint_runs(runs: pd.DataFrame, verdict: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that `verdict.csv` compares: all training patients, and the ratio that it names (if it does)."""
    runs = runs[runs["fraction"] == 1] if "fraction" in runs.columns else runs
    return runs[runs["ratio"].isin([0, verdict["ratio"].iloc[0]])] if "ratio" in verdict.columns else runs


def average_folds(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run of a k-fold study, its metrics averaged over the folds; other runs as they are."""
    if "fold" not in runs.columns or runs["fold"].nunique() < 2:
        return runs
    keys = ["arm", "model", "seed", "generator_seed", "fraction", "ratio", "split"]
    return runs.drop(columns="fold").groupby(keys, sort=False, as_index=False).mean(numeric_only=True)


def table_of_arms(study: str, source: Tables, primary: bool = False) -> str:
    """Return the table of arms: test metrics over seeds, and the differences that `verdict.csv` holds."""
    runs, verdict = source.read(study, "classification.csv"), source.read(study, "verdict.csv")
    if runs is None:
        return ""
    runs = runs[runs["split"] == "test"]
    rows = primary_rows(verdict) if verdict is not None else pd.DataFrame(columns=["arm", "control"])
    if primary and len(rows):
        runs = endpoint_runs(runs[runs["model"] == rows.iloc[0]["model"]], verdict)
    runs = average_folds(runs)
    groups = ["model", "arm", *(key for key in ("fraction", "ratio") if _varies(runs, key))]
    columns = {"model": "l", "arm": "l", "fraction": "r", "ratio": "r"}
    columns = {
        head: side for head, side in columns.items() if head in groups and not (primary and head == "model")
    }
    measures = {"macro F1": "macro_f1"} | (
        {} if primary else {"accuracy": "accuracy", "AUROC": "auroc", "ECE": "ece"}
    )
    columns |= {"macro F1": "r", "± seeds": "r", **{head: "r" for head in measures}, "runs": "r"}
    if primary and len(rows):
        columns |= {"Δ against real": "r", "Δ against duplicates": "r"}
    body = []
    for key, group in runs.groupby(groups, sort=False):
        named = dict(zip(groups, key, strict=True))
        means = {head: format_number(group[column].mean()) for head, column in measures.items()}
        cells = {head: _show_key(head, named[head]) for head in columns if head in named} | means
        cells |= {"± seeds": format_number(group["macro_f1"].std(ddof=1)), "runs": str(len(group))}
        if primary and len(rows):
            of_model = verdict[
                (verdict["model"] == named["model"]) & (verdict["metric"] == rows.iloc[0]["metric"])
            ]
            for head, control in (("Δ against real", BASELINE), ("Δ against duplicates", CONTROL)):
                row = pick_row(of_model, named["arm"], control)
                cells[head] = format_interval(row) if row is not None else ""
        body.append(cells)
    return make_study_table(columns, body, f"arms-{study}" + ("-headline" if primary else ""))


def _varies(frame: pd.DataFrame, column: str) -> bool:
    return column in frame.columns and frame.groupby("arm")[column].nunique().max() > 1


def _show_key(head: str, value) -> str:
    return {"arm": show_arm, "model": "`{}`".format}.get(head, lambda v: format_number(v, 2))(value)


def table_of_measures(study: str, source: Tables) -> str:
    """Return what the notebooks other than 05 found, one row each: the measure, its control, the result,
    where.
    """
    rows = [
        row
        for compose in (_measure_audit, _measure_generator, _measure_clip, _measure_segmentation)
        if (row := compose(study, source))
    ]
    columns = {"asked of": "l", "measure": "l", "control": "l", "result": "l"}
    return in_div(make_table(columns, rows, (14, 26, 28, 28)), "stack") if rows else ""


def _measure_audit(study: str, source: Tables) -> list[str] | None:
    audit = source.read_json(study, "audit.json")
    leaks, views, splits = (
        audit.get("cross_split_leaks"),
        audit.get("shortcut_scores"),
        audit.get("split_by_image"),
    )
    if not leaks or not views:
        return None
    views = [
        view for view in views if not view.get("coarse")
    ] or views  # coarse ones may hold the disease itself
    highest = max(views, key=lambda view: view["balanced_accuracy"])
    gain = max((row["difference"] for row in splits or []), default=float("nan"))
    return [
        link_notebook("01-data-audit", study, "the data"),
        "patients, pictures or near-duplicates in two splits",
        f"a split by image would have gained {format_points(gain)} points",
        f"{sum(leaks.values())}; what is left without the disease ({highest['view']}) gives "
        f"{highest['balanced_accuracy']:.3f} "
        f"balanced accuracy, {highest['verdict']}",
    ]


def _measure_generator(study: str, source: Tables) -> list[str] | None:
    synthesis = source.read(study, "synthesis.csv")
    if synthesis is None:
        return None
    overall = synthesis[synthesis["label"] == "all"] if (synthesis["label"] == "all").any() else synthesis
    overall = overall[overall["encoder"] == overall.iloc[0]["encoder"]]
    kid = overall.groupby("generator")["kid"].mean()
    if not {"lora", "untuned"} <= set(kid.index):
        return None
    floor = f"real against real {kid['real-floor']:.4f}, " if "real-floor" in kid.index else ""
    return [
        link_notebook("03-generation", study, "the generator"),
        f"KID, seen by `{overall.iloc[0]['encoder']}`; lower is nearer to real",
        f"{floor}untuned {kid['untuned']:.4f}".replace("-", "−"),
        f"tuned {kid['lora']:.4f}".replace("-", "−"),
    ]


def _measure_clip(study: str, source: Tables) -> list[str] | None:
    runs = source.read(study, "classification.csv")
    if runs is None:
        return None
    scores = (
        runs[(runs["split"] == "test") & runs["model"].isin(["clip-zero-shot", "clip-lora"]) & runs["arm"].isin(["none", "real"])]
        .groupby("model")["macro_f1"]
        .mean()
    )
    if len(scores) < 2:
        return None
    return [
        link_notebook("04-clip-lora", study, "the vision-language model"),
        "macro F1 on test images",
        f"zero-shot {scores['clip-zero-shot']:.3f}",
        f"with LoRA {scores['clip-lora']:.3f}",
    ]


def _measure_segmentation(study: str, source: Tables) -> list[str] | None:
    segmentation = source.read(study, "segmentation.csv")
    if segmentation is None:
        return None
    own = segmentation["test_source"].iloc[0]  # rows of other sources (transfer) and of few masks are another question
    segmentation = segmentation[(segmentation["train_source"] == own) & (segmentation["test_source"] == own)]
    dice = (
        segmentation[segmentation["split"] == "test"].groupby("model")["dice_per_image"].mean().sort_values()
    )
    trained = dice.drop(labels=[name for name in dice.index if name.startswith("mean")])
    baseline = [name for name in dice.index if name.startswith("mean")]
    if trained.empty:
        return None
    return [
        link_notebook("06-segmentation", study, "the pixels"),
        "Dice of the lungs, per image",
        f"mean mask {dice[baseline[0]]:.3f}" if baseline else "–",
        f"`{trained.index[-1]}` {trained.iloc[-1]:.3f}",
    ]


def table_of_verdicts(study: str, source: Tables) -> str:
    """Return the table of comparisons with interval, corrected p, minimum detectable effect and verdict."""
    verdict = source.read(study, "verdict.csv")
    if verdict is None:
        return ""
    delta = "Δ, points (95\u00a0% interval)"
    columns = {
        "arm": "l",
        "control": "l",
        "model": "l",
        "metric": "l",
        delta: "r",
        "verdict": "l",
        "p, Holm": "r",
        "MDE": "r",
        "seeds": "r",
        "patients": "r",
    }
    rows = [
        {
            "arm": show_arm(row.arm),
            "control": show_arm(row.control),
            "model": f"`{row.model}`",
            "metric": METRIC_NAMES.get(row.metric, row.metric),
            delta: format_interval(row),
            "verdict": show_verdict(row.verdict),
            "p, Holm": format_number(row.p_holm),
            "MDE": format_points(row.mde, signed=False),
            "seeds": format_number(row.n_seeds),
            "patients": format_number(row.n_patients),
        }
        for row in verdict.itertuples()
    ]
    return make_study_table(columns, rows, f"verdict-{study}", fold=("metric", "model", "seeds", "patients"))


def table_of_synthesis(study: str, source: Tables) -> str:
    """Return the table of distances to real images, the mean over generator seeds, with the real-vs-real
    floor.
    """
    synthesis = source.read(study, "synthesis.csv")
    if synthesis is None:
        return ""
    keys = {"generator": "generator", "encoder": "encoder", "class": "label"}
    values = {  # what is asked first stands where no one has to scroll
        "KID": ("kid", 4),
        "class recovered": ("class_recovery", 2),
        "by a second judge": ("second_recovery", 2),
        "precision": ("precision", 2),
        "recall": ("recall", 2),
        "memorised": ("memorised_share", 2),
        "FID": ("fid", 2),
        "CMMD": ("cmmd", 3),
        "density": ("density", 2),
        "coverage": ("coverage", 2),
        "real": ("n_real", 0),
        "synthetic": ("n_synthetic", 0),
    }
    for head in ("class recovered", "by a second judge"):  # a study without a judge has neither
        if not synthesis.get(values[head][0], pd.Series(dtype=float)).notna().any():
            del values[head]
    note, many = "", synthesis["generator"].nunique() > MANY_GENERATORS
    if many:  # a table of hundreds of rows is read by nobody
        synthesis = synthesis[synthesis["label"] == "all"]
        note = f"All classes together; each class apart is in `data/results/{study}/synthesis.csv`.\n\n"
    return note + average_rows(
        synthesis, keys, values, f"synthesis-{study}", ("encoder", "real", "synthetic", "seeds")
    )


def table_of_segmentation(study: str, source: Tables) -> str:
    """Return the table of segmentation: the mean over seeds, per model and training source."""
    segmentation = source.read(study, "segmentation.csv")
    if segmentation is None:
        return ""
    keys = {"model": "model", "trained on": "train_source", "tested on": "test_source"}
    values = {
        "Dice per image": ("dice_per_image", 3),
        "Dice pooled": ("dice_pooled", 3),
        "IoU": ("iou", 3),
        "HD95, px": ("hd95", 1),
        "parameters": ("params_total", 0),
    }
    test = segmentation[segmentation["split"] == "test"]
    return average_rows(test, keys, values, f"segmentation-{study}", ("trained on", "tested on", "seeds"))


def average_rows(
    frame: pd.DataFrame,
    keys: dict[str, str],
    values: dict[str, tuple[str, int]],
    identity: str,
    fold: tuple[str, ...],
) -> str:
    """Return the means over seeds as a table; `keys` map heads to columns, `values` heads to (column,
    decimals).
    """
    seed = "generator_seed" if "generator_seed" in frame.columns else "seed"
    rows = []
    for named, group in frame.groupby(list(keys.values()), sort=False):
        cells = dict(zip(keys, named, strict=True))
        cells = {
            head: f"`{cell}`" if head in ("generator", "encoder", "model") else cell
            for head, cell in cells.items()
        }
        cells |= {
            head: format_number(group[column].mean(), digits) for head, (column, digits) in values.items()
        }
        cells["seeds"] = str(group[seed].nunique()) if seed in group.columns else "1"
        rows.append(cells)
    columns = dict.fromkeys(keys, "l") | dict.fromkeys([*values, "seeds"], "r")
    return make_study_table(columns, rows, identity, fold)
