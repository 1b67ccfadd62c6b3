# SPDX-License-Identifier: Apache-2.0
"""The rule rewards of the public sets, for ``reward.custom_reward_function.path=pkg://verl_dvpo.bench.data.reward``.

No judge model is used. SimpleQA counts the normalised text; HLE that or math-verify; both are stricter than a judge.
"""

from typing import Any

from verl_dvpo.bench.data import dialogue
from verl_dvpo.bench.data.answers import chosen_letter, normalised, short_answer
from verl_dvpo.bench.data.equivalence import judge, judge_exact, require_math_verify
from verl_dvpo.bench.data.helper import Helper, HelperError
from verl_dvpo.bench.data.registry import set_of
from verl_dvpo.bench.tasks.task import TURNS

#: Seconds for one response; math-verify's own limits are below.
SECONDS = 30.0
_HELPER = Helper()


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """Scores one response, with the signature of verl's reward managers.

    Args:
        data_source: a set's name; its rule counts where ``extra_info`` names none.
        solution_str: the response without special tokens.
        ground_truth: the answer, or a dialogue's goal.
        extra_info: ``grader`` and ``options`` of the row; a dialogue's assistant turns under ``dialogue_turns``.
        **kwargs: unused; verl passes what its configuration names.

    Returns:
        ``score``, the reward, and ``acc``: 1 for the right answer, else 0. ``answered``: 1 if an answer was found.
        A dialogue adds ``tcr``, ``acr`` and ``gcr``. All in [0, 1].

    Raises:
        ValueError: the rule is unknown, math-verify is not installed, or a dialogue's turns are missing.
    """
    info = extra_info or {}
    grader = info.get("grader") or set_of(data_source).grader
    if grader == "dialogue":
        return dialogue.score(_turns(info, data_source), ground_truth)
    if grader == "choice":
        letter = chosen_letter(solution_str, int(info.get("options") or 0))
        answered, right = letter is not None, letter == ground_truth
    elif grader == "text":
        said = short_answer(solution_str)
        answered, right = said is not None, said is not None and normalised(said) == normalised(ground_truth)
    elif grader in ("math", "exact"):
        answered, right = _judge_elsewhere(grader, solution_str, ground_truth)
    else:
        raise ValueError(f"grader is {grader!r}; math, choice, text, exact and dialogue are allowed; correct the rows")
    return {"score": float(right), "acc": float(right), "answered": float(answered)}


def _judge_elsewhere(grader: str, response: str, truth: str) -> tuple[bool, bool]:
    """Asks math-verify in a process of its own, as reward managers call from threads. Too long a time is no answer."""
    require_math_verify()
    try:
        answered, right = _HELPER.run(judge if grader == "math" else judge_exact, response, truth, seconds=SECONDS)
    except HelperError:
        return False, False
    return answered, right


def _turns(info: dict[str, Any], source: str) -> list[str]:
    if TURNS not in info:
        raise ValueError(
            f"extra_info has no {TURNS!r} for data_source {source!r}; it must hold the assistant's turns; give the "
            f"rows agent_name={dialogue.AGENT}, and use a reward manager that passes the extra fields of agent loops "
            "on, as verl's `naive` does"
        )
    return [str(turn) for turn in info[TURNS]]
