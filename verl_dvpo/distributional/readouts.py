# SPDX-License-Identifier: Apache-2.0
"""One number of a value distribution that is not its mean, as the actor's value (ours; docs/advantages.md).

Shapes: M equally weighted points of a distribution, ascending, at the levels (2j−1)/(2M).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .advantage_config import CVAR_LEVELS, READOUTS


def readout_weights(size: int, readout: str, level: float) -> Tensor:
    """Weights w_j >= 0 of M ascending points, Σ_j w_j = 1, for a readout V_w = Σ_j w_j θ_j (ours).

    A readout with *fixed* weights commutes with GAE. Let A_t^j be the GAE of quantile j (Eq 2 of [DVPO]), with
    δ_t^j = r_t + γ θ_j(s_{t+1}) − θ_j(s_t) and A_t^j = δ_t^j + γλ A_{t+1}^j. Then Σ_j w_j δ_t^j =
    r_t + γ V_w(s_{t+1}) − V_w(s_t), because the weights sum to 1 and are the same at s_t and s_{t+1}; so by induction
    from the last token Σ_j w_j A_t^j is the scalar GAE of V_w. The mean, the median, the trimmed mean and CVaR are all
    such sums over *sorted* points, and the critic has to hand over V_w alone. An aggregate whose weights depend on the
    A_t^j themselves does not commute: their median over j is not the GAE of any value, because A_t^j does not ascend
    in j.

    Point j stands for the levels from (j−1)/M to j/M, and its weight is the share of them that the readout covers:
    ``mean`` all of [0, 1], ``trimmed`` [level, 1 − level], ``cvar`` [0, level], ``median`` the middle point, or the
    middle two.

    Args:
        size: M >= 1.
        readout: ``mean``, ``median``, ``trimmed`` or ``cvar``.
        level: in (0, 0.5) for ``trimmed``, in (0, 1] for ``cvar``; the others have none.

    Returns:
        (M,) float64.

    Raises:
        ValueError: no point, an unknown readout, or a level outside its bounds.
    """
    if size < 1:
        raise ValueError(f"size is {size!r}; it must be at least 1")
    if readout == "mean":
        low, high = 0.0, 1.0
    elif readout == "median":
        low = (size - 1) // 2 / size
        high = 1.0 - low
    elif readout == "trimmed" and 0.0 < level < 0.5:
        low, high = level, 1.0 - level
    elif readout == "cvar" and 0.0 < level <= 1.0:
        low, high = 0.0, level
    elif readout in READOUTS:
        allowed = "(0, 0.5)" if readout == "trimmed" else "(0, 1]"
        raise ValueError(f"level is {level!r}; with readout {readout!r} it must be in {allowed}")
    else:
        raise ValueError(f"readout is {readout!r}; it must be one of {', '.join(READOUTS)}")
    edges = torch.arange(size + 1, dtype=torch.float64).div_(size).clamp_(low, high)
    return edges.diff() / (high - low)


def read_out(points: Tensor, readout: str, level: float) -> Tensor:
    """V_w = Σ_j w_j θ_j with the weights of ``readout_weights``: (..., M) ascending -> (...), in units of the value."""
    weights = readout_weights(points.shape[-1], readout, level).to(points)
    return points @ weights


def cvar_level(disagreement: Tensor, sigma: Tensor, mask: Tensor) -> Tensor:
    """Takes the level of CVaR from a batch: α = max(α_0, 1 − K), K = Σε²/Σ(ε² + σ²) over valid tokens (ours).

    K is the share of the variance of a return that comes from what the critic does not know. Heads that agree give α =
    1, the mean; heads that disagree by more than the returns spread give the lowest level α_0 of ``CVAR_LEVELS``. One
    level for all states keeps the weights fixed, so the readout commutes with GAE.

    Args:
        disagreement: (B, T) ε, standard deviation of the value over the critic's heads, >= 0.
        sigma: (B, T) σ, spread of the state's distribution, >= 0.
        mask: (B, T) of 0 and 1, any dtype.

    Returns:
        a float64 scalar in [α_0, 1]; 1 where all are 0, or no token is valid.
    """
    unknown = disagreement.double().square().masked_fill(mask == 0, 0.0).sum()
    total = unknown + sigma.double().square().masked_fill(mask == 0, 0.0).sum()
    share = torch.where(total > 0, unknown / total, 0.0)
    return (1.0 - share).clamp_min(min(CVAR_LEVELS.values()))


def cvar_between(level: Tensor, values: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """Reads CVaR at a level between those of ``CVAR_LEVELS`` and 1, by linear interpolation in the level (ours).

    It is a sum of two readouts with fixed weights, so its weights over levels are fixed as well, and sum to 1.

    Args:
        level: scalar in [α_0, 1].
        values: (B, T) the value itself, which stands at level 1.
        fields: name -> (B, T) for each of ``CVAR_LEVELS``.

    Returns:
        (B, T) in units of the value.
    """
    knots = torch.tensor([*CVAR_LEVELS.values(), 1.0], dtype=torch.float64, device=level.device)
    stacked = torch.stack([*(fields[name] for name in CVAR_LEVELS), values])
    above = torch.searchsorted(knots, level.double()).clamp(1, len(knots) - 1)
    share = (level - knots[above - 1]) / (knots[above] - knots[above - 1])
    return torch.lerp(stacked[above - 1], stacked[above], share.to(values.dtype))
