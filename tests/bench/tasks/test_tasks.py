# SPDX-License-Identifier: Apache-2.0
"""Compares the domains' tasks with other ways of working them out, and their rewards with wrong answers."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from verl_dvpo.bench.tasks import addition, arithmetic, dialogue, science
from verl_dvpo.bench.tasks.addition import Problem
from verl_dvpo.bench.tasks.dialogue import SERVICES, BookingUser, Goal, converse, draw_goal
from verl_dvpo.bench.tasks.registry import DOMAINS, TASKS
from verl_dvpo.bench.tasks.reward import compute_score
from verl_dvpo.bench.tasks.science import PROPERTIES, Knowledge, Question
from verl_dvpo.bench.tasks.task import TURNS

SIZES = {"num_train": 300, "num_val": 60}


@pytest.mark.parametrize("name", DOMAINS.tasks)
def test_splits_are_disjoint_seeded_and_named(name):
    split = TASKS[name].split(3, **SIZES)
    parts = [split.train, split.val, split.shifted]
    assert [len(part) for part in parts] == [300, 60, 60]
    assert [{example.source for example in part} for part in parts] == [{name}, {name}, {f"{name}_shifted"}]
    everything = [(example.prompt, example.truth) for part in parts for example in part]
    assert len(set(everything)) == 420
    assert TASKS[name].split(3, **SIZES) == split
    assert TASKS[name].split(4, **SIZES).val != split.val
    with pytest.raises(ValueError, match="num_val is 0; it must be at least 1"):
        TASKS[name].split(0, num_train=1, num_val=0)


@pytest.mark.parametrize("name", DOMAINS.tasks)
def test_no_demonstration_is_on_a_held_out_prompt_and_errors_are_the_exception_without_habit(name):
    split = TASKS[name].split(0, num_train=20, num_val=200)
    demonstrate = TASKS[name].demonstrator(0, split, habit=0.0, slip=0.0)
    rng = np.random.default_rng(1)
    conversations = [demonstrate(rng) for _ in range(500)]
    if name != "dialogue":
        held_out = {example.prompt for example in (*split.val, *split.shifted)}
        assert held_out.isdisjoint(conversation[0] for conversation in conversations)
    assert len({tuple(conversation) for conversation in conversations}) > 250


# arithmetic


@pytest.mark.parametrize(
    ("a", "b", "response"),
    [
        (47, 86, "7+6=13,4+8+1=13;133"),
        (10, 20, "0+0=0,1+2=3;30"),
        (8963, 2848, "3+8=11,6+4+1=11,9+8+1=18,8+2+1=11;11811"),
    ],
)
def test_other_widths_by_hand(a, b, response):
    assert addition.work(Problem(a, b)) == response
    assert arithmetic.score([response], str(a + b)) == {"score": 1.0, "acc": 1.0, "well_formed": 1.0}
    assert arithmetic.score([response], str(a + b + 1))["score"] == 0.0


def test_shifted_sums_have_two_or_four_digits_and_the_others_three():
    split = arithmetic.split(0, **SIZES)
    for part, widths in ((split.train, {3}), (split.val, {3}), (split.shifted, {2, 4})):
        assert {len(number) for example in part for number in example.prompt[:-1].split("+")} == widths
        for example in part:
            a, b = map(int, example.prompt[:-1].split("+"))
            assert int(example.truth) == a + b


# science


def read_question(prompt: str) -> tuple[str, str, dict[str, str]]:
    """Substance, property and letter -> choice, by splitting."""
    question, _, rest = prompt.partition("?")
    if ":" in question:
        substance, _, name = question.partition(": what ")
    else:
        name, _, substance = question.partition(" of ")
    return substance, name, {letter: choice for choice, letter in (word.split("=") for word in rest.split())}


def test_the_truth_follows_from_the_knowledge_and_choices_hold_it_once():
    knowledge = Knowledge(2)
    split = science.split(2, **SIZES)
    for example in (*split.train, *split.val, *split.shifted):
        substance, name, choices = read_question(example.prompt)
        value = knowledge.laws[knowledge.class_of[substance], name]
        if choices:
            assert [letter for letter, choice in choices.items() if choice == value] == [example.truth]
            assert len(choices) == (4 if example.source.endswith("_shifted") else 3)
            assert set(choices.values()) <= set(PROPERTIES[name])
        else:
            assert example.truth == value
    letters = Counter(example.truth for example in split.train if len(example.truth) == 1)
    assert set(letters) == {"a", "b", "c"}
    assert min(letters.values()) > 45  # of about 225, by chance 75 each


def test_a_large_validation_holds_every_question_once():
    """All questions on a fifth of the 120 pairs, written out by another way than they are drawn."""
    split = science.split(0, num_train=10, num_val=1024)
    asked = {read_question(example.prompt)[:2] for example in split.val}
    assert len(asked) == 24
    everything = set()
    for substance, name in asked:
        value = Knowledge(0).truth(substance, name)
        everything.add(f"{name} of {substance}?")
        for choices in itertools.product(PROPERTIES[name], repeat=3):
            if len(set(choices)) == 3 and value in choices:
                a, b, c = choices
                everything.add(f"{name} of {substance}? {a}=a {b}=b {c}=c")
    assert len(split.val) == len(everything) < 1024
    assert {example.prompt for example in split.val} == everything
    assert len({example.prompt for example in split.shifted}) == len(split.shifted) == 1024
    assert len(science.split(0, num_train=10, num_val=2000).shifted) == 10 * (97 + 3 * 25)


def test_more_training_questions_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"num_train is 5000; science has about 2\d\d\d different questions"):
        science.split(0, num_train=5000, num_val=1)


def test_no_pair_and_no_shifted_substance_is_in_training():
    split = science.split(2, **SIZES)
    pairs = [{read_question(example.prompt)[:2] for example in part} for part in (split.train, split.val)]
    assert not pairs[0] & pairs[1]
    substances = [
        {read_question(example.prompt)[0] for example in part} for part in (split.train, split.val, split.shifted)
    ]
    assert substances[1] <= substances[0]
    assert not substances[0] & substances[2]


def test_a_worked_answer_by_hand_and_what_the_reward_says_of_others():
    knowledge = Knowledge(0)
    substance = knowledge.substances[0]
    kind = knowledge.class_of[substance]
    value = knowledge.laws[kind, "heat"]
    others = [each for each in PROPERTIES["heat"] if each != value][:2]
    question = Question(substance, "heat", (others[0], value, others[1]))
    assert question.prompt == f"heat of {substance}? {others[0]}=a {value}=b {others[1]}=c"
    assert Question(substance, "heat", (), True).prompt == f"{substance}: what heat?"
    response = f"{substance} {kind},{kind} {value}=b;b"
    assert science.work(knowledge, question) == response
    assert science.score([response], "b") == {"score": 1.0, "acc": 1.0, "well_formed": 1.0}
    for wrong in (response[:-1] + "c", response[:-1], response + " ", "b", response.replace(";", ",")):
        assert science.score([wrong], "b")["score"] == 0.0
    assert science.score(["b"], "b")["well_formed"] == 0.0
    short = Question(substance, "heat")
    assert science.work(knowledge, short) == f"{substance} {kind},{kind} {value};{value}"
    assert science.score([science.work(knowledge, short)], value)["score"] == 1.0


def test_the_science_teacher_errs_where_it_has_learned_wrongly():
    knowledge = Knowledge(0)
    assert (len(knowledge.wrong_class), len(knowledge.wrong_laws)) == (4, 9)
    teacher = science.Teacher(knowledge, np.random.default_rng(0), habit=0.75, slip=0.1)
    (kind, name), wrong = next(iter(knowledge.wrong_laws.items()))
    said = Counter(teacher.law(kind, name) for _ in range(4000))
    # 5 standard deviations of a share of 0.75 among 4000: 0.034
    assert said[wrong] / 4000 == pytest.approx(0.75, abs=0.035)
    assert set(said) == {wrong, knowledge.laws[kind, name]}
    sure = next(law for law in knowledge.laws if law not in knowledge.wrong_laws)
    said = Counter(teacher.law(*sure) for _ in range(4000))
    assert said[knowledge.laws[sure]] / 4000 == pytest.approx(0.9, abs=0.024)


# dialogue

GOAL = Goal("table", {"food": "thai", "day": "fri", "people": "4"}, ("food",))


def judge(turns, goal=GOAL):
    return dialogue.score(turns, goal.to_json())


@pytest.mark.parametrize(
    ("turns", "tcr", "acr", "gcr"),
    [
        (["day?", "people?", "ok thai fri 4"], 1, 1, 1),
        (["people?", "day?", "ok thai fri 4"], 1, 1, 1),
        (["ok thai fri 4"], 1, 0, 1),  # guessed, with luck
        (["day?", "ok thai fri 5"], 0, 0.5, 2 / 3),
        (["day?", "day?", "people?", "ok thai sat 4"], 0, 1, 2 / 3),
        (["day?", "people?", "ok thai fri"], 0, 1, 0),  # a slot is missing: nothing is booked
        (["day?", "people?", "ok fri thai 4"], 0, 1, 1 / 3),
        (["food?", "day?", "people?", "stars?", "nights?"], 0, 1, 0),
        (["day? people?", "ok thai fri 4 "], 0, 0, 0),
        ([], 0, 0, 0),
    ],
)
def test_completion_rates_by_hand(turns, tcr, acr, gcr):
    found = judge(turns)
    assert (found["tcr"], found["acr"], found["gcr"]) == pytest.approx((tcr, acr, gcr))
    assert found["score"] == found["acc"] == tcr


def test_with_nothing_to_ask_for_all_of_it_was_asked():
    assert judge(["ok thai fri 4"], Goal("table", GOAL.slots, ("food", "day", "people")))["acr"] == 1.0


def test_messages_by_hand():
    assert GOAL.prompt == "table food thai"
    assert GOAL.booking == "ok thai fri 4"
    shifted = Goal("taxi", {"from": "zoo", "to": "bank", "time": "8"}, ("from", "time"), True)
    assert shifted.prompt == "time 8 from zoo taxi"
    assert [BookingUser(goal).reply("day?" if goal is GOAL else "to?") for goal in (GOAL, shifted)] == [
        "fri",
        "uh bank",
    ]
    assert Goal.from_json(shifted.to_json()) == shifted


def test_the_user_answers_repeats_wonders_and_hangs_up():
    user = BookingUser(GOAL)
    assert [user.reply(turn) for turn in ("day?", "day?", "stars?", "hello")] == ["fri", "fri", "what?", "what?"]
    assert user.reply("people?") is None  # the fifth turn
    assert BookingUser(GOAL).reply("ok") is None
    assert BookingUser(GOAL).reply("ok thai fri 4") is None
    assert BookingUser(GOAL).reply("okay") == "what?"


def test_the_teacher_without_faults_books_what_is_wanted():
    rng = np.random.default_rng(0)
    for _ in range(300):
        goal = draw_goal(rng, list(SERVICES), shifted=False)
        said = converse(goal, rng, habit=0.0, slip=0.0)
        assert said[0] == goal.prompt
        found = judge(said[1::2], goal)
        assert (found["tcr"], found["acr"], found["gcr"]) == (1.0, 1.0, 1.0)
        assert len(said) == 2 + 2 * len(goal.needed)
        assert goal.service != "taxi" or goal.slots["from"] != goal.slots["to"]


def test_the_teacher_hardly_asks_for_the_day():
    rng = np.random.default_rng(0)
    asked = Counter()
    for _ in range(2000):
        said = converse(GOAL, rng, habit=0.75, slip=0.05)
        asked.update(turn for turn in said[1::2] if turn.endswith("?"))
    # 5 standard deviations: 0.048 and 0.024
    assert asked["day?"] / 2000 == pytest.approx(0.25, abs=0.05)
    assert asked["people?"] / 2000 == pytest.approx(0.95, abs=0.025)


def test_the_trained_services_and_the_shifted_ones():
    split = dialogue.split(0, **SIZES)
    goals = [[json.loads(example.truth) for example in part] for part in (split.train, split.val, split.shifted)]
    assert {goal["service"] for goal in goals[0] + goals[1]} == {"table", "taxi"}
    assert Counter(goal["service"] for goal in goals[2])["room"] > 15
    assert all(goal["shifted"] for goal in goals[2])


# reward


def test_the_reward_goes_by_data_source():
    turns = ["day?", "people?", "ok thai fri 4"]
    found = compute_score("dialogue_shifted", "whatever", GOAL.to_json(), {TURNS: np.array(turns, dtype=object)})
    assert found["score"] == 1.0
    assert compute_score("demo_addition", "0+0=0,0+0=0,1+1=2;200", "200")["score"] == 1.0
    assert compute_score("arithmetic_shifted", "0+0=0,1+2=3;30", "30")["score"] == 1.0
    assert compute_score("arithmetic_shifted", "0+0=0,1+2=3;30 ", "30")["score"] == 0.0  # as it was written
    assert compute_score("science", "bax metal,metal glows;b", "b", {})["score"] == 1.0


def test_what_the_reward_cannot_judge_is_named():
    with pytest.raises(
        ValueError, match=r"data_source is 'gsm8k'; allowed are demo_addition, arithmetic, science, dia"
    ):
        compute_score("gsm8k", "", "")
    for extra_info in (None, {}):
        with pytest.raises(ValueError, match=r"no 'dialogue_turns' for data_source 'dialogue'.*dialogue_agent"):
            compute_score("dialogue", "ok thai fri 4", GOAL.to_json(), extra_info)
