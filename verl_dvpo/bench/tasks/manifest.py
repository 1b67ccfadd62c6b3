# SPDX-License-Identifier: Apache-2.0
"""Makes a folder once: whole or not at all, and again only if its settings have changed.

A manifest in the folder, a JSON file, holds the settings that it was made with and what its maker found.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from verl_dvpo.bench.common import write_json

Manifest = dict[str, Any]


def find_or_make(
    folder: Path, *, name: str, settings: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[Manifest, bool]:
    """Finds the folder made with these settings, or makes it.

    The folder is built beside its place and renamed into it. A folder made with other settings is replaced.

    Args:
        folder: an absolute path; its parents are made too.
        name: of the folder's kind; the manifest is ``<name>.json``.
        settings: everything that decides what is in the folder, in types that JSON keeps.
        build: fills an empty folder and returns what the manifest holds beside the settings.

    Returns:
        The manifest, and True if the folder was there already.

    Raises:
        ValueError: if there is something else at ``folder``.
    """
    found = read_manifest(folder, name)
    if found is not None and found["settings"] == settings:
        return found, True
    if found is None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(
            f"out_dir is {str(folder)!r}; it must be a new, an empty or an earlier {name} folder, but holds no "
            f"{name}.json; name another folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        manifest = {"settings": settings, **build(partial)}
        write_json(partial / f"{name}.json", manifest)
        _move_into_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest, False


def read_manifest(folder: Path, name: str) -> Manifest | None:
    """Reads the manifest of a folder of the kind ``name``; None if there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def code_digest(modules: Sequence[ModuleType]) -> str:
    """Returns 16 hexadecimal digits that change with the source of ``modules``."""
    digest = hashlib.sha256()
    for module in modules:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:16]


def _move_into_place(partial: Path, folder: Path) -> None:
    partial.chmod(0o755)  # mkdtemp makes it private
    if not folder.exists():
        partial.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(old / folder.name)
    partial.rename(folder)
    shutil.rmtree(old)
