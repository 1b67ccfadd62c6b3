# SPDX-License-Identifier: Apache-2.0
"""Puts the noise into verl: a subclass of whichever reward manager the run has chosen.

verl resolves the manager's class from ``reward.reward_manager`` alone. A manager of our own under a name there would
need the user to say ``reward.reward_manager.name`` to us instead of to verl, and ``reward.custom_reward_function``
twice. So ``verl_dvpo.compat`` wraps verl's function with ``manager_for``. Whatever the user says on the command line
about reward functions and managers goes on to mean what it means in verl.
"""

import dataclasses
import functools
import logging
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from verl_dvpo.noise.config import PREFIX, noise_config
from verl_dvpo.noise.reward import CLEAN_SCORE, CORRUPTED, RewardFunctionError, to_extra_info, with_noise
from verl_dvpo.noise.sample import Origin, canonical

if TYPE_CHECKING:
    from verl import DataProto

logger = logging.getLogger("verl_dvpo")

#: Field of a sample that ``verl_dvpo.noise.rollout`` adds: true if it belongs to a validation.
VALIDATE = "__validate__"
#: Extra field of a sample whose reward is NaN: the reason.
REWARD_ERROR = "reward_error"


def manager_for(config: DictConfig, chosen: type) -> type:
    """Returns ``chosen``, or a subclass with noise where ``noise:`` asks for a corruption."""
    return chosen if noise_config(config.get(PREFIX)) is None else noisy(chosen)


@functools.cache
def noisy(base: type) -> Any:
    """Returns a subclass of the reward manager ``base`` whose reward function is wrapped by ``with_noise``."""

    class NoisyRewardManager(base):
        """Wraps the reward function, and tells it where each sample comes from."""

        def __init__(self, config: DictConfig, tokenizer: Any, compute_score: Any, **kwargs: Any) -> None:
            settings = noise_config(config.get(PREFIX))
            assert settings is not None
            wrapped = with_noise(compute_score, settings, function_name(config))
            super().__init__(config=config, tokenizer=tokenizer, compute_score=wrapped, **kwargs)

        async def run_single(self, data: "DataProto") -> dict[str, Any]:
            """Scores as ``base`` does; a reward that fails in training is NaN with a reason, which stops the trainer.

            verl itself would log the error and go on without the sample.
            """
            origin = origin_of(data)
            try:
                result: dict[str, Any] = await super().run_single(with_origin(data, origin))
            except RewardFunctionError as error:
                if origin.validate:
                    raise
                # out of a Ray actor, as with verl's manager ``remote``, it comes with the actor's traceback in its text
                reason = str(getattr(error, "cause", error))
                logger.error("%s", reason)
                failed = {"acc": math.nan, CLEAN_SCORE: math.nan, CORRUPTED: math.nan, REWARD_ERROR: reason}
                return {"reward_score": math.nan, "reward_extra_info": failed}
            return result

    NoisyRewardManager.__name__ = NoisyRewardManager.__qualname__ = f"Noisy{base.__name__}"
    return NoisyRewardManager


def function_name(config: DictConfig) -> str:
    """Returns the user's name of the reward function: its path and name, or that of verl's default."""
    chosen = config.reward.get("custom_reward_function")
    if not chosen or not chosen.get("path"):
        return "verl.utils.reward_score.default_compute_score"
    return f"{chosen.path}:{chosen.name}"


def origin_of(data: "DataProto") -> Origin:
    """Returns the origin of the last response in ``data``, which verl scores where an agent loop made several.

    Raises:
        ValueError: the rollout did not say whether it was a validation.
    """
    fields = {name: values[-1] for name, values in data.non_tensor_batch.items()}
    if VALIDATE not in fields:
        raise ValueError(
            f"the field {VALIDATE!r} of a rollout is missing; it must tell training from validation, because noise= "
            "never corrupts a validation; roll out with verl's AgentLoopWorker or a subclass with its _run_agent_loop"
        )
    response_length = data.batch["responses"].shape[-1]
    return Origin(
        validate=bool(fields[VALIDATE]),
        prompt=canonical(fields["raw_prompt"]),
        length=int(data.batch["attention_mask"][-1, -response_length:].sum()),
        step=int(fields.get("global_steps", -1)),
        session=int(fields.get("session_id", 0)),
        uid=str(fields.get("uid", "")),
        index=str(fields.get("index", "")),
    )


def with_origin(data: "DataProto", origin: Origin) -> "DataProto":
    """Returns the last response in ``data`` with ``origin`` in its ``extra_info``; ``data`` stays as it is."""
    last = data[-1:]
    users = last.non_tensor_batch["extra_info"][0] if "extra_info" in last.non_tensor_batch else None
    extra_info = np.empty(1, dtype=object)
    extra_info[0] = to_extra_info(users, origin)
    return dataclasses.replace(last, non_tensor_batch={**last.non_tensor_batch, "extra_info": extra_info})
