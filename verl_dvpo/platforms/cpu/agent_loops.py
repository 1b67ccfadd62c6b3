# SPDX-License-Identifier: Apache-2.0
"""``agent_loop_manager_class`` of ``platform=cpu``: less Python per sample, and answers that repeat.

Around a small model on a small machine verl's Python costs more than the generation. In verl:

- each sample is written to TransferQueue by itself, and each prompt's status twice. Here, what is to be written within
  a few milliseconds is written together; a caller still goes on only when its own sample is stored.
- each sample is sent to a reward worker and back. Here the same reward manager scores in this process, unless a reward
  model is served elsewhere.
- each sample's agent loop is made by Hydra from a merged configuration. Here a registered class, whose configuration
  is its name and nothing else, is called.
- each sample asks an actor for a server and tells it when done. Here that is asked once, where there is one server,
  and requests of a few milliseconds go to the server together.
- vLLM's server turns tokens to text and hands over each token as it comes. Here it hands over whole answers, as tokens.

verl draws all samples from one stream of random numbers, in the order in which requests happen to arrive, or, with
``rollout.full_determinism``, gives all requests one seed, those of one prompt included. Here each request has a seed of
its own, a function of ``rollout.seed``, the step, the row of the data, the number of the answer, and the tokens before
it. vLLM's CPU engine gives a request the same tokens and probabilities whatever else is in its batch, so a sample can
be drawn again.
"""

import asyncio
import copy
import dataclasses
import hashlib
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable
from types import SimpleNamespace
from typing import Any

import hydra
import ray
from verl.experimental.reward_loop import RewardLoopWorker
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient

from verl_dvpo.compat.apply import apply_in_this_process
from verl_dvpo.compat.entry import Moment

#: Seconds that a write waits for company.
WAIT = 0.005


class Gatherer:
    """Collects items of one event loop and hands them over in lists.

    Args:
        write: takes a group and its items; returns nothing, or a result for each item. What it raises, every waiting
            caller of that list gets; a result that is an exception is raised for its own caller.
        wait: seconds between the first item and the writing of it and all that came since.
        in_turn: writes one list of a group at a time; otherwise a list does not wait for the one before it.
    """

    def __init__(
        self, write: Callable[[Any, list[Any]], Awaitable[Any]], wait: float = WAIT, *, in_turn: bool = True
    ) -> None:
        self._write = write
        self._wait = wait
        self._in_turn = in_turn
        self._waiting: defaultdict[Hashable, list[tuple[Any, asyncio.Future[Any]]]] = defaultdict(list)
        self._writers: dict[Hashable, asyncio.Task[None]] = {}

    async def put(self, group: Hashable, item: Any) -> Any:
        """Returns the item's result when it is written."""
        done = asyncio.get_running_loop().create_future()
        self._waiting[group].append((item, done))
        if group not in self._writers:
            self._writers[group] = asyncio.create_task(self._drain(group))
        return await done

    async def _drain(self, group: Hashable) -> None:
        await asyncio.sleep(self._wait)
        if not self._in_turn:
            del self._writers[group]  # what comes from now on makes a list of its own
            await self._hand_over(group, self._waiting.pop(group, []))
            return
        while taken := self._waiting.pop(group, []):
            await self._hand_over(group, taken)
        del self._writers[group]

    async def _hand_over(self, group: Hashable, taken: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        try:
            results = await self._write(group, [item for item, _ in taken]) or [None] * len(taken)
        except Exception as error:
            results = [error] * len(taken)
        for result, (_, done) in zip(results, taken, strict=True):
            if done.done():
                continue
            if isinstance(result, BaseException):
                done.set_exception(result)
            else:
                done.set_result(result)


class GatheredQueue:
    """Stands for the module ``transfer_queue`` where verl's agent loops write to it."""

    def __init__(self, queue: Any, to_tensordict: Callable[[list[dict[str, Any]]], Any]) -> None:
        self._queue = queue
        self._to_tensordict = to_tensordict
        self._samples = Gatherer(self._write_samples)
        self._statuses = Gatherer(self._write_statuses)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    async def async_kv_batch_put(
        self, keys: list[str], fields: list[dict[str, Any]], tags: list[dict[str, Any]], partition_id: str
    ) -> None:
        """Stores rows, given as dictionaries; those with the same fields are written together."""
        for key, row, tag in zip(keys, fields, tags, strict=True):
            await self._samples.put((partition_id, frozenset(row)), (key, row, tag))

    async def async_kv_put(self, key: str, partition_id: str, tag: dict[str, Any]) -> None:
        """Stores a tag; those of one partition are written together."""
        await self._statuses.put(partition_id, (key, tag))

    async def _write_samples(self, group: tuple[str, frozenset[str]], items: list[Any]) -> None:
        keys, rows, tags = zip(*items, strict=True)
        await self._queue.async_kv_batch_put(
            keys=list(keys), fields=self._to_tensordict(list(rows)), tags=list(tags), partition_id=group[0]
        )

    async def _write_statuses(self, partition_id: str, items: list[Any]) -> None:
        keys, tags = zip(*items, strict=True)
        await self._queue.async_kv_batch_put(keys=list(keys), tags=list(tags), partition_id=partition_id)


class InProcess:
    """Stands for a Ray actor's method: ``remote`` returns the coroutine itself."""

    def __init__(self, method: Callable[..., Awaitable[Any]]) -> None:
        self.remote = method


class InProcessReward:
    """Stands for the handle of a reward worker.

    Each call gets a copy of its sample, as one does that is sent away: verl's managers write into ``extra_info``, and
    the answers to a prompt share the row's.
    """

    def __init__(self, config: Any) -> None:
        self._worker = RewardLoopWorker(config)
        self.compute_score = InProcess(self._compute_score)

    async def _compute_score(self, data: Any) -> Any:
        own = dataclasses.replace(data, non_tensor_batch=copy.deepcopy(data.non_tensor_batch))
        return await self._worker.compute_score(own)


def gather_writes(queue: Any) -> GatheredQueue:
    """Puts a `GatheredQueue` before the module ``transfer_queue``."""
    return GatheredQueue(queue, list_of_dict_to_tensordict)


def keep_rows(original: Callable[..., Any]) -> Callable[..., list[Any]]:
    """Keeps rows as dictionaries until they are written."""

    def rows(fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(fields)

    return rows


def direct_hydra(original: Any) -> Any:
    """Stands for the module ``hydra`` where verl makes an agent loop."""
    return SimpleNamespace(utils=SimpleNamespace(instantiate=make_agent_loop))


def make_agent_loop(config: Any, **kwargs: Any) -> Any:
    """Does what ``hydra.utils.instantiate`` does; without Hydra if the configuration only names a class and itself.

    An entry of the file in ``agent.agent_loop_config_path`` has a ``name``, which the class gets as an argument.
    """
    if "_target_" in config and set(config) <= {"_target_", "name"}:
        own = {key: value for key, value in config.items() if key != "_target_"}
        return hydra.utils.get_class(config["_target_"])(**own, **kwargs)
    return hydra.utils.instantiate(config=config, **kwargs)


def derived_seed(*parts: object) -> int:
    """Derives a seed in [0, 2^48), equal in every process for parts of equal ``repr``."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest(), "little")


class SeededClient(LLMServerClient):
    """Derives the seed of each request from the one in the sampling parameters, so that turns draw apart."""

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any
    ) -> Any:
        if (seed := sampling_params.get("seed")) is not None:
            sampling_params = {**sampling_params, "seed": derived_seed(seed, list(prompt_ids))}
        return await super().generate(request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs)


class GatheredServer:
    """Stands for the handle of `VLLMCPUHttpServer`: sends it requests of a few milliseconds together."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._requests = Gatherer(self._send, in_turn=False)
        self.generate = InProcess(self._generate)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    async def _generate(self, **request: Any) -> Any:
        return await self._requests.put(None, request)

    async def _send(self, group: None, requests: list[dict[str, Any]]) -> list[Any]:
        return await self._server.generate_many.remote(requests)


class OneServerClient(SeededClient):
    """Asks for the server once, where there is only one."""

    _server: tuple[str, Any] | None = None

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        if self._server is None:
            name, server = await super()._acquire_server(request_id, **extra)
            self._server = name, GatheredServer(server)
        return self._server

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        pass


class SeededAsyncClient(FullyAsyncLLMServerClient, SeededClient):
    """Derives a seed for what is left of an answer that an update has interrupted, too."""


def has_one_server(config: Any) -> bool:
    """Tells whether all training processes together make one rollout server."""
    rollout = config.actor_rollout_ref.rollout
    world = config.trainer.nnodes * config.trainer.n_gpus_per_node
    parts = [rollout.get(f"{name}_parallel_size") or 1 for name in ("tensor_model", "data", "pipeline_model")]
    return bool(world == math.prod(parts))


class CPUAgentLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):  # type: ignore[name-defined]
    """Adds to verl's worker what the module's head says; runs in a process of its own, in which verl is changed."""

    config: Any
    llm_client: Any
    reward_loop_worker_handles: list[Any] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        apply_in_this_process(Moment.AGENT_LOOP_WORKER)
        if self.reward_loop_worker_handles is not None and not self.config.reward.reward_model.enable:
            self.reward_loop_worker_handles = [InProcessReward(self.config)]
        self.choose_client()

    def choose_client(self) -> None:
        """Puts a client of ours in the place of verl's; one of the user's own stays."""
        if type(self.llm_client) is LLMServerClient:
            self.llm_client.__class__ = OneServerClient if has_one_server(self.config) else SeededClient
        elif type(self.llm_client) is FullyAsyncLLMServerClient:
            self.llm_client.__class__ = SeededAsyncClient

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        rollout = self.config.actor_rollout_ref.rollout
        place = [trajectory[part] for part in ("step", "validate", "sample_index")]
        seed = derived_seed(rollout.seed, *map(str, place), kwargs["session_id"])
        return await super()._run_agent_loop({**sampling_params, "seed": seed}, trajectory, **kwargs)


class CPUAgentLoopManager(AgentLoopManagerTQ):
    """Starts `CPUAgentLoopWorker` where verl's manager starts verl's worker."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(CPUAgentLoopWorker)
