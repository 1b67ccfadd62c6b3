# SPDX-License-Identifier: Apache-2.0
"""Runs ``verl-dvpo COMMAND``; each command is an entry point of the group ``verl_dvpo.commands``.

    [project.entry-points."verl_dvpo.commands"]
    study = "my_package.commands:app [my-extra]"

The object is a ``typer.Typer`` application, or a function with a docstring that typer understands. The extra in
brackets, if there is one, says what the command needs beyond its package. Any installed package may add commands.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Annotated, Any

import typer
from packaging.requirements import Requirement

GROUP = "verl_dvpo.commands"
#: Variables that switch progress bars off: tqdm's, and that of transformers, which has its own class.
QUIET = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    A mistake of the user becomes one line ``error: ...`` and status 2: a ValueError, and an OSError, which is what a
    file, a disk or a hub that cannot be reached raises. With ``--debug`` it is raised, and its traceback shown.

    Args:
        argv: arguments without the program's name; the command line's by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    settings: dict[str, bool] = {"debug": False}
    quiet_bars(sys.stderr.isatty())
    try:
        build_app(settings)(args=arguments, prog_name="verl-dvpo")
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except (ValueError, OSError) as error:
        if settings["debug"]:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def quiet_bars(terminal: bool) -> None:
    """Switches off the progress bars of all libraries, here and in child processes, where there is no terminal.

    A bar writes carriage returns, with which a file of a log becomes one line. A user's own setting is kept.
    """
    if not terminal:
        for name in QUIET:
            os.environ.setdefault(name, "1")


def one_line(error: ValueError | OSError) -> str:
    """Returns what an error says without its line breaks; of the system's errors the file and the reason."""
    if isinstance(error, OSError) and error.strerror is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or f"{type(error).__name__}, without a word; --debug shows where"


def build_app(settings: dict[str, bool]) -> typer.Typer:
    """Returns the application with every installed command.

    Args:
        settings: receives the global option ``debug``.
    """
    app = typer.Typer(
        name="verl-dvpo",
        help="Distributional critics for verl.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        epilog="Example: `verl-dvpo demo algorithm=dvpo` trains a small model on this machine's CPU.",
    )

    @app.callback()
    def read_options(
        debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    ) -> None:
        settings["debug"] = debug

    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        _add(app, entry)
    return app


def missing_extra(entry: metadata.EntryPoint) -> str | None:
    """Returns what to install for an entry point whose extra is not installed; None if nothing is missing."""
    package = entry.dist
    if package is None:
        return None
    for extra in entry.extras:
        for text in package.requires or ():
            required = Requirement(text)
            needed = required.marker is not None and required.marker.evaluate({"extra": extra})
            if needed and not required.marker.evaluate({"extra": ""}) and not _is_installed(required.name):  # type: ignore[union-attr]
                return f"pip install '{package.name}[{extra}]'"
    return None


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _add(app: typer.Typer, entry: metadata.EntryPoint) -> None:
    """Adds one command, or a stand-in that says why it cannot run."""
    install = missing_extra(entry)
    if install is not None:
        _add_stand_in(app, entry.name, f"needs an extra that is not installed; {install}")
        return
    try:
        command: typer.Typer | Callable[..., Any] = entry.load()
    except (ImportError, AttributeError) as error:
        _add_stand_in(app, entry.name, f"cannot be imported from {entry.value}: {error}; reinstall its package")
        return
    if isinstance(command, typer.Typer):
        app.add_typer(command, name=entry.name)
    else:
        app.command(entry.name)(command)


def _add_stand_in(app: typer.Typer, name: str, reason: str) -> None:
    @app.command(
        name,
        help=f"Not available: {reason}",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def stand_in() -> None:
        raise ValueError(f"command is {name!r}; it {reason}")


if __name__ == "__main__":
    sys.exit(main())
