"""How results are put into words: numbers, intervals, verdicts and arms as Markdown, by one rule."""

import math
import re
from collections.abc import Iterable

import pandas as pd

from medaug.plots import ARM_COLOURS

QUESTION_ARM, BASELINE, CONTROL, BOUND = "real+synthetic", "real", "real+duplicates", "oracle"
SHOWN_STUDY = "phantom"  # the only study whose pictures may be shown: its images are simulated
METRIC_NAMES = {
    "macro_f1": "macro F1",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "ece": "ECE",
    "brier": "Brier score",
}


def format_points(value: float, signed: bool = True) -> str:
    """Return a difference of 0-1 metrics in points of a hundred: "+1.2", with a true minus sign."""
    if not math.isfinite(value):
        return "–"
    text = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return text.replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def format_number(value: float, digits: int = 3) -> str:
    """Return a number with `digits` decimals, a whole one with thin spaces, "–" for none."""
    if value is None or pd.isna(value):
        return "–"
    if float(value).is_integer() and abs(value) >= 1:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.{digits}f}".replace("-", "−")


def format_interval(row) -> str:
    """Return "+1.2 (−0.3 to +2.7)" of a row, with spaces that do not break."""
    return (
        f"{format_points(row.delta)} ({format_points(row.ci_low)} to {format_points(row.ci_high)})".replace(
            " ", "\u00a0"
        )
    )


def describe(row, against: str) -> str:
    """Return one comparison as a sentence, worded by its verdict."""
    verdict, metric = row.verdict, METRIC_NAMES.get(row.metric, row.metric)
    interval = f"95\u00a0% interval {format_points(row.ci_low)} to {format_points(row.ci_high)}"
    size = f"**{format_points(row.delta)} points** of {metric} ({interval})"
    if verdict == "helps":
        return f"Against {against}, they helped: {size}."
    if verdict == "hurts":
        return f"Against {against}, they hurt: {size}."
    if verdict.startswith("no difference"):
        margin = max(abs(row.ci_low), abs(row.ci_high))
        most = f"at most {format_points(margin, signed=False)} points either way"
        return f"Against {against}, they made no difference that matters, {most}: {size}."
    best = (
        f"a gain, if there is one, is at most {format_points(row.ci_high)} points"
        if row.ci_high > 0
        else "a gain is not in sight"
    )
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
    """Return a Markdown table; `columns` maps heads to "l", "r" or "c"; `widths` are relative (for wide
    tables).
    """
    marks = {"l": (":", ""), "r": ("", ":"), "c": (":", ":")}
    dashes = list(widths) or [8] * len(columns)
    rule = "|".join(
        left + "-" * width + right
        for (left, right), width in zip((marks[a] for a in columns.values()), dashes, strict=True)
    )
    lines = ["| " + " | ".join(columns) + " |", f"|{rule}|"]
    for row in rows:
        cells = (re.sub(r"[ \t\n]+", " ", str(cell)).replace("|", "\\|") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_study_table(
    columns: dict[str, str], rows: list[dict[str, str]], identity: str, fold: Iterable[str] = ()
) -> str:
    """Return a sortable table of `rows` ({head: cell}); a column in `fold` with one value throughout becomes
    a sentence.
    """
    if not rows:
        return ""
    same = {head: rows[0][head] for head in fold if len(rows) > 1 and len({row[head] for row in rows}) == 1}
    columns = {head: side for head, side in columns.items() if head not in same}
    table = in_div(
        make_table(columns, ([row[head] for head in columns] for row in rows)), "sortable", identity
    )
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


def headline(against: dict) -> str:
    """Return the answer in one clause, by rule, from the verdicts against the baseline and against the
    control.
    """
    kind = {control: _kind(row.verdict) if row is not None else "unknown" for control, row in against.items()}
    baseline, control = kind[BASELINE], kind[CONTROL]
    if baseline == control == "helps":
        return "yes, the generated images helped, and by more than copies of real images do."
    if baseline == "helps" and control in ("undecided", "same"):
        return (
            "the generated images helped against real images alone, but not measurably more than copies do."
        )
    if "hurts" in (baseline, control) and "helps" not in (baseline, control):
        return "no, the generated images hurt."
    if baseline == "same" and control in ("same", "undecided", "unknown"):
        return "no, the generated images made no difference that matters."
    if control == "helps":
        return (
            "the generated images did better than copies; against real images alone it could not be decided."
        )
    if "helps" in (baseline, control):
        return "it depends on the control: they helped against one and hurt against the other."
    return "it could not be decided whether the generated images helped."


def _kind(verdict: str) -> str:
    return "same" if verdict.startswith("no difference") else verdict
