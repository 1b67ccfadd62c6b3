# SPDX-License-Identifier: Apache-2.0
"""The manifest around verl's checkpoint of the critic: written when all ranks have saved, checked before any loads."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from verl_dvpo.families.base import FamilyConfig, ValueFamily
from verl_dvpo.saved.facts import program_facts
from verl_dvpo.saved.manifest import (
    FILE,
    Manifest,
    check_files,
    describe_files,
    differences,
    file_names,
    read_manifest,
    write_manifest,
)

#: What a family keeps beside the head, see ``ValueFamily.state``.
STATE_FILE = "family_state.safetensors"

#: verl names the files of a rank so.
_OF_RANK = re.compile(r"_rank_(\d+)\.pt$")

#: Among a manifest's facts: the engine that wrote the checkpoint, ``fsdp`` or ``megatron``; absent in older ones.
ENGINE = "engine"

FORCE_DATA = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Settings(Protocol):
    """The part of a family's settings that a manifest needs; ``FamilyConfig`` has it."""

    @property
    def family(self) -> str:
        """Returns the family's name."""

    def plain(self) -> dict[str, Any]:
        """Returns every setting."""

    def layout(self) -> dict[str, Any]:
        """Returns the settings that fix what the outputs mean."""


def describe_critic(
    kind: str, settings: Settings, num_outputs: int, hidden_size: int, facts: Mapping[str, Any]
) -> Manifest:
    """Returns the manifest of a critic, still without files.

    Args:
        kind: ``checkpoint`` or ``critic``.
        settings: of its family.
        num_outputs: D.
        hidden_size: H of the backbone.
        facts: of the run; those of the program are added.
    """
    return Manifest(
        kind=kind,
        family=settings.family,
        num_outputs=num_outputs,
        hidden_size=hidden_size,
        layout=layout(settings, num_outputs),
        settings=settings.plain(),
        facts={**program_facts(), **facts},
    )


def layout(settings: Settings, num_outputs: int) -> dict[str, Any]:
    """Returns what must agree for a saved head to be loaded, see ``FamilyConfig.layout``."""
    return {**settings.layout(), "num_outputs": num_outputs}


def check_checkpoint(folder: Path, settings: FamilyConfig, num_outputs: int) -> Manifest:
    """Reads a checkpoint's manifest, and compares the sizes of its files and the critic that wrote it.

    Raises:
        ValueError: it is not whole, or another family or other sizes wrote it; names the difference.
    """
    manifest = read_manifest(folder, "checkpoint")
    refuse_differences(folder, manifest, settings, num_outputs)
    check_files(folder, manifest, contents=False)
    return manifest


def refuse_differences(folder: Path, manifest: Manifest, settings: FamilyConfig, num_outputs: int) -> None:
    """Raises ValueError where the critic in ``folder`` has another family or other sizes than ``settings``."""
    found = differences(manifest, settings.family, layout(settings, num_outputs))
    if found:
        raise ValueError(
            f"critic.value does not fit {folder}: {'; '.join(found)}; set critic.value as it was there, or start anew; "
            "nothing was loaded"
        )


def refuse_other_engine(folder: Path, facts: Mapping[str, Any], engine: str) -> None:
    """Raises ValueError unless ``engine`` wrote the checkpoint; older manifests do not say, and pass."""
    saved = facts.get(ENGINE, engine)
    if saved != engine:
        raise ValueError(
            f"{folder} was saved by the critic on {saved!r}; this run's is on {engine!r}; start it with that "
            "engine, or export the critic and start from that"
        )


# ---------------------------------------------------------------------- on all ranks together


def unseal(folder: Path) -> None:
    """Takes the manifest away before files under it change; call on every rank."""
    if distributed.get_rank() == 0:
        (folder / FILE).unlink(missing_ok=True)
    distributed.barrier()


def seal(folder: Path, manifest: Manifest, family: ValueFamily) -> None:
    """Saves the family's state, then the manifest; call on every rank, after all have saved.

    Each rank describes its own files, which may lie on a disk of its own; rank 0 describes the others and writes.

    Raises:
        RuntimeError: a file cannot be read or written on some rank.
    """

    def describe() -> dict[str, dict[str, Any]]:
        if distributed.get_rank() == 0 and (state := family.state()):
            save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, folder / STATE_FILE)
        return describe_files(folder, _own(file_names(folder)))

    found = _on_all_ranks(describe)
    if distributed.get_rank() == 0:
        write_manifest(folder, manifest.of_files({name: file for part in found for name, file in part.items()}))
    distributed.barrier()


def verify(
    folder: Path, settings: FamilyConfig, num_outputs: int, refuse_saved: Callable[[Path, Mapping[str, Any]], None]
) -> None:
    """Checks the whole checkpoint before any part of it is loaded; call on every rank.

    Args:
        folder: of the checkpoint.
        settings: of the family that shall load it.
        num_outputs: D.
        refuse_saved: raises ValueError where the engine cannot load what its facts describe.

    Raises:
        ValueError: on every rank, where something is missing, changed or does not fit on any of them.
    """
    world = distributed.get_world_size()

    def read() -> Manifest | None:
        if distributed.get_rank() != 0:
            return None
        manifest = read_manifest(folder, "checkpoint")
        refuse_differences(folder, manifest, settings, num_outputs)
        refuse_saved(folder, manifest.facts)
        saved = {int(match[1]) + 1 for name in manifest.files if (match := _OF_RANK.search(name))}
        if saved and max(saved) != world:
            raise ValueError(
                f"{folder} was saved by {max(saved)} ranks; this run has {world}; start it with as many, or export the "
                "critic and start from that"
            )
        return manifest

    manifest = _on_all_ranks(read)[0]
    assert manifest is not None

    def check() -> None:
        check_files(folder, manifest, _own(list(manifest.files)))

    _on_all_ranks(check)


def load_state(folder: Path, family: ValueFamily) -> None:
    """Gives the family back what it kept in a checkpoint that ``verify`` has passed."""
    file = folder / STATE_FILE
    holder = [load_file(file) if distributed.get_rank() == 0 and file.is_file() else {}]
    distributed.broadcast_object_list(holder, src=0)
    family.load_state(holder[0])


@contextmanager
def data_only() -> Iterator[None]:
    """Makes every ``torch.load`` inside refuse whatever is not data; verl's own asks for pickles.

    numpy's random state, which verl saves, is let through.
    """
    before = os.environ.get(FORCE_DATA)
    os.environ[FORCE_DATA] = "1"
    try:
        with torch.serialization.safe_globals(_numpy_parts()):
            yield
    finally:
        if before is None:
            del os.environ[FORCE_DATA]
        else:
            os.environ[FORCE_DATA] = before


def _numpy_parts() -> list[Any]:
    reconstruct = np.zeros(0).__reduce__()[0]
    return [np.ndarray, np.dtype, reconstruct, type(np.dtype(np.uint32)), type(np.dtype(np.int64))]


def _own(names: list[str]) -> list[str]:
    """Picks the names of this rank's files; those of no rank belong to rank 0."""
    rank = distributed.get_rank()
    return [name for name in names if (int(m[1]) if (m := _OF_RANK.search(name)) else 0) == rank]


def _on_all_ranks(work: Callable[[], Any]) -> list[Any]:
    """Runs ``work`` on every rank and returns all results; where one fails, all raise its error."""
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as caught:
        error = (isinstance(caught, ValueError), str(caught))
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, (result, error))
    for _, failure in gathered:
        if failure is not None:
            raise ValueError(failure[1]) if failure[0] else RuntimeError(failure[1])
    return [part for part, _ in gathered]
