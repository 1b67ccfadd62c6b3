# SPDX-License-Identifier: Apache-2.0
"""Defines the command ``gate``. Imports of weight are inside the function."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def gate(
    out: Annotated[Path, typer.Option(help="Folder of report.md, its tables and its figure.")],
    tasks: Annotated[
        list[str] | None, typer.Argument(help="TASK=FOLDER to measure; results of other tasks in OUT are kept.")
    ] = None,
    study: Annotated[
        list[Path] | None, typer.Option(help="Folder of a study to compare algorithms in; may be repeated.")
    ] = None,
    critic: Annotated[list[str] | None, typer.Option(help="Algorithm whose critic is fitted; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of every measurement, at least 2.")] = 3,
    fitted: Annotated[int, typer.Option(help="Responses that a critic is fitted to.")] = 3072,
    prompts: Annotated[int, typer.Option(help="Held-out prompts, at least 2.")] = 256,
    answers: Annotated[int, typer.Option(help="Responses to each of them, at least 2.")] = 8,
    epochs: Annotated[int, typer.Option(help="Passes over the fitted responses.")] = 4,
    with_critic: Annotated[str, typer.Option(help="Algorithm of the studies that has a critic.")] = "ppo",
    without_critic: Annotated[str, typer.Option(help="Algorithm of the studies without.")] = "reinforce_plus_plus",
) -> None:
    """Report on which tasks critics matter: what they explain, and whether algorithms with one win.

    Example: `verl-dvpo gate --out runs/gate exam=runs/exam/data --study runs/studies/gate`
    """
    from .comparison import COLUMNS as COMPARED
    from .comparison import compare
    from .critics import critic_of
    from .fit import FitConfig
    from .policy import load_policy, parse_task
    from .report import COMPARISON, SETTINGS, VARIANCE, read_table, replaced, write_report
    from .variance import COLUMNS as MEASURED
    from .variance import SETTINGS as SETTINGS_COLUMNS
    from .variance import Sizes, measure, settings_table

    if seeds < 2:
        raise ValueError(f"seeds is {seeds}; it must be at least 2, since one seed has no interval; choose more")
    if not tasks and not study:
        raise ValueError("tasks is empty; TASK=FOLDER or --study is allowed; name at least one")
    sizes, fit = Sizes(fitted=fitted, prompts=prompts, answers=answers), FitConfig(epochs=epochs)
    critics = {name: critic_of(name) for name in critic or ("ppo", "dvpo_calibrated")}
    policies = [load_policy(*parse_task(text)) for text in tasks or ()]
    measured, settings = read_table(out / VARIANCE, MEASURED), read_table(out / SETTINGS, SETTINGS_COLUMNS)
    compared = read_table(out / COMPARISON, COMPARED)
    if study:
        compared = replaced(compared, compare(study, with_critic=with_critic, without_critic=without_critic))
    out.mkdir(parents=True, exist_ok=True)

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def write() -> Path:
        algorithms = (with_critic, without_critic)
        return write_report(out, settings=settings, measured=measured, compared=compared, algorithms=algorithms)

    for policy in policies:
        found = measure(policy, critics, sizes=sizes, fit=fit, seeds=range(seeds), note=note)
        measured = replaced(measured, found)
        settings = replaced(settings, settings_table(policy.task.name, sizes, fit, seeds))
        write()  # what is measured stays, whatever comes later
    print(write())
