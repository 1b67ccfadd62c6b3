# SPDX-License-Identifier: Apache-2.0
"""Reads rows from files (parquet, JSON lines, JSON, CSV), folders of such files, or the hub."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
#: The hub's identifiers: a name, with or without its owner.
_IDENTIFIER = re.compile(r"[\w.-]+(/[\w.-]+)?")
#: Characters of one cell of a CSV file; the csv module's own limit is shorter than a worked solution.
_LONGEST_CELL = 1 << 27


def read_source(source: str, *, subset: str | None = None, split: str = "train") -> list[Row]:
    """Returns the rows of a source.

    Args:
        source: the path of a file or folder, or an identifier on the hub.
        subset: of a set on the hub; None for its only one.
        split: of a set on the hub.

    Raises:
        ValueError: there is no such file, it cannot be read, it holds no rows, or the hub does not give the set.
    """
    path = Path(source).expanduser()
    if path.exists():
        rows = [row for file in _files(path) for row in _read_file(file)]
    elif path.suffix in READERS or not _IDENTIFIER.fullmatch(source):
        raise ValueError(f"source is {source!r}; there is no such file or folder, and no set on the hub is called so")
    else:
        rows = _read_hub(source, subset, split)
    if not rows:
        raise ValueError(f"source is {source!r}; it holds no rows; take another one")
    return rows


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of one file.

    Raises:
        ValueError: there is none, it has another suffix, or it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"file is {str(path)!r}; there is none; name one that is there")
    return list(_read_file(path))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(each for each in path.rglob("*") if each.is_file() and each.suffix in READERS)
    if not files:
        raise ValueError(f"source is {str(path)!r}; the folder holds no {', '.join(READERS)}; name another one")
    return files


def _read_file(path: Path) -> Iterator[Row]:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"file is {str(path)!r}; {', '.join(READERS)} are read; convert it to one of these")
    try:
        rows = reader(path)
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"file is {str(path)!r}; it cannot be read: {reason}; take a whole copy") from error
    for row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"file is {str(path)!r}; it holds a {type(row).__name__}; each row has to be an object")
        yield row


def _read_parquet(path: Path) -> list[Row]:
    return pq.read_table(path).to_pylist()


def _read_json_lines(path: Path) -> list[Row]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _read_json(path: Path) -> list[Row]:
    """Reads a list of rows; a file of JSON lines may be called ``.json`` too."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return _read_json_lines(path)
    if not isinstance(content, list):
        raise ValueError(f"it holds a {type(content).__name__} in place of a list of rows")
    return content


def _read_csv(path: Path) -> list[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


READERS = {".parquet": _read_parquet, ".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv}


def _read_hub(source: str, subset: str | None, split: str) -> list[Row]:
    import datasets
    import httpx

    wanted = f"{source!r}" + (f", subset {subset!r}" if subset else "") + f", split {split!r}"
    try:
        found = datasets.load_dataset(source, subset, split=split)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"source is {wanted}; there is no such path here, and the hub did not give it: {reason}; check name and "
            "network, log in for sets on request, or download it and give the path"
        ) from error
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):  # only whether there is one matters; decoding takes long
            found = found.cast_column(name, datasets.Image(decode=False))
    return found.to_list()
