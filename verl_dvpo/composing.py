# SPDX-License-Identifier: Apache-2.0
"""Composes configurations of ``main_ppo`` without importing verl, whose import takes many seconds."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig


def compose(name: str, overrides: Sequence[str], folder: Path | None = None) -> DictConfig:
    """Composes as ``main_ppo --config-dir folder --config-name name`` does.

    Args:
        name: of the primary configuration.
        overrides: as on the command line.
        folder: where the primary configuration is; None for verl's own and ours.

    Raises:
        HydraException: there is no such configuration, or an override cannot be applied.
        OmegaConfBaseException: an override has a value of another type.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins

    from verl_dvpo.hydra_plugin import VerlDvpoSearchPath

    verl = importlib.util.find_spec("verl")
    assert verl is not None
    assert verl.submodule_search_locations
    base = Path(verl.submodule_search_locations[0]) / "trainer" / "config"
    Plugins.instance().register(VerlDvpoSearchPath)  # as verl_dvpo.plugin does in a process that imports verl
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder or base), version_base=None):
        return hydra_compose(name, overrides=[f"hydra.searchpath=[file://{base}]", *overrides])
