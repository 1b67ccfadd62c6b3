# SPDX-License-Identifier: Apache-2.0
"""Task dialogue: the assistant books what the user wants, and has to ask for what the user did not say.

    user       table food thai people 4
    assistant  day?
    user       fri
    assistant  ok thai fri 4

``<slot>?`` asks, ``ok`` and the values in the service's order books and ends the dialogue. The user is a program
(`User`) that knows its goal. The teacher that demonstrates hardly ever asks for some of the slots, and guesses.

Training and validation are about tables and taxis; in the shifted validation users order rooms too, say things the
other way round, and hesitate.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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

NAME = "dialogue"
_PLACES = ("park", "zoo", "bank", "port", "mall", "dock")
SERVICES: dict[str, dict[str, tuple[str, ...]]] = {
    "table": {
        "food": ("thai", "pizza", "sushi", "tapas", "curry"),
        "day": ("mon", "tue", "wed", "thu", "fri", "sat", "sun"),
        "people": tuple("23456789"),
    },
    "taxi": {"from": _PLACES, "to": _PLACES, "time": tuple("123456789")},
    "room": {"city": ("rome", "oslo", "bonn", "lima"), "nights": tuple("1234567"), "stars": tuple("12345")},
}
TRAINED = ("table", "taxi")
#: Slots for which the teacher hardly ever asks.
SHAKY_SLOTS = frozenset({"day", "time", "stars"})
#: Assistant turns after which the user hangs up: one for each slot, the booking, and one wasted.
MOST_TURNS = 5
_ASK = re.compile(r"([a-z]+)\?")
_BOOK = re.compile(r"ok((?: [a-z0-9]+)*)")


@dataclass(frozen=True)
class Goal:
    """What a user wants, and how it is said.

    Attributes:
        service: of `SERVICES`.
        slots: slot -> value, all slots of the service, in its order.
        given: the slots that the first message names.
        shifted: whether the user speaks the other way round.
    """

    service: str
    slots: dict[str, str]
    given: tuple[str, ...]
    shifted: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        """The slots that have to be asked for."""
        return tuple(slot for slot in self.slots if slot not in self.given)

    @property
    def prompt(self) -> str:
        """The user's first message."""
        parts = [f"{slot} {self.slots[slot]}" for slot in self.slots if slot in self.given]
        return " ".join([*reversed(parts), self.service] if self.shifted else [self.service, *parts])

    @property
    def booking(self) -> str:
        """The right last message."""
        return " ".join(["ok", *self.slots.values()])

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Goal":
        """The goal that `to_json` wrote."""
        content = json.loads(text)
        return cls(**{**content, "given": tuple(content["given"])})


class User:
    """Answers the assistant until it books, or for `MOST_TURNS` of its turns."""

    def __init__(self, goal: Goal):
        self._goal = goal
        self._turns = 0

    def reply(self, assistant: str) -> str | None:
        """What the user says to the assistant's message; None when the dialogue is over."""
        self._turns += 1
        if _BOOK.fullmatch(assistant) or self._turns >= MOST_TURNS:
            return None
        asked = _ASK.fullmatch(assistant)
        if asked is None or asked.group(1) not in self._goal.slots:
            return "what?"
        value = self._goal.slots[asked.group(1)]
        return f"uh {value}" if self._goal.shifted else value


def draw_goal(rng: np.random.Generator, services: Sequence[str], *, shifted: bool) -> Goal:
    """A goal whose first message names each slot with probability 1/2."""
    service = pick(rng, services)
    slots = {slot: pick(rng, values) for slot, values in SERVICES[service].items()}
    while service == "taxi" and slots["to"] == slots["from"]:
        slots["to"] = pick(rng, _PLACES)
    return Goal(service, slots, tuple(slot for slot in slots if happens(rng, 0.5)), shifted)


def split(seed: int, *, num_train: int, num_val: int) -> Split:
    """Goals, no two of them with the same first message and the same values."""
    check_sizes(num_train=num_train, num_val=num_val)
    rng = np.random.default_rng([seed, 30])
    taken: set[str] = set()

    def fresh(count: int, services: Sequence[str], shifted: bool) -> list[Example]:
        found: list[Example] = []
        while len(found) < count:
            goal = draw_goal(rng, services, shifted=shifted)
            if goal.to_json() not in taken:
                taken.add(goal.to_json())
                found.append(Example(NAME + SHIFTED if shifted else NAME, goal.prompt, goal.to_json()))
        return found

    shifted = fresh(num_val, ("room", *SERVICES), True)  # every second one is about a room
    val = fresh(num_val, TRAINED, False)
    return Split(fresh(num_train, TRAINED, False), val, shifted)


def demonstrator(seed: int, held_out: Split, *, habit: float, slip: float) -> Demonstrate:
    """The teacher with goals of all services in both manners; the goals of the validations are left out."""
    truths = {example.truth for example in (*held_out.val, *held_out.shifted)}

    def demonstrate(rng: np.random.Generator) -> Conversation:
        while True:
            goal = draw_goal(rng, list(SERVICES), shifted=happens(rng, 0.4))
            if goal.to_json() not in truths:
                return converse(goal, rng, habit=habit, slip=slip)

    return demonstrate


def converse(goal: Goal, rng: np.random.Generator, *, habit: float, slip: float) -> Conversation:
    """A dialogue of user and teacher: habit is to guess a shaky slot, a slip to guess or miscopy any other."""
    user = User(goal)
    said = [goal.prompt]
    booked = {}
    for slot, values in SERVICES[goal.service].items():
        careless = happens(rng, habit if slot in SHAKY_SLOTS and slot in goal.needed else slip)
        booked[slot] = pick(rng, values) if careless else goal.slots[slot]
        if slot in goal.needed and not careless:
            reply = user.reply(f"{slot}?")
            assert reply is not None
            said += [f"{slot}?", reply]
    return [*said, " ".join(["ok", *booked.values()])]


def score(turns: Sequence[str], truth: str) -> dict[str, float]:
    """Judges the assistant's turns.

    The names are those of arXiv 2512.03847, which does not define them; these definitions are ours.

    Args:
        turns: what the assistant said, one string a turn.
        truth: a goal's JSON.

    Returns:
        ``score`` and ``acc``: TCR. ``tcr``, task completion: 1 if everything is booked as wanted. ``acr``, ask
        completion: the share of the slots that had to be asked for that were (1 if there were none). ``gcr``, goal
        completion: the share of the slots that are booked as wanted (0 if nothing is booked). ``well_formed``: 1 if
        the last turn books a value for each slot. All in [0, 1].
    """
    goal = Goal.from_json(truth)
    asked = {match.group(1) for turn in turns if (match := _ASK.fullmatch(turn))}
    booking = _BOOK.fullmatch(turns[-1]) if turns else None
    values = booking.group(1).split() if booking else []
    right = [wanted == value for wanted, value in zip(goal.slots.values(), values, strict=False)]
    complete = float(len(values) == len(goal.slots) and all(right))
    gcr = sum(right) / len(goal.slots) if len(values) == len(goal.slots) else 0.0
    acr = sum(slot in asked for slot in goal.needed) / len(goal.needed) if goal.needed else 1.0
    well_formed = float(len(values) == len(goal.slots))
    return {"score": complete, "acc": complete, "tcr": complete, "acr": acr, "gcr": gcr, "well_formed": well_formed}
