# SPDX-License-Identifier: Apache-2.0
"""Set service_dialogue: the assistant finds out what a user wants and does it; the user is a program.

The dialogue set of arXiv 2512.03847 is not published, and the paper defines none of TCR, ACR and GCR. The schema is
ours, for sets of one's own, and so are the rates; they are those of ``verl_dvpo.bench.tasks.dialogue`` for any goal.

    goal       {"food": "thai", "day": "friday", "people": "4"}
    messages   user        A thai table for 4, please.
    rolled out assistant   ask: day
               user        day: friday
               assistant   done: food=thai; day=friday; people=4

Only the last message of ``messages`` has to be the user's; there may be a conversation before it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from verl_dvpo.bench.data.answers import after_thinking, normalised
from verl_dvpo.bench.data.noisy import messages_of
from verl_dvpo.bench.data.schema import DataSet, Example, Field, SkippedRow, id_of

#: Our agent loop for this set; see ``dialogue_loop.py``.
AGENT = "service_dialogue_agent"
#: Assistant turns beyond one for each slot and one to finish, before the user hangs up.
SPARE_TURNS = 2
_ASK = re.compile(r"(?im)^\s*ask:\s*(.+?)\s*$")
_DONE = re.compile(r"(?im)^\s*done:\s*(.+?)\s*$")


@dataclass(frozen=True)
class ServiceGoal:
    """Holds the wishes of a user.

    Attributes:
        slots: slot -> value, all that has to be right at the end.
        given: the slots that the prompt names already.
    """

    slots: dict[str, str]
    given: tuple[str, ...]

    @property
    def needed(self) -> tuple[str, ...]:
        """The slots that have to be asked for."""
        return tuple(slot for slot in self.slots if slot not in self.given)

    def to_json(self) -> str:
        """Writes the goal as JSON, which ``from_json`` reads."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "ServiceGoal":
        """Reads a goal that ``to_json`` wrote."""
        content = json.loads(text)
        return cls(content["slots"], tuple(content["given"]))


class ServiceUser:
    """Answers what the assistant asks for until it is done, for a limited number of turns."""

    def __init__(self, goal: ServiceGoal):
        self._goal = goal
        self._left = len(goal.slots) + 1 + SPARE_TURNS

    def reply(self, assistant: str) -> str | None:
        """Returns the answer to the assistant's message, or None when the dialogue is over."""
        self._left -= 1
        if booking(assistant) is not None or self._left <= 0:
            return None
        known = [slot for slot in self._goal.slots if normalised(slot) in asked_slots(assistant)]
        if not known:
            return "What do you need to know?"
        return "\n".join(f"{slot}: {self._goal.slots[slot]}" for slot in known)


def asked_slots(turn: str) -> set[str]:
    """Returns the normalised slots that an assistant's turn asks for."""
    lines = _ASK.findall(after_thinking(turn))
    return {normalised(slot) for line in lines for slot in re.split(r"[,;]", line)}


def booking(turn: str) -> dict[str, str] | None:
    """Returns the normalised slots and values of the last ``done:`` line of a turn; None if it has none."""
    lines = _DONE.findall(after_thinking(turn))
    if not lines:
        return None
    pairs = (part.split("=", 1) for part in lines[-1].split(";") if "=" in part)
    return {normalised(slot): normalised(value) for slot, value in pairs}


def score(turns: Sequence[str], truth: str) -> dict[str, float]:
    """Judges the assistant's turns by three rates (ours: the paper names them and does not define them).

    Args:
        turns: what the assistant said, one string a turn.
        truth: a goal's JSON.

    Returns:
        ``score`` and ``acc``: TCR. ``tcr``, task completion: 1 if the last turn finishes with every slot as wanted.
        ``acr``, ask completion: the share of the slots that had to be asked for that were (1 if there were none).
        ``gcr``, goal completion: the share of the slots that are as wanted at the end (0 if it is never finished).
        ``answered``: 1 if the last turn finishes. All in [0, 1].
    """
    goal = ServiceGoal.from_json(truth)
    asked: set[str] = set().union(*(asked_slots(turn) for turn in turns))
    done = booking(turns[-1]) if turns else None
    right = [done is not None and done.get(normalised(slot)) == normalised(goal.slots[slot]) for slot in goal.slots]
    tcr, gcr = float(all(right)), sum(right) / len(right)
    acr = sum(normalised(slot) in asked for slot in goal.needed) / len(goal.needed) if goal.needed else 1.0
    return {"score": tcr, "acc": tcr, "answered": float(done is not None), "tcr": tcr, "acr": acr, "gcr": gcr}


def user(truth: str) -> ServiceUser:
    """Returns the user who has the goal ``truth``, in JSON."""
    return ServiceUser(ServiceGoal.from_json(truth))


def instruction(slots: Sequence[str]) -> str:
    """Returns the system message that tells the assistant how to ask and how to finish."""
    return (
        f"You arrange what the user wants. You need: {', '.join(slots)}. Ask for what you do not know with the line "
        "`ask: NAME`. When you know everything, finish with the line `done: NAME=VALUE; NAME=VALUE`, which names all."
    )


def goal_and_messages(values: Mapping[str, Any], rng: np.random.Generator) -> Example:
    """Makes an example of a conversation and the user's goal.

    Without a column ``given``, a slot counts as given if its value stands in one of the user's messages.
    """
    messages = messages_of(values["messages"], "messages")
    wanted = values["goal"]
    if isinstance(wanted, str):
        try:
            wanted = json.loads(wanted)
        except json.JSONDecodeError as error:
            raise SkippedRow("goal is no JSON") from error
    # A parquet file gives a struct of all rows' slots; those of other rows are None.
    slots = {str(key): str(value) for key, value in wanted.items() if value is not None} if wanted else {}
    if not slots or not all(normalised(value) for value in slots.values()):
        raise SkippedRow("goal has no slots, or an empty value")
    said = " " + normalised(" ".join(each["content"] for each in messages if each["role"] == "user")) + " "
    given = values.get("given")
    if given is None:
        given = [slot for slot, value in slots.items() if f" {normalised(value)} " in said]
    goal = ServiceGoal(slots, tuple(slot for slot in slots if slot in given))
    system = {"role": "system", "content": instruction(list(slots))}
    if messages[0]["role"] == "system":
        system["content"] = f"{messages[0]['content']}\n\n{system['content']}"
        messages = messages[1:]
    return Example(prompt=[system, *messages], truth=goal.to_json(), grader="dialogue", id=id_of(values))


SERVICE_DIALOGUE = DataSet(
    name="service_dialogue",
    ability="dialogue",
    grader="dialogue",
    fields=(
        Field("messages", ("messages",), "list of {role, content}"),
        Field("goal", ("goal",), "{slot: value} or JSON"),
        Field("given", ("given",), "list of slots", required=False),
        Field("id", ("id",), required=False),
    ),
    build=goal_and_messages,
    licence="that of your own set",
    agent=AGENT,
)
SETS = (SERVICE_DIALOGUE,)
