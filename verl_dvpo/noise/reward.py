# SPDX-License-Identifier: Apache-2.0
"""Wraps a reward function: calls it once, and corrupts its score in training.

verl's reward managers call ``compute_score(data_source=..., solution_str=..., ground_truth=..., extra_info=...)`` and
take a number or a dict with ``score``; the wrapper has the same interface. In a validation it returns the answer of
the wrapped function unchanged, the same object.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from numbers import Real
from typing import Any, cast

from verl_dvpo.noise.base import NoiseConfig
from verl_dvpo.noise.correction import correct
from verl_dvpo.noise.corruptions import corrupt
from verl_dvpo.noise.sample import ORIGIN, Origin, Sample, canonical
from verl_dvpo.noise.where import acting

RewardFunction = Callable[..., Any]
#: The clean score, beside ``score``, the one that the algorithm learns from.
CLEAN_SCORE = "clean_score"
#: The response's answer, for a vote; only with ``noise.correction.kind=majority``. None where it has none.
ANSWER = "majority_answer"
#: The corrupted score before its correction; only with a correction.
NOISY_SCORE = "noisy_score"
#: 1.0 where the corrupted score differs from the clean one, else 0.0.
CORRUPTED = "corrupted"
#: 1.0 where the clean score is ``high``, 0.0 where it is ``low``, NaN where it is neither.
CLEAN_PASS = "clean_pass"
#: 1.0 where the corrupted score is above the middle of [low, high], else 0.0.
NOISY_PASS = "noisy_pass"


class RewardFunctionError(ValueError):
    """Says that a wrapped reward function failed or returned no reward; names function, data source and sample."""


def with_noise(inner: RewardFunction, config: NoiseConfig, name: str) -> RewardFunction:
    """Returns ``inner`` with its scores corrupted in training; a coroutine function where ``inner`` is one.

    The dict that it returns in training has the fields of ``inner``, and ``score`` (corrupted, then corrected),
    ``clean_score``, ``corrupted``, ``clean_pass``, ``noisy_pass``, and ``noisy_score`` with a correction. ``acc`` is
    that of ``inner``, or the clean score where ``inner`` returned a number, as in verl.

    Args:
        inner: the user's reward function, or verl's default.
        config: the corruption.
        name: name of ``inner`` in errors.

    Raises (when called):
        RewardFunctionError: ``inner`` raised; its score is not a finite number, or does not fit ``config``; or
            ``extra_info`` lacks the sample's origin, without which training and validation look alike.
    """
    # functions in partials, not objects: verl asks inspect.iscoroutinefunction, and pickles them for its workers
    wrapper = _score_async if inspect.iscoroutinefunction(inner) else _score
    return cast(RewardFunction, functools.partial(wrapper, inner, config, name))


def to_extra_info(extra_info: dict[str, Any] | None, origin: Origin) -> dict[str, Any]:
    """Returns a copy of ``extra_info`` that carries ``origin`` to ``with_noise``."""
    return {**(extra_info or {}), ORIGIN: asdict(origin)}


def _score(inner: RewardFunction, config: NoiseConfig, name: str, /, **asked: Any) -> Any:
    sample, asked = _open(name, asked)
    try:
        answer = inner(**asked)
    except Exception as error:  # any of the user's: it is named and raised again
        raise _failed(name, sample, error) from error
    return _close(config, name, sample, answer)


async def _score_async(inner: RewardFunction, config: NoiseConfig, name: str, /, **asked: Any) -> Any:
    sample, asked = _open(name, asked)
    try:
        answer = await inner(**asked)
    except Exception as error:  # any of the user's: it is named and raised again
        raise _failed(name, sample, error) from error
    return _close(config, name, sample, answer)


def _open(name: str, asked: dict[str, Any]) -> tuple[Sample, dict[str, Any]]:
    """Returns the sample, and the arguments that ``inner`` would get without noise."""
    extra_info = dict(asked.get("extra_info") or {})
    origin = extra_info.pop(ORIGIN, None)
    if origin is None:
        raise RewardFunctionError(
            f"extra_info of data source {asked['data_source']!r} is without {ORIGIN!r}; noise around {name} needs it "
            "to tell training from validation; choose a reward manager that passes extra_info on to its reward function"
        )
    sample = Sample(
        data_source=str(asked["data_source"]),
        ground_truth=canonical(asked["ground_truth"]),
        response=asked["solution_str"],
        origin=Origin(**origin),
        extra_info=extra_info,
    )
    return sample, {**asked, "extra_info": extra_info}


def _close(config: NoiseConfig, name: str, sample: Sample, answer: Any) -> Any:
    clean = _number(name, sample, answer)
    if sample.origin.validate:
        return answer
    result = dict(answer) if isinstance(answer, dict) else {"acc": clean}
    try:
        noise = acting(config, sample)
        noisy = clean if noise is None else corrupt(noise, clean, sample, result if isinstance(answer, dict) else {})
    except ValueError as error:
        raise RewardFunctionError(f"noise around {name}: {error} ({sample})") from error
    result |= {
        "score": correct(config, noisy, acts=noise is not None),
        CLEAN_SCORE: clean,
        CORRUPTED: float(noisy != clean),
        CLEAN_PASS: float(clean == config.high) if clean in (config.low, config.high) else math.nan,
        NOISY_PASS: float(noisy > (config.low + config.high) / 2.0),
    }
    if config.correction.kind == "none":
        return result
    if config.correction.kind == "majority":
        result[ANSWER] = _answer(config, sample, result)
    return result | {NOISY_SCORE: noisy}


def _answer(config: NoiseConfig, sample: Sample, result: dict[str, Any]) -> str | None:
    """Returns a response's answer in the form in which answers are compared; None for none, and for an empty one."""
    own = config.correction
    if own.answer_pattern is None:
        answer = result.get(own.answer_key, sample.response)
    else:
        match = re.search(own.answer_pattern, sample.response)
        answer = match and match[min(1, match.re.groups)]
    return None if answer is None or answer == "" else canonical(answer)


def _number(name: str, sample: Sample, answer: Any) -> float:
    if isinstance(answer, dict) and "score" not in answer:
        raise RewardFunctionError(
            f"the answer of reward function {name} is a dict with {sorted(map(str, answer))}; it must have 'score'; "
            f"return the reward under that key ({sample})"
        )
    score = answer["score"] if isinstance(answer, dict) else answer
    if getattr(score, "ndim", None) == 0:
        score = score.item()  # of numpy or torch
    if not isinstance(score, Real):
        raise RewardFunctionError(
            f"the score of reward function {name} is {score!r} of type {type(score).__name__}; it must be a finite "
            f"number; return one, or a dict with one under 'score' ({sample})"
        )
    if not math.isfinite(score):
        raise RewardFunctionError(
            f"the score of reward function {name} is {score}; it must be a finite number; return one ({sample})"
        )
    return float(score)


def _failed(name: str, sample: Sample, error: Exception) -> RewardFunctionError:
    return RewardFunctionError(f"reward function {name} raised {type(error).__name__}: {error} ({sample})")
