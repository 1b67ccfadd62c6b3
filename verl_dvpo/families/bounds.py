# SPDX-License-Identifier: Apache-2.0
"""Checks of a family's settings; each raises a ValueError that begins with the field's name."""

import math
from collections.abc import Collection


def require_integer(name: str, value: object, *, least: int, most: int | None = None, other: str = "") -> None:
    """Raises ValueError unless ``value`` is an integer from ``least`` to ``most``, or the word ``other``."""
    if other and value == other:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"in [{least}, {most}]"
        or_other = f", or {other!r}" if other else ""
        raise ValueError(f"{name} is {value!r}; it must be an integer {bounds}{or_other}")


def require_at_least(name: str, value: object, least: float) -> None:
    """Raises ValueError unless ``value`` is a number of at least ``least``; infinity is one, NaN is not."""
    if not _is_number(value) or not value >= least:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it must be a number >= {least:g}")


def require_finite(name: str, value: object, *, least: float | None = None, above: float | None = None) -> None:
    """Raises ValueError unless ``value`` is a finite number, not below ``least`` and greater than ``above``."""
    bound = "" if least is None else f" >= {least:g}"
    bound += "" if above is None else f" > {above:g}"
    fits = _is_number(value) and math.isfinite(value)  # type: ignore[arg-type]
    fits = fits and (least is None or value >= least)  # type: ignore[operator]
    fits = fits and (above is None or value > above)  # type: ignore[operator]
    if not fits:
        raise ValueError(f"{name} is {value!r}; it must be a finite number{bound}")


def require_between(name: str, value: object, low: float, high: float) -> None:
    """Raises ValueError unless low <= ``value`` <= high."""
    if not _is_number(value) or not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it must be a number in [{low:g}, {high:g}]")


def require_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")


def require_terms(coef: Collection[str], allowed: Collection[str]) -> None:
    """Raises ValueError unless every name in ``coef`` is one of ``allowed``."""
    unknown = sorted(set(coef) - set(allowed))
    if unknown:
        raise ValueError(f"coef has unknown terms {', '.join(unknown)}; allowed are {', '.join(allowed)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
