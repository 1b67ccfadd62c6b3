# SPDX-License-Identifier: Apache-2.0
"""The quantile Huber loss between two sets of points, exact in O((M + K) log K) per token (docs/method.md, section 5).

Shapes: M quantiles (or J of them, of several heads side by side), K target samples, L tokens, "..." any leading shape.

The usual form builds all M×K differences u = z_k − θ_j. This one sorts the targets: the samples around θ_j then fall
into four runs, split at θ_j − κ, θ_j and θ_j + κ, on which ρ is linear, quadratic, quadratic and linear. The sum of ρ
over a run follows from the number of its samples, their sum and their sum of squares, which are differences of prefix
sums. So each θ takes three binary searches (one if κ = 0) and a closed form, for the value and for the gradient.

Precision: all arithmetic is float64; only the search at κ = 0, which compares and does not add, keeps the input's
dtype. Sums run outward from the row's median over samples shifted by it, so neither values in the thousands nor an
outlier blur small differences. With d the distance of θ from the median, the error of Σ_k ρ is of order 1e-16·K·d, and
1e-16·K·d·(1 + d/κ) for κ > 0.

Memory: rows are processed in blocks, and the backward pass keeps only the gradient. No step waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ._checks import as_compute, check_not_negative
from .levels import check_levels
from .sorting import Count, count_below, count_tied, sort_samples

# θs (or samples) per block. On a CPU, per thread: temporaries then stay in the cache and each thread has enough to do.
# A GPU is faster with fewer, larger kernels.
_BLOCK_PER_CPU_THREAD = 1 << 15
_BLOCK_ACCELERATOR = 1 << 20

# θ (R, J), z (R, K), τ (J,), κ -> Σ_k ρ and its slope in θ, (R, J) in float64.
Block = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]


def quantile_huber_loss(
    quantiles: torch.Tensor,
    targets: torch.Tensor,
    levels: torch.Tensor,
    *,
    kappa: float = 1.0,
    level_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the quantile Huber loss (1/(M·K)) Σ_j w_j Σ_k ρ_{τ_j}^κ(z_k − θ_j), Eq 3 of [DVPO] (paper).

    ρ has the form of [IQN]: ρ_τ^κ(u) = |τ − 1{u<0}|·H_κ(u)/κ with H_κ(u) = ½u² for |u| ≤ κ, else κ(|u| − ½κ). For κ = 0
    it is the pinball |τ − 1{u<0}|·|u| with gradient 0 at u = 0, as autograd has it for |u|.

    Targets, levels and weights get no gradient, and there is no second derivative. A NaN or infinity makes the loss and
    the gradient of its token NaN or infinite. torch.compile is supported.

    Args:
        quantiles: (..., M) θ, in any order.
        targets: (..., K) z, in any order, same leading shape.
        levels: (M,) τ, ascending in (0, 1].
        kappa: width κ ≥ 0 of the quadratic zone, in units of the value.
        level_weights: (M,) w; 1 if not given.

    Returns:
        (...) per-token loss; bfloat16 and float16 inputs give float32.

    Raises:
        ValueError: shapes that do not agree, M = 0 or K = 0, levels not ascending in (0, 1], kappa negative or not
            finite, an integer dtype.
    """
    check_not_negative("kappa", kappa)
    check_points(quantiles, targets)
    check_levels(levels, quantiles.shape[-1])
    if level_weights is not None and level_weights.shape != levels.shape:
        raise ValueError(
            f"level_weights has shape {tuple(level_weights.shape)}; it must be that of levels, {tuple(levels.shape)}"
        )
    quantiles, targets = as_compute("quantiles", quantiles), as_compute("targets", targets.detach())
    return sorted_quantile_huber(quantiles, sort_samples(targets), levels, kappa, level_weights)


def check_points(quantiles: torch.Tensor, targets: torch.Tensor) -> None:
    """Raises ValueError unless quantiles (..., M) and targets (..., K) share a leading shape and M, K ≥ 1."""
    for name, points in (("quantiles", quantiles), ("targets", targets)):
        if points.ndim == 0 or points.shape[-1] == 0:
            raise ValueError(f"{name} has shape {tuple(points.shape)}; its last axis must hold at least one point")
    if quantiles.shape[:-1] != targets.shape[:-1]:
        raise ValueError(
            f"quantiles has shape {tuple(quantiles.shape)} and targets {tuple(targets.shape)}; "
            "they must agree in all axes but the last"
        )


def sorted_quantile_huber(
    theta: torch.Tensor,
    sorted_targets: torch.Tensor,
    levels: torch.Tensor,
    kappa: float,
    level_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``quantile_huber_loss`` for targets already ascending, without its checks.

    Args:
        theta: (..., M), or (..., N·M) for N heads side by side on the same targets, which gives the mean over heads;
            float32 or float64.
        sorted_targets: (..., K) ascending; float32 or float64.
        levels: (M,).
        kappa: κ ≥ 0.
        level_weights: (M,) or None.

    Returns:
        (...) per-token loss.
    """
    dtype = torch.promote_types(theta.dtype, sorted_targets.dtype)
    heads = theta.shape[-1] // levels.shape[0]
    tau = levels.detach().to(theta.device, torch.float64).repeat(heads)
    weight = torch.ones_like(tau) if level_weights is None else level_weights.detach().to(tau).repeat(heads)
    weight = weight / (theta.shape[-1] * sorted_targets.shape[-1])
    leading = theta.shape[:-1]
    loss: torch.Tensor = _QuantileHuber.apply(  # type: ignore[no-untyped-call]
        theta.to(dtype).reshape(-1, theta.shape[-1]),
        sorted_targets.to(dtype).reshape(-1, sorted_targets.shape[-1]),
        tau,
        weight,
        float(kappa),
    )
    return loss.reshape(leading)


class _QuantileHuber(torch.autograd.Function):
    """Computes Σ_j weight_j Σ_k ρ_{τ_j}^κ(z_k − θ_j): theta (L, J), z (L, K) ascending, tau, weight (J,) -> (L,)."""

    @staticmethod
    def forward(
        ctx: Any, theta: torch.Tensor, z: torch.Tensor, tau: torch.Tensor, weight: torch.Tensor, kappa: float
    ) -> torch.Tensor:
        loss: torch.Tensor
        loss, gradient = _value_and_gradient(theta, z, tau, weight, kappa, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_loss[:, None] * gradient, None, None, None, None


# torch.compile does not look into a custom operator, so the blocks and dtypes inside cannot break its graph.
@torch.library.custom_op("verl_dvpo::quantile_huber", mutates_args=())
def _value_and_gradient(
    theta: torch.Tensor,
    z: torch.Tensor,
    tau: torch.Tensor,
    weight: torch.Tensor,
    kappa: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = theta.shape
    loss = theta.new_empty(rows)
    gradient = theta.new_empty((rows, size) if with_gradient else (0, size))
    on_cpu = theta.device.type == "cpu"
    budget = _BLOCK_PER_CPU_THREAD * torch.get_num_threads() if on_cpu else _BLOCK_ACCELERATOR
    step = max(1, budget // max(size, z.shape[1]))
    for chosen, one_block in _row_groups(theta, z, kappa):
        for block in _slices(rows, step) if chosen is None else chosen.split(step):
            value, slope = one_block(theta[block], z[block], tau, kappa)
            value = value @ weight
            loss[block] = value.to(loss.dtype)
            if with_gradient:
                # value·0 is 0, or NaN if the row is not finite: counts alone would hide a NaN among the targets.
                slope.mul_(weight).add_((value * 0.0)[:, None])
                gradient[block] = slope.to(gradient.dtype)
    return loss, gradient


@_value_and_gradient.register_fake
def _(
    theta: torch.Tensor,
    z: torch.Tensor,
    tau: torch.Tensor,
    weight: torch.Tensor,
    kappa: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, size = theta.shape
    return theta.new_empty(rows), theta.new_empty((rows if with_gradient else 0, size))


def _slices(rows: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, rows, step)]


def _row_groups(theta: torch.Tensor, z: torch.Tensor, kappa: float) -> list[tuple[torch.Tensor | None, Block]]:
    """Assigns rows to closed forms; None stands for all rows."""
    if kappa == 0.0:
        return [(None, _pinball_block)]
    if theta.device.type != "cpu":  # reading which rows need which form would stall the host
        return [(None, partial(_huber_block, left=True, right=True))]
    low, high = theta.double().aminmax(dim=1)
    # A NaN makes both true, so that it reaches the result.
    left, right = ~(high - kappa <= z[:, 0]), ~(low + kappa > z[:, -1])
    kind = left + 2 * right.int()
    groups = [(value, (kind == value).nonzero()[:, 0]) for value in range(4)]
    return [
        (None if len(rows) == len(theta) else rows, partial(_huber_block, left=value in (1, 3), right=value >= 2))
        for value, rows in groups
        if len(rows)
    ]


def _pinball_block(
    theta: torch.Tensor, z: torch.Tensor, tau: torch.Tensor, kappa: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes Σ_k ρ_τ^0(z_k − θ) and its slope in θ: (R, J) and (R, J) in float64.

    With c = #{z < θ}, S_c the sum of the c smallest and S that of all: Σ_k ρ = (c − τK)θ − S_c + τS. The slope is
    c − τ(K − #{z = θ}).
    """
    centre, size = _median(z), z.shape[1]
    sums = _sums_from_middle(z.double() - centre)
    first, last = sums[:, :1], sums[:, -1:]
    below = count_below(z, theta)
    number = below.number.double()
    slope = number - tau * size
    value = (theta.double() - centre).mul_(slope).sub_(sums.gather(1, below.place)).add_(torch.lerp(first, last, tau))
    tied = count_tied(z, theta, below)
    return value, slope if tied is None else number - tau * (size - tied)


def _huber_block(
    theta: torch.Tensor, z: torch.Tensor, tau: torch.Tensor, kappa: float, *, left: bool, right: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes Σ_k ρ_τ^κ(z_k − θ), κ > 0, and its slope in θ: (R, J) and (R, J) in float64.

    For the edges e = θ − κ, θ, θ + κ, in this order, let A and B be Σ (θ − z) and Σ (θ − z)² of the samples between
    the row's middle and e, negative if e lies to the left of it. Then the samples below θ (weight 1 − τ) have
    Σ H/κ = Σ_{z < θ−κ} (θ − z − ½κ) + (B₂ − B₁)/2κ with slope #{z < θ−κ} + (A₂ − A₁)/κ, and likewise those above
    (weight τ).

    Args:
        left: some sample may be more than κ below a θ; if not, the search for θ − κ is skipped.
        right: some sample may be κ or more above a θ. With κ = 1 and rewards in [0, 1] most rows have neither.
    """
    size = z.shape[1]
    centre = _median(z)
    samples, points = z.double() - centre, theta.double() - centre
    sums, squares = _sums_from_middle(samples), _sums_from_middle(samples.square())
    first, last = sums[:, :1], sums[:, -1:]
    # The points' own dtype is enough here, because a search only compares.
    middle = count_below(z, theta)
    a2, b2 = _moments(middle.number.to(points), _at(sums, middle), _at(squares, middle), points, size)
    # Edges in float64: rounding θ ± κ to float32 would put samples into the wrong run.
    if left:
        edge = count_below(samples, points - kappa)
        number, total = edge.number, _at(sums, edge)
        a1, b1 = _moments(number, total, _at(squares, edge), points, size)
        slope_below = torch.sub(a2, a1, out=a1).div_(kappa).add_(number)
        far = total.neg_().add_(first).addcmul_(number, points).sub_(number, alpha=0.5 * kappa)
        below = far.add_(torch.sub(b2, b1, out=b1), alpha=0.5 / kappa)
    else:
        a1, b1 = _moments(0, first, squares[:, :1], points, size)
        slope_below = torch.sub(a2, a1, out=a1).div_(kappa)
        below = torch.sub(b2, b1, out=b1).mul_(0.5 / kappa)
    if right:
        edge = count_below(samples, points + kappa)
        number, total = edge.number, _at(sums, edge)
        a3, b3 = _moments(number, total, _at(squares, edge), points, size)
        beyond = number.sub_(size)  # minus the number of samples above θ + κ
        slope_above = a3.sub_(a2).div_(kappa).add_(beyond)
        far = total.neg_().add_(last).addcmul_(beyond, points).add_(beyond, alpha=0.5 * kappa)
        above = far.add_(b3.sub_(b2), alpha=0.5 / kappa)
    else:
        a3, b3 = _moments(size, last, squares[:, -1:], points, size)
        slope_above = a3.sub_(a2).div_(kappa)
        above = b3.sub_(b2).mul_(0.5 / kappa)
    return torch.lerp(below, above, tau), torch.lerp(slope_below, slope_above, tau)


def _at(sums: torch.Tensor, count: Count) -> torch.Tensor:
    """Looks up the entries at the counts: (R, K+1) -> (R, J)."""
    return sums.gather(1, count.place)


def _moments(
    number: torch.Tensor | int, total: torch.Tensor, square: torch.Tensor, points: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes Σ (θ − z) and Σ (θ − z)², (R, J) each, over the samples z from the row's middle to an edge.

    Args:
        number: samples below the edge.
        total: Σ z from the middle to the edge.
        square: Σ z² from the middle to the edge.
        points: (R, J) θ.
        size: K.
    """
    weighted = points * (number - size // 2)
    first = weighted - total
    # Σ (θ − z)² = Σ z² + θ·(2·Σ (θ − z) − n·θ)
    second = torch.addcmul(square, points, weighted.neg_().add_(first, alpha=2.0))
    return first, second


def _median(z: torch.Tensor) -> torch.Tensor:
    """Returns the median of each row, (R, K) ascending -> (R, 1) float64; outliers do not move it."""
    return z[:, z.shape[1] // 2, None].double()


def _sums_from_middle(values: torch.Tensor) -> torch.Tensor:
    """Computes sums outward from the middle: (R, K) -> (R, K+1).

    Entry c is the sum of the first c values minus that of the first K//2. An outlier at an end enters only the sums
    that reach it and blurs no other.
    """
    middle = values.shape[1] // 2
    left = values[:, :middle].flip(1).cumsum(1).flip(1).neg_()
    return torch.cat([left, torch.zeros_like(values[:, :1]), values[:, middle:].cumsum(1)], dim=1)
