# SPDX-License-Identifier: Apache-2.0
"""Describes noise on binary rewards by its false positives and false negatives, as known from its settings.

A reward passes if it is above the middle of [low, high]. FPR is the probability that a wrong response passes, FNR that
a right one does not, and Youden's J = TPR - FPR = 1 - FPR - FNR: 1 for clean rewards, 0 where they say nothing, below
0 where they say the opposite.
"""

import math
from functools import singledispatch
from typing import NamedTuple

from verl_dvpo.noise.base import NoiseConfig
from verl_dvpo.noise.corruptions import spend
from verl_dvpo.noise.draws import normal_cdf
from verl_dvpo.noise.kinds import (
    STUDENT_T,
    Additive,
    Adversary,
    Deflation,
    Dropout,
    Flip,
    FlipAsymmetric,
    Gaussian,
    HeavyTailed,
    Inflation,
    LengthBias,
    PreferenceModel,
    PromptConsistent,
    RewardModel,
)


class Rates(NamedTuple):
    """Holds the probabilities of the two errors, both in [0, 1]."""

    fpr: float
    fnr: float

    @property
    def youden_j(self) -> float:
        """TPR - FPR, in [-1, 1]."""
        return 1.0 - self.fpr - self.fnr


@singledispatch
def rates(config: NoiseConfig) -> Rates | None:
    """Returns the rates of the noise where it acts, on clean rewards ``low`` and ``high`` (ours).

    Where a kind decides by prompt, they are means over prompts.

    Args:
        config: the noise; its ``where`` and its steps are left out of account.

    Returns:
        None where they depend on the data: length bias, offsets of prompts, a wrong reference or a pass rate that the
        data holds.
    """
    return Rates(0.0, 0.0)


@rates.register
def _(config: Flip) -> Rates:
    return Rates(config.rate, config.rate)


@rates.register
def _(config: FlipAsymmetric) -> Rates:
    return Rates(config.false_positive, config.false_negative)


@rates.register
def _(config: Additive) -> Rates | None:
    half = (config.high - config.low) / 2.0
    match config:
        case PreferenceModel() | LengthBias():
            return None
        case Gaussian() | HeavyTailed():
            beyond = config.rate * _beyond(config, half)
            return Rates(beyond, beyond)
        case Deflation():
            # a right score that falls onto the middle does not pass
            return Rates(0.0, config.rate * (config.amount >= half))
        case Inflation():
            return Rates(config.rate * (config.amount > half), 0.0)
    raise AssertionError(type(config).__name__)


@rates.register
def _(config: PromptConsistent) -> Rates | None:
    return None if config.wrong_answer_key is not None else Rates(config.rate * config.agreement, config.rate)


@rates.register
def _(config: RewardModel) -> Rates:
    if config.graded and config.accuracy == 0.5:
        return Rates(0.0, 1.0)  # every score is the middle, which does not pass
    return Rates(1.0 - config.accuracy, 1.0 - config.accuracy)


@rates.register
def _(config: Dropout) -> Rates:
    passes = config.withheld > (config.low + config.high) / 2.0
    return Rates(config.rate * passes, config.rate * (not passes))


@rates.register
def _(config: Adversary) -> Rates | None:
    if config.pass_rate_key is not None:
        return None
    of_right, of_wrong = spend(config.rate, config.pass_rate)
    return Rates(of_wrong, of_right)


def stays_binary(config: NoiseConfig) -> bool:
    """Tells whether rewards ``low`` and ``high`` stay one of the two under the noise."""
    match config:
        case RewardModel():
            return not config.graded
        case Dropout():
            return config.withheld in (config.low, config.high)
        case Additive():
            return False
    return True


def _beyond(config: Gaussian | HeavyTailed, distance: float) -> float:
    """Returns the probability that the addend is above ``distance`` > 0."""
    if config.scale == 0.0:
        return 0.0
    far = distance / config.scale
    if isinstance(config, Gaussian):
        return normal_cdf(-far)
    try:
        from scipy import stats
    except ModuleNotFoundError as error:
        raise ValueError(
            f"noise.family is {config.family!r}; its rates need scipy, which is missing; pip install 'verl-dvpo[bench]'"
        ) from error
    if config.family == STUDENT_T:
        return float(stats.t(config.tail).sf(far))
    if config.tail == 2.0:
        return normal_cdf(-far / math.sqrt(2.0))
    return float(stats.levy_stable(config.tail, 0.0).sf(far))
