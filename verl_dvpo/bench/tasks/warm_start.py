# SPDX-License-Identifier: Apache-2.0
"""Trains a model on the teachers' demonstrations, in float32 on the CPU, before reinforcement learning.

Shapes: B demonstrations, L tokens of a conversation, padded on the right.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_dvpo.bench.common import Progress
from verl_dvpo.bench.tasks.conversation import IGNORED_LABEL, encode, limited_threads
from verl_dvpo.bench.tasks.registry import WarmStartConfig
from verl_dvpo.bench.tasks.task import Demonstrate

#: Steps between two lines of progress where the output is no terminal.
LINE_EVERY = 50


def batches(
    tokenizer: PreTrainedTokenizerFast, demonstrators: Sequence[Demonstrate], batch_size: int, *, seed: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields token ids (B, L) and labels (B, L) without end; the demonstrators take turns.

    Args:
        tokenizer: from ``build_tokenizer``.
        demonstrators: one for each task; they share one random generator.
        batch_size: B.
        seed: of that generator, as numpy takes it.
    """
    rng = np.random.default_rng(seed)
    count = 0
    while True:
        ids, labels = [], []
        for _ in range(batch_size):
            one, label = encode(tokenizer, demonstrators[count % len(demonstrators)](rng))
            ids.append(torch.tensor(one))
            labels.append(torch.tensor(label))
            count += 1
        padding = float(cast(int, tokenizer.pad_token_id))
        yield (
            torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=padding),
            torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
        )


def warm_start(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    demonstrators: Sequence[Demonstrate],
    config: WarmStartConfig,
    *,
    seed: Sequence[int],
) -> None:
    """Trains ``model`` in place. The same seed, machine and number of threads give the same weights.

    Padding on the right needs no attention mask: under causal attention no real token sees it, and it has no label.

    Args:
        model: in float32.
        tokenizer, demonstrators, seed: see ``batches``.
        config: steps, batch size and learning rate.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / config.warmup_steps) * max(0.02, 1 - step / config.steps)
    )
    source = batches(tokenizer, demonstrators, config.batch_size, seed=seed)
    model.train()
    with limited_threads(), Progress(config.steps, unit="step") as progress:
        for step in range(1, config.steps + 1):
            ids, labels = next(source)
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress.terminal or step % LINE_EVERY == 0 or step == config.steps:
                progress.update(step, f"warm start, loss {loss.item():.3f}")
    model.eval()
