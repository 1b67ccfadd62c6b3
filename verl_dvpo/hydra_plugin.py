# SPDX-License-Identifier: Apache-2.0
"""Puts ``verl_dvpo.config`` on Hydra's search path, so that its YAML is found from any directory."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class VerlDvpoSearchPath(SearchPathPlugin):
    """Behind the primary config's own path: a name that verl has as well stays verl's."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="verl-dvpo", path="pkg://verl_dvpo.config")
