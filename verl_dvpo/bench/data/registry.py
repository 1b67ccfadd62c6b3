# SPDX-License-Identifier: Apache-2.0
"""Lists the sets. Reward workers import this file, so it imports nothing heavy."""

from verl_dvpo.bench.data import dialogue, knowledge, mathematics, noisy
from verl_dvpo.bench.data.schema import DataSet

#: Every set by its name.
SETS: dict[str, DataSet] = {
    each.name: each for each in (*mathematics.SETS, *knowledge.SETS, *dialogue.SETS, *noisy.SETS)
}


def set_of(name: str) -> DataSet:
    """Returns the set of that name.

    Raises:
        ValueError: there is none.
    """
    try:
        return SETS[name]
    except KeyError:
        raise ValueError(f"NAME is {name!r}; the sets are {', '.join(SETS)}; choose one of them") from None
