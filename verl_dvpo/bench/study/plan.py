# SPDX-License-Identifier: Apache-2.0
"""Derives the runs of a study: their names, folders and configurations."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_dvpo.bench.study.config import Algorithm, Noise, Study, Task, arms_of
from verl_dvpo.saved.files import read_json
from verl_dvpo.seeds import set_seeds

#: Status of a run that has ended, in its record.
FINISHED, FAILED = "finished", "failed"
#: Overrides that a study's own may change: its curves begin before training.
DEFAULTS = ("trainer.val_before_train=true",)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One element of a study's matrix.

    Attributes:
        study: name of the study.
        out: folder of the study; absolute.
        base: overrides that all runs share.
        steps, test_freq: as in the study.
    """

    study: str
    out: Path
    base: tuple[str, ...]
    algorithm: Algorithm
    noise: Noise
    task: Task
    seed: int
    steps: int
    test_freq: int

    @property
    def arm(self) -> tuple[str, str, str]:
        """Returns the names of its algorithm, noise and task."""
        return (self.algorithm.name, self.noise.name, self.task.name)

    @property
    def name(self) -> str:
        """Unique within the study."""
        return f"{self.algorithm.name}__{self.noise.name}__{self.task.name}__s{self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of all its files."""
        return self.out / "runs" / self.name

    @property
    def metrics(self) -> Path:
        """JSON lines that verl writes, one a step."""
        return self.folder / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """Everything that verl printed."""
        return self.folder / "train.log"

    @property
    def record(self) -> Path:
        """The record of the run's end; the file exists only after it."""
        return self.folder / "run.json"

    @property
    def overrides(self) -> tuple[str, ...]:
        """Hydra overrides that determine the training; places of files are not among them."""
        return (
            *self.algorithm.selection,
            *self.noise.selection,
            *self.task.selection,
            *self.base,
            f"trainer.total_training_steps={self.steps}",
            f"trainer.test_freq={self.test_freq}",
        )


def plan(study: Study) -> list[Run]:
    """Returns all runs of a study's arms, ordered by seed, task, noise, algorithm.

    An interrupted study thus has all arms of its first seeds, and can compare them. With hypotheses these are the runs
    that may be needed; ``verl_dvpo.bench.study.stopping`` tells which are.
    """
    arms = arms_of(study)
    axes = itertools.product(study.seeds, study.tasks, study.noises, study.algorithms)
    return [
        Run(
            study=study.name,
            out=study.out.absolute(),
            base=study.base,
            algorithm=algorithm,
            noise=noise,
            task=task,
            seed=seed,
            steps=study.steps,
            test_freq=study.test_freq,
        )
        for seed, task, noise, algorithm in axes
        if (algorithm.name, noise.name, task.name) in arms
    ]


def read_record(run: Run) -> dict[str, Any] | None:
    """Returns how a run ended; None if it has not."""
    return read_json(run.record) if run.record.is_file() else None


def compose(run: Run) -> DictConfig:
    """Composes the configuration of a run and validates it before Ray starts.

    Raises:
        ValueError: Hydra cannot compose it, or ``verl_dvpo.preflight`` refuses it; the error names the run.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    import verl_dvpo.plugin  # noqa: F401  (puts verl_dvpo.config on the search path)
    from verl_dvpo import preflight

    ours = (
        # A study stores metrics, not weights; an interrupted run starts again from the beginning.
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        "trainer.logger=[console]",
        f"trainer.project_name={run.study}",
        f"trainer.experiment_name={run.name}",
    )
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_module("verl.trainer.config", version_base=None):
            config = hydra.compose("dvpo_trainer", overrides=[*DEFAULTS, *run.overrides, *ours])
        config.trainer.default_local_dir = str(run.folder / "checkpoints")
        set_seeds(config, run.seed)
        preflight.check(config)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"run {run.name}: {error}") from error
    return config


def resolved(config: DictConfig) -> str:
    """Returns a configuration as YAML, with every interpolation replaced by its value."""
    return OmegaConf.to_yaml(config, resolve=True)
