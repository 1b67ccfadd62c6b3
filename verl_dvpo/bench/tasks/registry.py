# SPDX-License-Identifier: Apache-2.0
"""Lists the tasks and the sets of tasks that share one folder and one model.

Reward workers import this file, so it imports nothing heavy.
"""

import dataclasses
from dataclasses import dataclass

from verl_dvpo.bench.tasks import addition, arithmetic, dialogue, exam, science
from verl_dvpo.bench.tasks.task import SHIFTED, Task

#: Every task by its name.
TASKS: dict[str, Task] = {
    task.name: task for task in (addition.TASK, arithmetic.TASK, science.TASK, dialogue.TASK, exam.TASK)
}


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Settings of the supervised training that precedes reinforcement learning.

    Attributes:
        steps: optimizer steps, at least 1.
        batch_size: demonstrations a step, at least 1.
        learning_rate: peak of AdamW's rate, above 0. It rises linearly and then decays linearly to 2 % of the peak.
        warmup_steps: steps of the rise, at least 1.
        habit: the teachers' probability in [0, 1] of an error where they have learned something wrong.
        slip: the teachers' probability in [0, 1] of an error anywhere else.

    Raises:
        ValueError: if a number is out of its range.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int
    habit: float
    slip: float

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "warmup_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1; choose a larger one")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0; choose a larger one")
        for name in ("habit", "slip"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]; choose a probability")


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The size of a set's model, a Qwen3.

    Attributes:
        hidden_size: at least 1.
        intermediate_size: of the feed-forward layers, at least 1.
        num_layers: at least 1.
        num_heads: at least 1; of ``model.HEAD_DIM`` each.
        num_key_value_heads: at least 1; ``num_heads`` is a multiple of it.

    Raises:
        ValueError: if a number is out of its range.
    """

    hidden_size: int = 192
    intermediate_size: int = 448
    num_layers: int = 2
    num_heads: int = 6
    num_key_value_heads: int = 2

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1; choose a larger one")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_key_value_heads, which is "
                f"{self.num_key_value_heads}; change one of them"
            )


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """Tasks that share one folder and one model.

    Attributes:
        name: of the set; the manifest in its folder is ``<name>.json``.
        tasks: the names of the tasks; demonstrations take turns in this order.
        num_train: prompts of each task to train on.
        num_val: prompts in each validation.
        warm_start: how the model is trained before reinforcement learning.
        max_positions: tokens of prompt and response for which the model has room.
        longest_turn: tokens that the model may write in one turn of the greedy validation.
        stream: second part of the seed of the demonstrations.
        model: the size of the model.
    """

    name: str
    tasks: tuple[str, ...]
    num_train: int
    num_val: int
    warm_start: WarmStartConfig
    max_positions: int
    longest_turn: int
    stream: int
    model: ModelSize = ModelSize()


#: Three-digit addition for ``make train``; its settings are config/task/demo.yaml.
DEMO = TaskSet(
    name="demo",
    tasks=(addition.TASK.name,),
    num_train=4096,
    num_val=256,
    warm_start=WarmStartConfig(steps=400, warmup_steps=30, habit=0.8, slip=0.04),
    max_positions=128,
    longest_turn=addition.LONGEST_RESPONSE + 1,
    stream=1,
)
#: Three domains with a shifted validation each, for studies; their settings are config/task/domains.yaml.
DOMAINS = TaskSet(
    name="domains",
    tasks=(arithmetic.TASK.name, science.TASK.name, dialogue.TASK.name),
    num_train=2048,
    num_val=256,
    warm_start=WarmStartConfig(steps=600, warmup_steps=50, habit=0.75, slip=0.03),
    max_positions=256,
    longest_turn=48,
    stream=40,
)
#: Papers with partial credit, on a model of half the size; their settings are config/task/exam.yaml.
EXAM = TaskSet(
    name="exam",
    tasks=(exam.TASK.name,),
    num_train=8192,
    num_val=256,
    warm_start=WarmStartConfig(steps=400, warmup_steps=30, habit=0.75, slip=0.03),
    max_positions=64,
    longest_turn=exam.LONGEST_RESPONSE + 1,
    stream=60,
    model=ModelSize(hidden_size=128, intermediate_size=320, num_heads=4),
)
#: Every set.
SETS = (DEMO, DOMAINS, EXAM)


def task_of(source: str) -> Task:
    """Returns the task of a data source.

    Raises:
        ValueError: if no task has that data source.
    """
    try:
        return TASKS[source.removesuffix(SHIFTED)]
    except KeyError:
        raise ValueError(
            f"data_source is {source!r}; allowed are {', '.join(TASKS)}, each with or without {SHIFTED!r}; for other "
            "data set reward.custom_reward_function to its own reward"
        ) from None
