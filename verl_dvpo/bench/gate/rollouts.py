# SPDX-License-Identifier: Apache-2.0
"""Samples a policy in this process and judges what it wrote: Monte-Carlo returns on clean rewards.

Shapes: B responses, L tokens of the longest prompt with its response, T tokens of the longest response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_dvpo.bench.tasks.conversation import encode, limited_threads
from verl_dvpo.bench.tasks.task import Example, Task

#: Responses that are sampled at once.
BATCH = 256


@dataclass(frozen=True)
class Rollouts:
    """Responses to prompts, with their rewards.

    Attributes:
        ids: (B, L) prompt and response, then padding.
        starts: (B,) tokens of each prompt: the place in ``ids`` of the response's first token.
        lengths: (B,) tokens of each response, its end token included.
        rewards: (B,) the clean reward; it arrives at a response's last token, and without a discount it is the return
            of every token.
        prompts: (B,) the number of each response's prompt.
    """

    ids: Tensor
    starts: Tensor
    lengths: Tensor
    rewards: Tensor
    prompts: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> "Rollouts":
        """Takes rows (B',) of every tensor."""
        return Rollouts(*(each[rows] for each in (self.ids, self.starts, self.lengths, self.rewards, self.prompts)))

    @property
    def mask(self) -> Tensor:
        """(B, T) of 0.0 and 1.0: 1 at the tokens of the response."""
        return (torch.arange(int(self.lengths.max())) < self.lengths[:, None]).float()

    @property
    def token_rewards(self) -> Tensor:
        """(B, T): the reward at the last token of each response, else 0."""
        return torch.zeros_like(self.mask).scatter_(1, self.lengths[:, None] - 1, self.rewards[:, None])

    @property
    def states(self) -> Tensor:
        """(B, T): the place in ``ids`` of the state that predicts each token; padding repeats the last state."""
        steps = torch.arange(int(self.lengths.max())).clamp(max=self.lengths[:, None] - 1)
        return self.starts[:, None] + steps - 1


def sample(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    examples: Sequence[Example],
    *,
    answers: int,
    longest: int,
    seed: int,
) -> Rollouts:
    """Samples ``answers`` responses to each example at temperature 1; those to one prompt are neighbours.

    Args:
        model, tokenizer: the policy.
        task: judges the responses; it is answered in one turn.
        examples: the prompts.
        answers: responses to a prompt, at least 1.
        longest: tokens that a response may have.
        seed: of the draws; the caller's random state does not change.

    Raises:
        ValueError: the task has a simulated user.
    """
    if task.user is not None:
        raise ValueError(f"task is {task.name!r}; a task that is answered in one turn is allowed; choose another one")
    asked = [(number, example) for number, example in enumerate(examples) for _ in range(answers)]
    # Responses of one batch are as long as the longest; neighbours in length waste little.
    rows: list[tuple[list[int], list[int]]] = []
    with torch.random.fork_rng(devices=[]), limited_threads():
        torch.manual_seed(seed)
        for first in range(0, len(asked), BATCH):
            prompts = [encode(tokenizer, [example.prompt])[0] for _, example in asked[first : first + BATCH]]
            rows += zip(prompts, _generate(model, tokenizer, prompts, longest=longest), strict=True)
    texts = tokenizer.batch_decode([response for _, response in rows], skip_special_tokens=True)
    scores = [task.score([text], example.truth)["score"] for text, (_, example) in zip(texts, asked, strict=True)]
    return Rollouts(
        ids=torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(prompt + response) for prompt, response in rows],
            batch_first=True,
            padding_value=float(cast(int, tokenizer.pad_token_id)),
        ),
        starts=torch.tensor([len(prompt) for prompt, _ in rows]),
        lengths=torch.tensor([len(response) for _, response in rows]),
        rewards=torch.tensor(scores, dtype=torch.float32),
        prompts=torch.tensor([number for number, _ in asked]),
    )


@torch.no_grad()
def _generate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[int]], *, longest: int
) -> list[list[int]]:
    """Returns a response to each prompt, its end token included where it has one."""
    padding, end = cast(int, tokenizer.pad_token_id), cast(int, tokenizer.eos_token_id)
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = cast(Any, model).generate(
        ids, attention_mask=mask, max_new_tokens=longest, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    found = []
    for response in output[:, width:].tolist():
        found.append(response[: response.index(end) + 1] if end in response else response)
    return found
