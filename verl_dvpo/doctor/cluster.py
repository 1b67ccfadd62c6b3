# SPDX-License-Identifier: Apache-2.0
"""Checks that Ray starts as a run starts it, and that the plugin is there in Ray's workers too."""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

from verl_dvpo.doctor.checks import Machine, check, remedy
from verl_dvpo.doctor.lines import Line, ok, problem
from verl_dvpo.doctor.machine import cpu_platform
from verl_dvpo.doctor.process import judge_plugin

#: Seconds for a worker that imports verl, on a machine under load, and for Ray's start beside it.
PATIENCE, WITH_START = 300.0, 420.0


def start_and_ask(say: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Starts Ray with the resources of ``platform=cpu``, or with Ray's own, and asks a worker what verl knows there.

    Workers are started without the fork server, which saves nothing for one. Ray's session is in a folder that is
    removed at the end.

    Args:
        say: receives each part of the answer when it is known.

    Returns:
        ``worker``: the facts of ``probes.registered`` in a worker.
    """
    on_cpu = os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"
    settings: dict[str, Any] = {"include_dashboard": False}
    if on_cpu:
        from verl_dvpo.platforms.cpu.loopback import keep_ray_inside

        settings |= cpu_platform()
        keep_ray_inside(None)
    import ray

    from verl_dvpo.doctor import probes

    began = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix="ray-", dir=os.environ.get("RAY_TMPDIR"), ignore_cleanup_errors=True
    ) as own:
        ray.init(**settings, _temp_dir=own, log_to_driver=False, logging_level=logging.ERROR)
        try:
            resources = ray.cluster_resources()
            say({"seconds": time.monotonic() - began, "cpus": resources.get("CPU", 0), "gpus": resources.get("GPU", 0)})
            asked = ray.remote(num_cpus=1)(probes.registered).remote()
            return {"worker": ray.get(asked, timeout=PATIENCE)}
        finally:
            ray.shutdown()


@check(
    "ray",
    about="whether Ray starts, with the logical CPUs and the store that platform=cpu gives it, or as it is on GPUs",
    remedy="see shared memory, loopback, disk and the package ray above; RAY_TMPDIR must be a folder with a short name "
    "(/tmp/ray), and no other Ray may hold it: `ray stop` ends one of yours",
    dear=True,
)
def ray(machine: Machine) -> Line:
    answer = machine.ask("ray", WITH_START)
    if "cpus" not in answer.facts:
        return problem("ray", answer.error or "no answer", remedy("ray"))
    facts, gpus = answer.facts, machine.platform == "gpu"
    text = f"started in {facts['seconds']:.0f} s with {facts['cpus']:.0f} CPUs and {facts['gpus']:.0f} GPUs"
    if gpus and not facts["gpus"]:
        return problem("ray", f"{text}; a run waits for ever for a GPU", "see devices, and CUDA_VISIBLE_DEVICES")
    return ok("ray", text if gpus else f"{text}, both logical")


@check(
    "plugin in Ray",
    about="whether a worker of Ray has loaded this package, and what it has registered there",
    remedy="install this package where the workers run: `pip install --no-deps .`; see plugin and ray above, and "
    "ray_kwargs.ray_init.runtime_env, which may name another Python",
    dear=True,
)
def plugin_in_ray(machine: Machine) -> Line:
    answer = machine.ask("ray", WITH_START)
    if "cpus" not in answer.facts:
        return problem("plugin in Ray", "Ray did not start", remedy("ray"))
    return judge_plugin("plugin in Ray", answer.facts.get("worker"), answer.error)
