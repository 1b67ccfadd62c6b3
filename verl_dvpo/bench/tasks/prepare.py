# SPDX-License-Identifier: Apache-2.0
"""Makes the folder of a set of tasks: a warm-started model with its tokenizer, and parquet files in verl's schema.

    <folder>/model/                    config.json, model.safetensors, tokenizer.json, ...
    <folder>/<task>/train.parquet      prompts to train on
    <folder>/<task>/val.parquet        prompts of the same kind, data source <task>
    <folder>/<task>/shifted.parquet    prompts of another kind, data source <task>_shifted, if the task has them
    <folder>/agents.yaml               registers the dialogue's agent loop with verl, if a task has a user
    <folder>/<set>.json                the settings it was made with, and scores before reinforcement learning

The parquet files of a set of one task lie in the folder itself.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
from transformers.utils import logging

from verl_dvpo.bench.tasks import addition, conversation, model, task, tokenizer, warm_start
from verl_dvpo.bench.tasks.manifest import code_digest, find_or_make
from verl_dvpo.bench.tasks.registry import TASKS, TaskSet, WarmStartConfig, task_of
from verl_dvpo.bench.tasks.task import DIALOGUE_AGENT, SINGLE_TURN_AGENT, Example, Split

PARTS = ("train", "val", "shifted")
AGENTS_FILE = "agents.yaml"
AGENTS = f"""\
# Registers an agent loop with verl: actor_rollout_ref.rollout.agent.agent_loop_config_path.
- name: {DIALOGUE_AGENT}
  _target_: verl_dvpo.bench.tasks.agent_loop.DialogueAgentLoop
"""


@dataclasses.dataclass(frozen=True)
class TaskFolder:
    """The folder of a set of tasks.

    Attributes:
        path: of the folder.
        tasks: the set.
        scores: data source -> name -> mean under greedy decoding before reinforcement learning.
        reused: True if the folder was there already.
    """

    path: Path
    tasks: TaskSet
    scores: dict[str, dict[str, float]]
    reused: bool

    @property
    def model(self) -> Path:
        """The folder of the model and its tokenizer."""
        return self.path / "model"

    def file(self, name: str, part: str) -> Path:
        """Returns the parquet file of a task's part: train, val or shifted."""
        return _task_folder(self.path, self.tasks, name) / f"{part}.parquet"


def prepare(
    tasks: TaskSet,
    out_dir: str | Path,
    *,
    seed: int = 0,
    num_train: int | None = None,
    num_val: int | None = None,
    config: WarmStartConfig | None = None,
) -> TaskFolder:
    """Makes the folder of a set of tasks, or finds it there already.

    A folder made with other settings, or by another version of this code, is replaced.

    Args:
        tasks: the set.
        out_dir: the folder to make; its parents are made too.
        seed: of everything that is drawn; at least 0.
        num_train: prompts of each task to train on, at least 1; None for the set's default.
        num_val: prompts in each validation, at least 1; None for the set's default. Other prompts are then trained on.
        config: how to train before reinforcement learning; None for the set's default.

    Raises:
        ValueError: if a number is out of range, or if ``out_dir`` is there and is no such folder.
    """
    config = config or tasks.warm_start
    sizes = {
        "num_train": tasks.num_train if num_train is None else num_train,
        "num_val": tasks.num_val if num_val is None else num_val,
    }
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0; choose another one")
    splits = {name: TASKS[name].split(seed, **sizes) for name in tasks.tasks}
    settings = {
        "seed": seed,
        **sizes,
        **dataclasses.asdict(config),
        **{name: getattr(tasks, name) for name in ("max_positions", "longest_turn", "stream")},
        "model": dataclasses.asdict(tasks.model),
        "code": code_digest(_modules(tasks)),
    }
    out = Path(out_dir).absolute()
    manifest, reused = find_or_make(
        out, name=tasks.name, settings=settings, build=lambda folder: _build(folder, tasks, splits, config, seed)
    )
    return TaskFolder(out, tasks, manifest["scores"], reused)


def rows(examples: Sequence[Example], *, part: str, with_agent: bool) -> list[dict[str, Any]]:
    """Returns one row in verl's RLHF schema for each example.

    Args:
        examples: of any tasks.
        part: train, val or shifted.
        with_agent: True to name the agent loop in each row; without it verl takes its own for single turns.
    """
    return [
        {
            "data_source": each.source,
            "prompt": tokenizer.messages(each.prompt),
            "ability": task_of(each.source).ability,
            "reward_model": {"style": "rule", "ground_truth": each.truth},
            **({"agent_name": task_of(each.source).agent} if with_agent else {}),
            "extra_info": {"split": part, "index": index},
        }
        for index, each in enumerate(examples)
    ]


def _build(
    folder: Path, tasks: TaskSet, splits: Mapping[str, Split], config: WarmStartConfig, seed: int
) -> dict[str, Any]:
    """Fills the folder and returns what the manifest holds beside the settings."""
    _write_data(folder, tasks, splits)
    characters = tokenizer.build_tokenizer(max_length=tasks.max_positions)
    policy = model.build_model(characters, tasks.model, seed=seed)
    demonstrators = [
        TASKS[name].demonstrator(seed, split, habit=config.habit, slip=config.slip) for name, split in splits.items()
    ]
    start = time.perf_counter()
    warm_start.warm_start(policy, characters, demonstrators, config, seed=(seed, tasks.stream))
    seconds = time.perf_counter() - start
    with _quiet_transformers():
        policy.save_pretrained(folder / "model")
        characters.save_pretrained(folder / "model")
    scores = {
        examples[0].source: conversation.greedy_scores(
            policy, characters, TASKS[name], examples, longest=tasks.longest_turn
        )
        for name, split in splits.items()
        for examples in (split.val, split.shifted)
        if examples
    }
    return {"scores": scores, "warm_start_seconds": round(seconds, 1)}


def _write_data(folder: Path, tasks: TaskSet, splits: Mapping[str, Split]) -> None:
    """Writes the parquet files and, if a task has a user, the registration of its agent loop."""
    with_agent = any(TASKS[name].agent != SINGLE_TURN_AGENT for name in tasks.tasks)
    for name, split in splits.items():
        own = _task_folder(folder, tasks, name)
        own.mkdir(exist_ok=True)
        for part in PARTS:
            if examples := getattr(split, part):
                frame = pd.DataFrame(rows(examples, part=part, with_agent=with_agent))
                frame.to_parquet(own / f"{part}.parquet", index=False)
    if with_agent:
        (folder / AGENTS_FILE).write_text(AGENTS)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Runs its body without the progress bars of transformers."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _task_folder(folder: Path, tasks: TaskSet, name: str) -> Path:
    return folder if tasks.tasks == (name,) else folder / name


def _modules(tasks: TaskSet) -> list[ModuleType]:
    """Lists the modules that decide what is in the folder; ``arithmetic`` uses ``addition``."""
    own = [sys.modules[TASKS[name].split.__module__] for name in tasks.tasks]
    return [*own, addition, conversation, model, task, tokenizer, warm_start, sys.modules[__name__]]
