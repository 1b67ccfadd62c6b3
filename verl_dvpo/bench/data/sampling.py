# SPDX-License-Identifier: Apache-2.0
"""Samples answers to the prompts of a prepared set with vLLM and writes them, so that votes can be counted again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from verl_dvpo.bench.common import Progress
from verl_dvpo.bench.data.prepare import write_rows
from verl_dvpo.bench.data.sources import Row

#: Prompts that vLLM gets at once: enough to fill its batches, few enough to tell how far it is.
PROMPTS = 256
SAMPLE_SCHEMA = pa.schema([("index", pa.int64()), ("id", pa.string()), ("responses", pa.list_(pa.string()))])


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of the sampler.

    Attributes:
        model: a folder or an identifier on the hub.
        num_samples: answers to each prompt, at least 1.
        temperature: at least 0.
        top_p: in (0, 1].
        max_tokens: of an answer, at least 1.
        tensor_parallel: devices that share the model, at least 1.
        max_model_len: tokens of prompt and answer; None for the model's own.
        memory_share: share in (0, 1] of a device's memory that vLLM takes.
        seed: of the draws, at least 0; each answer has draws of its own.

    Raises:
        ValueError: a number is out of its range.
    """

    model: str
    num_samples: int = 16
    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 4096
    tensor_parallel: int = 1
    max_model_len: int | None = None
    memory_share: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_tokens", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1; choose a larger one")
        if self.temperature < 0 or self.seed < 0:
            raise ValueError(f"temperature is {self.temperature}, seed {self.seed}; both must be at least 0; raise it")
        for name in ("top_p", "memory_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in (0, 1]; choose a share")


def sample(rows: Sequence[Row], config: SamplingConfig) -> list[list[str]]:
    """Returns ``num_samples`` answers to the prompt of each row.

    Raises:
        ValueError: vLLM is not installed, or does not start with the model.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise ValueError(
            f"vllm cannot be imported: {error}; pip install 'verl-dvpo[gpu]', or pass --samples"
        ) from error
    try:
        engine = LLM(
            model=config.model,
            tensor_parallel_size=config.tensor_parallel,
            max_model_len=config.max_model_len,
            gpu_memory_utilization=config.memory_share,
            seed=config.seed,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"model is {config.model!r}; vLLM does not start with it: {error}; its lines above say why; if memory is "
            f"short, lower memory_share, which is {config.memory_share}, or max_model_len"
        ) from error
    parameters = [
        SamplingParams(
            n=config.num_samples,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_tokens,
            # vLLM adds the answer's number; equal seeds would draw alike for all prompts
            seed=config.seed + place * config.num_samples,
        )
        for place in range(len(rows))
    ]
    answers: list[list[str]] = []
    with Progress(len(rows), unit="prompt") as progress:
        for start in range(0, len(rows), PROMPTS):
            some = slice(start, start + PROMPTS)
            # vLLM's own bar divides by its time, which is 0 where bars are switched off
            outputs = engine.chat([row["prompt"] for row in rows[some]], parameters[some], use_tqdm=False)
            answers += [[answer.text for answer in output.outputs] for output in outputs]
            progress.update(len(answers), f"{config.num_samples} answers to each")
    return answers


def write_samples(path: Path, rows: Sequence[Row], samples: Sequence[Sequence[str]]) -> None:
    """Writes samples as ``votes.read_samples`` reads them."""
    write_rows(
        path,
        [
            {"index": row["extra_info"]["index"], "id": row["extra_info"]["id"], "responses": list(texts)}
            for row, texts in zip(rows, samples, strict=True)
        ],
        SAMPLE_SCHEMA,
    )
