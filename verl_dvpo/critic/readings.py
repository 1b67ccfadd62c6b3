# SPDX-License-Identifier: Apache-2.0
"""Reads, of a critic's outputs, the per-token numbers that the actor's options need beside the value.

Shape legend: D outputs of the head per token, L response tokens laid end to end, J quantile levels.
"""

import torch
from torch import Tensor

from verl_dvpo.distributional.advantage_config import CVAR_LEVELS, SIGMA_LEVELS, AdvantageConfig
from verl_dvpo.distributional.metrics import population_std
from verl_dvpo.distributional.readouts import read_out
from verl_dvpo.families.base import SampledFamily, ValueFamily

#: Set on the batch by the trainer where the actor's options need more of a state than its value: ``AdvantageConfig``.
OPTIONS = "dvpo_options"

#: Quantiles that a readout takes of a family without samples, at the levels (2j−1)/(2·200).
READOUT_POINTS = 200


@torch.no_grad()
def read_states(family: ValueFamily, outputs: Tensor, options: AdvantageConfig) -> dict[str, Tensor]:
    """Returns each of ``options.fields``: name -> (L,), in units of reward.

    ``value_sigma`` is half the distance between the 16 % and the 84 % quantile, ``value_low`` and ``value_high`` are
    the quantiles at ``reward_low`` and ``reward_high``, ``value_disagreement`` is the standard deviation of the value
    over the heads, ``value_readout`` the readout, ``value_cvar_10`` and so on CVaR at ``CVAR_LEVELS``.

    Args:
        family: the critic's family.
        outputs: (L, D).
        options: the options of the actor's advantage.
    """
    fields = options.fields
    ends = {
        "value_sigma": SIGMA_LEVELS,
        "value_low": (options.reward_low,) * 2,
        "value_high": (options.reward_high,) * 2,
    }
    found: dict[str, Tensor] = {}
    levels = sorted({level for name in fields for level in ends.get(name, ())})
    if levels:
        read = family.quantiles(outputs, torch.tensor(levels, device=outputs.device)).unbind(-1)
        quantile = dict(zip(levels, read, strict=True))
        for name in ends.keys() & set(fields):
            low, high = (quantile[level] for level in ends[name])
            found[name] = 0.5 * (high - low) if name == "value_sigma" else high
    if "value_disagreement" in fields:
        found["value_disagreement"] = population_std(family.head_values(outputs), -1)
    if "value_readout" in fields:
        assert options.readout_level != "auto"
        found["value_readout"] = read_out(_points(family, outputs), options.readout, options.readout_level)
    if options.adapts_readout:
        points = _points(family, outputs)
        found |= {name: read_out(points, "cvar", level) for name, level in CVAR_LEVELS.items()}
    return found


def check_readings(family: ValueFamily, options: AdvantageConfig, name: str) -> None:
    """Raises ValueError where the family's outputs cannot hold what the chosen options read of them.

    Args:
        family: the critic's family.
        options: the options of the actor's advantage.
        name: the family's name, for the error.
    """
    if not options.fields:
        return
    chosen = ", ".join(
        f"algorithm.value.{field} is {getattr(options, field)!r}"
        for field, off in (("weighting", "none"), ("reward", "raw"), ("readout", "mean"))
        if getattr(options, field) not in (off, "group_std", "clipped", "clipped_residual")
    )
    outputs = _fresh_outputs(family)
    ends = family.quantiles(outputs, torch.tensor(SIGMA_LEVELS))
    if not bool((ends[:, 1] > ends[:, 0]).any()):
        raise ValueError(
            f"{chosen}; that needs a critic with a distribution; critic.value.family is {name!r}, whose quantiles are "
            "all equal; choose a distributional family such as quantile_ensemble"
        )
    if "value_disagreement" in options.fields and family.head_values(outputs).shape[-1] < 2:
        what, field = ("level", "readout_level") if options.adapts_readout else ("gain", "gate_gain")
        raise ValueError(
            f"{chosen}; its {what} needs heads that can disagree; critic.value.family is {name!r} with one head; set "
            f"critic.value.num_heads to 2 or more, or algorithm.value.{field} to a number"
        )


def _points(family: ValueFamily, outputs: Tensor) -> Tensor:
    """(L, D) -> (L, K): equally weighted points of the distribution, ascending."""
    if isinstance(family, SampledFamily):
        return family.samples(outputs)
    levels = torch.arange(0.5, READOUT_POINTS, device=outputs.device).div_(READOUT_POINTS)
    return family.quantiles(outputs, levels)


def _fresh_outputs(family: ValueFamily) -> Tensor:
    """(8, D): what a head that was just made says of random hidden states."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.empty(family.num_outputs, 4), torch.empty(family.num_outputs)
    family.init_head(weight, bias, generator)
    return torch.randn(8, 4, generator=generator) @ weight.T + bias
