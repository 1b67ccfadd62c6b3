# SPDX-License-Identifier: Apache-2.0
"""Reads a worker's values on one fixed batch, and the batch's token ids."""

import torch
from critic import harness
from verl.workers.utils.padding import response_from_nested


def worker_values(worker) -> list[torch.Tensor]:
    batch = harness.make_batch(seed=5)
    return list(response_from_nested(harness.infer(worker, batch)["values"], batch["response_mask"]).unbind())


def states(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of values after each token, those of the states that predict a response's tokens."""
    batch = harness.make_batch(seed=5)
    prompts = [len(prompt) for prompt in batch["prompts"].unbind()]
    return [row[length - 1 : -1] for row, length in zip(rows, prompts, strict=True)]


def ids() -> list[list[int]]:
    return [row.tolist() for row in harness.make_batch(seed=5)["input_ids"].unbind()]
