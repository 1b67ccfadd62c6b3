# SPDX-License-Identifier: Apache-2.0
"""Task exam: a paper of several small sums, each worth points, answered one after the other; partial credit.

A prompt is ``38!47.25:``: two to six sums of two digits, each followed by a mark that says what it is worth
(``MARKS``). The response is ``11!10,07:``: each sum, and behind it the mark, or the mark's sign of doubt (``DOUBTS``).
The reward is the points of the right answers as a share of ``FULL``, doubted or not, so a paper may offer 2 points or
10, and nothing tells how it went before the last token.

A critic matters here for three reasons. Papers differ in what they offer and in how hard they are, and both can be
read from the prompt. An answer decides its own points when it is written, and the doubt behind it says how it went,
so the outcome becomes known bit by bit. With one response to a prompt there is no group whose mean could stand in for
the critic.

The teacher knows half of the sums badly (``shaky_facts``, by the seed): there it errs by one more often than not. Each
paper has its own share of such sums. It sees its errors afterwards: it doubts what is wrong, except for slips.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl_dvpo.bench.tasks.task import Conversation, Demonstrate, Example, Split, Task, check_sizes, happens, pick

NAME = "exam"
#: Mark after a sum -> the points that it is worth.
MARKS = {".": 1, ":": 2, "!": 4}
#: Mark -> the sign that stands for it behind an answer in doubt.
DOUBTS = {".": ",", ":": ";", "!": "?"}
FEWEST_SUMS, MOST_SUMS = 2, 6
#: Most points of a paper, whose right answers earn a reward of 1.
FULL = 10
#: Of the 55 unordered pairs of digits, those that the teacher is shaky at.
NUM_SHAKY = 27
#: Characters of an answer, of two digits and a mark; as many as a sum in the prompt has.
WIDTH = 3
LONGEST_RESPONSE = WIDTH * MOST_SUMS
_RESPONSE = re.compile(r"([0-9]{2}[.:!,;?])+")
_MARK_OF = {doubt: mark for mark, doubt in DOUBTS.items()}
_FACTS = tuple(itertools.combinations_with_replacement(range(10), 2))

#: Two digits, the smaller one first.
Fact = tuple[int, int]


@dataclass(frozen=True)
class Sum:
    """One sum of two digits and its mark."""

    x: int
    y: int
    mark: str

    @property
    def fact(self) -> Fact:
        """The pair of digits in ascending order, which the teacher knows well or badly."""
        return (min(self.x, self.y), max(self.x, self.y))


@dataclass(frozen=True)
class Paper:
    """The sums of one prompt, in order."""

    sums: tuple[Sum, ...]

    @property
    def prompt(self) -> str:
        """The user's message, for example ``38!47.25:``."""
        return "".join(f"{each.x}{each.y}{each.mark}" for each in self.sums)

    @property
    def example(self) -> Example:
        """The paper as an example of the task's data source."""
        return Example(NAME, self.prompt, work(self))


class Teacher:
    """Answers papers with errors in them.

    Args:
        shaky: the facts that it knows badly.
        rng: source of the errors.
        habit: probability in [0, 1] of an answer one too small (one too large for 0) on a shaky fact. Above one half,
            greedy decoding learns the wrong answer.
        slip: probability in [0, 1] of an answer one too small or too large on any other fact.

    Raises:
        ValueError: if a probability is out of its range.
    """

    def __init__(self, shaky: frozenset[Fact], rng: np.random.Generator, *, habit: float, slip: float):
        for name, value in (("habit", habit), ("slip", slip)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value}; it must be in [0, 1]; choose a probability")
        self._shaky, self._rng, self._habit, self._slip = shaky, rng, habit, slip

    def answer(self, one: Sum) -> int:
        """Draws the teacher's answer, at least 0."""
        right = one.x + one.y
        if one.fact in self._shaky:
            return abs(right - 1) if happens(self._rng, self._habit) else right
        if not happens(self._rng, self._slip):
            return right
        return abs(right + (1 if happens(self._rng, 0.5) else -1))

    def mark(self, one: Sum, answer: int) -> str:
        """Returns what the teacher writes behind an answer: its mark, or its sign of doubt."""
        doubts = (answer != one.x + one.y) != happens(self._rng, self._slip)
        return DOUBTS[one.mark] if doubts else one.mark


def work(paper: Paper, teacher: Teacher | None = None) -> str:
    """Writes the response, for example ``11!10,07:``; without a teacher every answer is right and without doubt."""
    text = ""
    for each in paper.sums:
        answer = each.x + each.y if teacher is None else teacher.answer(each)
        text += f"{answer:02d}{each.mark if teacher is None else teacher.mark(each, answer)}"
    return text


def shaky_facts(seed: int) -> frozenset[Fact]:
    """Draws the ``NUM_SHAKY`` facts that the teacher knows badly."""
    chosen = np.random.default_rng([seed, 50]).choice(len(_FACTS), size=NUM_SHAKY, replace=False)
    return frozenset(_FACTS[index] for index in chosen)


def score(turns: Sequence[str], truth: str) -> dict[str, float]:
    """Adds up the points of the right answers; each answer is judged at its own place, with its mark.

    Args:
        turns: the response, alone. A missing answer earns nothing; a response with more answers than sums, or with
            anything else in it, is not well formed and earns nothing at all.
        truth: the response whose answers are all right.

    Returns:
        ``score``, points as a share of ``FULL``; ``acc``, points as a share of those that the paper offers;
        ``well_formed``, 0.0 or 1.0. All are in [0, 1].
    """
    (response,) = turns
    if _RESPONSE.fullmatch(response) is None or len(response) > len(truth):
        return {"score": 0.0, "acc": 0.0, "well_formed": 0.0}
    right = _answers(truth)
    earned = sum(MARKS[a[-1]] for said, a in zip(_answers(response), right, strict=False) if said == a)
    return {"score": earned / FULL, "acc": earned / sum(MARKS[a[-1]] for a in right), "well_formed": 1.0}


def _answers(response: str) -> list[str]:
    """Cuts a response into answers with their marks; a sign of doubt becomes its mark."""
    sure = "".join(_MARK_OF.get(character, character) for character in response)
    return [sure[start : start + WIDTH] for start in range(0, len(sure), WIDTH)]


def draw_paper(rng: np.random.Generator, shaky: frozenset[Fact]) -> Paper:
    """Draws the number of sums, marks that offer at most ``FULL`` points, the share of shaky facts, and the facts."""
    count = int(rng.integers(FEWEST_SUMS, MOST_SUMS + 1))
    while sum(map(MARKS.__getitem__, marks := [pick(rng, list(MARKS)) for _ in range(count)])) > FULL:
        pass
    share = rng.random()
    solid = [fact for fact in _FACTS if fact not in shaky]
    sums = []
    for mark in marks:
        facts = sorted(shaky) if happens(rng, share) else solid
        digits = rng.permutation(facts[int(rng.integers(len(facts)))])
        sums.append(Sum(int(digits[0]), int(digits[1]), mark))
    return Paper(tuple(sums))


def split(seed: int, *, num_train: int, num_val: int) -> Split:
    """Draws distinct papers; the validation is drawn first. There is no shifted validation.

    Raises:
        ValueError: if a size is below 1.
    """
    check_sizes(num_train=num_train, num_val=num_val)
    rng, shaky = np.random.default_rng([seed, 51]), shaky_facts(seed)
    papers: dict[str, Example] = {}
    while len(papers) < num_val + num_train:
        example = draw_paper(rng, shaky).example
        papers.setdefault(example.prompt, example)
    examples = list(papers.values())
    return Split(examples[num_val:], examples[:num_val])


def demonstrator(seed: int, held_out: Split, *, habit: float, slip: float) -> Demonstrate:
    """Returns the teacher on papers that are not in the validation."""
    prompts = {example.prompt for example in held_out.validations}
    shaky = shaky_facts(seed)
    teacher = Teacher(shaky, np.random.default_rng([seed, 52]), habit=habit, slip=slip)

    def demonstrate(rng: np.random.Generator) -> Conversation:
        while (paper := draw_paper(rng, shaky)).prompt in prompts:
            pass
        return [paper.prompt, work(paper, teacher)]

    return demonstrate


TASK = Task(name=NAME, ability="math", split=split, demonstrator=demonstrator, score=score)
