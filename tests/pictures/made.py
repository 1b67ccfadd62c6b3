# SPDX-License-Identifier: Apache-2.0
"""Answers with numbers that are easy to follow, and files of them."""

from pathlib import Path
from typing import Any

import numpy as np

from verl_dvpo.saved.values import LEVELS, Answer, Dump, path_of, write_dump

#: Quantiles of a standard uniform: each is its own level.
UNIFORM = np.asarray(LEVELS)


def answer(reward: float, length: int = 4, *, quantiles: Any = UNIFORM, heads: int = 2, **more: Any) -> Answer:
    """An answer with one distribution at every state, or one for each (T, J), and its reward at the end."""
    mask = np.ones(length, dtype=bool) if "mask" not in more else np.asarray(more.pop("mask"), dtype=bool)
    rewards = np.zeros(length)
    rewards[np.flatnonzero(mask)[-1:]] = reward
    whole = np.broadcast_to(np.asarray(quantiles, float), (length, len(LEVELS))).copy()
    fields: dict[str, Any] = {
        "ids": np.arange(length),
        "mask": mask,
        "quantiles": whole,
        "heads": np.stack([whole.mean(-1) + 0.01 * head for head in range(heads)], -1),
        "values": whole.mean(-1),
        "rewards": rewards,
        "realised": np.full(length, float(reward)),
        "advantages": np.linspace(-1, 1, length),
        "returns": np.full(length, float(reward)),
        "prompt": "1+1=",
        "pieces": tuple("abcdefghij"[token % 10] for token in range(length)),
    }
    return Answer(**{**fields, **more})


def falling(length: int, at: int, reward: float = 0.0) -> Answer:
    """An answer whose distribution falls by 0.5 at one token."""
    return answer(reward, length, quantiles=UNIFORM + np.where(np.arange(length) > at, -0.5, 0.0)[:, None])


def save_run(folder: Path, *dumps: Dump) -> Path:
    """A run's folder with these files."""
    for dump in dumps:
        write_dump(path_of(folder / "checkpoints", dump.step), dump)
    folder.mkdir(exist_ok=True)
    return folder


def story() -> Dump:
    """A step with a right answer, a wrong one that falls at its sixth token, one token alone, and one with a tool."""
    tool = answer(1.0, 5, mask=[1, 0, 0, 1, 1])
    facts = {"settings": {"critic.value.family": "quantile_ensemble", "data.seed": 7}}
    return Dump(10, (answer(1.0, 8), falling(9, 5), answer(0.0, 1), tool), facts)
