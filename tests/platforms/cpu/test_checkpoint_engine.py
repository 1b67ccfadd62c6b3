# SPDX-License-Identifier: Apache-2.0
"""Weights arrive as they were sent, whatever their sizes; saved policies stay as they were while the actor learns."""

import asyncio
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from verl.checkpoint_engine import CheckpointEngineRegistry
from verl.utils import fsdp_utils

from verl_dvpo.platforms.cpu.checkpoint_engine import GlooCheckpointEngine
from verl_dvpo.platforms.cpu.patches import saved_copies


def weights() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    embedding = torch.randn(6, 4, generator=rng)
    return {
        "embedding": embedding,
        "norm": torch.randn(4, generator=rng).bfloat16(),
        "large": torch.randn(50, 4, generator=rng),
        "transposed": torch.randn(3, 5, generator=rng).T,
        "a number": torch.tensor(7.0),
        "nothing": torch.zeros(0, 4),
        "steps": torch.arange(3),
        "tied": embedding,
    }


async def transfer(engines: list[GlooCheckpointEngine], actors: int) -> tuple[list[list[str]], list[dict], Path]:
    """Does what verl's manager does with the engines of actor processes and of those before rollout servers.

    Returns the names that each actor gathered, what each other process received, and the place where they met.
    """
    metadata = [engine.prepare() for engine in engines]
    for_actors, for_servers = GlooCheckpointEngine.build_topology(actors, len(engines) - actors, metadata)
    arguments = [
        {name: values[rank] for name, values in mine.items()}
        for mine, count in ((for_actors, actors), (for_servers, len(engines) - actors))
        for rank in range(count)
    ]
    assert all(len(values) == actors for values in for_actors.values())
    await asyncio.gather(
        *(asyncio.to_thread(engine.init_process_group, **mine) for engine, mine in zip(engines, arguments, strict=True))
    )
    gathered: list[list[str]] = [[] for _ in range(actors)]

    def gather(names: list[str]):
        for name, weight in weights().items():
            names.append(name)
            buffer = weight.clone() if name != "tied" else weight
            yield name, buffer
            buffer.fill_(-1)  # whoever gathers may use its memory again

    async def receive(engine: GlooCheckpointEngine) -> dict[str, torch.Tensor]:
        found = [pair async for pair in engine.receive_weights(global_steps=3)]
        assert len({name for name, _ in found}) == len(found)
        return dict(found)

    sending = [engine.send_weights(gather(names)) for engine, names in zip(engines, gathered, strict=False)]
    results = await asyncio.gather(*sending, *(receive(engine) for engine in engines[actors:]))
    for engine in engines:
        engine.finalize()
    return gathered, results[actors:], Path(metadata[0]["meeting"])


@pytest.mark.parametrize("bucket", [1, 100, 400, 1 << 20])
def test_every_weight_arrives_once_and_as_it_was(bucket, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    engines = [CheckpointEngineRegistry.new("gloo", bucket_size=bucket, is_master=rank == 0) for rank in range(2)]
    engines += [CheckpointEngineRegistry.new("gloo", bucket_size=bucket) for _ in range(2)]
    met = set()
    for _ in range(2):  # each transfer has a group of its own
        gathered, received, meeting = asyncio.run(transfer(engines, actors=2))
        met.add(meeting)
        assert gathered == [list(weights())] * 2, "all of the actor's processes take part in gathering"
        for found in received:
            assert found.keys() == weights().keys()
            for name, weight in weights().items():
                assert found[name].dtype == weight.dtype
                assert torch.equal(found[name], weight), name
    assert len(met) == 2
    assert not any(meeting.exists() for meeting in met)


def test_a_saved_policy_stays_as_it_was_while_the_actor_learns(tmp_path):
    """On a GPU the copy in the CPU's memory is one; here it would be the parameters themselves."""
    if not torch.distributed.is_initialized():
        meeting = f"file://{tmp_path / 'meeting'}"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    old = {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}
    verls = getattr(fsdp_utils.fsdp2_sharded_save_to_cpu, "__wrapped__", fsdp_utils.fsdp2_sharded_save_to_cpu)
    save = saved_copies(verls)

    def learn() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)

    state, spec = save(model)
    learn()
    present, _ = save(model)
    fsdp_utils.fsdp2_sharded_load_from_cpu(model, state, spec)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), old[name])
    fsdp_utils.fsdp2_sharded_load_from_cpu(model, present, spec)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), old[name] + 1.0)
