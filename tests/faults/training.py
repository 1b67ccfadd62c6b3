# SPDX-License-Identifier: Apache-2.0
"""Runs ``main_ppo`` on the demo's smallest model in a folder of its own, and looks at what it leaves behind."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from verl_dvpo.platforms.compiled import compiled_code

HERE = Path(__file__).parent

#: Seconds that the start of a run may take on a busy machine.
START = 400.0

#: The shortest steps that have every phase.
SHORT = (
    "algorithm=dvpo",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "critic.ppo_mini_batch_size=4",
    "trainer.logger=[console,file]",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=1",
    "trainer.resume_mode=auto",
    # more gain nothing on a tiny model, and wait for each other on a busy machine
    'ray_kwargs.ray_init.runtime_env.env_vars.VERL_DVPO_CPU_THREADS="1"',
)


@dataclass
class Ended:
    """What is known of a run that has ended.

    Attributes:
        status: its exit status.
        log: what it printed.
        seconds: from the fault to the end of its last process; Ray's own agents, which look for their raylet once in a
            minute, apart.
        last: the processes that lived longest, agents included.
        left: what it left behind.
    """

    status: int
    log: str
    seconds: float
    last: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def says(self, text: str) -> bool:
        return text in self.log


def descendants(others: frozenset[int] = frozenset()) -> list[psutil.Process]:
    """Lists the living processes below this one, but for ``others`` and those below them, and buries the dead."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if others and others & {process.pid, *(parent.pid for parent in process.parents())}:
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
            elif process.ppid() == os.getpid():
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue
    return found


def name_of(process: psutil.Process) -> str:
    try:
        # the rows are published: no folder of this machine
        what = " ".join(process.cmdline()).replace(f"{sys.prefix}/bin/", "")[:120] or process.name()
        since = time.time() - process.create_time()
        return f"process {process.pid} of {process.ppid()}, {process.status()}, {since:.0f} s old: {what}"
    except psutil.NoSuchProcess:
        return f"process {process.pid}"


@contextmanager
def own_folder() -> Iterator[Path]:
    """A short path for sockets; Ray's session is in it too."""
    folder = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


#: Processes of Ray's own that are no part of a run.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")

#: Seconds that the processes of a run have at least to follow it; the fork server looks for its raylet every 5.
PARTING = 30.0


def command(demo: Path, checkpoints: Path, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", "dvpo_trainer", "platform=cpu", "+task=demo"),
        *(f"demo.dir={demo}", f"trainer.default_local_dir={checkpoints}", f"hydra.run.dir={checkpoints}-hydra"),
        *(*SHORT, *overrides),
    ]


def environment(folder: Path, fault: dict | list | None = None) -> dict[str, str]:
    """The environment of a run whose temporary files, Ray's included, are in ``folder``."""
    own = {
        "VERL_PLATFORM": "cpu",
        "RAY_worker_niceness": "0",
        "RAY_TMPDIR": str(folder / "ray"),
        "TMPDIR": str(folder / "tmp"),
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
        "HYDRA_FULL_ERROR": "1",
        # what torch compiles outlives runs
        **compiled_code(),
        # a busy machine is no fault
        "RAY_raylet_start_wait_time_s": "200",
        "RAY_worker_register_timeout_seconds": "200",
    }
    if fault:
        path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        own |= {"FAULT": json.dumps(fault), "VERL_USE_EXTERNAL_MODULES": "inject", "PYTHONPATH": os.pathsep.join(path)}
    (folder / "tmp").mkdir(exist_ok=True)
    (folder / "ray").mkdir(exist_ok=True)
    return {**os.environ, **own}


def run(
    arguments: list[str],
    folder: Path,
    fault: dict | None = None,
    limit: float = 240.0,
    look: Callable[[], object] = lambda: None,
) -> Ended:
    """Runs to the end, or for ``limit`` seconds after the fault at most; leaves no process behind.

    ``look`` is called again and again while it runs.
    """
    shared = set(os.listdir("/dev/shm"))
    before = frozenset(each.pid for each in descendants())  # a fork server of this process, for one
    log = folder / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT, env=environment(folder, fault))
    stamp = Path(fault["stamp"]) if fault else folder / "stamp"
    started = time.time()
    while process.poll() is None and time.time() - _since(stamp, started) < limit:
        look()
        time.sleep(0.1)
    status = process.poll()
    over = time.time()
    last: list[str] = []
    own_end = time.time()
    while (alive := descendants(before)) and status is not None:
        last = [name_of(each) for each in alive]
        if not all(any(agent in name for agent in AGENTS) for name in last):
            own_end = time.time()
        if time.time() > max(_since(stamp, started) + limit, over + PARTING):
            break
        time.sleep(0.1)
    ended = Ended(-1 if status is None else status, "", own_end - _since(stamp, started), last)
    ended.left = [name_of(each) for each in descendants(before)]
    for each in descendants(before):
        each.kill()
    process.wait()
    psutil.wait_procs(descendants(before), timeout=10)
    ended.left += [f"/dev/shm/{name}" for name in sorted(_lasting(shared))]
    ended.left += [f"temporary file {path.name}" for path in sorted((folder / "tmp").iterdir())]
    ended.log = log.read_text(errors="replace")
    return ended


def _lasting(before: set[str]) -> set[str]:
    """Names in shared memory that were not there ``before`` and stay; other runs make some for a moment."""
    found = set(os.listdir("/dev/shm")) - before
    deadline = time.time() + 5.0
    while found and time.time() < deadline:
        time.sleep(0.2)
        found &= set(os.listdir("/dev/shm"))
    return found


def _since(stamp: Path, started: float) -> float:
    """The time of the fault; while there was none, the start and what a start may take."""
    text = stamp.read_text() if stamp.exists() else ""
    return float(text) if text else started + START
