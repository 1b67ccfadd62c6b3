# SPDX-License-Identifier: Apache-2.0
"""Writes a set as parquet files in verl's schema.

<folder>/<set>.parquet           the rows
<folder>/<set>_val.parquet       rows held out of them, if asked for
<folder>/<set>.json              source, columns, options, and what was left out
<folder>/<set>_agents.yaml       registers the agent loop of a dialogue with verl
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl_dvpo.bench.common import write_json
from verl_dvpo.bench.data.dialogue import AGENT
from verl_dvpo.bench.data.schema import ROW_SCHEMA, DataSet, Example, SkippedRow, find_columns
from verl_dvpo.bench.data.sources import Row, read_source
from verl_dvpo.saved.files import write_bytes, write_text

AGENTS = f"""\
# Registers an agent loop with verl: actor_rollout_ref.rollout.agent.agent_loop_config_path.
- name: {AGENT}
  _target_: verl_dvpo.bench.data.dialogue_loop.ServiceDialogueAgentLoop
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of a preparation.

    Attributes:
        source: path or identifier on the hub; None for the set's own on the hub.
        subset: of the hub's set; None for the set's own.
        split: of the hub's set; None for the set's own.
        columns: field or published column -> column of the source.
        instruction: follows each prompt that is not published as messages; None for the set's own.
        noise_share: share in [0, 1] of the prompts whose label is the published wrong answer; None for all. Only for
            sets that have both.
        num_val: rows to hold out, at least 0.
        limit: rows to use, the first ones, at least 1; None for all.
        seed: of all that is drawn: order of options, noisy labels, rows held out. At least 0.
        overwrite: whether files that are there are replaced.

    Raises:
        ValueError: a number is out of its range.
    """

    source: str | None = None
    subset: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    instruction: str | None = None
    noise_share: float | None = None
    num_val: int = 0
    limit: int | None = None
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_val", 0), ("seed", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}; choose a larger one")
        if self.noise_share is not None and not 0.0 <= self.noise_share <= 1.0:
            raise ValueError(f"noise_share is {self.noise_share}; it must be in [0, 1]; choose a share")


@dataclass(frozen=True)
class Prepared:
    """The outcome of a preparation.

    Attributes:
        files: file -> number of rows.
        skipped: reason -> number of rows that were left out for it.
        noisy: rows whose label is a wrong answer; None where that is not known.
    """

    files: dict[Path, int]
    skipped: dict[str, int]
    noisy: int | None


def prepare(dataset: DataSet, out_dir: str | Path, options: Options) -> Prepared:
    """Reads a set and writes its files; nothing is written unless all of it can be.

    Args:
        dataset: the set.
        out_dir: the folder; made if needed.
        options: as above.

    Raises:
        ValueError: the source cannot be read or lacks a column, no row is usable, or a file is there already.
    """
    out = Path(out_dir)
    _check_out(dataset, out, options)
    source = options.source or dataset.hub
    if source is None:
        raise ValueError(f"source is None; {dataset.name} is on no hub: give a file or folder with {dataset.schema}")
    rows = read_source(source, subset=options.subset or dataset.subset, split=options.split or dataset.split)
    variant, columns = _variant(dataset, rows, options.columns)
    examples, tags, skipped = _examples(variant, rows[: options.limit], columns, options.seed)
    if not examples:
        raise ValueError(f"source is {source!r}; none of its rows can be used ({_reasons(skipped)}); take another one")
    examples = _with_noise(dataset, examples, options)
    held_out = _held_out(len(examples), options)
    ending = dataset.instruction if options.instruction is None else options.instruction
    written = [_row(dataset, each, *tag, instruction=ending) for each, tag in zip(examples, tags, strict=True)]
    files = _write(dataset, out, written, held_out)
    noisy = _count_noisy(examples)
    write_json(
        out / f"{dataset.name}.json",
        {
            "set": dataset.name,
            "source": source,
            "licence": dataset.licence,
            "columns": columns,
            "options": {**dataclasses.asdict(options), "columns": dict(options.columns)},
            "rows": {path.name: count for path, count in files.items()},
            "skipped": skipped,
            "noisy_labels": noisy,
        },
    )
    return Prepared(files, skipped, noisy)


def write_rows(path: Path, rows: Sequence[Row], schema: pa.Schema = ROW_SCHEMA) -> None:
    """Writes rows as a parquet file of that schema, atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink)
    write_bytes(path, sink.getvalue().to_pybytes())


def _check_out(dataset: DataSet, out: Path, options: Options) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {str(out)!r}; it must be a folder, but is a file; name another one")
    names = [f"{dataset.name}.parquet", f"{dataset.name}_val.parquet"]
    there = [name for name in names if (out / name).exists()]
    if there and not options.overwrite:
        raise ValueError(f"out is {str(out)!r}; {', '.join(there)} is there already; name another one, or --overwrite")
    if options.noise_share is not None and not any(each.name == "wrong" for each in dataset.fields):
        raise ValueError(
            f"noise_share is {options.noise_share}; {dataset.name} has no wrong answers of its own; leave it out, and "
            "use noise=... in training"
        )


def _variant(dataset: DataSet, rows: Sequence[Row], chosen: Mapping[str, str]) -> tuple[DataSet, dict[str, str]]:
    """Returns the set, or its alternative, whose columns the rows have, and the columns."""
    present = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return dataset, find_columns(dataset, present, chosen)
    except ValueError:
        if dataset.alternative is not None:
            try:
                return dataset.alternative, find_columns(dataset.alternative, present, chosen)
            except ValueError:
                pass  # the message about the set itself names the alternative too
        raise


def _examples(
    dataset: DataSet, rows: Sequence[Row], columns: Mapping[str, str], seed: int
) -> tuple[list[Example], list[tuple[int, str]], dict[str, int]]:
    """Returns the examples, the number and the tags of each one's row, and the reasons for rows that give none."""
    examples, tags = [], []
    skipped: Counter[str] = Counter()
    for index, row in enumerate(rows):
        values = {each.name: row.get(columns[each.name]) if each.name in columns else None for each in dataset.fields}
        try:
            example = dataset.build(values, np.random.default_rng([seed, index]))
        except SkippedRow as reason:
            skipped[str(reason)] += 1
            continue
        examples.append(example)
        kept = {name: row[name] for name in dataset.tags if row.get(name) is not None}
        tags.append((index, json.dumps(kept, ensure_ascii=False, default=str)))
    return examples, tags, dict(skipped)


def _with_noise(dataset: DataSet, examples: list[Example], options: Options) -> list[Example]:
    """Gives the asked share of the examples that have a wrong answer that answer as their label."""
    pairs = [place for place, each in enumerate(examples) if each.wrong is not None]
    share = 1.0 if options.noise_share is None else options.noise_share
    rng = np.random.default_rng([options.seed, len(examples), 1])
    chosen = set(rng.permutation(pairs)[: round(share * len(pairs))].tolist())
    return [
        dataclasses.replace(each, truth=each.wrong) if place in chosen and each.wrong is not None else each
        for place, each in enumerate(examples)
    ]


def _count_noisy(examples: Sequence[Example]) -> int | None:
    known = [each for each in examples if each.original is not None]
    return sum(each.truth != each.original for each in known) if known else None


def _held_out(count: int, options: Options) -> frozenset[int]:
    if options.num_val >= count:
        raise ValueError(f"num_val is {options.num_val}; only {count} rows can be used; hold out fewer")
    rng = np.random.default_rng([options.seed, count, 2])
    return frozenset(rng.permutation(count)[: options.num_val].tolist())


def _row(dataset: DataSet, example: Example, index: int, tags: str, *, instruction: str) -> Row:
    """Returns a row of ``ROW_SCHEMA``, without its split."""
    if isinstance(example.prompt, str):
        words = f"{example.prompt}\n\n{instruction}" if instruction else example.prompt
        prompt: list[dict[str, str]] = [{"role": "user", "content": words}]
    else:
        prompt = list(example.prompt)
    return {
        "data_source": dataset.name,
        "prompt": prompt,
        "ability": dataset.ability,
        "reward_model": {"style": "rule", "ground_truth": example.truth},
        "agent_name": dataset.agent,
        "extra_info": {
            "index": index,
            "id": example.id,
            "grader": example.grader,
            "options": example.options,
            "original_truth": example.original or "",
            "tags": tags,
        },
    }


def _write(dataset: DataSet, out: Path, rows: Sequence[Row], held_out: frozenset[int]) -> dict[Path, int]:
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Row]] = {dataset.name: [], f"{dataset.name}_val": []}
    for place, row in enumerate(rows):
        val = place in held_out
        info: dict[str, Any] = {**row["extra_info"], "split": "val" if val else "train"}
        parts[f"{dataset.name}_val" if val else dataset.name].append({**row, "extra_info": info})
    files = {}
    for name, part in parts.items():
        path = out / f"{name}.parquet"
        if part:
            files[path] = len(part)
            write_rows(path, part)
        else:
            path.unlink(missing_ok=True)  # an earlier one, whose rows are trained on now
    if dataset.agent == AGENT:
        write_text(out / f"{dataset.name}_agents.yaml", AGENTS)
    return files


def _reasons(skipped: Mapping[str, int]) -> str:
    return "; ".join(f"{count}: {reason}" for reason, count in skipped.items())
