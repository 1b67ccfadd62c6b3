# SPDX-License-Identifier: Apache-2.0
"""Asks the critic of a checkpoint what it believes along saved answers.

Shape legend: S tokens of prompt and response, T of the response.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from verl_dvpo.saved.values import LEVELS, Answer, Dump

#: Answers at once.
BATCH = 8


def dump_of_rollouts(run: Path, files: Sequence[Path], *, limit: int, step: int | None, device: str) -> Dump:
    """Evaluates a critic on rollouts, at even distances in the files.

    The reward comes at an answer's last token, and there are no advantages: those belong to an update.

    Args:
        run: a run with a checkpoint, or the folder of an exported critic.
        files: as ``verl_dvpo.pretrain.rollouts.read_rollouts`` takes them.
        limit: answers, >= 1.
        step: which checkpoint; None takes the last.
        device: where to compute.

    Raises:
        ValueError: there is no whole checkpoint, or a file of rollouts is wrong.
    """
    import torch

    from verl_dvpo.critic.dumps import realised_returns, texts_of
    from verl_dvpo.pretrain.rollouts import read_rollouts

    model = load_critic(run, step).to(device)
    found = read_rollouts(files, model.tokenizer)
    count = min(limit, len(found))
    gamma = float(model.facts.get("algorithm", {}).get("gamma", 1.0))
    answers: list[Answer] = []
    for first in range(0, count, BATCH):
        some = [found[i * len(found) // count] for i in range(first, min(first + BATCH, count))]
        values = model.values([[*each.prompt, *each.response] for each in some], batch_size=BATCH)
        for rollout, row in zip(some, values, strict=True):
            states = row.outputs[len(rollout.prompt) - 1 : -1]
            rewards = torch.zeros(len(rollout.response))
            rewards[-1] = rollout.reward
            mask = torch.ones_like(rewards)
            texts = texts_of(model.tokenizer, rollout.response, rollout.prompt) if model.tokenizer else {}
            answers.append(
                Answer(
                    ids=np.asarray(rollout.response),
                    mask=np.ones(len(rollout.response), dtype=bool),
                    quantiles=_numbers(row.family.quantiles(states, torch.tensor(LEVELS, device=states.device))),
                    heads=_numbers(row.family.head_values(states)),
                    values=_numbers(row.family.value(states)),
                    rewards=rewards.numpy(),
                    realised=realised_returns(rewards, mask, gamma).numpy(),
                    **texts,
                )
            )
    return Dump(int(model.facts.get("step") or -1), tuple(answers), _facts(model, gamma))


def load_critic(run: Path, step: int | None) -> Any:
    """Loads the critic of a run's checkpoint, or an exported one, as a ``ValueModel``."""
    from verl_dvpo.export.run import export
    from verl_dvpo.export.value_model import ValueModel
    from verl_dvpo.saved.head_file import FILE

    if (run / FILE).is_file():
        return ValueModel.from_pretrained(run)
    with tempfile.TemporaryDirectory() as folder:
        export(run, Path(folder) / "critic", step=step)
        return ValueModel.from_pretrained(Path(folder) / "critic")


def _numbers(tensor: Any) -> Any:
    return tensor.detach().float().cpu().numpy()


def _facts(model: Any, gamma: float) -> dict[str, Any]:
    own = {"critic.value.family": model.settings.family}
    own |= {f"critic.value.{name}": value for name, value in model.settings.plain().items() if value is not None}
    seeds = {f"seed: {name}": seed for name, seed in model.facts.get("seeds", {}).items()}
    about = {"base model": model.facts.get("base_model"), "checkpoint": model.facts.get("step")}
    settings = {**about, **model.facts.get("algorithm", {}), **own, **seeds}
    return {"gamma": gamma, "settings": {name: value for name, value in settings.items() if value is not None}}
