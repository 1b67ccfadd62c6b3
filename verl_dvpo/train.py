# SPDX-License-Identifier: Apache-2.0
"""Runs verl's ``main_ppo`` and returns an objective, which a Hydra sweep can maximise.

    python -m verl_dvpo.train algorithm=dvpo platform=cpu +task=demo
    python -m verl_dvpo.train -m algorithm=dvpo critic.value.coef.risk=0,0.05,0.1,0.2

verl's own entry returns nothing. This one runs the same trainer in the same way and returns the last validation score:
the mean over the data sources that ``objective`` in the configuration names, or over all where it names none. ``seed``
in the configuration goes to everything that draws (``verl_dvpo.seeds``). Ray stays up between the runs of one process;
each run's actors are gone when it returns.
"""

import os
import time
from pathlib import Path
from typing import Any

import hydra
import ray
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from ray import PlacementGroupID
from ray.util.placement_group import PlacementGroup
from verl.trainer import main_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

from verl_dvpo.records import last_score
from verl_dvpo.seeds import set_seeds

METRICS_ENV = "VERL_FILE_LOGGER_PATH"


def run(config: DictConfig, metrics: Path) -> float | None:
    """Trains as ``main_ppo`` does and reads the outcome from the metrics that verl wrote.

    Args:
        config: composed from ``dvpo_trainer`` or verl's own primary configuration.
        metrics: JSON lines that this run writes; an older file is replaced.

    Returns:
        The objective of `last_score`; None if the run never validated.

    Raises:
        ValueError: the configuration is wrong, and nothing was started; or ``objective`` names a data source that the
            validation does not have.
    """
    if (seed := OmegaConf.select(config, "seed")) is not None:
        set_seeds(config, seed)
    auto_set_device(config)
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.unlink(missing_ok=True)
    backends = config.trainer.logger
    with open_dict(config):
        config.trainer.logger = [*([backends] if isinstance(backends, str) else backends)]
        if "file" not in config.trainer.logger:
            config.trainer.logger.append("file")
        # The logger lives in a Ray actor, which a cluster that is already up gives an older environment.
        environment = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
        config.ray_kwargs.ray_init.runtime_env.env_vars = {**environment, METRICS_ENV: str(metrics.resolve())}
    variables = dict(config.ray_kwargs.ray_init.runtime_env.env_vars)
    runner: Any = main_ppo.TaskRunnerV1
    if ray.is_initialized():
        runner = runner.options(runtime_env={"env_vars": variables})
    try:
        main_ppo.run_ppo(config, task_runner_class=runner)
    finally:
        if ray.is_initialized():
            release()
    return last_score(metrics, OmegaConf.select(config, "objective"))


def release(seconds: float = 180.0) -> None:
    """Removes the placement groups of a finished run, whose actors end with them, so that another can start.

    Those of other jobs of the cluster stay; while there are any, it is not known how many devices will be free, and
    nothing is waited for. Ray ends a run's actors some time after the last handle to its TaskRunner is gone; verl's
    ``ResourcePoolManager`` asks for the devices at once and does not wait.

    Args:
        seconds: to wait for the devices, > 0.

    Raises:
        TimeoutError: devices are still taken after ``seconds``.
    """
    job, shared = ray.get_runtime_context().get_job_id(), False
    for name, group in ray.util.placement_group_table().items():
        if group["state"] == "REMOVED":
            continue
        if name.endswith(job):  # a group's identifier ends with that of its job
            ray.util.remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))
        else:
            shared = True
    if shared:
        return
    total = ray.cluster_resources().get("GPU", 0)
    deadline = time.monotonic() + seconds
    while ray.available_resources().get("GPU", 0) < total:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"Ray's free devices are {ray.available_resources().get('GPU', 0)} after {seconds:.0f} s; all {total} "
                "must be free before another run; stop Ray with `ray stop` and start again"
            )
        time.sleep(0.2)


@hydra.main(config_path="pkg://verl.trainer.config", config_name="dvpo_trainer", version_base=None)
def main(config: DictConfig) -> float | None:
    """Runs one run of a sweep, or a run alone; metrics go to Hydra's output folder."""
    output = Path(HydraConfig.get().runtime.output_dir)
    return run(config, Path(os.environ.get(METRICS_ENV, output / "metrics.jsonl")))


if __name__ == "__main__":
    main()
