# SPDX-License-Identifier: Apache-2.0
"""Reads the warm-started policy and the prompts of a task from a folder that the commands of the tasks made."""

from pathlib import Path

import pandas as pd
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from verl_dvpo.bench.gate.variance import Policy
from verl_dvpo.bench.tasks.manifest import read_manifest
from verl_dvpo.bench.tasks.prepare import TaskFolder
from verl_dvpo.bench.tasks.registry import SETS, TASKS
from verl_dvpo.bench.tasks.task import Example


def parse_task(text: str) -> tuple[str, Path]:
    """Reads ``TASK=FOLDER``.

    Raises:
        ValueError: it is not of that form, there is no such task, or it has a simulated user.
    """
    name, separator, folder = text.partition("=")
    allowed = [name for name, task in TASKS.items() if task.user is None]
    if not separator or not folder or name not in allowed:
        raise ValueError(f"task is {text!r}; TASK=FOLDER is allowed, TASK one of {', '.join(allowed)}; correct it")
    return name, Path(folder)


def load_policy(name: str, folder: Path) -> Policy:
    """Reads the policy of the task ``name`` from its folder.

    Raises:
        ValueError: the folder is not one of a set that has the task.
    """
    for tasks in SETS:
        if name in tasks.tasks and read_manifest(folder, tasks.name) is not None:
            break
    else:
        commands = ", ".join(tasks.name for tasks in SETS if name in tasks.tasks)
        raise ValueError(
            f"folder of task {name} is {str(folder)!r}; one of the set {commands} is allowed, with its manifest; make "
            "it with the set's command, or correct the path"
        )
    made = TaskFolder(folder, tasks, {}, reused=True)
    return Policy(
        task=TASKS[name],
        model=Qwen3ForCausalLM.from_pretrained(made.model).float().eval(),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(made.model),
        longest=tasks.longest_turn,
        train=_examples(made.file(name, "train")),
        held_out=_examples(made.file(name, "val")),
    )


def _examples(path: Path) -> list[Example]:
    frame = pd.read_parquet(path)
    rows = zip(frame["data_source"], frame["prompt"], frame["reward_model"], strict=True)
    return [Example(source, prompt[0]["content"], reward["ground_truth"]) for source, prompt, reward in rows]
