# SPDX-License-Identifier: Apache-2.0
"""Defines the commands ``demo-data``, ``demo`` and ``domains``. Imports of weight are inside the functions."""

import argparse
from pathlib import Path
from typing import Annotated

import typer

Out = Annotated[Path, typer.Option(help="Folder to make.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn, from 0.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the warm start.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="Make a few seconds' variant for tests; its model learns nothing.")]


def demo_data(out: Out = Path("runs/demo/data"), seed: Seed = 0, steps: Steps = None, tiny: Tiny = False) -> None:
    """Make the model and the data of the demo.

    Example: `verl-dvpo demo-data --out runs/demo/data`
    """
    from verl_dvpo.bench.demo.__main__ import run

    run(argparse.Namespace(out=str(out), seed=seed, steps=steps, tiny=tiny))


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, e.g. algorithm=ppo.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of the demo's model and data.")] = Path("runs/demo/data"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo/run"),
) -> None:
    """Train on the demo on this machine's CPU.

    Hydra overrides follow the options, with or without `--` between them.

    Example: `verl-dvpo demo --out runs/demo/ppo -- algorithm=ppo trainer.total_training_steps=20`
    """
    from verl_dvpo.bench.demo.prepare import prepare_demo
    from verl_dvpo.bench.demo.run import run_demo

    raise typer.Exit(run_demo(prepare_demo(data), out, overrides or []))


def domains(out: Out = Path("runs/domains/data"), seed: Seed = 0, steps: Steps = None, tiny: Tiny = False) -> None:
    """Make the data of the three domains, and the model that serves them all.

    Example: `verl-dvpo domains --out runs/domains/data`
    """
    from verl_dvpo.bench.domains.commands import run

    run(argparse.Namespace(out=str(out), seed=seed, steps=steps, tiny=tiny))
