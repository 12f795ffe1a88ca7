"""The command `medaug`: quick, one line for a mistake, help for every word."""

import subprocess
import sys

import pytest

from medaug import cli, paths, studies


def call(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "medaug.cli", *arguments], capture_output=True, text=True, **options)


def test_checking_loads_nothing_heavy():
    """What makes `medaug check` answer in under a second."""
    code = ("import sys; from medaug import cli; cli.main(['check', 'phantom']); "
            "print(sorted({'torch', 'pandas', 'numpy', 'snakemake', 'papermill'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "can run: 01-data-audit" in done.stdout


def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path):
    done = call("run", "phantm", env={"PATH": "/usr/bin:/bin", "MEDAUG_RUNS": str(tmp_path / "runs")})
    assert done.returncode == 2
    assert done.stderr.startswith("medaug: there is no study 'phantm', did you mean 'phantom'?")
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments, says", [
    (["check", "phantom", "--data", "/nowhere"], "there is no data folder /nowhere"),
    (["run", "phantom", "--profile", "lsf"], "no profile 'lsf': give one of kubernetes, local, slurm"),
    (["site", "--where", "phantom"], "study 'phantom' has no site yet"),
    (["execute", "phantom", "09-none"], "no notebook '09-none'"),
])
def test_errors(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("medaug: ") and says in said and said.count("\n") == 1


def test_studies_are_listed_with_a_line_each(capsys):
    assert cli.main(["studies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == studies.list_studies()
    assert all(len(line.split()) > 3 for line in lines)


def test_every_command_teaches(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "medaug run phantom --cores 2" in capsys.readouterr().out
    for command in ("audit", "check", "plan", "run", "execute", "merge", "publish", "segment", "site", "strip"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert len(capsys.readouterr().out.splitlines()) >= 5


# -- medaug segment


@pytest.fixture
def films(tmp_path):
    """Weights of a small untrained network, and a folder with images of several kinds, one of them damaged."""
    import torch
    from PIL import Image

    from medaug import segmentation

    torch.manual_seed(0)
    options = {"decoder_channels": [16, 16, 8, 8, 8]}
    network = segmentation.build_segmenter("unet", "tu-lcnet_035", **options)
    segmentation.save_segmenter(tmp_path / "unet.safetensors", network, {
        "architecture": "unet", "encoder": "tu-lcnet_035", "num_classes": 0, "options": options, "image_size": 64,
        "threshold": 0.5, "trained_on": "phantom"})
    folder = tmp_path / "films"
    (folder / "ward").mkdir(parents=True)
    for name, mode, size in (("a.png", "L", (80, 70)), ("a.jpg", "RGB", (64, 64)), ("ward/b.tif", "I;16", (65, 130))):
        Image.new(mode, size).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return tmp_path


def segment(films, *more: str) -> int:
    return cli.main(["segment", str(films / "films"), "--model", str(films / "unet.safetensors"), "--output",
                     str(films / "masks"), *more])


def test_segment_writes_masks_in_each_images_own_size(films, capsys):
    from PIL import Image

    assert segment(films, "--threshold", "0.4") == 0
    assert "3 mask(s)" in capsys.readouterr().out
    masks = {str(path.relative_to(films / "masks")): Image.open(path) for path in (films / "masks").rglob("*.png")}
    assert {name: mask.size for name, mask in masks.items()} == {"a.png.png": (80, 70), "a.jpg.png": (64, 64),
                                                                 "ward/b.png": (65, 130)}
    assert all(mask.mode == "L" and {value for _, value in mask.getcolors()} <= {0, 255} for mask in masks.values())


def test_segment_names_what_it_cannot_read_and_writes_the_rest(films, capsys):
    (films / "films" / "broken.png").write_bytes(b"no image")
    assert segment(films) == 2
    said = capsys.readouterr()
    assert "broken.png: not an image" in said.err and "1 image(s) have no mask" in said.err and "3 mask(s)" in said.out


@pytest.mark.parametrize("change, says", [
    ({"--output": "films"}, "masks would replace them"), ({"--model": "films/a.png"}, "is no network of 06-segmentation"),
    ({"--model": "none.safetensors"}, "no weights"), ({"folder": "nowhere"}, "there is no folder"),
    ({"folder": "empty"}, "no images under")])
def test_segment_says_what_is_wrong_in_one_line(films, capsys, change, says):
    (films / "empty").mkdir()
    given = {"folder": "films", "--model": "unet.safetensors", "--output": "masks", **change}
    options = [word for key in ("--model", "--output") for word in (key, str(films / given[key]))]
    assert cli.main(["segment", str(films / given["folder"]), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("medaug: ") and says in said and said.count("\n") == 1


def test_all_after_two_dashes_goes_to_snakemake(monkeypatch):
    called = []
    monkeypatch.setattr(cli.engine, "run_snakemake", lambda *given, **named: called.append(given) or 0)
    assert cli.main(["run", "phantom", "--cores", "1", "--", "--until", "02-sd-lora"]) == 0
    study, _, options, more = called[0]
    assert study == "phantom" and options[-2:] == ["--cores", "1"] and more == ["--until", "02-sd-lora"]
