"""The house rules that a machine can check: imports, sources without outputs, no machine's paths, packages in step."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from medaug import studies

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "medaug"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LEAVES = {"paths", "runtime"}

# A helper imports the field's libraries and the two leaves. Each exception, with its one reason.
ALLOWED = {
    ("claims", "faults"): "a claim about a mistake is settled by re-enacting the mistake",
    ("claims", "guards"): "a claim about a mistake is settled by seeing its guard catch it",
    ("claims", "statistics"): "a claim's figure is computed by the function that the tables are computed with",
    ("folder_audit", "archives"): "what a zip holds is audited like a folder",
    ("folder_audit", "audit"): "one definition of a copy and of a shortcut, in the notebook and on the command line",
    ("folder_audit", "dicom"): "patients of DICOM files are named in their headers",
    ("folder_audit", "fingerprints"): "files are hashed and measured as they are for a study",
    ("folder_audit", "images"): "a file is an image if the decoder of everything else can read it",
    ("folder_audit", "sources"): "a table is read as it is for a study",
    ("images", "dicom"): "a DICOM file is an image like any other to whoever loads it",
    ("fingerprints", "images"): "near duplicates are judged on pixels as decoded for everything else",
    ("foundations", "phantom"): "the shipped weights are trained on simulated films",
    ("diffusion", "parallel"): "the one loop of all trainings is the one that several processes share",
    ("generation", "diffusion"): "a generator is the pipeline that diffusion has tuned, and halves batches in the same way",
    ("report", "guards"): "the report lists the guards from their own docstrings",
    ("report", "results"): "the report's text quotes the tables of results",
    ("report", "tables"): "the report links the files of the contract",
    ("report", "wording"): "one rule puts a verdict into words on every page",
    ("results", "tables"): "the results are read by the contract of the tables",
    ("results", "wording"): "one rule puts a verdict into words on every page",
    ("wording", "plots"): "an arm has one colour in figures and in text",
    ("site", "markdown"): "the built-in renderer of pages is one part of the built-in site",
    ("sources", "archives"): "a zip or a MedMNIST file becomes a folder first",
    ("sources", "dicom"): "patients of DICOM files are named in their headers",
    ("sources", "fingerprints"): "where no patients are named, near-duplicate groups stand in for them",
    ("sources", "images"): "each file is decoded once, by the function that all else uses",
    ("sources", "phantom"): "the simulator is one of the sources",
    ("tuning", "diffusion"): "every method is the one loop, with another loss or other weights",
    ("tuning", "parallel"): "a batch that is not drawn by diffusion is shared here",
    ("training", "classifiers"): "a network is trained with the preprocessing that belongs to its weights",
    ("engine", "studies"): "the engine runs what a study file says",
    ("engine", "tables"): "publishing copies the tables of the contract",
    ("engine", "report"): "publishing writes the published copy of the report's text",
    **{("cli", name): "the command line is where everything meets" for name in
       ("engine", "folder_audit", "images", "report", "segmentation", "site", "sources", "studies", "tables")},
}  # fmt: skip


def read_imports(path: Path) -> set[str]:
    """First-level modules of this package that a source file imports ("paths", "phantom", ...)."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: import from medaug by its full name, not relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("medaug.")}


def list_exceptions() -> set[tuple[str, str]]:
    found = set()
    for path in SOURCES.rglob("*.py"):
        module = path.relative_to(SOURCES).parts[0].removesuffix(".py")
        found |= {(module, name) for name in read_imports(path) - LEAVES - {module} if (SOURCES / name).is_dir()
                  or (SOURCES / f"{name}.py").is_file()}
    return found


def test_helpers_import_only_leaves_save_for_named_reasons():
    unnamed = list_exceptions() - set(ALLOWED)
    assert not unnamed, f"give a one-sentence reason in ALLOWED, or pass the value in from the notebook: {sorted(unnamed)}"


def test_no_reason_outlives_its_import():
    assert not set(ALLOWED) - list_exceptions()


def test_leaves_import_nothing_of_the_package():
    assert read_imports(SOURCES / "paths.py") == set()
    assert read_imports(SOURCES / "runtime.py") <= {"paths"}


def list_tracked() -> list[Path]:
    """Text files that git tracks or would track."""
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True)
    binary = {".png", ".jpg", ".parquet", ".safetensors", ".svg", ".ico", ".woff2"}
    return [ROOT / name for name in listing.stdout.splitlines()
            if (ROOT / name).is_file() and Path(name).suffix not in binary and name != "tests/test_layout.py"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize("pattern, what", [
    (r"(?<![\w./-])/(home|root|Users|work|mnt|tmp/pytest)/[\w.-]+", "a machine's absolute path"),
    (r"pypi\.org|pythonhosted\.org|pypi\.python|--(extra-)?index-url|anaconda\.org|registry\.npmjs", "a package registry"),
    (r"(?i)\b(TODO|FIXME|XXX)\b", "something left to do"),
])
def test_tracked_files_hold_no(pattern, what):
    found = [f"{path.relative_to(ROOT)}: {match.group(0)}" for path in list_tracked()
             for match in re.finditer(pattern, path.read_text(encoding="utf-8", errors="replace"))]
    assert not found, f"{what} in {found}"


# -- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_a_source(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) >= (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    cells = notebook["cells"]
    identities = [cell["id"] for cell in cells]
    assert len(set(identities)) == len(identities)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "run `medaug strip`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_like_the_others(path):
    cells = studies.read_cells(path.stem)
    front, question, parameters, imports = cells[:4]
    assert front["cell_type"] == "raw"
    assert {"title", "description"} <= set(yaml.safe_load(front["source"].strip().strip("-")))
    assert question["cell_type"] == "markdown"
    lowered = question["source"].lower()
    for word in ("question", "reads", "writes", "minute|hour|second", "control"):
        assert re.search(word, lowered), f"the opening does not tell: {word}"
    assert parameters["metadata"]["tags"] == ["parameters"]
    assert {"study", "seed", "threads", "device"} <= set(studies.read_parameters(path.stem))
    assert f'start_run(study, "{path.stem}", seed, threads, device)' in imports["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_tells_a_story(path):
    cells = studies.read_cells(path.stem)
    kinds = [cell["cell_type"] for cell in cells[1:]]  # less the front matter
    assert 0.3 <= kinds.count("markdown") / len(kinds) <= 0.65
    assert "finish_run(run)" in cells[-1]["source"] or any("finish_run(run)" in c["source"] for c in cells[-2:])
    figures = [cell["source"] for cell in cells if "save_figure(" in cell["source"]]
    for source in figures:
        assert {"fig-cap", "fig-alt"} <= set(re.findall(r"#\| ([\w-]+):", source)), f"a figure without words: {source[:80]}"


def test_shared_parameters_have_one_default():
    everywhere = {}
    for path in NOTEBOOKS:
        for key in ("image_size", "classes"):
            value = studies.read_parameters(path.stem).get(key)
            if value is not None:
                everywhere.setdefault(key, {})[path.stem] = value
    for key, values in everywhere.items():
        assert len({json.dumps(value) for value in values.values()}) == 1, f"{key}: {values}"


# -- packages


def plain_name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group(0).lower().replace("_", "-").replace(".", "-")


@pytest.fixture(scope="module")
def declared() -> dict[str, set[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"run": {plain_name(r) for r in project["dependencies"]},
            **{group: {plain_name(r) for r in project["optional-dependencies"][group]} for group in ("dev", "extra")}}


def test_every_dependency_is_pinned(declared):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", pin) for pin in pins)
    assert declared["run"] | declared["dev"] <= {plain_name(pin) for pin in pins}


def test_conda_environment_is_in_step(declared):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    nested = [name for entry in environment["dependencies"] if isinstance(entry, dict) for name in entry["pip"]]
    renamed = {"pytorch": "torch"}
    given = {renamed.get(plain_name(entry), plain_name(entry)) for entry in [*plain, *nested]}
    assert given - {"python", "pip", "quarto", "make", "git"} == declared["run"] | declared["dev"]
    assert {"quarto", "python", "pip"} <= given


def test_conda_asks_for_the_same_versions(declared):
    """A bound in pyproject.toml ("torch>=2.11,<2.15") stands in environment.yml too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    environment = (ROOT / "environment.yml").read_text(encoding="utf-8")
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        bound = requirement[len(re.match(r"[\w.-]+", requirement).group(0)):]
        assert bound in environment, f"{requirement} is not in environment.yml"


def test_imports_are_declared(declared):
    """What the sources import is declared, so that no package is there only by chance."""
    known = {"sklearn": "scikit-learn", "skimage": "scikit-image", "PIL": "pillow", "yaml": "pyyaml"}
    imported = set()
    for path in [*SOURCES.rglob("*.py"), *(ROOT / "bench").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    own = {"medaug", *(path.stem for path in (ROOT / "bench").glob("*.py"))}
    foreign = {plain_name(known.get(name, name)) for name in imported - own - sys.stdlib_module_names}
    assert foreign <= declared["run"] | declared["extra"]
