# SPDX-License-Identifier: Apache-2.0
"""The demo's rule reward, for ``reward.custom_reward_function.path=pkg://verl_dvpo.bench.demo.reward``.

It is 1 for exactly the right answer and 0 for everything else: steps earn nothing by themselves, so that what rises
under training is what is measured.
"""

from typing import Any

from verl_dvpo.bench.demo.task import is_correct, parse_answer


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """Scores one response in the way verl's reward managers ask for it.

    Args:
        data_source: unused; there is one task.
        solution_str: the response, special tokens removed.
        ground_truth: the true sum in decimal.
        extra_info: unused.
        **kwargs: unused; verl passes what its configuration names.

    Returns:
        ``score``, the reward; ``acc``, the same number under the name by which verl reports validation accuracy (it
        stays clean where a wrapper corrupts the score); ``well_formed``, whether there is an answer to read. Each is
        0.0 or 1.0.
    """
    correct = float(is_correct(solution_str, ground_truth))
    return {"score": correct, "acc": correct, "well_formed": float(parse_answer(solution_str) is not None)}
