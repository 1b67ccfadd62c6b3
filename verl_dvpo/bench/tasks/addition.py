# SPDX-License-Identifier: Apache-2.0
"""The demo's task: add two numbers of three digits, column by column, with the working shown.

A prompt is ``347+586=`` and the response is ``7+6=13,4+8+1=13,3+5+1=9;933``: one step for each column from the right
(with the carry as a third summand where there is one), then ``;`` and the answer.

Room to learn comes from the warm start's teacher (``Teacher``). It knows the procedure, but it has learned ten facts
of addition badly: on those it writes a sum that is one too small more often than not, and it slips now and then
elsewhere. A model trained on such demonstrations repeats the bad habit under greedy decoding, and still gets the fact
right in a part of its samples: that part is what reinforcement learning can find and amplify.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl_dvpo.bench.tasks.task import Conversation, Demonstrate, Example, Split, Task, check_sizes

NAME = "demo_addition"
DIGITS = 3
#: Characters of "9+9=18,9+9+1=19,9+9+1=19;1998": 6 + 1 + 8 + 1 + 8 + 1 + 4.
LONGEST_RESPONSE = 29
# Unordered pairs of digits that the teacher is shaky at: 20 of the 100 ordered pairs, so that about
# 0.80 * 0.80 * (1 - 20/81) = 0.48 of all problems meet none of them.
SHAKY_FACTS = frozenset({(3, 8), (4, 7), (4, 8), (5, 7), (5, 8), (6, 7), (6, 8), (6, 9), (7, 8), (7, 9)})
_RESPONSE = re.compile(r"[0-9+=,]*;([0-9]+)")


@dataclass(frozen=True)
class Problem:
    """One addition of two numbers with equally many digits."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        """The user's message, for example ``347+586=``."""
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        """The true sum in decimal, the ground truth of the reward."""
        return str(self.a + self.b)

    @property
    def key(self) -> tuple[int, int]:
        """A key that is equal for two problems that differ by the order of their summands only."""
        return (min(self.a, self.b), max(self.a, self.b))

    @property
    def swapped(self) -> "Problem":
        """The same problem with its summands in the other order."""
        return Problem(self.b, self.a)

    def example(self, source: str) -> Example:
        """Returns the problem as an example of the data source ``source``."""
        return Example(source, self.prompt, self.answer)


class Teacher:
    """Writes worked demonstrations with errors in them.

    Args:
        rng: source of the errors.
        habit: probability in [0, 1] of a sum one too small on a shaky fact. Above one half, greedy decoding learns
            the wrong sum.
        slip: probability in [0, 1] of an error of one, up or down, on any other step.

    Raises:
        ValueError: if a probability is out of its range.
    """

    def __init__(self, rng: np.random.Generator, *, habit: float, slip: float):
        for name, value in (("habit", habit), ("slip", slip)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}; it must be in [0, 1]; choose a probability")
        self._rng = rng
        self._habit = habit
        self._slip = slip

    def error(self, x: int, y: int, total: int) -> int:
        """Draws the error (-1, 0 or 1) of a column with digits ``x`` and ``y``; ``total`` plus it is in [0, 19]."""
        if (min(x, y), max(x, y)) in SHAKY_FACTS:
            return -1 if self._rng.random() < self._habit else 0
        if self._rng.random() >= self._slip:
            return 0
        if total in (0, 2 * 9 + 1):
            return 1 if total == 0 else -1
        return 1 if self._rng.random() < 0.5 else -1


def work(problem: Problem, teacher: Teacher | None = None) -> str:
    """Writes the worked response: columns from the right, ``;``, answer.

    Without a teacher every step is right. With one, some steps are wrong and the rest follows from them.
    """
    a, b = (str(number)[::-1] for number in (problem.a, problem.b))
    steps, digits, carry = [], "", 0
    for x, y in zip(a, b, strict=True):
        total = int(x) + int(y) + carry
        if teacher is not None:
            total += teacher.error(int(x), int(y), total)
        steps.append(f"{x}+{y}+1={total}" if carry else f"{x}+{y}={total}")
        carry, digit = divmod(total, 10)
        digits = f"{digit}{digits}"
    return ",".join(steps) + ";" + (f"1{digits}" if carry else digits)


def parse_answer(response: str) -> str | None:
    """Returns the digits after the ``;``, or None if ``response`` is not steps, ``;``, digits, and nothing else."""
    match = _RESPONSE.fullmatch(response)
    return None if match is None else match.group(1)


def score(turns: Sequence[str], truth: str) -> dict[str, float]:
    """Returns 1 for exactly the right sum after the working (no blanks, no leading zeros) and 0 otherwise.

    Steps earn nothing by themselves, so what rises under training is what is measured.

    Args:
        turns: the response, alone.
        truth: the true sum in decimal.

    Returns:
        ``score`` and ``acc``, which are equal; ``well_formed``, 1 if there is an answer to read. Each is 0.0 or 1.0.
    """
    (response,) = turns
    answer = parse_answer(response)
    correct = float(answer == truth)
    return {"score": correct, "acc": correct, "well_formed": float(answer is not None)}


def draw_problem(rng: np.random.Generator, digits: int = DIGITS) -> Problem:
    """Draws a problem with both summands uniform among the numbers of ``digits`` digits."""
    a, b = rng.integers(10 ** (digits - 1), 10**digits, size=2)
    return Problem(int(a), int(b))


def draw_problems(seed: int, *, num_train: int, num_val: int) -> tuple[list[Problem], list[Problem]]:
    """Draws train and validation problems with distinct keys, within and between the lists.

    The validation problems are drawn first, so they depend on ``seed`` and ``num_val`` only.

    Raises:
        ValueError: if a size is below 1, or if both together are more than a tenth of the problems that exist.
    """
    check_sizes(num_train=num_train, num_val=num_val)
    numbers = 10**DIGITS - 10 ** (DIGITS - 1)
    limit = numbers * (numbers + 1) // 2 // 10
    if num_train + num_val > limit:
        raise ValueError(
            f"num_train + num_val is {num_train} + {num_val}; at most {limit} problems are allowed; choose fewer"
        )
    rng = np.random.default_rng([seed, 0])
    chosen: dict[tuple[int, int], Problem] = {}
    while len(chosen) < num_train + num_val:
        problem = draw_problem(rng)
        chosen.setdefault(problem.key, problem)
    problems = list(chosen.values())
    return problems[num_val:], problems[:num_val]


def split(seed: int, *, num_train: int, num_val: int) -> Split:
    """Draws the examples; see ``draw_problems``. There is no shifted validation."""
    train, val = draw_problems(seed, num_train=num_train, num_val=num_val)
    return Split([problem.example(NAME) for problem in train], [problem.example(NAME) for problem in val])


def demonstrator(seed: int, held_out: Split, *, habit: float, slip: float) -> Demonstrate:
    """Returns the teacher on problems that are not in the validation; it errs with random numbers of its own."""
    prompts = {example.prompt for example in held_out.validations}
    teacher = Teacher(np.random.default_rng([seed, 2]), habit=habit, slip=slip)

    def demonstrate(rng: np.random.Generator) -> Conversation:
        while True:
            problem = draw_problem(rng)
            if prompts.isdisjoint((problem.prompt, problem.swapped.prompt)):
                return [problem.prompt, work(problem, teacher)]

    return demonstrate


TASK = Task(name=NAME, ability="math", split=split, demonstrator=demonstrator, score=score)
