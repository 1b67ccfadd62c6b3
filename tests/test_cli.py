# SPDX-License-Identifier: Apache-2.0
"""The command line finds its commands in the metadata of installed packages, and turns mistakes into one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from verl_dvpo.cli import GROUP, main

ROOT = Path(__file__).parents[1]

COMMANDS = '''
from typing import Annotated

import typer

app = typer.Typer(help="Two more commands.")

@app.command("fail")
def fail() -> None:
    """Fail."""
    raise ValueError("rate is 3;\\n  a number in [0, 1] is allowed; correct it")

@app.command("leave")
def leave(status: int) -> None:
    """Leave with a status."""
    raise typer.Exit(status)

def train(overrides: Annotated[list[str] | None, typer.Argument()] = None, out: str = "here") -> None:
    """Train, with Hydra overrides."""
    print(out, *overrides or [])

def greet(name: str = "you") -> None:
    """Greet someone.

    Example: `verl-dvpo greet --name me`
    """
    print(f"hello {name}")
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs a package with commands into a folder of its own; returns a function that adds entry points."""
    (tmp_path / "outside_commands.py").write_text(COMMANDS)
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: outside\nVersion: 1.0\nRequires-Dist: pytest\nProvides-Extra: full\n"
        'Requires-Dist: surely-not-installed; extra == "full"\nProvides-Extra: light\n'
        'Requires-Dist: pytest; extra == "light"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "outside_commands", raising=False)

    def declare(*lines: str) -> None:
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")

    declare("more = outside_commands:app", "greet = outside_commands:greet [light]")
    return declare


def test_an_outside_package_adds_commands(package, capsys):
    assert main(["greet", "--name", "them"]) == 0
    assert capsys.readouterr().out == "hello them\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "Two more commands." in text
    assert "Greet someone." in text
    assert main(["greet", "--help"]) == 0
    assert "Example: verl-dvpo greet --name me" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_status_2(package, capsys):
    assert main(["more", "fail"]) == 2
    assert capsys.readouterr().err == "error: rate is 3; a number in [0, 1] is allowed; correct it\n"
    with pytest.raises(ValueError, match="rate is 3"):
        main(["--debug", "more", "fail"])
    assert main(["nothing"]) == 2
    assert "No such command 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 1, 5])
def test_the_status_of_a_command_is_returned(package, status):
    assert main(["more", "leave", str(status)]) == status


def test_a_command_whose_extra_is_missing_says_what_to_install(package, capsys):
    package("heavy = outside_commands:greet [full]", "greet = outside_commands:greet")
    assert main(["heavy", "--some", "option"]) == 2
    assert capsys.readouterr().err == (
        "error: command is 'heavy'; it needs an extra that is not installed; pip install 'outside[full]'\n"
    )
    assert main(["--help"]) == 0
    assert "pip install" in " ".join(capsys.readouterr().out.replace("│", " ").split())  # wherever lines break
    assert main(["greet"]) == 0


@pytest.mark.parametrize("target", ["no_such_module:app", "outside_commands:nothing"])
def test_a_command_that_cannot_be_imported_leaves_the_others_alone(package, target, capsys):
    package(f"broken = {target}", "greet = outside_commands:greet")
    assert main(["broken"]) == 2
    assert f"cannot be imported from {target}" in capsys.readouterr().err
    assert main(["greet"]) == 0


def test_every_command_that_ships_is_found_and_teaches_with_an_example(capsys):
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    ours = {
        "data",
        "demo-data",
        "demo",
        "doctor",
        "domains",
        "exam-data",
        "estimate",
        "export",
        "gate",
        "lab",
        "plot",
        "pseudo-labels",
        "pretrain-critic",
        "run",
        "study",
        "sweep",
    }
    assert set(declared) == ours
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    assert "Not available" not in overview
    for words in (*([name] for name in declared), ["study", "run"], ["study", "report"], ["sweep", "report"]):
        assert words[0] in overview
        assert main([*words, "--help"]) == 0
        assert f"Example: verl-dvpo {' '.join(words)} " in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "there", "{}"],
        ["--out", "there", "--", "{}"],
        ["{}", "--out", "there"],
    ],
)
def test_hydra_overrides_pass_with_and_without_a_separator(package, arguments, capsys):
    package("train = outside_commands:train")
    overrides = ["algorithm=ppo", "+task=demo", "~data.shuffle", "trainer.logger=[console]"]
    given = [each for argument in arguments for each in (overrides if argument == "{}" else [argument])]
    assert main(["train", *given]) == 0
    assert capsys.readouterr().out.split() == ["there", *overrides]


def test_the_command_line_imports_nothing_of_the_workbench():
    code = "import sys, verl_dvpo.cli; print([name for name in sys.modules if name.startswith('verl_dvpo.bench')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
