# SPDX-License-Identifier: Apache-2.0
"""The five constraints of the DVPO loss: ``cvar``, ``gain``, ``shift``, ``shape`` and ``curvature``, Eqs 5 to 9.

Each constraint is a difference d(q) between a statistic of the critic's distribution q and that of the target samples z
(docs/method.md, section 4). ``cvar`` asks for d = 0, the others for d ≤ 0. ``shape`` and ``curvature`` have a lower and
an upper part, so there are seven differences.

With ``constraint: batch`` the targets act on a token's gradient only through the multiplier. ``constraint_statistics:
level`` changes nothing but multipliers: ``level_differences`` gives those of ``cvar``, ``gain`` and ``shift``, in units
of a level and two-sided.

Shapes: M quantiles, K target samples, L tokens, "..." any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from ._checks import as_compute, tail_size
from .config import CONSTRAINT_TERMS, LEVEL_TERMS, DVPOLossConfig, check_level_statistics
from .levels import check_levels, read_at
from .quantile_huber import check_points
from .sorting import count_below, count_tied, sort_samples, sort_with_gradient

# Term -> its differences.
PARTS: Mapping[str, tuple[str, ...]] = {
    "cvar": ("cvar",),
    "gain": ("gain",),
    "shift": ("shift",),
    "shape": ("shape_low", "shape_up"),
    "curvature": ("curvature_low", "curvature_up"),
}
MULTIPLIERS = tuple(part for name in CONSTRAINT_TERMS for part in PARTS[name])

# Rows × points that ``constraint_multipliers`` sorts at a time: a sorted copy of a whole update would be large, and on
# a CPU this size keeps temporaries in the cache (docs/benchmarks.md).
_CHUNK_CPU = 1 << 19
_CHUNK_ACCELERATOR = 1 << 22


def constraint_terms(
    quantiles: torch.Tensor,
    sorted_targets: torch.Tensor,
    levels: torch.Tensor,
    config: DVPOLossConfig,
    names: Collection[str],
    multipliers: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Computes the constraint terms per token, before their coefficients (docs/method.md, section 4).

    With multipliers μ (``constraint: batch``, ours) a term is Σ 2·μ·d(q) over its parts, the gradient step of
    relu(mean d)². Multipliers in levels (``constraint_statistics: level``, ours) enter the same way: the gradient is
    that of 2·μ·mean low(q) for ``cvar``, −2·μ·mean up(q) for ``gain`` and −2·μ·mean q for ``shift``, and the constant
    part of d(q) makes the reported term 0 at a perfect fit. Without multipliers (``constraint: token``, the papers'
    literal reading) a term is d² for ``cvar``, relu(d)² for ``gain`` and Σ relu(d) for the others.

    Args:
        quantiles: (..., M) q, the head-averaged quantiles.
        sorted_targets: (..., K) z, ascending.
        levels: (M,) τ.
        config: tail shares.
        names: the active ones of the five terms.
        multipliers: part -> scalar, or None.

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
    """Computes the differences d(q) of the named terms, Eqs 5 to 9 of [DVPO] (``shape``: paper; the others: rebuilt).

    cvar: mean low(q) − mean low(z). gain: mean up(z) − mean up(q). shift: mean z − mean q.
    shape: var low(q) − var low(z), and var up(z) − var up(q). curvature: c(low(q)) − c(low(z)), and
    c(up(z)) − c(up(q)), with z read at the levels first if K ≠ M. low and up are tails with shares α and β.

    Args:
        q: (..., M) ascending.
        z: (..., K) ascending.
        levels: (M,) τ.
        config: tail shares.
        names: the active ones of the five terms.

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
    """Computes the population variance, (..., k) -> (...); torch's own warns if there is no token."""
    return (tail - tail.mean(-1, keepdim=True)).square().mean(-1)


def tail_curvature(tail: torch.Tensor) -> torch.Tensor:
    """Computes c(·) of Eq 9 (rebuilt), the mean absolute second difference: (..., k) -> (...); 0 for k < 3."""
    if tail.shape[-1] < 3:
        return torch.zeros_like(tail[..., 0])
    return tail.diff(n=2, dim=-1).abs().mean(-1)


def level_differences(
    q: torch.Tensor, z: torch.Tensor, levels: torch.Tensor, config: DVPOLossConfig
) -> dict[str, torch.Tensor]:
    """Computes the differences of ``cvar``, ``gain`` and ``shift`` in levels (ours; docs/method.md, section 4).

    F_z(q_j) is the share of z below q_j, ties counted half. cvar: mean over the lower tail of F_z(q_j) − τ_j. gain:
    mean over the upper tail of τ_j − F_z(q_j). shift: mean over all j of τ_j − F_z(q_j). Their mean over tokens is 0 if
    q are the quantiles of the distribution behind z, although one token's z comes from one trajectory. Each lies in
    [−1, 1], so an outlier counts as one sample.

    Args:
        q: (R, M) ascending.
        z: (R, K) ascending, same dtype.
        levels: (M,) τ.
        config: tail shares.

    Returns:
        part -> (R,); NaN for a row that is not finite.
    """
    below = count_below(z, q)
    tied = count_tied(z, q, below)
    number = below.number if tied is None else torch.add(below.number, tied, alpha=0.5)
    # Counts hide a NaN or an infinity; the ends of a sorted row show it.
    ends = torch.stack([v[:, i] for v in (q, z) for i in (0, -1)])
    broken = ends.mul_(0.0).sum(0)
    size, tau = q.shape[-1], levels.to(q)
    low, up = slice(tail_size(config.alpha, size)), slice(size - tail_size(config.beta, size), size)

    def excess(part: slice) -> torch.Tensor:
        return number[:, part].mean(-1) / z.shape[-1] - tau[part].mean() + broken

    return {"cvar": excess(low), "gain": -excess(up), "shift": -excess(slice(size))}


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
    """Computes the multipliers of ``constraint: batch`` (ours): μ = b for ``cvar`` and relu(b) for the rest.

    b is the mean of d(θ_old) over all valid tokens of the update. With ``constraint_statistics: level`` (ours) d comes
    from ``level_differences`` and μ = b for all parts, because relu of noise around 0 would push at every update
    (docs/critic_lab.md).

    ``reduce`` extends the mean over all ranks. It adds sums and counts before the mean and the relu, so the result does
    not depend on how tokens are spread over ranks.

    Args:
        old_quantiles: (..., M) the head-averaged quantiles behind the targets, in any order.
        targets: (..., K) target samples, in any order.
        mask: (...) of 0 and 1, any dtype. A masked token has no influence, even if it is NaN.
        levels: (M,) τ, ascending in (0, 1].
        config: tail shares.
        reduce: adds a 1-D float64 tensor over ranks and returns it, in place or not; None for one rank.

    Returns:
        {cvar, gain, shift, shape_low, shape_up, curvature_low, curvature_up}, or {cvar, gain, shift} of levels ->
        float64 scalar; all zero if no token is valid anywhere.

    Raises:
        ValueError: shapes that do not agree, M or K = 0, levels not ascending in (0, 1], a level of 1 with
            ``constraint_statistics: level``.
    """
    check_points(old_quantiles, targets)
    check_levels(levels, old_quantiles.shape[-1])
    count_levels = config.constraint_statistics == "level"
    if count_levels:
        check_level_statistics(float(levels[-1]), config)
    if mask.shape != targets.shape[:-1]:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; with targets {tuple(targets.shape)} it must be "
            f"{tuple(targets.shape[:-1])}"
        )
    old_quantiles, targets = as_compute("old_quantiles", old_quantiles), as_compute("targets", targets)
    q = old_quantiles.reshape(-1, old_quantiles.shape[-1])
    z = targets.reshape(-1, targets.shape[-1])
    dtype = torch.promote_types(q.dtype, z.dtype)
    valid = mask.reshape(-1) != 0
    parts = LEVEL_TERMS if count_levels else MULTIPLIERS
    sums = torch.zeros(len(parts) + 1, dtype=torch.float64, device=q.device)
    chunk = _CHUNK_CPU if q.device.type == "cpu" else _CHUNK_ACCELERATOR
    rows = max(1, chunk // max(q.shape[1], z.shape[1]))
    for start in range(0, q.shape[0], rows):
        block = slice(start, start + rows)
        qs, zs = sort_samples(q[block]).to(dtype), sort_samples(z[block]).to(dtype)
        if count_levels:
            d = level_differences(qs, zs, levels, config)
        else:
            d = constraint_differences(qs, zs, levels, config, CONSTRAINT_TERMS)
        stacked = torch.stack([d[part].double() for part in parts] + [torch.ones_like(d["cvar"]).double()])
        sums += torch.where(valid[block], stacked, 0.0).sum(-1)
    if reduce is not None:
        sums = reduce(sums)
    means = sums[:-1] / sums[-1].clamp(min=1.0)
    two_sided = parts if count_levels else ("cvar",)
    return {part: means[i] if part in two_sided else means[i].relu() for i, part in enumerate(parts)}
