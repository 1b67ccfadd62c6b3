# SPDX-License-Identifier: Apache-2.0
"""Lets a value distribution act on the actor, through (B, T) fields (ours; docs/advantages.md).

The actor of [DVPO] sees only the mean of the quantiles: GAE is linear. Each function here lets more of the distribution
act: on the weight of an advantage, on the reward, on the value that is its baseline, or on λ. None carries a gradient.

Shapes: B sequences, T response positions, M levels. Position t is the state that predicts token t. The mask rule is
verl's (``compute_gae_advantage_return``): a masked position's reward and value are ignored, and the next value and the
running advantage are carried through it. So a response's last state is its last valid position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._checks import check_unit_interval
from .advantage_config import AdvantageConfig
from .readouts import cvar_between, cvar_level
from .returns import _next_valid, _scan


@dataclass(frozen=True)
class ActorAdvantages:
    """The actor's advantages before whitening, and what was done to get them.

    Attributes:
        advantages: (B, T).
        metrics: name -> scalar; one or two for each option that is on.
    """

    advantages: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def actor_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    config: AdvantageConfig,
    gamma: float,
    lam: float,
    fields: Mapping[str, Tensor],
    groups: Tensor | None = None,
) -> ActorAdvantages:
    """Changes the reward, takes the GAE of the readout and weighs it, as ``config`` says (ours).

    Args:
        rewards: (B, T) per-token rewards.
        values: (B, T) mean of the critic's distribution.
        mask: (B, T) of 0 and 1, any dtype.
        config: which options are on.
        gamma: discount in [0, 1].
        lam: trace in [0, 1] where ``config.lam_actor`` is None.
        fields: name -> (B, T) for each of ``config.fields``.
        groups: (B,) integers, equal for answers to one prompt; ``group_std`` needs them.

    Raises:
        ValueError: a field or the groups are missing, or a number is outside its bounds.
    """
    missing = [name for name in config.fields if name not in fields]
    if missing:
        raise ValueError(f"fields has {sorted(fields)}; these options of the advantage also need {missing}")
    if config.weighting == "group_std" and groups is None:
        raise ValueError("groups is None; weighting 'group_std' needs the number of each response's prompt")
    baseline, read = _baseline(values, mask, config, fields)
    changed, metrics = _changed_rewards(rewards, baseline, mask, config, fields)
    metrics |= read
    trace = _trace(mask, config, lam)
    if isinstance(trace, Tensor):
        metrics["advantages/lam"] = trace.mean()
    advantages = gae(changed, baseline, mask, gamma=gamma, lam=trace)
    if config.weighting != "none":
        if config.weighting == "precision":
            sigma = fields["value_sigma"]
        else:
            assert groups is not None, "checked above"
            sigma = group_std(rewards, mask, groups)[:, None].expand_as(rewards)
        weights = precision_weights(sigma, eps=config.weighting_eps, power=config.weighting_power)
        advantages = advantages * weights
        metrics["advantages/effective_share"] = effective_share(weights, mask)
    return ActorAdvantages(advantages, metrics)


def _baseline(
    values: Tensor, mask: Tensor, config: AdvantageConfig, fields: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    if config.readout == "mean":
        return values, {}
    if not config.adapts_readout:
        return fields["value_readout"], {}
    level = cvar_level(fields["value_disagreement"], fields["value_sigma"], mask)
    return cvar_between(level, values, fields), {"advantages/readout_level": level}


def _changed_rewards(
    rewards: Tensor, values: Tensor, mask: Tensor, config: AdvantageConfig, fields: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    metrics: dict[str, Tensor] = {}
    if config.reward == "raw":
        return rewards, metrics
    if config.reward == "winsorised":
        sigma = fields.get("value_sigma", torch.zeros_like(values))
        low, high = fields["value_low"], fields["value_high"]
        changed = winsorise_rewards(rewards, mask, low, high, sigma, widening=config.reward_widening)
    elif config.reward == "gated":
        if config.gate_gain is None:
            gain = gate_gain(fields["value_disagreement"], fields["value_sigma"])
            exists = last_valid(mask)[1]
            metrics["advantages/gate_gain"] = at_last(gain, mask).sum() / exists.sum().clamp_min(1)
        else:
            gain = torch.full_like(values, config.gate_gain)
        changed = gate_rewards(rewards, mask, values, gain)
    else:
        start = values if config.reward == "clipped_residual" else torch.zeros_like(values)
        changed = clip_rewards(rewards, mask, start, low=config.reward_low, high=config.reward_high)
    return changed, metrics | {"advantages/reward_change": (changed - rewards).abs().sum(-1).mean()}


def _trace(mask: Tensor, config: AdvantageConfig, lam: float) -> float | Tensor:
    if config.lam_actor == "length":
        return length_lambda(mask, alpha=config.length_alpha)
    return lam if config.lam_actor is None else config.lam_actor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float | Tensor) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438) without whitening, with a λ for each response.

    δ_t = r_t + γ V(s_{t+1}) − V(s_t), A_t = δ_t + γλ A_{t+1}; over masked positions as verl does it.

    Args:
        rewards: (B, T).
        values: (B, T).
        mask: (B, T) of 0 and 1, any dtype.
        gamma: discount in [0, 1].
        lam: trace in [0, 1], one number or (B,).

    Returns:
        (B, T); a masked position carries the advantage of the next valid one, 0 where there is none.

    Raises:
        ValueError: ``gamma`` or a single ``lam`` outside [0, 1].
    """
    check_unit_interval("gamma", gamma)
    if isinstance(lam, Tensor):
        decay = gamma * lam.to(values.dtype)[:, None].expand_as(values)
    else:
        check_unit_interval("lam", lam)
        decay = torch.full_like(values, gamma * lam)
    valid = mask != 0
    following = _next_valid(values.detach()[:, :, None], valid)[:, :, 0]
    errors = (rewards + gamma * following - values).detach().masked_fill(~valid, 0.0)
    trace = torch.where(valid, decay, 1.0)
    return _scan(errors[:, :, None], trace[:, :, None].contiguous())[:, :, 0]


def length_lambda(mask: Tensor, *, alpha: float) -> Tensor:
    """λ = 1 − 1/(α·length) of each response (VAPO, arXiv 2504.05118), and 0 where α·length is below 1.

    The weights (1 − λ)λ^n of the n-step returns then have a mean horizon of α·length tokens.

    Args:
        mask: (B, T); a response's length is its number of valid tokens.
        alpha: > 0; 0.05 in VAPO.

    Returns:
        (B,) float64 in [0, 1).
    """
    length = (mask != 0).sum(-1).double()
    return 1.0 - 1.0 / (alpha * length).clamp_min(1.0)


# ---------------------------------------------------------------------------------------------------- weights


def precision_weights(sigma: Tensor, *, eps: float, power: int = 2) -> Tensor:
    """1/(σ^p + ε): an advantage counts less where the return is uncertain (ours).

    With p = 2 and ε the variance of an advantage that has other causes than the state's return, these are inverse
    variance weights. σ = 0 gives 1/ε. Whitening follows, so only ratios of weights matter.

    Args:
        sigma: (...) spread >= 0, in units of reward; half the distance between the 16 % and the 84 % quantile.
        eps: ε > 0, in units of reward to the power p.
        power: p, 1 or 2.

    Raises:
        ValueError: ``eps`` is not greater than 0.
    """
    if not eps > 0:
        raise ValueError(f"eps is {eps!r}; it must be greater than 0: where sigma is 0 the weight is 1/eps")
    return (sigma.square() if power == 2 else sigma).add(eps).reciprocal()


def group_std(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """Standard deviation of the total reward among the answers to a prompt, as GRPO takes it (arXiv 2402.03300).

    Divided by n − 1; 1 where a prompt has one answer, as in verl. Rows without a valid token belong to no group.

    Args:
        rewards: (B, T); the total is taken over valid tokens.
        mask: (B, T).
        groups: (B,) integers, equal for answers to one prompt.

    Returns:
        (B,) in units of reward, 1 for rows without a valid token.
    """
    _, std, is_group = group_moments(rewards, mask, groups)
    return torch.where(is_group, std, 1.0)


def group_moments(rewards: Tensor, mask: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Measures total rewards among the answers to a prompt.

    Args:
        rewards: (B, T); the total is taken over valid tokens.
        mask: (B, T) of 0 and 1, any dtype; rows without a valid token belong to no group.
        groups: (B,) integers, equal for answers to one prompt.

    Returns:
        means (B,) and standard deviations (B,), divided by n − 1, of each row's group, and whether that group has two
        answers or more and the row is one of them (B,) bool. Where it is not, the deviation is 0.
    """
    valid = mask != 0
    exists = valid.any(-1).to(rewards.dtype)
    totals = rewards.masked_fill(~valid, 0.0).sum(-1)
    places = torch.unique(groups, return_inverse=True)[1]
    zeros = torch.zeros_like(totals)
    count = zeros.index_add(0, places, exists)
    mean = zeros.index_add(0, places, totals * exists) / count.clamp_min(1)
    squares = zeros.index_add(0, places, (totals - mean[places]).square() * exists)
    is_group = (count[places] > 1) & (exists > 0)
    std = (squares / (count - 1).clamp_min(1)).sqrt()
    return mean[places], std[places] * is_group, is_group


def effective_share(weights: Tensor, mask: Tensor) -> Tensor:
    """(Σw)²/(n·Σw²) over the n valid tokens: the share of the tokens that still count; 1 where all weigh the same.

    Args:
        weights: (B, T), > 0.
        mask: (B, T).

    Returns:
        a scalar in (0, 1]; 0 without a valid token.
    """
    valid = weights.masked_fill(mask == 0, 0.0).double()
    count = (mask != 0).sum()
    return valid.sum().square() / (count * valid.square().sum()).clamp_min(torch.finfo(torch.float64).tiny)


# ---------------------------------------------------------------------------------------------------- rewards


def last_valid(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The last valid position of each row.

    Args:
        mask: (B, T) of 0 and 1, any dtype; T of at least 1.

    Returns:
        index (B,) int64, 0 where there is none; exists (B,) bool.
    """
    positions = torch.arange(mask.shape[-1], device=mask.device)
    index = torch.where(mask != 0, positions, -1).amax(-1)
    return index.clamp_min(0), index >= 0


def at_last(values: Tensor, mask: Tensor) -> Tensor:
    """(B, T) -> (B,): what stands at the last valid position; 0 in rows without one."""
    index, exists = last_valid(mask)
    return torch.where(exists, values.gather(-1, index[:, None])[:, 0], 0.0)


def _with_last(rewards: Tensor, mask: Tensor, last: Tensor) -> Tensor:
    """``rewards`` with (B,) ``last`` at the last valid token; rows without one as they were."""
    index, exists = last_valid(mask)
    old = rewards.gather(-1, index[:, None])
    return rewards.scatter(-1, index[:, None], torch.where(exists[:, None], last[:, None], old))


def winsorise_rewards(
    rewards: Tensor, mask: Tensor, low: Tensor, high: Tensor, sigma: Tensor, *, widening: float
) -> Tensor:
    """R → min(max(R, l − kσ), u + kσ) at the last state (ours).

    The distribution of the last state describes the reward of the last valid token, which is R; where the reward is
    terminal it is the response's total. Earlier rewards stay as they are.

    Args:
        rewards: (B, T).
        mask: (B, T).
        low: (B, T) l, the lower of two quantiles of the state's distribution.
        high: (B, T) u, the upper one.
        sigma: (B, T) spread >= 0.
        widening: k >= 0.

    Returns:
        (B, T).
    """
    margin = widening * at_last(sigma, mask)
    reward = at_last(rewards, mask)
    floor, ceiling = at_last(low, mask) - margin, at_last(high, mask) + margin
    return _with_last(rewards, mask, torch.minimum(torch.maximum(reward, floor), ceiling))


def gate_gain(disagreement: Tensor, sigma: Tensor) -> Tensor:
    """K = ε²/(ε² + σ²): the gain of a Kalman filter that measures V once with noise σ and believed it up to ε (ours).

    Args:
        disagreement: (...) ε, standard deviation of the value over the critic's heads, >= 0.
        sigma: (...) σ, spread of the state's distribution, >= 0, in the same unit.

    Returns:
        (...) in [0, 1]; 1 where both are 0: a reward without noise is believed.
    """
    epistemic, total = disagreement.square(), disagreement.square() + sigma.square()
    return torch.where(total > 0, epistemic / total, 1.0)


def gate_rewards(rewards: Tensor, mask: Tensor, values: Tensor, gain: Tensor) -> Tensor:
    """R → V + K·(R − V) at the last state, R and V as in ``winsorise_rewards`` (ours).

    The error of the last state becomes K times what it was. Heads that agree on a wrong value give a small K, and then
    little is learned from the reward.

    Args:
        rewards: (B, T).
        mask: (B, T).
        values: (B, T) V, the value that the actor sees.
        gain: (B, T) K in [0, 1]: 1 leaves the reward, 0 takes the critic's word for it.

    Returns:
        (B, T).
    """
    value, reward = at_last(values, mask), at_last(rewards, mask)
    return _with_last(rewards, mask, torch.lerp(value, reward, at_last(gain, mask)))


def clip_rewards(rewards: Tensor, mask: Tensor, start: Tensor, *, low: float, high: float) -> Tensor:
    """R → S + (R − S drawn in to two quantiles of the batch's R − S) at the last state (ours).

    Two controls of ``winsorise_rewards`` without a distribution: S = 0 needs no critic, S = V a scalar one.

    Args:
        rewards: (B, T).
        mask: (B, T); rows without a valid token do not count.
        start: (B, T) S.
        low: level in [0, 1].
        high: level in [0, 1], above ``low``; quantiles are read by linear interpolation.

    Returns:
        (B, T).
    """
    exists = last_valid(mask)[1]
    if not exists.any():
        return rewards
    origin = at_last(start, mask)
    residual = at_last(rewards, mask) - origin
    levels = torch.tensor([low, high], dtype=residual.dtype, device=residual.device)
    floor, ceiling = torch.quantile(residual[exists], levels)
    return _with_last(rewards, mask, origin + residual.clamp(floor, ceiling))
