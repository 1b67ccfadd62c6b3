# SPDX-License-Identifier: Apache-2.0
"""``python -m verl_dvpo.bench.demo --out DIR``: makes the demo's model and data, or finds them."""

import argparse
import sys
from collections.abc import Sequence

from verl_dvpo.bench.demo.prepare import prepare_demo
from verl_dvpo.bench.demo.warm_start import WarmStartConfig

# Enough to run every part of a training run in a test; far too little to learn to add.
TINY_STEPS, TINY_TRAIN, TINY_VAL = 20, 64, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the demo data on `parser`."""
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of problems, demonstrations and weights (default: 0)")
    parser.add_argument("--steps", type=int, help=f"warm-start steps (default: {WarmStartConfig.steps})")
    parser.add_argument("--tiny", action="store_true", help="a few seconds' variant for tests: it cannot add")


def run(arguments: argparse.Namespace) -> None:
    """Makes the folder that `arguments` ask for and prints where its parts are."""
    steps = arguments.steps
    if steps is None:
        steps = TINY_STEPS if arguments.tiny else WarmStartConfig.steps
    config = WarmStartConfig(steps=steps)
    sizes = {"num_train": TINY_TRAIN, "num_val": TINY_VAL} if arguments.tiny else {}
    demo = prepare_demo(arguments.out, seed=arguments.seed, warm_start_config=config, **sizes)
    print(f"{'found' if demo.reused else 'made'} the demo's model and data")
    print(f"  model       {demo.model}\n  train       {demo.train}\n  validation  {demo.val}")
    print(f"  greedy validation accuracy before reinforcement learning: {demo.greedy_accuracy:.3f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. A ValueError is the user's and becomes one line."""
    parser = argparse.ArgumentParser(prog="python -m verl_dvpo.bench.demo", description=__doc__)
    add_arguments(parser)
    try:
        run(parser.parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
