# SPDX-License-Identifier: Apache-2.0
"""Removes the shared memory of verl's weight transfer, where a run ended in the middle of one.

verl's sender removes its segment itself, unless it is killed while it waits for a receiver that is dead. Segments have
random names, so each is noted in the run's folder of temporary files, which the fork server clears when the run ends.
"""

import contextlib
import tempfile
from collections.abc import Callable
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

NOTE = "shared-memory-"
#: Where Linux shows segments as files.
SEGMENTS = Path("/dev/shm")


def noted(original: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that notes the name of a segment before ``original`` makes it.

    The notes of this process's segments that are gone are removed then.
    """
    notes: dict[str, Path] = {}

    def create_shared_memory(size: int, name: str) -> Any:
        for gone in [each for each in notes if not (SEGMENTS / each).exists()]:
            notes.pop(gone).unlink(missing_ok=True)
        notes[name] = Path(tempfile.gettempdir()) / f"{NOTE}{name}"
        notes[name].touch()
        return original(size, name)

    return create_shared_memory


def remove_noted(folder: Path) -> None:
    """Removes the segments whose notes are in ``folder``; those that their owner has removed are passed over."""
    for note in folder.glob(f"{NOTE}*"):
        with contextlib.suppress(FileNotFoundError):
            segment = shared_memory.SharedMemory(name=note.name.removeprefix(NOTE))
            segment.close()
            segment.unlink()
