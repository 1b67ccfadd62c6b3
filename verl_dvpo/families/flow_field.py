# SPDX-License-Identifier: Apache-2.0
"""The field of the value flow and its integration (docs/method.md, section 7; rebuilt after [DFPO], arXiv 2602.05890).

v(ζ,u|s) = Σ_{i<I} Σ_{p<P} a_ip(s)·cos(π i Φ(ζ/σ))·u^p, with Φ the normal distribution function and σ the value scale.

Shapes: R tokens, I frequencies, P powers of the virtual time u, K base noises, J points ζ of one token. a is (R, I, P).

Two facts make it cheap. u is one number per token, so the powers collapse to (R, I) coefficients before any point is
touched. cos(iφ) = 2 cos φ cos((i−1)φ) − cos((i−2)φ), so a token's J points cost J cosines and I multiply-adds each.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Points per block: on a CPU the recurrence's three buffers stay in the cache; a GPU wants few and large kernels.
_BLOCK_CPU = 1 << 15
_BLOCK_ACCELERATOR = 1 << 24


def base_noises(num_noises: int, scale: float) -> Tensor:
    """ε_k = σ·Φ^{-1}((2k−1)/(2K)), k = 1..K: (K,) float32, ascending and symmetric around 0.

    Args:
        num_noises: K >= 1.
        scale: σ > 0, in units of reward.
    """
    levels = (2.0 * torch.arange(1, num_noises + 1, dtype=torch.float64) - 1.0) / (2.0 * num_noises)
    noises: Tensor = scale * torch.special.ndtri(levels)
    return noises.float()


def noise_basis(num_noises: int, num_frequencies: int) -> Tensor:
    """cos(π i Φ(ε_k/σ)) = cos(π i (2k−1)/(2K)): (K, I) float32, the field's basis at the base noises. No σ in it."""
    levels = (2.0 * torch.arange(1, num_noises + 1, dtype=torch.float64) - 1.0) / (2.0 * num_noises)
    return torch.cos(torch.pi * levels[:, None] * torch.arange(num_frequencies, dtype=torch.float64)).float()


def at_time(coefficients: Tensor, time: Tensor) -> Tensor:
    """Collapses the powers at a known time: (R, I, P) and u (R,) -> (R, I), Σ_p a_ip u^p."""
    result = coefficients[..., -1]
    for p in range(coefficients.shape[-1] - 2, -1, -1):
        result = torch.addcmul(coefficients[..., p], result, time[:, None])
    return result


def cosine_series(coefficients: Tensor, points: Tensor, scale: float) -> Tensor:
    """Sums a cosine series, Σ_i c_i·cos(π i Φ(ζ/σ)): c (R, I) with gradient, ζ (R, J) constants -> (R, J)."""
    phase = torch.special.ndtr(points.detach() / scale)
    series: Tensor = _CosineSeries.apply(coefficients, phase)  # type: ignore[no-untyped-call]
    return series


def euler_samples(coefficients: Tensor, noises: Tensor, basis: Tensor, scale: float, steps: int) -> Tensor:
    """Integrates from u = 0 to 1 in ``steps`` steps of Euler's method, from every noise: (R, I, P) -> (R, K), unsorted.

    One step is ẑ_k = ε_k + v(ε_k, 0|s): one matrix product, with gradient. More steps carry none.

    Args:
        coefficients: (R, I, P) a.
        noises: (K,) from ``base_noises``.
        basis: (K, I) from ``noise_basis``.
        scale: σ.
        steps: >= 1.
    """
    points = noises + coefficients[..., 0] @ basis.T / steps
    if steps > 1:
        points = points.detach()
    for step in range(1, steps):
        time = points.new_full(points.shape[:1], step / steps)
        points = points + cosine_series(at_time(coefficients.detach(), time), points, scale) / steps
    return points


class _CosineSeries(torch.autograd.Function):
    """Σ_i c_i·cos(π i φ): c (R, I), φ (R, J) in [0, 1], without gradient -> (R, J)."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, phase: Tensor) -> Tensor:
        cosine = torch.cos(torch.pi * phase)
        ctx.save_for_backward(cosine)
        ctx.size = coefficients.shape[1]
        result = torch.empty_like(cosine)
        for block in _blocks(cosine):
            result[block] = _clenshaw(coefficients[block], cosine[block])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (cosine,) = ctx.saved_tensors
        result = gradient.new_empty(ctx.size, gradient.shape[0])
        for block in _blocks(cosine):
            _weighted_sums(gradient[block], cosine[block], result[:, block])
        return result.T, None


def _blocks(points: Tensor) -> list[slice]:
    budget = _BLOCK_CPU if points.device.type == "cpu" else _BLOCK_ACCELERATOR
    step = max(1, budget // max(1, points.shape[1]))
    return [slice(start, start + step) for start in range(0, points.shape[0], step)]


def _clenshaw(coefficients: Tensor, cosine: Tensor) -> Tensor:
    """Clenshaw's recurrence: y_i = c_i + 2 cos φ·y_{i+1} − y_{i+2}; the sum is c_0 + cos φ·y_1 − y_2."""
    twice = 2.0 * cosine
    one, two = torch.zeros_like(cosine), torch.zeros_like(cosine)
    for i in range(coefficients.shape[1] - 1, 0, -1):
        two.neg_().addcmul_(twice, one).add_(coefficients[:, i, None])
        one, two = two, one
    return torch.addcmul(coefficients[:, :1] - two, cosine, one)


def _weighted_sums(weights: Tensor, cosine: Tensor, out: Tensor) -> None:
    """out_i = Σ_j w_j·cos(iφ_j), (I, R): the recurrence of the cosines is linear, so it is run on w_j·cos(iφ_j)."""
    twice = 2.0 * cosine
    before, now = weights * cosine, weights.clone()
    for i in range(out.shape[0]):
        torch.sum(now, -1, out=out[i])
        # cos(−φ) = cos(φ), so the recurrence needs no special first step.
        before.neg_().addcmul_(twice, now)
        before, now = now, before
