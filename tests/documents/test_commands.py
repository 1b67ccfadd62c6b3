# SPDX-License-Identifier: Apache-2.0
"""Every command in the documents exists, with its options, files and overrides, and a test executes such a one.

A block that no test can execute has a comment above it, ``<!-- needs a GPU -->`` and the like (``shell.MARKERS``).
"""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import click
import pytest
import typer
from documents.shell import MARKERS, PAGES, UTILITIES, Command, blocks, commands, overrides
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

import verl_dvpo.plugin  # noqa: F401  (puts verl_dvpo.config on the search path)
from verl_dvpo.cli import GROUP, build_app

ROOT = Path(__file__).parents[2]
COMMANDS = [command for page in PAGES for command in commands(page)]
HINT = f"or put one of {', '.join(f'<!-- {marker} -->' for marker in MARKERS)} above its block"
#: Entry points that are run as modules, with a configuration of Hydra.
MODULES = ("verl.trainer.main_ppo", "verl_dvpo.train")


@cache
def sources() -> dict[str, str]:
    """Every test's text; a command in this folder proves nothing."""
    files = [file for file in (ROOT / "tests").rglob("*.py") if "documents" not in file.parts]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def mentions(pattern: str) -> list[str]:
    return [name for name, text in sources().items() if re.search(pattern, text)]


@cache
def application() -> click.Command:
    return typer.main.get_command(build_app({"debug": False}))


def of_ours() -> list[Command]:
    return [command for command in COMMANDS if command.program == "verl-dvpo"]


def resolved(command: Command) -> tuple[list[str], click.Command, list[str]]:
    """Follows the words of ``verl-dvpo`` to a command: its name, itself, and what is left."""
    found, words, name = application(), list(command.words[1:]), []
    while words and words[0].startswith("--"):
        assert words.pop(0) in ("--debug", "--help"), command
    while hasattr(found, "commands"):
        assert words, f"{command.place}: verl-dvpo {' '.join(name)} needs one of {', '.join(found.commands)}"
        assert words[0] in found.commands, f"{command.place}: there is no command {words[0]!r}"
        name.append(words[0])
        found = found.commands[words.pop(0)]
    return name, found, words


def wrong_options(found: click.Command, words: list[str]) -> Iterator[str]:
    """Yields the options that a command does not have, and arguments that it does not take."""
    options = {text: parameter for parameter in found.params for text in (*parameter.opts, *parameter.secondary_opts)}
    takes = any(parameter.param_type_name == "argument" for parameter in found.params)
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "--":
            return
        if word.startswith("--"):
            name, _, value = word.partition("=")
            if name not in options and name != "--help":
                yield name
            elif not value and not getattr(options.get(name), "is_flag", True):
                words[:1] = []
        elif not takes:
            yield word


@pytest.mark.parametrize("command", of_ours(), ids=lambda command: f"{command.place} {' '.join(command.words)[:60]}")
def test_options_exist(command):
    name, found, words = resolved(command)
    wrong = list(wrong_options(found, words))
    assert not wrong, f"{command.place}: verl-dvpo {' '.join(name)} does not take {', '.join(wrong)}"


def test_options_in_prose_exist():
    """``verl-dvpo X --y`` between backticks, whose words in capitals stand for something."""
    wrong = []
    for page in PAGES:
        text = re.sub(r"^(```|~~~).*?^\1\s*$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for quoted in re.findall(r"`(verl-dvpo [^`]+)`", text):
            words = quoted.replace("\n", " ").split()
            if words[1].isupper():
                continue
            _, found, rest = resolved(Command(page.name, tuple(words), ""))
            wrong += [f"{page.name}: {quoted}: {option}" for option in wrong_options(found, rest)]
    assert not wrong


def test_a_test_executes_each_of_our_commands():
    """A test imports the function that the command is, or calls the program with its name."""
    points = {point.name: point for point in metadata.entry_points(group=GROUP)}
    for command in of_ours():
        (first, *_), _, _ = resolved(command)
        module, _, attribute = points[first].value.split(" ")[0].partition(":")
        called = rf'\[\s*"{first}"|"{first}"\]|cli", "{first}"'
        imported = rf"from {re.escape(module)} import [^\n]*\b{attribute}\b|import {re.escape(module)}\b"
        assert command.marker or mentions(f"{called}|{imported}"), (
            f"{command.place}: no test executes {first}; add one, {HINT}"
        )


def hydra_commands() -> Iterator[tuple[str, str, list[str], str]]:
    """Yields place, primary configuration, overrides and marker of each command that Hydra configures."""
    for command in COMMANDS:
        words = list(command.words)
        if command.program == "python" and words[1:2] == ["-m"] and words[2] in MODULES:
            name, folder, rest = "ppo_trainer" if words[2] == MODULES[0] else "dvpo_trainer", "", words[3:]
            if "--config-name" in rest:
                at = rest.index("--config-name")
                name, rest = rest[at + 1], rest[:at] + rest[at + 2 :]
            if "--config-dir" in rest:
                at = rest.index("--config-dir")
                folder, rest = rest[at + 1], rest[:at] + rest[at + 2 :]
            kept = [
                re.sub(r"=([^\[{(',]+),.*", r"=\1", word) for word in rest if word not in ("...", "-m", "--multirun")
            ]
            yield command.place, f"{folder}:{name}", kept, command.marker
        elif command.program == "verl-dvpo" and command.words[1] in ("demo", "run"):
            _, _, words = resolved(command)
            kept = [word for word in words if re.match(r"^\+*[\w.]+=", word)]
            yield command.place, ":dvpo_trainer", ["+task=demo", "platform=cpu", *kept], command.marker
    for page in PAGES:
        for place, words in overrides(page):
            base = [] if any(word.startswith("algorithm=") for word in words) else ["algorithm=dvpo_calibrated"]
            yield place, ":dvpo_trainer", [*base, *words], ""


def test_overrides_compose(monkeypatch, tmp_path):
    """Each configuration that a command names is one that Hydra makes."""
    monkeypatch.chdir(tmp_path)
    seen, failed = set(), []
    for place, where, words, marker in hydra_commands():
        folder, _, name = where.partition(":")
        if (where, *words) in seen or marker == "needs the network":  # packages that are not installed
            continue
        seen.add((where, *words))
        GlobalHydra.instance().clear()
        more = [f"hydra.searchpath=[file://{ROOT / folder}]"] if folder else []
        try:
            with initialize_config_module("verl.trainer.config", version_base=None):
                compose(name, overrides=[*more, *words], return_hydra_config=True)
        except Exception as error:  # whatever is wrong with any of them is to be reported
            failed.append(f"{place}: {' '.join(words)}: {' '.join(str(error).split())[:300]}")
    assert not failed, "\n".join(failed)
    assert len(seen) > 15


def test_runs_without_the_cpu_platform_are_marked():
    for place, _, words, marker in hydra_commands():
        runs = not any(place == other for page in PAGES for other, _ in overrides(page))
        if runs and "platform=cpu" not in words:
            assert marker, (
                f"{place}: no test runs this without an accelerator; put <!-- needs a GPU --> above its block"
            )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.place} {' '.join(command.words)[:60]}")
def test_programs_files_and_targets_exist(command):
    program, words = command.program, [word for word in command.words[1:] if word != "..."]
    if program == "make":
        targets = re.findall(r"^([a-z]\w*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert next(word for word in words if "=" not in word) in targets, command.place
    elif program == "python" and words[0] == "-m":
        check_module(command, words[1], words[2:])
    elif program == "python" and words[0].endswith(".py"):
        check_script(command, words[0], words[1:])
    elif program == "bash" or command.words[0].startswith("scripts/"):
        script = words[0] if program == "bash" else command.words[0]
        assert (ROOT / script).is_file(), f"{command.place}: there is no {script}"
        assert command.marker or mentions(re.escape(Path(script).name)) or mentions(Path(script).stem), command.place
    else:
        executed = program in UTILITIES or program == "verl-dvpo"
        assert executed or command.marker, f"{command.place}: no test executes {program}; {HINT}"


def check_module(command: Command, module: str, words: list[str]) -> None:
    if module in (*MODULES, "pytest"):
        missing = [word for word in words if module == "pytest" and "/" in word and not (ROOT / word).exists()]
        assert not missing, f"{command.place}: there is no {', '.join(missing)}"
    elif module.startswith("verl_dvpo"):
        assert importlib.util.find_spec(module) is not None, f"{command.place}: there is no module {module}"
        called = rf'"{re.escape(module)}"|(from|import) {re.escape(module)}\b'
        assert command.marker or mentions(called), f"{command.place}: no test executes {module}; {HINT}"
    else:
        assert command.marker, f"{command.place}: no test executes python -m {module}; {HINT}"


def check_script(command: Command, script: str, words: list[str]) -> None:
    """A script's options are strings in it, and a test reads or runs it."""
    assert (ROOT / script).is_file(), f"{command.place}: there is no {script}"
    text = (ROOT / script).read_text()
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    absent = [option for option in options if f'"{option}"' not in text]
    assert not absent, f"{command.place}: {script} has no option {', '.join(absent)}"
    tested = mentions(rf"\b{Path(script).stem}\b")
    assert command.marker or tested, f"{command.place}: no test executes {script}; {HINT}"


def test_python_in_the_documents_is_python_and_its_imports_exist():
    for page in PAGES:
        for number, _, language, text in blocks(page):
            for node in ast.walk(ast.parse(text)) if language == "python" else ():
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("verl_dvpo"):
                    module = importlib.import_module(node.module)
                    absent = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                    assert not absent, f"{page.name}:{number}: {node.module} has no {', '.join(absent)}"


def test_an_option_that_does_not_exist_is_found():
    _, found, words = resolved(Command("here", ("verl-dvpo", "plot", "RUN", "--oot", "DIR"), ""))
    assert list(wrong_options(found, words)) == ["--oot"]
    with pytest.raises(AssertionError, match="there is no command 'plod'"):
        resolved(Command("here", ("verl-dvpo", "plod"), ""))
