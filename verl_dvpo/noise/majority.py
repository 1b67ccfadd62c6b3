# SPDX-License-Identifier: Apache-2.0
"""Relabels a prompt's answers by their majority: ``noise.correction.kind=majority``.

The answers to a prompt vote. If one answer has more votes than any other, responses with that answer get the reward
``high`` and all others ``low``, whatever the given rewards were. Where two answers lead together, nothing is known, and
the given rewards stay. A response without an answer has no vote. It is the pseudo-label of test-time reinforcement
learning (arXiv 2504.16084), rebuilt; here it is a baseline against noisy rewards, because it does not read them.

Reward functions see one response at a time, so ``verl_dvpo.noise.reward`` leaves each answer beside its reward, and the
vote is held where a step's responses are together first, before anything learns from them.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from verl_dvpo.noise.config import PREFIX, noise_config
from verl_dvpo.noise.reward import ANSWER

KIND = "majority"


def relabelled(config: Any, keys: Sequence[str], infos: Sequence[dict[str, Any]]) -> list[float] | None:
    """Returns the rewards after the vote, one a sample; None where no majority is asked for.

    Args:
        config: of the run.
        keys: verl's names of the samples, ``<uid>_<number of the answer>_<number of its part>``.
        infos: what the reward function returned for each, with ``score`` and ``ANSWER``; one that the reward manager
            answered itself has no answer, and keeps its ``score``.
    """
    noise = noise_config(config.get(PREFIX))
    if noise is None or noise.correction.kind != KIND:
        return None
    places = [key.rsplit("_", 2)[:2] for key in keys]
    answers: dict[str, dict[str, str]] = defaultdict(dict)  # of each prompt, one vote for each response
    for (uid, session), info in zip(places, infos, strict=True):
        if info.get(ANSWER) is not None:
            answers[uid][session] = info[ANSWER]
    chosen = {uid: majority(list(votes.values())) for uid, votes in answers.items()}
    return [
        info.get("score", 0.0)
        if ANSWER not in info or chosen.get(uid) is None
        else (noise.high if info[ANSWER] == chosen[uid] else noise.low)
        for (uid, _), info in zip(places, infos, strict=True)
    ]


def majority(answers: Sequence[str]) -> str | None:
    """Returns the answer with more votes than any other; None where there is none."""
    first_two = Counter(answers).most_common(2)
    if not first_two or (len(first_two) == 2 and first_two[0][1] == first_two[1][1]):
        return None
    return first_two[0][0]
