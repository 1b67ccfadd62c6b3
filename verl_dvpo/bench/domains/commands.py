# SPDX-License-Identifier: Apache-2.0
"""``verl-dvpo domains --out DIR``: makes the three domains' data and the model that serves them all."""

import argparse

# Enough to run every part of a training run in a test; far too little to learn anything.
TINY_STEPS, TINY_TRAIN, TINY_VAL = 20, 64, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options on `parser`."""
    parser.add_argument("--out", default="runs/domains/data", help="folder to make (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of the warm start")
    parser.add_argument("--tiny", action="store_true", help="a few seconds' variant for tests: it has learned nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Makes the folder that `arguments` ask for and prints how well its model does."""
    from verl_dvpo.bench.domains.prepare import prepare_domains
    from verl_dvpo.bench.domains.warm_start import DomainsConfig

    steps = arguments.steps
    if steps is None:
        steps = TINY_STEPS if arguments.tiny else DomainsConfig.steps
    sizes = {"num_train": TINY_TRAIN, "num_val": TINY_VAL} if arguments.tiny else {}
    made = prepare_domains(arguments.out, seed=arguments.seed, config=DomainsConfig(steps=steps), **sizes)
    print(f"{'found' if made.reused else 'made'} the domains in {made.folder}")
    print("greedy validation before reinforcement learning:")
    for source, scores in made.scores.items():
        print(f"  {source:<20}" + "  ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    return 0
