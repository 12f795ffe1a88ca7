"""Study files: every mistake is one clear line, before anything has run."""

import json

import pytest
import torch

from medaug import classifiers, paths, studies

PARAMETERS = {
    "01-data-audit": 'study = "phantom"\nseed = 0\nsource = "phantom"  # where from\ndata = ""\nfolder = ""\n'
                     'image_size = 64  # px\n',
    "02-sd-lora": 'study = "phantom"\nseed = 0\nlearning_rate = 1e-3\nrank = 4\nmasks = False\nlayers = ["to_q"]\n',
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two notebooks; returns a function that writes the study file `mine` and checks it."""
    for name in ("notebooks", "studies", "runs", "data"):
        (tmp_path / name).mkdir()
    for name, source in PARAMETERS.items():
        cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source.splitlines(keepends=True)}
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(json.dumps({"cells": [cell]}))
    for name in ("notebooks", "studies", "runs"):
        monkeypatch.setattr(paths, name.upper(), tmp_path / name)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.delenv("MEDAUG_DATA", raising=False)

    def write(text: str, data: str = "") -> None:
        (tmp_path / "studies" / "mine.yaml").write_text(text)
        studies._parse_study.cache_clear()
        studies.check_study("mine", data)

    write.folder = tmp_path / "data"
    return write


def test_values_come_from_cell_then_common_then_section(project):
    project("common:\n  seed: 1\n  image_size: 128\n02-sd-lora:\n  seed: 2\n  learning_rate: 1e-4\n")
    assert studies.resolve_parameters("mine", "01-data-audit") == {
        "study": "mine", "seed": 1, "source": "phantom", "data": "", "folder": "", "image_size": 128}
    tuned = studies.resolve_parameters("mine", "02-sd-lora")
    assert (tuned["seed"], tuned["rank"]) == (2, 4)
    assert tuned["learning_rate"] == 1e-4  # which YAML 1.1 reads as text


@pytest.mark.parametrize("text, says", [
    ("02-sd-lora:\n  rnk: 8\n", "unknown parameter 'rnk', did you mean 'rank'?"),
    ("common:\n  rnak: 8\n", "common: unknown parameter 'rnak', did you mean 'rank'?"),
    ("02-sd-lra:\n  rank: 8\n", "no notebook '02-sd-lra', did you mean '02-sd-lora'?"),
    ("02-sd-lora:\n  rank: eight\n", "'rank' is 'eight', expected a whole number (as in the notebook: 4)"),
    ("02-sd-lora:\n  rank: 4.5\n", "'rank' is 4.5, expected a whole number"),
    ("02-sd-lora:\n  masks: 1\n", "'masks' is 1, expected true or false"),
    ("02-sd-lora:\n  layers: to_q\n", "'layers' is 'to_q', expected a list"),
    ("02-sd-lora:\n  learning_rate: fast\n", "expected a number"),
    ("common:\n  seed: [1, 2]\n", "'seed' is [1, 2], expected a whole number"),
    ("02-sd-lora:\n  rank: 4\n  rank: 8\n", "'rank' is given twice"),
    ("02-sd-lora:\n  study: other\n", "'study' is the file's own name"),
    ("02-sd-lora: 8\n", "must hold `name: value` lines"),
    ("- rank\n", "expected sections"),
    ("02-sd-lora: {rank\n", "not valid YAML"),
    ("common:\n  skip: [03-generation]\n", "skip: no notebook '03-generation'"),
    ("plan:\n  02-sd-lora: {minuts: 3}\n", "did you mean 'minutes'?"),
    ("01-data-audit:\n  source: guangzhou\n", "needs a folder: set `data` there, or DATA=/path"),
    ("01-data-audit:\n  source: guangzhou\n  data: /no/such/folder\n", "there is no /no/such/folder"),
    ("01-data-audit:\n  folder: /no/such/folder\n", "there is no /no/such/folder"),
])
def test_a_mistake_is_one_line_that_says_what_to_change(project, text, says):
    with pytest.raises((studies.StudyError, FileNotFoundError)) as caught:
        project(text)
    assert says in str(caught.value)
    assert "studies/mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(paths.RUNS.iterdir())


def test_unknown_study_names_the_known_ones(project):
    project("")
    with pytest.raises(studies.StudyError, match="no study 'mien', did you mean 'mine'.*known: mine"):
        studies.check_study("mien")


def test_missing_data_folder(project):
    with pytest.raises(FileNotFoundError, match="no data folder /nowhere/at/all"):
        project("", data="/nowhere/at/all")


def test_data_folder_by_command_or_environment(project, monkeypatch):
    text = "01-data-audit:\n  source: guangzhou\n"
    project(text, data=str(project.folder))
    monkeypatch.setenv("MEDAUG_DATA", str(project.folder))
    project(text)


def test_a_study_that_may_fetch_needs_no_folder(project):
    project("common:\n  online: true\n01-data-audit:\n  source: guangzhou\n")


def test_skipped_notebooks_are_left_out(project):
    project("common:\n  skip: [02-sd-lora]\n")
    assert studies.list_notebooks("mine") == ["01-data-audit"]


def test_parameter_cell_must_hold_literals(project):
    path = paths.NOTEBOOKS / "02-sd-lora.ipynb"
    path.write_text(path.read_text().replace("rank = 4", "rank = 2 * two"))
    with pytest.raises(studies.StudyError, match="02-sd-lora.ipynb: the parameter cell may only hold lines"):
        studies.read_parameters("02-sd-lora")


def test_estimate_prefers_what_was_measured(project):
    project("plan:\n  01-data-audit: {minutes: 9, disk_gb: 2}\n  02-sd-lora: {minutes: 5, gpu_hours: 1.5}\n")
    (paths.RESULTS / "mine").mkdir(parents=True)
    (paths.RESULTS / "mine" / "run.json").write_text(json.dumps({"01-data-audit": {"wall_seconds": 120}}))
    estimate = studies.estimate_study("mine")
    assert estimate["01-data-audit"] == {"minutes": 2, "disk_gb": 2, "gpu_hours": 0, "basis": "published run"}
    assert estimate["02-sd-lora"] == {"minutes": 5, "disk_gb": 0, "gpu_hours": 1.5, "basis": "plan"}
    card = paths.run_dir("mine") / "parts" / "run" / "01-data-audit.json"
    card.parent.mkdir(parents=True)
    card.write_text(json.dumps({"wall_seconds": 30}))
    assert studies.estimate_study("mine")["01-data-audit"]["basis"] == "last run"


@pytest.mark.parametrize("name", studies.list_studies())
def test_every_study_that_ships_is_right(name):
    """Each key exists in its notebook, each value has its type; every notebook that it runs has an estimate."""
    study = studies.load_study(name)
    assert study.get("description"), "say in one line what the study is"
    assert set(studies.list_notebooks(name)) <= set(study["plan"])


def test_the_embedded_study_is_the_notebooks_own_defaults():
    for notebook in studies.list_notebooks("phantom"):
        assert studies.resolve_parameters("phantom", notebook) == studies.read_parameters(notebook)


@pytest.mark.parametrize("name", [n for n in studies.list_studies() if "05-baselines" in studies.list_notebooks(n)])
def test_every_network_of_a_study_can_be_built_and_cut(name):
    """On the meta device: no memory and no weights. Their sizes are asserted in test_classifiers.py."""
    parameters = studies.resolve_parameters(name, "05-baselines")
    for model, own in parameters["models"].items():
        unknown = set(own) - {"network", "weights", "frozen", "size", "channels", "mean", "std", "steps", "batch_size", "learning_rate",
                              "weight_decay", "optimizer", "schedule", "arms"}
        assert not unknown, f"{model}: {unknown}"
        assert set(own.get("arms", [])) <= set(parameters["arms"])
        assert all(isinstance(value, float) for key in ("learning_rate", "weight_decay") for value in own[key]), model
        if own["network"] == "clip":
            continue
        with torch.device("meta"):
            network = classifiers.build_classifier(own["network"], len(parameters["classes"]), "none", own["channels"], own["size"])
            if own["frozen"] not in (0, "all"):
                body, tail = classifiers.split_model(network, own["frozen"])
                assert classifiers.count_parameters(body)[0] == 0 < classifiers.count_parameters(tail)[0]


@pytest.mark.parametrize("name", [n for n in studies.list_studies() if "07-verdict" in studies.list_notebooks(n)])
def test_the_primary_model_of_a_study_meets_its_family(name):
    """The endpoint's model is trained, on both sides of every comparison of the family, with images enough for the ratio."""
    trained, verdict = (studies.resolve_parameters(name, notebook) for notebook in ("05-baselines", "07-verdict"))
    own = trained["models"][verdict["primary_model"]]
    assert {arm for pair in verdict["family"] for arm in pair} <= set(own.get("arms", trained["arms"]))
    assert verdict["ratio"] == trained["ratio"] and verdict["classes"] == trained["classes"]
    made = studies.resolve_parameters(name, "03-generation")
    assert trained["generator"] in made["generators"] and set(trained["generator_seeds"]) <= set(made["generator_seeds"])


@pytest.mark.parametrize("page", ["README.md", "guide.qmd"])
def test_the_study_file_that_the_pages_print_is_enough(tmp_path, monkeypatch, page):
    """Two classes of one's own and a folder: captions, arms and notebooks fit them, and nothing else need be said."""
    text = (paths.ROOT / page).read_text(encoding="utf-8")
    printed = text[text.index("# studies/my-hospital.yaml"):].partition("```")[0]
    (tmp_path / "my-hospital.yaml").write_text(printed)
    monkeypatch.setattr(paths, "STUDIES", tmp_path)
    notebooks = studies.list_notebooks("my-hospital")
    assert "06-segmentation" not in notebooks and len(notebooks) == 6
    parameters = {notebook: studies.resolve_parameters("my-hospital", notebook) for notebook in notebooks}
    classes = ["normal", "pneumonia"]
    assert list(parameters["02-sd-lora"]["prompts"]) == classes
    captions = parameters["04-clip-lora"]["prompt_sets"]
    assert parameters["04-clip-lora"]["tuning_prompts"] in captions and all(list(texts) == classes for texts in captions.values())
    assert captions["plain"] == parameters["02-sd-lora"]["prompts"]
    assert "oracle" not in parameters["05-baselines"]["arms"] and "real+synthetic" in parameters["05-baselines"]["arms"]
    assert parameters["03-generation"]["n_per_class"] == 0  # as many as the ratio asks for
    (tmp_path / "my-hospital.yaml").write_text(printed + "02-sd-lora:\n  prompts: {normal: clear, pneumonia: ill}\n06-segmentation:\n  steps: 10\n")
    assert studies.resolve_parameters("my-hospital", "02-sd-lora")["prompts"] == {"normal": "clear", "pneumonia": "ill"}
    assert "06-segmentation" in studies.list_notebooks("my-hospital")
