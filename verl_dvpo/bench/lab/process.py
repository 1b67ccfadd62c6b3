# SPDX-License-Identifier: Apache-2.0
"""Defines token processes whose return distribution is known: a Markov chain over tokens with a terminal reward.

At step t the policy writes token +1 with probability p, else −1; the state (t, x) is the step and the sum of tokens so
far, x in {−t, −t+2, ..., t}. After T tokens the reward is drawn given x_T from A atoms. Undiscounted, so the return of
every state is that reward, and dynamic programming backward over t gives its distribution exactly.

Shapes: B sequences, T tokens, S = T(T+1)/2 states before the last token, E = T+1 end points, A atoms of the reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

NOISES = ("clean", "flip", "heavy")
#: Share of labels that ``flip`` inverts.
FLIP_RATE = 0.3
#: ``heavy`` adds HEAVY_SCALE times a Student-t variable of HEAVY_DF degrees of freedom: mean 0, infinite variance.
HEAVY_DF = 1.5
HEAVY_SCALE = 0.3


@dataclass(frozen=True)
class TokenProcess:
    """The chain and its reward.

    Attributes:
        name: for tables.
        atoms: (A,) possible rewards, ascending.
        end_probs: (E, A) probability of each atom given the number of +1 tokens, rows summing to 1.
        up: p in (0, 1), the probability of token +1.
    """

    name: str
    atoms: Array
    end_probs: Array
    up: float = 0.5

    @property
    def length(self) -> int:
        """T."""
        return self.end_probs.shape[0] - 1

    @property
    def num_states(self) -> int:
        """S."""
        return self.length * (self.length + 1) // 2

    def truth(self) -> Array:
        """Returns the exact distribution of the return of each state, by dynamic programming: (S, A)."""
        following = self.end_probs
        layers = []
        for t in range(self.length - 1, -1, -1):
            following = (1 - self.up) * following[: t + 1] + self.up * following[1 : t + 2]
            layers.append(following)
        return np.concatenate(layers[::-1])

    def visits(self) -> Array:
        """Returns how often a token is predicted from each state, summing to 1: (S,)."""
        layers = [stats.binom.pmf(np.arange(t + 1), t, self.up) for t in range(self.length)]
        return np.concatenate(layers) / self.length

    def sample(self, batch: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], Array]:
        """Draws B sequences: the index (B, T) of the state that predicts each token, and clean rewards (B,)."""
        ups = rng.random((batch, self.length)) < self.up
        count = np.concatenate([np.zeros((batch, 1), dtype=np.int64), ups.cumsum(1)], axis=1)
        t = np.arange(self.length)
        states = t * (t + 1) // 2 + count[:, :-1]
        cumulative = self.end_probs.cumsum(1)[count[:, -1]]
        drawn = (rng.random((batch, 1)) > cumulative).sum(1).clip(max=self.atoms.shape[0] - 1)
        return states, self.atoms[drawn]

    def corrupted(self, noise: str) -> TokenProcess:
        """Returns the process that a critic sees under ``noise``; under ``heavy``, which is no such process, itself."""
        if noise == "flip":
            seen = (1 - FLIP_RATE) * self.end_probs + FLIP_RATE * self.end_probs[:, ::-1]
            return TokenProcess(self.name, self.atoms, seen, self.up)
        return self


def corrupt(rewards: Array, noise: str, atoms: Array, rng: np.random.Generator) -> Array:
    """Returns the corrupted rewards (B,).

    Args:
        rewards: (B,) clean.
        noise: ``clean`` (nothing), ``flip`` (a share ``FLIP_RATE`` of two-valued labels inverted), ``heavy`` (a
            Student-t variable of mean 0 and infinite variance added to each).
        atoms: (A,) the possible rewards; ``flip`` needs A = 2.
        rng: drawn from even for ``clean``, so that later draws do not depend on the noise.

    Raises:
        ValueError: the noise is unknown, or ``flip`` is asked for a reward that has more than two values.
    """
    if noise not in NOISES:
        raise ValueError(f"noise is {noise!r}; allowed are {', '.join(NOISES)}; choose one of them")
    if noise == "flip" and atoms.shape[0] != 2:
        raise ValueError(f"noise is 'flip'; it needs a reward of 2 values, not {atoms.shape[0]}; choose another noise")
    flips = rng.random(rewards.shape) < FLIP_RATE
    heavy = HEAVY_SCALE * rng.standard_t(HEAVY_DF, rewards.shape)
    if noise == "flip":
        return np.where(flips, atoms.sum() - rewards, rewards)
    return rewards + heavy if noise == "heavy" else rewards


def bernoulli_walk(length: int = 9) -> TokenProcess:
    """Returns the process with reward 1 if x_T > 0, else 0: a verifier's label (docs/method.md, section 3, T = 9)."""
    ends = 2 * np.arange(length + 1) - length
    positive = (ends > 0).astype(float)
    return TokenProcess("bernoulli", np.array([0.0, 1.0]), np.stack([1 - positive, positive], 1))


def skewed_walk(length: int = 9, points: int = 64) -> TokenProcess:
    """Returns the process with reward x_T/T + 0.3·(E − 1), E exponential: a score with a long upper tail.

    E takes the ``points`` midpoint quantiles of the exponential distribution, equally likely, so that the truth is
    finite and exact; 0.3 is about the spread that the walk itself gives (1/√T).
    """
    exponential = stats.expon.ppf((np.arange(points) + 0.5) / points)
    ends = (2 * np.arange(length + 1) - length) / length
    values = (ends[:, None] + 0.3 * (exponential - 1)).ravel()
    atoms, place = np.unique(values, return_inverse=True)
    end_probs = np.zeros((length + 1, atoms.shape[0]))
    rows = np.repeat(np.arange(length + 1), points)
    np.add.at(end_probs, (rows, place.ravel()), 1 / points)
    return TokenProcess("skewed", atoms, end_probs)


PROCESSES = {"bernoulli": bernoulli_walk, "skewed": skewed_walk}
