# SPDX-License-Identifier: Apache-2.0
"""``python -m verl_dvpo.bench.lab --out DIR``: runs the critic lab; writes lab.json, report.md and figures to DIR."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .experiments import DEFAULT, EXPERIMENTS, run
from .figures import figures
from .report import markdown
from .training import MODELS, TrainConfig

QUICK_UPDATES = 20
NAMES = ("spread", *EXPERIMENTS)


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Declares the command's options, and :func:`execute` as what ``run`` does."""
    p.add_argument("--out", type=Path, required=True, help="folder for lab.json, report.md and the figures")
    p.add_argument("--seeds", type=int, default=4, help="runs of everything, at least 2 (default 4)")
    p.add_argument("--quick", action="store_true", help="a look at whether it runs: 2 seeds, few updates, no findings")
    p.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    p.add_argument("--all", action="store_true", help="every experiment; about twice the default's time")
    p.add_argument("--updates", type=int, help=f"critic updates of a run (default {TrainConfig().updates})")
    p.add_argument("--model", choices=sorted(MODELS), default="table", help="what stands for the backbone")
    p.add_argument("--workers", type=int, help="processes of one thread each (default: one per CPU)")
    p.add_argument("--resume", action="store_true", help="keep the runs that DIR/lab.json has, and add what is missing")
    p.add_argument("--redraw", action="store_true", help="only the report and figures, from DIR/lab.json")
    p.set_defaults(run=execute)


def execute(args: argparse.Namespace) -> None:
    """Runs the lab.

    Raises:
        ValueError: fewer than 2 seeds, or runs to take up that are not of this kind.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "lab.json"
    if args.redraw:
        result = json.loads(path.read_text())
    else:
        config = replace(TrainConfig(), model=args.model)
        if args.updates or args.quick:
            config = replace(config, updates=args.updates or QUICK_UPDATES)
        seeds = range(2 if args.quick else args.seeds)
        done = json.loads(path.read_text()) if args.resume else None
        names = args.only or (NAMES if args.all else DEFAULT)

        def save(so_far: dict) -> None:
            unfinished = path.with_suffix(".part")
            unfinished.write_text(json.dumps(so_far) + "\n")
            unfinished.replace(path)

        result = run(names, config, seeds, workers=args.workers, done=done, save=save)
        save(result)
    (args.out / "report.md").write_text(markdown(result))
    for figure in figures(result, args.out):
        print(figure)
    print(args.out / "report.md")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the lab with the given arguments, by default the command line's."""
    p = argparse.ArgumentParser(prog="python -m verl_dvpo.bench.lab", description=__doc__)
    add_arguments(p)
    args = p.parse_args(argv)
    try:
        execute(args)
    except ValueError as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
