# SPDX-License-Identifier: Apache-2.0
"""Compares mathematical answers with math-verify, which the extra ``data`` installs.

math-verify limits its own time with an alarm, which only the main thread of a process can set. ``helper.py`` runs
these functions in a process of their own for everybody else.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

from verl_dvpo.bench.data.answers import after_thinking, last_boxed, normalised, short_answer

#: Seconds for one parse or one comparison.
SECONDS = 5


@dataclass(frozen=True)
class MathAnswer:
    """An answer that was found.

    Attributes:
        text: as it was written.
        parsed: what math-verify made of it, never empty.
    """

    text: str
    parsed: list[Any]


def require_math_verify() -> None:
    """Raises ValueError if math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("math-verify is not installed; mathematics is graded with it; pip install 'verl-dvpo[data]'")


def read_answer(response: str) -> MathAnswer | None:
    """Returns the last box of a response, else what math-verify finds in its text; None if there is no answer."""
    from math_verify import parse

    text = after_thinking(response)
    boxed = last_boxed(text)
    if boxed is not None and not boxed:
        return None
    parsed = parse(text if boxed is None else f"\\boxed{{{boxed}}}", parsing_timeout=SECONDS)
    if not parsed:
        return None
    return MathAnswer(str(parsed[-1]) if boxed is None else boxed, parsed)


def are_equal(gold: MathAnswer, other: MathAnswer) -> bool:
    """Says whether math-verify takes two answers for the same; ``gold`` is the one that is trusted."""
    from math_verify import verify

    return bool(verify(gold.parsed, other.parsed, timeout_seconds=SECONDS))


def judge(response: str, truth: str) -> tuple[bool, bool]:
    """Says whether a response has an answer, and whether the answer is ``truth`` (mathematics, with or without box)."""
    found = read_answer(response)
    gold = read_answer(truth if last_boxed(truth) is not None else f"\\boxed{{{truth}}}")
    return found is not None, found is not None and gold is not None and are_equal(gold, found)


def judge_exact(response: str, truth: str) -> tuple[bool, bool]:
    """As ``judge``, for answers that are words or mathematics: the normalised texts may agree instead."""
    said = short_answer(response)
    if said is not None and normalised(said) == normalised(truth) != "":
        return True, True
    answered, right = judge(response, truth)
    return answered or said is not None, right
