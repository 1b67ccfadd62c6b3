# SPDX-License-Identifier: Apache-2.0
"""Trajectory balance of [FlowRL]: rewards that carry the log-partition function, and the squared residual.

docs/method.md, section 7d, has the equations, and says what is rebuilt.

Shapes: B sequences, T response positions. A row's mean over tokens is taken over its valid ones, 0 where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .advantages import _with_last, group_moments, last_valid

#: As in verl's GRPO: added to a group's standard deviation.
GROUP_EPS = 1e-6


def group_normalised(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """Normalises total rewards among the answers to a prompt: r̂ = (R − mean)/(std + 1e-6), std with n − 1 (paper).

    Args:
        rewards: (B, T); the total R is taken over valid tokens.
        mask: (B, T) of 0 and 1, any dtype; rows without a valid token belong to no group.
        groups: (B,) integers, equal for answers to one prompt.

    Returns:
        (B,); R itself where a prompt has one answer, as in verl's GRPO; 0 in rows without a valid token.
    """
    mean, std, is_group = group_moments(rewards, mask, groups)
    totals = rewards.masked_fill(mask == 0, 0.0).sum(-1)
    return torch.where(is_group, (totals - mean) / (std + GROUP_EPS), totals)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Averages over a row's valid tokens: (B, T) -> (B,), 0 where there is none; differentiable."""
    valid = mask != 0
    return values.masked_fill(~valid, 0.0).sum(-1) / valid.sum(-1).clamp_min(1)


def balance_rewards(
    rewards: Tensor, old_log_prob: Tensor, ref_log_prob: Tensor, mask: Tensor, groups: Tensor, *, beta: float
) -> Tensor:
    """Computes b = β·r̂ + (1/|y|) log π_ref − (1/|y|) log π_old of each answer, as the reward of its last token.

    log Z(x) that minimises the mean of (log Z + log π_old/|y| − β·r̂ − log π_ref/|y|)² over answers is the mean of b
    given x: the value of the prompt's last token, undiscounted.

    Args:
        rewards: (B, T).
        old_log_prob: (B, T) of the policy before the update.
        ref_log_prob: (B, T) of the reference policy.
        mask: (B, T).
        groups: (B,) integers, equal for answers to one prompt.
        beta: β > 0.

    Returns:
        (B, T): b at the last valid token, 0 elsewhere.
    """
    apart = mean_over_tokens(ref_log_prob, mask) - mean_over_tokens(old_log_prob, mask)
    return _with_last(torch.zeros_like(rewards), mask, beta * group_normalised(rewards, mask, groups) + apart)


def balance_advantages(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Computes b − log Z(x), the negative residual of the policy before the update, at every token of an answer.

    Args:
        rewards: (B, T) of ``balance_rewards``.
        values: (B, T) of the critic; the first is that of the prompt's last token, log Z(x).
        mask: (B, T).

    Returns:
        advantages (B, T) and returns (B, T), which are b; both 0 at masked tokens.
    """
    valid = (mask != 0).to(rewards.dtype)
    index, _ = last_valid(mask)
    returns = rewards.gather(-1, index[:, None]) * valid
    return returns - values[:, :1] * valid, returns


def balance_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """Computes w·δ² of each answer, with δ = log Z + log π/|y| − β·r̂ − log π_ref/|y| (paper, Eq of the loss).

    With A = b − log Z, δ = (log π − log π_old)/|y| − A, so the residual needs no more than a policy loss is given.
    w = clip(π(y|x)/π_old(y|x), 1 − clip_low, 1 + clip_high) has no gradient.

    Args:
        old_log_prob: (B, T).
        log_prob: (B, T), with gradient.
        advantages: (B, T) of ``balance_advantages``.
        mask: (B, T).
        clip_low: in [0, 1].
        clip_high: >= 0.

    Returns:
        losses (B,) and w (B,).
    """
    apart = (log_prob - old_log_prob).masked_fill(mask == 0, 0.0)
    ratio = apart.detach().sum(-1).clamp(-20.0, 20.0).exp()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    residual = mean_over_tokens(apart, mask) - mean_over_tokens(advantages, mask)
    return weight * residual.square(), weight
