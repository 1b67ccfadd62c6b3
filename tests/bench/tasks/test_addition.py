# SPDX-License-Identifier: Apache-2.0
"""Compares the task with Python's own arithmetic, the teacher with counts, and the reward with wrong answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_dvpo.bench.tasks.addition import (
    LONGEST_RESPONSE,
    SHAKY_FACTS,
    Problem,
    Teacher,
    demonstrator,
    draw_problem,
    draw_problems,
    parse_answer,
    score,
    split,
    work,
)
from verl_dvpo.bench.tasks.task import Example, Split

NUMBERS = st.integers(100, 999)


def read_steps(response: str) -> tuple[list[tuple[list[int], int]], str]:
    """Summands and written sum of every step, and the answer; by splitting, without the module's own parser."""
    working, answer = response.split(";")
    steps = []
    for step in working.split(","):
        left, right = step.split("=")
        steps.append(([int(summand) for summand in left.split("+")], int(right)))
    return steps, answer


def is_correct(response: str, answer: str) -> bool:
    found = score([response], answer)
    assert found["score"] == found["acc"]
    return found["score"] == 1.0


def draw_many(count: int, seed: int = 3) -> list[Problem]:
    rng = np.random.default_rng(seed)
    return [draw_problem(rng) for _ in range(count)]


def has_shaky_fact(problem: Problem) -> bool:
    return any(
        (int(min(pair)), int(max(pair))) in SHAKY_FACTS for pair in zip(str(problem.a), str(problem.b), strict=True)
    )


@pytest.mark.parametrize(
    ("a", "b", "response"),
    [
        (347, 586, "7+6=13,4+8+1=13,3+5+1=9;933"),
        (100, 100, "0+0=0,0+0=0,1+1=2;200"),
        (999, 999, "9+9=18,9+9+1=19,9+9+1=19;1998"),
        (905, 95 + 100, "5+5=10,0+9+1=10,9+1+1=11;1100"),
    ],
)
def test_working_by_hand(a, b, response):
    assert work(Problem(a, b)) == response


def test_working_is_true_for_thousands_of_problems():
    for problem in draw_many(5000):
        steps, answer = read_steps(work(problem))
        assert answer == str(problem.a + problem.b) == problem.answer
        carry = 0
        for (summands, total), x, y in zip(steps, str(problem.a)[::-1], str(problem.b)[::-1], strict=True):
            assert summands == [int(x), int(y), 1][: 2 + carry]
            assert total == sum(summands)
            carry = total // 10


def test_longest_response_is_reached_and_not_passed():
    assert len(work(Problem(999, 999))) == LONGEST_RESPONSE
    teacher = Teacher(np.random.default_rng(0), habit=0.7, slip=0.5)
    assert max(len(work(problem, teacher)) for problem in draw_many(3000)) <= LONGEST_RESPONSE


def test_share_of_problems_without_a_shaky_fact():
    # By hand: 10 unordered pairs of distinct digits from 3 to 9 are 20 ordered ones; units and tens draw from 100
    # ordered pairs, hundreds from 81 (no zero): 0.8 * 0.8 * (61/81) = 0.4820
    assert len(SHAKY_FACTS) == 10
    assert all(0 < x < y for x, y in SHAKY_FACTS)
    digits, leading = range(10), range(1, 10)
    clean = sum((min(x, y), max(x, y)) not in SHAKY_FACTS for x in digits for y in digits) / 100
    clean_leading = sum((min(x, y), max(x, y)) not in SHAKY_FACTS for x in leading for y in leading) / 81
    assert clean * clean * clean_leading == pytest.approx(0.4820, abs=1e-4)
    problems = draw_many(20000)
    # Five standard deviations of a share of 20000: 5 * sqrt(0.482 * 0.518 / 20000) = 0.018
    assert np.mean([not has_shaky_fact(problem) for problem in problems]) == pytest.approx(0.482, abs=0.018)


def test_habit_alone_errs_exactly_on_shaky_facts():
    teacher = Teacher(np.random.default_rng(0), habit=1.0, slip=0.0)
    for problem in draw_many(2000):
        assert is_correct(work(problem, teacher), problem.answer) != has_shaky_fact(problem)
    # 8+3 is shaky: 10 for 11. The carry stays, 4+4+1 = 9; 2+2 = 4.
    assert work(Problem(248, 243), teacher) == "8+3=10,4+4+1=9,2+2=4;490"


def test_error_rates_are_those_asked_for():
    teacher = Teacher(np.random.default_rng(0), habit=0.8, slip=0.1)
    # 6000 draws: five standard deviations are 5 * sqrt(0.8 * 0.2 / 6000) = 0.026 and 5 * sqrt(0.09 / 6000) = 0.019
    shaky = np.array([teacher.error(8, 7, 15) for _ in range(6000)])
    assert set(shaky) == {-1, 0}
    assert (shaky == -1).mean() == pytest.approx(0.8, abs=0.026)
    other = np.array([teacher.error(2, 2, 4) for _ in range(6000)])
    assert (other == 0).mean() == pytest.approx(0.9, abs=0.019)
    assert (other == 1).mean() == pytest.approx(0.05, abs=0.014)
    assert {teacher.error(0, 0, 0) for _ in range(300)} == {0, 1}
    assert {teacher.error(9, 9, 19) for _ in range(300)} == {-1, 0}


def test_demonstrations_follow_from_their_own_steps():
    teacher = Teacher(np.random.default_rng(1), habit=0.8, slip=0.3)
    for problem in draw_many(2000):
        steps, answer = read_steps(work(problem, teacher))
        carry, value = 0, 0
        for place, (summands, total) in enumerate(steps):
            assert (len(summands) == 3) == (carry == 1)
            assert abs(total - sum(summands)) <= 1
            assert 0 <= total <= 19
            carry = total // 10
            value += total % 10 * 10**place
        assert int(answer) == value + 1000 * carry


@pytest.mark.parametrize("name", ["habit", "slip"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_probabilities_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        Teacher(np.random.default_rng(0), **{"habit": 0.5, "slip": 0.5, name: value})


@given(NUMBERS, NUMBERS)
def test_the_right_answer_is_accepted_with_and_without_true_steps(a, b):
    response = work(Problem(a, b))
    assert is_correct(response, str(a + b))
    assert is_correct(";" + str(a + b), str(a + b))


@given(NUMBERS, NUMBERS, st.integers(0, 28), st.sampled_from("0123456789+=,; x\n"))
def test_a_changed_character_in_the_answer_is_rejected(a, b, position, character):
    response = work(Problem(a, b))
    start = response.index(";")
    position = start + position % (len(response) - start)
    changed = response[:position] + character + response[position + 1 :]
    assert is_correct(changed, str(a + b)) == (changed == response)


@pytest.mark.parametrize(
    "response",
    ["", "933", ";", ";0933", ";933 ", " ;933", ";933\n", ";933;933", ";932,933", "7+6=13;+933", "3+5=8;-933", "x;933",
     ";९३३", "7+6=13,4+8+1=13,3+5+1=9;9330", "7+6=13,4+8+1=13,3+5+1=9;93", "7+6=13,4+8+1=13,3+5+1=9"],
)  # fmt: skip
def test_malformed_and_wrong_responses_are_rejected(response):
    assert not is_correct(response, "933")


def test_parse_answer_reads_wrong_answers_too():
    assert parse_answer("1+1=3,1+1=2,1+1=2;223") == "223"
    assert parse_answer("1+1=3,1+1=2,1+1=2;") is None


@pytest.mark.parametrize("seed", [0, 1])
def test_split_shares_no_problem_even_with_summands_swapped(seed):
    train, val = draw_problems(seed, num_train=4096, num_val=256)
    assert (len(train), len(val)) == (4096, 256)
    unordered = [frozenset((problem.a, problem.b)) for problem in train + val]
    assert len(set(unordered)) == 4096 + 256
    assert all(100 <= number <= 999 for problem in train + val for number in (problem.a, problem.b))


def test_split_depends_on_the_seed_alone_and_validation_not_on_the_training_size():
    assert draw_problems(5, num_train=100, num_val=20) == draw_problems(5, num_train=100, num_val=20)
    assert draw_problems(5, num_train=100, num_val=20)[1] == draw_problems(5, num_train=300, num_val=20)[1]
    assert draw_problems(5, num_train=100, num_val=20)[1] != draw_problems(6, num_train=100, num_val=20)[1]


@pytest.mark.parametrize(("num_train", "num_val"), [(0, 5), (5, 0), (5, -1), (40000, 1000)])
def test_impossible_sizes_are_named(num_train, num_val):
    with pytest.raises(ValueError, match=r"num_(train|val)"):
        draw_problems(0, num_train=num_train, num_val=num_val)


def test_examples_are_the_problems_and_there_is_no_shifted_part():
    train, val = draw_problems(2, num_train=30, num_val=10)
    parts = split(2, num_train=30, num_val=10)
    for problems, examples in ((train, parts.train), (val, parts.val)):
        assert [(f"{p.a}+{p.b}=", str(p.a + p.b)) for p in problems] == [(e.prompt, e.truth) for e in examples]
        assert {example.source for example in examples} == {"demo_addition"}
    assert parts.shifted == ()
    assert parts.validations == list(parts.val)


def test_held_out_problems_are_skipped_in_either_order():
    def first(count, held_out):
        rng, demonstrate = np.random.default_rng(7), demonstrator(0, held_out, habit=0.0, slip=0.0)
        return [demonstrate(rng)[0] for _ in range(count)]

    nothing = Split(train=[], val=[])
    shown = first(40, nothing)
    swapped = ["+".join(reversed(prompt[:-1].split("+"))) + "=" for prompt in shown[::2]]
    without = first(40, Split(train=[], val=[Example("demo_addition", prompt, "") for prompt in swapped]))
    assert not {*shown[::2], *swapped} & set(without)
    # The others stay, in their order, and fresh ones follow.
    assert without[:20] == shown[1::2]
