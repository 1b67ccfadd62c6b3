# SPDX-License-Identifier: Apache-2.0
"""Targets of a distributional critic: distributional GAE (Eq 2 of [DVPO]) and samples of the λ-mixture of returns.

Shapes: B sequences, T response positions, M quantiles (or samples) of a state's value. Position t is the state that
predicts token t, as in verl.

The mask rule is that of verl's ``compute_gae_advantage_return``: a masked position's reward and value are ignored, and
the next value and the running advantage pass through it to the position before.

Both targets solve a backward linear recurrence x_t = o_t + a_t·x_{t+1}, which ``_scan`` computes.
"""

from __future__ import annotations

import math

import torch

from ._checks import as_compute, check_unit_interval


def distributional_gae(
    rewards: torch.Tensor,
    quantiles: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes targets and advantages of distributional GAE, Eq 2 of [DVPO] (paper), with verl's mask rule.

    For every quantile j: δ_t^j = r_t + γ θ_j(s_{t+1}) − θ_j(s_t), Â_t^j = δ_t^j + γλ Â_{t+1}^j, and the target is
    z_t^j = θ_j(s_t) + Â_t^j. The actor's advantage is A_t = (1/M) Σ_j Â_t^j, which by linearity is the scalar GAE
    [GAE] of V = mean_j θ_j.

    The target is a λ-weighted average of quantile functions. Its mean is right, and its spread is too small for
    0 < λ < 1; ``sample_replacement_returns`` has the right spread (docs/method.md, section 3).

    Args:
        rewards: (B, T) per-token rewards, at any position.
        quantiles: (B, T, M) θ of the old critic.
        mask: (B, T) of 0 and 1, any dtype.
        gamma: discount in [0, 1].
        lam: trace λ in [0, 1].

    Returns:
        targets (B, T, M) and advantages (B, T), the latter not whitened. A masked position holds its value plus the
        carried advantage, as in verl. Neither has a gradient. bfloat16 and float16 inputs give float32.

    Raises:
        ValueError: shapes that do not agree, M = 0, gamma or lam outside [0, 1].
    """
    rewards, quantiles, valid = _checked(rewards, quantiles, mask, gamma, lam)
    # In place, because at M = 200 a copy of the data is often gigabytes.
    errors = _next_valid(quantiles, valid).mul_(gamma).add_(rewards[:, :, None]).sub_(quantiles)
    trace = torch.ones_like(rewards).masked_fill_(valid, gamma * lam)
    advantages = _scan(errors.masked_fill_(~valid[:, :, None], 0.0), trace[:, :, None])
    mean = advantages.mean(-1)
    return advantages.add_(quantiles), mean


def sample_replacement_returns(
    rewards: torch.Tensor,
    quantiles: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws M samples per state from the λ-mixture of n-step returns (ours, after [GMAC]; docs/method.md, section 3).

    Backward over t, for each k: z_t^k = r_t + γ·( b·θ_κ(s_{t+1}) + (1−b)·z_{t+1}^k ) with b ~ Bernoulli(1−λ) drawn for
    each (t, k) and κ uniform over the M points; z = r at the last valid position. One random cyclic shift of 1..M per
    state gives the κ: each is uniform, and λ = 0 gives exactly r_t + γ·(a permutation of θ(s_{t+1})).

    Args:
        rewards: (B, T) per-token rewards, at any position.
        quantiles: (B, T, M) equally weighted points of the old critic's distribution.
        mask: (B, T) of 0 and 1, any dtype.
        gamma: discount in [0, 1].
        lam: trace λ in [0, 1]; 1 gives the Monte-Carlo return, 0 one-step targets.
        generator: source of randomness on the quantiles' device; the same state of it gives the same samples.

    Returns:
        (B, T, M) samples, in no order and without a gradient. A masked position holds the samples of the next valid
        one, and 0 if there is none. bfloat16 and float16 inputs give float32.

    Raises:
        ValueError: shapes that do not agree, M = 0, gamma or lam outside [0, 1].
    """
    rewards, quantiles, valid = _checked(rewards, quantiles, mask, gamma, lam)
    size = quantiles.shape[-1]
    device = quantiles.device
    if lam == 1.0:
        carried = torch.ones_like(rewards).masked_fill_(valid, gamma)
        monte_carlo = _scan(torch.where(valid, rewards, 0.0)[:, :, None], carried[:, :, None])
        return monte_carlo.expand(-1, -1, size).contiguous()
    replaced = torch.empty(quantiles.shape, dtype=torch.bool, device=device)
    replaced.bernoulli_(1.0 - lam, generator=generator)
    shift = torch.randint(size, valid.shape, generator=generator, device=device)
    following = _next_valid(quantiles, valid)
    points = torch.arange(size, device=device)
    for t in _slices(following.shape[1], math.isqrt(following.shape[1]) + 1):
        # In slices of T: an int64 index of the full size would take as much memory as two copies of the data.
        turned = (points + shift[:, t, None]).remainder_(size)
        following[:, t] = following[:, t].gather(-1, turned)
    offset = following.mul_(gamma).mul_(replaced).add_(rewards[:, :, None])
    carried = torch.full_like(offset, gamma).masked_fill_(replaced, 0.0)
    ignored = ~valid[:, :, None]
    return _scan(offset.masked_fill_(ignored, 0.0), carried.masked_fill_(ignored, 1.0))


def _checked(
    rewards: torch.Tensor, quantiles: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if quantiles.ndim != 3 or quantiles.shape[-1] == 0:
        raise ValueError(f"quantiles has shape {tuple(quantiles.shape)}; it must be (B, T, M) with M of at least 1")
    for name, tensor in (("rewards", rewards), ("mask", mask)):
        if tensor.shape != quantiles.shape[:2]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; with quantiles {tuple(quantiles.shape)} it must be "
                f"{tuple(quantiles.shape[:2])}"
            )
    check_unit_interval("gamma", gamma)
    check_unit_interval("lam", lam)
    quantiles = as_compute("quantiles", quantiles.detach())
    return rewards.detach().to(quantiles.dtype), quantiles, mask != 0


def _next_valid(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Looks up the value at the next valid position after t, 0 where there is none: (B, T, M) -> (B, T, M)."""
    length = valid.shape[1]
    if length == 0:
        return values.clone()
    positions = torch.arange(length, device=valid.device)
    # The first valid position at or after t, ``length`` if there is none. Read at t + 1 it is the next one after t.
    first = torch.where(valid, positions, length).flip(1).cummin(1).values.flip(1)
    after = torch.nn.functional.pad(first[:, 1:], (0, 1), value=length)
    rows = torch.arange(valid.shape[0], device=valid.device)[:, None]
    return values[rows, after.clamp(max=length - 1)].masked_fill_((after == length)[:, :, None], 0.0)


def _scan(offset: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Solves x_t = offset_t + factor_t·x_{t+1} backward over T, with x_{T+1} = 0. Overwrites both arguments.

    T is cut into about √T chunks, and one kernel takes a step in all of them. ``factor`` becomes its running product,
    which then carries each chunk's first x into the chunk before. This takes 2·√T steps and two passes over the data; a
    loop takes T steps, a log-depth scan log2(T) passes. Factors lie in [0, 1], so their products cannot grow and the
    result is as accurate as the loop's.

    Args:
        offset: (B, T, M).
        factor: (B, T, M) or (B, T, 1), in [0, 1].

    Returns:
        (B, T, M).
    """
    batch, length, _ = offset.shape
    if offset.numel() == 0:
        return offset
    chunk = min(length, max(32, math.isqrt(length - 1) + 1))
    padding = -length % chunk
    if padding:
        # At the end of T: x is 0 there whatever the factor is, as long as the offset is 0.
        offset = torch.nn.functional.pad(offset, (0, 0, 0, padding))
        factor = torch.nn.functional.pad(factor, (0, 0, 0, padding))
    x = offset.reshape(batch, -1, chunk, offset.shape[-1])
    a = factor.reshape(batch, -1, chunk, factor.shape[-1])
    for i in range(chunk - 2, -1, -1):
        x[:, :, i].addcmul_(a[:, :, i], x[:, :, i + 1])
        a[:, :, i].mul_(a[:, :, i + 1])
    for c in range(x.shape[1] - 2, -1, -1):
        x[:, c].addcmul_(a[:, c], x[:, c + 1, :1])
    return x.reshape(batch, length + padding, -1)[:, :length]


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]
