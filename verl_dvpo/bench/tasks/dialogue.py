# SPDX-License-Identifier: Apache-2.0
"""Task dialogue: the assistant books what the user wants and must ask for what the user did not say.

    user       table food thai people 4
    assistant  day?
    user       fri
    assistant  ok thai fri 4

``<slot>?`` asks for a slot. ``ok`` and the values in the service's order book and end the dialogue. The user is a
program (``BookingUser``) that knows its goal. The teacher hardly ever asks for some of the slots and guesses them.

Training and validation are about tables and taxis. In the shifted validation users also order rooms, name slots in
reverse order and hesitate.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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
#: Slots that the teacher hardly ever asks for.
SHAKY_SLOTS = frozenset({"day", "time", "stars"})
#: Assistant turns after which the user hangs up: one for each slot, the booking, and one wasted.
MOST_TURNS = 5
_ASK = re.compile(r"([a-z]+)\?")
_BOOK = re.compile(r"ok((?: [a-z0-9]+)*)")


@dataclass(frozen=True)
class Goal:
    """A user's wish and manner of speaking.

    Attributes:
        service: a name in ``SERVICES``.
        slots: slot -> value, all slots of the service, in its order.
        given: the slots that the first message names.
        shifted: whether the user names slots in reverse order and hesitates.
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
        """Writes the goal as JSON, which ``from_json`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Goal":
        """Reads a goal that ``to_json`` wrote."""
        content = json.loads(text)
        return cls(**{**content, "given": tuple(content["given"])})


class BookingUser:
    """Answers the assistant until it books, for at most ``MOST_TURNS`` of its turns."""

    def __init__(self, goal: Goal):
        self._goal = goal
        self._turns = 0

    def reply(self, assistant: str) -> str | None:
        """Returns the answer to the assistant's message, or None when the dialogue is over."""
        self._turns += 1
        if _BOOK.fullmatch(assistant) or self._turns >= MOST_TURNS:
            return None
        asked = _ASK.fullmatch(assistant)
        if asked is None or asked.group(1) not in self._goal.slots:
            return "what?"
        value = self._goal.slots[asked.group(1)]
        return f"uh {value}" if self._goal.shifted else value


def draw_goal(rng: np.random.Generator, services: Sequence[str], *, shifted: bool) -> Goal:
    """Draws a goal whose first message names each slot with probability 1/2."""
    service = pick(rng, services)
    slots = {slot: pick(rng, values) for slot, values in SERVICES[service].items()}
    while service == "taxi" and slots["to"] == slots["from"]:
        slots["to"] = pick(rng, _PLACES)
    return Goal(service, slots, tuple(slot for slot in slots if happens(rng, 0.5)), shifted)


def split(seed: int, *, num_train: int, num_val: int) -> Split:
    """Draws distinct goals: no two have the same values and name the same slots first.

    Raises:
        ValueError: if a size is below 1.
    """
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
    """Returns the teacher, with goals of all services in both manners that are in no validation."""
    truths = {example.truth for example in held_out.validations}

    def demonstrate(rng: np.random.Generator) -> Conversation:
        while True:
            goal = draw_goal(rng, list(SERVICES), shifted=happens(rng, 0.4))
            if goal.to_json() not in truths:
                return converse(goal, rng, habit=habit, slip=slip)

    return demonstrate


def converse(goal: Goal, rng: np.random.Generator, *, habit: float, slip: float) -> Conversation:
    """Plays a dialogue of user and teacher.

    Args:
        goal: the user's.
        rng: source of the teacher's errors.
        habit: probability in [0, 1] of a guess for a shaky slot that the user did not name.
        slip: probability in [0, 1] of a random value for any other slot.
    """
    user = BookingUser(goal)
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
    """Judges the assistant's turns by three rates.

    Their names are from arXiv 2512.03847, which does not define them; the definitions are ours.

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


def user(truth: str) -> BookingUser:
    """Returns the user who has the goal ``truth``, in JSON."""
    return BookingUser(Goal.from_json(truth))


TASK = Task(name=NAME, ability="dialogue", split=split, demonstrator=demonstrator, score=score, user=user)
