# SPDX-License-Identifier: Apache-2.0
"""Makes the domains' folder: one warm-started model with its tokenizer, and nine parquet files in verl's schema.

    <folder>/model/                      config.json, model.safetensors, tokenizer.json, ...
    <folder>/<domain>/train.parquet      prompts to train on
    <folder>/<domain>/val.parquet        prompts of the same kind, data source <domain>
    <folder>/<domain>/shifted.parquet    prompts of another kind, data source <domain>_shifted
    <folder>/domains.json                the settings it was made with, and scores before reinforcement learning

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

from verl_dvpo.bench.demo import model as demo_model
from verl_dvpo.bench.demo import task as demo_task
from verl_dvpo.bench.demo import tokenizer as demo_tokenizer
from verl_dvpo.bench.demo.tokenizer import build_tokenizer, messages
from verl_dvpo.bench.domains import arithmetic, conversation, dialogue, example, science
from verl_dvpo.bench.domains import warm_start as warm_start_module
from verl_dvpo.bench.domains.example import Example, Split
from verl_dvpo.bench.domains.warm_start import MAX_POSITIONS, DomainsConfig, build_model, warm_start

DOMAINS = {domain.NAME: domain for domain in (arithmetic, science, dialogue)}
#: verl's agent loop for a domain's rows; `verl_dvpo.bench.domains.agent_loop` has the dialogue's.
AGENTS = {arithmetic.NAME: "single_turn_agent", science.NAME: "single_turn_agent", dialogue.NAME: "dialogue_agent"}
ABILITIES = {arithmetic.NAME: "math", science.NAME: "science", dialogue.NAME: "dialogue"}
MANIFEST = "domains.json"
PARTS = ("train", "val", "shifted")
#: Tokens of a prompt and of a response, as in config/task/domains.yaml.
LONGEST_PROMPT, LONGEST_RESPONSE = 64, 112


@dataclass(frozen=True)
class DomainsFolder:
    """Where the parts lie, and how well the model does before reinforcement learning.

    Attributes:
        folder: of everything.
        scores: data source -> name -> mean in [0, 1] under greedy decoding.
        reused: whether the folder was there already.
    """

    folder: Path
    scores: dict[str, dict[str, float]]
    reused: bool


def prepare_domains(
    out_dir: str | Path,
    *,
    seed: int = 0,
    num_train: int = 2048,
    num_val: int = 256,
    config: DomainsConfig | None = None,
) -> DomainsFolder:
    """Makes the folder at `out_dir`, or finds it there already; one made with other settings or code is replaced.

    Args:
        out_dir: the folder to make; its parents are made too.
        seed: of everything that is drawn; at least 0.
        num_train, num_val: prompts of each domain to train on, and in each of its two validations; at least 1.
        config: how to train.

    Raises:
        ValueError: a number is out of range, or `out_dir` is there and is no such folder.
    """
    config = config or DomainsConfig()
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    splits = {name: domain.split(seed, num_train=num_train, num_val=num_val) for name, domain in DOMAINS.items()}
    settings = {"seed": seed, "num_train": num_train, "num_val": num_val, **asdict(config), "code": _code_digest()}
    out = Path(out_dir).absolute()
    found = _read_manifest(out)
    if found is not None and found["settings"] == settings:
        return DomainsFolder(out, found["scores"], reused=True)
    if found is None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out_dir {out} is there and is no domains folder ({MANIFEST} is missing): name another one")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        manifest = _build(partial, splits, config, settings)
        _move_into_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return DomainsFolder(out, manifest["scores"], reused=False)


def rows(examples: Sequence[Example], *, part: str) -> list[dict[str, Any]]:
    """One row in verl's RLHF schema for each example."""
    return [
        {
            "data_source": each.source,
            "prompt": messages(each.prompt),
            "ability": ABILITIES[each.domain],
            "reward_model": {"style": "rule", "ground_truth": each.truth},
            "agent_name": AGENTS[each.domain],
            "extra_info": {"split": part, "index": index},
        }
        for index, each in enumerate(examples)
    ]


def _build(folder: Path, splits: dict[str, Split], config: DomainsConfig, settings: dict[str, Any]) -> dict[str, Any]:
    for name, split in splits.items():
        (folder / name).mkdir()
        for part in PARTS:
            frame = pd.DataFrame(rows(getattr(split, part), part=part))
            frame.to_parquet(folder / name / f"{part}.parquet", index=False)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = MAX_POSITIONS
    model = build_model(tokenizer, seed=settings["seed"])
    demonstrators = {
        name: DOMAINS[name].demonstrator(settings["seed"], split, habit=config.habit, slip=config.slip)
        for name, split in splits.items()
    }
    start = time.perf_counter()
    warm_start(model, tokenizer, demonstrators, config, seed=settings["seed"])
    seconds = time.perf_counter() - start
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    scores = {
        examples[0].source: conversation.greedy_scores(model, tokenizer, examples, longest=48)
        for split in splits.values()
        for examples in (split.val, split.shifted)
    }
    manifest = {"settings": settings, "scores": scores, "warm_start_seconds": round(seconds, 1)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _move_into_place(partial: Path, out: Path) -> None:
    partial.chmod(0o755)  # mkdtemp makes it private
    if not out.exists():
        partial.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    out.rename(old / "domains")
    partial.rename(out)
    shutil.rmtree(old)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else None


def _code_digest() -> str:
    """Changes with the code that determines what is in the folder, so that an upgrade does not reuse an old one."""
    digest = hashlib.sha256()
    ours = (*DOMAINS.values(), conversation, example, warm_start_module)
    for module in (*ours, demo_model, demo_task, demo_tokenizer):
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]
