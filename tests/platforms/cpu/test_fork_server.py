# SPDX-License-Identifier: Apache-2.0
"""Forks of the server are as processes of their own: arguments, environment, folder, output, and their end.

Runs that use it repeat those without it to the bit; tests/test_e2e.py starts its workers this way.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import hydra
import psutil
import pytest
from omegaconf import OmegaConf
from torch._inductor.runtime.cache_dir_utils import cache_dir

import verl_dvpo.plugin  # noqa: F401  (puts verl_dvpo.config on the search path)
from verl_dvpo.platforms.cpu import fork_client, fork_server
from verl_dvpo.platforms.cpu.fork_server import ForkServer

ROOT = Path(__file__).parents[3]

TELL = """
import json, os, sys, random
import numpy as np
print(json.dumps({
    "argv": sys.argv, "path": sys.path[:2], "cwd": os.getcwd(), "environment": dict(os.environ), "name": __name__,
    "loaded": "fractions" in sys.modules, "pid": os.getpid(), "draws": [random.random(), float(np.random.rand())],
    "threads": __import__("torch").get_num_threads(),
}))
print("an error", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def server():
    with ForkServer({"COLOUR": "server"}, modules=("numpy.random", "torch"), run_modules=("fractions",)) as running:
        yield running


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(TELL)
    return path


def run(server: ForkServer, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [*shlex.split(server.py_executable), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


def test_a_fork_is_what_the_process_would_have_been(server, script, tmp_path):
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "COLOUR": "client", "PYTHONPATH": "/else/where"}
    done = run(server, str(script), "--a", "b c", cwd=tmp_path, env=environment)
    told = json.loads(done.stdout)
    assert told["argv"] == [str(script), "--a", "b c"]
    assert told["path"] == [str(tmp_path), "/else/where"]
    assert Path(told["cwd"]) == tmp_path
    assert {name: told["environment"].get(name) for name in environment} == environment
    assert told["name"] == "__main__"
    assert told["loaded"]
    assert told["threads"] == 1
    assert "an error" in done.stderr
    assert done.returncode == 0


def test_the_precompiled_header_of_torch_outlives_the_run(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("from torch._inductor import codecache\nprint(codecache._HEADER_DIR)\n")
    with ForkServer(modules=("torch._inductor.codecache",), run_modules=()) as own:
        variables = {**os.environ, "TMPDIR": own.folder}
        printed = Path(run(own, str(script), env=variables).stdout.strip())
    assert printed == Path(cache_dir()) / "precompiled_headers"


def test_forks_draw_apart(server, script):
    first, second = (json.loads(run(server, str(script)).stdout) for _ in range(2))
    assert first["pid"] != second["pid"]
    assert set(first["draws"]).isdisjoint(second["draws"])


def test_who_ends_the_client_ends_the_worker(server, tmp_path):
    script = tmp_path / "sleep.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(300)\n")
    for number in (signal.SIGTERM, signal.SIGKILL):
        client = subprocess.Popen([*shlex.split(server.py_executable), str(script)], stdout=subprocess.PIPE, text=True)
        worker = int(client.stdout.readline())
        client.send_signal(number)
        client.wait(20)
        assert wait_for_end(worker), number


def test_a_signal_to_a_worker_s_group_leaves_the_server(server, script, tmp_path):
    """Ray ends a worker with its whole process group."""
    sleeper = tmp_path / "sleep.py"
    sleeper.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(300)\n")
    client = subprocess.Popen([*shlex.split(server.py_executable), str(sleeper)], stdout=subprocess.PIPE, text=True)
    worker = int(client.stdout.readline())
    os.killpg(os.getpgid(worker), signal.SIGKILL)
    client.wait(20)
    assert json.loads(run(server, str(script)).stdout)["loaded"]


def test_the_server_ends_with_its_owner(tmp_path):
    code = (
        "import os, sys\nfrom verl_dvpo.platforms.cpu.fork_server import ForkServer\n"
        "server = ForkServer(modules=('fractions',), run_modules=())\n"
        "print(server._process.pid, flush=True)\nos._exit(0)\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert wait_for_end(int(printed.stdout.split()[-1]))
    assert not list(Path(tmp_path).glob("verl-dvpo-*"))


def test_a_worker_that_answers_nobody_ends_with_the_server(tmp_path):
    """It sleeps in C and keeps Python's lock, so that no thread of its own can end it."""
    script = tmp_path / "stuck.py"
    script.write_text("import ctypes, os\nprint(os.getpid(), flush=True)\nctypes.PyDLL(None).sleep(300)\n")
    with ForkServer(modules=("fractions",), run_modules=()) as own:
        client = subprocess.Popen([*shlex.split(own.py_executable), str(script)], stdout=subprocess.PIPE, text=True)
        worker = int(client.stdout.readline())
        time.sleep(1.0)  # until it sleeps
        client.kill()
        client.wait(20)
        assert not wait_for_end(worker, seconds=1.0)
    assert wait_for_end(worker)


def test_shared_memory_of_a_killed_worker_is_removed_with_the_server(tmp_path):
    """It ends as a sender of weights does whose receiver and whose own group of processes were killed."""
    script = tmp_path / "sender.py"
    script.write_text(
        "import os, signal\nfrom multiprocessing import resource_tracker, shared_memory\n"
        "from verl_dvpo.platforms.cpu.shared_memory import noted\n"
        "make = noted(lambda size, name: shared_memory.SharedMemory(name=name, create=True, size=size))\n"
        "make(64, 'verl_weights_of_a_test')\nprint('made', flush=True)\n"
        "os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with ForkServer(modules=("fractions",), run_modules=()) as own:
        variables = {**os.environ, "TMPDIR": own.folder, "PYTHONPATH": str(ROOT)}
        done = run(own, str(script), env=variables)
        assert "made" in done.stdout, done.stderr
        assert Path("/dev/shm/verl_weights_of_a_test").exists()
    assert not Path("/dev/shm/verl_weights_of_a_test").exists()


def test_clients_that_leave_before_the_answer_leave_no_process_and_no_traceback(script, tmp_path, capfd):
    variables = {"PATH": os.environ["PATH"], "RAY_JOB_ID": "", "RAY_RAYLET_PID": ""}
    with ForkServer(modules=("fractions",), run_modules=()) as own:
        with fork_client.connect(own.address) as first:
            fork_client.send(first, {"run": "left", "environment": variables})
        with fork_client.connect(own.address) as second:
            fork_client.send(second, {"run": "-", "environment": variables})
            address = second.recv(1024).decode()
        for _ in range(3):
            with fork_client.connect(address) as asking:
                message = {"arguments": [str(script)], "environment": variables, "folder": str(tmp_path)}
                fork_client.send(asking, message)
                socket.send_fds(asking, [b"."], [0, 1, 2])
        assert json.loads(run(own, str(script), env=variables).stdout)["name"] == "__main__"
        servers = psutil.Process(own._process.pid).children(recursive=True)
        deadline = time.monotonic() + 20
        while len(servers) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
            servers = psutil.Process(own._process.pid).children(recursive=True)
        assert len(servers) == 1, "the server of the run"
    assert wait_for_end(servers[0].pid)
    assert "Traceback" not in capfd.readouterr().err


def test_status_and_traceback_of_a_script_that_fails(server, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import atexit\natexit.register(print, 'exit handler')\nraise ValueError('told')\n")
    done = run(server, str(script))
    assert "ValueError: told" in done.stderr
    assert "exit handler" in done.stdout


DRAW = "from ray import ActorClassID, _raylet\nprint(ActorClassID.from_random().hex())\n"


def test_forks_of_a_run_draw_apart_from_ray_too(tmp_path):
    """With the modules that a run imports; Ray's identifiers come from its library's own random numbers."""
    script = tmp_path / "draw.py"
    script.write_text(DRAW)
    with ForkServer(modules=()) as server:
        first, second = (run(server, str(script)) for _ in range(2))
    assert first.stdout != second.stdout
    assert len(first.stdout) == len(second.stdout) > 16
    assert "workers start without forks" not in first.stderr + second.stderr


def test_forks_that_would_draw_alike_are_not_made(tmp_path, capfd):
    """A module that declares a Ray actor draws before the forks do; then each client becomes its worker."""
    (tmp_path / "declares.py").write_text("import ray\n\n\n@ray.remote\nclass Actor:\n    pass\n")
    script = tmp_path / "draw.py"
    script.write_text(DRAW)
    with ForkServer({"PYTHONPATH": str(tmp_path)}, modules=(), run_modules=("declares",)) as server:
        first, second = (run(server, str(script)) for _ in range(2))
    assert "workers start without forks" in capfd.readouterr().err
    assert first.stdout != second.stdout


def test_without_a_server_the_client_is_the_worker(script):
    server = ForkServer(modules=("no_such_module",), run_modules=())
    server.close()
    told = json.loads(run(server, str(script), "--a").stdout)
    assert told["argv"] == [str(script), "--a"]
    assert not told["loaded"]


def test_modules_that_load_ray_are_refused(tmp_path):
    """Ray's library reads the job and the raylet from the environment when it is loaded, once."""
    server = ForkServer(modules=("ray",), run_modules=())
    assert server._process.wait(60) != 0
    server.close()


def wait_for_end(pid: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("own", "expected"), [(None, "the server's"), ("their own", "their own")])
def test_verls_own_merge_keeps_the_server(monkeypatch, own, expected):
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("dvpo_trainer", overrides=["platform=cpu"])
    config.ray_kwargs.ray_init.runtime_env.py_executable = own
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(
        fork_server,
        "_of_this_process",
        lambda variables: SimpleNamespace(py_executable="the server's", folder="its folder"),
    )
    default = fork_server.in_runtime_env(lambda config: {"env_vars": {}})(config)
    # as verl's run_ppo merges them
    merged = OmegaConf.merge(default, config.ray_kwargs.ray_init.runtime_env)
    assert merged.py_executable == expected
    if own is None:
        assert merged.env_vars.TMPDIR == "its folder"
        assert cache_dir() == merged.env_vars.TORCHINDUCTOR_CACHE_DIR, "what torch compiles outlives the run"
