# SPDX-License-Identifier: Apache-2.0
"""Measures how much of the variance of Monte-Carlo returns critics explain, and how much a prompt tells at most.

Shapes: B responses, T tokens of the longest response, P prompts, K responses to each of them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_dvpo.bench.gate.fit import FitConfig, fit_critic
from verl_dvpo.bench.gate.rollouts import Rollouts, sample
from verl_dvpo.bench.tasks.conversation import limited_threads
from verl_dvpo.bench.tasks.task import Example, Task
from verl_dvpo.families.base import FamilyConfig

#: Columns of the measurements: one number a row. ``critic`` is empty for what no critic is needed for.
COLUMNS = ["task", "critic", "seed", "quantity", "position", "value"]
#: Columns of the table that says how.
SETTINGS = ["task", "setting", "value"]
#: Names in the column ``quantity``.
FIRST, ALL, AT, BETWEEN, MEAN, DEVIATION, LENGTH = (
    "explained at the first token",
    "explained over all tokens",
    "explained at a position",
    "share between prompts",
    "mean reward",
    "standard deviation of the reward",
    "tokens of a response",
)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a measurement.

    Attributes:
        fitted: prompts with one response each that a critic is fitted to, at least 1.
        prompts: P held-out prompts, at least 2.
        answers: K responses to each of those, at least 2.

    Raises:
        ValueError: a number is too small.
    """

    fitted: int = 3072
    prompts: int = 256
    answers: int = 8

    def __post_init__(self) -> None:
        for name, least in (("fitted", 1), ("prompts", 2), ("answers", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}; choose a larger one")


@dataclass(frozen=True)
class Policy:
    """A warm-started policy on its task.

    Attributes:
        task: judges responses.
        model, tokenizer: the policy.
        longest: tokens that a response may have.
        train: prompts that critics are fitted on.
        held_out: other prompts.
    """

    task: Task
    model: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    longest: int
    train: Sequence[Example]
    held_out: Sequence[Example]


def explained(values: Tensor, returns: Tensor) -> float:
    """Computes 1 - Σ(R - V)² / Σ(R - mean of R)²; NaN where the returns do not vary.

    Args:
        values: (L,) of a critic.
        returns: (L,) Monte-Carlo returns.
    """
    r, v = returns.double(), values.double()
    total = (r - r.mean()).square().sum()
    return float(1.0 - (r - v).square().sum() / total) if total > 0 else math.nan


def between_share(rewards: Tensor) -> float:
    """Computes the share of the variance of rewards that lies between prompts: what a critic of prompts can explain.

    With MSW the mean of the variances of each prompt's rewards (unbiased), and MSB the variance of the prompts' means,
    it is (MSB - MSW/K) / (MSB - MSW/K + MSW), without the bias that few responses have. It may fall below 0 where the
    prompts do not differ. NaN where no reward varies.

    Args:
        rewards: (P, K), P and K at least 2.
    """
    within = float(rewards.double().var(dim=1).mean())
    between = float(rewards.double().mean(dim=1).var()) - within / rewards.shape[1]
    return between / (between + within) if between + within > 0 else math.nan


def measure(
    policy: Policy,
    critics: Mapping[str, FamilyConfig],
    *,
    sizes: Sizes,
    fit: FitConfig,
    seeds: Sequence[int],
    note: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Fits each critic to rollouts of each seed and measures it on held-out ones.

    A seed has prompts, responses, first weights and order of its own. All critics of a seed see the same rollouts.

    Args:
        policy: what is measured.
        critics: name -> settings of its family.
        sizes: how many rollouts.
        fit: how critics are fitted; its seed is replaced.
        seeds: at least one.
        note: is told what was measured.

    Returns:
        One number a row, with ``COLUMNS``.

    Raises:
        ValueError: there are fewer prompts than ``sizes`` asks for, or all rewards of a seed are equal.
    """
    rows: list[tuple] = []
    for seed in seeds:
        train, held_out = draw(policy, sizes, seed)
        if float(held_out.rewards.std()) == 0.0:
            raise ValueError(
                f"reward of {policy.task.name} is {float(held_out.rewards[0]):g} on every held-out response; rewards "
                "that differ are allowed; take a policy that is neither perfect nor lost"
            )
        spread = between_share(held_out.rewards.view(sizes.prompts, sizes.answers))
        alone = {
            BETWEEN: spread,
            MEAN: float(held_out.rewards.mean()),
            DEVIATION: float(held_out.rewards.std()),
            LENGTH: float(held_out.lengths.float().mean()),
        }
        rows += [(policy.task.name, "", seed, name, math.nan, value) for name, value in alone.items()]
        for name, settings in critics.items():
            seeded = dataclasses.replace(settings, head_seed=seed)
            with limited_threads():
                critic = fit_critic(policy.model, seeded, train, dataclasses.replace(fit, seed=seed))
                found = explained_by(critic.values(held_out), held_out)
            rows += [(policy.task.name, name, seed, *entry) for entry in found]
            note(f"{policy.task.name}, seed {seed}, {name}: explains {found[1][2]:.3f} over all tokens")
    return pd.DataFrame(rows, columns=COLUMNS)


def draw(policy: Policy, sizes: Sizes, seed: int) -> tuple[Rollouts, Rollouts]:
    """Samples the rollouts of a seed: one response to each prompt to fit, K neighbours to each held-out prompt.

    Raises:
        ValueError: there are too few prompts.
    """
    rng = np.random.default_rng([seed, 70])
    parts = (("fitted", policy.train, 1), ("prompts", policy.held_out, sizes.answers))
    drawn = []
    for stream, (name, examples, answers) in enumerate(parts):
        count = getattr(sizes, name)
        if count > len(examples):
            raise ValueError(
                f"{name} is {count}; {policy.task.name} has {len(examples)} such prompts; choose fewer, or make more"
            )
        chosen = [examples[index] for index in rng.choice(len(examples), size=count, replace=False)]
        drawn.append(
            sample(
                policy.model,
                policy.tokenizer,
                policy.task,
                chosen,
                answers=answers,
                longest=policy.longest,
                seed=2 * seed + stream,
            )
        )
    return drawn[0], drawn[1]


def explained_by(values: Tensor, rollouts: Rollouts) -> list[tuple[str, float, float]]:
    """Returns (quantity, position, explained variance): at the first token, over all tokens, and at each position.

    Args:
        values: (B, T) of a critic.
        rollouts: what they are values of; the return of every token is the reward.
    """
    inside = rollouts.mask.bool()
    returns = rollouts.rewards[:, None].expand_as(values)
    positions = [
        (AT, float(place), explained(values[inside[:, place], place], returns[inside[:, place], place]))
        for place in range(inside.shape[1])
    ]
    return [
        (FIRST, math.nan, positions[0][2]),
        (ALL, math.nan, explained(values[inside], returns[inside])),
        *positions,
    ]


def settings_table(task: str, sizes: Sizes, fit: FitConfig, seeds: int) -> pd.DataFrame:
    """Returns how a task was measured, one setting a row: task, setting, value."""
    said = {
        "responses fitted": sizes.fitted,
        "held-out prompts": sizes.prompts,
        "responses to each": sizes.answers,
        **{name: value for name, value in dataclasses.asdict(fit).items() if name != "seed"},
        "seeds": seeds,
    }
    return pd.DataFrame([(task, name.replace("_", " "), value) for name, value in said.items()], columns=SETTINGS)
