# SPDX-License-Identifier: Apache-2.0
"""Checks of what the machine has: disk, memory, shared memory, ports, and accelerators."""

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import psutil

from verl_dvpo.doctor.checks import Machine, check, remedy
from verl_dvpo.doctor.lines import Line, ok, problem, warning

GIB = 2**30
#: Bytes free where a run writes. The demo's checkpoint, log and Ray's session take a few hundred MB; a checkpoint of a
#: model of 8 billion parameters with its optimiser 100 GB.
LEAST_DISK, GOOD_DISK = 1 * GIB, 10 * GIB
#: Bytes of memory free for platform=cpu: 0.5 GiB for Ray's store, 1 GiB for vLLM's cache, and 1 to 2 GiB for the
#: processes, which share what they import.
LEAST_MEMORY, GOOD_MEMORY = 3 * GIB, 6 * GIB
#: What Ray itself wants of shared memory, as a share of all memory, where platform=cpu does not say how much.
RAYS_SHARE = 0.3
#: The limits of a container's memory, of both versions of cgroups.
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def cpu_platform() -> dict[str, Any]:
    """Reads what ``platform=cpu`` gives to ``ray.init``."""
    from importlib import resources

    from omegaconf import OmegaConf

    text = (resources.files("verl_dvpo.config") / "platform" / "cpu.yaml").read_text()
    found = OmegaConf.to_container(OmegaConf.create(text).ray_kwargs.ray_init, resolve=True)
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}


def gib(size: float) -> str:
    """Writes bytes for people."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _space(folder: Path) -> tuple[int, int]:
    """Returns the bytes of a file system that are free for this user, and all of them."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


@check(
    "disk",
    about="room where runs, temporary files and Ray's session are written",
    remedy="free some, or write elsewhere: trainer.default_local_dir for checkpoints, TMPDIR and RAY_TMPDIR for others",
)
def disk(machine: Machine) -> Line:
    temporary = machine.environment.get("TMPDIR", tempfile.gettempdir())
    ray = machine.environment.get("RAY_TMPDIR", temporary)
    places = {"here": machine.folder, "temporary files": Path(temporary), "Ray's session": Path(ray)}
    free: dict[str, int] = {}
    for name, place in places.items():
        if not place.is_dir() or not os.access(place, os.W_OK):
            return problem("disk", f"{name}: {place} is no folder that can be written to", remedy("disk"))
        free[name] = _space(place)[0]
    least = min(free, key=lambda name: free[name])
    text = f"{gib(free[least])} free ({least})"
    if free[least] < LEAST_DISK:
        return problem("disk", f"{text}; {gib(LEAST_DISK)} are needed", remedy("disk"))
    if free[least] < GOOD_DISK:
        return warning("disk", f"{text}; fine for the demo, little for checkpoints of large models", remedy("disk"))
    return ok("disk", text)


@check(
    "memory",
    about="memory that is free, within the limit of a container",
    remedy="end other programs, or give the container more (docker run --memory=8g); on platform=cpu less is needed "
    "with ray_kwargs.ray_init.object_store_memory=200000000",
)
def memory(machine: Machine) -> Line:
    free, cores = free_memory(), len(os.sched_getaffinity(0))
    text = f"{gib(free)} free, {cores} cores"
    if free < LEAST_MEMORY:
        return problem("memory", f"{text}; a run needs {gib(LEAST_MEMORY)} at least", remedy("memory"))
    if free < GOOD_MEMORY:
        return warning("memory", f"{text}; enough for the demo", remedy("memory"))
    return ok("memory", text)


def free_memory() -> int:
    """Returns the bytes that are free on the machine, or the limit of this container if it is less."""
    free = int(psutil.virtual_memory().available)
    for file in CGROUPS:
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdigit():
            free = min(free, int(text))
    return free


@check(
    "shared memory",
    about="the size of /dev/shm, where Ray's store and the transfer of weights lie",
    remedy="make it larger: docker run --shm-size=2g, or `mount -o remount,size=2g /dev/shm`; Kubernetes: an emptyDir "
    "with medium Memory at /dev/shm",
)
def shared_memory(machine: Machine) -> Line:
    folder = machine.shared_memory
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return problem("shared memory", f"{folder} is no folder that can be written to", remedy("shared memory"))
    free, size = _space(folder)
    on_cpu = machine.platform == "cpu"
    wanted = int(cpu_platform()["object_store_memory"] if on_cpu else RAYS_SHARE * psutil.virtual_memory().total)
    text = f"{gib(free)} of {gib(size)} free in {folder}"
    if free >= wanted:
        return ok("shared memory", text)
    who = f"platform=cpu gives Ray's store {gib(wanted)}" if on_cpu else f"Ray's store wants {gib(wanted)}"
    made = problem if on_cpu or free < cpu_platform()["object_store_memory"] else warning
    return made("shared memory", f"{text}; {who}", remedy("shared memory"))


@check(
    "loopback",
    about="whether a process can listen on 127.0.0.1 and be reached there",
    remedy="bring the loopback interface up (`ip link set lo up`), and let the sandbox or firewall pass 127.0.0.1",
)
def loopback(machine: Machine) -> Line:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                other, _ = server.accept()
                with other:
                    client.sendall(b"?")
                    heard = other.recv(1)
    except OSError as error:
        return problem("loopback", f"127.0.0.1 cannot be reached: {error}", remedy("loopback"))
    if heard != b"?":
        return problem("loopback", "what was sent over 127.0.0.1 did not arrive", remedy("loopback"))
    return ok("loopback", "a process can listen on 127.0.0.1 and be reached there")


@check(
    "devices",
    about="torch, and the accelerators that it sees",
    remedy="without an accelerator set VERL_PLATFORM=cpu (platform=cpu on the command line); with one install a torch "
    "that is built for it, and see CUDA_VISIBLE_DEVICES",
)
def devices(machine: Machine) -> Line:
    answer = machine.ask("devices")
    if answer.error:
        return problem("devices", f"torch cannot be imported: {answer.error}", remedy("devices"))
    torch, names = answer.facts["torch"], answer.facts["devices"]
    seen = f"{len(names)} x {names[0]}" if names else "no accelerator"
    text = f"torch {torch} sees {seen}; platform {machine.platform}"
    if machine.platform == "gpu" and not names:
        return problem("devices", text, remedy("devices"))
    if machine.platform == "cpu" and names:
        return warning("devices", f"{text}, so it stays idle", "unset VERL_PLATFORM to use it")
    return ok("devices", text)
