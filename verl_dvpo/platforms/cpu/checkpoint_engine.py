# SPDX-License-Identifier: Apache-2.0
"""``actor_rollout_ref.rollout.checkpoint_engine.backend=gloo``: sends the actor's weights to rollout servers apart.

``trainer_mode=separate_async`` has such servers, and verl's own engines for them need an accelerator or its network.
The actor's first process and the process before each server make one group of gloo for each transfer. They meet at a
file, so all of them are on one machine.
"""

import asyncio
import datetime
import os
import tempfile
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any

import torch
from safetensors.torch import load, save
from torch.distributed import BroadcastOptions, FileStore, ProcessGroupGloo
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.workers.rollout.utils import ensure_async_iterator

#: After which a process gives up on one that is silent; the trainer's watch notices a dead one long before.
TIMEOUT = datetime.timedelta(minutes=30)

Weights = Iterator[tuple[str, torch.Tensor]] | AsyncIterator[tuple[str, torch.Tensor]]


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Broadcasts weights in buckets, each of them in the format of safetensors.

    Args:
        bucket_size: bytes of weights that are sent together, > 0; a larger weight makes a bucket of its own.
        is_master: true in the actor's first process, which sends.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.bucket_size = bucket_size
        self.is_master = is_master
        self._group: ProcessGroupGloo | None = None

    def prepare(self) -> dict[str, str]:
        """Says where the processes of this transfer meet; the master does, the others have nothing to say."""
        if not self.is_master:
            return {}
        return {"meeting": os.path.join(tempfile.gettempdir(), f"weights-{uuid.uuid4().hex}")}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Gives the actor's first process rank 0, its others rank -1, and ranks from 1 to those that receive."""
        size, meeting = 1 + rollout_world_size, metadata[0]["meeting"]

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {"rank": ranks, "world_size": [size] * len(ranks), "meeting": [meeting] * len(ranks)}

        return arguments([0] + [-1] * (actor_wg_world_size - 1)), arguments(list(range(1, size)))

    def init_process_group(self, rank: int, world_size: int, meeting: str) -> None:  # type: ignore[override]
        """Joins the group of this transfer; rank -1 stays outside."""
        if rank >= 0:
            self._group = ProcessGroupGloo(FileStore(meeting, world_size), rank, world_size, TIMEOUT)

    def finalize(self) -> None:
        """Leaves the group; the file goes with the last one."""
        self._group = None

    @torch.no_grad()
    async def send_weights(self, weights: Weights, global_steps: int | None = None) -> None:
        """Sends all of ``weights``. Ranks outside the group take part in gathering them, and send nothing."""
        bucket: dict[str, torch.Tensor] = {}
        size = 0
        async for name, weight in ensure_async_iterator(weights):
            if self._group is None:
                continue
            if bucket and size + weight.nbytes > self.bucket_size:
                await self._send(bucket, last=False)
                bucket, size = {}, 0
            bucket[name] = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
            size += weight.nbytes
        if self._group is not None:
            await self._send(bucket, last=True)

    async def receive_weights(  # type: ignore[override]
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Yields each of the actor's weights with its name, in the order of the buckets."""
        last = False
        while not last:
            header = torch.zeros(2, dtype=torch.int64)
            await self._broadcast(header)
            length, last = int(header[0]), bool(header[1])
            content = torch.empty(length, dtype=torch.uint8)
            await self._broadcast(content)
            for name, weight in load(content.numpy().tobytes()).items():
                yield name, weight

    async def _send(self, bucket: dict[str, torch.Tensor], *, last: bool) -> None:
        content = torch.frombuffer(bytearray(save(bucket)), dtype=torch.uint8)
        await self._broadcast(torch.tensor([len(content), int(last)]))
        await self._broadcast(content)

    async def _broadcast(self, tensor: torch.Tensor) -> None:
        """Broadcasts from rank 0, in a thread, so that the process answers meanwhile."""
        assert self._group is not None, "init_process_group comes first"
        options = BroadcastOptions()
        options.rootRank = 0
        await asyncio.to_thread(self._group.broadcast([tensor], options).wait)  # type: ignore[attr-defined]
