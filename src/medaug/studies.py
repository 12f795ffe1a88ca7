"""Study files: values only. They are checked against the notebooks' own parameter cells before anything runs.

Imports nothing heavy, so that `medaug check` answers in under a second.
"""

import ast
import difflib
import json
import os
from functools import cache
from pathlib import Path

import yaml

from medaug import paths

# Keys of `common:` that steer the engine; no notebook reads them.
ENGINE_KEYS = {
    "foundations": "shipped",  # "train": run notebook 00 for this study first
    "online": False,  # True: models and data may be fetched from their hubs
    "retries": 0,  # how often a notebook that failed is started again
    "skip": [],  # notebooks that this study has no data for
}
PLAN_KEYS = {"minutes": 0.0, "disk_gb": 0.0, "gpu_hours": 0.0}
PAPERMILL_TAG = "parameters"
FOUNDATIONS = "00-foundations"
MANIFEST, MASKS = "01-data-audit", "06-segmentation"
BUILT_IN = ("phantom", "tissue")  # sources that need no folder: both are simulated


class StudyError(ValueError):
    """A study that cannot run as written; the message is one line that says what to change, and where."""


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error (plain YAML silently keeps the last)."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise StudyError(f"line {node.start_mark.line + 1} and after: '{key}' is given twice")
        return super().construct_mapping(node, deep)


def list_studies() -> list[str]:
    """Return the names of the study files in `studies/`, sorted."""
    return sorted(path.stem for path in paths.STUDIES.glob("*.yaml"))


def list_notebooks(study: str = "") -> list[str]:
    """Return the notebooks' names in story order ("01-data-audit", ...); for a study, those that it runs."""
    names = sorted(path.stem for path in paths.NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
    if not study:
        return names
    engine = resolve_engine(study)
    skipped = {*engine["skip"], *(() if engine["foundations"] == "train" else (FOUNDATIONS,))}
    values = load_study(study)
    if (values["common"] | values.get(MANIFEST, {})).get("folder") and MASKS not in values:  # a folder has no masks, unless the study speaks of them
        skipped.add(MASKS)
    return [name for name in names if name not in skipped]


def read_cells(notebook: str) -> list[dict]:
    """Return the cells of `notebooks/<notebook>.ipynb` as plain dicts, `source` as one string."""
    path = paths.NOTEBOOKS / f"{notebook}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


def read_parameters(notebook: str) -> dict:
    """Return the defaults of a notebook, from the cell tagged `parameters`: {name: literal}.

    Raises StudyError when there is no such notebook or cell, or it holds anything but `name = literal` lines.
    """
    path = paths.NOTEBOOKS / f"{notebook}.ipynb"
    if not path.exists():
        raise StudyError(f"no notebook '{notebook}'{_suggest(notebook, list_notebooks())}")
    return dict(_parse_parameters(notebook, path, path.stat().st_mtime_ns))


@cache
def _parse_parameters(notebook: str, path: Path, mtime: int) -> dict:
    tagged = [c for c in read_cells(notebook) if PAPERMILL_TAG in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise StudyError(f"{path.name}: expected one cell tagged '{PAPERMILL_TAG}', found {len(tagged)}")
    try:
        statements = ast.parse(tagged[0]["source"]).body
        return {statement.targets[0].id: ast.literal_eval(statement.value) for statement in statements}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise StudyError(f"{path.name}: the parameter cell may only hold lines `name = literal` ({error})") from None


def load_study(name: str) -> dict[str, dict]:
    """Read and check `studies/<name>.yaml`; return {section: {key: value}}, with `common` and `plan` always there.

    Every key must be a parameter of the notebook it is meant for (in `common`: of at least one notebook) and every
    value of the same type as that parameter's default. Raises StudyError: one line that names the file, the key and
    the closest right name.
    """
    path = paths.STUDIES / f"{name}.yaml"
    if not path.exists():
        raise StudyError(f"there is no study '{name}'{_suggest(name, list_studies())}; "
                         f"known: {', '.join(list_studies())} (a study is a file studies/NAME.yaml)")
    return _parse_study(name, path, path.stat().st_mtime_ns)


@cache
def _parse_study(name: str, path: Path, mtime: int) -> dict[str, dict]:
    try:
        study = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys) or {}
    except StudyError as error:
        raise StudyError(f"studies/{path.name}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"studies/{path.name} is not valid YAML: {' '.join(str(error).split())}") from None
    study = {section: values or {} for section, values in study.items()} if isinstance(study, dict) else study
    _check_sections(f"studies/{path.name}", study)
    return {"common": {}, "plan": {}, **study}


def _check_sections(file: str, study: dict) -> None:
    notebooks = list_notebooks()
    if not isinstance(study, dict):
        raise StudyError(f"{file}: expected sections ({', '.join(['common', *notebooks])}), found a {type(study).__name__}")
    known = ["description", "common", "plan", *notebooks]
    for section, values in study.items():
        if section not in known:
            raise StudyError(f"{file}: no notebook '{section}'{_suggest(section, known)}")
        if section != "description" and not isinstance(values, dict):
            raise StudyError(f"{file}: section '{section}' must hold `name: value` lines")
    defaults = {notebook: read_parameters(notebook) for notebook in notebooks}
    for notebook in notebooks:
        _check_values(f"{file}, {notebook}", study.get(notebook, {}), defaults[notebook])
    everywhere = {key: value for section in reversed(notebooks) for key, value in defaults[section].items()}
    common = study.get("common", {})
    _check_values(f"{file}, common", common, {**everywhere, **ENGINE_KEYS})
    for notebook in notebooks:
        _check_values(f"{file}, common (for {notebook})", {k: v for k, v in common.items() if k in defaults[notebook]},
                      defaults[notebook])
    for notebook, values in study.get("plan", {}).items():
        if notebook not in notebooks:
            raise StudyError(f"{file}, plan: no notebook '{notebook}'{_suggest(notebook, notebooks)}")
        _check_values(f"{file}, plan of {notebook}", values, PLAN_KEYS)
    for notebook in common.get("skip", []):
        if notebook not in notebooks:
            raise StudyError(f"{file}, skip: no notebook '{notebook}'{_suggest(notebook, notebooks)}")


def _check_values(where: str, values: dict, defaults: dict) -> None:
    for key, value in values.items():
        if key == "study":
            raise StudyError(f"{where}: 'study' is the file's own name and cannot be set")
        if key not in defaults:
            raise StudyError(f"{where}: unknown parameter '{key}'{_suggest(key, defaults)}")
        _convert(where, key, value, defaults[key])


def _convert(where: str, key: str, value, default):
    """Return `value` as the default's type; whole numbers serve as floats, and so does 1e-4 (text to YAML 1.1)."""
    if isinstance(default, float) and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if default is None or type(value) is type(default):
        return value
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list",
             dict: "a mapping", type(None): "empty"}
    raise StudyError(f"{where}: '{key}' is {value!r}, expected {names[type(default)]} (as in the notebook: {default!r})")


def _suggest(word: str, known) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def resolve_parameters(study: str, notebook: str) -> dict:
    """Return all parameters of `notebook` for `study`: its defaults, then `common`, then its own section.

    The defaults are those of the embedded study; where they cannot hold for other classes or for real images, others stand in
    for them (see `_fit_defaults`).
    """
    values, defaults = load_study(study), read_parameters(notebook)
    given = {k: v for k, v in values["common"].items() if k in defaults} | values.get(notebook, {})
    own = {k: _convert(study, k, v, defaults[k]) for k, v in given.items()}
    resolved = {**defaults, **_fit_defaults(defaults, own.get("classes", []), not _reads_simulated(study)), **own}
    return {**resolved, **({"study": study} if "study" in defaults else {})}


def _fit_defaults(defaults: dict, classes: list[str], real: bool) -> dict:
    """Return what a study that sets only its classes, or reads `real` images, gets in place of a notebook's defaults.

    Captions for its own classes; of real images, no arm of true new ones, and as many synthetic ones as `ratio` asks for.
    """
    known, fitted = defaults.get("classes", []), {}
    if classes and classes != known:
        captions = {label: f"chest x-ray, {label}" for label in classes}
        fitted |= {key: captions for key, value in defaults.items() if isinstance(value, dict) and list(value) == known}
        if "prompt_sets" in defaults:
            fitted["prompt_sets"] = {defaults["tuning_prompts"]: captions, "words": {label: label for label in classes}}
    if real and "oracle" in defaults.get("arms", []):
        fitted["arms"] = [arm for arm in defaults["arms"] if arm != "oracle"]
    if real and "n_per_class" in defaults:
        fitted["n_per_class"] = 0
    return fitted


def _reads_simulated(study: str) -> bool:
    """Say whether the images of `study` are made by this project: what its first notebook reads."""
    values = load_study(study)
    return is_built_in(values["common"] | values.get(MANIFEST, {}))


def resolve_engine(study: str) -> dict:
    """Return the engine's settings for `study` (see ENGINE_KEYS)."""
    return {key: load_study(study)["common"].get(key, default) for key, default in ENGINE_KEYS.items()}


def check_study(study: str, data: str = "") -> None:
    """Check all that can be known before a run: the study file, its values, and that its images are there.

    `data` is the folder given on the command line ("" for the environment's MEDAUG_DATA). Raises StudyError or
    FileNotFoundError, each one line.
    """
    load_study(study)
    given = data or os.environ.get("MEDAUG_DATA", "")
    if given and not Path(given).expanduser().exists():
        raise FileNotFoundError(f"there is no data folder {given}: set DATA=/path to the folder that holds the images")
    for notebook in list_notebooks(study):
        parameters = resolve_parameters(study, notebook)
        if not resolve_engine(study)["online"]:
            _check_source(f"studies/{study}.yaml, {notebook}", parameters, given)
        if notebook == FOUNDATIONS and not parameters.get("output", "").startswith("runs/"):
            raise StudyError(f"studies/{study}.yaml, {notebook}: set `output` to a folder under runs/{study}/ "
                             "(a study does not write over the weights that ship with the project)")


def is_built_in(parameters: dict) -> bool:
    """Say whether a notebook with these parameters needs no images from elsewhere."""
    return parameters.get("source", BUILT_IN[0]) in BUILT_IN and not parameters.get("folder")


def _check_source(where: str, parameters: dict, given: str) -> None:
    """Readers find a named source by its name in or beside the folder given, or take that folder for it."""
    source = parameters.get("source", BUILT_IN[0])
    folder = parameters.get("folder") or parameters.get("data") or given
    if not is_built_in(parameters) and not folder:
        raise FileNotFoundError(f"{where}: source '{source}' needs a folder: set `data` there, or DATA=/path (make)")
    if not is_built_in(parameters) and not Path(folder).expanduser().exists():
        raise FileNotFoundError(f"{where}: there is no {folder}; set it to where the images are")
    if parameters.get("mask_source"):
        paths.find_source(parameters["mask_source"], folder)


def estimate_study(study: str) -> dict[str, dict]:
    """Return {notebook: {minutes, disk_gb, gpu_hours, basis}} for each notebook that `study` runs.

    Minutes come from the last run on this machine, else from the published run card, else from the study's `plan:`
    section (`basis` says which); disk and GPU hours from the section.
    """
    plan = load_study(study)["plan"]
    published = _read_cards(paths.published_dir(study) / "run.json")
    estimate = {}
    for notebook in list_notebooks(study):
        row = {**PLAN_KEYS, **plan.get(notebook, {}), "basis": "plan" if notebook in plan else "unknown"}
        own = _read_cards(paths.run_dir(study) / "parts" / "run" / f"{notebook}.json")
        for basis, card in (("last run", own), ("published run", published.get(notebook, {}))):
            if "wall_seconds" in card:
                row |= {"minutes": card["wall_seconds"] / 60, "basis": basis}
                break
        estimate[notebook] = row
    return estimate


def _read_cards(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
