"""The website: Quarto where there is one, else the same pages by nbconvert and a few templates (in
`assets/`).

Both read the same sources: `_quarto.yml`, the `.qmd` pages, and the notebooks that papermill has executed.
Neither runs any code.
"""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

import yaml

from medaug import markdown, paths
from medaug.runtime import replace_when_done

STORY = (
    "foundations",
    "phantom",
)  # the embedded study, after the models that it starts from; other studies follow
INSTALL_SECONDS = 60
TAGS = {
    "remove-cell": ("echo", "output"),
    "hide-cell": ("echo", "output"),
    "hide-code": ("echo",),
    "hide-output": ("output",),
}

REPR = re.compile(r"<(Axes|Figure)|\[?<matplotlib|Text\(")  # what a plotting call returns: nothing to show


@dataclass
class Page:
    """One page: where it comes from, where it goes (both relative to the site's root), and what it shows."""

    source: str
    title: str
    description: str = ""
    body: str = ""
    toc: list[tuple[int, str, str]] = field(default_factory=list)
    references: list[tuple[str, str]] = field(default_factory=list)
    has_code: bool = False
    full: bool = False  # the whole width, no list of headings

    @property
    def address(self) -> str:
        """The page's path in the site."""
        return str(PurePosixPath(self.source).with_suffix(".html"))


def build_site() -> Path:
    """Build the website and return its first page; one line says which way it was made."""
    quarto = find_quarto()
    if quarto is None:
        print(
            "No Quarto here: the built-in renderer makes the same pages. (Quarto: by conda, or its installer.)"
        )
        return build_plain_site()
    print(f"Rendering the site with {quarto}")
    return run_quarto(quarto)


# -- with Quarto ------------------------------------------------------------------------------------------


def find_quarto() -> str | None:
    """Return the command of Quarto: of QUARTO_PATH, PATH or this Python's environment; None if there is none.

    Where there is none, one attempt is made to install the package `quarto-cli`, which fetches Quarto; a
    failure is remembered in `runs/.no-quarto` (delete it to try again). A run folder elsewhere (MEDAUG_RUNS)
    is beyond Quarto's reach.
    """
    if paths.RUNS != paths.ROOT / "runs":
        return None
    beside = Path(sys.executable).with_name("quarto")
    for candidate in (os.environ.get("QUARTO_PATH"), shutil.which("quarto"), str(beside)):
        if candidate and os.access(candidate, os.X_OK) and not Path(candidate).is_dir():
            return candidate
    failed = paths.RUNS / ".no-quarto"
    if not failed.exists():
        reason = install_quarto()
        if reason is None and beside.exists():
            return str(beside)
        with replace_when_done(failed) as temporary:
            temporary.write_text(f"{reason}\nDelete this file to try again.\n", encoding="utf-8")
    return None


def install_quarto(seconds: float = INSTALL_SECONDS) -> str | None:
    """Try to install Quarto into this Python's environment; return None, or in a few words why it failed."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "quarto-cli"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        return None if process.wait(timeout=seconds) == 0 else "quarto-cli could not be installed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # pip and the build that it started
        process.wait()
        return f"quarto-cli was not installed within {seconds:g} s"


def run_quarto(quarto: str) -> Path:
    """Render the project with Quarto; return `_site/index.html`. Raises RuntimeError with Quarto's last
    words.
    """
    result = subprocess.run([quarto, "render", str(paths.ROOT), "--quiet"], capture_output=True, text=True)
    index = paths.ROOT / "_site" / "index.html"
    if result.returncode or not index.exists():
        last = (result.stderr.strip() or result.stdout.strip() or "it said nothing").splitlines()[-1]
        raise RuntimeError(f"quarto render failed: {last} (run `quarto render` to see all of it)")
    return index


# -- without Quarto ---------------------------------------------------------------------------------------


def build_plain_site() -> Path:
    """Build the site into `runs/site/` from the same sources; return its first page."""
    config = yaml.safe_load((paths.ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    sources = list_sources(config["project"]["render"])
    bibliography = markdown.read_bibliography(paths.ROOT / config["bibliography"])
    folder = paths.RUNS / "site"
    shutil.rmtree(folder, ignore_errors=True)
    pages, files = [], set()
    for source in sources:
        converter = markdown.Converter(source, bibliography, set(sources))
        make = read_notebook if source.endswith(".ipynb") else read_page
        page, outputs = make(source, converter)
        page.toc = [
            (level, identity, text) for level, identity, text in converter.headings if level in (2, 3)
        ]
        page.references = [
            (key, markdown.format_reference(bibliography[key])) for key in sorted(converter.cited)
        ]
        pages.append(page)
        files |= converter.files
        for name, content in outputs.items():
            write_file(folder / name, content)
    resources = [pattern.removeprefix("/") for pattern in config["project"].get("resources", [])]
    files |= {to_site_path(path) for pattern in resources for path in glob_site(pattern)}
    for name in sorted(files):
        write_file(folder / name, markdown.real_path(name).read_bytes())
    write_assets(folder / "assets")
    write_pages(pages, config["website"], folder)
    write_file(
        folder / "search.js",
        f"window.SEARCH = {json.dumps(list(index_pages(pages)), ensure_ascii=False)};\n".encode(),
    )
    return folder / "index.html"


def list_sources(patterns: Iterable[str]) -> list[str]:
    """Return the sources of `project: render` that exist, as paths of the site, in story order."""
    found = []
    for pattern in patterns:
        found += [to_site_path(path) for path in glob_site(pattern.removeprefix("/"))]
    return sorted(
        found,
        key=lambda name: (name.endswith(".ipynb"), _rank(name), name if name.endswith(".ipynb") else ""),
    )


def _rank(source: str) -> int:
    study = source.split("/")[1] if "/" in source else ""
    return STORY.index(study) if study in STORY else len(STORY)


def glob_site(pattern: str) -> list[Path]:
    """Return the files of a pattern relative to the project; `runs/` may lie elsewhere (see
    `markdown.real_path`).
    """
    base, rest = (
        (paths.RUNS, pattern.removeprefix("runs/")) if pattern.startswith("runs/") else (paths.ROOT, pattern)
    )
    return sorted(path for path in base.glob(rest) if path.is_file())


def to_site_path(path: Path) -> str:
    """Return a file's path in the site."""
    if path.is_relative_to(paths.RUNS):
        return "runs/" + path.relative_to(paths.RUNS).as_posix()
    return path.relative_to(paths.ROOT).as_posix()


def write_file(path: Path, content: bytes) -> None:
    """Write one file of the site, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def split_front_matter(text: str) -> tuple[dict, str]:
    """Return the YAML front matter of a text ({} if there is none) and the rest."""
    match = re.match(r"---\n(.*?)\n---\s*(?:\n|$)", text, flags=re.DOTALL)
    return (yaml.safe_load(match[1]) or {}, text[match.end() :]) if match else ({}, text)


def read_page(source: str, converter: markdown.Converter) -> tuple[Page, dict[str, bytes]]:
    """Return a `.qmd` page with its fragments put in (and no files of its own)."""
    front, text = split_front_matter(markdown.real_path(source).read_text(encoding="utf-8"))
    text = markdown.insert_fragments(text)
    converter.number_labels(text)
    page = Page(source, front["title"], front.get("description", ""), full=front.get("page-layout") == "full")
    page.body = converter.convert(text)
    return page, {}


def read_notebook(source: str, converter: markdown.Converter) -> tuple[Page, dict[str, bytes]]:
    """Return the page of an executed notebook, and the images of its outputs: {path in the site: bytes}."""
    import nbformat

    notebook = nbformat.read(markdown.real_path(source), as_version=4)
    front = {}
    if notebook.cells and notebook.cells[0].cell_type in ("raw", "markdown"):
        front, notebook.cells[0].source = split_front_matter(notebook.cells[0].source)
    converter.number_labels("\n".join(cell.source for cell in notebook.cells))
    prepare_cells(notebook, converter)
    exporter = make_exporter()
    exporter.register_filter("page_markdown", converter.convert)
    stem = PurePosixPath(source).stem
    body, resources = exporter.from_notebook_node(
        notebook, {"unique_key": stem, "output_files_dir": f"{stem}_files"}
    )
    page = Page(
        source, front.get("title", stem), front.get("description", ""), body, has_code="code-fold" in body
    )
    return page, {
        f"{PurePosixPath(source).parent}/{name}": content for name, content in resources["outputs"].items()
    }


@cache
def make_exporter():
    """Return nbconvert's HTML exporter with our template; made once, since this takes longer than a page."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    exporter = HTMLExporter(
        config=Config(
            {"HTMLExporter": {"preprocessors": ["nbconvert.preprocessors.ExtractOutputPreprocessor"]}}
        )
    )
    exporter.raw_template = (paths.ROOT / "assets" / "notebook.html.j2").read_text(encoding="utf-8")
    exporter.register_filter("page_code", markdown.highlight_code)
    return exporter


def prepare_cells(notebook, converter: markdown.Converter) -> None:
    """Read each code cell's `#|` options and tags into its metadata, and take out what no page shows."""
    kept = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            kept.append(cell)
            continue
        options, cell.source = split_options(cell.source)
        hidden = {part for tag in cell.metadata.get("tags", []) for part in TAGS.get(tag, ())}
        hidden |= {
            part
            for part in ("echo", "output")
            if options.get(part) is False or options.get("include") is False
        }
        if "output" in hidden:
            cell.outputs = []
        if hidden == {"echo", "output"}:
            continue
        cell.metadata["site"] = {
            "echo": "echo" not in hidden,
            "open": options.get("code-fold") in (False, "show"),
            "summary": options.get("code-summary", "show code"),
            "label": options.get("label", ""),
        }
        cell.outputs = [
            show_result(output)
            for output in cell.outputs
            if not REPR.match(output.get("data", {}).get("text/plain", "")) or len(output.data) > 1
        ]
        add_captions(cell.outputs, options, converter)
        kept.append(cell)
    notebook.cells = kept


def split_options(source: str) -> tuple[dict, str]:
    """Return a cell's `#|` options and its code without them."""
    lines = source.split("\n")
    count = next((i for i, line in enumerate(lines) if not line.startswith("#|")), len(lines))
    options = yaml.safe_load("\n".join(line[2:].removeprefix(" ") for line in lines[:count])) or {}
    return options, "\n".join(lines[count:]).strip("\n")


def show_result(output):
    """Return an output as the template wants it: a cell's last value like any display, and of a figure its
    picture.
    """
    if output.output_type == "execute_result":
        output.output_type = "display_data"
        output.pop("execution_count", None)
    if "image/png" in output.get("data", {}):  # else a vector copy, or a figure's repr, would be taken
        output.data = {"image/png": output.data["image/png"]}
    return output


def add_captions(outputs: list, options: dict, converter: markdown.Converter) -> None:
    """Put caption and alt text to the first image (or, with `tbl-cap`, the first table) of a cell."""
    label = str(options.get("label", ""))
    kinds = {
        "fig-cap": ("image/png", "image/svg+xml", "image/jpeg"),
        "tbl-cap": ("text/html", "text/markdown"),
    }
    for name, types in kinds.items():
        first = next((output for output in outputs if set(types) & set(output.get("data", {}))), None)
        if first is None:
            continue
        if options.get(name):
            caption = re.sub(
                r"^<p>(.*)</p>\s*$", r"\1", converter.convert(str(options[name])), flags=re.DOTALL
            )
            first.metadata["caption"] = converter.caption(label, caption)
        if name == "fig-cap":
            first.metadata["alt"] = str(options.get("fig-alt") or options.get("fig-cap") or "")


def write_assets(folder: Path) -> None:
    """Copy styles and scripts, and make the colours of the code for light and dark."""
    from pygments.formatters import HtmlFormatter

    for path in (paths.ROOT / "assets").iterdir():
        if path.suffix in (".css", ".js", ".svg"):
            write_file(folder / path.name, path.read_bytes())
    light, dark = (
        re.sub(
            r"background(-color)?: [^;}]*;?",
            "",
            HtmlFormatter(style=style).get_style_defs(f".{theme} .highlight"),
        )
        for style, theme in (("tango", "quarto-light"), ("github-dark", "quarto-dark"))
    )
    write_file(folder / "code.css", f"{light}\n{dark}\n".encode())


def write_pages(pages: list[Page], website: dict, folder: Path) -> None:
    """Put each page into the frame with navigation, and write it."""
    from jinja2 import Environment, FileSystemLoader

    template = Environment(loader=FileSystemLoader(paths.ROOT / "assets"), trim_blocks=True).get_template(
        "page.html.j2"
    )
    navbar = [
        {"text": item["text"], "address": str(PurePosixPath(item["href"]).with_suffix(".html"))}
        for item in website["navbar"]["left"]
    ]
    sidebar = list_sidebar(pages, navbar)
    order = [entry for group in sidebar for entry in group["entries"]]
    addresses = [entry["address"] for entry in order]
    for page in pages:
        at = addresses.index(page.address)
        text = template.render(
            page=page,
            site=website,
            footer=website["page-footer"],
            navbar=navbar,
            sidebar=sidebar,
            root="../" * page.address.count("/"),
            previous=order[at - 1] if at else None,
            following=order[at + 1] if at + 1 < len(order) else None,
        )
        write_file(folder / page.address, text.encode())


def list_sidebar(pages: list[Page], navbar: list[dict]) -> list[dict]:
    """Return the sidebar's groups in story order, as `sidebar.lua` makes them for Quarto."""
    titles = {page.address: page.title for page in pages}
    named = {item["address"]: item["text"] for item in navbar}

    def entries(addresses: Iterable[str]) -> list[dict]:
        return [{"address": a, "text": named.get(a, titles[a])} for a in addresses if a in titles]

    notebooks = [page.address for page in pages if page.source.endswith(".ipynb")]
    story = [address for address in notebooks if _rank(address) < len(STORY)]
    groups = [
        {"text": "", "entries": entries(["index.html"])},
        {"text": "Step by step", "entries": entries(story)},
    ]
    for study in sorted({address.split("/")[1] for address in notebooks if address not in story}):
        groups.append(
            {"text": f"Study {study}", "entries": entries(a for a in notebooks if a.split("/")[1] == study)}
        )
    groups += [
        {"text": "What came out", "entries": entries(["results.html", "claims.html"])},
        {"text": "Use it", "entries": entries(["guide.html", "cards.html"])},
    ]
    return [group for group in groups if group["entries"]]


def index_pages(pages: list[Page]) -> Iterator[dict[str, str]]:
    """Yield one entry of the search index for each section of each page: address, page, heading, text."""
    for page in pages:
        for part in re.split(r"(?=<h[23] id=)", page.body):
            part = re.sub(
                r"<(style|script|details class=\"code-fold\").*?</(style|script|details)>",
                " ",
                part,
                flags=re.DOTALL,
            )
            head = re.match(r'<h[23] id="([^"]*)">(.*?)</h[23]>', part, flags=re.DOTALL)
            text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", part)).split())
            yield {
                "address": page.address + (f"#{head[1]}" if head else ""),
                "page": page.title,
                "heading": html.unescape(re.sub(r"<[^>]+>", "", head[2])) if head else "",
                "text": text[:4000],
            }
