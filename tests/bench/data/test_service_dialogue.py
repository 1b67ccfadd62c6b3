# SPDX-License-Identifier: Apache-2.0
"""The dialogue's user and its three rates, by hand and against those of the made-up dialogue task."""

import json

import pytest

from verl_dvpo.bench.data.dialogue import ServiceGoal, ServiceUser, asked_slots, booking, goal_and_messages, score
from verl_dvpo.bench.data.schema import SkippedRow
from verl_dvpo.bench.tasks import dialogue as made_up

GOAL = ServiceGoal({"food": "thai", "day": "Friday", "people": "4"}, ("food", "people"))
TRUTH = GOAL.to_json()


def rates(turns, truth=TRUTH):
    found = score(turns, truth)
    assert found["score"] == found["acc"] == found["tcr"]
    return found["tcr"], found["acr"], found["gcr"], found["answered"]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (["ask: day", "Done: food=Thai; day=friday; people=4"], (1.0, 1.0, 1.0, 1.0)),
        (["done: food=thai; day=friday; people=4"], (1.0, 0.0, 1.0, 1.0)),
        (["ask: day", "done: food=thai; day=monday; people=4"], (0.0, 1.0, 2 / 3, 1.0)),
        (["ask: day", "done: food=thai"], (0.0, 1.0, 1 / 3, 1.0)),
        (["ask: people", "I shall do it."], (0.0, 0.0, 0.0, 0.0)),
        (["<think>done: food=thai</think>ask: day"], (0.0, 1.0, 0.0, 0.0)),
        ([], (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_the_three_rates(turns, expected):
    assert rates(turns) == pytest.approx(expected)


def test_nothing_had_to_be_asked_for():
    truth = ServiceGoal({"city": "rome"}, ("city",)).to_json()
    assert rates(["done: city=Rome"], truth) == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("asks", [[], ["day"], ["day", "people"], ["food"]])
@pytest.mark.parametrize("values", [None, ["thai", "fri", "4"], ["thai", "mon", "4"], ["sushi", "mon", "9"]])
def test_the_rates_are_those_of_the_made_up_task(asks, values):
    slots = {"food": "thai", "day": "fri", "people": "4"}
    ours = [f"ask: {slot}" for slot in asks]
    theirs = [f"{slot}?" for slot in asks]
    if values is not None:
        ours.append("done: " + "; ".join(f"{slot}={value}" for slot, value in zip(slots, values, strict=True)))
        theirs.append("ok " + " ".join(values))
    expected = made_up.score(theirs, made_up.Goal("table", slots, ("food",)).to_json())
    found = score(ours, ServiceGoal(slots, ("food",)).to_json())
    assert [found[name] for name in ("tcr", "acr", "gcr")] == [expected[name] for name in ("tcr", "acr", "gcr")]


def test_the_user_answers_and_hangs_up():
    user = ServiceUser(GOAL)
    assert user.reply("Which day?\nask: day") == "day: Friday"
    assert user.reply("ask: Day, people") == "day: Friday\npeople: 4"
    assert user.reply("ask: price") == "What do you need to know?"
    assert user.reply("done: food=thai") is None
    patient = ServiceUser(GOAL)
    assert [patient.reply("hm") for _ in range(6)] == ["What do you need to know?"] * 5 + [None]


def test_lines_that_ask_and_finish():
    assert asked_slots("I see.\n ask: day; party size\nASK: food") == {"day", "party size", "food"}
    assert asked_slots("You may ask: anything") == set()
    assert booking("done: a=1") == {"a": "1"}
    assert booking("done: a=1; b = x=y ;\ndone: a=2") == {"a": "2"}
    assert booking("well done: a=1") is None


def example(messages=None, **values):
    said = messages or [{"role": "user", "content": "A Thai table for 4, please."}]
    return goal_and_messages({"messages": said, "goal": GOAL.slots, **values}, None)


def test_what_the_user_said_is_given():
    assert ServiceGoal.from_json(example().truth).needed == ("day",)
    assert ServiceGoal.from_json(example(given=["day"]).truth).needed == ("food", "people")
    assert ServiceGoal.from_json(example(goal=json.dumps({"people": "40"})).truth).needed == ("people",)
    assert ServiceGoal.from_json(example(goal={"day": "friday", "other": None}).truth).slots == {"day": "friday"}


def test_the_system_message_names_the_slots():
    prompt = example([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]).prompt
    assert [each["role"] for each in prompt] == ["system", "user"]
    assert prompt[0]["content"].startswith("Be brief.\n\n")
    assert "You need: food, day, people." in prompt[0]["content"]


@pytest.mark.parametrize("values", [{"goal": {}}, {"goal": "no JSON"}, {"goal": {"day": "!"}}, {"messages": []}])
def test_rows_that_cannot_be_used(values):
    with pytest.raises(SkippedRow):
        goal_and_messages({"messages": [{"role": "user", "content": "Hi"}], "goal": GOAL.slots, **values}, None)
