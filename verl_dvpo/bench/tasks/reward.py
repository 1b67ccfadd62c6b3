# SPDX-License-Identifier: Apache-2.0
"""The rule reward of all tasks, for ``reward.custom_reward_function.path=pkg://verl_dvpo.bench.tasks.reward``."""

from typing import Any

from verl_dvpo.bench.tasks.registry import task_of
from verl_dvpo.bench.tasks.task import DIALOGUE_AGENT, TURNS


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """Scores one response by the rules of its task, with the signature of verl's reward managers.

    Args:
        data_source: a task's name, with or without ``_shifted``.
        solution_str: the response without special tokens.
        ground_truth: the answer, or a dialogue's goal.
        extra_info: holds a dialogue's assistant turns under ``dialogue_turns``; unused otherwise.
        **kwargs: unused; verl passes what its configuration names.

    Returns:
        ``score``, the reward; ``acc`` and ``well_formed``, in [0, 1]; and what else the task reports.

    Raises:
        ValueError: if the data source is unknown, or if a dialogue's turns are missing.
    """
    task = task_of(data_source)
    if task.user is None:
        return task.score([solution_str], ground_truth)
    if extra_info is None or TURNS not in extra_info:
        raise ValueError(
            f"extra_info has no {TURNS!r} for data_source {data_source!r}; it must hold the assistant's turns; give "
            f"the rows agent_name={DIALOGUE_AGENT}, and use a reward manager that passes the extra fields of agent "
            "loops on, as verl's `naive` does"
        )
    return task.score(list(extra_info[TURNS]), ground_truth)
