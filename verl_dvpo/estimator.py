# SPDX-License-Identifier: Apache-2.0
"""Registers ``algorithm.adv_estimator=dvpo``: the actor's advantage under a distributional critic, and its options."""

from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from verl.trainer.ppo.core_algos import compute_gae_advantage_return, register_adv_est
from verl.utils.torch_functional import masked_whiten

from verl_dvpo.distributional.advantage_config import AdvantageConfig
from verl_dvpo.distributional.advantages import actor_advantages

#: The section of the options in the YAML. verl 0.9.1 never builds its ``AlgoConfig`` from ``algorithm`` in training
#: (estimators get the section itself), so a key more is as good as its own.
PREFIX = "algorithm.value"


def advantage_config(algorithm: DictConfig | Mapping[str, Any] | None) -> AdvantageConfig:
    """The options of ``algorithm.value``, checked; the defaults where there is no such section.

    Raises:
        ValueError: an unknown field, or a value outside its bounds.
    """
    section = (algorithm or {}).get("value")
    if OmegaConf.is_config(section):
        section = OmegaConf.to_container(section, resolve=True)
    allowed = [f.name for f in fields_of(AdvantageConfig)]
    for name, value in (section or {}).items():
        if name not in allowed:
            raise ValueError(f"{PREFIX}.{name} is {value!r}; there is no such field; use one of {', '.join(allowed)}")
    try:
        return AdvantageConfig(**(section or {}))
    except ValueError as error:
        raise ValueError(f"{PREFIX}.{error}") from None


def check_options(config: DictConfig) -> None:
    """Raises ValueError for options of the advantage that are out of bounds, or that estimator or critic cannot serve.

    Args:
        config: the whole configuration; a critic of this package where the estimator is ``dvpo``.
    """
    options = advantage_config(config.algorithm)
    if options.is_off:
        return
    estimator, answers = config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.n
    if estimator != "dvpo":
        raise ValueError(
            f"algorithm.adv_estimator is {estimator!r}; only 'dvpo' reads the options of {PREFIX}, and one is on; set "
            "algorithm.adv_estimator=dvpo and choose a critic, or switch the options off"
        )
    if options.weighting == "group_std" and answers < 2:
        raise ValueError(
            f"actor_rollout_ref.rollout.n is {answers!r}; {PREFIX}.weighting 'group_std' needs at least 2 answers to a "
            "prompt; set it to 2 or more, or the weighting to 'precision'"
        )
    from verl_dvpo.critic.config import family_config
    from verl_dvpo.critic.readings import check_readings
    from verl_dvpo.families.registry import build_family

    section = OmegaConf.to_container(config.critic.value, resolve=True)
    assert isinstance(section, dict)
    settings = family_config(**{str(name): value for name, value in section.items() if name != "_target_"})
    check_readings(build_family(settings), options, settings.family)


@register_adv_est("dvpo")
def compute_dvpo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    values: Tensor | None = None,
    gamma: float | None = None,
    lam: float | None = None,
    config: DictConfig | Mapping[str, Any] | None = None,
    index: np.ndarray | None = None,
    fields: Mapping[str, Tensor] | None = None,
    metrics: dict[str, Any] | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Computes A_t = (1/M) Σ_j Â_t^j, whitened over the mask [DVPO Eq 2, paper], or a form that ``config`` asks for.

    The recurrence is linear, so the mean over quantiles of the distributional GAE is the GAE of the mean value
    (docs/method.md, section 3): verl's own function on the (B, T) means computes it, and no quantile is needed here.
    The options of ``algorithm.value`` (ours, docs/advantages.md) change the actor's advantages only; the returns stay
    those of the plain form, and so do the critic's own targets, which its worker builds.

    Args:
        token_level_rewards: (B, T).
        response_mask: (B, T), 0 at padding and at tokens that the policy did not write.
        values: (B, T), the mean of the critic's distribution at the state that predicts each token.
        gamma: discount in [0, 1].
        lam: trace in [0, 1].
        config: the section ``algorithm``.
        index: (B,) names of prompts, for ``weighting: group_std``.
        fields: name -> (B, T), what the chosen options need of the critic beside ``values``.
        metrics: takes the options' metrics.

    Returns:
        advantages (B, T), whitened, and returns (B, T).

    Raises:
        ValueError: the trainer passed no values, as verl's own trainers do; or an option outside its bounds.
    """
    if values is None or gamma is None or lam is None:
        raise ValueError(
            "algorithm.adv_estimator is 'dvpo'; it is allowed under trainers that pass values, which verl's own do "
            "not; set trainer.v1.trainer_mode to dvpo_sync, dvpo_colocate_async or dvpo_separate_async, and "
            "critic.enable=true"
        )
    advantages, returns = compute_gae_advantage_return(
        token_level_rewards=token_level_rewards, values=values, response_mask=response_mask, gamma=gamma, lam=lam
    )
    options = advantage_config(config)
    if options.is_off:
        return advantages, returns
    with torch.no_grad():
        found = actor_advantages(
            token_level_rewards,
            values,
            response_mask,
            config=options,
            gamma=gamma,
            lam=lam,
            fields=fields or {},
            groups=None if index is None else torch.from_numpy(np.unique(index, return_inverse=True)[1]),
        )
        if metrics is not None:
            metrics.update({name: value.item() for name, value in found.metrics.items()})
        return masked_whiten(found.advantages, response_mask), returns
