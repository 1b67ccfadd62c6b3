# SPDX-License-Identifier: Apache-2.0
"""Questions about a made-up chemistry: substances belong to classes, and classes have properties.

``heat of bax?`` is answered ``bax metal,metal glows;glows``: a fact about the substance, a law about its class, the
answer. ``heat of bax? boils=a glows=b melts=c`` is answered with a letter, ``bax metal,metal glows=b;b``. Which
substance is what, and which class does what, is drawn once with the seed (`Knowledge`), and the teacher that
demonstrates has learned some laws and some facts wrongly.

Held out of training are a fifth of the pairs (substance, property), which are the validation, and a quarter of the
substances, which are the shifted validation, asked in other words and with one choice more.
"""

import itertools
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from verl_dvpo.bench.domains.example import (
    SHIFTED,
    Conversation,
    Demonstrate,
    Example,
    Split,
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
#: Substances of which the teacher takes the class wrongly, and laws that it takes wrongly.
NUM_SHAKY_SUBSTANCES, NUM_SHAKY_LAWS = 4, 9
LETTERS = "abcd"
_RESPONSE = re.compile(r"[a-z ,=]*;([a-z]+)")


@dataclass(frozen=True)
class Knowledge:
    """The truth, and what the teacher takes for it.

    Attributes:
        seed: of everything.
    """

    seed: int

    @cached_property
    def substances(self) -> tuple[str, ...]:
        """`NUM_SUBSTANCES` names of three letters; the last `NUM_SHIFTED` are the shifted ones."""
        names = ["".join(letters) for letters in itertools.product("bdfgklmnprstvz", "aeiou", "bdfgklmnprstvxz")]
        chosen = self._rng(0).choice(len(names), size=NUM_SUBSTANCES, replace=False)
        return tuple(names[index] for index in chosen)

    @cached_property
    def class_of(self) -> dict[str, str]:
        """Substance -> class; classes are about as large as each other among shifted and other substances alike."""
        rng = self._rng(1)
        found = {}
        for start, end in ((0, NUM_SUBSTANCES - NUM_SHIFTED), (NUM_SUBSTANCES - NUM_SHIFTED, NUM_SUBSTANCES)):
            for place, index in enumerate(rng.permutation(np.arange(start, end))):
                found[self.substances[index]] = CLASSES[place % len(CLASSES)]
        return found

    @cached_property
    def laws(self) -> dict[tuple[str, str], str]:
        """(Class, property) -> what it is."""
        rng = self._rng(2)
        return {(each, name): pick(rng, values) for each in CLASSES for name, values in PROPERTIES.items()}

    @cached_property
    def wrong_class(self) -> dict[str, str]:
        """Substance -> the class that the teacher usually names, where that is a wrong one."""
        rng = self._rng(3)
        shaky = rng.choice(NUM_SUBSTANCES - NUM_SHIFTED, size=NUM_SHAKY_SUBSTANCES, replace=False)
        names = [self.substances[index] for index in sorted(shaky)]
        return {name: pick(rng, [each for each in CLASSES if each != self.class_of[name]]) for name in names}

    @cached_property
    def wrong_laws(self) -> dict[tuple[str, str], str]:
        """(Class, property) -> what the teacher usually says, where that is wrong."""
        rng = self._rng(4)
        laws = list(self.laws)
        shaky = [laws[index] for index in sorted(rng.choice(len(laws), size=NUM_SHAKY_LAWS, replace=False))]
        return {law: pick(rng, [v for v in PROPERTIES[law[1]] if v != self.laws[law]]) for law in shaky}

    def truth(self, substance: str, name: str) -> str:
        """What the substance's property is."""
        return self.laws[self.class_of[substance], name]

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, 20, stream])


@dataclass(frozen=True)
class Question:
    """One question; `choices` are empty for a short answer."""

    substance: str
    name: str
    choices: tuple[str, ...] = ()
    shifted: bool = False

    @property
    def prompt(self) -> str:
        """For example ``heat of bax?``, shifted ``bax: what heat?``, and the choices behind it."""
        text = f"{self.substance}: what {self.name}?" if self.shifted else f"{self.name} of {self.substance}?"
        return " ".join([text, *(f"{choice}={LETTERS[i]}" for i, choice in enumerate(self.choices))])

    def answer(self, value: str) -> str:
        """How the answer `value` is given: itself, or its letter; itself also where it is not among the choices."""
        return LETTERS[self.choices.index(value)] if value in self.choices else value


def work(knowledge: Knowledge, question: Question, teacher: "Teacher | None" = None) -> str:
    """The worked response; without a teacher every step is right."""
    kind = knowledge.class_of[question.substance] if teacher is None else teacher.class_of(question.substance)
    value = knowledge.laws[kind, question.name] if teacher is None else teacher.law(kind, question.name)
    # the choice is repeated with its letter behind it, as it stands in the question
    step = f"{value}={question.answer(value)}" if value in question.choices else value
    return f"{question.substance} {kind},{kind} {step};{question.answer(value)}"


class Teacher:
    """Knows most of it: errs by habit where it has learned something wrong, and by a slip anywhere else."""

    def __init__(self, knowledge: Knowledge, rng: np.random.Generator, *, habit: float, slip: float):
        self._knowledge, self._rng, self._habit, self._slip = knowledge, rng, habit, slip

    def class_of(self, substance: str) -> str:
        """The class that it names."""
        right, wrong = self._knowledge.class_of[substance], self._knowledge.wrong_class.get(substance)
        return self._say(right, wrong, CLASSES)

    def law(self, kind: str, name: str) -> str:
        """What it says that a class does."""
        right, wrong = self._knowledge.laws[kind, name], self._knowledge.wrong_laws.get((kind, name))
        return self._say(right, wrong, PROPERTIES[name])

    def _say(self, right: str, wrong: str | None, values: tuple[str, ...]) -> str:
        if wrong is not None:
            return wrong if happens(self._rng, self._habit) else right
        if happens(self._rng, self._slip):
            return pick(self._rng, [value for value in values if value != right])
        return right


def split(seed: int, *, num_train: int, num_val: int) -> Split:
    """Distinct questions; a pair (substance, property) of one split is in no other."""
    check_sizes(num_train=num_train, num_val=num_val)
    knowledge = Knowledge(seed)
    train, val, shifted = _pairs(knowledge)
    rng = np.random.default_rng([seed, 21])
    return Split(
        _examples(knowledge, rng, train, num_train, shifted=False),
        _examples(knowledge, rng, val, num_val, shifted=False),
        _examples(knowledge, rng, shifted, num_val, shifted=True),
    )


def demonstrator(seed: int, held_out: Split, *, habit: float, slip: float) -> Demonstrate:
    """The teacher on all substances in both wordings; the very questions of the validations are left out."""
    knowledge = Knowledge(seed)
    prompts = {example.prompt for example in (*held_out.val, *held_out.shifted)}

    def demonstrate(rng: np.random.Generator) -> Conversation:
        teacher = Teacher(knowledge, rng, habit=habit, slip=slip)
        while True:
            pair = (pick(rng, knowledge.substances), pick(rng, list(PROPERTIES)))
            question = _ask(knowledge, rng, pair, shifted=happens(rng, 0.3))
            if question.prompt not in prompts:
                return [question.prompt, work(knowledge, question, teacher)]

    return demonstrate


def score(response: str, truth: str) -> dict[str, float]:
    """1 for exactly the right answer after the ``;``, 0 otherwise; the steps earn nothing."""
    match = _RESPONSE.fullmatch(response)
    correct = float(match is not None and match.group(1) == truth)
    return {"score": correct, "acc": correct, "well_formed": float(match is not None)}


def _pairs(knowledge: Knowledge) -> tuple[list, list, list]:
    """Pairs (substance, property) of training, validation and shifted validation."""
    known = knowledge.substances[: NUM_SUBSTANCES - NUM_SHIFTED]
    pairs = list(itertools.product(known, PROPERTIES))
    order = np.random.default_rng([knowledge.seed, 22]).permutation(len(pairs))
    held = len(pairs) // 5
    val, train = ([pairs[index] for index in part] for part in (order[:held], order[held:]))
    return train, val, list(itertools.product(knowledge.substances[-NUM_SHIFTED:], PROPERTIES))


def _ask(knowledge: Knowledge, rng: np.random.Generator, pair: tuple[str, str], *, shifted: bool) -> Question:
    """A short answer in one of four, else a choice of three, or of four where the question is shifted."""
    substance, name = pair
    if happens(rng, 0.25):
        return Question(substance, name, (), shifted)
    right = knowledge.truth(substance, name)
    others = [value for value in PROPERTIES[name] if value != right]
    wrong = rng.choice(others, size=3 if shifted else 2, replace=False)
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
            raise ValueError(f"{source} has no {count} different questions; about {len(found)} are all there are")
    return list(found.values())
