"""The website: what its configuration names exists, both renderers show the same, and no link is dead."""

import os
import re
import shutil
import stat
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup

from medaug import markdown, paths, report, site

ROOT = Path(__file__).resolve().parents[1]
CONFIG = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
PAGES = sorted(path.name for path in ROOT.glob("*.qmd"))
SOURCES = ["_quarto.yml", "_quarto-pdf.yml", "references.bib", *PAGES, "assets", "_extensions"]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project without runs: the site's sources, copied; the paths of the package point to it."""
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
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


def make_notebook(title: str = "5 · Does it help?"):
    """A small notebook as papermill leaves it: executed, with text, an image, a table and Markdown."""
    v4 = nbformat.v4
    image = v4.new_output("display_data", {"image/png": PNG, "text/plain": "<Figure size 1x1>"})
    table = v4.new_output(
        "execute_result",
        {
            "text/html": "<table><tr><th>a</th></tr><tr><td>1</td></tr></table>",
            "text/plain": "   a",
        },
        execution_count=4,
    )
    cells = [
        v4.new_raw_cell(f'---\ntitle: "{title}"\ndescription: "One sentence."\n---'),
        v4.new_markdown_cell(
            "**The question** [@pink2026]; see @fig-dot, @tbl-a and @sec-look, then "
            "[the verdict](07-verdict.ipynb).\n\n## A look {#sec-look}\n\n$x_1^2$"
        ),
        v4.new_code_cell('study = "phantom"', metadata={"tags": ["parameters"]}, execution_count=1),
        v4.new_code_cell(
            "print('seen')",
            execution_count=2,
            outputs=[
                v4.new_output("stream", name="stdout", text="seen\n"),
                v4.new_output("stream", name="stderr", text="noise\n"),
            ],
        ),
        v4.new_code_cell(
            '#| label: fig-dot\n#| fig-cap: "A dot, simulated [@hu2021]."\n#| fig-alt: "One dot."\nplot()',
            execution_count=3,
            outputs=[image],
        ),
        v4.new_code_cell(
            '#| label: tbl-a\n#| tbl-cap: "A table."\nframe', execution_count=4, outputs=[table]
        ),
        v4.new_code_cell("secret = 1", metadata={"tags": ["remove-cell"]}, execution_count=5),
        v4.new_code_cell(
            "Markdown('...')",
            execution_count=6,
            outputs=[
                v4.new_output(
                    "execute_result",
                    {"text/markdown": "The best is **0.81**.", "text/plain": "<Markdown>"},
                    execution_count=6,
                )
            ],
        ),
        v4.new_code_cell(
            "axis.plot()",
            execution_count=7,
            outputs=[
                v4.new_output(
                    "execute_result", {"text/plain": "[<matplotlib.lines.Line2D at 0x1>]"}, execution_count=7
                )
            ],
        ),
    ]
    return v4.new_notebook(cells=cells)


@pytest.fixture
def full_project(project) -> Path:
    """The same with two executed notebooks, one published table and one published figure."""
    folder = project / "runs/phantom/notebooks"
    folder.mkdir(parents=True)
    nbformat.write(make_notebook(), folder / "05-baselines.ipynb")
    nbformat.write(make_notebook("7 · What may be claimed?"), folder / "07-verdict.ipynb")
    (project / "data/results/phantom").mkdir(parents=True)
    (project / "data/results/phantom/verdict.csv").write_text(
        "arm,control,model,metric,delta,ci_low,ci_high,p,p_holm,n_seeds,n_patients,mde,verdict\n"
        "real+synthetic,real,small-cnn,macro_f1,0.01,-0.01,0.03,0.2,0.2,5,480,0.02,undecided\n",
        encoding="utf-8",
    )
    (project / "figures/phantom").mkdir(parents=True)
    (project / "figures/phantom/prompt-grid.png").write_bytes(b"png")
    report.write_fragments()
    return project


def find_dead_links(folder: Path) -> list[str]:
    """Links and pictures of a built site that lead nowhere: missing files and missing anchors."""
    soups = {
        path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in folder.rglob("*.html")
    }
    anchors = {path.resolve(): {tag["id"] for tag in soup.find_all(id=True)} for path, soup in soups.items()}
    dead = []
    for path, soup in soups.items():
        for tag in soup.find_all(["a", "img", "link", "script"]):
            target = tag.get("href") or tag.get("src")
            if not target or re.match(r"(https?|mailto|data|javascript):", target):
                continue
            name, _, anchor = unquote(target).partition("#")
            file = (path.parent / name).resolve() if name else path.resolve()
            if not file.exists() or (anchor and file in anchors and anchor not in anchors[file]):
                dead.append(f"{path.relative_to(folder)}: {target}")
    return dead


# -- what the configuration names -------------------------------------------------------------------------


def test_the_configuration_names_only_what_exists():
    html = CONFIG["format"]["html"]
    named = [item["href"] for item in CONFIG["website"]["navbar"]["left"]]
    named += [name for name in CONFIG["project"]["render"] if "*" not in name]
    named += [name for names in html["theme"].values() for name in names if name.endswith(".scss")]
    named += [
        html["css"],
        html["include-after-body"],
        CONFIG["bibliography"],
        CONFIG["website"]["favicon"],
        CONFIG["website"]["navbar"]["logo"],
        CONFIG["project"]["pre-render"],
    ]
    assert [name for name in named if not (ROOT / name).is_file()] == []
    assert CONFIG["execute"]["enabled"] is False
    assert sorted(name for name in CONFIG["project"]["render"] if name.endswith(".qmd")) == PAGES
    assert yaml.safe_load((ROOT / "_quarto-pdf.yml").read_text(encoding="utf-8"))["format"]["typst"]


def test_both_sidebars_name_the_same_pages_in_the_same_words():
    lua = (ROOT / "_extensions/medaug/sidebar.lua").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\w+\.qmd", lua))) == PAGES
    navbar = [
        {"text": item["text"], "address": item["href"].replace(".qmd", ".html")}
        for item in CONFIG["website"]["navbar"]["left"]
    ]
    pages = [site.Page(name, name) for name in PAGES]
    groups = site.list_sidebar(pages, navbar)
    assert all(f'"{group["text"]}"' in lua for group in groups if group["text"])
    assert all(f"{entry['text']}" in lua for group in groups for entry in group["entries"])
    assert sum(len(group["entries"]) for group in groups) == len(PAGES)


def test_pages_hold_no_code_to_execute():
    for name in PAGES:
        assert not re.search(
            r"^```\s*\{(python|r|julia|ojs)", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE
        )


def test_every_citation_is_in_the_bibliography():
    keys = set(markdown.read_bibliography(ROOT / "references.bib"))
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        texts[path.name] = "\n".join(
            cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"
        )
    missing = {
        f"{name}: {key}"
        for name, text in texts.items()
        for key in re.findall(r"(?<![\w.`/])@([a-z]+\d{4}[a-z]?)\b", text)
        if key not in keys
    }
    assert not missing


def test_bibliography_entries_can_be_cited():
    for key, entry in markdown.read_bibliography(ROOT / "references.bib").items():
        assert {"author", "title", "year"} <= set(entry), key
        assert re.fullmatch(r".+ \(\d{4}\)\. .+", re.sub(r"<[^>]+>", "", markdown.format_reference(entry))), (
            key
        )


# -- the built-in renderer --------------------------------------------------------------------------------


def test_a_fresh_clone_gives_every_page_and_no_dead_link(project):
    index = site.build_plain_site()
    assert index == project / "runs/site/index.html"
    assert sorted(path.stem for path in index.parent.glob("*.html")) == [Path(name).stem for name in PAGES]
    assert "make report" in index.read_text(encoding="utf-8")
    assert find_dead_links(index.parent) == []


def test_the_whole_site_has_no_dead_link(full_project):
    folder = site.build_plain_site().parent
    assert find_dead_links(folder) == []
    assert (folder / "data/results/phantom/verdict.csv").exists()
    front = (folder / "index.html").read_text(encoding="utf-8")
    assert 'src="figures/phantom/prompt-grid.png"' in front and "It could not be decided" not in front
    assert "could not be decided whether the generated images helped" in front


def test_a_notebook_becomes_a_page(full_project):
    folder = site.build_plain_site().parent
    text = (folder / "runs/phantom/notebooks/05-baselines.html").read_text(encoding="utf-8")
    page = BeautifulSoup(text, "html.parser")
    assert page.h1.text == "5 · Does it help?" and page.find(class_="description").text == "One sentence."
    figure = page.find(id="fig-dot")
    assert (
        figure.img["alt"] == "One dot."
        and "Figure 1: A dot, simulated (Hu et al., 2021)." in figure.figcaption.text
    )
    assert (folder / "runs/phantom/notebooks" / figure.img["src"]).stat().st_size > 0
    assert "base64" not in text
    assert "Table 1: A table." in page.find(id="tbl-a").text and page.find(id="tbl-a").table
    assert (
        page.find("a", href="#fig-dot").text == "Figure 1"
        and page.find("a", href="#sec-look").text == "A look"
    )
    assert page.find("a", href="07-verdict.html") and page.find("strong", string="0.81")
    assert "Disentangling" in page.find(id="ref-pink2026").text
    assert page.find("svg", class_="math")["aria-label"] == "x_1^2"
    shown = page.find("main").text
    assert "seen" in shown and not any(
        hidden in shown for hidden in ("noise", "#|", "secret", "matplotlib", "Figure size")
    )
    assert len(page.find_all("details", class_="code-fold")) == 6 and not page.find("details", open=True)


def test_two_builds_are_the_same_bytes(full_project):
    def read_all() -> dict[str, bytes]:
        folder = site.build_plain_site().parent
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    assert read_all() == read_all()


def test_a_run_folder_elsewhere_is_shown_too(full_project, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "runs"
    shutil.move(full_project / "runs", elsewhere)
    monkeypatch.setattr(paths, "RUNS", elsewhere)
    index = site.build_site()
    assert index == elsewhere / "site/index.html"
    assert (elsewhere / "site/runs/phantom/notebooks/05-baselines.html").exists() and find_dead_links(
        index.parent
    ) == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[x]{.badge .red}", '<span class="badge red">x</span>'),
        (
            "[gone](/runs/phantom/notebooks/99-none.ipynb)",
            '<span class="not-here" title="appears here after make report">gone</span>',
        ),
        ("a@b.com and @nobody2020", "a@b.com and @nobody2020"),
        (
            "[@pink2026, p. 3; @hu2021]",
            '2026</a>, p. 3; <a class="citation" href="#ref-hu2021">Hu et al., 2021</a>)',
        ),
        (
            '::: {.callout-tip title="T"}\n\ntext\n\n:::',
            '<div class="callout callout-tip"><p class="callout-title">T</p>',
        ),
        (
            '::: {.callout-note collapse="true"}\n\ntext\n\n:::',
            '<details class="callout callout-note"><summary>Note</summary>',
        ),
        ("| a |\n|--:|\n| 1 |\n\n: Cap {#tbl-c}", '<table id="tbl-c"><caption>Table 1: Cap</caption>'),
        (
            '![c](assets/logo.svg){#fig-l fig-alt="A logo"}',
            '<figure id="fig-l"><img src="assets/logo.svg" alt="A logo"',
        ),
        ("$\\begin{matrix}$", "<code>\\begin{matrix}</code>"),
        ("``` unknown\n<x>\n```", "&lt;x&gt;"),
    ],
)
def test_the_markdown_that_pages_use(project, text, expected):
    page = markdown.Converter("index.qmd", markdown.read_bibliography(ROOT / "references.bib"), set())
    page.number_labels(text)
    assert expected in page.convert(text)


# -- with Quarto ------------------------------------------------------------------------------------------


def write_script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_quarto_is_used_where_there_is_one_and_its_error_is_one_line(project, monkeypatch, capsys):
    script = write_script(
        project / "quarto", f'mkdir -p "{project}/_site" && echo page > "{project}/_site/index.html"'
    )
    monkeypatch.setenv("QUARTO_PATH", str(script))
    assert site.build_site() == project / "_site/index.html"
    assert capsys.readouterr().out.count("\n") == 1
    write_script(script, "echo first >&2; echo 'ERROR: no such filter' >&2; exit 1")
    with pytest.raises(RuntimeError, match="ERROR: no such filter") as error:
        site.build_site()
    assert "\n" not in str(error.value)


def test_a_failed_installation_is_tried_once(project, monkeypatch, capsys):
    python = write_script(project / "python", f"echo tried >> {project}/tries; exit 1")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.delenv("QUARTO_PATH", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for _ in range(2):
        assert site.find_quarto() is None
    assert (project / "tries").read_text(encoding="utf-8").count("tried") == 1
    assert "Delete this file" in (project / "runs/.no-quarto").read_text(encoding="utf-8")


def test_an_installation_that_hangs_is_stopped_with_its_children(project, monkeypatch):
    python = write_script(project / "python", f"sleep 60 & echo $! > {project}/child; wait")
    monkeypatch.setattr(sys, "executable", str(python))
    started = time.monotonic()
    assert "not installed within" in site.install_quarto(seconds=0.5)
    assert time.monotonic() - started < 5
    child = int((project / "child").read_text())
    while is_alive(child) and time.monotonic() - started < 10:
        time.sleep(0.02)
    assert not is_alive(child)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # a zombie that nobody has waited for yet is no longer alive
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.skipif(shutil.which("quarto") is None, reason="no quarto on PATH")
def test_quarto_renders_the_same_pages(full_project):
    os.environ.pop("QUARTO_PATH", None)
    index = site.run_quarto(shutil.which("quarto"))
    folder = index.parent
    text = index.read_text(encoding="utf-8")
    assert "could not be decided whether the generated images helped" in text
    assert 'src="figures/phantom/prompt-grid.png"' in text.replace("./", "")
    notebook = BeautifulSoup(
        (folder / "runs/phantom/notebooks/05-baselines.html").read_text(encoding="utf-8"), "html.parser"
    )
    assert notebook.find("img", alt="One dot.") and "noise" not in notebook.find("main").text
    plain = {
        path.relative_to(full_project / "runs/site")
        for path in site.build_plain_site().parent.rglob("*.html")
    }
    assert {path.relative_to(folder) for path in folder.rglob("*.html")} == plain
    assert find_dead_links(folder) == []
