# SPDX-License-Identifier: Apache-2.0
"""Reads ``noise.*`` into the model of its kind, and checks it against the rest of a run before Ray starts."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ValidationError

from verl_dvpo.noise.base import PREFIX, NoiseConfig
from verl_dvpo.noise.correction import check_correction
from verl_dvpo.noise.kinds import KINDS, NONE

__all__ = ["PREFIX", "check_config", "noise_config"]


def noise_config(settings: Mapping[str, Any] | DictConfig | None) -> NoiseConfig | None:
    """Returns the noise that ``noise:`` asks for; None where it is absent, or ``kind: none`` without a correction.

    Raises:
        ValueError: an unknown kind or field, a missing one, a value outside its bounds, or a correction that does not
            fit the kind.
    """
    if settings is None:
        return None
    if isinstance(settings, DictConfig):
        settings = OmegaConf.to_container(settings, resolve=True)  # type: ignore[assignment]
    if not isinstance(settings, Mapping):
        raise ValueError(f"{PREFIX} is {settings!r}; it must hold fields; choose a kind with noise=NAME")
    values = {str(name): value for name, value in settings.items()}
    kind = values.pop("kind", None)
    if kind not in (NONE, *KINDS):
        raise ValueError(f"{PREFIX}.kind is {kind!r}; it must be one of {[NONE, *KINDS]}; choose one with noise=NAME")
    model = KINDS.get(kind, NoiseConfig)
    try:
        noise = model.model_validate(values)
    except ValidationError as error:
        # the cause would repeat the same fault in pydantic's words
        raise ValueError(_line(error, model, kind)) from None
    check_correction(noise, kind)
    return None if kind == NONE and noise.correction.kind == "none" else noise


def check_config(config: DictConfig) -> None:
    """Raises ValueError for a ``noise:`` that is wrong in itself, or that this run would not honour."""
    if noise_config(config.get(PREFIX)) is None:
        return
    noise = f"noise={config[PREFIX].kind}"
    if not config.trainer.get("use_v1", True):
        raise ValueError(
            f"trainer.use_v1 is {config.trainer.use_v1}; it must be true with {noise}; set trainer.use_v1=true"
        )
    reward = config.reward
    if reward.reward_model.enable and not reward.reward_model.enable_resource_pool:
        raise ValueError(
            f"reward.reward_model.enable_resource_pool is {reward.reward_model.enable_resource_pool}; it must be true "
            f"with {noise} and a reward model, because verl otherwise scores without telling training from "
            "validation; set reward.reward_model.enable_resource_pool=true"
        )
    if reward.reward_model.enable and not reward.custom_reward_function.path:
        raise ValueError(
            f"reward.custom_reward_function.path is {reward.custom_reward_function.path!r}; it must name a file with "
            f"{noise} and a reward model, because noise wraps reward functions; "
            "set a reward function that asks the reward model"
        )
    groups = config.algorithm.get("filter_groups")
    if groups is not None and groups.enable and groups.metric not in ("reward", "score"):
        raise ValueError(
            f"algorithm.filter_groups.metric is {groups.metric!r}; it must be 'reward' or 'score' with {noise}, "
            "because others stay clean and the filter would see through the noise; use one of the two"
        )
    _check_majority(config)
    if config.algorithm.adv_estimator == "gdpo":
        raise ValueError(
            f"algorithm.adv_estimator is 'gdpo'; it must be another with {noise}, because gdpo learns from the parts "
            "of a reward and noise corrupts only their sum; choose another estimator, or noise=none"
        )


def _check_majority(config: DictConfig) -> None:
    """Raises ValueError where a majority is asked for and cannot vote."""
    if config[PREFIX].get("correction", {}).get("kind") != "majority":
        return
    answers = config.actor_rollout_ref.rollout.n
    if answers < 2:
        raise ValueError(
            f"actor_rollout_ref.rollout.n is {answers!r}; it must be at least 2 with "
            f"{PREFIX}.correction.kind=majority, because one answer is its own majority; set it to 3 or more"
        )
    groups = config.algorithm.get("filter_groups")
    if groups is not None and groups.enable:
        raise ValueError(
            f"algorithm.filter_groups.enable is {groups.enable!r}; it must be false with "
            f"{PREFIX}.correction.kind=majority, because verl filters before the vote; set it to false"
        )


def _line(error: ValidationError, model: type[BaseModel], kind: str) -> str:
    """Says the first fault in one line: the field, its value, what is allowed, what to do."""
    fault = error.errors()[0]
    names = [str(part) for part in fault["loc"] if isinstance(part, str)]
    holder, field = _declaration(model, names)
    name = ".".join([PREFIX, *names])
    file = "_base" if names[0] in NoiseConfig.model_fields else kind
    if fault["type"] == "extra_forbidden":
        allowed = sorted(holder.model_fields)
        return f"{name} is {fault['input']!r}; {PREFIX}.kind={kind} has no such field; its fields are {allowed}"
    if fault["type"] == "missing":
        return f"{name} is missing; it must be {field.description}; set it, or choose the kind with noise={kind}"
    says = str(fault["ctx"]["error"]) if fault["type"] == "value_error" else f"it must be {field.description}"
    return f"{name} is {fault['input']!r}; {says}; config/noise/{file}.yaml explains it"


def _declaration(model: type[BaseModel], names: list[str]) -> tuple[type[BaseModel], Any]:
    """Finds the model and the field that ``names`` lead to; no field for an unknown last name."""
    first, *rest = names
    field = model.model_fields.get(first)
    if rest and field is not None and isinstance(field.annotation, type):
        return _declaration(field.annotation, rest)
    return model, field
