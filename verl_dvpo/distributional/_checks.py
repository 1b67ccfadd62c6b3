# SPDX-License-Identifier: Apache-2.0
"""Checks and dtype rules that every function of this package shares."""

from __future__ import annotations

import math

import torch


def check_unit_interval(name: str, value: float) -> None:
    """Raise ValueError unless 0 ≤ value ≤ 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}; it must be in [0, 1]")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless value is finite and ≥ 0."""
    if not (value >= 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value}; it must be a finite number of at least 0")


def as_compute(name: str, values: torch.Tensor) -> torch.Tensor:
    """float32 and float64 stay, bfloat16 and float16 become float32; ValueError for anything that is not floating."""
    if not values.is_floating_point():
        raise ValueError(f"{name} has dtype {values.dtype}; it must be a floating type")
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def check_tail(name: str, fraction: float) -> None:
    """Raise ValueError unless 0 < fraction ≤ 0.5."""
    if not 0.0 < fraction <= 0.5:
        raise ValueError(f"{name} is {fraction}; a tail fraction must be in (0, 0.5]")


def tail_size(fraction: float, size: int) -> int:
    """Number of points in a tail of `size` points: max(1, ⌊fraction·size + ½⌋) (spec section 4)."""
    return max(1, math.floor(fraction * size + 0.5))
