# SPDX-License-Identifier: Apache-2.0
"""Supervised training on the three domains' demonstrations together, in float32 on the CPU.

Shapes: B demonstrations, L tokens, padded on the right.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_dvpo.bench.demo.model import build_config
from verl_dvpo.bench.demo.warm_start import IGNORED_LABEL, limited_threads
from verl_dvpo.bench.domains.conversation import encode
from verl_dvpo.bench.domains.example import Demonstrate

#: Of prompt and response together; a dialogue is longer than the demo's sums.
MAX_POSITIONS = 256


@dataclass(frozen=True, kw_only=True)
class DomainsConfig:
    """How the warm start is trained; ranges are checked on construction.

    Attributes:
        steps: optimizer steps, at least 1.
        batch_size: demonstrations a step, at least 1, a third of each domain on average.
        learning_rate: peak of AdamW's rate (linear warm-up over 50 steps, then linear decay to 2 % of it), above 0.
        habit: the teachers' probability in [0, 1] of an error where they have learned something wrongly.
        slip: their probability in [0, 1] of an error anywhere else.
    """

    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 3e-3
    habit: float = 0.75
    slip: float = 0.03

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        for name in ("habit", "slip"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


def build_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> Qwen3ForCausalLM:
    """The demo's architecture with room for a dialogue, freshly initialised. The caller's random state stays."""
    config = build_config(tokenizer)
    config.max_position_embeddings = MAX_POSITIONS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.float()


def batches(
    tokenizer: PreTrainedTokenizerFast, demonstrators: Mapping[str, Demonstrate], batch_size: int, *, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of token ids (B, L) and labels (B, L); domains take turns."""
    rng = np.random.default_rng([seed, 40])
    order = list(demonstrators.values())
    count = 0
    while True:
        ids, labels = [], []
        for _ in range(batch_size):
            one, label = encode(tokenizer, order[count % len(order)](rng))
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
    demonstrators: Mapping[str, Demonstrate],
    config: DomainsConfig,
    *,
    seed: int,
) -> None:
    """Trains `model` in place. The same seed, machine and thread count give the same weights.

    Padding on the right needs no attention mask: under causal attention no real token sees it, and it has no label.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * max(0.02, 1 - step / config.steps)
    )
    source = batches(tokenizer, demonstrators, config.batch_size, seed=seed)
    model.train()
    with limited_threads(), tqdm(range(config.steps), desc="warm start", unit="step", mininterval=1.0) as progress:
        for _ in progress:
            ids, labels = next(source)
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
