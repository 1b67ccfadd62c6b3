# SPDX-License-Identifier: Apache-2.0
"""Logs the clean reward beside the corrupted one in training, and stops a run whose reward function failed.

verl logs what a reward function returns beside its score in validations only, so ``verl_dvpo.compat`` wraps
``PPOTrainer._balance_batch``, the first thing that every trainer calls on a scored batch.
Metrics, means over the responses of a step: ``noise/clean_score/mean``, ``noise/score/mean``,
``noise/corrupted/mean`` (share in [0, 1]), ``noise/error/mean`` and ``noise/error/abs_mean`` (corrupted minus clean),
``noise/noisy_score/mean`` (before its correction, if there is one), ``noise/unscored/mean`` (share for which the reward
manager answered itself, as ``rate_limited`` does after a timeout), ``noise/majority_right/mean`` (share of rewards that
are the clean ones after a vote, with ``noise.correction.kind=majority``). ``_error_rates`` adds ``noise/fpr``,
``noise/fnr`` and ``noise/youden_j``.
"""

import math
from collections.abc import Sequence
from typing import Any

from verl_dvpo.noise.config import PREFIX, noise_config
from verl_dvpo.noise.manager import REWARD_ERROR
from verl_dvpo.noise.reward import (
    ANSWER,
    CLEAN_PASS,
    CLEAN_SCORE,
    CORRUPTED,
    NOISY_PASS,
    NOISY_SCORE,
    RewardFunctionError,
)


def is_wanted(config: Any) -> bool:
    """Tells whether ``noise:`` asks for a corruption."""
    return noise_config(config.get(PREFIX)) is not None


def noise_metrics(infos: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the metrics of a step from the fields that ``with_noise`` returned for its samples.

    Args:
        infos: one dict a sample, verl's ``reward_extra_info``; at least one.

    Raises:
        RewardFunctionError: some rewards failed; says how many, and the first few reasons.
    """
    errors = [info[REWARD_ERROR] for info in infos if REWARD_ERROR in info]
    if errors:
        raise RewardFunctionError(
            f"{len(errors)} of {len(infos)} rewards failed, and nothing was updated: " + "; ".join(errors[:3])
        )
    scored = [info for info in infos if CLEAN_SCORE in info]
    metrics = {"noise/unscored/mean": 1.0 - len(scored) / len(infos)}
    if not scored:
        return metrics
    noisy = [info.get(NOISY_SCORE, info["score"]) for info in scored]
    errors_of_score = [score - info[CLEAN_SCORE] for score, info in zip(noisy, scored, strict=True)]
    series = {
        "clean_score/mean": [info[CLEAN_SCORE] for info in scored],
        "score/mean": [info["score"] for info in scored],
        "corrupted/mean": [info[CORRUPTED] for info in scored],
        "error/mean": errors_of_score,
        "error/abs_mean": [abs(error) for error in errors_of_score],
    }
    if NOISY_SCORE in scored[0]:
        series["noisy_score/mean"] = noisy
    if ANSWER in scored[0]:
        series["majority_right/mean"] = [float(info["score"] == info[CLEAN_SCORE]) for info in scored]
    metrics |= {f"noise/{name}": math.fsum(values) / len(values) for name, values in series.items()}
    return metrics | _error_rates(scored)


def _error_rates(scored: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns FPR, FNR and J = 1 - FPR - FNR over the responses whose clean score is ``low`` or ``high``.

    A rate is left out where a step has no response of its class.
    """
    wrong = [info[NOISY_PASS] for info in scored if info.get(CLEAN_PASS) == 0.0]
    right = [info[NOISY_PASS] for info in scored if info.get(CLEAN_PASS) == 1.0]
    metrics = {}
    if wrong:
        metrics["noise/fpr"] = sum(wrong) / len(wrong)
    if right:
        metrics["noise/fnr"] = 1.0 - sum(right) / len(right)
    if wrong and right:
        metrics["noise/youden_j"] = sum(right) / len(right) - sum(wrong) / len(wrong)
    return metrics
