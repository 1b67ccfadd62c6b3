# SPDX-License-Identifier: Apache-2.0
"""Refuses a verl that this package was not tested with, before anything starts."""

import os

from verl_dvpo.compat import versions
from verl_dvpo.compat.fingerprints import check


def check_version() -> None:
    """Raises ValueError unless the installed verl is in the table of versions.

    A version under development has one number for many commits, so its source is compared with the table as well.

    Raises:
        ValueError: one line that names the versions that fit.
    """
    if os.environ.get(versions.OVERRIDE_ENV) == "1":
        return
    found = versions.installed()
    if found not in versions.SUPPORTED:
        raise ValueError(f"verl is {found!r}; {versions.fitting()}; install one of them, for example verl==0.9.1")
    if ".dev" in found and (findings := check().findings):
        names = ", ".join(sorted({finding.symbol for finding in findings}))
        raise ValueError(
            f"verl is {found!r} of another commit, which changes {names}; {versions.fitting()}; "
            f"install one of them, or set {versions.OVERRIDE_ENV}=1 to try this one"
        )
