# SPDX-License-Identifier: Apache-2.0
"""Runs functions in one process of its own, with a limit of time that also ends what no alarm can interrupt.

verl's own grading by math-verify keeps four processes, each of which imports verl; a reward worker of ours keeps one
that imports what it is asked to run. The process ends with the one that started it, however that ends.
"""

import atexit
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

#: Seconds for the process to start, on a busy machine too.
START_SECONDS = 180.0


class HelperError(RuntimeError):
    """The function ran too long, or its process died."""


class Helper:
    """One process, started when it is first needed. May be shared by threads; calls wait for each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
        """Returns ``function(*arguments)``.

        Args:
            function: of a module, so that it can be named to another process.
            *arguments: that can be pickled.
            seconds: after which the process is ended; the next call starts another.

        Raises:
            HelperError: it ran too long, or the process died.
            Exception: what the function raised.
        """
        with self._lock:
            pipe = self._pipe if self._process is not None and self._process.is_alive() else None
            try:
                if pipe is None:
                    pipe = self._start()
                pipe.send((function, arguments))
                if not pipe.poll(seconds):
                    self._stop()
                    raise HelperError(f"{function.__name__} ran for more than {seconds:g} s and was ended")
                failed, result = pipe.recv()
            except (EOFError, OSError) as error:
                self._stop()
                raise HelperError(f"the process of {function.__name__} died; see its messages above") from error
        if failed:
            raise result
        return result

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._stop()

    def _start(self) -> Connection:
        self._stop()
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        if not self._pipe.poll(START_SECONDS):
            self._stop()
            raise HelperError(f"the helper's process did not start within {START_SECONDS:g} s; free the machine")
        self._pipe.recv()
        return self._pipe

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def _serve(pipe: Connection) -> None:
    """Runs what comes through the pipe until its other end is closed."""
    pipe.send(None)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (False, function(*arguments))
        except Exception as error:  # goes to the caller, who raises it
            answer = (True, error)
        pipe.send(answer)
