# SPDX-License-Identifier: Apache-2.0
"""Measures what a run costs: seconds of processor time, over all its processes."""

import threading
from types import TracebackType

import psutil

#: Seconds between two looks. What a process uses between the last look and its end is not seen.
INTERVAL = 1.0


class ProcessorTime:
    """Adds up the processor time that this process and its descendants use within the ``with`` block.

    Attributes:
        seconds: user and system time so far, of processes that have ended too; final after the block.
    """

    def __init__(self) -> None:
        self._root = psutil.Process()
        self._before: dict[tuple[int, float], float] = {}
        self._latest: dict[tuple[int, float], float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    @property
    def seconds(self) -> float:
        return sum(used - self._before.get(process, 0.0) for process, used in self._latest.items())

    def __enter__(self) -> "ProcessorTime":
        self._look()
        self._before = dict(self._latest)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _follow(self) -> None:
        while not self._over.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        for process in [self._root, *self._root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                self._latest[process.pid, process.create_time()] = times.user + times.system
            except psutil.Error:  # it has just ended
                continue
