# SPDX-License-Identifier: Apache-2.0
"""Quantile levels and their conventions, and reading a distribution at given levels.

Shapes: M quantile levels, K samples of a distribution, "..." any leading shape.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

LEVEL_KINDS = ("midpoint", "right")

# Tensors that passed ``check_levels`` -> their version at that time. Reading values from a GPU stalls the host, so
# levels that come with every micro-batch are read once.
_CHECKED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def quantile_levels(
    num_quantiles: int,
    kind: str = "midpoint",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Returns the levels τ of M equally weighted quantiles, ascending in (0, 1].

    ``right`` is τ_j = j/M ([DVPO], paper). ``midpoint`` is τ_j = (2j−1)/(2M) ([QR-DQN]; ours here). At τ = 1 the
    pinball loss has no downward gradient, so the last quantile of ``right`` can only rise.

    Args:
        num_quantiles: M ≥ 1.
        kind: ``midpoint`` or ``right``.
        device: device of the levels.
        dtype: a floating type; None takes torch's default. Types narrower than float32 round close levels together.

    Returns:
        (M,) levels.

    Raises:
        ValueError: M < 1 or an unknown kind.
    """
    if isinstance(num_quantiles, bool) or not isinstance(num_quantiles, int) or num_quantiles < 1:
        raise ValueError(f"num_quantiles is {num_quantiles!r}; it must be an integer of at least 1")
    if kind not in LEVEL_KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(LEVEL_KINDS)}")
    j = torch.arange(1, num_quantiles + 1, dtype=torch.float64)
    levels = j / num_quantiles if kind == "right" else (2 * j - 1) / (2 * num_quantiles)
    return levels.to(device=device, dtype=dtype or torch.get_default_dtype())


def check_levels(levels: torch.Tensor, num_quantiles: int) -> None:
    """Raises ValueError unless ``levels`` is (M,), strictly ascending and inside (0, 1].

    Reads the values once per tensor, and again after a change in place; other calls do not touch the device. Under
    torch.compile it checks the shape only, because values are unknown there.
    """
    if levels.ndim != 1 or levels.shape[0] != num_quantiles:
        raise ValueError(f"levels has shape {tuple(levels.shape)}; for these quantiles it must be ({num_quantiles},)")
    if not levels.is_floating_point():
        raise ValueError(f"levels has dtype {levels.dtype}; it must be a floating type")
    if torch.compiler.is_compiling():
        return
    version = -1 if levels.is_inference() else levels._version
    if version >= 0 and _CHECKED.get(levels) == version:
        return
    values = levels.detach().double().cpu()
    inside = bool(((values > 0) & (values <= 1)).all())
    if not inside or not bool((values[1:] > values[:-1]).all()):
        raise ValueError(f"levels is {_short(values)}; it must ascend strictly inside (0, 1]")
    _CHECKED[levels] = version


def _short(values: torch.Tensor) -> str:
    shown = ", ".join(f"{v:.6g}" for v in values[:8].tolist())
    return f"[{shown}{', ...' if values.numel() > 8 else ''}]"


def read_at(sorted_samples: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Reads the quantiles of K equally weighted samples at M levels, by linear interpolation.

    Sample k stands at level (2k−1)/(2K); a level outside the first and the last one gets the end sample
    (docs/method.md, section 4).

    Args:
        sorted_samples: (..., K) ascending.
        levels: (M,) in (0, 1].

    Returns:
        (..., M) in the samples' dtype.
    """
    size = sorted_samples.shape[-1]
    position = (levels.double() * size - 0.5).clamp(0, size - 1)
    below = position.floor()
    weight = (position - below).to(sorted_samples.dtype)
    index = below.long()
    low = sorted_samples[..., index]
    high = sorted_samples[..., (index + 1).clamp(max=size - 1)]
    return torch.lerp(low, high, weight)
