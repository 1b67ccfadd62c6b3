# SPDX-License-Identifier: Apache-2.0
"""Does things to a run, each at one phase of one step; verl imports it where ``VERL_USE_EXTERNAL_MODULES`` names it.

``FAULT`` in the environment is JSON, one fault or a list of them: ``phase`` and ``step`` of
`verl_dvpo.health.Watch.moved`; ``delay``, seconds after the phase began; ``do``, one of the functions below; ``what``,
its argument; ``stamp``, a file that gets the time.
"""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
from wrapt import register_post_import_hook

from verl_dvpo.health import Watch

GIVEN: Any = json.loads(os.environ.get("FAULT", "[]"))
FAULTS: list[dict[str, Any]] = GIVEN if isinstance(GIVEN, list) else [GIVEN]


def pids_of(part: str) -> list[int]:
    """Finds the processes of a part: an actor by its class, or one of Ray's own."""
    if part == "trainer":
        return [os.getpid()]
    raylet = psutil.Process(int(os.environ["RAY_RAYLET_PID"]))
    if part == "raylet":
        return [raylet.pid]
    driver = raylet.parent()
    assert driver is not None
    if part == "EngineCore":  # a fork of the rollout server; it keeps the name that Ray gave its parent
        return [child.pid for server in pids_of("HttpServer") for child in psutil.Process(server).children()]
    if part == "driver":
        return [driver.pid]
    if part in ("gcs_server", "fork_server"):
        return [child.pid for child in driver.children() if part in " ".join(child.cmdline())]
    from ray._private import state

    return [row["Pid"] for row in state.actors(actor_state_name="ALIVE").values() if part in row["ActorClassName"]]


def send(number: int, part: str) -> None:
    found = pids_of(part)
    if not found:
        raise LookupError(f"no process of {part!r}")
    for pid in found[:1]:
        os.kill(pid, number)


ACTIONS = {
    "kill": lambda part: send(signal.SIGKILL, part),
    "stop": lambda part: send(signal.SIGSTOP, part),
    "terminate": lambda part: send(signal.SIGTERM, part),
    "touch": lambda path: Path(path).touch(),
    "read_only": lambda path: subprocess.run(["mount", "-o", "remount,ro", path], check=True),
}


def strike(fault: dict[str, Any]) -> None:
    time.sleep(fault.get("delay", 0.0))
    Path(fault["stamp"]).write_text(repr(time.time()))
    ACTIONS[fault["do"]](fault["what"])


def watch_for_the_moment() -> None:
    moved = Watch.moved

    def moved_and_strike(self: Watch, phase: str, step: int) -> None:
        moved(self, phase, step)
        for fault in FAULTS:
            if (phase, step) == (fault["phase"], fault["step"]) and not Path(fault["stamp"]).exists():
                if fault["do"] == "touch":
                    strike(fault)
                else:
                    threading.Thread(target=strike, args=(fault,), daemon=True).start()

    Watch.moved = moved_and_strike  # type: ignore[method-assign]


def spoil_the_critic(module: ModuleType) -> None:
    """Puts a NaN into the critic's weights once the file that the fault names is there."""
    worker: Any = module.DistributionalCriticWorker
    infer = worker.infer_batch

    def infer_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(FAULTS[0]["what"]).exists():
            import torch

            with torch.no_grad():
                for parameter in self.engine.module.parameters():
                    parameter.fill_(float("nan"))
        return infer(self, *args, **kwargs)

    # verl's decorator marks a method by attributes, which tell the trainer how to send it a batch
    infer_batch.__dict__.update(vars(infer))
    worker.infer_batch = infer_batch


if FAULTS:
    watch_for_the_moment()
    if FAULTS[0].get("spoil") == "critic":
        register_post_import_hook(spoil_the_critic, "verl_dvpo.critic.worker")
