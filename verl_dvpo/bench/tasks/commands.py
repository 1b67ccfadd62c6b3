# SPDX-License-Identifier: Apache-2.0
"""The commands of the tasks: ``verl-dvpo demo-data``, ``demo``, ``domains`` and ``exam-data``.

The docstrings of the functions are the commands' help. What they use is imported when they run, so help is fast.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from verl_dvpo.bench.tasks.registry import DEMO, DOMAINS, EXAM, TaskSet

if TYPE_CHECKING:
    from verl_dvpo.bench.tasks.prepare import TaskFolder

# Enough to run every part of a training run in a test; far too little to learn anything.
TINY_STEPS, TINY_TRAIN, TINY_VAL = 20, 64, 16

Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn, at least 0.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="Make a variant for tests in seconds; its model knows nothing.")]


def demo_data(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("runs/demo/data"),
    seed: Seed = 0,
    steps: Annotated[
        int | None, typer.Option(help=f"Steps of the warm start. (default: {DEMO.warm_start.steps})")
    ] = None,
    num_val: Annotated[int | None, typer.Option(help=f"Validation problems. (default: {DEMO.num_val})")] = None,
    tiny: Tiny = False,
) -> None:
    """Make the demo's model and data (three-digit addition), or find them.

    Example: `verl-dvpo demo-data --out runs/demo/data --num-val 1024`
    """
    made = _prepare(DEMO, out, seed=seed, steps=steps, num_val=num_val, tiny=tiny)
    (name,) = DEMO.tasks
    print(f"{'found' if made.reused else 'made'} the demo's model and data")
    print(
        f"  model       {made.model}\n  train       {made.file(name, 'train')}\n  validation  {made.file(name, 'val')}"
    )
    print(f"  greedy validation accuracy before reinforcement learning: {made.scores[name]['acc']:.3f}")


def demo(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides, for example algorithm=ppo.")] = None,
    data: Annotated[Path, typer.Option(help="Folder of the demo's model and data; made if needed.")] = Path(
        "runs/demo/data"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo/run"),
    num_val: Annotated[int | None, typer.Option(help=f"Validation problems. (default: {DEMO.num_val})")] = None,
) -> None:
    """Train on the demo on this machine's CPU and show a line a step.

    Hydra overrides follow the options, with or without `--` between them.

    Example: `verl-dvpo demo --out runs/demo/ppo algorithm=ppo trainer.total_training_steps=30`
    """
    from verl_dvpo.bench.tasks.run import run_demo

    status = run_demo(_prepare(DEMO, data, num_val=num_val), out, overrides or [])
    if status:
        raise typer.Exit(status)


def domains(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("runs/domains/data"),
    seed: Seed = 0,
    steps: Annotated[
        int | None, typer.Option(help=f"Steps of the warm start. (default: {DOMAINS.warm_start.steps})")
    ] = None,
    num_val: Annotated[
        int | None, typer.Option(help=f"Prompts in each of the six validations. (default: {DOMAINS.num_val})")
    ] = None,
    tiny: Tiny = False,
) -> None:
    """Make the data of arithmetic, science and dialogue and the one model that serves all three, or find them.

    Example: `verl-dvpo domains --out runs/domains/data --num-val 1024`
    """
    made = _prepare(DOMAINS, out, seed=seed, steps=steps, num_val=num_val, tiny=tiny)
    print(f"{'found' if made.reused else 'made'} the domains in {made.path}")
    print("greedy validation before reinforcement learning:")
    for source, scores in made.scores.items():
        print(f"  {source:<20}" + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))


def exam_data(
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("runs/exam/data"),
    seed: Seed = 0,
    steps: Annotated[
        int | None, typer.Option(help=f"Steps of the warm start. (default: {EXAM.warm_start.steps})")
    ] = None,
    num_val: Annotated[int | None, typer.Option(help=f"Validation papers. (default: {EXAM.num_val})")] = None,
    tiny: Tiny = False,
) -> None:
    """Make the model and data of papers with partial credit, or find them.

    Example: `verl-dvpo exam-data --out runs/exam/data --num-val 1024`
    """
    made = _prepare(EXAM, out, seed=seed, steps=steps, num_val=num_val, tiny=tiny)
    (name,) = EXAM.tasks
    print(f"{'found' if made.reused else 'made'} the exam's model and data in {made.path}")
    scores = "  ".join(f"{key} {value:.3f}" for key, value in made.scores[name].items())
    print(f"  greedy validation before reinforcement learning: {scores}")


def _prepare(
    tasks: TaskSet,
    out: Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    num_val: int | None = None,
    tiny: bool = False,
) -> "TaskFolder":
    """Makes or finds the folder that the options ask for."""
    from verl_dvpo.bench.tasks.prepare import prepare

    if steps is None:
        steps = TINY_STEPS if tiny else tasks.warm_start.steps
    if num_val is None:
        num_val = TINY_VAL if tiny else tasks.num_val
    config = dataclasses.replace(tasks.warm_start, steps=steps)
    return prepare(
        tasks, out, seed=seed, num_train=TINY_TRAIN if tiny else tasks.num_train, num_val=num_val, config=config
    )
