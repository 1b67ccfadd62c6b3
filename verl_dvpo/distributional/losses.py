# SPDX-License-Identifier: Apache-2.0
"""The DVPO loss: three sums of pinballs, and five constraints on the distribution's tails and mean.

Equations are in docs/method.md, section 4.

Shapes: N heads, M quantiles, K target samples, "..." any leading shape (tokens).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ._checks import as_compute
from .config import CONSTRAINT_TERMS, DVPOLossConfig
from .constraints import constraint_terms
from .levels import check_levels
from .quantile_huber import check_points, sorted_quantile_huber
from .sorting import sort_samples


class DVPOLoss(NamedTuple):
    """Holds the result of ``dvpo_loss``.

    Attributes:
        total: (...) ``quantile`` + Σ coef[name]·term.
        terms: name -> (...) each active term before its coefficient; a term with coefficient 0 is not computed.
    """

    total: torch.Tensor
    terms: dict[str, torch.Tensor]


def dvpo_loss(
    quantiles: torch.Tensor,
    targets: torch.Tensor,
    levels: torch.Tensor,
    config: DVPOLossConfig,
    multipliers: Mapping[str, torch.Tensor] | None = None,
) -> DVPOLoss:
    """Computes the DVPO loss per token, Eq 11 of [DVPO]: L = ``quantile`` + Σ coef[name]·term (structure: paper).

    A NaN or infinity in quantiles or targets makes its token's total NaN or infinite. No step waits for the device.

    Args:
        quantiles: (..., N, M) θ of every head, in any order.
        targets: (..., K) samples z, in any order; they get no gradient.
        levels: (M,) τ, ascending in (0, 1].
        config: coefficients and settings of the terms.
        multipliers: the result of ``constraint_multipliers``. ``constraint="batch"`` needs it if a constraint has a
            positive coefficient; ``constraint="token"`` ignores it.

    Returns:
        ``DVPOLoss`` with (...) tensors; float32 for bfloat16 and float16 inputs.

    Raises:
        ValueError: shapes that do not agree, N, M or K = 0, levels not ascending in (0, 1], multipliers missing.
    """
    if quantiles.ndim < 2 or quantiles.shape[-2] == 0:
        raise ValueError(
            f"quantiles has shape {tuple(quantiles.shape)}; it must be (..., N, M) with N, M of at least 1"
        )
    check_points(quantiles[..., 0, :], targets)
    check_levels(levels, quantiles.shape[-1])
    coef = config.coef
    active = [name for name in CONSTRAINT_TERMS if coef[name] > 0]
    if active and config.constraint == "batch" and multipliers is None:
        raise ValueError(
            f"multipliers is None, but constraint is 'batch' and {', '.join(active)} are active; "
            "pass the result of constraint_multipliers"
        )
    quantiles, targets = as_compute("quantiles", quantiles), as_compute("targets", targets)
    sorted_targets = sort_samples(targets)
    mean_head = quantiles.mean(-2)

    terms = {"quantile": sorted_quantile_huber(quantiles.flatten(-2), sorted_targets, levels, config.kappa)}
    if coef["risk"] > 0 and config.risk_form == "separable":
        weights = risk_weights(levels, config.risk_temperature)
        terms["risk"] = sorted_quantile_huber(mean_head, sorted_targets, levels, config.kappa, weights)
    if active:
        given = multipliers if config.constraint == "batch" else None
        terms |= constraint_terms(mean_head, sorted_targets, levels, config, active, given)
    if coef["consistency"] > 0:
        terms["consistency"] = head_consistency(quantiles, mean_head)
    total = terms["quantile"]
    for name, term in itertools.islice(terms.items(), 1, None):
        total = torch.add(total, term, alpha=coef[name])
    return DVPOLoss(total, terms)


def risk_weights(levels: torch.Tensor, temperature: float) -> torch.Tensor:
    """Computes the weights of Eq 4 of [DVPO] (rebuilt): w_j = exp(−τ_j/temperature), normalised to mean 1.

    In the loss they scale separate pinballs, so they change no quantile's minimiser; in ``risk_averse_weights`` they
    change the value (docs/method.md, section 4).

    Args:
        levels: (M,) τ.
        temperature: > 0, in units of a level; a small one leaves weight on the lowest quantiles only.

    Returns:
        (M,) float64, descending.
    """
    return torch.softmax(-levels.double() / temperature, dim=0) * levels.shape[0]


def risk_averse_weights(levels: torch.Tensor, config: DVPOLossConfig) -> torch.Tensor:
    """Computes the weights of the risk-averse value of ``risk_form: readout`` (rebuilt; docs/method.md, section 4).

    V_c = (1/M) Σ_j ((1 − c) + c·w_j)·θ_j with c = coef.risk and w of ``risk_weights``. With c = 1 it is the mean under
    the distortion that has the density exp(−τ/temperature), so V_c is at most the mean.

    Args:
        levels: (M,) τ, ascending.
        config: coefficient, temperature and form.

    Returns:
        (M,) float64 with mean 1, not ascending; all 1 for ``separable``.
    """
    share = config.coef["risk"] if config.risk_form == "readout" else 0.0
    return spectral_weights(levels, config.risk_temperature, share)


def spectral_weights(levels: torch.Tensor, temperature: float, share: float) -> torch.Tensor:
    """Computes (1 − c) + c·w_j with c = ``share`` in [0, 1] and w of ``risk_weights``: (M,) -> (M,) float64, mean 1."""
    return 1.0 + share * (risk_weights(levels, temperature) - 1.0)


def head_consistency(quantiles: torch.Tensor, mean_head: torch.Tensor) -> torch.Tensor:
    """Computes ``consistency``, Eq 10 of [DVPO] (rebuilt).

    It is the mean over head pairs and levels of (θ_ij − θ_i'j)², and 0 for N = 1. For each level
    Σ_{i<i'} (θ_i − θ_i')² = N·Σ_i (θ_i − q)², so N(N−1)/2 pairs cost N differences. q is a constant here because its
    own gradient is Σ_i (θ_i − q) = 0.

    Args:
        quantiles: (..., N, M).
        mean_head: (..., M) their mean over N.

    Returns:
        (...) in units of the value squared.
    """
    heads = quantiles.shape[-2]
    if heads == 1:
        return torch.zeros_like(mean_head[..., 0])
    mean = mean_head.detach()
    deviation: torch.Tensor = _MeanSquaredDeviation.apply(quantiles, mean)  # type: ignore[no-untyped-call]
    return deviation * (2.0 * heads / (heads - 1))


class _MeanSquaredDeviation(torch.autograd.Function):
    """Takes the mean over N and M of (θ − q)²: quantiles (..., N, M), constant mean_head (..., M) -> (...).

    It saves only its inputs. Autograd's own form saves θ − q and needs two more tensors of that size in the backward
    pass.
    """

    @staticmethod
    def forward(ctx: Any, quantiles: torch.Tensor, mean_head: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(quantiles, mean_head)
        return (quantiles - mean_head.unsqueeze(-2)).square_().mean((-1, -2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None]:
        quantiles, mean_head = ctx.saved_tensors
        scale = grad_loss * (2.0 / (quantiles.shape[-1] * quantiles.shape[-2]))
        return (quantiles - mean_head.unsqueeze(-2)).mul_(scale[..., None, None]), None
