# SPDX-License-Identifier: Apache-2.0
"""What platform=cpu does faster than verl gives what verl gives."""

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.utils import seqlen_balancing, tensordict_utils

from verl_dvpo.platforms.cpu import agent_loops, patches
from verl_dvpo.platforms.cpu.agent_loops import (
    GatheredQueue,
    GatheredServer,
    Gatherer,
    InProcess,
    has_one_server,
    make_agent_loop,
)


def test_log_probs_equal_verls_row_by_row():
    log_probs = patches.whole_batch_log_probs(None)
    torch.manual_seed(0)
    for shape in ((7, 11), (3, 5, 11), (0, 11)):
        logits = (30 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        labels = torch.randint(0, 11, shape[:-1])
        mine = log_probs(logits, labels)
        expected = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
        if len(labels):
            # verl's own; this process may have it replaced already
            rows = torch.stack([torch.logsumexp(row, -1) for row in logits])
            torch.testing.assert_close(mine, logits.gather(-1, labels[..., None])[..., 0] - rows)
        (slope,) = torch.autograd.grad(mine.sum(), logits)
        (reference,) = torch.autograd.grad(expected.sum(), logits)
        torch.testing.assert_close(slope, reference, rtol=1e-10, atol=1e-12)


def test_one_partition_is_what_karmarkar_karp_finds():
    original = getattr(seqlen_balancing.get_seqlen_balanced_partitions, "__wrapped__", None)
    original = original or seqlen_balancing.get_seqlen_balanced_partitions
    partitions = patches.skip_single_partitions(original)
    lengths = torch.randint(1, 100, (37,), generator=torch.Generator().manual_seed(0)).tolist()
    for parts, equal in ((1, True), (1, False), (3, False)):
        assert partitions(lengths, parts, equal) == original(lengths, parts, equal)


def test_what_comes_together_is_written_together_and_in_order():
    written = []

    async def write(group, items):
        written.append((group, items))

    async def run():
        gatherer = Gatherer(write, wait=0.02)
        await asyncio.gather(*(gatherer.put(i % 2, i) for i in range(6)))
        await gatherer.put(0, 99)  # after all of it
        assert not gatherer._waiting
        assert not gatherer._writers

    asyncio.run(run())
    assert sorted(written[:2]) == [(0, [0, 2, 4]), (1, [1, 3, 5])]
    assert written[2:] == [(0, [99])]


def test_a_caller_goes_on_only_when_its_own_item_is_written():
    written = []

    async def run():
        writing, allowed = asyncio.Event(), asyncio.Event()

        async def write(group, items):
            writing.set()
            await allowed.wait()
            written.extend(items)

        gatherer = Gatherer(write, wait=0.0)
        first = asyncio.create_task(gatherer.put("a", 1))
        await writing.wait()
        late = asyncio.create_task(gatherer.put("a", 2))  # while the first is being written
        await asyncio.sleep(0.02)
        assert not first.done()
        assert not late.done()
        allowed.set()
        await asyncio.gather(first, late)

    asyncio.run(run())
    assert written == [1, 2]


def test_a_failed_write_fails_its_callers_and_no_later_ones():
    async def write(group, items):
        if "bad" in items:
            raise OSError("storage is full")

    async def run():
        gatherer = Gatherer(write, wait=0.01)
        results = await asyncio.gather(gatherer.put(0, "bad"), gatherer.put(0, "with it"), return_exceptions=True)
        assert [str(result) for result in results] == ["storage is full"] * 2
        await gatherer.put(0, "later")

    asyncio.run(run())


class FakeServer:
    """Answers each request with its prompt reversed; a prompt that begins with 0 fails."""

    def __init__(self):
        self.calls = []
        self.generate_many = InProcess(self._generate_many)

    async def _generate_many(self, requests):
        self.calls.append([request["prompt_ids"] for request in requests])
        await asyncio.sleep(0.05 if len(requests) > 1 else 0.0)
        return [
            ValueError("no") if request["prompt_ids"][0] == 0 else list(reversed(request["prompt_ids"]))
            for request in requests
        ]


def test_requests_go_together_and_each_caller_gets_its_own_answer_or_error():
    server = FakeServer()
    gathered = GatheredServer(server)

    async def main():
        prompts = [[1, 2], [0, 3], [4, 5]]
        return await asyncio.gather(
            *(gathered.generate.remote(prompt_ids=prompt) for prompt in prompts), return_exceptions=True
        )

    first, failed, third = asyncio.run(main())
    assert (first, third) == ([2, 1], [5, 4])
    assert isinstance(failed, ValueError)
    assert server.calls == [[[1, 2], [0, 3], [4, 5]]]


def test_a_later_request_does_not_wait_for_earlier_answers():
    gathered = GatheredServer(FakeServer())
    ended = []

    async def ask(prompt, after):
        await asyncio.sleep(after)
        await gathered.generate.remote(prompt_ids=prompt)
        ended.append(prompt)

    async def main():
        await asyncio.gather(ask([1], 0.0), ask([2], 0.0), ask([3], 0.02))

    asyncio.run(main())
    assert ended[0] == [3]


def test_rows_arrive_as_verl_would_have_put_them_one_by_one():
    """Ragged rows, rows with other fields, and two partitions."""
    calls, statuses = [], []

    async def batch_put(keys, partition_id, fields=None, tags=None):
        (calls if fields is not None else statuses).append((partition_id, keys, fields, tags))

    queue = GatheredQueue(
        SimpleNamespace(async_kv_batch_put=batch_put, other="kept"), tensordict_utils.list_of_dict_to_tensordict
    )
    rows = [
        {"ids": torch.arange(3), "text": "a"},
        {"ids": torch.arange(5), "text": "b"},
        {"ids": torch.arange(4), "text": "c", "score": torch.ones(4)},
    ]

    async def run():
        puts = [queue.async_kv_batch_put([f"k{i}"], [row], [{"n": i}], "train") for i, row in enumerate(rows)]
        puts.append(queue.async_kv_batch_put(["v"], [rows[0]], [{"n": 9}], "val"))
        await asyncio.gather(*puts, *(queue.async_kv_put(f"p{i}", "train", {"status": "running"}) for i in range(2)))

    asyncio.run(run())
    assert queue.other == "kept"
    assert statuses == [("train", ["p0", "p1"], None, [{"status": "running"}] * 2)]
    found = {(where, tuple(keys)): (fields, tags) for where, keys, fields, tags in calls}
    assert set(found) == {("train", ("k0", "k1")), ("train", ("k2",)), ("val", ("v",))}
    fields, tags = found["train", ("k0", "k1")]
    assert [row.tolist() for row in fields["ids"].unbind()] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert list(fields["text"]) == ["a", "b"]
    assert tags == [{"n": 0}, {"n": 1}]


def test_a_reward_sees_the_fields_of_its_own_answer(monkeypatch):
    """The answers to a prompt share the row; verl's manager writes each one's fields into it, and scores later."""

    def compute_score(data_source, solution_str, ground_truth, extra_info):
        time.sleep(0.01)
        return float(extra_info["answer"])

    async def ask(count: int) -> list[float]:
        manager = NaiveRewardManager(None, SimpleNamespace(decode=lambda *_, **__: ""), compute_score)
        monkeypatch.setattr(
            agent_loops, "RewardLoopWorker", lambda config: SimpleNamespace(compute_score=manager.run_single)
        )
        rewards = agent_loops.InProcessReward(None)
        row = {"data_source": "any", "reward_model": {"ground_truth": "1"}, "extra_info": {"index": 3}}

        def sample(answer: int) -> DataProto:
            return DataProto.from_dict(
                tensors={"responses": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 4).long()},
                non_tensors={
                    **{name: np.array([value]) for name, value in row.items()},
                    "tool_extra_fields": np.array([{"answer": answer}], dtype=object),
                },
            )

        found = await asyncio.gather(*(rewards.compute_score.remote(sample(i)) for i in range(count)))
        assert row["extra_info"] == {"index": 3}
        return [each["reward_score"] for each in found]

    assert asyncio.run(ask(8)) == list(range(8))


class Loop:
    def __init__(self, **kwargs):
        self.kwargs = kwargs


def test_registered_loops_are_called_and_configured_ones_go_through_hydra():
    name = f"{Loop.__module__}.{Loop.__qualname__}"
    tools = SimpleNamespace(tools=[1])
    plain = make_agent_loop({"_target_": name}, tools=tools)
    assert type(plain) is Loop
    assert plain.kwargs["tools"] is tools
    named = make_agent_loop(OmegaConf.create({"name": "mine", "_target_": name}), tools=tools)
    assert type(named) is Loop
    assert named.kwargs == {"name": "mine", "tools": tools}
    assert named.kwargs["tools"] is tools
    configured = make_agent_loop(OmegaConf.create({"_target_": name, "depth": 3}), tools=tools)
    assert type(configured) is Loop
    assert configured.kwargs["depth"] == 3


@pytest.mark.parametrize(
    ("nodes", "gpus", "tensor", "expected"), [(1, 1, 1, True), (1, 2, 2, True), (1, 2, 1, False), (2, 1, 1, False)]
)
def test_one_server_is_recognised(nodes, gpus, tensor, expected):
    config = OmegaConf.create(
        {
            "trainer": {"nnodes": nodes, "n_gpus_per_node": gpus},
            "actor_rollout_ref": {"rollout": {"tensor_model_parallel_size": tensor, "data_parallel_size": 1}},
        }
    )
    assert has_one_server(config) is expected
