# SPDX-License-Identifier: Apache-2.0
"""Defines the commands of ``study``: run, status, report and collect. Imports of weight are inside the functions."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Run a matrix of algorithms, noises, tasks and seeds, and report on it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    epilog="Example: `verl-dvpo study run examples/studies/smoke.yaml`",
)


@app.command("run")
def run(
    study: Annotated[Path, typer.Argument(help="YAML file of the study.")],
    out: Annotated[Path | None, typer.Option(help="Folder, in place of the study's own.")] = None,
) -> None:
    """Execute the runs of a study that are not finished.

    The same command resumes an interrupted study and repeats failed runs. Start it several times to execute several
    runs at once: each process claims the next free run.

    With hypotheses, seeds are added until the stopping rule ends; hypotheses or settings that have changed since the
    first run are refused, and the difference is shown.

    Example: `verl-dvpo study run examples/studies/smoke.yaml`
    """
    from verl_dvpo.bench.study.config import load_study
    from verl_dvpo.bench.study.frozen import StudyChangedError
    from verl_dvpo.bench.study.runner import run_study, unfinished

    chosen = load_study(study)
    if out is not None:
        chosen = chosen.changed(out=str(out))
    try:
        failed = run_study(chosen)
    except StudyChangedError as error:
        print(error.diff, end="", file=sys.stderr)
        raise
    for each in failed:
        print(f"failed: {each.name}; see {each.record} and {each.log}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} runs failed; the same command repeats them", file=sys.stderr)
        raise typer.Exit(1)
    left = unfinished(chosen)
    if left:
        print(f"no run is free; other processes execute {', '.join(each.name for each in left)}")
    else:
        print(f"all runs are finished; next: verl-dvpo study report {chosen.out}")


@app.command("status")
def status(folder: Annotated[Path, typer.Argument(help="Folder of the study.")]) -> None:
    """Tell how many runs have ended, and where each contrast stands.

    Example: `verl-dvpo study status runs/studies/reference`
    """
    from verl_dvpo.bench.study.status import status as text

    print(text(folder))


@app.command("collect")
def collect(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.")],
    out: Annotated[Path, typer.Option(help="Folder in a repository.")],
) -> None:
    """Write the report with its tables, figures and frozen hypotheses into a folder of a few MB, without runs.

    Example: `verl-dvpo study collect runs/studies/reference --out docs/results/reference`
    """
    from verl_dvpo.bench.study.collect import collect as gather

    for path in gather(folder, out):
        print(path)


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the report; default: FOLDER/report.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Algorithm to compare the others with, in place of the study's own.")
    ] = None,
) -> None:
    """Write tables, CSV files and figures of the finished runs.

    Example: `verl-dvpo study report runs/studies/smoke --reference ppo`
    """
    from verl_dvpo.bench.study.report import write_report

    print(write_report(folder, out, reference=reference) / "report.md")
