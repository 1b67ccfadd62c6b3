# SPDX-License-Identifier: Apache-2.0
"""The commands ``verl-dvpo data`` and ``verl-dvpo pseudo-labels``.

Their docstrings are their help. What they use is imported when they run, so help is fast.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from verl_dvpo.bench.data.sources import Row

Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn, at least 0.")]


def data(
    name: Annotated[str | None, typer.Argument(help="A set; without one, the sets are listed.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for NAME.parquet.")] = Path("runs/data"),
    source: Annotated[
        str | None, typer.Option(help="File, folder or identifier on the hub. (default: the set's own on the hub)")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Subset of the set on the hub. (default: the set's own)")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the set on the hub. (default: the set's own)")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="FIELD=COLUMN where the source calls it otherwise; again for more.")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="Follows each prompt. (default: the set's own)")] = None,
    noise_share: Annotated[
        float | None, typer.Option(help="Share of wrong labels in [0, 1], for rlvr_noisy. (default: 1)")
    ] = None,
    num_val: Annotated[int, typer.Option(help="Rows to hold out in NAME_val.parquet.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Use the first rows only. (default: all)")] = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Write a public set as parquet files that verl reads: prompt, answer and rule of the reward.

    Example: `verl-dvpo data math500 --source MATH-500.jsonl --out runs/data`
    """
    from verl_dvpo.bench.data.prepare import Options, prepare
    from verl_dvpo.bench.data.registry import SETS, set_of

    if name is None:
        width = max(map(len, SETS))
        for each in SETS.values():
            print(f"{each.name:<{width}}  {each.ability:<9}  {each.hub or '(files of your own)'}\n    {each.schema}")
        return
    options = Options(
        source=source,
        subset=subset,
        split=split,
        columns=_pairs(column or []),
        instruction=instruction,
        noise_share=noise_share,
        num_val=num_val,
        limit=limit,
        seed=seed,
        overwrite=overwrite,
    )
    made = prepare(set_of(name), out, options)
    for path, count in made.files.items():
        print(f"{count} rows in {path}")
    for reason, count in made.skipped.items():
        print(f"  left out {count}: {reason}")
    if made.noisy is not None:
        print(f"  {made.noisy} labels are other than the right answer")


def pseudo_labels(
    data: Annotated[Path, typer.Option(help="Parquet file of `verl-dvpo data`.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    samples: Annotated[
        Path | None, typer.Option(help="Saved answers: index or id, and responses. (default: sample with vLLM)")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model to sample with: folder or identifier on the hub.")] = None,
    num_samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 16,
    temperature: Annotated[float, typer.Option(help="Of the samples.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Of the samples, in (0, 1].")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 4096,
    max_model_len: Annotated[int | None, typer.Option(help="Of prompt and answer. (default: the model's)")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Devices that share the model.")] = 1,
    memory_share: Annotated[float, typer.Option(help="Of a device's memory, for vLLM, in (0, 1].")] = 0.9,
    seed: Seed = 0,
    min_share: Annotated[float, typer.Option(help="Smallest share of the votes of a kept prompt, in [0, 1].")] = 0.0,
    ties: Annotated[str, typer.Option(help="first: the answer that came first; drop: leave the prompt out.")] = "first",
) -> None:
    """Label prompts by majority vote among a model's answers; the vote's share is kept as a column.

    Without --samples, answers are sampled with vLLM and kept beside the output as NAME_samples.parquet.

    Example: `verl-dvpo pseudo-labels --data runs/data/light_r1.parquet --model Qwen/Qwen3-8B --out
    runs/data/light_r1_votes.parquet --min-share 0.5`
    """
    from verl_dvpo.bench.data.prepare import write_rows
    from verl_dvpo.bench.data.sampling import SamplingConfig, sample, write_samples
    from verl_dvpo.bench.data.votes import VOTE_SCHEMA, label, read_samples, summary

    if (samples is None) == (model is None):
        raise ValueError(
            f"samples is {samples and str(samples)!r} and model is {model!r}; exactly one of them is allowed; give "
            "--samples FILE or --model MODEL"
        )
    rows = _prepared_rows(data)
    if samples is not None:
        answers = read_samples(samples, rows)
    else:
        config = SamplingConfig(
            model=str(model),
            num_samples=num_samples,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            max_model_len=max_model_len,
            tensor_parallel=tensor_parallel,
            memory_share=memory_share,
            seed=seed,
        )
        answers = sample(rows, config)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_samples(out.with_name(f"{out.stem}_samples.parquet"), rows, answers)
    labelled = label(rows, answers, min_share=min_share, ties=ties)
    print("\n".join(summary(labelled)))
    if not labelled.rows:
        raise ValueError(f"min_share is {min_share}; no prompt is left; lower it, or sample a stronger model")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(out, labelled.rows, VOTE_SCHEMA)
    print(f"{len(labelled.rows)} rows in {out}")


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        field, equals, column = text.partition("=")
        if not (field and equals and column):
            raise ValueError(f"column is {text!r}; FIELD=COLUMN is allowed; name both")
        pairs[field] = column
    return pairs


def _prepared_rows(path: Path) -> "list[Row]":
    """Returns the rows of a file that ``verl-dvpo data`` wrote, or says that it is none."""
    from verl_dvpo.bench.data.schema import ROW_SCHEMA
    from verl_dvpo.bench.data.sources import read_rows

    rows = read_rows(path)
    missing = [name for name in ROW_SCHEMA.names if not rows or name not in rows[0]]
    if missing:
        raise ValueError(
            f"column {missing[0]!r} is missing in {path}; a file of `verl-dvpo data` has "
            f"{', '.join(ROW_SCHEMA.names)}; prepare the set first"
        )
    return rows
