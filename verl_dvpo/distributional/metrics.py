# SPDX-License-Identifier: Apache-2.0
"""Metrics of a value distribution (docs/method.md, section 6).

Every metric is per token: inputs with leading shape (...) give (...), so no result depends on how a batch is cut.
``masked_sums`` gives the sum and the count over valid tokens; add both over micro-batches and ranks, then divide.
Variances over tokens need sums of their own: ``explained_variance_sums``.

Shapes: N heads, M points of a distribution, "..." any leading shape (tokens).
"""

from __future__ import annotations

import torch

from ._checks import as_compute, check_tail, tail_size
from .levels import read_at
from .sorting import sort_samples


def crossing_fraction(quantiles: torch.Tensor) -> torch.Tensor:
    """Computes the share of adjacent quantiles out of order, θ_j > θ_{j+1}, before any sort (ours).

    Args:
        quantiles: (..., M) in the critic's own order; an ensemble's (..., N, M) gives one number per head.

    Returns:
        (...) in [0, 1]; 0 for M = 1.

    Raises:
        ValueError: M = 0.
    """
    _check_points("quantiles", quantiles)
    if quantiles.shape[-1] == 1:
        return torch.zeros_like(as_compute("quantiles", quantiles)[..., 0])
    out_of_order = quantiles[..., :-1] > quantiles[..., 1:]
    return out_of_order.to(as_compute("quantiles", quantiles).dtype).mean(-1)


def coverage(samples: torch.Tensor, returns: torch.Tensor, level: float = 0.8) -> torch.Tensor:
    """Tells for each token whether the realised return lies in the central interval of the distribution, ends included.

    The interval runs from the (1−level)/2 to the (1+level)/2 quantile of the M points, read by linear interpolation. A
    calibrated critic of a continuous return has a mean of ``level`` over tokens.

    Args:
        samples: (..., M) equally weighted points, in any order.
        returns: (...) realised returns.
        level: in (0, 1).

    Returns:
        (...) of 0 and 1; NaN where the return or a sample is NaN.

    Raises:
        ValueError: shapes that do not agree, M = 0, level outside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}; it must be in (0, 1)")
    samples, returns = _checked(samples, returns)
    ends = torch.tensor([0.5 - 0.5 * level, 0.5 + 0.5 * level], dtype=torch.float64, device=samples.device)
    interval = read_at(sort_samples(samples), ends)
    inside = (interval[..., 0] <= returns) & (returns <= interval[..., 1])
    return _nan_like(inside.to(samples.dtype), samples, returns)


def pit(samples: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """Computes the probability integral transform: the share of points below the realised return, ties counted half.

    Over tokens it is uniform on [0, 1] if the critic is calibrated and the return continuous. Its mean is ½ for every
    calibrated critic, because ties count half.

    Args:
        samples: (..., M) equally weighted points, in any order.
        returns: (...) realised returns.

    Returns:
        (...) in [0, 1]; NaN where the return or a sample is NaN.

    Raises:
        ValueError: shapes that do not agree, M = 0.
    """
    samples, returns = _checked(samples, returns)
    y = returns.unsqueeze(-1)
    share = 0.5 * ((samples < y).to(samples.dtype) + (samples <= y).to(samples.dtype)).mean(-1)
    return _nan_like(share, samples, returns)


def crps(samples: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
    """Computes the continuous ranked probability score of M equally weighted points against the realised return.

    E|X − y| − ½E|X − X'| = (2/M) Σ_j ρ_{(2j−1)/(2M)}^0(y − x_(j)) over the sorted points, exact in one pass.

    Args:
        samples: (..., M) equally weighted points, in any order.
        returns: (...) realised returns.

    Returns:
        (...) ≥ 0, in units of the value; lower is better.

    Raises:
        ValueError: shapes that do not agree, M = 0.
    """
    samples, returns = _checked(samples, returns)
    size = samples.shape[-1]
    above = sort_samples(samples) - returns.unsqueeze(-1)
    tau = (torch.arange(size, device=samples.device, dtype=samples.dtype) + 0.5) / size
    return 2.0 * (((above > 0).to(samples.dtype) - tau) * above).mean(-1)


def tail_mean(samples: torch.Tensor, fraction: float = 0.1, side: str = "lower") -> torch.Tensor:
    """Computes the mean of the lowest (CVaR) or highest max(1, ⌊fraction·M + ½⌋) points.

    Args:
        samples: (..., M) equally weighted points, in any order.
        fraction: share of the points, in (0, 0.5].
        side: ``lower`` or ``upper``.

    Returns:
        (...) in units of the value.

    Raises:
        ValueError: M = 0, fraction outside (0, 0.5], an unknown side.
    """
    check_tail("fraction", fraction)
    _check_points("samples", samples)
    if side not in ("lower", "upper"):
        raise ValueError(f"side is {side!r}; it must be one of lower, upper")
    samples = as_compute("samples", samples)
    size = tail_size(fraction, samples.shape[-1])
    ordered = sort_samples(samples)
    tail = ordered[..., :size] if side == "lower" else ordered[..., samples.shape[-1] - size :]
    return _nan_like(tail.mean(-1), samples)


def population_std(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Computes the population standard deviation over one axis, in two passes (faster than torch.std on a CPU)."""
    return (values - values.mean(dim, keepdim=True)).square().mean(dim).sqrt()


def spread(samples: torch.Tensor) -> torch.Tensor:
    """Computes the population standard deviation of a token's points: (..., M) -> (...), in units of the value."""
    _check_points("samples", samples)
    return population_std(as_compute("samples", samples), -1)


def ensemble_std(quantiles: torch.Tensor) -> torch.Tensor:
    """Computes the population standard deviation of the heads' values: (..., N, M) -> (...), in units of the value."""
    _check_points("quantiles", quantiles)
    if quantiles.ndim < 2 or quantiles.shape[-2] == 0:
        raise ValueError(f"quantiles has shape {tuple(quantiles.shape)}; it must be (..., N, M) with N of at least 1")
    return population_std(as_compute("quantiles", quantiles).mean(-1), -1)


def masked_sums(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Computes the sum over valid tokens and their count: (2,) float64, additive over micro-batches and ranks.

    Args:
        values: (...) a per-token metric.
        mask: (...) of 0 and 1, any dtype. A masked token has no influence, even if it is NaN.

    Raises:
        ValueError: shapes that do not agree.
    """
    valid = _valid(values, mask)
    return torch.stack([torch.where(valid, values.double(), 0.0).sum(), valid.sum().double()])


def explained_variance_sums(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Computes the sums behind the explained variance: (5,) float64, additive over micro-batches and ranks.

    They are n, Σy, Σy², Σe, Σe² over valid tokens, with y the return and e = y − value.

    Args:
        values: (...) the critic's values.
        returns: (...) the returns that they should explain.
        mask: (...) of 0 and 1, any dtype.

    Raises:
        ValueError: shapes that do not agree.
    """
    valid = _valid(values, mask)
    _valid(returns, mask)
    y = torch.where(valid, returns.double(), 0.0)
    e = torch.where(valid, returns.double() - values.double(), 0.0)
    return torch.stack([valid.sum().double(), y.sum(), y.square().sum(), e.sum(), e.square().sum()])


def explained_variance(sums: torch.Tensor) -> torch.Tensor:
    """Computes 1 − var(y − value)/(var(y) + 1e-5), verl's formula, from the (5,) sums of ``explained_variance_sums``.

    Variances are unbiased; 1e-5 is verl's guard against a constant return.

    Returns:
        float64 scalar ≤ 1; NaN for fewer than 2 tokens.
    """
    count, y, yy, e, ee = sums.double().unbind()
    scale = torch.where(count > 1, 1.0 / (count - 1.0), torch.nan)
    return 1.0 - (ee - e * e / count) * scale / ((yy - y * y / count) * scale + 1e-5)


def _check_points(name: str, points: torch.Tensor) -> None:
    if points.ndim == 0 or points.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(points.shape)}; its last axis must hold at least one point")


def _checked(samples: torch.Tensor, returns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_points("samples", samples)
    if returns.shape != samples.shape[:-1]:
        raise ValueError(
            f"returns has shape {tuple(returns.shape)}; with samples {tuple(samples.shape)} it must be "
            f"{tuple(samples.shape[:-1])}"
        )
    samples = as_compute("samples", samples.detach())
    return samples, returns.detach().to(samples.dtype)


def _valid(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if values.shape != mask.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be that of the values, {tuple(values.shape)}")
    return mask != 0


def _nan_like(result: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """Returns ``result`` with NaN where an input is NaN, which comparisons and sorts would hide."""
    for values in inputs:
        unknown = values.isnan()
        result = torch.where(unknown.any(-1) if unknown.ndim > result.ndim else unknown, torch.nan, result)
    return result
