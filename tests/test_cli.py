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
    for command in ("audit", "check", "plan", "run", "execute", "merge", "publish", "site", "strip"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert len(capsys.readouterr().out.splitlines()) >= 5
