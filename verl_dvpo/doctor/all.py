# SPDX-License-Identifier: Apache-2.0
"""Registers every check of the machine, from cheap to dear."""

from collections.abc import Sequence

# The order of these imports is the order of the report.
# isort: off
import verl_dvpo.doctor.packages
import verl_dvpo.doctor.machine
import verl_dvpo.doctor.process
import verl_dvpo.doctor.learning
import verl_dvpo.doctor.cluster  # noqa: F401

# isort: on
from verl_dvpo.doctor.checks import CHECKS, Check


def chosen(only: Sequence[str] = (), *, quick: bool = False) -> list[Check]:
    """Returns the checks to run, in order.

    Args:
        only: their names; all where it is empty.
        quick: leaves out those that are dear, unless ``only`` names them.

    Raises:
        ValueError: there is no check of such a name.
    """
    unknown = [name for name in only if name not in CHECKS]
    if unknown:
        raise ValueError(f"--only is {unknown[0]!r}; allowed are {', '.join(map(repr, CHECKS))}; choose one of them")
    if only:
        return [each for name, each in CHECKS.items() if name in only]
    return [each for each in CHECKS.values() if not (quick and each.dear)]
