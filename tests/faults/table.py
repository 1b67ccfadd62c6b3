# SPDX-License-Identifier: Apache-2.0
"""The faults, and what has to come of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_dvpo.health import PARTS

SERVER, LOOP, REWARD = "HttpServer", "AgentLoopWorker", "RewardLoopWorker"
TRAINING, STORAGE, CONTROLLER = "WorkerDict", "StorageUnit", "TransferQueueController"
ENGINE = "EngineCore"
#: Seconds without progress after which a run is given up here.
STALL = 30

#: Class -> name in the table and in the message.
NAMES = {
    SERVER: "rollout server",
    LOOP: "agent-loop worker",
    REWARD: "reward worker",
    TRAINING: "training process",
    STORAGE: "TransferQueue's storage",
    CONTROLLER: "TransferQueue's controller",
    "LoadBalancer": "load balancer",
    ENGINE: "vLLM's engine",
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        name: unique, for the command line.
        part: as the table shows it.
        phase: of `verl_dvpo.health.PHASES`, or a word for what happens between two runs.
        kind: as the table shows it.
        message: what the log has to say; empty where the run has to go on to its end.
        spec: for ``inject``; none where files are spoiled between two runs.
        overrides: of the run.
        spoil: of `SPOILERS`, done to the latest checkpoint before the run.
        mount: the checkpoints are on a small disk of their own.
        note: what a plugin cannot do better.
    """

    name: str
    part: str
    phase: str
    kind: str
    message: str
    spec: dict[str, Any] | None = None
    overrides: tuple[str, ...] = ()
    spoil: str = ""
    mount: bool = False
    note: str = ""


def kill(part: str, phase: str, *, delay: float = 0.02) -> Fault:
    name = NAMES[part]
    short = name.split("'s ")[-1].replace(" ", "-")
    return Fault(
        name=f"kill-{short}-{phase}",
        part=name,
        phase=phase,
        kind="SIGKILL",
        message=next((f"{named} (process" for key, named in PARTS.items() if key in part), "EngineDead"),
        spec={"do": "kill", "what": part, "phase": phase, "delay": delay},
    )


def stop(part: str, phase: str) -> Fault:
    name = NAMES[part]
    short = name.split("'s ")[-1].replace(" ", "-")
    return Fault(
        name=f"stop-{short}-{phase}",
        part=name,
        phase=phase,
        kind="SIGSTOP",
        message=f"nothing has moved for {STALL} s",
        spec={"do": "stop", "what": part, "phase": phase},
        overrides=(f"trainer.value.stall_seconds={STALL}",),
    )


def ray_or_driver(
    part: str, phase: str, message: str, *, do: str = "kill", delay: float = 0.02, note: str = ""
) -> Fault:
    return Fault(
        name=f"{do}-{part.replace('_', '-')}-{phase}",
        part={"trainer": "trainer", "driver": "main_ppo"}.get(part, f"Ray's {part}"),
        phase=phase,
        kind="SIGTERM" if do == "terminate" else "SIGKILL",
        message=message,
        spec={"do": do, "what": part, "phase": phase, "delay": delay},
        note=note,
    )


def reward(behaviour: str, message: str) -> Fault:
    return Fault(
        name=f"reward-{behaviour}",
        part="reward function",
        phase="generation",
        kind=behaviour,
        message=message,
        spec={"do": "touch", "what": "FLAG", "phase": "generation", "reward": behaviour},
        overrides=(
            f"reward.custom_reward_function.path={Path(__file__).with_name('reward.py')}",
            f"trainer.value.stall_seconds={STALL}",
        ),
    )


def spoiled(spoil: str, what: str) -> Fault:
    return Fault(
        name=f"checkpoint-{spoil}", part="checkpoint", phase="before a resume", kind=what, message="", spoil=spoil
    )


DEAD_TRAINER = "TaskRunnerV1"
BEYOND_US = "the message is Ray's; `verl-dvpo run` says what to do"

NO_HEAD = "steps need no GCS and go on; Ray's own agents outlive the run, but for `verl-dvpo run`, which ends them"

NO_DRIVER = "nobody is left to say anything; Ray's own agents end within a minute more"

FAULTS = (
    kill(SERVER, "generation"),
    kill(SERVER, "critic_update"),
    kill(SERVER, "weight_transfer", delay=0.0),
    kill(ENGINE, "generation"),
    kill(LOOP, "generation"),
    kill(LOOP, "actor_update"),
    kill(REWARD, "generation"),
    kill(REWARD, "advantages"),
    kill(TRAINING, "generation"),
    kill(TRAINING, "log_probs"),
    kill(TRAINING, "values"),
    kill(TRAINING, "critic_update"),
    kill(TRAINING, "actor_update"),
    kill(TRAINING, "checkpoint", delay=0.05),
    kill(TRAINING, "weight_transfer", delay=0.0),
    kill(STORAGE, "generation"),
    kill(STORAGE, "values"),
    kill(STORAGE, "actor_update"),
    kill(CONTROLLER, "generation"),
    kill(CONTROLLER, "advantages", delay=0.0),
    kill(CONTROLLER, "weight_transfer"),
    kill("LoadBalancer", "generation"),
    ray_or_driver("trainer", "generation", DEAD_TRAINER, note=BEYOND_US),
    ray_or_driver("trainer", "critic_update", DEAD_TRAINER, note=BEYOND_US),
    ray_or_driver("trainer", "checkpoint", DEAD_TRAINER, delay=0.05, note=BEYOND_US),
    ray_or_driver("trainer", "weight_transfer", DEAD_TRAINER, note=BEYOND_US),
    ray_or_driver("driver", "generation", "", note=NO_DRIVER),
    ray_or_driver("driver", "checkpoint", "", delay=0.05, note=NO_DRIVER),
    ray_or_driver("driver", "critic_update", "", do="terminate", note="asked for"),
    ray_or_driver("raylet", "generation", "raylet", note=BEYOND_US),
    ray_or_driver("raylet", "actor_update", "raylet", note=BEYOND_US),
    ray_or_driver("gcs_server", "generation", "", note=NO_HEAD),
    ray_or_driver("gcs_server", "critic_update", "", note=NO_HEAD),
    stop(SERVER, "generation"),
    stop(TRAINING, "critic_update"),
    stop(CONTROLLER, "advantages"),
    reward("hangs", f"nothing has moved for {STALL} s"),
    reward("raises", "reward"),
    reward("nan", "not finite"),
    Fault(
        name="nan-critic",
        part="critic",
        phase="values",
        kind="NaN in the weights",
        message="critic's values are not finite",
        spec={"do": "touch", "what": "FLAG", "phase": "generation", "spoil": "critic"},
    ),
    Fault(
        name="disk-full",
        part="disk",
        phase="checkpoint",
        kind="full",
        message="saving a checkpoint",
        spec={"do": "touch", "what": "FLAG", "phase": "checkpoint"},
        mount=True,
    ),
    Fault(
        name="disk-read-only",
        part="disk",
        phase="checkpoint",
        kind="read-only",
        message="saving a checkpoint",
        spec={"do": "read_only", "what": "CHECKPOINTS", "phase": "actor_update"},
        mount=True,
    ),
    spoiled("truncated", "a file cut in half"),
    spoiled("flipped", "one bit of a file flipped"),
    spoiled("tracker", "latest_checkpointed_iteration.txt empty"),
    spoiled("critic-gone", "the critic's folder removed"),
)
