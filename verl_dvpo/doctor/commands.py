# SPDX-License-Identifier: Apache-2.0
"""The command ``verl-dvpo doctor``. Its docstring is its help; what it uses is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    run: Annotated[Path | None, typer.Argument(help="A run whose critic is judged, in place of the machine.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out Ray and the trainings.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="A check by its name; again for more. (default: all)", show_default=False)
    ] = None,
) -> None:
    """Check this machine and the installation, or say what is wrong with the critic of a run.

    RUN is the folder of a run, its metrics (`*.jsonl` or TensorBoard's) or its checkpoints; runs of verl's own PPO too.

    Exit status: 0 for no problem, 1 for a problem, 2 for input that cannot be used. A warning is no problem.

    Example: `verl-dvpo doctor runs/demo/dvpo`
    """
    if run is not None:
        if quick or only:
            raise ValueError("--quick and --only choose checks of the machine; with RUN leave them out")
        status = _of_run(run, json)
    else:
        status = _of_machine(json, quick, only or [])
    if status:
        raise typer.Exit(status)


def _of_run(path: Path, json: bool) -> int:
    from verl_dvpo.doctor.lines import exit_status
    from verl_dvpo.doctor.run import diagnose, report, report_json

    run, lines = diagnose(path)
    print(report_json(run, lines) if json else report(run, lines))
    return exit_status(lines)


def _of_machine(json: bool, quick: bool, only: list[str]) -> int:
    from verl_dvpo.doctor.all import chosen
    from verl_dvpo.doctor.checks import Machine, run_checks
    from verl_dvpo.doctor.lines import as_json, exit_status, show, summary

    machine, lines = Machine(), []
    for line in run_checks(chosen(only, quick=quick), machine):
        lines.append(line)
        if not json:
            print(show(line), flush=True)
    print(as_json(lines, platform=machine.platform) if json else summary(lines))
    return exit_status(lines)
