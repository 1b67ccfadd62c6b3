# SPDX-License-Identifier: Apache-2.0
"""The demo's task: add two numbers of three digits, column by column, with the working shown.

A prompt is ``347+586=`` and the response is ``7+6=13,4+8+1=13,3+5+1=9;933``: one step for each column from the right
(with the carry as a third summand where there is one), then ``;`` and the answer.

Room to learn comes from the warm start's teacher (`Teacher`). It knows the procedure, but it has learned ten facts
of addition badly: on those it writes a sum that is one too small more often than not, and it slips now and then
elsewhere. A model trained on such demonstrations repeats the bad habit under greedy decoding, and still gets the fact
right in a part of its samples: that part is what reinforcement learning can find and amplify.
"""

import re
from dataclasses import dataclass

import numpy as np

DIGITS = 3
LOWEST, HIGHEST = 10 ** (DIGITS - 1), 10**DIGITS - 1
# "9+9=18,9+9+1=19,9+9+1=19;1998": 6 + 1 + 8 + 1 + 8 + 1 + 4 characters.
LONGEST_RESPONSE = 29
# Unordered pairs of digits that the teacher is shaky at: 20 of the 100 ordered pairs, so that about
# 0.80 * 0.80 * (1 - 20/81) = 0.48 of all problems meet none of them.
SHAKY_FACTS = frozenset({(3, 8), (4, 7), (4, 8), (5, 7), (5, 8), (6, 7), (6, 8), (6, 9), (7, 8), (7, 9)})
_RESPONSE = re.compile(r"[0-9+=,]*;([0-9]+)")


@dataclass(frozen=True)
class Problem:
    """One addition; `a` and `b` are integers in [100, 999]."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        """What the user's message says, for example ``347+586=``."""
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        """The true sum in decimal, the ground truth of the reward."""
        return str(self.a + self.b)

    @property
    def key(self) -> tuple[int, int]:
        """Equal for two problems that differ by the order of their summands only."""
        return (min(self.a, self.b), max(self.a, self.b))


class Teacher:
    """Writes worked demonstrations with errors in them.

    Args:
        rng: source of the errors.
        habit: probability in [0, 1] of a sum one too small on a shaky fact. Above one half, greedy decoding learns
            the wrong sum.
        slip: probability in [0, 1] of an error of one, up or down, on any other step.
    """

    def __init__(self, rng: np.random.Generator, *, habit: float, slip: float):
        for name, value in (("habit", habit), ("slip", slip)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        self._rng = rng
        self._habit = habit
        self._slip = slip

    def error(self, x: int, y: int, total: int) -> int:
        """What to add to the true `total` of a column with digits `x` and `y`: -1, 0 or 1; the sum stays in [0, 19]."""
        if (min(x, y), max(x, y)) in SHAKY_FACTS:
            return -1 if self._rng.random() < self._habit else 0
        if self._rng.random() >= self._slip:
            return 0
        if total in (0, 2 * 9 + 1):
            return 1 if total == 0 else -1
        return 1 if self._rng.random() < 0.5 else -1

    def demonstrate(self, problem: Problem) -> str:
        """A response to `problem`, wrong where an error was made, consistent with its own steps otherwise."""
        return work(problem, self)


def work(problem: Problem, teacher: Teacher | None = None) -> str:
    """The worked response: columns from the right, ``;``, answer. Without a teacher every step is right."""
    steps: list[str] = []
    columns: list[int] = []
    carry = 0
    for place in range(DIGITS):
        x, y = (number // 10**place % 10 for number in (problem.a, problem.b))
        total = x + y + carry
        if teacher is not None:
            total += teacher.error(x, y, total)
        steps.append(f"{x}+{y}+1={total}" if carry else f"{x}+{y}={total}")
        carry, digit = divmod(total, 10)
        columns.append(digit)
    answer = carry * 10**DIGITS + sum(digit * 10**place for place, digit in enumerate(columns))
    return ",".join(steps) + f";{answer:0{DIGITS}d}"


def parse_answer(response: str) -> str | None:
    """The digits after the ``;``, or None where `response` is not steps, ``;``, digits, and nothing else."""
    match = _RESPONSE.fullmatch(response)
    return None if match is None else match.group(1)


def is_correct(response: str, answer: str) -> bool:
    """Whether `response` is well-formed and ends in exactly `answer` (no blanks, no leading zeros)."""
    return parse_answer(response) == answer


def draw_problem(rng: np.random.Generator) -> Problem:
    """A problem with both summands uniform on [100, 999]."""
    a, b = rng.integers(LOWEST, HIGHEST + 1, size=2)
    return Problem(int(a), int(b))


def draw_split(seed: int, *, num_train: int, num_val: int) -> tuple[list[Problem], list[Problem]]:
    """Train and validation problems, all distinct as problems: no two share a `key`, within or between the lists.

    The validation problems are drawn first, so that they depend on the seed and `num_val` only.

    Raises:
        ValueError: if a count is below 1, or if both together are more than a tenth of the problems that exist.
    """
    for name, count in (("num_train", num_train), ("num_val", num_val)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    numbers = HIGHEST - LOWEST + 1
    limit = numbers * (numbers + 1) // 2 // 10
    if num_train + num_val > limit:
        raise ValueError(f"num_train + num_val must be at most {limit}, got {num_train} + {num_val}")
    rng = np.random.default_rng([seed, 0])
    chosen: dict[tuple[int, int], Problem] = {}
    while len(chosen) < num_train + num_val:
        problem = draw_problem(rng)
        chosen.setdefault(problem.key, problem)
    problems = list(chosen.values())
    return problems[num_val:], problems[:num_val]
