# SPDX-License-Identifier: Apache-2.0
"""Registers every check of the machine, from cheap to dear."""

import importlib
from collections.abc import Sequence

from verl_dvpo.doctor.checks import CHECKS, Check

#: The modules that register checks, in the order of the report; within a module it is that of the file.
ORDER = ("packages", "machine", "process", "learning", "cluster")


def _in_order() -> dict[str, Check]:
    for name in ORDER:
        importlib.import_module(f"verl_dvpo.doctor.{name}")
    return dict(sorted(CHECKS.items(), key=lambda item: ORDER.index(item[1].find.__module__.rpartition(".")[2])))


def chosen(only: Sequence[str] = (), *, quick: bool = False) -> list[Check]:
    """Returns the checks to run, in order.

    Args:
        only: their names; all where it is empty.
        quick: leaves out those that are dear, unless ``only`` names them.

    Raises:
        ValueError: there is no check of such a name.
    """
    known = _in_order()
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"--only is {unknown[0]!r}; allowed are {', '.join(map(repr, known))}; choose one of them")
    if only:
        return [each for name, each in known.items() if name in only]
    return [each for each in known.values() if not (quick and each.dear)]
