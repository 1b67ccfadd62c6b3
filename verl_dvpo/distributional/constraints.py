# SPDX-License-Identifier: Apache-2.0
"""The five constraints of the DVPO loss: `cvar`, `gain`, `shift`, `shape`, `curvature` (Eqs 5 to 9, spec section 4).

Each is a difference d(q) between a statistic of the critic's distribution q and of the target samples z. `cvar` should
be zero; the others should not be positive. `shape` and `curvature` have a lower and an upper part, so there are seven
differences in all.

Shapes: M quantiles, K target samples, L tokens, "..." any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from ._checks import as_compute, tail_size
from .config import CONSTRAINT_TERMS, DVPOLossConfig
from .levels import check_levels, read_at
from .quantile_huber import check_points
from .sorting import sort_samples, sort_with_gradient

# The differences that make up each term.
PARTS: Mapping[str, tuple[str, ...]] = {
    "cvar": ("cvar",),
    "gain": ("gain",),
    "shift": ("shift",),
    "shape": ("shape_low", "shape_up"),
    "curvature": ("curvature_low", "curvature_up"),
}
MULTIPLIERS = tuple(part for name in CONSTRAINT_TERMS for part in PARTS[name])

# Rows × points that `constraint_multipliers` sorts at a time: it sees a whole update, a copy of which would be large.
_CHUNK = 1 << 22


def constraint_terms(
    quantiles: torch.Tensor,
    sorted_targets: torch.Tensor,
    levels: torch.Tensor,
    config: DVPOLossConfig,
    names: Collection[str],
    multipliers: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """The constraint terms of one token each, before their coefficients.

    With multipliers μ (`constraint: batch`, ours) a term is Σ 2·μ·d(q) over its parts: the gradient step of
    relu(mean d)². Without (`constraint: token`, the papers' literal reading): d² for `cvar`, relu(d)² for `gain`,
    Σ relu(d) for the others.

    Args:
        quantiles: (..., M) q, the head-averaged quantiles.
        sorted_targets: (..., K) z, ascending.
        levels: (M,) τ.
        config: tail shares.
        names: which of the five terms.
        multipliers: a scalar for each part, or None.

    Returns:
        name -> (...).
    """
    differences = constraint_differences(sort_with_gradient(quantiles), sorted_targets, levels, config, names)
    terms = {}
    for name in names:
        parts = [differences[part] for part in PARTS[name]]
        if multipliers is None:
            terms[name] = _token_term(name, parts)
        else:
            weights = [2.0 * multipliers[part].to(parts[0]) for part in PARTS[name]]
            terms[name] = torch.stack([w * d for w, d in zip(weights, parts, strict=True)]).sum(0)
    return terms


def _token_term(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if name == "cvar":
        return parts[0].square()
    if name == "gain":
        return parts[0].relu().square()
    return torch.stack([part.relu() for part in parts]).sum(0)


def constraint_differences(
    q: torch.Tensor, z: torch.Tensor, levels: torch.Tensor, config: DVPOLossConfig, names: Collection[str]
) -> dict[str, torch.Tensor]:
    """The differences d(q) of the named terms, Eqs 5 to 9 of [DVPO] (`shape`: paper; the others: rebuilt).

    cvar: mean low(q) − mean low(z). gain: mean up(z) − mean up(q). shift: mean z − mean q.
    shape: var low(q) − var low(z), and var up(z) − var up(q). curvature: c(low(q)) − c(low(z)), and
    c(up(z)) − c(up(q)), with z read at the levels first if K ≠ M. low and up are the tails of shares α and β.

    Args:
        q: (..., M) ascending.
        z: (..., K) ascending.
        levels: (M,) τ.
        config: tail shares.
        names: which of the five terms.

    Returns:
        part -> (...).
    """
    q_low, z_low = (v[..., : tail_size(config.alpha, v.shape[-1])] for v in (q, z))
    q_up, z_up = (v[..., v.shape[-1] - tail_size(config.beta, v.shape[-1]) :] for v in (q, z))
    d: dict[str, torch.Tensor] = {}
    if "cvar" in names:
        d["cvar"] = q_low.mean(-1) - z_low.mean(-1)
    if "gain" in names:
        d["gain"] = z_up.mean(-1) - q_up.mean(-1)
    if "shift" in names:
        d["shift"] = z.mean(-1) - q.mean(-1)
    if "shape" in names:
        d["shape_low"] = _variance(q_low) - _variance(z_low)
        d["shape_up"] = _variance(z_up) - _variance(q_up)
    if "curvature" in names:
        if z.shape[-1] != q.shape[-1]:
            low, up = q_low.shape[-1], q_up.shape[-1]
            z_low, z_up = read_at(z, levels[:low]), read_at(z, levels[levels.shape[0] - up :])
        d["curvature_low"] = tail_curvature(q_low) - tail_curvature(z_low)
        d["curvature_up"] = tail_curvature(z_up) - tail_curvature(q_up)
    return d


def _variance(tail: torch.Tensor) -> torch.Tensor:
    """Population variance: (..., k) -> (...). Unlike torch's it does not warn when there is no token."""
    return (tail - tail.mean(-1, keepdim=True)).square().mean(-1)


def tail_curvature(tail: torch.Tensor) -> torch.Tensor:
    """c(·) of Eq 9 (rebuilt): (..., k) -> (...), mean absolute second difference; 0 for fewer than 3 points."""
    if tail.shape[-1] < 3:
        return torch.zeros_like(tail[..., 0])
    return tail.diff(n=2, dim=-1).abs().mean(-1)


@torch.no_grad()
def constraint_multipliers(
    old_quantiles: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    levels: torch.Tensor,
    config: DVPOLossConfig,
    *,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The multipliers of `constraint: batch` (ours): μ = b for `cvar`, relu(b) for the rest, b = mean of d(θ_old).

    The mean runs over all valid tokens of the update. With `reduce` it runs over all ranks too: sums and the count are
    reduced before the mean and the relu, so the result does not depend on how tokens are spread over ranks.

    Args:
        old_quantiles: (..., M) the head-averaged quantiles that the targets were built from, in any order.
        targets: (..., K) target samples, in any order.
        mask: (...) of 0 and 1, any dtype. What a masked token holds, NaN included, has no influence.
        levels: (M,) τ, ascending in (0, 1].
        config: tail shares.
        reduce: sums one 1-D float64 tensor over ranks and returns it (in place or not).

    Returns:
        {cvar, gain, shift, shape_low, shape_up, curvature_low, curvature_up} -> float64 scalar; all zero if no token
        is valid anywhere.

    Raises:
        ValueError: shapes that do not agree, M or K = 0, levels not ascending in (0, 1].
    """
    check_points(old_quantiles, targets)
    check_levels(levels, old_quantiles.shape[-1])
    if mask.shape != targets.shape[:-1]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; with targets {tuple(targets.shape)} it must be "
            f"{tuple(targets.shape[:-1])}"
        )
    old_quantiles, targets = as_compute("old_quantiles", old_quantiles), as_compute("targets", targets)
    q = old_quantiles.reshape(-1, old_quantiles.shape[-1])
    z = targets.reshape(-1, targets.shape[-1])
    valid = mask.reshape(-1) != 0
    sums = torch.zeros(len(MULTIPLIERS) + 1, dtype=torch.float64, device=q.device)
    rows = max(1, _CHUNK // max(q.shape[1], z.shape[1]))
    for start in range(0, q.shape[0], rows):
        block = slice(start, start + rows)
        d = constraint_differences(sort_samples(q[block]), sort_samples(z[block]), levels, config, CONSTRAINT_TERMS)
        stacked = torch.stack([d[part].double() for part in MULTIPLIERS] + [torch.ones_like(d["cvar"]).double()])
        sums += torch.where(valid[block], stacked, 0.0).sum(-1)
    if reduce is not None:
        sums = reduce(sums)
    means = sums[:-1] / sums[-1].clamp(min=1.0)
    return {part: means[i] if part == "cvar" else means[i].relu() for i, part in enumerate(MULTIPLIERS)}
