# SPDX-License-Identifier: Apache-2.0
"""Starts vLLM's engine as a fork of verl's rollout server, which has imported vLLM already.

vLLM forks its engine by default. Where the server is a Ray actor it spawns the engine, with all its imports, because
the engine may use Ray. With one worker inside the engine (``distributed_executor_backend: uni``) it does not. The fork
closes the server's connections to Ray, so that Ray sees the end of the server, and ends with the server.
"""

import contextlib
import ctypes
import multiprocessing.context
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

#: ``PR_SET_PDEATHSIG`` of prctl(2).
PARENT_DEATH_SIGNAL = 1


def end_with_parent() -> None:
    """Lets the kernel kill this process when its parent ends, however that ends; on Linux."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


class EngineProcess(multiprocessing.context.ForkProcess):
    """Leaves the parent's connections before it does its work."""

    def run(self) -> None:
        end_with_parent()
        close_connections()
        super().run()


class EngineContext(multiprocessing.context.ForkContext):
    """Makes processes of `EngineProcess`; everything else is multiprocessing's ``fork``."""

    Process = EngineProcess


def fork_engine(original: Callable[[], Any]) -> Callable[[], EngineContext]:
    """Returns a function that gives vLLM the context of its engine's process, whatever ``original`` would choose."""

    def get_mp_context() -> EngineContext:
        return EngineContext()

    return get_mp_context


def close_connections() -> None:
    """Closes every socket of this process that has a name: those to Ray, ZeroMQ's and the fork server's.

    Pipes of multiprocessing are sockets without a name, and stay open.
    """
    for entry in os.listdir("/proc/self/fd"):
        number = int(entry)
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(number)) as copy:
                named = copy.family != socket.AF_UNIX or copy.getsockname() or _peer(copy)
            if named:
                os.close(number)


def _peer(connection: socket.socket) -> Any:
    """Returns the name of the other end; empty where there is none."""
    try:
        return connection.getpeername()
    except OSError:
        return ""
