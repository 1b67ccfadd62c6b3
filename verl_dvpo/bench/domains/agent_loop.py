# SPDX-License-Identifier: Apache-2.0
"""The dialogue with the simulated user as an agent loop of verl's: the policy writes the assistant's turns.

A response is everything behind the first message, the user's later turns included. Their tokens have response_mask 0
and log-probability 0: the policy gets no gradient for them, and values are carried through them to the turn before.
"""

import asyncio
from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
from verl.utils.profiler import simple_timer

from verl_dvpo.bench.domains.dialogue import Goal, User
from verl_dvpo.bench.domains.reward import TURNS
from verl_dvpo.compat.moved import merge_context

NAME = "dialogue_agent"


class DialogueAgentLoop(AgentLoopBase):
    """Speaks with `User` until it books, the user hangs up, a turn has no end, or the response is full."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.response_length = self.rollout_config.response_length
        self._text: Any = self.tokenizer  # verl declares the factory's type, not what it makes

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """One dialogue; ``reward_model.ground_truth`` of the row is the user's goal."""
        user = User(Goal.from_json(kwargs["reward_model"]["ground_truth"]))
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
            # What is left, so that a turn that is too long is cut off by the server and not here.
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

    async def _decode(self, tokens: list[int]) -> str:
        return await asyncio.get_running_loop().run_in_executor(
            None, lambda: self._text.decode(tokens, skip_special_tokens=True)
        )


def _has_ended(tokens: list[int], end: int) -> bool:
    return bool(tokens) and tokens[-1] == end


def _merge(fields: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The first turn's fields, but the newest version of the weights that any turn was written by."""
    if not fields:
        return dict(new)
    newest = new.get("max_global_steps")
    return {**fields, "max_global_steps": newest} if newest is not None else fields
