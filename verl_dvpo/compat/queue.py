# SPDX-License-Identifier: Apache-2.0
"""Reads TransferQueue, which carries a step's samples between verl's processes."""

from typing import Any

import transfer_queue as tq


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
