"""The pieces of text made from the tables: worded by rule, quoting the tables, and calm when a table is
missing.
"""

import inspect
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from medaug import guards, markdown, paths, report, results, wording

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob("*.qmd"))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """An empty project: the paths of the package point into a temporary folder."""
    for name, folder in {
        "ROOT": ".",
        "RUNS": "runs",
        "RESULTS": "data/results",
        "FIGURES": "figures",
        "NOTEBOOKS": "notebooks",
        "STUDIES": "studies",
        "FOUNDATIONS": "data/foundations",
    }.items():
        monkeypatch.setattr(paths, name, tmp_path / folder)
    return tmp_path


def make_verdict(
    against_real: str = "helps", against_duplicates: str = "undecided", delta: float = 0.0123
) -> pd.DataFrame:
    shared = {
        "arm": "real+synthetic",
        "model": "small-cnn",
        "metric": "macro_f1",
        "p": 0.01,
        "p_holm": 0.02,
        "n_seeds": 5,
        "n_patients": 480,
        "mde": 0.017,
        "primary": True,
    }
    rows = [
        {
            **shared,
            "control": control,
            "delta": delta,
            "ci_low": delta - 0.01,
            "ci_high": delta + 0.01,
            "verdict": verdict,
        }
        for control, verdict in (("real", against_real), ("real+duplicates", against_duplicates))
    ]
    other = {**rows[0], "model": "mobilenetv2-frozen", "delta": 0.5, "primary": False}
    return pd.DataFrame([other, *rows])


def make_classification() -> pd.DataFrame:
    rows = [
        {
            "arm": arm,
            "model": "small-cnn",
            "seed": seed,
            "fraction": 1.0,
            "ratio": 0.0,
            "split": split,
            "macro_f1": score,
            "accuracy": 0.9,
            "auroc": 0.95,
            "ece": 0.05,
        }
        for arm, base in (("real", 0.7), ("real+synthetic", 0.8))
        for seed in range(2)
        for split, score in (("val", 0.1), ("test", base + 0.02 * seed))
    ]
    return pd.DataFrame(rows)


def save(folder: Path, **frames: pd.DataFrame) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        frame.to_csv(folder / f"{name}.csv", index=False)


def test_every_fragment_is_written_even_from_nothing(project):
    written = report.write_fragments()
    assert [path.stem for path in written] == list(report.FRAGMENTS)
    assert "make report" in (project / "runs/report/answer.md").read_text(encoding="utf-8")
    assert "make report" in (project / "runs/report/results.md").read_text(encoding="utf-8")


def test_the_answer_quotes_the_primary_model_only(project):
    save(project / "runs/phantom/tables", verdict=make_verdict())
    text = report.compose_answer(results.Tables(studies=("phantom",)))
    assert "**+1.2 points** of macro F1" in text and "(95\u00a0% interval +0.2 to +2.2)" in text
    assert "480 test patients" in text and "are 1.7 and 1.7 points" in text
    assert "50" not in re.sub(r"\d\d\d", "", text)  # the other model's 0.5


@pytest.mark.parametrize(
    "against_real, against_duplicates, words",
    [
        ("helps", "helps", "more than copies of real images do"),
        ("helps", "undecided", "not measurably more than copies"),
        ("helps", "no difference within ±0.02", "not measurably more than copies"),
        ("undecided", "helps", "did better than copies"),
        ("undecided", "undecided", "could not be decided"),
        ("no difference within ±0.02", "undecided", "no difference that matters"),
        ("hurts", "undecided", "the generated images hurt"),
        ("undecided", "hurts", "the generated images hurt"),
        ("helps", "hurts", "it depends on the control"),
    ],
)
def test_the_headline_follows_the_verdicts(against_real, against_duplicates, words):
    rows = make_verdict(against_real, against_duplicates)
    primary = results.primary_rows(rows)
    against = {
        control: results.pick_row(primary, "real+synthetic", control)
        for control in ("real", "real+duplicates")
    }
    assert words in wording.headline(against)


@pytest.mark.parametrize(
    "verdict, delta, words",
    [
        ("helps", 0.02, "they helped"),
        ("hurts", -0.02, "they hurt"),
        ("no difference within ±0.02", 0.003, "at most 1.3 points either way"),
        ("undecided", 0.004, "a gain, if there is one, is at most +1.4 points"),
        ("undecided", -0.03, "a gain is not in sight"),
    ],
)
def test_one_comparison_is_worded_by_its_verdict(verdict, delta, words):
    row = make_verdict(verdict, delta=delta).iloc[1]
    assert words in wording.describe(row, "real alone")


def test_the_other_models_and_splits_stay_out_of_the_headline_table(project):
    save(project / "runs/phantom/tables", verdict=make_verdict(), classification=make_classification())
    table = results.table_of_arms("phantom", results.Tables(), primary=True)
    lines = [line for line in table.splitlines() if "real+synthetic" in line]
    assert (
        len(lines) == 1
        and "| 0.810 | 0.014 | 2 |" in lines[0]
        and "+1.2\u00a0(+0.2\u00a0to\u00a0+2.2)" in lines[0]
    )


def test_runs_on_fewer_patients_and_at_other_ratios_stay_out_of_the_headline_table(project):
    runs = make_classification().assign(ratio=lambda f: f["arm"].map({"real": 0.0, "real+synthetic": 0.5}))
    fewer = runs.assign(fraction=0.25, macro_f1=0.2)
    other = runs[runs["arm"] == "real+synthetic"].assign(ratio=1.0, macro_f1=0.3)
    verdict = make_verdict().assign(ratio=0.5)
    tables = []
    for classification in (runs, pd.concat([runs, fewer, other])):
        save(project / "runs/phantom/tables", verdict=verdict, classification=classification)
        tables.append(results.table_of_arms("phantom", results.Tables(), primary=True))
    assert tables[0] == tables[1]
    assert "0.25" in results.table_of_arms("phantom", results.Tables())  # the table of all runs shows them


def test_folds_are_averaged_before_seeds_are_compared(project):
    runs = pd.concat([make_classification().assign(fold=fold, generator_seed=-1,
                                                   macro_f1=lambda f, fold=fold: f["macro_f1"] + 0.1 * fold) for fold in (0, 1)])
    save(project / "runs/phantom/tables", verdict=make_verdict(), classification=runs)
    table = results.table_of_arms("phantom", results.Tables(), primary=True)
    assert "| 0.860 | 0.014 | 2 |" in table  # 0.81 and 0.91, and the seeds' spread without the folds'


def test_a_runs_table_goes_before_a_published_one(project):
    save(project / "runs/phantom/tables", verdict=make_verdict(delta=0.05))
    save(project / "data/results/phantom", verdict=make_verdict(delta=0.01))
    for published, words in ((False, "+5.0 points"), (True, "+1.0 points")):
        folder = project / ("data/results/report" if published else "runs/report")
        report.write_fragments(published=published)
        assert words in (folder / "answer.md").read_text(encoding="utf-8")


def test_studies_stand_in_order_and_a_table_of_one_does_not_need_the_others(project):
    save(project / "data/results/zebra", verdict=make_verdict())
    save(project / "data/results/guangzhou-local", verdict=make_verdict())
    save(project / "runs/phantom/tables", classification=make_classification())
    assert results.find_studies() == ["phantom", "guangzhou-local", "zebra"]
    text = report.compose_results(results.Tables(studies=("phantom", "guangzhou-local", "zebra")))
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## phantom {#phantom}",
        "## guangzhou-local {#guangzhou-local}",
        "## zebra {#zebra}",
    ]


def test_generator_seeds_are_averaged_and_a_missing_measure_is_a_dash(project):
    row = {
        "generator": "lora",
        "encoder": "e",
        "label": "all",
        "n_real": 400,
        "n_synthetic": 300,
        "fid": 2.0,
        "cmmd": None,
    }
    row |= dict.fromkeys(["precision", "recall", "density", "coverage", "memorised_share"], 0.5)
    frame = pd.DataFrame(
        [{**row, "generator_seed": seed, "kid": kid} for seed, kid in ((0, 0.01), (1, 0.03))]
    )
    save(project / "runs/phantom/tables", synthesis=pd.concat([frame, frame.assign(generator="untuned")]))
    table = results.table_of_synthesis("phantom", results.Tables())
    assert table.startswith("The same in all rows: encoder `e`, real 400, synthetic 300, seeds 2.")
    assert "| `lora` | all | 0.0200 | 0.50 | 0.50 | 0.50 | 2 | – |" in table and "class recovered" not in table


def test_many_generators_are_told_for_all_classes_together_and_with_their_judges(project):
    rows = [{"generator": f"g{number}", "encoder": "e", "label": label, "generator_seed": 0, "class_recovery": 0.5 + number / 100}
            for number in range(results.MANY_GENERATORS + 1) for label in ("viral", "all")]  # fmt: skip
    measured = ["n_real", "n_synthetic", "fid", "kid", "cmmd", "precision", "recall", "density", "coverage", "memorised_share"]
    frame = pd.DataFrame(rows).assign(**dict.fromkeys(measured, 0.25))
    save(project / "runs/phantom/tables", synthesis=frame)
    table = results.table_of_synthesis("phantom", results.Tables())
    assert table.startswith("All classes together; each class apart is in `data/results/phantom/synthesis.csv`.")
    assert "viral" not in table and table.count("| `g") == 13 and "second judge" not in table and "| 0.62 |" in table
    save(project / "runs/phantom/tables", synthesis=frame[frame["generator"] != "g12"])
    few = results.table_of_synthesis("phantom", results.Tables())
    assert few.count("| `g") == 24 and "viral" in few


def test_columns_with_one_value_become_a_sentence():
    rows = [{"a": "1", "b": "x"}, {"a": "2", "b": "x"}]
    text = wording.make_study_table({"a": "r", "b": "l"}, rows, "t", fold=("b",))
    assert text.startswith("The same in all rows: b x.") and "| a |" in text


def test_figures_keep_the_alt_text_that_their_notebook_wrote(project):
    folder = project / "runs/phantom/figures"
    folder.mkdir(parents=True)
    (folder / "verdict-forest.png").write_bytes(b"png")
    (folder / "verdict-forest.json").write_text(
        json.dumps({"alt": 'Five arms, "oracle" on top.'}), encoding="utf-8"
    )
    text = report.compose_front_figures(results.Tables())
    assert "fig-alt=\"Five arms, 'oracle' on top.\"" in text and "make report" in text


def test_claims_are_shown_as_written_with_links_to_their_evidence(project):
    (project / "notebooks").mkdir()
    (project / "notebooks/07-verdict.ipynb").write_text('{"cells": []}', encoding="utf-8")
    claim = "LoRA r=4 *a*=16 [d] on `x_y` <b> | cites @key for $5"
    save(
        project / "data/results",
        claims=pd.DataFrame(
            [
                {
                    "id": "0.09",
                    "verdict": "refuted",
                    "evidence": "07-verdict#caught",
                    "value": "16 modules",
                    "published_value": "128",
                    "report": "0",
                    "claim": claim,
                }
            ]
        ),
    )
    text = report.compose_claims_table(results.Tables())
    assert "[07-verdict, caught](/runs/phantom/notebooks/07-verdict.ipynb#caught)" in text
    page = markdown.Converter("claims.qmd", {}, set())
    shown = re.sub(r"<[^>]+>", "", page.convert(text).replace("<b>", "&lt;b&gt;"))
    assert claim.replace("<b>", "&lt;b&gt;") in shown or claim in shown
    assert 'class="badge-verdict refuted"' in page.convert(text)
    assert "| **all** | **1** |" in report.compose_claims_summary(results.Tables())


@pytest.mark.parametrize(
    "evidence, link",
    [
        ("07-verdict#caught", "[07-verdict, caught](/runs/phantom/notebooks/07-verdict.ipynb#caught)"),
        (
            "lymphoma-local/07-verdict",
            "[lymphoma-local/07-verdict](/runs/lymphoma-local/notebooks/07-verdict.ipynb)",
        ),
        (
            "see 07-verdict of study guangzhou: a_b",
            "see [07-verdict of study guangzhou](/runs/guangzhou/notebooks/07-verdict.ipynb): a\\_b",
        ),
        ("17-verdict-2 is no notebook", "17-verdict-2 is no notebook"),
    ],
)
def test_evidence_becomes_links(project, evidence, link):
    (project / "notebooks").mkdir()
    (project / "notebooks/07-verdict.ipynb").write_text('{"cells": []}', encoding="utf-8")
    assert report.link_evidence(evidence) == link


def test_every_guard_is_listed_and_stops_claims_that_exist():
    checks = {
        name for name, function in inspect.getmembers(guards, inspect.isfunction) if name.startswith("check_")
    }
    assert set(report.STOPS) <= checks
    text = report.compose_caught(results.Tables())
    assert all(f"`{name}`" in text for name in checks)
    known = set(pd.read_csv(ROOT / "data" / "claims.csv", dtype=str)["id"])
    assert {claim for claims in report.STOPS.values() for claim in claims} <= known


def test_pages_use_known_fragments_and_every_fragment_is_used():
    used = {name for path in PAGES for name in markdown.FRAGMENT.findall(path.read_text(encoding="utf-8"))}
    assert used == set(report.FRAGMENTS)


@pytest.mark.parametrize(
    "value, text", [(0.0123, "+1.2"), (-0.0004, "0.0"), (-0.02, "−2.0"), (float("nan"), "–")]
)
def test_points(value, text):
    assert wording.format_points(value) == text


def test_masks_of_other_sources_stay_out_of_the_headline(project):
    home = {"model": "unet", "train_source": "lungs", "test_source": "lungs", "split": "test", "dice_per_image": 0.95}
    rows = [{**home, "model": "mean-mask", "dice_per_image": 0.7}, home, {**home, "train_source": "phantom", "dice_per_image": 0.1},
            {**home, "test_source": "phantom", "dice_per_image": 0.2}, {**home, "train_source": "lungs:10", "dice_per_image": 0.3}]
    save(project / "data/results/phantom", segmentation=pd.DataFrame(rows))
    row = results._measure_segmentation("phantom", results.Tables())
    assert row[-2:] == ["mean mask 0.700", "`unet` 0.950"]
