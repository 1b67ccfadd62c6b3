# SPDX-License-Identifier: Apache-2.0
"""Addition with the working shown, as in the demo, with numbers of other widths out of the domain.

Training and validation have three digits (`verl_dvpo.bench.demo.task`); the shifted one has two or four. The teacher
demonstrates all widths and errs in the same facts, so that what is unlearned at three digits can be seen to carry over
or not.
"""

import numpy as np

from verl_dvpo.bench.demo.task import Problem, Teacher, is_correct, parse_answer
from verl_dvpo.bench.domains.example import SHIFTED, Conversation, Demonstrate, Example, Split, check_sizes

NAME = "arithmetic"
WIDTH = 3
SHIFTED_WIDTHS = (2, 4)
#: Of the demonstrations' widths: 2, 3 and 4 digits.
SHARES = (0.2, 0.6, 0.2)


def draw(rng: np.random.Generator, digits: int) -> Problem:
    """A problem with both summands uniform among the numbers of `digits` digits."""
    a, b = rng.integers(10 ** (digits - 1), 10**digits, size=2)
    return Problem(int(a), int(b))


def work(problem: Problem, teacher: Teacher | None = None) -> str:
    """The worked response for summands of equal width: columns from the right, ``;``, answer; as in the demo."""
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


def split(seed: int, *, num_train: int, num_val: int) -> Split:
    """All distinct, also with summands swapped; validations are drawn first, and depend on seed and `num_val` only."""
    check_sizes(num_train=num_train, num_val=num_val)
    rng = np.random.default_rng([seed, 10])
    taken: set[tuple[int, int]] = set()

    def fresh(digits: int) -> Problem:
        while (problem := draw(rng, digits)).key in taken:
            pass
        taken.add(problem.key)
        return problem

    shifted = [fresh(SHIFTED_WIDTHS[i % 2]) for i in range(num_val)]
    val = [fresh(WIDTH) for _ in range(num_val)]
    train = [fresh(WIDTH) for _ in range(num_train)]
    return Split(
        [_example(problem, NAME) for problem in train],
        [_example(problem, NAME) for problem in val],
        [_example(problem, NAME + SHIFTED) for problem in shifted],
    )


def demonstrator(seed: int, held_out: Split, *, habit: float, slip: float) -> Demonstrate:
    """The demo's teacher, on problems of all widths that are in no validation."""
    prompts = {example.prompt for example in (*held_out.val, *held_out.shifted)}

    def demonstrate(rng: np.random.Generator) -> Conversation:
        teacher = Teacher(rng, habit=habit, slip=slip)
        while True:
            problem = draw(rng, int(rng.choice([2, 3, 4], p=SHARES)))
            swapped = Problem(problem.b, problem.a)
            if problem.prompt not in prompts and swapped.prompt not in prompts:
                return [problem.prompt, work(problem, teacher)]

    return demonstrate


def score(response: str, truth: str) -> dict[str, float]:
    """1 for exactly the right sum after the working, 0 otherwise."""
    correct = float(is_correct(response, truth))
    return {"score": correct, "acc": correct, "well_formed": float(parse_answer(response) is not None)}


def _example(problem: Problem, source: str) -> Example:
    return Example(source, problem.prompt, problem.answer)
