# SPDX-License-Identifier: Apache-2.0
"""Reads and writes TransferQueue, which carries a step's samples between verl's processes."""

from collections.abc import Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict


def reward_infos(batch: Any) -> list[dict[str, Any]]:
    """Fetches what the reward function returned beside the score of each sample.

    Args:
        batch: TransferQueue's description of the samples, a ``KVBatchMeta``.

    Returns:
        One dictionary a sample, in the batch's order; empty where nothing came with the score.
    """
    stored = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"])
    # TransferQueue gives a list, an array or a stack of NonTensorData, as its backend has it.
    rows = [getattr(fields, "data", fields) for fields in stored["extra_fields"]]
    return [fields.get("reward_extra_info", {}) for fields in rows]


def shift_rewards(batch: Any, amounts: Sequence[float]) -> None:
    """Adds an amount to the reward of each sample, at the last token of its response, where rewards are.

    Args:
        batch: TransferQueue's description of B samples, a ``KVBatchMeta``.
        amounts: B numbers, in units of reward.
    """
    stored = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
    rows = [row.clone() for row in stored["rm_scores"].unbind()]
    for row, amount in zip(rows, amounts, strict=True):
        row[-1] += amount
    written = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    fields = TensorDict({"rm_scores": written}, batch_size=len(rows))
    tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
