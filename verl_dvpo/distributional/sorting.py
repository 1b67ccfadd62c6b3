# SPDX-License-Identifier: Apache-2.0
"""Sorting and binary search along rows, fast on CPUs too.

On a GPU torch.sort and torch.searchsorted are what one wants. On a CPU both work element by element with branches that
cannot be predicted; on one AMD Zen 5 core, 2048 rows of 200: numpy's vectorised sort 0.3 ms against 11.5 ms, and a
binary search whose every step is one gather of all rows 3 ms against 15 ms.

Shapes: R rows, K samples, J thresholds, "..." any leading shape.
"""

from __future__ import annotations

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


def count_below(rows: torch.Tensor, thresholds: torch.Tensor, *, or_equal: bool = False) -> torch.Tensor:
    """For each threshold, how many of its row's samples are smaller (or equal).

    Args:
        rows: (R, K) ascending.
        thresholds: (R, J), in any order. For a NaN the count means nothing.
        or_equal: count samples that equal the threshold too.

    Returns:
        (R, J) int64 in 0..K.
    """
    if rows.device.type != "cpu":
        return torch.searchsorted(rows, thresholds.contiguous(), right=or_equal)
    size = rows.shape[1]
    steps = size.bit_length()
    # With 2^steps − 1 entries every probe is inside the row; infinity is never below a finite threshold.
    padded = torch.nn.functional.pad(rows, (0, (1 << steps) - 1 - size), value=torch.inf)
    below = torch.le if or_equal else torch.lt
    count = torch.zeros(thresholds.shape, dtype=torch.int64)
    for step in (1 << i for i in reversed(range(steps))):
        # `count` samples are known to be below; is the one `step` further too?
        probe = padded[:, step - 1 :].gather(1, count)
        count.add_(below(probe, thresholds), alpha=step)
    return count.clamp_(max=size)
