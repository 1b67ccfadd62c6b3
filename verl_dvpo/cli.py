# SPDX-License-Identifier: Apache-2.0
"""``verl-dvpo``: the commands that are not verl's own."""

import argparse
import sys
from collections.abc import Sequence


def _demo_data(parser: argparse.ArgumentParser) -> None:
    from verl_dvpo.bench.demo.__main__ import add_arguments, run

    add_arguments(parser)
    parser.set_defaults(run=run)


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", default="runs/demo/data", help="folder of the demo's model and data (default: %(default)s)"
    )
    parser.add_argument("--out", default="runs/demo/run", help="folder of the run (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, for example algorithm=ppo")

    def run(arguments: argparse.Namespace) -> int:
        from verl_dvpo.bench.demo.prepare import prepare_demo
        from verl_dvpo.bench.demo.run import run_demo

        return run_demo(prepare_demo(arguments.data), arguments.out, arguments.overrides)

    parser.set_defaults(run=run)


def _domains(parser: argparse.ArgumentParser) -> None:
    from verl_dvpo.bench.domains.commands import add_arguments

    add_arguments(parser)


def _study(parser: argparse.ArgumentParser) -> None:
    from verl_dvpo.bench.study.commands import add_arguments

    add_arguments(parser)


def _lab(parser: argparse.ArgumentParser) -> None:
    from verl_dvpo.bench.lab.__main__ import add_arguments

    add_arguments(parser)


COMMANDS = {
    "demo-data": (_demo_data, "make the demo's model and data"),
    "demo": (_demo, "train on the demo on this machine's CPU"),
    "domains": (_domains, "make the three domains' data and the model that serves them all"),
    "lab": (_lab, "train every critic where the truth is known, and report its errors"),
    "study": (_study, "run a matrix of algorithms, noises, tasks and seeds, and report on it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. A ValueError is the user's and becomes one line."""
    parser = argparse.ArgumentParser(prog="verl-dvpo", description="Distributional critics for verl")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (declare, text) in COMMANDS.items():
        declare(commands.add_parser(name, help=text, description=text))
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
