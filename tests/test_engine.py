"""What runs when: on the real Snakefile, notebooks and helpers; and what one notebook's run leaves behind."""

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import yaml

from medaug import engine, paths, runtime, studies

ROOT = Path(__file__).resolve().parents[1]
LAST = "07-verdict"


class Project:
    """A copy of the project in a folder of its own; `plan` asks Snakemake, in this process, what would run there."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("notebooks", "studies", "src", "profiles"):
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        shutil.copy(ROOT / "Snakefile", root)
        (root / "data").mkdir()
        (root / "data" / "foundations").symlink_to(ROOT / "data" / "foundations")
        shutil.copy(ROOT / "data" / "claims.csv", root / "data")

    def snakemake(self, *arguments: str) -> str:
        from snakemake.cli import main

        log = io.StringIO()
        with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log), pytest.raises(SystemExit) as end:
            main([*engine._snakemake_arguments("phantom", "", ["--cores", "1", "--nocolor"]), *arguments])
        assert end.value.code == 0, log.getvalue()
        return log.getvalue()

    def reasons(self, *arguments: str) -> dict[str, str]:
        return engine.read_reasons(self.snakemake("--dry-run", *arguments))

    def plan(self) -> set[str]:
        return set(self.reasons()) & set(studies.list_notebooks())

    def pretend_all_ran(self) -> None:
        summary = self.snakemake("--dry-run", "--summary")
        for line in summary.splitlines():
            name = line.split("\t")[0]
            if "\t" in line and name.startswith("runs/"):
                path = self.root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(name)
        self.snakemake("--touch", "--forceall")

    @contextlib.contextmanager
    def edited(self, name: str, old: str, new: str):
        path = self.root / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        yield
        path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MEDAUG_DATA", raising=False)
        made = Project(root)
        for name, folder in {"ROOT": "", "NOTEBOOKS": "notebooks", "STUDIES": "studies", "RUNS": "runs",
                             "FOUNDATIONS": "data/foundations", "RESULTS": "data/results"}.items():  # fmt: skip
            patch.setattr(paths, name, root / folder)
        assert made.plan() == set(studies.list_notebooks("phantom")), "a fresh clone has everything to do"
        made.pretend_all_ran()
        yield made


def uses(module: str) -> set[str]:
    """Notebooks that name a helper in their own imports."""
    return {name for name in studies.list_notebooks("phantom") if f"medaug.{module}" in
            engine.find_imports("\n".join(c["source"] for c in studies.read_cells(name) if c["cell_type"] == "code"))}


def test_nothing_to_do_when_nothing_has_changed(project):
    assert project.plan() == set()


@pytest.mark.parametrize("notebook, stale", [
    ("01-data-audit", {"01-data-audit", "02-sd-lora", "03-generation", "04-clip-lora", "05-baselines", "06-segmentation"}),
    ("02-sd-lora", {"02-sd-lora", "03-generation", "04-clip-lora", "05-baselines"}),
    ("03-generation", {"03-generation", "04-clip-lora", "05-baselines"}),
    ("04-clip-lora", {"04-clip-lora"}),
    ("05-baselines", {"05-baselines"}),
    ("06-segmentation", {"06-segmentation"}),
    (LAST, set()),
])
def test_an_edited_notebook_reruns_with_what_depends_on_it(project, notebook, stale):
    with project.edited(f"notebooks/{notebook}.ipynb", '"cells"', ' "cells"'):
        assert project.plan() == stale | {LAST}
    assert project.plan() == set(), "the same content again, though newer: nothing to do"


def test_an_edited_helper_reruns_the_notebooks_that_import_it(project):
    with project.edited("src/medaug/segmentation.py", "\n", "\n# edited\n"):
        assert project.plan() == {"06-segmentation", LAST}
    with project.edited("src/medaug/clip.py", "\n", "\n# edited\n"):
        assert {"04-clip-lora", LAST} <= project.plan() and "06-segmentation" not in project.plan()


def test_an_edited_helper_of_a_helper_reruns_them_too(project):
    assert "medaug.phantom.anatomy" not in engine.find_imports("from medaug import sources")
    with project.edited("src/medaug/phantom/anatomy.py", "\n", "\n# edited\n"):
        assert "01-data-audit" in project.plan()


def test_an_edited_leaf_reruns_all(project):
    with project.edited("src/medaug/runtime.py", "\n", "\n# edited\n"):
        assert project.plan() == set(studies.list_notebooks("phantom"))


def test_what_no_notebook_imports_reruns_none(project):
    for module in ("cli", "engine", "site"):
        with project.edited(f"src/medaug/{module}.py", "\n", "\n# edited\n"):
            assert project.plan() == set()


def test_a_study_value_reruns_its_notebook_and_says_why(project):
    with project.edited("studies/phantom.yaml", "plan:", "04-clip-lora:\n  seed: 3\nplan:"):
        reasons = project.reasons()
        assert set(reasons) & set(studies.list_notebooks()) == {"04-clip-lora", LAST}
        assert "before: 'seed = 0' now: 'seed = 3'" in reasons["04-clip-lora"]


def test_a_missing_product_is_made_again(project):
    product = project.root / "runs" / "phantom" / "generator" / "generator.json"
    kept = product.rename(product.with_suffix(".kept"))
    assert project.plan() == {"02-sd-lora", "03-generation", "04-clip-lora", "05-baselines", LAST}
    kept.rename(product)
    executed = project.root / "runs" / "phantom" / "notebooks" / "04-clip-lora.ipynb"
    kept = executed.rename(executed.with_suffix(".kept"))
    assert project.plan() == {"04-clip-lora", LAST}, "a notebook that failed is not forgotten"
    kept.rename(executed)


def test_snakemake_writes_under_runs_only(project):
    names = {path.name for path in project.root.iterdir()}
    assert names == {"notebooks", "studies", "src", "profiles", "Snakefile", "data", "runs", ".snakemake"}


def test_notebooks_that_may_run_side_by_side_fit_on_two_cores(project):
    """06 beside 02 and 03, 05 beside 04: one thread each. Threads that wait for each other are slow wherever something else runs."""
    assert all(studies.resolve_parameters("phantom", name)["threads"] == 1 for name in studies.list_notebooks("phantom"))


@pytest.mark.parametrize("profile", ["local", "slurm", "kubernetes"])
def test_profile_holds_only_options_that_snakemake_has(profile):
    from snakemake.cli import get_argument_parser

    known = {option for action in get_argument_parser()._actions for option in action.option_strings}
    settings = yaml.safe_load((ROOT / "profiles" / profile / "config.yaml").read_text(encoding="utf-8"))
    assert settings["executor"] == profile
    assert {f"--{key}" for key in settings} <= known


@pytest.mark.parametrize("profile", ["local", "slurm"])
def test_profile_plans_all(project, profile):
    reasons = project.reasons("--profile", str(project.root / "profiles" / profile), "--forceall", "--quiet", "host")
    assert set(studies.list_notebooks("phantom")) <= set(reasons)


def test_a_cluster_gets_a_gpu_where_the_study_asks_for_one(project):
    with project.edited("studies/phantom.yaml", "plan:", "common:\n  device: cuda\nplan:"):
        log = project.snakemake("--dry-run", "--forceall", "--profile", str(project.root / "profiles" / "slurm"))
    jobs = {block.split(":")[0]: block for block in log.split("\nrule ")[1:]}
    asking = {name for name in studies.list_notebooks("phantom") if "gpu=1" in jobs[name]}
    assert asking == set(studies.list_notebooks("phantom")) - {"01-data-audit", LAST}


@pytest.mark.parametrize("profile, count", [("local", 1), ("slurm", 4)])
def test_a_training_shared_by_processes_gets_a_gpu_for_each(project, profile, count):
    with project.edited("studies/phantom.yaml", "plan:", "common:\n  device: cuda\n02-sd-lora:\n  processes: 4\nplan:"):
        log = project.snakemake("--dry-run", "--forceall", "--quiet", "host", "--profile", str(project.root / "profiles" / profile))
    job = next(block for block in log.split("\nrule ")[1:] if block.startswith("02-sd-lora:"))
    assert f"gpu={count}" in job  # on one machine a single token stands for all of its GPUs


# -- whole runs


def test_the_fingerprint_notices_any_touch(project):
    (paths.run_dir("phantom") / engine.SITE).write_text(f"{project.root / 'Snakefile'}\n")
    engine.mark_done("phantom")
    assert engine.is_done("phantom")
    for name in ("src/medaug/runtime.py", "studies/phantom.yaml", "runs/phantom/manifest.parquet"):
        stat = (project.root / name).stat()
        os.utime(project.root / name)
        assert not engine.is_done("phantom"), name
        os.utime(project.root / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert engine.is_done("phantom")
    (paths.run_dir("phantom") / engine.SITE).write_text("/no/such/index.html\n")
    assert not engine.is_done("phantom"), "a site that was removed is built again"


def test_a_second_run_in_the_same_folder_is_told(tmp_path):
    engine._take_lock(tmp_path / "tiny")
    with pytest.raises(RuntimeError, match=rf"study 'tiny' is being run .* already \(process {os.getpid()}, since"):
        engine._take_lock(tmp_path / "tiny")


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = f"from pathlib import Path; from medaug import engine; engine._take_lock(Path({str(tmp_path)!r})); print(1, flush=True)"
    holder = subprocess.Popen([sys.executable, "-c", f"{code}; import time; time.sleep(60)"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with open(tmp_path / ".lock") as handle, pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    holder.kill()
    holder.wait()
    engine._take_lock(tmp_path)


def test_a_notebook_does_not_outlive_the_run_that_was_killed():
    child = "from medaug import engine; import time; engine.stop_with_parent(0.1); print('up', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    killed = time.time()
    process.send_signal(signal.SIGKILL)
    assert process.stdout.read() == ""  # returns when the last holder of the pipe, the child, has gone
    assert time.time() - killed < 30
    process.wait()


def test_half_written_files_are_nobodys(tmp_path, monkeypatch):
    """Another process may write beside us, and one that was killed leaves its half."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    folder = paths.run_dir("tiny") / "tables"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("a\n1\n")
    for name in ("b.csv", "../run.json"):
        sums, state = engine.hash_tables("tiny"), engine.fingerprint_study("tiny")
        with runtime.replace_when_done(folder / name) as temporary:
            temporary.write_text("half")
            assert engine.hash_tables("tiny") == sums and engine.fingerprint_study("tiny") == state
            engine.pack_run("tiny", tmp_path / "bundle.tar")
            with tarfile.open(tmp_path / "bundle.tar") as bundle:
                assert not [member for member in bundle.getnames() if runtime.PARTIAL in member]
        assert engine.fingerprint_study("tiny") != state


def test_bundles_carry_what_a_step_wrote(tmp_path, monkeypatch):
    """The round trip of a cluster without a shared file system: what is unpacked is not packed again."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "pod-1")
    first = paths.run_dir("tiny")
    (first / "images").mkdir(parents=True)
    (first / "images" / "a.png").write_bytes(b"a")
    engine.pack_run("tiny", tmp_path / "01.tar")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "pod-2")
    engine.unpack_runs("tiny", [tmp_path / "01.tar"])
    second = paths.run_dir("tiny")
    assert (second / "images" / "a.png").read_bytes() == b"a"
    later = time.time() + 5
    for name in ("table.csv", ".hidden"):
        (second / name).write_text(name)
        os.utime(second / name, (later, later))
    engine.pack_run("tiny", tmp_path / "02.tar")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "pod-3")
    engine.unpack_runs("tiny", [tmp_path / "02.tar"])
    assert [path.name for path in paths.run_dir("tiny").iterdir() if path.name[0] != "."] == ["table.csv"]


# -- one notebook


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A project with one small notebook that can be told to fail, and its study `tiny`."""
    for name in ("notebooks", "studies", "runs"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(paths, name.upper(), tmp_path / name)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    sources = ['study = "phantom"\nthreads = 1\nfail = False\n',
               'import os\nif fail:\n    raise ValueError("the first line\\nand the second")\n'
               'print(study, os.environ["PYTHONHASHSEED"], os.environ["OMP_NUM_THREADS"], os.environ["HF_HUB_OFFLINE"])']
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "outputs": [], "execution_count": None, "source": source}
             for i, source in enumerate(sources)]  # fmt: skip
    cells[0]["metadata"]["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": cells}
    (tmp_path / "notebooks" / "01-data-audit.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "studies" / "tiny.yaml").write_text("")
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return tmp_path


def test_a_notebook_appears_when_all_of_it_has_run(tiny, capsys):
    executed = engine.execute_notebook("tiny", "01-data-audit")
    assert executed == tiny / "runs" / "tiny" / "notebooks" / "01-data-audit.ipynb"
    cells = json.loads(executed.read_text())["cells"]
    assert "".join(cells[-1]["outputs"][0]["text"]) == "tiny 0 1 1\n"
    assert "injected-parameters" in cells[1]["metadata"]["tags"] and 'study = "tiny"' in "".join(cells[1]["source"])
    assert "fail" not in "".join(cells[1]["source"]), "only what differs from the parameter cell is injected"
    assert "01-data-audit starts" in capsys.readouterr().out
    assert not list((tiny / "runs" / "tiny" / "running").iterdir())


def test_a_failed_notebook_is_one_line_and_never_shown(tiny):
    (tiny / "studies" / "tiny.yaml").write_text("01-data-audit:\n  fail: true\n")
    studies._parse_study.cache_clear()
    with pytest.raises(engine.NotebookError) as caught:
        engine.execute_notebook("tiny", "01-data-audit")
    message = str(caught.value)
    assert "01-data-audit failed in cell [3]: ValueError: the first line; the copy with all of it is" in message
    assert "\n" not in message
    copy = tiny / "runs" / "tiny" / "failed" / "01-data-audit.ipynb"
    assert str(copy) in message and "and the second" in copy.read_text()
    assert not list((tiny / "runs" / "tiny" / "notebooks").iterdir())


def test_outputs_are_stripped_from_sources(tiny):
    path = tiny / "notebooks" / "01-data-audit.ipynb"
    notebook = json.loads(path.read_text())
    assert engine.strip_notebooks() == []
    notebook["cells"][1].update(execution_count=4, outputs=[{"output_type": "stream", "name": "stdout", "text": ["x"]}])
    path.write_text(json.dumps(notebook))
    assert engine.strip_notebooks(write=False) == ["01-data-audit.ipynb"] == engine.strip_notebooks()
    cell = json.loads(path.read_text())["cells"][1]
    assert cell["outputs"] == [] and cell["execution_count"] is None
    assert engine.strip_notebooks() == []


@pytest.mark.parametrize("source, found", [
    ("from medaug import paths, plots", {"medaug", "medaug.paths", "medaug.plots"}),
    ("import medaug.tables as t\nimport numpy", {"medaug.tables"}),
    ("from medaug.phantom import chest", {"medaug.phantom", "medaug.phantom.chest"}),
    ("%matplotlib inline\n!ls\nif True:\n    from medaug import guards", {"medaug", "medaug.guards"}),
    ("import os", set()),
    ("this is not python", set()),
])
def test_imports_are_read_from_cells(source, found):
    assert engine.find_imports(source) == found


@pytest.mark.parametrize("reason, short", [
    ("Missing output files: runs/a/b.ipynb; Input files updated by another job: c", "not made yet"),
    ("Updated input files: src/medaug/clip.py, notebooks/04.ipynb", "changed: clip.py, 04.ipynb"),
    ("Params have changed since last execution: Union of exclusive params before and now across all output: "
     "before: 'rank = 4' now: 'rank = 8'", "changed: 'rank = 4' -> 'rank = 8'"),
    ("Input files updated by another job: runs/a/manifest.parquet", "what it reads is made anew"),
    ("up to date", "up to date"),
])  # fmt: skip
def test_reasons_are_short_in_the_plan(reason, short):
    assert engine.shorten_reason(reason) == short


def test_durations_read_as_a_person_says_them():
    assert [engine.format_minutes(m) for m in (0.5, 2, 200)] == ["30 s", "2.0 min", "3.3 h"]
