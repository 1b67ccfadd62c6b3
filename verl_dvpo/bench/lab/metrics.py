# SPDX-License-Identifier: Apache-2.0
"""Measures a trained critic against the exact truth, without sampling.

Every number is an average over states, weighted by how often a token is predicted from them.

Shapes: R runs (seeds), S states, K samples of a state's value, A atoms of the return.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from .process import HEAVY_DF, HEAVY_SCALE, Array, TokenProcess

#: Share of each tail that is measured: α and β of the shipped losses.
TAIL = 0.1
COVERAGE = 0.8

#: Name -> meaning with its unit, in the order of the report's columns.
METRICS = {
    "v_error": "RMS difference of the mean to the clean truth [reward]",
    "v_bias": "mean signed difference to the clean truth [reward]",
    "v_error_seen": "RMS difference of the mean to the truth of the rewards that the critic saw [reward]",
    "crps_excess": "CRPS above the true distribution's own (the squared distance of the CDFs) [reward]",
    "coverage_80": "probability of the return inside the central 80 % interval [share]",
    "lower_tail_error": "mean absolute error of the lower 10 % tail's mean (CVaR) [reward]",
    "upper_tail_error": "mean absolute error of the upper 10 % tail's mean [reward]",
    "lower_tail_seen": "as the lower tail, against the quantiles of the rewards that the critic saw [reward]",
    "upper_tail_seen": "as the upper tail, against the quantiles of the rewards that the critic saw [reward]",
    "lower_tail_bias": "mean signed error of the lower tail's mean [reward]",
    "upper_tail_bias": "mean signed error of the upper tail's mean [reward]",
    "spread_ratio": "spread (standard deviation) over the true one, both averaged over states",
}


def evaluate(
    samples: Array, process: TokenProcess, noise: str = "clean", *, values: Array | None = None
) -> dict[str, Array]:
    """Returns all metrics of ``METRICS``.

    Args:
        samples: (R, S, K) equally weighted points of each state's value, ascending.
        process: the clean process.
        noise: corruption of the rewards, one of ``process.NOISES``.
        values: (R, S) the value that the actor sees; None for the samples' mean.

    Returns:
        name -> (R,).
    """
    truth, atoms, weight = process.truth(), process.atoms, process.visits()
    seen = process.corrupted(noise).truth() @ atoms
    mean = samples.mean(-1) if values is None else values
    clean = truth @ atoms
    low_true, up_true = true_tail_means(truth, atoms)
    k = max(1, int(TAIL * samples.shape[-1] + 0.5))
    lower, upper = samples[..., :k].mean(-1), samples[..., samples.shape[-1] - k :].mean(-1)
    low, up = lower - low_true, upper - up_true
    observed = seen_quantiles(process, noise, samples.shape[-1])
    spread_true = np.sqrt((truth @ atoms**2 - clean**2).clip(0))
    return {
        "v_error": np.sqrt((mean - clean) ** 2 @ weight),
        "v_bias": (mean - clean) @ weight,
        "v_error_seen": np.sqrt((mean - seen) ** 2 @ weight),
        "crps_excess": cdf_distance(samples, truth, atoms) @ weight,
        "coverage_80": coverage_probability(samples, truth, atoms) @ weight,
        "lower_tail_error": np.abs(low) @ weight,
        "upper_tail_error": np.abs(up) @ weight,
        "lower_tail_seen": np.abs(lower - observed[:, :k].mean(-1)) @ weight,
        "upper_tail_seen": np.abs(upper - observed[:, samples.shape[-1] - k :].mean(-1)) @ weight,
        "lower_tail_bias": low @ weight,
        "upper_tail_bias": up @ weight,
        "spread_ratio": (samples.std(-1) @ weight) / (spread_true @ weight),
    }


def true_tail_means(truth: Array, atoms: Array) -> tuple[Array, Array]:
    """Returns the means of exactly the lowest and the highest ``TAIL`` of the probability: (S, A) -> (S,), (S,)."""

    def lowest(probs: Array, values: Array) -> Array:
        before = probs.cumsum(-1) - probs
        return (np.clip(TAIL - before, 0, probs) @ values) / TAIL

    return lowest(truth, atoms), lowest(truth[:, ::-1], atoms[::-1])


def cdf_distance(samples: Array, truth: Array, atoms: Array) -> Array:
    """Returns ∫ (F_samples − F_truth)² dy: (R, S, K), (S, A), (A,) -> (R, S).

    It is the expected CRPS of the samples minus that of the truth itself, computed in its energy form
    E|X − Y| − ½E|X − X'| − ½E|Y − Y'| with X a sample and Y a return.
    """
    states, size = samples.shape[1:]
    j = (2 * np.arange(1, size + 1) - size - 1) / size**2
    within = samples @ j  # ½E|X − X'| of ascending samples
    # ½E|Y − Y'| = ∫ F(1 − F), a step function between ascending atoms
    cdf = truth.cumsum(-1)[:, :-1]
    own = (cdf * (1 - cdf)) @ np.diff(atoms)
    # E|x − Y| is piecewise linear in x, with knots at the atoms
    below = np.concatenate([np.zeros((states, 1)), truth.cumsum(-1)], axis=1)
    below_sum = np.concatenate([np.zeros((states, 1)), (truth * atoms).cumsum(-1)], axis=1)
    place = np.searchsorted(atoms, samples)
    row = np.arange(states)[None, :, None]
    p, s = below[row, place], below_sum[row, place]
    between = samples * (2 * p - 1) + below_sum[None, :, -1:] - 2 * s
    return between.mean(-1) - within - own


def coverage_probability(samples: Array, truth: Array, atoms: Array) -> Array:
    """Returns the probability of the return inside the samples' central 80 % interval, ends included: (R, S)."""
    size = samples.shape[-1]
    # as in `distributional.coverage`: sample k stands at the midpoint (2k−1)/(2K), linear in between.
    ends = np.clip(np.array([0.5 - COVERAGE / 2, 0.5 + COVERAGE / 2]) * size - 0.5, 0, size - 1)
    below = np.floor(ends).astype(int)
    above = np.minimum(below + 1, size - 1)
    interval = samples[..., below] + (ends - below) * (samples[..., above] - samples[..., below])
    cdf = np.concatenate([np.zeros((truth.shape[0], 1)), truth.cumsum(-1)], axis=1)
    row = np.arange(truth.shape[0])[None, :]
    first = np.searchsorted(atoms, interval[..., 0], side="left")
    last = np.searchsorted(atoms, interval[..., 1], side="right")
    return np.maximum(cdf[row, last] - cdf[row, first], 0.0)


def true_samples(process: TokenProcess, size: int) -> Array:
    """Returns the exact quantiles at K midpoint levels, the best that K points can do: (1, S, K)."""
    levels = (np.arange(size) + 0.5) / size
    cdf = process.truth().cumsum(-1)
    place = (cdf[:, None, :] < levels[None, :, None] - 1e-12).sum(-1).clip(max=process.atoms.shape[0] - 1)
    return process.atoms[place][None]


def seen_quantiles(process: TokenProcess, noise: str, size: int) -> Array:
    """Returns quantiles (S, K) at K midpoint levels of the corrupted return under ``noise``.

    Tails are measured on these and not on the exact tail means, which under ``heavy`` depend mostly on values beyond
    the last quantile.
    """
    if noise != "heavy":
        return true_samples(process.corrupted(noise), size)[0]
    # The noise is continuous: its CDF, mixed over atoms, on a grid that is fine in the middle and wide at the ends.
    grid = np.sinh(np.linspace(-9, 9, 3001)) * HEAVY_SCALE / 10
    noise_cdf = stats.t.cdf((grid[:, None] - process.atoms) / HEAVY_SCALE, HEAVY_DF)
    cdf = process.truth() @ noise_cdf.T
    levels = (np.arange(size) + 0.5) / size
    return np.stack([np.interp(levels, row, grid) for row in cdf])
