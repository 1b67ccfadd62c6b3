# SPDX-License-Identifier: Apache-2.0
"""Computes the corrupted score from the clean score and the sample.

The functions are pure: every draw is a hash of the sample. Of the uniform numbers of a key, the first decides whether
the corruption strikes, the others by how much.
"""

import math
import re
from functools import singledispatch
from typing import Any

from verl_dvpo.noise.base import PREFIX, NoiseConfig
from verl_dvpo.noise.draws import normal, student_t, symmetric_stable, uniforms
from verl_dvpo.noise.kinds import (
    STABLE,
    Additive,
    Adversary,
    Binary,
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
from verl_dvpo.noise.sample import Sample, canonical
from verl_dvpo.noise.where import last_user_message

Result = dict[str, Any]


@singledispatch
def corrupt(config: NoiseConfig, score: float, sample: Sample, result: Result) -> float:
    """Returns the corrupted score.

    Args:
        config: which corruption, and how much of it.
        score: the clean score, finite.
        sample: whose score it is.
        result: the other fields that the wrapped reward returned; empty where it returned a number.

    Raises:
        ValueError: the score lies outside [low, high], or the sample lacks a field that ``config`` names.
    """
    return score  # clean rewards, with a correction


@corrupt.register
def _(config: Flip, score: float, sample: Sample, result: Result) -> float:
    mirrored = _mirror(config, score)
    return mirrored if _draws(config, sample, config.scope)[0] < config.rate else score


@corrupt.register
def _(config: FlipAsymmetric, score: float, sample: Sample, result: Result) -> float:
    mirrored = _mirror(config, score)
    rate = config.false_negative if _is_right(config, score) else config.false_positive
    return mirrored if _draws(config, sample, config.scope)[0] < rate else score


@corrupt.register
def _(config: Additive, score: float, sample: Sample, result: Result) -> float:
    strike, *draws = _draws(config, sample, config.scope)
    return score + _addend(config, sample, draws) if strike < config.rate else score


@corrupt.register
def _(config: PreferenceModel, score: float, sample: Sample, result: Result) -> float:
    strike, *draws = _draws(config, sample, config.scope)
    error = _addend(config, sample, draws) if strike < config.rate else 0.0
    return score + _offset(config, sample) + error


@corrupt.register
def _(config: PromptConsistent, score: float, sample: Sample, result: Result) -> float:
    mirrored = _mirror(config, score)
    if _draws(config, sample, "prompt")[0] >= config.rate:
        return score
    if _is_right(config, score):
        return mirrored
    if config.wrong_answer_key is not None:
        reference = _look_up(sample.extra_info, config.wrong_answer_key, "wrong_answer_key", "extra_info")
        answer = _look_up(result, config.answer_key, "answer_key", "the reward function's dict")
        return mirrored if str(answer) == str(reference) else score
    answer = canonical(result[config.answer_key]) if config.answer_key in result else sample.response
    agrees = uniforms(config.seed, ("answer", *sample.key("prompt"), answer))[0] < config.agreement
    return mirrored if agrees else score


@corrupt.register
def _(config: RewardModel, score: float, sample: Sample, result: Result) -> float:
    right = _is_right(config, score)
    _mirror(config, score)  # for its check
    draw = _draws(config, sample, config.scope)[0]
    if config.accuracy in (0.0, 1.0):
        return config.high if right == (config.accuracy == 1.0) else config.low
    # z > 0, the verdict "right", has probability Φ(m) = accuracy for right responses and 1 - Φ(m) for wrong ones.
    mean = normal(config.accuracy)
    latent = (mean if right else -mean) - normal(draw)
    if not config.graded:
        return config.high if latent > 0.0 else config.low
    return config.low + (config.high - config.low) * _logistic(2.0 * abs(mean) * latent)


@corrupt.register
def _(config: Dropout, score: float, sample: Sample, result: Result) -> float:
    return config.withheld if _draws(config, sample, config.scope)[0] < config.rate else score


@corrupt.register
def _(config: Adversary, score: float, sample: Sample, result: Result) -> float:
    mirrored = _mirror(config, score)
    of_right, of_wrong = spend(config.rate, _pass_rate(config, sample))
    rate = of_right if _is_right(config, score) else of_wrong
    return mirrored if _draws(config, sample, "sample")[0] < rate else score


def spend(budget: float, pass_rate: float) -> tuple[float, float]:
    """Returns the shares (f, g) in [0, 1] of right and wrong responses to flip.

    They have the largest f + g with p f + (1 - p) g = budget (ours): the rarer verdict is the cheaper one, as
    ``Adversary`` explains.

    Args:
        budget: in [0, 1].
        pass_rate: p in [0, 1].
    """

    if budget == 0.0:
        return 0.0, 0.0

    def fill(first: float) -> tuple[float, float]:
        of_first = 1.0 if first <= budget else budget / first
        return of_first, max(0.0, budget - first) / (1.0 - first)

    if pass_rate <= 0.5:
        return fill(pass_rate)
    of_wrong, of_right = fill(1.0 - pass_rate)
    return of_right, of_wrong


def _addend(config: Additive, sample: Sample, draws: list[float]) -> float:
    match config:
        case Gaussian():
            return config.scale * normal(draws[0])
        case HeavyTailed():
            law = symmetric_stable if config.family == STABLE else student_t
            return config.scale * law(draws[0], draws[1], config.tail)
        case Deflation():
            return -config.amount
        case Inflation():
            return config.amount
        case LengthBias():
            return config.slope * sample.origin.length / config.reference
    raise AssertionError(type(config).__name__)


def _offset(config: PreferenceModel, sample: Sample) -> float:
    key = sample.key("prompt")
    if config.offset_pattern is not None:
        match = re.search(config.offset_pattern, last_user_message(sample))
        key = (match[0],) if match else ()
    return config.offset * normal(uniforms(config.seed, ("offset", *key))[0])


def _draws(config: NoiseConfig, sample: Sample, scope: str) -> tuple[float, ...]:
    return uniforms(config.seed, sample.key(scope))


def _is_right(config: Binary, score: float) -> bool:
    return score > (config.low + config.high) / 2.0


def _mirror(config: Binary, score: float) -> float:
    if not config.low <= score <= config.high:
        raise ValueError(
            f"the clean score is {score}; it must be in [{PREFIX}.low, {PREFIX}.high] = [{config.low}, {config.high}]; "
            "set the two to the reward function's lowest and highest score"
        )
    return config.low + config.high - score


def _pass_rate(config: Adversary, sample: Sample) -> float:
    if config.pass_rate_key is None:
        return config.pass_rate
    value = _look_up(sample.extra_info, config.pass_rate_key, "pass_rate_key", "extra_info")
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = math.nan
    if not 0.0 <= rate <= 1.0:
        raise ValueError(
            f"extra_info.{config.pass_rate_key} is {value!r}; it must be a number in [0, 1]; mend the data, or set "
            f"{PREFIX}.pass_rate_key=null"
        )
    return rate


def _look_up(holder: dict[str, Any], key: str, field: str, where: str) -> Any:
    if key not in holder:
        raise ValueError(
            f"{PREFIX}.{field} is {key!r}; it must be a key of {where}, which has {sorted(map(str, holder))}; "
            "name one of those"
        )
    return holder[key]


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else math.exp(x) / (1.0 + math.exp(x))
