# SPDX-License-Identifier: Apache-2.0
"""Gives one seed to everything of a run that draws."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

#: Fields that take a run's seed, verl's and ours; a field that a configuration lacks is skipped.
SEEDS = (
    "data.seed",
    "noise.seed",
    "actor_rollout_ref.rollout.seed",
    "actor_rollout_ref.actor.data_loader_seed",
    "actor_rollout_ref.actor.fsdp_config.seed",
    "critic.data_loader_seed",
    "critic.fsdp.seed",
    "critic.value.head_seed",
    "critic.value.target_seed",
)


def set_seeds(config: DictConfig, seed: int) -> None:
    """Writes ``seed`` into each field of ``SEEDS`` that ``config`` has."""
    for field in SEEDS:
        if _has(config, field):
            OmegaConf.update(config, field, seed)


def _has(config: DictConfig, field: str) -> bool:
    parent, _, name = field.rpartition(".")
    node: Any = OmegaConf.select(config, parent)
    return node is not None and name in node
