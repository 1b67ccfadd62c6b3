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
    """Sends this process's arguments, environment, folder and open output files; returns when the worker has ended."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    message = json.dumps(request).encode()
    socket.send_fds(server, [len(message).to_bytes(8, "little")], [0, 1, 2])
    server.sendall(message)
    worker = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "little")
    if not worker:
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(worker, number))
    while server.recv(1):  # nothing is sent: the end of the worker ends the connection
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
