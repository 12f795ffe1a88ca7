"""The pieces of text of the website that hold numbers: Markdown, made from the results tables, by rule.

A page says `{{< fragment NAME >}}`; here is what each NAME says. Every function takes `Tables` (which tables to read) and
returns Markdown. A missing table never stops the others: its fragment says what to run. Links that begin with `/` are
relative to the project; where a run's file is missing, the site shows the published one (see `_extensions/medaug`).
"""

import inspect
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from medaug import guards, paths, tables
from medaug.plots import ARM_COLOURS
from medaug.runtime import replace_when_done

QUESTION_ARM, BASELINE, CONTROL, BOUND = "real+synthetic", "real", "real+duplicates", "oracle"
SHOWN_STUDY = "phantom"  # the only study whose pictures may be shown: its images are simulated
VERDICTS = ("reproduced", "refuted", "corrected", "answered", "not testable here")
REPORTS = {"0": "0 and 1: pneumonia, Stable Diffusion and CLIP", "2": "2: lymphoma, three ways to augment",
           "3": "3: pneumonia, baselines", "4": "4: COVID radiography, segmentation"}
METRIC_NAMES = {"macro_f1": "macro F1", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC",
                "auprc": "AUPRC", "ece": "ECE", "brier": "Brier score"}
# The claims (of data/results/claims.csv) that each guard would have stopped.
STOPS = {
    "check_lora_coverage": ["0.09", "0.17"],
    "check_weights_change": ["0.10"],
    "check_gradients_flow": ["0.10"],
    "check_loss_falls": ["0.10"],
    "check_round_trip": ["0.11"],
    "check_not_degenerate": ["0.25", "3.15"],
    "check_split_integrity": ["2.08", "2.14", "4.02"],
    "check_metrics_consistent": ["4.12", "4.13"],
    "check_augmentation_changes": ["2.10", "4.04"],
    "check_same_path": ["3.15"],
    "check_label_order": ["0.19", "0.20"],
    "check_numbers_from_tables": ["2.11", "2.12", "0.23"],
}
# Front figures: file of the phantom study, the notebook it comes from, and what to look for in it.
FRONT_FIGURES = [
    ("verdict-forest", "07-verdict",
     "What each training set was worth, against the real images alone and against as many duplicates. A dot is the mean "
     "difference, a line its 95\u00a0% interval; where the line crosses zero, the sign is not settled."),
    ("prompt-grid", "02-sd-lora",
     "The same prompts and the same noise, before and after LoRA. What changes from row to row is what the generator learned; "
     "all images are simulated."),
    ("fidelity-floor", "03-generation",
     "How far generated images are from real ones, beside the floor that two sets of real images have between them. Only the "
     "distance above the floor counts."),
]


@dataclass(frozen=True)
class Tables:
    """Where numbers are read from: the run's tables, else the published ones; with `published`, those alone."""

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
        places = [paths.RESULTS / "claims.csv"] if self.published else [paths.RUNS / "report" / "claims.csv",
                                                                        paths.RESULTS / "claims.csv"]
        for path in places:
            if path.exists():
                return pd.read_csv(path, dtype=str, keep_default_na=False)
        return None


def write_fragments(studies: Iterable[str] | None = None, published: bool = False) -> list[Path]:
    """Write every fragment as Markdown to `runs/report/`; return the files.

    `studies` are the names to show (default: all that have tables). With `published`, only published tables are read and
    the fragments go to `data/results/report/`, the copy that a fresh clone shows.
    """
    source = Tables(published, tuple(studies) if studies is not None else tuple(find_studies(published)))
    folder = (paths.RESULTS if published else paths.RUNS) / "report"
    written = []
    for name, compose in FRAGMENTS.items():
        with replace_when_done(folder / f"{name}.md") as temporary:
            temporary.write_text(compose(source).rstrip() + "\n", encoding="utf-8")
        written.append(folder / f"{name}.md")
    return written


def find_studies(published: bool = False) -> list[str]:
    """Return the studies that have tables: the phantom ones first, then those on real data, then a user's own."""
    known = ["phantom", "phantom-full", "guangzhou-local", "lymphoma-local", "covid-local", "guangzhou", "lymphoma", "covid"]
    folders = {path.parent.name for path in paths.RESULTS.glob("*/*.csv")}
    if not published:
        folders |= {path.parents[1].name for path in paths.RUNS.glob("*/tables/*.csv")}
    return sorted(folders, key=lambda name: (known.index(name) if name in known else len(known), name))


# -- words and numbers ------------------------------------------------------------------------------------------------


def format_points(value: float, signed: bool = True) -> str:
    """Return a difference of 0-1 metrics in points of a hundred: "+1.2", with a true minus sign."""
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text.replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def format_number(value: float, digits: int = 3) -> str:
    """Return a number with `digits` decimals, a whole one with thin spaces between thousands, "–" for none."""
    if value is None or pd.isna(value):
        return "–"
    if float(value).is_integer() and abs(value) >= 1:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.{digits}f}".replace("-", "−")


def format_interval(row) -> str:
    """Return "+1.2 (−0.3 to +2.7)" of a row with `delta`, `ci_low`, `ci_high`, with spaces that do not break."""
    return f"{format_points(row.delta)} ({format_points(row.ci_low)} to {format_points(row.ci_high)})".replace(" ", "\u00a0")


def describe(row, against: str) -> str:
    """Return one comparison as a sentence, worded by its verdict."""
    verdict, metric = row.verdict, METRIC_NAMES.get(row.metric, row.metric)
    size = f"**{format_points(row.delta)} points** of {metric} (95\u00a0% interval {format_points(row.ci_low)} to {format_points(row.ci_high)})"
    if verdict == "helps":
        return f"Against {against}, they helped: {size}."
    if verdict == "hurts":
        return f"Against {against}, they hurt: {size}."
    if verdict.startswith("no difference"):
        margin = max(abs(row.ci_low), abs(row.ci_high))
        return f"Against {against}, they made no difference that matters, at most {format_points(margin, signed=False)} points either way: {size}."
    best = f"a gain, if there is one, is at most {format_points(row.ci_high)} points" if row.ci_high > 0 else "a gain is not in sight"
    return f"Against {against}, it could not be decided: {size}; {best}."


def show_arm(arm: str) -> str:
    """Return an arm's name with its colour, the same on every page (see `medaug.plots`)."""
    colour = ARM_COLOURS.get(arm)
    return f'[{arm}]{{.arm style="--arm:{colour}"}}' if colour else f"`{arm}`"


def show_verdict(verdict: str) -> str:
    """Return a verdict as a coloured label."""
    name = {"not testable here": "untestable"}.get(verdict, verdict.split(" ")[0])
    return f"[{in_points(verdict)}]{{.badge-verdict .{name}}}" if verdict else ""


def in_points(verdict: str) -> str:
    """Return a verdict with its margin, if it names one, in points instead of a share of one."""
    return re.sub(r"±(\d*\.?\d+)", lambda match: f"±{format_points(float(match[1]), signed=False)}", verdict)


def escape_markdown(text: str) -> str:
    """Return plain text with what Markdown would read as markup escaped."""
    return re.sub(r"([\\`*_<>\[\]@$~^#])", r"\\\1", text)


def make_table(columns: dict[str, str], rows: Iterable[Iterable[str]], widths: Iterable[int] = ()) -> str:
    """Return a Markdown table; `columns` maps heads to "l", "r" or "c"; `widths` are relative (for wide tables)."""
    marks = {"l": (":", ""), "r": ("", ":"), "c": (":", ":")}
    dashes = list(widths) or [8] * len(columns)
    rule = "|".join(left + "-" * width + right
                    for (left, right), width in zip((marks[a] for a in columns.values()), dashes, strict=True))
    lines = ["| " + " | ".join(columns) + " |", f"|{rule}|"]
    for row in rows:
        cells = (re.sub(r"[ \t\n]+", " ", str(cell)).replace("|", "\\|") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_study_table(columns: dict[str, str], rows: list[dict[str, str]], identity: str, fold: Iterable[str] = ()) -> str:
    """Return a sortable table of `rows` ({head: cell}); a column in `fold` with one value throughout becomes a sentence."""
    if not rows:
        return ""
    same = {head: rows[0][head] for head in fold if len(rows) > 1 and len({row[head] for row in rows}) == 1}
    columns = {head: side for head, side in columns.items() if head not in same}
    table = in_div(make_table(columns, ([row[head] for head in columns] for row in rows)), "sortable", identity)
    sentence = ", ".join(f"{head} {value}" for head, value in same.items())
    return f"The same in all rows: {sentence}.\n\n{table}" if same else table


def in_div(text: str, classes: str, identity: str = "") -> str:
    """Return `text` in a fenced div."""
    marks = " ".join(([f"#{identity}"] if identity else []) + [f".{name}" for name in classes.split()])
    return f"::: {{{marks}}}\n\n{text}\n\n:::"


def note_missing(what: str, study: str = SHOWN_STUDY) -> str:
    """Return the sentence that stands where a table is missing."""
    command = "make report" if study == SHOWN_STUDY else f"make study STUDY={study}"
    return f"*{what}: not here yet; `{command}` computes it.*"


def link_notebook(name: str, study: str = SHOWN_STUDY, text: str = "") -> str:
    """Return a link to a notebook's page."""
    return f"[{text or name}](/runs/{study}/notebooks/{name}.ipynb)"


# -- the front page ---------------------------------------------------------------------------------------------------


def primary_rows(verdict: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the endpoint that the study named beforehand: its metric and model (`primary`, else the first)."""
    if "primary" in verdict.columns and verdict["primary"].any():
        return verdict[verdict["primary"].astype(bool)]
    first = verdict.iloc[0]
    return verdict[(verdict["model"] == first["model"]) & (verdict["metric"] == first["metric"])]


def pick_row(rows: pd.DataFrame, arm: str, control: str):
    """Return the row that compares `arm` with `control`, or None."""
    found = rows[(rows["arm"] == arm) & (rows["control"] == control)]
    return found.iloc[0] if len(found) else None


def compose_answer(source: Tables) -> str:
    """The answer of the embedded study, then one line for each other study that has a verdict."""
    verdict = source.read(SHOWN_STUDY, "verdict.csv")
    if verdict is None:
        answer = note_missing("The answer")
    else:
        answer = answer_study(verdict)
    others = [line for line in (answer_briefly(study, source) for study in source.studies if study != SHOWN_STUDY) if line]
    blocks = [in_div(answer, "answer")]
    if others:
        blocks.append("The other studies, each with its own endpoint:\n\n" + "\n".join(f"- {line}" for line in others))
    return "\n\n".join(blocks)


def answer_study(verdict: pd.DataFrame) -> str:
    """Return the answer's paragraphs from the primary rows of one study."""
    rows = primary_rows(verdict)
    against = {control: pick_row(rows, QUESTION_ARM, control) for control in (BASELINE, CONTROL)}
    found = {control: row for control, row in against.items() if row is not None}
    if not found:
        return note_missing(f"A comparison of `{QUESTION_ARM}` with its controls")
    names = {BASELINE: "the real images alone", CONTROL: "the same number of duplicated real images"}
    sentences = [describe(row, names[control]) for control, row in found.items()]
    any_row = next(iter(found.values()))
    bound = pick_row(rows, BOUND, BASELINE)
    scope = (f"{int(any_row.n_seeds)} training seeds, {int(any_row.n_patients)} test patients, model `{any_row.model}`; the smallest "
             f"difference that this test could have been expected to see is {format_points(any_row.mde, signed=False)} points.")
    if bound is not None:
        scope += (f" Extra images from the true distribution, the most that any generator could give, brought "
                  f"{format_interval(bound)} points.")
    return (f"**In the embedded study, on simulated radiographs: {headline(against)}**\n\n" + " ".join(sentences)
            + "\n\n" + in_div(f"{scope} All of it is computed in {link_notebook('07-verdict', text='the verdict')}.", "because"))


def headline(against: dict) -> str:
    """Return the answer in one clause, by rule, from the verdicts against the baseline and against the control."""
    kind = {control: _kind(row.verdict) if row is not None else "unknown" for control, row in against.items()}
    baseline, control = kind[BASELINE], kind[CONTROL]
    if baseline == control == "helps":
        return "yes, the generated images helped, and by more than copies of real images do."
    if baseline == "helps" and control in ("undecided", "same"):
        return "the generated images helped against real images alone, but not measurably more than copies of real images do."
    if "hurts" in (baseline, control) and "helps" not in (baseline, control):
        return "no, the generated images hurt."
    if baseline == "same" and control in ("same", "undecided", "unknown"):
        return "no, the generated images made no difference that matters."
    if control == "helps":
        return "the generated images did better than copies of real images; against real images alone it could not be decided."
    if "helps" in (baseline, control):
        return "it depends on the control: they helped against one and hurt against the other."
    return "it could not be decided whether the generated images helped."


def _kind(verdict: str) -> str:
    return "same" if verdict.startswith("no difference") else verdict


def answer_briefly(study: str, source: Tables) -> str:
    """Return one line for a further study: its two comparisons with interval and verdict ("" if it has none)."""
    verdict = source.read(study, "verdict.csv")
    if verdict is None:
        return ""
    rows = primary_rows(verdict)
    parts = []
    for control, name in ((BASELINE, "real alone"), (CONTROL, "duplicates")):
        row = pick_row(rows, QUESTION_ARM, control)
        if row is not None:
            parts.append(f"against {name} {format_interval(row)} points, {in_points(row.verdict)}")
    if not parts:
        return ""
    metric, model = METRIC_NAMES.get(rows.iloc[0].metric, rows.iloc[0].metric), rows.iloc[0].model
    return f"[{study}](/results.qmd#{study}) ({metric}, `{model}`): {'; '.join(parts)}."


def compose_front_figures(source: Tables) -> str:
    """Three figures of the phantom study, with the alt text that their notebooks wrote."""
    blocks = []
    for number, (name, notebook, caption) in enumerate(FRONT_FIGURES, start=1):
        path = find_figure(SHOWN_STUDY, name)
        if path is None:
            blocks.append(note_missing(f"Figure {number}, of {notebook}"))
            continue
        card = path.with_suffix(".json")
        alt = json.loads(card.read_text(encoding="utf-8")).get("alt", caption) if card.exists() else caption
        alt = alt.replace('"', "'").replace("\n", " ")
        blocks.append(f'![{caption} From {link_notebook(notebook)}.](/runs/{SHOWN_STUDY}/figures/{name}.png)'
                      f'{{#fig-{name} fig-alt="{alt}"}}')
    return in_div("\n\n".join(blocks), "figures")


def find_figure(study: str, name: str) -> Path | None:
    """Return the PNG of a figure: of the run, else the published one, else None."""
    for folder in (paths.run_dir(study) / "figures", paths.FIGURES / study):
        if (folder / f"{name}.png").exists():
            return folder / f"{name}.png"
    return None


def compose_headline_numbers(source: Tables) -> str:
    """The arms of the phantom study with their differences, then what the other notebooks found, one row each."""
    parts = [part for part in (table_of_arms(SHOWN_STUDY, source, primary=True), table_of_measures(SHOWN_STUDY, source)) if part]
    return "\n\n".join(parts) or note_missing("The headline numbers")


def table_of_arms(study: str, source: Tables, primary: bool = False) -> str:
    """Return the table of arms: test metrics over seeds, and the differences that `verdict.csv` holds."""
    runs, verdict = source.read(study, "classification.csv"), source.read(study, "verdict.csv")
    if runs is None:
        return ""
    runs = runs[runs["split"] == "test"]
    rows = primary_rows(verdict) if verdict is not None else pd.DataFrame(columns=["arm", "control"])
    if primary and len(rows):
        runs = runs[runs["model"] == rows.iloc[0]["model"]]
    groups = ["model", "arm", *(key for key in ("fraction", "ratio") if _varies(runs, key))]
    columns = {"model": "l", "arm": "l", "fraction": "r", "ratio": "r"}
    columns = {head: side for head, side in columns.items() if head in groups and not (primary and head == "model")}
    measures = {"macro F1": "macro_f1"} | ({} if primary else {"accuracy": "accuracy", "AUROC": "auroc", "ECE": "ece"})
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
            of_model = verdict[(verdict["model"] == named["model"]) & (verdict["metric"] == rows.iloc[0]["metric"])]
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
    """Return what the notebooks other than 05 found, one row each: the measure, its control, the result, where."""
    rows = [row for compose in (_measure_audit, _measure_generator, _measure_clip, _measure_segmentation)
            if (row := compose(study, source))]
    columns = {"asked of": "l", "measure": "l", "control": "l", "result": "l"}
    return in_div(make_table(columns, rows, (14, 26, 28, 28)), "stack") if rows else ""


def _measure_audit(study: str, source: Tables) -> list[str] | None:
    audit = source.read_json(study, "audit.json")
    leaks, views, splits = audit.get("cross_split_leaks"), audit.get("shortcut_scores"), audit.get("split_by_image")
    if not leaks or not views:
        return None
    highest = max(views, key=lambda view: view["balanced_accuracy"])
    gain = max((row["difference"] for row in splits or []), default=float("nan"))
    return [link_notebook("01-data-audit", study, "the data"), "patients, pictures or near-duplicates in two splits",
            f"a split by image would have gained {format_points(gain)} points",
            f"{sum(leaks.values())}; what is left without the disease ({highest['view']}) gives {highest['balanced_accuracy']:.3f} "
            f"balanced accuracy, {highest['verdict']}"]


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
    return [link_notebook("03-generation", study, "the generator"), f"KID, seen by `{overall.iloc[0]['encoder']}`; lower is nearer to real",
            f"{floor}untuned {kid['untuned']:.4f}".replace("-", "−"), f"tuned {kid['lora']:.4f}".replace("-", "−")]


def _measure_clip(study: str, source: Tables) -> list[str] | None:
    runs = source.read(study, "classification.csv")
    if runs is None:
        return None
    scores = runs[(runs["split"] == "test") & runs["model"].isin(["clip-zero-shot", "clip-lora"])].groupby("model")["macro_f1"].mean()
    if len(scores) < 2:
        return None
    return [link_notebook("04-clip-lora", study, "the vision-language model"), "macro F1 on test images",
            f"zero-shot {scores['clip-zero-shot']:.3f}", f"with LoRA {scores['clip-lora']:.3f}"]


def _measure_segmentation(study: str, source: Tables) -> list[str] | None:
    segmentation = source.read(study, "segmentation.csv")
    if segmentation is None:
        return None
    dice = segmentation[segmentation["split"] == "test"].groupby("model")["dice_per_image"].mean().sort_values()
    trained = dice.drop(labels=[name for name in dice.index if name.startswith("mean")])
    baseline = [name for name in dice.index if name.startswith("mean")]
    if trained.empty:
        return None
    return [link_notebook("06-segmentation", study, "the pixels"), "Dice of the lungs, per image",
            f"mean mask {dice[baseline[0]]:.3f}" if baseline else "–", f"`{trained.index[-1]}` {trained.iloc[-1]:.3f}"]


def compose_notebooks(source: Tables) -> str:
    """The notebooks in story order: title and question from each one's own first cell."""
    rows = []
    for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]-*.ipynb")):
        front = read_front_matter(json.loads(path.read_text(encoding="utf-8")))
        rows.append([link_notebook(path.stem, text=front.get("title", path.stem)), front.get("description", "")])
    return make_table({"notebook": "l", "what it asks": "l"}, rows, (30, 60)) if rows else note_missing("The notebooks")


def read_front_matter(notebook: dict) -> dict:
    """Return the YAML front matter in the first cell of a notebook (as read from JSON), {} if there is none."""
    import yaml

    first = "".join(notebook["cells"][0]["source"]) if notebook["cells"] else ""
    found = re.match(r"---\n(.*?)\n---\s*$", first.strip(), flags=re.DOTALL)
    return yaml.safe_load(found[1]) or {} if found else {}


def compose_limits(source: Tables) -> str:
    """What the numbers cannot tell; the first lines are read from the verdict, the rest holds for any run."""
    lines = []
    verdict = source.read(SHOWN_STUDY, "verdict.csv")
    if verdict is not None:
        rows = primary_rows(verdict)
        undecided = rows[rows["verdict"] == "undecided"]
        harmful = rows[rows["verdict"] == "hurts"]
        lines.append(f"**{len(undecided)} of {len(rows)} comparisons could not be decided.** A true difference below "
                     f"{format_points(rows['mde'].median(), signed=False)} points (the median over the comparisons) would probably go unseen.")
        if len(harmful):
            pairs = ", ".join(f"`{row.arm}` against `{row.control}` ({format_points(row.delta)})" for row in harmful.itertuples())
            lines.append(f"**Some arms did harm:** {pairs}.")
    lines += [
        "**Simulated is not real.** The embedded study shows that the method works and what it can see, not what a hospital would find. "
        "For real images there are the studies below, whose test sets differ from their training sets in ways that no split can repair.",
        "**Small models.** Two cores and ten minutes allow a generator of a few million weights at 64 pixels. The full-size models of the five "
        "reports run in the studies `guangzhou`, `lymphoma` and `covid`, which need a GPU.",
        "**One generator, few seeds.** Training seeds and generator seeds both vary, but the generator itself is tuned once per study; how much "
        "a second tuning would differ is not in the intervals.",
        "**Distances are not use.** FID, KID and the like say how similar two sets of images look to an encoder. They are shown beside what the "
        "images were worth, and the two need not agree.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def compose_studies(source: Tables) -> str:
    """Which studies have numbers, and whether they are this machine's or the published ones."""
    if not source.studies:
        return note_missing("Studies with results")
    rows = []
    for study in source.studies:
        here = not source.published and any((paths.run_dir(study) / "tables").glob("*.csv"))
        rows.append([f"[{study}](/results.qmd#{study})", describe_study(study), "run on this machine" if here else "published"])
    return make_table({"study": "l", "data": "l", "numbers": "l"}, rows, (20, 60, 20))


def describe_study(study: str) -> str:
    """Return the one-line description in the study's file ("" if it has none)."""
    import yaml

    path = paths.STUDIES / f"{study}.yaml"
    return str((yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("description", "")) if path.exists() else ""


# -- results ----------------------------------------------------------------------------------------------------------


def compose_results(source: Tables) -> str:
    """The tables of every study, one section each."""
    if not source.studies:
        return note_missing("Results")
    return "\n\n".join(compose_study(study, source) for study in source.studies)


def compose_study(study: str, source: Tables) -> str:
    """One study: what it is, what was compared, what it saw, and its files to download."""
    sections = [("What each training set was worth", table_of_arms), ("What may be claimed", table_of_verdicts),
                ("How good the generated images are", table_of_synthesis), ("At the level of pixels", table_of_segmentation)]
    parts = [f"## {study} {{#{study}}}", describe_study(study), links_of_study(study, source)]
    for title, compose in sections:
        if text := compose(study, source):
            parts.append(f"### {title} {{#{study}-{compose.__name__.removeprefix('table_of_')}}}\n\n{text}")
    return "\n\n".join(part for part in parts if part)


def links_of_study(study: str, source: Tables) -> str:
    """Return links to a study's files, and to the notebook pages that are there."""
    names = [name for name in (*tables.COLUMNS, *tables.JSON_TABLES) if not name.endswith(".parquet") and source.find(study, name)]
    files = ", ".join(f"[{name}](/runs/{study}/tables/{name})" for name in names)
    pages = "" if source.published else ", ".join(
        link_notebook(path.stem, study) for path in sorted((paths.run_dir(study) / "notebooks").glob("*.ipynb")))
    return f"Files: {files}." + (f" Notebooks: {pages}." if pages and study != SHOWN_STUDY else "")


def table_of_verdicts(study: str, source: Tables) -> str:
    """Return the table of comparisons with interval, corrected p, minimum detectable effect and verdict."""
    verdict = source.read(study, "verdict.csv")
    if verdict is None:
        return ""
    delta = "Δ, points (95\u00a0% interval)"
    columns = {"arm": "l", "control": "l", "model": "l", "metric": "l", delta: "r", "p, Holm": "r", "MDE": "r", "seeds": "r",
               "patients": "r", "verdict": "l"}
    rows = [{"arm": show_arm(row.arm), "control": show_arm(row.control), "model": f"`{row.model}`",
             "metric": METRIC_NAMES.get(row.metric, row.metric), delta: format_interval(row), "p, Holm": format_number(row.p_holm),
             "MDE": format_points(row.mde, signed=False), "seeds": format_number(row.n_seeds),
             "patients": format_number(row.n_patients), "verdict": show_verdict(row.verdict)} for row in verdict.itertuples()]
    return make_study_table(columns, rows, f"verdict-{study}", fold=("metric", "model", "seeds", "patients"))


def table_of_synthesis(study: str, source: Tables) -> str:
    """Return the table of distances between generated and real images, with the real-vs-real floor."""
    synthesis = source.read(study, "synthesis.csv")
    if synthesis is None:
        return ""
    columns = {"generator": "l", "encoder": "l", "class": "l", "real": "r", "synthetic": "r", "FID": "r", "KID": "r", "CMMD": "r",
               "precision": "r", "recall": "r", "density": "r", "coverage": "r", "memorised": "r"}
    rows = [{"generator": f"`{row.generator}`", "encoder": f"`{row.encoder}`", "class": row.label, "real": format_number(row.n_real),
             "synthetic": format_number(row.n_synthetic), "FID": format_number(row.fid, 2), "KID": format_number(row.kid, 4),
             "CMMD": format_number(row.cmmd), "precision": format_number(row.precision, 2), "recall": format_number(row.recall, 2),
             "density": format_number(row.density, 2), "coverage": format_number(row.coverage, 2),
             "memorised": format_number(row.memorised_share, 2)} for row in synthesis.itertuples()]
    return make_study_table(columns, rows, f"synthesis-{study}", fold=("encoder", "real", "synthetic"))


def table_of_segmentation(study: str, source: Tables) -> str:
    """Return the table of segmentation: the mean over seeds, per model and training source."""
    segmentation = source.read(study, "segmentation.csv")
    if segmentation is None:
        return ""
    columns = {"model": "l", "trained on": "l", "tested on": "l", "Dice per image": "r", "Dice pooled": "r", "IoU": "r",
               "HD95, px": "r", "parameters": "r", "seeds": "r"}
    groups = segmentation[segmentation["split"] == "test"].groupby(["model", "train_source", "test_source"], sort=False)
    rows = [{"model": f"`{model}`", "trained on": trained, "tested on": tested,
             "Dice per image": format_number(group["dice_per_image"].mean()), "Dice pooled": format_number(group["dice_pooled"].mean()),
             "IoU": format_number(group["iou"].mean()), "HD95, px": format_number(group["hd95"].mean(), 1),
             "parameters": format_number(group["params_total"].iloc[0]), "seeds": str(group["seed"].nunique())}
            for (model, trained, tested), group in groups]
    return make_study_table(columns, rows, f"segmentation-{study}", fold=("trained on", "tested on", "seeds"))


# -- claims and guards ------------------------------------------------------------------------------------------------


def compose_claims_table(source: Tables) -> str:
    """Every claim: what was said, what was found, the verdict, and where to look."""
    claims = source.read_claims()
    if claims is None:
        return note_missing("The claims table")
    columns = {"id": "l", "claim": "l", "as published": "l", "found here": "l", "verdict": "l", "evidence": "l"}
    rows = [[f"[{row.id}]{{#claim-{row.id.replace('.', '-')}}}", escape_markdown(getattr(row, "claim", "")),
             escape_markdown(row.published_value), escape_markdown(row.value), show_verdict(row.verdict),
             link_evidence(row.evidence)] for row in claims.itertuples()]
    return in_div(make_table(columns, rows, (6, 34, 20, 24, 14, 28)), "claims sortable filterable", "claims-table")


def link_evidence(text: str) -> str:
    """Return the evidence with each notebook in it ("07-verdict#caught", "guangzhou-local/05-baselines") turned into a link."""
    names = "|".join(path.stem for path in paths.NOTEBOOKS.glob("[0-9][0-9]-*.ipynb")) or "(?!)"
    parts = re.split(rf"(?<![\w-])((?:[a-z][\w-]*/)?(?:{names})(?:#[\w-]+)?)(?![\w-])", text)
    for place in range(1, len(parts), 2):
        page, _, section = parts[place].partition("#")
        study, _, name = page.rpartition("/")
        shown = page + (f", {section.replace('-', ' ')}" if section else "")
        parts[place] = f"[{shown}](/runs/{study or SHOWN_STUDY}/notebooks/{name}.ipynb{'#' + section if section else ''})"
    return "".join(part if place % 2 else escape_markdown(part) for place, part in enumerate(parts))


def compose_claims_summary(source: Tables) -> str:
    """How many claims of each report got which verdict."""
    claims = source.read_claims()
    if claims is None:
        return note_missing("The summary of the claims")
    report = claims["report"] if "report" in claims.columns else claims["id"].str.split(".").str[0]
    shown = [verdict for verdict in VERDICTS if (claims["verdict"] == verdict).any()]
    columns = {"report": "l", "claims": "r", **{show_verdict(verdict): "r" for verdict in shown}}
    rows = [[REPORTS.get(str(number), str(number)), str(len(group)),
             *(str((group["verdict"] == verdict).sum() or "") for verdict in shown)] for number, group in claims.groupby(report)]
    rows.append(["**all**", f"**{len(claims)}**", *(f"**{(claims['verdict'] == verdict).sum()}**" for verdict in shown)])
    return make_table(columns, rows)


def compose_caught(source: Tables) -> str:
    """Every guard: what it checks (its own first sentence), which claims it would have stopped, which notebooks show it."""
    rows, claims = [], source.read_claims()
    listed = set(claims["id"]) if claims is not None else set()
    for name, guard in inspect.getmembers(guards, inspect.isfunction):
        if name.startswith("check_") and guard.__module__ == guards.__name__:
            stops = ", ".join(f"[{claim}](/claims.qmd#claim-{claim.replace('.', '-')})" if claim in listed else claim
                              for claim in STOPS.get(name, []))
            rows.append([f"`{name}`", summarise(guard), stops or "–", ", ".join(find_uses(name)) or "its test"])
    rows.sort(key=lambda row: (row[2] == "–", row[2]))
    return in_div(make_table({"guard": "l", "what it checks": "l", "would have stopped": "l", "shown in": "l"}, rows, (24, 50, 18, 24)),
                  "stack")


def summarise(guard: Callable) -> str:
    """Return the first sentence of a function's docstring."""
    text = re.sub(r"\s+", " ", inspect.getdoc(guard) or "")
    return re.split(r"(?<=[.;:])\s", text, maxsplit=1)[0].rstrip(";:.").replace("`", "") + "."


def find_uses(name: str) -> list[str]:
    """Return links to the notebooks whose code calls the function `name`, each to the section of its last use."""
    links = []
    for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]-*.ipynb")):
        section = used = None
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                for _, anchor in re.findall(r"^(#+) [^\n{]*(?:\{#([\w-]+)\})?", text, flags=re.MULTILINE):
                    section = f"#{anchor}" if anchor else ""
            elif cell["cell_type"] == "code" and f"{name}(" in text:
                used = section or ""
        if used is not None:
            links.append(f"[{path.stem[:2]}](/runs/{SHOWN_STUDY}/notebooks/{path.name}{used})")
    return links


# -- models -----------------------------------------------------------------------------------------------------------


def compose_model_cards(source: Tables) -> str:
    """The README of each shipped model, its headings one level below those of the page."""
    cards = []
    for path in sorted(paths.FOUNDATIONS.glob("*/README.md")):
        text = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.DOTALL).strip()
        text = re.sub(r"^(#+)(?= )", r"#\1#", text, flags=re.MULTILINE)
        cards.append(text if text.startswith("#") else f"### {path.parent.name}\n\n{text}")
    return "\n\n".join(cards) or "*The model cards stand beside the weights, in `data/foundations/`.*"


FRAGMENTS: dict[str, Callable[[Tables], str]] = {
    "answer": compose_answer,
    "front-figures": compose_front_figures,
    "headline-numbers": compose_headline_numbers,
    "notebooks": compose_notebooks,
    "limits": compose_limits,
    "studies": compose_studies,
    "results": compose_results,
    "claims-table": compose_claims_table,
    "claims-summary": compose_claims_summary,
    "caught": compose_caught,
    "model-cards": compose_model_cards,
}
