# SPDX-License-Identifier: Apache-2.0
"""Reads and writes files that people pass on: atomically, inside one folder, and as data that cannot run."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: JSON files of ours are a few kilobytes; a longer one is none of ours.
LONGEST_JSON = 64 << 20


def write_text(path: Path, text: str) -> None:
    """Writes a text in UTF-8, as ``write_bytes`` does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically: at ``path`` there is the old file or the whole new one, also after a crash."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: the file cannot be read, is too long, or holds no JSON object.
    """
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise ValueError(f"it has more than {LONGEST_JSON >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as JSON: {reason}; take a whole copy of its folder") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a JSON object is allowed; take a whole copy")
    return content


def inside(folder: Path, name: str) -> Path:
    """Returns the path of ``name`` in ``folder``.

    Raises:
        ValueError: it would leave the folder: an absolute path, ``..``, or a link to elsewhere.
    """
    root = folder.resolve()
    path = root / name
    if "\0" in name or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{folder} names the file {name!r}; names inside the folder are allowed; do not use it")
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{folder} holds {name!r}, a link to elsewhere; files of its own are allowed; do not use it")
    return path


def sha256(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if _HAS_DIGEST else _digest(file)


_HAS_DIGEST = hasattr(hashlib, "file_digest")  # Python 3.11


def _digest(file: Any) -> str:
    found = hashlib.sha256()
    while block := file.read(1 << 20):
        found.update(block)
    return found.hexdigest()


def refuse_taken(out: Path) -> None:
    """Raises ValueError where there is something at ``out`` already."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"out is '{out}'; a folder that does not exist or is empty is allowed; give another name")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yields a folder to fill; it becomes ``out`` at the end, and nothing is left after an error.

    Raises:
        ValueError: there is something at ``out`` already.
    """
    refuse_taken(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
