# SPDX-License-Identifier: Apache-2.0
"""Starts Ray's workers as forks of one process that has imported everything.

A run on the CPU platform has nine processes, and each imports verl, transformers and vLLM for ten seconds. The fork
server imports them once. Ray starts ``fork_client.py`` instead of Python (its runtime environment's ``py_executable``);
the client asks the server, which forks, and the fork becomes the worker.

Ray's library reads the number of the job and the raylet's process id from the environment when it is loaded. So the
server itself never loads it. For each run (a job of a raylet) it forks a server of that run's own, which loads Ray and
all that needs it, and whose forks are the workers.

A fork has the arguments, environment, folder and output of the process that it stands for, random states of its own,
and the number of threads that its environment asks for.

``platform=cpu`` uses it for each Ray that verl starts, unless ``VERL_DVPO_FORK_SERVER`` is 0.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import logging
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
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from omegaconf import OmegaConf, open_dict

from verl_dvpo.platforms.compiled import CACHE_ENV, compiled_code
from verl_dvpo.platforms.cpu import distribution
from verl_dvpo.platforms.cpu.engine_process import end_with_parent
from verl_dvpo.platforms.cpu.loopback import keep_ray_inside
from verl_dvpo.platforms.cpu.shared_memory import remove_noted

logger = logging.getLogger(__name__)

CLIENT = Path(__file__).with_name("fork_client.py")
#: In the environment of a run's workers; 0 switches the fork server off.
SWITCH = "VERL_DVPO_FORK_SERVER"
#: Seconds that a run's raylet has, after the run's driver has ended, to end its workers.
PARTING = 20.0

#: What the server imports: other packages, and nothing that imports Ray.
MODULES = (
    "torch",
    "torch._inductor.codecache",
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
#: What the server of a run imports beside them. Nothing that declares Ray actors, as verl's modules do: the class of an
#: actor draws from the random numbers of Ray's library, whose state the forks would share.
RUN_MODULES = (
    "ray",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3",
)


class ForkServer:
    """A fork server, alive as long as the ``with`` block or the process that started it.

    Workers end with their run's raylet, or ``PARTING`` seconds after the server's end.

    Args:
        environment: variables of the server beside this process's own; those that are read at import count here.
        modules: imported at once, in order; none of them may import Ray.
        run_modules: imported by the server of each run.
    """

    def __init__(
        self,
        environment: dict[str, str] | None = None,
        modules: tuple[str, ...] = MODULES,
        run_modules: tuple[str, ...] = RUN_MODULES,
    ) -> None:
        self.folder = tempfile.mkdtemp(prefix="verl-dvpo-")  # the server removes it
        self.address = str(Path(self.folder) / "fork-server")
        lifeline, self._lifeline = os.pipe()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        listener.listen(64)
        lists = [",".join(modules), ",".join(run_modules)]
        command = [sys.executable, "-m", __name__, str(listener.fileno()), str(lifeline), *lists]
        fds = (listener.fileno(), lifeline)
        own = {**os.environ, **compiled_code(), "TMPDIR": self.folder, **(environment or {})}
        self._process = subprocess.Popen(command, pass_fds=fds, env=own, start_new_session=True)
        listener.close()
        os.close(lifeline)

    @property
    def py_executable(self) -> str:
        """The command that Ray runs in place of Python."""
        return " ".join(shlex.quote(part) for part in (sys.executable, "-I", "-S", str(CLIENT), self.address))

    def close(self, *, wait: bool = True) -> None:
        """Ends the server; it waits for the ends of its runs, and this process for it where ``wait`` says so."""
        os.close(self._lifeline)
        if wait:
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
    atexit.register(server.close, wait=False)  # Ray, which ends the run, is told to end after this
    return server


def in_runtime_env(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Lets Ray start its workers through a fork server, one for all clusters that this process starts, on loopback.

    verl asks ``original`` for the runtime environment just before it starts Ray, and merges the configuration's over
    it. An empty ``py_executable`` there is taken out, because it would replace ours; the user's own is kept. The
    workers' folder of temporary files is the server's, so that sockets, locks and stores of a run are removed with it,
    however the run ends.
    """

    def runtime_env(config: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = original(config, *args, **kwargs)
        if os.environ.get("VERL_PLATFORM", "").strip().lower() != "cpu":
            return result
        keep_ray_inside(OmegaConf.select(config, "ray_kwargs.ray_init") if config is not None else None)
        own = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env") if config is not None else None
        own = OmegaConf.create({}) if own is None else own
        variables = {**result.get("env_vars", {}), **(own.get("env_vars") or {})}
        if variables.get(SWITCH, "1") != "0" and not own.get("py_executable"):
            server = _of_this_process(frozenset(variables.items()))
            result["py_executable"] = server.py_executable
            own_files = {**compiled_code(), **result.get("env_vars", {}), "TMPDIR": server.folder}
            result["env_vars"] = own_files
            with open_dict(own):
                own.pop("py_executable", None)
        return result

    return runtime_env


def serve(listener: socket.socket, lifeline: int, modules: list[str], run_modules: list[str]) -> None:
    """Imports ``modules``, then gives each run a server of its own until ``lifeline`` is closed at its other end.

    Returns when the servers of the runs have ended.
    """
    distribution.install()
    load(modules)
    if "ray" in sys.modules:
        raise RuntimeError(f"modules are {modules}; none may import ray, which each run has to load for itself")
    runs: dict[str, str] = {}
    servers: list[int] = []
    for connection in connections(listener, lifeline):
        message = receive(connection)
        if not message:  # the client ended before it had asked
            connection.close()
            continue
        request = json.loads(message)
        address = f"{listener.getsockname()}-{request['run']}"
        if request["run"] not in runs:
            runs[request["run"]] = address
            own = socket.socket(socket.AF_UNIX)
            own.bind(address)
            own.listen(64)
            servers.append(os.fork())
            if servers[-1] == 0:
                with ends_here():
                    connection.sendall(address.encode())
                    connection.close()
                    listener.close()
                    serve_run(own, lifeline, request["environment"], run_modules)
            own.close()
        else:
            with contextlib.suppress(OSError):  # the client ended before it was answered
                connection.sendall(address.encode())
        connection.close()
    listener.close()
    while any(map(is_alive, servers)):
        time.sleep(0.1)


def serve_run(listener: socket.socket, lifeline: int, environment: dict[str, str], modules: list[str]) -> None:
    """Imports ``modules`` with a run's environment, then forks once per connection; does not return.

    It ends with the run's raylet, at most ``PARTING`` seconds after ``lifeline`` is closed at its other end, and its
    forks with it. It ends at once if its forks would draw the same random numbers from Ray's library; then each client
    becomes the worker that it asked for.
    """
    os.setsid()
    set_environment(environment)
    load(modules)
    if "ray" in sys.modules and draw_in_a_fork() == draw_in_a_fork():
        logger.error(
            "modules are %s; one of them draws from Ray's random numbers; workers start without forks", modules
        )
        os._exit(1)
    raylet = int(environment.get("RAY_RAYLET_PID") or 0)
    for connection in connections(listener, lifeline, raylet):
        if os.fork() == 0:
            with ends_here():
                end_with_parent()
                os.close(lifeline)
                listener.close()
                run(connection)
        connection.close()
    listener.close()
    parting = time.monotonic() + PARTING
    while is_alive(raylet) and time.monotonic() < parting:
        time.sleep(0.2)
    os._exit(0)


@contextlib.contextmanager
def ends_here() -> Iterator[None]:
    """Ends this process with the block, whatever happens in it; the interpreter is not taken down.

    A fork shares locks with threads that it does not have, and would wait for them for ever. A client that has gone is
    no error.
    """
    status = 1
    try:
        yield
        status = 0
    except ConnectionError:
        pass
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def is_alive(process: int) -> bool:
    """Tells whether a process runs; 0 stands for none, and one that is dead and not yet buried does not run."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def draw_in_a_fork() -> bytes:
    """An identifier that Ray's library draws in a fork of this process."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        from ray import ActorClassID

        os.write(writer, ActorClassID.from_random().binary())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as drawn:
        return drawn.read()


def load(modules: list[str]) -> None:
    """Imports modules before forks are made of this process; one that is not installed is left to the worker."""
    for module in filter(None, modules):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    if compiler := sys.modules.get("torch._inductor.codecache"):
        # torch takes the folder of its precompiled header from the one of temporary files, whatever CACHE_ENV says
        compiler._HEADER_DIR = str(Path(compiled_code()[CACHE_ENV]) / "precompiled_headers")  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies


def connections(listener: socket.socket, lifeline: int, raylet: int = 0) -> Iterator[socket.socket]:
    """Yields connections until ``lifeline`` is closed at its other end, or the process ``raylet`` has ended."""
    while True:
        ready, _, _ = select.select([listener.fileno(), lifeline], [], [], 5.0 if raylet else None)
        if lifeline in ready or (raylet and not is_alive(raylet)):
            return
        if ready:
            yield listener.accept()[0]


def set_environment(environment: dict[str, str]) -> None:
    """Gives this process the environment of another."""
    os.environ.clear()
    os.environ.update(environment)


def run(connection: socket.socket) -> None:
    """Becomes the worker that the other end of ``connection`` asks for; does not return."""
    os.setsid()  # Ray ends a worker with its process group, which must not be the server's
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message = receive(connection)
    if not message:
        os._exit(1)
    request: dict[str, Any] = json.loads(message)
    _, fds, _, _ = socket.recv_fds(connection, 1, 3)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    set_environment(request["environment"])
    os.chdir(request["folder"])
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    connection.sendall(os.getpid().to_bytes(8, "little"))
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


def receive(connection: socket.socket) -> bytes:
    """The next message of a client; empty where the client ended before its end."""
    size, parts = 8, bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            return b""
        parts += part
        if size == 8 and len(parts) == 8:
            size += int.from_bytes(parts, "little")
    return bytes(parts[8:])


def _end_with(connection: socket.socket) -> None:
    """Ends this process when the client has ended: whoever kills the client means the worker."""
    with contextlib.suppress(OSError):  # one that was killed with something unread resets the connection
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
    owner, folder = os.getpid(), Path(listening.getsockname()).parent
    try:
        serve(listening, int(sys.argv[2]), sys.argv[3].split(","), sys.argv[4].split(","))
    finally:
        if os.getpid() == owner:
            remove_noted(folder)
            shutil.rmtree(folder, ignore_errors=True)
