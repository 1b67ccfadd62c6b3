# SPDX-License-Identifier: Apache-2.0
"""Puts the shards of verl's FSDP checkpoint together, of any number of ranks, in a process of its own.

The files are read as data (``weights_only``): a pickle in them raises and does not run.
"""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

_NAME = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt$")


def read_shards(folder: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    """Returns the state of the model that ``folder`` holds in shards: name -> tensor on the CPU.

    Args:
        folder: of a checkpoint.
        prefixes: names that begin with none of them are left on the disk.

    Raises:
        ValueError: there are no shards, some are missing, one is no data, or they do not fit together.
    """
    ranks: dict[int, Path] = {}
    worlds: set[int] = set()
    for path in folder.iterdir():
        if match := _NAME.match(path.name):
            worlds.add(int(match[1]))
            ranks[int(match[2])] = path
    if len(worlds) != 1 or sorted(ranks) != list(range(max(worlds))):
        raise ValueError(
            f"{folder} holds shards {sorted(path.name for path in ranks.values())}; those of all ranks of one world "
            "are allowed; take a whole copy of the checkpoint"
        )
    states = [_read(ranks[rank], mmap=prefixes != ("",)) for rank in sorted(ranks)]
    if len({frozenset(state) for state in states}) != 1:
        raise ValueError(f"{folder} holds shards of different tensors; take a whole copy of the checkpoint")
    wanted = [name for name in states[0] if name.startswith(prefixes)]
    return {name: _join(name, [state[name] for state in states]) for name in wanted}


def _read(path: Path, *, mmap: bool) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} holds no tensors alone: {reason}; do not use it") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no dictionary of tensors; take a whole copy of the checkpoint")
    return state


def _join(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Joins the parts of one tensor, in the order of ranks."""
    first = parts[0]
    if not isinstance(first, DTensor):  # replicated, on every rank
        return first.detach()
    for placement in first.placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(f"{name} is placed as {placement}; whole and sharded tensors are allowed")
    local = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
    joined = _join_mesh(first.device_mesh.mesh, first.placements, local)
    if joined.shape != first.shape:
        raise ValueError(f"{name} has shape {tuple(joined.shape)} put together; it must be {tuple(first.shape)}")
    return joined.detach()


def _join_mesh(mesh: Tensor, placements: Sequence[Any], local: Sequence[Tensor]) -> Tensor:
    """Joins along the first dimension of the mesh, after each of its slices was joined."""
    if mesh.ndim == 0:
        return local[int(mesh)]
    placement, rest = placements[0], placements[1:]
    if isinstance(placement, Replicate):
        return _join_mesh(mesh[0], rest, local)
    return torch.cat([_join_mesh(slice_, rest, local) for slice_ in mesh], dim=placement.dim)
