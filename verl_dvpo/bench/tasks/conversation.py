# SPDX-License-Identifier: Apache-2.0
"""Turns conversations into tokens and lets a model answer greedily; the rollout sees the same tokens.

Shapes: L tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_dvpo.bench.tasks.task import Conversation, Example, Task
from verl_dvpo.bench.tasks.tokenizer import END, START

#: Label that torch's cross-entropy leaves out.
IGNORED_LABEL = -100
#: Prompts at once in a greedy evaluation.
BATCH = 256
#: Matrices this small do not run faster on more threads.
MOST_THREADS = 4


def encode(tokenizer: PreTrainedTokenizerFast, turns: Sequence[str]) -> tuple[list[int], list[int]]:
    """Returns token ids and labels (L,); only the assistant's turns and their end tokens have labels.

    Args:
        tokenizer: from ``build_tokenizer``.
        turns: a conversation; it may end with the user's or with the assistant's turn.
    """
    ids: list[int] = []
    labels: list[int] = []
    for place, turn in enumerate(turns):
        is_user = place % 2 == 0
        before = "\n" if is_user and place else ""
        text = f"{before}{START}user\n{turn}{END}\n{START}assistant\n" if is_user else f"{turn}{END}"
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        labels += [IGNORED_LABEL] * len(piece) if is_user else piece
    return ids, labels


@torch.no_grad()
def greedy_turns(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, histories: Sequence[Sequence[str]], *, longest: int
) -> list[str]:
    """Returns the model's next turn in each history, without special tokens and of at most ``longest`` tokens."""
    said = []
    for start in range(0, len(histories), BATCH):
        rows = [torch.tensor(encode(tokenizer, history)[0]) for history in histories[start : start + BATCH]]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), cast(int, tokenizer.pad_token_id))
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, width - len(row) :] = row
            mask[place, width - len(row) :] = 1
        with limited_threads():
            # ``generate`` declares a protocol as its self type, which mypy does not see in the class.
            output = cast(Any, model).generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False)
        said += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return said


def greedy_responses(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    examples: Sequence[Example],
    *,
    longest: int,
) -> list[list[str]]:
    """Returns the assistant's turns for each example: one, or a whole dialogue with the simulated user.

    Args:
        model, tokenizer: of the warm start.
        task: the task of the examples.
        examples: the prompts.
        longest: tokens that the model may write in a turn.
    """
    histories: list[Conversation] = [[example.prompt] for example in examples]
    users = [task.user(example.truth) if task.user is not None else None for example in examples]
    unfinished = list(range(len(examples)))
    while unfinished:
        turns = greedy_turns(model, tokenizer, [histories[place] for place in unfinished], longest=longest)
        going_on = []
        for place, turn in zip(unfinished, turns, strict=True):
            histories[place].append(turn)
            user = users[place]
            reply = user.reply(turn) if user is not None else None
            if reply is not None:
                histories[place].append(reply)
                going_on.append(place)
        unfinished = going_on
    return [history[1::2] for history in histories]


def greedy_scores(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    examples: Sequence[Example],
    *,
    longest: int,
) -> dict[str, float]:
    """Returns the means over the examples of the reward's entries, except ``score``; arguments as above."""
    responses = greedy_responses(model, tokenizer, task, examples, longest=longest)
    found = [task.score(turns, example.truth) for example, turns in zip(examples, responses, strict=True)]
    return {name: sum(each[name] for each in found) / len(found) for name in found[0] if name != "score"}


@contextmanager
def limited_threads() -> Iterator[None]:
    """Runs its body on at most ``MOST_THREADS`` of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, MOST_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)
