# SPDX-License-Identifier: Apache-2.0
"""Chooses which answers to show, and says by what rule: the eye should know what was looked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl_dvpo.saved.values import LEVELS, Answer, Dump

MEDIAN = LEVELS.index(0.5)


@dataclass(frozen=True)
class Shown:
    """An answer to show.

    Attributes:
        step: of training; -1 where it is not known.
        answer: what the critic believed along it.
        why: the rule that chose it.
    """

    step: int
    answer: Answer
    why: str


def median_of(answer: Answer) -> np.ndarray:
    """(V,): the median at each valid token of an answer."""
    return answer.quantiles[answer.mask, MEDIAN].astype(float)


def fall(answer: Answer) -> float:
    """Returns by how much the median falls from its highest state to the last, in units of reward."""
    return float((median := median_of(answer)).max() - median[-1])


def rise(answer: Answer) -> float:
    """Returns by how much the median rises from its lowest state to the last, in units of reward."""
    return float((median := median_of(answer))[-1] - median.min())


def choose_answers(dumps: Sequence[Dump], count: int) -> list[Shown]:
    """Chooses up to ``count`` answers.

    First one that goes right and one that goes wrong: of the highest and of the lowest reward, in the later half of the
    dumps where there is one, those in which the median rises and falls most. Then others that nobody looked for: the
    first answer of the last dump, of the first, and of those between; where these are too few, the second of each, ...
    """
    everyone = [
        (place, dump.step, each) for place, dump in enumerate(dumps) for each in dump.answers if each.mask.any()
    ]
    if not everyone:
        return []
    rewards = [answer.reward for _, _, answer in everyone]
    best, worst = max(rewards), min(rewards)
    chosen: list[Shown] = []
    if worst < best:
        for extreme, word, moves, rule in ((best, "highest", rise, "rises"), (worst, "lowest", fall, "falls")):
            same = [each for each in everyone if np.isclose(each[2].reward, extreme)]
            late = [each for each in same if each[0] >= len(dumps) // 2] or same
            _, step, answer = max(late, key=lambda each: moves(each[2]))
            chosen.append(Shown(step, answer, f"of those with the {word} reward, the one whose median {rule} most"))
    chosen += _others(everyone, len(dumps), count, [each.answer for each in chosen])
    return chosen[:count]


def _others(
    everyone: Sequence[tuple[int, int, Answer]], dumps: int, count: int, taken: Sequence[Answer]
) -> list[Shown]:
    """Takes answers by their place alone: the first of some dumps, then the second of each, and so on."""
    order = np.linspace(dumps - 1, 0, num=min(dumps, count)).round().astype(int).tolist()
    of_dump = {place: [each[1:] for each in everyone if each[0] == place] for place in dict.fromkeys(order)}
    return [
        Shown(step, answer, f"number {turn + 1} of those that were written in this step")
        for turn in range(max(map(len, of_dump.values())))
        for step, answer in (rows[turn] for rows in of_dump.values() if turn < len(rows))
        if not any(answer is each for each in taken)
    ]
