# SPDX-License-Identifier: Apache-2.0
"""Keeps a run to itself: Ray listens on 127.0.0.1, training processes meet at a file, sockets are among its own files.

Ray, TransferQueue and vLLM's server all listen at what Ray takes for the node's address. Ray replaces a loopback
address by an outer one, even where ``ray.init`` is given it, unless it is told that there is no cluster.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

#: Where the training processes meet; verl hands it to ``torch.distributed``.
MEETING_ENV = "DIST_INIT_METHOD"


def keep_ray_inside(ray_init: Any) -> None:
    """Lets the Ray that this process starts next listen on the loopback address only.

    Args:
        ray_init: the arguments of ``ray.init``; with an ``address`` Ray runs already, and nothing is changed.
    """
    if (ray_init or {}).get("address") is None:
        from ray._private import ray_constants

        ray_constants.ENABLE_RAY_CLUSTER = False


def meet_at_a_file() -> None:
    """Lets the training processes of a run meet at a file of the run's, unless the user says where.

    The store that they meet at otherwise listens on every address of the machine. verl gives all processes of a worker
    group one port, which names the file. Nothing changes outside a run on Ray, or where a group has several machines.
    """
    import ray

    if MEETING_ENV in os.environ or "MASTER_PORT" not in os.environ or not ray.is_initialized():
        return
    if os.environ.get("RAY_LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return
    context = ray.get_runtime_context()
    cluster = context.gcs_address.rpartition(":")[2]
    name = f"verl-dvpo-{cluster}-{context.get_job_id()}-{os.environ['MASTER_PORT']}"
    os.environ[MEETING_ENV] = f"file://{Path(tempfile.gettempdir()) / name}"


def among_own_files(address: str) -> str:
    """Moves the socket of verl's weight transfer from ``/tmp`` to the run's folder of temporary files.

    There it is removed with the run, however that ends. The name is shorter: a socket's path has 107 bytes at most.
    """
    path, _, name = address.rpartition("/tmp/rl-colocate-zmq-")
    if path != "ipc://":
        return address
    return f"ipc://{tempfile.gettempdir()}/w-{name.replace('-replica-', '-').replace('-rank-', '-')}"
