# SPDX-License-Identifier: Apache-2.0
"""The demo's warm start: supervised training on the teacher's worked demonstrations, in float32 on the CPU.

Shapes: B demonstrations, L tokens of prompt and response together, padded on the right.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_dvpo.bench.demo.task import LONGEST_RESPONSE, Problem, Teacher, draw_problem, is_correct
from verl_dvpo.bench.demo.tokenizer import encode_prompt

IGNORED_LABEL = -100
# More threads than this only get in each other's way on matrices this small.
MOST_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """How the warm start is trained; ranges are checked on construction.

    Attributes:
        steps: optimizer steps, at least 1.
        batch_size: demonstrations a step, at least 1.
        learning_rate: peak of AdamW's rate (linear warm-up over 30 steps, then linear decay to 2 % of it), above 0.
        habit, slip: the teacher's error probabilities, in [0, 1]; see `Teacher`.
    """

    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 3e-3
    habit: float = 0.8
    slip: float = 0.04

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("habit", "slip"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


def encode_demonstration(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Token ids and labels (L,) of one demonstration; only the response and its end token are to be learned."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    response_ids = [*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id]
    return prompt_ids + response_ids, [IGNORED_LABEL] * len(prompt_ids) + response_ids


def demonstration_batches(
    tokenizer: PreTrainedTokenizerFast, held_out: Sequence[Problem], config: WarmStartConfig, *, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of token ids (B, L) and labels (B, L) from fresh problems, none of them in `held_out`."""
    rng = np.random.default_rng([seed, 1])
    teacher = Teacher(np.random.default_rng([seed, 2]), habit=config.habit, slip=config.slip)
    held_out_keys = {problem.key for problem in held_out}
    while True:
        ids: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        while len(ids) < config.batch_size:
            problem = draw_problem(rng)
            if problem.key in held_out_keys:
                continue
            one, label = encode_demonstration(tokenizer, problem.prompt, teacher.demonstrate(problem))
            ids.append(torch.tensor(one))
            labels.append(torch.tensor(label))
        assert tokenizer.pad_token_id is not None
        yield (
            torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=float(tokenizer.pad_token_id)),
            torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
        )


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: Sequence[Problem],
    config: WarmStartConfig,
    *,
    seed: int,
) -> None:
    """Trains `model` in place. The same seed, machine and thread count give the same weights.

    Padding on the right needs no attention mask: under causal attention no real token sees it, and it has no label.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * max(0.02, 1 - step / config.steps)
    )
    batches = demonstration_batches(tokenizer, held_out, config, seed=seed)
    model.train()
    with limited_threads(), tqdm(range(config.steps), desc="warm start", unit="step", mininterval=1.0) as progress:
        for _ in progress:
            ids, labels = next(batches)
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


@torch.no_grad()
def greedy_responses(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]
) -> list[str]:
    """The model's greedy response to each problem, special tokens removed, as verl's reward would see it."""
    # Summands of one width make prompts of one length: no padding.
    ids = torch.tensor([encode_prompt(tokenizer, problem.prompt) for problem in problems])
    with limited_threads():
        # Its declared self type is a protocol that no model's class is seen to meet.
        output = cast(Any, model).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST_RESPONSE + 1, do_sample=False
        )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def greedy_accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> float:
    """Fraction in [0, 1] of `problems` whose greedy response is correct."""
    responses = greedy_responses(model, tokenizer, problems)
    correct = [is_correct(response, problem.answer) for response, problem in zip(responses, problems, strict=True)]
    return sum(correct) / len(correct)


@contextmanager
def limited_threads() -> Iterator[None]:
    """Runs its body on at most `MOST_THREADS` of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, MOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
