# SPDX-License-Identifier: Apache-2.0
"""Conversations as tokens, for the warm start and for greedy evaluation; the rollout sees the same tokens.

Shapes: L tokens.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_dvpo.bench.demo.tokenizer import END, START
from verl_dvpo.bench.demo.warm_start import IGNORED_LABEL, limited_threads
from verl_dvpo.bench.domains import dialogue
from verl_dvpo.bench.domains.example import Example
from verl_dvpo.bench.domains.reward import TURNS, compute_score

#: Prompts at once in a greedy evaluation.
BATCH = 256


def encode(tokenizer: PreTrainedTokenizerFast, turns: Sequence[str]) -> tuple[list[int], list[int]]:
    """Token ids and labels (L,): only the assistant's turns and their ends are to be learned.

    Args:
        tokenizer: with the demo's chat template.
        turns: the user's first message, and then by turns the assistant's and the user's; ends with either.
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
    """The model's next turn in each history (see `encode`), special tokens removed; at most `longest` tokens."""
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
            # Its declared self type is a protocol that no model's class is seen to meet.
            output = cast(Any, model).generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False)
        said += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return said


def greedy_responses(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], *, longest: int
) -> list[list[str]]:
    """The assistant's turns for each example: one, or a whole dialogue with the simulated user."""
    histories = [[example.prompt] for example in examples]
    users = [
        dialogue.User(dialogue.Goal.from_json(example.truth)) if example.domain == dialogue.NAME else None
        for example in examples
    ]
    open_ = list(range(len(examples)))
    while open_:
        turns = greedy_turns(model, tokenizer, [histories[place] for place in open_], longest=longest)
        still = []
        for place, turn in zip(open_, turns, strict=True):
            histories[place].append(turn)
            user = users[place]
            reply = user.reply(turn) if user is not None else None
            if reply is not None:
                histories[place].append(reply)
                still.append(place)
        open_ = still
    return [history[1::2] for history in histories]


def greedy_scores(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], *, longest: int
) -> dict[str, float]:
    """Means over the examples, which are of one domain, of what the reward says of the greedy responses."""
    found = []
    for example, turns in zip(examples, greedy_responses(model, tokenizer, examples, longest=longest), strict=True):
        found.append(compute_score(example.source, turns[-1], example.truth, {TURNS: turns}))
    return {name: sum(each[name] for each in found) / len(found) for name in found[0] if name != "score"}
