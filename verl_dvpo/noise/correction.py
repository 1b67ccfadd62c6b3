# SPDX-License-Identifier: Apache-2.0
"""Repairs noisy rewards before the algorithm sees them, with known error rates or by bounds.

With u = (reward - low) / (high - low) of a noisy binary reward, FPR, FNR and J = 1 - FPR - FNR (arXiv 2510.00915 names
both ideas; the formulas here are rebuilt from them, not taken from its text):

- backward: u' = (u - FPR) / J, so that E[u' | right] = (1 - FNR - FPR) / J = 1 and E[u' | wrong] = 0. The reward
  low + (high - low) u' is unbiased, for J below 0 too; its variance grows as 1 / J^2. J = 0 has no such form.
- forward: w = u - (1 - FNR), so that E[w | right] = 0 and E[w | wrong] = FPR - (1 - FNR) = -J. A policy gradient whose
  terms are weighted by (high - low) w is, in expectation, J > 0 times that of the clean reward less a constant, which
  changes no policy gradient. It needs FNR alone, and never divides.
- clip: the reward, drawn in to [low, high] of the correction (a control, without rates).

Backward is affine and forward is a shift. Where the rates are the same for all samples, whitening, a group's mean or a
critic takes most of either away; what they change is the scale of rewards against KL penalties and value losses, the
sign where J < 0, and, where rates differ between samples (``noise.where``), which samples count how much.
A sample on which the noise does not act has rates 0.

Relabelling by the majority of a prompt's answers needs them together: ``verl_dvpo.noise.majority``.
"""

from verl_dvpo.noise.base import NoiseConfig
from verl_dvpo.noise.rates import Rates, rates, stays_binary


def correct(config: NoiseConfig, score: float, *, acts: bool) -> float:
    """Returns the corrected reward; the noisy one where a majority is still to vote.

    Args:
        config: the noise with its ``correction``.
        score: noisy reward; ``low`` or ``high`` for backward and forward.
        acts: whether the noise acts on the sample.
    """
    chosen = config.correction
    if chosen.kind in ("none", "majority"):
        return score
    if chosen.kind == "clip":
        low = config.low if chosen.low is None else chosen.low
        high = config.high if chosen.high is None else chosen.high
        return min(max(score, low), high)
    fpr, fnr = known_rates(config) if acts else (0.0, 0.0)
    span = config.high - config.low
    noisy = (score - config.low) / span
    if chosen.kind == "forward":
        return span * (noisy - (1.0 - fnr))
    return score if fpr == fnr == 0.0 else config.low + span * (noisy - fpr) / (1.0 - fpr - fnr)


def known_rates(config: NoiseConfig) -> Rates:
    """Returns the rates that the correction uses: its own where they are set, those of the noise elsewhere.

    A rate that forward correction does not need and nobody knows is 0.
    """
    own = config.correction
    known = rates(config) or Rates(0.0, 0.0)
    return Rates(
        known.fpr if own.false_positive is None else own.false_positive,
        known.fnr if own.false_negative is None else own.false_negative,
    )


def check_correction(config: NoiseConfig, kind: str) -> None:
    """Raises ValueError for a correction that does not fit the noise ``kind``."""
    own = config.correction
    field = "noise.correction"
    if own.kind == "clip":
        low = config.low if own.low is None else own.low
        high = config.high if own.high is None else own.high
        if not low < high:
            raise ValueError(f"{field}.high is {high}; it must be above {field}.low, which is {low}; set both")
    if own.kind not in ("backward", "forward"):
        return
    if not stays_binary(config):
        raise ValueError(
            f"{field}.kind is {own.kind!r}; it must be 'clip' or 'none' with these rewards, because noise.kind={kind} "
            "makes others of low and high; use noise.correction.kind=clip"
        )
    # clean rewards have rates 0, but whoever corrects them knows of noise in the rewards themselves
    unknown = kind == "none" or rates(config) is None
    for name in ("false_negative",) if own.kind == "forward" else ("false_positive", "false_negative"):
        if unknown and getattr(own, name) is None:
            raise ValueError(
                f"{field}.{name} is None; it must be a number in [0, 1] with noise.kind={kind}, whose own rates are "
                f"not known; set {field}.{name}"
            )
    youden_j = known_rates(config).youden_j
    if own.kind == "backward" and abs(youden_j) < 1e-9:
        raise ValueError(
            f"{field}.kind is 'backward'; false positives and false negatives must not add up to 1, because such "
            "rewards say nothing; change the rates, or set noise.correction.kind=none"
        )
    if own.kind == "forward" and youden_j <= 0.0:
        raise ValueError(
            f"{field}.kind is 'forward'; false positives and false negatives must add up to less than 1, because it "
            "would learn the opposite; use noise.correction.kind=backward"
        )
