# SPDX-License-Identifier: Apache-2.0
"""Lets a reward manager know whether it scores for training or for a validation.

verl's rollout workers know (the trajectory's ``validate``) and do not tell: ``AgentLoopWorker._compute_score`` sends
the reward workers the fields of the data's row, and the flag is not among them. The data cannot say it either: nothing
obliges a user's rows to name their split, and one file may serve both. So ``verl_dvpo.compat`` wraps two methods of
that worker with ``remembering`` and ``with_flag``; without ``noise:``, nothing changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from verl_dvpo.noise.config import PREFIX, noise_config
from verl_dvpo.noise.manager import VALIDATE

#: Of the trajectory that this task of the event loop is running.
_validating: ContextVar[bool | None] = ContextVar("verl_dvpo_noise_validating", default=None)


@contextmanager
def remembering(trajectory: Mapping[str, Any]) -> Iterator[None]:
    """Remembers within the block, for this task of the event loop, whether ``trajectory`` belongs to a validation."""
    token = _validating.set(bool(trajectory["validate"]))
    try:
        yield
    finally:
        _validating.reset(token)


def with_flag(config: Any, outputs: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Adds the remembered flag to the fields that reward workers get; without ``noise:``, returns ``kwargs`` itself.

    Args:
        config: the run's configuration.
        outputs: of the agent loop, one or more.
        kwargs: the fields of the data's row.

    Raises:
        ValueError: in training, the agent loop set the reward itself, so that no reward function is there to corrupt.
    """
    validate = _validating.get()
    if validate is None or noise_config(config.get(PREFIX)) is None:
        return kwargs
    if outputs[-1].reward_score is not None and not validate:
        raise ValueError(
            f"reward_score of an agent loop is {outputs[-1].reward_score}; it must be unset with "
            f"noise={config[PREFIX].kind}, which corrupts reward functions; leave it unset and score in one"
        )
    # a copy: what the rollout stores has no field more than without noise
    return {**kwargs, VALIDATE: validate}
