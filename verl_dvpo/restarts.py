# SPDX-License-Identifier: Apache-2.0
"""``verl-dvpo run``: starts verl's ``main_ppo``, and starts it again after a failure that is not the user's.

    verl-dvpo run --max-restarts 10 -- algorithm=dvpo platform=cpu +task=demo

All that the run prints is passed on. Its temporary files, Ray's included, are in a folder that is removed when it ends,
and so are processes that outlive it.
"""

import collections
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import psutil
import typer

from verl_dvpo.composing import compose
from verl_dvpo.platforms.compiled import compiled_code
from verl_dvpo.saved.checkpoints import TRACKER

#: Names the file in which a run says that its configuration is in order, and where its checkpoints are.
STATE_ENV = "VERL_DVPO_RUN_STATE"
#: Of prctl(2): orphans among the descendants become children of this process.
SET_CHILD_SUBREAPER = 36
#: The exit status of a run whose configuration was refused.
REFUSED = 2
#: Seconds that the parts of a run have to end by themselves after ``main_ppo`` has ended.
GRACE = 30.0


def announce(config: Any) -> None:
    """Says, in the process of ``main_ppo``, that the configuration is in order; called before Ray starts."""
    if path := os.environ.get(STATE_ENV):
        folder = Path(config.trainer.default_local_dir).resolve()
        state = {"checkpoints": str(folder), "resume_mode": config.trainer.resume_mode, "tracker": _changed(folder)}
        Path(path).write_text(json.dumps(state))


def _changed(folder: Path) -> int | None:
    """The time at which a checkpoint was last finished in ``folder``; None if never."""
    with suppress(OSError):
        return (folder / TRACKER).stat().st_mtime_ns
    return None


@dataclass(frozen=True)
class Failure:
    """The reason of a run's end in words, and the step if it is known. Equal failures at one step will come again."""

    text: str
    step: int | None

    @property
    def refuses(self) -> bool:
        """True where the reason is a value: ours are ValueErrors, and Hydra and OmegaConf have their own."""
        return re.match(r"ValueError|hydra\.|omegaconf\.|[\w.]*(Config|Override)\w*Exception", self.text) is not None

    def same(self, other: "Failure | None") -> bool:
        """Tells whether ``other`` is this failure at this step; process ids and times do not count."""
        return other is not None and self.step == other.step and _plain(self.text) == _plain(other.text)


def _plain(text: str) -> str:
    return re.sub(r"[0-9a-f]*\d[0-9a-f.:-]*", "#", text)


def failure_of(lines: Iterable[str], status: int) -> Failure:
    """Finds in the last lines of a log what ended the run.

    Args:
        lines: what ``main_ppo`` printed last.
        status: its exit status, negative for a signal.
    """
    lines = list(lines)
    steps = [int(match[1]) for line in lines if (match := re.search(r"(?:^|\s)step:(\d+) - ", line))]
    step = steps[-1] + 1 if steps else None
    for line in reversed(lines):
        if found := re.search(r"RunEndedError: (.*)", line):
            named = re.match(r"step (\d+),", found[1])
            return Failure(found[1].strip(), int(named[1]) if named else step)
    if any("ActorDiedError" in line for line in lines) and any("TaskRunnerV1" in line for line in lines):
        return Failure("the trainer (TaskRunnerV1) is dead; look at the machine's memory and at the log above", step)
    errors = [line.strip() for line in lines if re.match(r"\s*[\w.]+(Error|Exception)\b", line)]
    if errors:
        return Failure(errors[-1], step)
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return Failure(f"main_ppo ended with {how} and without a word", step)


def adopt_orphans() -> None:
    """Makes this process the parent of all descendants that lose theirs, so that none is lost; on Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(seconds: float) -> None:
    """Waits for all descendants of this process to end, and ends those that have not after ``seconds``."""
    deadline = time.monotonic() + seconds
    while alive := _alive_descendants():
        if time.monotonic() < deadline:
            time.sleep(0.1)
            continue
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5.0)


def _alive_descendants() -> list[psutil.Process]:
    """Lists them anew: while a run ends, one that it had still asked for may start."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Run:
    """One run of ``main_ppo`` after the other, until one ends well or there is no sense in another.

    Args:
        command: of ``main_ppo``, with the user's overrides.
        max_restarts: at most, >= 0.
        out: gets all that the run prints.
    """

    def __init__(self, command: list[str], max_restarts: int, out: IO[str]) -> None:
        self.command, self.max_restarts, self.out = command, max_restarts, out
        self.stopped_by = 0
        self.process: subprocess.Popen[str] | None = None

    def until_done(self) -> int:
        """Returns the exit status: 0, 2 for a refused configuration, 1 after a failure, 128 + n after signal n."""
        before: Failure | None = None
        extra: list[str] = []
        for attempt in range(self.max_restarts + 1):
            status, state, failure = self.once(extra)
            if self.stopped_by:
                return 128 + self.stopped_by
            if status == 0:
                return 0
            if state is None and failure.refuses:
                self.say(f"the configuration was refused, and nothing is started again: {failure.text}")
                return REFUSED
            if state is None:
                self.say(f"{failure.text}; not started again: it ended before the configuration was in order")
                return 1
            if failure.same(before):
                self.say(f"{failure.text}; not started again: the same failure at the same step, twice")
                return 1
            if attempt == self.max_restarts:
                self.say(f"{failure.text}; not started again: --max-restarts is {self.max_restarts}")
                return 1
            before = failure
            extra = ["trainer.resume_mode=auto"] if self.has_own_checkpoint(state) else []
            self.say(f"{failure.text}; starting again, {attempt + 1} of at most {self.max_restarts} times")
        raise AssertionError("the last attempt returns")

    def has_own_checkpoint(self, state: dict[str, Any]) -> bool:
        """Tells whether this command has finished a checkpoint, or was told to go on from another's."""
        self.first = getattr(self, "first", state)
        return state["resume_mode"] == "auto" or _changed(Path(state["checkpoints"])) != self.first["tracker"]

    def once(self, extra: list[str]) -> tuple[int, dict[str, Any] | None, Failure]:
        """Runs once; returns the exit status, what the run announced, and what ended it."""
        last: collections.deque[str] = collections.deque(maxlen=2000)
        with _own_folder() as folder:
            state = folder / "state.json"
            environment = {
                **os.environ,
                **compiled_code(),
                STATE_ENV: str(state),
                "TMPDIR": str(folder),
                "RAY_TMPDIR": str(folder),
                "PYTHONUNBUFFERED": "1",
                "TQDM_DISABLE": os.environ.get("TQDM_DISABLE", "1"),  # it writes to us, who are no terminal
            }
            self.process = subprocess.Popen(
                [*self.command, *extra],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                text=True,
                errors="replace",
            )
            reader = threading.Thread(target=self._pass_on, args=(self.process.stdout, last), daemon=True)
            reader.start()
            status = self.process.wait()
            end_descendants(0.0 if self.stopped_by else GRACE)
            reader.join(timeout=5.0)
            announced = json.loads(state.read_text()) if state.exists() else None
        return status, announced, failure_of(last, status)

    def _pass_on(self, stream: IO[str], last: collections.deque[str]) -> None:
        for line in stream:
            last.append(line.rstrip("\n"))
            self.out.write(line if line.endswith("\n") else f"{line}\n")  # what we say begins a line of its own
            self.out.flush()

    def stop(self, number: int, frame: Any = None) -> None:
        """Passes a signal on to the run, which is not started again."""
        self.stopped_by = number
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            killer = threading.Timer(GRACE, self.process.kill)
            killer.daemon = True
            killer.start()

    @staticmethod
    def say(text: str) -> None:
        """Prints one line about the run."""
        print(f"verl-dvpo run, {time.strftime('%H:%M:%S')}: {text}", file=sys.stderr, flush=True)


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder for all temporary files of a run; its name is short, as it is part of the names of sockets."""
    folder = Path(tempfile.mkdtemp(prefix="vdr-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_overrides(config_name: str, overrides: list[str]) -> None:
    """Refuses what Hydra cannot compose, in a second and before anything starts.

    Raises:
        ValueError: what Hydra says of it.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if any(text.startswith("-") for text in overrides):
        return  # options of Hydra's own, which only its command line reads
    try:
        compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"the overrides of main_ppo do not compose: {error}") from error


def run(
    overrides: Annotated[list[str], typer.Argument(help="Hydra overrides of main_ppo, after `--`.")],
    max_restarts: Annotated[int, typer.Option(min=0, help="How often a run that failed is started again.")] = 10,
    config_name: Annotated[str, typer.Option(help="The primary configuration.")] = "dvpo_trainer",
) -> None:
    """Train with verl's `main_ppo`, and go on from the last good checkpoint after a failure.

    A configuration that is refused is not tried again (exit status 2). Nor is a run that fails twice in the same way at
    the same step.
    With `trainer.resume_mode=auto` the first start goes on from a checkpoint as well.

    Example: `verl-dvpo run --max-restarts 5 -- algorithm=dvpo trainer.save_freq=20`
    """
    check_overrides(config_name, overrides)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name", config_name, *overrides]
    adopt_orphans()
    runs = Run(command, max_restarts, sys.stdout)
    before = {number: signal.signal(number, runs.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = runs.until_done()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    raise typer.Exit(status)
