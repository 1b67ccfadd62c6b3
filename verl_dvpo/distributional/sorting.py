# SPDX-License-Identifier: Apache-2.0
"""Sorts and searches along rows, fast on CPUs as well as on GPUs.

A GPU uses torch.sort and torch.searchsorted. On a CPU both work element by element, so a CPU uses numpy's vectorised
sort and a binary search that takes each step for all rows at once (times in docs/benchmarks.md).

Shapes: R rows, K samples, J thresholds, "..." any leading shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

try:
    import numpy as np
except ImportError:  # torch runs without numpy, and so does this package
    np = None  # type: ignore[assignment]


def sort_samples(samples: torch.Tensor) -> torch.Tensor:
    """Sorts (..., K) along the last axis, ascending and NaN last, without a gradient."""
    samples = samples.detach()
    if np is None or samples.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.sort(samples, dim=-1).values
    return torch.from_numpy(np.sort(samples.numpy(), axis=-1))


def sort_with_gradient(samples: torch.Tensor) -> torch.Tensor:
    """Sorts (..., K) along the last axis, ascending and NaN last; the gradient returns to each value's old place."""
    if np is None or samples.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.sort(samples, dim=-1).values
    order = torch.from_numpy(np.argsort(samples.detach().numpy(), axis=-1))
    return samples.gather(-1, order)


class Count(NamedTuple):
    """Holds, for each threshold, the number of samples of its row below it: (R, J), once to compute, once to index."""

    number: torch.Tensor  # in the thresholds' dtype
    place: torch.Tensor  # in int64


def count_below(rows: torch.Tensor, thresholds: torch.Tensor, *, or_equal: bool = False) -> Count:
    """Counts, for each threshold, the samples of its row that are smaller (or equal).

    Args:
        rows: (R, K) ascending.
        thresholds: (R, J), in any order, same dtype. The count of a NaN means nothing but lies in 0..K.
        or_equal: also counts samples equal to the threshold.

    Returns:
        (R, J) counts in 0..K.
    """
    if rows.device.type != "cpu":
        index = torch.searchsorted(rows.contiguous(), thresholds.contiguous(), right=or_equal)
        return Count(index.to(thresholds.dtype), index)
    number = _count_below_cpu(rows, thresholds, or_equal)
    # Through int32, because the direct conversion of floats to int64 is not vectorised.
    return Count(number, number.int().long())


def _count_below_cpu(rows: torch.Tensor, thresholds: torch.Tensor, or_equal: bool) -> torch.Tensor:
    """Searches all thresholds at once; counts are floats because torch compares and adds those fastest."""
    size = rows.shape[1]
    above = torch.ge if or_equal else torch.gt
    # A Huber zone wider than the data is common (κ = 1, rewards in [0, 1]): then all counts are the same.
    if thresholds.numel() == 0 or thresholds.max() < rows[:, 0].min():
        return torch.zeros_like(thresholds)
    if thresholds.min() > rows[:, -1].max():
        return torch.full_like(thresholds, size)
    steps = size.bit_length()
    # With 2^steps − 1 entries every probe is inside the row, and infinity is above every finite threshold.
    padded = torch.nn.functional.pad(rows, (0, (1 << steps) - 1 - size), value=torch.inf)
    # The first steps have few pivots: comparing with all of them is cheaper than looking one up.
    fine = max(0, steps - 3)
    hit = torch.empty_like(thresholds)
    number = torch.zeros_like(thresholds)
    for pivot in range((1 << fine) - 1, padded.shape[1], 1 << fine):
        number.add_(above(thresholds, padded[:, pivot, None], out=hit), alpha=1 << fine)
    for step in (1 << i for i in reversed(range(fine))):
        # ``number`` samples are known to be below; is the one ``step`` further too?
        probe = padded[:, step - 1 :].gather(1, number.int().long())
        number.add_(above(thresholds, probe, out=hit), alpha=step)
    return number.clamp_(max=size)


def count_tied(rows: torch.Tensor, thresholds: torch.Tensor, below: Count) -> torch.Tensor | None:
    """Counts the samples equal to each threshold, given those below it: (R, J), or None if no threshold is tied."""
    if rows.device.type != "cpu":  # looking for ties would stall the host
        return count_below(rows, thresholds, or_equal=True).number - below.number
    next_sample = rows.gather(1, below.place.clamp(max=rows.shape[1] - 1))
    tied_rows = (next_sample == thresholds).any(1).nonzero()[:, 0]
    if tied_rows.numel() == 0:
        return None
    tied = torch.zeros_like(thresholds)
    not_above = count_below(rows[tied_rows], thresholds[tied_rows], or_equal=True).number
    tied[tied_rows] = not_above - below.number[tied_rows]
    return tied
