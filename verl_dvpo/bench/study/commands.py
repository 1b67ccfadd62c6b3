# SPDX-License-Identifier: Apache-2.0
"""``verl-dvpo study run STUDY.yaml`` and ``verl-dvpo study report DIR``."""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the two commands on `parser`."""
    commands = parser.add_subparsers(required=True, metavar="run|report")
    run = commands.add_parser("run", help="run what the study still lacks; may run several times at once")
    run.add_argument("study", help="YAML file; its fields: verl_dvpo/bench/study/config.py")
    run.add_argument("--out", help="folder, in place of the study's own")
    run.set_defaults(run=_run)
    report = commands.add_parser("report", help="tables, CSV and figures of what is finished")
    report.add_argument("folder", help="folder of the study")
    report.add_argument("--out", help="folder of the report (default: FOLDER/report)")
    report.add_argument("--reference", help="algorithm to compare the others with, in place of the study's own")
    report.set_defaults(run=_report)


def _run(arguments: argparse.Namespace) -> int:
    import dataclasses
    from pathlib import Path

    from verl_dvpo.bench.study.config import load_study
    from verl_dvpo.bench.study.runner import run_study, unfinished

    study = load_study(arguments.study)
    if arguments.out is not None:
        study = dataclasses.replace(study, out=Path(arguments.out))
    failed = run_study(study)
    for run in failed:
        print(f"failed: {run.name}; see {run.record} and {run.log}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} runs failed; the same command tries them again", file=sys.stderr)
        return 1
    left = unfinished(study)
    if left:
        print(f"nothing is left to take; other processes are at {', '.join(run.name for run in left)}")
        return 0
    print(f"all runs are finished; verl-dvpo study report {study.out}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from verl_dvpo.bench.study.report import write_report

    print(write_report(arguments.folder, arguments.out, reference=arguments.reference) / "report.md")
    return 0
