# SPDX-License-Identifier: Apache-2.0
"""Addition prompts with right and wrong responses, asked in the way of verl's reward managers."""

import random
from collections.abc import Iterator
from typing import Any

from verl_dvpo.bench.tasks.addition import Problem, work
from verl_dvpo.bench.tasks.reward import compute_score
from verl_dvpo.noise.config import noise_config
from verl_dvpo.noise.reward import to_extra_info, with_noise
from verl_dvpo.noise.sample import Origin, canonical

SOURCE = "demo_addition"


def problem(number: int) -> Problem:
    """A different one for each number below 810,000."""
    return Problem(100 + number % 900, 100 + number // 900)


def response(asked: Problem, *, right: bool) -> str:
    """The worked response, or one that ends in a sum one too large."""
    worked = work(asked)
    return worked if right else f"{worked.split(';')[0]};{int(asked.answer) + 1}"


def question(number: int, *, right: bool, text: str | None = None, **origin: Any) -> dict[str, Any]:
    """The keyword arguments of a reward function for one sample."""
    asked = problem(number)
    place = {"validate": False, "step": 1, "session": 0, "length": 20, "uid": f"uid-{number}", "index": str(number)}
    return {
        "data_source": SOURCE,
        "solution_str": response(asked, right=right) if text is None else text,
        "ground_truth": asked.answer,
        "extra_info": to_extra_info(
            {"split": "train", "index": number},
            Origin(**{"prompt": canonical([{"role": "user", "content": asked.prompt}]), **place, **origin}),
        ),
    }


def questions(count: int, pass_rate: float = 0.5, **origin: Any) -> Iterator[tuple[bool, dict[str, Any]]]:
    """`count` samples of different prompts, a share `pass_rate` of them right, spread evenly; each with its verdict."""
    for number in range(count):
        right = int((number + 1) * pass_rate) > int(number * pass_rate)
        yield right, question(number, right=right, **origin)


SETTINGS = (
    {"kind": "flip", "rate": 0.3},
    {"kind": "heavy_tailed", "family": "stable", "tail": 1.2, "scale": 0.5},
    {"kind": "prompt_consistent", "rate": 0.6},
    {"kind": "reward_model", "accuracy": 0.718},
    {"kind": "adversary", "rate": 0.3, "pass_rate": 0.3},
)


def one_worker(numbers: list[int]) -> dict[tuple[int, int], float]:
    """What a reward worker makes of these samples, in this order, under each of `SETTINGS`."""
    functions = [with_noise(compute_score, noise_config(settings), "demo") for settings in SETTINGS]
    return {
        (which, number): function(**question(number, right=number % 3 == 0, step=number % 5, uid=str(random.random())))[
            "score"
        ]
        for which, function in enumerate(functions)
        for number in numbers
    }
