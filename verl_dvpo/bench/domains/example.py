# SPDX-License-Identifier: Apache-2.0
"""What the three domains have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

#: The data sources of a domain's validation are ``<domain>`` and ``<domain>`` with this behind it.
SHIFTED = "_shifted"


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        source: data source; the domain's name, with `SHIFTED` behind it where the example is out of the domain.
        prompt: the user's first message.
        truth: what the reward is judged by.
    """

    source: str
    prompt: str
    truth: str

    @property
    def domain(self) -> str:
        """The name of the domain that judges it."""
        return self.source.removesuffix(SHIFTED)


@dataclass(frozen=True)
class Split:
    """A domain's examples; no prompt is in two of the three."""

    train: Sequence[Example]
    val: Sequence[Example]
    shifted: Sequence[Example]


#: A conversation from the user's first message to the assistant's last, which alternate.
Conversation = list[str]
#: Writes a worked demonstration with errors in it, on a fresh prompt that is in no validation.
Demonstrate = Callable[[np.random.Generator], Conversation]


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def happens(rng: np.random.Generator, probability: float) -> bool:
    """True with this probability."""
    return bool(rng.random() < probability)


def pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    """One of `values`, each as likely."""
    return values[int(rng.integers(len(values)))]
