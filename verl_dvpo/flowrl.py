# SPDX-License-Identifier: Apache-2.0
"""Registers ``algorithm=flowrl``, a baseline: its estimator and its policy loss (arXiv 2509.15207, partly rebuilt)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
from verl.utils.torch_functional import masked_mean

from verl_dvpo.distributional.flow_balance import balance_advantages, balance_loss, balance_rewards

NAME = "flowrl"


def beta_of(algorithm: DictConfig | Mapping[str, Any]) -> float:
    """Reads ``algorithm.flowrl.beta``.

    Raises:
        ValueError: it is missing, or no finite number greater than 0.
    """
    beta = (algorithm.get(NAME) or {}).get("beta")
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not 0.0 < beta < float("inf"):
        raise ValueError(f"algorithm.flowrl.beta is {beta!r}; it must be a finite number greater than 0")
    return float(beta)


def check_flowrl(config: DictConfig) -> None:
    """Raises ValueError where a setting takes from FlowRL what it is.

    Args:
        config: the whole configuration; anything is allowed where FlowRL is not used.
    """
    uses = config.algorithm.adv_estimator == NAME
    loss = config.actor_rollout_ref.actor.policy_loss.loss_mode
    if uses != (loss == NAME):
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.loss_mode is {loss!r} and algorithm.adv_estimator is "
            f"{config.algorithm.adv_estimator!r}; 'flowrl' is both or neither; put algorithm=flowrl on the command line"
        )
    if not uses:
        if NAME in config.algorithm:
            raise ValueError(
                f"algorithm.adv_estimator is {config.algorithm.adv_estimator!r}; algorithm=flowrl allows 'flowrl'; "
                "take out the preset or the override that sets it, or choose another algorithm"
            )
        return
    beta_of(config.algorithm)
    needed = {
        "critic.enable": (config.critic.enable, True, "the critic is the log-partition function"),
        "algorithm.gamma": (config.algorithm.gamma, 1.0, "an answer is one step"),
        "algorithm.lam": (config.algorithm.lam, 1.0, "an answer is one step"),
        "algorithm.use_kl_in_reward": (config.algorithm.use_kl_in_reward, False, "the loss has the reference policy"),
        "actor_rollout_ref.actor.use_kl_loss": (
            config.actor_rollout_ref.actor.use_kl_loss,
            True,
            "it brings the reference policy; kl_loss_coef may be 0",
        ),
    }
    for field, (value, wanted, why) in needed.items():
        if value != wanted:
            raise ValueError(f"{field} is {value!r}; algorithm.adv_estimator=flowrl allows {wanted}: {why}; set it")
    if (lam := OmegaConf.select(config, "critic.value.lam")) not in (None, 1.0):
        raise ValueError(
            f"critic.value.lam is {lam!r}; algorithm.adv_estimator=flowrl allows null or 1.0: an answer is one step; "
            "set it"
        )


def flowrl_rewards(batch: Mapping[str, Tensor], uids: np.ndarray, algorithm: DictConfig) -> Tensor:
    """Computes the rewards (B, T) from which the critic learns log Z and the estimator takes its residual.

    Args:
        batch: ``token_level_rewards``, ``old_log_probs``, ``ref_log_prob`` and ``response_mask``, each (B, T).
        uids: (B,) names of prompts.
        algorithm: the section ``algorithm``.
    """
    return balance_rewards(
        batch["token_level_rewards"],
        batch["old_log_probs"],
        batch["ref_log_prob"],
        batch["response_mask"],
        torch.from_numpy(np.unique(uids, return_inverse=True)[1]),
        beta=beta_of(algorithm),
    )


@register_adv_est(NAME)
def compute_flowrl_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, values: Tensor | None = None, **unused: Any
) -> tuple[Tensor, Tensor]:
    """Computes b − log Z(x) at every token, not whitened: the residual of the loss is in units of log-probability.

    Args:
        token_level_rewards: (B, T) of ``flowrl_rewards``.
        response_mask: (B, T).
        values: (B, T) of the critic.

    Returns:
        advantages (B, T) and returns (B, T).

    Raises:
        ValueError: the trainer passed no values, as verl's own trainers do.
    """
    if values is None:
        raise ValueError(
            "algorithm.adv_estimator is 'flowrl'; it is allowed under trainers that pass values, which verl's own do "
            "not; put algorithm=flowrl on the command line, which sets trainer.v1.trainer_mode"
        )
    return balance_advantages(token_level_rewards, values, response_mask)


@register_policy_loss(NAME)
def compute_policy_loss_flowrl(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Computes the mean over answers of w·δ² (paper); the mean is over answers whatever ``loss_agg_mode`` says.

    Args:
        old_log_prob: (B, T).
        log_prob: (B, T), with gradient.
        advantages: (B, T) of ``compute_flowrl_advantage``.
        response_mask: (B, T).
        loss_agg_mode: not used.
        config: the actor's section; its clip ratios bound w.
        rollout_is_weights: (B, T) of verl's rollout correction, or None.
    """
    low, high = (
        config.clip_ratio if bound is None else bound for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    losses, weight = balance_loss(old_log_prob, log_prob, advantages, response_mask, clip_low=low, clip_high=high)
    matrix = losses[:, None].expand_as(log_prob)
    if rollout_is_weights is not None:
        matrix = matrix * rollout_is_weights
    loss = agg_loss(
        loss_mat=matrix, loss_mask=response_mask, loss_agg_mode="seq-mean-token-mean", **config.global_batch_info
    )
    return loss, {
        "actor/ppo_kl": masked_mean(values=old_log_prob - log_prob, mask=response_mask).detach().item(),
        "actor/flowrl_weight": weight.mean().item(),
    }
