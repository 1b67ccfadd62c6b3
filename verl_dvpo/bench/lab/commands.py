# SPDX-License-Identifier: Apache-2.0
"""Defines the command ``lab``. Imports of weight are inside the function."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

QUICK_UPDATES = 20


def lab(
    out: Annotated[Path, typer.Option(help="Folder for lab.json, report.md and the figures.")],
    seeds: Annotated[int, typer.Option(help="Seeds of every run, at least 2.")] = 4,
    quick: Annotated[bool, typer.Option("--quick", help="Check that it runs: 2 seeds, few updates.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Experiments, several by repeating the option.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every experiment; about twice the default's time.")] = False,
    updates: Annotated[int | None, typer.Option(help="Critic updates of a run.")] = None,
    model: Annotated[str, typer.Option(help="What stands for the backbone: table or mlp.")] = "table",
    workers: Annotated[int | None, typer.Option(help="Processes of one thread each; default: one per CPU.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the runs that lab.json has.")] = False,
    redraw: Annotated[bool, typer.Option("--redraw", help="Only write report and figures, from lab.json.")] = False,
) -> None:
    """Train every critic where the true returns are known, and report its errors.

    Example: `verl-dvpo lab --out runs/lab --only kappa --only terms --seeds 8`
    """
    from verl_dvpo.bench.common import write_json, write_text

    from .experiments import DEFAULT, EXPERIMENTS, run
    from .figures import figures
    from .report import markdown
    from .training import TrainConfig

    path = out / "lab.json"
    if (resume or redraw) and not path.is_file():
        raise ValueError(f"out is {str(out)!r}; --resume and --redraw need its lab.json; run the lab there first")
    done = _done(path) if resume or redraw else None
    out.mkdir(parents=True, exist_ok=True)
    if redraw and done is not None:
        result = done
    else:
        config = dataclasses.replace(TrainConfig(), model=model)
        if updates is not None or quick:
            config = dataclasses.replace(config, updates=QUICK_UPDATES if updates is None else updates)
        names = only or (("spread", *EXPERIMENTS) if all_ else DEFAULT)
        result = run(
            names,
            config,
            range(2 if quick else seeds),
            workers=workers,
            done=done,
            save=lambda so_far: write_json(path, so_far),
        )
        write_json(path, result)
    try:
        text, drawn = markdown(result), figures(result, out)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; a lab that is done is allowed; finish it with --resume") from error
    write_text(out / "report.md", text)
    for figure in drawn:
        print(figure)
    print(out / "report.md")


def _done(path: Path) -> dict[str, Any]:
    """Reads what an earlier call has measured.

    Raises:
        ValueError: the file is broken, or another version of the lab wrote it.
    """
    from verl_dvpo.saved.files import read_json

    found = read_json(path)
    if missing := {"meta", "runs"} - found.keys():
        raise ValueError(f"{path} lacks {sorted(missing)}; a file of this version's lab is allowed; run the lab anew")
    return found
