# SPDX-License-Identifier: Apache-2.0
"""Where a run listens and meets; that a whole run listens on loopback only, tests/test_guarded_run.py shows."""

import os
import socket
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import ray

from verl_dvpo.platforms.cpu.loopback import MEETING_ENV, among_own_files, keep_ray_inside, meet_at_a_file


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(ray._private.ray_constants, "ENABLE_RAY_CLUSTER", True)
    context = SimpleNamespace(get_job_id=lambda: "02000000", gcs_address="127.0.0.1:41234")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.delenv(MEETING_ENV, raising=False)
    for name, value in {"MASTER_PORT": "29501", "WORLD_SIZE": "2", "RAY_LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("ray_init", [None, {}, {"num_cpus": 4}, {"address": None}])
def test_ray_takes_the_loopback_address_for_its_own(cluster, ray_init):
    keep_ray_inside(ray_init)
    assert ray._private.services.get_node_ip_address() == "127.0.0.1"


def test_a_ray_that_runs_elsewhere_is_left_alone(cluster):
    keep_ray_inside({"address": "10.1.1.1:6379"})
    assert ray._private.ray_constants.ENABLE_RAY_CLUSTER


def test_training_processes_meet_at_a_file_of_their_own(cluster, monkeypatch):
    meet_at_a_file()
    first = os.environ.pop(MEETING_ENV)
    assert first == f"file://{tempfile.gettempdir()}/verl-dvpo-41234-02000000-29501"
    monkeypatch.setenv("MASTER_PORT", "29502")
    meet_at_a_file()
    assert os.environ.pop(MEETING_ENV) != first


def test_processes_of_several_machines_have_no_common_file(cluster, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    meet_at_a_file()
    assert MEETING_ENV not in os.environ


def test_a_process_without_ray_starts_none(cluster, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    meet_at_a_file()
    assert MEETING_ENV not in os.environ


def test_a_place_that_the_user_chose_stays(cluster, monkeypatch):
    monkeypatch.setenv(MEETING_ENV, "tcp://10.1.1.1:29500")
    meet_at_a_file()
    assert os.environ[MEETING_ENV] == "tcp://10.1.1.1:29500"


@pytest.mark.parametrize(("init", "outside"), [("env://", True), ("file", False)])
def test_torchs_own_meeting_point_listens_everywhere_and_a_file_does_not(tmp_path, init, outside):
    """What ``meet_at_a_file`` is for."""
    code = (
        "import psutil, sys, torch.distributed as d\n"
        "d.init_process_group('gloo', rank=0, world_size=1, init_method=sys.argv[1])\n"
        "found = [c.laddr.ip for c in psutil.Process().net_connections('inet') if c.status == 'LISTEN']\n"
        "print(any(ip in ('::', '0.0.0.0') for ip in found))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    address = f"file://{tmp_path / 'meeting'}" if init == "file" else init
    command = [sys.executable, "-c", code, address]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == str(outside), done.stderr[-500:]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("ipc:///tmp/rl-colocate-zmq-01000000-4-replica-3-rank-12.sock", "ipc://{}/w-01000000-4-3-12.sock"),
        ("ipc:///elsewhere/rl-colocate-zmq-1.sock", "ipc:///elsewhere/rl-colocate-zmq-1.sock"),
        ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555"),
    ],
)
def test_the_socket_of_the_weights_is_among_the_runs_files(address, expected):
    assert among_own_files(address) == expected.format(tempfile.gettempdir())
