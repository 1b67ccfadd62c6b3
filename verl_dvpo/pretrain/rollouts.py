# SPDX-License-Identifier: Apache-2.0
"""Reads rollouts: parquet files with prompt, response and reward, and what verl dumps to ``trainer.rollout_data_dir``.

A file is data: parquet and JSON lines hold nothing that runs.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

#: Of a parquet file, and of verl's JSON lines: the names of prompt, response and reward.
COLUMNS = {".parquet": ("prompt", "response", "reward"), ".jsonl": ("input", "output", "score")}

SCHEMA = "prompt (text, messages or token ids), response (text or token ids), reward (number)"


@dataclass(frozen=True)
class Rollout:
    """One answer to a prompt, and its reward.

    Attributes:
        prompt: token ids, at least one.
        response: token ids, at least one.
        reward: finite; given at the response's last token.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    reward: float


def read_rollouts(paths: Iterable[Path], tokenizer: Any) -> list[Rollout]:
    """Reads files and folders of rollouts, in the order of their names.

    Texts are tokenised as they are; messages go through the tokenizer's chat template. verl's dump leaves out special
    tokens, the end of an answer among them. A rollout with an empty prompt or response is passed over.

    Args:
        paths: parquet files, JSON lines, or folders of them.
        tokenizer: a transformers tokenizer; None allows token ids only.

    Raises:
        ValueError: names the file, what is wrong with it and what is expected.
    """
    found: list[Rollout] = []
    for file in _files(paths):
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
        for number, row in enumerate(rows):
            rollout = _rollout(row, tokenizer, f"{file}, row {number}", COLUMNS[file.suffix])
            if rollout.prompt and rollout.response:
                found.append(rollout)
    if not found:
        raise ValueError(f"rollouts are {', '.join(map(str, paths))}; none holds a prompt with an answer; {SCHEMA}")
    return found


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        inner = sorted(file for suffix in COLUMNS for file in path.glob(f"*{suffix}")) if path.is_dir() else [path]
        if not inner or not inner[0].is_file() or inner[0].suffix not in COLUMNS:
            raise ValueError(
                f"rollouts is '{path}'; parquet files, JSON lines (.jsonl) or a folder of them are allowed"
            )
        yield from inner


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        # memory_map=False: a file that shrinks while it is read raises instead of killing the process
        with parquet.ParquetFile(file, memory_map=False, page_checksum_verification=True) as opened:
            _require(file, opened.schema_arrow.names)
            table = opened.read(columns=list(COLUMNS[".parquet"]), use_threads=False)
            complete = table.num_rows == opened.metadata.num_rows
        table.validate(full=True)
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError, MemoryError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{file} is no whole parquet file: {reason}; take a whole copy") from error
    if not complete:
        raise ValueError(f"{file} is no whole parquet file: rows are missing; take a whole copy")
    yield from rows


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}; take a whole copy") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}, is no JSON: {error}; take a whole copy") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}, holds a {type(row).__name__}; a JSON object is allowed")
        _require(file, row)
        yield row


def _require(file: Path, names: Iterable[str]) -> None:
    there = list(names)
    for name in COLUMNS[file.suffix]:
        if name not in there:
            raise ValueError(f"{file} has no column {name!r}; it has {', '.join(sorted(there))}; expected: {SCHEMA}")


def _rollout(row: dict[str, Any], tokenizer: Any, place: str, names: Sequence[str]) -> Rollout:
    prompt, response, reward = (row[name] for name in names)
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise ValueError(f"{place}: {names[2]} is {reward!r}; a finite number is allowed; correct or leave out the row")
    return Rollout(
        _ids(prompt, tokenizer, f"{place}: {names[0]}", messages=True),
        _ids(response, tokenizer, f"{place}: {names[1]}", messages=False),
        float(reward),
    )


def _ids(value: Any, tokenizer: Any, place: str, *, messages: bool) -> tuple[int, ...]:
    if isinstance(value, list) and all(isinstance(item, int) and item >= 0 for item in value):
        return tuple(value)
    chat = messages and isinstance(value, list) and all(isinstance(item, dict) for item in value)
    if not (isinstance(value, str) or chat):
        kinds = "text, messages or token ids" if messages else "text or token ids"
        raise ValueError(f"{place} is {str(value)[:80]!r}; {kinds} are allowed")
    if tokenizer is None:
        raise ValueError(f"{place} is text; the model has no tokenizer; give token ids")
    if chat:
        try:
            value = tokenizer.apply_chat_template(value, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"{place} does not fit the chat template: {error}") from error
    return tuple(tokenizer(value, add_special_tokens=False)["input_ids"])


def split_by_prompt(rollouts: Sequence[Rollout], share: float, seed: int) -> tuple[list[Rollout], list[Rollout]]:
    """Splits by prompt, so that no prompt is in both parts.

    Args:
        rollouts: at least two different prompts.
        share: of the prompts that is held out, in (0, 1); at least one prompt is on each side.
        seed: of the choice.

    Returns:
        What to train on, and what is held out.

    Raises:
        ValueError: a share outside (0, 1), or fewer than two prompts.
    """
    import torch

    if not 0.0 < share < 1.0:
        raise ValueError(f"held_out is {share}; a number in (0, 1) is allowed")
    prompts = sorted({rollout.prompt for rollout in rollouts})
    if len(prompts) < 2:
        raise ValueError(f"rollouts hold {len(prompts)} prompt; two or more are needed, to hold some out")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    out = {prompts[i] for i in order[:count]}
    return [r for r in rollouts if r.prompt not in out], [r for r in rollouts if r.prompt in out]
