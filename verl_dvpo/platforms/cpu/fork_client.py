# SPDX-License-Identifier: Apache-2.0
"""Asks the fork server for a Ray worker and stands for it until it ends.

``verl_dvpo.platforms.cpu.fork_server`` runs this file as Ray's ``py_executable``, with the arguments that Python would
get. It imports nothing but the standard library's smallest modules, so that it starts in a few hundredths of a second.
"""

import json
import os
import signal
import socket
import sys


def main(address: str, arguments: list) -> int:
    """Has the server make the worker, and returns when it has ended; without a server, becomes the worker itself."""
    try:
        server, worker = ask(address, arguments)
    except OSError:
        worker = 0
    if not worker:
        os.execv(sys.executable, [sys.executable, *arguments])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(worker, number))
    while server.recv(1):  # nothing is sent: the end of the worker ends the connection
        pass
    return 0


def ask(address: str, arguments: list) -> tuple:
    """Sends this process's arguments, environment, folder and open output files.

    Returns:
        the connection, and the worker's process id; 0 if there is none.

    Raises:
        OSError: no server answers.
    """
    environment = dict(os.environ)
    run = f"{environment.get('RAY_JOB_ID', '')}-{environment.get('RAY_RAYLET_PID', '')}"
    with connect(address) as first:
        send(first, {"run": run, "environment": environment})
        own = first.recv(1024).decode()
    server = connect(own)
    send(server, {"arguments": arguments, "environment": environment, "folder": os.getcwd()})
    socket.send_fds(server, [b"."], [0, 1, 2])
    return server, int.from_bytes(server.recv(8, socket.MSG_WAITALL), "little")


def connect(address: str) -> socket.socket:
    """A connection to the server at ``address``."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    return server


def send(server: socket.socket, message: dict) -> None:
    """Sends the length of a message, and the message as JSON."""
    encoded = json.dumps(message).encode()
    server.sendall(len(encoded).to_bytes(8, "little") + encoded)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
