# SPDX-License-Identifier: Apache-2.0
"""The options of the actor's advantage, typed and checked where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

WEIGHTINGS = ("none", "precision", "group_std")
REWARDS = ("raw", "winsorised", "gated", "clipped", "clipped_residual")
READOUTS = ("mean", "median", "trimmed", "cvar")

#: Levels whose half distance is the robust spread σ(s): the standard deviation of a normal distribution, within 0.6 %.
SIGMA_LEVELS = (0.16, 0.84)


#: Levels of CVaR whose values the critic hands over for ``readout_level: auto``: field -> level. 1 is the value itself.
CVAR_LEVELS = {"value_cvar_10": 0.1, "value_cvar_25": 0.25, "value_cvar_50": 0.5}


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Options of the actor's advantage (ours, docs/advantages.md); the defaults are those of DVPO and of PPO.

    Attributes:
        weighting: ``none``; ``precision``: A/(σ^p + weighting_eps) with the spread σ of the state's distribution;
            ``group_std``: the same with the standard deviation of the rewards of the prompt's answers, a control that
            needs no distribution.
        weighting_eps: > 0; in units of reward squared, or of reward where ``weighting_power`` is 1.
        weighting_power: p, 1 or 2. 2 weighs by inverse variance; ``group_std`` with 1 and 1e-6 divides as GRPO does.
        reward: ``raw``; ``winsorised``: drawn in to the critic's quantiles at the last state; ``gated``:
            V + K·(R − V) at the last state; ``clipped``: drawn in to quantiles of the batch's rewards, a control;
            ``clipped_residual``: R − V drawn in to quantiles of the batch's, a control.
        reward_low: lower level of ``winsorised`` and of both controls, in (0, 1) and below ``reward_high``.
        reward_high: their upper level, in (0, 1).
        reward_widening: k >= 0; ``winsorised`` leaves what is within k·σ beyond the two quantiles.
        gate_gain: K in [0, 1] of ``gated``; None computes K from the heads' disagreement against the spread.
        readout: what the actor takes for V(s): ``mean``, ``median``, ``trimmed`` (the mean without ``readout_level`` of
            the distribution at each end) or ``cvar`` (the mean of the lowest ``readout_level``).
        readout_level: in (0, 0.5) for ``trimmed``, in (0, 1] for ``cvar``; a share of the distribution. ``auto`` with
            ``cvar``: from the heads' disagreement against the spread in each batch.
        lam_actor: λ of the actor's advantage: None takes ``algorithm.lam``; a number in [0, 1]; ``length`` takes
            1 − 1/(length_alpha·length) for each response (VAPO).
        length_alpha: α > 0 of that formula; 0.05 in VAPO.

    Raises:
        ValueError: a value outside its bounds; the message begins with the field's name.
    """

    weighting: str = "none"
    weighting_eps: float = 0.25
    weighting_power: int = 2
    reward: str = "raw"
    reward_low: float = 0.05
    reward_high: float = 0.95
    reward_widening: float = 0.0
    gate_gain: float | None = None
    readout: str = "mean"
    readout_level: float | Literal["auto"] = 0.25
    lam_actor: float | Literal["length"] | None = None
    length_alpha: float = 0.05

    def __post_init__(self) -> None:
        for name, allowed in (("weighting", WEIGHTINGS), ("reward", REWARDS), ("readout", READOUTS)):
            if getattr(self, name) not in allowed:
                _refuse(name, getattr(self, name), f"it must be one of {', '.join(allowed)}")
        for name in ("weighting_eps", "length_alpha"):
            if not (_finite(getattr(self, name)) and getattr(self, name) > 0):
                _refuse(name, getattr(self, name), "it must be a finite number greater than 0")
        if self.weighting_power not in (1, 2):
            _refuse("weighting_power", self.weighting_power, "it must be 1 or 2")
        self._check_reward()
        self._check_readout()
        if self.lam_actor not in (None, "length") and not _within(self.lam_actor, 0.0, 1.0):
            _refuse("lam_actor", self.lam_actor, "it must be null, a number in [0, 1] or 'length'")

    def _check_reward(self) -> None:
        for name in ("reward_low", "reward_high"):
            value = getattr(self, name)
            if not (_finite(value) and 0.0 < value < 1.0):
                _refuse(name, value, "it must be a level in (0, 1)")
        if not self.reward_low < self.reward_high:
            _refuse("reward_low", self.reward_low, f"it must be below reward_high, which is {self.reward_high}")
        if not (_finite(self.reward_widening) and self.reward_widening >= 0):
            _refuse("reward_widening", self.reward_widening, "it must be a finite number of at least 0")
        if self.gate_gain is not None and not _within(self.gate_gain, 0.0, 1.0):
            _refuse("gate_gain", self.gate_gain, "it must be null or a number in [0, 1]")

    def _check_readout(self) -> None:
        level = self.readout_level
        if level == "auto":
            if self.readout != "cvar":
                _refuse("readout_level", level, "'auto' is a level of readout 'cvar'; choose that, or a number")
            return
        if not (_within(level, 0.0, 1.0) and level > 0.0):
            _refuse("readout_level", level, "it must be in (0, 1], or 'auto' with readout 'cvar'")
        if self.readout == "trimmed" and level >= 0.5:
            _refuse("readout_level", level, "with readout 'trimmed' it must be in (0, 0.5)")

    @property
    def is_off(self) -> bool:
        """True where the advantage is verl's GAE of the mean value, whitened: no option is chosen."""
        return (self.weighting, self.reward, self.readout, self.lam_actor) == ("none", "raw", "mean", None)

    @property
    def adapts_readout(self) -> bool:
        """True where each batch has a level of CVaR of its own."""
        return self.readout == "cvar" and self.readout_level == "auto"

    @property
    def fields(self) -> tuple[str, ...]:
        """The (B, T) fields beside ``values`` that the chosen options need of the critic; none for most of them."""
        gates = self.reward == "gated" and self.gate_gain is None
        winsorises = self.reward == "winsorised"
        adapts = self.adapts_readout
        needed = {
            "value_sigma": self.weighting == "precision"
            or gates
            or adapts
            or (winsorises and self.reward_widening > 0),
            "value_low": winsorises,
            "value_high": winsorises,
            "value_disagreement": gates or adapts,
            "value_readout": self.readout != "mean" and not adapts,
            **dict.fromkeys(CVAR_LEVELS, adapts),
        }
        return tuple(name for name, is_needed in needed.items() if is_needed)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _within(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _refuse(name: str, value: object, allowed: str) -> None:
    raise ValueError(f"{name} is {value!r}; {allowed}")
