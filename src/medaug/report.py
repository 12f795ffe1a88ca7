"""The pieces of text of the website that hold numbers: Markdown, made from the results tables, by rule.

A page says `{{< fragment NAME >}}`; here is what each NAME says. Every function takes `Tables` (which tables
to read) and returns Markdown. A missing table never stops the others: its fragment says what to run. Links
that begin with `/` are relative to the project; where a run's file is missing, the site shows the published
one (see `_extensions/medaug`).
"""

import inspect
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from medaug import guards, paths, tables
from medaug.results import (
    Tables,
    find_studies,
    pick_row,
    primary_rows,
    table_of_arms,
    table_of_measures,
    table_of_segmentation,
    table_of_synthesis,
    table_of_verdicts,
)
from medaug.runtime import replace_when_done
from medaug.wording import (
    BASELINE,
    BOUND,
    CONTROL,
    METRIC_NAMES,
    QUESTION_ARM,
    SHOWN_STUDY,
    describe,
    escape_markdown,
    format_interval,
    format_points,
    headline,
    in_div,
    in_points,
    link_notebook,
    make_table,
    note_missing,
    show_verdict,
)

VERDICTS = ("reproduced", "refuted", "corrected", "answered", "not testable here")
REPORTS = {
    "0": "0 and 1: pneumonia, Stable Diffusion and CLIP",
    "2": "2: lymphoma, three ways to augment",
    "3": "3: pneumonia, baselines",
    "4": "4: COVID radiography, segmentation",
}
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
    (
        "verdict-forest",
        "07-verdict",
        "What each training set was worth, against the real images alone and against as many duplicates. "
        "A dot is the mean difference, a line its 95\u00a0% interval; where the line crosses zero, the sign "
        "is not settled.",
    ),
    (
        "prompt-grid",
        "02-sd-lora",
        "The same prompts and the same noise, before and after LoRA. What changes is what the generator "
        "learned; all images are simulated.",
    ),
    (
        "fidelity-floor",
        "03-generation",
        "How far generated images are from real ones, beside the floor that two sets of real images have "
        "between them. Only the distance above the floor counts.",
    ),
]


def write_fragments(studies: Iterable[str] | None = None, published: bool = False) -> list[Path]:
    """Write every fragment as Markdown to `runs/report/`; return the files.

    `studies` are the names to show (default: all that have tables). With `published`, only published tables
    are read and the fragments go to `data/results/report/`, the copy that a fresh clone shows.
    """
    source = Tables(published, tuple(studies) if studies is not None else tuple(find_studies(published)))
    folder = (paths.RESULTS if published else paths.RUNS) / "report"
    written = []
    for name, compose in FRAGMENTS.items():
        with replace_when_done(folder / f"{name}.md") as temporary:
            temporary.write_text(compose(source).rstrip() + "\n", encoding="utf-8")
        written.append(folder / f"{name}.md")
    return written


# -- the front page ---------------------------------------------------------------------------------------


def compose_answer(source: Tables) -> str:
    """The answer of the embedded study, then one line for each other study that has a verdict."""
    verdict = source.read(SHOWN_STUDY, "verdict.csv")
    if verdict is None:
        answer = note_missing("The answer")
    else:
        answer = answer_study(verdict)
    others = [
        line
        for line in (answer_briefly(study, source) for study in source.studies if study != SHOWN_STUDY)
        if line
    ]
    blocks = [in_div(answer, "answer")]
    if others:
        blocks.append(
            "The other studies, each with its own endpoint:\n\n" + "\n".join(f"- {line}" for line in others)
        )
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
    smallest = " and ".join(format_points(row.mde, signed=False) for row in found.values())
    bound = pick_row(rows, BOUND, BASELINE)
    scope = (
        f"{int(any_row.n_seeds)} training seeds, {int(any_row.n_patients)} test patients, model "
        f"`{any_row.model}`; the smallest differences that these comparisons could have been expected "
        f"to see are {smallest} points."
    )
    if bound is not None:
        scope += (
            f" Extra images from the true distribution, the most that any generator could give, brought "
            f"{format_interval(bound)} points."
        )
    return (
        f"**In the embedded study, on simulated radiographs: {headline(against)}**\n\n"
        + " ".join(sentences)
        + "\n\n"
        + in_div(
            f"{scope} All of it is computed in {link_notebook('07-verdict', text='the verdict')}.", "because"
        )
    )


def answer_briefly(study: str, source: Tables) -> str:
    """Return one line for a further study, its two comparisons with verdict ("" if it has none)."""
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
        blocks.append(
            f"![{caption} From {link_notebook(notebook)}.](/runs/{SHOWN_STUDY}/figures/{name}.png)"
            f'{{#fig-{name} fig-alt="{alt}"}}'
        )
    return in_div("\n\n".join(blocks), "figures")


def find_figure(study: str, name: str) -> Path | None:
    """Return the PNG of a figure: of the run, else the published one, else None."""
    for folder in (paths.run_dir(study) / "figures", paths.FIGURES / study):
        if (folder / f"{name}.png").exists():
            return folder / f"{name}.png"
    return None


def compose_headline_numbers(source: Tables) -> str:
    """The arms of the phantom study with their differences, then what the other notebooks found, one row
    each.
    """
    parts = [
        part
        for part in (table_of_arms(SHOWN_STUDY, source, primary=True), table_of_measures(SHOWN_STUDY, source))
        if part
    ]
    return "\n\n".join(parts) or note_missing("The headline numbers")


def compose_notebooks(source: Tables) -> str:
    """The notebooks in story order: title and question from each one's own first cell."""
    rows = []
    for path in sorted(paths.NOTEBOOKS.glob("[0-9][0-9]-*.ipynb")):
        front = read_front_matter(json.loads(path.read_text(encoding="utf-8")))
        study = "foundations" if path.stem.startswith("00") else SHOWN_STUDY
        rows.append(
            [link_notebook(path.stem, study, front.get("title", path.stem)), front.get("description", "")]
        )
    return (
        make_table({"notebook": "l", "what it asks": "l"}, rows, (30, 60))
        if rows
        else note_missing("The notebooks")
    )


def read_front_matter(notebook: dict) -> dict:
    """Return the YAML front matter in a notebook's first cell ({} if there is none)."""
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
        lines.append(
            f"**{len(undecided)} of {len(rows)} comparisons could not be decided.** A true difference below "
            f"{format_points(rows['mde'].median(), signed=False)} points (the median over the comparisons) "
            "would probably go unseen."
        )
        if len(harmful):
            pairs = ", ".join(
                f"`{row.arm}` against `{row.control}` ({format_points(row.delta)})"
                for row in harmful.itertuples()
            )
            lines.append(f"**Some arms did harm:** {pairs}.")
    lines += [
        "**Simulated is not real.** The embedded study shows that the method works and what it can see, not "
        "what a hospital would find. For real images there are the studies below, whose test sets differ "
        "from their training sets in ways that no split can repair.",
        "**Small models.** Two cores and ten minutes allow a generator of a few million weights at 64 "
        "pixels. The full-size models of the five reports run in the studies `guangzhou`, `lymphoma` and `covid`, "
        "which need a GPU.",
        "**One generator, few seeds.** Training seeds and generator seeds both vary, but the generator "
        "itself is tuned once per study; how much a second tuning would differ is not in the intervals.",
        "**Another processor is another draw.** On one machine two runs give the same bytes. On another, sums round "
        "differently in the last digit, and training makes of that what another seed would make: a comparison near "
        "its limit may be decided on one machine and not on the other. The interval is what holds for both.",
        "**Distances are not use.** FID, KID and the like say how similar two sets of images look to an "
        "encoder. They are shown beside what the images were worth, and the two need not agree.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def compose_studies(source: Tables) -> str:
    """Which studies have numbers, and whether they are this machine's or the published ones."""
    if not source.studies:
        return note_missing("Studies with results")
    rows = []
    for study in source.studies:
        here = not source.published and any((paths.run_dir(study) / "tables").glob("*.csv"))
        rows.append(
            [
                f"[{study}](/results.qmd#{study})",
                describe_study(study),
                "run on this machine" if here else "published",
            ]
        )
    return make_table({"study": "l", "data": "l", "numbers": "l"}, rows, (20, 60, 20))


def describe_study(study: str) -> str:
    """Return the one-line description in the study's file ("" if it has none)."""
    import yaml

    path = paths.STUDIES / f"{study}.yaml"
    return (
        str((yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("description", ""))
        if path.exists()
        else ""
    )


# -- results ----------------------------------------------------------------------------------------------


def compose_results(source: Tables) -> str:
    """The tables of every study, one section each."""
    if not source.studies:
        return note_missing("Results")
    return "\n\n".join(compose_study(study, source) for study in source.studies)


def compose_study(study: str, source: Tables) -> str:
    """One study: what it is, what was compared, what it saw, and its files to download."""
    sections = [
        ("What each training set was worth", table_of_arms),
        ("What may be claimed", table_of_verdicts),
        ("How good the generated images are", table_of_synthesis),
        ("At the level of pixels", table_of_segmentation),
    ]
    parts = [f"## {study} {{#{study}}}", describe_study(study), links_of_study(study, source)]
    for title, compose in sections:
        if text := compose(study, source):
            parts.append(f"### {title} {{#{study}-{compose.__name__.removeprefix('table_of_')}}}\n\n{text}")
    return "\n\n".join(part for part in parts if part)


def links_of_study(study: str, source: Tables) -> str:
    """Return links to a study's files, and to the notebook pages that are there."""
    names = [
        name
        for name in (*tables.COLUMNS, *tables.JSON_TABLES)
        if not name.endswith(".parquet") and source.find(study, name)
    ]
    files = ", ".join(f"[{name}](/runs/{study}/tables/{name})" for name in names)
    pages = (
        ""
        if source.published
        else ", ".join(
            link_notebook(path.stem, study)
            for path in sorted((paths.run_dir(study) / "notebooks").glob("*.ipynb"))
        )
    )
    return f"Files: {files}." + (f" Notebooks: {pages}." if pages and study != SHOWN_STUDY else "")


# -- claims and guards ------------------------------------------------------------------------------------


def compose_claims_table(source: Tables) -> str:
    """Every claim: what was said, what was found, the verdict, and where to look."""
    claims = source.read_claims()
    if claims is None:
        return note_missing("The claims table")
    columns = {
        "id": "l",
        "claim": "l",
        "as published": "l",
        "found here": "l",
        "verdict": "l",
        "evidence": "l",
    }
    rows = [
        [
            f"[{row.id}]{{#claim-{row.id.replace('.', '-')}}}",
            escape_markdown(getattr(row, "claim", "")),
            escape_markdown(row.published_value),
            escape_markdown(row.value),
            show_verdict(row.verdict),
            link_evidence(row.evidence),
        ]
        for row in claims.itertuples()
    ]
    return in_div(
        make_table(columns, rows, (6, 34, 20, 24, 14, 28)), "claims sortable filterable", "claims-table"
    )


def link_evidence(text: str) -> str:
    """Return the evidence with each notebook in it ("07-verdict#caught", "guangzhou-local/05-baselines")
    turned into a link.
    """
    names = "|".join(path.stem for path in paths.NOTEBOOKS.glob("[0-9][0-9]-*.ipynb")) or "(?!)"
    page = (
        rf"(?:(?P<study>[a-z][\w-]*)/)?(?P<name>{names})(?:#(?P<section>[\w-]+))?"
        r"(?: of study (?P<of>[a-z][\w-]*))?"
    )
    shown, end = [], 0
    for match in re.finditer(rf"(?<![\w/-]){page}(?![\w-])", text):
        section = match["section"]
        words = match[0].replace(f"#{section}", f", {section.replace('-', ' ')}") if section else match[0]
        target = f"/runs/{match['of'] or match['study'] or SHOWN_STUDY}/notebooks/{match['name']}.ipynb"
        shown += [
            escape_markdown(text[end : match.start()]),
            f"[{words}]({target}{'#' + section if section else ''})",
        ]
        end = match.end()
    return "".join(shown) + escape_markdown(text[end:])


def compose_claims_summary(source: Tables) -> str:
    """How many claims of each report got which verdict."""
    claims = source.read_claims()
    if claims is None:
        return note_missing("The summary of the claims")
    report = claims["report"] if "report" in claims.columns else claims["id"].str.split(".").str[0]
    shown = [verdict for verdict in VERDICTS if (claims["verdict"] == verdict).any()]
    columns = {"report": "l", "claims": "r", **{show_verdict(verdict): "r" for verdict in shown}}
    rows = [
        [
            REPORTS.get(str(number), str(number)),
            str(len(group)),
            *(str((group["verdict"] == verdict).sum() or "") for verdict in shown),
        ]
        for number, group in claims.groupby(report)
    ]
    rows.append(
        [
            "**all**",
            f"**{len(claims)}**",
            *(f"**{(claims['verdict'] == verdict).sum()}**" for verdict in shown),
        ]
    )
    return make_table(columns, rows)


def compose_caught(source: Tables) -> str:
    """Every guard: what it checks (its own first sentence), which claims it would have stopped, which
    notebooks show it.
    """
    rows, claims = [], source.read_claims()
    listed = set(claims["id"]) if claims is not None else set()
    for name, guard in inspect.getmembers(guards, inspect.isfunction):
        if name.startswith("check_") and guard.__module__ == guards.__name__:
            stops = ", ".join(
                f"[{claim}](/claims.qmd#claim-{claim.replace('.', '-')})" if claim in listed else claim
                for claim in STOPS.get(name, [])
            )
            rows.append(
                [f"`{name}`", summarise(guard), stops or "–", ", ".join(find_uses(name)) or "its test"]
            )
    rows.sort(key=lambda row: (row[2] == "–", row[2]))
    return in_div(
        make_table(
            {"guard": "l", "what it checks": "l", "would have stopped": "l", "shown in": "l"},
            rows,
            (24, 50, 18, 24),
        ),
        "stack",
    )


def summarise(guard: Callable) -> str:
    """Return the first sentence of a function's docstring."""
    text = re.sub(r"\s+", " ", inspect.getdoc(guard) or "")
    return re.split(r"(?<=[.;:])\s", text, maxsplit=1)[0].rstrip(";:.").replace("`", "") + "."


def find_uses(name: str) -> list[str]:
    """Return links to the notebooks whose code calls the function `name`, each to the section of its last
    use.
    """
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


# -- models -----------------------------------------------------------------------------------------------


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
