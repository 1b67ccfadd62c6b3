# SPDX-License-Identifier: Apache-2.0
"""Defines the command ``sweep report``. Imports of weight are inside the function."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Report on sweeps of `python -m verl_dvpo.train`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    epilog="Example: `verl-dvpo sweep report multirun/2026-01-31/12-00-00`",
)


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of the sweep, `hydra.sweep.dir`.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the report. (default: FOLDER/report)")] = None,
) -> None:
    """Write the last scores over what was swept: a table in Markdown and CSV, and a figure in PNG and SVG.

    Runs that differ in their seeds alone are one point, with a mean and a standard deviation.

    Example: `verl-dvpo sweep report multirun/2026-01-31/12-00-00 --out docs/risk`
    """
    from verl_dvpo.bench.sweep.report import write_report

    print(write_report(folder, out))
