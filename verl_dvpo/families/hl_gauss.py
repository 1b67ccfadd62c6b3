# SPDX-License-Identifier: Apache-2.0
"""A histogram critic that learns Gaussian-smoothed targets by cross-entropy (HL-Gauss; arXiv 2403.03950).

The head's D = m outputs are the logits of m bins of equal width on [value_min, value_max], and V = Σ_i p_i·c_i with the
bins' centres c (paper). A target y becomes the bin masses of a normal density around y, cut to the support (paper).
A target outside the support is clipped to its nearer end first; ``hl_gauss/out_of_support`` counts how many are.

Shapes: B sequences, T response positions, m bins, K samples of a state's value, J quantile levels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from verl_dvpo.distributional.levels import quantile_levels
from verl_dvpo.distributional.returns import distributional_gae, sample_replacement_returns
from verl_dvpo.distributional.sorting import count_below
from verl_dvpo.families.base import FamilyConfig, FamilyLoss, ValueFamily
from verl_dvpo.families.bounds import require_choice, require_finite, require_integer
from verl_dvpo.families.registry import register_family

#: The quantiles that are logged, and their levels.
SHOWN = {"quantile/q10": 0.1, "quantile/q50": 0.5, "quantile/q90": 0.9}


@dataclass(frozen=True, kw_only=True)
class HLGaussConfig(FamilyConfig):
    """Settings of ``family: hl_gauss``.

    Attributes:
        value_min: lower end of the support, in units of reward.
        value_max: upper end, > value_min. The defaults leave a margin of 10 σ around returns in [0, 1]: a target at an
            end of the support loses half of its normal density, and its mean moves inwards by almost σ.
        num_bins: m >= 2; 51 as in C51, since the setting of the paper was not at hand.
        sigma_ratio: > 0: σ of the normal density over the width of a bin (paper: 0.75).
        target: ``lambda_return`` (paper's regression targets, with the λ-return of GAE), or ``sample_replacement``
            (ours): samples of the mixture of n-step returns, so that the histogram spreads as returns do.
        num_samples: K >= 2 samples of a state's histogram for ``sample_replacement``.
    """

    meaning: ClassVar[tuple[str, ...]] = ("value_min", "value_max", "num_bins", "sigma_ratio")

    value_min: float = -0.2
    value_max: float = 1.2
    num_bins: int = 51
    sigma_ratio: float = 0.75
    target: str = "lambda_return"
    num_samples: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require_finite("value_min", self.value_min)
        require_finite("value_max", self.value_max, above=self.value_min)
        require_integer("num_bins", self.num_bins, least=2)
        require_finite("sigma_ratio", self.sigma_ratio, above=0.0)
        require_choice("target", self.target, ("lambda_return", "sample_replacement"))
        require_integer("num_samples", self.num_samples, least=2)


@register_family("hl_gauss")
class HLGaussFamily(ValueFamily):
    """V(s) = Σ_i p_i(s)·c_i, p = softmax(outputs); L = −Σ_i h_i·log p_i with the smoothed histogram h of the target.

    A freshly drawn head has logits near 0: every state starts with a flat histogram, its value in the middle of the
    support, where no bin's gradient is lost.
    """

    Config = HLGaussConfig

    def __init__(self, config: HLGaussConfig) -> None:
        self.config = config
        self.num_outputs = config.num_bins
        self.drawn = config.target == "sample_replacement"
        # The mean is all that λ-returns need; samples need the whole histogram.
        self.num_kept = config.num_bins if self.drawn else 1
        self.width = (config.value_max - config.value_min) / config.num_bins
        self.sigma = config.sigma_ratio * self.width
        edges = torch.linspace(config.value_min, config.value_max, config.num_bins + 1, dtype=torch.float64)
        self.centers = (0.5 * (edges[1:] + edges[:-1])).float()
        self.edges = edges.float()
        self.levels = quantile_levels(config.num_samples, "midpoint", dtype=torch.float32)
        self.shown = torch.tensor(list(SHOWN.values()))

    def _move_to(self, device: torch.device) -> None:
        if self.edges.device != device:
            self.edges, self.centers, self.levels, self.shown = (
                tensor.to(device) for tensor in (self.edges, self.centers, self.levels, self.shown)
            )

    def value(self, outputs: Tensor) -> Tensor:
        """(..., m) -> (...): the mean of the histogram."""
        return self._mean(outputs.softmax(-1))

    def _mean(self, probs: Tensor) -> Tensor:
        """(..., m) -> (...). A product and a sum, because a matrix product's rounding depends on how tokens are cut."""
        self._move_to(probs.device)
        return (probs * self.centers).sum(-1)

    def quantiles(self, outputs: Tensor, levels: Tensor) -> Tensor:
        """(..., m) and (J,) -> (..., J): quantiles of the histogram, without the spread of the targets' smoothing."""
        self._move_to(outputs.device)
        return histogram_quantiles(outputs.softmax(-1), levels, self.edges, self.sigma)

    def keep(self, outputs: Tensor) -> Tensor:
        """(..., m) -> (..., S): the value (S = 1), or with ``sample_replacement`` the bins' probabilities (S = m)."""
        probs = outputs.softmax(-1)
        return probs if self.drawn else self._mean(probs).unsqueeze(-1)

    def values_from_kept(self, kept: Tensor) -> Tensor:
        """(..., S) -> (...): the mean of the histogram."""
        return self._mean(kept) if self.drawn else kept.squeeze(-1)

    def build_targets(
        self,
        kept: Tensor,
        rewards: Tensor,
        mask: Tensor,
        *,
        gamma: float,
        lam: float,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Returns ``histogram`` (B, T, m), and ``outside`` (B, T), the share of targets outside the support."""
        self._move_to(kept.device)
        if self.drawn:
            samples = histogram_samples(kept, self.levels, self.edges, self.sigma)
            returns = sample_replacement_returns(rewards, samples, mask, gamma=gamma, lam=lam, generator=generator)
        else:
            returns, _ = distributional_gae(rewards, kept, mask, gamma=gamma, lam=lam)
        clipped = returns.clamp(self.config.value_min, self.config.value_max)
        outside = (clipped != returns).float().mean(-1)
        return {"histogram": smoothed_histogram(clipped, self.edges, self.sigma), "outside": outside}

    def loss(
        self, outputs: Tensor, targets: Mapping[str, Tensor], multipliers: Mapping[str, Tensor] | None = None
    ) -> FamilyLoss:
        """L = ``cross_entropy``, −Σ_i h_i·log p_i (paper)."""
        entropy = F.cross_entropy(outputs, targets["histogram"], reduction="none")
        return FamilyLoss(total=entropy, terms={"cross_entropy": entropy})

    def statistics(self, outputs: Tensor) -> dict[str, Tensor]:
        """q10, q50, q90 and spread (standard deviation), all without the spread of the smoothing."""
        self._move_to(outputs.device)
        probs = outputs.softmax(-1)
        quantiles = histogram_quantiles(probs, self.shown, self.edges, self.sigma)
        spread = returns_variance(probs, self.edges, self.sigma).sqrt()
        return dict(zip(SHOWN, quantiles.unbind(-1), strict=True)) | {"quantile/spread": spread}

    def target_statistics(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Share of the targets that lay outside the support and were clipped into it."""
        return {"hl_gauss/out_of_support": targets["outside"]}


def smoothed_histogram(points: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """Projects points onto bins: the mean over K points of the bin masses of N(y, σ²), cut to the support. (paper)

    One point: h_i = (Φ((e_{i+1} − y)/σ) − Φ((e_i − y)/σ)) / (Φ((e_m − y)/σ) − Φ((e_0 − y)/σ)).

    Args:
        points: (..., K) y, inside the support.
        edges: (m + 1,) e, ascending.
        sigma: σ > 0, in units of reward.

    Returns:
        (..., m), rows sum to 1; NaN where a point is.
    """
    total = points.new_zeros(*points.shape[:-1], edges.shape[0] - 1)
    for y in points.split(1, -1):  # one point at a time: all at once would need K times the memory
        mass = torch.special.ndtr((edges - y) / sigma).diff(dim=-1)
        total += mass / mass.sum(-1, keepdim=True)
    return total / points.shape[-1]


def histogram_quantiles(probs: Tensor, levels: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """Reads quantiles of a histogram, and takes out the spread of the smoothing. (ours)

    Mass is uniform inside a bin. Then all deviations from the mean shrink by one factor, which turns the variance of
    that mass into ``returns_variance``.

    Args:
        probs: (..., m), rows sum to 1.
        levels: (J,) in (0, 1).
        edges: (m + 1,) ascending, equally spaced.
        sigma: σ of the smoothing, in units of reward.

    Returns:
        (..., J), ascending with the level.
    """
    mean, variance = _moments(probs, edges)
    width = (edges[-1] - edges[0]) / probs.shape[-1]
    # Mass that is uniform inside each bin has this much more variance than mass at the centres.
    shrink = (returns_variance(probs, edges, sigma) / (variance + width**2 / 12.0)).sqrt()
    return mean[..., None] + shrink[..., None] * (_read(probs, levels, edges) - mean[..., None])


def histogram_samples(probs: Tensor, levels: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """Draws equally weighted samples from a histogram: quantiles at equally spaced levels, moved and scaled. (ours)

    The samples have the histogram's mean and the variance of ``returns_variance`` exactly, so targets that are built
    from them again and again, one token after the other, neither drift nor widen nor shrink.

    Args:
        probs: (..., m), rows sum to 1.
        levels: (K,) equally spaced in (0, 1).
        edges: (m + 1,) ascending, equally spaced.
        sigma: σ of the smoothing, in units of reward.

    Returns:
        (..., K), ascending.
    """
    mean, _ = _moments(probs, edges)
    raw = _read(probs, levels, edges)
    raw = raw - raw.mean(-1, keepdim=True)
    found = raw.square().mean(-1).clamp_min(torch.finfo(raw.dtype).tiny)
    scale = (returns_variance(probs, edges, sigma) / found).sqrt()
    return mean[..., None] + scale[..., None] * raw


def _read(probs: Tensor, levels: Tensor, edges: Tensor) -> Tensor:
    """(..., m) and (J,) -> (..., J): quantiles of mass that is uniform inside each bin."""
    rows = probs.reshape(-1, probs.shape[-1])
    below = F.pad(rows.cumsum(-1), (1, 0))
    wanted = levels.to(rows).expand(rows.shape[0], -1).contiguous()
    # The bin in which the cumulated mass passes the level; rounding may leave the last sum below 1.
    place = count_below(below[:, 1:].contiguous(), wanted).place.clamp(max=rows.shape[-1] - 1)
    share = (wanted - below.gather(1, place)) / rows.gather(1, place)
    width = (edges[-1] - edges[0]) / rows.shape[-1]
    return (edges[place] + width * share.clamp(0.0, 1.0)).reshape(*probs.shape[:-1], -1)


def returns_variance(probs: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """Estimates the variance of the returns that a histogram was fitted to: (..., m) -> (...), >= 0. (ours)

    Smoothing adds σ², and standing at the centre of a bin of width w adds w²/12 (Sheppard's correction).
    """
    _, variance = _moments(probs, edges)
    width = (edges[-1] - edges[0]) / probs.shape[-1]
    return (variance - width**2 / 12.0 - sigma**2).clamp_min(0.0)


def _moments(probs: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """(..., m) -> mean (...) and variance (...) of mass at the centres of the bins."""
    centers = 0.5 * (edges[:-1] + edges[1:])
    mean = (probs * centers).sum(-1)
    return mean, (probs * (centers - mean.unsqueeze(-1)).square()).sum(-1)
