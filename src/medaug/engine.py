"""How notebooks are run: what each depends on, papermill around one of them, Snakemake around all of them.

The order of the notebooks and what each makes stand in the Snakefile. Nothing heavy is imported at the top.
"""

import ast
import contextlib
import datetime
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from medaug import paths, runtime, studies

PACKAGE = "medaug"
SITE, DONE = ".site", ".done"  # in runs/<study>/: where the site is; the state after the last complete run


class NotebookError(RuntimeError):
    """A notebook stopped with an error; the message is one line: which cell, which error, where the copy is."""


def find_imports(source: str) -> set[str]:
    """Return the dotted names of all that `source` (Python, IPython magics allowed) may import from this package."""
    plain = "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines())
    try:
        tree = ast.parse(plain)
    except SyntaxError:  # it cannot import anything either; the notebook's own run says where the error is
        return set()
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] == PACKAGE}


def find_helpers(notebook: str) -> list[Path]:
    """Return the source files of this package that `notebook` imports, directly or through another one, sorted."""
    cells = [cell["source"] for cell in studies.read_cells(notebook) if cell["cell_type"] == "code"]
    return sorted(_follow_imports({name for source in cells for name in find_imports(source)}))


def _follow_imports(names: set[str]) -> set[Path]:
    """Source files that importing `names` runs, with all that they import in turn."""
    found, waiting = set(), set(names)
    while waiting:
        for path in _module_files(waiting.pop()) - found:
            found.add(path)
            waiting |= _read_imports(path, path.stat().st_mtime_ns)
    return found


@cache
def _read_imports(path: Path, mtime: int) -> frozenset[str]:
    return frozenset(find_imports(path.read_text(encoding="utf-8")))


def _module_files(name: str) -> set[Path]:
    """Files that Python runs for `import name`: the module and the `__init__` of each package above it."""
    parts, found = name.split("."), set()
    for depth in range(1, len(parts) + 1):
        base = paths.ROOT.joinpath("src", *parts[:depth])
        found |= {path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()}
    return found


def find_weights(parameters: dict) -> list[Path]:
    """Return the files of the shipped foundation weights that `parameters` name ("foundations/NAME"), sorted."""
    names = {value for value in _list_texts(parameters) if value.startswith("foundations/")}
    folders = [paths.FOUNDATIONS / name.removeprefix("foundations/") for name in names]
    return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())


def _list_texts(value) -> list[str]:
    """All texts in a value of lists and dicts."""
    if isinstance(value, dict | list):
        return [text for part in (value.values() if isinstance(value, dict) else value) for text in _list_texts(part)]
    return [value] if isinstance(value, str) else []


def find_evidence(study: str, parameters: dict) -> list[Path]:
    """Return the tables of other studies that a notebook counts as evidence, as far as they are there, sorted."""
    others = [name for name in parameters.get("evidence_studies", []) if name != study]
    tables = (path for name in others for path in (paths.run_dir(name) / "tables", paths.published_dir(name)))
    return sorted(path for folder in tables for path in folder.glob("*.csv") if path.name != "timing.csv")


def notebook_environment(threads: int, online: bool = False) -> dict[str, str]:
    """Return the environment a notebook's process needs to give the same bytes each time, fast, without a network."""
    return {
        # glibc gives each large tensor's memory back to the system and faults it in again; kept, a LoRA step takes a tenth
        # less on one core and a fifth on two (other systems ignore these)
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # torch's documentation, "Reproducibility": needed for cuBLAS
        **{f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")},
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "0" if online else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MEDAUG_HEADLESS": "1",
    }


def execute_notebook(study: str, notebook: str) -> Path:
    """Run `notebook` for `study` by papermill, one process for it alone; return the executed copy's path.

    The copy appears in `runs/<study>/notebooks/` only when every cell has run. If one fails, the copy goes to
    `runs/<study>/failed/` instead and NotebookError says in one line which cell and which error.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    run_dir, file = paths.run_dir(study), f"{notebook}.ipynb"
    running, failed, done = (run_dir / folder / file for folder in ("running", "failed", "notebooks"))
    parameters = _give_folder(studies.resolve_parameters(study, notebook))
    for folder in (running.parent, done.parent):
        folder.mkdir(parents=True, exist_ok=True)
    failed.unlink(missing_ok=True)
    os.environ.update(notebook_environment(parameters.get("threads", 1), studies.resolve_engine(study)["online"]))
    started = time.time()
    minutes = studies.estimate_study(study).get(notebook, {}).get("minutes")
    _say(f"{notebook} starts" + (f", about {format_minutes(minutes)}" if minutes else ""))
    try:
        papermill.execute_notebook(
            paths.NOTEBOOKS / file, running, parameters=_select_changed(notebook, parameters), kernel_name="python3",
            cwd=str(paths.ROOT), progress_bar={"desc": notebook} if sys.stderr.isatty() else False, log_output=False,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
    except (PapermillExecutionError, DeadKernelError) as error:
        failed.parent.mkdir(parents=True, exist_ok=True)
        os.replace(running, failed)
        raise NotebookError(f"{notebook} failed{_describe_error(error)}; the copy with all of it is {failed}") from None
    os.replace(running, done)
    _say(f"{notebook} done in {format_minutes((time.time() - started) / 60)}")
    return done


def _give_folder(parameters: dict) -> dict:
    """A notebook that reads a real source gets the folder of the command line, unless the study names one."""
    if studies.is_built_in(parameters) or parameters.get("folder") or parameters.get("data", "given"):
        return parameters
    return {**parameters, "data": os.environ.get("MEDAUG_DATA", "")}


def _select_changed(notebook: str, parameters: dict) -> dict:
    """Only what differs from the parameter cell is injected, so the reader of the executed copy sees just that."""
    defaults = studies.read_parameters(notebook)
    return {key: value for key, value in parameters.items() if value != defaults[key]}


def _describe_error(error: Exception) -> str:
    if not hasattr(error, "ename"):
        return ": its process died (most often: out of memory)"
    lines = [line.strip() for line in str(error.evalue).splitlines() if line.strip()]
    return f" in cell [{error.exec_count}]: {error.ename}: {lines[0] if lines else ''}".rstrip(": ")


def format_minutes(minutes: float) -> str:
    """Return a duration as a person says it: "40 s", "3.5 min", "2.5 h"."""
    if minutes < 1.5:
        return f"{minutes * 60:.0f} s"
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _say(line: str) -> None:
    print(f"[{datetime.datetime.now():%H:%M:%S}] {line}", flush=True)


def stop_with_parent(seconds: float = 1.0) -> None:
    """End this process when the one that started it has gone (killed), so that no notebook runs on unseen.

    The notebook's kernel watches this process in the same way (ipykernel's parent poller).
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_snakemake(study: str, data: str, options: list[str], extra: list[str] = (), quiet: bool = True) -> int:
    """Take the study's lock and run Snakemake, in this process, with `options` and the user's `extra` arguments.

    The lock goes with the process, so a kill leaves none behind; Snakemake's own lock files, which a kill does leave
    behind, are not used. `quiet` leaves only warnings and errors of Snakemake's own log: each notebook says when it
    starts and ends. Returns the exit code. Raises RuntimeError when the study is being run already.
    """
    _take_lock(paths.run_dir(study))
    if not extra and is_done(study):
        return 0
    from snakemake.cli import main

    if quiet:
        logging.getLogger("snakemake.logging").addFilter(_is_news)
    try:
        main([*_snakemake_arguments(study, data, options), *extra])
    except SystemExit as end:
        if end.code:
            return end.code
    if not extra:
        mark_done(study)
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    """Keep Snakemake's warnings and errors, less those that repeat what a failed notebook has just said itself."""
    echoes = ("CalledProcessError", "Exiting because a job", "At least one job did not")
    return record.levelno >= logging.WARNING and not any(echo in record.getMessage() for echo in echoes)


def _snakemake_arguments(study: str, data: str, arguments: list[str]) -> list[str]:
    return ["--snakefile", str(paths.ROOT / "Snakefile"), "--directory", str(paths.ROOT), "--nolock", *arguments,
            "--config", f"study={study}", *([f"data={Path(data).expanduser().resolve()}"] if data else [])]


def shorten_reason(reason: str) -> str:
    """Return the first cause in Snakemake's reason for a rule, in a few words (`snakemake -n` has all of them)."""
    cause = reason.split("; ")[0]
    kind, _, names = cause.partition(": ")
    if kind.startswith("Params have changed"):
        return f"changed: {names.partition('before: ')[2]}".replace(" now: ", " -> ")
    if kind.startswith("Updated input files"):
        return f"changed: {', '.join(Path(name).name for name in names.split(', '))}"
    words = {"Missing output files": "not made yet", "Input files updated by another job": "what it reads is made anew"}
    return words.get(kind, cause)


def fingerprint_study(study: str) -> str:
    """Return a hash of all that Snakemake would look at for `study`: names, sizes and times, no contents."""
    run_dir = paths.run_dir(study)
    groups = (
        [paths.ROOT / "Snakefile", paths.STUDIES / f"{study}.yaml"], paths.NOTEBOOKS.glob("*.ipynb"),
        (paths.ROOT / "src").rglob("*.py"), paths.FOUNDATIONS.rglob("*"), find_site_sources(), run_dir.glob("*/*.ipynb"),
        run_dir.glob("*.*"), run_dir.glob("*/*.json"), run_dir.glob("*/*.parquet"), run_dir.glob("tables/*"),
        paths.RUNS.glob("*/tables/*.csv"), (paths.ROOT / "data").glob("*.csv"))
    files = sorted({path for group in groups for path in group
                    if path.is_file() and path.name[0] != "." and not runtime.is_partial(path)})  # fmt: skip
    stats = ((path, path.stat()) for path in files)
    listing = [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def is_done(study: str) -> bool:
    """Say whether nothing at all has been touched since the last complete run (Snakemake needs seconds to find out).

    Any doubt is answered by no: then Snakemake looks for itself.
    """
    done, site = paths.run_dir(study) / DONE, find_site(study)
    return bool(site) and done.exists() and done.read_text(encoding="utf-8") == fingerprint_study(study)


def mark_done(study: str) -> None:
    """Remember the present state as that of a complete run."""
    (paths.run_dir(study) / DONE).write_text(fingerprint_study(study), encoding="utf-8")


def find_site(study: str) -> Path | None:
    """Return the first page of the site that the last run of `study` built, None if it is not there (any more)."""
    stamp = paths.run_dir(study) / SITE
    if not stamp.exists():
        return None
    index = Path(stamp.read_text(encoding="utf-8").strip())
    if not index.is_file():
        stamp.unlink()
        return None
    return index


def show_plan(study: str, data: str = "") -> None:
    """Print what a run of `study` would do now and why (Snakemake's dry run), with its time, disk and GPU hours."""
    command = [sys.executable, "-m", "snakemake", *_snakemake_arguments(study, data, ["--dry-run", "--nocolor"])]
    dry_run = subprocess.run(command, capture_output=True, text=True, check=False)
    if dry_run.returncode:
        raise RuntimeError("Snakemake cannot plan this study:\n" + (dry_run.stderr or dry_run.stdout).strip())
    reasons = read_reasons(dry_run.stdout + dry_run.stderr)
    estimate = studies.estimate_study(study)
    print(f"{'notebook':18} {'time':>8} {'disk':>8} {'GPU':>8}   from            now")
    for notebook, row in estimate.items():
        print(f"{notebook:18} {format_minutes(row['minutes']):>8} {row['disk_gb']:5.1f} GB {row['gpu_hours']:6.1f} h   "
              f"{row['basis']:14}  {shorten_reason(reasons.get(notebook, 'up to date'))}")
    rows = [row for notebook, row in estimate.items() if notebook in reasons]
    minutes, disk, gpu = (sum(row[key] for row in rows) for key in studies.PLAN_KEYS)
    print(f"to run now: {len(rows)} notebooks, {format_minutes(minutes)} one after another, {disk:.1f} GB, {gpu:.1f} GPU hours")
    paths.RUNS.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(paths.RUNS).free / 1e9
    if disk > free:
        print(f"not enough disk: {free:.1f} GB are free in {paths.RUNS}")


def read_reasons(log: str) -> dict[str, str]:
    """Return {rule: reason} of a Snakemake dry run's log."""
    found, rule = {}, ""
    for line in log.splitlines():
        words = line.split()
        if len(words) == 2 and words[0] in ("rule", "localrule") and words[1].endswith(":"):
            rule = words[1].rstrip(":")
        elif rule and line.strip().startswith("reason: "):
            found[rule] = line.strip().removeprefix("reason: ")
    return found


@contextlib.contextmanager
def wait_for_site() -> Iterator[None]:
    """Hold the site for one builder at a time: two studies that end together build it one after the other."""
    paths.RUNS.mkdir(parents=True, exist_ok=True)
    with open(paths.RUNS / ".site-lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _take_lock(folder: Path) -> None:
    """Lock `folder` for this process until it ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 100).decode()
        raise RuntimeError(f"study '{folder.name}' is being run in this folder already ({owner}): "
                           "wait until it ends, or stop that process") from None
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()}, since {datetime.datetime.now():%H:%M}".encode())


def hash_tables(study: str) -> str:
    """Return the SHA-256 sums of a run's tables in the form of `sha256sum`, without those that hold times."""
    tables = sorted(path for path in (paths.run_dir(study) / "tables").glob("*.*") if path.is_file())
    return "".join(f"{hashlib.sha256(table.read_bytes()).hexdigest()}  {table.name}\n" for table in tables
                   if table.name not in ("timing.csv", "run.json"))


def pack_run(study: str, bundle: Path) -> Path:
    """Pack what this step wrote under `runs/<study>` (all that is newer than the last `unpack_runs`) into one tar.

    For clusters without a shared file system: a bundle is what Snakemake moves through the object store.
    """
    run_dir = paths.run_dir(study)
    marker = run_dir / ".unpacked"
    since = marker.stat().st_mtime_ns if marker.exists() else 0
    bundle.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(bundle, "w") as archive:
        for path in sorted(run_dir.rglob("*")):
            name = path.relative_to(run_dir)
            kept = (path.is_file() and path.name[0] != "." and not runtime.is_partial(path)
                    and name.parts[0] not in ("bundles", "running"))  # fmt: skip
            if kept and path.stat().st_mtime_ns > since:
                archive.add(path, arcname=name)
    return bundle


def unpack_runs(study: str, bundles: Iterable[Path]) -> None:
    """Unpack what earlier steps packed into `runs/<study>`, and mark the moment for `pack_run`."""
    run_dir = paths.run_dir(study)
    run_dir.mkdir(parents=True, exist_ok=True)
    for bundle in bundles:
        with tarfile.open(bundle) as archive:
            archive.extractall(run_dir, filter="data")
    (run_dir / ".unpacked").touch()


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs of this machine, without importing torch."""
    if not shutil.which("nvidia-smi"):
        return 0
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def find_site_sources() -> list[Path]:
    """Return the files that the site is made from beside the runs: pages, styles, published tables, its modules."""
    patterns = ("*.qmd", "_quarto*.yml", "*.bib", "assets/*", "_extensions/**/*", "data/results/*/*", "data/results/*.csv")
    modules = {path for name in ("site", "report") for path in _follow_imports({f"{PACKAGE}.{name}"})}
    return sorted(modules | {path for pattern in patterns for path in paths.ROOT.glob(pattern) if path.is_file()})


def publish_study(study: str) -> list[Path]:
    """Copy a run's tables, the claims and the report's fragments to `data/results/`; return the files written.

    Figures go to `figures/<study>/` only if the run's manifest says that its images are simulated: no picture of a
    real patient is ever published.
    """
    from medaug import report, tables

    written = tables.publish_tables(study)
    card = paths.run_dir(study) / "manifest.json"
    if card.exists() and json.loads(card.read_text(encoding="utf-8")).get("simulated") is True:
        written += _copy_files(paths.run_dir(study) / "figures", paths.FIGURES / study, ("*.png", "*.svg", "*.json"))
    claims = paths.RUNS / "report" / "claims.csv"
    if claims.exists():
        written.append(Path(shutil.copyfile(claims, paths.RESULTS / "claims.csv")))
    return written + report.write_fragments(published=True)


def _copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Make `target` hold just what `source` holds now."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    files = sorted(path for pattern in patterns for path in source.glob(pattern))
    return [Path(shutil.copyfile(path, target / path.name)) for path in files]


def strip_notebooks(write: bool = True) -> list[str]:
    """Remove outputs and execution counts from the notebooks' sources; return the names of those that had any."""
    dirty = []
    for path in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        if not any(cell["outputs"] or cell["execution_count"] is not None for cell in code):
            continue
        dirty.append(path.name)
        for cell in code:
            cell.update(outputs=[], execution_count=None)
        if write:
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return dirty


def drop_stale_parts(study: str) -> None:
    """Remove the parts of notebooks that `study` does not run (any more), so that no table holds them."""
    story = studies.list_notebooks(study)
    for part in (paths.run_dir(study) / "parts").glob("*/*"):
        if part.stem not in story:
            part.unlink()
