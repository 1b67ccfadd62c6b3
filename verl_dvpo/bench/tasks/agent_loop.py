# SPDX-License-Identifier: Apache-2.0
"""Runs a dialogue with a task's simulated user as an agent loop of verl; the policy writes the assistant's turns.

A response is everything after the first message, the user's later turns included. The user's tokens have response_mask
0 and log-probability 0: the policy gets no gradient for them, and values are carried through them to the turn before.

``prepare.py`` writes a file that registers this class with verl; the task's YAML names it in
``actor_rollout_ref.rollout.agent.agent_loop_config_path``.
"""

import asyncio
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
from verl.utils.profiler import simple_timer

from verl_dvpo.bench.tasks.registry import task_of
from verl_dvpo.bench.tasks.task import TURNS, User
from verl_dvpo.compat.moved import merge_context


class DialogueAgentLoop(AgentLoopBase):
    """Speaks with the task's user until the user hangs up, a turn has no end, or the response is full."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.response_length = self.rollout_config.response_length
        self._text: Any = self.tokenizer  # verl declares the type of the factory instead of its product

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """Runs one dialogue.

        Args:
            sampling_params: of vLLM.
            priority: of the request.
            **kwargs: the row; ``data_source`` names the task and ``reward_model.ground_truth`` is the user's goal.

        Raises:
            ValueError: if the row's task has no user.
        """
        user = self.find_user(kwargs["data_source"], kwargs["reward_model"]["ground_truth"])
        messages = list(kwargs["raw_prompt"])
        tokens = await self.ct_build_initial_tokens(messages)
        mask: list[int] = []
        log_probs: list[float] | None = None
        turns: list[str] = []
        fields: dict[str, Any] = {}
        timing: dict[str, Any] = {}
        preempted = 0
        request = f"det-{int(priority)}" if self.rollout_config.full_determinism else uuid4().hex
        while True:
            # The server cuts off a turn that is longer than the rest of the response.
            limited = {**sampling_params, "max_tokens": self.response_length - len(mask)}
            with simple_timer("generate_sequences", timing):
                output = await self.server_manager.generate(
                    request_id=request, prompt_ids=tokens, sampling_params=limited, priority=int(priority)
                )
            fields = _merge(fields, output.extra_fields)
            preempted += output.num_preempted or 0
            if log_probs is None and output.log_probs:
                log_probs = []
            merged, mask, log_probs = await self.ct_merge_assistant_token(
                tokens, output.token_ids, mask, log_probs, assistant_logprobs=output.log_probs or None
            )
            tokens = merged.token_ids
            said = await self._decode(output.token_ids)
            turns.append(said)
            reply = user.reply(said)
            if reply is None or not _has_ended(output.token_ids, self._text.eos_token_id):
                break
            spoken = [*messages, {"role": "assistant", "content": said}]
            messages = [*spoken, {"role": "user", "content": reply}]
            merged, longer, logs = await merge_context(self)(spoken, messages, tokens, mask, log_probs)
            if len(longer) >= self.response_length:
                break
            tokens, mask, log_probs = merged.token_ids, longer, logs
        start = len(tokens) - len(mask)
        end = self.response_length
        return AgentLoopOutput(
            prompt_ids=tokens[:start],
            response_ids=tokens[start:][:end],
            response_mask=mask[:end],
            response_logprobs=log_probs[:end] if log_probs else None,
            num_turns=2 * len(turns),
            metrics=AgentLoopMetrics(**timing, num_preempted=preempted),
            extra_fields={**fields, TURNS: turns, "turn_scores": [], "tool_rewards": []},
        )

    def find_user(self, source: str, truth: str) -> User:
        """Returns the simulated user of a row.

        Args:
            source: the row's data source, which names the task.
            truth: the user's goal.

        Raises:
            ValueError: the task has no user.
        """
        task = task_of(source)
        if task.user is None:
            raise ValueError(
                f"data_source is {source!r}; a dialogue needs a task with a simulated user; set agent_name={task.agent}"
            )
        return task.user(truth)

    async def _decode(self, tokens: list[int]) -> str:
        return await asyncio.get_running_loop().run_in_executor(
            None, lambda: self._text.decode(tokens, skip_special_tokens=True)
        )


def _has_ended(tokens: list[int], end: int) -> bool:
    return bool(tokens) and tokens[-1] == end


def _merge(fields: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns the first turn's fields with the newest version of the weights among all turns."""
    if not fields:
        return dict(new)
    newest = new.get("max_global_steps")
    return {**fields, "max_global_steps": newest} if newest is not None else fields
