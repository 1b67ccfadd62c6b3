# SPDX-License-Identifier: Apache-2.0
"""Makes the reference of commands from the applications themselves: what ``verl-dvpo COMMAND --help`` says."""

import inspect
from collections.abc import Iterator

import click
import typer

from site_pages.configuration import cell
from verl_dvpo.cli import build_app


def all_commands() -> Iterator[tuple[str, click.Command]]:
    """Yields each installed command and subcommand by its words, ``study run``."""
    application = typer.main.get_command(build_app({"debug": False}))
    yield from _below("", application)


def page() -> str:
    """Returns the page of Markdown."""
    parts = [
        "# Commands",
        "`verl-dvpo COMMAND --help` says the same in a terminal. A mistake in what is given ends in one line and "
        "status 2; `verl-dvpo --debug COMMAND` shows its traceback. Any installed package may add commands "
        "(entry-point group `verl_dvpo.commands`).",
    ]
    for name, command in sorted(all_commands()):
        parts += [f"## verl-dvpo {name}", _text(command), _table(command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _below(prefix: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not hasattr(command, "commands"):
        yield prefix.strip(), command
        return
    for name, inner in command.commands.items():
        yield from _below(f"{prefix} {name}", inner)


def _text(command: click.Command) -> str:
    text = inspect.cleandoc(command.help or "").split("\f")[0]
    return text.replace("<", "&lt;")


def _table(command: click.Command) -> str:
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            name = f"`{(parameter.metavar or parameter.name or '').upper()}`"
        else:
            name = ", ".join(f"`{option}`" for option in parameter.opts)
        rows.append(f"| {name} | {_default(parameter)} | {cell(getattr(parameter, 'help', '') or '')} |")
    return "\n".join(["| option or argument | default | |", "| --- | --- | --- |", *rows]) if rows else ""


def _default(parameter: click.Parameter) -> str:
    if parameter.required:
        return "has to be given"
    default = parameter.default
    if default is None or default == () or default == [] or callable(default) or "Sentinel" in repr(type(default)):
        return ""
    return f"`{cell(str(default))}`"
