# SPDX-License-Identifier: Apache-2.0
"""Sorting and binary search along rows, fast on CPUs too.

On a GPU torch.sort and torch.searchsorted are what one wants. On a CPU both work element by element with branches that
cannot be predicted; on one AMD Zen 5 core, 2048 rows of 200: numpy's vectorised sort 0.3 ms against 11.5 ms, and a
binary search whose every step is one gather of all rows 3 ms against 15 ms.

Shapes: R rows, K samples, J thresholds, "..." any leading shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

try:
    import numpy as np
except ImportError:  # torch works without numpy, and so does this package
    np = None  # type: ignore[assignment]


def sort_samples(samples: torch.Tensor) -> torch.Tensor:
    """(..., K) -> (..., K) ascending along the last axis, NaN last. Carries no gradient."""
    samples = samples.detach()
    if np is None or samples.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.sort(samples, dim=-1).values
    return torch.from_numpy(np.sort(samples.numpy(), axis=-1))


def sort_with_gradient(samples: torch.Tensor) -> torch.Tensor:
    """(..., K) -> (..., K) ascending along the last axis, NaN last; the gradient goes back to where a value was."""
    if np is None or samples.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.sort(samples, dim=-1).values
    order = torch.from_numpy(np.argsort(samples.detach().numpy(), axis=-1))
    return samples.gather(-1, order)


class Count(NamedTuple):
    """How many samples of its row lie below each threshold: the same (R, J) numbers, to compute and to index with."""

    number: torch.Tensor  # in the thresholds' dtype
    place: torch.Tensor  # in int64


def count_below(rows: torch.Tensor, thresholds: torch.Tensor, *, or_equal: bool = False) -> Count:
    """For each threshold, how many of its row's samples are smaller (or equal).

    Args:
        rows: (R, K) ascending.
        thresholds: (R, J), in any order, same dtype. For a NaN the count means nothing, but is in 0..K.
        or_equal: count samples that equal the threshold too.

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
    """Binary search of all thresholds at once; counts are floats because torch compares and adds those fastest."""
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
        # `number` samples are known to be below; is the one `step` further too?
        probe = padded[:, step - 1 :].gather(1, number.int().long())
        number.add_(above(thresholds, probe, out=hit), alpha=step)
    return number.clamp_(max=size)


def count_tied(rows: torch.Tensor, thresholds: torch.Tensor, below: Count) -> torch.Tensor | None:
    """How many samples equal each threshold, given how many are below: (R, J), or None if there is certainly no tie."""
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
