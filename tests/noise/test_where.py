# SPDX-License-Identifier: Apache-2.0
"""Tests of ``noise.where`` and the steps of noise: where it acts, and that the rest stays clean."""

import math
import re

import numpy as np
import pytest
from samples import SOURCE, problem, question

from verl_dvpo.bench.tasks.reward import compute_score
from verl_dvpo.noise.config import noise_config
from verl_dvpo.noise.kinds import KINDS
from verl_dvpo.noise.reward import RewardFunctionError, with_noise
from verl_dvpo.noise.sample import canonical

NUMBERS = range(0, 900, 3)
STRONGEST = {
    "flip": {"rate": 1.0},
    "flip_asymmetric": {"false_positive": 1.0, "false_negative": 1.0},
    "gaussian": {"scale": 6.0},
    "heavy_tailed": {"family": "student_t", "tail": 1.5, "scale": 1.0},
    "preference_model": {"family": "student_t", "tail": 1.0, "scale": 1.0, "offset": 1.0},
    "inflation": {"amount": 1.0},
    "deflation": {"amount": 1.0},
    "length_bias": {"slope": 1.0, "reference": 10},
    "prompt_consistent": {"rate": 1.0, "agreement": 1.0},
    "reward_model": {"accuracy": 0.7},
    "dropout": {"rate": 1.0, "withheld": -1.0},
    "adversary": {"rate": 1.0},
}


def struck(settings: dict, numbers=NUMBERS, **origin) -> list[bool]:
    """Whether the score of each sample changed; odd numbers are right."""
    noisy = with_noise(compute_score, noise_config(settings), "demo")
    results = [noisy(**question(number, right=number % 2 == 1, **origin)) for number in numbers]
    assert [result["clean_score"] for result in results] == [float(number % 2) for number in numbers]
    assert [result["corrupted"] == 1.0 for result in results] == [r["score"] != r["clean_score"] for r in results]
    return [result["corrupted"] == 1.0 for result in results]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_acts_on_the_matching_prompts_alone(kind: str):
    matching = [str(problem(number).prompt)[0] in "56789" for number in NUMBERS]
    assert 100 < sum(matching) < 200
    plain = {"kind": kind, **STRONGEST[kind]}
    assert struck(plain) == [True] * len(NUMBERS)
    assert struck({**plain, "where": {"prompt_matches": "^[5-9]"}}) == matching


def test_a_sample_inside_gets_the_draw_that_it_has_without_a_condition():
    plain = {"kind": "heavy_tailed", "family": "stable", "tail": 1.2, "scale": 0.5}
    everywhere = with_noise(compute_score, noise_config(plain), "demo")
    inside = with_noise(compute_score, noise_config({**plain, "where": {"prompt_matches": "^[5-9]"}}), "demo")
    for number in NUMBERS:
        asked = question(number, right=True)
        wanted = everywhere(**asked)["score"] if 100 + number % 900 >= 500 else 1.0
        assert inside(**asked)["score"] == wanted


def test_the_last_user_message_decides():
    def acts(messages) -> bool:
        settings = {"kind": "flip", "rate": 1.0, "where": {"prompt_matches": "^7"}}
        return struck(settings, [1], prompt=canonical(messages))[0]

    user = {"role": "user", "content": "7+1"}
    assert acts([user])
    assert acts([{"role": "system", "content": "1"}, {"role": "user", "content": "1"}, user])
    assert acts([user, {"role": "assistant", "content": "1"}])
    assert not acts([user, {"role": "user", "content": "1+7"}])
    assert acts([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "7+1"}]}])
    assert not acts([{"role": "user", "content": ""}])
    with pytest.raises(
        RewardFunctionError,
        match=r"must have a message of role 'user' .*prompt_matches or noise.offset_pattern; mend",
    ):
        acts([{"role": "system", "content": "7"}])


def test_data_sources_and_conditions_together():
    flip = {"kind": "flip", "rate": 1.0}
    assert struck({**flip, "where": {"data_source": ["other", SOURCE]}}) == [True] * len(NUMBERS)
    assert struck({**flip, "where": {"data_source": ["other"]}}) == [False] * len(NUMBERS)
    by_prompt, by_share = {"prompt_matches": "^[5-9]"}, {"share": 0.5}
    both = np.array(struck({**flip, "where": {**by_prompt, **by_share}}))
    each = [np.array(struck({**flip, "where": condition})) for condition in (by_prompt, by_share)]
    assert (both == each[0] & each[1]).all()
    assert 0 < both.sum() < each[0].sum()


def test_a_share_of_prompts_is_the_same_at_every_step_and_for_every_response_and_grows():
    def where(share: float, seed: int = 0, **origin) -> np.ndarray:
        settings = {"kind": "flip", "rate": 1.0, "seed": seed, "where": {"share": share}}
        return np.array(struck(settings, range(2000), **origin))

    half = where(0.5)
    assert abs(half.mean() - 0.5) < 3.0 * math.sqrt(0.25 / 2000)
    assert (half == where(0.5, step=9, session=3)).all()
    assert not (where(0.2) & ~half).any()
    assert 0.4 < (half == where(0.5, seed=1)).mean() < 0.6
    assert not where(0.0).any()
    assert where(1.0).all()


def test_the_choice_of_prompts_says_nothing_about_the_draws_inside():
    settings = {"kind": "flip", "rate": 0.3, "scope": "prompt"}
    inside = np.array(struck({"kind": "flip", "rate": 1.0, "where": {"share": 0.5}}, range(4000)))
    struck_of = np.array(struck({**settings, "where": {"share": 0.5}}, range(4000)))
    assert abs(struck_of[inside].mean() - 0.3) < 3.0 * math.sqrt(0.3 * 0.7 / inside.sum())


@pytest.mark.parametrize(
    ("first", "last", "steps"),
    [(None, None, range(1, 8)), (3, None, range(3, 8)), (None, 5, range(1, 6)), (3, 5, range(3, 6)), (4, 4, [4])],
)
def test_noise_acts_from_its_first_step_to_its_last(first, last, steps):
    settings = {"kind": "flip", "rate": 1.0, "from_step": first, "until_step": last}
    assert [step for step in range(1, 8) if struck(settings, [1], step=step)[0]] == list(steps)


def test_a_sample_without_a_step_is_named_where_the_step_decides():
    with pytest.raises(RewardFunctionError, match=r"step of a sample is -1; it must be known with noise.from_step"):
        struck({"kind": "flip", "rate": 1.0, "from_step": 2}, [1], step=-1)
    assert struck({"kind": "flip", "rate": 1.0}, [1], step=-1) == [True]


def test_a_regular_expression_that_does_not_compile_is_named():
    said = r"noise.where.prompt_matches is '\^\[5-9'; it must be a regular expression that compiles, and re says: "
    with pytest.raises(ValueError, match=said) as caught:
        noise_config({"kind": "flip", "rate": 0.1, "where": {"prompt_matches": "^[5-9"}})
    assert re.search("unterminated character set", str(caught.value))


def test_a_rate_elsewhere_strikes_what_is_left_out():
    plain = {"kind": "heavy_tailed", "family": "student_t", "tail": 1.0, "scale": 1.0}
    inside = [str(problem(number).prompt)[0] in "56789" for number in NUMBERS]
    hits = struck({**plain, "rate": 1.0, "rate_elsewhere": 0.3, "where": {"prompt_matches": "^[5-9]"}})
    assert all(hit for hit, is_inside in zip(hits, inside, strict=True) if is_inside)
    # those that a rate of 0.3 strikes everywhere
    everywhere = struck({**plain, "rate": 0.3})
    outside = [(hit, alone) for hit, alone, within in zip(hits, everywhere, inside, strict=True) if not within]
    assert all(hit == alone for hit, alone in outside)
    assert 0 < sum(hit for hit, _ in outside) < len(outside)
    # and none outside the steps of the noise
    late = {**plain, "rate_elsewhere": 0.3, "from_step": 5}
    assert not any(struck({**late, "where": {"prompt_matches": "^x"}}))
