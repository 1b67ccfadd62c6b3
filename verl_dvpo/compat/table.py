# SPDX-License-Identifier: Apache-2.0
"""Every tie to the insides of verl, vLLM and Ray, in one table.

``applied`` has what ``apply`` puts in place, in that order. ``subclasses`` and ``cpu_subclasses`` have
the methods that our classes redefine. ``calls`` has the functions that our code calls by position, and those whose
insides it relies on.
"""

from verl_dvpo.compat.applied import APPLIED
from verl_dvpo.compat.calls import CALLS
from verl_dvpo.compat.cpu_subclasses import CPU_SUBCLASSES
from verl_dvpo.compat.entry import Entry
from verl_dvpo.compat.subclasses import SUBCLASSES

ENTRIES: tuple[Entry, ...] = (*APPLIED, *SUBCLASSES, *CPU_SUBCLASSES, *CALLS)


def entry(symbol: str) -> Entry:
    """Returns the entry whose symbol or member is ``symbol``; with several, the one that is applied first.

    Raises:
        KeyError: the table has none.
    """
    for each in ENTRIES:
        if symbol in each.symbols():
            return each
    raise KeyError(symbol)
