# SPDX-License-Identifier: Apache-2.0
"""The fork that becomes vLLM's engine: it leaves the parent's connections and ends with the parent."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from verl_dvpo.platforms.cpu.engine_process import EngineContext

PARENT = """
import os, signal, time
from verl_dvpo.platforms.cpu.engine_process import EngineContext

child = EngineContext().Process(target=time.sleep, args=(60,))
child.start()
print(child.pid, flush=True)
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def test_named_sockets_are_closed_and_pipes_stay(tmp_path) -> None:
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_UNIX) as client:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "named"))
        unix.listen()
        client.connect(str(tmp_path / "named"))
        context = EngineContext()
        receiver, sender = context.Pipe()  # a pair of sockets without names
        numbers = [tcp.fileno(), unix.fileno(), client.fileno(), receiver.fileno()]

        def report() -> None:
            sender.send([is_open(number) for number in numbers])

        child = context.Process(target=report)
        child.start()
        assert receiver.poll(20)
        assert receiver.recv() == [False, False, False, True]
        child.join()
        assert child.exitcode == 0
        assert all(map(is_open, numbers))  # here nothing was closed


def test_the_engine_ends_with_a_server_that_is_killed() -> None:
    parent = subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.returncode == -signal.SIGKILL
    engine = int(parent.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and running(engine):
        time.sleep(0.05)
    assert not running(engine)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"
