# SPDX-License-Identifier: Apache-2.0
"""Tests of the wrapper: its arguments, its answers, and its errors when the wrapped function misbehaves."""

import asyncio
import inspect
import multiprocessing
import random

import numpy as np
import pytest
import torch
from ray import cloudpickle
from samples import SETTINGS, SOURCE, one_worker, question, questions
from verl.utils.reward_score import default_compute_score

from verl_dvpo.bench.tasks.reward import compute_score
from verl_dvpo.noise.config import noise_config
from verl_dvpo.noise.reward import RewardFunctionError, with_noise
from verl_dvpo.noise.sample import ORIGIN

ALWAYS = {"kind": "flip", "rate": 1.0}
FLIPPED = {"score": 0.0, "acc": 1.0, "clean_score": 1.0, "corrupted": 1.0, "clean_pass": 1.0, "noisy_pass": 0.0}


def noisy(inner, settings=ALWAYS, name="rewards.py:mine"):
    return with_noise(inner, noise_config(settings), name)


def test_the_wrapped_function_is_asked_as_without_noise():
    heard = {}

    def inner(**asked):
        heard.update(asked)
        return 1.0

    asked = {**question(5, right=True), "reward_router_address": "host:1"}
    noisy(inner)(**asked)
    assert heard == {**asked, "extra_info": {"split": "train", "index": 5}}
    assert ORIGIN in asked["extra_info"], "what came in is not changed"


def test_the_demo_reward_inside_keeps_what_it_returned():
    assert noisy(compute_score)(**question(5, right=True)) == FLIPPED | {"well_formed": 1.0}


def test_verls_default_reward_inside():
    asked = {**question(5, right=True, text="#### 72"), "data_source": "openai/gsm8k", "ground_truth": "72"}
    assert default_compute_score("openai/gsm8k", "#### 72", "72") == 1.0
    assert noisy(default_compute_score)(**asked) == FLIPPED


@pytest.mark.parametrize("answer", [1.0, True, 1, np.float32(1.0), torch.tensor(1.0), {"score": 1.0, "note": "x"}])
def test_in_a_validation_the_answer_is_the_wrapped_functions_own(answer):
    assert noisy(lambda **_: answer)(**question(5, right=True, validate=True)) is answer
    assert noisy(lambda **_: answer)(**question(5, right=True, validate=False))["score"] == 0.0


def test_coroutine_functions_stay_coroutine_functions():
    calls = []

    async def inner(**asked):
        calls.append(asked["ground_truth"])
        await asyncio.sleep(0)
        return 1.0

    wrapped = noisy(inner)
    assert inspect.iscoroutinefunction(wrapped)
    assert not inspect.iscoroutinefunction(noisy(compute_score))
    assert asyncio.run(wrapped(**question(5, right=True)))["score"] == 0.0
    assert asyncio.run(wrapped(**question(5, right=True, validate=True))) == 1.0
    assert len(calls) == 2


def raising(**_):
    raise KeyError("answer")


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (raising, "raised KeyError: 'answer'"),
        (lambda **_: None, "is None of type NoneType"),
        (lambda **_: "1.0", "is '1.0' of type str"),
        (lambda **_: (1.0, 2.0), "of type tuple"),
        (lambda **_: np.ones(2), "of type ndarray"),
        (lambda **_: {"acc": 1.0}, "is a dict with ['acc']; it must have 'score'"),
        (lambda **_: {"score": "high"}, "is 'high' of type str"),
        (lambda **_: float("nan"), "is nan; it must be a finite number"),
        (lambda **_: {"score": -np.inf}, "is -inf; it must be a finite number"),
    ],
)
def test_errors_name_function_data_source_and_sample(inner, said, validate):
    with pytest.raises(RewardFunctionError) as caught:
        noisy(inner)(**question(5, right=True, step=7, session=3, validate=validate))
    message = str(caught.value)
    for part in (said, "rewards.py:mine", repr(SOURCE), "uid 'uid-5'", "index '5'", "step 7", "rollout 3"):
        assert part in message
    if inner is raising:
        assert isinstance(caught.value.__cause__, KeyError)


def test_coroutine_functions_that_raise_are_named_too():
    async def inner(**_):
        raise TimeoutError("no answer")

    with pytest.raises(RewardFunctionError, match=r"rewards.py:mine raised TimeoutError: no answer .*index '5'"):
        asyncio.run(noisy(inner)(**question(5, right=True)))


@pytest.mark.parametrize(
    ("settings", "score", "said"),
    [
        (ALWAYS, -1.0, r"score is -1.0; it must be in \[noise.low, noise.high\] = \[0.0, 1.0\]"),
        ({"kind": "reward_model", "accuracy": 0.7}, 1.5, "score is 1.5; it must be in"),
        (
            {"kind": "adversary", "rate": 0.1, "pass_rate_key": "solved"},
            1.0,
            "noise.pass_rate_key is 'solved'; it must be a key of",
        ),
        (
            {"kind": "adversary", "rate": 0.1, "pass_rate_key": "split"},
            1.0,
            r"extra_info.split is \'train\'; it must be .*\[0, 1\]",
        ),
        (
            {"kind": "prompt_consistent", "rate": 1.0, "wrong_answer_key": "vote"},
            0.0,
            "wrong_answer_key is 'vote'; it must be",
        ),
    ],
)
def test_samples_that_do_not_fit_the_corruption_are_named(settings, score, said):
    with pytest.raises(RewardFunctionError, match=said) as caught:
        noisy(lambda **_: score, settings)(**question(5, right=True))
    assert "index '5'" in str(caught.value)


def test_a_sample_without_its_origin_is_refused():
    asked = {**question(5, right=True), "extra_info": {"split": "test"}}
    with pytest.raises(RewardFunctionError, match="tell training from validation"):
        noisy(compute_score)(**asked)


def test_one_and_four_worker_processes_and_any_order_corrupt_alike():
    numbers = list(range(400))
    alone = one_worker(numbers)
    random.Random(0).shuffle(numbers)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        parts = pool.map(one_worker, [numbers[:30], numbers[30:100], numbers[100:250], numbers[250:]], chunksize=1)
    together = {key: score for part in parts for key, score in part.items()}
    assert together == alone
    assert len(set(alone.values())) > 400, "there is noise to agree on"


def test_a_resumed_run_corrupts_as_an_uninterrupted_one():
    def steps(first: int, last: int) -> list[list[float]]:
        wrapped = noisy(compute_score, SETTINGS[0])  # a new process starts with a new wrapper
        return [
            [wrapped(**sample)["score"] for _, sample in questions(50, step=step)] for step in range(first, last + 1)
        ]

    whole = steps(1, 6)
    assert steps(1, 3) + steps(4, 6) == whole
    assert len({tuple(scores) for scores in whole}) == 6, "steps differ"


def test_wrapped_functions_reach_other_processes():
    # verl's manager `remote` hands its reward function to Ray actors, which pickle it so
    for answer in (compute_score, lambda **_: 1.0):
        there = cloudpickle.loads(cloudpickle.dumps(noisy(answer)))
        assert there(**question(5, right=True))["score"] == 0.0
