# SPDX-License-Identifier: Apache-2.0
"""Puts ``verl_dvpo.config`` on Hydra's search path, so that its YAML is found from any directory."""

import re
import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class VerlDvpoSearchPath(SearchPathPlugin):
    """Appends our path behind the primary configuration's own, so that a name that verl has as well stays verl's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        refuse_old_names(sys.argv[1:])
        search_path.append(provider="verl-dvpo", path="pkg://verl_dvpo.config")


def refuse_old_names(overrides: list[str]) -> None:
    """Raises ValueError for an override of ``critic.dvpo``, which Hydra would only call a key that is not there.

    Args:
        overrides: arguments of the command line, before Hydra composes.
    """
    for override in overrides:
        if found := re.match(r"[~+]*critic\.dvpo(?=[.=]|$)", override):
            raise ValueError(old_name(override, "critic.value" + override[found.end() :]))


def old_name(found: str, instead: str) -> str:
    """The error for a setting under ``critic.dvpo``."""
    return f"{found} is set; critic.dvpo is now called critic.value; write {instead}"
