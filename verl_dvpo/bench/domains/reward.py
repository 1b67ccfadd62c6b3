# SPDX-License-Identifier: Apache-2.0
"""The domains' rule reward, for ``reward.custom_reward_function.path=pkg://verl_dvpo.bench.domains.reward``."""

from typing import Any

from verl_dvpo.bench.domains import arithmetic, dialogue, science
from verl_dvpo.bench.domains.example import SHIFTED

#: In ``extra_info``: what the assistant said, a string a turn; `verl_dvpo.bench.domains.agent_loop` leaves it there.
TURNS = "dialogue_turns"


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """Scores one response by the rules of its domain, in the way of verl's reward managers.

    Args:
        data_source: a domain's name, with or without ``_shifted``.
        solution_str: the response, special tokens removed.
        ground_truth: the answer, or a dialogue's goal.
        extra_info: for a dialogue, with the assistant's turns under `TURNS`.
        **kwargs: unused.

    Returns:
        ``score``, ``acc`` and ``well_formed`` in [0, 1]; for a dialogue also ``tcr``, ``acr`` and ``gcr``.

    Raises:
        ValueError: unknown data source, or a dialogue whose turns are not there.
    """
    domain = data_source.removesuffix(SHIFTED)
    if domain == arithmetic.NAME:
        return arithmetic.score(solution_str, ground_truth)
    if domain == science.NAME:
        return science.score(solution_str, ground_truth)
    if domain != dialogue.NAME:
        raise ValueError(f"data source {data_source!r} is none of the domains'")
    if TURNS not in (extra_info or {}):
        raise ValueError(
            f"data source {data_source!r}: the assistant's turns are missing from extra_info; rows need agent_name="
            "dialogue_agent, and the reward manager has to pass the agent loop's extra fields on, as `naive` does"
        )
    assert extra_info is not None
    return dialogue.score(list(extra_info[TURNS]), ground_truth)
