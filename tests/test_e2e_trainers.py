# SPDX-License-Identifier: Apache-2.0
"""verl's asynchronous trainers and a run on two nodes, on one Ray of two nodes of this machine.

Nothing is replaced: what runs here is what a user runs, on a model of a few layers that has learned nothing.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from omegaconf import OmegaConf
from ray._private import state as ray_state
from ray.cluster_utils import Cluster
from test_configs import compose_config
from test_e2e import steps

from verl_dvpo.cli import main as command
from verl_dvpo.saved.values import Answer, dump_files, read_dump

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("two_nodes")]  # one process has what they share

#: Sampler and trainer are compared in every step, and the values of a few answers written.
WATCHED = ("algorithm.rollout_correction.bypass_mode=false", "critic.value.dump_every=1")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert command(["demo-data", "--out", str(folder), "--tiny"]) == 0
    return folder


@pytest.fixture(scope="module", autouse=True)
def _two_nodes() -> Iterator[None]:
    """Two nodes with one device each, so that neither can hold a run of two."""
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    config = compose_config("dvpo_trainer", "platform=cpu")
    settings = OmegaConf.to_container(config.ray_kwargs.ray_init, resolve=True)
    runtime_env = get_ppo_ray_runtime_env(config)
    runtime_env["env_vars"] |= settings["runtime_env"]["env_vars"] | {"TRANSFER_QUEUE_ENABLE": "1"}
    runtime_env["env_vars"]["VERL_DVPO_CPU_THREADS"] = "1"
    runtime_env["env_vars"]["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    node = {"num_cpus": 16, "num_gpus": 1, "object_store_memory": 200_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    ray.init(address=cluster.address, runtime_env=runtime_env)
    yield
    ray.shutdown()
    cluster.shutdown()


def nodes_of(kind: str) -> set[str]:
    """The nodes on which actors of a class ran in this module's last run."""
    rows = ray_state.actors().values()
    last = max(row["StartTime"] for row in rows if "TaskRunner" in row["ActorClassName"])
    return {row["Address"]["NodeID"] for row in rows if kind in row["ActorClassName"] and row["StartTime"] >= last}


def lambda_returns(answer: Answer, gamma: float, lam: float) -> np.ndarray:
    """(T,) from the answer's own values and rewards, by the definition."""
    places = np.flatnonzero(answer.mask)
    values, rewards = answer.values[places].astype(float), answer.rewards[places].astype(float)
    returns = np.zeros(len(answer.ids))
    after = following = 0.0
    for place, value, reward in zip(places[::-1], values[::-1], rewards[::-1], strict=True):
        after = reward + gamma * ((1 - lam) * following + lam * after)
        following, returns[place] = value, after
    return returns


def check_kept(folder: Path, count: int) -> None:
    """The trainer's λ-returns, from values that it fetched, are those of what the critic's worker kept."""
    dumps = [read_dump(file) for file in dump_files(folder)]
    assert len(dumps) == count
    for dump in dumps:
        assert len(dump.answers) >= 2
        for answer in dump.answers:
            expected = lambda_returns(answer, dump.facts["gamma"], dump.facts["settings"]["algorithm.lam"])
            np.testing.assert_allclose(answer.returns[answer.mask], expected[answer.mask], atol=1e-6)
            assert np.ptp(answer.values[answer.mask]) > 0


@pytest.mark.long
def test_two_nodes_learn_together(demo, tmp_path):
    _, *records = steps(demo, tmp_path, "algorithm=dvpo", "trainer.nnodes=2", *WATCHED)
    assert [record["training/global_step"] for record in records] == [1, 2]
    assert len(nodes_of("WorkerDict")) == len(nodes_of("HttpServer")) == 2
    for record in records:
        assert record["training/rollout_probs_diff_max"] < 1e-5  # the servers of both nodes got the weights
        assert record["critic/inferred_again"] == 0
        assert record["actor/grad_norm"] >= 0
        assert record["critic/grad_norm"] > 0
    check_kept(tmp_path, 2)


@pytest.mark.long
def test_answers_that_an_update_interrupts_are_learned_from_whole(demo, tmp_path):
    """Few answers at once, so that some are being written when enough are done. The policy does not move: its
    versions agree, and an answer that two of them wrote has the probabilities of one.
    """
    few = ["actor_rollout_ref.rollout.max_num_seqs=2", "actor_rollout_ref.actor.optim.lr=0"]
    count = ["trainer.total_training_steps=3", "trainer.test_freq=3"]
    _, *records = steps(demo, tmp_path, "algorithm=dvpo", "trainer_mode=colocate_async", *few, *count, *WATCHED)
    assert [record["training/global_step"] for record in records] == [1, 2, 3]
    assert max(record["training/off_policy/trajectory_spans/max"] for record in records) >= 2
    assert [record["critic/staleness/max"] for record in records] == [0, 1, 1]
    for record in records:
        assert record["training/rollout_probs_diff_max"] < 1e-5
        assert record["critic/inferred_again"] == 0
        assert record["critic/grad_norm"] > 0
    check_kept(tmp_path, 3)


def test_servers_apart_get_the_weights_of_a_policy_that_moves(demo, tmp_path):
    """Two updates between transfers, nothing prefetched: all answers of a step come from the policy that began it.

    Old log-probabilities are that policy's after its first update too, so both agree with the sampler; the policy moves
    so far in an update that another's would not.
    """
    moving = ["actor_rollout_ref.actor.optim.lr=1e-2", "actor_rollout_ref.actor.ppo_mini_batch_size=4"]
    apart = [
        "trainer_mode=separate_async",
        "trainer.v1.separate_async.parameter_sync_step=2",
        "trainer.v1.separate_async.num_warmup_batches=0",
    ]
    _, *records = steps(demo, tmp_path, "algorithm=dvpo", *apart, *moving, *WATCHED)
    assert [record["training/global_step"] for record in records] == [1, 2]
    assert len(nodes_of("WorkerDict") | nodes_of("HttpServer")) == 2
    for record in records:
        assert record["training/rollout_probs_diff_max"] < 1e-4
        assert record["critic/staleness/max"] == record["critic/inferred_again"] == 0
        assert record["critic/grad_norm"] > 0
    assert abs(records[1]["actor/entropy"] - records[0]["actor/entropy"]) > 0.01
    check_kept(tmp_path, 2)
