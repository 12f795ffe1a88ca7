"""One thread for each process: `make test` runs several side by side, and threads that wait for each other spin."""

import linecache
import os

import pytest

for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR"):  # read when torch and numpy are first imported, so before any test
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")


@pytest.fixture
def run_cells(tmp_path, monkeypatch):
    """A function that runs a notebook's code cells in this process, its studies in `tmp_path`, and returns their names.

    `run_cells(notebook, until="", **parameters)`: `parameters` come after the notebook's own; the cell with the id `until` and
    those after it do not run.
    """
    import matplotlib.pyplot
    import torch

    from medaug import paths, studies

    def run(notebook, until="", **parameters):
        names = {"display": lambda *shown: None}
        for cell in studies.read_cells(notebook):
            if until and cell["id"] == until:
                break
            if cell["cell_type"] == "code":
                source, place = cell["source"], f"<{notebook} {cell['id']}>"
                linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)  # for inspect.getsource
                exec(compile(source, place, "exec"), names)
                if studies.PAPERMILL_TAG in cell["metadata"].get("tags", []):
                    assert set(parameters) <= set(names)
                    names.update(parameters)
        return names

    matplotlib.use("Agg")
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    monkeypatch.setenv("MEDAUG_HEADLESS", "1")
    yield run
    matplotlib.pyplot.close("all")
    torch.use_deterministic_algorithms(False)
