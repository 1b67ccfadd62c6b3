# SPDX-License-Identifier: Apache-2.0
"""Lets a reward manager know whether it scores for training or for a validation.

verl's rollout workers know (the trajectory's ``validate``) and do not tell: ``AgentLoopWorker._compute_score`` (verl
0.9.1, experimental/agent_loop/agent_loop.py, line 967) sends the reward workers the fields of the data's row, and the
flag is not among them. The data cannot say it either: nothing obliges a user's rows to name their split, and one file
may serve both. There is no extension point between the two methods, so both are wrapped; without ``noise:``, nothing
changes.
"""

import functools
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from verl_dvpo.noise.config import PREFIX, noise_config
from verl_dvpo.noise.manager import VALIDATE

#: Of the trajectory that this task of the event loop is running.
_validating: ContextVar[bool | None] = ContextVar("verl_dvpo_noise_validating", default=None)


def install(agent_loop_module: ModuleType) -> None:
    """Wraps the two methods of ``verl.experimental.agent_loop.agent_loop``; a second call does nothing."""
    worker = agent_loop_module.AgentLoopWorker
    run, score = worker._run_agent_loop, worker._compute_score
    if hasattr(run, "__wrapped__"):
        return

    @functools.wraps(run)
    async def _run_agent_loop(self: Any, sampling_params: Any, trajectory: Any, **kwargs: Any) -> Any:
        token = _validating.set(bool(trajectory["validate"]))
        try:
            return await run(self, sampling_params, trajectory, **kwargs)
        finally:
            _validating.reset(token)

    @functools.wraps(score)
    async def _compute_score(self: Any, outputs: Any, kwargs: Any) -> None:
        validate = _validating.get()
        if validate is None or noise_config(self.config.get(PREFIX)) is None:
            await score(self, outputs, kwargs)
            return
        if outputs[-1].reward_score is not None and not validate:
            raise ValueError(
                f"noise={self.config[PREFIX].kind} corrupts reward functions, but this agent loop set reward_score "
                "itself; leave it unset and score in a reward function"
            )
        # a copy: what the rollout stores has no field more than without noise
        await score(self, outputs, {**kwargs, VALIDATE: validate})

    worker._run_agent_loop = _run_agent_loop
    worker._compute_score = _compute_score
