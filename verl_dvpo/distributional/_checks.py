# SPDX-License-Identifier: Apache-2.0
"""Argument checks and dtype rules shared by this package."""

from __future__ import annotations

import math

import torch


def check_unit_interval(name: str, value: float) -> None:
    """Raises ValueError unless 0 ≤ value ≤ 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}; it must be in [0, 1]")


def check_not_negative(name: str, value: object) -> None:
    """Raises ValueError unless value is a finite number ≥ 0."""
    if not (isinstance(value, int | float) and value >= 0.0 and math.isfinite(value)):
        raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0")


def as_compute(name: str, values: torch.Tensor) -> torch.Tensor:
    """Returns ``values`` in the dtype of the computation: float32 and float64 unchanged, narrower types as float32.

    Raises:
        ValueError: the dtype is not floating.
    """
    if not values.is_floating_point():
        raise ValueError(f"{name} has dtype {values.dtype}; it must be a floating type")
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def check_tail(name: str, fraction: float) -> None:
    """Raises ValueError unless 0 < fraction ≤ 0.5."""
    if not 0.0 < fraction <= 0.5:
        raise ValueError(f"{name} is {fraction}; a tail fraction must be in (0, 0.5]")


def tail_size(fraction: float, size: int) -> int:
    """Returns the number of points in a tail: max(1, ⌊fraction·size + ½⌋) of ``size`` (docs/method.md, section 4)."""
    return max(1, math.floor(fraction * size + 0.5))
