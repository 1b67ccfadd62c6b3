# SPDX-License-Identifier: Apache-2.0
"""Defines what a task is: prompts, a teacher, a reward and, for a dialogue, a simulated user.

A new task is one file that defines a ``Task`` and one line in ``registry.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

#: Suffix of the data source of a task's shifted validation.
SHIFTED = "_shifted"
#: verl's agent loop for tasks that are answered in one turn.
SINGLE_TURN_AGENT = "single_turn_agent"
#: Our agent loop for tasks with a simulated user; see ``agent_loop.py``.
DIALOGUE_AGENT = "dialogue_agent"
#: Key of ``extra_info`` under which the dialogue's agent loop leaves the assistant's turns, one string each.
TURNS = "dialogue_turns"

#: A user's first message, then by turns the assistant's and the user's messages.
Conversation = list[str]
#: Writes a demonstration on a fresh prompt that is in no validation. It ends with the assistant's turn.
Demonstrate = Callable[[np.random.Generator], Conversation]


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        source: data source: the task's name, followed by ``_shifted`` in the shifted validation.
        prompt: the user's first message.
        truth: what the reward compares a response with.
    """

    source: str
    prompt: str
    truth: str


@dataclass(frozen=True)
class Split:
    """A task's examples; the three parts are disjoint.

    Attributes:
        train: examples to train on.
        val: examples of the same kind.
        shifted: examples of another kind; empty if the task has none.
    """

    train: Sequence[Example]
    val: Sequence[Example]
    shifted: Sequence[Example] = ()

    @property
    def validations(self) -> list[Example]:
        """The examples that no demonstration may show."""
        return [*self.val, *self.shifted]


class User(Protocol):
    """A simulated user of one dialogue."""

    def reply(self, assistant: str) -> str | None:
        """Returns the answer to the assistant's message, or None when the dialogue is over."""


class DrawSplit(Protocol):
    """Draws a task's examples."""

    def __call__(self, seed: int, *, num_train: int, num_val: int) -> Split:
        """Draws ``num_train`` and ``num_val`` examples; the validations depend on ``seed`` and ``num_val`` only.

        Raises:
            ValueError: if a size is below 1, or if there are not enough examples.
        """


class MakeDemonstrator(Protocol):
    """Makes a task's teacher."""

    def __call__(self, seed: int, held_out: Split, *, habit: float, slip: float) -> Demonstrate:
        """Returns the teacher.

        Args:
            seed: of what the teacher knows.
            held_out: the split whose validations the teacher avoids.
            habit: probability in [0, 1] of an error where the teacher has learned something wrong.
            slip: probability in [0, 1] of an error anywhere else.
        """


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        name: of the task and of the data source of its rows.
        ability: verl's column of that name, for example ``math``.
        split: draws the prompts.
        demonstrator: makes the teacher whose demonstrations the warm start learns from.
        score: judges the assistant's turns (one string each; a task without a user has one turn) by an example's
            ``truth``. Returns at least ``score``, the reward (any finite number, partial credit included), and ``acc``,
            the number in [0, 1] that verl reports as validation accuracy. ``acc`` stays clean where noise corrupts the
            score. All further entries become validation metrics.
        user: makes the simulated user of a dialogue from an example's ``truth``; None for a task of one turn.
    """

    name: str
    ability: str
    split: DrawSplit
    demonstrator: MakeDemonstrator
    score: Callable[[Sequence[str], str], dict[str, float]]
    user: Callable[[str], User] | None = None

    @property
    def agent(self) -> str:
        """The name of the agent loop that rolls the task out."""
        return SINGLE_TURN_AGENT if self.user is None else DIALOGUE_AGENT


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1; choose a larger one")


def happens(rng: np.random.Generator, probability: float) -> bool:
    """Returns True with the given probability."""
    return bool(rng.random() < probability)


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    """Draws one of ``values`` uniformly."""
    return values[int(rng.integers(len(values)))]
