# SPDX-License-Identifier: Apache-2.0
"""Independent references for the tests: float64 loops and the pairwise form, written from docs/method.md, section 4."""

from __future__ import annotations

import torch


def rho(u: float, tau: float, kappa: float) -> float:
    """Computes ρ_τ^κ(u)."""
    weight = abs(tau - (1.0 if u < 0 else 0.0))
    if kappa == 0:
        return weight * abs(u)
    huber = 0.5 * u * u if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)
    return weight * huber / kappa


def rho_slope(u: float, tau: float, kappa: float) -> float:
    """Computes dρ_τ^κ(u)/du, 0 at u = 0."""
    weight = abs(tau - (1.0 if u < 0 else 0.0))
    if u == 0:
        return 0.0
    sign = 1.0 if u > 0 else -1.0
    if kappa == 0 or abs(u) > kappa:
        return weight * sign
    return weight * u / kappa


def loop_loss(
    theta: list[float], z: list[float], tau: list[float], kappa: float, weights: list[float] | None = None
) -> tuple[float, list[float]]:
    """Computes one token's quantile Huber loss and its gradient in θ by the double loop."""
    weights = weights or [1.0] * len(theta)
    scale = 1.0 / (len(theta) * len(z))
    value, gradient = 0.0, []
    for theta_j, tau_j, w_j in zip(theta, tau, weights, strict=True):
        slope = 0.0
        for z_k in z:
            value += w_j * rho(z_k - theta_j, tau_j, kappa) * scale
            slope -= w_j * rho_slope(z_k - theta_j, tau_j, kappa) * scale
        gradient.append(slope)
    return value, gradient


def pairwise_loss(
    theta: torch.Tensor,
    z: torch.Tensor,
    tau: torch.Tensor,
    kappa: float,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the usual M×K form: θ (..., M), z (..., K), τ (M,) -> (...), differentiable by autograd."""
    u = z[..., None, :] - theta[..., :, None]
    size = u.abs()
    huber = size if kappa == 0 else torch.where(size <= kappa, 0.5 * u * u, kappa * (size - 0.5 * kappa)) / kappa
    loss = (tau[:, None] - (u < 0).to(u.dtype)).abs() * huber
    if weights is not None:
        loss = loss * weights[:, None]
    return loss.mean((-1, -2))
