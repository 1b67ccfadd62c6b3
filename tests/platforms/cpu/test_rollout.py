# SPDX-License-Identifier: Apache-2.0
"""Where trainer and sampler meet for the weights. That they do meet, every end-to-end run shows."""

import os
import tempfile
from types import SimpleNamespace

import pytest
import ray
from verl.workers.rollout.vllm_rollout import ServerAdapter
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

from verl_dvpo.platforms.cpu.rollout import CPUServerAdapter, VLLMCPUHttpServer
from verl_dvpo.platforms.cpu.vllm_worker import CPUWorkerExtension


@pytest.fixture
def sockets(monkeypatch):
    """The sender's and the receiver's socket in the first job of a cluster whose GCS is at a port."""

    def as_verl_names_it(self):
        self.zmq_handle = f"ipc:///tmp/rl-colocate-zmq-{ray.get_runtime_context().get_job_id()}-replica-0-rank-0.sock"

    def as_verl_tells_it(self):
        os.environ["VERL_RAY_JOB_ID"] = ray.get_runtime_context().get_job_id()

    monkeypatch.setattr(ServerAdapter, "__init__", as_verl_names_it)
    monkeypatch.setattr(vLLMHttpServer, "__init__", as_verl_tells_it)
    for name in ("VERL_RAY_JOB_ID", "VERL_REPLICA_RANK", "VERL_ZMQ_BASE_TRAINER_RANK"):
        monkeypatch.delenv(name, raising=False)

    def at(port: int) -> tuple[str, str]:
        context = SimpleNamespace(get_job_id=lambda: "01000000", gcs_address=f"10.0.0.1:{port}")
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        VLLMCPUHttpServer()
        worker = object.__new__(CPUWorkerExtension)
        vars(worker).update(model_runner=None, local_rank=0)
        return CPUServerAdapter().zmq_handle, worker._get_zmq_handle()

    return at


def test_two_clusters_side_by_side_do_not_meet_at_one_socket(sockets):
    first, second = sockets(40001), sockets(40002)
    assert first[0] == first[1]
    assert second[0] == second[1]
    assert first[0] != second[0]
    assert first[0] == f"ipc://{tempfile.gettempdir()}/w-01000000-40001-0-0.sock"  # removed with the run's files
    assert all(len(handle.removeprefix("ipc://")) < 108 for handle in (*first, *second))  # a Unix socket's limit
