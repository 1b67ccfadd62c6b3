# SPDX-License-Identifier: Apache-2.0
"""Registers ``algorithm.adv_estimator=dvpo``: the actor's advantage under a distributional critic."""

from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import compute_gae_advantage_return, register_adv_est


@register_adv_est("dvpo")
def compute_dvpo_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    values: Tensor | None = None,
    gamma: float | None = None,
    lam: float | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """Computes A_t = (1/M) Σ_j Â_t^j, whitened over the mask [DVPO Eq 2, paper].

    The recurrence is linear, so the mean over quantiles of the distributional GAE is the GAE of the mean value
    (docs/method.md, section 3): verl's own function on the (B, T) means computes it, and no quantile is needed here.

    Args:
        token_level_rewards: (B, T).
        response_mask: (B, T), 0 at padding and at tokens that the policy did not write.
        values: (B, T), the mean of the critic's distribution at the state that predicts each token.
        gamma: discount in [0, 1].
        lam: trace in [0, 1].

    Returns:
        advantages (B, T), whitened, and returns (B, T).

    Raises:
        ValueError: the trainer passed no values, as verl's own trainers do.
    """
    if values is None or gamma is None or lam is None:
        raise ValueError(
            "algorithm.adv_estimator is 'dvpo'; it is allowed under trainers that pass values, which verl's own do "
            "not; set trainer.v1.trainer_mode to dvpo_sync, dvpo_colocate_async or dvpo_separate_async, and "
            "critic.enable=true"
        )
    return compute_gae_advantage_return(
        token_level_rewards=token_level_rewards, values=values, response_mask=response_mask, gamma=gamma, lam=lam
    )
