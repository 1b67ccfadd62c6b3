# SPDX-License-Identifier: Apache-2.0
"""Addition as in ``addition.py``, validated on other widths too.

Training and validation have three digits, the shifted validation has two or four. The teacher demonstrates all widths
and errs in the same facts, so the shifted validation shows if what is learned at three digits carries over.
"""

import numpy as np

from verl_dvpo.bench.tasks.addition import Problem, Teacher, draw_problem, score, work
from verl_dvpo.bench.tasks.task import SHIFTED, Conversation, Demonstrate, Split, Task, check_sizes

NAME = "arithmetic"
WIDTH = 3
SHIFTED_WIDTHS = (2, 4)
#: Shares of 2, 3 and 4 digits among the demonstrations.
SHARES = (0.2, 0.6, 0.2)


def split(seed: int, *, num_train: int, num_val: int) -> Split:
    """Draws distinct problems; two that differ by the order of their summands only count as one.

    The validations are drawn first, so they depend on ``seed`` and ``num_val`` only.

    Raises:
        ValueError: if a size is below 1.
    """
    check_sizes(num_train=num_train, num_val=num_val)
    rng = np.random.default_rng([seed, 10])
    taken: set[tuple[int, int]] = set()

    def fresh(digits: int) -> Problem:
        while (problem := draw_problem(rng, digits)).key in taken:
            pass
        taken.add(problem.key)
        return problem

    shifted = [fresh(SHIFTED_WIDTHS[i % 2]) for i in range(num_val)]
    val = [fresh(WIDTH) for _ in range(num_val)]
    train = [fresh(WIDTH) for _ in range(num_train)]
    return Split(
        [problem.example(NAME) for problem in train],
        [problem.example(NAME) for problem in val],
        [problem.example(NAME + SHIFTED) for problem in shifted],
    )


def demonstrator(seed: int, held_out: Split, *, habit: float, slip: float) -> Demonstrate:
    """Returns the teacher of ``addition.py`` on problems of all widths that are in no validation."""
    prompts = {example.prompt for example in held_out.validations}

    def demonstrate(rng: np.random.Generator) -> Conversation:
        teacher = Teacher(rng, habit=habit, slip=slip)
        while True:
            problem = draw_problem(rng, int(rng.choice([2, 3, 4], p=SHARES)))
            if prompts.isdisjoint((problem.prompt, problem.swapped.prompt)):
                return [problem.prompt, work(problem, teacher)]

    return demonstrate


TASK = Task(name=NAME, ability="math", split=split, demonstrator=demonstrator, score=score)
