# SPDX-License-Identifier: Apache-2.0
"""Makes the demo's folder: a warm-started model with its tokenizer, and two parquet files in verl's schema.

    <folder>/model/            config.json, model.safetensors, tokenizer.json, ...
    <folder>/train.parquet     problems to train on
    <folder>/val.parquet       problems to measure on, none of them in train.parquet or in the warm start
    <folder>/demo.json         the settings it was made with, and the accuracy before reinforcement learning

The folder appears whole or not at all: it is built beside its place and renamed into it.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from verl_dvpo.bench.demo import model as model_module
from verl_dvpo.bench.demo import task, tokenizer, warm_start
from verl_dvpo.bench.demo.task import Problem, draw_split
from verl_dvpo.bench.demo.tokenizer import build_tokenizer, messages
from verl_dvpo.bench.demo.warm_start import WarmStartConfig

DATA_SOURCE = "demo_addition"
MANIFEST = "demo.json"


@dataclass(frozen=True)
class DemoFolder:
    """Where the demo's parts lie, and how well the model does before reinforcement learning.

    Attributes:
        model: folder of the model and its tokenizer.
        train, val: parquet files.
        greedy_accuracy: fraction in [0, 1] of the validation problems solved under greedy decoding.
        reused: whether the folder was there already.
    """

    model: Path
    train: Path
    val: Path
    greedy_accuracy: float
    reused: bool


def prepare_demo(
    out_dir: str | Path,
    *,
    seed: int = 0,
    num_train: int = 4096,
    num_val: int = 256,
    warm_start_config: WarmStartConfig | None = None,
) -> DemoFolder:
    """Makes the demo's folder at `out_dir`, or finds it there already.

    A folder made with other settings, or by another version of this code, is replaced.

    Args:
        out_dir: the folder to make; its parents are made too.
        seed: of problems, demonstrations and initial weights; at least 0.
        num_train, num_val: problems in the two parquet files; at least 1.
        warm_start_config: how to train; its defaults take about a minute on two cores.

    Raises:
        ValueError: if a number is out of range, or if `out_dir` is there and is not a demo folder.
    """
    config = warm_start_config or WarmStartConfig()
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    train, val = draw_split(seed, num_train=num_train, num_val=num_val)
    settings = {"seed": seed, "num_train": num_train, "num_val": num_val, **asdict(config), "code": _code_digest()}

    out = Path(out_dir).absolute()
    found = _read_manifest(out)
    if found is not None and found["settings"] == settings:
        return _folder(out, found, reused=True)
    if found is None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out_dir {out} is there and is not a demo folder ({MANIFEST} is missing): name another one")

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        _build(partial, train, val, config, settings)
        _move_into_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    manifest = _read_manifest(out)
    assert manifest is not None
    return _folder(out, manifest, reused=False)


def rows(problems: Sequence[Problem], *, split: str) -> list[dict[str, Any]]:
    """One row in verl's RLHF schema for each problem."""
    return [
        {
            "data_source": DATA_SOURCE,
            "prompt": messages(problem.prompt),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"split": split, "index": index},
        }
        for index, problem in enumerate(problems)
    ]


def _build(
    folder: Path, train: list[Problem], val: list[Problem], config: WarmStartConfig, settings: dict[str, Any]
) -> None:
    for split, problems in (("train", train), ("val", val)):
        pd.DataFrame(rows(problems, split=split)).to_parquet(folder / f"{split}.parquet", index=False)
    characters = build_tokenizer()
    model = model_module.build_model(characters, seed=settings["seed"])
    start = time.perf_counter()
    warm_start.warm_start(model, characters, val, config, seed=settings["seed"])
    seconds = time.perf_counter() - start
    model.save_pretrained(folder / "model")
    characters.save_pretrained(folder / "model")
    accuracy = warm_start.greedy_accuracy(model, characters, val)
    manifest = {"settings": settings, "greedy_accuracy": accuracy, "warm_start_seconds": round(seconds, 1)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _move_into_place(partial: Path, out: Path) -> None:
    partial.chmod(0o755)  # mkdtemp makes it private
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        out.rename(old / "demo")
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else None


def _folder(out: Path, manifest: dict[str, Any], *, reused: bool) -> DemoFolder:
    return DemoFolder(
        model=out / "model",
        train=out / "train.parquet",
        val=out / "val.parquet",
        greedy_accuracy=manifest["greedy_accuracy"],
        reused=reused,
    )


def _code_digest() -> str:
    """Changes with the code that determines what is in the folder, so that an upgrade does not reuse an old one."""
    digest = hashlib.sha256()
    for module in (task, tokenizer, model_module, warm_start):
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]
