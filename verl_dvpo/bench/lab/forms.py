# SPDX-License-Identifier: Apache-2.0
"""Defines other forms of the tail constraints; one became the core's ``constraint_statistics: level``. (ours)

With ``constraint: batch`` the targets z enter a constraint only through its multiplier μ: the term 2·μ·d(q) has a
gradient in q alone. So a form is a *statistic*, seven differences per token, and an *average* of it over the update.

Statistics:

- ``tail``: the rebuilt one, tails of q against tails of the same token's z (docs/method.md, section 4).
- ``clipped``: as ``tail``, z first clipped to the kept distribution's range, one spread of it wider on both sides.
- ``capped``: as ``tail``, each token's difference limited to a tenth of its kept spread.
- ``median``: as ``tail``, with medians of tails for their means and, for ``shift``, medians for means.
- ``unbiased``: z's tail is what lies beyond q's own tail edge, e.g. v − mean (v − z)₊/α for the lower one (Rockafellar
  and Uryasev). Its mean over tokens is the tail mean of the *mixture* of targets; the mean of ``tail``'s is not,
  because each token's z is one trajectory's and narrower.
- ``level``: in units of probability: the share of z below q_j against τ_j. The core's
  ``level_differences``, and a form of ``shape`` that the core does not have, ``level_shape_differences``.

Averages over the update's L tokens, in the order of its sequences:

- ``mean``.
- ``blocks``: median of the means of 16 blocks of tokens.
- ``gated``: the mean moved towards 0 by 2 standard errors, which come from the same 16 blocks.
- ``signed``: the mean, and every constraint two-sided: μ = b. A one-sided multiplier relu(b) is positive on average
  when b is noise around 0, and pushes for ever; a signed one averages out. With
  ``level`` it is the core's form, except for ``shape`` and for ``right`` levels, which the core refuses.

Shapes: L tokens, M quantiles, K target samples.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from verl_dvpo.distributional import CONSTRAINT_TERMS, MULTIPLIERS, constraint_multipliers
from verl_dvpo.distributional.constraints import constraint_differences, level_differences
from verl_dvpo.distributional.sorting import count_below, sort_samples
from verl_dvpo.families.base import Reduce
from verl_dvpo.families.quantile_ensemble import QuantileEnsembleConfig, QuantileEnsembleFamily

STATISTICS = ("tail", "clipped", "capped", "median", "unbiased", "level")
AVERAGES = ("mean", "blocks", "gated", "signed")
BLOCKS = 16
GATE = 2.0
CAP = 0.1


class ConstraintFormFamily(QuantileEnsembleFamily):
    """A quantile ensemble whose constraints use another statistic or average.

    Args:
        config: of the quantile ensemble, with ``constraint: batch``.
        statistic: one of ``STATISTICS``.
        average: one of ``AVERAGES``.
    """

    def __init__(self, config: QuantileEnsembleConfig, *, statistic: str = "tail", average: str = "mean") -> None:
        super().__init__(config)
        if statistic not in STATISTICS:
            raise ValueError(f"statistic is {statistic!r}; allowed are {', '.join(STATISTICS)}; choose one of them")
        if average not in AVERAGES:
            raise ValueError(f"average is {average!r}; allowed are {', '.join(AVERAGES)}; choose one of them")
        if self.loss_config.constraint != "batch":
            raise ValueError(f"constraint is {self.loss_config.constraint!r}; allowed is 'batch'; change it")
        self.statistic, self.average = statistic, average

    @torch.no_grad()
    def multipliers(
        self, targets: Mapping[str, Tensor], mask: Tensor, *, reduce: Reduce | None = None
    ) -> dict[str, Tensor]:
        """Returns multipliers as ``constraint_multipliers`` does, on one rank and with every token valid."""
        assert reduce is None
        assert bool(mask.all())
        if (self.statistic, self.average) == ("tail", "mean"):
            return constraint_multipliers(targets["old"], targets["targets"], mask, self.levels, self.loss_config)
        q, z = sort_samples(targets["old"]), sort_samples(targets["targets"])
        d = self.differences(q, z)
        average = {"blocks": _median_of_blocks, "gated": _gated_mean}.get(self.average, lambda v: v.mean(-1))
        b = average(torch.stack([d[name] for name in MULTIPLIERS]).double())
        two_sided = MULTIPLIERS if self.average == "signed" else ("cvar",)
        mu = {name: b[i] if name in two_sided else b[i].relu() for i, name in enumerate(MULTIPLIERS)}
        if self.statistic == "level":
            # The slope of a variance is twice a deviation: in units of the tail's own, all terms are free of units.
            low, up = tail_sizes(q.shape[-1], self.loss_config.alpha, self.loss_config.beta)
            for name, tail in (("shape_low", q[:, :low]), ("shape_up", q[:, q.shape[-1] - up :])):
                mu[name] /= 2 * tail.std(-1, correction=0).mean().double().clamp(min=1e-6)
        return mu

    def differences(self, q: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Returns the differences of the statistic: q (L, M) and z (L, K), ascending -> part -> (L,)."""
        width = q.std(-1, correction=0, keepdim=True)
        if self.statistic == "clipped":
            z = z.clamp(q[:, :1] - width, q[:, -1:] + width)
        d = constraint_differences(q, z, self.levels, self.loss_config, CONSTRAINT_TERMS)
        if self.statistic == "capped":
            limit = CAP * width[:, 0]
            d = {name: value.clamp(-limit, limit) for name, value in d.items()}
        if self.statistic == "median":
            d |= median_differences(q, z, self.loss_config.alpha, self.loss_config.beta)
        if self.statistic == "unbiased":
            d |= unbiased_differences(q, z, self.loss_config.alpha, self.loss_config.beta)
        if self.statistic == "level":
            d |= level_differences(q, z, self.levels, self.loss_config)
            d |= level_shape_differences(q, z, self.levels, self.loss_config.alpha, self.loss_config.beta)
        return d


def median_differences(q: Tensor, z: Tensor, alpha: float, beta: float) -> dict[str, Tensor]:
    """Returns ``cvar``, ``gain`` and ``shift`` with medians in place of means: (L, M), (L, K) -> part -> (L,)."""

    def at(v: Tensor, level: float) -> Tensor:
        return v[:, min(int(level * v.shape[-1]), v.shape[-1] - 1)]

    return {
        "cvar": at(q, alpha / 2) - at(z, alpha / 2),
        "gain": at(z, 1 - beta / 2) - at(q, 1 - beta / 2),
        "shift": at(z, 0.5) - at(q, 0.5),
    }


def unbiased_differences(q: Tensor, z: Tensor, alpha: float, beta: float) -> dict[str, Tensor]:
    """Returns ``cvar``, ``gain`` and ``shape`` against the part of z beyond q's own tail edges."""
    low_mean, low_second, low_z, low_z2 = _beyond(q, z, alpha)
    # The upper tail is the lower tail of the negated values.
    up_mean, up_second, up_z, up_z2 = _beyond(-q.flip(-1), -z.flip(-1), beta)
    return {
        "cvar": low_mean - low_z,
        "gain": up_mean - up_z,
        "shape_low": low_second - low_z2,
        "shape_up": up_z2 - up_second,
    }


def _beyond(q: Tensor, z: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns mean and variance of q's lower tail; then of z beyond its edge v mean and second moment about q's mean.

    Exactly the share k/M of the probability counts: if less of z is below v, the rest counts as lying at v.
    """
    size = q.shape[-1]
    k = max(1, int(alpha * size + 0.5))
    share = k / size
    edge = 0.5 * (q[:, k - 1 : k] + q[:, min(k, size - 1) : min(k, size - 1) + 1])
    tail = q[:, :k]
    mean = tail.mean(-1, keepdim=True)
    below = z < edge
    rest = share - below.to(z).mean(-1)
    first = edge[:, 0] - (edge - z).relu().mean(-1) / share
    second = ((z - mean).square() * below).mean(-1) + rest * (edge - mean).square()[:, 0]
    return mean[:, 0], tail.var(-1, correction=0), first, second / share


def level_shape_differences(q: Tensor, z: Tensor, levels: Tensor, alpha: float, beta: float) -> dict[str, Tensor]:
    """Returns ``shape`` in probability: half of the mass beyond a tail's edge should be beyond its middle.

    ½F_z(edge) − F_z(middle) > 0 says that the lower tail is too wide, and likewise above that the upper is too narrow;
    F_z(q_j) is the share of z below q_j, ties half.
    """
    size = q.shape[-1]
    low, up = tail_sizes(size, alpha, beta)
    # Edge and middle of the lower tail, of the upper.
    places = [low - 1, (low - 1) // 2, size - up, size - 1 - (up - 1) // 2]
    points, tau = q[:, places], levels[places]
    below, upto = (count_below(z, points, or_equal=equal).number for equal in (False, True))
    edge, middle, up_edge, up_middle = (0.5 * (below + upto) / z.shape[-1]).unbind(-1)
    low_share = tau[1] / tau[0]
    up_share = (1 - tau[3]) / (1 - tau[2]).clamp(min=1e-12)
    return {
        "shape_low": low_share * edge - middle,
        "shape_up": (1 - up_middle) - up_share * (1 - up_edge),
    }


def tail_sizes(size: int, alpha: float, beta: float) -> tuple[int, int]:
    """Returns how many of ``size`` points belong to the lower and to the upper tail."""
    return max(1, int(alpha * size + 0.5)), max(1, int(beta * size + 0.5))


def _block_means(values: Tensor) -> Tensor:
    """Returns means of G blocks of neighbouring tokens, as nearly equal as L allows: (..., L) -> (..., G)."""
    return torch.stack([block.mean(-1) for block in values.tensor_split(BLOCKS, dim=-1)], -1)


def _median_of_blocks(values: Tensor) -> Tensor:
    means = _block_means(values).sort(-1).values
    return 0.5 * (means[..., (BLOCKS - 1) // 2] + means[..., BLOCKS // 2])


def _gated_mean(values: Tensor) -> Tensor:
    means = _block_means(values)
    error = means.std(-1) / BLOCKS**0.5
    b = values.mean(-1)
    return b.sign() * (b.abs() - GATE * error).relu()
