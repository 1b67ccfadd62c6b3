# SPDX-License-Identifier: Apache-2.0
"""Starts Ray's workers as forks of one process that has imported everything.

A run on the CPU platform has nine processes, and each imports verl, transformers and vLLM for ten seconds. The fork
server imports them once. Ray starts ``fork_client.py`` instead of Python (its runtime environment's ``py_executable``);
the client asks the server, which forks, and the fork becomes the worker.

A fork has the arguments, environment, folder and output of the process that it stands for, random states of its own,
and the number of threads that its environment asks for.

``platform=cpu`` uses it for each Ray that verl starts, unless ``VERL_DVPO_FORK_SERVER`` is 0.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf

from verl_dvpo.platforms.cpu import distribution

CLIENT = Path(__file__).with_name("fork_client.py")
#: In the environment of a run's workers; 0 switches the fork server off.
SWITCH = "VERL_DVPO_FORK_SERVER"

#: What the workers of a run import of other packages. Nothing that imports Ray: its library reads the job's number and
#: the raylet's process id from the environment when it is loaded, so each fork loads it for itself.
MODULES = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "tensordict",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "accelerate",
    "aiohttp",
    "codetiming",
    "datasets",
    "fastapi",
    "hydra",
    "pandas",
    "peft",
    "torchdata.stateful_dataloader",
    "uvicorn",
    "zmq",
    "vllm",
)


class ForkServer:
    """A fork server, alive as long as the ``with`` block or the process that started it.

    Args:
        environment: variables of the server beside this process's own; those that are read at import count here.
        modules: imported before the first fork, in order.
    """

    def __init__(self, environment: dict[str, str] | None = None, modules: tuple[str, ...] = MODULES) -> None:
        self.address = str(Path(tempfile.mkdtemp(prefix="verl-dvpo-")) / "fork-server")  # the server removes the folder
        lifeline, self._lifeline = os.pipe()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(64)
        command = [sys.executable, "-m", __name__, str(listener.fileno()), str(lifeline), *modules]
        fds = (listener.fileno(), lifeline)
        self._process = subprocess.Popen(
            command, pass_fds=fds, env={**os.environ, **(environment or {})}, start_new_session=True
        )
        listener.close()
        os.close(lifeline)

    @property
    def py_executable(self) -> str:
        """What Ray is to run in place of Python."""
        return " ".join(shlex.quote(part) for part in (sys.executable, "-I", "-S", str(CLIENT), self.address))

    def close(self) -> None:
        """Ends the server; its forks go on until Ray ends them."""
        os.close(self._lifeline)
        self._process.wait()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@functools.cache
def _of_this_process(environment: frozenset[tuple[str, str]]) -> ForkServer:
    server = ForkServer(dict(environment))
    atexit.register(server.close)
    return server


def in_runtime_env(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Lets Ray start its workers through a fork server, one for all clusters that this process starts.

    verl asks ``original`` for the runtime environment just before it starts Ray.
    """

    def runtime_env(config: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = original(config, *args, **kwargs)
        own = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars") if config is not None else None
        variables = {**result.get("env_vars", {}), **(own or {})}
        if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu" and variables.get(SWITCH, "1") != "0":
            result["py_executable"] = _of_this_process(frozenset(variables.items())).py_executable
        return result

    return runtime_env


def serve(listener: socket.socket, lifeline: int, modules: list[str]) -> None:
    """Imports ``modules``, then forks once per connection until ``lifeline`` is closed at its other end."""
    distribution.install()
    for module in modules:
        importlib.import_module(module)
    if "ray" in sys.modules:
        raise RuntimeError(f"one of {modules} imports ray, which every worker has to load for itself")
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    while True:
        ready, _, _ = select.select([listener.fileno(), lifeline], [], [])
        if lifeline in ready:
            return
        connection, _ = listener.accept()
        worker = os.fork()
        if worker == 0:
            os.close(lifeline)
            listener.close()
            run(connection)
        connection.close()


def run(connection: socket.socket) -> None:
    """Becomes the worker that the other end of ``connection`` asks for; does not return."""
    os.setsid()  # Ray ends a worker with its process group, which must not be the server's
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, fds, _, _ = socket.recv_fds(connection, 8, 3)
    request: dict[str, Any] = json.loads(_receive(connection, int.from_bytes(head, "little")))
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    connection.sendall(os.getpid().to_bytes(8, "little"))
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    _own_state()
    script, *arguments = request["arguments"]
    sys.argv = [script, *arguments]
    given = request["environment"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [str(Path(script).parent), *(path for path in given if path and path not in sys.path)]
    try:
        runpy.run_path(script, run_name="__main__")
        status: Any = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    # As multiprocessing ends its forks: the interpreter itself is not taken down, it is the server's.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def _receive(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            os._exit(1)
        parts += part
    return bytes(parts)


def _end_with(connection: socket.socket) -> None:
    """Ends this process when the client has ended: whoever kills the client means the worker."""
    connection.recv(1)
    os._exit(1)


def _own_state() -> None:
    """Gives the fork what a new process would have: numpy's random state, and its number of threads."""
    import numpy as np
    import torch

    np.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


if __name__ == "__main__":
    listening = socket.socket(fileno=int(sys.argv[1]))
    owner = os.getpid()
    try:
        serve(listening, int(sys.argv[2]), sys.argv[3:])
    finally:
        if os.getpid() == owner:
            shutil.rmtree(Path(listening.getsockname()).parent, ignore_errors=True)
