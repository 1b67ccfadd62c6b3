# SPDX-License-Identifier: Apache-2.0
"""The command ``verl-dvpo plot``. Its docstring is its help; what it uses is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[list[str], typer.Argument(help="Folder of a run, or NAME=FOLDER; runs of one NAME are a group.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    rollouts: Annotated[
        list[Path] | None,
        typer.Option(help="Answers (parquet, JSON lines) on which the critic of the run's checkpoint is asked."),
    ] = None,
    answers: Annotated[int, typer.Option(help="Answers of each run that are shown.")] = 4,
    from_step: Annotated[int, typer.Option(help="Leaves out what the critic wrote before this step.")] = 0,
    step: Annotated[int | None, typer.Option(help="With --rollouts: which checkpoint. (default: the last)")] = None,
    limit: Annotated[int, typer.Option(help="With --rollouts: how many answers are read.")] = 64,
    device: Annotated[str, typer.Option(help="With --rollouts: where to compute.")] = "cpu",
) -> None:
    """Draw what a run's critic believed: PNGs and one page that needs nothing else.

    The run has `critic.value.dump_every` above 0, or a checkpoint and `--rollouts`. Several runs get their curves too.

    Example: `verl-dvpo plot runs/demo/dvpo --out runs/demo/pictures`
    """
    from verl_dvpo.pictures.draw import draw
    from verl_dvpo.pictures.rollouts import dump_of_rollouts
    from verl_dvpo.pictures.runs import Run, group_runs, read_run
    from verl_dvpo.saved.files import refuse_taken

    for name, value in (("answers", answers), ("limit", limit)):
        if value < 1:
            raise ValueError(f"{name} is {value}; an integer >= 1 is allowed")
    refuse_taken(out)
    groups = group_runs(runs)
    found = [(name, folder) for name, folders in groups.items() for folder in folders]
    if rollouts:
        read = [
            Run(name, folder, (dump_of_rollouts(folder, rollouts, limit=limit, step=step, device=device),))
            for name, folder in found
        ]
    else:
        read = [read_run(name, folder, first_step=from_step) for name, folder in found]
    print(f"wrote {draw(read, out, answers=answers)}")
