# SPDX-License-Identifier: Apache-2.0
"""Distributional critics for LLM reinforcement learning with verl.

Public names are imported when they are first used. Importing this package alone imports neither torch nor verl, because
verl imports ``verl_dvpo.plugin`` while its own import is still running.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verl_dvpo.distributional.config import DVPOLossConfig
    from verl_dvpo.distributional.levels import quantile_levels
    from verl_dvpo.distributional.losses import dvpo_loss
    from verl_dvpo.distributional.metrics import coverage, crps, pit
    from verl_dvpo.distributional.quantile_huber import quantile_huber_loss
    from verl_dvpo.distributional.returns import distributional_gae, sample_replacement_returns
    from verl_dvpo.export.value_model import TokenValues, ValueModel
    from verl_dvpo.families.base import FamilyConfig, FamilyLoss, ValueFamily
    from verl_dvpo.families.registry import register_family

__version__ = "0.1.0"

__all__ = [
    "DVPOLossConfig",
    "FamilyConfig",
    "FamilyLoss",
    "TokenValues",
    "ValueFamily",
    "ValueModel",
    "__version__",
    "coverage",
    "crps",
    "distributional_gae",
    "dvpo_loss",
    "pit",
    "quantile_huber_loss",
    "quantile_levels",
    "register_family",
    "sample_replacement_returns",
]

# Public name -> the module that defines it.
_HOMES = {
    "DVPOLossConfig": "verl_dvpo.distributional.config",
    "FamilyConfig": "verl_dvpo.families.base",
    "FamilyLoss": "verl_dvpo.families.base",
    "TokenValues": "verl_dvpo.export.value_model",
    "ValueFamily": "verl_dvpo.families.base",
    "ValueModel": "verl_dvpo.export.value_model",
    "coverage": "verl_dvpo.distributional.metrics",
    "crps": "verl_dvpo.distributional.metrics",
    "distributional_gae": "verl_dvpo.distributional.returns",
    "dvpo_loss": "verl_dvpo.distributional.losses",
    "pit": "verl_dvpo.distributional.metrics",
    "quantile_huber_loss": "verl_dvpo.distributional.quantile_huber",
    "quantile_levels": "verl_dvpo.distributional.levels",
    "register_family": "verl_dvpo.families.registry",
    "sample_replacement_returns": "verl_dvpo.distributional.returns",
}


def __getattr__(name: str) -> Any:
    """Imports the module that defines the public name ``name`` and returns its value."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists what is imported already and every public name."""
    return sorted({*globals(), *__all__})
