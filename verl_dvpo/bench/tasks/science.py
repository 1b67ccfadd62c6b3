# SPDX-License-Identifier: Apache-2.0
"""Task science: questions about a made-up chemistry, in which substances belong to classes that have properties.

``heat of bax?`` is answered ``bax metal,metal glows;glows``: a fact about the substance, a law about its class, the
answer. ``heat of bax? boils=a glows=b melts=c`` is answered with a letter, ``bax metal,metal glows=b;b``. The seed
decides all facts and laws (``Knowledge``). The teacher has learned some of both wrongly.

The validation asks about a fifth of the pairs (substance, property), which training never asks about. The shifted
validation asks about a quarter of the substances, in other words and with one choice more.
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from verl_dvpo.bench.tasks.task import (
    SHIFTED,
    Conversation,
    Demonstrate,
    Example,
    Split,
    Task,
    check_sizes,
    happens,
    pick,
)

NAME = "science"
CLASSES = ("metal", "salt", "acid", "gas", "oil", "wax")
PROPERTIES: dict[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "grey", "white", "green"),
    "heat": ("melts", "burns", "glows", "boils"),
    "water": ("sinks", "floats", "mixes", "fizzes"),
    "charge": ("plus", "minus", "none", "both"),
}
NUM_SUBSTANCES = 40
NUM_SHIFTED = 10
#: Substances whose class the teacher has learned wrongly, and laws that it has learned wrongly.
NUM_SHAKY_SUBSTANCES, NUM_SHAKY_LAWS = 4, 9
LETTERS = "abcd"
#: Wrong choices of a question that is not shifted, and of one that is.
NUM_WRONG = (2, 3)
_RESPONSE = re.compile(r"[a-z ,=]*;([a-z]+)")


@dataclass(frozen=True)
class Knowledge:
    """The true facts and laws, and the teacher's wrong ones.

    Attributes:
        seed: of all that is drawn.
    """

    seed: int

    @cached_property
    def substances(self) -> tuple[str, ...]:
        """``NUM_SUBSTANCES`` names of three letters; the last ``NUM_SHIFTED`` are those of the shifted validation."""
        names = ["".join(letters) for letters in itertools.product("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvxz")]
        chosen = self._rng(0).choice(len(names), size=NUM_SUBSTANCES, replace=False)
        return tuple(names[index] for index in chosen)

    @cached_property
    def class_of(self) -> dict[str, str]:
        """Substance -> class; classes are of nearly equal size, among shifted and other substances alike."""
        rng = self._rng(1)
        found = {}
        for start, end in ((0, NUM_SUBSTANCES - NUM_SHIFTED), (NUM_SUBSTANCES - NUM_SHIFTED, NUM_SUBSTANCES)):
            for place, index in enumerate(rng.permutation(np.arange(start, end))):
                found[self.substances[index]] = CLASSES[place % len(CLASSES)]
        return found

    @cached_property
    def laws(self) -> dict[tuple[str, str], str]:
        """(Class, property) -> the property's true value."""
        rng = self._rng(2)
        return {(each, name): pick(rng, values) for each in CLASSES for name, values in PROPERTIES.items()}

    @cached_property
    def wrong_class(self) -> dict[str, str]:
        """Substance -> the wrong class that the teacher usually names; only substances that it is shaky on."""
        rng = self._rng(3)
        shaky = rng.choice(NUM_SUBSTANCES - NUM_SHIFTED, size=NUM_SHAKY_SUBSTANCES, replace=False)
        names = [self.substances[index] for index in sorted(shaky)]
        return {name: pick(rng, [each for each in CLASSES if each != self.class_of[name]]) for name in names}

    @cached_property
    def wrong_laws(self) -> dict[tuple[str, str], str]:
        """(Class, property) -> the wrong value that the teacher usually names; only laws that it is shaky on."""
        rng = self._rng(4)
        laws = list(self.laws)
        shaky = [laws[index] for index in sorted(rng.choice(len(laws), size=NUM_SHAKY_LAWS, replace=False))]
        return {law: pick(rng, [v for v in PROPERTIES[law[1]] if v != self.laws[law]]) for law in shaky}

    def truth(self, substance: str, name: str) -> str:
        """Returns the true value of a substance's property."""
        return self.laws[self.class_of[substance], name]

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, 20, stream])


@dataclass(frozen=True)
class Question:
    """One question; ``choices`` is empty for a short answer."""

    substance: str
    name: str
    choices: tuple[str, ...] = ()
    shifted: bool = False

    @property
    def prompt(self) -> str:
        """The user's message, for example ``heat of bax?`` (shifted ``bax: what heat?``), followed by the choices."""
        text = f"{self.substance}: what {self.name}?" if self.shifted else f"{self.name} of {self.substance}?"
        return " ".join([text, *(f"{choice}={LETTERS[i]}" for i, choice in enumerate(self.choices))])

    def answer(self, value: str) -> str:
        """Returns the letter of ``value`` among the choices, or ``value`` itself if it is not one of them."""
        return LETTERS[self.choices.index(value)] if value in self.choices else value


def work(knowledge: Knowledge, question: Question, teacher: "Teacher | None" = None) -> str:
    """Writes the worked response; without a teacher every step is right."""
    kind = knowledge.class_of[question.substance] if teacher is None else teacher.class_of(question.substance)
    value = knowledge.laws[kind, question.name] if teacher is None else teacher.law(kind, question.name)
    # A choice is repeated with its letter, as it stands in the question.
    step = f"{value}={question.answer(value)}" if value in question.choices else value
    return f"{question.substance} {kind},{kind} {step};{question.answer(value)}"


class Teacher:
    """Errs by habit where it has learned something wrong, and by a slip anywhere else."""

    def __init__(self, knowledge: Knowledge, rng: np.random.Generator, *, habit: float, slip: float):
        self._knowledge, self._rng, self._habit, self._slip = knowledge, rng, habit, slip

    def class_of(self, substance: str) -> str:
        """Draws the class that the teacher names."""
        right, wrong = self._knowledge.class_of[substance], self._knowledge.wrong_class.get(substance)
        return self._say(right, wrong, CLASSES)

    def law(self, kind: str, name: str) -> str:
        """Draws the value that the teacher names for the property ``name`` of the class ``kind``."""
        right, wrong = self._knowledge.laws[kind, name], self._knowledge.wrong_laws.get((kind, name))
        return self._say(right, wrong, PROPERTIES[name])

    def _say(self, right: str, wrong: str | None, values: tuple[str, ...]) -> str:
        if wrong is not None:
            return wrong if happens(self._rng, self._habit) else right
        if happens(self._rng, self._slip):
            return pick(self._rng, [value for value in values if value != right])
        return right


def split(seed: int, *, num_train: int, num_val: int) -> Split:
    """Draws distinct questions; a pair (substance, property) of one part is in no other.

    A validation has at most as many questions as there are on its pairs (510 to 580 by the seed, and 1720 in the
    shifted one), so it is smaller than ``num_val`` where that is larger.

    Raises:
        ValueError: if a size is below 1, or if there are fewer than ``num_train`` questions to train on.
    """
    check_sizes(num_train=num_train, num_val=num_val)
    knowledge = Knowledge(seed)
    train, val, shifted = _pairs(knowledge)
    rng = np.random.default_rng([seed, 21])
    return Split(
        _examples(knowledge, rng, train, num_train, shifted=False),
        _examples(knowledge, rng, val, min(num_val, num_questions(val, shifted=False)), shifted=False),
        _examples(knowledge, rng, shifted, min(num_val, num_questions(shifted, shifted=True)), shifted=True),
    )


def demonstrator(seed: int, held_out: Split, *, habit: float, slip: float) -> Demonstrate:
    """Returns the teacher, on questions about all substances in both wordings that are in no validation."""
    knowledge = Knowledge(seed)
    prompts = {example.prompt for example in held_out.validations}

    def demonstrate(rng: np.random.Generator) -> Conversation:
        teacher = Teacher(knowledge, rng, habit=habit, slip=slip)
        while True:
            pair = (pick(rng, knowledge.substances), pick(rng, list(PROPERTIES)))
            question = _ask(knowledge, rng, pair, shifted=happens(rng, 0.3))
            if question.prompt not in prompts:
                return [question.prompt, work(knowledge, question, teacher)]

    return demonstrate


def score(turns: Sequence[str], truth: str) -> dict[str, float]:
    """Returns 1 for exactly the right answer after the ``;`` and 0 otherwise; the steps earn nothing.

    Args:
        turns: the response, alone.
        truth: the right value, or its letter.

    Returns:
        ``score`` and ``acc``, which are equal; ``well_formed``, 1 if there is an answer to read. Each is 0.0 or 1.0.
    """
    (response,) = turns
    match = _RESPONSE.fullmatch(response)
    correct = float(match is not None and match.group(1) == truth)
    return {"score": correct, "acc": correct, "well_formed": float(match is not None)}


def num_questions(pairs: Sequence[tuple[str, str]], *, shifted: bool) -> int:
    """Counts the different questions on pairs (substance, property): a short one, and all orders of all choices."""
    wrong = NUM_WRONG[shifted]
    return sum(1 + math.comb(len(PROPERTIES[name]) - 1, wrong) * math.factorial(wrong + 1) for _, name in pairs)


def _pairs(knowledge: Knowledge) -> tuple[list, list, list]:
    """Returns the pairs (substance, property) of training, validation and shifted validation."""
    known = knowledge.substances[: NUM_SUBSTANCES - NUM_SHIFTED]
    pairs = list(itertools.product(known, PROPERTIES))
    order = np.random.default_rng([knowledge.seed, 22]).permutation(len(pairs))
    held = len(pairs) // 5
    val, train = ([pairs[index] for index in part] for part in (order[:held], order[held:]))
    return train, val, list(itertools.product(knowledge.substances[-NUM_SHIFTED:], PROPERTIES))


def _ask(knowledge: Knowledge, rng: np.random.Generator, pair: tuple[str, str], *, shifted: bool) -> Question:
    """Asks for a short answer in one of four cases, else for a choice of three, or of four if shifted."""
    substance, name = pair
    if happens(rng, 0.25):
        return Question(substance, name, (), shifted)
    right = knowledge.truth(substance, name)
    others = [value for value in PROPERTIES[name] if value != right]
    wrong = rng.choice(others, size=NUM_WRONG[shifted], replace=False)
    return Question(substance, name, tuple(str(each) for each in rng.permutation([right, *wrong])), shifted)


def _examples(
    knowledge: Knowledge, rng: np.random.Generator, pairs: list, count: int, *, shifted: bool
) -> list[Example]:
    source = NAME + SHIFTED if shifted else NAME
    found: dict[str, Example] = {}
    tries = 0
    while len(found) < count:
        question = _ask(knowledge, rng, pairs[int(rng.integers(len(pairs)))], shifted=shifted)
        truth = question.answer(knowledge.truth(question.substance, question.name))
        found.setdefault(question.prompt, Example(source, question.prompt, truth))
        tries += 1
        if tries > 50 * count + 1000:
            raise ValueError(
                f"num_train is {count}; {source} has about {len(found)} different questions; choose a smaller one"
            )
    return list(found.values())


TASK = Task(name=NAME, ability="science", split=split, demonstrator=demonstrator, score=score)
