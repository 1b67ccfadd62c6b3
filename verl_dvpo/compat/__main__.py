# SPDX-License-Identifier: Apache-2.0
"""``python -m verl_dvpo.compat``: prints the table of changes, and checks it against sources of verl, vLLM and Ray."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from verl_dvpo.compat.fingerprints import check, installed_trees, record, verl_tree
from verl_dvpo.compat.table import ENTRIES

EXAMPLES = """examples:
  python -m verl_dvpo.compat check                  compares the installed verl, vLLM and Ray with the table
  python -m verl_dvpo.compat check --verl ../verl   compares a checkout of verl instead
  python -m verl_dvpo.compat record --verl ../verl  after reading what changed: writes its fingerprints
  python -m verl_dvpo.compat table                  prints the table as Markdown
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 1 where a check found a difference."""
    parser = argparse.ArgumentParser(
        prog="python -m verl_dvpo.compat",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("check", "record", "table"))
    parser.add_argument("--verl", type=Path, help="a source tree of verl, in place of the installed packages")
    chosen = parser.parse_args(arguments)
    if chosen.command == "table":
        print(table())
        return 0
    try:
        trees = [verl_tree(chosen.verl)] if chosen.verl is not None else installed_trees()
    except ValueError as error:
        parser.error(str(error))
    names = ", ".join(f"{tree.package} {tree.version}" for tree in trees)
    if chosen.command == "record":
        print(f"recorded {record(trees)} symbols of {names}")
        return 0
    report = check(trees)
    for finding in report.findings:
        print(finding)
    for reason in report.skipped:
        print(f"skipped {reason}")
    print(f"{names}: {report.compared} symbols compared, {len(report.findings)} differ")
    return 1 if report.findings else 0


def table() -> str:
    """Writes the table as Markdown, one row an entry."""
    rows = ["| symbol | kind | ours | what | why | versions |", "| --- | --- | --- | --- | --- | --- |"]
    for entry in ENTRIES:
        members = f": {', '.join(f'`{member}`' for member in entry.members)}" if entry.members else ""
        why = f"{entry.why} ({entry.upstream})" if entry.upstream else entry.why
        cells = (f"`{entry.symbol}`{members}", entry.kind.value, f"`{entry.ours}`", entry.what, why)
        rows.append(f"| {' | '.join(cells)} | {', '.join(entry.versions)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
