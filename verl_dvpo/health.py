# SPDX-License-Identifier: Apache-2.0
"""Ends a run whose parts have died, or in which nothing moves, with one message: which part, and what to do.

verl notices a dead process only where it waits for that very process. A rollout that waits for a dead agent-loop worker
waits for ever, and so does a reward function that hangs. Here a thread of the trainer looks every few seconds at Ray's
table of actors, which costs one small request, and at the time of the last sign of progress.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

#: Asks a process of a run for its stacks. Beyond the signals that batch systems and libraries use.
STACKS = int(getattr(signal, "SIGRTMIN", 34)) + 7
#: Wakes the trainer's main thread.
WAKE = STACKS + 1
#: Seconds that the trainer has for its own end before its process is ended.
GRACE = 30.0
#: Seconds in which Ray hands what the parts have written on to the run's log.
HANDED_ON = 2.0

#: Part of an actor's class name -> what we call it.
PARTS = {
    "HttpServer": "rollout server",
    "AgentLoopWorker": "agent-loop worker",
    "RewardLoopWorker": "reward worker",
    "WorkerDict": "training process of actor and critic",
    "CheckpointEngineWorker": "receiver of a rollout server's weights",
    "TransferQueueController": "TransferQueue's controller",
    "StorageUnit": "TransferQueue's storage",
    "LoadBalancer": "load balancer of the rollout servers",
}

#: What a phase is called -> what the trainer does in it, and the parts that work then.
PHASES = {
    "start": ("starting the parts", "all of them"),
    "load": ("loading a checkpoint", "the training processes and the disk"),
    "generation": ("waiting for answers", "rollout servers, agent-loop workers and reward workers"),
    "log_probs": ("computing log-probabilities", "the training processes"),
    "values": ("computing values", "the critic"),
    "advantages": ("computing advantages", "the trainer and TransferQueue"),
    "critic_update": ("updating the critic", "the critic"),
    "actor_update": ("updating the actor", "the actor"),
    "checkpoint": ("saving a checkpoint", "the training processes and the disk"),
    "weight_transfer": ("sending weights to the rollout servers", "the actor and the rollout servers"),
    "validation": ("validating", "rollout servers, agent-loop workers and reward workers"),
}
RESUME = "start the run again with trainer.resume_mode=auto, or let `verl-dvpo run` do so"


class RunEndedError(RuntimeError):
    """A part of the run has died, or nothing moves; its text is all that a user needs."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """``trainer.value``: when a run is given up, and what is looked at before a checkpoint is loaded.

    Attributes:
        stall_seconds: without a sign of progress, after which the run ends; > 0, None: never.
        verify_checkpoints: read the whole of a checkpoint and compare its checksums before it is loaded.
    """

    stall_seconds: float | None = 1800.0
    verify_checkpoints: bool = True

    def __post_init__(self) -> None:
        seconds = self.stall_seconds
        if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
            raise ValueError(
                f"trainer.value.stall_seconds is {seconds!r}; a number above 0 or null is allowed; "
                "give more seconds than the longest phase takes"
            )
        if not isinstance(self.verify_checkpoints, bool):
            raise ValueError(
                f"trainer.value.verify_checkpoints is {self.verify_checkpoints!r}; true and false are allowed; "
                "false saves reading the files twice"
            )


def health_config(section: Any) -> HealthConfig:
    """Reads ``trainer.value``; the defaults where there is no such section.

    Raises:
        ValueError: an unknown field, or a value outside its bounds.
    """
    values = dict(section or {})
    for name in values:
        if name not in HealthConfig.__dataclass_fields__:
            raise ValueError(
                f"trainer.value.{name} is {values[name]!r}; there is no such field; "
                f"use one of {', '.join(HealthConfig.__dataclass_fields__)}"
            )
    return HealthConfig(**values)


def answer_with_stacks() -> None:
    """Lets this process write the stack of each of its threads to its standard error where `STACKS` asks for it.

    In Ray's workers only, whose standard error ends up in the run's log.
    """
    if "RAY_RAYLET_PID" in os.environ:
        faulthandler.register(STACKS, file=2, all_threads=True)


@dataclass(frozen=True)
class Actor:
    """One row of Ray's table of actors: class, node, process id and, for a dead one, the reason in Ray's words."""

    kind: str
    node: str
    pid: int
    cause: str = ""

    def __str__(self) -> str:
        part = next((name for key, name in PARTS.items() if key in self.kind), f"actor {self.kind}")
        return f"{part} (process {self.pid} on {self.node})"


def actors(state: str) -> dict[str, Actor]:
    """Asks Ray for the actors of this job in ``state``, ``ALIVE`` or ``DEAD``: actor id -> actor.

    Of the dead, those that were told to end or that nobody held any longer are left out.
    """
    import ray
    from ray._private import state as ray_state

    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    found = {}
    for identifier, row in ray_state.actors(job_id=job, actor_state_name=state).items():
        cause = _cause(row["DeathCause"]) if state == "DEAD" else ""
        if cause is not None:
            found[identifier] = Actor(row["ActorClassName"], row["Address"]["IPAddress"], row["Pid"], cause)
    return found


def _cause(death: Any) -> str | None:
    """Returns why an actor died; None where it was meant to."""
    if death.HasField("oom_context"):
        return "Ray ended it because the machine ran out of memory"
    if not death.HasField("actor_died_error_context"):
        return None
    context = death.actor_died_error_context
    reason = context.DESCRIPTOR.fields_by_name["reason"].enum_type.values_by_number[context.reason].name
    if reason == "NODE_DIED":
        return "its machine left the Ray cluster"
    if reason != "WORKER_DIED" or "INTENDED" in context.error_message:
        return None
    return "its process ended without a word, as after a SIGKILL, a lack of memory or a crash"


def catches(pid: int, number: int) -> bool:
    """Tells whether a process of this machine has a handler for a signal; without one the signal would end it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    mask = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)


def ask_for_stacks(living: Iterable[Actor]) -> list[Actor]:
    """Lets each actor on this machine write its stacks to the log; returns those that were asked."""
    asked = [actor for actor in living if catches(actor.pid, STACKS)]
    for actor in asked:
        with contextlib.suppress(ProcessLookupError):
            os.kill(actor.pid, STACKS)
    return asked


class Watch:
    """Watches over a run while its ``with`` block lasts.

    Where a part has died, or nothing has moved for long, the block's thread is woken at whatever it waits for, and a
    `RunEndedError` leaves the block; if that does not end the process in `GRACE` seconds, the process is ended. An
    error that leaves the block after a part has died becomes a `RunEndedError` too.

    Args:
        stall_seconds: of `HealthConfig`.
        interval: seconds between two looks, > 0.
    """

    def __init__(self, stall_seconds: float | None, interval: float = 2.0) -> None:
        self.stall_seconds = stall_seconds
        self.interval = interval
        self.phase, self.step = "start", 0
        self.failure = ""
        self._last = time.monotonic()
        self._sign: Any = None
        self._known: set[str] = set()
        self._left = threading.Event()

    def moved(self, phase: str, step: int) -> None:
        """Notes that a phase of `PHASES` begins in ``step``."""
        self.phase, self.step, self._last = phase, step, time.monotonic()

    def sign(self, sign: Any) -> None:
        """Notes progress within a phase, unless ``sign`` is the one of the last call."""
        if sign != self._sign:
            self._sign, self._last = sign, time.monotonic()

    def __enter__(self) -> "Watch":
        self._left = left = threading.Event()
        self._last = time.monotonic()
        self._known = set(actors("DEAD"))
        self._waiter = threading.get_ident()
        self._wakes = threading.current_thread() is threading.main_thread()
        if self._wakes:
            signal.signal(WAKE, self._raise)
        threading.Thread(target=self._look, args=(left,), name="verl-dvpo-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self.failure and isinstance(error, KeyboardInterrupt):
            raise RunEndedError(self.failure) from None
        if not isinstance(error, Exception) or isinstance(error, RunEndedError):
            return
        deadline = time.monotonic() + 3 * self.interval  # Ray may learn of a death after those who wait for the actor
        while not (death := self._death()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if death:
            raise RunEndedError(death) from error

    def _look(self, left: threading.Event) -> None:
        """Looks until the block is left, or there is a reason to end the run."""
        while not left.wait(self.interval):
            try:
                self.failure = self._death() or self._stall()
            except Exception:
                logger.warning("Ray's table of actors could not be read", exc_info=True)
            if self.failure:
                break
        else:
            return
        print(self.failure, file=sys.stderr, flush=True)
        if self._wakes:
            signal.pthread_kill(self._waiter, WAKE)
        time.sleep(GRACE)
        os._exit(1)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not self._left.is_set():
            raise KeyboardInterrupt  # while ``ray.get`` waits, Ray lets no other exception through

    def _death(self) -> str:
        """Says which part has died since the block began; empty if none has."""
        new = [actor for identifier, actor in actors("DEAD").items() if identifier not in self._known]
        if not new:
            return ""
        doing = PHASES[self.phase][0]
        return (
            f"step {self.step}, {doing}: {', '.join(map(str, new))} is dead; {new[0].cause}; look at its last lines in "
            f"this log and at the machine's memory, then {RESUME}"
        )

    def _stall(self) -> str:
        """Says where nothing moves, after the stacks of all parts have been written; empty if all is well."""
        if self.stall_seconds is None or time.monotonic() - self._last < self.stall_seconds:
            return ""
        asked = ask_for_stacks(actors("ALIVE").values())
        time.sleep(HANDED_ON)
        doing, parts = PHASES[self.phase]
        return (
            f"step {self.step}, {doing}: nothing has moved for {self.stall_seconds:g} s; it is the turn of {parts}; "
            f"the stacks of {len(asked)} processes are in this log and show where each waits; mend that or raise "
            f"trainer.value.stall_seconds, then {RESUME}"
        )
