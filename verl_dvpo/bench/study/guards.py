# SPDX-License-Identifier: Apache-2.0
"""Surrounds a run: its output goes to its log, its time is limited, and only one process executes it."""

import contextlib
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from verl_dvpo.bench.study.plan import Run


class RunTimeoutError(RuntimeError):
    """Says that a run took longer than ``minutes_per_run``."""


@contextlib.contextmanager
def redirected(path: Path) -> Iterator[None]:
    """Sends standard output and error to a file, also those of other threads and of C code."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    try:
        with open(path, "a", buffering=1) as log:
            for target in (1, 2):
                os.dup2(log.fileno(), target)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield
    finally:
        for target, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, target)
            os.close(copy)


@contextlib.contextmanager
def at_most(minutes: float | None) -> Iterator[None]:
    """Raises ``RunTimeoutError`` in the main thread after so many minutes; None sets no limit."""
    if minutes is None:
        yield
        return

    def stop(*_: object) -> None:
        raise RunTimeoutError(f"the run took longer than minutes_per_run={minutes}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, minutes * 60)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def sigterm_exits() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that the stack unwinds and Ray ends; does so in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def claim(run: Run) -> Iterator[bool]:
    """Locks a run for this process and yields True, or yields False if another process holds it.

    The lock ends with the process. Its file lies outside the run's folder, which is emptied at the start.
    """
    folder = run.out / ".locks"
    folder.mkdir(exist_ok=True)
    with open(folder / run.name, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
