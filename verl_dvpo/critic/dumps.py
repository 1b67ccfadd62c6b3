# SPDX-License-Identifier: Apache-2.0
"""Collects what the critic says of a few answers, and writes it with their rewards: ``critic.value.dump_every``.

Inference hands over each micro-batch's outputs, the update brings rewards and advantages; both in the critic's process.

Shape legend: B sequences of this rank, T response positions of one, L response tokens of a micro-batch laid end to end,
D outputs of the head, R answers that are written.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from verl_dvpo.critic.store import sequence_keys
from verl_dvpo.distributional.advantages import gae
from verl_dvpo.families.base import ValueFamily
from verl_dvpo.saved.values import LEVELS, Answer, Dump, path_of, write_dump

if TYPE_CHECKING:
    from tensordict import TensorDict

logger = logging.getLogger(__name__)

#: Set on the batch by the trainer where a dump is due: ``DumpPlan``.
PLAN = "dvpo_dump"

#: What the update has to bring beside the critic's own fields, for the pictures alone.
FIELDS = ("advantages", "returns")


@dataclass(frozen=True)
class DumpPlan:
    """Says that this step's answers are to be written, and where.

    Attributes:
        step: of training.
        folder: of the run's checkpoints, as the critic's machine sees it.
        facts: of the run, as JSON holds them.
    """

    step: int
    folder: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def choose_rows(mask: Tensor, count: int) -> list[int]:
    """Chooses rows at even distances among those with a valid token.

    Nothing of an answer decides, so that what is measured on the chosen holds for all of them.

    Args:
        mask: jagged (B, T), 0 at tokens that the policy did not write.
        count: how many, >= 1.

    Returns:
        At most ``count`` rows, ascending.
    """
    written = [row for row, valid in enumerate(mask.unbind()) if bool((valid != 0).any())]
    count = min(count, len(written))
    return [written[i * len(written) // count] for i in range(count)]


class ValueDump:
    """The values of some rows of one batch, from inference until they are written.

    Args:
        plan: of the step.
        family: gives the outputs their meaning.
        data: the batch that is inferred, with jagged ``prompts``, ``responses`` and ``response_mask``.
        count: how many answers to write, >= 1.
    """

    def __init__(self, plan: DumpPlan, family: ValueFamily, data: "TensorDict", count: int) -> None:
        self.plan = plan
        self.family = family
        self.rows = choose_rows(data["response_mask"], count)
        keys = sequence_keys(data["prompts"], data["responses"])
        self.keys = {row: keys[row] for row in self.rows}
        self.found: dict[int, list[dict[str, Tensor]]] = {row: [] for row in self.rows}

    @torch.no_grad()
    def add(self, outputs: Tensor, batch_rows: Tensor, rows: Tensor) -> None:
        """Takes a block of a micro-batch of the inference pass; a row's blocks come in order.

        Args:
            outputs: (L, D).
            batch_rows: (B',) row in this rank's batch of each sequence of the micro-batch.
            rows: (L,) sequence of each token within the micro-batch.
        """
        levels = torch.tensor(LEVELS, device=outputs.device)
        for place, row in enumerate(batch_rows.tolist()):
            states = outputs[rows == place] if row in self.found else outputs[:0]
            if len(states):
                self.found[row].append(
                    {
                        "quantiles": self.family.quantiles(states, levels).float().cpu(),
                        "heads": self.family.head_values(states).float().cpu(),
                        "values": self.family.value(states).float().cpu(),
                    }
                )

    def write(self, data: "TensorDict", rewards: Tensor, *, gamma: float, tokenizer: Any = None) -> None:
        """Writes the file. A disk that refuses it is told in the log, and training goes on.

        Sequences are found again by their tokens, as what was kept of them is; one that is not there is left out.

        Args:
            data: the batch of the update: ``prompts``, ``responses``, ``response_mask``, and ``FIELDS`` where known.
            rewards: jagged (B, T), those that the critic learns from.
            gamma: discount in [0, 1].
            tokenizer: of the model; None leaves out the texts.
        """
        columns = {"ids": data["responses"], "mask": data["response_mask"], "rewards": rewards}
        columns |= {name: data[name] for name in FIELDS if name in data}
        whole = {name: column.unbind() for name, column in columns.items()}
        prompts = data["prompts"].unbind()
        keys = sequence_keys(data["prompts"], data["responses"])
        places = {key: place for place, key in enumerate(keys)}
        answers = []
        for row, key in self.keys.items():
            # of sequences with the same tokens the one in its old place, because rewards may differ
            place = row if row < len(keys) and keys[row] == key else places.get(key)
            if place is None:
                continue
            mine = {name: column[place].cpu() for name, column in whole.items()}
            mine |= {name: torch.cat([block[name] for block in self.found[row]]) for name in self.found[row][0]}
            mine["realised"] = realised_returns(mine["rewards"], mine["mask"], gamma)
            mine["mask"] = mine["mask"] != 0
            texts = texts_of(tokenizer, mine["ids"].tolist(), prompts[place].tolist()) if tokenizer else {}
            answers.append(Answer(**{name: column.numpy() for name, column in mine.items()}, **texts))
        path = path_of(Path(self.plan.folder), self.plan.step)
        try:
            write_dump(path, Dump(self.plan.step, tuple(answers), {**self.plan.facts, "gamma": gamma}))
        except OSError as error:
            logger.warning("critic: %s cannot be written: %s; there is no picture of this step", path, error)


def realised_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Computes Σ_k γ^k r_{t+k} over valid tokens of one response, (T,) from (T,) and (T,)."""
    row = rewards.float()[None]
    return gae(row, torch.zeros_like(row), mask[None], gamma=gamma, lam=1.0)[0]


def texts_of(tokenizer: Any, ids: Sequence[int], prompt: Sequence[int]) -> dict[str, Any]:
    """Returns ``pieces``, the text of each token on its own, and ``prompt``, which shows no special tokens."""
    return {
        "pieces": tuple(tokenizer.decode([token]) for token in ids),
        "prompt": tokenizer.decode(list(prompt), skip_special_tokens=True),
    }


#: Of a run's configuration, what its pictures are labelled with; of sections everything.
SHOWN = (
    "trainer.project_name",
    "trainer.experiment_name",
    "data.train_batch_size",
    "data.seed",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.actor.optim.lr",
    "critic.optim.lr",
    "critic.ppo_epochs",
    "critic.ppo_mini_batch_size",
    "algorithm",
    "critic.value",
    "noise",
)


def shown_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``settings``: those of a run's configuration that its pictures show, by their dotted names.

    Args:
        config: the whole configuration as plain values.
    """
    found: dict[str, Any] = {}
    for name in SHOWN:
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        _flatten(found, name, value)
    return {"settings": found}


def _flatten(found: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(found, f"{name}.{key}", inner)
    elif value is not None:
        found[name] = value
