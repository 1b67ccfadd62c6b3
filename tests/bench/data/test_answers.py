# SPDX-License-Identifier: Apache-2.0
"""What counts as the answer of a response, for letters, short texts and mathematics."""

import os
import time

import pytest

from verl_dvpo.bench.data.answers import after_thinking, chosen_letter, last_boxed, normalised, short_answer
from verl_dvpo.bench.data.equivalence import judge, judge_exact
from verl_dvpo.bench.data.helper import Helper, HelperError
from verl_dvpo.bench.data.reward import compute_score
from verl_dvpo.bench.tasks.task import TURNS


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{ }", r"\{"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\fbox{5}", None),
        (r"\boxed {6}", "6"),
        ("no box", None),
        (r"\boxed{}", ""),
    ],
)
def test_last_boxed(text, box):
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("response", "rest"), [("a", "a"), ("<think>a</think>b", "b"), ("a</think>b</think>c", "c"), ("<think>a", "")]
)
def test_after_thinking(response, rest):
    assert after_thinking(response) == rest


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("Answer: C", "C"),
        ("answer: c", None),
        ("The answer is (B).", "B"),
        ("**Answer:** **D**", "D"),
        ("Answer: A\nNo, wait.\nAnswer: B", "B"),
        ("The correct answer is option E because it fits.", "E"),
        (r"\boxed{C}", "C"),
        (r"Answer: A, so \boxed{\text{B}}", "B"),
        (r"\boxed{\textbf{(D) } 12}", "D"),
        (r"\boxed{12}", None),
        ("I compare them.\nC.", "C"),
        ("Answer: None of them", None),
        ("The answer is A good one", None),
        ("The answer is A.", "A"),
        ("A long story about B", None),
        ("<think>Answer: B</think>Answer: C", "C"),
        ("<think>Answer: B", None),
        ("Answer: K", None),
        ("", None),
    ],
)
def test_chosen_letter(response, letter):
    assert chosen_letter(response, options=10) == letter


def test_without_a_number_of_options_every_letter_counts():
    assert chosen_letter("Answer: K") == "K"
    assert chosen_letter("Answer: E", options=4) is None


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("It flows there.\nAnswer: The Rhine", "The Rhine"),
        ("**Answer:** the Rhine.", "the Rhine."),
        ("The answer is Rhine", "Rhine"),
        ("Answer:\nRhine", "Rhine"),
        ("Rhine", "Rhine"),
        ("Some words.\nRhine", "Rhine"),
        (r"Answer: \boxed{\text{Rhine}}", "Rhine"),
        ("<think>Main?</think>\n\nAnswer: Rhine\n", "Rhine"),
        ("", None),
        ("<think>Rhine", None),
    ],
)
def test_short_answer(response, answer):
    assert short_answer(response) == answer


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("The Rhine", "rhine.", True),
        ("São Tomé", "sao tome", True),
        ("1,234,567", "1234567", True),
        ("1,23", "123", False),
        ("-5", "5", False),
        ("3.14", "314", False),
        ("Jean-Paul  Sartre", "Jean Paul Sartre", True),
        ("“An Ode”", "ode", True),
        ("north", "south", False),
    ],
)
def test_normalised_texts(left, right, same):
    assert (normalised(left) == normalised(right)) == same


@pytest.mark.parametrize(
    ("response", "truth", "verdict"),
    [
        (r"So \boxed{0.5}.", r"\frac12", (True, True)),
        (r"First \boxed{\frac12}, no: \boxed{3}", r"\frac12", (True, False)),
        (r"First \boxed{3}, no: \boxed{4}", "4", (True, True)),
        (r"<think>\boxed{3}</think> It is \boxed{4}.", "4", (True, True)),
        (r"<think>\boxed{4}", "4", (False, False)),
        (r"\boxed{27}", "27.0", (True, True)),
        (r"\boxed{1,000}", "1000", (True, True)),
        (r"\boxed{060}", "60", (True, True)),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", (True, True)),
        ("The final answer is $42$.", "42", (True, True)),
        (r"\boxed{}", "1", (False, False)),
        ("no answer", "1", (False, False)),
        (r"\boxed{7}", "__NoCorrectAnswer__", (True, False)),
        (r"\boxed{7}", "", (True, False)),
    ],
)
def test_mathematics_is_judged_by_math_verify(response, truth, verdict):
    assert judge(response, truth) == verdict


def test_words_or_mathematics():
    assert judge_exact("Answer: the Euler class", "Euler class") == (True, True)
    assert judge_exact("Answer: $\\frac{2}{4}$", "1/2") == (True, True)
    assert judge_exact("Answer: the Chern class", "Euler class") == (True, False)
    assert judge_exact("", "Euler class") == (False, False)


def scores(source, response, truth, **info):
    found = compute_score(source, response, truth, info, reward_router_address=None)
    assert found["score"] == found["acc"]
    return found["score"], found["answered"]


def test_rewards_of_the_sets():
    assert scores("math500", r"\boxed{\frac{2}{4}}", r"\frac{1}{2}") == (1.0, 1.0)
    assert scores("light_r1", r"\boxed{3}", r"\frac{1}{2}") == (0.0, 1.0)
    assert scores("supergpqa", "Answer: J", "J", options=10) == (1.0, 1.0)
    assert scores("gpqa", "Answer: J", "A", options=4) == (0.0, 0.0)
    assert scores("simpleqa", "Answer: the Rhine.", "Rhine") == (1.0, 1.0)
    assert scores("simpleqa", "It may be the Rhine or the Main.", "Rhine") == (0.0, 1.0)
    assert scores("hle", "Answer: B", "B", grader="choice", options=0) == (1.0, 1.0)
    assert scores("hle", "Answer: 0.5", "1/2") == (1.0, 1.0)


def test_rewards_say_what_is_wrong():
    with pytest.raises(ValueError, match="grader is 'judge'"):
        compute_score("hle", "a", "b", {"grader": "judge"})
    with pytest.raises(ValueError, match="NAME is 'gsm8k'"):
        compute_score("gsm8k", "a", "b")
    with pytest.raises(ValueError, match=f"extra_info has no '{TURNS}'"):
        compute_score("service_dialogue", "a", "{}", {})


def test_without_math_verify_there_is_no_silent_zero(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'verl-dvpo\[data\]'"):
        compute_score("math500", r"\boxed{1}", "1")


def test_the_helper_ends_what_runs_too_long_and_goes_on():
    helper = Helper()
    try:
        first = helper.run(os.getpid, seconds=30)
        assert first != os.getpid()
        assert helper.run(os.getpid, seconds=30) == first
        start = time.monotonic()
        with pytest.raises(HelperError, match=r"sleep ran for more than 0\.2 s"):
            helper.run(time.sleep, 60, seconds=0.2)
        assert time.monotonic() - start < 30
        with pytest.raises(ZeroDivisionError):
            helper.run(divmod, 1, 0, seconds=30)
        with pytest.raises(HelperError, match="died"):
            helper.run(os._exit, 3, seconds=30)
        assert helper.run(os.getpid, seconds=30) != first
    finally:
        helper.close()
