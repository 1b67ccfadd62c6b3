# SPDX-License-Identifier: Apache-2.0
"""Finds the critic that an algorithm of config/algorithm has, with the settings that a run would give it."""

from verl_dvpo.families.base import FamilyConfig


def critic_of(algorithm: str) -> FamilyConfig:
    """Returns the settings of an algorithm's critic, as its configuration composes them.

    Args:
        algorithm: a name in config/algorithm, for example ``ppo``.

    Raises:
        ValueError: there is no such algorithm, or it has no critic of this package.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    import verl_dvpo.plugin  # noqa: F401  (puts verl_dvpo.config on the search path)
    from verl_dvpo.critic.config import family_config

    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("verl.trainer.config", version_base=None):
            config = hydra.compose("dvpo_trainer", overrides=[f"algorithm={algorithm}"])
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"critic is {algorithm!r}; a name in config/algorithm is allowed; {reason}") from error
    value = OmegaConf.select(config, "critic.value")
    if not config.critic.enable or value is None:
        raise ValueError(f"critic is {algorithm!r}; an algorithm with a critic is allowed; choose one, such as ppo")
    settings = OmegaConf.to_container(value, resolve=True)
    assert isinstance(settings, dict)
    return family_config(**{str(name): field for name, field in settings.items() if name != "_target_"})
